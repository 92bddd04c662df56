"""Wrong first attempts are answered with what to do.

Everything happens in a temporary folder, on the demonstration model. An answer is at most three lines, names what is
wrong, and says what to do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from lindep_onnx import cli

MODELS = Path(__file__).parents[2] / "models"


@dataclass(frozen=True)
class Attempt:
    """A command, and words that its answer must hold: what was found, and what to do.

    Attributes:
        mistake: what is wrong with it.
        command: arguments, with spaces between.
        wanted: parts of the answer.
    """

    mistake: str
    command: str
    wanted: Sequence[str]


ATTEMPTS = (
    Attempt("nothing at all", "", ("IN.onnx", "--help")),
    Attempt(
        "a typing error in the file", "dmeo.onnx small.onnx --calib calib.npz", ("no such model file", "demo.onnx")
    ),
    Attempt("a PyTorch checkpoint", "model.pt small.onnx --calib calib.npz", ("model.pt", "export it to ONNX")),
    Attempt("no data", "demo.onnx small.onnx", ("--calib DATA", "--proven-only")),
    Attempt("data in place of the output", "demo.onnx calib.npz", ("calib.npz", "--calib")),
    Attempt("no output", "demo.onnx --calib calib.npz", ("OUT.onnx is missing", "--dry-run")),
    Attempt("the model as its own output", "demo.onnx demo.onnx --calib calib.npz", ("demo.onnx", "name another file")),
    Attempt(
        "a folder that is not there", "demo.onnx out/small.onnx --calib calib.npz", ("does not exist", "create it")
    ),
    Attempt(
        "data that is not there", "demo.onnx small.onnx --calib data.npz", ("data.npz", "no such calibration data")
    ),
    Attempt(
        "an option of another tool", "demo.onnx small.onnx --calib calib.npz --sparsity 0.5", ("--sparsity", "--help")
    ),
    Attempt("an underscore", "demo.onnx small.onnx --calib calib.npz --max_error 0.1", ("--max_error", "--max-error")),
    Attempt("percent", "demo.onnx small.onnx --calib calib.npz --params 50", ("--params", "above 0 and at most 1")),
    Attempt("a percent sign", "demo.onnx small.onnx --calib calib.npz --params 50%", ("--params", "'50%'", "0.5")),
    Attempt(
        "what nothing can reach",
        "demo.onnx small.onnx --calib calib.npz --params 0.00001 --max-samples 64",
        ("ask for at least",),
    ),
    Attempt("recovery without a budget", "demo.onnx small.onnx --calib calib.npz --recover 100", ("--params 0.5",)),
    Attempt("a report as text", "demo.onnx small.onnx --calib calib.npz --report r.txt", (".json or .html",)),
    Attempt(
        "a provider that is not there",
        "demo.onnx small.onnx --calib calib.npz --providers TensorrtExecutionProvider",
        ("TensorrtExecutionProvider", "CPUExecutionProvider"),
    ),
    Attempt(
        "arrays of another name", "demo.onnx small.onnx --calib named.npz", ("'image'", "'images'", "Name the arrays")
    ),
    Attempt("bytes in place of floats", "demo.onnx small.onnx --calib bytes.npy", ("wants float32", "uint8", "Scale")),
    Attempt("channels last", "demo.onnx small.onnx --calib last.npy", ("[samples, 1, 28, 28]", "numpy.moveaxis")),
    Attempt(
        "one sample without its axis",
        "demo.onnx small.onnx --calib one.npy",
        ("[samples, 1, 28, 28]", "Add a leading axis"),
    ),
    Attempt("pickled objects", "demo.onnx small.onnx --calib objects.npy", ("pickled", "save plain numbers")),
    Attempt("a table", "demo.onnx small.onnx --calib data.csv", (".npz, .npy, a folder", "FILE.py:FUNC")),
    Attempt(
        "a loader of pairs", "demo.onnx small.onnx --calib loader.py:pairs", ("a tuple, not a dict", "make it yield")
    ),
    Attempt(
        "a function of another name", "demo.onnx small.onnx --calib loader.py:load", ("no function 'load'", "'pairs'")
    ),
    Attempt("a mean of pixels", "demo.onnx small.onnx --calib photos --mean 127.5", ("--mean", "--scale 1")),
    Attempt("a mean with spaces", "demo.onnx small.onnx --calib photos --mean 0.5 0.5 0.5", ("commas", "--mean")),
    Attempt("a size that does not fit", "demo.onnx small.onnx --calib photos --image-size 224", ("224x224", "drop")),
    Attempt(
        "options for images without any", "demo.onnx small.onnx --calib calib.npz --std 0.5", ("folders of images",)
    ),
    Attempt("images for a model of any size", "free.onnx small.onnx --calib photos", ("any size", "--image-size")),
    Attempt("random tokens", "tokens.onnx small.onnx --random-calib 50", ("int64", "--input-range ids=LO:HI")),
    Attempt(
        "quality judged on noise", "demo.onnx small.onnx --random-calib 50 --max-error 0.1", ("--max-error", "--calib")
    ),
    Attempt(
        "a plan of something else",
        "demo.onnx small.onnx --calib calib.npz --plan report.json",
        ("report.json", "no plan"),
    ),
)


@dataclass(frozen=True)
class Answer:
    """What a command said.

    Attributes:
        code: exit code.
        lines: on standard error.
    """

    code: int
    lines: Sequence[str]

    def misses(self, attempt: Attempt) -> Sequence[str]:
        """What is wrong with it."""
        text = " ".join(self.lines)
        found = [f"lacks {part!r}" for part in attempt.wanted if part not in text]
        found += ["has the exit code 0"] * (self.code == 0) + ["is longer than 3 lines"] * (len(self.lines) > 3)
        return found + ["is a fault"] * ("unexpected" in text or "Traceback" in text)


def prepared(folder: Path) -> None:
    """What the commands name."""
    shutil.copy(MODELS / "demo.onnx", folder / "demo.onnx")
    shutil.copy(MODELS / "calib.npz", folder / "calib.npz")
    with np.load(MODELS / "calib.npz") as data:
        (name,) = data.files
        values = data[name][:40]
    np.savez(folder / "named.npz", images=values)
    np.save(folder / "bytes.npy", np.zeros(values.shape, np.uint8))
    np.save(folder / "last.npy", np.moveaxis(values, 1, -1))
    np.save(folder / "one.npy", values[0])
    np.save(folder / "objects.npy", np.array([{"x": 1}], dtype=object), allow_pickle=True)
    (folder / "data.csv").write_text("1,2,3\n")
    (folder / "model.pt").write_bytes(b"PK\x03\x04 archive/data.pkl")
    (folder / "report.json").write_text('{"before": {}, "after": {}}\n')
    (folder / "loader.py").write_text("import numpy as np\ndef pairs():\n    yield np.zeros((1, 3)), 1\n")
    (folder / "photos").mkdir()
    # A picture without Pillow: the portable pixmap is a header and the pixels.
    (folder / "photos" / "a.ppm").write_bytes(b"P6 20 20 255\n" + bytes(range(200)) * 6)
    rng = np.random.default_rng(0)
    for name, node, kind, shape, weight in (
        ("free", "Conv", TensorProto.FLOAT, ["N", 3, "H", "W"], rng.normal(size=(4, 3, 1, 1))),
        ("tokens", "Gather", TensorProto.INT64, ["N", 8], rng.normal(size=(30, 4))),
    ):
        value = helper.make_tensor_value_info("ids" if kind == TensorProto.INT64 else "image", kind, shape)
        inputs = ["w", value.name] if node == "Gather" else [value.name, "w"]
        graph = helper.make_graph(
            [helper.make_node(node, inputs, ["y"])], name, [value], [helper.make_empty_tensor_value_info("y")],
            [onnx.numpy_helper.from_array(weight.astype(np.float32), "w")],
        )  # fmt: skip
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.save(onnx.shape_inference.infer_shapes(model), folder / f"{name}.onnx")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("attempts")
    prepared(made)
    return made


def answer_to(attempt: Attempt, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Answer:
    monkeypatch.chdir(folder)
    errors = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        code = cli.main(attempt.command.split())
    return Answer(code, errors.getvalue().splitlines())


@pytest.mark.parametrize("attempt", ATTEMPTS, ids=lambda attempt: attempt.mistake)
def test_a_mistake_is_answered_in_three_lines_with_what_to_do(
    attempt: Attempt, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = answer_to(attempt, folder, monkeypatch)
    assert not answer.misses(attempt), answer.lines


def test_a_bad_answer_is_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt = ATTEMPTS[1]
    good = answer_to(attempt, folder, monkeypatch)
    assert len(ATTEMPTS) >= 20 and not good.misses(attempt)
    for bad in (
        {"code": 0},
        {"lines": ()},
        {"lines": (*good.lines, "", "", "")},
        {"lines": (*good.lines, "unexpected")},
    ):
        assert dataclasses.replace(good, **bad).misses(attempt)

"""The command line: what it writes, what it says, and what it leaves alone when something is wrong."""

from __future__ import annotations

import json
import os
import pickle
import re
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from build import build, run

from lindep_onnx import files, pipeline
from lindep_onnx.cli import main
from lindep_onnx.data.inputs import InputSpec
from lindep_onnx.data.samples import open_samples
from lindep_onnx.data.split import Part
from lindep_onnx.model import ir as graph
from lindep_onnx.model.edit import METADATA_KEY
from lindep_onnx.options import DataOptions
from lindep_onnx.planning import judge

ROOT = Path(__file__).parents[2]
#: Channels of the model below that are copies of others.
COPIES = 9
WIDTH = 40


def planted() -> onnx.ModelProto:
    """x (N, 6) -> 40 channels, 9 of them copies -> 12, in names that tell where they come from."""
    rng = np.random.default_rng(0)
    w, b = rng.normal(size=(6, WIDTH)).astype(np.float32), rng.normal(size=WIDTH).astype(np.float32)
    w[:, :COPIES], b[:COPIES] = 2 * w[:, 10 : 10 + COPIES], 2 * b[10 : 10 + COPIES]
    weights = {"w": w, "b": b, "v": (WIDTH, 12)}
    return build("h = Gemm(x, w, b)\nr = Relu(h)\ny = Gemm(r, v)", weights, x=("N", 6))


def samples(count: int = 300) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(count, 6)).astype(np.float32)


@dataclass(frozen=True)
class Run:
    code: int
    out: str
    err: str


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a model and data that fit; temporary files go to a folder of its own."""
    (tmp_path / "work").mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    onnx.save(planted(), "in.onnx")
    np.savez("data.npz", x=samples())
    return tmp_path / "work"


@pytest.fixture
def cli(folder: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Run]:
    def call(*arguments: str | Path) -> Run:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Run(code, captured.out, captured.err)

    return call


GOOD = ("in.onnx", "out.onnx", "--calib", "data.npz")


def content(folder: Path) -> dict[str, bytes | None]:
    """Everything in a folder, hidden files included."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def width(path: str | Path) -> int:
    return graph.load(path).stored["w"].shape[1]


def assert_one_clear_message(run: Run, code: int, match: str) -> None:
    assert run.code == code, run.err
    assert re.search(match, run.err, re.DOTALL), run.err
    lines = run.err.rstrip("\n").split("\n")
    assert 1 <= len(lines) <= 3 and all(line.strip() for line in lines)
    assert lines[0].startswith("lindep-onnx: ") and run.err.count("lindep-onnx: ") == 1
    assert "Traceback" not in run.err and "usage:" not in run.err.lower()


# ------------------------------------------------------------------------------------------------------------ bad input


@dataclass(frozen=True)
class Bad:
    """A mistake: what is prepared, the arguments, and what has to come of it."""

    name: str
    match: str
    arguments: tuple[str, ...] = GOOD
    prepare: Callable[[Path], object] = lambda folder: None
    code: int = 1


def data(**arrays: np.ndarray) -> Callable[[Path], object]:
    return lambda folder: np.savez(folder / "data.npz", **arrays)


def with_value(value: float) -> np.ndarray:
    changed = samples()
    changed[17, 2] = value
    return changed


def cut(name: str, share: float) -> Callable[[Path], object]:
    def prepare(folder: Path) -> None:
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: int(len(whole) * share)])

    return prepare


def text(name: str, value: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(value, encoding="utf-8")


class Bomb:
    def __reduce__(self) -> tuple[object, ...]:
        return open, ("trap", "w")


def pickled(folder: Path) -> None:
    np.savez(folder / "data.npz", x=np.array([Bomb()], dtype=object))


def plain_pickle(folder: Path) -> None:
    (folder / "data.npz").write_bytes(pickle.dumps(Bomb()))


def without(what: str) -> Callable[[Path], object]:
    def prepare(folder: Path) -> None:
        model = planted()
        if what == "node":
            del model.graph.node[1]
        elif what == "initializer":
            del model.graph.initializer[0]
        else:
            model.ClearField(what)
        onnx.save(model, folder / "in.onnx")

    return prepare


def lost_weights(folder: Path) -> None:
    onnx.save(planted(), folder / "in.onnx", save_as_external_data=True, location="weights", size_threshold=0)
    (folder / "weights").unlink()


def linked(make: Callable[[Path, Path], object]) -> Callable[[Path], object]:
    return lambda folder: make(folder / "out.onnx", folder / "in.onnx")


BAD = [
    # the model
    Bad("missing model", "missing.onnx: no such model file", ("missing.onnx", *GOOD[1:])),
    Bad("model is a folder", "temporary: is not a file", ("../temporary", *GOOD[1:])),
    Bad("model is text", "in.onnx: is not a.* ONNX model", prepare=text("in.onnx", "hello")),
    Bad("model is empty", "in.onnx: is not an ONNX model", prepare=text("in.onnx", "")),
    Bad("model is the data", "data.npz: is not a.* ONNX model", ("data.npz", *GOOD[1:])),
    Bad("model is JSON", "model.json: is not a.* ONNX model", ("model.json", *GOOD[1:]), text("model.json", "{}")),
    *[Bad(f"model cut at {s}", "in.onnx: is not a.* ONNX model", prepare=cut("in.onnx", s)) for s in (0.1, 0.5, 0.99)],
    *[
        Bad(f"model without {field}", "in.onnx: ", prepare=without(field))
        for field in ("graph", "ir_version", "opset_import")
    ],
    Bad("model without a node", "in.onnx: .*reads 'h'|in.onnx: .*reads 'r'", prepare=without("node")),
    Bad("model without a weight", "reads 'w'", prepare=without("initializer")),
    Bad("lost external data", "in.onnx: its external data cannot be read", prepare=lost_weights),
    # the data
    Bad("missing data", "nothing.npz: no such calibration data", (*GOOD[:3], "nothing.npz")),
    Bad("other input name", "no array for the model input 'x'.*the arrays 'y'", prepare=data(y=samples())),
    Bad("superfluous array", "no input 'z'", prepare=data(x=samples(), z=samples())),
    Bad(
        "other width", r"wants arrays of shape \[samples, 6\], this one is \[300, 5\]", prepare=data(x=samples()[:, :5])
    ),
    Bad("other rank", r"this one is \[300, 6, 1\]", prepare=data(x=samples()[..., None])),
    Bad("integers", "'x' wants float32, the array is int64", prepare=data(x=np.ones((30, 6), np.int64))),
    Bad("strings", "'x' wants float32", prepare=data(x=np.full((30, 6), "1.0"))),
    *[
        Bad(f"{value} in the data", r"NaN or infinite.*sample 17", prepare=data(x=with_value(value)))
        for value in (np.nan, np.inf)
    ],
    Bad(
        "activations that overflow",
        "Tensor 'r' becomes NaN or infinite",
        prepare=data(x=np.float32(3e38) * np.sign(samples())),
    ),
    Bad("pickled array", "pickled Python objects, which are never loaded", prepare=pickled),
    Bad("plain pickle", "data.npz: is not a readable", prepare=plain_pickle),
    *[Bad(f"data cut at {s}", "data.npz: is not a readable", prepare=cut("data.npz", s)) for s in (0.1, 0.5, 0.99)],
    Bad("no samples", "holds no samples", prepare=data(x=samples(0))),
    Bad("no arrays", "there is no array in it", prepare=data()),
    Bad(
        "empty folder of data", "empty: holds neither", (*GOOD[:3], "empty"), lambda folder: (folder / "empty").mkdir()
    ),
    Bad(
        "data is a text file",
        "is .npz, .npy, a folder or FILE.py:FUNC",
        (*GOOD[:3], "data.csv"),
        text("data.csv", "1,2"),
    ),
    Bad(
        "function that fails",
        "failed after 0.*out of coffee",
        (*GOOD[:3], "source.py:feeds"),
        text("source.py", "def feeds():\n    raise RuntimeError('out of coffee\\n' * 9)\n"),
    ),
    Bad("missing function", "--calib", (*GOOD[:3], "source.py:feeds"), text("source.py", ""), code=2),
    Bad("no data", "Calibration data is missing: give --calib DATA", GOOD[:2], code=2),
    # the output
    Bad("missing output", "OUT.onnx is missing", ("in.onnx", "--calib", "data.npz"), code=2),
    Bad(
        "output is the input",
        "out.onnx|in.onnx: is the input model",
        ("in.onnx", "in.onnx", "--calib", "data.npz"),
        code=2,
    ),
    Bad("output is the input by another path", "is the input model", ("in.onnx", "../work/in.onnx", *GOOD[2:]), code=2),
    Bad(
        "output is a hard link to the input",
        "is the input model",
        prepare=linked(lambda out, model: out.hardlink_to(model)),
        code=2,
    ),
    Bad(
        "output is a symbolic link to the input",
        "is the input model",
        prepare=linked(lambda out, model: out.symlink_to(model)),
        code=2,
    ),
    Bad("output is the data", "data.npz: is .*the calibration data", ("in.onnx", "data.npz", *GOOD[2:]), code=2),
    Bad(
        "report is the output",
        "o.json: is .*the other output",
        ("in.onnx", "o.json", *GOOD[2:], "--report", "o.json"),
        code=2,
    ),
    Bad(
        "report is the input",
        "in.json: is the input",
        ("in.json", "o.onnx", *GOOD[2:], "--report", "in.json"),
        text("in.json", "x"),
        code=2,
    ),
    Bad("output is a folder", "temporary: is a directory", ("in.onnx", "../temporary", *GOOD[2:])),
    Bad("missing output folder", "the folder .*nowhere.* does not exist", ("in.onnx", "nowhere/out.onnx", *GOOD[2:])),
    Bad("output folder is a file", "in.onnx/out.onnx", ("in.onnx", "in.onnx/out.onnx", *GOOD[2:])),
    Bad("missing report folder", "nowhere", (*GOOD, "--report", "nowhere/r.json")),
    Bad("report of another kind", "written as .json or .html", (*GOOD, "--report", "r.txt"), code=2),
    *[
        Bad(f"NUL in {what}", "cannot be looked up .it holds a NUL", arguments, code=2)
        for what, arguments in {
            "the model": ("in\0.onnx", *GOOD[1:]),
            "the output": ("in.onnx", "out\0.onnx", *GOOD[2:]),
            "the stress data": (*GOOD, "--stress", "\0"),
        }.items()
    ],
    # the options
    Bad("no arguments", "The following arguments are required: IN.onnx", (), code=2),
    Bad("unknown option", "nrecognized arguments: --prune", (*GOOD, "--prune"), code=2),
    Bad("shortened option", "nrecognized arguments", (*GOOD, "--max-sam", "4"), code=2),
    Bad("superfluous argument", "nrecognized arguments: more", (*GOOD, "more"), code=2),
    Bad("option without its value", "--max-samples: expected one argument", (*GOOD, "--max-samples"), code=2),
    Bad("unknown provider", "--providers: 'Abacus' is not available", (*GOOD, "--providers", "Abacus"), code=2),
    Bad("half an evaluation", "--eval and --max-drop belong together", (*GOOD, "--max-drop", "0.1"), code=2),
    Bad("missing evaluation", "--eval takes FILE.py:FUNC", (*GOOD, "--eval", "no.py:f", "--max-drop", "0"), code=2),
    Bad("proven only with a budget", "takes no budget", (*GOOD, "--proven-only", "--params", "0.5"), code=2),
    *[
        Bad(f"{option} {value}", option, (*GOOD, option, value), code=2)
        for option, values in {
            "--max-samples": ("0", "-3", "many", "1.5"),
            "--batch-size": ("0", "x"),
            "--holdout": ("0", "1", "nan", "-0.1", "half"),
            "--seed": ("x", "1.5", "-1"),
            "--max-error": ("-1", "nan", "small"),
            "--min-agreement": ("1.1", "-0.1", "nan"),
            "--params": ("0", "1.5", "nan", "50%"),
            "--macs": ("0",),
            "--size": ("-1",),
            "--min-channels": ("0", "x"),
            "--round-to": ("0", "x", "-8"),
            "--threads": ("-1", "x"),
            "--refit": ("best",),
            "--input-range": ("1", "1:0", "x=a:b", "nan:1", "z=0:1"),
        }.items()
        for value in values
    ],
]


@pytest.mark.parametrize("bad", BAD, ids=[bad.name for bad in BAD])
def test_a_mistake_gives_one_short_message_and_leaves_everything_as_it_was(
    bad: Bad, folder: Path, cli: Callable
) -> None:
    bad.prepare(folder)
    before = content(folder.parent)
    found = cli(*bad.arguments)
    assert_one_clear_message(found, bad.code, bad.match)
    assert found.out == ""
    assert content(folder.parent) == before


def test_the_same_without_the_mistake_works(folder: Path, cli: Callable) -> None:
    before = content(folder.parent)
    found = cli(*GOOD)
    assert (found.code, found.err) == (0, "")
    after = content(folder.parent)
    assert after.keys() - before.keys() == {"work/out.onnx"}
    assert all(after[name] == before[name] for name in before)


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission_is_refused_before_the_work(folder: Path, cli: Callable) -> None:
    (folder / "locked").mkdir(mode=0o555)
    assert_one_clear_message(cli("in.onnx", "locked/out.onnx", *GOOD[2:]), 1, "cannot be written")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder in which nobody can create files")
def test_a_folder_that_takes_no_files_is_an_output_error(cli: Callable) -> None:
    assert_one_clear_message(cli("in.onnx", "/proc/out.onnx", *GOOD[2:]), 1, "/proc/out.onnx: .*cannot be written")


@pytest.mark.parametrize("options", [(), ("--save-as-external-data",)])
def test_a_disk_that_fills_up_leaves_the_old_output_and_nothing_else(
    options: tuple[str, ...], folder: Path, cli: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "out.onnx").write_bytes(b"old")
    before = content(folder.parent)

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "flush", full)
    assert_one_clear_message(cli(*GOOD, *options), 1, "out.onnx: cannot be written .No space left on device")
    assert content(folder.parent) == before


@pytest.mark.parametrize(
    ("error", "match"),
    [
        (MemoryError(), "out of memory; use fewer samples"),
        (KeyboardInterrupt(), "interrupted"),
        (ZeroDivisionError("a\nb\nc\nd"), "unexpected ZeroDivisionError: a.*--debug"),
    ],
)
def test_what_nobody_expected_is_one_message_too(
    error: BaseException, match: str, cli: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(pipeline, "run", fails)
    assert_one_clear_message(cli(*GOOD), 1, match)


@pytest.mark.parametrize("arguments", [(*GOOD[:3], "nothing.npz"), (*GOOD, "--holdout", "2")])
def test_debug_shows_the_traceback_and_keeps_the_exit_code(arguments: tuple[str, ...], cli: Callable) -> None:
    plain, debugged = cli(*arguments), cli(*arguments, "--debug")
    assert "Traceback (most recent call last)" in debugged.err and "Traceback" not in plain.err
    assert plain.code == debugged.code != 0
    assert plain.err.removeprefix("lindep-onnx: ").strip() in debugged.err


# ------------------------------------------------------------------------------------------------------------ good input


def test_copies_go_and_the_output_stays(folder: Path, cli: Callable) -> None:
    found = cli(*GOOD)
    assert found.code == 0
    assert f"{COPIES} of {WIDTH} removable channels went" in found.out and "Verification passed" in found.out
    assert width("out.onnx") == WIDTH - COPIES
    original, smaller = onnx.load("in.onnx"), onnx.load("out.onnx")
    onnx.checker.check_model(smaller, full_check=True)
    fresh = np.random.default_rng(9).normal(size=(500, 6)).astype(np.float32)
    expected = run(original, {"x": fresh})[0]
    np.testing.assert_allclose(run(smaller, {"x": fresh})[0], expected, atol=1e-5 * np.abs(expected).max())


def test_the_module_runs_as_a_program(folder: Path) -> None:
    command = [sys.executable, "-m", "lindep_onnx"]
    options = {"capture_output": True, "text": True, "env": {**os.environ, "PYTHONPATH": str(ROOT)}}
    good = subprocess.run([*command, *GOOD], **options)
    assert (good.returncode, good.stderr) == (0, "")
    assert width("out.onnx") == WIDTH - COPIES
    bad = subprocess.run([*command, *GOOD, "--holdout", "2"], **options)
    assert_one_clear_message(Run(bad.returncode, bad.stdout, bad.stderr), 2, "--holdout")


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_are_no_errors(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([option])
    assert caught.value.code == 0 and "lindep-onnx" in capsys.readouterr().out


def test_quiet_says_nothing_and_does_the_same(folder: Path, cli: Callable) -> None:
    loud = cli(*GOOD)
    quiet = cli("in.onnx", "quiet.onnx", *GOOD[2:], "-q")
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "") and loud.out
    assert (folder / "quiet.onnx").read_bytes() == (folder / "out.onnx").read_bytes()


def test_a_dry_run_reports_and_writes_no_model(folder: Path, cli: Callable) -> None:
    before = content(folder.parent)
    for arguments in (("in.onnx", *GOOD[2:]), GOOD):
        found = cli(*arguments, "--dry-run", "--report", "r.json")
        assert found.code == 0 and f"{COPIES} of {WIDTH}" in found.out
        assert json.loads((folder / "r.json").read_text())["after"]["channels"] == WIDTH - COPIES + 12
        (folder / "r.json").unlink()
        assert content(folder.parent) == before


COUNTS = {"parameters", "macs", "bytes", "channels", "latency_ms"}
STABLE = {"before", "after", "verification", "groups", "refusals", "budget", "seconds", "versions"}


def test_the_json_report_has_the_keys_that_scripts_rely_on(folder: Path, cli: Callable) -> None:
    assert cli(*GOOD, "--report", "r.json").code == 0
    report = json.loads((folder / "r.json").read_text())
    assert report.keys() >= STABLE
    for side in ("before", "after"):
        assert report[side].keys() >= COUNTS and all(report[side][key] > 0 for key in COUNTS)
    assert report["verification"].keys() >= {
        "samples",
        "relative_error",
        "max_abs_error",
        "agreement",
        "passed",
        "data",
    }
    assert report["verification"]["passed"] is True and report["verification"]["relative_error"] < 1e-5
    (group,) = report["groups"]
    assert group.keys() >= {"name", "channels_before", "channels_after", "error", "proven", "sites"}
    assert (group["channels_before"], group["channels_after"]) == (WIDTH, WIDTH - COPIES)
    assert report["refusals"] and all(
        entry.keys() >= {"reason", "nodes", "channels", "message"} for entry in report["refusals"]
    )
    assert report["budget"] == []
    (layer, *_) = report["layer_times"]
    assert layer.keys() == {"name", "op", "before_ms", "after_ms"} and layer["before_ms"] > 0
    assert report["seconds"] and all(seconds >= 0 for seconds in report["seconds"].values())
    assert (
        report["versions"]["onnx"] == onnx.__version__ and report["versions"]["onnxruntime"] == onnxruntime.__version__
    )


def test_the_counts_of_the_report_are_those_of_the_files(folder: Path, cli: Callable) -> None:
    assert cli(*GOOD, "--report", "r.json").code == 0
    report = json.loads((folder / "r.json").read_text())
    for side, path, channels in (("before", "in.onnx", WIDTH), ("after", "out.onnx", WIDTH - COPIES)):
        weights = [onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer]
        assert report[side]["parameters"] == sum(weight.size for weight in weights if weight.size > 1)
        assert report[side]["macs"] == channels * (6 + 12) and report[side]["channels"] == channels + 12
    assert report["before"]["bytes"] > report["after"]["bytes"]


@pytest.mark.parametrize("suffix", ["json", "html"])
def test_a_report_is_written_beside_the_model(suffix: str, folder: Path, cli: Callable) -> None:
    before = content(folder.parent)
    assert cli(*GOOD, "--report", f"r.{suffix}").code == 0
    assert content(folder.parent).keys() - before.keys() == {"work/out.onnx", f"work/r.{suffix}"}
    assert (folder / f"r.{suffix}").stat().st_size > 500


def test_an_existing_output_is_replaced_in_one_step(folder: Path, cli: Callable) -> None:
    (folder / "out.onnx").write_bytes(b"old")
    with (folder / "out.onnx").open("rb") as reader:  # whoever reads meanwhile sees the old file to its end
        assert cli(*GOOD).code == 0
        assert reader.read() == b"old"
    assert width("out.onnx") == WIDTH - COPIES


def test_the_output_is_as_readable_as_any_new_file(folder: Path, cli: Callable) -> None:
    (folder / "other").write_bytes(b"")
    assert cli(*GOOD, "--save-as-external-data", "--report", "r.json").code == 0
    modes = {stat.S_IMODE((folder / name).stat().st_mode) for name in ("other", "out.onnx", "out.onnx.data", "r.json")}
    assert len(modes) == 1


def test_two_runs_give_the_same_bytes(folder: Path, cli: Callable) -> None:
    for name in ("a", "b"):
        assert cli("in.onnx", f"{name}.onnx", *GOOD[2:], "--report", f"{name}.json").code == 0
    assert (folder / "a.onnx").read_bytes() == (folder / "b.onnx").read_bytes()
    a, b = (json.loads((folder / f"{name}.json").read_text()) for name in "ab")
    assert a["verification"] == b["verification"] and a["groups"] == b["groups"]


def test_a_second_run_removes_nothing_more(folder: Path, cli: Callable) -> None:
    assert cli(*GOOD).code == 0
    assert cli("out.onnx", "again.onnx", *GOOD[2:]).code == 0
    first, again = onnx.load("out.onnx"), onnx.load("again.onnx")
    assert again.graph.SerializeToString(deterministic=True) == first.graph.SerializeToString(deterministic=True)
    assert [entry.key for entry in again.metadata_props] == [METADATA_KEY]


def test_a_model_without_anything_to_remove_is_written_with_our_entry_and_nothing_else(
    folder: Path, cli: Callable
) -> None:
    model = build("h = Gemm(x, w)\nr = Relu(h)\ny = Gemm(r, v)", {"w": (6, 9), "v": (9, 5)}, x=("N", 6))
    onnx.save(model, "in.onnx")
    found = cli(*GOOD)
    assert found.code == 0
    result = onnx.load("out.onnx")
    assert [entry.key for entry in result.metadata_props] == [METADATA_KEY]
    del result.metadata_props[:]
    assert result == onnx.load("in.onnx")


# --------------------------------------------------------------------------------------------------------- external data


def test_external_data_goes_beside_the_output_and_is_complete(folder: Path, cli: Callable) -> None:
    assert cli(*GOOD).code == 0
    assert cli("in.onnx", "big.onnx", *GOOD[2:], "--save-as-external-data").code == 0
    names = {path.name for path in folder.iterdir()}
    assert names == {"in.onnx", "data.npz", "out.onnx", "big.onnx", "big.onnx.data"}
    assert (folder / "big.onnx").stat().st_size < (folder / "out.onnx").stat().st_size
    inputs = {"x": samples(5)}
    expected = run(onnx.load("out.onnx"), inputs)[0]
    session = onnxruntime.InferenceSession("big.onnx", providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(None, inputs)[0], expected)


def test_without_large_weights_there_is_no_external_file(folder: Path, cli: Callable) -> None:
    model = build("h = Gemm(x, w)\nr = Relu(h)\ny = Gemm(r, v)", {"w": (6, 9), "v": (9, 5)}, x=("N", 6))
    onnx.save(model, "in.onnx")
    assert cli(*GOOD, "--save-as-external-data").code == 0
    assert {path.name for path in folder.iterdir()} == {"in.onnx", "data.npz", "out.onnx"}


def test_external_data_is_replaced_and_not_appended_to(folder: Path, cli: Callable) -> None:
    arguments = (*GOOD, "--save-as-external-data")
    assert cli(*arguments).code == 0
    first = content(folder)
    assert cli(*arguments).code == 0
    assert content(folder) == first and "out.onnx.data" in first


def test_a_model_with_external_data_is_read_and_left_alone(folder: Path, cli: Callable) -> None:
    onnx.save(planted(), "in.onnx", save_as_external_data=True, location="weights", size_threshold=0)
    before = content(folder)
    assert cli(*GOOD).code == 0
    assert {name: value for name, value in content(folder).items() if name != "out.onnx"} == before
    assert width("out.onnx") == WIDTH - COPIES


def test_external_data_never_replaces_the_weights_of_the_input(folder: Path, cli: Callable) -> None:
    onnx.save(planted(), "in.onnx", save_as_external_data=True, location="out.onnx.data", size_threshold=0)
    before = content(folder)
    for _ in range(2):
        assert cli(*GOOD, "--save-as-external-data").code == 0
        after = content(folder)
        assert after.keys() - before.keys() == {"out.onnx", "out.onnx.1.data"}
        assert all(after[name] == before[name] for name in before)
    assert width("out.onnx") == WIDTH - COPIES


# ------------------------------------------------------------------------------------------------------- what is kept


def annotated() -> onnx.ModelProto:
    model = onnx.shape_inference.infer_shapes(planted())
    model.ir_version, model.producer_name, model.producer_version = 9, "trainer", "3.1"
    model.domain, model.model_version, model.doc_string = "example.org", 42, "what it is for"
    model.metadata_props.add(key="labels", value="a,b,c")
    model.graph.name, model.graph.doc_string = "classifier", "a graph"
    model.graph.metadata_props.add(key="graph", value="kept")
    for number, node in enumerate(model.graph.node):
        node.doc_string = f"node {number}"
        node.metadata_props.add(key="layer", value=str(number))
    for value in (*model.graph.input, *model.graph.output):
        value.doc_string = f"the {value.name} of it"
    for tensor in model.graph.initializer:
        tensor.doc_string = f"trained {tensor.name}"
        tensor.metadata_props.add(key="run", value=tensor.name)
    model.opset_import.add(domain="ai.onnx.ml", version=3)
    return model


def test_everything_around_the_weights_is_kept(folder: Path, cli: Callable) -> None:
    original = annotated()
    onnx.save(original, "in.onnx")
    assert cli(*GOOD).code == 0
    result = onnx.load("out.onnx")
    assert width("out.onnx") == WIDTH - COPIES
    for field in (
        "ir_version",
        "opset_import",
        "producer_name",
        "producer_version",
        "domain",
        "model_version",
        "doc_string",
    ):
        assert getattr(result, field) == getattr(original, field), field
    for field in ("name", "doc_string", "metadata_props", "input", "output", "node"):
        assert getattr(result.graph, field) == getattr(original.graph, field), field
    assert result.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "N"
    assert [(t.name, t.doc_string, t.metadata_props) for t in result.graph.initializer] == [
        (t.name, t.doc_string, t.metadata_props) for t in original.graph.initializer
    ]
    entries = {entry.key: entry.value for entry in result.metadata_props}
    assert entries.keys() == {"labels", METADATA_KEY} and entries["labels"] == "a,b,c"


def test_recorded_shapes_follow_the_channels(folder: Path, cli: Callable) -> None:
    onnx.save(annotated(), "in.onnx")
    assert cli(*GOOD).code == 0
    shapes = {value.name: value.type.tensor_type.shape.dim for value in onnx.load("out.onnx").graph.value_info}
    assert shapes["h"][1].dim_value == shapes["r"][1].dim_value == WIDTH - COPIES
    assert shapes["h"][0].dim_param == "N"


@pytest.mark.parametrize("opset", [11, 13, 21])
def test_the_opset_is_kept(opset: int, folder: Path, cli: Callable) -> None:
    model = planted()
    model.opset_import[0].version = opset
    onnx.save(model, "in.onnx")
    assert cli(*GOOD).code == 0
    assert onnx.load("out.onnx").opset_import == model.opset_import and width("out.onnx") == WIDTH - COPIES


def test_the_metadata_entry_tells_the_options_that_were_given(folder: Path, cli: Callable) -> None:
    assert cli(*GOOD, "--seed", "5", "--max-samples", "200").code == 0
    entry = next(entry.value for entry in onnx.load("out.onnx").metadata_props if entry.key == METADATA_KEY)
    assert json.loads(entry)["options"] == {"seed": 5, "max_samples": 200}


def test_a_node_whose_first_output_is_absent_is_kept_as_it_is(folder: Path, cli: Callable) -> None:
    w = planted().graph.initializer[0]
    weights = {
        "w": onnx.numpy_helper.to_array(w),
        "v": (WIDTH, 5),
        "a": np.array([0]),
        "k": (1, 16, 5),
        "q": (1, 16, 4),
    }
    body = "h = Gemm(x, w)\nr = Relu(h)\ng = Gemm(r, v)\nu = Unsqueeze(g, a)\nz, n = LSTM<hidden_size=4>(u, k, q)\ny = Squeeze(n, a)"
    model = build(body, weights, x=("N", 6))
    lstm = next(node for node in model.graph.node if node.op_type == "LSTM")
    lstm.output[0] = ""
    onnx.save(model, "in.onnx")
    assert cli(*GOOD).code == 0
    assert width("out.onnx") == WIDTH - COPIES
    assert next(node for node in onnx.load("out.onnx").graph.node if node.op_type == "LSTM") == lstm


# -------------------------------------------------------------------------------------------------- verification fails


@pytest.fixture
def treacherous(folder: Path) -> Path:
    """Two channels that are copies on every sample but one, which is among those that only verify."""
    model, data = planted(), samples()
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor).copy() for tensor in model.graph.initializer}
    weights["w"][5, 0] += 5.0
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weights["w"], "w"))
    data[:, 5] = 0
    inputs = [InputSpec("x", np.dtype(np.float32), ("N", 6))]
    with open_samples({"x": data}, inputs, DataOptions(batch_size=16)) as opened:
        data[opened.parts[Part.VERIFY][3], 5] = 10.0
    onnx.save(model, "in.onnx")
    np.savez("data.npz", x=data)
    return folder


def test_what_unseen_samples_turn_down_stays(treacherous: Path, cli: Callable) -> None:
    found = cli(*GOOD)
    assert found.code == 0 and "Held-out samples turned down" in found.out
    assert width("out.onnx") == WIDTH - COPIES + 1


@pytest.fixture
def strict(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bound that nothing meets, not even what the weights prove."""
    monkeypatch.setattr(judge, "LOSSLESS_VERIFIED_ERROR", -1.0)
    monkeypatch.setattr(judge, "OUTPUT_ROUNDINGS", -1.0)
    return folder


def test_failed_verification_writes_the_report_and_no_model(strict: Path, cli: Callable) -> None:
    before = content(strict.parent)
    found = cli(*GOOD, "--report", "r.json")
    assert_one_clear_message(found, 3, "differs from the original by .*data")
    after = content(strict.parent)
    assert after.keys() - before.keys() == {"work/r.json"} and all(after[name] == before[name] for name in before)
    assert json.loads((strict / "r.json").read_text())["verification"]["passed"] is False


def test_failed_verification_leaves_an_existing_output(strict: Path, cli: Callable) -> None:
    (strict / "out.onnx").write_bytes(b"old")
    assert cli(*GOOD).code == 3
    assert (strict / "out.onnx").read_bytes() == b"old"


def test_force_writes_the_model_and_still_says_three(treacherous: Path, cli: Callable) -> None:
    assert cli(*GOOD, "--force", "--report", "r.json").code == 3
    assert width("out.onnx") < WIDTH
    assert json.loads((treacherous / "r.json").read_text())["verification"]["passed"] is False


def test_the_same_data_without_the_sample_passes(treacherous: Path, cli: Callable) -> None:
    with np.load("data.npz") as data:
        kept = data["x"][data["x"][:, 5] == 0]
    np.savez("data.npz", x=kept)
    assert cli(*GOOD).code == 0 and width("out.onnx") < WIDTH


# ------------------------------------------------------------------------------------------------------ stress data


@pytest.fixture
def shifted(folder: Path) -> Path:
    """A channel that is a copy as long as one input is zero, as it is in the calibration data but not in the field."""
    model = planted()
    w = onnx.numpy_helper.to_array(model.graph.initializer[0]).copy()
    w[5, 0] += 5.0
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(w, "w"))
    onnx.save(model, "in.onnx")
    calibration, field = samples(), samples(40)
    calibration[:, 5] = field[:, 5] = 0
    np.savez("data.npz", x=calibration)
    np.savez("same.npz", x=field)
    field[17, 5], field[23, 5] = 10.0, 3.0
    np.savez("field.npz", x=field)
    return folder


def test_stress_data_that_the_result_holds_on_is_reported(shifted: Path, cli: Callable) -> None:
    found = cli(*GOOD, "--stress", "same.npz", "--report", "r.json")
    assert found.code == 0 and "Stress test passed: " in found.out and " 40 stress samples" in found.out
    stress = json.loads((shifted / "r.json").read_text())["stress"]
    assert stress["passed"] is True and stress["samples"] == 40 and stress["relative_error"] < 1e-5


@pytest.mark.parametrize("budget", [(), ("--max-error", "1e-4")])
def test_a_result_that_fails_on_stress_data_is_not_written(budget: tuple, shifted: Path, cli: Callable) -> None:
    assert cli(*GOOD, *budget).code == 0
    (shifted / "out.onnx").write_bytes(b"old")
    found = cli(*GOOD, *budget, "--stress", "field.npz", "--report", "r.json")
    assert_one_clear_message(found, 3, "does not hold on the stress data: .*worst samples: 17, 23")
    assert (shifted / "out.onnx").read_bytes() == b"old"
    report = json.loads((shifted / "r.json").read_text())
    assert report["stress"]["passed"] is False and report["stress"]["worst_samples"][:2] == [17, 23]
    assert report["verification"]["passed"] is True


def test_agreement_is_asked_of_stress_data_too(shifted: Path, cli: Callable) -> None:
    np.savez("wild.npz", x=samples(400) * np.float32([1, 1, 1, 1, 1, 30]))
    found = cli(*GOOD, "--channels", "0.4", "--min-agreement", "0.6", "--stress", "wild.npz", "--report", "r.json")
    assert_one_clear_message(found, 3, "--min-agreement 0.6 does not hold on the stress data")
    assert not (shifted / "out.onnx").exists()


def test_failed_stress_is_in_the_page_and_force_writes_all_the_same(shifted: Path, cli: Callable) -> None:
    assert cli(*GOOD, "--stress", "field.npz", "--force", "--report", "r.html").code == 3
    assert "STRESS TEST FAILED" in (shifted / "r.html").read_text(encoding="utf-8") and width("out.onnx") < WIDTH


def test_stress_data_that_does_not_fit_is_one_message(folder: Path, cli: Callable) -> None:
    assert_one_clear_message(cli(*GOOD, "--stress", "no.npz"), 1, "no.npz: no such calibration data")
    assert_one_clear_message(cli("in.onnx", "s.npz", *GOOD[2:], "--stress", "s.npz"), 2, "s.npz: is .* name another")

"""Sources that need no preparation: functions, classes and readers in the conventions of other tools, random inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from build import build
from onnxruntime.quantization import CalibrationDataReader

import lindep_onnx
from lindep_onnx import cli
from lindep_onnx.data.inputs import InputSpec
from lindep_onnx.data.samples import open_samples
from lindep_onnx.data.sources import RandomInputs
from lindep_onnx.errors import CalibrationError, UsageError
from lindep_onnx.options import Config, DataOptions

X = InputSpec("x", np.dtype(np.float32), ("N", 3))
VALUES = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)


def fed(source: Any, *inputs: InputSpec, **options: Any) -> dict[str, np.ndarray]:
    with open_samples(source, inputs or (X,), DataOptions(batch_size=4, **options)) as samples:
        batches = list(samples.batches())
    return {
        name: np.concatenate([np.atleast_1d(b.feeds[name])[: len(b.samples)] for b in batches])
        for name in batches[0].feeds
    }


class ConsumerNode(CalibrationDataReader):
    """What `onnxruntime.quantization` calls a data reader."""

    def __init__(self, rows: np.ndarray = VALUES) -> None:
        self.rows = iter(rows)

    def get_next(self) -> dict[str, np.ndarray] | None:
        row = next(self.rows, None)
        return None if row is None else {"x": row[None]}


@pytest.mark.parametrize(
    "source",
    [
        ConsumerNode(),
        VALUES,
        {"x": VALUES},
        [VALUES[:5], VALUES[5:]],
        ({"x": row[None]} for row in VALUES),
        list(VALUES[:, None]),
    ],
    ids=["onnxruntime reader", "array", "dict", "list of arrays", "generator of dicts", "list of rows"],
)
def test_objects_of_other_tools_are_sources(source: Any) -> None:
    np.testing.assert_array_equal(fed(source)["x"], VALUES)


CODE = """
import numpy as np
from values import VALUES
def load_data():  # polygraphy
    for row in VALUES:
        yield {"x": row[None]}
def array():  # modelopt
    return VALUES
def mapping():
    return {"x": VALUES}
class Reader:  # onnxruntime
    def __init__(self, repeat=1):
        self.rows = iter(VALUES)
    def get_next(self):
        row = next(self.rows, None)
        return None if row is None else {"x": row[None]}
reader = Reader()
listed = [{"x": VALUES}]
def needs(path, size): pass
def exhausted(): return iter(())
number = 3
"""


@pytest.fixture
def script(tmp_path: Path) -> str:
    (tmp_path / "values.py").write_text(f"import numpy as np\nVALUES = np.array({VALUES.tolist()}, dtype=np.float32)\n")
    (tmp_path / "feeds.py").write_text(CODE)
    return str(tmp_path / "feeds.py")


@pytest.mark.parametrize("name", ["", ":load_data", ":array", ":mapping", ":Reader", ":reader", ":listed"])
def test_a_file_may_name_a_function_a_class_or_an_object(name: str, script: str) -> None:
    np.testing.assert_array_equal(fed(script + name)["x"], VALUES)


@pytest.mark.parametrize(
    ("name", "kind", "match"),
    [
        (":needs", UsageError, r"needs the argument\(s\) path, size"),
        (":number", UsageError, "is of type int; name a function"),
        (":missing", UsageError, "has no function 'missing'. It has 'load_data'"),
        (":exhausted", CalibrationError, "yields nothing"),
        (":no name", UsageError, "takes FILE.py:FUNC"),
    ],
)
def test_what_cannot_be_called_is_refused_by_name(name: str, kind: type, match: str, script: str) -> None:
    with pytest.raises(kind, match=match):
        fed(script + name)


def test_a_reader_that_was_read_is_told_to_be_rewound() -> None:
    reader = ConsumerNode()
    fed(reader)
    with pytest.raises(CalibrationError, match="rewound"):
        fed(reader)


def test_shards_are_read_in_sorted_order_whatever_the_folder_says(tmp_path: Path) -> None:
    for number in (2, 0, 1):
        np.save(tmp_path / f"shard_{number}.npy", VALUES[4 * number : 4 * number + 4])
    np.testing.assert_array_equal(fed(tmp_path)["x"], VALUES)


# ---- random inputs ------------------------------------------------------------------------------------------------


def test_random_inputs_follow_the_declared_types_shapes_and_ranges() -> None:
    inputs = (
        InputSpec("x", np.dtype(np.float32), ("N", 400)),
        InputSpec("ids", np.dtype(np.int64), ("N", 7), (3.0, 9.0)),
        InputSpec("image", np.dtype(np.float32), ("N", 30), (0.0, 1.0)),
        InputSpec("mask", np.dtype(np.bool_), ("N", 20)),
    )
    found = fed(RandomInputs(20), *inputs)
    assert {name: (value.shape, value.dtype) for name, value in found.items()} == {
        "x": ((20, 400), np.float32), "ids": ((20, 7), np.int64), "image": ((20, 30), np.float32), "mask": ((20, 20), bool)
    }  # fmt: skip
    assert abs(found["x"].std() - 1) < 0.05 and set(np.unique(found["ids"])) == set(range(3, 10))
    assert 0 <= found["image"].min() < 0.05 and 0.95 < found["image"].max() <= 1
    np.testing.assert_array_equal(found["x"], fed(RandomInputs(20), *inputs)["x"])
    assert (found["x"] != fed(RandomInputs(20), *inputs, seed=1)["x"]).any()


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        (InputSpec("ids", np.dtype(np.int64), ("N", 7)), r"--input-range ids=LO:HI"),
        (InputSpec("x", np.dtype(np.float32), ("N", 3, "H", "W")), r"leaves sizes open \(H, W\)"),
        (InputSpec("x", np.dtype(np.float32), None), "leaves sizes open"),
        (InputSpec("text", np.dtype(object), ("N",)), "nobody knows which values"),
    ],
)
def test_what_cannot_be_drawn_is_refused(spec: InputSpec, match: str) -> None:
    with pytest.raises(CalibrationError, match=match):
        fed(RandomInputs(5), spec)


def silent_on_noise() -> onnx.ModelProto:
    """Channels 0 and 1 are duplicates for every input; channel 2 is never awake on standard normal values."""
    w = np.random.default_rng(1).normal(size=(6, 3, 1, 1)).astype(np.float32)
    w[1] = w[0]
    b = np.float32([0, 0, -200, 0, 0, 0])
    return build(
        "h = Conv(x, w, b)\nr = Relu(h)\ny = Conv(r, v)", {"w": w, "b": b, "v": (4, 6, 1, 1)}, x=("N", 3, 6, 6)
    )


def test_nothing_that_random_inputs_merely_show_is_taken_for_redundant() -> None:
    result = lindep_onnx.compress(silent_on_noise(), random_calib=200)
    assert "WARNING: random inputs" in result.report.notes[0] and "random inputs" in result.report.verification.data
    (group,) = result.report.groups
    assert (group.removed, group.proven) == (1, 1)
    data = np.random.default_rng(2).normal(size=(200, 3, 6, 6)).astype(np.float32)
    real = lindep_onnx.compress(silent_on_noise(), data).report  # the negative control: as evidence, it would go
    assert real.groups[0].removed == 2 and not any("WARNING" in note for note in real.notes)


def test_a_size_may_be_asked_for_with_random_inputs_and_says_what_they_are() -> None:
    report = lindep_onnx.compress(silent_on_noise(), random_calib=50, params=0.5, round_to=1).report
    assert report.after.parameters <= 0.5 * report.before.parameters
    assert report.notes[0].startswith("WARNING: random inputs took the place")


@pytest.mark.parametrize(
    "options", [{"max_error": 0.1}, {"min_agreement": 0.9}, {"proven_only": True}, {"random_calib": 0}]
)
def test_random_inputs_judge_nothing(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"random|--random-calib must be at least 1"):
        Config(**{"random_calib": 10, **options})
    with pytest.raises(UsageError, match="takes the place of --calib"):
        lindep_onnx.compress(silent_on_noise(), VALUES, random_calib=10)


def test_the_warning_comes_first_and_last_in_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(silent_on_noise(), tmp_path / "m.onnx")
    command = [str(tmp_path / "m.onnx"), str(tmp_path / "o.onnx"), "--random-calib", "30"]
    assert cli.main(command) == 0
    told = capsys.readouterr()
    assert "WARNING: random inputs" in told.err and "WARNING: random inputs" in told.out
    assert cli.main([*command, "-q"]) == 0
    assert capsys.readouterr().err == ""

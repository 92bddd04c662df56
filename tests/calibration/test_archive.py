"""Moments that were saved: the same result without the calibration, and nothing of another model or data."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from build import build

import lindep_onnx
from lindep_onnx.calibration import archive, collect
from lindep_onnx.errors import CalibrationError, LindepError, UsageError
from lindep_onnx.model import ir as graph
from lindep_onnx.model.edit import GraphEdits, apply_edits
from lindep_onnx.model.weights import fingerprint
from lindep_onnx.moves import sensitivity as sensitivity

DATA = np.random.default_rng(0).normal(size=(80, 3, 6, 6)).astype(np.float32)


def net(seed: int = 3) -> onnx.ModelProto:
    w = np.random.default_rng(seed).normal(size=(12, 3, 3, 3)).astype(np.float32)
    w[1:6:2] = w[0:6:2]
    body = "h = Conv<pads=[1,1,1,1]>(x, w, b)\nr = Relu(h)\nl = Conv(r, k)\nt = Relu(l)\ny = Conv(t, v)"
    return build(
        body, {"w": w, "b": np.zeros(12, np.float32), "k": (10, 12, 1, 1), "v": (5, 10, 1, 1)}, x=("N", 3, 6, 6)
    )


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    lindep_onnx.compress(net(), DATA, params=0.8, save_moments=tmp_path / "moments")
    return tmp_path / "moments"


@pytest.mark.parametrize(
    "options", [{}, {"params": 0.8}, {"params": 0.7}, {"macs": 0.8}, {"max_error": 0.3, "refit": "fold"}]
)
def test_budgets_are_swept_without_calibration_and_come_to_the_same_bytes(
    options: dict[str, Any], saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = lindep_onnx.compress(net(), DATA, **options).model.SerializeToString()

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the data was run again")

    monkeypatch.setattr(collect, "measure", never)
    if "macs" not in options:  # another currency has other prices
        monkeypatch.setattr(sensitivity.PerturbationRunner, "error", never)
    found = lindep_onnx.compress(net(), DATA, load_moments=saved, **options)
    assert found.model.SerializeToString() == expected
    with pytest.raises(AssertionError, match="run again"):  # the negative control
        lindep_onnx.compress(net(), DATA, **options)


@pytest.mark.parametrize(
    ("seed", "data", "options", "match"),
    [
        (4, DATA, {}, "another model"),
        (3, DATA + 1, {}, "other calibration data"),
        (3, DATA[:79], {}, "other calibration data"),
        (3, DATA, {"holdout": 0.4}, "other calibration data, or split or fed otherwise"),
        (3, DATA, {"seed": 1}, "--seed"),
        (3, DATA, {"batch_size": 3}, "--batch-size"),
        (3, DATA, {"max_samples": 70}, "--max-samples"),
        (3, DATA, {"exclude": ("nothing",)}, "other options .*--exclude"),
        (3, DATA, {"min_channels": 2}, "--min-channels"),
        (3, DATA, {"input_range": {"x": (-9.0, 9.0)}}, "--input-range"),
    ],
)
def test_moments_of_something_else_are_refused_in_one_line(
    seed: int, data: np.ndarray, options: dict[str, Any], match: str, saved: Path
) -> None:
    with pytest.raises(CalibrationError, match=rf"moments: was made with .*{match}") as caught:
        lindep_onnx.compress(net(seed), data, load_moments=saved, **options)
    assert len(str(caught.value).splitlines()) == 1


def test_stages_save_and_load_moments_too(tmp_path: Path) -> None:
    with lindep_onnx.calibrate(lindep_onnx.trace(net()), DATA, save_moments=tmp_path / "m") as first:
        expected = lindep_onnx.plan(first, params=0.6)
    with lindep_onnx.calibrate(lindep_onnx.trace(net()), DATA, load_moments=tmp_path / "m") as second:
        assert lindep_onnx.plan(second, params=0.6) == expected


@pytest.mark.parametrize("options", [{"proven_only": True}, {"max_samples": 2}])
def test_there_is_nothing_to_save_where_nothing_is_calibrated(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--save-moments and --load-moments are about calibration"):
        lindep_onnx.compress(net(), DATA, save_moments=tmp_path / "m", **options)


def changed(path: Path, name: str, value: np.ndarray) -> None:
    with np.load(path) as data:
        arrays = dict(data)
    assert name in arrays
    arrays[name] = value
    with path.open("wb") as file:
        np.savez(file, **arrays)


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("beside.format", np.array(9), "this version"),
        ("beside.key", np.zeros(3), "another model"),
        ("beside.doubtful", np.zeros(3, bool), "do not agree"),
        ("beside.parameters.0.units", np.array([0, 0, 1]), "do not agree"),
        ("beside.parameters.0.cost", np.full(11, np.nan), "do not agree"),
        ("0.gram", np.full((12, 12), np.nan), "do not agree"),
        ("0.sum", np.zeros(5), "sizes of"),
        ("0.counts", np.array([1.0]), "not a readable file"),
    ],
)
def test_contents_that_do_not_agree_are_refused(name: str, value: np.ndarray, match: str, saved: Path) -> None:
    changed(saved, name, value)
    with pytest.raises(CalibrationError, match=match):
        lindep_onnx.compress(net(), DATA, load_moments=saved)


def test_a_compressed_file_is_refused_before_it_grows(saved: Path) -> None:
    with zipfile.ZipFile(saved.with_suffix(".zip"), "w", zipfile.ZIP_DEFLATED) as packed:
        buffer = io.BytesIO()
        np.save(buffer, np.zeros(1 << 24))
        packed.writestr("names.npy", buffer.getvalue())
    with pytest.raises(CalibrationError, match="it is compressed"):
        lindep_onnx.compress(net(), DATA, load_moments=saved.with_suffix(".zip"))


def test_changed_bytes_never_escape_as_another_error(saved: Path) -> None:
    whole, rng = saved.read_bytes(), np.random.default_rng(0)
    with lindep_onnx.calibrate(traced := lindep_onnx.trace(net()), DATA) as seen:
        key = archive.key(traced.structure, seen.samples, seen.config)
        for _ in range(300):
            broken = bytearray(whole)
            for place in rng.integers(0, len(whole), 3):
                broken[place] = rng.integers(256)
            saved.write_bytes(broken)
            try:
                archive.load(saved, traced.structure, seen.samples, key)
            except LindepError as error:
                assert len(str(error).splitlines()) == 1


def test_a_fingerprint_is_of_what_is_computed_and_stays_while_results_are_made() -> None:
    model = graph.load(build("c = Constant<value = float[1] {2.0}>()\nh = Conv(x, w)\nm = Mul(h, c)\ny = Conv(m, v)",
                             {"w": (6, 3, 1, 1), "v": (4, 6, 1, 1)}, x=("N", 3, 6, 6)))  # fmt: skip
    before, mark = model.proto.SerializeToString(), fingerprint(model.proto, None)
    made = apply_edits(model, GraphEdits(constants={"w": 2 * model.stored["w"]}), "").proto
    assert model.proto.SerializeToString() == before and fingerprint(model.proto, None) == mark
    assert fingerprint(made, None) != mark
    made = apply_edits(model, GraphEdits(), "a note").proto
    assert fingerprint(made, None) == mark

"""Whether the original runs on the data at all: batches that are baked in, samples that it cannot take."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from build import build, copied, run
from onnx import TensorProto, helper

import lindep_onnx
from lindep_onnx.cli import main
from lindep_onnx.errors import CalibrationError

W, V = copied("w", (8, 16), 1, 4), np.random.default_rng(7).normal(size=(16, 5)).astype(np.float32)


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).normal(size=shape).astype(np.float32)


def baked(batch: int) -> onnx.ModelProto:
    """A model whose input has a free batch, and a Reshape inside a fixed one."""
    body = "h = MatMul(x, w)\nr = Relu(h)\ns = Reshape(r, t)\nf = Reshape(s, b)\ny = MatMul(f, v)"
    targets = {"t": np.array([batch, 16, 1]), "b": np.array([batch, 16])}
    model = build(body, {"w": W, "v": V, **targets}, x=(batch, 8))
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "N"
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "N"
    return model


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("options", [{}, {"params": 0.7}], ids=str)
def test_a_batch_that_is_baked_in_is_kept(batch: int, options: dict[str, float]) -> None:
    result = lindep_onnx.compress(baked(batch), calib=normal(50, 8), **options)
    assert any(f"batches of {batch}," in note for note in result.report.notes)
    assert result.report.before.channels - result.report.after.channels >= 4
    if not options:
        feeds = {"x": normal(batch, 8)}
        np.testing.assert_allclose(run(result.model, feeds)[0], run(baked(batch), feeds)[0], rtol=1e-4, atol=1e-5)


def test_a_batch_that_is_free_is_not_looked_for() -> None:
    body = "h = MatMul(x, w)\nr = Relu(h)\ns = Reshape(r, t)\nf = Reshape(s, b)\ny = MatMul(f, v)"
    model = build(body, {"w": W, "v": V, "t": np.array([-1, 4, 4]), "b": np.array([-1, 16])}, x=("N", 8))
    assert not any("batches of" in note for note in lindep_onnx.compress(model, calib=normal(50, 8)).report.notes)


def table() -> onnx.ModelProto:
    model = build("e = Gather(t, x)\nh = MatMul(e, w)\nr = Relu(h)\ny = MatMul(r, v)", {"t": (50, 8), "w": W, "v": V},
                  x=("N", 7), kind=TensorProto.INT64)  # fmt: skip
    assert model.graph.input[0].type.tensor_type.elem_type == TensorProto.INT64
    return model


@pytest.mark.parametrize("options", [{}, {"params": 0.8}, {"proven_only": True}], ids=str)
def test_a_sample_that_the_model_cannot_take_is_named(options: dict[str, object]) -> None:
    ids = np.random.default_rng(0).integers(0, 50, (90, 7))
    ids[17:50, 0] = 50
    with pytest.raises(CalibrationError, match=r"cannot run on sample 17 of the calibration data: .*idx=50"):
        lindep_onnx.compress(table(), calib=ids, **options)
    with (
        pytest.raises(CalibrationError, match="cannot run on sample 17"),
        lindep_onnx.calibrate(lindep_onnx.trace(table()), ids),
    ):
        pass


def test_a_fault_of_the_data_is_no_bug_on_the_command_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ids = np.random.default_rng(0).integers(0, 50, (90, 7))
    ids[:, 3] = 51
    np.savez(tmp_path / "c.npz", x=ids)
    onnx.save(table(), tmp_path / "m.onnx")
    assert main([str(tmp_path / "m.onnx"), "--calib", str(tmp_path / "c.npz"), "--dry-run"]) == 1
    told = capfd.readouterr().err
    assert "sample 0 of" in told and "c.npz" in told and "unexpected" not in told and "report it" not in told
    assert "onnxruntime:" not in told  # no log line of the runtime beside it


def test_another_failure_is_not_blamed_on_the_data() -> None:
    model = build("y = Relu(x)", {}, x=("N", 8))
    model.graph.node.append(helper.make_node("Identity", ["y"], ["z"]))
    with pytest.raises(TypeError):
        lindep_onnx.compress(model, calib=normal(20, 8), eval=lambda session: session + 1, max_drop=1.0, params=0.9)

"""What cannot be loaded is never written: the file is opened from the disk before it takes its name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from build import as_array, build
from onnx import TensorProto

from lindep_onnx import pipeline
from lindep_onnx.api import apply, calibrate, compress, plan, trace
from lindep_onnx.errors import OutputError, VerificationError
from lindep_onnx.model import save as saving
from lindep_onnx.model.ir import Model, load
from lindep_onnx.model.save import save
from lindep_onnx.options import Config
from lindep_onnx.pipeline import Files, Request
from lindep_onnx.planning.loadable import check_opens
from lindep_onnx.structure.rules import registry


def model() -> onnx.ModelProto:
    w = as_array("w", (20, 32))
    w[:, 28:] = w[:, :4]
    return build("h = MatMul(x, w)\nr = Relu(h)\ny = MatMul(r, v)", {"w": w, "v": (32, 16)}, x=("N", 20))


def refused(folder: Path, monkeypatch: pytest.MonkeyPatch, spoil: object) -> None:
    """A run whose result is spoilt on its way to the disk: it fails, and the old file is still there."""
    out = folder / "out.onnx"
    out.write_bytes(b"old")
    monkeypatch.setattr(saving, "serialise", spoil)
    with pytest.raises((OutputError, VerificationError)):
        pipeline.run(Request(model(), files=Files(out)), Config(proven_only=True), pipeline.Log())
    assert out.read_bytes() == b"old" and [path.name for path in folder.iterdir()] == ["out.onnx"]


def test_a_file_that_is_not_what_was_written_does_not_take_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = saving.serialise

    def spoil(proto: onnx.ModelProto, folder: object, file: object) -> None:
        other = onnx.ModelProto()
        other.CopyFrom(proto)
        value = onnx.numpy_helper.to_array(other.graph.initializer[0]) * np.float32(1.5)
        other.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(value, other.graph.initializer[0].name))
        written(other, folder, file)

    refused(tmp_path, monkeypatch, spoil)


def test_a_file_that_onnx_runtime_does_not_load_does_not_take_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.onnx"
    broken = model()
    broken.graph.node[0].input[0] = "v"  # a product that does not fit
    with pytest.raises(VerificationError, match="not the result"):
        save(broken, None, out, check=lambda path: check_opens(runtime(), load(model()), path))
    assert not list(tmp_path.iterdir())


def runtime() -> pipeline.Runtime:
    return pipeline.Runtime.named(Config().providers, Config().threads)


@pytest.mark.parametrize("external", [False, True])
def test_values_may_be_stored_in_any_form(tmp_path: Path, external: bool) -> None:
    proto = model()
    value = onnx.numpy_helper.to_array(proto.graph.initializer[0])
    listed = onnx.helper.make_tensor("w", TensorProto.FLOAT, value.shape, value.ravel().tolist())
    proto.graph.initializer[0].CopyFrom(listed)
    seen: list[Path] = []
    save(proto, None, tmp_path / "out.onnx", external_data=external, check=seen.append)
    found: Model = load(tmp_path / "out.onnx")
    np.testing.assert_array_equal(found.stored["w"], value)
    assert len(seen) == 1 and len(list(tmp_path.iterdir())) == (2 if external else 1)


def test_a_group_that_onnx_runtime_refuses_is_left_out_by_name_and_the_rest_goes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A rewriting rule is missing: a Reshape keeps the sizes that it had.
    monkeypatch.delitem(registry._REWRITING, "Reshape")
    w, u = as_array("w", (20, 32)), as_array("u", (16, 32))
    w[:, 24:], u[:, 24:] = w[:, :8], u[:, :8]
    body = "h = MatMul(x, w)\nr = Relu(h)\ng = MatMul(r, v)\nt = Tanh(g)\nk = MatMul(t, u)\ns = Relu(k)\ne = Reshape(s, i)\ny = MatMul(e, q)"
    weights = {"w": w, "v": (32, 16), "u": u, "q": (32, 5), "i": np.array([-1, 32])}
    net = build(body, weights, x=("N", 20))
    result = compress(net, np.random.default_rng(0).normal(size=(300, 20)).astype(np.float32), round_to=1)
    assert [(group.name, group.removed) for group in result.report.groups if group.removed] == [("MatMul_0", 8)]
    assert any("MatMul_4" in note for note in result.report.notes)
    assert ("refused", 32) in [(refusal.reason, refusal.channels) for refusal in result.report.refusals]
    # Stage by stage it is the same.
    x = np.random.default_rng(0).normal(size=(300, 20)).astype(np.float32)
    with calibrate(trace(net), x) as seen:
        assert seen.samples is not None and any("MatMul_4" in note for note in seen.samples.notes)
        made = plan(seen, round_to=1)
    assert [group.removed for group in apply(net, made, x).report.groups if group.removed] == [8]
    monkeypatch.undo()
    result = compress(net, np.random.default_rng(0).normal(size=(300, 20)).astype(np.float32), round_to=1)
    assert [group.removed for group in result.report.groups if group.removed] == [8, 8]

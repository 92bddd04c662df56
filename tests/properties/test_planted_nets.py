"""Nets from PyTorch's two exporters and in tf2onnx's manner: exactly what was planted goes."""

from __future__ import annotations

import importlib

import onnx
import pytest
from build import traced

from lindep_onnx.api import compress

pytest.importorskip("torch")
pytest.importorskip("onnxscript")
planted_nets = importlib.import_module("planted_nets")


@pytest.mark.slow
@pytest.mark.parametrize("name", planted_nets.NETS)
def test_exactly_what_was_planted_goes(name: str) -> None:
    found = planted_nets.found_in(name)
    # At bfloat16's two digits one more channel looks like a combination of others.
    assert found.planted <= found.removed <= found.planted + ("bfloat16" in name)
    assert found.error < (2e-2 if "bfloat16" in name else 2e-3 if "float16" in name else 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in planted_nets.NETS if "dynamo" not in name])
def test_nothing_goes_where_nothing_was_planted(name: str) -> None:
    assert planted_nets.found_in(name, dependent=False).removed == 0


def _kept(model: onnx.ModelProto, net: planted_nets.Net) -> list[int]:
    """Channels of each producer of the compressed model, in order."""
    result = compress(model, planted_nets.data(net, 128, 1), round_to=1)
    return [len(producer.atoms) for producer in traced(result.model).producers]


@pytest.mark.slow
@pytest.mark.parametrize("name", planted_nets.MODULES)
def test_both_exporters_lead_to_the_same_widths(name: str) -> None:
    old, new = (planted_nets.NETS[f"{name}, {exporter}"](True) for exporter in ("TorchScript", "dynamo"))
    assert _kept(old.model, old) == _kept(new.model, new)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shufflenet", "cnn_1d", "cnn_3d", "residual"])
def test_normalization_of_its_own_leads_to_the_same_widths(name: str) -> None:
    apart, fused = (planted_nets.exported(name, True, fused=fused) for fused in (False, True))
    assert "BatchNormalization" in {node.op_type for node in apart.model.graph.node}
    assert "BatchNormalization" not in {node.op_type for node in fused.model.graph.node}
    assert _kept(apart.model, apart) == _kept(fused.model, fused)

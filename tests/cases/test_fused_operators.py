"""Operators that ONNX Runtime has fused: written out they compute the same, and lose the same channels."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from build import as_array, build, run, traced

from lindep_onnx.api import compress
from lindep_onnx.model.cost import cost
from lindep_onnx.model.fused import fused_operators, written_out
from lindep_onnx.model.ir import load

IMAGE, ROWS = ("N", 3, 6, 6), ("N", 5, 8)
#: Operator, attributes, inputs behind x, and the shape of x.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], tuple]] = {
    "conv": ("FusedConv", {"pads": [1, 1, 1, 1], "activation": "Relu"}, {"w": (8, 3, 3, 3), "b": (8,)}, IMAGE),
    "conv of groups": ("FusedConv", {"group": 3, "activation": "Sigmoid"}, {"w": (6, 1, 3, 3)}, IMAGE),
    "leaky conv": ("FusedConv", {"activation": "LeakyRelu", "activation_params": [0.3]}, {"w": (8, 3, 3, 3)}, IMAGE),
    "clipped conv": ("FusedConv", {"activation": "Clip", "activation_params": [-0.1, 0.4]}, {"w": (8, 3, 1, 1)}, IMAGE),
    "hard conv": ("FusedConv", {"activation": "HardSigmoid", "activation_params": [0.3, 0.4]}, {"w": (8, 3, 1, 1)}, IMAGE),
    "conv and sum": ("FusedConv", {"activation": "Relu"}, {"w": (3, 3, 1, 1), "b": (3,), "z": (2, 3, 6, 6)}, IMAGE),
    "gemm": ("FusedGemm", {"activation": "Relu", "transB": 1, "alpha": 0.7}, {"w": (8, 8), "b": (8,)}, ("N", 8)),
    "leaky gemm": ("FusedGemm", {"activation": "LeakyRelu", "activation_alpha": 0.2}, {"w": (8, 6)}, ("N", 8)),
    "product": ("FusedMatMul", {"alpha": 0.25}, {"w": (8, 6)}, ROWS),
    "transposed product": ("FusedMatMul", {"transB": 1}, {"w": (6, 8)}, ROWS),
    "gelu": ("Gelu", {}, {}, ROWS),
    "biased gelu": ("BiasGelu", {}, {"b": (8,)}, ROWS),
    "fast gelu": ("FastGelu", {}, {}, ROWS),
    "biased fast gelu": ("FastGelu", {}, {"b": (8,)}, ROWS),
    "quick gelu": ("QuickGelu", {}, {}, ROWS),
    "quick gelu of another alpha": ("QuickGelu", {"alpha": 1.2}, {}, ROWS),
    "skip normalization": ("SkipLayerNormalization", {"epsilon": 1e-3}, {"s": (2, 5, 8), "g": (8,), "b": (8,)}, ROWS),
    "skip with bias": ("SkipLayerNormalization", {}, {"s": (2, 5, 8), "g": (8,), "b": (8,), "c": (8,)}, ROWS),
}  # fmt: skip


def model_of(
    nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], x: tuple, outputs: str = "y", opset: int = 17
) -> onnx.ModelProto:
    graph = onnx.helper.make_graph(
        nodes,
        "test",
        [onnx.helper.make_tensor_value_info("x", 1, x)],
        [onnx.helper.make_tensor_value_info(name, 1, None) for name in outputs.split()],
        [onnx.numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    opsets = [onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid("com.microsoft", 1)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8)


def fused(op: str, inputs: list[str], outputs: str, **attributes: Any) -> onnx.NodeProto:
    return onnx.helper.make_node(op, inputs, outputs.split(), domain="com.microsoft", name="it", **attributes)


@pytest.mark.parametrize("opset", [17, 20])
@pytest.mark.parametrize("case", CASES)
def test_what_is_written_out_computes_the_same(case: str, opset: int) -> None:
    op, attributes, given, x = CASES[case]
    weights = {name: as_array(name, shape) for name, shape in given.items()}
    node = fused(op, ["x", *weights], "y", **attributes)
    model = model_of([node], weights, x, opset=opset)
    plain = written_out(load(model))
    assert fused_operators(load(model)) == (f"com.microsoft::{op}",) and not any("::" in one.op for one in plain.nodes)
    data = {"x": np.random.default_rng(0).normal(size=(2, *x[1:])).astype(np.float32)}
    (want,), (got,) = run(model, data), run(plain.proto, data)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    assert cost(load(model), {"x": data["x"].shape}).macs == cost(plain, {"x": data["x"].shape}).macs


@pytest.mark.parametrize(
    ("op", "attributes", "given", "x"),
    [
        ("FusedConv", {"activation": "Softplus"}, {"w": (8, 3, 3, 3)}, IMAGE),
        ("FusedMatMul", {"transA": 1}, {"w": (5, 6)}, ROWS),
        ("NhwcConv", {}, {"w": (8, 3, 3, 3)}, IMAGE),
        ("GroupNorm", {"groups": 2, "activation": 0}, {"g": (8,), "b": (8,)}, ROWS),
        ("EmbedLayerNormalization", {}, {"w": (8, 8)}, ROWS),
    ],
)
def test_what_is_not_written_out_is_named(op: str, attributes: dict, given: dict, x: tuple) -> None:
    weights = {name: as_array(name, shape) for name, shape in given.items()}
    weights["u"] = as_array("u", (x[1], x[1], 1, 1) if len(x) == 4 else (8, 8))
    first = onnx.helper.make_node("Conv" if len(x) == 4 else "MatMul", ["x", "u"], ["h"])
    model = model_of([first, fused(op, ["h", *given], "y", **attributes)], weights, x)
    (refusal, *_) = traced(model).refusals
    assert refusal.reason.code == "runtime_operator" and f"{op} of com.microsoft" in refusal.reason.message
    assert any(found.nodes == ("it",) for found in traced(model).refusals)


def test_a_model_that_onnx_runtime_has_optimized_loses_what_it_loses_without() -> None:
    w = as_array("w", (12, 3, 3, 3))
    w[8:] = w[:4]
    body = "h = Conv<pads=[1,1,1,1]>(x, w)\nr = Relu(h)\ng = Conv(r, v)\ns = LeakyRelu(g)\np = GlobalAveragePool(s)\nq = Flatten(p)\ny = Gemm(q, k)"
    plain = build(body, {"w": w, "v": (6, 12, 1, 1), "k": (6, 4)})
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    images = np.random.default_rng(0).normal(size=(64, 3, 8, 8)).astype(np.float32)
    optimized = optimized_by_onnx_runtime(plain, options)
    assert "FusedConv" in {node.op_type for node in optimized.graph.node}
    results = [compress(model, images) for model in (plain, optimized)]
    assert [[group.removed for group in result.report.groups] for result in results] == [[4, 0], [4, 0]]
    assert any("FusedConv" in note for note in results[1].report.notes)
    np.testing.assert_allclose(*(run(result.model, {"x": images[:3]})[0] for result in results), rtol=1e-4, atol=1e-5)


def optimized_by_onnx_runtime(model: onnx.ModelProto, options: onnxruntime.SessionOptions) -> onnx.ModelProto:
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return onnx.load(options.optimized_model_filepath)

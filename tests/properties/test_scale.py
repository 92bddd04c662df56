"""Ten thousand nodes, a hundred thousand channels: traced, proven and rewritten in half a minute."""

from __future__ import annotations

import time

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from lindep_onnx.model.ir import load
from lindep_onnx.model.shapes import resolve
from lindep_onnx.proofs.prove import prove
from lindep_onnx.structure.placement import equalized
from lindep_onnx.structure.rewrite import Removal, rewrite
from lindep_onnx.structure.trace import trace

BLOCKS, WIDTH = 1250, 40  # each block has eight nodes and two new axes


def deep(grouped: bool) -> onnx.ModelProto:
    """A residual net: pointwise, batch normalization, ReLU, depthwise, ReLU, shuffle or Clip, pointwise, sum."""
    rng = np.random.default_rng(0)
    nodes, weights = [], {"first": rng.normal(size=(WIDTH, 3, 1, 1))}
    nodes.append(helper.make_node("Conv", ["x", "first"], ["h0"], "first"))
    for i in range(BLOCKS):
        at = {name: f"{name}{i}" for name in "abcdefgwvmknop"}
        weights[at["w"]] = rng.normal(size=(WIDTH, WIDTH // (2 if grouped else 1), 1, 1))
        weights[at["v"]] = rng.normal(size=(WIDTH, WIDTH // (2 if grouped else 1), 1, 1))
        weights[at["m"]], weights[at["k"]] = np.ones(WIDTH), rng.normal(size=(WIDTH, 1, 1, 1))
        group = {"group": 2} if grouped else {}
        nodes += [
            helper.make_node("Conv", [f"h{i}", at["w"]], [at["a"]], f"conv_a{i}", **group),
            helper.make_node("BatchNormalization", [at["a"], *[at["m"]] * 4], [at["b"]], f"norm{i}"),
            helper.make_node("Relu", [at["b"]], [at["c"]], f"relu_a{i}"),
            helper.make_node("Conv", [at["c"], at["k"]], [at["d"]], f"depthwise{i}", group=WIDTH),
            helper.make_node("Relu", [at["d"]], [at["e"]], f"relu_b{i}"),
            helper.make_node("Identity", [at["e"]], [at["f"]], f"same{i}"),
            helper.make_node("Conv", [at["f"], at["v"]], [at["g"]], f"conv_b{i}", **group),
            helper.make_node("Add", [f"h{i}", at["g"]], [f"h{i + 1}"], f"add{i}"),
        ]
    weights["last"] = rng.normal(size=(4, WIDTH, 1, 1))
    nodes.append(helper.make_node("Conv", [f"h{BLOCKS}", "last"], ["y"], "last"))
    tensors = [onnx.numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()]
    given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 4, 4])]
    made = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4, 4, 4])]
    graph = helper.make_graph(nodes, "deep", given, made, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.slow
@pytest.mark.parametrize("grouped", [False, True])
def test_ten_thousand_nodes_take_half_a_minute(grouped: bool) -> None:
    model = deep(grouped)
    assert len(model.graph.node) > 10_000
    start = time.perf_counter()
    loaded = load(model)
    channels = trace(loaded, resolve(loaded))
    prove(channels)
    removed = equalized(channels, np.arange(channels.units) % 3 == 0)
    smaller = rewrite(channels, Removal(removed), "test").proto
    seconds = time.perf_counter() - start
    produced = sum(len(producer.atoms) for producer in channels.producers)
    assert produced > 100_000 and removed.sum() > 10_000
    assert smaller.ByteSize() < model.ByteSize()
    assert seconds < 30, f"{seconds:.1f} s"

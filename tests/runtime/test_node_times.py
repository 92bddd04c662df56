"""How long nodes take before and after."""

from __future__ import annotations

import numpy as np
import pytest
from build import build

from lindep_onnx.model.ir import load
from lindep_onnx.runtime.backend import Runtime
from lindep_onnx.runtime.node_times import OTHER, LayerTime, dominant, layer_times, slowest

RUNTIME = Runtime(threads=1)
FEEDS = {"x": np.ones((1, 3, 32, 32), np.float32)}


def net(width: int):
    body = "a = Conv<pads=[1,1,1,1]>(x, w)\nb = Relu(a)\nc = Conv<pads=[1,1,1,1]>(b, v)\ny = Relu(c)"
    return load(build(body, {"w": (width, 3, 3, 3), "v": (64, width, 3, 3)}, x=(1, 3, 32, 32)))


def test_a_narrower_layer_takes_less_and_fused_nodes_count_with_it() -> None:
    times = {entry.name: entry for entry in layer_times(net(256), net(16), FEEDS, RUNTIME)}
    assert set(times) <= {"Conv_0", "Conv_2", OTHER} and times["Conv_2"].op == "Conv"
    assert times["Conv_2"].before_ms > 3 * times["Conv_2"].after_ms > 0


def test_nodes_of_one_of_the_models_alone_are_there_too() -> None:
    other = load(build("y = Gelu(x)", {}, x=(1, 3, 32, 32), opset=20))
    found = layer_times(net(8), other, FEEDS, RUNTIME)
    assert [(entry.name, entry.before_ms is None, entry.after_ms is None) for entry in found if entry.name != OTHER] == [
        ("Conv_0", False, True), ("Conv_2", False, True), ("Gelu_0", True, False)
    ]  # fmt: skip


def test_the_names_that_hold_most_of_the_time() -> None:
    assert dominant({"a": 1.0, "b": 6.0, "c": 3.0}, 2) == (("b", 0.6), ("c", pytest.approx(0.3)))
    assert dominant({}) == dominant({"a": 0.0}) == ()
    times = (LayerTime("a", "Conv", 1.0, 3.0), LayerTime("b", "Conv", 9.0, None), LayerTime("c", "Conv", 1.0, 1.0))
    assert [(entry.name, share) for entry, share in slowest(times)] == [("a", 0.75), ("c", 0.25)]


def test_a_long_run_is_profiled_once() -> None:
    model = net(8)
    runs = [RUNTIME.profile(model, FEEDS, 4, seconds).count("model_run") for seconds in (0.0, 60.0)]
    assert runs == [2, 5]


def test_nodes_without_names_are_found() -> None:
    proto = build("a = Conv(x, w)\ny = Relu(a)", {"w": (8, 3, 5)}, x=(1, 3, 64))
    for node in proto.graph.node:
        node.name = ""
    model, feeds = load(proto), {"x": np.ones((1, 3, 64), np.float32)}
    assert {entry.name for entry in layer_times(model, model, feeds, RUNTIME)} == {"Conv(a)"}
    assert not any(node.name for node in model.proto.graph.node)

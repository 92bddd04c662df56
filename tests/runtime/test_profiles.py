"""Profiles of other tools: read, and matched with the nodes of a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from build import build

from lindep_onnx.errors import UsageError
from lindep_onnx.model.ir import load
from lindep_onnx.runtime import layer_latency as latency
from lindep_onnx.runtime.backend import Runtime
from lindep_onnx.runtime.profiles import match, parse_profile

RUNTIME = Runtime(threads=1)
SHAPE = {"x": (1, 3, 24, 24)}
NET = (
    "a = Conv<pads=[1,1,1,1]>(x, w)\nb = Relu(a)\nc = Conv<pads=[1,1,1,1], group=64>(b, k)\nd = Relu(c)\n"
    "e = Conv(d, v)\nf = GlobalAveragePool(e)\ng = Flatten(f)\ny = Gemm<transB=1>(g, u)"
)
LAYERS = ("Conv_0", "Conv_2", "Conv_4", "Gemm_7")
TENSORRT = [
    {"count": 10},
    {"name": "Reformatting CopyNode for Input Tensor 0 to Conv_0 + Relu_1", "timeMs": 10, "averageMs": 1.0},
    {"name": "Conv_0 + Relu_1", "timeMs": 20, "averageMs": 2.0, "medianMs": 1.5, "percentage": 20},
    {"name": "PWN(PWN(Conv_2), Relu_3)", "timeMs": 40, "averageMs": 4.0},
    {"name": "Conv_4 + Gemm_7", "timeMs": 80, "averageMs": 8.0},
    {"name": "{ForeignNode[GlobalAveragePool_5...Flatten_6]}", "timeMs": 5, "averageMs": 0.5},
]
HEAD = "layerName;execStatus;layerType;execType;realTime (ms);cpuTime (ms)\n"
OPENVINO = "".join(
    f"{HEAD}x;Status.NOT_RUN;Parameter;unknown;9.0;9.0\nConv_0/WithoutBiases;Status.EXECUTED;Convolution;jit;{first};1\n"
    f"e;EXECUTED;Convolution;jit;{first};1\nreorder_7;EXECUTED;Reorder;jit;0.5;0.5\nTotal;;;;9;9\n\n"
    for first in (1.0, 3.0)
)


def net(width: int = 64) -> onnx.ModelProto:
    weights = {"w": (width, 3, 3, 3), "k": (width, 1, 3, 3), "v": (96, width, 1, 1), "u": (10, 96)}
    return build(NET.replace("64", str(width)), weights, x=("N", 3, 24, 24))


def times_of(text: str, proto: onnx.ModelProto | None = None) -> tuple[dict[str, float], list[str]]:
    model = load(proto or net())
    macs = {layer.node.index: layer.macs for layer in latency.layers(model, SHAPE)}
    found = match(parse_profile(text, "p"), model, lambda node: macs.get(node.index, 0.0))
    return dict(found.seconds), [name for name, _ in found.other]


def profile_of(proto: onnx.ModelProto) -> str:
    return RUNTIME.profile(proto, {"x": np.ones(SHAPE["x"], np.float32)}, 3)


def test_every_layer_is_found_in_a_profile_of_onnx_runtime() -> None:
    seconds, other = times_of(profile_of(net()))
    assert all(seconds[name] > 0 for name in LAYERS) and "Relu_1" not in seconds
    assert all(name.startswith("Reorder") for name in other)


def test_a_sum_that_is_fused_belongs_to_the_layer_of_its_shape() -> None:
    body = "a = Conv(x, w)\nb = Relu(a)\nc = Conv(b, v)\nd = Add(c, b)\ny = Relu(d)"
    proto = build(body, {"w": (16, 3, 1, 1), "v": (16, 16, 1, 1)}, x=("N", 3, 24, 24))
    seconds, _ = times_of(profile_of(proto), proto)
    assert {"Conv_0", "Conv_2"} <= set(seconds) and "Relu_4" not in seconds


def test_unnamed_nodes_are_found_by_their_outputs() -> None:
    proto = net()
    for node in proto.graph.node:
        node.name = ""
    seconds, _ = times_of(profile_of(proto), proto)
    assert {"Conv(a)", "Conv(c)", "Conv(e)"} <= set(seconds)


def test_layers_that_tensorrt_joined_share_its_time_by_their_work() -> None:
    seconds, other = times_of(json.dumps(TENSORRT))
    works = {layer.node.name: layer.macs for layer in latency.layers(load(net()), SHAPE)}
    assert seconds["Conv_0"] == pytest.approx(1.5e-3) and seconds["Conv_2"] == pytest.approx(4e-3)
    assert seconds["Gemm_7"] / seconds["Conv_4"] == pytest.approx(works["Gemm_7"] / works["Conv_4"])
    assert seconds["Gemm_7"] + seconds["Conv_4"] == pytest.approx(8e-3)
    assert [name.split()[0] for name in other] == ["Reformatting", "{ForeignNode[GlobalAveragePool_5...Flatten_6]}"]


def test_requests_of_openvino_are_averaged_and_what_did_not_run_left_out() -> None:
    seconds, other = times_of(OPENVINO)
    assert seconds == {"Conv_0": pytest.approx(2e-3), "Conv_4": pytest.approx(2e-3)} and other == ["reorder_7"]
    node = {"name": "Conv_0", "status": "EXECUTED", "real_time": 2.0}
    idle = {"name": "Conv_2", "status": "OPTIMIZED_OUT", "real_time": "2.0"}
    for values in (
        {"avg_performance": {"nodes": [node, idle]}},
        {"detailed_performance": [{"nodes": [node, idle]}] * 3},
    ):
        assert times_of(json.dumps(values))[0] == {"Conv_0": pytest.approx(2e-3)}


def event(name: str, ts: int, dur: int, cat: str = "Node", **told: Any) -> dict[str, Any]:
    return {"cat": cat, "ph": "X", "name": name, "ts": ts, "dur": dur, "args": told}


def test_the_first_run_of_a_profile_is_its_warm_up() -> None:
    runs = [event("model_run", ts, 90, "Session") for ts in (0, 100, 200)]
    nodes = [event("Conv_0_kernel_time", ts + 5, dur, op_name="Conv") for ts, dur in ((0, 80), (100, 10), (200, 20))]
    assert times_of(json.dumps(runs + nodes))[0] == {"Conv_0": pytest.approx(10e-6)}
    assert times_of(json.dumps(runs[:1] + nodes[:1]))[0] == {"Conv_0": pytest.approx(80e-6)}


def test_launches_are_not_taken_for_times_of_a_device() -> None:
    runs = [event("model_run", 0, 90, "Session")]
    nodes = [event("Conv_0_kernel_time", 5, 2, op_name="Conv", provider="CUDAExecutionProvider")]
    with pytest.raises(UsageError, match="device"):
        times_of(json.dumps(runs + nodes))
    kernels = [event("winograd", 9, 70, "Kernel", parent_name="Conv_0_kernel_time")]
    assert times_of(json.dumps(runs + nodes + kernels))[0] == {"Conv_0": pytest.approx(70e-6)}


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "[1]", "3", '{"avg_performance": {}}', '[{"name": "a", "averageMs": 0}]', HEAD,
             '[{"name": "a", "averageMs": -1}, {"name": "b", "averageMs": 3}]', f"{HEAD}a;EXECUTED;b"],
)  # fmt: skip
def test_what_is_no_profile_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"p\.json"):
        parse_profile(text, "p.json")


def test_a_profiled_layer_goes_down_a_staircase_of_blocks(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(json.dumps(TENSORRT))
    model = load(net())
    times, (note,) = latency.load_times([tmp_path / "p.json"], model, SHAPE, lambda layer: 16)
    first, depthwise, *_ = layers = latency.layers(model, SHAPE)
    assert times.total(layers) == pytest.approx(15e-3) and times.rest == pytest.approx(1.5e-3)
    narrow = latency.layers(load(net(33)), SHAPE)
    share = latency.FIXED + (1 - latency.FIXED) * 48 / 64
    assert times.predict(narrow[0]) == pytest.approx(share * times.predict(first))
    assert times.predict(narrow[1]) == pytest.approx(share * times.predict(depthwise))
    assert "TensorRT" in note and "ForeignNode" in note


def test_profiles_are_joined_by_their_mean(tmp_path: Path) -> None:
    double = [{**row, "averageMs": 3 * row["averageMs"], "medianMs": 4.5} for row in TENSORRT if "name" in row]
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, rows in zip(paths, (TENSORRT, double), strict=True):
        path.write_text(json.dumps(rows))
    model = load(net())
    times, _ = latency.load_times(paths, model, SHAPE)
    assert times.predict(latency.layers(model, SHAPE)[0]) == pytest.approx(3e-3)


def test_the_profile_of_another_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps([{"name": "Gemm_7", "averageMs": 2.0}, {"name": "conv1 + relu1", "averageMs": 1.0}]))
    with pytest.raises(UsageError, match=r"1 of the 4 layers.*conv1"):
        latency.load_times([path], load(net()), SHAPE)

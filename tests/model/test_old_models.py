"""What old exporters leave behind: IR version 3, where every initializer is a graph input, and unknown shapes."""

from __future__ import annotations

import numpy as np
import onnx
from build import build, feed, ignoring, initializer, run, traced

from lindep_onnx.api import compress
from lindep_onnx.structure.rewrite import Removal, rewrite


def _as_version_3(model: onnx.ModelProto) -> onnx.ModelProto:
    model.ir_version = 3
    model.graph.input.extend(
        onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        for tensor in model.graph.initializer
    )
    return model


def _removed(units: int) -> np.ndarray:
    return np.arange(units) % 3 == 0


def test_before_version_4_every_initializer_stays_declared_at_its_new_size_and_new_ones_are_declared() -> None:
    body = "h = MatMul(x, w)\nr = Relu(h)\ny = MatMul(r, v)"
    model = _as_version_3(build(body, {"w": (6, 8), "v": (8, 4)}, x=("N", 6), opset=9))
    channels = traced(model)
    (reader,) = channels.consumers[0].readers
    shift = np.arange(4.0)
    smaller = rewrite(channels, Removal(_removed(8), shifts={reader: shift}), "").proto
    onnx.checker.check_model(smaller, full_check=True)
    declared = {value.name: value.type.tensor_type.shape.dim for value in smaller.graph.input}
    sizes = {tensor.name: list(tensor.dims) for tensor in smaller.graph.initializer}
    assert [declared.keys() - sizes.keys(), sizes.keys() - declared.keys()] == [{"x"}, set()]
    assert all([dim.dim_value for dim in declared[name]] == sizes[name] for name in sizes)
    assert sizes["w"] == [6, 5]
    x = {"x": feed(build(body, {"w": (6, 8), "v": (8, 4)}, x=("N", 6)))["x"]}
    np.testing.assert_allclose(run(smaller, x)[0], run(ignoring(channels, _removed(8)), x)[0] + shift, atol=1e-5)


def test_before_version_4_constants_behind_nodes_do_not_hide_shapes() -> None:
    body = "h = Conv(x, w)\ns = Unsqueeze<axes=[1,2]>(k)\nt = Mul(h, s)\ny = Conv(t, v)"
    weights = {"w": (8, 3, 3, 3), "k": (8,), "v": (4, 8, 3, 3)}
    assert traced(_as_version_3(build(body, weights, opset=9))).units == 8


def test_channels_that_meet_a_tensor_of_unknown_rank_stay() -> None:
    body = "h = Conv(x, w)\nt = Add(h, u)\ny = Conv(t, v)"
    model = build(body, {"w": (8, 3, 3, 3), "v": (4, 8, 3, 3)}, inputs={"u": (1, 8, 1, 1)})
    model.graph.input[1].type.tensor_type.ClearField("shape")
    channels = traced(model)
    assert channels.units == 0
    assert "unknown_rank" in [refusal.reason.code for refusal in channels.refusals]


def test_a_model_in_which_nothing_may_go_comes_back_as_it_is() -> None:
    model = build("y = Conv(x, w)", {"w": (8, 3, 3, 3)})
    result = compress(model, feed(model, samples=12)).model
    np.testing.assert_array_equal(initializer(result, "w"), initializer(model, "w"))
    assert [node.op_type for node in result.graph.node] == ["Conv"]

"""Half precision: worked on in single precision, rounded once, and every type as it was."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from build import as_array, build, feed, initializer, run
from free_widths import compress
from onnx import TensorProto, helper
from planted_net import images, net, widths

from lindep_onnx.model.ir import load
from lindep_onnx.model.precision import epsilon, perturbed_one_ulp, to_float32, to_stored_dtype

HALF = [TensorProto.FLOAT16, TensorProto.BFLOAT16]


def rounded(model: onnx.ModelProto, kind: int) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            value = onnx.numpy_helper.to_array(tensor)
            tensor.CopyFrom(helper.make_tensor(tensor.name, kind, value.shape, value.ravel().tolist()))
    for value in (*copy.graph.input, *copy.graph.output):
        value.type.tensor_type.elem_type = kind
    return copy


@pytest.mark.parametrize("kind", HALF)
def test_exactly_the_planted_channels_go(kind: int) -> None:
    model = rounded(net(planted=True), kind)
    result = compress(model, images(64, 3))
    assert widths(result.model) == (7, 8)
    assert {tensor.data_type for tensor in result.model.graph.initializer} == {kind}
    assert {value.type.tensor_type.elem_type for value in result.model.graph.output} == {kind}
    assert result.report.after.bytes < result.report.before.bytes


@pytest.mark.parametrize("kind", HALF)
def test_a_model_without_dependence_comes_back_to_the_last_byte(kind: int) -> None:
    model = rounded(net(planted=False), kind)
    result = compress(model, images(64, 1)).model
    del result.metadata_props[:]
    assert result.SerializeToString(deterministic=True) == model.SerializeToString(deterministic=True)


def test_types_are_kept_where_single_and_half_precision_meet() -> None:
    w = as_array("w", (16, 3, 1, 1))
    w[5:9] = 2 * w[:4]
    body = "c = Cast<to=10>(x)\nh = Conv(c, w)\nr = Relu(h)\ng = Conv(r, k)\nf = Cast<to=1>(g)\ny = Conv(f, v)"
    weights = {"w": w.astype(np.float16), "k": as_array("k", (6, 16, 1, 1)).astype(np.float16), "v": (4, 6, 1, 1)}
    model = build(body, weights)
    result = compress(model, {"x": np.random.default_rng(0).normal(size=(64, 3, 8, 8)).astype(np.float32)}).model
    onnx.checker.check_model(result, full_check=True)
    types = {tensor.name: tensor.data_type for tensor in result.graph.initializer}
    assert initializer(result, "w").shape == (12, 3, 1, 1)
    assert all(kind == (TensorProto.FLOAT if name == "v" else TensorProto.FLOAT16) for name, kind in types.items())
    assert [node.attribute[0].i for node in result.graph.node if node.op_type == "Cast"] == [10, 1]


@pytest.mark.parametrize("kind", HALF)
def test_there_and_back_changes_nothing(kind: int) -> None:
    model = rounded(net(planted=True), kind)
    assert epsilon(model) > 0 and epsilon(to_float32(load(model)).proto) == 0
    back = to_stored_dtype(to_float32(load(model)), load(model)).proto
    for before, after in zip(model.graph.initializer, back.graph.initializer, strict=True):
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(before), onnx.numpy_helper.to_array(after))


def test_a_neighbour_is_one_spacing_away_at_most() -> None:
    value = np.random.default_rng(0).normal(size=(16, 10)).astype(np.float16)
    value[0] = 0
    model = build("y = MatMul(x, w)", {"w": value.astype(np.float32).T}, x=("N", 10))
    moved = initializer(perturbed_one_ulp(load(rounded(model, TensorProto.FLOAT16)), 0).proto, "w").T
    steps = np.abs(moved.astype(np.float32) - value) / np.spacing(np.abs(value)).astype(np.float32)
    assert (moved[0] == 0).all() and steps[1:].max() == 1 and (steps[1:] == 0).any()


def test_what_has_no_neighbour_stays() -> None:
    """The bits beside those of a negative zero, and of the ends of the range, are those of no number."""
    ends = np.finfo(np.float32)
    alone = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, ends.max, ends.min], np.float32)
    model = build("y = MatMul(x, w)", {"w": np.tile(alone, (10, 4))}, x=("N", 10))
    moved = initializer(perturbed_one_ulp(load(model), 0).proto, "w").reshape(10, 4, 7)
    np.testing.assert_array_equal(moved[..., :5], np.broadcast_to(alone[:5], (10, 4, 5)))
    assert np.isfinite(moved[..., 5:]).all() and (moved[..., 5:] != alone[5:]).any()


@pytest.mark.parametrize(
    "scales",
    ("k = Identity(s)\ny = Resize(h, , k)", "k = Concat<axis=0>(t, t)\ny = Resize(h, , k)", "y = Resize(h, , s)"),
)
def test_what_sizes_follow_from_stays(scales: str) -> None:
    """A scale a hair below 2 would make 13 rows of 7, not 14."""
    weights = {"w": as_array("w", (4, 4, 1, 1)), "s": np.float32([1, 1, 2, 2]), "t": np.float32([2, 2])}
    model = build(f"h = Conv(x, w)\n{scales}", weights, x=(2, 4, 7, 7))
    moved = perturbed_one_ulp(load(model), 0).proto
    assert [value.shape for value in run(moved, feed(model))] == [value.shape for value in run(model, feed(model))]
    assert (initializer(moved, "w") != initializer(model, "w")).any()


def test_double_precision_stays() -> None:
    w = as_array("w", (10, 16)).astype(np.float64)
    w[:, 3], w[:, 5] = 2 * w[:, 1], 0
    model = build(
        "h = MatMul(x, w)\nr = Relu(h)\ny = MatMul(r, v)",
        {"w": w, "v": as_array("v", (16, 4)).astype(np.float64)},
        x=("N", 10),
        kind=TensorProto.DOUBLE,
    )
    smaller = compress(model, {"x": np.random.default_rng(0).normal(size=(300, 10))}).model
    assert initializer(smaller, "w").shape == (10, 14) and initializer(smaller, "w").dtype == np.float64

"""Gradients against differences of the loss, which the reference implementation computes in double precision."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from build import build
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from lindep_onnx.distill.autodiff.differentiate import Differentiated, differentiate
from lindep_onnx.distill.autodiff.rules import RULES
from lindep_onnx.model.ir import load
from lindep_onnx.runtime.backend import Runtime

STEP = 1e-6
#: The reference implementation rounds Erf to single precision.
ROUGH = {"Erf": 1e-3}


def with_loss(model: onnx.ModelProto) -> onnx.ModelProto:
    """A weighted sum of each output, plus the mean of its squares: no symmetry that could hide an error."""
    parts = []
    for output in model.graph.output:
        shape = [dim.dim_value or 3 for dim in output.type.tensor_type.shape.dim]
        factor = np.cos(np.arange(np.prod(shape))).reshape(shape).astype(np.float32)
        name = output.name
        model.graph.initializer.append(numpy_helper.from_array(factor, f"{name}_factor"))
        model.graph.node.extend(
            [
                helper.make_node("Mul", [name, f"{name}_factor"], [f"{name}_weighted"]),
                helper.make_node("ReduceSum", [f"{name}_weighted"], [f"{name}_sum"], keepdims=0),
                helper.make_node("Mul", [name, name], [f"{name}_squares"]),
                helper.make_node("ReduceMean", [f"{name}_squares"], [f"{name}_energy"], keepdims=0),
            ]
        )
        parts += [f"{name}_sum", f"{name}_energy"]
    model.graph.node.append(helper.make_node("Sum", parts, ["loss"]))
    return model


def doubled(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model in double precision, with the loss as its only output."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and tensor.name != "scales":
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))
    for value in copy.graph.input:
        value.type.tensor_type.elem_type = TensorProto.DOUBLE
    del copy.graph.output[:]
    copy.graph.output.append(helper.make_tensor_value_info("loss", TensorProto.DOUBLE, None))
    return copy


def difference_quotient(model: onnx.ModelProto, x: np.ndarray, name: str, direction: np.ndarray, step: float) -> float:
    """Change of the loss along a direction of one weight."""
    losses = []
    for sign in (1, -1):
        moved = doubled(model)
        tensor = next(tensor for tensor in moved.graph.initializer if tensor.name == name)
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + sign * step * direction, name))
        losses.append(float(np.ravel(ReferenceEvaluator(moved).run(None, {"x": x.astype(np.float64)})[0])[0]))
    return (losses[0] - losses[1]) / (2 * step)


def derived(model: onnx.ModelProto, weights: list[str], x: np.ndarray) -> tuple[Differentiated, dict[str, np.ndarray]]:
    found = differentiate(load(model), "loss", weights, {"x": x.shape})
    session = Runtime(threads=1).open(found.proto)
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    values = session.run(list(found.gradients.values()), {"x": x, **{name: stored[name] for name in found.gradients}})
    return found, dict(zip(found.gradients, values, strict=True))


C = {"w": (4, 3, 3, 3), "b": (4,)}
FIRST = "a = Conv<pads=[1,1,1,1]>(x, w, b)"
AFTER = {
    "strides and odd rest": ("y = Conv<strides=[2,3], pads=[1,0,1,1]>(a, v, c)", {"v": (5, 4, 3, 2), "c": (5,)}),
    "dilations": ("y = Conv<dilations=[2,1], pads=[2,0,0,1]>(a, v)", {"v": (5, 4, 3, 2)}),
    "groups": ("y = Conv<group=2, strides=[2,1]>(a, v)", {"v": (6, 2, 3, 3)}),
    "depthwise, a position left over": ("y = Conv<group=4, strides=[2,2]>(a, v)", {"v": (12, 1, 2, 2)}),
    "depthwise": ("y = Conv<group=4, pads=[1,1,1,1], strides=[2,2]>(a, v, c)", {"v": (4, 1, 3, 3), "c": (4,)}),
    "same, upper": ('y = Conv<auto_pad="SAME_UPPER", strides=[2,2]>(a, v)', {"v": (5, 4, 3, 2)}),
    "same, lower": ('y = Conv<auto_pad="SAME_LOWER", strides=[2,2]>(a, v)', {"v": (5, 4, 2, 3)}),
    "pointwise": ("y = Conv(a, v)", {"v": (5, 4, 1, 1)}),
    "transposed": ("y = ConvTranspose<strides=[2,1], pads=[1,0,0,1], dilations=[1,2]>(a, v, c)", {"v": (4, 6, 3, 2), "c": (6,)}),
    "Gemm": ("f = Flatten(a)\ny = Gemm<alpha=0.5, beta=2.0>(f, v, c)", {"v": (168, 5), "c": (1, 5)}),
    "Gemm, transposed": ("f = Flatten(a)\ng = Transpose(f)\ny = Gemm<transA=1, transB=1>(g, v)", {"v": (5, 168)}),
    "MatMul": ("y = MatMul(a, v)", {"v": (7, 5)}),
    "MatMul from the left": ("y = MatMul(v, a)", {"v": (5, 6)}),
    "MatMul of data": ("t = Transpose<perm=[0,1,3,2]>(a)\ny = MatMul(a, t)", {}),
    "Add": ("s = Add(a, v)\ny = Mul(s, s)", {"v": (4, 1, 1)}),
    "Sub": ("s = Sub(v, a)\ny = Mul(s, s)", {"v": (6, 1)}),
    "Mul": ("y = Mul(v, a)", {"v": (1,)}),
    "Div": ("s = Exp(a)\ny = Div(v, s)", {"v": (7,)}),
    "Div by a weight": ("y = Div(a, v)", {"v": np.linspace(1, 2, 7, dtype=np.float32)}),
    "Sum": ("y = Sum(a, v, v)", {"v": (4, 6, 7)}),
    "Mean": ("m = Mean(a, v, a)\ny = Mul(m, a)", {"v": (4, 6, 7)}),
    "Relu": ("y = Relu(a)", {}),
    "LeakyRelu": ("y = LeakyRelu<alpha=0.3>(a)", {}),
    "Elu": ("y = Elu<alpha=0.7>(a)", {}),
    "PRelu": ("y = PRelu(a, v)", {"v": (4, 1, 1)}),
    "Clip": ("y = Clip(a, lo, hi)", {"lo": np.float32(-0.2), "hi": np.float32(0.8)}),
    "Clip, one side": ("y = Clip(a, lo)", {"lo": np.float32(-0.2)}),
    "Sigmoid": ("y = Sigmoid(a)", {}),
    "Tanh": ("y = Tanh(a)", {}),
    "HardSigmoid": ("y = HardSigmoid<alpha=0.4>(a)", {}),
    "HardSwish": ("y = HardSwish(a)", {}),
    "Softplus": ("y = Softplus(a)", {}),
    "Erf": ("y = Erf(a)", {}),
    "Sqrt, Pow and Log": ("e = Exp(a)\nr = Sqrt(e)\np = Pow(r, three)\ny = Log(p)", {"three": np.float32(3)}),
    "Abs and Reciprocal": ("e = Exp(a)\nm = Abs(a)\ns = Add(e, m)\ny = Reciprocal(s)", {}),
    "Where": ("z = Greater(a, zero)\ny = Where(z, a, v)", {"zero": np.float32(0), "v": (7,)}),
    "Softmax": ("y = Softmax<axis=1>(a)", {}),
    "LogSoftmax": ("y = LogSoftmax<axis=1>(a)", {}),
    "BatchNormalization": (
        "y = BatchNormalization<epsilon=0.01>(a, v, c, m, u)",
        {"v": (4,), "c": (4,), "m": (4,), "u": np.linspace(0.5, 2, 4, dtype=np.float32)},
    ),
    "LayerNormalization": ("y = LayerNormalization<axis=-3>(a, v, c)", {"v": (4, 6, 7), "c": (4, 6, 7)}),
    "ReduceMean": ("y = ReduceMean<axes=[-1,1], keepdims=0>(a)", {}),
    "ReduceSum": ("y = ReduceSum<keepdims=0>(a, axes)", {"axes": np.array([2, 3])}),
    "GlobalAveragePool": ("y = GlobalAveragePool(a)", {}),
    "MaxPool": ("y = MaxPool<kernel_shape=[2,2], strides=[2,2]>(a)", {}),
    "MaxPool, overlapping": ("y = MaxPool<kernel_shape=[3,3], strides=[1,2], pads=[1,1,1,1]>(a)", {}),
    "AveragePool": ("y = AveragePool<kernel_shape=[3,2], strides=[2,2], pads=[1,0,1,1]>(a)", {}),
    "AveragePool with padding": ("y = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1], count_include_pad=1>(a)", {}),
    "Concat and Slice": ("s = Slice(a, one, many, axis)\nr = Relu(a)\ny = Concat<axis=2>(s, r)", {"one": np.array([1]), "many": np.array([99]), "axis": np.array([-2])}),
    "Slice with steps": ("y = Slice(a, s, e, ax, st)", {"s": np.array([1, -1]), "e": np.array([6, -99]), "ax": np.array([2, 3]), "st": np.array([2, -2])}),
    "Split": ("p, q = Split<axis=1>(a, sizes)\nr = Exp(q)\ny = Concat<axis=1>(r, p)", {"sizes": np.array([1, 3])}),
    "Split, one part unread": ("p, q = Split<axis=1>(a, sizes)\ny = Exp(q)", {"sizes": np.array([1, 3])}),
    "Pad": ("y = Pad(a, pads)", {"pads": np.array([0, 2, 0, 1, 0, 0, 3, 0])}),
    "Gather": ("y = Gather<axis=1>(a, picked)", {"picked": np.array([3, 0])}),
    "Reshape": ("y = Reshape(a, to)", {"to": np.array([0, -1, 7])}),
    "Expand": ("m = ReduceMean<axes=[1]>(a)\ny = Expand(m, to)", {"to": np.array([3, 4, 6, 7])}),
    "Resize, linear": ('y = Resize<mode="linear">(a, , scales)', {"scales": np.array([1, 1, 2, 1.5], np.float32)}),
    "Resize, nearest": ('y = Resize<mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor">(a, , , sizes)', {"sizes": np.array([3, 4, 12, 7])}),
    "a weight read twice": ("r = Relu(a)\np = Conv(r, v)\ns = Tanh(p)\ny = Conv(s, v)", {"v": (4, 4, 2, 2)}),
}  # fmt: skip


@pytest.mark.parametrize("name", AFTER)
def test_gradients_are_those_of_differences_of_the_loss(name: str) -> None:
    body, weights = AFTER[name]
    if "auto_pad" in body and tuple(map(int, onnx.__version__.split(".")[:2])) < (1, 23):
        pytest.skip("the reference implementation of this onnx pads wrongly")
    model = with_loss(build(f"{FIRST}\n{body}", {**C, **weights}, x=(3, 3, 6, 7)))
    trainable = [key for key in ("w", "b", "v", "c") if key in {**C, **weights}]
    x = np.random.default_rng(1).normal(size=(3, 3, 6, 7)).astype(np.float32)
    found, gradients = derived(model, trainable, x)
    assert not found.obstacles and set(gradients) == set(trainable)
    rng = np.random.default_rng(2)
    for key, gradient in gradients.items():
        direction = rng.normal(size=gradient.shape)
        wanted = difference_quotient(model, x, key, direction, ROUGH.get(name, STEP))
        scale = np.linalg.norm(gradient) * np.linalg.norm(direction) / np.sqrt(gradient.size)
        assert float((gradient * direction).sum()) == pytest.approx(wanted, abs=2e-4 * scale + 1e-6), key
        assert scale > 1e-4  # a zero would pass for anything


def test_a_wrong_gradient_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "Tanh", RULES["Identity"])
    with pytest.raises(AssertionError):
        test_gradients_are_those_of_differences_of_the_loss("Tanh")


def test_weights_behind_an_operator_without_a_rule_are_left_out_and_the_node_is_named() -> None:
    body = "a = MatMul(x, w)\nb = CumSum(a, axis)\nc = MatMul(a, u)\nd = Add(b, c)\ny = MatMul(d, v)"
    weights = {"w": (4, 5), "u": (5, 5), "v": (5, 2), "axis": np.array(1)}
    model = with_loss(build(body, weights, x=(3, 4)))
    found, gradients = derived(model, ["w", "u", "v"], np.ones((3, 4), np.float32))
    assert set(gradients) == {"u", "v"}  # w reaches the loss around the CumSum too, but that is half of its gradient
    assert found.obstacles == (("CumSum_1", "CumSum", "has no gradient rule"),)


def test_a_weight_that_the_loss_does_not_depend_on_has_no_gradient() -> None:
    model = with_loss(build("a = MatMul(x, w)\nb = MatMul(a, v)\ny = Relu(a)", {"w": (4, 5), "v": (5, 2)}, x=(3, 4)))
    found, gradients = derived(model, ["w", "v"], np.ones((3, 4), np.float32))
    assert set(gradients) == {"w"} and not found.obstacles


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_of_grouped_convolutions_are_those_of_pytorch(groups: int, transposed: bool) -> None:
    torch = pytest.importorskip("torch")
    op = "ConvTranspose" if transposed else "Conv"
    shape = (4, 8 // groups, 3, 3) if transposed else (8, 4 // groups, 3, 3)
    body = f"a = Mul(x, w)\nb = {op}<group={groups}, strides=[2,2], pads=[1,1,1,1]>(a, v)\ny = Tanh(b)"
    model = build(body, {"w": (4, 1, 1), "v": shape}, x=(2, 4, 7, 6))
    stored = {
        tensor.name: torch.tensor(numpy_helper.to_array(tensor), requires_grad=True)
        for tensor in model.graph.initializer
    }
    x = np.random.default_rng(3).normal(size=(2, 4, 7, 6)).astype(np.float32)
    _, gradients = derived(with_loss(model), ["w", "v"], x)
    function = torch.nn.functional.conv_transpose2d if transposed else torch.nn.functional.conv2d
    y = torch.tanh(function(torch.tensor(x) * stored["w"], stored["v"], stride=2, padding=1, groups=groups))
    factor = torch.cos(torch.arange(y.numel(), dtype=torch.float64)).reshape(y.shape).float()
    ((y * factor).sum() + (y * y).mean()).backward()
    for name, gradient in gradients.items():
        np.testing.assert_allclose(gradient, stored[name].grad.numpy(), atol=2e-4 * np.abs(gradient).max())

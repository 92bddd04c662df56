"""What each operator does to gradients: one rule for each, and the tape that the rules write on.

A rule is called with a node, the gradients of the loss with respect to its outputs, and the positions of the inputs
whose gradients are wanted; it returns them by position. All shapes are fixed, so that a rule states every shape as a
constant and never asks for one at run time. The operators written on the tape are those of operator set 17 that did not
change since.

Sources: a convolution is linear in its data and in its weight, so that both gradients are its adjoints: of the data a
transposed convolution, of the weight the product of the output gradient with the patches (Goodfellow, Bengio and
Courville, "Deep Learning", 9.5). The others are derivatives of the formulas in the ONNX operator documentation.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from lindep_onnx.model.ir import Model, Node
from lindep_onnx.model.shapes import ShapeInfo
from lindep_onnx.model.weighted import pads_implicitly, window_of
from lindep_onnx.structure.rules.registry import registering

Array: TypeAlias = NDArray[Any]
Gradients: TypeAlias = Mapping[int, str]
#: Called with the node, the gradient of each output (None where nothing reads it), the wanted positions and the tape.
Rule: TypeAlias = "Callable[[Node, Sequence[str | None], frozenset[int], Tape], Gradients]"

#: Operators whose outputs do not change under small changes of their inputs: nothing flows back through them.
FLAT = frozenset(
    [
        "ArgMax",
        "ArgMin",
        "And",
        "Ceil",
        "ConstantOfShape",
        "Equal",
        "Floor",
        "Greater",
        "GreaterOrEqual",
        "IsInf",
        "IsNaN",
        "Less",
        "LessOrEqual",
        "NonZero",
        "Not",
        "Or",
        "Round",
        "Shape",
        "Sign",
        "Size",
        "Xor",
    ]
)


class Unsupported(Exception):  # noqa: N818 - says what is missing, to the walk over the graph only
    """This use of an operator has no gradient here; the message says why."""


class Tape:
    """The nodes of a backward pass, in the making.

    Args:
        model: the forward graph.
        shape_info: its constants and shapes; every shape on the way must be fixed.
        dtype: element type of weights, activations and gradients.

    Attributes:
        nodes: in topological order.
        constants: arrays that the nodes read, by name.
        extra: outputs to add to forward nodes, by (node index, position).
    """

    def __init__(self, model: Model, shape_info: ShapeInfo, dtype: np.dtype[Any]) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, Array] = {}
        self.extra: dict[tuple[int, int], str] = {}
        self.dtype = dtype
        self._model, self._shape_info = model, shape_info
        self._known: dict[tuple[bytes, tuple[int, ...], str], str] = {}
        self._names = (f"lindep_onnx_grad_{number}" for number in itertools.count())

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a forward tensor.

        Raises:
            Unsupported: it is not fixed.
        """
        shape = self._shape_info.shapes.get(name)
        if shape is None or not all(isinstance(size, int) for size in shape):
            raise Unsupported(f"the shape of {name!r} is not fixed")
        return tuple(int(size) for size in shape)

    def value(self, name: str) -> Array | None:
        """The value of a constant forward tensor, None for others."""
        return self._shape_info.constants.get(name)

    def required(self, name: str) -> Array:
        """The value of a tensor that a rule needs to know beforehand.

        Raises:
            Unsupported: it is computed at run time.
        """
        value = self.value(name)
        if value is None:
            raise Unsupported(f"{name!r} is computed at run time")
        return value

    def forward_output(self, node: Node, position: int) -> str:
        """Ask a forward node for an optional output."""
        if position < len(node.outputs) and node.outputs[position]:
            return node.outputs[position]
        return self.extra.setdefault((node.index, position), next(self._names))

    def constant(self, value: Array) -> str:
        """The name of a constant; equal ones are stored once."""
        key = (value.tobytes(), value.shape, str(value.dtype))
        if key not in self._known:
            self._known[key] = next(self._names)
            self.constants[self._known[key]] = value
        return self._known[key]

    def add(self, op: str, *inputs: str | Array | Sequence[int] | float, **attributes: Any) -> str:
        """Write a node with one output and return its name. Numbers are of the tape's type, sequences are int64."""
        names = [value if isinstance(value, str) else self.constant(self._array(value)) for value in inputs]
        output = next(self._names)
        self.nodes.append(onnx.helper.make_node(op, names, [output], **attributes))
        return output

    def _array(self, value: Array | Sequence[int] | float) -> Array:
        if isinstance(value, np.ndarray):
            return value if value.dtype.kind in "iub" else value.astype(self.dtype)
        return np.asarray(value, self.dtype) if isinstance(value, float) else np.asarray(value, np.int64)

    # ---- what several rules need -------------------------------------------------------------------------------

    def reshape(self, name: str, shape: Sequence[int]) -> str:
        """The same elements in another shape."""
        return self.add("Reshape", name, list(shape))

    def transpose(self, name: str, perm: Sequence[int]) -> str:
        """Axes in another order; nothing is written if the order stays."""
        return name if list(perm) == sorted(perm) else self.add("Transpose", name, perm=list(perm))

    def sum(self, name: str, axes: Sequence[int]) -> str:
        """Sum over axes, which stay with size 1."""
        return self.add("ReduceSum", name, list(axes), keepdims=1) if axes else name

    def mean(self, name: str, axes: Sequence[int]) -> str:
        """Mean over axes (not negative), which stay with size 1."""
        return (
            self.add("ReduceMean", name, keepdims=1, axes=list(axes))
            if self.opset < 18
            else self.add("ReduceMean", name, list(axes), keepdims=1)
        )

    @property
    def opset(self) -> int:
        """Operator set of the graph."""
        return self._model.opset

    def mask(self, condition: str) -> str:
        """A bool tensor as zeros and ones."""
        return self.add("Cast", condition, to=onnx.helper.np_dtype_to_tensor_dtype(self.dtype))

    def unbroadcast(self, name: str, shape: Sequence[int], target: Sequence[int]) -> str:
        """Sum a gradient of a broadcast result down to the shape of the operand."""
        ahead = len(shape) - len(target)
        axes = [axis for axis in range(len(shape)) if axis < ahead or target[axis - ahead] != shape[axis]]
        return name if not axes else self.reshape(self.sum(name, axes), target)

    def pick_back(self, name: str, shape: Sequence[int], axis: int, picked: Array, size: int) -> str:
        """The gradient of picking positions along an axis: each goes back to its place, zeros elsewhere.

        Args:
            name: gradient of what was picked.
            shape: of that gradient.
            axis: along which.
            picked: places that were picked, in order.
            size: of the axis that was picked from.

        Raises:
            Unsupported: a position was picked twice.
        """
        if len(np.unique(picked)) != len(picked):
            raise Unsupported("a position is read twice")
        begin = int(picked[0]) if len(picked) else 0
        if np.array_equal(picked, np.arange(begin, begin + len(picked))):
            pads = np.zeros((2, len(shape)), np.int64)
            pads[:, axis] = begin, size - begin - len(picked)
            return self.add("Pad", name, pads.ravel()) if pads.any() else name
        zero = np.zeros([1 if place == axis else length for place, length in enumerate(shape)])
        source = np.full(size, len(picked), np.int64)
        source[picked] = np.arange(len(picked))
        return self.add("Gather", self.add("Concat", name, zero, axis=axis), source, axis=axis)


_RULES: dict[str, Rule] = {}


def gradients_of(*ops: str) -> Callable[[Rule], Rule]:
    """Register a rule for some operator types."""
    return registering(_RULES, ops)


def gradient_rule(op: str) -> Rule | None:
    """The rule of an operator type, None where there is none."""
    return _RULES.get(op)


def _axis(node: Node, default: int, rank: int) -> int:
    return int(node.attributes.get("axis", default)) % rank


def _first(given: Sequence[str | None]) -> str:
    """The gradient of the first output, where no other output may carry one."""
    if given[0] is None or any(name is not None for name in given[1:]):
        raise Unsupported("an output other than the first is read")
    return given[0]


# ---- products -----------------------------------------------------------------------------------------------------


@gradients_of("Conv")
def _conv(node: Node, given: Sequence[str | None], wanted: frozenset[int], tape: Tape) -> Gradients:
    window = _Window(node, tape.shape(node.inputs[0]), tape.shape(node.inputs[1]))
    dy, found = _first(given), {}
    if 0 in wanted:
        found[0] = window.adjoint(tape, dy, node.inputs[1], tape.shape(node.outputs[0]))
    if 1 in wanted:
        found[1] = window.weight(tape, node.inputs[0], dy, tape.shape(node.outputs[0]))
    if 2 in wanted:
        found[2] = _channel_sum(tape, dy, tape.shape(node.outputs[0]))
    return found


@gradients_of("ConvTranspose")
def _conv_transpose(node: Node, given: Sequence[str | None], wanted: frozenset[int], tape: Tape) -> Gradients:
    """The adjoint of a convolution that reads this node's output, so that the roles of data and gradient swap."""
    if pads_implicitly(node):
        raise Unsupported("its padding is implicit")
    window = _Window(node, tape.shape(node.outputs[0]), tape.shape(node.inputs[1]))
    dy, found = _first(given), {}
    if 0 in wanted:
        found[0] = tape.add("Conv", dy, node.inputs[1], **window.attributes)
    if 1 in wanted:
        found[1] = window.weight(tape, dy, node.inputs[0], tape.shape(node.inputs[0]))
    if 2 in wanted:
        found[2] = _channel_sum(tape, dy, tape.shape(node.outputs[0]))
    return found


def _channel_sum(tape: Tape, dy: str, shape: Sequence[int]) -> str:
    axes = [axis for axis in range(len(shape)) if axis != 1]
    return tape.reshape(tape.sum(dy, axes), [shape[1]])


class _Window:
    """A convolution from data (B, C, S...) with weight (M, C / group, K...), all numbers explicit."""

    def __init__(self, node: Node, data: Sequence[int], weight: Sequence[int]) -> None:
        window = window_of(node, weight[2:], data[2:])
        self.data, self.weight_shape = tuple(data), tuple(weight)
        self.kernel, self.strides, self.dilations = window.kernel, list(window.strides), list(window.dilations)
        self.group = int(node.attributes.get("group", 1))
        self.pads = [begin for begin, _ in window.pads] + [end for _, end in window.pads]
        self.attributes = {
            "strides": self.strides,
            "dilations": self.dilations,
            "pads": self.pads,
            "group": self.group,
            "kernel_shape": list(self.kernel),
        }

    def adjoint(self, tape: Tape, dy: str, weight: str, output: Sequence[int]) -> str:
        """The gradient of the data, (B, C, S...)."""
        # What the strides leave over was never read, but the gradient has it.
        return tape.add("ConvTranspose", dy, weight, output_padding=self._left(output), **self.attributes)

    def _left(self, output: Sequence[int]) -> list[int]:
        """Positions at the end of each spatial axis that the strides leave over."""
        spatial = len(self.kernel)
        return [
            self.data[2 + k]
            - ((output[2 + k] - 1) * self.strides[k] + (self.kernel[k] - 1) * self.dilations[k] + 1)
            + self.pads[k]
            + self.pads[spatial + k]
            for k in range(spatial)
        ]

    def weight(self, tape: Tape, data: str, dy: str, output: Sequence[int]) -> str:
        """The gradient of the weight, (M, C / group, K...).

        Patches times output gradient, a matrix for each sample and group. As a convolution whose kernel is the output
        gradient it took 1.5 to 3 times as long in ONNX Runtime (32 images, 16 to 64 channels, 3 x 3), but a sixth to
        two thirds of the time where each group reads one channel (4 images, 32 to 1,152 channels, 3 x 3 and 5 x 5).
        """
        if self.weight_shape[1] == 1:
            return self._depthwise_weight(tape, data, dy, output)
        spatial, group = len(self.kernel), self.group
        batch, channels = self.data[:2]
        outputs, positions = output[1], math.prod(output[2:])
        if any(self.pads):
            before, after = self.pads[:spatial], self.pads[spatial:]
            data = tape.add("Pad", data, [0, 0, *before, 0, 0, *after])
        taps = []
        for tap in itertools.product(*(range(size) for size in self.kernel)):
            starts = [at * step for at, step in zip(tap, self.dilations, strict=True)]
            ends = [
                start + (size - 1) * step + 1
                for start, size, step in zip(starts, output[2:], self.strides, strict=True)
            ]
            axes = list(range(2, 2 + spatial))
            seen = tape.add("Slice", data, starts, ends, axes, self.strides)
            taps.append(tape.reshape(seen, [batch, group, channels // group, positions]))
        patches = taps[0] if len(taps) == 1 else tape.add("Concat", *taps, axis=2)
        each = tape.reshape(dy, [batch, group, outputs // group, positions])
        product = tape.add("MatMul", each, tape.transpose(patches, [0, 1, 3, 2]))
        total = tape.reshape(tape.sum(product, [0]), [outputs, len(taps), channels // group])
        return tape.reshape(tape.transpose(total, [0, 2, 1]), [outputs, channels // group, *self.kernel])

    def _depthwise_weight(self, tape: Tape, data: str, dy: str, output: Sequence[int]) -> str:
        """The same as one convolution, each channel of each sample a group; strides and dilations trade places."""
        spatial, batch = len(self.kernel), self.data[0]
        sizes = self.data[2:]
        before = self.pads[:spatial]
        after = [pad - left for pad, left in zip(self.pads[spatial:], self._left(output), strict=True)]
        if min(after) < 0:
            data = tape.add("Pad", data, [0, 0, *before, 0, 0, *after])
            sizes = tuple(size + a + b for size, a, b in zip(sizes, before, after, strict=True))
            before = after = [0] * spatial
        found = tape.add(
            "Conv",
            tape.reshape(data, [1, batch * self.data[1], *sizes]),
            tape.reshape(dy, [batch * output[1], 1, *output[2:]]),
            group=batch * self.data[1],
            pads=[*before, *after],
            strides=self.dilations,
            dilations=self.strides,
        )
        each = tape.reshape(found, [batch, output[1], 1, *self.kernel])
        return tape.reshape(tape.sum(each, [0]), self.weight_shape)


@gradients_of("Gemm")
def _gemm(node: Node, given: Sequence[str | None], wanted: frozenset[int], tape: Tape) -> Gradients:
    dy, found = _first(given), {}
    a, b = node.inputs[:2]
    alpha, beta = float(node.attributes.get("alpha", 1.0)), float(node.attributes.get("beta", 1.0))
    turned_a, turned_b = (int(node.attributes.get(name, 0)) for name in ("transA", "transB"))
    if 0 in wanted:
        found[0] = (
            tape.add("Gemm", b, dy, alpha=alpha, transA=turned_b, transB=1)
            if turned_a
            else tape.add("Gemm", dy, b, alpha=alpha, transB=1 - turned_b)
        )
    if 1 in wanted:
        found[1] = (
            tape.add("Gemm", dy, a, alpha=alpha, transA=1, transB=turned_a)
            if turned_b
            else tape.add("Gemm", a, dy, alpha=alpha, transA=1 - turned_a)
        )
    if 2 in wanted:
        summed = tape.unbroadcast(dy, tape.shape(node.outputs[0]), tape.shape(node.inputs[2]))
        found[2] = summed if beta == 1 else tape.add("Mul", summed, beta)
    return found


@gradients_of("MatMul")
def _matmul(node: Node, given: Sequence[str | None], wanted: frozenset[int], tape: Tape) -> Gradients:
    dy, found = _first(given), {}
    a, b = node.inputs
    shapes = [tape.shape(a), tape.shape(b)]
    if min(map(len, shapes)) < 2:
        raise Unsupported("an operand is a vector")
    out = tape.shape(node.outputs[0])
    if 0 in wanted:
        turned = tape.transpose(b, [*range(len(shapes[1]) - 2), len(shapes[1]) - 1, len(shapes[1]) - 2])
        shape = [*out[:-2], *shapes[0][-2:]]
        found[0] = tape.unbroadcast(tape.add("MatMul", dy, turned), shape, shapes[0])
    if 1 in wanted and len(shapes[1]) == 2:  # one product over all leading axes
        rows = math.prod(out[:-1])
        left = a if math.prod(shapes[0][:-1]) == rows else ""
        if not left:
            raise Unsupported("a matrix is broadcast against its own leading axes")
        flat_a, flat_dy = tape.reshape(left, [rows, shapes[0][-1]]), tape.reshape(dy, [rows, out[-1]])
        found[1] = tape.add("Gemm", flat_a, flat_dy, transA=1)
    elif 1 in wanted:
        turned = tape.transpose(a, [*range(len(shapes[0]) - 2), len(shapes[0]) - 1, len(shapes[0]) - 2])
        shape = [*out[:-2], *shapes[1][-2:]]
        found[1] = tape.unbroadcast(tape.add("MatMul", turned, dy), shape, shapes[1])
    return found


# ---- element by element -------------------------------------------------------------------------------------------


@gradients_of("Add", "Sub", "Mul", "Div", "Sum", "Mean")
def _arithmetic(node: Node, given: Sequence[str | None], wanted: frozenset[int], tape: Tape) -> Gradients:
    dy, found = _first(given), {}
    out = tape.shape(node.outputs[0])
    for position in sorted(wanted):
        if node.op == "Mul":
            flowing = tape.add("Mul", dy, node.inputs[1 - position])
        elif node.op == "Div":
            flowing = tape.add("Div", dy, node.inputs[1])
            if position == 1:
                flowing = tape.add("Neg", tape.add("Mul", flowing, node.outputs[0]))
        else:
            flowing = tape.add("Neg", dy) if node.op == "Sub" and position == 1 else dy
            flowing = tape.add("Mul", dy, 1 / len(node.inputs)) if node.op == "Mean" else flowing
        found[position] = tape.unbroadcast(flowing, out, tape.shape(node.inputs[position]))
    return found


@gradients_of("Identity", "Dropout", "Neg", "Abs", "Sqrt", "Exp", "Log", "Reciprocal", "Erf", "Pow")
def _unary(node: Node, given: Sequence[str | None], wanted: frozenset[int], tape: Tape) -> Gradients:
    dy = _first(given)
    x, y = node.inputs[0], node.outputs[0]
    if wanted - {0}:
        raise Unsupported("an input other than the first depends on a weight")
    if node.op == "Dropout" and node.input(2) and bool(np.any(tape.required(node.inputs[2]))):
        raise Unsupported("it is in training mode")
    if node.op in ("Identity", "Dropout"):
        return {0: dy}
    if node.op == "Neg":
        return {0: tape.add("Neg", dy)}
    if node.op == "Sqrt":
        return {0: tape.add("Div", tape.add("Mul", dy, 0.5), y)}
    if node.op == "Log":
        return {0: tape.add("Div", dy, x)}
    if node.op == "Pow":
        exponent = tape.required(node.inputs[1]).astype(np.float64)
        raised = tape.add("Pow", x, exponent - 1)
        flowing = tape.add("Mul", dy, tape.add("Mul", raised, exponent))
        return {0: tape.unbroadcast(flowing, tape.shape(y), tape.shape(x))}
    if node.op == "Abs":
        slope = tape.add("Sign", x)
    elif node.op == "Exp":
        slope = y
    elif node.op == "Reciprocal":
        slope = tape.add("Neg", tape.add("Mul", y, y))
    else:  # Erf
        bell = tape.add("Exp", tape.add("Neg", tape.add("Mul", x, x)))
        slope = tape.add("Mul", bell, 2 / math.sqrt(math.pi))
    return {0: tape.add("Mul", dy, slope)}


@gradients_of("Relu", "LeakyRelu", "Elu", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "Softplus", "Gelu")
def _activation(node: Node, given: Sequence[str | None], wanted: frozenset[int], tape: Tape) -> Gradients:
    return {0: tape.add("Mul", _first(given), _slope(node, tape))}


def _slope(node: Node, tape: Tape) -> str:
    """The derivative of an activation at its input."""
    x, y, attributes = node.inputs[0], node.outputs[0], node.attributes

    def positive(name: str) -> str:
        return tape.mask(tape.add("Greater", name, 0.0))

    if node.op == "Relu":
        return positive(y)
    if node.op == "LeakyRelu":
        alpha = float(attributes.get("alpha", 0.01))
        return tape.add("Add", tape.add("Mul", positive(x), 1 - alpha), alpha)
    if node.op == "Elu":
        alpha = float(attributes.get("alpha", 1.0))
        return tape.add("Where", tape.add("Greater", x, 0.0), 1.0, tape.add("Add", y, alpha))
    if node.op == "Sigmoid":
        return tape.add("Mul", y, tape.add("Sub", 1.0, y))
    if node.op == "Tanh":
        return tape.add("Sub", 1.0, tape.add("Mul", y, y))
    if node.op == "HardSigmoid":
        return tape.add("Mul", _between(tape, y, 0.0, 1.0), float(attributes.get("alpha", 0.2)))
    if node.op == "HardSwish":  # x min(max(x + 3, 0), 6) / 6
        inside = tape.add("Add", tape.add("Mul", x, 1 / 3), 0.5)
        return tape.add(
            "Where", tape.add("Less", tape.add("Abs", x), 3.0), inside, tape.mask(tape.add("Greater", x, 0.0))
        )
    if node.op == "Softplus":
        return tape.add("Sigmoid", x)
    if attributes.get("approximate", "none") != "none":
        raise Unsupported("it is approximated by tanh")
    share = tape.add("Mul", tape.add("Add", tape.add("Erf", tape.add("Mul", x, math.sqrt(0.5))), 1.0), 0.5)
    bell = tape.add("Exp", tape.add("Mul", tape.add("Mul", x, x), -0.5))
    return tape.add("Add", share, tape.add("Mul", tape.add("Mul", x, bell), 1 / math.sqrt(2 * math.pi)))


def _between(tape: Tape, name: str, low: float | str, high: float | str) -> str:
    return tape.mask(tape.add("And", tape.add("Greater", name, low), tape.add("Less", name, high)))


@gradients_of("Clip")
def _clip(node: Node, given: Sequence[str | None], wanted: frozenset[int], tape: Tape) -> Gradients:
    if wanted - {0}:
        raise Unsupported("a bound depends on a weight")
    bounds = [
        node.inputs[position] if node.input(position) else sign * float(np.finfo(tape.dtype).max)
        for position, sign in ((1, -1), (2, 1))
    ]
    return {0: tape.add("Mul", _first(given), _between(tape, node.outputs[0], *bounds))}


@gradients_of("PRelu")
def _prelu(node: Node, given: Sequence[str | None], wanted: frozenset[int], tape: Tape) -> Gradients:
    x, slope = node.inputs
    dy, found = _first(given), {}
    if 0 in wanted:
        steep = tape.mask(tape.add("Greater", x, 0.0))
        flat = tape.add("Mul", slope, tape.add("Sub", 1.0, steep))
        found[0] = tape.add("Mul", dy, tape.add("Add", steep, flat))
    if 1 in wanted:
        flowing = tape.add("Mul", dy, tape.add("Min", x, 0.0))
        found[1] = tape.unbroadcast(flowing, tape.shape(x), tape.shape(slope))
    return found


@gradients_of("Where")
def _where(node: Node, given: Sequence[str | None], wanted: frozenset[int], tape: Tape) -> Gradients:
    dy, chosen = _first(given), tape.mask(node.inputs[0])
    out, found = tape.shape(node.outputs[0]), {}
    for position in sorted(wanted - {0}):
        share = chosen if position == 1 else tape.add("Sub", 1.0, chosen)
        found[position] = tape.unbroadcast(tape.add("Mul", dy, share), out, tape.shape(node.inputs[position]))
    return found


@gradients_of("Cast")
def _cast(node: Node, given: Sequence[str | None], wanted: frozenset[int], tape: Tape) -> Gradients:
    if int(node.attributes["to"]) != onnx.helper.np_dtype_to_tensor_dtype(tape.dtype):
        raise Unsupported("it leaves the element type of the weights")
    return {0: _first(given)}


# ---- normalisation and sums ---------------------------------------------------------------------------------------


@gradients_of("Softmax", "LogSoftmax")
def _softmax(node: Node, given: Sequence[str | None], wanted: frozenset[int], tape: Tape) -> Gradients:
    dy, y = _first(given), node.outputs[0]
    axis = _axis(node, -1, len(tape.shape(y)))
    if node.op == "Softmax":
        inner = tape.sum(tape.add("Mul", dy, y), [axis])
        return {0: tape.add("Mul", y, tape.add("Sub", dy, inner))}
    return {0: tape.add("Sub", dy, tape.add("Mul", tape.add("Exp", y), tape.sum(dy, [axis])))}


@gradients_of("BatchNormalization")
def _batch_normalization(node: Node, given: Sequence[str | None], wanted: frozenset[int], tape: Tape) -> Gradients:
    """Mean and variance are fixed: y = scale (x - mean) / deviation + bias."""
    if node.attributes.get("training_mode", 0):
        raise Unsupported("it is in training mode")
    if wanted & {3, 4}:
        raise Unsupported("its statistics depend on a weight")
    dy, found = _first(given), {}
    shape = tape.shape(node.inputs[0])
    aligned = [-1, *(1,) * (len(shape) - 2)]
    variance = tape.add("Add", node.inputs[4], float(node.attributes.get("epsilon", 1e-5)))
    deviation = tape.add("Sqrt", variance)
    if 0 in wanted:
        factor = tape.reshape(tape.add("Div", node.inputs[1], deviation), aligned)
        found[0] = tape.add("Mul", dy, factor)
    if 1 in wanted:
        centred = tape.add("Sub", node.inputs[0], tape.reshape(node.inputs[3], aligned))
        product = _channel_sum(tape, tape.add("Mul", dy, centred), shape)
        found[1] = tape.add("Div", product, deviation)
    if 2 in wanted:
        found[2] = _channel_sum(tape, dy, shape)
    return found


@gradients_of("LayerNormalization")
def _layer_normalization(node: Node, given: Sequence[str | None], wanted: frozenset[int], tape: Tape) -> Gradients:
    dy, found = _first(given), {}
    x, scale = node.inputs[:2]
    shape = tape.shape(x)
    axes = list(range(_axis(node, -1, len(shape)), len(shape)))
    centred = tape.add("Sub", x, tape.mean(x, axes))
    variance = tape.mean(tape.add("Mul", centred, centred), axes)
    deviation = tape.add("Sqrt", tape.add("Add", variance, float(node.attributes.get("epsilon", 1e-5))))
    normal = tape.add("Div", centred, deviation)
    if 0 in wanted:
        inner = tape.add("Mul", dy, scale)
        along = tape.add("Mul", normal, tape.mean(tape.add("Mul", inner, normal), axes))
        rest = tape.add("Sub", tape.add("Sub", inner, tape.mean(inner, axes)), along)
        found[0] = tape.add("Div", rest, deviation)
    if 1 in wanted:
        found[1] = tape.unbroadcast(tape.add("Mul", dy, normal), shape, tape.shape(scale))
    if 2 in wanted:
        found[2] = tape.unbroadcast(dy, shape, tape.shape(node.inputs[2]))
    return found


@gradients_of("ReduceSum", "ReduceMean", "GlobalAveragePool")
def _reduction(node: Node, given: Sequence[str | None], wanted: frozenset[int], tape: Tape) -> Gradients:
    shape = tape.shape(node.inputs[0])
    if node.op == "GlobalAveragePool":
        axes = list(range(2, len(shape)))
    elif node.input(1):
        axes = [int(axis) for axis in tape.required(node.inputs[1]).ravel()]
    else:
        axes = [int(axis) for axis in node.attributes.get("axes", ())]
    if not axes and node.attributes.get("noop_with_empty_axes", 0):
        return {0: _first(given)}
    axes = sorted(axis % len(shape) for axis in axes) or list(range(len(shape)))
    dy = tape.reshape(_first(given), [1 if axis in axes else size for axis, size in enumerate(shape)])
    if node.op != "ReduceSum":
        dy = tape.add("Mul", dy, 1 / math.prod(shape[axis] for axis in axes))
    return {0: tape.add("Expand", dy, list(shape))}


# ---- pooling ------------------------------------------------------------------------------------------------------


@gradients_of("MaxPool")
def _max_pool(node: Node, given: Sequence[str | None], wanted: frozenset[int], tape: Tape) -> Gradients:
    """Each output passes its gradient to the one position that it was read from."""
    if node.attributes.get("storage_order", 0):
        raise Unsupported("its indices count columns first")
    shape = tape.shape(node.inputs[0])
    size = math.prod(shape)
    places = tape.reshape(tape.forward_output(node, 1), [-1])
    flat = tape.reshape(_first(given), [-1])
    zeros = tape.add("Expand", np.zeros(1), [size])
    return {0: tape.reshape(tape.add("ScatterElements", zeros, places, flat, axis=0, reduction="add"), shape)}


@gradients_of("AveragePool")
def _average_pool(node: Node, given: Sequence[str | None], wanted: frozenset[int], tape: Tape) -> Gradients:
    """The adjoint of a depthwise convolution with ones, divided by what each window counts."""
    if node.attributes.get("ceil_mode", 0):
        raise Unsupported("it rounds sizes up")
    shape, out = tape.shape(node.inputs[0]), tape.shape(node.outputs[0])
    kernel = [int(n) for n in node.attributes["kernel_shape"]]
    window = _Window(node, [shape[0], shape[1], *shape[2:]], [shape[1], 1, *kernel])
    window.attributes["group"] = shape[1]
    counts = np.ones(out[2:])
    for axis in range(len(kernel)):
        reach = np.arange(kernel[axis]) * window.dilations[axis] - window.pads[axis]
        places = np.arange(out[2 + axis])[:, None] * window.strides[axis] + reach
        inside = ((places >= 0) & (places < shape[2 + axis])).sum(axis=1)
        own = np.full(len(inside), kernel[axis]) if node.attributes.get("count_include_pad", 0) else inside
        counts = counts * own.reshape([-1 if place == axis else 1 for place in range(len(kernel))])
    ones = np.ones((shape[1], 1, *kernel))
    return {
        0: window.adjoint(tape, tape.add("Div", _first(given), counts), tape.constant(ones.astype(tape.dtype)), out)
    }


@gradients_of("Resize")
def _resize(node: Node, given: Sequence[str | None], wanted: frozenset[int], tape: Tape) -> Gradients:
    """Interpolation is linear, an axis at a time: y = A x along each, so that the gradient is A' dy."""
    if wanted - {0}:
        raise Unsupported("an input other than the first depends on a weight")
    shape, out = tape.shape(node.inputs[0]), tape.shape(node.outputs[0])
    roi_or_more = {"coordinate_transformation_mode": "tf_crop_and_resize"}
    if any(node.attributes.get(name) == value for name, value in roi_or_more.items()) or "axes" in node.attributes:
        raise Unsupported("it crops, or names its axes")
    scales = tape.required(node.inputs[2]).ravel() if node.input(2) and tape.required(node.inputs[2]).size else None
    flowing, rank = _first(given), len(shape)
    for axis in range(rank):
        if shape[axis] == out[axis] and (scales is None or scales[axis] == 1):
            continue
        matrix = _interpolation(node, shape[axis], out[axis], None if scales is None else float(scales[axis]), tape)
        last = [*(place for place in range(rank) if place != axis), axis]
        moved = tape.add("MatMul", tape.transpose(flowing, last), matrix)
        flowing = tape.transpose(moved, [int(place) for place in np.argsort(last)])
    return {0: flowing}


def _interpolation(node: Node, size: int, wanted: int, scale: float | None, tape: Tape) -> Array:
    """(wanted, size): what a Resize node does along one axis, asked of the reference implementation."""
    names = ["x", "", "scales"] if scale is not None else ["x", "", "", "sizes"]
    text = {key: value for key, value in node.attributes.items() if key != "antialias"}
    single = onnx.helper.make_node("Resize", names, ["y"], **text)
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [single],
        "axis",
        [
            value("x", onnx.TensorProto.FLOAT, [size, size]),
            value("scales", onnx.TensorProto.FLOAT, [2]) if scale is not None else value("sizes", 7, [2]),
        ],
        [value("y", onnx.TensorProto.FLOAT, None)],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", tape.opset)])
    target: Array = np.array([1, scale], np.float32) if scale is not None else np.array([size, wanted], np.int64)
    feeds = {"x": np.eye(size, dtype=np.float32), names[-1]: target}
    (found,) = ReferenceEvaluator(model).run(None, feeds)
    return np.asarray(found).T.copy()


# ---- shapes -------------------------------------------------------------------------------------------------------


@gradients_of("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def _reshaped(node: Node, given: Sequence[str | None], wanted: frozenset[int], tape: Tape) -> Gradients:
    return {0: tape.reshape(_first(given), tape.shape(node.inputs[0]))}


@gradients_of("Transpose")
def _transposed(node: Node, given: Sequence[str | None], wanted: frozenset[int], tape: Tape) -> Gradients:
    rank = len(tape.shape(node.inputs[0]))
    perm = node.attributes.get("perm", range(rank)[::-1])
    return {0: tape.transpose(_first(given), [int(place) for place in np.argsort(list(perm))])}


@gradients_of("Expand")
def _expanded(node: Node, given: Sequence[str | None], wanted: frozenset[int], tape: Tape) -> Gradients:
    return {0: tape.unbroadcast(_first(given), tape.shape(node.outputs[0]), tape.shape(node.inputs[0]))}


@gradients_of("Concat")
def _concatenated(node: Node, given: Sequence[str | None], wanted: frozenset[int], tape: Tape) -> Gradients:
    dy, axis = _first(given), _axis(node, 0, len(tape.shape(node.outputs[0])))
    ends = np.cumsum([tape.shape(name)[axis] for name in node.inputs])
    return {
        position: tape.add("Slice", dy, [int(ends[position] - tape.shape(name)[axis])], [int(ends[position])], [axis])
        for position, name in enumerate(node.inputs)
        if position in wanted
    }


@gradients_of("Split")
def _split(node: Node, given: Sequence[str | None], wanted: frozenset[int], tape: Tape) -> Gradients:
    axis = _axis(node, 0, len(tape.shape(node.inputs[0])))
    parts = [
        name if name is not None else tape.constant(np.zeros(tape.shape(output), tape.dtype))
        for name, output in zip(given, node.outputs, strict=True)
    ]
    return {0: tape.add("Concat", *parts, axis=axis)}


@gradients_of("Slice")
def _sliced(node: Node, given: Sequence[str | None], wanted: frozenset[int], tape: Tape) -> Gradients:
    shape, out = tape.shape(node.inputs[0]), list(tape.shape(node.outputs[0]))
    starts, ends = (tape.required(node.inputs[position]).ravel().tolist() for position in (1, 2))
    axes = tape.required(node.inputs[3]).ravel().tolist() if node.input(3) else list(range(len(starts)))
    steps = tape.required(node.inputs[4]).ravel().tolist() if node.input(4) else [1] * len(starts)
    flowing = _first(given)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        size = shape[axis]
        # Bounds beyond the axis mean its end, as in Python; -1 of a negative step has no Python form but None.
        stop = None if step < 0 and end < -size else end
        picked = np.arange(size)[slice(start, stop, step)]
        flowing = tape.pick_back(flowing, out, axis % len(shape), picked, size)
        out[axis] = size
    return {0: flowing}


@gradients_of("Gather")
def _gathered(node: Node, given: Sequence[str | None], wanted: frozenset[int], tape: Tape) -> Gradients:
    shape = tape.shape(node.inputs[0])
    axis = _axis(node, 0, len(shape))
    picked = tape.required(node.inputs[1])
    flat = [*shape[:axis], picked.size, *shape[axis + 1 :]]
    flowing = tape.reshape(_first(given), flat)
    return {0: tape.pick_back(flowing, flat, axis, picked.ravel() % shape[axis], shape[axis])}


@gradients_of("Pad")
def _padded(node: Node, given: Sequence[str | None], wanted: frozenset[int], tape: Tape) -> Gradients:
    if node.attributes.get("mode", "constant") != "constant" or node.input(3):
        raise Unsupported("it repeats what is there, or names its axes")
    if wanted - {0}:
        raise Unsupported("what it pads with depends on a weight")
    shape = tape.shape(node.inputs[0])
    pads = tape.required(node.inputs[1]).ravel().tolist()
    if min(pads) < 0:
        raise Unsupported("it cuts")
    return {
        0: tape.add(
            "Slice",
            _first(given),
            pads[: len(shape)],
            [begin + size for begin, size in zip(pads, shape, strict=False)],
            list(range(len(shape))),
        )
    }

"""The operators that multiply by a weight, Conv, ConvTranspose, Gemm and MatMul: what there is to know about them.

Axis 0 of a weight counts all channels, axis 1 those of one group; what lies behind them is the kernel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lindep_onnx.model.node import Node

#: Positions of the inputs that may be weights: factors, and what is added.
WEIGHTS: Mapping[str, tuple[int, ...]] = {"Conv": (1, 2), "ConvTranspose": (1, 2), "Gemm": (0, 1, 2), "MatMul": (0, 1)}

#: Recurrent operators, and how many gates each has: parts of the state's size that every step computes.
GATES: Mapping[str, int] = {"RNN": 1, "GRU": 3, "LSTM": 4}


@dataclass(frozen=True)
class Weighted:
    """How a node multiplies by a weight.

    Attributes:
        inputs: axis of the weight that meets the channel axis of the data.
        outputs: axis of the weight that becomes the channel axis of the product.
        bias: name of what is added, empty if nothing is.
        group: how many parts the channels are divided into, each with its own share of the weight.
        scale: what the product is multiplied by.
        bias_scale: what the bias is multiplied by.
        transposed: whether each position is spread over a window (ConvTranspose), not gathered from one.
    """

    inputs: int
    outputs: int
    bias: str = ""
    group: int = 1
    scale: float = 1.0
    bias_scale: float = 1.0
    transposed: bool = False

    def widths(self, weight: Sequence[int]) -> tuple[int, int]:
        """Input and output channels of all groups, from the shape of the weight."""
        inputs, outputs = (int(weight[axis]) * (self.group if axis else 1) for axis in (self.inputs, self.outputs))
        return inputs, outputs

    def depthwise(self, weight: Sequence[int]) -> bool:
        """Whether every input channel is a group of its own."""
        return self.group > 1 and self.widths(weight)[0] == self.group

    def weight_shape(self, widths: tuple[int, int], kernel: Sequence[int]) -> tuple[int, ...]:
        """Undo `widths`."""
        sizes = {self.inputs: widths[0], self.outputs: widths[1]}
        return (sizes[0], sizes[1] // self.group, *kernel)


def weighted(node: Node, position: int = 1) -> Weighted | None:
    """What a node does with the weight at `position`, None for other operators; a MatMul has it on either side."""
    read = node.attributes.get
    if node.op in ("Conv", "ConvTranspose"):
        axes = (0, 1) if node.op == "ConvTranspose" else (1, 0)
        group = int(read("group", 1))
        return Weighted(*axes, node.input(2), group, transposed=node.op == "ConvTranspose")
    if node.op == "Gemm":
        axes = (1, 0) if read("transB", 0) else (0, 1)
        alpha, beta = float(read("alpha", 1.0)), float(read("beta", 1.0))
        return Weighted(*axes, node.input(2), scale=alpha, bias_scale=beta)
    if node.op == "MatMul":
        return Weighted(1 - position, position)
    return None


def macs(node: Node, data: Sequence[int], weight: Sequence[int], result: Sequence[int]) -> int:
    """Multiply-accumulates of a node, from the shapes of its two factors and of its output; 0 for other operators.

    The output of a recurrent layer may have any shape: its weights meet the input, and its state, at every step.
    """
    if node.op in GATES:
        return math.prod(data[:2]) * math.prod(weight[:2]) * (weight[2] + weight[1] // GATES[node.op])
    if node.op == "Einsum":
        return _summed(node.attributes["equation"], data, weight)
    layout = weighted(node)
    if layout is None:
        return 0
    if node.op == "MatMul":  # a batch of matrices, or a vector
        return math.prod(result) * weight[-2 if len(weight) > 1 else 0]
    if node.op == "Gemm":
        return math.prod(result) * weight[layout.inputs]
    return math.prod(data if layout.transposed else result) * math.prod(weight[1:])


def _summed(equation: str, data: Sequence[int], weight: Sequence[int]) -> int:
    """Products that an Einsum of two factors adds up: one for each value of all of its indices."""
    terms = equation.replace(" ", "").partition("->")[0].split(",")
    if len(terms) != 2 or [len(term) for term in terms] != [len(data), len(weight)] or "." in equation:
        return 0
    return math.prod(dict(zip("".join(terms), (*data, *weight), strict=True)).values())


@dataclass(frozen=True)
class Window:
    """The positions that a convolution or a pooling combines, all numbers explicit.

    Attributes:
        kernel: extent by spatial axis.
        strides: by spatial axis.
        dilations: by spatial axis.
        pads: (begin, end) zeros by spatial axis.
        transposed: whether the strides spread the input (ConvTranspose) rather than the windows.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    transposed: bool = False

    @property
    def padded(self) -> bool:
        """Whether any zeros stand beyond the border."""
        return any(map(any, self.pads))

    def output_size(self, axis: int, size: int) -> int:
        """How many positions a spatial axis of so many has afterwards."""
        reach = (self.kernel[axis] - 1) * self.dilations[axis] + 1
        pads = sum(self.pads[axis])
        if self.transposed:
            return self.strides[axis] * (size - 1) + reach - pads
        return (size + pads - reach) // self.strides[axis] + 1


def window_of(node: Node, kernel: Sequence[int], sizes: Sequence[int | str]) -> Window:
    """The window that a node moves over its input.

    Args:
        node: a convolution or a pooling; no ConvTranspose that `pads_implicitly`.
        kernel: its extent.
        sizes: of the spatial axes of the input; where one is unknown, the padding is the most that it may be.
    """
    spatial = len(kernel)
    strides = tuple(int(step) for step in node.attributes.get("strides", [1] * spatial))
    dilations = tuple(int(step) for step in node.attributes.get("dilations", [1] * spatial))
    flat = [0] * (2 * spatial)
    mode = node.attributes.get("auto_pad", "NOTSET")
    if mode == "NOTSET":
        flat = [int(pad) for pad in node.attributes.get("pads", flat)]
    elif mode != "VALID":
        for axis in range(spatial):
            size = sizes[axis]
            reach = (kernel[axis] - 1) * dilations[axis] + 1
            total = reach - 1
            if isinstance(size, int):
                total = max(0, (-(-size // strides[axis]) - 1) * strides[axis] + reach - size)
            less, more = total // 2, total - total // 2
            flat[axis], flat[axis + spatial] = (less, more) if mode == "SAME_UPPER" else (more, less)
    pads = tuple((flat[axis], flat[axis + spatial]) for axis in range(spatial))
    return Window(tuple(map(int, kernel)), strides, dilations, pads, transposed=node.op == "ConvTranspose")


def may_pad(node: Node) -> bool:
    """Whether a convolution may see zeros beyond the border, whatever the sizes."""
    return any(node.attributes.get("pads", ())) or node.attributes.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID")


def pads_implicitly(node: Node) -> bool:
    """Whether the padding of a ConvTranspose follows from an output size that is only known at run time."""
    return node.attributes.get("auto_pad", "NOTSET") != "NOTSET" or "output_shape" in node.attributes

"""Writing graphs: nodes of one output, one call each, and the tape that a backward pass is written on.

The operators written are those of operator set 17 that did not change since.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray

from lindep_onnx.model.ir import Model
from lindep_onnx.model.node import Node
from lindep_onnx.model.shapes import ShapeInfo

Array: TypeAlias = NDArray[Any]
#: A tensor by its name, or the value of a constant: numbers are of the writer's type, sequences are int64.
Operand: TypeAlias = "str | Array | Sequence[int] | float"


class Unsupported(Exception):  # noqa: N818 - says what is missing, to the walk over the graph only
    """This use of an operator has no gradient here; the message says why."""


class Writer:
    """Nodes in the making: `writer.Mul("x", 2.0, ...)` writes a node and returns the name of its output.

    Args:
        prefix: of the names of new tensors.
        dtype: element type of numbers.

    Attributes:
        nodes: in topological order.
        constants: arrays that the nodes read, by name.
    """

    def __init__(self, prefix: str, dtype: np.dtype[Any]) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, Array] = {}
        self.dtype = dtype
        self._known: dict[tuple[bytes, tuple[int, ...], str], str] = {}
        self._names = (f"{prefix}{number}" for number in itertools.count())

    def __getattr__(self, op: str) -> Callable[..., str]:
        if not op[:1].isupper():
            raise AttributeError(op)
        return partial(self._add, op)

    def _add(self, op: str, *inputs: Operand, **attributes: Any) -> str:
        names = [value if isinstance(value, str) else self.constant(self._array(value)) for value in inputs]
        output = next(self._names)
        self.nodes.append(onnx.helper.make_node(op, names, [output], **attributes))
        return output

    def _array(self, value: Array | Sequence[int] | float) -> Array:
        if isinstance(value, np.ndarray):
            return value if value.dtype.kind in "iub" else value.astype(self.dtype)
        return np.asarray(value, self.dtype if isinstance(value, float) else np.int64)

    def constant(self, value: Array) -> str:
        """The name of a constant; equal ones are stored once."""
        key = (value.tobytes(), value.shape, str(value.dtype))
        if key not in self._known:
            self._known[key] = next(self._names)
            self.constants[self._known[key]] = value
        return self._known[key]

    def append_to(self, graph: onnx.GraphProto) -> None:
        """Add all that was written to a graph."""
        graph.node.extend(self.nodes)
        graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in self.constants.items())


class Tape(Writer):
    """The nodes of a backward pass, in the making.

    All shapes are fixed, so that a rule states every shape as a constant and never asks for one at run time.

    Args:
        model: the forward graph.
        shape_info: its constants and shapes; every shape on the way must be fixed.
        dtype: element type of weights, activations and gradients.

    Attributes:
        extra: outputs to add to forward nodes, by (node index, position).
        opset: operator set of the graph.
    """

    def __init__(self, model: Model, shape_info: ShapeInfo, dtype: np.dtype[Any]) -> None:
        super().__init__("lindep_onnx_grad_", dtype)
        self.extra: dict[tuple[int, int], str] = {}
        self.opset = model.opset
        self._shape_info = shape_info

    # ---- what is known of the forward graph --------------------------------------------------------------------

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a forward tensor.

        Raises:
            Unsupported: it is not fixed.
        """
        shape = self._shape_info.shapes.get(name)
        if shape is None or not all(isinstance(size, int) for size in shape):
            raise Unsupported(f"the shape of {name!r} is not fixed")
        return tuple(int(size) for size in shape)

    def required(self, name: str) -> Array:
        """The value of a tensor that a rule needs to know beforehand.

        Raises:
            Unsupported: it is computed at run time.
        """
        value = self._shape_info.constants.get(name)
        if value is None:
            raise Unsupported(f"{name!r} is computed at run time")
        return value

    def integers(self, node: Node, position: int, default: Sequence[int]) -> list[int]:
        """The elements of an optional input that a rule needs to know beforehand.

        Raises:
            Unsupported: it is computed at run time.
        """
        name = node.input(position)
        return [int(value) for value in self.required(name).ravel()] if name else list(default)

    def forward_output(self, node: Node, position: int) -> str:
        """Ask a forward node for an optional output."""
        if position < len(node.outputs) and node.outputs[position]:
            return node.outputs[position]
        return self.extra.setdefault((node.index, position), next(self._names))

    # ---- what several rules write ------------------------------------------------------------------------------

    def reshape(self, name: str, shape: Sequence[int]) -> str:
        """The same elements in another shape."""
        return self.Reshape(name, list(shape))

    def transpose(self, name: str, perm: Sequence[int]) -> str:
        """Axes in another order; nothing is written if the order stays."""
        perm = [int(axis) for axis in perm]
        return name if perm == sorted(perm) else self.Transpose(name, perm=perm)

    def sum(self, name: str, axes: Sequence[int]) -> str:
        """Sum over axes, which stay with size 1."""
        return self.ReduceSum(name, list(axes), keepdims=1) if axes else name

    def mean(self, name: str, axes: Sequence[int]) -> str:
        """Mean over axes (not negative), which stay with size 1."""
        if self.opset < 18:
            return self.ReduceMean(name, keepdims=1, axes=list(axes))
        return self.ReduceMean(name, list(axes), keepdims=1)

    def channel_sum(self, name: str, shape: Sequence[int]) -> str:
        """Sum over all axes but the second, as a vector."""
        return self.reshape(self.sum(name, [axis for axis in range(len(shape)) if axis != 1]), [shape[1]])

    def mask(self, condition: str) -> str:
        """A bool tensor as zeros and ones."""
        return self.Cast(condition, to=onnx.helper.np_dtype_to_tensor_dtype(self.dtype))

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
            return self.Pad(name, pads.ravel()) if pads.any() else name
        zero = np.zeros([1 if place == axis else length for place, length in enumerate(shape)])
        source = np.full(size, len(picked), np.int64)
        source[picked] = np.arange(len(picked))
        return self.Gather(self.Concat(name, zero, axis=axis), source, axis=axis)

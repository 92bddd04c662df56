"""Shape arithmetic: integer tensors that exporters compute shapes with, followed element by element.

An element is a number where it is known, else a symbol (see `model.shapes`).
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray

from lindep_onnx.model.ir import Model
from lindep_onnx.model.node import Node

Array: TypeAlias = NDArray[Any]
Shape: TypeAlias = "tuple[int | str, ...]"

#: Integer tensors up to this size are followed as possible shapes.
SHAPE_VALUE_LIMIT = 4096
#: Operators that give floats in the shape of their input, of which ONNX's inference says nothing.
SCALING = frozenset(["ai.onnx.ml::Normalizer", "ai.onnx.ml::Scaler"])


@dataclass
class Known:
    """What is known so far; it grows while a model is resolved.

    Attributes:
        opset: of the model.
        constants, shapes, values, dtypes: see `model.shapes.ShapeInfo`.
        symbols: fresh ones.
    """

    opset: int
    constants: dict[str, Array]
    shapes: dict[str, Shape] = field(default_factory=dict)
    values: dict[str, Array] = field(default_factory=dict)
    dtypes: dict[str, int] = field(default_factory=dict)
    symbols: Iterator[str] = field(default_factory=lambda: (f"?{number}" for number in itertools.count()))

    def read(self, name: str) -> Array:
        """The elements of an integer tensor, as int and str objects.

        Raises:
            KeyError: nothing is known of them, or it is no shape.
        """
        if name not in self.constants:
            return self.values[name]
        value = self.constants[name]
        if value.size > SHAPE_VALUE_LIMIT or value.dtype.kind not in "iub":
            raise KeyError(name)
        return value.astype(object)

    def sizes(self, name: str) -> list[int | str]:
        """The elements of a shape."""
        return [element if isinstance(element, str) else int(element) for element in self.read(name)]

    def record(self, name: str, value: Array) -> None:
        """Keep the elements of a tensor: as a constant if all are known, not at all if they are too many."""
        if value.size <= SHAPE_VALUE_LIMIT:
            if all(isinstance(element, int | np.integer) for element in value.flat):
                self.constants[name] = value.astype(np.int64)
            else:
                self.values[name] = value

    def merge_shape(self, name: str, found: Shape) -> None:
        """Take over a shape, but for what is known as a number already."""
        known = self.shapes.get(name)
        if known is not None and len(known) == len(found):
            found = tuple(min(pair, key=_vagueness) for pair in zip(known, found, strict=True))
        self.shapes[name] = found


def _vagueness(size: int | str) -> int:
    """How little a size says: a number, a name that the file gives, a name that was made up for something unknown."""
    return 0 if isinstance(size, int) else 2 if size.startswith(("?", "unk__")) else 1


def follow(model: Model, known: Known) -> None:
    """Evaluate integer tensors as far as they are known, and the shapes that they describe; what is found is added."""
    known.values = {}
    unknown = (KeyError, ValueError, IndexError, TypeError)
    for node in model.nodes:
        if all(name in known.constants for name in node.outputs if name):
            continue
        result = node.outputs[0]
        if node.op in _VALUES:
            with contextlib.suppress(*unknown):
                known.record(result, np.asarray(_VALUES[node.op](node, known), dtype=object))
        if node.op in SCALING and node.inputs[0] in known.shapes:
            known.merge_shape(result, known.shapes[node.inputs[0]])
            known.dtypes.setdefault(result, onnx.TensorProto.FLOAT)
        if node.op in _TARGETS:
            with contextlib.suppress(*unknown):
                known.merge_shape(result, _TARGETS[node.op](node, known))


# ---- values ------------------------------------------------------------------------------------------------------


def _shape(node: Node, known: Known) -> Array:
    dims = np.array(known.shapes[node.inputs[0]], dtype=object)
    return dims[slice(node.attributes.get("start", 0), node.attributes.get("end"))]


def _gather(node: Node, known: Known) -> Array:
    indices = known.read(node.inputs[1]).astype(np.int64)
    return np.take(known.read(node.inputs[0]), indices, axis=node.attributes.get("axis", 0))


def _concat(node: Node, known: Known) -> Array:
    return np.concatenate([known.read(name) for name in node.inputs], axis=node.attributes["axis"])


def _slice(node: Node, known: Known) -> Array:
    data = known.read(node.inputs[0])
    if known.opset < 10:
        given = [node.attributes.get(name) for name in ("starts", "ends", "axes", "steps")]
    else:
        names = [node.input(position) for position in range(1, 5)]
        given = [known.read(name).astype(np.int64).tolist() if name else None for name in names]
    starts, ends, axes, steps = given
    if starts is None or ends is None:
        raise KeyError(node.name)
    index: list[Any] = [slice(None)] * data.ndim
    for place, axis in enumerate(axes if axes is not None else range(len(starts))):
        step = int(steps[place]) if steps is not None else 1
        stop = int(ends[place])
        index[axis] = slice(int(starts[place]), None if step < 0 and stop < -data.shape[axis] else stop, step)
    return np.asarray(data[tuple(index)])


def _same(node: Node, known: Known) -> Array:
    if node.op == "Cast" and node.attributes.get("to") not in (onnx.TensorProto.INT64, onnx.TensorProto.INT32):
        raise KeyError(node.name)
    return known.read(node.inputs[0])


def _reshaped(node: Node, known: Known) -> Array:
    data = known.read(node.inputs[0])
    if node.op == "Reshape":
        return data.reshape([int(size) for size in known.read(node.inputs[1])])
    axes = node.attributes.get("axes")
    if axes is None and node.input(1):
        axes = [int(axis) for axis in known.read(node.inputs[1])]
    if node.op == "Squeeze":
        return np.squeeze(data, None if axes is None else tuple(axes))
    if axes is None:
        raise KeyError(node.name)
    return np.expand_dims(data, tuple(axes))


def _arithmetic(node: Node, known: Known) -> Array:
    left, right = np.broadcast_arrays(*(known.read(name) for name in node.inputs[:2]))
    neutral = 0 if node.op in ("Add", "Sub") else 1

    def one(a: Any, b: Any) -> Any:
        if isinstance(a, str) or isinstance(b, str):
            if b == neutral:
                return a
            return b if a == neutral and node.op in ("Add", "Mul") else next(known.symbols)
        if node.op == "Div":
            return int(a / b) if b else next(known.symbols)
        return int({"Add": a + b, "Sub": a - b, "Mul": a * b}[node.op])

    result = np.empty(left.shape, dtype=object)
    for place in np.ndindex(*left.shape):
        result[place] = one(left[place], right[place])
    return result


_VALUES: Mapping[str, Callable[[Node, Known], Array]] = {
    "Shape": _shape,
    "Gather": _gather,
    "Concat": _concat,
    "Slice": _slice,
    **dict.fromkeys(("Cast", "Identity"), _same),
    **dict.fromkeys(("Reshape", "Squeeze", "Unsqueeze"), _reshaped),
    **dict.fromkeys(("Add", "Sub", "Mul", "Div"), _arithmetic),
}


# ---- shapes that values describe ---------------------------------------------------------------------------------


def _reshape_target(node: Node, known: Known) -> Shape:
    data, target = known.shapes[node.inputs[0]], known.sizes(node.inputs[1])
    if not node.attributes.get("allowzero", 0):
        target = [data[axis] if size == 0 else size for axis, size in enumerate(target)]
    if -1 in target:
        place = target.index(-1)
        target[place] = _inferred(list(data), target[:place] + target[place + 1 :], known.symbols)
    return tuple(target)


def _inferred(data: list[int | str], others: list[int | str], symbols: Iterator[str]) -> int | str:
    """The size that -1 stands for: what is left of the data once the other sizes are divided out."""
    left = list(data)
    for size in [size for size in others if isinstance(size, str)]:
        if size not in left:
            return next(symbols)
        left.remove(size)
    fixed = math.prod(size for size in others if isinstance(size, int))
    count = math.prod(size for size in left if isinstance(size, int))
    free = [size for size in left if isinstance(size, str)]
    if not free and fixed and count % fixed == 0:
        return count // fixed
    return free[0] if len(free) == 1 and count == fixed else next(symbols)


def _expand_target(node: Node, known: Known) -> Shape:
    data, target = list(known.shapes[node.inputs[0]]), known.sizes(node.inputs[1])
    rank = max(len(data), len(target))
    pairs = zip([1] * (rank - len(data)) + data, [1] * (rank - len(target)) + target, strict=True)
    return tuple(wanted if size == 1 else size for size, wanted in pairs)


def _resize_target(node: Node, known: Known) -> Shape:
    """The `sizes`, where they say all; scales, which inference follows, are empty then if they are not left out."""
    if "axes" in node.attributes or node.attributes.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise KeyError(node.name)
    target = known.sizes(node.inputs[3])
    if len(target) != len(known.shapes[node.inputs[0]]):
        raise KeyError(node.name)
    return tuple(target)


_TARGETS: Mapping[str, Callable[[Node, Known], Shape]] = {
    "Reshape": _reshape_target,
    "Expand": _expand_target,
    "Resize": _resize_target,
    "ConstantOfShape": lambda node, known: tuple(known.sizes(node.inputs[0])),
}

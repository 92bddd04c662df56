"""What the weights alone say about channels, for every input: bounds, and which channels are multiples of each other.

Each rule maps facts about a node's inputs to facts about its output. An operator without a rule says nothing: its
output may be anything, but a channel of it is still the same channel wherever it is read.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lindep_onnx.graph import Node
from lindep_onnx.shapes import Shape

__all__ = ["Facts", "Known", "output_facts"]

Array: TypeAlias = NDArray[Any]
Vector: TypeAlias = NDArray[np.float64]
Keys: TypeAlias = "tuple[bytes, ...]"

#: Multiples are compared to so many digits: single precision holds no more.
DIGITS = 6
INF = float("inf")


@dataclass(frozen=True)
class Facts:
    """Facts about the channels of one tensor.

    Attributes:
        axis: the channel axis.
        low, high: (C,) bounds of each channel over all inputs and positions.
        key: (C,) channels with equal keys are multiples of each other,
        scale: (C,) by these positive factors.
    """

    axis: int
    low: Vector
    high: Vector
    key: Keys
    scale: Vector


@dataclass(frozen=True)
class Known:
    """What rules may ask for: constants, shapes, and the facts found so far."""

    constants: Mapping[str, Array]
    shapes: Mapping[str, Shape]
    facts: Mapping[str, Facts]

    def of(self, name: str, axis: int) -> Facts | None:
        """Facts about a computed tensor along an axis; bare identity where nothing is known; None without a size."""
        found = self.facts.get(name)
        if found is not None and found.axis == axis:
            return found
        shape = self.shapes.get(name, ())
        if name in self.constants or not 0 <= axis < len(shape) or not isinstance(shape[axis], int):
            return None
        size = int(shape[axis])
        keys = tuple(_hash("channel", name, axis, channel) for channel in range(size))
        return Facts(axis, np.full(size, -INF), np.full(size, INF), keys, np.ones(size))


def output_facts(node: Node, known: Known) -> Facts | None:
    """Facts about the first output of a node; None if nothing can be said."""
    rule = _RULES.get(node.op)
    with np.errstate(all="ignore"):
        found = rule(node, known) if rule is not None else None
    if found is None or np.isnan(found.low).any() or np.isnan(found.high).any():
        return None
    return found


def _hash(*parts: object) -> bytes:
    digest = hashlib.blake2b(digest_size=12)
    for part in parts:
        digest.update(part if isinstance(part, bytes) else repr(part).encode())
        digest.update(b"|")
    return digest.digest()


def _options(node: Node) -> str:
    plain = {key: value for key, value in node.attributes.items() if key != "group"}
    return repr(sorted((key, np.asarray(value).tolist()) for key, value in plain.items()))


def _normalised(rows: Vector) -> tuple[Vector, list[bytes]]:
    """(C,) length of each row, and the bytes of its direction."""
    length = np.linalg.norm(rows, axis=1)
    direction = np.round(rows / np.where(length > 0, length, 1.0)[:, None], DIGITS) + 0.0
    return length, [row.tobytes() for row in direction]


# ---- products -----------------------------------------------------------------------------------------------------


def _convolution(node: Node, known: Known) -> Facts | None:
    weight, data = known.constants.get(node.inputs[1]), known.of(node.inputs[0], 1)
    bias = known.constants.get(node.input(2)) if node.input(2) else np.zeros(1)
    if weight is None or data is None or bias is None:
        return None
    group, rows = int(node.attributes.get("group", 1)), len(weight)
    w = weight.astype(np.float64).reshape(rows, weight.shape[1], -1)
    b = np.broadcast_to(bias.astype(np.float64).ravel(), (rows,))
    padded = any(node.attributes.get("pads", ())) or node.attributes.get("auto_pad", "NOTSET") not in (
        "NOTSET",
        "VALID",
    )
    low, high = (np.minimum(data.low, 0), np.maximum(data.high, 0)) if padded else (data.low, data.high)
    source = np.arange(rows) // (rows // group)  # the group of each output
    index = source[:, None] * weight.shape[1] + np.arange(weight.shape[1])
    bounds = _bounds(w, low[index], high[index], b)
    if group > 1 and weight.shape[1] == 1:  # one channel each: what multiplies it carries over
        length, direction = _normalised(np.hstack([w[:, 0] * data.scale[source, None], b[:, None]]))
        keys = tuple(_hash("depthwise", _options(node), data.key[s], d) for s, d in zip(source, direction, strict=True))
    else:
        length, direction = _normalised(np.hstack([w.reshape(rows, -1), b[:, None]]))
        keys = tuple(
            _hash("Conv", node.inputs[0], _options(node), s if group > 1 else 0, d)
            for s, d in zip(source, direction, strict=True)
        )
    return Facts(1, *bounds, keys, length)


def _bounds(weight: Vector, low: Vector, high: Vector, bias: Vector) -> tuple[Vector, Vector]:
    """Bounds of sum w x + b over the box; (C, I, T) weights and (C, I) bounds."""
    positive, negative = np.maximum(weight, 0).sum(axis=2), np.minimum(weight, 0).sum(axis=2)
    lowest = _product(positive, low) + _product(negative, high)
    highest = _product(positive, high) + _product(negative, low)
    return lowest.sum(axis=1) + bias, highest.sum(axis=1) + bias


def _product(weight: Vector, bound: Vector) -> Vector:
    return np.where(weight == 0, 0.0, weight * bound)  # nothing times infinity is nothing


def _matrix(node: Node, known: Known) -> Facts | None:
    gemm = node.op == "Gemm"
    weight = known.constants.get(node.inputs[1])
    shape = known.shapes.get(node.inputs[0], ())
    if weight is None or weight.ndim != 2 or len(shape) < 2 or node.attributes.get("transA", 0):
        return None
    axis = len(shape) - 1
    data = known.of(node.inputs[0], axis)
    bias = known.constants.get(node.input(2)) if node.input(2) else np.zeros(1)
    if data is None or bias is None:
        return None
    w = weight.astype(np.float64) * float(node.attributes.get("alpha", 1.0) if gemm else 1.0)
    w = w if node.attributes.get("transB", 0) else w.T
    if bias.size not in (1, len(w)):
        return None
    beta = float(node.attributes.get("beta", 1.0)) if gemm else 1.0
    b = np.broadcast_to(bias.astype(np.float64).ravel() * beta, (len(w),))
    rows = w[:, :, None]
    box = np.broadcast_to(data.low, w.shape), np.broadcast_to(data.high, w.shape)
    length, direction = _normalised(np.hstack([w, b[:, None]]))
    keys = tuple(_hash("product", node.inputs[0], axis, d) for d in direction)
    return Facts(axis, *_bounds(rows, *box, b), keys, length)


# ---- channel by channel -------------------------------------------------------------------------------------------


def _affine(data: Facts, factor: Vector, addend: Vector, what: str = "affine") -> Facts:
    ends = _product(factor, data.low) + addend, _product(factor, data.high) + addend
    scale = data.scale * factor
    length, direction = _normalised(np.stack([scale, addend], axis=1))
    plain = (addend == 0) & (scale > 0)
    keys = tuple(key if same else _hash(what, key, d) for key, same, d in zip(data.key, plain, direction, strict=True))
    return Facts(data.axis, np.minimum(*ends), np.maximum(*ends), keys, np.where(plain, scale, length))


def _normalization(node: Node, known: Known) -> Facts | None:
    data = known.of(node.inputs[0], 1)
    values = [known.constants.get(name) for name in node.inputs[1:5]]
    if data is None or node.attributes.get("training_mode", 0) or any(value is None for value in values):
        return None
    scale, shift, mean, variance = (np.asarray(value, dtype=np.float64) for value in values)
    factor = scale / np.sqrt(variance + float(node.attributes.get("epsilon", 1e-5)))
    return _affine(data, factor, shift - factor * mean)


def _arithmetic(node: Node, known: Known) -> Facts | None:
    if len(node.inputs) != 2:
        return None
    fixed = [known.constants.get(name) for name in node.inputs]
    rank = len(known.shapes.get(node.outputs[0], ()))
    if (fixed[0] is None) == (fixed[1] is None):
        return _both(node, known, rank) if fixed[0] is None else None
    place = 0 if fixed[0] is None else 1
    found = known.facts.get(node.inputs[place])
    value = fixed[1 - place]
    if found is None or value is None or len(known.shapes.get(node.inputs[place], ())) != rank:
        return None
    size, behind = len(found.low), rank - found.axis
    if value.size == 1:
        constant = np.full(size, float(value.ravel()[0]))
    elif value.size == size and value.ndim >= behind and value.shape[value.ndim - behind] == size:
        constant = value.astype(np.float64).ravel()
    else:
        return None
    one, zero = np.ones(size), np.zeros(size)
    if node.op == "Add":
        return _affine(found, one, constant)
    if node.op == "Mul":
        return _affine(found, constant, zero)
    if node.op == "Sub":
        return _affine(found, one, -constant) if place == 0 else _affine(found, -one, constant)
    return _affine(found, 1.0 / constant, zero) if place == 0 and (constant != 0).all() else None


def _both(node: Node, known: Known, rank: int) -> Facts | None:
    left, right = (known.facts.get(name) for name in node.inputs)
    if left is None or right is None or left.axis != right.axis or len(left.low) != len(right.low):
        return None
    if any(len(known.shapes.get(name, ())) != rank for name in node.inputs):
        return None
    if node.op in ("Add", "Sub"):
        sign = 1.0 if node.op == "Add" else -1.0
        ends = np.sort(np.stack([sign * right.low, sign * right.high]), axis=0)
        length, direction = _normalised(np.stack([left.scale, right.scale], axis=1))
        parts = zip(left.key, right.key, direction, strict=True)
        keys = tuple(_hash(node.op, *part) for part in parts)
        return Facts(left.axis, left.low + ends[0], left.high + ends[1], keys, length)
    if node.op == "Mul":
        pairs = [(a, b) for a in (left.low, left.high) for b in (right.low, right.high)]
        corners = np.stack([np.where((a == 0) | (b == 0), 0.0, a * b) for a, b in pairs])
        keys = tuple(_hash("Mul", a, b) for a, b in zip(left.key, right.key, strict=True))
        return Facts(left.axis, corners.min(axis=0), corners.max(axis=0), keys, left.scale * right.scale)
    return None


def _homogeneous(function: Callable[[Vector, Node], Vector]) -> Callable[[Node, Known], Facts | None]:
    """f(s x) = s f(x) for s > 0, rising."""

    def rule(node: Node, known: Known) -> Facts | None:
        data = known.facts.get(node.inputs[0])
        if data is None or any(node.outputs[1:]):
            return None
        keys = tuple(_hash(node.op, _options(node), key) for key in data.key)
        return replace(data, low=function(data.low, node), high=function(data.high, node), key=keys)

    return rule


def _pool(node: Node, known: Known) -> Facts | None:
    data = known.facts.get(node.inputs[0])
    if data is None or data.axis != 1 or any(node.outputs[1:]):
        return None
    zeros = node.op == "AveragePool" and node.attributes.get("count_include_pad", 0)
    low, high = (np.minimum(data.low, 0), np.maximum(data.high, 0)) if zeros else (data.low, data.high)
    return replace(data, low=low, high=high, key=tuple(_hash(node.op, _options(node), key) for key in data.key))


def _monotone(function: Callable[[Vector], Vector]) -> Callable[[Node, Known], Facts | None]:
    """Rising, with no more said about multiples than that equal inputs give equal outputs."""

    def rule(node: Node, known: Known) -> Facts | None:
        data = known.facts.get(node.inputs[0])
        return None if data is None else _rising(node, data, function)

    return rule


def _rising(node: Node, data: Facts, function: Callable[[Vector], Vector]) -> Facts:
    scales = [float(f"{scale:.{DIGITS}e}") for scale in data.scale]
    keys = tuple(_hash(node.op, _options(node), key, scale) for key, scale in zip(data.key, scales, strict=True))
    return Facts(data.axis, function(data.low), function(data.high), keys, np.ones(len(data.low)))


def _clip(node: Node, known: Known) -> Facts | None:
    data = known.facts.get(node.inputs[0])
    ends = []
    for position, name, default in ((1, "min", -INF), (2, "max", INF)):
        value = known.constants.get(node.input(position))
        if node.input(position) and (value is None or value.size != 1):
            return None
        ends.append(float(node.attributes.get(name, default)) if value is None else float(value.ravel()[0]))
    if data is None:
        return None
    found = _rising(node, data, lambda x: np.minimum(np.maximum(x, ends[0]), ends[1]))
    return replace(found, key=tuple(_hash(key, *ends) for key in found.key))


def _sigmoid(x: Vector) -> Vector:
    return 1.0 / (1.0 + np.exp(-x))


def _leaky(x: Vector, node: Node) -> Vector:
    slope = float(node.attributes.get("alpha", 0.01))
    return np.where(x >= 0, x, slope * x)


# ---- moving channels ----------------------------------------------------------------------------------------------


def _same(node: Node, known: Known) -> Facts | None:
    return known.facts.get(node.inputs[0]) if not node.input(2) else None


def _concat(node: Node, known: Known) -> Facts | None:
    rank = len(known.shapes.get(node.outputs[0], ()))
    axis = node.attributes["axis"] % rank if rank else -1
    parts = [known.of(name, axis) for name in node.inputs]
    if any(part is None for part in parts):
        return None
    known_parts = [part for part in parts if part is not None]
    return Facts(
        axis,
        np.concatenate([part.low for part in known_parts]),
        np.concatenate([part.high for part in known_parts]),
        tuple(key for part in known_parts for key in part.key),
        np.concatenate([part.scale for part in known_parts]),
    )


def _transpose(node: Node, known: Known) -> Facts | None:
    data = known.facts.get(node.inputs[0])
    rank = len(known.shapes.get(node.inputs[0], ()))
    if data is None:
        return None
    order = list(node.attributes.get("perm", range(rank)[::-1]))
    return replace(data, axis=order.index(data.axis), key=tuple(_hash("Transpose", order, key) for key in data.key))


def _flatten(node: Node, known: Known) -> Facts | None:
    data = known.facts.get(node.inputs[0])
    before, after = known.shapes.get(node.inputs[0], ()), known.shapes.get(node.outputs[0], ())
    if data is None or data.axis != 1 or len(after) != 2 or not all(isinstance(n, int) for n in before[1:]):
        return None
    times = math.prod(n for n in before[2:] if isinstance(n, int))
    if after[1] != len(data.low) * times:
        return None
    keys = tuple(_hash("position", key, place) for key in data.key for place in range(times))
    return Facts(1, data.low.repeat(times), data.high.repeat(times), keys, data.scale.repeat(times))


_RULES: Mapping[str, Callable[[Node, Known], Facts | None]] = {
    "Conv": _convolution,
    "Gemm": _matrix,
    "MatMul": _matrix,
    "BatchNormalization": _normalization,
    **dict.fromkeys(("Add", "Sub", "Mul", "Div"), _arithmetic),
    "Relu": _homogeneous(lambda x, node: np.maximum(x, 0)),
    "LeakyRelu": _homogeneous(_leaky),
    **dict.fromkeys(("MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool"), _pool),
    "Clip": _clip,
    "Sigmoid": _monotone(_sigmoid),
    "Tanh": _monotone(np.tanh),
    "Softplus": _monotone(lambda x: np.logaddexp(0, x)),
    **dict.fromkeys(("Identity", "Dropout"), _same),
    "Concat": _concat,
    "Transpose": _transpose,
    **dict.fromkeys(("Flatten", "Reshape"), _flatten),
}

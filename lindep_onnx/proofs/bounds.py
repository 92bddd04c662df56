"""What the weights alone say about channels, for every input: bounds, and which channels are multiples of each other.

Each rule maps facts about a node's inputs to facts about its output. An operator without a rule says nothing: its
output may be anything, but a channel of it is still the same channel wherever it is read.

Bounds hold for what a runtime computes, not only for real numbers. A sum of n products is computed, in whatever order,
as the sum of every term times (1 + d) with |d| at most about n units of rounding; so each term is widened by that share
of itself. A value that cannot vary is not widened: rounding makes it another constant, not a variable.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray

from lindep_onnx.model.ir import Node
from lindep_onnx.model.shapes import Shape

Array: TypeAlias = NDArray[Any]
Vector: TypeAlias = NDArray[np.float64]
Keys: TypeAlias = "tuple[bytes, ...]"

#: Directions of weights that are this close are equal: twice what storing them as float32 changes.
ALIKE = 2.0**-22
#: Longer axes are positions, or declared by somebody who means harm.
MAX_CHANNELS = 1 << 20
#: Entries of a matrix that are in float64 at a time.
CHUNK = 1 << 21
INF = float("inf")
#: A rounding of float32, and of what is stored in half of its bits (bfloat16 is the coarser one), both taken twice.
ROUNDING, ROUNDING_HALF = 2.0**-23, 2.0**-7
#: Roundings that a runtime may add to those of the terms: a fused normalization or bias.
MORE_ROUNDINGS = 4
#: Runtimes approximate transcendental functions; ONNX Runtime is within a tenth of this, absolute and relative.
APPROXIMATION = 1e-6


@dataclass(frozen=True)
class Product:
    """The rows of one constant matrix: channel i is the product of row i with what is read, plus a bias.

    Attributes:
        rows: (C, D) weights; what is read has D entries at each position.
        bias: (C,) float64.
    """

    rows: Array
    bias: Vector


@dataclass(frozen=True)
class AffineForm:
    """A channel that is an affine function of what one product reads: factor (row . x + bias) + shift.

    Attributes:
        base: forms of equal base read the same x; their vectors can be added.
        product, row: which row.
        factor, shift: what came behind it.
    """

    base: bytes
    product: Product
    row: int
    factor: float = 1.0
    shift: float = 0.0

    def vector(self) -> Vector:
        """(D + 1,) coefficients of x and of 1."""
        weights = self.factor * self.product.rows[self.row].astype(np.float64).ravel()
        return np.append(weights, self.factor * self.product.bias[self.row] + self.shift)


Forms: TypeAlias = "tuple[AffineForm | None, ...]"


@dataclass(frozen=True)
class ChannelBounds:
    """Facts about the channels of one tensor.

    Attributes:
        axis: the channel axis.
        low, high: (C,) bounds of each channel over all inputs and positions.
        key: (C,) channels with equal keys are multiples of each other,
        scale: (C,) by these positive factors.
        form: (C,) how each channel is an affine function of what a product reads; None where it is not known to be.
    """

    axis: int
    low: Vector
    high: Vector
    key: Keys
    scale: Vector
    form: Forms

    @property
    def varies(self) -> NDArray[np.bool_]:
        """(C,) whether a channel may be other than one known number."""
        return np.asarray(~(np.isfinite(self.low) & (self.low == self.high)))


@dataclass(frozen=True)
class BoundsContext:
    """What rules may ask for: constants, shapes, the facts found so far, and the share that a rounding may change."""

    constants: Mapping[str, Array]
    shapes: Mapping[str, Shape]
    facts: Mapping[str, ChannelBounds]
    rounding: float = ROUNDING

    def of(self, name: str, axis: int) -> ChannelBounds | None:
        """Facts about a computed tensor along an axis; None without a size.

        Known along another axis, its bounds hold along this one too. Of an unknown tensor a channel is at least the
        same channel wherever it is read.
        """
        found = self.facts.get(name)
        if found is not None and found.axis == axis:
            return found
        low, high = (-INF, INF) if found is None else (float(found.low.min()), float(found.high.max()))
        return self.bounded(name, axis, low, high)

    def bounded(self, name: str, axis: int, low: float, high: float) -> ChannelBounds | None:
        """Facts about a computed tensor of which only one pair of bounds is known; None without a size."""
        shape = self.shapes.get(name, ())
        if name in self.constants or not 0 <= axis < len(shape) or not isinstance(shape[axis], int):
            return None
        size = int(shape[axis])
        if not 0 < size <= MAX_CHANNELS:
            return None
        keys = tuple(_hash("channel", name, axis, channel) for channel in range(size))
        return ChannelBounds(axis, np.full(size, low), np.full(size, high), keys, np.ones(size), (None,) * size)


def output_bounds(node: Node, known: BoundsContext) -> ChannelBounds | None:
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


def _chunks(rows: Array) -> Iterator[slice]:
    step = max(1, CHUNK // max(1, rows[0].size if len(rows) else 1))
    return (slice(start, start + step) for start in range(0, len(rows), step))


def _directions(rows: Array, last: Vector) -> tuple[Vector, list[bytes]]:
    """Length and direction of the rows of a matrix that has `last` as one more column.

    Returns:
        (C,) length of each row.
        (C,) a name for each direction, the same for those that differ by rounding. Not by rounding them: two that are
            as good as equal may round apart. Only rows whose products with one random vector are close are compared.
    """
    probe = np.random.default_rng(0).normal(size=rows.shape[1] + 1)
    probe /= np.linalg.norm(probe)
    length, place = np.empty(len(rows)), np.empty(len(rows))
    for part in _chunks(rows):
        block = np.column_stack([rows[part].astype(np.float64), last[part]])
        length[part] = np.linalg.norm(block, axis=1)
        place[part] = block @ probe
    place /= np.where(length > 0, length, 1.0)
    names = [b""] * len(rows)
    known: deque[tuple[float, Vector, bytes]] = deque()
    for index in np.argsort(place, kind="stable").tolist():
        if not np.isfinite(place[index]):
            names[index] = _hash("not finite", index)
            continue
        while known and place[index] - known[0][0] > ALIKE:
            known.popleft()
        direction = np.append(rows[index].astype(np.float64), last[index]) / (length[index] or 1.0)
        name = next((name for _, other, name in known if np.linalg.norm(other - direction) <= ALIKE), None)
        if name is None:
            name = _hash((direction + 0.0).tobytes())
            known.append((float(place[index]), direction, name))
        names[index] = name
    return length, names


def _levels(scale: Vector) -> Vector:
    """(C,) the scales, with one number for those that differ by rounding."""
    result, level = scale.copy(), -1.0
    for index in np.argsort(scale, kind="stable").tolist():
        level = level if scale[index] <= level * (1 + ALIKE) else float(scale[index])
        result[index] = level
    return result


# ---- products -----------------------------------------------------------------------------------------------------


def _convolution(node: Node, known: BoundsContext) -> ChannelBounds | None:
    weight, data = known.constants.get(node.inputs[1]), known.of(node.inputs[0], 1)
    bias = known.constants.get(node.input(2)) if node.input(2) else np.zeros(1)
    if weight is None or data is None or bias is None:
        return None
    group, rows = int(node.attributes.get("group", 1)), len(weight)
    if group < 1 or rows % group or group * weight.shape[1] != len(data.low) or bias.size not in (1, rows):
        return None
    w = weight.reshape(rows, weight.shape[1], -1)
    b = np.broadcast_to(bias.astype(np.float64).ravel(), (rows,))
    padded = any(node.attributes.get("pads", ())) or node.attributes.get("auto_pad", "NOTSET") not in (
        "NOTSET",
        "VALID",
    )
    low, high = (np.minimum(data.low, 0), np.maximum(data.high, 0)) if padded else (data.low, data.high)
    source = np.arange(rows) // (rows // group)  # the group of each output
    index = source[:, None] * weight.shape[1] + np.arange(weight.shape[1])
    bounds = _bounds(w, low[index], high[index], b, known.rounding)
    options = _options(node)
    if group > 1 and weight.shape[1] == 1:  # one channel each: what multiplies it carries over
        length, direction = _directions(w[:, 0] * data.scale[source, None], b)
        keys = tuple(_hash("depthwise", options, data.key[s], d) for s, d in zip(source, direction, strict=True))
    else:
        length, direction = _directions(w.reshape(rows, -1), b)
        keys = tuple(
            _hash("Conv", node.inputs[0], options, s if group > 1 else 0, d)
            for s, d in zip(source, direction, strict=True)
        )
    product = Product(w.reshape(rows, -1), b)
    base = [_hash("Conv", node.inputs[0], options, weight.shape[1:], part) for part in range(group)]
    forms = tuple(AffineForm(base[part], product, row) for row, part in enumerate(source.tolist()))
    return ChannelBounds(1, *bounds, keys, length, forms)


def _bounds(weight: Array, low: Vector, high: Vector, bias: Vector, rounding: float) -> tuple[Vector, Vector]:
    """Bounds of sum w x + b over the box, as it is computed; (C, I, T) weights and (C, I) bounds."""
    lowest, highest = np.empty(len(weight)), np.empty(len(weight))
    for part in _chunks(weight):
        w, least, most, b = weight[part].astype(np.float64), low[part], high[part], bias[part]
        positive, negative = np.maximum(w, 0).sum(axis=2), np.minimum(w, 0).sum(axis=2)
        varies = (((positive != 0) | (negative != 0)) & (least != most)).any(axis=1)
        count = (w != 0).sum(axis=(1, 2)) + MORE_ROUNDINGS
        share = np.where(varies, np.minimum(1.0, rounding * count), 0.0)
        for result, sign, (first, last) in ((lowest, -1.0, (least, most)), (highest, 1.0, (most, least))):
            # All terms of a sign are at their extreme together, so that those of one input may be added up first.
            terms = _product(positive, first), _product(negative, last)
            size = np.abs(terms[0]).sum(axis=1) + np.abs(terms[1]).sum(axis=1) + np.abs(b)
            result[part] = terms[0].sum(axis=1) + terms[1].sum(axis=1) + b + sign * _product(share, size)
    return lowest, highest


def _widened(low: Vector, high: Vector, share: float | Vector, size: Vector | float = 0.0) -> tuple[Vector, Vector]:
    """Bounds of what is computed with a relative error of `share`, of itself and of terms of `size` in it."""
    fixed = np.isfinite(low) & (low == high)
    return (
        np.where(fixed, low, low - _product(share, np.abs(low) + size)),
        np.where(fixed, high, high + _product(share, np.abs(high) + size)),
    )


def _product(weight: Vector | float, bound: Vector) -> Vector:
    return np.where(np.equal(weight, 0), 0.0, weight * bound)  # nothing times infinity is nothing


def _matrix(node: Node, known: BoundsContext) -> ChannelBounds | None:
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
    alpha = float(node.attributes.get("alpha", 1.0)) if gemm else 1.0
    w = weight if node.attributes.get("transB", 0) else weight.T
    w = w if alpha == 1 else w.astype(np.float64) * alpha  # a view wherever that is enough: matrices are large
    if bias.size != 1 and (bias.size != len(w) or bias.shape[-1] != len(w)):
        return None  # one for each row
    beta = float(node.attributes.get("beta", 1.0)) if gemm else 1.0
    b = np.broadcast_to(bias.astype(np.float64).ravel() * beta, (len(w),))
    box = np.broadcast_to(data.low, w.shape), np.broadcast_to(data.high, w.shape)
    bounds = _bounds(w[:, :, None], *box, b, known.rounding)
    length, direction = _directions(w, b)
    base = _hash("product", node.inputs[0], axis)
    keys = tuple(_hash(base, d) for d in direction)
    product = Product(w, b)
    forms = tuple(AffineForm(base, product, row) for row in range(len(w)))
    return ChannelBounds(axis, *bounds, keys, length, forms)


# ---- channel by channel -------------------------------------------------------------------------------------------


def _affine(
    data: ChannelBounds, factor: Vector, addend: Vector, rounding: float, size: Vector | None = None
) -> ChannelBounds:
    """What factor x + addend is; `size` bounds the terms that the addend is made of."""
    ends = _product(factor, data.low) + addend, _product(factor, data.high) + addend
    terms = (np.abs(addend) if size is None else size) * 2
    bounds = _widened(np.minimum(*ends), np.maximum(*ends), rounding * MORE_ROUNDINGS, terms)
    scale = data.scale * factor
    length, direction = _directions(scale[:, None], addend)
    plain = (addend == 0) & (scale > 0)
    keys = tuple(
        key if same else _hash("affine", key, d) for key, same, d in zip(data.key, plain, direction, strict=True)
    )
    forms = tuple(
        None if form is None or not f else replace(form, factor=form.factor * f, shift=form.shift * f + a)
        for form, f, a in zip(data.form, factor.tolist(), addend.tolist(), strict=True)
    )
    return ChannelBounds(data.axis, *bounds, keys, np.where(plain, scale, length), forms)


def _normalization(node: Node, known: BoundsContext) -> ChannelBounds | None:
    data = known.of(node.inputs[0], 1)
    values = [known.constants.get(name) for name in node.inputs[1:5]]
    if data is None or node.attributes.get("training_mode", 0) or any(value is None for value in values):
        return None
    scale, shift, mean, variance = (np.asarray(value, dtype=np.float64) for value in values)
    factor = scale / np.sqrt(variance + float(node.attributes.get("epsilon", 1e-5)))
    return _affine(data, factor, shift - factor * mean, known.rounding, np.abs(shift) + np.abs(factor * mean))


def _arithmetic(node: Node, known: BoundsContext) -> ChannelBounds | None:
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
    one, zero, unit = np.ones(size), np.zeros(size), known.rounding
    if node.op == "Add":
        return _affine(found, one, constant, unit)
    if node.op == "Mul":
        return _affine(found, constant, zero, unit)
    if node.op == "Sub":
        return _affine(found, one, -constant, unit) if place == 0 else _affine(found, -one, constant, unit)
    return _affine(found, 1.0 / constant, zero, unit) if place == 0 and (constant != 0).all() else None


def _negative(node: Node, known: BoundsContext) -> ChannelBounds | None:
    data = known.facts.get(node.inputs[0])
    if data is None:
        return None
    return _affine(data, -np.ones(len(data.low)), np.zeros(len(data.low)), known.rounding)


def _both(node: Node, known: BoundsContext, rank: int) -> ChannelBounds | None:
    left, right = (known.facts.get(name) for name in node.inputs)
    if left is None or right is None or left.axis != right.axis or len(left.low) != len(right.low):
        return None
    if any(len(known.shapes.get(name, ())) != rank for name in node.inputs):
        return None
    if node.op in ("Add", "Sub"):
        sign = 1.0 if node.op == "Add" else -1.0
        ends = np.sort(np.stack([sign * right.low, sign * right.high]), axis=0)
        length, direction = _directions(left.scale[:, None], right.scale)
        parts = zip(left.key, right.key, direction, strict=True)
        keys = tuple(_hash(node.op, *part) for part in parts)
        share = np.where(left.varies | right.varies, 2 * known.rounding, 0.0)
        bounds = (
            left.low + ends[0] - _product(share, np.abs(left.low) + np.abs(ends[0])),
            left.high + ends[1] + _product(share, np.abs(left.high) + np.abs(ends[1])),
        )
        return ChannelBounds(left.axis, *bounds, keys, length, (None,) * len(length))
    if node.op == "Mul":
        pairs = [(a, b) for a in (left.low, left.high) for b in (right.low, right.high)]
        corners = np.stack([np.where((a == 0) | (b == 0), 0.0, a * b) for a, b in pairs])
        keys = tuple(_hash("Mul", a, b) for a, b in zip(left.key, right.key, strict=True))
        bounds = _widened(corners.min(axis=0), corners.max(axis=0), 2 * known.rounding)
        return ChannelBounds(left.axis, *bounds, keys, left.scale * right.scale, (None,) * len(keys))
    return None


Function: TypeAlias = "Callable[[Vector, Node], Vector]"


def _identical(data: ChannelBounds, result: ChannelBounds, start: float, end: float) -> ChannelBounds:
    """The facts of the input for channels that stay where the function is the identity; the new ones elsewhere."""
    same = (data.low >= start) & (data.high <= end)
    return ChannelBounds(
        data.axis,
        np.where(same, data.low, result.low),
        np.where(same, data.high, result.high),
        tuple(old if own else new for own, old, new in zip(same, data.key, result.key, strict=True)),
        np.where(same, data.scale, result.scale),
        tuple(old if own else new for own, old, new in zip(same, data.form, result.form, strict=True)),
    )


def _homogeneous(function: Function) -> Callable[[Node, BoundsContext], ChannelBounds | None]:
    """f(s x) = s f(x) for s > 0; monotone on both sides of 0, and the identity above it."""

    def rule(node: Node, known: BoundsContext) -> ChannelBounds | None:
        data = known.facts.get(node.inputs[0])
        if data is None or any(node.outputs[1:]):
            return None
        options = _options(node)
        keys = tuple(_hash(node.op, options, key) for key in data.key)
        bounds = _widened(*_hull(data, lambda x: function(x, node), (0.0,)), 2 * known.rounding)
        changed = ChannelBounds(data.axis, *bounds, keys, data.scale, (None,) * len(keys))
        return _identical(data, changed, 0.0, INF)

    return rule


def _hull(
    data: ChannelBounds, function: Callable[[Vector], Vector], turns: tuple[float, ...] = ()
) -> tuple[Vector, Vector]:
    """Bounds of a function that is monotone between its turning points."""
    places = [data.low, data.high, *(np.clip(turn, data.low, data.high) for turn in turns)]
    values = np.stack([function(place) for place in places])
    return values.min(axis=0), values.max(axis=0)


def _pool(node: Node, known: BoundsContext) -> ChannelBounds | None:
    data = known.of(node.inputs[0], 1)
    if data is None or any(node.outputs[1:]):
        return None
    average = node.op in ("AveragePool", "GlobalAveragePool")
    zeros = node.op == "AveragePool" and node.attributes.get("count_include_pad", 0)
    low, high = (np.minimum(data.low, 0), np.maximum(data.high, 0)) if zeros else (data.low, data.high)
    options = _options(node)
    keys = tuple(_hash(node.op, options, key) for key in data.key)
    if not average:
        return replace(data, key=keys, form=(None,) * len(keys))
    low, high = _widened(low, high, min(1.0, known.rounding * (_averaged(node, known) + MORE_ROUNDINGS)))
    forms = tuple(
        None if form is None else replace(form, base=_hash(node.op, options, form.base)) for form in data.form
    )
    return replace(data, low=low, high=high, key=keys, form=forms)


def _averaged(node: Node, known: BoundsContext) -> float:
    """How many values an average is over, infinity where that is not known."""
    sizes = node.attributes.get("kernel_shape") or known.shapes.get(node.inputs[0], ())[2:]
    return float(math.prod(sizes)) if all(isinstance(size, int) for size in sizes) else INF


def _monotone(function: Function, least: float = -INF) -> Callable[[Node, BoundsContext], ChannelBounds | None]:
    """Monotone and, as runtimes compute it, never below `least`; there is no such upper end (tanh exceeds 1)."""

    def rule(node: Node, known: BoundsContext) -> ChannelBounds | None:
        data = known.facts.get(node.inputs[0])
        if data is None:
            return None
        found = _equal_inputs(node, data, lambda x: function(x, node))
        share = max(APPROXIMATION, known.rounding * MORE_ROUNDINGS)
        low, high = _widened(found.low, found.high, share, 1.0)
        return replace(found, low=np.maximum(low, least), high=high)

    return rule


def _equal_inputs(
    node: Node, data: ChannelBounds, function: Callable[[Vector], Vector], turns: tuple[float, ...] = ()
) -> ChannelBounds:
    """No more is said about multiples than that equal inputs give equal outputs."""
    scales = _levels(data.scale).tolist()
    options = _options(node)
    keys = tuple(_hash(node.op, options, key, scale) for key, scale in zip(data.key, scales, strict=True))
    return ChannelBounds(data.axis, *_hull(data, function, turns), keys, np.ones(len(data.low)), (None,) * len(keys))


def _clip(node: Node, known: BoundsContext) -> ChannelBounds | None:
    data = known.facts.get(node.inputs[0])
    ends = []
    for position, name, default in ((1, "min", -INF), (2, "max", INF)):
        value = known.constants.get(node.input(position))
        if node.input(position) and (value is None or value.size != 1):
            return None
        ends.append(float(node.attributes.get(name, default)) if value is None else float(value.ravel()[0]))
    if data is None:
        return None
    found = _equal_inputs(node, data, lambda x: np.minimum(np.maximum(x, ends[0]), ends[1]))
    return _identical(data, replace(found, key=tuple(_hash(key, *ends) for key in found.key)), *ends)


def _hard_swish(node: Node, known: BoundsContext) -> ChannelBounds | None:
    data = known.facts.get(node.inputs[0])
    if data is None:
        return None
    found = _equal_inputs(node, data, lambda x: _product(np.clip((x + 3) / 6, 0, 1), x), (-3.0, -1.5))
    low, high = _widened(found.low, found.high, known.rounding * MORE_ROUNDINGS)
    return _identical(data, replace(found, low=low, high=high), 3.0 + 1e-3, INF)


def _sigmoid(x: Vector, node: Node) -> Vector:
    return 1.0 / (1.0 + np.exp(-x))


def _hard_sigmoid(x: Vector, node: Node) -> Vector:
    return np.clip(float(node.attributes.get("alpha", 0.2)) * x + float(node.attributes.get("beta", 0.5)), 0.0, 1.0)


def _leaky(x: Vector, node: Node) -> Vector:
    slope = float(node.attributes.get("alpha", 0.01))
    return np.where(x >= 0, x, _product(slope, x))


# ---- moving channels ----------------------------------------------------------------------------------------------


def _same(node: Node, known: BoundsContext) -> ChannelBounds | None:
    return known.facts.get(node.inputs[0]) if not node.input(2) else None


def _cast(node: Node, known: BoundsContext) -> ChannelBounds | None:
    data = known.facts.get(node.inputs[0])
    if data is None or node.attributes.get("to") not in (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE):
        return None
    low, high = _widened(data.low, data.high, 2 * known.rounding)
    return replace(data, low=low, high=high)


def _concat(node: Node, known: BoundsContext) -> ChannelBounds | None:
    rank = len(known.shapes.get(node.outputs[0], ()))
    axis = node.attributes["axis"] % rank if rank else -1
    parts = [known.of(name, axis) for name in node.inputs]
    if any(part is None for part in parts):
        return None
    known_parts = [part for part in parts if part is not None]
    return ChannelBounds(
        axis,
        np.concatenate([part.low for part in known_parts]),
        np.concatenate([part.high for part in known_parts]),
        tuple(key for part in known_parts for key in part.key),
        np.concatenate([part.scale for part in known_parts]),
        tuple(form for part in known_parts for form in part.form),
    )


def _transpose(node: Node, known: BoundsContext) -> ChannelBounds | None:
    data = known.facts.get(node.inputs[0])
    rank = len(known.shapes.get(node.inputs[0], ()))
    if data is None:
        return None
    order = list(node.attributes.get("perm", range(rank)[::-1]))
    keys = tuple(_hash("Transpose", order, key) for key in data.key)
    forms = tuple(
        None if form is None else replace(form, base=_hash("Transpose", order, form.base)) for form in data.form
    )
    return replace(data, axis=order.index(data.axis), key=keys, form=forms)


def _flatten(node: Node, known: BoundsContext) -> ChannelBounds | None:
    data = known.facts.get(node.inputs[0])
    before, after = known.shapes.get(node.inputs[0], ()), known.shapes.get(node.outputs[0], ())
    if data is None or data.axis != 1 or len(after) != 2 or not all(isinstance(n, int) for n in before[1:]):
        return None
    times = math.prod(n for n in before[2:] if isinstance(n, int))
    if after[1] != len(data.low) * times:
        return None
    keys = tuple(_hash("position", key, place) for key in data.key for place in range(times))
    forms = tuple(
        None if form is None else replace(form, base=_hash("position", form.base, place))
        for form in data.form
        for place in range(times)
    )
    return ChannelBounds(1, data.low.repeat(times), data.high.repeat(times), keys, data.scale.repeat(times), forms)


_RULES: Mapping[str, Callable[[Node, BoundsContext], ChannelBounds | None]] = {
    "Conv": _convolution,
    "Gemm": _matrix,
    "MatMul": _matrix,
    "BatchNormalization": _normalization,
    **dict.fromkeys(("Add", "Sub", "Mul", "Div"), _arithmetic),
    "Relu": _homogeneous(lambda x, node: np.maximum(x, 0)),
    "LeakyRelu": _homogeneous(_leaky),
    **dict.fromkeys(("MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool"), _pool),
    "Clip": _clip,
    "HardSwish": _hard_swish,
    "Neg": _negative,
    "Sigmoid": _monotone(_sigmoid, least=0.0),
    "HardSigmoid": _monotone(_hard_sigmoid, least=0.0),
    "Tanh": _monotone(lambda x, node: np.tanh(x)),
    "Softplus": _monotone(lambda x, node: np.logaddexp(0, x), least=0.0),
    **dict.fromkeys(("Identity", "Dropout"), _same),
    "Cast": _cast,
    "Concat": _concat,
    "Transpose": _transpose,
    **dict.fromkeys(("Flatten", "Reshape"), _flatten),
}

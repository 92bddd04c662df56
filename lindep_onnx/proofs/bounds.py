"""What the weights alone say about channels, for every input: bounds, and which channels are multiples of each other.

The rules of the operators (`proofs.rules`) map facts about a node's inputs to facts about its output.

Bounds hold for what a runtime computes, not only for real numbers. A sum of n products is computed, in whatever order,
as the sum of every term times (1 + d) with |d| at most about n units of rounding; so each term is widened by that share
of itself. A value that cannot vary is not widened: rounding makes it another constant, not a variable.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lindep_onnx.model.node import Node
from lindep_onnx.model.shapes import Shape

Array: TypeAlias = NDArray[Any]
Vector: TypeAlias = NDArray[np.float64]
Keys: TypeAlias = "tuple[bytes, ...]"
#: Lowest and highest values.
Box: TypeAlias = "tuple[Vector, Vector]"

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

    def renamed(self, *parts: object) -> ChannelBounds:
        """The same facts about what an operation that treats all channels alike, named by `parts`, makes of them."""
        keys = tuple(identity(*parts, key) for key in self.key)
        bases = (None if form is None else replace(form, base=identity(*parts, form.base)) for form in self.form)
        return replace(self, key=keys, form=tuple(bases))

    def take(self, places: NDArray[np.int64]) -> ChannelBounds:
        """The facts about some channels, in the order of `places`."""
        key, form = (tuple(facts[place] for place in places.tolist()) for facts in (self.key, self.form))
        return ChannelBounds(self.axis, self.low[places], self.high[places], key, self.scale[places], form)

    def where_not(self, same: NDArray[np.bool_], other: ChannelBounds) -> ChannelBounds:
        """These facts for channels in `same`, those of `other` for the rest."""
        places = np.arange(len(same))
        return joined([self, other]).take(np.where(same, places, places + len(same)))


def joined(parts: Sequence[ChannelBounds]) -> ChannelBounds:
    """The facts about channels that follow each other."""
    low, high, scale = (np.concatenate([getattr(part, name) for part in parts]) for name in ("low", "high", "scale"))
    keys, forms = (tuple(fact for part in parts for fact in getattr(part, name)) for name in ("key", "form"))
    return ChannelBounds(parts[0].axis, low, high, keys, scale, forms)


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
        keys = tuple(identity("channel", name, axis, channel) for channel in range(size))
        return ChannelBounds(axis, np.full(size, low), np.full(size, high), keys, np.ones(size), (None,) * size)


Rule: TypeAlias = Callable[[Node, BoundsContext], ChannelBounds | None]
#: A rule that is only asked where something is known of the first input.
FactsRule: TypeAlias = Callable[[Node, ChannelBounds, BoundsContext], ChannelBounds | None]


def of_facts(rule: FactsRule) -> Rule:
    """The rule of an operator that says nothing where nothing is known of its first input."""

    def asked(node: Node, known: BoundsContext) -> ChannelBounds | None:
        data = known.facts.get(node.inputs[0])
        return None if data is None else rule(node, data, known)

    return asked


def identity(*parts: object) -> bytes:
    """A key that is the same for the same parts only."""
    digest = hashlib.blake2b(digest_size=12)
    for part in parts:
        digest.update(part if isinstance(part, bytes) else repr(part).encode())
        digest.update(b"|")
    return digest.digest()


def options_of(node: Node) -> str:
    """The attributes of a node but for its groups, as a key."""
    plain = ((key, np.asarray(value).tolist()) for key, value in node.attributes.items() if key != "group")
    return repr(sorted(plain))


def _chunks(rows: Array) -> Iterator[slice]:
    step = max(1, CHUNK // max(1, rows[0].size if len(rows) else 1))
    return (slice(start, start + step) for start in range(0, len(rows), step))


def directions(rows: Array, last: Vector) -> tuple[Vector, list[bytes]]:
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
            names[index] = identity("not finite", index)
            continue
        while known and place[index] - known[0][0] > ALIKE:
            known.popleft()
        direction = np.append(rows[index].astype(np.float64), last[index]) / (length[index] or 1.0)
        name = next((name for _, other, name in known if np.linalg.norm(other - direction) <= ALIKE), None)
        if name is None:
            name = identity((direction + 0.0).tobytes())
            known.append((float(place[index]), direction, name))
        names[index] = name
    return length, names


def levels(scale: Vector) -> Vector:
    """(C,) the scales, with one number for those that differ by rounding."""
    result, level = scale.copy(), -1.0
    for index in np.argsort(scale, kind="stable").tolist():
        level = level if scale[index] <= level * (1 + ALIKE) else float(scale[index])
        result[index] = level
    return result


def product_bounds(weight: Array, low: Vector, high: Vector, bias: Vector, rounding: float) -> Box:
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
            terms = times(positive, first), times(negative, last)
            size = np.abs(terms[0]).sum(axis=1) + np.abs(terms[1]).sum(axis=1) + np.abs(b)
            result[part] = terms[0].sum(axis=1) + terms[1].sum(axis=1) + b + sign * times(share, size)
    return lowest, highest


def widened(low: Vector, high: Vector, share: float | Vector, size: Vector | float = 0.0) -> Box:
    """Bounds of what is computed with a relative error of `share`, of itself and of terms of `size` in it."""
    fixed = np.isfinite(low) & (low == high)
    return (
        np.where(fixed, low, low - times(share, np.abs(low) + size)),
        np.where(fixed, high, high + times(share, np.abs(high) + size)),
    )


def times(weight: Vector | float, bound: Vector) -> Vector:
    """A product in which nothing times infinity is nothing."""
    return np.where(np.equal(weight, 0), 0.0, weight * bound)


def hull(data: ChannelBounds, function: Callable[[Vector], Vector], turns: Sequence[float] = ()) -> Box:
    """Bounds of a function that is monotone between its turning points."""
    places = [data.low, data.high, *(np.clip(turn, data.low, data.high) for turn in turns)]
    values = np.stack([function(place) for place in places])
    return values.min(axis=0), values.max(axis=0)

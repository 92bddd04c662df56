"""Channels that the weights alone prove redundant: constants, multiples of others, and combinations of several.

The proof is for every input, or for every input in the ranges that the user declares. It is about what a runtime
computes in floating point, up to rounding: bounds are widened by what rounding can do (see `proofs.bounds`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import onnx
import scipy.linalg
from numpy.typing import NDArray

from lindep_onnx.errors import UsageError
from lindep_onnx.linalg.elimination import Allowance
from lindep_onnx.linalg.lossless import COLLINEAR, CONSTANT, JOINT
from lindep_onnx.model.ir import Model
from lindep_onnx.options import EVERY_INPUT
from lindep_onnx.proofs.bounds import (
    ROUNDING,
    ROUNDING_HALF,
    AffineForm,
    BoundsContext,
    ChannelBounds,
    identity,
    levels,
)
from lindep_onnx.proofs.rules import output_bounds
from lindep_onnx.structure.layout import ConsumerLayout, features
from lindep_onnx.structure.placement import equalized
from lindep_onnx.structure.steps import ChannelSteps, Fold
from lindep_onnx.structure.types import FROZEN, Consumer, Group, Structure

Ranges = Mapping[str, tuple[float, float]]

#: Channels are dependent if what is left of one is no more than what storing it and the others as float32 can change,
#: twice that much for each at its factor. Larger factors, of channels of equal length, would turn rounding into error.
ROUNDED, LARGEST_FACTOR = 2.0**-23, 32.0
#: Below this share of its own length the rest of a channel is looked at more closely.
SMALL_REST = 1e-5
#: Multiply-accumulates that one group may take; beyond it combinations of several channels are not looked for.
MAX_WORK = 2e11


@dataclass(frozen=True)
class _Seen:
    """What is known of the features of one consumer.

    Features of equal key are multiples of each other by their scales; a key is empty where nothing is known.
    """

    layout: ConsumerLayout
    keys: list[bytes]
    scale: NDArray[np.float64]
    forms: list[AffineForm | None]


@dataclass(frozen=True)
class _Combination:
    """Units that are combinations of others: unit removed[j] is the sum of matrix[i, j] times unit kept[i]."""

    kept: NDArray[np.int64]
    removed: NDArray[np.int64]
    matrix: NDArray[np.float64]

    def of(self, gone: NDArray[np.bool_]) -> _Combination:
        """Without the units that stay after all; `gone` is (units,)."""
        return _Combination(self.kept, self.removed[gone[self.removed]], self.matrix[:, gone[self.removed]])


@dataclass(frozen=True)
class Proof:
    """What follows from the weights.

    Attributes:
        steps: removes every unit that is proven redundant.
        constant: (units,) bool, units that are constant at every consumer, whatever the input.
        statistics: what folding needs to know of each consumer.
    """

    steps: ChannelSteps
    constant: NDArray[np.bool_]
    statistics: tuple[ConsumerLayout, ...]


@np.errstate(all="ignore")  # weights may be infinite
def prove(structure: Structure, ranges: Ranges = MappingProxyType({}), *, half: bool = False) -> Proof:
    """Propagate bounds and identities through the graph, and see what they mean at the consumers.

    `half` tells that the result will be computed in half precision, of which the model is a copy in single precision.
    """
    shape_info = structure.shape_info
    known = BoundsContext(shape_info.constants, shape_info.shapes, facts := {}, ROUNDING_HALF if half else ROUNDING)
    for name, (low, high) in ranges.items():
        if found := _bounded(known, name, low, high):
            facts[name] = found
    for node in structure.model.nodes if structure.consumers else ():
        made = node.outputs[0] if node.outputs else ""
        if made and made not in shape_info.constants and (found := output_bounds(node, known)):
            facts[made] = found
    seen = [_consumer(structure, consumer, known) for consumer in structure.consumers]
    constant = np.ones(structure.units, dtype=bool)
    for layout in (entry.layout for entry in seen):
        constant[layout.unit[(layout.unit != FROZEN) & ~layout.constant]] = False
    kind = np.zeros(structure.units, dtype=np.int8)
    bounds = Allowance(structure.units, structure.minimums)
    partner = np.full(structure.units, -1)
    for unit in np.flatnonzero(constant)[::-1].tolist():
        if bounds.take(unit):
            kind[unit] = CONSTANT
    for unit, other in _multiples(structure, seen, kind):
        if bounds.take(unit):
            kind[unit], partner[unit] = COLLINEAR, other
    combinations = [found for group in structure.groups for found in _combinations(group, seen, kind, bounds)]
    for combination in combinations:
        kind[combination.removed] = JOINT
    kind[~equalized(structure, kind > 0)] = 0
    combinations = [combination.of(kind == JOINT) for combination in combinations if kind[combination.removed].any()]
    steps = ChannelSteps(kind > 0, kind, _folds(seen, kind, partner, combinations))
    return Proof(steps, constant, tuple(_of_removed_constants(entry.layout, kind) for entry in seen))


def _of_removed_constants(layout: ConsumerLayout, kind: NDArray[np.int8]) -> ConsumerLayout:
    """Means of constants that go as such: all others are made up for as multiples and combinations, which are exact."""
    gone = np.append(kind == CONSTANT, False)[layout.unit]
    return replace(layout, mean=np.where(gone, layout.mean, 0.0))


def ranges_of(model: Model, wanted: Ranges) -> dict[str, tuple[float, float]]:
    """The range of every input that has one: declared by the user, or by a type of few values.

    Args:
        model: whose inputs.
        wanted: by input name; `EVERY_INPUT` is for all that are not named.

    Raises:
        UsageError: there is no such input, or it holds no numbers.
    """
    types = {value.name: value.type.tensor_type.elem_type for value in model.proto.graph.input}
    numeric = {name: onnx.helper.tensor_dtype_to_np_dtype(types[name]) for name in model.inputs if types[name]}
    numeric = {name: dtype for name, dtype in numeric.items() if dtype.kind in "fiubV"}
    for name in wanted.keys() - {EVERY_INPUT}:
        if name not in numeric:
            listed = ", ".join(numeric) or "none"
            raise UsageError(f"--input-range: the model has no numeric input {name!r}; it has: {listed}.")
    found: dict[str, tuple[float, float]] = {}
    for name, dtype in numeric.items():
        given = wanted.get(name, wanted.get(EVERY_INPUT))
        if given is not None:
            found[name] = (float(given[0]), float(given[1]))
        elif dtype.kind in "iu" and dtype.itemsize <= 2:
            found[name] = (float(np.iinfo(dtype).min), float(np.iinfo(dtype).max))
        elif dtype.kind == "b":
            found[name] = (0.0, 1.0)
    return found


def _bounded(known: BoundsContext, name: str, low: float, high: float) -> ChannelBounds | None:
    """The range of an input, along the axis that is most likely its channels, as constants behind it are."""
    shape = known.shapes.get(name, ())
    sizes = {axis: size for axis, size in enumerate(shape) if isinstance(size, int) and axis in (1, len(shape) - 1)}
    found = (known.bounded(name, axis, low, high) for axis in sorted(sizes, key=sizes.__getitem__) or range(len(shape)))
    return next(filter(None, found), None)


def _consumer(structure: Structure, consumer: Consumer, known: BoundsContext) -> _Seen:
    """The layout of a consumer, and what ties them to each other."""
    layout = features(consumer.columns)
    index = layout.index + consumer.first_column
    size = len(index)
    facts = _at_all_readers(consumer, known)
    low, high, scale = np.full(size, -np.inf), np.full(size, np.inf), np.ones(size)
    keys = [b""] * size
    forms: list[AffineForm | None] = [None] * size
    if facts is not None:
        low, high, scale = facts.low[index].min(axis=1), facts.high[index].max(axis=1), facts.scale[index[:, 0]]
        ratios = facts.scale[index] / np.where(scale > 0, scale, 1.0)[:, None]
        same = (np.abs(ratios - 1) < 1e-9).all(axis=1) | (scale == 0)
        # Behind a Flatten a channel is known by all of its positions.
        keys = [b"".join(facts.key[place] for place in row) if ok else b"" for row, ok in zip(index, same, strict=True)]
        forms = [_common([facts.form[place] for place in row]) for row in index]
    # A constant other than zero can only go where the output can take it up.
    constant = np.isfinite(low) & (low == high) & (consumer.affine | (low == 0))
    mean = np.where(constant & consumer.affine, low, 0.0)
    found = ConsumerLayout(consumer, layout.index, structure.unit[layout.atoms], mean, constant)
    return _Seen(found, keys, scale, forms)


def _at_all_readers(consumer: Consumer, known: BoundsContext) -> ChannelBounds | None:
    """What holds wherever a weight is multiplied: channels are multiples by one factor, that of the first reader."""
    parts = [known.of(reader.tensor, reader.axis) for reader in consumer.readers]
    first, others = parts[0], [part for part in parts[1:] if part is not None]
    if len(parts) == 1 or first is None:
        return first
    if len(others) < len(parts) - 1 or any(len(part.low) != len(first.low) for part in others):
        return None
    rows = [first.key]
    for part in others:
        ratios = levels(part.scale / first.scale).tolist()
        rows.append(tuple(identity(key, ratio) for key, ratio in zip(part.key, ratios, strict=True)))
    low, high = (
        np.min([part.low for part in (first, *others)], axis=0),
        np.max([p.high for p in (first, *others)], axis=0),
    )
    keys = tuple(identity(*row) for row in zip(*rows, strict=True))
    return replace(first, low=low, high=high, key=keys, form=(None,) * len(low))


def _common(forms: list[AffineForm | None]) -> AffineForm | None:
    """One form for all positions of a channel, if they are the same function of what is read there."""
    first = forms[0]
    same = [form for form in forms if first and form and form.product is first.product]
    if first is None or len(same) < len(forms) or len({(form.row, form.factor, form.shift) for form in same}) > 1:
        return None
    return replace(first, base=b"".join(form.base for form in same))


def _multiples(structure: Structure, seen: list[_Seen], kind: NDArray[np.int8]) -> list[tuple[int, int]]:
    """(unit, the unit it is a multiple of) at every consumer it is read at."""
    found = []
    for group in structure.groups:
        signature: dict[int, list[object]] = {int(unit): [] for unit in group.units if not kind[unit]}
        for index in group.consumers:
            own = seen[index]
            for feature, unit in enumerate(own.layout.unit.tolist()):
                if unit in signature:
                    usable = bool(own.keys[feature]) and own.scale[feature] > 0
                    signature[unit].append((index, own.keys[feature] if usable else unit))
        first: dict[tuple[object, ...], int] = {}
        for unit in sorted(signature):
            other = first.setdefault(tuple(signature[unit]), unit)
            if other != unit and signature[unit]:
                found.append((unit, other))
    return found[::-1]


def _combinations(group: Group, seen: list[_Seen], kind: NDArray[np.int8], bounds: Allowance) -> Iterator[_Combination]:
    """Units that are the same combination of others at every consumer of the group that reads them.

    A unit's vector holds the coefficients of its form at every consumer, end to end. A dependence between vectors is
    one between the channels themselves, at every position and for every input.
    """
    forms: dict[int, list[tuple[int, AffineForm]] | None] = {int(unit): [] for unit in group.units if not kind[unit]}
    for index in group.consumers:
        counted: set[int] = set()
        for unit, form in zip(seen[index].layout.unit.tolist(), seen[index].forms, strict=True):
            own = forms.get(unit)
            if own is None:
                continue
            if form is None or unit in counted:  # two features of one unit at a consumer: not looked into
                forms[unit] = None
            else:
                counted.add(unit)
                own.append((index, form))
    alike: dict[tuple[tuple[int, bytes], ...], list[int]] = {}
    for unit, own in forms.items():
        if own:
            alike.setdefault(tuple((index, form.base) for index, form in own), []).append(unit)
    for units in alike.values():
        width = sum(form.product.rows.shape[1] + 1 for _, form in forms[units[0]] or ())
        if len(units) > 1 and float(len(units)) ** 2 * width <= MAX_WORK:
            vectors = np.stack([np.concatenate([form.vector() for _, form in forms[unit] or ()]) for unit in units])
            found = _dependent(np.array(units), vectors, bounds)
            if found is not None:
                yield found


def _dependent(units: NDArray[np.int64], vectors: NDArray[np.float64], bounds: Allowance) -> _Combination | None:
    """Which of the units are combinations of the others; `vectors` is (units, coefficients)."""
    length = np.linalg.norm(vectors, axis=1)
    if not np.isfinite(length).all() or not (length > 0).all():
        return None
    triangle, order = scipy.linalg.qr((vectors / length[:, None]).T, mode="r", pivoting=True)
    rank = int((np.abs(np.diagonal(triangle)) > SMALL_REST).sum())
    if rank == len(units) or not rank:
        return None
    factors = scipy.linalg.solve_triangular(triangle[:rank, :rank], triangle[:rank, rank:])
    rest = np.linalg.norm(triangle[rank:, rank:], axis=0)
    good = [
        place
        for place in range(len(units) - rank)
        if rest[place] <= ROUNDED * (1 + np.abs(factors[:, place]).sum())
        and np.abs(factors[:, place]).max() <= LARGEST_FACTOR
        and bounds.take(int(units[order[rank + place]]))
    ]
    if not good:
        return None
    kept, removed = order[:rank], order[rank:][good]
    return _Combination(units[kept], units[removed], factors[:, good] * length[removed] / length[kept][:, None])


def _folds(
    seen: list[_Seen], kind: NDArray[np.int8], partner: NDArray[np.int64], combinations: list[_Combination]
) -> dict[int, Fold]:
    folds = {}
    for index, own in enumerate(seen):
        unit_of, scale = own.layout.unit, own.scale
        gone = np.append(kind > 0, False)[unit_of]
        if not gone.any():
            continue
        places = {int(unit): np.flatnonzero(unit_of == unit) for unit in np.unique(unit_of) if unit >= 0}
        full = np.eye(len(gone))
        full[:, gone] = 0
        for combination in combinations:
            if int(combination.removed[0]) in places:
                kept = np.concatenate([places[int(unit)] for unit in combination.kept])
                removed = np.concatenate([places[int(unit)] for unit in combination.removed])
                full[np.ix_(kept, removed)] = combination.matrix
                back = removed[~gone[removed]]  # what has to stay for another reason
                full[:, back] = np.eye(len(gone))[:, back]
        for unit, mine in places.items():
            if kind[unit] == COLLINEAR:  # of a unit that may itself be a combination
                others = places[int(partner[unit])]
                full[:, mine] = full[:, others] * (scale[mine] / scale[others])
        folds[index] = Fold(~gone, full[np.ix_(~gone, gone)])
    return folds

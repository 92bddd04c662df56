"""One price for the whole graph: the order in which units go when a budget allows errors.

Removing a unit adds error at its sites and saves parameters or MACs. Inside a group the units are ordered by
elimination (see `linalg.elimination`), each site weighted by its measured influence on the outputs. The costs along
that order are not monotone and savings depend on the order too, so a group's price is the slope of the lower convex
hull of cost against saving. Sorted by price, the hull segments of all groups are a ladder of nested plans: every
budget, of whatever kind, is a rung of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lindep_onnx.calibration.statistics import Statistics, problem
from lindep_onnx.linalg.elimination import Allowance, eliminate
from lindep_onnx.linalg.fold import ConsumerProblem, choose_ridge
from lindep_onnx.moves.channels import local_minimums, local_problem, local_units
from lindep_onnx.structure.steps import Fold
from lindep_onnx.structure.types import Product, Structure

Saving: TypeAlias = Literal["parameters", "macs", "channels"]

#: Rungs that a search over measured errors probes, and how they crowd where little is left; a search over sizes uses
#: every unit.
RUNGS, CROWDING = 96, 1.5


@dataclass(frozen=True)
class Curve:
    """The units of one group in the order in which they go.

    Attributes:
        group: its number.
        units: (R,) unit numbers.
        cost: (R,) squared error of the outputs that is expected once the unit and all before it are gone.
        saving: (R,) what that saves, in the currency of the ladder.
    """

    group: int
    units: NDArray[np.int64]
    cost: NDArray[np.float64]
    saving: NDArray[np.float64]


#: The curves of all groups by the currency that they are priced in.
Prices: TypeAlias = Mapping[Saving, Sequence[Curve]]


@dataclass(frozen=True)
class Ladder:
    """Nested plans, from nothing to everything that may go.

    Attributes:
        units: number of units of the model.
        order: (R,) units in the order in which they go.
        price: (R,) ascending, cost per saving.
    """

    units: int
    order: NDArray[np.int64]
    price: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.order)

    def removed(self, count: int) -> NDArray[np.bool_]:
        """(units,) bool, once the first `count` units of the order are gone."""
        mask = np.zeros(self.units, dtype=bool)
        mask[self.order[:count]] = True
        return mask

    def rungs(self) -> list[int]:
        """Counts of units that searches by measured error probe, ascending: the same for every budget.

        They lie closer where little is left: there a unit is a larger share of the model.
        """
        left = np.linspace(1, 0, RUNGS + 1) ** CROWDING
        return sorted({round(len(self) * (1 - share)) for share in left.tolist()})


@dataclass(frozen=True)
class FrontierPoint:
    """What one plan on the path gives without a refit.

    Attributes:
        parameters: share of the original's parameters that is left.
        relative_error: worst output error, as `lindep_onnx.verify` defines it, on samples that choose between plans.
        agreement: share of them with the same arg-max; None if no output has one.
        channels: how many went.
        expected: root of the squared relative error of the outputs, averaged over them, that the plan was priced at.
    """

    parameters: float
    relative_error: float
    agreement: float | None
    channels: int = 0
    expected: float | None = None


def savings(
    structure: Structure, kind: Saving, rates: Mapping[int, float] = MappingProxyType({})
) -> NDArray[np.float64]:
    """(units,) parameters, MACs or output channels that go with each unit, all others kept.

    Args:
        structure: the traced model.
        kind: the currency.
        rates: by node, what a multiply-accumulate of it is worth; those of all others, or of all without, count as 1.
    """
    if kind == "channels":
        return np.bincount(structure.unit[_produced(structure)] + 1, minlength=structure.units + 1)[1:].astype(
            np.float64
        )
    total = np.zeros(structure.units + 1)  # the last entry takes what stays
    positions = {
        (product.reader.node, product.position): _positions(structure, product) for product in structure.products
    }
    for name, readers in structure.reads.items():
        shape = structure.shape_info.constants[name].shape
        for key, axes in readers.items():
            times = 1.0 if kind == "parameters" else positions.get(key, 0.0) * rates.get(key[0], 1.0)
            for axis, atoms in axes.items():
                blocks = len(atoms) if atoms.ndim == 2 and axis > 0 else 1
                slice_size = math.prod(shape) / max(1, shape[axis]) / blocks
                np.add.at(total, structure.unit[atoms], times * slice_size)
            if kind == "parameters":
                break  # a shared weight is stored once
    return total[:-1]


def _produced(structure: Structure) -> NDArray[np.int64]:
    return np.concatenate([np.empty(0, np.int64), *(producer.atoms for producer in structure.producers)])


def _positions(structure: Structure, product: Product) -> float:
    reader = product.reader
    shape = structure.shape_info.shapes.get(reader.output, ())
    return float(
        math.prod(n for axis, n in enumerate(shape) if axis not in (0, reader.output_axis) and isinstance(n, int))
    )


def curves(
    structure: Structure,
    statistics: Statistics,
    sensitivity: Sequence[float],
    saving: NDArray[np.float64],
    numbers: Sequence[int] | None = None,
) -> list[Curve]:
    """Order the units of every group, or of some.

    Args:
        structure: the traced model.
        statistics: what the data says.
        sensitivity: for each site, squared error of the outputs for a squared relative error of 1 at the site.
        saving: (units,) what each unit saves.
        numbers: of the groups; None for all.
    """
    nothing = np.zeros(structure.units, dtype=bool)
    local = local_units(structure)
    least = local_minimums(structure, local)
    found = []
    for number in range(len(structure.groups)) if numbers is None else numbers:
        group = structure.groups[number]
        problems = []
        for index in group.consumers:
            posed = local_problem(problem(structure, statistics.consumers[index], nothing), local)
            weight = max(sensitivity[index], 1e-12)
            problems.append(replace(posed, energy=posed.energy / weight, ridge=_ridge(posed, len(group.units))))
        gain = np.maximum(saving[group.units], 1e-9)
        order = eliminate(problems, np.ones(len(group.units), dtype=bool), gain=gain, minimums=least[number])
        found.append(Curve(number, group.units[order.order], order.cost, np.cumsum(gain[order.order])))
    return found


def _ridge(posed: ConsumerProblem, units: int) -> float:
    """The ridge that predicts unseen samples best when half of the units are gone, spread evenly."""
    if posed.holdout is None:
        return 1e-10
    gone = np.zeros(units + 1, dtype=bool)
    gone[:units:2] = True
    kept = ~gone[posed.unit]
    return max(1e-10, choose_ridge(posed, kept)[0]) if 0 < kept.sum() < len(kept) else 1e-10


def build_ladder(structure: Structure, found: Sequence[Curve], first: NDArray[np.bool_]) -> Ladder:
    """Merge the curves of all groups by price.

    Args:
        structure: the traced model.
        found: a curve for each group.
        first: (units,) bool, units that go for nothing before all others.
    """
    free = np.flatnonzero(first)
    pieces: list[tuple[float, int, int, NDArray[np.int64]]] = []
    for curve in found:
        ends = _hull(curve.saving, curve.cost)
        begin, spent, saved = 0, 0.0, 0.0
        for place, end in enumerate(ends):
            slope = (curve.cost[end] - spent) / max(curve.saving[end] - saved, 1e-300)
            pieces.append((float(slope), curve.group, place, curve.units[begin : end + 1]))
            begin, spent, saved = end + 1, float(curve.cost[end]), float(curve.saving[end])
    pieces.sort(key=lambda piece: piece[:3])
    order = np.concatenate([np.empty(0, np.int64), *(piece[3] for piece in pieces)])
    price = np.concatenate([np.empty(0), *(np.full(len(piece[3]), piece[0]) for piece in pieces)])
    rest = ~np.isin(order, free)
    order, price = np.concatenate([free, order[rest]]), np.concatenate([np.zeros(len(free)), price[rest]])
    # A curve may end at a unit that goes for nothing: then another one of its axis stays in its place.
    allowance = Allowance(structure.units, structure.minimums)
    possible = np.array([allowance.take(unit) for unit in order.tolist()], dtype=bool)
    return Ladder(structure.units, order[possible], price[possible])


def _hull(saving: NDArray[np.float64], cost: NDArray[np.float64]) -> list[int]:
    """Ends of the segments of the lower convex hull from (0, 0) on."""
    ends: list[int] = []
    for place in range(len(saving)):
        while ends:
            before = ends[-2] if len(ends) > 1 else None
            x0, y0 = (saving[before], cost[before]) if before is not None else (0.0, 0.0)
            last = ends[-1]
            # The last corner goes if the new point lies below the line through it.
            if (cost[last] - y0) * (saving[place] - x0) < (cost[place] - y0) * (saving[last] - x0):
                break
            ends.pop()
        ends.append(place)
    return ends


def folds_of(
    structure: Structure, statistics: Statistics, removed: NDArray[np.bool_], base: Mapping[int, Fold]
) -> dict[int, Fold]:
    """The fold of every site that loses something, with the ridge that does best on unseen samples.

    Args:
        structure: the traced model.
        statistics: what the data says.
        removed: (units,) bool.
        base: folds that are known already, used where they are for the same features.
    """
    found: dict[int, Fold] = {}
    for index, seen in enumerate(statistics.consumers):
        kept = ~np.append(removed, False)[seen.unit]
        if kept.all():
            continue
        if index in base and np.array_equal(base[index].kept, kept):
            found[index] = base[index]
            continue
        found[index] = Fold(kept, choose_ridge(problem(structure, seen, removed), kept)[1])
    return found

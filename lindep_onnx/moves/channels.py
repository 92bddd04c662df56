"""Which units go: everything that costs nothing, or as much as a budget allows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from lindep_onnx.calibration.statistics import Statistics, problem
from lindep_onnx.linalg.elimination import Minimums
from lindep_onnx.linalg.fold import ConsumerProblem
from lindep_onnx.linalg.lossless import lossless_removals
from lindep_onnx.structure.layout import ConsumerLayout
from lindep_onnx.structure.placement import equalized
from lindep_onnx.structure.steps import ChannelSteps, Fold
from lindep_onnx.structure.types import FROZEN, Group, Structure

#: Rounds over all groups: each can free weight for the groups before it. Two are enough unless paths cross.
ROUNDS = 4


def plan_lossless(
    structure: Structure,
    statistics: Statistics,
    uncertain: NDArray[np.bool_],
    *,
    tolerance: float,
    keep: NDArray[np.bool_] | None = None,
) -> ChannelSteps:
    """Everything whose removal adds at most `tolerance` at every site, on unseen samples too.

    Groups go from outputs to inputs: what a group loses are rows of the weights that read the groups before it, and
    weights that are gone no longer have to be made up for.

    Args:
        structure: the traced model.
        statistics: what the data says.
        uncertain: (units,) bool, constant so far but without a margin.
        tolerance: RMS relative error that one site may gain.
        keep: (units,) bool, units that stay in any case; None for none.
    """
    while True:
        plan = _planned(structure, statistics, uncertain, keep, tolerance)
        whole = equalized(structure, plan.removed)
        if (whole == plan.removed).all():
            return plan
        keep = ~whole


def part_of(plan: ChannelSteps, consumers: Sequence[ConsumerLayout], removed: NDArray[np.bool_]) -> ChannelSteps | None:
    """A plan of which some units stay after all; None if it does not remove all the others.

    What is removed is made up for feature by feature, from those that stayed anyway: the rest is as it was.

    Args:
        plan: the whole plan.
        consumers: of the model, for the unit of each feature.
        removed: (units,) bool, what still goes.
    """
    if (removed & ~plan.removed).any():
        return None
    folds = {}
    for index, fold in plan.folds.items():
        kept = ~np.append(removed, False)[consumers[index].unit]
        if kept.all():
            continue
        matrix = np.zeros((int(kept.sum()), int((~kept).sum())))
        matrix[fold.kept[kept]] = fold.matrix[:, ~kept[~fold.kept]]
        folds[index] = Fold(kept, matrix)
    return ChannelSteps(removed, np.where(removed, plan.kind, 0).astype(np.int8), folds)


def _planned(
    structure: Structure,
    statistics: Statistics,
    uncertain: NDArray[np.bool_],
    keep: NDArray[np.bool_] | None,
    tolerance: float,
) -> ChannelSteps:
    removed = np.zeros(structure.units, dtype=bool)
    kind = np.zeros(structure.units, dtype=np.int8)
    folds: dict[int, Fold] = {}
    rows: dict[int, bytes] = {}
    local = local_units(structure)
    least = local_minimums(structure, local)
    for _ in range(ROUNDS):
        changed = False
        for number in reversed(range(len(structure.groups))):
            group = structure.groups[number]
            current = b"".join(
                structure.mask(structure.consumers[consumer].rows, removed).tobytes() for consumer in group.consumers
            )
            if rows.get(number) == current:
                continue
            rows[number] = current
            before = removed[group.units].copy()
            _plan_group(
                structure, statistics, uncertain, keep, group, local, least[number], removed, kind, folds, tolerance
            )
            changed |= bool((removed[group.units] != before).any())
        if not changed:
            break
    return ChannelSteps(removed, kind, folds)


def _plan_group(
    structure: Structure,
    statistics: Statistics,
    uncertain: NDArray[np.bool_],
    keep: NDArray[np.bool_] | None,
    group: Group,
    local: NDArray[np.int64],
    least: Minimums,
    removed: NDArray[np.bool_],
    kind: NDArray[np.int8],
    folds: dict[int, Fold],
    tolerance: float,
) -> None:
    """Decide one group from scratch and write the decision into `removed`, `kind` and `folds`."""
    units = group.units
    removed[units] = False
    kind[units] = 0
    problems = []
    read = np.zeros(len(units) + 1, dtype=bool)  # the last entry answers for FROZEN
    varies = np.zeros(len(units) + 1, dtype=bool)
    for index in group.consumers:
        seen = statistics.consumers[index]
        posed = local_problem(problem(structure, seen, removed), local)
        multiplied = np.diagonal(posed.outer) != 0.0
        read[posed.unit[multiplied]] = True
        varies[posed.unit[multiplied & ~seen.constant]] = True
        problems.append(posed)
    sure = ~(statistics.inactive & uncertain)[units]
    unread = ~read[:-1]
    constant = ~varies[:-1]
    free = np.ones(len(units), dtype=bool) if keep is None else ~keep[units]
    inactive = (unread | (constant & sure)) & free
    result = lossless_removals(
        problems,
        (sure & statistics.active[units] & free) | inactive,
        constant=inactive,
        tolerance=tolerance,
        minimums=least,
    )
    removed[units] = result.removed
    kind[units] = result.kind
    for index, matrix in zip(group.consumers, result.folds, strict=True):
        kept = ~np.append(removed, False)[statistics.consumers[index].unit]
        if kept.all():
            folds.pop(index, None)
        else:
            folds[index] = Fold(kept, matrix)


def local_units(structure: Structure) -> NDArray[np.int64]:
    """(units + 1,) the number of each unit within its group; the last entry answers for FROZEN."""
    local = np.full(structure.units + 1, FROZEN, dtype=np.int64)
    for group in structure.groups:
        local[group.units] = np.arange(len(group.units))
    return local


def local_problem(posed: ConsumerProblem, local: NDArray[np.int64]) -> ConsumerProblem:
    """The same problem in the unit numbers of its group."""
    return replace(posed, unit=local[posed.unit])


def local_minimums(structure: Structure, local: NDArray[np.int64]) -> list[list[tuple[NDArray[np.int64], int]]]:
    """The constraints of each group in its own numbers. Members of other groups are not counted on."""
    owner = np.zeros(structure.units, dtype=np.int64)
    for number, group in enumerate(structure.groups):
        owner[group.units] = number
    found: list[list[tuple[NDArray[np.int64], int]]] = [[] for _ in structure.groups]
    for members, bound in structure.minimums:
        for number in np.unique(owner[members]).tolist():
            own = local[members[owner[members] == number]]
            found[number].append((own, min(bound, len(own))))
    return found

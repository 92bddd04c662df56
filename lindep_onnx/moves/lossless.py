"""Which units go for nothing: those that are constant, multiples or combinations of others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lindep_onnx.calibration.statistics import Statistics, problem
from lindep_onnx.linalg.lossless import CONSTANT, lossless_removals
from lindep_onnx.moves.base import Exactness
from lindep_onnx.moves.local import LocalUnits
from lindep_onnx.structure.layout import ConsumerLayout
from lindep_onnx.structure.placement import equalized
from lindep_onnx.structure.steps import ChannelSteps, Fold
from lindep_onnx.structure.types import Structure

#: Rounds over all groups: each can free weight for the groups before it. Two are enough unless paths cross.
ROUNDS = 4


def lossless_steps(structure: Structure, statistics: Statistics, bounds: Exactness) -> ChannelSteps:
    """Everything whose removal adds at most the tolerance at every consumer, on unseen samples too.

    Groups go from outputs to inputs: what a group loses are rows of the weights that read the groups before it, and
    weights that are gone no longer have to be made up for.

    Args:
        structure: the traced model.
        statistics: what the data says.
        bounds: what counts as nothing, and what stays in any case.
    """
    keep = bounds.keep
    while True:
        search = _Search(structure, statistics, bounds, np.zeros(structure.units, dtype=bool) if keep is None else keep)
        steps = search.run()
        whole = equalized(structure, steps.removed)
        if (whole == steps.removed).all():
            return steps
        keep = ~whole


def part_of(
    steps: ChannelSteps, consumers: Sequence[ConsumerLayout], removed: NDArray[np.bool_]
) -> ChannelSteps | None:
    """Steps of which some units stay after all; None if they do not remove all the others.

    What is removed is made up for feature by feature, from those that stayed anyway: the rest is as it was.

    Args:
        steps: all of them.
        consumers: of the model, for the unit of each feature.
        removed: (units,) bool, what still goes.
    """
    if (removed & ~steps.removed).any():
        return None
    folds = {}
    for index, fold in steps.folds.items():
        kept = ~np.append(removed, False)[consumers[index].unit]
        if kept.all():
            continue
        matrix = np.zeros((int(kept.sum()), int((~kept).sum())))
        matrix[fold.kept[kept]] = fold.matrix[:, ~kept[~fold.kept]]
        folds[index] = Fold(kept, matrix)
    return ChannelSteps(removed, np.where(removed, steps.kind, 0).astype(np.int8), folds)


class _Search:
    """Goes over all groups until nothing changes.

    Args:
        structure: the traced model.
        statistics: what the data says.
        bounds: what counts as nothing.
        keep: (units,) bool, units that stay in any case.
    """

    def __init__(
        self, structure: Structure, statistics: Statistics, bounds: Exactness, keep: NDArray[np.bool_]
    ) -> None:
        self._structure, self._statistics, self._bounds, self._keep = structure, statistics, bounds, keep
        self._local = LocalUnits(structure)
        self._removed = np.zeros(structure.units, dtype=bool)
        self._kind = np.zeros(structure.units, dtype=np.int8)
        self._folds: dict[int, Fold] = {}
        self._proven = ChannelSteps.of(np.zeros(structure.units, dtype=bool))
        if bounds.proven is not None:  # constants are left to the data, which knows their values
            sure = bounds.proven.removed & (bounds.proven.kind != CONSTANT) & ~keep
            self._proven = part_of(bounds.proven, statistics.consumers, sure) or self._proven

    def run(self) -> ChannelSteps:
        rows: dict[int, bytes] = {}
        structure = self._structure
        for _ in range(ROUNDS):
            changed = False
            for number in reversed(range(len(structure.groups))):
                group = structure.groups[number]
                current = b"".join(
                    structure.mask(structure.consumers[index].rows, self._removed).tobytes()
                    for index in group.consumers
                )
                if rows.get(number) == current:
                    continue
                rows[number] = current
                before = self._removed[group.units].copy()
                self._decide(number)
                changed |= bool((self._removed[group.units] != before).any())
            if not changed:
                break
        return ChannelSteps(self._removed, self._kind, self._folds)

    def _decide(self, number: int) -> None:
        """Decide one group from scratch."""
        group, statistics = self._structure.groups[number], self._statistics
        units = group.units
        self._removed[units] = False
        self._kind[units] = 0
        proven = self._proven.removed[units]
        problems = []
        read = np.zeros(len(units) + 1, dtype=bool)  # the last entry answers for FROZEN
        varies = np.zeros(len(units) + 1, dtype=bool)
        for index in group.consumers:
            seen = statistics.consumers[index]
            posed = self._local.problem(problem(self._structure, seen, self._removed))
            constant = seen.constant
            if index in self._proven.folds:
                base = self._proven.folds[index]
                posed, constant = posed.folded(base.kept, base.matrix), constant[base.kept]
            multiplied = np.diagonal(posed.outer) != 0.0
            read[posed.unit[multiplied]] = True
            varies[posed.unit[multiplied & ~constant]] = True
            problems.append(posed)
        sure = ~(statistics.inactive & self._bounds.uncertain)[units]
        free = ~self._keep[units] & ~proven
        inactive = (~read[:-1] | (~varies[:-1] & sure)) & free
        result = lossless_removals(
            problems,
            (sure & statistics.active[units] & free) | inactive,
            constant=inactive,
            tolerance=self._bounds.tolerance,
            minimums=[(members[~proven[members]], bound) for members, bound in self._local.minimums[number]],
        )
        self._removed[units] = result.removed | proven
        self._kind[units] = np.where(proven, self._proven.kind[units], result.kind)
        for index, matrix in zip(group.consumers, result.folds, strict=True):
            kept = ~np.append(self._removed, False)[statistics.consumers[index].unit]
            if kept.all():
                self._folds.pop(index, None)
            else:
                first = self._proven.folds.get(index)
                self._folds[index] = Fold(kept, matrix) if first is None else _after(first, kept, matrix)


def _after(first: Fold, kept: NDArray[np.bool_], matrix: NDArray[np.float64]) -> Fold:
    """One fold after another: `matrix` makes up for what goes of the features that `first` keeps; `kept` stay."""
    size = len(kept)
    one, other = np.eye(size), np.eye(size)
    one[:, ~first.kept] = 0.0
    one[np.ix_(first.kept, ~first.kept)] = first.matrix
    later = first.kept & ~kept
    other[:, later] = 0.0
    other[np.ix_(kept, later)] = matrix
    return Fold(kept, (other @ one)[np.ix_(kept, ~kept)])

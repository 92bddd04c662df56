"""What can go without a trace: features that are zero, multiples of others, or combinations of several.

The notation is that of `lindep_onnx.linalg.fold`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lindep_onnx.linalg.elimination import Allowance, Limits, Minimums, affordable, eliminate
from lindep_onnx.linalg.fold import ConsumerProblem, Matrix, fold, residual_moments

#: How a unit that goes is made up for, by number.
KINDS = ("kept", "constant", "collinear", "joint")
NONE, CONSTANT, COLLINEAR, JOINT = range(len(KINDS))

#: Ridge, relative to unit second moments, that keeps the inverse finite where features are exactly dependent. It adds
#: `ridge` times a feature's own share to its cost: 1e-13 is an error of 3e-7, far below what counts as lossless.
EXACT_RIDGE = 1e-13
#: 1 - |cosine| below which two features are multiples of each other: a relative difference of 1.4e-5.
COLLINEAR_TOLERANCE = 1e-10
#: How often the search for joint dependence goes on behind a unit that unseen samples do not confirm.
TRIES = 4
#: Rows of a Gram matrix that are compared with all others at a time.
BLOCK = 256


@dataclass(frozen=True)
class Collinear:
    """Classes of features that are multiples of each other.

    Attributes:
        label: (F,) class of each feature, named by its lowest member; -1 for features that are zero.
        scale: (F,) each feature is this times the representative of its class.
    """

    label: NDArray[np.int64]
    scale: NDArray[np.float64]


def collinear_classes(gram: Matrix, holdout: Matrix | None, *, tolerance: float = COLLINEAR_TOLERANCE) -> Collinear:
    """Find features that are multiples of others on the fit samples and stay so, by the same factor, on unseen ones.

    Every member is compared with the representative itself, so that small differences do not add up along a chain.

    Args:
        gram: (F, F) G of the fit samples.
        holdout: (F, F) of unseen samples, None to do without.
        tolerance: largest 1 - |cosine|.
    """
    size = len(gram)
    norm = np.sqrt(np.maximum(np.diagonal(gram), 0.0))
    live = norm > 0
    found = [np.empty((0, 2), dtype=np.int64)]
    for start in range(0, size, BLOCK):  # intermediate matrices of wide consumers would be large
        rows = slice(start, start + BLOCK)
        close = np.abs(gram[rows, start:]) >= (1.0 - tolerance) * np.outer(norm[rows], norm[start:])
        found.append(np.argwhere(close & live[rows, None] & live[start:]) + start)
    first, second = np.concatenate(found).T
    factor = gram[first, second] / gram[first, first]  # z_second = factor z_first
    if holdout is not None:
        unseen = np.maximum(np.diagonal(holdout), 0.0)
        expected = factor**2 * unseen[first]
        residual = unseen[second] - 2.0 * factor * holdout[first, second] + expected
        kept = (first == second) | (residual <= 4.0 * tolerance * np.maximum(unseen[second], expected))
        first, second, factor = first[kept], second[kept], factor[kept]
    label, scale = np.full(size, -1), np.zeros(size)
    label[second[::-1]], scale[second[::-1]] = first[::-1], factor[::-1]  # the lowest partner is written last
    followers = live & (label[label] != label)  # close to a feature that is itself a multiple of an earlier one
    label[followers] = np.flatnonzero(followers)
    scale[label == np.arange(size)] = 1.0
    return Collinear(label, scale)


@dataclass(frozen=True)
class LosslessRemoval:
    """What can go without a trace.

    Attributes:
        removed: (units,) bool.
        kind: (units,) index into `KINDS`.
        folds: for each consumer, T (kept x removed features).
    """

    removed: NDArray[np.bool_]
    kind: NDArray[np.int8]
    folds: tuple[Matrix, ...]


def lossless_removals(
    consumers: Sequence[ConsumerProblem],
    candidates: NDArray[np.bool_],
    *,
    constant: NDArray[np.bool_] | None = None,
    tolerance: float = 1e-5,
    minimums: Minimums = (),
) -> LosslessRemoval:
    """Remove everything that is constant, a multiple of another feature, or a combination of several, in this order.

    Dependence on one feature shows in few rows; dependence on several needs many (`ConsumerProblem.joint`), or a full
    solve finds it everywhere. All removals together may add at most `tolerance` at any consumer, on fit and on unseen
    samples.

    Args:
        consumers: the problems, which share units.
        candidates: (units,) bool, which may go.
        constant: (units,) bool, which may go because they are zero; all candidates by default.
        tolerance: RMS relative error allowed at each consumer.
        minimums: sets of units of which so many must survive.
    """
    search = _Search(consumers, len(candidates), tolerance, minimums)
    search.remove_constant(candidates if constant is None else candidates & constant)
    search.remove_collinear(candidates)
    search.restore_offenders()
    search.remove_joint(candidates)
    folds = tuple(consumer.fold(search.kind) for consumer in search.consumers)
    return LosslessRemoval(search.kind > 0, search.kind, folds)


class _Consumer:
    """What is exactly dependent at one consumer, and what its removed features are made up for by."""

    def __init__(self, problem: ConsumerProblem, tolerance: float) -> None:
        self.problem = problem
        self.classes = collinear_classes(
            problem.gram, problem.holdout, tolerance=max(COLLINEAR_TOLERANCE, tolerance**2)
        )
        self.zero = np.diagonal(problem.gram) == 0
        if problem.holdout is not None:
            self.zero &= np.diagonal(problem.holdout) == 0

    def classes_of(self, unit: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The classes that a unit has features in, and in each how many."""
        label = self.classes.label[self.problem.unit == unit]
        return np.unique(label[label >= 0], return_counts=True)

    def fold(self, kind: NDArray[np.int8]) -> Matrix:
        """Zero for constants, the partner alone for multiples, least squares for combinations."""
        kinds = np.append(kind, NONE)[self.problem.unit]
        kept, joint = kinds == NONE, kinds == JOINT
        column = np.cumsum(~kept) - 1
        matrix = np.zeros((len(kept), int((~kept).sum())))
        if joint.any():
            base = kept | joint
            matrix[np.ix_(kept, joint[~kept])] = fold(self.problem.gram[np.ix_(base, base)], kept[base])
        # The first survivor of each class answers for the others; next best is one that is a combination itself.
        label, scale = self.classes.label, self.classes.scale
        answers = np.full(len(kept), -1)
        for own in (joint, kept):  # the later one wins
            alive = np.flatnonzero(own & (label >= 0))[::-1]
            answers[label[alive]] = alive
        multiples = np.flatnonzero((kinds == COLLINEAR) & (label >= 0))
        partners = answers[label[multiples]]
        ratio = scale[multiples] / scale[partners]
        stays = kept[partners]
        matrix[partners[stays], column[multiples[stays]]] = ratio[stays]
        matrix[:, column[multiples[~stays]]] = ratio[~stays] * matrix[:, column[partners[~stays]]]
        return np.asarray(matrix[kept])

    def error(self, kind: NDArray[np.int8]) -> tuple[float, int]:
        """The squared relative error that the removals add on fit or unseen samples, and the unit to blame for it."""
        kept = self.problem.kept(kind > 0)
        worst, blamed = 0.0, 0
        if kept.all():
            return worst, blamed
        matrix, outer = self.fold(kind), self.problem.outer[np.ix_(~kept, ~kept)]
        for gram in (self.problem.gram, self.problem.holdout):
            if gram is not None:
                residual = residual_moments(gram, kept, matrix) * outer
                if residual.sum() / self.problem.energy > worst:
                    worst = residual.sum() / self.problem.energy
                    blamed = int(self.problem.unit[~kept][np.argmax(np.diagonal(residual))])
        return worst, blamed

    def reduced(self, kind: NDArray[np.int8]) -> ConsumerProblem:
        """The problem of what is left, with the weight of what went folded in."""
        return replace(self.problem.folded(self.problem.kept(kind > 0), self.fold(kind)), ridge=EXACT_RIDGE)


class _Search:
    """The state of `lossless_removals`: which units went, and as what."""

    def __init__(self, consumers: Sequence[ConsumerProblem], units: int, tolerance: float, minimums: Minimums) -> None:
        self.consumers = [_Consumer(consumer, tolerance) for consumer in consumers]
        self.kind = np.zeros(units, dtype=np.int8)
        self._tolerance, self._minimums = tolerance, minimums
        self._allowance = Allowance(units, minimums)

    def remove_constant(self, allowed: NDArray[np.bool_]) -> None:
        constant = allowed.copy()
        for consumer in self.consumers:
            unit = consumer.problem.unit
            constant[unit[(unit >= 0) & ~consumer.zero]] = False
        for unit in np.flatnonzero(constant)[::-1].tolist():
            if self._allowance.take(unit):
                self.kind[unit] = CONSTANT

    def remove_collinear(self, allowed: NDArray[np.bool_]) -> None:
        possible = allowed & (self.kind == 0)
        left = []  # for each consumer, how many features of each class are there
        for consumer in self.consumers:
            unit, label = consumer.problem.unit, consumer.classes.label
            alive = (label >= 0) & consumer.problem.kept(self.kind > 0)
            left.append(np.bincount(label[alive], minlength=len(unit)))
            alone = np.where(label >= 0, left[-1][label] < 2, ~consumer.zero)
            possible[unit[alone & (unit >= 0)]] = False
        for unit in np.flatnonzero(possible)[::-1].tolist():
            own = [consumer.classes_of(unit) for consumer in self.consumers]
            replaceable = all((counts[label] > count).all() for counts, (label, count) in zip(left, own, strict=True))
            if replaceable and self._allowance.take(unit):
                self.kind[unit] = COLLINEAR
                for counts, (label, count) in zip(left, own, strict=True):
                    counts[label] -= count

    def restore_offenders(self) -> None:
        """Put back whatever adds too much error on fit or unseen samples, the worst first."""
        errors = [consumer.error(self.kind) for consumer in self.consumers]
        while errors and max(errors)[0] > self._tolerance**2:
            unit = max(errors)[1]
            self.kind[unit] = NONE
            for number, consumer in enumerate(self.consumers):
                if (consumer.problem.unit == unit).any():
                    errors[number] = consumer.error(self.kind)

    def remove_joint(self, candidates: NDArray[np.bool_]) -> None:
        allowed = candidates & (self.kind == 0)
        for consumer in self.consumers:
            if not consumer.problem.joint:
                allowed[consumer.problem.unit[consumer.problem.unit >= 0]] = False
        if not allowed.any():
            return
        reduced = [consumer.reduced(self.kind) for consumer in self.consumers]
        limits = Limits(cost=len(self.consumers) * self._tolerance**2)
        allowed = affordable(reduced, allowed, limits.cost)
        minimums = [(members[self.kind[members] == 0], bound) for members, bound in self._minimums if bound > 0]
        order = eliminate(reduced, allowed, minimums=minimums, limits=limits).order
        for _ in range(TRIES):
            taken = self._remove_while_it_passes(order)
            order = order[taken + 1 :]  # unseen samples do not confirm the one left out; those behind it may be fine
            if not len(order):
                break

    def _remove_while_it_passes(self, order: NDArray[np.int64]) -> int:
        """Remove as many units from the front of `order` as pass together, and return how many."""
        before = self.kind
        low, high, middle = 0, len(order), len(order)  # order[:low] is known to pass; all of them may well
        while low < high:
            self.kind = before.copy()
            self.kind[order[:middle]] = JOINT
            if all(consumer.error(self.kind)[0] <= self._tolerance**2 for consumer in self.consumers):
                low = middle
            else:
                high = middle - 1
            middle = (low + high + 1) // 2
        self.kind = before.copy()
        self.kind[order[:low]] = JOINT
        return low

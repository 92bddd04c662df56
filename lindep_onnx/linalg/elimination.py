"""The order in which units go: always the one that costs least, all survivors refitted each time.

The notation is that of `lindep_onnx.linalg.fold`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from lindep_onnx.linalg.fold import ConsumerProblem, Matrix

Minimums: TypeAlias = Sequence[tuple[NDArray[np.int64], int]]

#: Share of the features of a consumer that must be left for its matrices to stay as they are.
SPARSE = 0.85


@dataclass(frozen=True)
class Elimination:
    """An order in which units can go.

    Attributes:
        order: (R,) units.
        cost: (R,) squared relative error summed over the consumers, on the fit samples, once the unit and all before
            it are gone and the survivors are refitted.
    """

    order: NDArray[np.int64]
    cost: NDArray[np.float64]


@dataclass(frozen=True)
class Limits:
    """Where an elimination ends, if not where nothing is left that may go.

    Attributes:
        removals: after so many.
        cost: before the summed cost passes this.
    """

    removals: float = math.inf
    cost: float = math.inf


class Allowance:
    """How many units of each set may still go.

    Args:
        units: number of units, of which nothing is gone yet.
        minimums: sets of units of which so many must survive.

    Attributes:
        free: (units,) bool, which may go.
    """

    def __init__(self, units: int, minimums: Minimums) -> None:
        self.free = np.ones(units, dtype=bool)
        self._sets = [np.asarray(members) for members, _ in minimums]
        self._left = [len(members) - bound for members, bound in minimums]
        self._of: dict[int, list[int]] = {}
        for number, members in enumerate(self._sets):
            for unit in members.tolist():
                self._of.setdefault(unit, []).append(number)
            self.free[members] &= self._left[number] > 0

    def take(self, unit: int) -> bool:
        """Whether a unit may go without leaving too few of a set; counts it if so."""
        if not self.free[unit]:
            return False
        for number in self._of.get(unit, ()):
            self._left[number] -= 1
            if self._left[number] <= 0:
                self.free[self._sets[number]] = False
        return True


def eliminate(
    consumers: Sequence[ConsumerProblem],
    candidates: NDArray[np.bool_],
    *,
    gain: NDArray[np.float64] | None = None,
    minimums: Minimums = (),
    limits: Limits = Limits(),
    block: int = 64,
) -> Elimination:
    """Remove units one by one, always the one that costs least for its gain, with all survivors refitted each time.

    The cost of a unit is exact for least squares: the sum over its consumers of tr(A_JJ (H_JJ)^-1) / energy for its
    features J, with A and H of what is left. After a removal, with P = H_KJ (H_JJ)^-1 and Q = A_KJ - P A_JJ / 2,

        H <- H - P H_JJ P',    A <- A - P Q' - Q P'.

    These updates are delayed: only the columns that a step needs and the diagonal blocks are kept current, and every
    `block` columns the whole is updated at once, matrix by matrix, in one triangle.

    Args:
        consumers: the problems, which share units.
        candidates: (units,) bool, which may go.
        gain: (units,) what removing a unit saves; all alike by default.
        minimums: sets of units of which so many must survive.
        limits: where to stop.
        block: delayed columns.
    """
    states = [_State(consumer, block, candidates) for consumer in consumers if _meets(consumer, candidates)]
    gain = np.ones(len(candidates)) if gain is None else gain
    allowance, allowed = Allowance(len(candidates), minimums), candidates.copy()
    order: list[int] = []
    cost: list[float] = []
    spent = 0.0
    while len(order) < limits.removals and (open_units := allowed & allowance.free).any():
        price = np.zeros(len(candidates))
        for state in states:
            price[state.units] += state.cost
        unit = int(np.argmin(np.where(open_units, price / gain, np.inf)))
        if spent + price[unit] > limits.cost:
            break
        spent += max(float(price[unit]), 0.0)
        order.append(unit)
        cost.append(spent)
        allowed[unit] = False
        allowance.take(unit)
        for state in states:
            state.remove(unit)
    return Elimination(np.array(order, dtype=np.int64), np.array(cost))


def affordable(consumers: Sequence[ConsumerProblem], candidates: NDArray[np.bool_], most: float) -> NDArray[np.bool_]:
    """The candidates that cost at most so much at every consumer while all else is there.

    What is not dependent now will not become so when others go. The largest consumers come first: where nothing is
    dependent, they leave little to ask the others.

    Args:
        consumers: the problems, which share units.
        candidates: (units,) bool.
        most: the squared relative error that is allowed.
    """
    left = candidates.copy()
    for consumer in sorted(consumers, key=lambda consumer: -len(consumer.unit)):
        if _meets(consumer, left):
            state = _State(consumer, 1, left)
            left[state.units[state.cost > most]] = False
    return left


def _meets(consumer: ConsumerProblem, units: NDArray[np.bool_]) -> bool:
    return bool(units[consumer.unit[consumer.unit >= 0]].any())


class _State:
    """H and A of one consumer while units go, in coordinates in which every live feature has unit second moment.

    Only the features of candidates have rows in H and A: an update needs no others. Both are symmetric, and only
    their lower triangles are stored. Features that went leave the matrices once they are a good part of them.

    Attributes:
        units: (U,) the candidates that the consumer reads.
        cost: (U,) current cost of removing each, over energy.
    """

    def __init__(self, consumer: ConsumerProblem, block: int, candidates: NDArray[np.bool_]) -> None:
        if not np.isfinite(consumer.gram).all():
            raise ValueError("the moments of a consumer are not finite")
        scale = np.sqrt(np.maximum(np.diagonal(consumer.gram), 0.0))
        live = scale > 0
        divisor = np.where(live, scale, 1.0)
        gram = consumer.gram / divisor[:, None]
        gram /= divisor
        gram[~live] = 0.0
        gram[:, ~live] = 0.0
        np.fill_diagonal(gram, 1.0)
        chosen = np.append(candidates, False)[consumer.unit]
        self._inverse = _regular_inverse(gram, chosen, consumer.ridge)
        del gram
        outer = np.array(consumer.outer[np.ix_(chosen, chosen)], order="F")
        outer *= scale[chosen] / consumer.energy
        outer *= scale[chosen, None]
        self._outer = outer
        self.units, self._slots = _slots(consumer.unit[chosen])
        self._place = {unit: index for index, unit in enumerate(self.units.tolist())}
        self._block = block
        self._begin()
        self._price()

    def _begin(self) -> None:
        """Start without delayed updates; diagonal blocks come from the matrices."""
        size, width = len(self._outer), self._slots.shape[1]
        self._used = 0
        self._pending = [np.zeros((size, self._block + width), order="F") for _ in range(3)]
        # Slots beyond a unit's features point at a feature that does not exist: an identity that costs nothing.
        self._index = np.maximum(self._slots, 0)
        self._real = (self._slots >= 0)[:, :, None]
        rows = np.maximum(self._index[:, :, None], self._index[:, None, :])
        columns = np.minimum(self._index[:, :, None], self._index[:, None, :])
        real = self._real & self._real.transpose(0, 2, 1)
        self._inverse_blocks = np.where(real, self._inverse[rows, columns], np.eye(width))
        self._outer_blocks = np.where(real, self._outer[rows, columns], 0.0)

    def _price(self) -> None:
        if self._slots.shape[1] == 1:
            cost = self._outer_blocks[:, 0, 0] / self._inverse_blocks[:, 0, 0]
        else:
            cost = np.trace(np.linalg.solve(self._inverse_blocks, self._outer_blocks), axis1=1, axis2=2)
        self.cost = np.maximum(cost, 0.0)

    def remove(self, unit: int) -> None:
        """Take out the features of a unit, if there are any."""
        where = self._place.get(unit)
        if where is None:
            return
        slots = self._slots[where]
        own = slots[slots >= 0]
        count = len(own)
        s, p, q = (pending[:, : self._used] for pending in self._pending)
        inverse = _columns(self._inverse, own) - s @ s[own].T
        outer = _columns(self._outer, own) - p @ q[own].T - q @ p[own].T
        # With H_JJ = L L' the columns of S are those of H_KJ L'^-1, so that S S' = P H_JJ P'; P = S L^-1.
        factor = _factor(inverse[own])
        if count == 1:  # a division, without what a solver costs to call
            new_s = inverse / factor
            new_p = new_s / factor
        else:
            new_s = scipy.linalg.solve_triangular(factor, inverse.T, lower=True, check_finite=False).T
            new_p = scipy.linalg.solve_triangular(factor, new_s.T, lower=True, trans="T", check_finite=False).T
        new_q = outer - 0.5 * new_p @ outer[own]
        for pending, column in zip(self._pending, (new_s, new_p, new_q), strict=True):
            column[own] = 0.0
            pending[:, self._used : self._used + count] = column
        self._used += count

        at_s, at_p, at_q = (np.where(self._real, column[self._index], 0.0) for column in (new_s, new_p, new_q))
        across = _by_unit(at_p, at_q)
        self._inverse_blocks -= _by_unit(at_s, at_s)
        self._outer_blocks -= across + across.transpose(0, 2, 1)
        self._inverse_blocks[where], self._outer_blocks[where] = np.eye(self._slots.shape[1]), 0.0
        self._slots[where], self._index[where], self._real[where] = -1, 0, False
        if self._used >= self._block:
            self._flush()
        self._price()

    def _flush(self) -> None:
        """Apply all delayed updates to the lower triangles, and drop features that went."""
        s, p, q = (pending[:, : self._used] for pending in self._pending)
        blas = scipy.linalg.blas
        self._inverse = blas.dsyrk(-1.0, s, beta=1.0, c=self._inverse, lower=True, overwrite_c=True)
        self._outer = blas.dsyr2k(-1.0, p, q, beta=1.0, c=self._outer, lower=True, overwrite_c=True)
        left = np.sort(self._slots[self._slots >= 0])
        if 0 < len(left) < SPARSE * len(self._outer):
            self._inverse, self._outer = (_sliced(matrix, left) for matrix in (self._inverse, self._outer))
            self._slots = np.where(self._slots < 0, -1, np.searchsorted(left, self._slots))
        self._begin()


def _columns(lower: Matrix, own: NDArray[np.int64]) -> Matrix:
    """(F, J) columns of a symmetric matrix of which the lower triangle is stored."""
    found = lower[:, own]
    for column, index in enumerate(own.tolist()):
        found[:index, column] = lower[index, :index]
    return found


def _sliced(lower: Matrix, left: NDArray[np.int64]) -> Matrix:
    """The same rows and columns of a matrix, in columns like it."""
    return np.asfortranarray(lower.T[left].take(left, axis=1).T)


def _factor(inner: Matrix) -> Matrix:
    """The Cholesky factor of a small diagonal block of H."""
    tiny = np.finfo(np.float64).tiny
    if len(inner) == 1:
        return np.sqrt(np.maximum(inner, tiny))
    values, vectors = np.linalg.eigh(inner)
    # Rounding may have made it indefinite by a little.
    values = np.maximum(values, np.finfo(np.float64).eps * max(values[-1], tiny))
    return np.asarray(np.linalg.qr((vectors * np.sqrt(values)).T)[1].T)


def _by_unit(left: Matrix, right: Matrix) -> Matrix:
    """(U, m, m) products of (U, m, k) with the transpose of (U, m, k)."""
    if left.shape[1:] == (1, 1):  # a product of tiny matrices costs more than the numbers
        return left * right
    return left @ right.transpose(0, 2, 1)


def _slots(unit: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(U,) the units of some features, and (U, m) the features of each, filled up with -1."""
    units, counts = np.unique(unit, return_counts=True)
    slots = np.full((len(units), int(counts.max())), -1, dtype=np.int64)
    slots[np.arange(slots.shape[1]) < counts[:, None]] = np.argsort(unit, kind="stable")
    return units, slots


def _regular_inverse(gram: Matrix, chosen: NDArray[np.bool_], ridge: float) -> Matrix:
    """The lower triangle of the block of (G + ridge I)^-1 that belongs to the chosen features.

    With them last, the end of the Cholesky factor of G is the factor of their Schur complement, whose inverse is the
    block. The ridge grows until rounding no longer makes G indefinite.
    """
    order = np.argsort(chosen, kind="stable")
    start = len(gram) - int(chosen.sum())
    while True:
        # Symmetric: the transpose of the rows as they lie in memory is the matrix by columns.
        regular = (gram.copy() if not start else gram[np.ix_(order, order)]).T
        regular[np.diag_indices_from(regular)] += ridge
        factor, info = scipy.linalg.lapack.dpotrf(regular, lower=True, clean=False, overwrite_a=True)
        if info == 0:
            part = factor if not start else np.asfortranarray(factor[start:, start:])
            inverse, info = scipy.linalg.lapack.dpotri(part, lower=True, overwrite_c=True)
        if info == 0:
            return np.asarray(inverse)
        ridge = max(ridge * 10.0, 1e-14)

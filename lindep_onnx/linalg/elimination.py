"""Linear dependence between the features of a site: what can go, in which order, and what makes up for it.

Notation. A site multiplies rows z of F features by weights w. `G` (F x F) is the second moment of z per row, about
the mean where the site can absorb a constant. `A` (F x F) is the sum of w w' over outputs and taps. Features R are
removed, K are kept, and z_R is replaced by T' z_K; T is the *fold*, and the weights become W_K + W_R T'. The added
squared error is

    E || W_R (z_R - T' z_K) ||^2 = tr(S A_RR),    S = second moment of z_R - T' z_K,

which the least-squares fold T = G_KK^-1 G_KR makes as small as it can be. With H = G^-1 that minimum is
tr(A_RR (H_RR)^-1) (the Schur complement of G_KK in G is the inverse of H_RR).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
Minimums = Sequence[tuple[NDArray[np.int64], int]]

#: Ridge, relative to unit second moments, that keeps the inverse finite where features are exactly dependent. It adds
#: `ridge` times a feature's own share to its cost: 1e-13 is an error of 3e-7, far below what counts as lossless.
EXACT_RIDGE = 1e-13
#: 1 - |cosine| below which two features are multiples of each other: a relative difference of 1.4e-5.
COLLINEAR = 1e-10
#: Folds with larger coefficients, in units of standard deviations, amplify rounding: they are solved with a cut-off.
LARGEST_COEFFICIENT = 1e4
#: Eigenvalues below this share of the largest one are noise.
CUTOFF = 1e-12
#: Share of the features of a site that must be left for its matrices to stay as they are.
SPARSE = 0.85
#: Rows of a Gram matrix that are compared with all others at a time.
_BLOCK = 256
#: How often the search for joint dependence goes on behind a unit that unseen samples do not confirm.
TRIES = 4

NONE, CONSTANT, COLLINEAR_KIND, JOINT = range(4)


@dataclass(frozen=True)
class ConsumerProblem:
    """The least-squares problem of one site.

    Attributes:
        gram: (F, F) G of the fit samples.
        holdout: (F, F) the same of unseen samples; None if there are none.
        outer: (F, F) A.
        unit: (F,) which unit each feature belongs to; -1 for features that stay. The features of a unit go together.
        energy: mean square of the centred output of the site; errors are sqrt(cost / energy).
        joint: whether there are rows enough to believe a dependence on several features.
    """

    gram: Matrix
    holdout: Matrix | None
    outer: Matrix
    unit: NDArray[np.int64]
    energy: float
    joint: bool


@dataclass(frozen=True)
class Elimination:
    """An order in which units can go.

    Attributes:
        order: (R,) units.
        cost: (R,) squared relative error summed over the sites, on the fit samples, once the unit and all before it
            are gone and the survivors are refitted.
    """

    order: NDArray[np.int64]
    cost: NDArray[np.float64]


# ---- elimination -----------------------------------------------------------------------------------------------


def eliminate(
    consumers: Sequence[ConsumerProblem],
    units: int,
    *,
    candidates: NDArray[np.bool_],
    gain: NDArray[np.float64] | None = None,
    limit: int | None = None,
    stop: float | None = None,
    ridge: float | Sequence[float] = 1e-10,
    block: int = 64,
    minimums: Minimums = (),
) -> Elimination:
    """Remove units one by one, always the one that costs least for its gain, with all survivors refitted each time.

    The cost of a unit is exact for least squares: the sum over its sites of tr(A_JJ (H_JJ)^-1) / energy for its
    features J, with A and H of what is left. After a removal, with P = H_KJ (H_JJ)^-1 and Q = A_KJ - P A_JJ / 2,

        H <- H - P H_JJ P',    A <- A - P Q' - Q P'.

    These updates are delayed: only the columns that a step needs and the diagonal blocks are kept current, and every
    `block` columns the whole is updated at once, matrix by matrix, in one triangle.

    Args:
        consumers: the problems, which share units.
        units: number of units.
        candidates: (units,) bool, which may go.
        gain: (units,) what removing a unit saves; all alike by default.
        limit: stop after so many removals.
        stop: stop before the summed cost passes this.
        ridge: relative to unit second moments, one for all sites or one for each.
        block: delayed columns.
        minimums: sets of units of which so many must survive.
    """
    ridges = [ridge] * len(consumers) if isinstance(ridge, float) else ridge
    states = [
        _State(consumer, own, block, candidates)
        for consumer, own in zip(consumers, ridges, strict=True)
        if _meets(consumer, candidates)
    ]
    gain = np.ones(units) if gain is None else gain
    guard = _Guard(units, minimums)
    allowed = candidates.copy()
    price = np.zeros(units)
    for state in states:
        price[state.units] += state.cost
    order: list[int] = []
    cost: list[float] = []
    spent = 0.0
    while limit is None or len(order) < limit:
        open_units = allowed & guard.free
        if not open_units.any():
            break
        unit = int(np.argmin(np.where(open_units, price / gain, np.inf)))
        if stop is not None and spent + price[unit] > stop:
            break
        spent += max(float(price[unit]), 0.0)
        order.append(unit)
        cost.append(spent)
        allowed[unit] = False
        guard.remove(unit)
        for state in states:
            if unit in state.place:
                state.remove(unit)
        price = np.zeros(units)
        for state in states:
            price[state.units] += state.cost
    return Elimination(np.array(order, dtype=np.int64), np.array(cost))


def _meets(consumer: ConsumerProblem, units: NDArray[np.bool_]) -> bool:
    return bool(units[consumer.unit[consumer.unit >= 0]].any())


class _Guard:
    """Keeps count of how many units of each set survive."""

    def __init__(self, units: int, least: Minimums) -> None:
        self.free = np.ones(units, dtype=bool)
        self._sets = [(np.asarray(members), bound) for members, bound in least]
        self._left = [len(members) - bound for members, bound in self._sets]
        self._of: dict[int, list[int]] = {}
        for number, (members, _) in enumerate(self._sets):
            for unit in members.tolist():
                self._of.setdefault(unit, []).append(number)
            if self._left[number] <= 0:
                self.free[members] = False

    def remove(self, unit: int) -> None:
        for number in self._of.get(unit, ()):
            self._left[number] -= 1
            if self._left[number] <= 0:
                self.free[self._sets[number][0]] = False


class _State:
    """H and A of one site while units go, in coordinates in which every live feature has unit second moment.

    Only the features of candidates have rows in H and A: an update needs no others. Both are symmetric, and only
    their lower triangles are stored. Features that went leave the matrices once they are a good part of them.

    Attributes:
        units: (U,) the candidates at this site.
        place: position of each unit in `units`.
        cost: (U,) current cost of removing each, over energy.
    """

    def __init__(self, consumer: ConsumerProblem, ridge: float, block: int, candidates: NDArray[np.bool_]) -> None:
        if not np.isfinite(consumer.gram).all():
            raise ValueError("the moments of a site are not finite")
        scale = np.sqrt(np.maximum(np.diagonal(consumer.gram), 0.0))
        live = scale > 0
        divisor = np.where(live, scale, 1.0)
        gram = consumer.gram / divisor[:, None]
        gram /= divisor
        gram[~live] = 0.0
        gram[:, ~live] = 0.0
        np.fill_diagonal(gram, 1.0)
        chosen = np.append(candidates, False)[consumer.unit]
        self._inverse = _regular_inverse(gram, chosen, ridge)
        del gram
        outer = np.array(consumer.outer[np.ix_(chosen, chosen)], order="F")
        outer *= scale[chosen] / consumer.energy
        outer *= scale[chosen, None]
        self._outer = outer
        self.units = np.unique(consumer.unit[chosen])
        self.place = {unit: index for index, unit in enumerate(self.units.tolist())}
        self._slots = _slots(consumer.unit[chosen], self.units)
        self._block = block
        self._used = 0
        self._begin()
        self._price()

    def _begin(self) -> None:
        """Start without delayed updates; diagonal blocks come from the matrices."""
        size, width = len(self._outer), self._slots.shape[1]
        self._pending = [np.zeros((size, self._block + width), order="F") for _ in range(3)]
        # Slots beyond a unit's features point at a feature that does not exist: an identity that costs nothing.
        self._index = np.where(self._slots < 0, 0, self._slots)
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
        where = self.place[unit]
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
        for matrix in (new_s, new_p, new_q):
            matrix[own] = 0.0
        span = slice(self._used, self._used + count)
        for pending, column in zip(self._pending, (new_s, new_p, new_q), strict=True):
            pending[:, span] = column
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
        self._used = 0
        left = np.sort(self._slots[self._slots >= 0])
        if 0 < len(left) < SPARSE * len(self._outer):
            self._inverse, self._outer = (_sliced(matrix, left) for matrix in (self._inverse, self._outer))
            moved = np.searchsorted(left, self._slots)
            self._slots = np.where(self._slots < 0, -1, moved)
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
    if len(inner) == 1:
        return np.sqrt(np.maximum(inner, np.finfo(np.float64).tiny))
    values, vectors = np.linalg.eigh(inner)
    # Rounding may have made it indefinite by a little.
    values = np.maximum(values, np.finfo(np.float64).eps * max(values[-1], np.finfo(np.float64).tiny))
    return np.asarray(np.linalg.qr((vectors * np.sqrt(values)).T)[1].T)


def _by_unit(left: Matrix, right: Matrix) -> Matrix:
    """(U, m, m) products of (U, m, k) with the transpose of (U, m, k)."""
    if left.shape[1:] == (1, 1):  # a product of tiny matrices costs more than the numbers
        return left * right
    return left @ right.transpose(0, 2, 1)


def _slots(unit: NDArray[np.int64], units: NDArray[np.int64]) -> NDArray[np.int64]:
    """(U, m) features of each unit, filled up with -1."""
    order = np.argsort(unit, kind="stable")
    order = order[unit[order] >= 0]
    if not len(units):
        return np.empty((0, 1), dtype=np.int64)
    counts = np.unique(unit[order], return_counts=True)[1]
    slots = np.full((len(units), int(counts.max())), -1, dtype=np.int64)
    rows = np.repeat(np.arange(len(units)), counts)
    starts = np.repeat(np.cumsum(counts) - counts, counts)
    slots[rows, np.arange(len(order)) - starts] = order
    return slots


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


# ---- folds -----------------------------------------------------------------------------------------------------


def fold(gram: Matrix, kept: NDArray[np.bool_], *, ridge: float = 0.0) -> Matrix:
    """The T (kept x removed) that makes E || z_R - T' z_K ||^2 smallest.

    Columns are scaled to unit second moment first. Without a ridge the normal equations are solved as they are
    (Cholesky); where they are singular, or the solution has huge coefficients, eigenvalues below a cut-off are left
    out.

    Args:
        gram: (F, F) G.
        kept: (F,) bool.
        ridge: relative to unit second moments.
    """
    scale = np.sqrt(np.maximum(np.diagonal(gram), 0.0))
    divisor = np.where(scale > 0, scale, 1.0)
    scaled = gram / np.outer(divisor, divisor)
    live = np.flatnonzero(kept & (scale > 0))
    gone = np.flatnonzero(~kept)
    result = np.zeros((len(scale), len(gone)))
    if len(live) and len(gone):
        left, right = scaled[np.ix_(live, live)].copy(), scaled[np.ix_(live, gone)]
        left[np.diag_indices_from(left)] += ridge
        solution = _solve(left, right)
        result[live] = solution / divisor[live, None] * scale[None, gone]
    return result[kept]


def _solve(left: Matrix, right: Matrix) -> Matrix:
    try:
        solution = scipy.linalg.cho_solve(scipy.linalg.cho_factor(left, lower=True), right)
        if np.isfinite(solution).all() and np.abs(solution).max() <= LARGEST_COEFFICIENT:
            return np.asarray(solution)
    except scipy.linalg.LinAlgError:
        pass
    values, vectors = scipy.linalg.eigh(left)
    large = values > CUTOFF * values[-1]
    chosen = vectors[:, large]
    return np.asarray(chosen @ ((chosen.T @ right) / values[large, None]))


def residual_moments(gram: Matrix, kept: NDArray[np.bool_], matrix: Matrix) -> Matrix:
    """(removed, removed) second moments of z_R - T' z_K, under any Gram matrix."""
    used = matrix.any(axis=1)  # a constant is made up for by nothing, a multiple by one feature alone
    partners, matrix, gone = np.flatnonzero(kept)[used], matrix[used], np.flatnonzero(~kept)
    product = matrix.T @ gram[np.ix_(partners, gone)]
    inner = gram[np.ix_(gone, gone)] - product - product.T + matrix.T @ gram[np.ix_(partners, partners)] @ matrix
    return np.asarray(inner)


def removal_cost(gram: Matrix, outer: Matrix, kept: NDArray[np.bool_], matrix: Matrix) -> float:
    """tr(S A_RR): the added squared error of a fold, fitted to this Gram matrix or to another."""
    residual = residual_moments(gram, kept, matrix)
    return max(0.0, float(np.sum(residual * outer[np.ix_(~kept, ~kept)])))


def choose_ridge(
    consumer: ConsumerProblem,
    kept: NDArray[np.bool_],
    grid: Sequence[float] = (0.0, 1e-10, 1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1),
) -> tuple[float, Matrix]:
    """The ridge whose fold, fitted to the fit samples, costs least on unseen ones; the smaller one of equals."""
    judge = consumer.gram if consumer.holdout is None else consumer.holdout
    best: tuple[float, float, Matrix] | None = None
    for ridge in grid if consumer.holdout is not None else grid[:1]:
        matrix = fold(consumer.gram, kept, ridge=ridge)
        cost = removal_cost(judge, consumer.outer, kept, matrix)
        if best is None or cost < best[0] * (1 - 1e-9):
            best = cost, ridge, matrix
    if best is None:
        raise ValueError("an empty grid of ridges")
    return best[1], best[2]


# ---- exact dependence ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Collinear:
    """Classes of features that are multiples of each other.

    Attributes:
        label: (F,) class of each feature, named by its lowest member; -1 for features that are zero.
        scale: (F,) each feature is this times the representative of its class.
    """

    label: NDArray[np.int64]
    scale: NDArray[np.float64]


def collinear_classes(gram: Matrix, holdout: Matrix | None, *, tolerance: float = COLLINEAR) -> Collinear:
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
    for start in range(0, size, _BLOCK):  # intermediate matrices of wide sites would be large
        rows = slice(start, start + _BLOCK)
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


def _affordable(consumers: Sequence[ConsumerProblem], candidates: NDArray[np.bool_], most: float) -> NDArray[np.bool_]:
    """The candidates that cost at most so much at every site while all else is there.

    What is not dependent now will not become so when others go. The largest sites come first: where nothing is
    dependent, they leave little to ask the others.
    """
    left = candidates.copy()
    for consumer in sorted(consumers, key=lambda consumer: -len(consumer.unit)):
        if _meets(consumer, left):
            state = _State(consumer, EXACT_RIDGE, 1, left)
            left[state.units[state.cost > most]] = False
    return left


@dataclass(frozen=True)
class LosslessRemoval:
    """What can go without a trace.

    Attributes:
        removed: (units,) bool.
        kind: (units,) 0 kept, 1 constant, 2 a multiple of another, 3 a combination of several.
        folds: for each site, T (kept x removed features).
    """

    removed: NDArray[np.bool_]
    kind: NDArray[np.int8]
    folds: tuple[Matrix, ...]


def lossless_removals(
    consumers: Sequence[ConsumerProblem],
    units: int,
    *,
    candidates: NDArray[np.bool_],
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
        units: number of units.
        candidates: (units,) bool, which may go.
        constant: (units,) bool, which may go because they are zero; all candidates by default.
        tolerance: RMS relative error allowed at each site.
        minimums: sets of units of which so many must survive.
    """
    search = _Search(consumers, units, tolerance, minimums)
    search.remove_constant(candidates if constant is None else candidates & constant)
    search.remove_collinear(candidates)
    search.restore_offenders()
    search.remove_joint(candidates)
    return LosslessRemoval(search.kind > 0, search.kind, tuple(search.folds()))


class _Search:
    """The state of `lossless_removals`: which units went, and as what."""

    def __init__(self, consumers: Sequence[ConsumerProblem], units: int, tolerance: float, least: Minimums) -> None:
        self.consumers = consumers
        self.kind = np.zeros(units, dtype=np.int8)
        self._tolerance = tolerance
        self._least = least
        self._classes = [
            collinear_classes(consumer.gram, consumer.holdout, tolerance=max(COLLINEAR, tolerance**2))
            for consumer in consumers
        ]
        self._zero = [
            (np.diagonal(consumer.gram) == 0)
            & (True if consumer.holdout is None else np.diagonal(consumer.holdout) == 0)
            for consumer in consumers
        ]

    def _bounded(self) -> _Guard:
        guard = _Guard(len(self.kind), self._least)
        for unit in np.flatnonzero(self.kind):
            guard.remove(int(unit))
        return guard

    def remove_constant(self, allowed: NDArray[np.bool_]) -> None:
        inactive = allowed.copy()
        for consumer, zero in zip(self.consumers, self._zero, strict=True):
            inactive[consumer.unit[(consumer.unit >= 0) & ~zero]] = False
        guard = self._bounded()
        for unit in np.flatnonzero(inactive)[::-1]:
            if guard.free[unit]:
                guard.remove(int(unit))
                self.kind[unit] = CONSTANT

    def remove_collinear(self, allowed: NDArray[np.bool_]) -> None:
        guard = self._bounded()
        # How many features of each class are left, at each site, and which features a unit has there.
        left, owned = [], []
        for consumer, classes in zip(self.consumers, self._classes, strict=True):
            gone = np.append(self.kind > 0, False)[consumer.unit]
            alive = (classes.label >= 0) & ~gone
            left.append(np.bincount(classes.label[alive], minlength=len(consumer.unit)))
            features: dict[int, list[int]] = {}
            for feature, unit in enumerate(consumer.unit.tolist()):
                if unit >= 0:
                    features.setdefault(unit, []).append(feature)
            owned.append(features)
        several = self._has_partner(left)
        for unit in np.flatnonzero(allowed & several & (self.kind == 0))[::-1].tolist():
            if guard.free[unit] and self._replaceable(unit, left, owned):
                guard.remove(unit)
                self.kind[unit] = COLLINEAR_KIND
                for counts, classes, features in zip(left, self._classes, owned, strict=True):
                    for feature in features.get(unit, ()):
                        if classes.label[feature] >= 0:
                            counts[classes.label[feature]] -= 1

    def _has_partner(self, left: Sequence[NDArray[np.int64]]) -> NDArray[np.bool_]:
        """Units of which no feature at any site is alone in its class."""
        possible = np.ones(len(self.kind), dtype=bool)
        for consumer, classes, zero, counts in zip(self.consumers, self._classes, self._zero, left, strict=True):
            single = (classes.label >= 0) & (counts[classes.label] < 2)
            single |= (classes.label < 0) & ~zero
            possible[consumer.unit[single & (consumer.unit >= 0)]] = False
        return possible

    def _replaceable(self, unit: int, left: Sequence[NDArray[np.int64]], owned: Sequence[dict[int, list[int]]]) -> bool:
        for counts, classes, features in zip(left, self._classes, owned, strict=True):
            own = [int(classes.label[feature]) for feature in features.get(unit, ())]
            if any(label >= 0 and counts[label] - own.count(label) < 1 for label in own):
                return False
        return True

    def restore_offenders(self) -> None:
        """Put back whatever adds too much error on fit or unseen samples, the worst first."""
        worst: dict[int, tuple[float, int]] = {}
        changed = list(range(len(self.consumers)))
        while changed:
            worst.update((number, self._worst(number)) for number in changed)
            error, unit = max(worst.values())
            if error <= self._tolerance**2:
                return
            self.kind[unit] = NONE
            changed = [number for number, consumer in enumerate(self.consumers) if (consumer.unit == unit).any()]

    def _worst(self, number: int) -> tuple[float, int]:
        """The squared relative error that the removals add at a site, and the unit to blame for most of it."""
        consumer, kept = self.consumers[number], self._kept(number)
        worst, blamed = 0.0, NONE
        if not kept.all():
            matrix, outer = self._fold(number, kept), consumer.outer[np.ix_(~kept, ~kept)]
            for gram in (consumer.gram, consumer.holdout):
                if gram is not None:
                    residual = residual_moments(gram, kept, matrix) * outer
                    if residual.sum() / consumer.energy > worst:
                        worst = residual.sum() / consumer.energy
                        blamed = int(consumer.unit[~kept][np.argmax(np.diagonal(residual))])
        return worst, blamed

    def remove_joint(self, candidates: NDArray[np.bool_]) -> None:
        allowed = candidates & (self.kind == 0)
        for consumer in self.consumers:
            if not consumer.joint:
                allowed[consumer.unit[consumer.unit >= 0]] = False
        if not allowed.any():
            return
        reduced = [self._reduced(number) for number in range(len(self.consumers))]
        stop = len(self.consumers) * self._tolerance**2
        allowed = _affordable(reduced, allowed, stop)
        least = [(members[self.kind[members] == 0], bound) for members, bound in self._least if bound > 0]
        order = eliminate(
            reduced, len(self.kind), candidates=allowed, stop=stop, ridge=EXACT_RIDGE, minimums=least
        ).order
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
            if self._passes():
                low = middle
            else:
                high = middle - 1
            middle = (low + high + 1) // 2
        self.kind = before.copy()
        self.kind[order[:low]] = JOINT
        return low

    def _reduced(self, number: int) -> ConsumerProblem:
        """The problem of what is left of a site, with the weight of what went folded in."""
        consumer, kept = self.consumers[number], self._kept(number)
        matrix = self._fold(number, kept)
        cross = matrix @ consumer.outer[np.ix_(~kept, kept)]
        outer = consumer.outer[np.ix_(kept, kept)] + cross + cross.T
        outer += matrix @ consumer.outer[np.ix_(~kept, ~kept)] @ matrix.T
        holdout = None if consumer.holdout is None else consumer.holdout[np.ix_(kept, kept)]
        return ConsumerProblem(
            consumer.gram[np.ix_(kept, kept)], holdout, outer, consumer.unit[kept], consumer.energy, consumer.joint
        )

    def _passes(self) -> bool:
        for number, consumer in enumerate(self.consumers):
            kept = self._kept(number)
            if kept.all():
                continue
            matrix = self._fold(number, kept)
            for gram in (consumer.gram, consumer.holdout):
                if gram is not None:
                    cost = removal_cost(gram, consumer.outer, kept, matrix)
                    if cost > self._tolerance**2 * consumer.energy:
                        return False
        return True

    def _kept(self, number: int) -> NDArray[np.bool_]:
        return np.asarray(~np.append(self.kind > 0, False)[self.consumers[number].unit])

    def folds(self) -> list[Matrix]:
        """T of every site."""
        return [self._fold(number, self._kept(number)) for number in range(len(self.consumers))]

    def _fold(self, number: int, kept: NDArray[np.bool_]) -> Matrix:
        """Zero for constants, the partner alone for multiples, least squares for combinations."""
        consumer, classes = self.consumers[number], self._classes[number]
        kinds = np.append(self.kind, 0)[consumer.unit]
        joint = kinds == JOINT
        column = np.cumsum(~kept) - 1
        matrix = np.zeros((len(kept), int((~kept).sum())))
        if joint.any():
            base = kept | joint
            matrix[np.ix_(kept, joint[~kept])] = fold(consumer.gram[np.ix_(base, base)], kept[base])
        # The first survivor of each class answers for the others; next best is one that is a combination itself.
        answers = np.full(len(kept), -1)
        for own in (joint, kept):  # the later one wins
            alive = np.flatnonzero(own & (classes.label >= 0))[::-1]
            answers[classes.label[alive]] = alive
        multiples = np.flatnonzero((kinds == COLLINEAR_KIND) & (classes.label >= 0))
        partners = answers[classes.label[multiples]]
        ratio = classes.scale[multiples] / classes.scale[partners]
        stays = kept[partners]
        matrix[partners[stays], column[multiples[stays]]] = ratio[stays]
        matrix[:, column[multiples[~stays]]] = ratio[~stays] * matrix[:, column[partners[~stays]]]
        return matrix[kept]

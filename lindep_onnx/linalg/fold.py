"""What makes up for removed features, and what that costs.

Notation. A consumer multiplies rows z of F features by weights w. `G` (F x F) is the second moment of z per row, about
the mean where the consumer can absorb a constant. `A` (F x F) is the sum of w w' over outputs and taps. Features R are
removed, K are kept, and z_R is replaced by T' z_K; T is the *fold*, and the weights become W_K + W_R T'. The added
squared error is

    E || W_R (z_R - T' z_K) ||^2 = tr(S A_RR),    S = second moment of z_R - T' z_K,

which the least-squares fold T = G_KK^-1 G_KR makes as small as it can be. With H = G^-1 that minimum is
tr(A_RR (H_RR)^-1) (the Schur complement of G_KK in G is the inverse of H_RR).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

Matrix: TypeAlias = NDArray[np.float64]

#: Folds with larger coefficients, in units of standard deviations, amplify rounding: they are solved with a cut-off.
LARGEST_COEFFICIENT = 1e4
#: Eigenvalues below this share of the largest one are noise.
CUTOFF = 1e-12
#: Costs that differ by no more than this share are equal.
EQUAL = 1e-9


@dataclass(frozen=True)
class ConsumerProblem:
    """The least-squares problem of one consumer.

    Attributes:
        gram: (F, F) G of the fit samples.
        holdout: (F, F) the same of unseen samples; None if there are none.
        outer: (F, F) A.
        unit: (F,) which unit each feature belongs to; -1 for features that stay. The features of a unit go together.
        energy: mean square of the centred output of the consumer; errors are sqrt(cost / energy).
        joint: whether there are rows enough to believe a dependence on several features.
        ridge: of an elimination, relative to unit second moments.
    """

    gram: Matrix
    holdout: Matrix | None
    outer: Matrix
    unit: NDArray[np.int64]
    energy: float
    joint: bool
    ridge: float = 1e-10

    def kept(self, removed: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """(F,) bool, the features that are left without some units."""
        return np.asarray(~np.append(removed, False)[self.unit])

    def folded(self, kept: NDArray[np.bool_], matrix: Matrix) -> ConsumerProblem:
        """What is left to decide once the other features have been folded into those in `kept`, (F,) bool.

        Args:
            kept: the features that are left.
            matrix: the fold, (kept x removed).
        """
        left = np.ix_(kept, kept)
        cross = matrix @ self.outer[np.ix_(~kept, kept)]
        outer = self.outer[left] + cross + cross.T + matrix @ self.outer[np.ix_(~kept, ~kept)] @ matrix.T
        holdout = None if self.holdout is None else self.holdout[left]
        return replace(self, gram=self.gram[left], holdout=holdout, outer=outer, unit=self.unit[kept])


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
    live, gone = np.flatnonzero(kept & (scale > 0)), np.flatnonzero(~kept)
    result = np.zeros((len(scale), len(gone)))
    if len(live) and len(gone):
        left = scaled[np.ix_(live, live)]
        left[np.diag_indices_from(left)] += ridge
        solution = _solve(left, scaled[np.ix_(live, gone)])
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
    """The ridge whose fold, fitted to the fit samples, costs least on unseen ones; the smaller one of equals.

    The cost falls and then rises along the grid, and is least near its upper end wherever nothing is exact: the walk
    begins there and ends where the cost no longer falls.

    Args:
        consumer: the problem.
        kept: (F,) bool.
        grid: ridges, ascending.
    """
    if not grid:
        raise ValueError("an empty grid of ridges")
    if consumer.holdout is None:
        return grid[0], fold(consumer.gram, kept, ridge=grid[0])

    def tried(place: int) -> tuple[float, Matrix]:
        matrix = fold(consumer.gram, kept, ridge=grid[place])
        assert consumer.holdout is not None
        return removal_cost(consumer.holdout, consumer.outer, kept, matrix), matrix

    place = max(0, len(grid) - 2)
    cost, matrix = tried(place)
    if place + 1 < len(grid):
        larger = tried(place + 1)
        if larger[0] < cost * (1 - EQUAL):
            return grid[place + 1], larger[1]
    while place:
        smaller = tried(place - 1)
        if smaller[0] * (1 - EQUAL) > cost:
            break
        place, (cost, matrix) = place - 1, smaller
    return grid[place], matrix

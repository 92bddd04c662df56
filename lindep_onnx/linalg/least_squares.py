"""Weights by least squares: what a product has to be so that it gives what it should.

A product multiplies rows p (K unknowns of one output) by V (K x M) and adds b, for each of G groups alone. Solved is

    minimise  E || t - V' p - b ||^2 + ridge || D (V - V0) ||^2,   D^2 = diag(E p p'),

whose ridge pulls towards weights V0 that are known to be good, never towards zero. The constant b is not ridged: V is
solved about the means, b makes the means equal.

What is asked of V beside the squares, a rank or a grid of values, is the solver's: a function of the same two arguments
as `unconstrained`, which `fitted` takes in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from lindep_onnx.linalg.fold import Matrix

RIDGES = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
FIRST_RIDGE = 3
#: Rows that are multiplied in float32 at a time, before their products are added up in float64.
CHUNK = 1 << 11
#: What single precision leaves of a variation, as a share of the mean.
ROUNDING = 1e-6


@dataclass(frozen=True)
class Rows:
    """What a product reads, and what it should give.

    Attributes:
        patches: (G, N, K) p, float32.
        target: (G, N, M) t.
    """

    patches: NDArray[np.float32]
    target: NDArray[Any]

    @property
    def energy(self) -> float:
        """Sum of squares of the centred target."""
        mean = self.target.mean(axis=1, keepdims=True, dtype=np.float64)
        own = (np.square(part - mean).sum() for _, part in self.chunks())
        return max(float(sum(own)), 1e-300)

    def chunks(self) -> Iterator[tuple[NDArray[np.float32], NDArray[Any]]]:
        """Patches and targets of a few rows at a time."""
        for start in range(0, self.target.shape[1], CHUNK):
            yield self.patches[:, start : start + CHUNK], self.target[:, start : start + CHUNK]


@dataclass(frozen=True)
class Weights:
    """What a product multiplies by and adds.

    Attributes:
        matrix: (G, K, M) V.
        constant: (G, 1, M) b.
    """

    matrix: Matrix
    constant: Matrix

    def error(self, rows: Rows) -> float:
        """Sum of squared errors; single precision is plenty to compare errors with."""
        matrix, constant = self.matrix.astype(np.float32), self.constant.astype(np.float32)
        total = 0.0
        for patches, target in rows.chunks():
            left = np.matmul(patches, matrix)
            left += constant
            left -= target
            total += float(np.square(left, out=left).sum(dtype=np.float64))
        return total


@dataclass(frozen=True)
class NormalEquations:
    """The problem about `prior`, in coordinates in which every unknown has unit second moment.

    Attributes:
        left: (G, K, K) scaled second moments.
        right: (G, K, M) what is left of the scaled cross moments.
        divisor: (G, K) D; infinite for what never varies, which keeps its weight.
        mean: (G, 1, K) of the rows.
        goal: (G, 1, M) mean of the target.
        prior: V0, and b where it is not free.
        free: whether b is solved for.
    """

    left: Matrix
    right: Matrix
    divisor: Matrix
    mean: Matrix
    goal: Matrix
    prior: Weights
    free: bool

    @classmethod
    def of(cls, rows: Rows, prior: Weights, free: bool) -> NormalEquations:
        """From the rows that are fitted."""
        groups, count, unknowns = rows.patches.shape
        outputs = rows.target.shape[2]
        gram, cross = np.zeros((groups, unknowns, unknowns)), np.zeros((groups, unknowns, outputs))
        total, goals = np.zeros((groups, 1, unknowns)), np.zeros((groups, 1, outputs))
        # About a point near the means, products lose nothing to them in single precision.
        near = rows.patches[:, :CHUNK].mean(axis=1, keepdims=True) if free else np.float32(0.0)
        aim = (rows.target[:, :CHUNK].mean(axis=1, keepdims=True) if free else prior.constant).astype(np.float32)
        for patches, target in rows.chunks():
            part, wanted = patches - near, target.astype(np.float32) - aim
            flipped = part.transpose(0, 2, 1)
            gram += flipped @ part
            cross += flipped @ wanted
            total += part.sum(axis=1, keepdims=True, dtype=np.float64)
            goals += wanted.sum(axis=1, keepdims=True, dtype=np.float64)
        mean, goal = total / count, goals / count
        gram, cross = gram / count, cross / count
        if free:
            gram -= mean.transpose(0, 2, 1) @ mean
            cross -= mean.transpose(0, 2, 1) @ goal
        mean, goal = mean + near, goal + aim
        scale = np.sqrt(np.maximum(np.diagonal(gram, axis1=1, axis2=2), 0.0))
        # What varies by no more than rounding of its own size does not vary.
        live = scale > np.maximum(1e-12 * scale.max(initial=1e-300), ROUNDING * np.abs(mean[:, 0]) * free)
        divisor = np.where(live, scale, np.inf)
        left = gram / (divisor[:, :, None] * divisor[:, None, :])
        left[~live, np.nonzero(~live)[1]] = 1.0
        right = (cross - gram @ prior.matrix) / divisor[:, :, None]
        return cls(left, right, divisor, mean, goal, prior, free)

    def moved(self, step: Matrix) -> Weights:
        """The weights that are so far, in scaled coordinates, from `prior`."""
        matrix = self.prior.matrix + step / self.divisor[:, :, None]
        return Weights(matrix, self.goal - self.mean @ matrix if self.free else self.prior.constant)


Solver: TypeAlias = Callable[[NormalEquations, float], Weights]


def unconstrained(equations: NormalEquations, ridge: float) -> Weights:
    """Whatever V errs least."""
    left = equations.left + ridge * np.eye(equations.left.shape[1])
    if len(left) > 1:
        return equations.moved(np.asarray(np.linalg.solve(left, equations.right), dtype=np.float64))
    factor = scipy.linalg.cho_factor(left[0], lower=True, overwrite_a=True, check_finite=False)
    return equations.moved(scipy.linalg.cho_solve(factor, equations.right[0], check_finite=False)[None])


def fitted(
    fit: Rows, unseen: Rows, prior: Weights, *, free: bool, solver: Solver = unconstrained
) -> tuple[Weights, float, float]:
    """The weights whose ridge errs least on rows that are not fitted; `prior` if none does better.

    Args:
        fit: what is fitted.
        unseen: what chooses the ridge.
        prior: V0 and b.
        free: whether b is solved for.
        solver: gives the weights for a ridge.

    Returns:
        The weights, and the sums of squared errors on the unseen rows of `prior` and of them.
    """
    equations = NormalEquations.of(fit, prior, free)
    before = error = prior.error(unseen)
    best = prior
    for ridges in (RIDGES[FIRST_RIDGE:], RIDGES[:FIRST_RIDGE][::-1]):
        last = np.inf
        for ridge in ridges:
            try:
                candidate = solver(equations, ridge)
            except np.linalg.LinAlgError:  # less than the moments are rounded to
                break
            found = candidate.error(unseen)
            if found < error:
                best, error = candidate, found
            if not found < last:
                break
            last = found
    return best, before, error

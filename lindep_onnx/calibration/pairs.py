"""Second moments of two tensors at the same positions: what one is worth as a linear map of the other.

A consumer's own Gram matrix says how its input channels depend on each other. Whoever puts one tensor in the place of
another (a whole branch by a map of the stream it starts from) needs the products between them as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lindep_onnx.data.samples import Samples
from lindep_onnx.data.split import Part
from lindep_onnx.linalg.linear_map import LinearMap
from lindep_onnx.log import Log
from lindep_onnx.runtime.backend import Runtime
from lindep_onnx.runtime.rows import ChannelAxis, RowSampler
from lindep_onnx.structure.types import Structure

#: Positions of one sample that are looked at.
POSITIONS = 256
#: More than any tensor has: positions are drawn here, the same for both tensors.
EVERY = 1 << 62


@dataclass(frozen=True)
class Pair:
    """Two computed tensors that agree in all axes but the channels'.

    Attributes:
        left: the one that is explained.
        right: the one that explains it.
    """

    left: ChannelAxis
    right: ChannelAxis


@dataclass(frozen=True)
class PairMoments:
    """Means over the rows x of the left and y of the right tensor, FIT samples.

    Attributes:
        rows: how many.
        left: (L,) mean of x.
        right: (R,) mean of y.
        left_gram: (L, L) mean of x x'.
        right_gram: (R, R) mean of y y'.
        cross: (L, R) mean of x y'.
    """

    rows: int
    left: NDArray[np.float64]
    right: NDArray[np.float64]
    left_gram: NDArray[np.float64]
    right_gram: NDArray[np.float64]
    cross: NDArray[np.float64]

    def carried(self, left: LinearMap | None, right: LinearMap | None) -> PairMoments:
        """The moments of mapped tensors, which need not be measured again; None maps nothing."""
        found = self
        if left is not None:
            found = replace(
                found,
                left=left.rows(found.left),
                left_gram=left.moments(found.left_gram),
                cross=left.rows(found.cross.T).T,
            )
        if right is not None:
            found = replace(
                found,
                right=right.rows(found.right),
                right_gram=right.moments(found.right_gram),
                cross=right.rows(found.cross),
            )
        return found

    def best_map(self, ridge: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(L, R) A and (L,) b that bring A y + b closest to x: A = Cov(x, y) (Cov(y) + ridge)^-1.

        Args:
            ridge: as a share of the mean variance of y.
        """
        covariance = self.right_gram - np.outer(self.right, self.right)
        scale = max(float(np.trace(covariance)) / max(1, len(covariance)), 1e-30)
        between = self.cross - np.outer(self.left, self.right)
        matrix = np.asarray(np.linalg.solve(covariance + ridge * scale * np.eye(len(covariance)), between.T).T, float)
        return matrix, self.left - matrix @ self.right

    def unexplained(self, matrix: NDArray[np.float64]) -> float:
        """Variance of x that A y + b leaves, as a share of all of it, b chosen best.

        Args:
            matrix: (L, R) A, as `best_map` finds it without a ridge.
        """
        spread = float(np.trace(self.left_gram) - self.left @ self.left)
        explained = float(np.vdot(matrix, self.cross - np.outer(self.left, self.right)))
        return max(0.0, (spread - explained) / max(spread, 1e-30))


def collect_pairs(
    structure: Structure, samples: Samples, pairs: Sequence[Pair], *, runtime: Runtime, seed: int, log: Log
) -> Mapping[Pair, PairMoments]:
    """Run the FIT samples once more, for pairs of tensors.

    Args:
        structure: the traced model.
        samples: the data.
        pairs: what to measure; without any nothing is run.
        runtime: what models run on.
        seed: of the positions that are sampled.
        log: is told how many samples are done.
    """
    if not pairs:
        return {}
    places = dict.fromkeys((place for pair in pairs for place in (pair.left, pair.right)), EVERY)
    sampler = RowSampler(structure.model, structure.shape_info, places, runtime)
    sums: dict[Pair, PairMoments] = {}
    done = 0
    for batch in samples.batches(Part.FIT):
        rng = np.random.default_rng((seed, int(batch.samples[0])))
        found = sampler.run(batch, rng).rows
        for pair in pairs:
            left, right = found[pair.left].values, found[pair.right].values
            if left.shape[:2] != right.shape[:2]:
                raise ValueError(f"{pair.left.tensor} and {pair.right.tensor} have different positions")
            chosen = np.sort(rng.choice(left.shape[1], min(POSITIONS, left.shape[1]), replace=False))
            x, y = (values[:, chosen].reshape(-1, values.shape[2]).astype(np.float64) for values in (left, right))
            more = PairMoments(len(x), x.sum(0), y.sum(0), x.T @ x, y.T @ y, x.T @ y)
            sums[pair] = _added(sums[pair], more) if pair in sums else more
        done += len(batch.samples)
        log.progress("pairs", done, len(samples.parts[Part.FIT]))
    return {pair: _divided(total) for pair, total in sums.items()}


def _added(one: PairMoments, other: PairMoments) -> PairMoments:
    return PairMoments(
        one.rows + other.rows,
        one.left + other.left,
        one.right + other.right,
        one.left_gram + other.left_gram,
        one.right_gram + other.right_gram,
        one.cross + other.cross,
    )


def _divided(total: PairMoments) -> PairMoments:
    return PairMoments(
        total.rows,
        total.left / total.rows,
        total.right / total.rows,
        total.left_gram / total.rows,
        total.right_gram / total.rows,
        total.cross / total.rows,
    )

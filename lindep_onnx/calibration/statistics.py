"""From moments to linear algebra: the problem that every consumer poses, and the units that may be asked to go."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from lindep_onnx.calibration.measure import Calibration, MeasuringPoint, measuring_point
from lindep_onnx.calibration.moments import Moments, MomentsAccumulator, never_changes
from lindep_onnx.calibration.pairs import Pair, PairMoments
from lindep_onnx.linalg.fold import ConsumerProblem
from lindep_onnx.structure.layout import ConsumerLayout, features
from lindep_onnx.structure.types import FROZEN, Consumer, Structure

#: Moments, or what still grows to be moments: both know smallest and largest values.
Extremes: TypeAlias = Moments | MomentsAccumulator
#: Samples in which a feature must leave its rest before anything but inactivity is concluded from it; half, of fewer.
MIN_ACTIVE_SAMPLES = 8
#: Rows for each feature, at most 16 counted per sample, that a dependence on several others needs.
JOINT_ROWS = 3.0


@dataclass(frozen=True)
class ConsumerStatistics(ConsumerLayout):
    """What is known about the input of one consumer.

    Attributes:
        consumer, index, unit: as in `ConsumerLayout`.
        mean: (F,) mean over the fit rows; zero where the consumer cannot absorb a constant.
        constant: (F,) bool, the feature never changed.
        gram: (F, F) second moments per row about `mean`, fit samples.
        holdout: the same over unseen samples, about the same `mean`; None if there are none.
        offset: (F,) mean over the fit rows, less `mean`.
        active: (F,) number of fit samples in which the feature leaves its rest (`Moments.moving`).
        joint: whether there are rows enough for dependence on several others.
        rows: number of rows that were fitted to.
        effective_rows: the same, but at most 16 for each sample.
    """

    gram: NDArray[np.float64]
    holdout: NDArray[np.float64] | None
    offset: NDArray[np.float64]
    active: NDArray[np.int64]
    joint: bool
    rows: int
    effective_rows: float


@dataclass(frozen=True)
class Statistics:
    """What the data says about a model.

    Attributes:
        consumers: in the order of `Structure.consumers`.
        constant: (units,) bool, constant at every consumer.
        inactive: (units,) bool, constant at some consumer: only a margin tells whether it will stay so.
        active: (units,) bool, seen often enough to conclude something from its values.
        samples: number of fit and unseen samples.
        enough: samples in which a channel must leave its rest to count as active.
        pairs: joint second moments of the tensors that some kind of change asked for.
    """

    consumers: tuple[ConsumerStatistics, ...]
    constant: NDArray[np.bool_]
    inactive: NDArray[np.bool_]
    active: NDArray[np.bool_]
    samples: int
    enough: int = 1
    pairs: Mapping[Pair, PairMoments] = field(default_factory=dict)


def statistics(structure: Structure, calibration: Calibration) -> Statistics:
    """Put the moments of all readers of each consumer together."""
    consumers = tuple(_consumer_statistics(structure, consumer, calibration) for consumer in structure.consumers)
    constant = np.ones(structure.units, dtype=bool)
    inactive = np.zeros(structure.units, dtype=bool)
    active = np.ones(structure.units, dtype=bool)
    enough = min(MIN_ACTIVE_SAMPLES, max(1, calibration.samples[0] // 2))
    for consumer in consumers:
        live = consumer.unit != FROZEN
        inactive[consumer.unit[live & consumer.constant]] = True
        constant[consumer.unit[live & ~consumer.constant]] = False
        active[consumer.unit[live & ~consumer.constant & (consumer.active < enough)]] = False
    return Statistics(consumers, constant, inactive, active, sum(calibration.samples), enough)


def constant_features(consumer: Consumer, *parts: Mapping[MeasuringPoint, Extremes]) -> NDArray[np.bool_]:
    """(F,) bool, features of a consumer that never changed; more data can only make them fewer.

    Args:
        consumer: the consumer.
        parts: extremes by measuring point, of some samples and of others.
    """
    points = [measuring_point(consumer, reader) for reader in consumer.readers]
    seen = [part[point] for part in parts for point in points if point in part]
    return never_changes(np.min([own.low for own in seen], axis=0), np.max([own.high for own in seen], axis=0))


def _consumer_statistics(structure: Structure, consumer: Consumer, calibration: Calibration) -> ConsumerStatistics:
    layout = features(consumer.columns)
    points = [measuring_point(consumer, reader) for reader in consumer.readers]
    fit = functools.reduce(Moments.merge, (calibration.fit[point] for point in points))
    constant = constant_features(consumer, calibration.fit, calibration.select or {})
    mean = fit.mean if consumer.affine else np.zeros(len(constant))
    gram, holdout = fit.about(mean), None
    if calibration.select is not None:
        holdout = functools.reduce(Moments.merge, (calibration.select[point] for point in points)).about(mean)
    if consumer.affine:
        # Rounding left over from the subtraction must not look like a signal.
        for matrix in (gram, holdout):
            if matrix is not None:
                matrix[constant] = 0.0
                matrix[:, constant] = 0.0
    return ConsumerStatistics(
        consumer=consumer,
        index=layout.index,
        unit=structure.unit[layout.atoms],
        mean=mean,
        constant=constant,
        gram=gram,
        holdout=holdout,
        offset=fit.mean - mean,
        active=fit.moving,
        joint=fit.effective_rows >= JOINT_ROWS * len(constant),
        rows=fit.rows,
        effective_rows=fit.effective_rows,
    )


def problem(structure: Structure, seen: ConsumerStatistics, removed: NDArray[np.bool_]) -> ConsumerProblem:
    """The least-squares problem of a consumer, without the outputs that are gone.

    A feature that nothing multiplies counts as zero: what it does makes no difference.
    """
    outer = _outer_product(structure, seen, removed)
    unread = np.diagonal(outer) == 0.0
    # The centred second moment is G - o o', so that the matrix need not be kept.
    energy = float(np.vdot(seen.gram, outer) - seen.offset @ outer @ seen.offset)
    return ConsumerProblem(
        gram=_without(unread, seen.gram),
        holdout=None if seen.holdout is None else _without(unread, seen.holdout),
        outer=outer,
        unit=seen.unit,
        energy=energy if energy > 0 else 1.0,
        joint=seen.joint,
    )


def _outer_product(structure: Structure, seen: ConsumerStatistics, removed: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(F, F) sum of w w' over the taps and the outputs that survive `removed`."""
    own = seen.consumer.part(structure.shape_info.constants[seen.consumer.weight])
    weight = np.moveaxis(own, (seen.consumer.inputs, seen.consumer.outputs), (0, 1))
    rows = structure.mask(seen.consumer.rows, removed)
    total = np.zeros((len(seen.index), len(seen.index)))
    for places in seen.index.T:  # tap by tap: the whole of a large weight in float64 is not needed
        tap = weight[places].compress(rows, axis=1).reshape(len(places), -1).astype(np.float64)
        total += tap @ tap.T
    return total


def _without(unread: NDArray[np.bool_], moments: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(unread[:, None] | unread, 0.0, moments) if unread.any() else moments

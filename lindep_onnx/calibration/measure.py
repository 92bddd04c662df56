"""Run calibration data through the model and keep moments of what each consumer reads, never the activations."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lindep_onnx.calibration.moments import Moments, MomentsAccumulator, batch_moments
from lindep_onnx.data.samples import Batch, Samples
from lindep_onnx.data.split import Part
from lindep_onnx.errors import CalibrationError
from lindep_onnx.log import Log
from lindep_onnx.runtime.backend import Runtime
from lindep_onnx.runtime.device_moments import DeviceMoments
from lindep_onnx.runtime.rows import ChannelAxis, Probe, RowSampler, summable
from lindep_onnx.structure.layout import features
from lindep_onnx.structure.types import Consumer, ConsumerNode, Structure

Array: TypeAlias = NDArray[Any]

#: Parts of the samples that moments are taken of.
MEASURED = (Part.FIT, Part.SELECT)
#: Rows collected for each feature of a consumer, at most. Three effective rows are the least that joint dependence
#: needs.
ROWS_PER_FEATURE = 8
#: Positions of one sample that are looked at, whatever the number of features.
MIN_POSITIONS = 16
MAX_POSITIONS = 4096
#: Taps of one sample that are looked at behind a Flatten.
ROWS_OF_TAPS = 64


@dataclass(frozen=True)
class MeasuringPoint:
    """Where moments are taken: several readers may share one.

    Attributes:
        tensor: what is fetched.
        axis: its channel axis.
        strides: spacing of the positions that are read, empty for all.
        layout: digest of the feature index.
    """

    tensor: str
    axis: int
    strides: tuple[int, ...]
    layout: str

    @property
    def key(self) -> str:
        """A name to store moments under."""
        return "|".join((self.tensor, str(self.axis), "x".join(map(str, self.strides)), self.layout))


def measuring_point(consumer: Consumer, reader: ConsumerNode) -> MeasuringPoint:
    """Where one reader of a consumer is measured."""
    layout = hashlib.blake2b(_index(consumer).astype("<i8").tobytes(), digest_size=8).hexdigest()
    return MeasuringPoint(reader.tensor, reader.axis, reader.strides, layout)


def measuring_points(structure: Structure) -> dict[MeasuringPoint, NDArray[np.int64]]:
    """Every measuring point of a model, and the (F, T) places of its features on the channel axis."""
    readers = ((consumer, reader) for consumer in structure.consumers for reader in consumer.readers)
    return {measuring_point(consumer, reader): _index(consumer) for consumer, reader in readers}


def _index(consumer: Consumer) -> NDArray[np.int64]:
    return features(consumer.columns).index + consumer.first_column


@dataclass(frozen=True)
class Draw:
    """Which positions of a sample are looked at.

    Attributes:
        seed: of the choice.
        fitted: number of FIT samples in all; the more there are, the fewer positions of each are needed.
    """

    seed: int
    fitted: int

    def streams(self, batch: Batch) -> list[np.random.Generator]:
        """Two sources of random numbers: they depend on the seed and on the first sample of a batch alone."""
        return np.random.default_rng((self.seed, int(batch.samples[0]))).spawn(2)

    def most(self, points: Mapping[MeasuringPoint, NDArray[np.int64]]) -> dict[ChannelAxis, int]:
        """How many positions of one sample are looked at, at most, at each place."""
        found: dict[ChannelAxis, int] = {}
        for point, index in points.items():
            share = ROWS_PER_FEATURE * len(index) // max(1, self.fitted)
            # Positions behind a Flatten are taps: there the whole axis is one row.
            own = int(np.clip(share, MIN_POSITIONS, MAX_POSITIONS)) if index.shape[1] == 1 else MAX_POSITIONS
            found[_place(point)] = max(found.get(_place(point), 0), own)
        return found


@dataclass(frozen=True)
class Calibration:
    """What the data says about every measuring point.

    Attributes:
        fit: moments over the samples that folds are fitted to.
        select: moments over unseen samples that decide; None if there are none.
        samples: number of samples in each of the two parts.
    """

    fit: Mapping[MeasuringPoint, Moments]
    select: Mapping[MeasuringPoint, Moments] | None
    samples: tuple[int, int]

    def counting(self, share: float) -> Calibration:
        """The same where only a share of the samples to fit to, from 0 to 1, are no copies of others."""
        fit = {point: replace(own, effective_rows=own.effective_rows * share) for point, own in self.fit.items()}
        return replace(self, fit=fit) if share < 1 else self

    def merge(self, other: Calibration) -> Calibration:
        """What the samples of both say."""
        return Calibration(
            fit=_merged(self.fit, other.fit),
            select=other.select if self.select is None else _merged(self.select, other.select or {}),
            samples=(self.samples[0] + other.samples[0], self.samples[1] + other.samples[1]),
        )


def _merged(
    own: Mapping[MeasuringPoint, Moments], other: Mapping[MeasuringPoint, Moments]
) -> Mapping[MeasuringPoint, Moments]:
    return {point: own[point].merge(other[point]) if point in other else own[point] for point in own} or other


class StatisticsAccumulator:
    """Moments of every measuring point that still grow.

    Args:
        structure: the traced model.

    Attributes:
        structure: the same.
        points: every measuring point, and the (F, T) places of its features on the channel axis.
        parts: what was added up, by part and measuring point.
        samples: how many were.
    """

    def __init__(self, structure: Structure) -> None:
        self.structure, self.points = structure, measuring_points(structure)
        self.parts = {
            part: {point: MomentsAccumulator(len(index)) for point, index in self.points.items()} for part in MEASURED
        }
        self.samples = dict.fromkeys(self.parts, 0)

    def absorb(self, found: Calibration) -> None:
        """Add what other samples said."""
        for part, count, moments in zip(self.parts, found.samples, (found.fit, found.select or {}), strict=True):
            self.samples[part] += count
            for point, own in moments.items():
                self.parts[part][point].absorb(own)

    def result(self) -> Calibration:
        """What all of it says. The sums are taken apart, for the matrices are the largest things in memory."""
        fit, select = (
            {point: own.pop(point).result() for point in self.points} if self.samples[part] else None
            for part, own in self.parts.items()
        )
        return Calibration(fit or {}, select, (self.samples[Part.FIT], self.samples[Part.SELECT]))


def measure(
    samples: Samples, sums: StatisticsAccumulator, draw: Draw, runtime: Runtime, log: Log, probe: Probe | None = None
) -> None:
    """Take the moments of what every consumer reads.

    The moments of some batches and of the others add up to those of all.

    Args:
        samples: the data; its FIT and SELECT parts are used.
        sums: what to add to.
        draw: which positions are looked at.
        runtime: what models run on.
        log: told how far it is.
        probe: what else is measured in the same runs; None for nothing.

    Raises:
        CalibrationError: an activation is not finite, naming the tensor.
        ModelError: ONNX Runtime cannot run the model.
    """
    for part in MEASURED:
        sums.samples[part] += len(samples.parts[part])
    if not sums.points:
        return
    structure, most = sums.structure, draw.most(sums.points)
    shares = runtime.shares(structure.shape_info.activation_bytes * samples.batch)
    summed = () if runtime.on_processor else _summed(structure, sums.points)
    sampler = RowSampler(structure.model, structure.shape_info, most, shares.each, probe=probe, summed=summed)

    def sampled(batch: Batch) -> tuple[dict[MeasuringPoint, Array], dict[MeasuringPoint, Moments], Sequence[Array]]:
        positions, columns = draw.streams(batch)
        seen = sampler.run(batch, positions)
        rows, moments = {}, {}
        for point, index in sums.points.items():
            place = _place(point)
            if place in seen.rows:
                rows[point] = np.ascontiguousarray(_features(seen.rows[place].values, index, columns))
            else:
                with _named(point):
                    moments[point] = _in_order(seen.summed[place], index[:, 0])
        return rows, moments, seen.probed

    done, total = 0, sum(len(samples.parts[part]) for part in MEASURED)
    try:
        with shares.pool() as pool:
            for part, own in sums.parts.items():
                for batch, (rows, moments, probed) in pool.in_order(sampled, samples.batches(part)):
                    for point, found in moments.items():
                        own[point].absorb(found)
                    full = {point: own[point] for point, values in rows.items() if own[point].take(values)}
                    list(pool.map(_add_up, full, full.values()))
                    if probe is not None:
                        probe.update(probed, batch)
                    done += len(batch.samples)
                    log.progress("calibrate", done, total)
                list(pool.map(_add_up, own, own.values()))
    except _NotFiniteError as error:
        found_at = next(_not_finite(error.point, sampler, draw, samples), None)
        where = "this data" if found_at is None else f"sample {found_at}; remove or repair it"
        raise CalibrationError(f"Tensor {error.point.tensor!r} becomes NaN or infinite on {where}.") from error


class _NotFiniteError(CalibrationError):
    """What is measured at a point is not finite."""

    def __init__(self, point: MeasuringPoint) -> None:
        super().__init__(point.tensor)
        self.point = point


def _not_finite(point: MeasuringPoint, sampler: RowSampler, draw: Draw, samples: Samples) -> Iterator[int]:
    """The samples on which what is measured at a point is not finite, looked for at the same positions again."""
    for batch in samples.batches(*MEASURED):
        rows = sampler.run(batch, draw.streams(batch)[0]).rows.get(_place(point))
        for number, own in zip(batch.samples, rows.values if rows is not None else (), strict=False):
            if not np.isfinite(own).all():
                yield int(number)


def _place(point: MeasuringPoint) -> ChannelAxis:
    return ChannelAxis(point.tensor, point.axis, point.strides)


def _summed(structure: Structure, found: Mapping[MeasuringPoint, NDArray[np.int64]]) -> set[ChannelAxis]:
    """Places whose moments are made on the device that holds the activations; taps behind a Flatten are rows."""
    flat = {_place(point) for point, index in found.items() if index.shape[1] > 1}
    places = {_place(point) for point in found} - flat
    return {place for place in places if summable(structure.model, structure.shape_info, place)}


def _in_order(summed: DeviceMoments, places: NDArray[np.int64]) -> Moments:
    """Moments of features from sums over a channel axis."""
    whole = np.array_equal(places, np.arange(len(summed.sum)))
    gram = summed.gram if whole else summed.gram[np.ix_(places, places)]
    return batch_moments(gram, summed.sum[places], summed.low[:, places], summed.high[:, places], summed.positions)


def _add_up(point: MeasuringPoint, accumulator: MomentsAccumulator) -> None:
    with _named(point):
        accumulator.add_up()


@contextmanager
def _named(point: MeasuringPoint) -> Iterator[None]:
    try:
        yield
    except CalibrationError as error:
        raise _NotFiniteError(point) from error


def _features(rows: Array, index: NDArray[np.int64], rng: np.random.Generator) -> Array:
    """(samples, rows, features): places of the axis in feature order; taps become rows."""
    features, taps = index.shape
    if taps == 1:
        places = index[:, 0]
        return rows if np.array_equal(places, np.arange(rows.shape[2])) else rows[:, :, places]
    chosen = np.sort(rng.permutation(taps)[: max(1, ROWS_OF_TAPS // rows.shape[1])])
    return rows[:, :, index.T[chosen]].reshape(len(rows), -1, features)

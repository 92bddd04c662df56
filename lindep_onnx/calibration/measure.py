"""Run calibration data through the model and keep moments of what reaches each site, never the activations."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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

#: Rows collected for each feature of a site, at most. Three effective rows are the least that joint dependence needs.
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
    """The tap of one reader of a site."""
    index = features(consumer.columns).index + consumer.first_column
    layout = hashlib.blake2b(index.astype("<i8").tobytes(), digest_size=8).hexdigest()
    return MeasuringPoint(reader.tensor, reader.axis, reader.strides, layout)


def measuring_points(structure: Structure) -> dict[MeasuringPoint, NDArray[np.int64]]:
    """Every tap of a model, and the (F, T) places of its features on the channel axis."""
    found: dict[MeasuringPoint, NDArray[np.int64]] = {}
    for consumer in structure.consumers:
        for reader in consumer.readers:
            found.setdefault(
                measuring_point(consumer, reader), features(consumer.columns).index + consumer.first_column
            )
    return found


@dataclass(frozen=True)
class Calibration:
    """What the data says about every tap.

    Attributes:
        fit: moments over the samples that folds are fitted to.
        select: moments over unseen samples that decide; None if there are none.
        samples: number of samples in each of the two parts.
    """

    fit: Mapping[MeasuringPoint, Moments]
    select: Mapping[MeasuringPoint, Moments] | None
    samples: tuple[int, int]

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
    return {place: own[place].merge(other[place]) if place in other else own[place] for place in own} or other


class StatisticsAccumulator:
    """Moments of every tap that still grow.

    Args:
        structure: the traced model.

    Attributes:
        taps: every tap, and the (F, T) places of its features on the channel axis.
        parts: what was added up, by part and tap.
        samples: how many were.
    """

    def __init__(self, structure: Structure) -> None:
        self.taps = measuring_points(structure)
        self.parts = {
            part: {at: MomentsAccumulator(len(index)) for at, index in self.taps.items()}
            for part in (Part.FIT, Part.SELECT)
        }
        self.samples = dict.fromkeys(self.parts, 0)

    def absorb(self, found: Calibration) -> None:
        """Add what other samples said."""
        for part, count, moments in zip(self.parts, found.samples, (found.fit, found.select or {}), strict=True):
            self.samples[part] += count
            for at, own in moments.items():
                self.parts[part][at].absorb(own)

    def result(self) -> Calibration:
        """What all of it says. The sums are taken apart, for the matrices are the largest things in memory."""
        fit, select = (
            {at: own.pop(at).result() for at in self.taps} if self.samples[part] else None
            for part, own in self.parts.items()
        )
        return Calibration(fit or {}, select, (self.samples[Part.FIT], self.samples[Part.SELECT]))


def calibrate(
    structure: Structure,
    samples: Samples,
    sums: StatisticsAccumulator,
    runtime: Runtime,
    log: Log,
    *,
    seed: int,
    probe: Probe | None = None,
    fitted: int | None = None,
) -> None:
    """Take the moments of every site input.

    The positions of a batch depend on the seed and on its first sample alone, so that the moments of some batches and
    of the others add up to those of all.

    Args:
        structure: the traced model.
        samples: the data; its FIT and SELECT parts are used.
        sums: what to add to.
        runtime: what models run on.
        log: told how far it is.
        seed: of the positions that are sampled.
        probe: what else is measured in the same runs; None for nothing.
        fitted: number of FIT samples in all, where `samples` are some of them.

    Raises:
        CalibrationError: an activation is not finite, naming the tensor.
        ModelError: ONNX Runtime cannot run the model.
    """
    counts = {part: len(samples.parts[part]) for part in sums.parts}
    most: dict[ChannelAxis, int] = {}
    for place, index in sums.taps.items():
        share = ROWS_PER_FEATURE * len(index) // max(1, counts[Part.FIT] if fitted is None else fitted)
        per_sample = int(np.clip(share, MIN_POSITIONS, MAX_POSITIONS))
        where = _place(place)
        # Positions behind a Flatten are taps: there the whole axis is one row.
        most[where] = max(most.get(where, 0), per_sample if index.shape[1] == 1 else MAX_POSITIONS)
    for part, count in counts.items():
        sums.samples[part] += count
    if not most:
        return
    shares = runtime.shares(structure.shape_info.activation_bytes * samples.batch)
    summed = () if runtime.on_processor else _summed(structure, sums.taps)
    sampler = RowSampler(structure.model, structure.shape_info, most, shares.each, probe=probe, summed=summed)

    def sampled(batch: Batch) -> tuple[dict[MeasuringPoint, Array], dict[MeasuringPoint, Moments], Sequence[Array]]:
        positions, columns = np.random.default_rng((seed, int(batch.samples[0]))).spawn(2)
        seen = sampler.run(batch, positions)
        rows, moments = {}, {}
        for at, index in sums.taps.items():
            if _place(at) in seen.rows:
                rows[at] = np.ascontiguousarray(_features(seen.rows[_place(at)].values, index, columns))
            else:
                with _named(at):
                    moments[at] = _in_order(seen.summed[_place(at)], index[:, 0])
        return rows, moments, seen.probed

    done = 0
    with shares.pool() as pool:
        for part, own in sums.parts.items():
            for batch, (rows, moments, probed) in pool.in_order(sampled, samples.batches(part)):
                for at, found in moments.items():
                    own[at].absorb(found)
                full = {at: own[at] for at, values in rows.items() if own[at].take(values)}
                list(pool.map(_add_up, full, full.values()))
                if probe is not None:
                    probe.update(probed, batch)
                done += len(batch.samples)
                log.progress("calibrate", done, sum(counts.values()))
            list(pool.map(_add_up, own, own.values()))


def _place(at: MeasuringPoint) -> ChannelAxis:
    return ChannelAxis(at.tensor, at.axis, at.strides)


def _summed(structure: Structure, found: Mapping[MeasuringPoint, NDArray[np.int64]]) -> set[ChannelAxis]:
    """Places whose moments are made on the device that holds the activations; taps behind a Flatten are rows."""
    flat = {_place(at) for at, index in found.items() if index.shape[1] > 1}
    places = {_place(at) for at in found} - flat
    return {place for place in places if summable(structure.model, structure.shape_info, place)}


def _in_order(summed: DeviceMoments, places: NDArray[np.int64]) -> Moments:
    """Moments of features from sums over a channel axis."""
    whole = np.array_equal(places, np.arange(len(summed.sum)))
    gram = summed.gram if whole else summed.gram[np.ix_(places, places)]
    return batch_moments(gram, summed.sum[places], summed.low[:, places], summed.high[:, places], summed.positions)


def _add_up(at: MeasuringPoint, accumulator: MomentsAccumulator) -> None:
    with _named(at):
        accumulator.add_up()


@contextmanager
def _named(at: MeasuringPoint) -> Iterator[None]:
    try:
        yield
    except CalibrationError as error:
        raise CalibrationError(f"Tensor {at.tensor!r} becomes NaN or infinite on this data.") from error


def _features(rows: Array, index: NDArray[np.int64], rng: np.random.Generator) -> Array:
    """(samples, rows, features): places of the axis in feature order; taps become rows."""
    features, taps = index.shape
    if taps == 1:
        places = index[:, 0]
        return rows if np.array_equal(places, np.arange(rows.shape[2])) else rows[:, :, places]
    chosen = np.sort(rng.permutation(taps)[: max(1, ROWS_OF_TAPS // rows.shape[1])])
    return rows[:, :, index.T[chosen]].reshape(len(rows), -1, features)

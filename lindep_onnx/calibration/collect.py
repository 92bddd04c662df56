"""One pass over the data: moments of every consumer, and the margins by which inactive channels are inactive.

Which channels have to be watched shows only in the data, so the pass has phases. In the first few samples all are. What
changed in them is not inactive; and once enough samples are through, most channels have been active too often to teach
anything about margins. Neither is watched any longer. What is concluded is what two separate passes over all samples
would conclude.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lindep_onnx.calibration.inactive import still_watched, uncertain_units, watched_tensors
from lindep_onnx.calibration.measure import MEASURED, Calibration, Draw, MeasuringPoint, StatisticsAccumulator, measure
from lindep_onnx.calibration.range_probe import RangeProbe, Ranges, WatchedTensor
from lindep_onnx.calibration.statistics import Extremes, Statistics, constant_features, statistics
from lindep_onnx.data.samples import Samples
from lindep_onnx.data.split import Part
from lindep_onnx.log import Log
from lindep_onnx.runtime.backend import Runtime
from lindep_onnx.structure.layout import features
from lindep_onnx.structure.types import Structure

Watched: TypeAlias = tuple[WatchedTensor, ...]

#: Samples that show what may be inactive, and how much of the data is through when it is asked again what to watch: a
#: little more than the share of samples in which a seldom channel may be active.
FIRST, SECOND = 32, 0.32


class ShardRunner(Protocol):
    """Takes moments and ranges of some samples."""

    def __call__(
        self, structure: Structure, samples: Samples, watched: Watched, draw: Draw, runtime: Runtime, log: Log, /
    ) -> tuple[Calibration, Ranges]:
        """Run the FIT and SELECT parts; the arguments are those of `measure` and `RangeProbe`."""


def collect_statistics(
    structure: Structure, samples: Samples, runtime: Runtime, log: Log, *, seed: int, over: ShardRunner | None = None
) -> tuple[Calibration, Statistics, NDArray[np.bool_]]:
    """Run the FIT and SELECT samples, and say what they say.

    Args:
        structure: the traced model.
        samples: the data.
        runtime: what models run on.
        log: told how far it is.
        seed: of the positions that are sampled.
        over: runs all but the first samples, elsewhere for instance; None to run them here.

    Returns:
        The moments, the statistics in them, and (units,) bool, units that are constant so far but not by a margin.

    Raises:
        CalibrationError: an activation is not finite, naming the tensor.
        ModelError: ONNX Runtime cannot run the model.
    """
    draw, total = Draw(seed, len(samples.parts[Part.FIT])), sum(len(samples.parts[part]) for part in MEASURED)
    sums = StatisticsAccumulator(structure)
    ranges: Ranges = {}
    everything = [np.ones(len(features(consumer.columns).atoms), dtype=bool) for consumer in structure.consumers]
    watched = watched_tensors(structure, everything)
    for number, some in enumerate(_phases(samples)):
        own = _from(log, sum(sums.samples.values()), total)
        if over is None or number == 0:
            more = collect_local(some, watched, sums, draw, runtime, own)
        else:
            found, more = over(structure, some, watched, draw, runtime, own)
            sums.absorb(found)
        ranges = _merged(ranges, more) if ranges else more
        if sum(sums.samples.values()) < total:
            watched = watched_tensors(structure, _constant(structure, *sums.parts.values()))
            watched = still_watched(watched, ranges, total) if number else watched
    fit = samples.parts[Part.FIT]
    seen = sums.result().counting(samples.different(Part.FIT) / max(1, len(fit)))
    return seen, statistics(structure, seen), _uncertain(structure, seen, ranges)


def collect_local(
    samples: Samples, watched: Watched, sums: StatisticsAccumulator, draw: Draw, runtime: Runtime, log: Log
) -> Ranges:
    """Run the FIT and SELECT parts in this process, and add them up; see `ShardRunner` for the other arguments."""
    probe = RangeProbe(sums.structure, watched) if watched else None
    measure(samples, sums, draw, runtime, log, probe)
    return probe.ranges() if probe is not None else {}


def _phases(samples: Samples) -> Iterator[Samples]:
    fit, select = (samples.parts[part] for part in MEASURED)
    counts = FIRST, int(SECOND * (len(fit) + len(select)))
    first, second = (min(len(fit), -(-count // samples.batch) * samples.batch) for count in counts)
    for number, phase in enumerate(np.split(fit, [first, max(first, second)])):
        unseen = select if number == 2 else select[:0]
        if number == 0 or len(phase) or len(unseen):
            yield samples.subset({Part.FIT: phase, Part.SELECT: unseen})


def _uncertain(structure: Structure, seen: Calibration, ranges: Ranges) -> NDArray[np.bool_]:
    """(units,) bool, units that are constant so far but not by a margin."""
    watched = watched_tensors(structure, _constant(structure, seen.fit, seen.select or {}))
    known = [own for own in watched if own.key in ranges]
    measured = [ranges[own.key][1].only(ranges[own.key][0], own) for own in known]
    uncertain = uncertain_units(structure.units, known, measured, sum(seen.samples))
    for own in watched:
        if own.key not in ranges:  # nobody looked
            uncertain[own.units] = True
    return uncertain


def _constant(structure: Structure, *parts: Mapping[MeasuringPoint, Extremes]) -> list[NDArray[np.bool_]]:
    """(F,) bool for every consumer."""
    return [constant_features(consumer, *parts) for consumer in structure.consumers]


def _merged(ranges: Ranges, more: Ranges) -> Ranges:
    """Both, for the channels that were watched last; what was watched no longer stays as it was."""
    merged = dict(ranges)
    for key, (watched, seen) in more.items():
        own, known = ranges[key]
        merged[key] = watched, known.only(own, watched).merge(seen)
    return merged


def _from(log: Log, done: int, total: int) -> Log:
    """Tells how far all phases are, from what one of them tells."""
    return Log(lambda stage, more, _: log.progress(stage, done + more, total))

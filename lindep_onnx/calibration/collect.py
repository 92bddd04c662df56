"""One pass over the data: moments of every site, and the margins by which silent channels are silent.

Which channels have to be watched shows only in the data, so the pass has stretches. In the first few samples all are.
What changed in them is not silent; and once enough samples are through, most channels have been awake too often to
teach anything about margins. Neither is watched any longer. What is concluded is what two separate passes over all
samples would conclude.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lindep_onnx.calibration.inactive import still_watched, uncertain_units, watched_tensors
from lindep_onnx.calibration.measure import Calibration, MeasuringPoint, StatisticsAccumulator, calibrate
from lindep_onnx.calibration.range_probe import RangeProbe, Ranges, WatchedTensor
from lindep_onnx.calibration.statistics import Extremes, Statistics, constant_features, statistics
from lindep_onnx.data.samples import Samples
from lindep_onnx.data.split import Part
from lindep_onnx.log import Log
from lindep_onnx.runtime.backend import Runtime
from lindep_onnx.structure.layout import features
from lindep_onnx.structure.types import Structure

#: Samples that show what may be silent, and how much of the data is through when it is asked again what to watch: a
#: little more than the share of samples in which a seldom channel may be awake.
FIRST, SECOND = 32, 0.32


def collect_statistics(
    structure: Structure,
    samples: Samples,
    runtime: Runtime,
    log: Log,
    *,
    seed: int,
    over: ShardRunner | None = None,
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
        The moments, the evidence in them, and (units,) bool, units that are constant so far but not by a margin.

    Raises:
        CalibrationError: an activation is not finite, naming the tensor.
        ModelError: ONNX Runtime cannot run the model.
    """
    fit, select = samples.parts[Part.FIT], samples.parts[Part.SELECT]
    total = len(fit) + len(select)
    first, second = (
        min(len(fit), -(-count // samples.batch) * samples.batch) for count in (FIRST, int(SECOND * total))
    )
    phases = [fit[:first], fit[first : max(first, second)], fit[max(first, second) :]]
    done = 0
    sums = StatisticsAccumulator(structure)
    ranges: Ranges = {}
    everything = [np.ones(len(features(consumer.columns).atoms), dtype=bool) for consumer in structure.consumers]
    watched = watched_tensors(structure, everything)
    for number, phase in enumerate(phases):
        last = number == len(phases) - 1
        part = samples.subset({Part.FIT: phase, Part.SELECT: select if last else select[:0]})
        if not len(phase) and not (last and len(select)) and number:
            continue
        own = _from(log, done, total)
        if over is None or number == 0:
            more = collect_local(structure, part, watched, sums, runtime, own, fitted=len(fit), seed=seed)
        else:
            found, more = over(structure, part, watched, runtime, own, fitted=len(fit))
            sums.absorb(found)
        done = sum(sums.samples.values())
        ranges = _merged(ranges, more) if ranges else more
        if done < total:
            watched = watched_tensors(structure, _constant(structure, sums.parts.values()))
            watched = still_watched(watched, ranges, total) if number else watched
    seen = sums.result()
    found_out = statistics(structure, seen)
    final = watched_tensors(structure, _constant(structure, (seen.fit, seen.select or {})))
    pairs = [(flat, ranges[flat.key]) for flat in final if flat.key in ranges]
    measured = [seen_of.only(own, flat) for flat, (own, seen_of) in pairs]
    uncertain = uncertain_units(structure.units, [flat for flat, _ in pairs], measured, found_out.samples)
    for flat in final:
        if flat.key not in ranges:  # nobody looked
            uncertain[flat.units] = True
    return seen, found_out, uncertain


class ShardRunner(Protocol):
    """Takes moments and ranges of some samples."""

    def __call__(
        self,
        structure: Structure,
        samples: Samples,
        watched: tuple[WatchedTensor, ...],
        runtime: Runtime,
        log: Log,
        /,
        *,
        fitted: int,
    ) -> tuple[Calibration, Ranges]:
        """Run the FIT and SELECT parts; the arguments are those of `calibrate` and `RangeProbe`."""


def collect_local(
    structure: Structure,
    samples: Samples,
    watched: tuple[WatchedTensor, ...],
    sums: StatisticsAccumulator,
    runtime: Runtime,
    log: Log,
    *,
    fitted: int,
    seed: int,
) -> Ranges:
    """Run the FIT and SELECT parts in this process, and add them up; see `ShardRunner` for the other arguments."""
    watch = RangeProbe(structure, watched) if watched else None
    calibrate(structure, samples, sums, runtime, log, seed=seed, probe=watch, fitted=fitted)
    return watch.ranges() if watch is not None else {}


def _constant(structure: Structure, parts: Iterable[Mapping[MeasuringPoint, Extremes]]) -> list[NDArray[np.bool_]]:
    """(F,) bool for every site."""
    known = tuple(parts)
    return [constant_features(consumer, *known) for consumer in structure.consumers]


def _merged(ranges: Ranges, more: Ranges) -> Ranges:
    """Both, for the channels that were watched last; what was watched no longer stays as it was."""
    merged = dict(ranges)
    for key, (flat, seen) in more.items():
        own, known = ranges[key]
        merged[key] = flat, known.only(own, flat).merge(seen)
    return merged


def _from(log: Log, done: int, total: int) -> Log:
    """Tells how far all phases are, from what one of them tells."""
    return Log(lambda stage, more, _: log.progress(stage, done + more, total))

"""One pass over the data: moments of every site, and the margins by which silent channels are silent.

Which channels have to be watched shows only in the data, so the pass has stretches. The first few samples are sampled
alone: what changed in them is not silent. From then on moments and ranges are taken in the same runs; what the first
samples have left to watch is made up for by running them once more. Once enough samples are through, most channels have
been awake too often to teach anything about margins, and are watched no longer. What is concluded is what two separate
passes over all samples would conclude.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lindep_onnx import silence
from lindep_onnx.analysis import Evidence, constant_features, evidence
from lindep_onnx.calibration import Calibration, calibrate
from lindep_onnx.channels import Channels
from lindep_onnx.data import Batch, Part, Samples
from lindep_onnx.sampling import RowSampler
from lindep_onnx.sessions import crew, in_order

__all__ = ["Over", "Progress", "Ranges", "here", "learn", "observe", "some_of"]

Progress: TypeAlias = Callable[[str, int, int], None]
Ranges: TypeAlias = "dict[silence.Key, tuple[silence.Flat, silence.Range]]"

#: Samples that show what may be silent, and how much of the data is through when it is asked again what to watch: a
#: little more than the share of samples in which a seldom channel may be awake.
FIRST, SECOND = 32, 0.32


def learn(
    channels: Channels,
    samples: Samples,
    *,
    seed: int,
    progress: Progress,
    providers: Sequence[str],
    threads: int,
    over: Over | None = None,
) -> tuple[Calibration, Evidence, NDArray[np.bool_]]:
    """Run the FIT and SELECT samples, and say what they say.

    Args:
        channels: the traced model.
        samples: the data.
        seed: of the positions that are sampled.
        progress: called with (stage, samples done, samples in all).
        providers: execution providers of ONNX Runtime.
        threads: intra-op threads, 0 for its own choice.
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
    stretches = [fit[:first], fit[first : max(first, second)], fit[max(first, second) :]]
    done = 0
    seen: Calibration | None = None
    ranges: Ranges = {}
    watched: tuple[silence.Flat, ...] = ()
    for number, stretch in enumerate(stretches):
        last = number == len(stretches) - 1
        part = some_of(samples, {Part.FIT: stretch, Part.SELECT: select if last else select[:0]})
        if not len(stretch) and not (last and len(select)) and seen is not None:
            continue
        run = here if over is None or number == 0 else over
        found, more = run(
            channels,
            part,
            watched,
            fitted=len(fit),
            seed=seed,
            progress=_from(progress, done, total),
            providers=providers,
            threads=threads,
        )
        done += sum(found.samples)
        seen = found if seen is None else seen.merge(found)
        ranges = _merged(ranges, more)
        del found  # the matrices are the largest things in memory
        if not last or done < total:
            watched = _flats(channels, seen)
            if number == 0 and watched:
                ranges = observe(channels, watched, part, providers=providers, threads=threads)
            watched = silence.narrowed(watched, ranges, total) if number else watched
    assert seen is not None
    found_out = evidence(channels, seen)
    final = _flats(channels, seen)
    pairs = [(flat, ranges[silence.key(flat)]) for flat in final if silence.key(flat) in ranges]
    measured = [seen_of.of(own, flat) for flat, (own, seen_of) in pairs]
    doubtful = silence.unexplained(channels.units, [flat for flat, _ in pairs], measured, found_out.samples)
    for flat in final:
        if silence.key(flat) not in ranges:  # nobody looked
            doubtful[flat.units] = True
    return seen, found_out, doubtful


class Over(Protocol):
    """Takes moments and ranges of some samples."""

    def __call__(
        self,
        channels: Channels,
        samples: Samples,
        watched: tuple[silence.Flat, ...],
        /,
        *,
        fitted: int,
        seed: int,
        progress: Progress,
        providers: Sequence[str],
        threads: int,
    ) -> tuple[Calibration, Ranges]:
        """Run the FIT and SELECT parts; the arguments are those of `calibrate` and `silence.Watch`."""


def here(
    channels: Channels, samples: Samples, watched: tuple[silence.Flat, ...], **options: Any
) -> tuple[Calibration, Ranges]:
    """Run the FIT and SELECT parts in this process; see `Over` for the arguments."""
    watch = silence.Watch(channels, watched) if watched else None
    found = calibrate(channels, samples, probe=watch, **options)
    return found, watch.ranges() if watch is not None else {}


def some_of(samples: Samples, parts: Mapping[Part, NDArray[np.int64]]) -> Samples:
    """The same source with fewer samples; valid as long as the whole is."""
    some = copy.copy(samples)
    some.parts = MappingProxyType({part: parts.get(part, samples.parts[part][:0]) for part in Part})
    return some


def _flats(channels: Channels, seen: Calibration) -> tuple[silence.Flat, ...]:
    return silence.flats(channels, [constant_features(site, seen) for site in channels.sites])


def observe(
    channels: Channels, watched: Sequence[silence.Flat], samples: Samples, *, providers: Sequence[str], threads: int
) -> Ranges:
    """The ranges alone, over the FIT and SELECT samples."""
    watch = silence.Watch(channels, watched)
    own = crew(threads, providers, channels.resolved.activation_bytes * samples.batch)
    sampler = RowSampler(channels.model, channels.resolved, {}, probe=watch, providers=providers, threads=own.threads)

    def probed(batch: Batch) -> list[NDArray[Any]]:
        return sampler.run(batch, np.random.default_rng(0))[1]

    with own.pool() as pool:
        for batch, values in in_order(pool, probed, samples.batches(Part.FIT, Part.SELECT), own.runs):
            watch.update(values, batch)
    return watch.ranges()


def _merged(ranges: Ranges, more: Ranges) -> Ranges:
    """Both, for the channels that were watched last; what was watched no longer stays as it was."""
    merged = dict(ranges)
    for key, (flat, seen) in more.items():
        own, known = ranges[key]
        merged[key] = flat, known.of(own, flat).merge(seen)
    return merged


def _from(progress: Progress, done: int, total: int) -> Progress:
    return lambda stage, more, _: progress(stage, done + more, total)

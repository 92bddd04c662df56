"""Will a channel that never changed stay as it is? What the data says about channels behind activation functions.

Unseen samples do not catch a channel that is merely inactive so far. Its activation margin does (see
`lindep_onnx.calibration.range_probe`). How large a margin is large enough depends on how heavy the tails are, which
differs from model to model by orders of magnitude, and the model itself shows it: channels that were active in a few
samples were inactive in all the others, and their margin over those others did not keep them so. An inactive channel
must have a margin well above the largest of theirs, and its input must stay inside the flat part by as many standard
deviations over all positions. How many that is falls with the number of samples (`margin`): else a larger sample, whose
extremes lie farther out, would let fewer channels go.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from lindep_onnx.calibration.moments import never_changes
from lindep_onnx.calibration.range_probe import Ranges, RangeStats, WatchedTensor
from lindep_onnx.structure.layout import features
from lindep_onnx.structure.rules.saturation import flat_parts, may_flatten
from lindep_onnx.structure.types import FROZEN, Structure

#: Of fewer samples nothing is concluded: what never changed in n of them may change in a share of 3 / n of all others.
MIN_SAMPLES = 32
#: Margins, in standard deviations, times the root of the number of samples: the more was seen, the nearer to it lies
#: what may still come. Chosen by tools/benchmarks/bench_trust.py, whose table is in docs/architecture.md: with less,
#: more channels go, and more of them become active; with more, fewer go and as few become active.
CERTAINTY = 32.0
#: An activation margin must exceed the largest that was violated by half as many times.
MARGIN_SHARE = 0.5
#: Share of the largest violated margin below which no channel is expected to violate a larger one.
OVERTAKING = 0.5
#: A channel that is active in at most this share of the samples, and in at least one, shows how large a margin may be
#: and still be violated.
SELDOM = 0.25


def watched_tensors(structure: Structure, constant: Sequence[NDArray[np.bool_]]) -> tuple[WatchedTensor, ...]:
    """What has to be looked at before inactive channels may go; nothing if there are none.

    Args:
        structure: the traced model.
        constant: for each consumer (F,) bool, the features that never changed at the positions that were looked at.
    """
    layouts = [features(consumer.columns) for consumer in structure.consumers]
    inactive = np.zeros(structure.units + 1, dtype=bool)
    for layout, own in zip(layouts, constant, strict=True):
        inactive[structure.unit[layout.atoms[own]]] = True
    inactive[FROZEN] = False
    if not inactive.any():
        return ()
    found = []
    for node in structure.model.nodes:
        if not may_flatten(node) or not node.inputs:
            continue
        parts = flat_parts(node, structure.shape_info.constants.get) or ()
        for label in structure.labels.get(node.inputs[0], ()):
            unit = structure.unit[label.along_cut()]
            places = np.flatnonzero(inactive[unit])
            # Without inactive channels a node still shows how others become active, if it is known where it is flat.
            if label.cut != 0 and (len(places) or (parts and (unit != FROZEN).any())):
                watched = None if parts else np.isin(np.arange(len(unit)), places)
                found.append(WatchedTensor(node.inputs[0], label.cut, parts, places, unit[places], watched, node.index))
    for number, (consumer, layout, own) in enumerate(zip(structure.consumers, layouts, constant, strict=True)):
        unit = structure.unit[layout.atoms]
        chosen = own & (unit != FROZEN)
        places = layout.index[chosen].ravel() + consumer.first_column
        units = np.repeat(unit[chosen], layout.index.shape[1])
        # A sample of the positions was constant; now all of them are asked.
        read = {(reader.tensor, reader.axis) for reader in consumer.readers if reader.axis != 0}
        for tensor, axis in sorted(read) if len(places) else ():
            width = structure.shape_info.shapes[tensor][axis]
            watched = np.isin(np.arange(width), places) if isinstance(width, int) else None
            found.append(WatchedTensor(tensor, axis, (), places, units, watched, -1 - number))
    return tuple(found)


def still_watched(watched: Sequence[WatchedTensor], ranges: Ranges, samples: int) -> tuple[WatchedTensor, ...]:
    """The same without the channels that are not inactive and can teach nothing any more.

    That is, those too often active to be among the seldom ones, and those whose margin is below half of the largest
    that was violated: their least distance can only fall, so that they would have to become half as scattered.

    Args:
        watched: what `watched_tensors` gave, after some of the samples.
        ranges: what was seen in them.
        samples: how many there are in all.
    """
    found = []
    overtaking = OVERTAKING * violated_margin(seen for _, seen in ranges.values())
    for own in watched:
        if not own.parts or own.key not in ranges:
            found.append(own)
            continue
        _, seen = ranges[own.key]
        wanted = np.zeros(len(seen.low), dtype=bool)
        wanted[own.inactive] = True
        for stats in seen.margins:
            wanted |= (seen.samples - stats.count <= _most_active(samples)) & (stats.margin >= overtaking)
        if wanted.any():
            found.append(replace(own, watched=wanted))
    return tuple(found)


def _most_active(samples: int) -> float:
    """Of so many samples, in how many a channel may be active and still count as seldom active."""
    return max(1.0, SELDOM * samples)


def margin(samples: int, certainty: float = CERTAINTY) -> float:
    """Standard deviations that count as far, after so many samples; half of it after four times as many."""
    return certainty / math.sqrt(max(1, samples))


def violated_margin(ranges: Iterable[RangeStats]) -> float:
    """The largest activation margin that did not keep a channel inactive: of those active in a few samples."""
    largest = 0.0
    for seen in ranges:
        for stats in seen.margins:
            active = seen.samples - stats.count
            seldom = (active >= 1) & (active <= _most_active(seen.samples)) & stats.varies
            largest = max(largest, float(stats.margin[seldom].max(initial=0.0)))
    return largest


def uncertain_units(
    units: int,
    watched: Sequence[WatchedTensor],
    ranges: Sequence[RangeStats],
    samples: int,
    certainty: float = CERTAINTY,
) -> NDArray[np.bool_]:
    """(units,) bool: constant so far, but not by a margin.

    A channel whose input stays inside a flat part of the activation with margin to spare is taken to stay there. One
    that varies before an operator without known flat parts is not, and none is if there are too few samples.

    Args:
        units: how many there are.
        watched: what `watched_tensors` gave.
        ranges: what was seen of each.
        samples: how many samples were seen.
        certainty: see `CERTAINTY`.
    """
    deviations = margin(samples, certainty)
    required = MARGIN_SHARE * deviations * violated_margin(ranges)
    uncertain = np.full(units, samples < MIN_SAMPLES)
    for own, seen in zip(watched, ranges, strict=True):
        uncertain[own.units[_doubted(own, seen, deviations, required)]] = True
    return uncertain


def _doubted(own: WatchedTensor, seen: RangeStats, deviations: float, required: float) -> NDArray[np.bool_]:
    """(W,) bool."""
    low, high = seen.low[own.inactive], seen.high[own.inactive]
    known = np.isfinite(low) & np.isfinite(high)
    with np.errstate(invalid="ignore"):  # of what is infinite
        varies = ~never_changes(low, high)
        spare = deviations * seen.deviation
    safe = np.zeros(len(low), dtype=bool)
    crossing = np.ones(len(low), dtype=bool)
    for (start, end), stats in zip(own.parts, seen.margins, strict=True):
        far = stats.margin[own.inactive] >= required
        safe |= (low - spare >= start) & (high + spare <= end) & far
        crossing &= ~((low >= start) & (high <= end))
    # What is not inside a flat part still varies behind it, so that another node is the cause.
    return np.asarray(~known | (varies & ~safe & (~crossing if own.parts else True)))

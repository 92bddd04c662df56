"""Will a channel that never changed stay as it is? What the data says about channels behind activation functions.

An activation that is flat on a part of its input makes a constant of every channel that stays inside that part: it is
silent. Unseen samples do not catch a channel that is merely silent so far. So let d_s be the distance of sample s from
the end of the flat part, of the position that comes nearest; the channel is silent in s if d_s >= 0. Over the samples
in which it is silent its *quiet margin* is

    min_s d_s / deviation_s d_s,

how far outside anything seen the next sample must lie to wake it. How large a margin is large enough depends on how
heavy the tails are, which differs from model to model by orders of magnitude, and the model itself shows it: channels
that woke in a few samples were silent in all the others, and their margin over those others did not keep them quiet. A
silent channel must have a margin well above the largest of theirs, and its input must stay inside the flat part by as
many standard deviations over all positions. How many that is falls with the number of samples (`margin`): else a larger
sample, whose extremes lie farther out, would let fewer channels go.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray

from lindep_onnx.calibration.moments import CONSTANT_TOLERANCE
from lindep_onnx.data.samples import Batch
from lindep_onnx.model.ir import Node
from lindep_onnx.runtime.rows import reduction
from lindep_onnx.structure.layout import features
from lindep_onnx.structure.rules.saturation import Interval, flat_parts, may_flatten
from lindep_onnx.structure.types import FROZEN, Structure

Floats: TypeAlias = NDArray[np.float64]
Key: TypeAlias = tuple[str, int, int]

#: Of fewer samples nothing is concluded: what never changed in n of them may change in a share of 3 / n of all others.
MIN_SAMPLES = 32
#: Margins, in standard deviations, times the root of the number of samples: the more was seen, the nearer to it lies
#: what may still come. Chosen by bench_trust.py (margins), whose table is in docs/architecture.md: with less, more
#: channels go, and more of them wake; with more, fewer go and as few wake.
CERTAINTY = 32.0
#: A quiet margin must exceed the largest that broke by half as many times.
QUIET_SHARE = 0.5
#: Channels of a convolution that are computed a second time: at most one in so many, and so many of a depthwise one.
FEW, FEW_DEPTHWISE = 4, 32
#: Samples whose extremes wait to be taken in together.
WAITING = 32
#: Share of the largest quiet margin that broke below which no channel is expected to break a larger one.
OVERTAKING = 0.5
#: A channel that is awake in at most this share of the samples, and in at least one, shows how large a quiet margin
#: may be and still break.
SELDOM = 0.25


@dataclass(frozen=True)
class WatchedTensor:
    """A tensor whose reader is constant on parts of its range; a weight, on none.

    Attributes:
        tensor: its name.
        axis: its channel axis.
        parts: intervals on which what the reader puts out does not change.
        inactive: (W,) places on that axis of channels that never changed behind it.
        units: (W,) the unit of each.
        watched: (C,) bool, channels whose extremes are measured; None for all.
        reader: who reads it: the index of the node, or below 0 for a site.
    """

    tensor: str
    axis: int
    parts: tuple[Interval, ...]
    inactive: NDArray[np.int64]
    units: NDArray[np.int64]
    watched: NDArray[np.bool_] | None = None
    reader: int = 0


@dataclass(frozen=True)
class MarginStats:
    """Distances d from the end of one flat part, over the samples in which a channel lies wholly inside.

    Attributes:
        count: (C,) number of those samples.
        sum, square: (C,) sum of d and of its square.
        least, most: (C,) extremes of d; infinite without samples.
        end: where the part ends, for the size of rounding.
    """

    count: NDArray[np.int64]
    sum: Floats
    square: Floats
    least: Floats
    most: Floats
    end: float

    def merge(self, other: MarginStats) -> MarginStats:
        """Over the samples of both."""
        return MarginStats(
            self.count + other.count,
            self.sum + other.sum,
            self.square + other.square,
            np.minimum(self.least, other.least),
            np.maximum(self.most, other.most),
            self.end,
        )

    @property
    def varies(self) -> NDArray[np.bool_]:
        """(C,) whether d changes by more than rounding."""
        several = self.count > 1
        least, most = np.where(several, self.least, 0.0), np.where(several, self.most, 0.0)
        return np.asarray(most - least > CONSTANT_TOLERANCE * (abs(self.end) + most))

    @property
    def margin(self) -> Floats:
        """(C,) quiet margin, infinite where d does not vary."""
        mean = self.sum / np.maximum(self.count, 1)
        deviation = np.sqrt(np.maximum(self.square / np.maximum(self.count, 1) - mean**2, 0.0))
        usable = self.varies & (deviation > 0)
        return np.asarray(np.divide(self.least, deviation, out=np.full(len(mean), np.inf), where=usable))


@dataclass(frozen=True)
class RangeStats:
    """Where the input of a node lies, over all positions of all samples.

    Attributes:
        low, high: (C,) extremes along the channel axis; infinite where they were not watched.
        sum, square: (W,) sum and sum of squares of the silent channels.
        rows: number of positions.
        samples: number of samples.
        quiet: one for each flat part.
    """

    low: Floats
    high: Floats
    sum: Floats
    square: Floats
    rows: int
    samples: int
    quiet: tuple[MarginStats, ...]

    @property
    def deviation(self) -> Floats:
        """(W,) standard deviation of the silent channels."""
        return np.sqrt(np.maximum(self.square / self.rows - (self.sum / self.rows) ** 2, 0.0))

    def of(self, own: WatchedTensor, other: WatchedTensor) -> RangeStats:
        """The same for the silent channels of another flat of the same tensor, which are some of its own.

        Args:
            own: what was watched.
            other: what is asked for.
        """
        order = np.argsort(own.inactive)
        at = order[np.searchsorted(own.inactive, other.inactive, sorter=order)]
        return replace(self, sum=self.sum[at], square=self.square[at])

    def merge(self, other: RangeStats) -> RangeStats:
        """The range over the positions of both."""
        return RangeStats(
            low=np.minimum(self.low, other.low),
            high=np.maximum(self.high, other.high),
            sum=self.sum + other.sum,
            square=self.square + other.square,
            rows=self.rows + other.rows,
            samples=self.samples + other.samples,
            quiet=tuple(own.merge(more) for own, more in zip(self.quiet, other.quiet, strict=True)),
        )


def flats(structure: Structure, constant: Sequence[NDArray[np.bool_]]) -> tuple[WatchedTensor, ...]:
    """What has to be looked at before silent channels may go; nothing if there are none.

    Args:
        structure: the traced model.
        constant: for each site (F,) bool, the features that never changed at the positions that were looked at.
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
            # Without silent channels a node still shows how others wake, if it is known where it is flat.
            if label.cut != 0 and (len(places) or (parts and (unit != FROZEN).any())):
                watched = None if parts else np.isin(np.arange(len(unit)), places)
                found.append(WatchedTensor(node.inputs[0], label.cut, parts, places, unit[places], watched, node.index))
    for number, (consumer, layout, own) in enumerate(zip(structure.consumers, layouts, constant, strict=True)):
        unit = structure.unit[layout.atoms]
        chosen = own & (unit != FROZEN)
        places = layout.index[chosen].ravel() + consumer.first_column
        units = np.repeat(unit[chosen], layout.index.shape[1])
        # A sample of the positions was constant; now all of them are asked.
        for tensor, axis in sorted({(reader.tensor, reader.axis) for reader in consumer.readers if reader.axis != 0}):
            width = structure.shape_info.shapes[tensor][axis]
            watched = np.isin(np.arange(width), places) if isinstance(width, int) else None
            if len(places):
                found.append(WatchedTensor(tensor, axis, (), places, units, watched, -1 - number))
    return tuple(found)


class RangeProbe:
    """Measures the input range of nodes, channel by channel, inside the graph so that nothing large is fetched.

    Args:
        structure: the traced model.
        watched: what `flats` gave.
    """

    def __init__(self, structure: Structure, watched: Sequence[WatchedTensor]) -> None:
        self._structure, self._watched = structure, watched
        self._ranges: list[RangeStats | None] = [None] * len(watched)
        self._fetched: list[dict[str, str]] = []
        self._waiting: list[list[NDArray[Any]]] = []
        self._waiting_samples = 0

    def extend(self, proto: onnx.ModelProto) -> tuple[dict[str, list[onnx.NodeProto]], list[str]]:
        """Nodes to put behind tensors, and the names of what they put out; initializers are added to `proto`."""
        nodes: dict[str, list[onnx.NodeProto]] = {}
        for number, flat in enumerate(self._watched):
            prefix = f"lindep_onnx_{number}_"
            behind, before, watched = _picked(proto, flat, prefix, self._structure)
            added, names = _measuring(proto, flat, watched, prefix, self._structure)
            nodes.setdefault(behind, []).extend([*before, *added])
            self._fetched.append(names)
        return nodes, [name for names in self._fetched for name in names.values()]

    def update(self, values: Sequence[NDArray[Any]], batch: Batch) -> None:
        """Take in what one batch gave."""
        # Shapes are kept as they are; of the other tensors, what is not filler.
        count, size = len(batch.samples), batch.size
        self._waiting.append([value if value.ndim == 1 else value[: len(value) * count // size] for value in values])
        self._waiting_samples += count
        if self._waiting_samples >= WAITING:
            self._add()

    def _add(self) -> None:
        """Many small batches cost more than one large one."""
        first = 0
        for number, flat in enumerate(self._watched if self._waiting else ()):
            names = self._fetched[number]
            own = [dict(zip(names, values[first:], strict=False)) for values in self._waiting]
            first += len(names)
            with np.errstate(over="ignore", invalid="ignore"):  # what is no number is doubted
                seen = _range(flat, own, _positions(self._structure, flat))
            known = self._ranges[number]
            self._ranges[number] = seen if known is None else known.merge(seen)
        self._waiting, self._waiting_samples = [], 0

    def ranges(self) -> dict[Key, tuple[WatchedTensor, RangeStats]]:
        """What was seen, by `key`."""
        self._add()
        pairs = zip(self._watched, self._ranges, strict=True)
        return {key(flat): (flat, seen) for flat, seen in pairs if seen is not None}


def _picked(
    proto: onnx.ModelProto, flat: WatchedTensor, prefix: str, structure: Structure
) -> tuple[str, list[onnx.NodeProto], str]:
    """The watched channels of a tensor: the tensor to stand behind, nodes, and the name of what they put out."""
    if flat.watched is None or flat.watched.all():
        return flat.tensor, [], flat.tensor
    apart = _apart(proto, flat.tensor, np.flatnonzero(flat.watched), prefix, structure) if flat.axis == 1 else None
    if apart is not None:
        return apart
    places = onnx.numpy_helper.from_array(np.flatnonzero(flat.watched), prefix + "watched")
    proto.graph.initializer.append(places)
    gather = onnx.helper.make_node("Gather", [flat.tensor, places.name], [prefix + "ranged"], axis=flat.axis)
    return flat.tensor, [gather], prefix + "ranged"


def _apart(
    proto: onnx.ModelProto, tensor: str, places: NDArray[np.int64], prefix: str, structure: Structure
) -> tuple[str, list[onnx.NodeProto], str] | None:
    """A few channels of a convolution, computed a second time; None where that is no option.

    Another reader of what a convolution puts out keeps ONNX Runtime from fusing the activation behind it, and makes it
    put the whole tensor into another order: on efficientnet_lite0 a run takes 12.4 ms instead of 6.8.
    """
    node, constants = structure.model.producer.get(tensor), structure.shape_info.constants
    if node is None or node.op != "Conv" or any(name and name not in constants for name in node.inputs[1:]):
        return None
    weight, group = constants[node.inputs[1]], int(node.attributes.get("group", 1))
    depthwise = group > 1 and weight.shape[:2] == (group, 1)
    if len(places) * FEW > len(weight) or (group > 1 and not (depthwise and len(places) <= FEW_DEPTHWISE)):
        return None
    stored = {"weight": weight[places], **({"bias": constants[node.input(2)][places]} if node.input(2) else {})}
    nodes = []
    padding = structure.model.producer.get(node.inputs[0])
    if padding is not None and padding.op != "Pad":
        padding = None
    behind = read = node.inputs[0] if padding is None else padding.inputs[0]
    if padding is not None:  # its operands are stored again, for those of the model may be made further down
        if any(name and name not in constants for name in padding.inputs[1:]) or _pads_channels(padding, constants):
            return None
        operands = {f"pad{place}": constants[name] for place, name in enumerate(padding.inputs[1:]) if name}
        proto.graph.initializer.extend(onnx.numpy_helper.from_array(v, prefix + name) for name, v in operands.items())
    if depthwise:  # picked by a convolution too: a Gather would put the whole tensor into another order
        stored["picking"] = np.zeros((len(places), group, *(1 for _ in weight.shape[2:])), dtype=weight.dtype)
        stored["picking"][np.arange(len(places)), places] = 1
        nodes.append(onnx.helper.make_node("Conv", [read, prefix + "picking"], [prefix + "read"]))
        read = prefix + "read"
    if padding is not None:  # once more as well, for it is fused with the convolution
        given = [read, *(prefix + f"pad{place}" if name else "" for place, name in enumerate(padding.inputs[1:]))]
        nodes.append(onnx.helper.make_node("Pad", given, [prefix + "padded"], **padding.attributes))
        read = prefix + "padded"
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(value, prefix + name) for name, value in stored.items())
    given = [read, *(prefix + name for name in stored if name != "picking")]
    attributes = {**node.attributes, "group": len(places) if depthwise else 1}
    nodes.append(onnx.helper.make_node("Conv", given, [prefix + "ranged"], **attributes))
    return behind, nodes, prefix + "ranged"


def _pads_channels(padding: Node, constants: Mapping[str, NDArray[Any]]) -> bool:
    """Whether a Pad with stored operands may widen or move the channels."""
    pads = padding.attributes["pads"] if "pads" in padding.attributes else constants.get(padding.input(1), ())
    pairs = np.reshape(pads, (2, -1))
    return bool(padding.input(3)) or pairs.shape[1] < 3 or bool(pairs[:, :2].any())


def _positions(structure: Structure, flat: WatchedTensor) -> int | None:
    """Positions of one entry of the leading axis; None where that differs from run to run."""
    sizes = [size for axis, size in enumerate(structure.shape_info.shapes[flat.tensor]) if axis not in (0, flat.axis)]
    known = [size for size in sizes if isinstance(size, int)]
    return math.prod(known) if len(known) == len(sizes) else None


def _measuring(
    proto: onnx.ModelProto, flat: WatchedTensor, watched: str, prefix: str, structure: Structure
) -> tuple[list[onnx.NodeProto], dict[str, str]]:
    """Nodes, and names by what they give: the low and high of what is watched, sum and square of what is silent."""
    # The leading axis stays: it counts samples, filler among them.
    rank, opset = len(structure.shape_info.shapes[flat.tensor]), structure.model.opset
    others = [other for other in range(rank) if other not in (0, flat.axis)]
    nodes, names = [], {what: prefix + what for what in ("low", "high")}
    inactive, width = watched, structure.shape_info.shapes[flat.tensor][flat.axis]
    if len(flat.inactive):
        names |= {what: prefix + what for what in ("sum", "square")}
        own = (
            np.arange(width if isinstance(width, int) else 0) if flat.watched is None else np.flatnonzero(flat.watched)
        )
        if not np.array_equal(own, flat.inactive):
            inactive, places = (
                prefix + "silent",
                flat.inactive if flat.watched is None else np.searchsorted(own, flat.inactive),
            )
            proto.graph.initializer.append(onnx.numpy_helper.from_array(places.astype(np.int64), prefix + "places"))
            nodes.append(onnx.helper.make_node("Gather", [watched, prefix + "places"], [inactive], axis=flat.axis))
    sources = {"low": watched, "high": watched, "sum": inactive, "square": inactive}
    operators = {"low": "ReduceMin", "high": "ReduceMax", "sum": "ReduceSum", "square": "ReduceSumSquare"}
    for what, name in names.items():
        nodes.append(reduction(proto, operators[what], sources[what], name, others, opset))
    if _positions(structure, flat) is None:
        names["shape"] = prefix + "shape"
        nodes.append(onnx.helper.make_node("Shape", [watched], [names["shape"]]))
    return nodes, names


def _range(flat: WatchedTensor, batches: Sequence[Mapping[str, NDArray[Any]]], positions: int | None) -> RangeStats:
    """The range over some batches; low and high are (samples, watched channels), sum and square (samples, W)."""
    low, high, *sums = (
        np.concatenate([batch[what] for batch in batches]).astype(np.float64)
        for what in ("low", "high", "sum", "square")
        if what in batches[0]
    )
    total, square = (value.sum(axis=0) for value in sums) if sums else np.zeros((2, 0))
    rows = sum(
        len(batch["low"]) * (math.prod(batch["shape"][1:]) // int(batch["shape"][flat.axis]))
        if positions is None
        else len(batch["low"]) * positions
        for batch in batches
    )
    if flat.watched is not None:
        low, high = (_spread(value, flat.watched, filling) for value, filling in ((low, np.inf), (high, -np.inf)))
    quiet = []
    for start, end in flat.parts:
        distance = np.minimum(low - start, end - high)
        inside = (distance >= 0) & np.isfinite(distance) & (True if flat.watched is None else flat.watched)
        counted = np.where(inside, distance, 0.0)
        quiet.append(
            MarginStats(
                count=inside.sum(axis=0),
                sum=counted.sum(axis=0),
                square=np.square(counted).sum(axis=0),
                least=np.where(inside, distance, np.inf).min(axis=0),
                most=np.where(inside, distance, -np.inf).max(axis=0),
                end=next((bound for bound in (start, end) if np.isfinite(bound)), 0.0),
            )
        )
    return RangeStats(low.min(0), high.max(0), total, square, int(rows), len(low), tuple(quiet))


def _spread(values: NDArray[Any], watched: NDArray[np.bool_], filling: float) -> NDArray[Any]:
    """(samples, C) from (samples, watched channels)."""
    whole = np.full((len(values), len(watched)), filling)
    whole[:, watched] = values
    return whole


def key(flat: WatchedTensor) -> Key:
    """What tells the flats of a model apart, however many of their channels are still silent."""
    return flat.tensor, flat.axis, flat.reader


def still_watched(
    watched: Sequence[WatchedTensor], ranges: Mapping[Any, tuple[WatchedTensor, RangeStats]], samples: int
) -> tuple[WatchedTensor, ...]:
    """The same without the channels that are not silent and can teach nothing any more.

    That is, those too often awake to be among the seldom ones, and those whose quiet margin is below half of the
    largest that broke: their least distance can only fall, so that they would have to become half as scattered.

    Args:
        watched: what `flats` gave, after some of the samples.
        ranges: what was seen in them.
        samples: how many there are in all.
    """
    found = []
    overtaking = OVERTAKING * broken_margin([seen for _, seen in ranges.values()])
    for flat in watched:
        if not flat.parts or key(flat) not in ranges:
            found.append(flat)
            continue
        _, seen = ranges[key(flat)]
        wanted = np.zeros(len(seen.low), dtype=bool)
        wanted[flat.inactive] = True
        for quiet in seen.quiet:
            wanted |= (seen.samples - quiet.count <= _most_awake(samples)) & (quiet.margin >= overtaking)
        if wanted.any():
            found.append(replace(flat, watched=wanted))
    return tuple(found)


def _most_awake(samples: int) -> float:
    """Of so many samples, in how many a channel may be awake and still count as seldom awake."""
    return max(1.0, SELDOM * samples)


def margin(samples: int, certainty: float = CERTAINTY) -> float:
    """Standard deviations that count as far, after so many samples; half of it after four times as many."""
    return certainty / math.sqrt(max(1, samples))


def broken_margin(ranges: Sequence[RangeStats]) -> float:
    """The largest quiet margin that did not keep a channel quiet: of those that woke in a few samples."""
    largest = 0.0
    for seen in ranges:
        for quiet in seen.quiet:
            awake = seen.samples - quiet.count
            seldom = (awake >= 1) & (awake <= _most_awake(seen.samples)) & quiet.varies
            if seldom.any():
                largest = max(largest, float(quiet.margin[seldom].max()))
    return largest


def unexplained(
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
        watched: what `flats` gave.
        ranges: what was seen of each.
        samples: how many samples were seen.
        certainty: see `CERTAINTY`.
    """
    deviations = margin(samples, certainty)
    required = QUIET_SHARE * deviations * broken_margin(ranges)
    uncertain = np.full(units, samples < MIN_SAMPLES)
    for flat, seen in zip(watched, ranges, strict=True):
        uncertain[flat.units[_doubted(flat, seen, deviations, required)]] = True
    return uncertain


def _doubted(flat: WatchedTensor, seen: RangeStats, deviations: float, required: float) -> NDArray[np.bool_]:
    """(W,) bool."""
    low, high = seen.low[flat.inactive], seen.high[flat.inactive]
    known = np.isfinite(low) & np.isfinite(high)
    with np.errstate(invalid="ignore"):  # of what is infinite
        varies = high - low > CONSTANT_TOLERANCE * np.maximum(np.abs(low), np.abs(high))
        spare = deviations * seen.deviation
    safe = np.zeros(len(low), dtype=bool)
    crossing = np.ones(len(low), dtype=bool)
    for (start, end), quiet in zip(flat.parts, seen.quiet, strict=True):
        far = quiet.margin[flat.inactive] >= required
        safe |= (low - spare >= start) & (high + spare <= end) & far
        crossing &= ~((low >= start) & (high <= end))
    # What is not inside a flat part still varies behind it, so that another node is the cause.
    return np.asarray(~known | (varies & ~safe & (~crossing if flat.parts else True)))

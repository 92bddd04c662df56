"""Where the inputs of activation functions lie, channel by channel, measured inside the graph.

An activation that is flat on a part of its input makes a constant of every channel that stays inside that part: the
channel is *inactive*. Let d_s be the distance of sample s from the end of the flat part, of the position that comes
nearest; the channel is inactive in s if d_s >= 0. Over the samples in which it is inactive its *activation margin* is

    min_s d_s / deviation_s d_s,

how far outside anything seen the next sample must lie to activate it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray

from lindep_onnx.calibration.moments import CONSTANT_TOLERANCE
from lindep_onnx.data.samples import Batch
from lindep_onnx.model.node import Node
from lindep_onnx.runtime.device_moments import reduction
from lindep_onnx.structure.rules.saturation import Interval
from lindep_onnx.structure.types import Structure

Array: TypeAlias = NDArray[Any]
Floats: TypeAlias = NDArray[np.float64]
#: What tells the watched tensors of a model apart, however many of their channels are still inactive.
Key: TypeAlias = tuple[str, int, int]

#: Channels of a convolution that are computed a second time: at most one in so many, and so many of a depthwise one.
FEW, FEW_DEPTHWISE = 4, 32
#: Samples whose extremes wait to be taken in together.
WAITING = 32


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
        reader: who reads it: the index of the node, or below 0 for a consumer.
    """

    tensor: str
    axis: int
    parts: tuple[Interval, ...]
    inactive: NDArray[np.int64]
    units: NDArray[np.int64]
    watched: NDArray[np.bool_] | None = None
    reader: int = 0

    @property
    def key(self) -> Key:
        """What tells it apart."""
        return self.tensor, self.axis, self.reader


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

    @classmethod
    def of(cls, low: Floats, high: Floats, part: Interval) -> MarginStats:
        """From the (samples, C) extremes of each sample; nothing is inside where they are not numbers."""
        distance = np.minimum(low - part[0], part[1] - high)
        inside = (distance >= 0) & np.isfinite(distance)
        counted = np.where(inside, distance, 0.0)
        return cls(
            count=inside.sum(axis=0),
            sum=counted.sum(axis=0),
            square=np.square(counted).sum(axis=0),
            least=np.where(inside, distance, np.inf).min(axis=0),
            most=np.where(inside, distance, -np.inf).max(axis=0),
            end=next((bound for bound in part if np.isfinite(bound)), 0.0),
        )

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
        """(C,) activation margin, infinite where d does not vary."""
        mean = self.sum / np.maximum(self.count, 1)
        deviation = np.sqrt(np.maximum(self.square / np.maximum(self.count, 1) - mean**2, 0.0))
        usable = self.varies & (deviation > 0)
        return np.asarray(np.divide(self.least, deviation, out=np.full(len(mean), np.inf), where=usable))


@dataclass(frozen=True)
class RangeStats:
    """Where the input of a node lies, over all positions of all samples.

    Attributes:
        low, high: (C,) extremes along the channel axis; infinite where they were not watched.
        sum, square: (W,) sum and sum of squares of the inactive channels.
        rows: number of positions.
        samples: number of samples.
        margins: one for each flat part.
    """

    low: Floats
    high: Floats
    sum: Floats
    square: Floats
    rows: int
    samples: int
    margins: tuple[MarginStats, ...]

    @classmethod
    def of(cls, watched: WatchedTensor, batches: Sequence[Mapping[str, Array]], positions: int | None) -> RangeStats:
        """From what was measured in some batches.

        Args:
            watched: the tensor.
            batches: `low` and `high` (samples, watched channels), `sum` and `square` (samples, W) if there are inactive
                channels, and the `shape` of the watched channels where `positions` is None.
            positions: of one entry of the leading axis; None where that differs from batch to batch.
        """

        def joined(what: str) -> Floats:
            return np.concatenate([batch[what] for batch in batches]).astype(np.float64)

        def each(batch: Mapping[str, Array]) -> int:
            return (
                math.prod(batch["shape"][1:]) // int(batch["shape"][watched.axis]) if positions is None else positions
            )

        low, high = joined("low"), joined("high")
        total, square = (joined(what).sum(0) if what in batches[0] else np.zeros(0) for what in ("sum", "square"))
        rows, samples = sum(len(batch["low"]) * each(batch) for batch in batches), len(low)
        if watched.watched is not None:
            filling = np.full((samples, len(watched.watched)), np.inf)
            low, high, seen = filling, -filling, (low, high)
            low[:, watched.watched], high[:, watched.watched] = seen
        margins = tuple(MarginStats.of(low, high, part) for part in watched.parts)
        return cls(low.min(0), high.max(0), total, square, int(rows), samples, margins)

    @property
    def deviation(self) -> Floats:
        """(W,) standard deviation of the inactive channels."""
        return np.sqrt(np.maximum(self.square / self.rows - (self.sum / self.rows) ** 2, 0.0))

    def only(self, own: WatchedTensor, other: WatchedTensor) -> RangeStats:
        """The same for the inactive channels of another value for the same tensor, which are some of its own.

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
            margins=tuple(own.merge(more) for own, more in zip(self.margins, other.margins, strict=True)),
        )


#: What was seen of each watched tensor, by its key.
Ranges: TypeAlias = dict[Key, tuple[WatchedTensor, RangeStats]]


class RangeProbe:
    """Measures the input range of nodes, channel by channel, inside the graph so that nothing large is fetched.

    Args:
        structure: the traced model.
        watched: what is measured.
    """

    def __init__(self, structure: Structure, watched: Sequence[WatchedTensor]) -> None:
        self._structure, self._watched = structure, watched
        self._ranges: list[RangeStats | None] = [None] * len(watched)
        self._fetched: list[dict[str, str]] = []
        self._waiting: list[list[Array]] = []
        self._waiting_samples = 0

    def extend(self, proto: onnx.ModelProto) -> tuple[dict[str, list[onnx.NodeProto]], list[str]]:
        """Nodes to put behind tensors, and the names of what they put out; initializers are added to `proto`."""
        nodes: dict[str, list[onnx.NodeProto]] = {}
        for number, watched in enumerate(self._watched):
            added = _Added(proto, f"lindep_onnx_{number}_")
            behind, source = _picked(watched, added, self._structure)
            self._fetched.append(_measured(watched, source, added, self._structure))
            nodes.setdefault(behind, []).extend(added.nodes)
        return nodes, [name for names in self._fetched for name in names.values()]

    def update(self, values: Sequence[Array], batch: Batch) -> None:
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
        for number, watched in enumerate(self._watched if self._waiting else ()):
            names = self._fetched[number]
            own = [dict(zip(names, values[first:], strict=False)) for values in self._waiting]
            first += len(names)
            with np.errstate(over="ignore", invalid="ignore"):  # what is no number is doubted
                seen = RangeStats.of(watched, own, _positions(self._structure, watched))
            known = self._ranges[number]
            self._ranges[number] = seen if known is None else known.merge(seen)
        self._waiting, self._waiting_samples = [], 0

    def ranges(self) -> Ranges:
        """What was seen."""
        self._add()
        pairs = zip(self._watched, self._ranges, strict=True)
        return {watched.key: (watched, seen) for watched, seen in pairs if seen is not None}


class _Added:
    """Nodes that measure one tensor, and initializers of a model; all names begin alike."""

    def __init__(self, proto: onnx.ModelProto, prefix: str) -> None:
        self.proto, self.prefix = proto, prefix
        self.nodes: list[onnx.NodeProto] = []

    def store(self, name: str, value: Array) -> str:
        self.proto.graph.initializer.append(onnx.numpy_helper.from_array(value, self.prefix + name))
        return self.prefix + name

    def put(self, op: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        self.nodes.append(onnx.helper.make_node(op, inputs, [self.prefix + name], **attributes))
        return self.prefix + name


def _picked(watched: WatchedTensor, added: _Added, structure: Structure) -> tuple[str, str]:
    """The watched channels of a tensor: the tensor to stand behind, and the name that has them."""
    if watched.watched is None or watched.watched.all():
        return watched.tensor, watched.tensor
    places = np.flatnonzero(watched.watched)
    again = _computed_again(watched.tensor, places, added, structure) if watched.axis == 1 else None
    if again is not None:
        return again
    inputs = [watched.tensor, added.store("watched", places)]
    return watched.tensor, added.put("Gather", inputs, "ranged", axis=watched.axis)


def _computed_again(
    tensor: str, places: NDArray[np.int64], added: _Added, structure: Structure
) -> tuple[str, str] | None:
    """A few channels of a convolution, computed a second time; None where that is no option.

    Another reader of what a convolution puts out keeps ONNX Runtime from fusing the activation behind it, and makes it
    put the whole tensor into another order: on efficientnet_lite0 a run takes 12.4 ms instead of 6.8.
    """
    model, constants = structure.model, structure.shape_info.constants
    node = model.producer.get(tensor)
    if node is None or node.op != "Conv" or not _stored(node.inputs[1:], constants):
        return None
    weight, group = constants[node.inputs[1]], int(node.attributes.get("group", 1))
    depthwise = group > 1 and weight.shape[:2] == (group, 1)
    if len(places) * FEW > len(weight) or (group > 1 and not (depthwise and len(places) <= FEW_DEPTHWISE)):
        return None
    padding = model.producer.get(node.inputs[0])
    padding = padding if padding is not None and padding.op == "Pad" else None
    if padding is not None and (not _stored(padding.inputs[1:], constants) or _pads_channels(padding, constants)):
        return None
    behind = read = (padding or node).inputs[0]
    if depthwise:  # picked by a convolution too: a Gather would put the whole tensor into another order
        picking = np.zeros((len(places), group, *(1 for _ in weight.shape[2:])), dtype=weight.dtype)
        picking[np.arange(len(places)), places] = 1
        read = added.put("Conv", [read, added.store("picking", picking)], "read")
    if padding is not None:  # once more as well, for it is fused; its operands may be made further down in the model
        given = [added.store(f"pad{n}", constants[name]) if name else "" for n, name in enumerate(padding.inputs[1:])]
        read = added.put("Pad", [read, *given], "padded", **padding.attributes)
    given = [added.store(f"weight{n}", constants[name][places]) for n, name in enumerate(node.inputs[1:]) if name]
    attributes = {**node.attributes, "group": len(places) if depthwise else 1}
    return behind, added.put("Conv", [read, *given], "ranged", **attributes)


def _stored(names: Iterable[str], constants: Mapping[str, Array]) -> bool:
    return all(not name or name in constants for name in names)


def _pads_channels(padding: Node, constants: Mapping[str, Array]) -> bool:
    """Whether a Pad with stored operands may widen or move the channels."""
    pads = padding.attributes["pads"] if "pads" in padding.attributes else constants.get(padding.input(1), ())
    pairs = np.reshape(pads, (2, -1))
    return bool(padding.input(3)) or pairs.shape[1] < 3 or bool(pairs[:, :2].any())


def _positions(structure: Structure, watched: WatchedTensor) -> int | None:
    """Positions of one entry of the leading axis; None where that differs from run to run."""
    shape = structure.shape_info.shapes[watched.tensor]
    sizes = [size for axis, size in enumerate(shape) if axis not in (0, watched.axis)]
    known = [size for size in sizes if isinstance(size, int)]
    return math.prod(known) if len(known) == len(sizes) else None


def _measured(watched: WatchedTensor, source: str, added: _Added, structure: Structure) -> dict[str, str]:
    """Names by what they give: the low and high of what is watched, sum and square of what is inactive."""
    # The leading axis stays: it counts samples, filler among them.
    shape, opset = structure.shape_info.shapes[watched.tensor], structure.model.opset
    others = [other for other in range(len(shape)) if other not in (0, watched.axis)]
    reductions = {"low": ("ReduceMin", source), "high": ("ReduceMax", source)}
    if len(watched.inactive):
        width = shape[watched.axis]
        own = np.arange(width if isinstance(width, int) else 0)
        places, inactive = watched.inactive, source
        if watched.watched is not None:
            own = np.flatnonzero(watched.watched)
        if not np.array_equal(own, places):
            places = places if watched.watched is None else np.searchsorted(own, places)
            inputs = [source, added.store("places", places.astype(np.int64))]
            inactive = added.put("Gather", inputs, "inactive", axis=watched.axis)
        reductions |= {"sum": ("ReduceSum", inactive), "square": ("ReduceSumSquare", inactive)}
    names = {what: added.prefix + what for what in reductions}
    for what, (op, of) in reductions.items():
        added.nodes.append(reduction(added.proto, op, of, names[what], others, opset))
    if _positions(structure, watched) is None:
        names["shape"] = added.put("Shape", [source], "shape")
    return names

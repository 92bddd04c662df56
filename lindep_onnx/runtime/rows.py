"""Rows of activations at seeded positions: what calibration and refits look at instead of whole tensors.

A row is what a tensor holds along its channel axis at one position of one sample. Where shapes are known the rows
are picked inside the graph, so that only they leave ONNX Runtime: fetching whole activations costs more than
computing them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray

from lindep_onnx.data.samples import Batch
from lindep_onnx.model.ir import Model
from lindep_onnx.model.shapes import ShapeInfo
from lindep_onnx.runtime.backend import Runtime

Array: TypeAlias = NDArray[Any]

#: Input of a graph that sums: how many samples of a batch are no filler. Operator set from which on Slice takes it, and
#: Gemm needs no third input.
COUNTED, SLICED = "lindep_onnx_counted", 11


@dataclass(frozen=True)
class ChannelAxis:
    """Where rows are taken.

    Attributes:
        tensor: name.
        axis: its channel axis.
        strides: spacing of the positions that count, one for each axis behind the channel axis; empty for all.
    """

    tensor: str
    axis: int
    strides: tuple[int, ...] = ()


@dataclass(frozen=True)
class Rows:
    """Rows of one place in one batch.

    Attributes:
        values: (samples, rows, channels), filler left out. A tensor whose leading axis does not count samples is one
            sample, which can only make guards stricter.
        positions: (rows,) which position each row is, counted through the axes other than samples and channels.
    """

    values: Array
    positions: NDArray[np.int64]


@dataclass(frozen=True)
class DeviceMoments:
    """Sums over the rows Z of one place in one batch, made inside the graph in float64.

    Attributes:
        gram: (channels, channels) Z'Z.
        sum: (channels,) column sums.
        low: (samples, channels) smallest value of each sample.
        high: (samples, channels) largest value of each sample.
        positions: rows of each sample.
    """

    gram: NDArray[np.float64]
    sum: NDArray[np.float64]
    low: Array
    high: Array
    positions: int


@dataclass(frozen=True)
class ProbeResult:
    """What one run gave.

    Attributes:
        rows: of every place but those that are summed.
        summed: of these.
        probed: what the probe asked for.
    """

    rows: Mapping[ChannelAxis, Rows]
    summed: Mapping[ChannelAxis, DeviceMoments]
    probed: Sequence[Array]


class Probe(Protocol):
    """Something else that is measured in the same run."""

    def extend(self, proto: onnx.ModelProto) -> tuple[Mapping[str, Sequence[onnx.NodeProto]], Sequence[str]]:
        """Nodes to put behind tensors, and the names of what they put out; initializers are added to `proto`."""

    def update(self, values: Sequence[Array], batch: Batch) -> None:
        """Take in what was put out for one batch."""


class RowSampler:
    """A session that gives rows of some tensors for every batch.

    Args:
        model: the model.
        shape_info: its shapes.
        most: for each place, the number of positions looked at in one sample, at most.
        runtime: what models run on.
        probe: what else is measured; None for nothing.
        summed: places whose rows do not leave the graph, but their sums (`summable`).
    """

    def __init__(
        self,
        model: Model,
        shape_info: ShapeInfo,
        most: Mapping[ChannelAxis, int],
        runtime: Runtime,
        *,
        probe: Probe | None = None,
        summed: Collection[ChannelAxis] = (),
    ) -> None:
        self._most = most
        self._summed: dict[ChannelAxis, dict[str, str]] = {}
        self._sizes: dict[ChannelAxis, int] = {}
        proto = onnx.ModelProto()
        proto.CopyFrom(model.proto)
        present = {value.name for value in proto.graph.output}
        self._fetched: dict[ChannelAxis, str] = {}
        nodes: dict[str, list[onnx.NodeProto]] = {}
        for number, (place, limit) in enumerate(most.items()):
            shape = shape_info.shapes.get(place.tensor, ())
            inside = _inside(shape, place.axis)
            if inside is not None and (place in summed or len(_allowed(shape, place)) > limit):
                self._sizes[place] = inside[1]
                picked = _positions_name(number) + "_picked"
                own = nodes.setdefault(place.tensor, [])
                own.extend(_gather(proto, place, inside[0], number))
                if place in summed:
                    added, self._summed[place] = _summing(proto, place, picked, inside[0], model.opset)
                    own.extend(added)
                else:
                    self._fetched[place] = picked
                    proto.graph.output.append(onnx.ValueInfoProto(name=picked))
            else:
                self._fetched[place] = place.tensor
                if place.tensor not in present:
                    present.add(place.tensor)
                    proto.graph.output.append(onnx.ValueInfoProto(name=place.tensor))
        self._shapes = {place: shape_info.shapes[place.tensor] for place in self._sizes}
        self._names = sorted(
            {*self._fetched.values(), *(name for own in self._summed.values() for name in own.values())}
        )
        watched, self._probed = probe.extend(proto) if probe is not None else ({}, ())
        for tensor, behind in watched.items():
            nodes.setdefault(tensor, []).extend(behind)
        proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in self._probed)
        insert_behind(proto, nodes)
        self._session = runtime.open(proto, model.folder)

    def rows(self, batch: Batch, rng: np.random.Generator) -> dict[ChannelAxis, Rows]:
        """Run one batch.

        Args:
            batch: what to feed.
            rng: draws the positions, the same for all samples of the batch.
        """
        return dict(self.run(batch, rng).rows)

    def run(self, batch: Batch, rng: np.random.Generator) -> ProbeResult:
        """Run one batch: its rows, sums, and what the probe asked for."""
        feeds = dict(batch.feeds)
        if self._summed:
            feeds[COUNTED] = np.array([len(batch.samples)], dtype=np.int64)
        chosen: dict[ChannelAxis, NDArray[np.int64]] = {}
        for number, (place, most) in enumerate(self._most.items()):
            if place in self._sizes:
                allowed = _allowed(self._shapes[place], place)
                chosen[place] = np.sort(rng.choice(allowed, min(most, len(allowed)), replace=False))
                feeds[_positions_name(number)] = chosen[place]
        found = self._session.run([*self._names, *self._probed], feeds)
        values = dict(zip(self._names, found, strict=False))
        result, summed = {}, {}
        for place, most in self._most.items():
            if place in self._summed:
                own = {what: values[name] for what, name in self._summed[place].items()}
                summed[place] = DeviceMoments(**own, positions=len(chosen[place]))
                continue
            value = values[self._fetched[place]]
            if place in chosen:
                kept = value[: len(value) * len(batch.samples) // batch.size]
                kept = np.moveaxis(kept, 1, 2) if place.axis == 1 else kept
                result[place] = Rows(kept, chosen[place])
            else:
                result[place] = _picked(value, place, most, batch, rng)
        return ProbeResult(result, summed, found[len(self._names) :])


def rows_at(data: Array, axis: int, positions: NDArray[np.int64]) -> Array:
    """(samples, rows, channels) of a tensor with samples along its leading axis.

    Args:
        data: the tensor.
        axis: its channel axis, not 0.
        positions: (rows,) as in `Rows`.
    """
    count, width = data.shape[0], data.shape[axis]
    before, behind = math.prod(data.shape[1:axis]), math.prod(data.shape[axis + 1 :])
    data = data.reshape(count, before, width, behind)
    if np.array_equal(positions, np.arange(before * behind)):
        return np.moveaxis(data, 2, 3).reshape(count, before * behind, width)
    return np.moveaxis(data[:, positions // behind, :, positions % behind], 0, 1)


def _inside(shape: tuple[int | str, ...], axis: int) -> tuple[int, int] | None:
    """Channels and positions, if rows can be picked inside the graph: samples first, channels second or last."""
    if not 1 <= axis < len(shape) or axis not in (1, len(shape) - 1):
        return None
    others = [size for place, size in enumerate(shape) if place not in (0, axis)]
    width = shape[axis]
    if not isinstance(width, int) or not all(isinstance(size, int) for size in others):
        return None
    return width, math.prod(size for size in others if isinstance(size, int))


def _allowed(shape: tuple[int | str, ...], place: ChannelAxis) -> NDArray[np.int64]:
    """Positions that count; all but the ones that strides skip."""
    sizes = [size for axis, size in enumerate(shape) if axis not in (0, place.axis) and isinstance(size, int)]
    every = np.arange(math.prod(sizes))
    if not place.strides:
        return every
    skip = (slice(None),) * (len(sizes) - len(place.strides))
    return np.ravel(every.reshape(sizes)[(*skip, *(slice(None, None, step) for step in place.strides))])


def _positions_name(number: int) -> str:
    return f"lindep_onnx_positions_{number}"


def _gather(proto: onnx.ModelProto, place: ChannelAxis, width: int, number: int) -> list[onnx.NodeProto]:
    positions = _positions_name(number)
    flat, shape, picked = (positions + what for what in ("_flat", "_shape", "_picked"))
    target = [0, width, -1] if place.axis == 1 else [0, -1, width]
    proto.graph.input.append(
        onnx.helper.make_tensor_value_info(positions, onnx.TensorProto.INT64, [positions + "_rows"])
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(target, dtype=np.int64), shape))
    return [
        onnx.helper.make_node("Reshape", [place.tensor, shape], [flat]),
        onnx.helper.make_node("Gather", [flat, positions], [picked], axis=2 if place.axis == 1 else 1),
    ]


def summable(model: Model, shape_info: ShapeInfo, place: ChannelAxis) -> bool:
    """Whether rows can be picked and summed inside the graph: samples are counted by the leading axis, as in an input.

    Args:
        model: the model.
        shape_info: its shapes.
        place: where rows are taken.
    """
    shape = shape_info.shapes.get(place.tensor, ())
    leading = {shape_info.shapes[name][0] for name in model.inputs if shape_info.shapes.get(name)}
    return model.opset >= SLICED and _inside(shape, place.axis) is not None and leading == {shape[0]}


def _summing(
    proto: onnx.ModelProto, place: ChannelAxis, picked: str, width: int, opset: int
) -> tuple[list[onnx.NodeProto], dict[str, str]]:
    """Nodes behind picked rows, and names of what they put out, by field of `DeviceMoments`.

    Rows become float64 before they are multiplied: products of float32 would lose the rank of the Gram matrix.
    """
    if all(value.name != COUNTED for value in proto.graph.input):
        proto.graph.input.append(onnx.helper.make_tensor_value_info(COUNTED, onnx.TensorProto.INT64, [1]))
    start, size = picked + "_start", picked + "_size"
    numbers = {start: np.zeros(1, dtype=np.int64), size: np.array([-1, width], dtype=np.int64)}
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in numbers.items())
    kept, exact, rows, flat = (picked + what for what in ("_kept", "_exact", "_rows", "_flat"))
    names = {what: f"{picked}_{what}" for what in ("gram", "sum", "low", "high")}
    behind = 2 if place.axis == 1 else 1  # the axis of the positions
    node = onnx.helper.make_node
    nodes = [
        node("Slice", [picked, start, COUNTED, start], [kept]),
        node("Cast", [kept], [exact], to=onnx.TensorProto.DOUBLE),
        node("Transpose", [exact], [rows], perm=[0, 2, 1]) if behind == 2 else node("Identity", [exact], [rows]),
        node("Reshape", [rows, size], [flat]),
        node("Gemm", [flat, flat], [names["gram"]], transA=1),
        reduction(proto, "ReduceSum", flat, names["sum"], [0], opset),
        reduction(proto, "ReduceMin", kept, names["low"], [behind], opset),
        reduction(proto, "ReduceMax", kept, names["high"], [behind], opset),
    ]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names.values())
    return nodes, names


def reduction(
    proto: onnx.ModelProto, op: str, source: str, name: str, axes: Sequence[int], opset: int
) -> onnx.NodeProto:
    """A node that reduces some axes away, in the form of the operator set.

    Args:
        proto: gets an initializer with the axes where they are an input.
        op: ReduceMin, ReduceMax, ReduceSum or ReduceSumSquare.
        source: what to reduce.
        name: of the result.
        axes: may be none.
        opset: version of the default operator set.
    """
    if not axes:
        if op == "ReduceSumSquare":
            return onnx.helper.make_node("Mul", [source, source], [name])
        return onnx.helper.make_node("Identity", [source], [name])
    if opset < (13 if op == "ReduceSum" else 18):
        return onnx.helper.make_node(op, [source], [name], axes=list(axes), keepdims=0)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(axes, dtype=np.int64), name + "_axes"))
    return onnx.helper.make_node(op, [source, name + "_axes"], [name], keepdims=0)


def insert_behind(proto: onnx.ModelProto, nodes: Mapping[str, Sequence[onnx.NodeProto]]) -> None:
    """Put nodes right behind the producer of a tensor, so that the tensor need not be kept until the end of a run.

    Args:
        proto: changed in place.
        nodes: by the tensor they read; those that read a graph input go first.
    """
    computed = {name for node in proto.graph.node for name in node.output}
    ordered = [node for name, extra in nodes.items() if name not in computed for node in extra]
    for node in proto.graph.node:
        ordered.append(node)
        ordered.extend(added for name in node.output for added in nodes.get(name, ()))
    rest = onnx.GraphProto(node=ordered)
    del proto.graph.node[:]
    proto.graph.node.extend(rest.node)


def _picked(data: Array, place: ChannelAxis, most: int, batch: Batch, rng: np.random.Generator) -> Rows:
    """Rows of a tensor that was fetched whole."""
    if place.axis == 0 or data.shape[0] % batch.size:
        data, axis = data[None], place.axis + 1
    else:
        data, axis = data[: len(data) * len(batch.samples) // batch.size], place.axis
    allowed = _allowed(data.shape, ChannelAxis(place.tensor, axis, place.strides))
    if len(allowed) > most:
        allowed = np.sort(rng.choice(allowed, most, replace=False))
    values = rows_at(data, axis, allowed)
    if axis == place.axis and len(data) != len(batch.samples):  # several entries of the leading axis for one sample
        values = values.reshape(len(batch.samples), -1, values.shape[-1])
    return Rows(values, allowed)

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
from lindep_onnx.runtime.device_moments import COUNTED, SLICED, DeviceMoments, summing

Array: TypeAlias = NDArray[Any]


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
        values: (samples, rows, channels), filler left out. A tensor of which nobody knows where samples lie, and whose
            leading axis does not count them, is one sample, which can only make guards stricter.
        positions: (rows,) which position each row is, counted through the axes other than samples and channels.
    """

    values: Array
    positions: NDArray[np.int64]


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
        self._most, self._shape_info = most, shape_info
        self._shapes: dict[ChannelAxis, tuple[int | str, ...]] = {}  # where rows are picked in the graph
        self._fetched: dict[ChannelAxis, str] = {}
        self._summed: dict[ChannelAxis, dict[str, str]] = {}
        proto = onnx.ModelProto()
        proto.CopyFrom(model.proto)
        nodes: dict[str, list[onnx.NodeProto]] = {}
        for number, (place, limit) in enumerate(most.items()):
            shape = shape_info.shapes.get(place.tensor, ())
            width = _inside(shape, place.axis) if shape_info.sample_axis(place.tensor) in (0, None) else None
            if width is None or (place not in summed and len(_allowed(shape, place)) <= limit):
                self._fetched[place] = place.tensor
                continue
            self._shapes[place] = shape
            own = nodes.setdefault(place.tensor, [])
            own.extend(_gather(proto, place, width, number))
            picked = own[-1].output[0]
            if place in summed:
                added, self._summed[place] = summing(proto, picked, place.axis, width, model.opset)
                own.extend(added)
            else:
                self._fetched[place] = picked
        sums = {name for own in self._summed.values() for name in own.values()}
        self._names = sorted({*self._fetched.values(), *sums})
        watched, self._probed = probe.extend(proto) if probe is not None else ({}, ())
        for tensor, behind in watched.items():
            nodes.setdefault(tensor, []).extend(behind)
        present = {value.name for value in proto.graph.output}
        wanted = [name for name in (*self._names, *self._probed) if name not in present]
        proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
        insert_behind(proto, nodes)
        self._session = runtime.open(proto, model.folder)

    def run(self, batch: Batch, rng: np.random.Generator) -> ProbeResult:
        """Run one batch: rows and sums at positions that its samples share, and what the probe asked for."""
        feeds = dict(batch.feeds)
        if self._summed:
            feeds[COUNTED] = np.array([len(batch.samples)], dtype=np.int64)
        chosen: dict[ChannelAxis, NDArray[np.int64]] = {}
        for number, (place, most) in enumerate(self._most.items()):
            if place in self._shapes:
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
                where = self._shape_info.sample_axis(place.tensor)
                result[place] = _picked(value, place, most, batch, rng, where)
        return ProbeResult(result, summed, found[len(self._names) :])


def samples_first(data: Array, axis: int, samples: int | None) -> tuple[Array, int]:
    """A tensor with its sample axis in front, where that is known, and where its channel `axis` is then."""
    if not samples:
        return data, axis
    return np.moveaxis(data, samples, 0), axis + 1 if axis < samples else axis


def rows_at(data: Array, axis: int, positions: NDArray[np.int64]) -> Array:
    """(samples, rows, channels) of a tensor at `positions` (rows,); samples are axis 0, channels another."""
    count, width = data.shape[0], data.shape[axis]
    before, behind = math.prod(data.shape[1:axis]), math.prod(data.shape[axis + 1 :])
    data = data.reshape(count, before, width, behind)
    if np.array_equal(positions, np.arange(before * behind)):
        return np.moveaxis(data, 2, 3).reshape(count, before * behind, width)
    return np.moveaxis(data[:, positions // behind, :, positions % behind], 0, 1)


def _inside(shape: tuple[int | str, ...], axis: int) -> int | None:
    """Channels, if rows can be picked inside the graph: samples first, channels second or last."""
    if not 1 <= axis < len(shape) or axis not in (1, len(shape) - 1):
        return None
    width, *others = (shape[axis], *shape[1:axis], *shape[axis + 1 :])
    return width if isinstance(width, int) and all(isinstance(size, int) for size in others) else None


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
    given = onnx.helper.make_tensor_value_info(positions, onnx.TensorProto.INT64, [positions + "_rows"])
    proto.graph.input.append(given)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(target, dtype=np.int64), shape))
    return [
        onnx.helper.make_node("Reshape", [place.tensor, shape], [flat]),
        onnx.helper.make_node("Gather", [flat, positions], [picked], axis=2 if place.axis == 1 else 1),
    ]


def summable(model: Model, shape_info: ShapeInfo, place: ChannelAxis) -> bool:
    """Whether rows can be picked and summed inside the graph: the leading axis counts samples, as in an input."""
    shape = shape_info.shapes.get(place.tensor, ())
    if shape_info.samples and shape_info.sample_axis(place.tensor) != 0:
        return False
    leading = {shape_info.shapes[name][0] for name in model.inputs if shape_info.shapes.get(name)}
    return model.opset >= SLICED and _inside(shape, place.axis) is not None and leading == {shape[0]}


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


def _picked(
    data: Array, place: ChannelAxis, most: int, batch: Batch, rng: np.random.Generator, samples: int | None
) -> Rows:
    """Rows of a tensor that was fetched whole."""
    data, axis = samples_first(data, place.axis, samples)
    whole = axis == 0 or bool(data.shape[0] % batch.size)
    if whole:
        data, axis = data[None], axis + 1
    else:
        data = data[: len(data) * len(batch.samples) // batch.size]
    allowed = _allowed(data.shape, ChannelAxis(place.tensor, axis, place.strides))
    if len(allowed) > most:
        allowed = np.sort(rng.choice(allowed, most, replace=False))
    values = rows_at(data, axis, allowed)
    if not whole and len(data) != len(batch.samples):  # several entries of the leading axis for one sample
        values = values.reshape(len(batch.samples), -1, values.shape[-1])
    return Rows(values, allowed)

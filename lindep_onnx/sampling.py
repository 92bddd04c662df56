"""Rows of activations at seeded positions: what calibration and refits look at instead of whole tensors.

A row is what a tensor holds along its channel axis at one position of one sample. Where shapes are known the rows
are picked inside the graph, so that only they leave ONNX Runtime: fetching whole activations costs more than
computing them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray

from lindep_onnx.data import Batch
from lindep_onnx.graph import Model
from lindep_onnx.sessions import open_session
from lindep_onnx.shapes import Resolved

__all__ = ["Place", "Probe", "RowSampler", "Rows", "insert_behind", "rows_at"]

Array: TypeAlias = NDArray[Any]


@dataclass(frozen=True)
class Place:
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
        resolved: its shapes.
        most: for each place, the number of positions looked at in one sample, at most.
        providers: execution providers of ONNX Runtime.
        threads: intra-op threads, 0 for its own choice.
        probe: what else is measured; None for nothing.
    """

    def __init__(
        self,
        model: Model,
        resolved: Resolved,
        most: Mapping[Place, int],
        *,
        providers: Sequence[str],
        threads: int,
        probe: Probe | None = None,
    ) -> None:
        self._most = most
        self._sizes: dict[Place, int] = {}
        proto = onnx.ModelProto()
        proto.CopyFrom(model.proto)
        present = {value.name for value in proto.graph.output}
        self._fetched: dict[Place, str] = {}
        nodes: dict[str, list[onnx.NodeProto]] = {}
        for number, (place, limit) in enumerate(most.items()):
            shape = resolved.shapes.get(place.tensor, ())
            inside = _inside(shape, place.axis)
            if inside is not None and len(_allowed(shape, place)) > limit:
                self._sizes[place] = inside[1]
                self._fetched[place] = _positions_name(number) + "_picked"
                nodes.setdefault(place.tensor, []).extend(_gather(proto, place, inside[0], number))
            else:
                self._fetched[place] = place.tensor
                if place.tensor not in present:
                    present.add(place.tensor)
                    proto.graph.output.append(onnx.ValueInfoProto(name=place.tensor))
        self._shapes = {place: resolved.shapes[place.tensor] for place in self._sizes}
        self._names = sorted(set(self._fetched.values()))
        added, self._probed = probe.extend(proto) if probe is not None else ({}, ())
        for tensor, own in added.items():
            nodes.setdefault(tensor, []).extend(own)
        proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in self._probed)
        insert_behind(proto, nodes)
        self._session = open_session(proto, model.folder, providers=providers, threads=threads)

    def rows(self, batch: Batch, rng: np.random.Generator) -> dict[Place, Rows]:
        """Run one batch.

        Args:
            batch: what to feed.
            rng: draws the positions, the same for all samples of the batch.
        """
        return self.run(batch, rng)[0]

    def run(self, batch: Batch, rng: np.random.Generator) -> tuple[dict[Place, Rows], list[Array]]:
        """Run one batch: its rows, and what the probe asked for."""
        feeds = dict(batch.feeds)
        chosen: dict[Place, NDArray[np.int64]] = {}
        for number, (place, most) in enumerate(self._most.items()):
            if place in self._sizes:
                chosen[place] = np.sort(rng.choice(_allowed(self._shapes[place], place), most, replace=False))
                feeds[_positions_name(number)] = chosen[place]
        found = self._session.run([*self._names, *self._probed], feeds)
        values = dict(zip(self._names, found, strict=False))
        result = {}
        for place, most in self._most.items():
            value = values[self._fetched[place]]
            if place in chosen:
                kept = value[: len(value) * len(batch.samples) // batch.size]
                kept = np.moveaxis(kept, 1, 2) if place.axis == 1 else kept
                result[place] = Rows(kept, chosen[place])
            else:
                result[place] = _picked(value, place, most, batch, rng)
        return result, found[len(self._names) :]


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


def _allowed(shape: tuple[int | str, ...], place: Place) -> NDArray[np.int64]:
    """Positions that count; all but the ones that strides skip."""
    sizes = [size for axis, size in enumerate(shape) if axis not in (0, place.axis) and isinstance(size, int)]
    every = np.arange(math.prod(sizes))
    if not place.strides:
        return every
    skip = (slice(None),) * (len(sizes) - len(place.strides))
    return np.ravel(every.reshape(sizes)[(*skip, *(slice(None, None, step) for step in place.strides))])


def _positions_name(number: int) -> str:
    return f"lindep_onnx_positions_{number}"


def _gather(proto: onnx.ModelProto, place: Place, width: int, number: int) -> list[onnx.NodeProto]:
    positions = _positions_name(number)
    flat, shape, picked = (positions + what for what in ("_flat", "_shape", "_picked"))
    target = [0, width, -1] if place.axis == 1 else [0, -1, width]
    proto.graph.input.append(
        onnx.helper.make_tensor_value_info(positions, onnx.TensorProto.INT64, [positions + "_rows"])
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(target, dtype=np.int64), shape))
    proto.graph.output.append(onnx.ValueInfoProto(name=picked))
    return [
        onnx.helper.make_node("Reshape", [place.tensor, shape], [flat]),
        onnx.helper.make_node("Gather", [flat, positions], [picked], axis=2 if place.axis == 1 else 1),
    ]


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


def _picked(data: Array, place: Place, most: int, batch: Batch, rng: np.random.Generator) -> Rows:
    """Rows of a tensor that was fetched whole."""
    if place.axis == 0 or data.shape[0] % batch.size:
        data, axis = data[None], place.axis + 1
    else:
        data, axis = data[: len(data) * len(batch.samples) // batch.size], place.axis
    allowed = _allowed(data.shape, Place(place.tensor, axis, place.strides))
    if len(allowed) > most:
        allowed = np.sort(rng.choice(allowed, most, replace=False))
    values = rows_at(data, axis, allowed)
    if axis == place.axis and len(data) != len(batch.samples):  # several entries of the leading axis for one sample
        values = values.reshape(len(batch.samples), -1, values.shape[-1])
    return Rows(values, allowed)

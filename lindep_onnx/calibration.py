"""Run calibration data through the model and keep moments of what reaches each site, never the activations."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray

from lindep_onnx.channels import Atoms, Channels, Reader, Site
from lindep_onnx.data import Batch, Part, Samples
from lindep_onnx.errors import CalibrationError
from lindep_onnx.graph import Model, Node
from lindep_onnx.moments import Moments, MomentsAccumulator
from lindep_onnx.verify import open_session

__all__ = ["Calibration", "Features", "Flat", "Range", "Tap", "calibrate", "features", "observe_flats", "tap"]

Array: TypeAlias = NDArray[Any]
Progress: TypeAlias = Callable[[str, int, int], None]

#: Rows collected for each feature of a site, at most. Three effective rows are the least that joint dependence needs.
ROWS_PER_FEATURE = 16
#: Positions of one sample that are looked at, whatever the number of features.
LEAST_POSITIONS = 16
MOST_POSITIONS = 4096


@dataclass(frozen=True)
class Features:
    """How the places of a weight's input axis are features and taps.

    Attributes:
        atoms: (F,) atom of each feature.
        index: (F, T) places of each feature. T is 1 but behind a Flatten, where the positions of a channel follow
            each other: they are taps of one feature, so that the Gram matrix stays channels by channels.
    """

    atoms: Atoms
    index: NDArray[np.int64]


def features(columns: Atoms) -> Features:
    """Group the places of an axis by atom; where atoms occur unequally often, every place is its own feature."""
    atoms, inverse, counts = np.unique(columns, return_inverse=True, return_counts=True)
    if (counts != counts[0]).any():
        return Features(columns, np.arange(len(columns))[:, None])
    places = np.argsort(inverse, kind="stable").reshape(len(atoms), int(counts[0]))
    order = np.argsort(places[:, 0])
    return Features(atoms[order], places[order])


@dataclass(frozen=True)
class Tap:
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


def tap(site: Site, reader: Reader) -> Tap:
    """The tap of one reader of a site."""
    index = features(site.columns).index
    layout = hashlib.blake2b(index.astype("<i8").tobytes(), digest_size=8).hexdigest()
    return Tap(reader.tensor, reader.axis, reader.strides, layout)


@dataclass(frozen=True)
class Calibration:
    """What the data says about every tap.

    Attributes:
        fit: moments over the samples that folds are fitted to.
        select: moments over unseen samples that decide; None if there are none.
        samples: number of samples in each of the two parts.
        shapes: input shapes of the first batch, with one sample in it.
    """

    fit: Mapping[Tap, Moments]
    select: Mapping[Tap, Moments] | None
    samples: tuple[int, int]


def calibrate(
    channels: Channels,
    samples: Samples,
    *,
    providers: Sequence[str],
    threads: int,
    seed: int,
    progress: Progress,
) -> Calibration:
    """Take the moments of every site input.

    Args:
        channels: the traced model.
        samples: the data; its FIT and SELECT parts are used.
        providers: execution providers of ONNX Runtime.
        threads: intra-op threads, 0 for its own choice.
        seed: of the positions that are sampled.
        progress: called with (stage, samples done, samples in all).

    Raises:
        CalibrationError: an activation is not finite, naming the tensor.
        ModelError: ONNX Runtime cannot run the model.
    """
    wanted: dict[Tap, NDArray[np.int64]] = {}
    for site in channels.sites:
        for reader in site.readers:
            wanted.setdefault(tap(site, reader), features(site.columns).index)
    counts = len(samples.parts[Part.FIT]), len(samples.parts[Part.SELECT])
    if not wanted:
        return Calibration({}, {}, counts)
    tensors = sorted({place.tensor for place in wanted})
    session = open_session(with_outputs(channels.model, tensors), providers=providers, threads=threads)
    done, total = 0, sum(counts)
    rng = np.random.default_rng(seed)
    result: dict[Part, dict[Tap, MomentsAccumulator]] = {}
    for part in (Part.FIT, Part.SELECT):
        count = max(1, len(samples.parts[part]))
        result[part] = {place: MomentsAccumulator(len(index)) for place, index in wanted.items()}
        for batch in samples.batches(part):
            fetched = dict(zip(tensors, session.run(tensors, batch.feeds), strict=True))
            share = len(batch.samples)
            for place, index in wanted.items():
                most = int(np.clip(ROWS_PER_FEATURE * len(index) // count, LEAST_POSITIONS, MOST_POSITIONS))
                rows = _rows(fetched[place.tensor], place, index, most, batch, rng)
                try:
                    result[part][place].update(rows)
                except CalibrationError as error:
                    raise CalibrationError(f"Tensor {place.tensor!r} becomes NaN or infinite on this data.") from error
            done += share
            progress("calibrate", done, total)
    finished = {
        part: {place: accumulator.result() for place, accumulator in accumulators.items()}
        for part, accumulators in result.items()
    }
    return Calibration(
        fit=finished[Part.FIT],
        select=finished[Part.SELECT] if counts[1] else None,
        samples=counts,
    )


def _rows(
    data: Array, place: Tap, index: NDArray[np.int64], most: int, batch: Batch, rng: np.random.Generator
) -> Array:
    """(samples, rows, features) of a fetched tensor, filler left out; about `most` rows a sample.

    The positions are the same for all samples of the batch. A tensor whose leading axis is not the batch counts as one
    sample, which can only make the guards stricter.
    """
    if place.strides:
        steps = (slice(None),) * (place.axis + 1) + tuple(slice(None, None, step) for step in place.strides)
        data = data[steps]
    axis, samples = place.axis + 1, batch.size
    if place.axis == 0 or data.shape[0] % samples:
        data, samples = data[None], 1
    else:
        data = data.reshape(samples, -1, *data.shape[1:])[: len(batch.samples)]
    count, width = data.shape[0], data.shape[axis]
    before = math.prod(data.shape[1:axis])
    behind = math.prod(data.shape[axis + 1 :])
    data = data.reshape(count, before, width, behind)
    positions, taps = before * behind, index.shape[1]
    if taps == 1 and positions > most:
        chosen = np.sort(rng.choice(positions, most, replace=False))
        rows = np.moveaxis(data[:, chosen // behind, :, chosen % behind], 0, 1)
    else:
        rows = np.moveaxis(data, 2, 3).reshape(count, positions, width)
    if taps > 1:
        chosen = np.sort(rng.permutation(taps)[: max(1, most // positions)])
        return rows[:, :, index.T[chosen]].reshape(count, -1, len(index))
    places = index[:, 0]
    return rows if np.array_equal(places, np.arange(width)) else rows[:, :, places]


def with_outputs(model: Model, names: Iterable[str]) -> onnx.ModelProto:
    """A copy of the model that also puts out the given tensors."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    present = {value.name for value in proto.graph.output}
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in present)
    return proto


# ---- saturation ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flat:
    """A node that is constant on parts of its input range.

    Attributes:
        node: the node.
        parts: intervals of the input on which the output does not change.
    """

    node: Node
    parts: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Range:
    """Where the input of a node lies, over all positions of all samples.

    Attributes:
        low, high, mean, deviation: (channels,) along the labelled axis.
    """

    low: NDArray[np.float64]
    high: NDArray[np.float64]
    mean: NDArray[np.float64]
    deviation: NDArray[np.float64]


def observe_flats(
    channels: Channels,
    flats: Sequence[tuple[Flat, int]],
    samples: Samples,
    *,
    providers: Sequence[str],
    threads: int,
    progress: Progress,
) -> tuple[Range, ...]:
    """Measure the input range of nodes, channel by channel, inside the graph so that nothing large is fetched.

    Args:
        channels: the traced model.
        flats: the nodes, each with the channel axis of its input.
        samples: the data; its FIT and SELECT parts are used.
        providers: execution providers of ONNX Runtime.
        threads: intra-op threads, 0 for its own choice.
        progress: called with (stage, samples done, samples in all).
    """
    model = channels.model
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    fetched = []
    for number, (flat, axis) in enumerate(flats):
        tensor = flat.node.inputs[0]
        # The leading axis stays, so that filler samples can be left out.
        others = [other for other in range(len(channels.resolved.shapes[tensor])) if other not in (0, axis)]
        names = [f"lindep_onnx_{number}_{what}" for what in ("low", "high", "mean", "square")]
        proto.graph.node.append(onnx.helper.make_node("Mul", [tensor, tensor], [names[3] + "s"]))
        for op, name in zip(("ReduceMin", "ReduceMax", "ReduceMean"), names, strict=False):
            _append_reduction(proto, op, tensor, name, others, model.opset)
        _append_reduction(proto, "ReduceMean", names[3] + "s", names[3], others, model.opset)
        fetched.extend(names)
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in fetched)
    session = open_session(proto, providers=providers, threads=threads)
    summaries = (np.min, np.max, np.sum, np.sum)
    collected: list[list[Array]] = [[] for _ in fetched]
    rows = np.zeros(len(fetched))
    done, total = 0, len(samples.parts[Part.FIT]) + len(samples.parts[Part.SELECT])
    for batch in samples.batches(Part.FIT, Part.SELECT):
        for position, value in enumerate(session.run(fetched, batch.feeds)):
            kept = np.asarray(value[: len(value) * len(batch.samples) // batch.size], dtype=np.float64)
            collected[position].append(summaries[position % 4](kept, axis=0))
            rows[position] += len(kept)
        done += len(batch.samples)
        progress("saturation", done, total)
    ranges = []
    for start in range(0, len(fetched), 4):
        low, high, mean, square = (summaries[part](collected[start + part], axis=0) for part in range(4))
        mean, square = mean / rows[start], square / rows[start]
        ranges.append(Range(low, high, mean, np.sqrt(np.maximum(square - mean**2, 0.0))))
    return tuple(ranges)


def _append_reduction(proto: onnx.ModelProto, op: str, source: str, name: str, axes: Sequence[int], opset: int) -> None:
    if not axes:
        proto.graph.node.append(onnx.helper.make_node("Identity", [source], [name]))
    elif opset >= 18:
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(axes, dtype=np.int64), name + "_axes"))
        proto.graph.node.append(onnx.helper.make_node(op, [source, name + "_axes"], [name], keepdims=0))
    else:
        proto.graph.node.append(onnx.helper.make_node(op, [source], [name], axes=list(axes), keepdims=0))

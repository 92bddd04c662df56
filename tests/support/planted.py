"""Real topologies with random weights in which the removable channels are known, because they were planted.

The `onnx` wheel ships nine image classifiers whose weights are one repeated value. `build` gives each a full set of
random weights, tuned layer by layer on random images so that every channel is alive, and then overwrites a share of
the channels with planted ones:

| kind | channel | where |
|---|---|---|
| copy | a positive multiple of another channel | every axis that may be planted |
| dead | zero after its ReLU | wherever a ReLU precedes every reader |
| combination | three others, added with positive coefficients | only a ReLU on the way, and enough rows |
| constant | one positive value | every reader is a Gemm or a Conv without padding |

A combination survives its ReLU because its parents are never clipped, on any input: they read a non-negative tensor
through absolute values of random weights and add a positive shift. With positive coefficients the combination is
never clipped either. A MaxPool or a Sum on the way would break this, hence the condition.

All four are one rule. A planted channel is a linear combination of its partners (one for a copy, none for dead and
constant): at every Conv, Gemm, BatchNormalization, Mul and Add on the way its gain equals that of the partners, and
its filter, mean and shift are their combination; without partners the shift is a level below or above zero.
Channels that a Sum adds together form one axis and are planted alike in all their producers. No channel is planted
on an axis that a grouped Conv reads or writes, that passes an LRN, a Softmax or an unknown operator, or that is a
graph output; so shufflenet, all of whose axes meet a grouped Conv, carries no planted channel at all.

Images keep their 224 x 224 positions, since the topologies hold Reshape constants that assume them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from lindep_onnx.errors import UsageError

Kind = Literal["copy", "dead", "combination", "constant"]
Floats = NDArray[np.float32]

KINDS: tuple[Kind, ...] = ("copy", "dead", "combination", "constant")
NAMES = (
    "bvlc_alexnet",
    "densenet121",
    "inception_v1",
    "inception_v2",
    "resnet50",
    "shufflenet",
    "squeezenet",
    "vgg19",
    "zfnet512",
)

_TUNING_IMAGES = 16
_TUNING_POSITIONS = 256  # per image and channel: enough for a quantile, and a small sort
_PARENTS = 3
_ROWS_PER_FEATURE = 3
_ROWS_PER_SAMPLE = 16  # neighbouring positions repeat each other
_FIT_SHARE = 0.7  # of the samples; the rest selects and verifies
_COMBINED_SHARE = 0.25  # parents per input of their producer: more would depend on each other without a ReLU


@dataclass(frozen=True)
class PlantedChannel:
    """One channel that can be removed without a change of the outputs.

    A copy and its source, or a combination and its parents, are one dependent set: removing any one of them is
    equally right. So compare the number of channels removed per axis with the number planted there, not the indices.

    Attributes:
        kind: how it depends on the others.
        channel: its index among the output channels of every producer.
        producers: names of the Conv or Gemm nodes that compute it; several where a Sum links them.
        outputs: the output tensors of the producers.
        tensor: the first post-activation tensor that holds the channel.
        index: its index along axis 1 of `tensor`; differs from `channel` behind a Concat.
        readers: names of the Conv or Gemm nodes that read it.
        partners: channels of the same producers that it combines.
        coefficients: one per partner; in `tensor` the channel is this combination of the partners.
    """

    kind: Kind
    channel: int
    producers: tuple[str, ...]
    outputs: tuple[str, ...]
    tensor: str
    index: int
    readers: tuple[str, ...]
    partners: tuple[int, ...]
    coefficients: tuple[float, ...]


@dataclass(frozen=True)
class Planted:
    """A model with random weights and the record of what was planted in it."""

    name: str
    model: onnx.ModelProto
    channels: tuple[PlantedChannel, ...]

    def calibration(self, n: int, seed: int) -> dict[str, Floats]:
        """Images for the model's one input, shape [n, 3, 224, 224]; see `random_inputs`."""
        return {self.model.graph.input[0].name: random_inputs(self.name, n, seed)}


def build(name: str, *, seed: int, share: float = 0.25, samples: int = 64, kinds: Sequence[Kind] = KINDS) -> Planted:
    """Give a topology random weights and plant dependent channels.

    Weights start as N(0, 1 / fan-in) (He et al., arXiv 1502.01852, up to the factor that the data pass sets); each
    output channel is then scaled to a standard deviation of 0.7 to 1.4 and shifted so that 50 to 70 % of its values
    are positive on random images, residual sums included.

    Args:
        name: one of `NAMES`.
        seed: of weights, tuning images and planting; the same seed gives the same bytes on the same machine.
        share: of the channels of every axis that may be planted, from 0 up to but excluding 1.
        samples: calibration samples that the model will be compressed with; decides where combinations can be told
            from chance. A Gemm axis wider than this carries copies only.
        kinds: which kinds to plant; copies replace those that an axis does not allow.

    Returns:
        The model and one record per planted channel.

    Raises:
        UsageError: an unknown topology or kind, or a share or sample count outside its range.
    """
    if name not in NAMES:
        raise UsageError(f"No topology is called {name!r}; choose one of {', '.join(NAMES)}.")
    if not 0 <= share < 1:
        raise UsageError(f"share must be at least 0 and below 1, not {share}.")
    if samples < 1:
        raise UsageError(f"samples must be at least 1, not {samples}.")
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise UsageError(f"kinds must be among {', '.join(KINDS)}, not {unknown[0]!r}.")
    planting, weights, images = np.random.default_rng(seed).spawn(3)
    topology = Topology.load(name)
    plan = _plan(topology, share, samples, kinds, planting)
    inputs = _images(_TUNING_IMAGES, topology.shapes[topology.input.name][1:], images)
    parameters = _tune(topology, plan, inputs, weights)
    return Planted(name, topology.model(parameters), _records(topology, plan))


def build_plain(name: str, seed: int) -> Planted:
    """The same random weights with nothing planted: every channel is alive and independent."""
    return build(name, seed=seed, share=0.0)


def random_inputs(name: str, n: int, seed: int) -> Floats:
    """Random images for a topology: noise at five scales, each image with its own spectrum, contrast and colour.

    Args:
        name: one of `NAMES`.
        n: number of images.
        seed: of the noise.

    Returns:
        Array of shape [n, 3, 224, 224].

    Raises:
        UsageError: an unknown topology or no images at all.
    """
    if name not in NAMES:
        raise UsageError(f"No topology is called {name!r}; choose one of {', '.join(NAMES)}.")
    if n < 1:
        raise UsageError(f"n must be at least 1 image, not {n}.")
    return _images(n, (3, 224, 224), np.random.default_rng(seed))


def _images(n: int, shape: tuple[int, ...], rng: np.random.Generator) -> Floats:
    channels, height, width = shape
    images = np.empty((n, *shape), np.float32)
    for image in images:
        image[:] = 0.5 * rng.standard_normal((channels, 1, 1))
        for cells in (3, 7, 14, 56):
            coarse = rng.standard_normal((channels, cells, cells)) * rng.uniform(0.1, 1.0)
            image += _blend(height, cells) @ coarse @ _blend(width, cells).T
        image += rng.uniform(0.1, 0.5) * rng.standard_normal(shape)
        image *= rng.uniform(0.5, 1.5)
    return images


def _blend(size: int, cells: int) -> NDArray[np.float64]:
    """Linear interpolation from `cells` grid points to `size` positions, shape [size, cells]."""
    grid = np.linspace(0, cells - 1, size)[:, None]
    return np.maximum(0.0, 1.0 - np.abs(grid - np.arange(cells)))


# ---------------------------------------------------------------------------------------------------- topology


@dataclass(frozen=True)
class _Reader:
    """A Conv or Gemm that multiplies a channel axis by a weight."""

    node: int
    features: int  # channels it reads in all
    positions: int
    padded: bool
    active: bool  # a ReLU has come before


@dataclass
class _Axis:
    """Channels that live and die together: those of one producer, or of several whose outputs are summed."""

    width: int
    producers: list[int]
    readers: list[_Reader] = field(default_factory=list)
    combinable: int = 0  # combinations that can be exact: needs an input without negative values, and enough of it
    blocked: bool = False
    mixed: bool = False  # a MaxPool, a Sum or a second activation breaks combinations
    tensor: str = ""  # first post-activation tensor and the offset of channel 0 in it
    offset: int = 0


@dataclass(frozen=True)
class Topology:
    """A light model without its weights, and where the channels of each producer go.

    Attributes:
        source: the light model.
        nodes: everything that stays, each with a name of its own.
        shapes: of every tensor, for one image.
        stored: shape of every weight, by initializer.
        constants: integer tensors, the shapes of Reshape.
        origin: a weight as a node sees it to its initializer; they differ behind Unsqueeze and Reshape.
        layout: a tensor's channel axis as the list of the axes it joins; absent where it cannot be followed.
    """

    source: onnx.ModelProto
    nodes: tuple[onnx.NodeProto, ...]
    shapes: dict[str, tuple[int, ...]]
    stored: dict[str, tuple[int, ...]]
    constants: dict[str, NDArray[Any]]
    origin: dict[str, str]
    layout: dict[str, tuple[_Axis, ...]]

    @classmethod
    def load(cls, name: str) -> Topology:
        """Read a light model of the `onnx` wheel and follow its channels."""
        folder = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
        source = onnx.load(folder / f"light_{name}.onnx")
        inferred = onnx.shape_inference.infer_shapes(source, strict_mode=True, data_prop=True).graph
        shapes = {
            info.name: tuple(dim.dim_value for dim in info.type.tensor_type.shape.dim)
            for info in (*inferred.input, *inferred.value_info, *inferred.output)
        }
        nodes = [node for node in source.graph.node if node.op_type != "ConstantOfShape"]
        taken = Counter(node.name for node in nodes)
        for i, node in enumerate(nodes):
            if not node.name or taken[node.name] > 1:
                node.name = f"{node.op_type}_{i}"
        filled = {node.output[0] for node in source.graph.node if node.op_type == "ConstantOfShape"}
        initial = {tensor.name: numpy_helper.to_array(tensor) for tensor in source.graph.initializer}
        constants = {key: value for key, value in initial.items() if value.dtype == np.int64}
        origin = {key: key for key in filled | (initial.keys() - constants.keys())}
        for node in nodes:
            if node.op_type in ("Reshape", "Unsqueeze") and node.input[0] in origin:
                origin[node.output[0]] = origin[node.input[0]]
        used = {origin[key] for node in nodes for key in node.input if key in origin}
        stored = {key: shapes[key] for key in sorted(used)}
        topology = cls(source, tuple(nodes), shapes, stored, constants, origin, {})
        topology._follow()
        return topology

    @property
    def input(self) -> onnx.ValueInfoProto:
        """The image input; the other graph inputs are weights with an initializer, as in IR version 3."""
        initial = {tensor.name for tensor in self.source.graph.initializer}
        image: onnx.ValueInfoProto
        (image,) = (info for info in self.source.graph.input if info.name not in initial)
        return image

    def axes(self) -> Iterator[_Axis]:
        """Every channel axis once, in the order of its first producer."""
        seen: set[int] = set()
        for node in self.nodes:
            for axis in self.layout.get(node.output[0], ()):
                if id(axis) not in seen:
                    seen.add(id(axis))
                    yield axis

    def is_weight(self, node: onnx.NodeProto) -> bool:
        """Whether the node only reshapes a weight."""
        return node.output[0] in self.origin

    def model(self, parameters: dict[str, Floats]) -> onnx.ModelProto:
        """The topology with these weights as initializers, opset and IR version as in the light model."""
        model = onnx.ModelProto()
        model.CopyFrom(self.source)
        graph = model.graph
        for entries in (graph.node, graph.initializer, graph.input):
            del entries[:]
        graph.node.extend(self.nodes)
        used = {key for node in self.nodes for key in node.input}
        values = parameters | {key: value for key, value in self.constants.items() if key in used}
        graph.input.append(self.input)
        for key, value in values.items():
            graph.initializer.append(numpy_helper.from_array(value, key))
            kind = helper.np_dtype_to_tensor_dtype(value.dtype)
            graph.input.append(helper.make_tensor_value_info(key, kind, value.shape))
        return model

    def _follow(self) -> None:
        """Fill `layout`, one rule per operator."""
        layout = self.layout
        active, touched = set[str](), set[str]()  # all, or some, channels have passed a ReLU
        for i, node in enumerate(self.nodes):
            if self.is_weight(node):
                continue
            data = [key for key in node.input if key not in self.origin and key not in self.constants]
            joined = tuple(axis for key in data for axis in layout.get(key, ()))
            output, op = node.output[0], node.op_type
            if op not in ("Conv", "Gemm") and any(key in touched for key in data):
                touched.add(output)
                if op not in ("BatchNormalization", "Mul", "Add") and all(key in active for key in data):
                    active.add(output)
            if op in ("Conv", "Gemm"):
                grouped = _attribute(node, "group", 1) > 1
                for axis in joined:
                    axis.readers.append(self._reader(i, data[0], data[0] in active))
                    axis.blocked |= grouped
                inputs = self.shapes[data[0]][1] if data[0] in active else 0
                combinable = int(inputs * _COMBINED_SHARE) // _PARENTS
                layout[output] = (_Axis(self.shapes[output][1], [i], combinable=combinable, blocked=grouped),)
            elif op == "Concat" and _attribute(node, "axis", 1) == 1 and all(key in layout for key in data):
                layout[output] = joined
            elif op == "Sum" and self._link([layout.get(key, ()) for key in data]):
                layout[output] = layout[data[0]]
            elif op in ("BatchNormalization", "Mul", "Add") and len(data) == 1 and joined:
                layout[output] = joined
                for axis in joined:
                    axis.mixed |= data[0] in touched
            elif op == "Relu" and joined:
                layout[output], offset = joined, 0
                for axis in joined:
                    axis.mixed |= data[0] in touched
                    if not axis.tensor:
                        axis.tensor, axis.offset = output, offset
                    offset += axis.width
                active.add(output)
                touched.add(output)
            elif op == "MaxPool" and joined:
                layout[output] = joined
                for axis in joined:
                    axis.mixed = True
            elif op in ("AveragePool", "GlobalAveragePool", "Dropout") and joined:
                layout[output] = joined
            elif op == "Reshape" and joined and len(self.shapes[output]) == 2:
                layout[output] = joined  # flattened: each channel is a run of neighbouring features
            else:
                for axis in joined:
                    axis.blocked = True
        for info in self.source.graph.output:
            for axis in layout.get(info.name, ()):
                axis.blocked = True

    def _reader(self, i: int, data: str, active: bool) -> _Reader:
        channels = sum(axis.width for axis in self.layout[data])
        positions = int(np.prod(self.shapes[data][1:])) // channels
        return _Reader(i, channels, positions, any(_attribute(self.nodes[i], "pads", [])), active)

    def _link(self, layouts: list[tuple[_Axis, ...]]) -> bool:
        """Make the axes that a Sum adds one axis each; False where they do not match one to one."""
        first, *others = layouts
        widths = [axis.width for axis in first]
        if not first or any([axis.width for axis in other] != widths for other in others):
            return False
        for other in others:
            for kept, gone in zip(first, other, strict=True):
                kept.mixed = True
                if gone is kept:
                    continue
                kept.producers = sorted(kept.producers + gone.producers)
                kept.readers += gone.readers
                kept.blocked |= gone.blocked
                if gone.tensor and (not kept.tensor or gone.producers[0] < kept.producers[0]):
                    kept.tensor, kept.offset = gone.tensor, gone.offset
                for key, axes in self.layout.items():
                    self.layout[key] = tuple(kept if axis is gone else axis for axis in axes)
        return True


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


# ------------------------------------------------------------------------------------------------------ planting


@dataclass(frozen=True)
class _Plant:
    """What one channel of an axis becomes: a combination of its partners, or a level when it has none."""

    kind: Kind
    channel: int
    partners: tuple[int, ...]
    coefficients: tuple[float, ...]
    level: float


_Plan = list[tuple[_Axis, tuple[_Plant, ...]]]


def _plan(topology: Topology, share: float, samples: int, kinds: Sequence[Kind], rng: np.random.Generator) -> _Plan:
    """Choose the planted channels of every axis; combinations first, since they tie the gains of their parents."""
    plan: _Plan = []
    for axis in topology.axes():
        if axis.blocked or not axis.readers:
            continue
        allowed = [kind for kind in kinds if _allows(topology, axis, kind, samples)] or ["copy"]
        order = [int(channel) for channel in rng.permutation(axis.width)]
        count = min(round(share * axis.width), axis.width - 1)
        kept, free = order[count:], order[count:]
        plants = []
        for i, channel in enumerate(sorted(order[:count])):
            kind = allowed[i % len(allowed)]
            if kind == "combination" and (
                len(free) < 2 * _PARENTS or len(free) <= len(kept) - _PARENTS * axis.combinable
            ):
                kind = "copy"
            partners: tuple[int, ...] = ()
            coefficients: tuple[float, ...] = ()
            if kind == "combination":
                partners, free = tuple(free[:_PARENTS]), free[_PARENTS:]
                coefficients = tuple(rng.uniform(0.3, 1.0, _PARENTS).tolist())
            elif kind == "copy":
                partners = (int(rng.choice(kept)),)
                coefficients = (float(np.exp(rng.uniform(np.log(0.5), np.log(2.0)))),)
            level = rng.uniform(0.3, 1.0) * (-1.0 if kind == "dead" else 1.0)
            plants.append(_Plant(kind, channel, partners, coefficients, level))
        plan.append((axis, tuple(sorted(plants, key=lambda plant: plant.kind != "combination"))))
    return plan


def _allows(topology: Topology, axis: _Axis, kind: Kind, samples: int) -> bool:
    """Whether a kind is exact, and can be found, at every reader of an axis."""
    if kind == "copy":
        return True
    if topology.nodes[axis.producers[0]].op_type == "Gemm" and axis.width > samples:
        return False
    if kind == "dead":
        return all(reader.active for reader in axis.readers)
    if kind == "constant":
        return not any(reader.padded for reader in axis.readers)
    return not axis.mixed and all(
        _FIT_SHARE * samples * min(reader.positions, _ROWS_PER_SAMPLE) >= _ROWS_PER_FEATURE * reader.features
        for reader in axis.readers
    )


def _records(topology: Topology, plan: _Plan) -> tuple[PlantedChannel, ...]:
    return tuple(
        PlantedChannel(
            kind=plant.kind,
            channel=plant.channel,
            producers=tuple(topology.nodes[i].name for i in axis.producers),
            outputs=tuple(topology.nodes[i].output[0] for i in axis.producers),
            tensor=axis.tensor,
            index=axis.offset + plant.channel,
            readers=tuple(topology.nodes[reader.node].name for reader in axis.readers),
            partners=plant.partners,
            coefficients=plant.coefficients,
        )
        for axis, plants in plan
        for plant in sorted(plants, key=lambda plant: plant.channel)
    )


# ------------------------------------------------------------------------------------------------------- weights


@dataclass(frozen=True)
class _Rows:
    """The planted rows of one tensor's channel axis, Concat offsets included."""

    plants: tuple[tuple[int, tuple[int, ...], tuple[float, ...], float], ...]
    parents: list[int]  # of combinations

    @classmethod
    def of(cls, layout: tuple[_Axis, ...], plan: _Plan) -> _Rows:
        """Shift the plants of each joined axis to its place."""
        plants: list[tuple[int, tuple[int, ...], tuple[float, ...], float]] = []
        parents: list[int] = []
        offset = 0
        for axis in layout:
            for plant in next((plants for planned, plants in plan if planned is axis), ()):
                partners = tuple(offset + partner for partner in plant.partners)
                plants.append((offset + plant.channel, partners, plant.coefficients, plant.level))
                if plant.kind == "combination":
                    parents += partners
            offset += axis.width
        return cls(tuple(plants), parents)

    def combine(self, values: NDArray[Any], *, levels: bool = False) -> None:
        """Overwrite planted rows (axis 0) by the combination of their partners; by a level or 0 without partners."""
        for row, partners, coefficients, level in self.plants:
            if partners:
                values[row] = np.tensordot(np.array(coefficients), values[list(partners)], axes=1)
            else:
                values[row] = level if levels else 0.0

    def tie(self, gains: NDArray[np.float64]) -> None:
        """Give planted rows, and all parents of one combination, the gain of the first partner; 1 without one."""
        for row, partners, _, _ in self.plants:
            gains[[row, *partners]] = gains[partners[0]] if partners else 1.0


def _tune(topology: Topology, plan: _Plan, images: Floats, rng: np.random.Generator) -> dict[str, Floats]:
    """Draw all weights in one sweep from input to output, each tuned to the data that reaches it.

    Returns:
        Initializer name to value, in the shape that is stored.
    """
    values: dict[str, Floats] = {topology.input.name: images}
    waiting = Counter(key for node in topology.nodes for key in node.input)
    readers = {key: node for node in topology.nodes for key in node.input}
    parameters: dict[str, Floats] = {}

    def store(key: str, value: NDArray[Any]) -> None:
        name = topology.origin[key]
        parameters[name] = value.astype(np.float32).reshape(topology.stored[name])

    for node in topology.nodes:
        if topology.is_weight(node):
            continue
        op, output = node.op_type, node.output[0]
        # What a Sum will add to this output decides its shift as well.
        summed = waiting[output] == 1 and readers[output].op_type == "Sum"
        rest = [values[key] for key in readers[output].input if key in values] if summed else []
        own = [key for key in node.input if key in topology.origin]
        if own:
            response = values[next(key for key in node.input if key in values)]
            rows = _Rows.of(topology.layout.get(output, ()), plan)
        if op in ("Conv", "Gemm"):
            weight = rng.standard_normal(topology.shapes[own[0]], np.float32)
            weight[rows.parents] = np.abs(weight[rows.parents])
            response = _run(topology, node, response, weight)
            scale = rng.uniform(0.7, 1.4, len(weight)) / _sampled(response).std(0)
            weight *= _along(scale, weight.ndim, 0)
            response *= _along(scale, response.ndim, 1)
            rows.combine(weight)
            rows.combine(response.swapaxes(0, 1))
            store(own[0], weight)
            if own[1:]:
                shift = _shift(response, rest, rows, rng)
                store(own[1], shift)
                response += _along(shift, response.ndim, 1)
        elif op == "BatchNormalization" and own:
            sampled = _sampled(response)
            scale = rng.uniform(0.7, 1.4, (sampled.shape[1],))
            mean = sampled.mean(0) + 0.1 * sampled.std(0) * rng.standard_normal(sampled.shape[1])
            variance = sampled.var(0) * rng.uniform(0.8, 1.25, sampled.shape[1])
            for gains in (scale, variance):
                rows.tie(gains)
            rows.combine(mean)
            gain = scale / np.sqrt(variance + _attribute(node, "epsilon", 1e-5))
            response = response * _along(gain, response.ndim, 1)
            shift = _shift(response, rest, rows, rng)
            for key, value in zip(own, (scale, shift + gain * mean, mean, variance), strict=True):
                store(key, value)
            response += _along(shift, response.ndim, 1)
        elif op == "Mul" and own:
            gain = rng.uniform(0.7, 1.4, (response.shape[1],))
            rows.tie(gain)
            store(own[0], gain)
            response = response * _along(gain, response.ndim, 1)
        elif op == "Add" and own:
            shift = _shift(response, rest, rows, rng)
            store(own[0], shift)
            response = response + _along(shift, response.ndim, 1)
        else:
            response = _run(topology, node, *(values[key] for key in node.input if key in values))
        values[output] = response
        for key in node.input:
            waiting[key] -= 1
            if not waiting[key]:
                values.pop(key, None)
    return parameters


def _shift(response: Floats, rest: list[Floats], rows: _Rows, rng: np.random.Generator) -> NDArray[np.float64]:
    """The shift per channel that leaves 50 to 70 % of the values positive; above zero for a combination's parent."""
    total = np.add.reduce([response, *rest])
    sampled = _sampled(total)
    active = rng.uniform(0.5, 0.7, (sampled.shape[1],))
    ordered = np.sort(sampled, axis=0)
    at = (1.0 - active) * (len(ordered) - 1)
    below, channel = at.astype(int), np.arange(len(active))
    low, high = ordered[below, channel], ordered[np.minimum(below + 1, len(ordered) - 1), channel]
    shift: NDArray[np.float64] = -(low + (at - below) * (high - low))
    shift[rows.parents] = rng.uniform(0.1, 0.3, len(rows.parents))
    rows.combine(shift, levels=True)
    return shift


def _sampled(response: Floats) -> NDArray[np.float64]:
    """Values per channel at evenly spread positions, shape [rows, channels]; the stride is odd to vary the column."""
    flat = response.reshape(*response.shape[:2], -1)
    stride = -(-flat.shape[2] // _TUNING_POSITIONS) | 1
    rows: Floats = np.moveaxis(flat[:, :, ::stride], 1, 2).reshape(-1, flat.shape[1])
    return rows.astype(np.float64)


def _along(vector: NDArray[Any], ndim: int, axis: int) -> Floats:
    """A vector as a float32 array that broadcasts along one axis."""
    return vector.astype(np.float32).reshape([-1 if i == axis else 1 for i in range(ndim)])


def _run(topology: Topology, node: onnx.NodeProto, *inputs: Floats) -> Floats:
    """First output of one node on a batch of images; a Conv or Gemm without its bias."""
    single = onnx.NodeProto()
    single.CopyFrom(node)
    del single.output[1:], single.input[len(inputs) :]
    feeds: dict[str, NDArray[Any]] = dict(zip(single.input, inputs, strict=True))
    if node.op_type == "Reshape":
        shape = topology.constants[node.input[1]].copy()
        shape[0] = len(inputs[0])
        single.input.append(node.input[1])
        feeds[node.input[1]] = shape
    if node.op_type == "Gemm":
        # Opset 9 demands the addend.
        single.input.append("no_bias")
        feeds["no_bias"] = np.zeros(1, np.float32)
    given = [
        helper.make_tensor_value_info(key, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for key, value in feeds.items()
    ]
    result = helper.make_tensor_value_info(single.output[0], onnx.TensorProto.FLOAT, None)
    graph = helper.make_graph([single], "single", given, [result])
    model = helper.make_model(graph, opset_imports=topology.source.opset_import, ir_version=4)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, feeds)[0])

"""What a layer costs in time, by its width: the currency of a budget on latency.

MACs promise what kernels do not keep: a layer of half the width may take three quarters of the time, or half of it only
at widths that suit the kernel. So every distinct layer shape is run alone, at a few widths, and what lies between is
interpolated. The table prices units and predicts the latency of a plan. Whether the result is as fast as asked for is
measured on the whole model, original and result in turns.

Timings differ from run to run, and so may the plan. A table that is kept in a file makes the plan a function of the
inputs again.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray

from lindep_onnx.errors import LindepError, OutputError, UsageError
from lindep_onnx.files import replacing
from lindep_onnx.model.ir import Model
from lindep_onnx.model.node import Node
from lindep_onnx.model.shapes import Shape, ShapeInfo, resolve
from lindep_onnx.model.weighted import Weighted, weighted
from lindep_onnx.runtime.backend import Purpose, Runtime

Widths: TypeAlias = "tuple[int, int]"

#: Shares of the channels at which layers are timed, and what widths are rounded up to there.
SHARES, MULTIPLE = (0.25, 0.5, 0.75, 1.0), 8
#: Seconds that one width is timed for, and runs at least; the fastest counts.
TIMED, MIN_RUNS = 0.015, 5
VERSION = 1


@dataclass(frozen=True)
class Layer:
    """One weighted node at the widths that it has.

    Attributes:
        kind: everything that its time depends on but the widths: operator, attributes, kernel, positions.
        widths: input and output channels.
        shape: of its input; the channel axis is `axis`.
        kernel: sizes of the weight behind the two channel axes.
        layout: what the node does with its weight.
        axis: channel axis of the input.
        node: the node itself.
    """

    kind: str
    widths: Widths
    shape: tuple[int, ...]
    kernel: tuple[int, ...]
    layout: Weighted
    axis: int
    node: Node

    @property
    def depthwise(self) -> bool:
        """Whether every channel is a group of its own."""
        return self.layout.group > 1 and self.layout.group == self.widths[0]


@dataclass(frozen=True)
class LatencyTable:
    """Seconds of layers, by kind and widths.

    Attributes:
        seconds: by kind, a grid of input widths, of output widths, and the seconds at each pair.
    """

    seconds: Mapping[str, tuple[tuple[int, ...], tuple[int, ...], NDArray[np.float64]]]

    def predict(self, layer: Layer) -> float:
        """Seconds of a layer, interpolated between the widths that were measured; 0 for unknown kinds."""
        if layer.kind not in self.seconds:
            return 0.0
        inputs, outputs, grid = self.seconds[layer.kind]
        along = [float(np.interp(layer.widths[1], outputs, row)) for row in grid]
        return float(np.interp(layer.widths[0], inputs, along))

    def total(self, found: Sequence[Layer]) -> float:
        """Seconds of several layers."""
        return sum(self.predict(layer) for layer in found)

    def rate(self, layer: Layer) -> float:
        """Seconds that a multiply-accumulate is worth when the layer gets narrower."""
        half = max(1, layer.widths[0] // 2), max(1, layer.widths[1] // 2)
        share = 0.5 if layer.depthwise else 0.75
        gained = max(0.0, self.predict(layer) - self.predict(replace(layer, widths=half))) / share
        return gained / max(1.0, _macs(layer))

    def save(self, path: Path) -> None:
        """Write the table as JSON, in one step.

        Raises:
            OutputError: the file cannot be written.
        """
        values = {kind: [list(i), list(o), grid.tolist()] for kind, (i, o, grid) in sorted(self.seconds.items())}
        try:
            with replacing(path) as staged:
                staged.write_text(json.dumps({"version": VERSION, "seconds": values}, indent=1), encoding="utf-8")
        except OSError as error:
            raise OutputError(f"{path}: cannot be written ({error.strerror or error}).") from error

    @staticmethod
    def load(path: Path) -> LatencyTable:
        """Read what `save` wrote.

        Raises:
            UsageError: it is no such table.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values["version"] != VERSION:
                raise ValueError("another version")
            found = {}
            for kind, (inputs, outputs, grid) in values["seconds"].items():
                numbers = np.array(grid, dtype=np.float64)
                if numbers.shape != (len(inputs), len(outputs)) or not (np.isfinite(numbers) & (numbers >= 0)).all():
                    raise ValueError("sizes or times that cannot be")
                found[str(kind)] = tuple(map(int, inputs)), tuple(map(int, outputs)), numbers
            return LatencyTable(found)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            fault = f"{path} is no table of latencies ({error})"
            raise UsageError(
                f"--latency-table: {fault}; name a file that does not exist to have one measured."
            ) from error


def layers(model: Model, inputs: Mapping[str, Shape]) -> list[Layer]:
    """The weighted nodes of a model whose shapes are known, with inputs of the shapes that count."""
    shape_info = resolve(model, inputs)
    return [layer for node in model.nodes if (layer := _layer(node, shape_info)) is not None]


def _layer(node: Node, shape_info: ShapeInfo) -> Layer | None:
    layout, weight = weighted(node), shape_info.constants.get(node.input(1))
    shape = shape_info.shapes.get(node.input(0))
    if layout is None or weight is None or not shape or not all(isinstance(size, int) for size in shape):
        return None
    if weight.ndim < 2 or node.attributes.get("transA", 0) or (node.op == "MatMul" and weight.ndim > 2):
        return None
    fixed = tuple(int(size) for size in shape)
    axis = len(fixed) - 1 if node.op == "MatMul" else 1
    kernel = weight.shape[2:]
    others = tuple(size for place, size in enumerate(fixed) if place != axis)
    attributes = {key: value for key, value in sorted(node.attributes.items()) if key not in ("group", "alpha", "beta")}
    groups = "depthwise" if layout.depthwise(weight.shape) else layout.group
    kind = f"{node.op} {others} {kernel} {groups} {weight.dtype} {attributes}"
    return Layer(kind, layout.widths(weight.shape), fixed, tuple(map(int, kernel)), layout, axis, node)


def _macs(layer: Layer) -> float:
    positions = math.prod(size for place, size in enumerate(layer.shape) if place != layer.axis)
    strides = math.prod(layer.node.attributes.get("strides", ())) if layer.node.op == "Conv" else 1
    pairs = layer.widths[0] * layer.widths[1] / layer.layout.group
    return positions * pairs * math.prod(layer.kernel) / max(1, strides)


def measure_table(found: Sequence[Layer], opset: int, runtime: Runtime) -> LatencyTable:
    """Time every kind of layer at a few widths."""
    seconds = {}
    for kind in dict.fromkeys(layer.kind for layer in found):
        layer = max((other for other in found if other.kind == kind), key=lambda other: math.prod(other.widths))
        inputs, outputs = (_grid(width, layer.layout.group) for width in layer.widths)
        grid = np.zeros((len(inputs), len(outputs)))
        for i, o in np.ndindex(grid.shape):
            if layer.depthwise and i != min(o, len(inputs) - 1):
                continue
            try:
                grid[i, o] = _time(layer, (inputs[i], outputs[o]), opset, runtime)
            except LindepError:  # a width that the operator does not take: as slow as the whole
                grid[i, o] = np.nan
        if layer.depthwise:  # the two widths are one
            grid[:] = np.diagonal(grid)[:, None] if grid.shape[0] == grid.shape[1] else grid.max(axis=0)
        grid = np.where(np.isnan(grid), np.nanmax(grid) if not np.isnan(grid).all() else 0.0, grid)
        seconds[kind] = inputs, outputs, grid
    return LatencyTable(seconds)


def _grid(width: int, group: int) -> tuple[int, ...]:
    step = MULTIPLE * (group if 1 < group < width else 1)
    return tuple(sorted({min(width, -(-round(share * width) // step) * step) for share in SHARES}))


def _time(layer: Layer, widths: Widths, opset: int, runtime: Runtime) -> float:
    """Seconds of one layer alone, the fastest of several runs."""
    before, after = widths
    node, layout = layer.node, replace(layer.layout, group=before if layer.depthwise else layer.layout.group)
    shape = tuple(before if place == layer.axis else size for place, size in enumerate(layer.shape))
    rng = np.random.default_rng(0)
    constants = {"w": rng.standard_normal(layout.weight_shape(widths, layer.kernel), dtype=np.float32)}
    if node.op == "Gemm" and opset < 11:
        constants["c"] = np.zeros(after, np.float32)
    attributes = {**node.attributes, **({"group": layout.group} if node.op in ("Conv", "ConvTranspose") else {})}
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(node.op, ["x", *constants], ["y"], **attributes)],
        "layer",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
        [onnx.helper.make_empty_tensor_value_info("y")],
        [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=8)
    session = runtime.open(model, purpose=Purpose.TIME)
    feeds = {"x": rng.standard_normal(shape, dtype=np.float32)}
    session.run(None, feeds)
    taken: list[float] = []
    stop = time.perf_counter() + TIMED
    while len(taken) < MIN_RUNS or time.perf_counter() < stop:
        start = time.perf_counter()
        session.run(None, feeds)
        taken.append(time.perf_counter() - start)
    return min(taken)

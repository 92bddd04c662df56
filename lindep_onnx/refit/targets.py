"""Which products are refitted, and what the original says that each should give.

Where the product only feeds an Add whose other operand is computed already, the target is the original *sum* less that
operand, so that the layer also makes up for the error of the other branch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lindep_onnx.data.samples import Batch
from lindep_onnx.linalg.fold import Matrix
from lindep_onnx.linalg.linear_map import ChannelMaps, LinearMap
from lindep_onnx.model.node import Node
from lindep_onnx.model.weighted import weighted
from lindep_onnx.refit.patches import unknowns
from lindep_onnx.runtime.backend import Pool
from lindep_onnx.runtime.rows import ChannelAxis, RowSampler
from lindep_onnx.structure.types import Product, Structure

Array: TypeAlias = NDArray[Any]

#: Wider problems keep their fold: the Gram matrix alone would take a gigabyte.
WIDEST = 8192


@dataclass(frozen=True)
class Task:
    """One product to refit.

    Attributes:
        product: in the compressed model.
        unknowns: weights of one of its outputs.
        place: what the original is asked for.
        channels: from the place's channels to the outputs of the compressed model; None where they are the same.
        scale, shift: (M,) z = scale y + shift leads from the product to the place.
        other: operand that is added to z; empty if none.
    """

    product: Product
    unknowns: int
    place: ChannelAxis
    channels: LinearMap | None
    scale: Matrix
    shift: Matrix
    other: str


def tasks_of(
    original: Structure, maps: ChannelMaps, compressed: Structure, *, residual: bool
) -> tuple[list[Task], tuple[str, ...]]:
    """Every product whose input is no longer that of the original, and the outputs of those that are too wide.

    Args:
        original: the original model, traced.
        maps: from its tensors to those of the compressed model.
        compressed: the result of folding, traced.
        residual: whether targets are sums where that is possible.
    """
    changed = _changed(original, maps)
    readers = Counter(product.weight for product in compressed.products)
    known = {product.reader.output for product in original.products}
    tasks, skipped = [], []
    for product in compressed.products:
        output = product.reader.output
        if product.reader.tensor not in changed or output not in known or readers[product.weight] > 1:
            continue
        if not _replaceable(product, compressed):
            continue
        task = _task(product, original, maps, compressed, residual)
        if task is not None and task.unknowns > WIDEST:
            skipped.append(output)
        elif task is not None:
            tasks.append(task)
    return tasks, tuple(skipped)


def _replaceable(product: Product, compressed: Structure) -> bool:
    """Whether nobody else reads the weight, and it and the bias can be replaced."""
    model, layout = compressed.model, weighted(compressed.model.nodes[product.reader.node], product.position)
    stored = product.weight in model.stored and product.weight not in (*model.fixed, *model.outputs)
    alone = len(model.consumers.get(product.weight, ())) <= 1
    given = layout.bias if layout is not None else ""
    return stored and alone and (not given or given in compressed.shape_info.constants) and product.reader.axis > 0


def _changed(original: Structure, maps: ChannelMaps) -> set[str]:
    """Computed tensors that differ from the original's, in channels or in values."""
    changed: set[str] = set()
    for node in original.model.nodes:
        touched = any(name in changed for name in (*node.inputs, *node.captures))
        if touched or any(maps.touches(name) for name in node.outputs if name):
            changed.update(name for name in node.outputs if name)
    return changed


def _task(
    product: Product, original: Structure, maps: ChannelMaps, compressed: Structure, residual: bool
) -> Task | None:
    axis = product.reader.output_axis
    size = compressed.shape_info.constants[product.weight].shape[product.outputs]
    outputs = size * (product.group if product.outputs == 1 else 1)
    tensor, other, scale, shift = product.reader.output, "", np.ones(outputs), np.zeros(outputs)
    behind = _sum_behind(product, compressed, outputs) if residual else None
    if behind is not None:
        tensor, other, scale, shift = behind
    channels = maps.of(tensor, axis)
    full = original.shape_info.shapes.get(tensor, ())
    if axis >= len(full) or not isinstance(full[axis], int):
        return None
    width = int(full[axis]) if channels is None else channels.width
    count = unknowns(product, compressed.shape_info.constants[product.weight].shape)
    found = Task(product, count, ChannelAxis(tensor, axis), channels, scale, shift, other)
    return found if width == outputs else None


def _sum_behind(product: Product, compressed: Structure, outputs: int) -> tuple[str, str, Matrix, Matrix] | None:
    """A sum that the product only feeds, what is added there, and the scale and shift (M,) up to it; None if none."""
    tensor, other = product.reader.output, ""
    scale, shift = np.ones(outputs), np.zeros(outputs)
    while not other and tensor not in compressed.model.outputs:
        consumers = compressed.model.consumers.get(tensor, ())
        if len(consumers) != 1:
            break
        node = consumers[0]
        step = _affine(node, tensor, outputs, product.reader.output_axis, compressed)
        if step is not None:
            scale, shift = scale * step[0], shift * step[0] + step[1]
        else:
            operand = _other_operand(node, tensor, product, compressed)
            if operand is None:
                break
            other = operand
        tensor = node.outputs[0]
    # A channel that is multiplied by nothing has no target.
    if not other or np.abs(scale).min() <= 1e-6 * np.abs(scale).max():
        return None
    return tensor, other, scale, shift


def _affine(node: Node, tensor: str, outputs: int, axis: int, structure: Structure) -> tuple[Matrix, Matrix] | None:
    """(M,) factor and addend of a node that treats every channel alike at all positions; None for other nodes."""
    constants = structure.shape_info.constants
    if node.op in ("Identity", "Dropout") and not node.input(2):
        return np.ones(outputs), np.zeros(outputs)
    if node.op == "BatchNormalization" and axis == 1 and all(name in constants for name in node.inputs[1:5]):
        scale, shift, mean, variance = (constants[name].astype(np.float64) for name in node.inputs[1:5])
        factor = scale / np.sqrt(variance + float(node.attributes.get("epsilon", 1e-5)))
        return factor, shift - factor * mean
    if node.op in ("Add", "Mul") and len(node.inputs) == 2:
        value = constants.get(node.inputs[1] if node.inputs[0] == tensor else node.inputs[0])
        rank = len(structure.shape_info.shapes.get(tensor, ()))
        if value is None or value.ndim > rank:
            return None
        behind = rank - axis
        flat = value.astype(np.float64).ravel()
        if value.size == 1:
            flat = np.full(outputs, flat[0])
        elif value.size != outputs or value.ndim < behind or value.shape[value.ndim - behind] != outputs:
            return None
        return (np.ones(outputs), flat) if node.op == "Add" else (flat, np.zeros(outputs))
    return None


def _other_operand(node: Node, tensor: str, product: Product, compressed: Structure) -> str | None:
    """What an Add adds to a tensor, if it is of the same shape and known before the product is computed."""
    if node.op not in ("Add", "Sum") or len(node.inputs) != 2 or node.inputs[0] == node.inputs[1]:
        return None
    other = node.inputs[1] if node.inputs[0] == tensor else node.inputs[0]
    own, shape = (compressed.shape_info.shapes.get(name) for name in (tensor, other))
    producer = compressed.model.producer.get(other)
    before = producer is None or producer.index < product.reader.node
    same = own is not None and shape is not None and len(own) == len(shape) and own[1:] == shape[1:]
    return other if before and same and other not in compressed.shape_info.constants else None


class Targets:
    """Rows of the original model at the places of all tasks, in files.

    Args:
        sampler: of the original model.
        batches: the data.
        rng: draws the positions, for each batch on its own.
        folder: where the files go; it is made.
        pool: threads for several batches at a time.
    """

    def __init__(
        self, sampler: RowSampler, batches: Iterable[Batch], rng: np.random.Generator, folder: Path, pool: Pool
    ) -> None:
        folder.mkdir()
        self._folder = folder
        self._batches: list[dict[ChannelAxis, tuple[tuple[int, ...], NDArray[np.int64]]]] = []
        self._numbers: dict[ChannelAxis, int] = {}
        drawn = ((batch, rng.spawn(1)[0]) for batch in batches)
        for _, seen in pool.in_order(lambda given: sampler.run(*given), drawn):
            self._numbers = {place: number for number, place in enumerate(seen.rows)}
            entry = {}
            for place, rows in seen.rows.items():
                with self._path(place).open("ab") as file:
                    file.write(np.ascontiguousarray(rows.values, dtype=np.float32).data)
                entry[place] = (rows.values.shape, rows.positions)
            self._batches.append(entry)

    def _path(self, place: ChannelAxis) -> Path:
        return self._folder / f"{self._numbers[place]}.bin"

    def take(self, place: ChannelAxis) -> list[tuple[Array, NDArray[np.int64]]]:
        """Of every batch, (samples, rows, channels) and the positions of the rows."""
        if not self._batches:
            return []
        flat = np.fromfile(self._path(place), dtype=np.float32)
        sizes = np.cumsum([math.prod(batch[place][0]) for batch in self._batches])
        parts = np.split(flat, sizes[:-1])
        return [
            (part.reshape(shape), positions)
            for part, (shape, positions) in zip(parts, (batch[place] for batch in self._batches), strict=True)
        ]

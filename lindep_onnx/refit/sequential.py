"""Refit the weights of a compressed model, layer by layer, to what the original computes.

A product multiplies patches p (K = channels of one group x kernel taps; the zeros of a padding are data) by V (K x M)
and adds b. A fold chooses V from channel statistics alone. Here V and b solve the whole least-squares problem

    minimise  E || t - V' p - b ||^2 + ridge || D (V - V0) ||^2,   D^2 = diag(E p p'),

where t is the pre-activation of the *original* model at the same position, p comes from the *compressed* model that
runs up to this layer (mode "sequential") or from the original (mode "kernel"), and the ridge pulls towards the fold
V0, never towards zero. The bias is not ridged: V is solved about the means, b makes the means equal. The ridge is the
one whose solution errs least on samples that were not fitted.

Where the product only feeds an Add whose other operand is computed already, t is the original *sum* less that operand,
so that the layer also makes up for the error of the other branch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from lindep_onnx.data.samples import Part, Samples
from lindep_onnx.files import Scratch
from lindep_onnx.log import Log
from lindep_onnx.model.edit import GraphEdits
from lindep_onnx.model.ir import Node
from lindep_onnx.model.weighted import Window
from lindep_onnx.runtime.backend import Runtime
from lindep_onnx.runtime.rows import ChannelAxis, RowSampler, rows_at
from lindep_onnx.runtime.stages import Stages
from lindep_onnx.structure.placement import Placement
from lindep_onnx.structure.types import Product, Structure

Array: TypeAlias = NDArray[Any]
Matrix: TypeAlias = NDArray[np.float64]

#: Rows for each unknown of one output, rows at least, and bytes of patches at most.
ROWS_PER_UNKNOWN = 16
MIN_ROWS = 1 << 14
PATCH_BYTES = 1 << 28
#: Wider problems keep their fold: the Gram matrix alone would take a gigabyte.
WIDEST = 8192
RIDGES = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
FIRST_RIDGE = 3
CHUNK = 1 << 13


@dataclass(frozen=True)
class Refitted:
    """What a refit changes.

    Attributes:
        edits: new weights and biases of the compressed model.
        errors: for each product by output name, (before, after): RMS error relative to the centred target, unseen rows.
        skipped: output names of products that were too wide.
    """

    edits: GraphEdits
    errors: Mapping[str, tuple[float, float]]
    skipped: tuple[str, ...]


@dataclass(frozen=True)
class _Task:
    """One product to refit.

    Attributes:
        product: in the compressed model.
        place: what the original is asked for.
        rows: (M,) which channel of the place each output of the compressed model is.
        scale, shift: (M,) z = scale y + shift leads from the product to the place.
        other: operand that is added to z; empty if none.
    """

    product: Product
    place: ChannelAxis
    rows: NDArray[np.int64]
    scale: Matrix
    shift: Matrix
    other: str


def refit(
    original: Structure,
    removed: NDArray[np.bool_],
    compressed: Structure,
    samples: Samples,
    runtime: Runtime,
    log: Log,
    *,
    mode: Literal["kernel", "sequential"],
    seed: int,
) -> Refitted:
    """Refit every product whose input is no longer that of the original.

    Args:
        original: the original model, traced.
        removed: (units,) bool, what went.
        compressed: the result of folding, traced.
        samples: the data; FIT samples are fitted, SELECT samples choose the ridge.
        runtime: what models run on.
        log: told how far it is.
        mode: where the inputs of a layer come from, see the module.
        seed: of the positions that are sampled.
    """
    placement = Placement(original, removed)
    tasks, skipped = _tasks(original, placement, compressed, residual=mode == "sequential")
    edits: dict[str, Array] = {}
    operands: dict[tuple[int, int], Array] = {}
    errors: dict[str, tuple[float, float]] = {}
    if not tasks:
        return Refitted(GraphEdits(), errors, skipped)
    fitted = len(samples.parts[Part.FIT])
    most = {task.place: _positions(task.product, compressed, max(1, fitted)) for task in tasks}
    source = compressed if mode == "sequential" else original
    with (
        Scratch() as folder,
        Stages(source.model, source.shape_info, samples.batches(Part.FIT), runtime) as fit,
        Stages(source.model, source.shape_info, samples.batches(Part.SELECT), runtime) as select,
    ):
        sampler = RowSampler(original.model, original.shape_info, most, runtime)
        rng = np.random.default_rng(seed)
        targets = [_Targets(sampler, samples, part, rng, Path(folder) / part.value) for part in (Part.FIT, Part.SELECT)]
        for done, task in enumerate(tasks):
            node = task.product.reader.node
            at = node if source is compressed else original.model.producer[task.product.reader.output].index
            kept = placement.chosen_along(task.product.reader.tensor, task.product.reader.axis)
            data = []
            for stages, target in zip((fit, select), targets, strict=True):
                stages.run_to(at)
                data.append(_gathered(task, stages, target, kept if source is original else None))
            new, error = _refitted(task, compressed, *data)
            errors[task.product.reader.output] = error
            for name, value in new.weights.items():
                edits[name] = value
                for stages in (fit, select) if source is compressed else ():
                    stages.set_weight(name, value)
            for (index, position), value in new.operands.items():
                operands[index, position] = value
                for stages in (fit, select) if source is compressed else ():
                    stages.set_operand(compressed.model.nodes[index], position, value)
            log.progress("refit", done + 1, len(tasks))
    return Refitted(GraphEdits(constants=edits, inputs=operands), errors, skipped)


# ---- which products, and their targets ----------------------------------------------------------------------------


def _tasks(
    original: Structure, placement: Placement, compressed: Structure, *, residual: bool
) -> tuple[list[_Task], tuple[str, ...]]:
    changed = _changed(original, placement)
    readers: dict[str, int] = {}
    for product in compressed.products:
        readers[product.weight] = readers.get(product.weight, 0) + 1
    known = {product.reader.output: product for product in original.products}
    tasks, skipped = [], []
    for product in compressed.products:
        output = product.reader.output
        if product.reader.tensor not in changed or output not in known or readers[product.weight] > 1:
            continue
        if len(compressed.model.consumers.get(product.weight, ())) > 1 or not _free(product, compressed):
            continue
        if _unknowns(product, compressed) > WIDEST:
            skipped.append(output)
            continue
        task = _task(product, original, placement, compressed, residual)
        if task is not None:
            tasks.append(task)
    return tasks, tuple(skipped)


def _free(product: Product, compressed: Structure) -> bool:
    """Whether the weight and the bias can be replaced."""
    model = compressed.model
    stored = product.weight in model.stored and product.weight not in (*model.overridable, *model.outputs)
    node = model.nodes[product.reader.node]
    given = node.input(2) if node.op in ("Conv", "ConvTranspose", "Gemm") else ""
    return stored and (not given or given in compressed.shape_info.constants) and product.reader.axis > 0


def _changed(original: Structure, placement: Placement) -> set[str]:
    """Computed tensors that differ from the original's, in channels or in values."""
    changed: set[str] = set()
    for node in original.model.nodes:
        touched = any(name in changed for name in (*node.inputs, *node.captures))
        if touched or any(placement.kept(name) for name in node.outputs if name):
            changed.update(name for name in node.outputs if name)
    return changed


def _task(
    product: Product, original: Structure, placement: Placement, compressed: Structure, residual: bool
) -> _Task | None:
    model, constants = compressed.model, compressed.shape_info.constants
    axis = product.reader.output_axis
    size = compressed.shape_info.constants[product.weight].shape[product.outputs]
    outputs = size * (product.group if product.window is not None and product.window.transposed else 1)
    scale, shift = np.ones(outputs), np.zeros(outputs)
    tensor, other = product.reader.output, ""
    while True:
        consumers = model.consumers.get(tensor, ())
        if len(consumers) != 1 or tensor in model.outputs:
            break
        node = consumers[0]
        step = _affine(node, tensor, constants, outputs, axis, compressed)
        if step is not None:
            scale, shift = scale * step[0], shift * step[0] + step[1]
        else:
            operand = _other_operand(node, tensor, product, compressed) if residual and not other else None
            if operand is None:
                break
            other = operand
        tensor = node.outputs[0]
    if not other:
        tensor, scale, shift = product.reader.output, np.ones(outputs), np.zeros(outputs)
    if np.abs(scale).min() <= 1e-6 * np.abs(scale).max():  # a channel that is multiplied by nothing has no target
        tensor, other = product.reader.output, ""
        scale, shift = np.ones(outputs), np.zeros(outputs)
    chosen = placement.chosen_along(tensor, axis)
    full = original.shape_info.shapes.get(tensor, ())
    if axis >= len(full) or not isinstance(full[axis], int):
        return None
    rows = np.arange(int(full[axis])) if chosen is None else chosen
    if len(rows) != outputs:
        return None
    return _Task(product, ChannelAxis(tensor, axis), rows, scale, shift, other)


def _affine(
    node: Node, tensor: str, constants: Mapping[str, Array], outputs: int, axis: int, structure: Structure
) -> tuple[Matrix, Matrix] | None:
    """(M,) factor and addend of a node that treats every channel alike at all positions; None for other nodes."""
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
    shapes = compressed.shape_info.shapes
    producer = compressed.model.producer.get(other)
    before = producer is None or producer.index < product.reader.node
    same = shapes.get(other) is not None and len(shapes[other]) == len(shapes.get(tensor, ()))
    same = same and all(a == b for a, b in zip(shapes[other][1:], shapes[tensor][1:], strict=True))
    return other if before and same and other not in compressed.shape_info.constants else None


def _unknowns(product: Product, structure: Structure) -> int:
    weight = structure.shape_info.constants[product.weight]
    taps = math.prod(product.window.kernel) if product.window is not None else 1
    inputs = weight.shape[product.inputs]
    if product.window is not None and product.window.transposed:
        inputs //= product.group
    return int(inputs) * taps


def _positions(product: Product, structure: Structure, samples: int) -> int:
    unknowns = _unknowns(product, structure)
    wanted = max(MIN_ROWS, ROWS_PER_UNKNOWN * unknowns)
    most = PATCH_BYTES // max(1, 4 * unknowns * product.group)
    return max(1, min(wanted, most) // samples)


class _Targets:
    """Rows of the original model at the places of all tasks, in files."""

    def __init__(
        self, sampler: RowSampler, samples: Samples, part: Part, rng: np.random.Generator, folder: Path
    ) -> None:
        folder.mkdir()
        self._folder = folder
        self._batches: list[dict[ChannelAxis, tuple[tuple[int, ...], NDArray[np.int64]]]] = []
        self._numbers: dict[ChannelAxis, int] = {}
        for batch in samples.batches(part):
            found = sampler.run(batch, rng).rows
            self._numbers = {place: number for number, place in enumerate(found)}
            entry = {}
            for place, rows in found.items():
                with self._path(place).open("ab") as file:
                    file.write(np.ascontiguousarray(rows.values, dtype=np.float32).tobytes())
                entry[place] = (rows.values.shape, rows.positions)
            self._batches.append(entry)

    def _path(self, place: ChannelAxis) -> Path:
        return self._folder / f"{self._numbers[place]}.bin"

    def positions(self, place: ChannelAxis, batch: int) -> NDArray[np.int64]:
        return self._batches[batch][place][1]

    def take(self, place: ChannelAxis) -> list[Array]:
        """Rows of every batch, (samples, rows, channels)."""
        if not self._batches:
            return []
        flat = np.fromfile(self._path(place), dtype=np.float32)
        sizes = np.cumsum([math.prod(batch[place][0]) for batch in self._batches])
        parts = np.split(flat, sizes[:-1])
        return [part.reshape(batch[place][0]) for part, batch in zip(parts, self._batches, strict=True)]


# ---- rows of one product ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rows:
    """Patches (G, N, K) and the output that the product should have there (G, N, M)."""

    patches: Array
    target: Matrix


def _gathered(task: _Task, stages: Stages, targets: _Targets, kept: NDArray[np.int64] | None) -> _Rows:
    product = task.product
    patches, others = [], []
    wanted = targets.take(task.place)
    for number, _ in enumerate(wanted):
        positions = targets.positions(task.place, number)
        data = stages.tensor(number, product.reader.tensor)
        if data is None:
            raise AssertionError(f"{product.reader.tensor} is not in the frontier")
        if kept is not None:
            data = np.take(data, kept, product.reader.axis)
        patches.append(_patches(data, product, positions))
        if task.other:
            other = stages.tensor(number, task.other)
            if other is None:
                raise AssertionError(f"{task.other} is not in the frontier")
            rows = rows_at(other, task.place.axis, positions)
            others.append(rows.reshape(-1, rows.shape[-1]))
    kept_rows = [value[:, :, task.rows].reshape(-1, len(task.scale)).astype(np.float64) for value in wanted]
    z = np.concatenate(kept_rows) if kept_rows else np.zeros((0, len(task.scale)))
    if others:
        z -= np.concatenate(others)
    target = (z - task.shift) / task.scale
    return _Rows(
        patches=np.concatenate(patches, axis=1) if patches else np.zeros((product.group, 0, 0), np.float32),
        target=np.moveaxis(target.reshape(len(target), product.group, -1), 1, 0),
    )


def _patches(data: Array, product: Product, positions: NDArray[np.int64]) -> Array:
    """(groups, samples x rows, channels of a group x taps) float32."""
    if product.window is None:
        rows = rows_at(data, product.reader.axis, positions)
        return np.ascontiguousarray(rows.reshape(1, -1, rows.shape[-1]), dtype=np.float32)
    taps = _taps(product.window, data.shape[2:], positions)  # (rows, T), the last place is a zero
    count, channels = data.shape[:2]
    flat = np.concatenate([data.reshape(count, channels, -1), np.zeros((count, channels, 1), data.dtype)], axis=2)
    picked = flat[:, :, taps]  # (samples, channels, rows, T)
    grouped = picked.reshape(count, product.group, channels // product.group, *taps.shape)
    ordered = grouped.transpose(1, 0, 3, 2, 4)  # (groups, samples, rows, channels, T)
    return np.ascontiguousarray(ordered.reshape(product.group, count * len(positions), -1), dtype=np.float32)


def _taps(window: Window, sizes: Sequence[int], positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """(rows, T) flat input positions that each output position combines; the number of positions means a zero."""
    outputs = [window.output_size(axis, size) for axis, size in enumerate(sizes)]
    places = np.unravel_index(positions, outputs)
    flat = np.zeros((len(positions), 1), dtype=np.int64)
    valid = np.ones((len(positions), 1), dtype=bool)
    for axis, size in enumerate(sizes):
        offsets = np.arange(window.kernel[axis]) * window.dilations[axis]
        begin, stride = window.pads[axis][0], window.strides[axis]
        if window.transposed:
            spread = places[axis][:, None] + begin - offsets
            at, inside = spread // stride, spread % stride == 0
        else:
            at = places[axis][:, None] * stride - begin + offsets
            inside = np.ones(at.shape, dtype=bool)
        inside = inside & (at >= 0) & (at < size)
        flat = (flat[:, :, None] * size + np.clip(at, 0, size - 1)[:, None, :]).reshape(len(positions), -1)
        valid = (valid[:, :, None] & inside[:, None, :]).reshape(len(positions), -1)
    return np.where(valid, flat, math.prod(sizes))


# ---- the weight as a matrix ---------------------------------------------------------------------------------------


def _matrix(weight: Array, product: Product) -> Matrix:
    """(G, K, M): the weight with its scale, ordered like the patches."""
    value = weight.astype(np.float64) * product.scale
    groups = product.group
    if product.window is None:
        return np.moveaxis(value, (product.inputs, product.outputs), (0, 1))[None]
    taps = math.prod(product.window.kernel)
    if product.window.transposed:  # (C, M of a group, *kernel)
        parts = value.reshape(groups, value.shape[0] // groups, value.shape[1], taps)
        return parts.transpose(0, 1, 3, 2).reshape(groups, -1, value.shape[1])
    parts = value.reshape(groups, value.shape[0] // groups, value.shape[1], taps)
    return parts.transpose(0, 2, 3, 1).reshape(groups, -1, value.shape[0] // groups)


def _weight(matrix: Matrix, product: Product, like: Array) -> Array:
    """Undo `_matrix`."""
    groups, _, outputs = matrix.shape
    value = matrix / product.scale
    if product.window is None:
        plain = np.moveaxis(value[0], (0, 1), (product.inputs, product.outputs))
    else:
        parts = value.reshape(groups, -1, math.prod(product.window.kernel), outputs)
        order = (0, 1, 3, 2) if product.window.transposed else (0, 3, 1, 2)
        plain = parts.transpose(order)
    return np.ascontiguousarray(plain.reshape(like.shape)).astype(like.dtype)


@dataclass(frozen=True)
class _New:
    weights: Mapping[str, Array]
    operands: Mapping[tuple[int, int], Array]


def _refitted(task: _Task, compressed: Structure, fit: _Rows, select: _Rows) -> tuple[_New, tuple[float, float]]:
    """Solve one product; keep what there was if nothing does better on unseen rows."""
    product = task.product
    stored = compressed.shape_info.constants[product.weight]
    prior = _matrix(stored, product)
    constant, free = _constant(task, compressed)
    now = constant.reshape(product.group, 1, -1)
    system = _System(fit, prior, now, free)
    unseen = select if select.target.size else fit
    best = _error(unseen, prior, now), prior, now
    before = best[0]
    for step in (range(FIRST_RIDGE, len(RIDGES)), range(FIRST_RIDGE - 1, -1, -1)):
        last = np.inf
        for place in step:
            candidate = system.solve(RIDGES[place])
            error = _error(unseen, *candidate)
            if error < best[0]:
                best = error, *candidate
            if not error < last:
                break
            last = error
    weights = {product.weight: _weight(best[1], product, stored)}
    operands = _operands(task, compressed, best[2].ravel() - constant) if free else {}
    energy = max(float(np.square(unseen.target - unseen.target.mean(axis=1, keepdims=True)).sum()), 1e-300)
    return _New(weights, operands), (math.sqrt(before / energy), math.sqrt(best[0] / energy))


def _constant(task: _Task, compressed: Structure) -> tuple[Matrix, bool]:
    """(M,) what the node adds to its product now, and whether that can change."""
    product, constants = task.product, compressed.shape_info.constants
    node = compressed.model.nodes[product.reader.node]
    outputs = len(task.scale)
    name = node.input(2) if node.op in ("Conv", "ConvTranspose", "Gemm") else ""
    value = constants[name].astype(np.float64) if name else np.zeros(1)
    beta = float(node.attributes.get("beta", 1.0)) if node.op == "Gemm" else 1.0
    bias = product.reader.bias
    if value.size not in (1, outputs):  # a matrix of biases, one for each row
        return np.zeros(outputs), False
    return np.broadcast_to(value.ravel() * beta, (outputs,)).copy(), bias is not None and bias.node is not None


def _operands(task: _Task, compressed: Structure, shift: Matrix) -> dict[tuple[int, int], Array]:
    """The bias that adds `shift` to the output of the node."""
    product, bias = task.product, task.product.reader.bias
    if bias is None or bias.node is None:
        return {}
    dtype = compressed.shape_info.constants[product.weight].dtype
    added = shift / product.scale * bias.scale
    if not bias.name:
        return {(bias.node, bias.position): added.astype(dtype)}
    current = compressed.shape_info.constants[bias.name]
    if compressed.model.nodes[bias.node].op == "Add":
        rank = len(compressed.shape_info.shapes[product.reader.output])
        added = added.reshape(-1, *(1,) * (rank - product.reader.output_axis - 1))
    return {(bias.node, bias.position): (current.astype(np.float64) + added).astype(current.dtype)}


# ---- least squares ------------------------------------------------------------------------------------------------


def _error(rows: _Rows, matrix: Matrix, constant: Matrix) -> float:
    """Sum of squared errors; single precision is plenty to compare errors with."""
    predicted = np.matmul(rows.patches, matrix.astype(np.float32))
    return float(np.square(predicted + constant - rows.target).sum())


class _System:
    """The normal equations of all groups of a product, for any ridge.

    Args:
        rows: what is fitted, (G, N, K) and (G, N, M).
        prior: (G, K, M) V0.
        constant: (G, 1, M) b where it is not free.
        free: whether b is solved for.
    """

    def __init__(self, rows: _Rows, prior: Matrix, constant: Matrix, free: bool) -> None:
        groups, count, unknowns = rows.patches.shape
        gram = np.zeros((groups, unknowns, unknowns))
        cross = np.zeros((groups, unknowns, rows.target.shape[2]))
        total = np.zeros((groups, 1, unknowns))
        for start in range(0, count, CHUNK):
            part = rows.patches[:, start : start + CHUNK].astype(np.float64)
            gram += part.transpose(0, 2, 1) @ part
            cross += part.transpose(0, 2, 1) @ (rows.target[:, start : start + CHUNK] - (0.0 if free else constant))
            total += part.sum(axis=1, keepdims=True)
        self._prior, self._constant, self._free = prior, constant, free
        self._mean, self._goal = total / count, rows.target.mean(axis=1, keepdims=True)
        gram, cross = gram / count, cross / count
        if free:
            gram -= self._mean.transpose(0, 2, 1) @ self._mean
            cross -= self._mean.transpose(0, 2, 1) @ self._goal
        scale = np.sqrt(np.maximum(np.diagonal(gram, axis1=1, axis2=2), 0.0))
        live = scale > 1e-12 * scale.max(initial=1e-300)
        self._divisor = np.where(live, scale, np.inf)  # what never varies keeps its weight
        self._left = gram / (self._divisor[:, :, None] * self._divisor[:, None, :])
        self._left[~live, np.nonzero(~live)[1]] = 1.0
        self._right = (cross - gram @ prior) / self._divisor[:, :, None]

    def solve(self, ridge: float) -> tuple[Matrix, Matrix]:
        """(G, K, M) V and (G, 1, M) b."""
        left = self._left + ridge * np.eye(self._left.shape[1])
        if len(left) == 1:
            factor = scipy.linalg.cho_factor(left[0], lower=True, overwrite_a=True, check_finite=False)
            step = scipy.linalg.cho_solve(factor, self._right[0], check_finite=False)[None]
        else:
            step = np.linalg.solve(left, self._right)
        matrix = self._prior + step / self._divisor[:, :, None]
        return matrix, (self._goal - self._mean @ matrix if self._free else self._constant)

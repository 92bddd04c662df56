"""Refit the weights of a compressed model, layer by layer, to what the original computes.

A product multiplies patches p (channels of one group x kernel taps; the zeros of a padding are data). A fold chooses
its weights V0 from channel statistics alone. Here V and the bias b solve the whole problem of
`lindep_onnx.linalg.least_squares`, where t is the pre-activation of the *original* model at the same position, p comes
from the *compressed* model that runs up to this layer (mode "sequential") or from the original (mode "kernel"), and the
ridge pulls towards the fold. It is the ridge whose solution errs least on samples that were not fitted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lindep_onnx.data.samples import Samples
from lindep_onnx.data.split import Part
from lindep_onnx.files import Scratch
from lindep_onnx.linalg.fold import Matrix
from lindep_onnx.linalg.least_squares import Rows, Weights, fitted
from lindep_onnx.linalg.linear_map import ChannelMaps, LinearMap
from lindep_onnx.log import Log
from lindep_onnx.model.edit import GraphEdits
from lindep_onnx.model.weighted import weighted
from lindep_onnx.refit.patches import matrix_of, patches_of, weight_of
from lindep_onnx.refit.targets import Targets, Task, tasks_of
from lindep_onnx.runtime.backend import Pool, Runtime
from lindep_onnx.runtime.rows import RowSampler, rows_at, samples_first
from lindep_onnx.runtime.stages import Stages
from lindep_onnx.structure.types import Product, Structure

Array: TypeAlias = NDArray[Any]

#: Rows for each unknown of one output, rows at least, and bytes of patches at most.
ROWS_PER_UNKNOWN = 16
MIN_ROWS = 1 << 14
PATCH_BYTES = 1 << 28


@dataclass(frozen=True)
class Cut:
    """A model and what is left of it.

    Attributes:
        original: the original model, traced.
        maps: how tensors of the compressed model follow from the original's.
        compressed: the result of a change and its fit, traced.
    """

    original: Structure
    maps: ChannelMaps
    compressed: Structure


@dataclass(frozen=True)
class Refitted:
    """What a refit changes.

    Attributes:
        edits: new weights and biases of the compressed model.
        errors: for each product by output name, (before, after): RMS error relative to the centred target, unseen rows.
        skipped: output names of products that were too wide.
        unplaced: those of products of which nobody knows where samples lie in what they read and give.
    """

    edits: GraphEdits
    errors: Mapping[str, tuple[float, float]]
    skipped: tuple[str, ...]
    unplaced: tuple[str, ...] = ()


def refit(
    cut: Cut, samples: Samples, runtime: Runtime, log: Log, *, mode: Literal["kernel", "sequential"], seed: int
) -> Refitted:
    """Refit every product whose input is no longer that of the original.

    Args:
        cut: the original and the compressed model.
        samples: the data; FIT samples are fitted, SELECT samples choose the ridge.
        runtime: what models run on.
        log: told how far it is.
        mode: where the inputs of a layer come from, see the module.
        seed: of the positions that are sampled.
    """
    original, compressed = cut.original, cut.compressed
    staged = mode == "sequential"
    tasks, skipped = tasks_of(original, cut.maps, compressed, residual=staged)
    weights: dict[str, Array] = {}
    operands: dict[tuple[int, int], Array] = {}
    errors: dict[str, tuple[float, float]] = {}
    unplaced = []
    if not tasks:
        return Refitted(GraphEdits(), errors, skipped)
    count = max(1, len(samples.parts[Part.FIT]))
    most = {task.place: _positions(task, count) for task in tasks}
    source = compressed if staged else original
    shares = runtime.shares(original.shape_info.activation_bytes * samples.batch)
    with (
        Scratch() as folder,
        Stages(source.model, source.shape_info, samples.batches(Part.FIT), runtime) as fit,
        Stages(source.model, source.shape_info, samples.batches(Part.SELECT), runtime) as select,
        shares.pool() as pool,
    ):
        sampler, rng = RowSampler(original.model, original.shape_info, most, shares.each), np.random.default_rng(seed)
        sources = [
            (stages, Targets(sampler, samples.batches(part), rng, Path(folder) / part.value, pool))
            for stages, part in ((fit, Part.FIT), (select, Part.SELECT))
        ]
        for done, task in enumerate(tasks):
            reader = task.product.reader
            at = reader.node if staged else original.model.producer[reader.output].index
            kept = None if staged else cut.maps.of(reader.tensor, reader.axis)
            data = []
            for stages, targets in sources:
                stages.run_to(at)
                data.append(_gathered(task, stages, targets, kept, pool))
            known = [rows for rows in data if rows is not None]
            if len(known) < len(data):
                unplaced.append(reader.output)
                continue
            weight, bias, errors[reader.output] = _refitted(task, compressed, *known)
            weights[task.product.weight] = weight
            operands.update(bias)
            for stages in (fit, select) if staged else ():
                stages.set_weight(task.product.weight, weight)
                for (index, position), value in bias.items():
                    stages.set_operand(compressed.model.nodes[index], position, value)
            log.progress("refit", done + 1, len(tasks))
    return Refitted(GraphEdits(constants=weights, inputs=operands), errors, skipped, tuple(unplaced))


def _positions(task: Task, samples: int) -> int:
    """Rows of each sample."""
    wanted = max(MIN_ROWS, ROWS_PER_UNKNOWN * task.unknowns)
    most = PATCH_BYTES // max(1, 4 * task.unknowns * task.product.group)
    return max(1, min(wanted, most) // samples)


def _gathered(task: Task, stages: Stages, targets: Targets, kept: LinearMap | None, pool: Pool) -> Rows | None:
    """Patches of the product at hand, and the output that it should have there; None where they do not belong together.

    That is where nobody knows which axis counts samples, and it is not the leading one.
    """
    reader, group, outputs = task.product.reader, task.product.group, len(task.scale)
    given = targets.take(task.place)
    ends = np.cumsum([0, *(rows.shape[0] * rows.shape[1] for rows, _ in given)])
    patches = np.empty((group, ends[-1], task.unknowns), dtype=np.float32)
    wanted = np.empty((ends[-1], outputs), dtype=np.float32)

    def gather(number: int) -> bool:
        rows, positions = given[number]
        data = _computed(stages, number, reader.tensor)
        data = data if kept is None else kept.along(data, reader.axis)
        data, axis = samples_first(data, reader.axis, stages.sample_axis(reader.tensor))
        moved = replace(task.product, reader=replace(reader, axis=axis))
        if not _belong(data, moved, rows, positions):
            return False
        place = slice(ends[number], ends[number + 1])
        patches[:, place] = patches_of(data, moved, positions)
        goal = (rows if task.channels is None else task.channels.rows(rows)).reshape(-1, outputs)
        if task.other:
            beside = _computed(stages, number, task.other)
            other = rows_at(*samples_first(beside, task.place.axis, stages.sample_axis(task.other)), positions)
            goal = goal - other.reshape(-1, outputs)
        wanted[place] = (goal - task.shift) / task.scale
        return True

    if not all(pool.map(gather, range(len(given)))):
        return None
    return Rows(patches, np.moveaxis(wanted.reshape(ends[-1], group, -1), 1, 0))


def _belong(data: Array, product: Product, rows: Array, positions: NDArray[np.int64]) -> bool:
    """Whether rows at these positions are what a product gives of the data."""
    if len(data) * len(positions) != rows.shape[0] * rows.shape[1]:
        return False
    if product.window is not None:
        return True
    places = math.prod(size for axis, size in enumerate(data.shape[1:], 1) if axis != product.reader.axis)
    return not len(positions) or int(positions.max()) < places


def _computed(stages: Stages, batch: int, name: str) -> Array:
    value = stages.tensor(batch, name)
    if value is None:
        raise AssertionError(f"{name} is not in the frontier")
    return value


def _refitted(
    task: Task, compressed: Structure, fit: Rows, select: Rows
) -> tuple[Array, dict[tuple[int, int], Array], tuple[float, float]]:
    """Weight, operands with the bias, and errors before and after: what there was if nothing errs less."""
    product, stored = task.product, compressed.shape_info.constants[task.product.weight]
    constant, free = _constant(task, compressed)
    prior = Weights(matrix_of(stored, product), constant.reshape(product.group, 1, -1))
    unseen = select if select.target.size else fit
    found, before, after = fitted(fit, unseen, prior, free=free)
    operands = _operands(product, compressed, found.constant.ravel() - constant) if free else {}
    energy = unseen.energy
    errors = math.sqrt(before / energy), math.sqrt(after / energy)
    return weight_of(found.matrix, product, stored), operands, errors


def _constant(task: Task, compressed: Structure) -> tuple[Matrix, bool]:
    """(M,) what the node adds to its product now, and whether that can change."""
    layout, outputs = weighted(compressed.model.nodes[task.product.reader.node], task.product.position), len(task.scale)
    assert layout is not None  # it is a product
    value = compressed.shape_info.constants[layout.bias].astype(np.float64) if layout.bias else np.zeros(1)
    if value.size not in (1, outputs):  # a matrix of biases, one for each row
        return np.zeros(outputs), False
    bias = task.product.reader.bias
    constant = np.broadcast_to(value.ravel() * layout.bias_scale, (outputs,)).copy()
    return constant, bias is not None and bias.node is not None


def _operands(product: Product, compressed: Structure, shift: Matrix) -> dict[tuple[int, int], Array]:
    """The bias that adds `shift` to the output of the node."""
    bias = product.reader.bias
    if bias is None or bias.node is None:
        return {}
    added = shift / product.scale * bias.scale
    if not bias.name:
        dtype = compressed.shape_info.constants[product.weight].dtype
        return {(bias.node, bias.position): added.astype(dtype)}
    current = compressed.shape_info.constants[bias.name]
    if compressed.model.nodes[bias.node].op == "Add":
        rank = len(compressed.shape_info.shapes[product.reader.output])
        added = added.reshape(-1, *(1,) * (rank - product.reader.output_axis - 1))
    return {(bias.node, bias.position): (current.astype(np.float64) + added).astype(current.dtype)}

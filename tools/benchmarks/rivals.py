"""Other ways to make a model smaller, brought to the same number of parameters.

| method | which channels go | what the survivors become |
|---|---|---|
| magnitude | smallest L2 norm over all weights that make or read them | nothing changes |
| interpolative | last pivots of a QR decomposition of the activations | Z_R ~ Z_K T, W_K + W_R T' |
| onnxsim | `onnxsim.apply_structured_pruning` | nothing changes |
| onnxsim-wanda | `onnxsim.apply_structured_wanda_pruning` | nothing changes |

Every group, or layer, loses the same share of its channels; `-global` behind a name ranks the channels of the whole
model instead, and `-finetune` adds `onnxsim.apply_pruning_finetune`. As published, the first two leave channels alone
that several layers make together, the residual streams; `-all` behind their names takes from those too. They go through
this project's tracing and rewriting, so that every shape is right. onnxsim takes a ratio, which is found by bisection.

All are left with at least as many parameters as asked for, and with hardly more; where that cannot be had there is no
comparison, but an `UnreachedError`.

The interpolative decomposition is that of Chee et al., "Model Preserving Compression for Neural Networks" (2022): no
constant term, no weights in the choice. Pivots and T are computed from a root S of the second moments, S'S = Z'Z,
whose QR decomposition is that of Z itself.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
import scipy.linalg
from numpy.typing import NDArray

from lindep_onnx.calibration import statistics as analysis
from lindep_onnx.calibration.measure import Draw, StatisticsAccumulator, measure
from lindep_onnx.data.inputs import InputSpec
from lindep_onnx.data.samples import Samples, open_samples
from lindep_onnx.data.split import Part
from lindep_onnx.log import Log
from lindep_onnx.model import ir as graph
from lindep_onnx.model.cost import cost
from lindep_onnx.model.shapes import resolve
from lindep_onnx.moves.fold_weights import fold_weights
from lindep_onnx.options import DataOptions
from lindep_onnx.planning.search import first_small_enough
from lindep_onnx.runtime.backend import Runtime
from lindep_onnx.structure.rewrite import Removal, rewrite
from lindep_onnx.structure.steps import Fold
from lindep_onnx.structure.trace import trace
from lindep_onnx.structure.types import FROZEN, Group, Structure

Matrix: TypeAlias = NDArray[np.float64]
Rival: TypeAlias = Callable[[onnx.ModelProto, Path, int], onnx.ModelProto]

#: How many more parameters, of the original's, a rival may be left with than was asked for.
TOLERANCE = 0.025
#: A ratio that leaves this much more is not improved on.
CLOSE = 0.002
STEPS = 14
BATCH = 32


class UnreachedError(LookupError):
    """A method cannot be brought to the number of parameters."""


def parameters(model: onnx.ModelProto) -> int:
    """What all methods are compared at."""
    return cost(graph.load(model), {}).parameters


def magnitude(
    model: onnx.ModelProto, _: Path, target: int, *, everywhere: bool = False, streams: bool = False
) -> onnx.ModelProto:
    """Remove the channels with the smallest weights.

    Args:
        model: the original.
        target: parameters to keep at least.
        everywhere: rank the channels of the whole model; else those of each group.
        streams: take from residual streams too.
    """
    channels = _traced(model)
    norms = _norms(channels)
    orders = [group.units[np.argsort(norms[group.units], kind="stable")] for group in _groups(channels, streams)]
    order = _evenly(orders)
    if everywhere:
        order = order[np.argsort(norms[order], kind="stable")]
    removed = _cut(channels, order, target)
    return rewrite(channels, Removal(removed), "").proto


def interpolative(model: onnx.ModelProto, calib: Path, target: int, *, streams: bool = False) -> onnx.ModelProto:
    """Keep the channels that pivoted QR finds first, and write the others as combinations of them.

    Args:
        model: the original.
        calib: npz of calibration images.
        target: parameters to keep at least.
        streams: take from residual streams too.
    """
    traced = _traced(model)
    # Without a constant term, as published.
    consumers = tuple(dataclasses.replace(consumer, affine=False) for consumer in traced.consumers)
    channels = dataclasses.replace(traced, consumers=consumers)
    with _open(channels, calib) as samples:
        sums = StatisticsAccumulator(channels)
        measure(samples, sums, Draw(0, len(samples.parts[Part.FIT])), Runtime(), Log())
    statistics = analysis.statistics(channels, sums.result())
    roots = [_root(consumer.gram) for consumer in statistics.consumers]
    order = _evenly([_pivots(group, statistics, roots)[::-1] for group in _groups(channels, streams)])
    removed = _cut(channels, order, target)
    folds = {}
    for index, (consumer, root) in enumerate(zip(statistics.consumers, roots, strict=True)):
        kept = ~np.append(removed, False)[consumer.unit]
        if not kept.all():
            matrix = np.linalg.lstsq(root[:, kept], root[:, ~kept], rcond=1e-10)[0]
            folds[index] = Fold(kept, np.asarray(matrix, dtype=np.float64))
    return rewrite(channels, fold_weights(channels, folds, statistics.consumers, removed), "").proto


def onnxsim(
    model: onnx.ModelProto,
    calib: Path,
    target: int,
    *,
    wanda: bool = False,
    everywhere: bool = False,
    finetune: bool = False,
) -> onnx.ModelProto:
    """Structured pruning by onnxsim.

    Args:
        model: the original.
        calib: npz of calibration images.
        target: parameters to keep at least.
        wanda: whether to weigh channels by their activations.
        everywhere: whether one ratio holds for the whole model rather than for each layer.
        finetune: whether to refit Gemm and MatMul afterwards.

    Raises:
        UnreachedError: no ratio leaves a number of parameters near the target.
    """
    library = importlib.import_module("onnxsim")
    data = _batches(model, calib) if wanda or finetune else []

    def prune(ratio: float) -> onnx.ModelProto:
        options: dict[str, Any] = {"sparsity": ratio, "global_sparsity": everywhere}
        if wanda:
            pruned = library.apply_structured_wanda_pruning(model, calibration_data=data, **options)
        else:
            pruned = library.apply_structured_pruning(model, **options)
        assert isinstance(pruned, onnx.ModelProto)
        return pruned

    pruned = _largest_ratio(prune, target, parameters(model))
    return library.apply_pruning_finetune(model, pruned, calibration_data=data) if finetune else pruned


RIVALS: dict[str, Rival] = {
    "magnitude": magnitude,
    "magnitude-all": partial(magnitude, streams=True),
    "magnitude-global": partial(magnitude, everywhere=True),
    "interpolative": interpolative,
    "interpolative-all": partial(interpolative, streams=True),
    **{
        f"onnxsim{wanda}{everywhere}{finetune}": partial(
            onnxsim, wanda=bool(wanda), everywhere=bool(everywhere), finetune=bool(finetune)
        )
        for wanda in ("", "-wanda")
        for everywhere in ("", "-global")
        for finetune in ("", "-finetune")
    },
}


# ---- which channels go -----------------------------------------------------------------------------------------


def _traced(model: onnx.ModelProto) -> Structure:
    loaded = graph.load(model)
    return trace(loaded, resolve(loaded))


def _groups(structure: Structure, streams: bool) -> list[Group]:
    """All groups, or those whose channels are each made by one layer; a depthwise convolution makes none anew."""
    depthwise = {product.reader.node for product in structure.products if product.group > 1}
    makers = np.zeros(structure.units + 1, dtype=np.int64)  # the last entry takes what stays
    for producer in structure.producers:
        if producer.node not in depthwise:
            makers[np.unique(structure.unit[producer.atoms])] += 1
    return [group for group in structure.groups if streams or makers[group.units].max() < 2]


def _norms(structure: Structure) -> Matrix:
    """(units,) L2 norm of all weights that make or read a unit; a shared weight counts once."""
    squares = np.zeros(structure.units + 1)  # the last entry takes what stays
    counted = set()
    for product in structure.products:
        axes = structure.reads.get(product.weight, {}).get((product.reader.node, product.position))
        if axes is None or product.weight in counted:
            continue
        counted.add(product.weight)
        weight = np.square(structure.shape_info.constants[product.weight].astype(np.float64))
        for axis, atoms in axes.items():
            others = tuple(other for other in range(weight.ndim) if other != axis)
            np.add.at(squares, structure.unit[atoms], weight.sum(axis=others))
    return np.sqrt(squares[:-1])


def _pivots(group: Group, statistics: analysis.Statistics, roots: list[Matrix]) -> NDArray[np.int64]:
    """Units of a group in the order of the pivots; several sites are stacked, all of the same norm."""
    blocks = []
    for index in group.consumers:
        unit, root = statistics.consumers[index].unit, roots[index]
        live = unit != FROZEN
        scale = max(float(np.linalg.norm(root[:, live])), 1e-300)
        turns = _occurrence(unit)
        # Several features of one unit are further rows.
        for turn in range(int(turns[live].max(initial=-1)) + 1):
            chosen = np.flatnonzero(live & (turns == turn))
            block = np.zeros((len(root), len(group.units)))
            block[:, np.searchsorted(group.units, unit[chosen])] = root[:, chosen] / scale
            blocks.append(block)
    order = scipy.linalg.qr(np.concatenate(blocks), mode="r", pivoting=True)[1]
    return group.units[order]


def _occurrence(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """How often each value has occurred before."""
    order = np.argsort(values, kind="stable")
    first = np.searchsorted(values[order], values[order])
    result = np.empty(len(values), dtype=np.int64)
    result[order] = np.arange(len(values)) - first
    return result


def _root(gram: Matrix) -> Matrix:
    """S with S'S = G."""
    values, vectors = scipy.linalg.eigh(gram)
    return np.asarray(np.sqrt(np.maximum(values, 0.0))[:, None] * vectors.T)


def _evenly(orders: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Merge the orders of all groups, so that each has lost the same share at any time."""
    shares = np.concatenate([(np.arange(len(order)) + 1) / len(order) for order in orders])
    return np.concatenate(orders)[np.argsort(shares, kind="stable")]


def _cut(structure: Structure, order: NDArray[np.int64], target: int) -> NDArray[np.bool_]:
    """(units,) bool, as many of the first ones as may go; no axis loses all of its channels."""
    spare = [len(members) - bound for members, bound in structure.minimums]
    bounds: dict[int, list[int]] = {}
    for number, (members, _) in enumerate(structure.minimums):
        for unit in members.tolist():
            bounds.setdefault(unit, []).append(number)
    going = []
    for unit in order.tolist():
        if all(spare[number] > 0 for number in bounds.get(unit, ())):
            going.append(unit)
            for number in bounds.get(unit, ()):
                spare[number] -= 1

    def removed(count: int) -> NDArray[np.bool_]:
        mask = np.zeros(structure.units, dtype=bool)
        mask[going[:count]] = True
        return mask

    def left(count: int) -> int:
        return cost(rewrite(structure, Removal(removed(count)), ""), {}).parameters

    count = first_small_enough(len(going), lambda count: left(count) - target)
    if count is None:
        raise UnreachedError(f"{left(len(going))} parameters are left with everything removed that can go.")
    return removed(count if left(count) == target else count - 1)


def _largest_ratio(prune: Callable[[float], onnx.ModelProto], target: int, before: int) -> onnx.ModelProto:
    """The smallest result with at least `target` parameters."""
    low, high = 0.0, 1.0
    above, below = before, 0
    best: onnx.ModelProto | None = None
    for step in range(STEPS):
        if best is not None and above - target <= CLOSE * before:
            break
        # Interpolation and bisection take turns: counts are nearly linear in the ratio, with steps.
        share = (above - target) / max(1, above - below) if step % 2 == 0 else 0.5
        ratio = low + (high - low) * min(max(share, 0.02), 0.98)
        pruned = prune(ratio)
        count = parameters(pruned)
        if count >= target:
            low, above, best = ratio, count, pruned
        else:
            high, below = ratio, count
    if best is None or above - target > TOLERANCE * before:
        smaller = f"{below / before:.1%} or " if below else ""
        raise UnreachedError(
            f"The nearest ratios leave {smaller}{above / before:.1%} of the parameters, not {target / before:.1%}."
        )
    return best


# ---- data ------------------------------------------------------------------------------------------------------


def _open(structure: Structure, calib: Path) -> Samples:
    """All of the images to fit by, but the two that a split cannot do without."""
    specs = [
        InputSpec(name, np.dtype(np.float32), structure.shape_info.shapes[name]) for name in structure.model.inputs
    ]
    return open_samples(str(calib), specs, DataOptions(holdout=1e-9, batch_size=BATCH))


def _batches(model: onnx.ModelProto, calib: Path) -> list[dict[str, NDArray[np.float32]]]:
    (value,) = model.graph.input
    step = 1 if value.type.tensor_type.shape.dim[0].dim_value == 1 else BATCH
    with np.load(calib) as data:
        images = data[value.name]
    return [{value.name: images[start : start + step]} for start in range(0, len(images), step)]

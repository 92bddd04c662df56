"""How much an error at one site matters to the outputs, measured by making one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lindep_onnx.calibration.statistics import Statistics, problem
from lindep_onnx.data.samples import Samples
from lindep_onnx.data.split import Part
from lindep_onnx.linalg.elimination import Limits, eliminate
from lindep_onnx.linalg.fold import ConsumerProblem, choose_ridge, removal_cost
from lindep_onnx.log import Log
from lindep_onnx.model.ir import Model
from lindep_onnx.moves.fold_weights import fold_weights
from lindep_onnx.planning.path import Curve, folds_of
from lindep_onnx.runtime.backend import Runtime
from lindep_onnx.structure.placement import equalized
from lindep_onnx.structure.rewrite import rewrite
from lindep_onnx.structure.steps import Fold
from lindep_onnx.structure.types import Structure

#: Squared relative error that is made at a site: large enough to stand out, small enough to be linear.
PERTURBATION = 0.02
#: Shares of a group that are removed to measure what it costs.
DEPTHS = (0.2, 0.5)
#: Samples that are run for each measurement.
SAMPLES = 48


class PerturbationRunner:
    """Runs changed models on some samples and says how far their outputs move.

    Args:
        structure: the traced model.
        statistics: what the data says.
        samples: the data; SELECT samples are run.
        runtime: what models run on.
    """

    def __init__(self, structure: Structure, statistics: Statistics, samples: Samples, runtime: Runtime) -> None:
        self._structure, self._statistics = structure, statistics
        self._shares = runtime.shares(structure.shape_info.activation_bytes * samples.batch)
        self._batches = list(samples.batches(Part.SELECT, limit=SAMPLES))
        self._reference = self._outputs(structure.model)
        self._energy = {name: _energy(values) for name, values in self._reference.items()}

    def error(self, folds: Mapping[int, Fold], removed: NDArray[np.bool_]) -> float:
        """Squared relative error of the outputs, averaged over them; NaN if they cannot be compared.

        Args:
            folds: by site index.
            removed: (units,) bool; features that are folded away may stay in place.
        """
        new = fold_weights(self._structure, folds, self._statistics.consumers, removed)
        outputs = self._outputs(rewrite(self._structure, new, ""))
        shares = [
            _difference(self._reference[name], outputs[name]) / energy
            for name, energy in self._energy.items()
            if energy
        ]
        return float(np.mean(shares)) if shares else float("nan")

    def _outputs(self, model: Model) -> dict[str, list[NDArray[Any]]]:
        session = self._shares.each.open(model)
        names = [output.name for output in session.get_outputs() if "float" in output.type or "double" in output.type]
        batches = self._batches if names else []
        with self._shares.pool() as pool:
            runs = list(pool.map(lambda batch: session.run(names, dict(batch.feeds)), batches))
        return {name: [np.asarray(run[place], dtype=np.float64) for run in runs] for place, name in enumerate(names)}


def consumer_sensitivity(
    structure: Structure, statistics: Statistics, perturbations: PerturbationRunner, log: Log
) -> list[float]:
    """Squared relative error of the outputs for a squared relative error of 1 at each site.

    At one site after the other the features that matter least are folded into the others, while the rest of the model
    stays as it is. So the errors are of the kind that a removal makes, not white noise. Where a group has one site only
    there is nothing to weigh, and it counts as 1.

    Args:
        structure: the traced model.
        statistics: what the data says.
        perturbations: of this model.
        log: told how far it is.
    """
    nothing = np.zeros(structure.units, dtype=bool)
    weighed = sorted(index for group in structure.groups if len(group.consumers) > 1 for index in group.consumers)
    found = dict.fromkeys(range(len(structure.consumers)), 1.0)
    measured: dict[int, float] = {}
    for done, index in enumerate(weighed):
        folded = _disturbed(problem(structure, statistics.consumers[index], nothing))
        if folded is not None:
            made, fold = folded
            value = perturbations.error({index: fold}, nothing) / made
            if np.isfinite(value) and value > 0:
                measured[index] = value
        log.progress("influence", done + 1, len(weighed))
    typical = float(np.median(list(measured.values()))) if measured else 1.0
    found.update({index: max(measured.get(index, typical), 1e-3 * typical) for index in weighed})
    return [found[index] for index in range(len(structure.consumers))]


def measured_curves(
    structure: Structure,
    statistics: Statistics,
    curves: Sequence[Curve],
    perturbations: PerturbationRunner,
    log: Log,
) -> list[Curve]:
    """Replace expected costs by measured ones: a group is removed in part, and the outputs tell what that does.

    Between the measured depths the ratio of measured to expected cost is interpolated; errors of one group at many
    sites add up coherently, which no sum over sites foresees.

    Args:
        structure: the traced model.
        statistics: what the data says.
        curves: expected costs.
        perturbations: of this model.
        log: told how far it is.
    """
    result = []
    for done, curve in enumerate(curves):
        depths, ratios = [], []
        for share in DEPTHS:
            depth = round(share * len(curve.units))
            if depth and curve.cost[depth - 1] > 0:
                removed = np.zeros(structure.units, dtype=bool)
                removed[curve.units[:depth]] = True
                removed = equalized(structure, removed, curve.units[:depth])
                error = perturbations.error(folds_of(structure, statistics, removed, {}), removed)
                if np.isfinite(error) and error > 0:
                    depths.append(depth)
                    ratios.append(np.log(error / curve.cost[depth - 1]))
        if depths:
            ratio = np.exp(np.interp(np.arange(1, len(curve.units) + 1), depths, ratios))
            # The cost of a longer removal is no smaller: both its parts and the ratio may wobble.
            curve = dataclasses.replace(curve, cost=np.maximum.accumulate(curve.cost * ratio))
        result.append(curve)
        log.progress("price", done + 1, len(curves))
    return result


def _disturbed(posed: ConsumerProblem) -> tuple[float, Fold] | None:
    """The squared relative error that a fold makes at a site, and the fold; None where hardly any can be made."""
    features = len(posed.unit)
    single = dataclasses.replace(posed, unit=np.arange(features), ridge=1e-6)
    order = eliminate([single], posed.unit >= 0, limits=Limits(features - 1, PERTURBATION)).order
    kept = np.ones(features, dtype=bool)
    kept[order] = False
    if kept.all():  # even the least important feature makes a larger error
        cheapest = eliminate([single], posed.unit >= 0, limits=Limits(removals=1)).order
        kept[cheapest] = False
    if kept.all():
        return None
    matrix = choose_ridge(single, kept)[1]
    judge = posed.gram if posed.holdout is None else posed.holdout
    made = removal_cost(judge, posed.outer, kept, matrix) / posed.energy
    return (made, Fold(kept, matrix)) if made > 1e-8 else None


def _energy(values: Sequence[NDArray[Any]]) -> float:
    count = sum(value.size for value in values)
    mean = sum(float(value.sum()) for value in values) / max(1, count)
    total = sum(float(np.square(value - mean).sum()) for value in values)
    return total if np.isfinite(total) else 0.0


def _difference(left: Sequence[NDArray[Any]], right: Sequence[NDArray[Any]]) -> float:
    if any(a.shape != b.shape for a, b in zip(left, right, strict=True)):
        return float("nan")
    return sum(float(np.square(a - b).sum()) for a, b in zip(left, right, strict=True))

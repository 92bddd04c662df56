"""How much an error at one consumer matters to the outputs, and what steps really cost, measured by taking some."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lindep_onnx.calibration.statistics import Statistics, problem
from lindep_onnx.data.samples import Samples
from lindep_onnx.data.split import Part
from lindep_onnx.linalg.elimination import Limits, eliminate
from lindep_onnx.linalg.fold import ConsumerProblem, choose_ridge, removal_cost
from lindep_onnx.log import Log
from lindep_onnx.model.edit import GraphEdits, apply_edits
from lindep_onnx.model.ir import Model
from lindep_onnx.moves.base import Move
from lindep_onnx.moves.channels import channel_edits
from lindep_onnx.runtime.backend import Runtime
from lindep_onnx.runtime.targets import FREE
from lindep_onnx.structure.steps import ChannelSteps, Curve, Fold
from lindep_onnx.structure.types import Structure
from lindep_onnx.verify.compare import as_array

#: Squared relative error that is made at a consumer: large enough to stand out, small enough to be linear.
PERTURBATION = 0.02
#: Shares of a site's steps that are taken to measure what they cost.
DEPTHS = (0.2, 0.5)
#: Samples that are run for each measurement.
SAMPLES = 16


class PerturbationRunner:
    """Runs changed models on some samples and says how far their outputs move.

    Args:
        structure: the traced model.
        samples: the data; SELECT samples are run.
        runtime: what models run on.
    """

    def __init__(self, structure: Structure, samples: Samples, runtime: Runtime) -> None:
        self._model = structure.model
        self._shares = runtime.shares(structure.shape_info.activation_bytes * samples.batch)
        self._batches = list(samples.batches(Part.SELECT, limit=SAMPLES))
        self._reference = self._outputs(structure.model)
        self._energy = {name: _energy(values) for name, values in self._reference.items()}

    def errors(self, changes: Iterable[Callable[[], GraphEdits | None]]) -> Iterator[float]:
        """The `error` of several changes, of which a few are made and run at a time.

        Args:
            changes: each gives what is changed; None for what need not be tried, which is NaN.

        Yields:
            An error for each change, in their order.
        """
        with self._shares.pool() as pool:
            for _, error in pool.in_order(self._made, changes):
                yield error

    def _made(self, change: Callable[[], GraphEdits | None]) -> float:
        edits = change()
        return float("nan") if edits is None else self.error(edits)

    def error(self, edits: GraphEdits) -> float:
        """Squared relative error of the outputs, averaged over them; NaN if they cannot be compared.

        Args:
            edits: what is changed.
        """
        outputs = self._outputs(apply_edits(self._model, edits, ""))
        shares = [
            _difference(self._reference[name], outputs[name]) / energy
            for name, energy in self._energy.items()
            if energy
        ]
        return float(np.mean(shares)) if shares else float("nan")

    def _outputs(self, model: Model) -> dict[str, list[NDArray[Any]]]:
        session = self._shares.each.open(model)
        names = [output.name for output in session.get_outputs() if "float" in output.type or "double" in output.type]
        runs = [session.run(names, dict(batch.feeds)) for batch in self._batches] if names else []
        return {name: [as_array(run[place]).astype(np.float64) for run in runs] for place, name in enumerate(names)}


def consumer_sensitivity(
    structure: Structure, statistics: Statistics, perturbations: PerturbationRunner, log: Log
) -> list[float]:
    """Squared relative error of the outputs for a squared relative error of 1 at each consumer.

    At one consumer after the other the features that matter least are folded into the others, while the rest of the
    model stays as it is. So the errors are of the kind that a removal makes, not white noise. Where a group has one
    consumer only there is nothing to weigh, and it counts as 1.

    Args:
        structure: the traced model.
        statistics: what the data says.
        perturbations: of this model.
        log: told how far it is.
    """
    nothing = ChannelSteps.of(np.zeros(structure.units, dtype=bool))
    weighed = sorted(index for group in structure.groups if len(group.consumers) > 1 for index in group.consumers)
    found = dict.fromkeys(range(len(structure.consumers)), 1.0)
    made: dict[int, float] = {}
    measured: dict[int, float] = {}

    def disturbed(index: int) -> GraphEdits | None:
        folded = _disturbed(problem(structure, statistics.consumers[index], nothing.removed))
        if folded is None:
            return None
        made[index], fold = folded
        # Features that are folded away stay in place: others still read them.
        return channel_edits(structure, replace(nothing, folds={index: fold}), statistics.consumers)

    errors = perturbations.errors(partial(disturbed, index) for index in weighed)
    for done, (index, error) in enumerate(zip(weighed, errors, strict=True)):
        value = error / made.get(index, 1.0)
        if np.isfinite(value) and value > 0:
            measured[index] = value
        log.progress("influence", done + 1, len(weighed))
    typical = float(np.median(list(measured.values()))) if measured else 1.0
    found.update({index: max(measured.get(index, typical), 1e-3 * typical) for index in weighed})
    return [found[index] for index in range(len(structure.consumers))]


class Measured:
    """Replaces expected costs by measured ones: some steps of a site are taken, and the outputs tell what that does.

    Between the measured depths the ratio of measured to expected cost is interpolated; errors of one site at many
    consumers add up coherently, which no sum over consumers foresees.

    Args:
        structure: the traced model.
        statistics: what the data says.
        perturbations: of this model.
    """

    def __init__(self, structure: Structure, statistics: Statistics, perturbations: PerturbationRunner) -> None:
        self._structure, self._statistics, self._perturbations = structure, statistics, perturbations

    def curves(self, move: Move, curves: Sequence[Curve], log: Log) -> list[Curve]:
        """The curves of one kind of change.

        Args:
            move: the kind.
            curves: expected costs.
            log: told how far it is.
        """
        depths = [
            [depth for depth in dict.fromkeys(round(share * len(curve.steps)) for share in DEPTHS) if depth]
            for curve in curves
        ]
        places = [(number, depth) for number, own in enumerate(depths) for depth in own]
        errors: list[dict[int, float]] = [{} for _ in curves]
        tries = (partial(self._edits, move, curves[number], depth) for number, depth in places)
        for done, ((number, depth), error) in enumerate(zip(places, self._perturbations.errors(tries), strict=True)):
            errors[number][depth] = error
            log.progress("price", done + 1, len(places))
        return [_corrected(curve, own) for curve, own in zip(curves, errors, strict=True)]

    def _edits(self, move: Move, curve: Curve, depth: int) -> GraphEdits | None:
        """What taking the first steps of a curve changes; None where that is expected to cost nothing."""
        if curve.cost[depth - 1] <= 0:
            return None
        order = curve.steps[:depth]
        taken = np.zeros(move.count(self._structure), dtype=bool)
        taken[order] = True
        taken = move.admissible(self._structure, taken, order, FREE)
        steps = move.fit(self._structure, move.unfitted(self._structure, taken), self._statistics)
        return move.apply(self._structure, steps, self._statistics)


def _corrected(curve: Curve, errors: Mapping[int, float]) -> Curve:
    """A curve through what was measured at some depths."""
    known = {depth: error for depth, error in errors.items() if np.isfinite(error) and error > 0}
    if not known:
        return curve
    ratios = [np.log(error / curve.cost[depth - 1]) for depth, error in known.items()]
    ratio = np.exp(np.interp(np.arange(1, len(curve.steps) + 1), list(known), ratios))
    # The cost of a longer removal is no smaller: both its parts and the ratio may wobble.
    return replace(curve, cost=np.maximum.accumulate(curve.cost * ratio))


def _disturbed(posed: ConsumerProblem) -> tuple[float, Fold] | None:
    """The squared relative error that a fold makes at a consumer, and the fold; None where hardly any can be made."""
    features = len(posed.unit)
    single = replace(posed, unit=np.arange(features), ridge=1e-6)
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

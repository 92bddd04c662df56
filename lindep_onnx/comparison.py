"""Two models held against each other, whoever made the second one: how far its outputs are off, its size, its time."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx

from lindep_onnx.data.split import Part
from lindep_onnx.errors import BudgetError, CalibrationError, LindepError, ModelError, TimingError
from lindep_onnx.log import Log
from lindep_onnx.model.ir import Model, load
from lindep_onnx.model.working import working_copy
from lindep_onnx.options import Config, flag
from lindep_onnx.pipeline import fitted, half_the_cores, open_data, strict_failure
from lindep_onnx.planning.budgets import Budgets, reached
from lindep_onnx.planning.judge import Judge, Reference
from lindep_onnx.planning.values import Evaluation
from lindep_onnx.proofs.traced import TracedModel, load_and_trace
from lindep_onnx.report.build import Compared, compared_report
from lindep_onnx.report.values import Report
from lindep_onnx.runtime.backend import Runtime
from lindep_onnx.verify.metrics import Comparison

Source = str | Path | onnx.ModelProto


def compare_models(
    original: Source, other: Source, calib: Any, config: Config, log: Log
) -> tuple[Report, LindepError | None]:
    """Run two models on the same data, all of it, and time each alone.

    Args:
        original: the model that the other is to stand in for.
        other: a model with the same inputs and outputs.
        calib: the data; nothing is fitted to it.
        config: limits on quality, and how data is read and models are run.
        log: told of stages and how far they are.

    Returns:
        The report, and why the other model must not stand in for the original; None if all limits hold.

    Raises:
        ModelError: a model cannot be read or run, or their inputs or outputs have other names.
        CalibrationError: the data does not fit the model.
    """
    runtime = Runtime.named(config.providers, config.threads)
    traced = load_and_trace(original, config, log)
    with half_the_cores(), ExitStack() as stack:
        samples = open_data(traced, calib, config, log, stack)
        if samples is None:
            raise CalibrationError("There is no data to compare the models on: give --calib DATA.")
        traced, samples = fitted(original, traced, samples, runtime, log)
        assert samples is not None
        second = _same_interface(traced, load(other), other)
        structure = traced.structure
        moved = structure.shape_info.moved_samples(structure.model.outputs)
        reference = Reference(traced.as_run, traced.stored, structure.shape_info.activation_bytes, moved)
        judge = Judge(reference, samples, config, runtime, log)
        with log.stage("compare"):
            found = judge.compare(working_copy(second), samples.batches())
        achieved = judge.quality(second, found)
        evaluation = Evaluation(judge.priced(second), found, achieved, _failure(judge.budgets, achieved, found))
        try:
            with log.stage("latency"), judge.stopwatch() as stopwatch:
                timing, notes = stopwatch.compare(second), samples.notes
        except TimingError as error:
            timing, notes = None, (*samples.notes, f"No latency was measured. {error}")
        different = sum(map(samples.different, Part))
        # All samples judge: it is as if twice of them were held out, of which half verify.
        judging = replace(judge.budgets, mode="budgeted", holdout=2.0)
        verdict = judging.verdict(found, evaluation.failure, different=different)
        compared = Compared(traced, judge.before, evaluation, timing, verdict, notes)
        report = compared_report(compared, config, log)
    return report, evaluation.failure or strict_failure(verdict, config)


def _failure(budgets: Budgets, achieved: Mapping[str, float | None], found: Comparison) -> LindepError | None:
    """The first limit on quality that does not hold; None if all do."""
    for name, value in achieved.items():
        if not budgets.holds(name, value):
            clause = reached(name, value, found, data="these samples")
            return BudgetError(f"{flag(name)} {budgets.limits[name]:g} does not hold: {clause}.")
    return None


def _same_interface(traced: TracedModel, second: Model, source: Source) -> Model:
    """The second model, once its inputs and outputs are known to be those of the first.

    Raises:
        ModelError: they are not.
    """
    first = traced.stored
    for what, own, others in (("inputs", first.inputs, second.inputs), ("outputs", first.outputs, second.outputs)):
        if set(own) != set(others):
            name = second.proto.graph.name if isinstance(source, onnx.ModelProto) else source
            raise ModelError(
                f"{name}: has the {what} {', '.join(others)}, and the original has {', '.join(own)}; models are "
                "compared by the names of their inputs and outputs."
            )
    return replace(second, told=first.told)

"""What Python programs call: the whole way at once, or stage by stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import onnx

from lindep_onnx.calibration.runnable import blamed_on_data
from lindep_onnx.calibration.shards import elsewhere
from lindep_onnx.comparison import compare_models
from lindep_onnx.errors import UsageError
from lindep_onnx.inspection import Inspection, inspect_model
from lindep_onnx.log import Log
from lindep_onnx.model.weights import embedded
from lindep_onnx.options import Config, DataOptions, MomentsOptions, Options, TraceOptions, declared
from lindep_onnx.pipeline import (
    Calibrated,
    Outcome,
    Repeated,
    Request,
    fitted,
    half_the_cores,
    open_data,
    open_round,
    run,
    strict_failure,
)
from lindep_onnx.pipeline import calibrate as calibrate_samples
from lindep_onnx.planning.loadable import without_refused
from lindep_onnx.planning.plan_file import Plan, options_of, to_plan
from lindep_onnx.planning.strategies import choose
from lindep_onnx.proofs.traced import TracedModel, load_and_trace
from lindep_onnx.report.values import Report
from lindep_onnx.runtime.backend import Runtime
from lindep_onnx.sweeping import SWEPT, Sweep, Swept, sweep_models

Progress: TypeAlias = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Result:
    """What `compress` and `apply` return.

    Attributes:
        model: the smaller model.
        report: what was done and measured.
        plan: what went, to be saved, edited and carried out again; None if it took several rounds.
    """

    model: onnx.ModelProto
    report: Report
    plan: Plan | None = None


def compress(
    model: str | Path | onnx.ModelProto,
    calib: Any = None,
    *,
    stress: Any = None,
    client: Any = None,
    progress: Progress | None = None,
    **options: Any,
) -> Result:
    """Remove channels that are linear combinations of others, and move their weight onto the survivors.

    Args:
        model: a path or a model in memory; never changed.
        calib: calibration data: a path (see the README), a dict of arrays with samples along the leading axis, an
            array for the only input, an iterable of either, or an object with `get_next()`. None only with
            `proven_only=True` or `random_calib=N`.
        stress: a second data set, in any of these forms, that the result has to match the original on as well.
        client: a `distributed.Client` whose workers calibrate, in the place of this process.
        progress: called with (stage, samples done, samples in all).
        **options: fields of `lindep_onnx.Config`.

    Raises:
        UsageError: an option has no meaning.
        ModelError: the model cannot be read or run.
        CalibrationError: the data, or the file of moments, does not fit the model.
        VerificationError: the result differs by more than allowed (not raised with `force=True`).
        BudgetError: no plan meets the budgets.
    """
    config = _config(options)
    request = Request(model, calib, stress, over=elsewhere(client, calib, config), detailed=True)
    outcome = run(request, config, Log(progress))
    return _result(outcome, config)


def apply(
    model: str | Path | onnx.ModelProto,
    plan: Plan | str | Path,
    calib: Any = None,
    *,
    stress: Any = None,
    progress: Progress | None = None,
    **options: Any,
) -> Result:
    """Carry out a plan: with the data that it was made with, and unedited, it gives the same bytes again.

    Args:
        model: a path or a model in memory; never changed.
        plan: a `Plan`, or the file of one.
        calib: calibration data, as in `compress`; not needed by a plan of what the weights prove.
        stress: a second data set, as in `compress`.
        progress: called with (stage, samples done, samples in all).
        **options: fields of `lindep_onnx.Config` to change; all others are those that the plan was made with.

    Raises:
        UsageError: the plan does not fit the model, or an option has no meaning.
        ModelError: the model cannot be read or run.
        CalibrationError: the data does not fit the model.
        VerificationError: the result differs by more than allowed (not raised with `force=True`).
        BudgetError: a budget that is asked for does not hold.
    """
    wanted = plan if isinstance(plan, Plan) else Plan.load(plan)
    config = options_of(wanted, _known(options))
    outcome = run(Request(model, calib, stress, Repeated(wanted, options), detailed=True), config, Log(progress))
    return _result(outcome, config)


def trace(model: str | Path | onnx.ModelProto, **options: Any) -> TracedModel:
    """Find out which channels of a model may go at all, and what goes with what. Nothing is run.

    Args:
        model: a path or a model in memory; never changed.
        **options: fields of `lindep_onnx.Config`, for instance `exclude` or `input_range`.

    Raises:
        UsageError: an option has no meaning.
        ModelError: the model cannot be read.
    """
    return load_and_trace(model, _config(options), Log())


def calibrate(
    traced: TracedModel,
    calib: Any,
    *,
    client: Any = None,
    progress: Progress | None = None,
    **options: Any,
) -> Calibrated:
    """Run calibration data through a traced model, and keep what `plan` needs to know about it.

    Args:
        traced: what `trace` returned.
        calib: calibration data, as in `compress`.
        client: a `distributed.Client` whose workers run the data, in the place of this process.
        progress: called with (stage, samples done, samples in all).
        **options: fields of `lindep_onnx.Config`, for instance `max_samples` or `seed`.

    Returns:
        A context manager: it may hold temporary files, which go when it is left or collected.

    Raises:
        UsageError: an option has no meaning, or belongs to `trace`.
        CalibrationError: the data, or the file of moments, does not fit the model.
    """
    config = _later(traced.config, options, "trace", TraceOptions)
    log = Log(progress)
    with half_the_cores(), ExitStack() as stack:
        samples = open_data(traced, calib, config, log, stack)
        stored = traced.stored or traced.structure.model
        runtime = Runtime.named(config.providers, config.threads)
        if stored.folder is None:  # a large one cannot be traced again from its protobuf alone
            traced, samples = fitted(stored.proto, traced, samples, runtime, log)
        with blamed_on_data(traced, samples, runtime):
            feeds = None if samples is None else next(iter(samples.batches(limit=1))).feeds
            traced, refused = without_refused(traced, runtime, feeds)
            samples = samples if samples is None else replace(samples, notes=(*samples.notes, *refused))
            found = calibrate_samples(traced, samples, config, runtime, log, elsewhere(client, calib, config))
        calibrated = replace(found, opened=stack.pop_all())
    if config.save_moments is not None:
        calibrated.save_moments(config.save_moments)
    return calibrated


def plan(calibrated: Calibrated, *, progress: Progress | None = None, **options: Any) -> Plan:
    """Decide what goes. Nothing is written, and the model is not changed; `apply` does that.

    Args:
        calibrated: what `calibrate` returned.
        progress: called with (stage, done, all).
        **options: fields of `lindep_onnx.Config`, for instance a budget.

    Raises:
        UsageError: an option has no meaning, or belongs to `trace` or `calibrate`.
        VerificationError: what may go changes the outputs by more than allowed.
        BudgetError: no plan meets the budgets.
    """
    config = _later(calibrated.config, options, "trace or calibrate", TraceOptions, DataOptions, MomentsOptions)
    if config.rounds > 1:
        raise UsageError("A plan is one cut, and rounds make several: use compress for rounds.")
    with half_the_cores():
        runtime = Runtime.named(config.providers, config.threads)
        round_ = open_round(calibrated, config, runtime, Log(progress))
        result = choose(round_)
        failure = result.failure or strict_failure(round_.judge.verdict(result.evaluation), config)
    if failure is not None and not config.force:
        raise failure
    return to_plan(calibrated.traced.structure, result, config.described())


def inspect(model: str | Path | onnx.ModelProto, **options: Any) -> Inspection:
    """Say what may be removed from a model, what its weights prove redundant, and what blocks the rest. No data.

    Args:
        model: a path or a model in memory; never changed.
        **options: fields of `lindep_onnx.Config`, for instance `exclude` or `input_range`.

    Raises:
        UsageError: an option has no meaning.
        ModelError: the model cannot be read.
    """
    return inspect_model(model, _config(options), Log())


def compare(
    original: str | Path | onnx.ModelProto,
    other: str | Path | onnx.ModelProto,
    calib: Any,
    *,
    progress: Progress | None = None,
    **options: Any,
) -> Report:
    """Run two models on the same data: error, agreement, size and latency of the second beside the first.

    Args:
        original: the model to compare with.
        other: the model that is to stand in for it, with the same inputs and outputs; whoever made it.
        calib: data, as in `compress`; all of it is used.
        progress: called with (stage, done, all).
        **options: fields of `lindep_onnx.Config`, for instance `min_agreement`.

    Raises:
        UsageError: an option has no meaning.
        ModelError: a model cannot be read or run, or they have other inputs or outputs.
        CalibrationError: the data does not fit the model.
        BudgetError: a limit on quality does not hold (not raised with `force=True`).
    """
    config = _config(options)
    report, failure = compare_models(original, other, calib, config, Log(progress))
    if failure is not None and not config.force:
        raise failure
    return report


def sweep(
    model: str | Path | onnx.ModelProto,
    calib: Any,
    *,
    progress: Progress | None = None,
    **options: Any,
) -> Sweep:
    """Compress a model to several budgets on one calibration.

    Args:
        model: a path or a model in memory; never changed.
        calib: calibration data, as in `compress`.
        progress: called with (stage, done, all).
        **options: fields of `lindep_onnx.Config`; of `params`, `macs`, `size`, `channels` and `latency` one is a list
            of shares.

    Raises:
        UsageError: an option has no meaning, or there is nothing to sweep over.
        ModelError: the model cannot be read or run.
        CalibrationError: the data does not fit the model.
    """
    several = {name: options[name] for name in SWEPT if isinstance(options.get(name), (list, tuple))}
    if len(several) != 1:
        raise UsageError(f"A sweep takes a list of shares for one of {', '.join(SWEPT)}.")
    ((over, shares),) = several.items()
    rest = {name: value for name, value in options.items() if name != over}
    return sweep_models(model, calib, Swept(over, tuple(shares)), _config(rest), Log(progress))


def _known(options: Mapping[str, Any]) -> Mapping[str, Any]:
    unknown = options.keys() - declared(Config).keys()
    if unknown:
        raise UsageError(f"Unknown option {sorted(unknown)[0]!r}; the options are the fields of lindep_onnx.Config.")
    return options


def _config(options: Mapping[str, Any]) -> Config:
    return Config(**_known(options))


def _later(config: Config, options: Mapping[str, Any], stage: str, *used: type[Options]) -> Config:
    """The options with what is given now. Groups that the stages before have used already cannot change any more."""
    late = sorted(name for group in used for name in declared(group) if name in options)
    if late:
        raise UsageError(f"{late[0]} comes too late here: give it to {stage}.")
    return replace(config, **_known(options))


def _result(outcome: Outcome, config: Config) -> Result:
    if outcome.failure is not None and not config.force:
        raise outcome.failure
    return Result(embedded(outcome.model.proto, outcome.model.folder), outcome.report, outcome.plan)

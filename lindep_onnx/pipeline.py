"""The stages in order: load, trace, prove, calibrate, price, choose, distill, verify, report."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from lindep_onnx._version import __version__
from lindep_onnx.calibration import archive
from lindep_onnx.calibration.collect import ShardRunner, collect_statistics
from lindep_onnx.calibration.pairs import collect_pairs
from lindep_onnx.calibration.runnable import baked_batch, blamed_on_data, shapes_in_batches
from lindep_onnx.calibration.statistics import Statistics, statistics
from lindep_onnx.data.samples import Samples, open_samples
from lindep_onnx.data.sources import RandomInputs
from lindep_onnx.data.split import Part
from lindep_onnx.distill.rounds import contract_in_rounds
from lindep_onnx.errors import BudgetError, LindepError, UsageError, VerificationError
from lindep_onnx.files import check_writable
from lindep_onnx.log import Log
from lindep_onnx.model.checks import as_model_error, check_model, full_check_passes
from lindep_onnx.model.edit import GraphEdits, apply_edits
from lindep_onnx.model.fused import fused_operators
from lindep_onnx.model.ir import Model
from lindep_onnx.model.save import check_output, save
from lindep_onnx.model.weights import check_unchanged
from lindep_onnx.moves.kinds import MOVES, changeable
from lindep_onnx.options import Config, ImageOptions, declared
from lindep_onnx.planning.budgets import COMPARED
from lindep_onnx.planning.builder import Builder, Workpiece
from lindep_onnx.planning.judge import Judge, Reference
from lindep_onnx.planning.loadable import check_opens, without_refused
from lindep_onnx.planning.plan_file import Plan, ResolvedPlan, resolve_plan, to_plan
from lindep_onnx.planning.pricing import TimeTable
from lindep_onnx.planning.round import Round
from lindep_onnx.planning.strategies import choose, preview, replayed
from lindep_onnx.planning.values import Result
from lindep_onnx.proofs.prove import prove
from lindep_onnx.proofs.traced import TracedModel, inputs_of, load_and_trace, samples_per_run, with_ranks
from lindep_onnx.report.build import Finished, build_report, verification_of
from lindep_onnx.report.values import Report
from lindep_onnx.runtime.backend import Runtime
from lindep_onnx.runtime.targets import WidthRule, resolved
from lindep_onnx.structure.steps import Prices
from lindep_onnx.structure.types import Structure
from lindep_onnx.verify.group_errors import measure_groups
from lindep_onnx.verify.variants import Variant, compare_variants
from lindep_onnx.verify.verdict import Verdict


@dataclass(frozen=True)
class Outcome:
    """A finished run, good or bad.

    Attributes:
        model: the smaller model.
        report: what was done and measured.
        failure: why the result must not be used; None if all is well.
        plan: what went; None if it took several rounds.
    """

    model: Model
    report: Report
    failure: LindepError | None
    plan: Plan | None = None


@dataclass(frozen=True)
class Files:
    """Where to write what; None for nothing.

    Attributes:
        output: the smaller model.
        external_data: whether its weights go into a file of their own.
        save_plan: what went.
    """

    output: Path | None = None
    external_data: bool = False
    save_plan: Path | None = None


@dataclass(frozen=True)
class Repeated:
    """A plan to carry out, and the options that are given now, beside its own."""

    plan: Plan
    changed: Mapping[str, Any]


@dataclass(frozen=True)
class Request:
    """What one run is asked to do, beside its options.

    Attributes:
        source: the model, a path or in memory.
        calib: calibration data; None without.
        stress: a second data set that the result has to match the original on as well; None without.
        repeated: a plan to carry out; None to make one.
        over: runs the calibration in the place of this process; None for this process.
        files: where to write what.
        detailed: whether the report also says how long each layer takes, and what other reductions would cost where a
            budget is asked for.
        preview: whether it says the latter without a budget too.
    """

    source: str | Path | onnx.ModelProto
    calib: Any = None
    stress: Any = None
    repeated: Repeated | None = None
    over: ShardRunner | None = None
    files: Files = Files()
    detailed: bool = False
    preview: bool = False


@dataclass(frozen=True)
class Calibrated:
    """What calibration data says about a traced model. A context manager: it may hold temporary files.

    Attributes:
        traced: the model.
        samples: the data; None without any.
        saved: what was found by running it; None if that is too little, or random, to conclude anything.
        statistics: the same as linear algebra.
        config: the options so far.
        opened: what to close.
    """

    traced: TracedModel
    samples: Samples | None
    saved: archive.SavedStatistics | None
    statistics: Statistics | None
    config: Config
    opened: ExitStack | None = None

    def __enter__(self) -> Calibrated:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.opened is not None:
            self.opened.close()

    @property
    def understood(self) -> TracedModel:
        """The model, by its name in version 0.1."""
        return self.traced

    @property
    def uncertain(self) -> NDArray[np.bool_]:
        """(units,) bool, channels that never changed, but might."""
        return np.zeros(self.traced.structure.units, dtype=bool) if self.saved is None else self.saved.uncertain

    def save_moments(self, path: str | Path, prices: Prices | None = None) -> None:
        """Keep what was found, so that `calibrate(..., load_moments=path)` need not run the data again.

        Args:
            path: where to.
            prices: curves that a budget was priced with.

        Raises:
            UsageError: nothing was found.
            OutputError: the file cannot be written.
        """
        if self.saved is None or self.saved.calibration is None or self.samples is None:
            raise UsageError("There is nothing to save: the data is none, random or too little.")
        saved = replace(self.saved, prices={**self.saved.prices, **(prices or {})})
        archive.save(Path(path), saved, archive.key(self.traced.structure, self.samples, self.config))


def run(request: Request, config: Config, log: Log) -> Outcome:
    """`compress` or `apply`, but failed verification is a value, and files are written."""
    _check(request, config)
    runtime = Runtime.named(config.providers, config.threads)
    traced = load_and_trace(request.source, config, log)
    repeated = request.repeated
    with half_the_cores(), ExitStack() as stack:
        samples = open_data(traced, request.calib, config, log, stack)
        traced, samples = fitted(request.source, traced, samples, runtime, log)
        stack.enter_context(blamed_on_data(traced, samples, runtime))
        feeds = None if samples is None else next(iter(samples.batches(limit=1))).feeds
        traced, refused = without_refused(traced, runtime, feeds)
        wanted = None if repeated is None else resolve_plan(repeated.plan, traced.structure, repeated.changed)
        stressing = open_data(traced, request.stress, _for_stress(config, request.stress), log, stack)
        calibrated = calibrate(traced, samples, config, runtime, log, request.over)
        if config.save_moments is None and calibrated.saved is not None:  # as large as the statistics
            calibrated = replace(calibrated, saved=replace(calibrated.saved, calibration=None))
        with as_model_error(traced.structure.model.proto) if samples is None else nullcontext():
            round_, result = _decided(calibrated, config, runtime, log, wanted)
        previewed = request.detailed if config.budgeted else request.preview and config.random_calib is None
        if previewed and wanted is None:
            result = replace(result, frontier=preview(replace(round_, prices=result.prices)))
        if config.save_moments is not None:
            calibrated.save_moments(config.save_moments, result.prices)
        result = replace(result, notes=(*result.notes, *refused))
        model, finished = verified(calibrated, round_, result, log)
        failure = finished.result.failure or strict_failure(finished.verdict, config)
        if stressing is not None:
            finished, failed = _stressed(finished, round_, stressing, log)
            failure = failure or failed
        if request.detailed and changeable(traced.structure):
            finished = _profiled(finished, round_)
        report = build_report(finished, calibrated.statistics, calibrated.uncertain, config, log)
    saved = to_plan(traced.structure, finished.result, finished.options) if config.rounds == 1 else None
    check_unchanged(traced.stored.folder)
    if failure is None or config.force:
        write(model, saved, request.files, partial(check_opens, runtime, traced.stored))
    return Outcome(model, report, failure, saved)


def fitted(
    source: str | Path | onnx.ModelProto, traced: TracedModel, samples: Samples | None, runtime: Runtime, log: Log
) -> tuple[TracedModel, Samples | None]:
    """Model and data with what each says about the other: numbers of axes, and a batch that is baked in."""
    if samples is None:
        return traced, None
    traced = with_ranks(source, traced, samples.ranks, log)
    size = baked_batch(traced, samples, runtime)
    if size is None:
        return traced, samples
    note = f"A shape inside the model fixes batches of {size}, whatever its inputs declare: it was run in those."
    samples = replace(samples.in_batches_of(size), notes=(*samples.notes, note))
    return load_and_trace(source, traced.config, log, shapes_in_batches(traced, size)), samples


def _check(request: Request, config: Config) -> None:
    """Find out before the work whether what is asked for can be done."""
    files, repeated = request.files, request.repeated
    needs_data = not config.proven_only and (repeated is None or repeated.plan.mode != "proven")
    if request.calib is None and config.random_calib is None and needs_data:
        raise UsageError("Calibration data is missing: give --calib DATA, or --proven-only to use the weights alone.")
    if request.calib is not None and config.random_calib is not None:
        raise UsageError("--random-calib takes the place of --calib: give one of them.")
    if config.rounds > 1 and files.save_plan is not None:
        raise UsageError("--save-plan: a plan is one cut, and --rounds makes several; drop one of them.")
    if files.output is not None:
        check_output(request.source, files.output)
        if files.external_data:
            check_writable(files.output.with_name(files.output.name + ".data"))
    for path in (config.save_moments, files.save_plan, config.checkpoint):
        if path is not None:
            check_writable(Path(path))


def _for_stress(config: Config, source: Any) -> Config:
    """Random inputs are no stress, and options for images need not be about this data set too."""
    config = replace(config, random_calib=None, max_samples=None)
    if isinstance(source, (str, Path)) and Path(source).is_dir():
        return config
    images: Mapping[str, Any] = dict.fromkeys(declared(ImageOptions))
    return replace(config, **images)


def open_data(traced: TracedModel, source: Any, config: Config, log: Log, stack: ExitStack) -> Samples | None:
    """Samples from a source; None without one.

    Args:
        traced: the model that will be fed.
        source: calibration data in any of its forms.
        config: the options.
        log: told how far it is.
        stack: closes the samples.
    """
    if source is None and config.random_calib is not None:
        source = RandomInputs(config.random_calib)
    if source is None:
        return None
    with log.stage("read data"):
        batch_size = config.batch_size or samples_per_run(traced.structure.shape_info)
        samples = open_samples(source, inputs_of(traced), replace(config, batch_size=batch_size), log)
    return stack.enter_context(samples)


def half_the_cores() -> AbstractContextManager[Any]:
    """BLAS threads that compete with ONNX Runtime's, or with other programs, wait for each other.

    Measured on two busy cores: refits 8 times slower with two threads than with one.
    """
    limits: AbstractContextManager[Any] = threadpool_limits(max(1, (os.cpu_count() or 1) // 2), user_api="blas")
    return limits


def calibrate(
    traced: TracedModel, samples: Samples | None, config: Config, runtime: Runtime, log: Log, over: ShardRunner | None
) -> Calibrated:
    """Run the data, here or elsewhere, or read what an earlier run found.

    Args:
        traced: the model.
        samples: the data; None without.
        config: the options.
        runtime: what models run on.
        log: told of stages and how far they are.
        over: runs the data in the place of this process; None for this process.

    Raises:
        UsageError: moments are asked for and none are collected.
        CalibrationError: the data, or the file of moments, does not fit the model.
    """
    random = config.random_calib is not None and not config.budgeted  # nothing that was merely observed may go
    usable = samples is not None and len(samples.parts[Part.FIT]) and not config.proven_only and not random
    if samples is None or not usable:
        if config.save_moments or config.load_moments:
            raise UsageError(
                "--save-moments and --load-moments are about calibration, and none runs here (--proven-only, random "
                "inputs without a budget, or fewer than 3 samples); drop them."
            )
        return Calibrated(traced, samples, None, None, config)
    if not (changeable(traced.structure) or config.save_moments or config.load_moments):
        return Calibrated(traced, samples, None, None, config)
    if config.load_moments is None:
        return _observed(traced, samples, config, runtime, log, over)
    with log.stage("load moments"):
        key = archive.key(traced.structure, samples, config)
        saved = archive.load(Path(config.load_moments), traced.structure, samples, key)
        assert saved.calibration is not None
        found = statistics(traced.structure, saved.calibration)
    return Calibrated(traced, samples, saved, found, config)


def _observed(
    traced: TracedModel, samples: Samples, config: Config, runtime: Runtime, log: Log, over: ShardRunner | None
) -> Calibrated:
    structure = traced.structure
    with log.stage("calibrate"):
        seen, found, uncertain = collect_statistics(structure, samples, runtime, log, seed=config.seed, over=over)
        pairs = tuple(pair for move in MOVES for pair in move.pairs(structure))
        if pairs:
            joint = collect_pairs(structure, samples, pairs, runtime=runtime, seed=config.seed, log=log)
            found = replace(found, pairs=joint)
    return Calibrated(traced, samples, archive.SavedStatistics(seen, uncertain, {}), found, config)


def open_round(
    calibrated: Calibrated,
    config: Config,
    runtime: Runtime,
    log: Log,
    wanted: ResolvedPlan | None = None,
    original: TracedModel | None = None,
) -> Round:
    """Where one round decides.

    Args:
        calibrated: the model that the round changes, and what the data says about it.
        config: the options of the round.
        runtime: what models run on.
        log: told of stages and how far they are.
        wanted: a plan to carry out; None to make one.
        original: what results are compared with; None where that is the model itself.
    """
    traced, structure = calibrated.traced, calibrated.traced.structure
    whole = original or traced
    uncertain = calibrated.uncertain & ~traced.proof.constant
    piece = Workpiece(structure, traced.proof, calibrated.statistics, uncertain, calibrated.samples, MOVES)
    shape_info = structure.shape_info
    moved = whole.structure.shape_info.moved_samples(whole.structure.model.outputs)
    reference = Reference(whole.as_run, whole.stored, shape_info.activation_bytes, moved)
    judge = Judge(reference, calibrated.samples, config, runtime, log, wanted)
    # Those of a plan that is carried out again count among them.
    options = {**(wanted.plan.options if wanted is not None else {}), **config.described()}
    metadata = json.dumps({"version": __version__, "options": options}, sort_keys=True)
    builder = Builder(piece, judge, config, metadata, runtime, log)
    rule = WidthRule(
        resolved(config.target, config.providers),
        blocks=config.latency is not None,
        fixed=None if config.round_to == "auto" else config.round_to,
    )
    times = TimeTable(whole.structure.model, structure.model, judge, config, runtime, log, rule)
    prices = {} if calibrated.saved is None else calibrated.saved.prices
    return Round(piece, builder, judge, times, config, options, whole.rounding, prices, rule)


def _decided(
    calibrated: Calibrated, config: Config, runtime: Runtime, log: Log, wanted: ResolvedPlan | None
) -> tuple[Round, Result]:
    """The result that is asked for, and the round that it is reported by: the first."""
    traced, samples = calibrated.traced, calibrated.samples

    def decide(current: Structure, options: Config) -> tuple[Round, Result]:
        if current is traced.structure:
            first = open_round(calibrated, options, runtime, log, wanted)
            return first, choose(first) if wanted is None else replayed(first, wanted)
        assert samples is not None
        proof = prove(current, traced.ranges, half=traced.rounding > 0)
        smaller = replace(traced, structure=current, proof=proof)
        observed = _observed(smaller, samples, config, runtime, log, None)
        later = open_round(observed, options, runtime, log, original=traced)
        return later, choose(later)

    again = config.rounds > 1 or config.recover is not None
    if samples is not None and again and changeable(traced.structure):
        return contract_in_rounds(traced.structure, samples, config, decide, runtime, log)
    return decide(traced.structure, config)


def verified(calibrated: Calibrated, round_: Round, result: Result, log: Log) -> tuple[Model, Finished]:
    """The model as it is written, checked in every way that it may be run."""
    traced, samples, judge = calibrated.traced, calibrated.samples, round_.judge
    structure, model = traced.structure, result.candidate.model
    with log.stage("verify"):
        written = judge.stored(model)
        if not result.candidate.decision and round_.config.recover is None:
            written = apply_edits(traced.stored, GraphEdits(), round_.builder.metadata)
        else:
            result = replace(result, notes=(*result.notes, *_written_out(traced.stored, written)))
        original_passed = full_check_passes(traced.stored.proto) is None
        check_model(written.proto, original_passed=original_passed)
        errors: dict[int, float] = {}
        variants: tuple[Variant, ...] = ()
        if samples is not None and changeable(structure):
            seed = round_.config.seed
            errors = measure_groups(structure, result.removed, model, samples, round_.runtime, seed=seed)
            usual = partial(judge.sessions, model)
            variants = compare_variants(traced.as_run, model, usual, samples, inputs_of(traced), judge.shares)
        failure = result.failure or _variant_failure(variants)
        result = replace(result, evaluation=replace(result.evaluation, failure=failure))
    mode, options, verdict = judge.budgets.mode, round_.options, judge.verdict(result.evaluation)
    return written, Finished(traced, samples, result, judge.before, mode, options, variants, errors, verdict)


def _written_out(stored: Model, written: Model) -> tuple[str, ...]:
    """What is said where operators that ONNX Runtime had fused are no longer so."""
    gone = sorted(set(fused_operators(stored)) - set(fused_operators(written)))
    if not gone:
        return ()
    return (
        f"Operators that ONNX Runtime had fused ({', '.join(gone)}) are written as the standard ones that they fuse; "
        "ONNX Runtime fuses them again when it loads the model.",
    )


def strict_failure(verdict: Verdict, config: Config) -> LindepError | None:
    """Why a result must not be used where nothing but a limit on quality that holds will do; None if all is well."""
    if not config.strict or verdict.status != "unchecked":
        return None
    return BudgetError(f"--strict: the quality was not checked: {verdict.reason}. Nothing was written.")


def _stressed(finished: Finished, round_: Round, stressing: Samples, log: Log) -> tuple[Finished, LindepError | None]:
    judge = round_.judge
    with log.stage("stress"):
        compared = judge.compare(finished.result.candidate.model, stressing.batches())
        lossless = None if finished.mode == "budgeted" else judge.is_lossless(compared.relative_error)
        failure = judge.budgets.stress_failure(compared, lossless) or judge.budgets.chance_failure(compared)
        budgets, different = replace(judge.budgets, holdout=2.0), sum(map(stressing.different, Part))  # all verify
        verdict = budgets.verdict(compared, failure, judged=COMPARED, different=different)
        stressed = verification_of(compared, verdict, "stress samples")
    return replace(finished, stressed=stressed), failure


def _profiled(finished: Finished, round_: Round) -> Finished:
    """The same with the times of layers, or with the reason why there are none."""
    result = finished.result
    try:
        return replace(finished, layer_times=round_.judge.layer_times(result.candidate.model))
    except LindepError as error:
        note = f"No times of single layers were measured. {error}"
        return replace(finished, result=replace(result, notes=(*result.notes, note)))


def write(model: Model, plan: Plan | None, files: Files, check: Callable[[Path], None]) -> None:
    """Write what was asked for.

    Args:
        model: the result.
        plan: what went; None if that is not to be written.
        files: where to.
        check: raises if a file that was written is not to take its name.
    """
    if files.output is not None:
        save(model.proto, model.folder, files.output, external_data=files.external_data, check=check)
    if files.save_plan is not None and plan is not None:
        plan.save(files.save_plan)


def _variant_failure(variants: Sequence[Variant]) -> LindepError | None:
    for variant in variants:
        if not variant.passed:
            return VerificationError(
                f"Run {variant.name}, the result differs from the original by {variant.relative_error:.2g}, more than "
                "as usual. Nothing was written; this is a fault of this package, please report it with the model."
            )
    return None

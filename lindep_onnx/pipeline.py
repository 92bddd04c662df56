"""The stages in order: load, trace, calibrate, analyse, plan, reconstruct, rewrite, verify, report."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
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

from lindep_onnx.calibration import archive
from lindep_onnx.calibration import collect as learning
from lindep_onnx.calibration import statistics as analysis
from lindep_onnx.data.samples import Samples, open_samples
from lindep_onnx.data.sources import RandomInputs
from lindep_onnx.data.split import Part
from lindep_onnx.distill.rounds import contract_in_rounds
from lindep_onnx.errors import LindepError, OutputError, UsageError, VerificationError
from lindep_onnx.log import Log
from lindep_onnx.model import ir as graph
from lindep_onnx.model.checks import as_model_error, check_model, full_check_passes
from lindep_onnx.model.edit import GraphEdits, apply_edits
from lindep_onnx.model.save import save
from lindep_onnx.model.weights import check_unchanged
from lindep_onnx.options import Config, ImageOptions, declared
from lindep_onnx.planning.path import Prices
from lindep_onnx.planning.plan_file import Plan, ResolvedPlan, resolve_plan, to_plan
from lindep_onnx.planning.strategies import Workshop
from lindep_onnx.proofs.prove import prove
from lindep_onnx.report.build import group_reports, summarise, verification_of
from lindep_onnx.report.data_support import sentences, support
from lindep_onnx.report.figures import spectra
from lindep_onnx.report.values import Report, Spectrum, Support, Verification
from lindep_onnx.runtime.backend import Runtime
from lindep_onnx.structure.steps import ChannelSteps
from lindep_onnx.structure.traced import TracedModel, inputs_of, load_and_trace, samples_per_run
from lindep_onnx.structure.types import Structure
from lindep_onnx.verify.group_errors import measure_groups
from lindep_onnx.verify.variants import Variant, compare_variants


@dataclass(frozen=True)
class Outcome:
    """A finished run, good or bad.

    Attributes:
        model: the smaller model.
        report: what was done and measured.
        failure: why the result must not be used; None if all is well.
        plan: what went; None if it took several rounds.
    """

    model: graph.Model
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
class Calibrated:
    """What calibration data says about a traced model. A context manager: it may hold temporary files.

    Attributes:
        understood: the traced model.
        samples: the data; None without any.
        learned: what was found by running it; None if that is too little, or random, to conclude anything.
        statistics: the same as linear algebra.
        config: the options so far.
        opened: what to close.
    """

    understood: TracedModel
    samples: Samples | None
    learned: archive.SavedStatistics | None
    statistics: analysis.Statistics | None
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
    def uncertain(self) -> NDArray[np.bool_]:
        """(units,) bool, channels that never changed, but might."""
        return np.zeros(self.understood.channels.units, dtype=bool) if self.learned is None else self.learned.uncertain

    def save_moments(self, path: str | Path, prices: Prices | None = None) -> None:
        """Keep what was found, so that `calibrate(..., load_moments=path)` need not run the data again.

        Args:
            path: where to.
            prices: curves that a budget was priced with.

        Raises:
            UsageError: nothing was found.
            OutputError: the file cannot be written.
        """
        if self.learned is None or self.learned.calibration is None or self.samples is None:
            raise UsageError("There is nothing to save: the data is none, random or too little.")
        learned = replace(self.learned, prices={**self.learned.prices, **(prices or {})})
        archive.save(Path(path), learned, archive.key(self.understood.channels, self.samples, self.config))


def run(
    source: str | Path | onnx.ModelProto,
    calib: Any,
    config: Config,
    log: Log,
    *,
    files: Files = Files(),
    stress: Any = None,
    over: learning.ShardRunner | None = None,
    repeated: Repeated | None = None,
    preview: bool = False,
) -> Outcome:
    """`compress` or `apply`, but failed verification is a value, and files are written.

    With `outlook` the report also says what budgets would cost where none is asked for.
    """
    needs_data = not config.proven_only and (repeated is None or repeated.plan.mode != "proven")
    if calib is None and config.random_calib is None and needs_data:
        raise UsageError("Calibration data is missing: give --calib DATA, or --proven-only to use the weights alone.")
    if calib is not None and config.random_calib is not None:
        raise UsageError("--random-calib takes the place of --calib: give one of them.")
    if config.rounds > 1 and files.save_plan is not None:
        raise UsageError("--save-plan: a plan is one cut, and --rounds makes several; drop one of them.")
    if files.output is not None:
        _check_output(source, files.output)
    for path in (config.save_moments, files.save_plan):
        if path is not None:
            _check_folder(Path(path))
    runtime = runtime_of(config)
    understood = load_and_trace(source, config, log)
    replayed = None if repeated is None else resolve_plan(repeated.plan, understood.channels, repeated.changed)
    with ExitStack() as stack:
        stack.enter_context(half_the_cores())
        samples = opened(understood, calib, config, config.max_samples, log, stack)
        stressing = opened(understood, stress, _for_stress(config, stress), None, log, stack)
        calibrated = learn(understood, samples, config, runtime, log, over)
        if config.save_moments is None and calibrated.learned is not None:  # as large as the evidence
            calibrated = replace(calibrated, learned=replace(calibrated.learned, calibration=None))
        return _run(calibrated, stressing, config, files, runtime, log, replayed, preview)


def runtime_of(config: Config) -> Runtime:
    """What models run on.

    Args:
        config: the options.
    """
    return Runtime.named(config.providers, config.threads)


def _check_output(source: str | Path | onnx.ModelProto, output: Path) -> None:
    in_file = not isinstance(source, onnx.ModelProto) and Path(source).exists()
    if in_file and output.exists() and output.samefile(source):
        raise UsageError(f"{output}: is the input model; name another file to write.")
    _check_folder(output)


def _check_folder(path: Path) -> None:
    """Find out before the work whether a file can be written."""
    if path.is_dir():
        raise OutputError(f"{path}: is a directory; name a file to write.")
    if not path.parent.is_dir():
        raise OutputError(f"{path}: the folder {path.parent} does not exist; create it or name another.")
    if not os.access(path.parent, os.W_OK):
        raise OutputError(f"{path}: the folder {path.parent} cannot be written to; name another.")


def _for_stress(config: Config, source: Any) -> Config:
    """Random inputs are no stress, and options for images need not be about this data set too."""
    config = replace(config, random_calib=None)
    if isinstance(source, (str, Path)) and Path(source).is_dir():
        return config
    images: Mapping[str, Any] = dict.fromkeys(declared(ImageOptions))
    return replace(config, **images)


def opened(
    understood: TracedModel,
    source: Any,
    config: Config,
    max_samples: int | None,
    log: Log,
    stack: ExitStack,
) -> Samples | None:
    """Samples from a source; None without one."""
    if source is None and config.random_calib is not None:
        source = RandomInputs(config.random_calib)
    if source is None:
        return None
    with log.stage("read data"):
        batch_size = config.batch_size or samples_per_run(understood.channels.shape_info)
        options = replace(config, max_samples=max_samples, batch_size=batch_size)
        samples = open_samples(source, inputs_of(understood), options, log)
    return stack.enter_context(samples)


def half_the_cores() -> AbstractContextManager[Any]:
    """BLAS threads that compete with ONNX Runtime's, or with other programs, wait for each other.

    Measured on two busy cores: refits 8 times slower with two threads than with one.
    """
    limits: AbstractContextManager[Any] = threadpool_limits(max(1, (os.cpu_count() or 1) // 2), user_api="blas")
    return limits


def learn(
    understood: TracedModel,
    samples: Samples | None,
    config: Config,
    runtime: Runtime,
    log: Log,
    over: learning.ShardRunner | None,
) -> Calibrated:
    """Run the data, here or elsewhere, or read what an earlier run found."""
    random = config.random_calib is not None and not config.budgeted  # nothing that was merely observed may go
    learned: archive.SavedStatistics | None = None
    statistics: analysis.Statistics | None = None
    if samples is not None and len(samples.parts[Part.FIT]) and not config.proven_only and not random:
        if config.load_moments is not None:
            with log.stage("load moments"):
                key = archive.key(understood.channels, samples, config)
                learned = archive.load(Path(config.load_moments), understood.channels, samples, key)
                assert learned.calibration is not None
                statistics = analysis.statistics(understood.channels, learned.calibration)
        else:
            learned, statistics = _observed(understood.channels, samples, config, runtime, log, over)
    if learned is None and (config.save_moments or config.load_moments):
        raise UsageError(
            "--save-moments and --load-moments are about calibration, and none runs here (--proven-only, random inputs "
            "without a budget, or fewer than 3 samples); drop them."
        )
    return Calibrated(understood, samples, learned, statistics, config)


def _observed(
    structure: Structure,
    samples: Samples,
    config: Config,
    runtime: Runtime,
    log: Log,
    over: learning.ShardRunner | None = None,
) -> tuple[archive.SavedStatistics, analysis.Statistics]:
    with log.stage("calibrate"):
        seen, statistics, uncertain = learning.collect_statistics(
            structure, samples, runtime, log, seed=config.seed, over=over
        )
    return archive.SavedStatistics(seen, uncertain, {}), statistics


def first_round(
    calibrated: Calibrated,
    config: Config,
    runtime: Runtime,
    log: Log,
    replayed: ResolvedPlan | None = None,
) -> Workshop:
    """Where the first round decides.

    Args:
        calibrated: what the data says.
        config: the options.
        runtime: what models run on.
        log: told of stages and how far they are.
        replayed: a plan to carry out; None to make one.
    """
    understood, learned = calibrated.understood, calibrated.learned
    return Workshop(
        understood.channels,
        calibrated.statistics,
        calibrated.uncertain,
        understood.proof,
        calibrated.samples,
        config,
        runtime,
        log,
        half=understood.half,
        prices=None if learned is None else learned.prices,
        replayed=replayed,
    )


def _run(
    calibrated: Calibrated,
    stressing: Samples | None,
    config: Config,
    files: Files,
    runtime: Runtime,
    log: Log,
    replayed: ResolvedPlan | None,
    preview: bool,
) -> Outcome:
    understood, samples, statistics = calibrated.understood, calibrated.samples, calibrated.statistics
    channels, proof, half, uncertain = understood.channels, understood.proof, understood.half, calibrated.uncertain
    original_passed = full_check_passes((half or channels.model).proto) is None

    def open_round(current: Structure, options: Config) -> Workshop:
        if current is channels:
            return first_round(calibrated, options, runtime, log, replayed)
        assert samples is not None
        learned, found_out = _observed(current, samples, config, runtime, log)
        known = prove(current, understood.ranges, half=half is not None)
        return Workshop(
            current, found_out, learned.uncertain, known, samples, options,
            runtime, log, half=half, reference=channels.model,
        )  # fmt: skip

    with as_model_error(channels.model.proto) if samples is None else nullcontext():
        if samples is not None and (config.rounds > 1 or config.recover is not None):
            workshop, chosen = contract_in_rounds(channels, samples, config, open_round, runtime, log)
        else:
            workshop = open_round(channels, config)
            chosen = workshop.choose()
    if preview and not chosen.frontier and replayed is None and config.random_calib is None:
        chosen = replace(chosen, frontier=workshop.preview())
    if config.save_moments is not None:
        calibrated.save_moments(config.save_moments, chosen.prices)
    with log.stage("verify"):
        result = workshop.stored(chosen.model)
        if half is not None and not chosen.removed.any():
            result = apply_edits(half, GraphEdits(), workshop.metadata)
        check_model(result.proto, original_passed=original_passed)
        errors: dict[int, float] = {}
        variants: tuple[Variant, ...] = ()
        if samples is not None:
            errors = measure_groups(channels, chosen.removed, chosen.model, samples, runtime, seed=config.seed)
            variants = compare_variants(
                channels.model, chosen.model, partial(workshop.sessions, chosen.model), samples,
                inputs_of(understood), workshop.shares,
            )  # fmt: skip
        chosen = replace(chosen, failure=chosen.failure or _variant_failure(variants))
    stressed: Verification | None = None
    failure = chosen.failure
    if stressing is not None:
        with log.stage("stress"):
            compared = workshop.compared(chosen.model, stressing)
            stress_failure = workshop.stress_failure(compared)
            where = "the stress data, which nothing was fitted to or chosen by"
            stressed = verification_of(compared, stress_failure is None, where)
            failure = failure or stress_failure
    found: dict[int, Support] = {}
    curves: dict[int, Spectrum] = {}
    if samples is not None and statistics is not None:
        with log.stage("statistics"):
            steps = ChannelSteps(chosen.removed, chosen.kind, chosen.folds)
            found = support(channels, statistics, steps, proof.steps.removed)
            curves = spectra(channels, statistics)
            kept = int((uncertain & statistics.inactive & ~chosen.removed).sum())
            notes = (*chosen.notes, *sentences(found, kept, len(samples)))
            chosen = replace(chosen, notes=notes)
    groups = tuple(group_reports(understood, chosen, errors, found, curves))
    report = summarise(understood, workshop, chosen, groups, variants, stressed, samples, config, log.seconds)
    saved = to_plan(channels, chosen, workshop.options) if config.rounds == 1 else None
    check_unchanged((half or channels.model).folder)
    if failure is None or config.force:
        if files.output is not None:
            save(result.proto, result.folder, files.output, external_data=files.external_data)
        if files.save_plan is not None and saved is not None:
            saved.save(files.save_plan)
    return Outcome(result, report, failure, saved)


def _variant_failure(variants: Sequence[Variant]) -> LindepError | None:
    for variant in variants:
        if not variant.passed:
            return VerificationError(
                f"Run {variant.name}, the result differs from the original by {variant.relative_error:.2g}, more than "
                "as usual. Nothing was written; this is a fault of this package, please report it with the model."
            )
    return None

"""The stages in order: load, trace, calibrate, analyse, plan, reconstruct, rewrite, verify, report."""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnxruntime
import scipy
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from lindep_onnx import analysis, archive, cluster, graph, learning, verify
from lindep_onnx._version import __version__
from lindep_onnx.anneal import anneal
from lindep_onnx.budget import Chosen, Workshop
from lindep_onnx.channels import Channels
from lindep_onnx.config import Config
from lindep_onnx.cost import Cost
from lindep_onnx.data import InputSpec, Part, Samples, open_samples
from lindep_onnx.errors import LindepError, ModelError, OutputError, UsageError, VerificationError
from lindep_onnx.groups import measure_groups
from lindep_onnx.ladder import Prices, savings
from lindep_onnx.plan import KINDS
from lindep_onnx.portrait import Redundancy, layers, redundancy
from lindep_onnx.precision import resolution, widened
from lindep_onnx.proven import Proof, prove, ranges_of
from lindep_onnx.replay import Plan, Replay, named, options_of, replay
from lindep_onnx.report import BudgetReport, GroupReport, RefusalReport, Report, Size, Verification
from lindep_onnx.shapes import Resolved, resolve
from lindep_onnx.sources import RandomInputs
from lindep_onnx.support import Support, sentences, support
from lindep_onnx.tracing import trace as walk
from lindep_onnx.variants import Variant, compare_variants

__all__ = [
    "RANDOM",
    "Calibrated",
    "Files",
    "Outcome",
    "Repeated",
    "Result",
    "Understood",
    "apply",
    "calibrate",
    "compress",
    "following",
    "plan",
    "run",
    "trace",
    "understand",
]

Progress: TypeAlias = Callable[[str, int, int], None]

#: What is said first where there is no real data.
RANDOM = (
    "WARNING: random inputs took the place of calibration data. They are nothing like real ones: errors, agreement and "
    "refits are about noise, and the accuracy on real data may be far below. Give --calib DATA before using the result."
)
#: Bytes that the activations of one run may take, were all of them kept, and the most samples in a run.
ACTIVATION_BYTES, MOST_BATCH = 1 << 27, 32


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


@dataclass(frozen=True)
class Outcome:
    """A finished run, good or bad.

    Attributes:
        model: the smaller model.
        report: what was done and measured.
        failure: why the result must not be used; None if all is well.
        plan: what went; None if it took several rounds.
    """

    model: onnx.ModelProto
    report: Report
    failure: LindepError | None
    plan: Plan | None = None


def compress(
    model: str | Path | onnx.ModelProto,
    calib: Any = None,
    *,
    stress: Any = None,
    client: Any = None,
    progress: Progress | None = None,
    save_moments: str | Path | None = None,
    load_moments: str | Path | None = None,
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
        save_moments: a file to keep what calibration found in, for other budgets.
        load_moments: such a file, in place of running the calibration; `calib` still chooses and verifies.
        **options: fields of `lindep_onnx.Config`.

    Raises:
        UsageError: an option has no meaning.
        ModelError: the model cannot be read or run.
        CalibrationError: the data, or the file of moments, does not fit the model.
        VerificationError: the result differs by more than allowed (not raised with `force=True`).
        BudgetError: no plan meets the budgets.
    """
    files = Files(save_moments=_path(save_moments), load_moments=_path(load_moments))
    config = _config(options)
    outcome = run(model, calib, config, files=files, stress=stress, client=client, progress=progress or _silent)
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
    outcome = run(model, calib, config, stress=stress, progress=progress or _silent, repeated=Repeated(wanted, options))
    return _result(outcome, config)


def trace(model: str | Path | onnx.ModelProto, **options: Any) -> Understood:
    """Find out which channels of a model may go at all, and what goes with what. Nothing is run.

    Args:
        model: a path or a model in memory; never changed.
        **options: fields of `lindep_onnx.Config`, for instance `exclude` or `input_range`.

    Raises:
        UsageError: an option has no meaning.
        ModelError: the model cannot be read.
    """
    return understand(model, _config(options))


def calibrate(
    traced: Understood,
    calib: Any,
    *,
    client: Any = None,
    progress: Progress | None = None,
    save_moments: str | Path | None = None,
    load_moments: str | Path | None = None,
    **options: Any,
) -> Calibrated:
    """Run calibration data through a traced model, and keep what `plan` needs to know about it.

    Args:
        traced: what `trace` returned.
        calib: calibration data, as in `compress`.
        client: a `distributed.Client` whose workers run the data, in the place of this process.
        progress: called with (stage, samples done, samples in all).
        save_moments: a file to keep what was found in.
        load_moments: such a file, in place of running the data.
        **options: fields of `lindep_onnx.Config`, for instance `max_samples` or `seed`.

    Returns:
        A context manager: it may hold temporary files, which go when it is left or collected.

    Raises:
        UsageError: an option has no meaning, or belongs to `trace`.
        CalibrationError: the data, or the file of moments, does not fit the model.
    """
    _refuse_late(options, TRACING, "trace")
    files = Files(save_moments=_path(save_moments), load_moments=_path(load_moments))
    config = replace(traced.config, **_known(options))
    clock, tell = _Clock(), progress or _silent
    with _half_the_cores(), ExitStack() as stack:
        samples = _opened(traced, calib, config, config.max_samples, clock, tell, stack)
        over = _over(traced, calib, config, client)
        calibrated = replace(_learn(traced, samples, config, files, clock, tell, over), opened=stack.pop_all())
    if files.save_moments is not None:
        calibrated.save_moments(files.save_moments)
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
    _refuse_late(options, TRACING | SAMPLING, "trace or calibrate")
    config = replace(calibrated.config, **_known(options))
    if config.rounds > 1:
        raise UsageError("A plan is one cut, and rounds make several: use compress for rounds.")
    with _half_the_cores():
        chosen = _workshop(calibrated, config, _Clock(), progress or _silent).choose()
    if chosen.failure is not None and not config.force:
        raise chosen.failure
    return named(calibrated.understood.channels, chosen, config.described())


#: Options that the first stages have used already.
TRACING = frozenset(("include", "exclude", "min_channels", "input_range"))
SAMPLING = frozenset(
    ("seed", "holdout", "max_samples", "batch_size", "image_size", "resize", "scale", "mean", "std", "layout", "color")
)


def _refuse_late(options: Mapping[str, Any], early: frozenset[str], stage: str) -> None:
    late = sorted(early & options.keys())
    if late:
        raise UsageError(f"{late[0]} comes too late here: give it to {stage}.")


def _known(options: Mapping[str, Any]) -> Mapping[str, Any]:
    unknown = options.keys() - Config.__dataclass_fields__.keys()
    if unknown:
        raise UsageError(f"Unknown option {sorted(unknown)[0]!r}; the options are the fields of lindep_onnx.Config.")
    return options


def _config(options: Mapping[str, Any]) -> Config:
    return Config(**_known(options))


def _path(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)


def _result(outcome: Outcome, config: Config) -> Result:
    if outcome.failure is not None and not config.force:
        raise outcome.failure
    return Result(outcome.model, outcome.report, outcome.plan)


def _silent(stage: str, done: int, total: int) -> None:
    pass


@dataclass(frozen=True)
class Files:
    """Where to write what, and what to read besides model and data; None for nothing.

    Attributes:
        output: the smaller model.
        external_data: whether its weights go into a file of their own.
        save_moments: what calibration found.
        load_moments: what it found before, in place of running it.
        save_plan: what went.
    """

    output: Path | None = None
    external_data: bool = False
    save_moments: Path | None = None
    load_moments: Path | None = None
    save_plan: Path | None = None


@dataclass(frozen=True)
class Repeated:
    """A plan to carry out, and the options that are given now, beside its own."""

    plan: Plan
    changed: Mapping[str, Any]


def run(
    source: str | Path | onnx.ModelProto,
    calib: Any,
    config: Config,
    *,
    files: Files = Files(),
    stress: Any = None,
    client: Any = None,
    progress: Progress = _silent,
    repeated: Repeated | None = None,
    outlook: bool = False,
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
    for path in filter(None, (files.save_moments, files.save_plan)):
        _check_folder(path)
    clock = _Clock()
    understood = understand(source, config, clock.stage)
    replayed = None if repeated is None else replay(repeated.plan, understood.channels, repeated.changed)
    with ExitStack() as stack:
        stack.enter_context(_half_the_cores())
        samples = _opened(understood, calib, config, config.max_samples, clock, progress, stack)
        stressing = _opened(understood, stress, _for_stress(config, stress), None, clock, progress, stack)
        over = _over(understood, calib, config, client)
        calibrated = _learn(understood, samples, config, files, clock, progress, over)
        return _run(calibrated, stressing, config, clock, files, progress, replayed, outlook)


def _over(understood: Understood, calib: Any, config: Config, client: Any) -> learning.Over | None:
    """Who runs the calibration in the place of this process, if anyone does."""
    if client is None or calib is None:
        return None
    options = config.include, config.exclude, config.min_channels
    batch_size = config.batch_size or _batch_size(understood.channels.resolved)
    return cluster.Workers(client, calib, _inputs(understood), batch_size, options)


def _half_the_cores() -> AbstractContextManager[Any]:
    """BLAS threads that compete with ONNX Runtime's, or with other programs, wait for each other.

    Measured on two busy cores: refits 8 times slower with two threads than with one.
    """
    limits: AbstractContextManager[Any] = threadpool_limits(max(1, (os.cpu_count() or 1) // 2), user_api="blas")
    return limits


def _for_stress(config: Config, source: Any) -> Config:
    """Random inputs are no stress, and options for images need not be about this data set too."""
    config = replace(config, random_calib=None)
    if isinstance(source, (str, Path)) and Path(source).is_dir():
        return config
    return replace(config, image_size=None, resize=None, scale=None, mean=None, std=None, layout=None, color=None)


def _opened(
    understood: Understood,
    source: Any,
    config: Config,
    max_samples: int | None,
    clock: _Clock,
    progress: Progress,
    stack: ExitStack,
) -> Samples | None:
    """Samples from a source; None without one."""
    if source is None and config.random_calib is not None:
        source = RandomInputs(config.random_calib)
    if source is None:
        return None
    with clock.stage("read data"):
        samples = open_samples(
            source,
            _inputs(understood),
            seed=config.seed,
            holdout=config.holdout,
            max_samples=max_samples,
            batch_size=config.batch_size or _batch_size(understood.channels.resolved),
            preprocessing=config.preprocessing,
            progress=progress,
        )
    return stack.enter_context(samples)


@dataclass(frozen=True)
class Understood:
    """What the model alone says.

    Attributes:
        name: of the file, or of the graph of a model in memory.
        channels: the traced model.
        ranges: lowest and highest value of inputs, where they are known.
        proof: what follows from the weights.
        half: the model as it is stored, where that is in half precision: all else is about a copy in single precision.
        config: the options so far.
    """

    name: str
    channels: Channels
    ranges: Mapping[str, tuple[float, float]]
    proof: Proof
    half: onnx.ModelProto | None
    config: Config


def understand(
    source: str | Path | onnx.ModelProto, config: Config, stage: Callable[[str], Any] = nullcontext
) -> Understood:
    """Everything that needs no data.

    Raises:
        ModelError: the model cannot be read, or is not well formed.
        UsageError: an input range names no input.
    """
    with stage("load"):
        model = graph.load(source)
        half = model.proto if resolution(model.proto) else None
    with following(model.proto, source):
        with stage("load"):
            if half is not None:
                model = graph.load(widened(half))
            resolved = resolve(model)
        with stage("trace"):
            channels = walk(
                model, resolved, include=config.include, exclude=config.exclude, min_channels=config.min_channels
            )
        with stage("prove"):
            ranges = ranges_of(model, config.input_range)
            proof = prove(channels, ranges, half=half is not None)
    name = Path(source).name if isinstance(source, (str, Path)) else model.proto.graph.name
    return Understood(name, channels, ranges, proof, half, config)


@contextmanager
def following(proto: onnx.ModelProto, source: object = None) -> Iterator[None]:
    """Blame what goes wrong inside on the model: rules rely on what the ONNX standard says, and nothing has run it yet.

    Args:
        proto: the model.
        source: its path, for the message.

    Raises:
        ModelError: instead of any other exception.
    """
    try:
        yield
    except LindepError:
        raise
    except Exception as error:
        name = source if isinstance(source, (str, Path)) else proto.graph.name or "the model"
        fault = verify.full_check_passes(proto)
        if fault is not None:
            raise ModelError(f"{name}: is not a valid ONNX model, and cannot be followed: {fault}") from error
        raise ModelError(
            f"{name}: cannot be followed ({type(error).__name__}: {str(error)[:200]}).\n"
            "If ONNX Runtime runs it, run again with --debug and report it."
        ) from error


@dataclass(frozen=True)
class Calibrated:
    """What calibration data says about a traced model. A context manager: it may hold temporary files.

    Attributes:
        understood: the traced model.
        samples: the data; None without any.
        learned: what was found by running it; None if that is too little, or random, to conclude anything.
        evidence: the same as linear algebra.
        config: the options so far.
        opened: what to close.
    """

    understood: Understood
    samples: Samples | None
    learned: archive.Learned | None
    evidence: analysis.Evidence | None
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
    def doubtful(self) -> NDArray[np.bool_]:
        """(units,) bool, channels that never changed, but might."""
        return np.zeros(self.understood.channels.units, dtype=bool) if self.learned is None else self.learned.doubtful

    def save_moments(self, path: str | Path, prices: Prices | None = None) -> None:
        """Keep what was found, so that `calibrate(..., load_moments=path)` need not run the data again.

        Args:
            path: where to.
            prices: curves that a budget was priced with.

        Raises:
            UsageError: nothing was found.
            OutputError: the file cannot be written.
        """
        if self.learned is None or self.samples is None:
            raise UsageError("There is nothing to save: the data is none, random or too little.")
        learned = replace(self.learned, prices={**self.learned.prices, **(prices or {})})
        archive.save(Path(path), learned, archive.key(self.understood.channels, self.samples, self.config))


def _learn(
    understood: Understood,
    samples: Samples | None,
    config: Config,
    files: Files,
    clock: _Clock,
    progress: Progress,
    over: learning.Over | None,
) -> Calibrated:
    """Run the data, here or elsewhere, or read what an earlier run found."""
    random = config.random_calib is not None and not config.budgeted  # nothing that was merely observed may go
    learned: archive.Learned | None = None
    evidence: analysis.Evidence | None = None
    if samples is not None and len(samples.parts[Part.FIT]) and not config.proven_only and not random:
        if files.load_moments is not None:
            with clock.stage("load moments"):
                key = archive.key(understood.channels, samples, config)
                learned = archive.load(files.load_moments, understood.channels, samples, key)
                evidence = analysis.evidence(understood.channels, learned.calibration)
        else:
            learned, evidence = _observed(understood.channels, samples, config, clock, progress, over)
    if learned is None and (files.save_moments or files.load_moments):
        raise UsageError(
            "--save-moments and --load-moments are about calibration, and none runs here (--proven-only, random inputs "
            "without a budget, or fewer than 3 samples); drop them."
        )
    return Calibrated(understood, samples, learned, evidence, config)


def _observed(
    channels: Channels,
    samples: Samples,
    config: Config,
    clock: _Clock,
    progress: Progress,
    over: learning.Over | None = None,
) -> tuple[archive.Learned, analysis.Evidence]:
    runtime: dict[str, Any] = {"providers": config.providers, "threads": config.threads}
    with clock.stage("calibrate"):
        seen, evidence, doubtful = learning.learn(
            channels, samples, seed=config.seed, progress=progress, over=over, **runtime
        )
    return archive.Learned(seen, doubtful, {}), evidence


def _workshop(
    calibrated: Calibrated,
    config: Config,
    clock: _Clock,
    progress: Progress,
    replayed: Replay | None = None,
) -> Workshop:
    understood, learned = calibrated.understood, calibrated.learned
    return Workshop(
        understood.channels,
        calibrated.evidence,
        calibrated.doubtful,
        understood.proof,
        calibrated.samples,
        config,
        clock.stage,
        progress,
        half=understood.half,
        prices=None if learned is None else learned.prices,
        replayed=replayed,
    )


def _run(
    calibrated: Calibrated,
    stressing: Samples | None,
    config: Config,
    clock: _Clock,
    files: Files,
    progress: Progress,
    replayed: Replay | None,
    outlook: bool,
) -> Outcome:
    understood, samples, evidence = calibrated.understood, calibrated.samples, calibrated.evidence
    channels, proof, half, doubtful = understood.channels, understood.proof, understood.half, calibrated.doubtful
    runtime: dict[str, Any] = {"providers": config.providers, "threads": config.threads}
    original_passed = verify.full_check_passes(channels.model.proto if half is None else half) is None

    def open_round(current: Channels, options: Config) -> Workshop:
        if current is channels:
            return _workshop(calibrated, options, clock, progress, replayed)
        assert samples is not None
        learned, found_out = _observed(current, samples, config, clock, progress)
        known = prove(current, understood.ranges, half=half is not None)
        return Workshop(
            current, found_out, learned.doubtful, known, samples, options,
            clock.stage, progress, half=half, reference=channels.model,
        )  # fmt: skip

    with following(channels.model.proto) if samples is None else nullcontext():
        if samples is not None and (config.rounds > 1 or config.recover is not None):
            workshop, chosen = anneal(channels, samples, config, open_round, clock.stage, progress)
        else:
            workshop = open_round(channels, config)
            chosen = workshop.choose()
    if outlook and not chosen.frontier and replayed is None and config.random_calib is None:
        chosen = replace(chosen, frontier=workshop.outlook())
    if files.save_moments is not None:
        calibrated.save_moments(files.save_moments, chosen.prices)
    with clock.stage("verify"):
        result = workshop.stored(chosen.proto)
        if half is not None and not chosen.removed.any():
            result = graph.edit(graph.load(half), graph.Edits(), workshop.metadata)
        verify.check_model(result, original_passed=original_passed)
        errors = measure_groups(channels, chosen, samples, seed=config.seed, **runtime) if samples is not None else {}
        variants: tuple[Variant, ...] = ()
        if samples is not None:
            variants = compare_variants(channels.model.proto, chosen.proto, samples, _inputs(understood), **runtime)
        chosen = replace(chosen, failure=chosen.failure or _variant_failure(variants))
    stressed: Verification | None = None
    failure = chosen.failure
    if stressing is not None:
        with clock.stage("stress"):
            compared = workshop.compared(chosen.proto, stressing)
            stress_failure = workshop.stress_failure(compared)
            where = "the stress data, which nothing was fitted to or chosen by"
            stressed = _verification(compared, stress_failure is None, where)
            failure = failure or stress_failure
    found: dict[int, Support] = {}
    curves: dict[int, Redundancy] = {}
    if samples is not None and evidence is not None:
        with clock.stage("statistics"):
            found = support(channels, evidence, chosen, proof)
            curves = redundancy(channels, evidence)
            kept = int((doubtful & evidence.silent & ~chosen.removed).sum())
            notes = (*chosen.notes, *sentences(found, kept, len(samples)))
            chosen = replace(chosen, notes=notes)
    groups = tuple(_group_reports(understood, chosen, errors, found, curves))
    report = _report(understood, workshop, chosen, groups, variants, stressed, samples, config, clock)
    saved = named(channels, chosen, workshop.options) if config.rounds == 1 else None
    if failure is None or config.force:
        if files.output is not None:
            graph.save(result, files.output, external_data=files.external_data)
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


class _Clock:
    """Seconds spent in each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


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


def _inputs(understood: Understood) -> list[InputSpec]:
    model, resolved, ranges = understood.channels.model, understood.channels.resolved, understood.ranges
    specs = []
    for value in model.proto.graph.input:
        if value.name in model.inputs:
            if not value.type.HasField("tensor_type"):
                kind = (value.type.WhichOneof("value") or "unknown type").removesuffix("_type")
                raise ModelError(
                    f"Input {value.name!r} is a {kind}, and calibration data holds tensors: use --proven-only, which "
                    "needs no data, or export the model with tensor inputs."
                )
            dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            shape = resolved.shapes.get(value.name, ())
            specs.append(InputSpec(value.name, dtype, shape, ranges.get(value.name)))
    return specs


def _batch_size(resolved: Resolved) -> int:
    """As many samples as keep the activations of one run within `ACTIVATION_BYTES`, unknown sizes counted as 1."""
    computed = (shape for name, shape in resolved.shapes.items() if name not in resolved.constants)
    elements = sum(math.prod(size for size in shape[1:] if isinstance(size, int)) for shape in computed)
    return max(1, min(MOST_BATCH, ACTIVATION_BYTES // max(1, 4 * elements)))


def _verification(
    found: verify.Comparison, passed: bool, data: str, variants: tuple[Variant, ...] = ()
) -> Verification:
    return Verification(
        samples=found.samples,
        relative_error=found.relative_error,
        max_abs_error=found.max_abs_error,
        agreement=found.agreement,
        passed=passed,
        data=data,
        worst_samples=found.worst_samples,
        worst_errors=found.worst_errors,
        outputs=found.outputs,
        variants=variants,
    )


def _report(
    understood: Understood,
    workshop: Workshop,
    chosen: Chosen,
    groups: tuple[GroupReport, ...],
    variants: tuple[Variant, ...],
    stressed: Verification | None,
    samples: Samples | None,
    config: Config,
    clock: _Clock,
) -> Report:
    verification = None
    if chosen.comparison is not None:
        where = "calibration samples that nothing was fitted to or chosen by"
        if config.random_calib is not None:
            where = "random inputs, which say little about real ones"
        verification = _verification(chosen.comparison, chosen.failure is None, where, variants)
    latency = chosen.latency or (None, None)
    before = workshop.before
    return Report(
        before=_size(before, latency[0]),
        after=_size(chosen.cost, latency[1]),
        verification=verification,
        stress=stressed,
        groups=groups,
        refusals=tuple(
            RefusalReport(refusal.reason.code, refusal.nodes, refusal.channels, refusal.reason.message)
            for refusal in understood.channels.refusals
        ),
        budget=tuple(
            BudgetReport(kind, float(getattr(config, kind)), reached) for kind, reached in chosen.achieved.items()
        ),
        seconds=clock.seconds,
        versions={
            "lindep_onnx": __version__,
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
            "numpy": np.__version__,
            "scipy": scipy.__version__,
            "python": platform.python_version(),
        },
        options=workshop.options,
        notes=(
            *([RANDOM] if config.random_calib is not None else []),
            *(samples.notes if samples is not None else ()),
            *chosen.notes,
        ),
        mode=workshop.mode,
        model=understood.name,
        layers=tuple(layers(understood.channels, chosen.removed)),
        frontier=chosen.frontier,
    )


def _size(cost: Cost, latency: float | None) -> Size:
    return Size(cost.parameters, cost.macs, cost.bytes, cost.channels, latency, cost.operators)


def _group_reports(
    understood: Understood,
    chosen: Chosen,
    errors: Mapping[int, float],
    found: Mapping[int, Support],
    curves: Mapping[int, Redundancy],
) -> Iterator[GroupReport]:
    channels = understood.channels
    saved = savings(channels, "parameters")
    for number, group in enumerate(channels.groups):
        gone = chosen.removed[group.units]
        kinds = chosen.kind[group.units][gone]
        proven = int((gone & understood.proof.plan.removed[group.units]).sum())
        yield GroupReport(
            name=group.name,
            channels_before=len(group.units),
            channels_after=int((~gone).sum()),
            error=errors.get(number),
            proven=proven,
            observed=int(gone.sum()) - proven,
            sites=tuple(channels.model.nodes[channels.sites[site].readers[0].node].name for site in group.sites),
            kinds={KINDS[kind]: int((kinds == kind).sum()) for kind in sorted(set(kinds.tolist())) if kind},
            support=found.get(number),
            redundancy=curves.get(number),
            saved=int(saved[group.units][gone].sum()),
        )

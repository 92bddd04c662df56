"""The stages in order: load, trace, calibrate, analyse, plan, reconstruct, rewrite, verify, report."""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnxruntime
import scipy
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from lindep_onnx import analysis, cluster, graph, learning, verify
from lindep_onnx._version import __version__
from lindep_onnx.anneal import anneal
from lindep_onnx.budget import Chosen, Workshop
from lindep_onnx.channels import Channels
from lindep_onnx.config import Config
from lindep_onnx.cost import Cost
from lindep_onnx.data import InputSpec, Part, Samples, open_samples
from lindep_onnx.errors import LindepError, ModelError, OutputError, UsageError, VerificationError
from lindep_onnx.groups import measure_groups
from lindep_onnx.plan import KINDS
from lindep_onnx.precision import resolution, widened
from lindep_onnx.proven import Proof, prove, ranges_of
from lindep_onnx.report import BudgetReport, GroupReport, RefusalReport, Report, Size, Verification
from lindep_onnx.shapes import Resolved, resolve
from lindep_onnx.support import Support, sentences, support
from lindep_onnx.tracing import trace
from lindep_onnx.variants import Variant, compare_variants

__all__ = ["Outcome", "Result", "Understood", "compress", "following", "run", "understand"]

Progress: TypeAlias = Callable[[str, int, int], None]

#: Bytes that the activations of one run may take, were all of them kept, and the most samples in a run.
ACTIVATION_BYTES, MOST_BATCH = 1 << 27, 32


@dataclass(frozen=True)
class Result:
    """What `compress` returns.

    Attributes:
        model: the smaller model.
        report: what was done and measured.
    """

    model: onnx.ModelProto
    report: Report


@dataclass(frozen=True)
class Outcome:
    """A finished run, good or bad.

    Attributes:
        model: the smaller model.
        report: what was done and measured.
        failure: why the result must not be used; None if all is well.
    """

    model: onnx.ModelProto
    report: Report
    failure: LindepError | None


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
            iterable of such dicts, or an object with `get_next()`. None only with `proven_only=True`.
        stress: a second data set, in any of these forms, that the result has to match the original on as well.
        client: a `distributed.Client` whose workers calibrate, in the place of this process.
        progress: called with (stage, samples done, samples in all).
        **options: fields of `lindep_onnx.Config`.

    Raises:
        UsageError: an option has no meaning.
        ModelError: the model cannot be read or run.
        CalibrationError: the data does not fit the model.
        VerificationError: the result differs by more than allowed (not raised with `force=True`).
        BudgetError: no plan meets the budgets.
    """
    unknown = options.keys() - Config.__dataclass_fields__.keys()
    if unknown:
        raise UsageError(f"Unknown option {sorted(unknown)[0]!r}; the options are the fields of lindep_onnx.Config.")
    config = Config(**options)
    outcome = run(model, calib, config, output=None, stress=stress, client=client, progress=progress or _silent)
    if outcome.failure is not None and not config.force:
        raise outcome.failure
    return Result(outcome.model, outcome.report)


def _silent(stage: str, done: int, total: int) -> None:
    pass


def run(
    source: str | Path | onnx.ModelProto,
    calib: Any,
    config: Config,
    *,
    output: Path | None,
    stress: Any = None,
    client: Any = None,
    external_data: bool = False,
    progress: Progress = _silent,
) -> Outcome:
    """`compress`, but failed verification is a value, and the result is written if `output` is given."""
    if calib is None and not config.proven_only:
        raise UsageError("Calibration data is missing: give --calib DATA, or --proven-only to use the weights alone.")
    if output is not None:
        _check_output(source, output)
    clock = _Clock()
    understood = understand(source, config, clock.stage)
    with ExitStack() as stack:
        # Half of the cores: BLAS threads that compete with ONNX Runtime's, or with other programs, wait for each other
        # (measured on two busy cores: refits 8 times slower with two threads than with one).
        stack.enter_context(threadpool_limits(max(1, (os.cpu_count() or 1) // 2), user_api="blas"))
        inputs = _inputs(understood)
        batch_size = config.batch_size or _batch_size(understood.channels.resolved)

        def opened(source: Any, max_samples: int | None) -> Samples | None:
            if source is None:
                return None
            with clock.stage("read data"):
                found = open_samples(
                    source,
                    inputs,
                    seed=config.seed,
                    holdout=config.holdout,
                    max_samples=max_samples,
                    batch_size=batch_size,
                )
            return stack.enter_context(found)

        over: learning.Over | None = None
        if client is not None and calib is not None:
            options = config.include, config.exclude, config.min_channels
            over = cluster.Workers(client, calib, inputs, batch_size, options)
        data = _Data(opened(calib, config.max_samples), opened(stress, None), inputs, over)
        return _run(understood, data, config, clock, output, external_data, progress)


@dataclass(frozen=True)
class Understood:
    """What the model alone says.

    Attributes:
        channels: the traced model.
        ranges: lowest and highest value of inputs, where they are known.
        proof: what follows from the weights.
        half: the model as it is stored, where that is in half precision: all else is about a copy in single precision.
    """

    channels: Channels
    ranges: Mapping[str, tuple[float, float]]
    proof: Proof
    half: onnx.ModelProto | None


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
            channels = trace(
                model, resolved, include=config.include, exclude=config.exclude, min_channels=config.min_channels
            )
        with stage("prove"):
            ranges = ranges_of(model, config.input_range)
            proof = prove(channels, ranges, half=half is not None)
    return Understood(channels, ranges, proof, half)


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
class _Data:
    """The samples to learn from, those that only judge, what the model declares about both, and who runs the former."""

    samples: Samples | None
    stress: Samples | None
    inputs: Sequence[InputSpec]
    over: learning.Over | None


def _run(
    understood: Understood,
    data: _Data,
    config: Config,
    clock: _Clock,
    output: Path | None,
    external_data: bool,
    progress: Progress,
) -> Outcome:
    channels, proof, half, samples = understood.channels, understood.proof, understood.half, data.samples
    runtime: dict[str, Any] = {"providers": config.providers, "threads": config.threads}
    original_passed = verify.full_check_passes(channels.model.proto if half is None else half) is None

    def learned_from(current: Channels) -> tuple[analysis.Evidence | None, NDArray[np.bool_]]:
        if samples is None or not len(samples.parts[Part.FIT]) or config.proven_only:
            return None, np.zeros(current.units, dtype=bool)
        with clock.stage("calibrate"):
            over = data.over if current is channels else None  # the workers know the original
            return learning.learn(current, samples, seed=config.seed, progress=progress, over=over, **runtime)

    evidence, doubtful = learned_from(channels)

    def open_round(current: Channels, options: Config) -> Workshop:
        first = current is channels
        learned = (evidence, doubtful) if first else learned_from(current)
        known = proof if first else prove(current, understood.ranges, half=half is not None)
        return Workshop(
            current, *learned, known, samples, options, clock.stage, progress, half=half, reference=channels.model
        )

    with following(channels.model.proto) if samples is None else nullcontext():
        if samples is not None and (config.rounds > 1 or config.recover is not None):
            workshop, chosen = anneal(channels, samples, config, open_round, clock.stage, progress)
        else:
            workshop = open_round(channels, config)
            chosen = workshop.choose()
    with clock.stage("verify"):
        result = workshop.stored(chosen.proto)
        if half is not None and not chosen.removed.any():
            result = graph.edit(graph.load(half), graph.Edits(), workshop.metadata)
        verify.check_model(result, original_passed=original_passed)
        errors = measure_groups(channels, chosen, samples, seed=config.seed, **runtime) if samples is not None else {}
        variants: tuple[Variant, ...] = ()
        if samples is not None:
            variants = compare_variants(channels.model.proto, chosen.proto, samples, data.inputs, **runtime)
        chosen = replace(chosen, failure=chosen.failure or _variant_failure(variants))
    stressed: Verification | None = None
    failure = chosen.failure
    if data.stress is not None:
        with clock.stage("stress"):
            compared = workshop.compared(chosen.proto, data.stress)
            stress_failure = workshop.stress_failure(compared)
            where = "the stress data, which nothing was fitted to or chosen by"
            stressed = _verification(compared, stress_failure is None, where)
            failure = failure or stress_failure
    found: dict[int, Support] = {}
    if samples is not None and evidence is not None:
        with clock.stage("statistics"):
            found = support(channels, evidence, chosen, proof)
            kept = int((doubtful & evidence.silent & ~chosen.removed).sum())
            notes = (*chosen.notes, *sentences(found, kept, len(samples)))
            chosen = replace(chosen, notes=notes)
    report = _report(understood, workshop.before, chosen, errors, found, variants, stressed, samples, config, clock)
    if output is not None and (failure is None or config.force):
        graph.save(result, output, external_data=external_data)
    return Outcome(result, report, failure)


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
    if output.is_dir():
        raise OutputError(f"{output}: is a directory; name a file to write.")
    folder = output.parent
    if not folder.is_dir():
        raise OutputError(f"{output}: the folder {folder} does not exist.")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"{output}: the folder {folder} cannot be written to.")


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
        outputs=found.outputs,
        variants=variants,
    )


def _report(
    understood: Understood,
    before: Cost,
    chosen: Chosen,
    errors: Mapping[int, float],
    found: Mapping[int, Support],
    variants: tuple[Variant, ...],
    stressed: Verification | None,
    samples: Samples | None,
    config: Config,
    clock: _Clock,
) -> Report:
    verification = None
    if chosen.comparison is not None:
        where = "calibration samples that nothing was fitted to or chosen by"
        verification = _verification(chosen.comparison, chosen.failure is None, where, variants)
    latency = chosen.latency or (None, None)
    return Report(
        before=Size(before.parameters, before.macs, before.bytes, before.channels, latency[0]),
        after=Size(chosen.cost.parameters, chosen.cost.macs, chosen.cost.bytes, chosen.cost.channels, latency[1]),
        verification=verification,
        stress=stressed,
        groups=tuple(_group_reports(understood, chosen, errors, found)),
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
        options=config.described(),
        notes=(*(samples.notes if samples is not None else ()), *chosen.notes),
        mode="proven" if config.proven_only else "budgeted" if config.budgeted else "lossless",
    )


def _group_reports(
    understood: Understood, chosen: Chosen, errors: Mapping[int, float], found: Mapping[int, Support]
) -> Iterator[GroupReport]:
    channels = understood.channels
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
        )

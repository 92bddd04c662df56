"""The stages in order: load, trace, calibrate, analyse, plan, reconstruct, rewrite, verify, report."""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnxruntime
import scipy
from threadpoolctl import threadpool_limits

from lindep_onnx import analysis, calibration, graph, silence, verify
from lindep_onnx._version import __version__
from lindep_onnx.anneal import anneal
from lindep_onnx.budget import Chosen, Workshop
from lindep_onnx.channels import Channels
from lindep_onnx.config import Config
from lindep_onnx.cost import Cost
from lindep_onnx.data import InputSpec, Part, Samples, open_samples
from lindep_onnx.errors import LindepError, OutputError, UsageError
from lindep_onnx.groups import measure_groups
from lindep_onnx.plan import KINDS
from lindep_onnx.proven import Proof, prove
from lindep_onnx.report import BudgetReport, GroupReport, RefusalReport, Report, Size, Verification
from lindep_onnx.shapes import Resolved, resolve
from lindep_onnx.tracing import trace

__all__ = ["Outcome", "Result", "compress", "run"]

Progress: TypeAlias = Callable[[str, int, int], None]

#: Bytes that the activations of one run may take, were all of them kept, and the most samples in a run.
ACTIVATION_BYTES, MOST_BATCH = 1 << 29, 32


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
    progress: Progress | None = None,
    **options: Any,
) -> Result:
    """Remove channels that are linear combinations of others, and move their weight onto the survivors.

    Args:
        model: a path or a model in memory; never changed.
        calib: calibration data: a path (see the README), a dict of arrays with samples along the leading axis, an
            iterable of such dicts, or an object with `get_next()`. None only with `proven_only=True`.
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
    outcome = run(model, calib, config, output=None, progress=progress or _silent)
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
    external_data: bool = False,
    progress: Progress = _silent,
) -> Outcome:
    """`compress`, but failed verification is a value, and the result is written if `output` is given."""
    if calib is None and not config.proven_only:
        raise UsageError("Calibration data is missing: give --calib DATA, or --proven-only to use the weights alone.")
    if output is not None:
        _check_output(source, output)
    clock = _Clock()
    with clock.stage("load"):
        model = graph.load(source)
        resolved = resolve(model)
    with clock.stage("trace"):
        channels = trace(
            model,
            resolved,
            include=config.include,
            exclude=config.exclude,
            min_channels=config.min_channels,
        )
    with clock.stage("prove"):
        proof = prove(channels)
    with ExitStack() as stack:
        # Half of the cores: BLAS threads that compete with ONNX Runtime's, or with other programs, wait for each other
        # (measured on two busy cores: refits 8 times slower with two threads than with one).
        stack.enter_context(threadpool_limits(max(1, (os.cpu_count() or 1) // 2), user_api="blas"))
        samples = None
        if calib is not None:
            with clock.stage("read data"):
                opened = open_samples(
                    calib,
                    _inputs(model, resolved),
                    seed=config.seed,
                    holdout=config.holdout,
                    max_samples=config.max_samples,
                    batch_size=config.batch_size or _batch_size(resolved),
                )
            samples = stack.enter_context(opened)
        return _run(channels, proof, samples, config, clock, output, external_data, progress)


def _run(
    channels: Channels,
    proof: Proof,
    samples: Samples | None,
    config: Config,
    clock: _Clock,
    output: Path | None,
    external_data: bool,
    progress: Progress,
) -> Outcome:
    runtime: dict[str, Any] = {"providers": config.providers, "threads": config.threads}
    original_passed = verify.full_check_passes(channels.model.proto) is None

    def open_round(current: Channels, options: Config) -> Workshop:
        evidence, doubtful = None, np.zeros(current.units, dtype=bool)
        if samples is not None and len(samples.parts[Part.FIT]) and not config.proven_only:
            with clock.stage("calibrate"):
                seen = calibration.calibrate(current, samples, seed=config.seed, progress=progress, **runtime)
                evidence = analysis.evidence(current, seen)
                watched = silence.flats(current, evidence)
                ranges = silence.observe(current, watched, samples, progress=progress, **runtime) if watched else ()
                doubtful = silence.unexplained(current.units, watched, ranges, evidence.samples)
        known = proof if current is channels else prove(current)
        return Workshop(
            current, evidence, doubtful, known, samples, options, clock.stage, progress, reference=channels.model
        )

    if samples is not None and (config.rounds > 1 or config.recover is not None):
        workshop, chosen = anneal(channels, samples, config, open_round, clock.stage, progress)
    else:
        workshop = open_round(channels, config)
        chosen = workshop.choose()
    with clock.stage("verify"):
        verify.check_model(chosen.proto, original_passed=original_passed)
        errors = measure_groups(channels, chosen, samples, seed=config.seed, **runtime) if samples is not None else {}
    report = _report(channels, workshop.before, chosen, proof, errors, samples, config, clock)
    if output is not None and (chosen.failure is None or config.force):
        graph.save(chosen.proto, output, external_data=external_data)
    return Outcome(chosen.proto, report, chosen.failure)


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


def _inputs(model: graph.Model, resolved: Resolved) -> list[InputSpec]:
    specs = []
    for value in model.proto.graph.input:
        if value.name in model.inputs:
            dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            specs.append(InputSpec(value.name, dtype, resolved.shapes.get(value.name, ())))
    return specs


def _batch_size(resolved: Resolved) -> int:
    """As many samples as keep the activations of one run within `ACTIVATION_BYTES`, unknown sizes counted as 1."""
    computed = (shape for name, shape in resolved.shapes.items() if name not in resolved.constants)
    elements = sum(math.prod(size for size in shape[1:] if isinstance(size, int)) for shape in computed)
    return max(1, min(MOST_BATCH, ACTIVATION_BYTES // max(1, 4 * elements)))


def _report(
    channels: Channels,
    before: Cost,
    chosen: Chosen,
    proof: Proof,
    errors: Mapping[int, float],
    samples: Samples | None,
    config: Config,
    clock: _Clock,
) -> Report:
    found = chosen.comparison
    verification = None
    if found is not None:
        verification = Verification(
            samples=found.samples,
            relative_error=found.relative_error,
            max_abs_error=found.max_abs_error,
            agreement=found.agreement,
            passed=chosen.failure is None,
            data="calibration samples that nothing was fitted to or chosen by",
            worst_samples=found.worst_samples,
            outputs=found.outputs,
        )
    latency = chosen.latency or (None, None)
    return Report(
        before=Size(before.parameters, before.macs, before.bytes, before.channels, latency[0]),
        after=Size(chosen.cost.parameters, chosen.cost.macs, chosen.cost.bytes, chosen.cost.channels, latency[1]),
        verification=verification,
        groups=tuple(_group_reports(channels, chosen, proof, errors)),
        refusals=tuple(
            RefusalReport(refusal.reason.code, refusal.nodes, refusal.channels, refusal.reason.message)
            for refusal in channels.refusals
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
    channels: Channels, chosen: Chosen, proof: Proof, errors: Mapping[int, float]
) -> Iterator[GroupReport]:
    for number, group in enumerate(channels.groups):
        gone = chosen.removed[group.units]
        kinds = chosen.kind[group.units][gone]
        proven = int((gone & proof.plan.removed[group.units]).sum())
        yield GroupReport(
            name=group.name,
            channels_before=len(group.units),
            channels_after=int((~gone).sum()),
            error=errors.get(number),
            proven=proven,
            observed=int(gone.sum()) - proven,
            sites=tuple(channels.model.nodes[channels.sites[site].readers[0].node].name for site in group.sites),
            kinds={KINDS[kind]: int((kinds == kind).sum()) for kind in sorted(set(kinds.tolist())) if kind},
        )

"""From the results of all stages to one report."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import scipy
from numpy.typing import NDArray

from lindep_onnx._version import __version__
from lindep_onnx.calibration.statistics import Statistics
from lindep_onnx.data.samples import Samples
from lindep_onnx.data.sources import RANDOM
from lindep_onnx.data.split import Part
from lindep_onnx.log import Log
from lindep_onnx.model.cost import Cost
from lindep_onnx.moves.kinds import MOVES
from lindep_onnx.moves.prices import savings
from lindep_onnx.options import Config
from lindep_onnx.planning.values import Evaluation, Result
from lindep_onnx.proofs.traced import TracedModel
from lindep_onnx.report.data_support import sentences, support
from lindep_onnx.report.figures import layers, next_step, spectra
from lindep_onnx.report.values import (
    BudgetReport,
    GroupReport,
    Latency,
    NextStep,
    RefusalReport,
    Report,
    Size,
    Spectrum,
    Support,
    Verification,
)
from lindep_onnx.runtime import backend
from lindep_onnx.runtime.node_times import LayerTime
from lindep_onnx.runtime.timing import Timing
from lindep_onnx.structure.steps import KINDS, ChannelSteps
from lindep_onnx.structure.types import Structure
from lindep_onnx.verify.metrics import Comparison
from lindep_onnx.verify.variants import Variant
from lindep_onnx.verify.verdict import Verdict


@dataclass(frozen=True)
class Finished:
    """A run that is decided and verified.

    Attributes:
        traced: the original.
        samples: the data; None without any.
        result: what the search ended with.
        before: what the original costs.
        mode: what was asked for: "proven", "lossless" or "budgeted".
        options: those that differ from their defaults.
        variants: comparisons in other ways of running it.
        errors: measured, by group.
        verdict: what may be said of it.
        stressed: the comparison on a second data set; None without one.
        layer_times: of the nodes of both models; empty if nobody asked.
    """

    traced: TracedModel
    samples: Samples | None
    result: Result
    before: Cost
    mode: str
    options: Mapping[str, Any]
    variants: tuple[Variant, ...]
    errors: Mapping[int, float]
    verdict: Verdict
    stressed: Verification | None = None
    layer_times: tuple[LayerTime, ...] = ()


def build_report(
    finished: Finished, statistics: Statistics | None, uncertain: NDArray[np.bool_], config: Config, log: Log
) -> Report:
    """Put the report of a run together.

    Args:
        finished: the run.
        statistics: what the data says about the original; None if it is too little to say anything.
        uncertain: (units,) bool, channels that never changed, but might.
        config: the options.
        log: the seconds of its stages are reported.
    """
    traced, result, samples = finished.traced, finished.result, finished.samples
    found: dict[int, Support] = {}
    curves: dict[int, Spectrum] = {}
    notes = result.notes
    if samples is not None and statistics is not None:
        with log.stage("statistics"):
            own = result.candidate.decision.channels
            known = own if result.candidate.mode == "lossless" else ChannelSteps(own.removed, own.kind, {})
            found = support(traced.structure, statistics, known, traced.proof.steps.removed)
            curves = spectra(traced.structure, statistics)
            kept = int((uncertain & statistics.inactive & ~result.removed).sum())
            notes = (*notes, *sentences(found, kept, sum(map(samples.different, Part))))
    latency = None if result.latency is None else _latency(result.latency)
    read = (traced.stored or traced.structure.model).notes
    random, achieved = config.random_calib is not None, result.evaluation.achieved.items()
    return Report(
        before=_size(finished.before, None if latency is None else latency.before_ms),
        after=_size(result.evaluation.cost, None if latency is None else latency.after_ms),
        verification=_verification(finished, random),
        stress=finished.stressed,
        groups=tuple(_group_reports(finished, found, curves)),
        refusals=refusal_reports(traced.structure),
        budget=tuple(BudgetReport(kind, float(getattr(config, kind)), reached) for kind, reached in achieved),
        seconds=log.seconds,
        versions=_versions(),
        options=finished.options,
        notes=(*([RANDOM] if random else []), *read, *(samples.notes if samples is not None else ()), *notes),
        mode=finished.mode,
        model=traced.name,
        layers=tuple(layers(traced.structure, result.removed)),
        frontier=result.frontier,
        kept_for_widths=result.kept_for_widths,
        widths=result.widths,
        latency=latency,
        layer_times=finished.layer_times,
        next_step=_next_step(finished),
    )


@dataclass(frozen=True)
class Compared:
    """Two models that were compared.

    Attributes:
        traced: the original.
        before: what it costs.
        evaluation: of the other model.
        latency: of the other beside the original; None if not measured.
        verdict: what may be said of the other.
        notes: what the user should know.
    """

    traced: TracedModel
    before: Cost
    evaluation: Evaluation
    latency: Timing | None
    verdict: Verdict
    notes: tuple[str, ...]


def compared_report(compared: Compared, config: Config, log: Log) -> Report:
    """A report on a model that somebody else made.

    Args:
        compared: what was measured.
        config: the options.
        log: the seconds of its stages are reported.
    """
    evaluation, latency = compared.evaluation, None if compared.latency is None else _latency(compared.latency)
    assert evaluation.comparison is not None
    return Report(
        before=_size(compared.before, None if latency is None else latency.before_ms),
        after=_size(evaluation.cost, None if latency is None else latency.after_ms),
        verification=verification_of(evaluation.comparison, compared.verdict, "samples"),
        groups=(),
        refusals=(),
        budget=tuple(
            BudgetReport(kind, float(getattr(config, kind)), reached) for kind, reached in evaluation.achieved.items()
        ),
        seconds=log.seconds,
        versions=_versions(),
        options=config.described(),
        notes=compared.notes,
        mode="compared",
        model=compared.traced.name,
        latency=latency,
    )


def refusal_reports(structure: Structure) -> tuple[RefusalReport, ...]:
    """What every kind of change leaves alone, and why."""
    return tuple(
        RefusalReport(refusal.reason.code, refusal.nodes, refusal.channels, refusal.reason.message)
        for move in MOVES
        for refusal in move.refusals(structure)
    )


def _versions() -> dict[str, str]:
    return {
        "lindep_onnx": __version__,
        "onnx": onnx.__version__,
        "onnxruntime": backend.version(),
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "python": platform.python_version(),
    }


def _next_step(finished: Finished) -> NextStep | None:
    result = finished.result
    left = result.evaluation.cost.parameters / max(1, finished.before.parameters)
    return next_step(result.frontier, left, None if result.latency is None else result.latency.ratio)


def _verification(finished: Finished, random: bool) -> Verification | None:
    found = finished.result.evaluation.comparison
    if found is None:
        return None
    return verification_of(
        found, finished.verdict, "random inputs" if random else "held-out samples", finished.variants
    )


def _group_reports(
    finished: Finished, found: Mapping[int, Support], curves: Mapping[int, Spectrum]
) -> Iterator[GroupReport]:
    """What became of each group; what the data is worth, and spectra, are by group."""
    structure, channels = finished.traced.structure, finished.result.candidate.decision.channels
    saved = savings(structure, "parameters")
    for number, group in enumerate(structure.groups):
        gone = channels.removed[group.units]
        kinds = channels.kind[group.units][gone]
        readers = (structure.consumers[consumer].readers[0].node for consumer in group.consumers)
        proven = int((gone & finished.traced.proof.steps.removed[group.units]).sum())
        yield GroupReport(
            name=group.name,
            channels_before=len(group.units),
            channels_after=int((~gone).sum()),
            error=finished.errors.get(number),
            proven=proven,
            observed=int(gone.sum()) - proven,
            sites=tuple(structure.model.nodes[node].name for node in readers),
            kinds={KINDS[kind]: int((kinds == kind).sum()) for kind in sorted(set(kinds.tolist())) if kind},
            support=found.get(number),
            redundancy=curves.get(number),
            saved=int(saved[group.units][gone].sum()),
        )


def verification_of(found: Comparison, verdict: Verdict, data: str, variants: tuple[Variant, ...] = ()) -> Verification:
    """A comparison as a part of the report; `data` says what it was made on."""
    passed = verdict.status != "failed"
    return Verification(
        **vars(found), passed=passed, data=data, variants=variants, status=verdict.status, reason=verdict.reason
    )


def _latency(found: Timing) -> Latency:
    values = {**vars(found)}
    return Latency(values.pop("before"), values.pop("after"), differs=found.differs, **values)


def _size(cost: Cost, latency: float | None) -> Size:
    return Size(cost.parameters, cost.macs, cost.bytes, cost.channels, latency, cost.operators)

"""From the results of all stages to one report."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping

import numpy as np
import onnx
import scipy

from lindep_onnx._version import __version__
from lindep_onnx.data.samples import Samples
from lindep_onnx.data.sources import RANDOM
from lindep_onnx.model.cost import Cost
from lindep_onnx.options import Config
from lindep_onnx.planning.path import savings
from lindep_onnx.planning.strategies import Chosen, Workshop
from lindep_onnx.report.figures import layers
from lindep_onnx.report.values import (
    BudgetReport,
    GroupReport,
    RefusalReport,
    Report,
    Size,
    Spectrum,
    Support,
    Verification,
)
from lindep_onnx.runtime import backend
from lindep_onnx.structure.steps import KINDS
from lindep_onnx.structure.traced import TracedModel
from lindep_onnx.verify.metrics import Comparison
from lindep_onnx.verify.variants import Variant


def summarise(
    understood: TracedModel,
    workshop: Workshop,
    chosen: Chosen,
    groups: tuple[GroupReport, ...],
    variants: tuple[Variant, ...],
    stressed: Verification | None,
    samples: Samples | None,
    config: Config,
    seconds: Mapping[str, float],
) -> Report:
    """Put the report of a run together.

    Args:
        understood: the model.
        workshop: of the first round.
        chosen: the result.
        groups: what `group_reports` gave.
        variants: comparisons in other ways of running it.
        stressed: the comparison on a second data set.
        samples: the data.
        config: the options.
        seconds: by stage.
    """
    verification = None
    if chosen.comparison is not None:
        where = "calibration samples that nothing was fitted to or chosen by"
        if config.random_calib is not None:
            where = "random inputs, which say little about real ones"
        verification = verification_of(chosen.comparison, chosen.failure is None, where, variants)
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
        seconds=seconds,
        versions={
            "lindep_onnx": __version__,
            "onnx": onnx.__version__,
            "onnxruntime": backend.version(),
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


def group_reports(
    understood: TracedModel,
    chosen: Chosen,
    errors: Mapping[int, float],
    found: Mapping[int, Support],
    curves: Mapping[int, Spectrum],
) -> Iterator[GroupReport]:
    """What became of each group.

    Args:
        understood: the model.
        chosen: the result.
        errors: measured, by group.
        found: what the data is worth, by group.
        curves: spectra and eliminations, by group.
    """
    channels = understood.channels
    saved = savings(channels, "parameters")
    for number, group in enumerate(channels.groups):
        gone = chosen.removed[group.units]
        kinds = chosen.kind[group.units][gone]
        proven = int((gone & understood.proof.steps.removed[group.units]).sum())
        yield GroupReport(
            name=group.name,
            channels_before=len(group.units),
            channels_after=int((~gone).sum()),
            error=errors.get(number),
            proven=proven,
            observed=int(gone.sum()) - proven,
            sites=tuple(
                channels.model.nodes[channels.consumers[consumer].readers[0].node].name for consumer in group.consumers
            ),
            kinds={KINDS[kind]: int((kinds == kind).sum()) for kind in sorted(set(kinds.tolist())) if kind},
            support=found.get(number),
            redundancy=curves.get(number),
            saved=int(saved[group.units][gone].sum()),
        )


def verification_of(found: Comparison, passed: bool, data: str, variants: tuple[Variant, ...] = ()) -> Verification:
    """A comparison as a part of the report.

    Args:
        found: the comparison.
        passed: whether it is good enough.
        data: what it was made on, in words.
        variants: comparisons in other ways of running it.
    """
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


def _size(cost: Cost, latency: float | None) -> Size:
    return Size(cost.parameters, cost.macs, cost.bytes, cost.channels, latency, cost.operators)

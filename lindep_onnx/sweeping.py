"""Several budgets of one kind on one calibration, so that a limit can be chosen with the figures on the table."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx

from lindep_onnx.calibration.runnable import blamed_on_data
from lindep_onnx.errors import LindepError, UsageError
from lindep_onnx.log import Log
from lindep_onnx.model.ir import Model
from lindep_onnx.model.save import check_output
from lindep_onnx.options import Config, flag
from lindep_onnx.pipeline import (
    Calibrated,
    Files,
    calibrate,
    fitted,
    half_the_cores,
    open_data,
    open_round,
    strict_failure,
    verified,
    write,
)
from lindep_onnx.planning.loadable import check_opens, without_refused
from lindep_onnx.planning.strategies import choose
from lindep_onnx.proofs.traced import load_and_trace
from lindep_onnx.runtime.backend import Runtime
from lindep_onnx.runtime.timing import Timing
from lindep_onnx.structure.steps import Prices
from lindep_onnx.verify.metrics import Comparison

#: Options that a sweep may be over.
SWEPT = ("params", "macs", "size", "channels", "latency")


@dataclass(frozen=True)
class Swept:
    """What is tried.

    Attributes:
        over: one of `SWEPT`.
        shares: budgets.
        output: where the smallest result goes that may be used; None for nowhere.
    """

    over: str
    shares: Sequence[float]
    output: Path | None = None


@dataclass(frozen=True)
class SweepPoint:
    """What one budget comes to.

    Attributes:
        asked: the share that was asked for.
        parameters, macs, bytes: what is left, as shares of the original's.
        latency: of the result beside the original; None if not measured.
        comparison: with the original, on samples that nothing was fitted to; None if there are none.
        status: "passed", "unchecked" or "failed".
        reason: why it was not checked or failed; empty if it passed.
    """

    asked: float
    parameters: float
    macs: float
    bytes: float
    latency: Timing | None
    comparison: Comparison | None
    status: str
    reason: str


@dataclass(frozen=True)
class Sweep:
    """What several budgets come to.

    Attributes:
        model: the name of the original.
        over: the option that was swept over.
        points: in the order in which they were asked for.
        best: which of them is the smallest, or fastest, that did not fail; None if all failed.
        result: the model of that one, as it is written; None if all failed.
    """

    model: str
    over: str
    points: tuple[SweepPoint, ...]
    best: int | None
    result: Model | None


def sweep_models(source: str | Path | onnx.ModelProto, calib: Any, wanted: Swept, config: Config, log: Log) -> Sweep:
    """Compress a model to several budgets; the data runs once.

    Args:
        source: the model.
        calib: calibration data.
        wanted: what is tried.
        config: all other options; limits on quality decide which result may be used.
        log: told of stages and how far they are.

    Raises:
        UsageError: there is nothing to sweep over, or an option that needs several rounds.
        ModelError: the model cannot be read or run.
        CalibrationError: the data does not fit the model.
        OutputError: the result cannot be written.
    """
    over, shares = wanted.over, wanted.shares
    if over not in SWEPT or not shares:
        raise UsageError(f"A sweep is over one of {', '.join(map(flag, SWEPT))}, with shares such as 0.9,0.8,0.7.")
    if config.rounds > 1 or config.recover is not None:
        raise UsageError("A sweep takes neither --rounds nor --recover: choose a budget first, then recover.")
    if wanted.output is not None:
        check_output(source, wanted.output)
    settings = [replace(config, **_budget(over, share)) for share in shares]
    runtime = Runtime.named(config.providers, config.threads)
    traced = load_and_trace(source, config, log)
    with half_the_cores(), ExitStack() as stack:
        samples = open_data(traced, calib, config, log, stack)
        traced, samples = fitted(source, traced, samples, runtime, log)
        stack.enter_context(blamed_on_data(traced, samples, runtime))
        feeds = None if samples is None else next(iter(samples.batches(limit=1))).feeds
        traced, _ = without_refused(traced, runtime, feeds)
        calibrated = calibrate(traced, samples, settings[0], runtime, log, None)
        points: list[SweepPoint] = []
        best, result, least = None, None, float("inf")
        prices: Prices = {}
        for number, options in enumerate(settings):
            point, model, prices = _point(_priced(calibrated, prices), options, over, runtime, log)
            points.append(point)
            size = _size(point, over)
            if model is not None and size < least:
                best, result, least = number, model, size
            log.progress("sweep", number + 1, len(settings))
    if result is not None and wanted.output is not None:
        write(result, None, Files(wanted.output), partial(check_opens, runtime, traced.stored))
    return Sweep(traced.name, over, tuple(points), best, result)


def _budget(over: str, share: float) -> dict[str, Any]:
    return {over: share}


def _priced(calibrated: Calibrated, prices: Prices) -> Calibrated:
    """The same with the curves that an earlier point was priced with."""
    if calibrated.saved is None:
        return calibrated
    return replace(calibrated, saved=replace(calibrated.saved, prices={**calibrated.saved.prices, **prices}))


def _point(
    calibrated: Calibrated, options: Config, over: str, runtime: Runtime, log: Log
) -> tuple[SweepPoint, Model | None, Prices]:
    """One budget: what it comes to, its model if that may be used, and the curves that it was priced with."""
    round_ = open_round(calibrated, options, runtime, log)
    model, finished = verified(calibrated, round_, choose(round_), log)
    result, verdict = finished.result, finished.verdict
    failure: LindepError | None = result.failure or strict_failure(verdict, options)
    before, after = finished.before, result.evaluation.cost
    point = SweepPoint(
        asked=float(getattr(options, over)),
        parameters=after.parameters / max(1, before.parameters),
        macs=after.macs / max(1, before.macs),
        bytes=after.bytes / max(1, before.bytes),
        latency=result.latency,
        comparison=result.evaluation.comparison,
        status="failed" if failure is not None else verdict.status,
        reason=str(failure) if failure is not None else verdict.reason,
    )
    return point, model if failure is None else None, dict(result.prices)


def _size(point: SweepPoint, over: str) -> float:
    if over == "latency":
        return point.latency.ratio if point.latency is not None else 1.0
    return {"macs": point.macs, "size": point.bytes}.get(over, point.parameters)

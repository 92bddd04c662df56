"""Timings without a clock."""

from __future__ import annotations

from lindep_onnx.model.cost import cost
from lindep_onnx.model.ir import Model
from lindep_onnx.runtime.timing import Ratio, Stopwatch, Timing


def timing(ratio: float) -> Timing:
    """A result that takes this share of a millisecond, give or take one percent."""
    return Timing(1.0, ratio, ratio, 0.99 * ratio, 1.01 * ratio, Ratio(1.0, 0.99, 1.01), 10, 1, 0)


def by_work(stopwatch: Stopwatch, model: Model) -> Timing:
    """As if every multiply-accumulate took the same time."""
    shapes = {name: value.shape for name, value in stopwatch.feeds.items()}
    before, after = (cost(found, shapes, stopwatch.batch).macs for found in (stopwatch.original, model))
    return timing(after / max(1, before))

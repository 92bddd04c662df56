"""Is the result equal to the original in other ways of running it: other batches, shapes, and optimisations?

A rewritten graph can be right as it was verified and wrong elsewhere: a shape that was written down for one batch size,
or a node that the runtime's optimiser replaced. So a few samples are run in every way that the model declares, and the
result may not differ from the original by much more than it does in the usual way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx

from lindep_onnx import verify
from lindep_onnx.config import LOSSLESS_VERIFIED_ERROR
from lindep_onnx.data import Batch, InputSpec, Samples
from lindep_onnx.errors import ModelError, VerificationError
from lindep_onnx.sessions import Session, open_session

__all__ = ["Variant", "compare_variants"]

#: Samples that are run in each way, and batch sizes that are tried: one alone, and one that nobody exports for.
SAMPLES, BATCHES = 8, (1, 3)
#: Sizes that the model leaves open are multiplied by this.
STRETCH = 2


@dataclass(frozen=True)
class Variant:
    """Original and result compared in one other way of running them.

    Attributes:
        name: what is different.
        samples: how many were compared.
        relative_error: worst output error, as `lindep_onnx.verify` defines it; infinite where the result does not run
            or its outputs have other shapes.
        passed: whether it is not much larger than in the usual way. With other shapes the samples are no longer like
            those the decisions were made on: there the result has to run and give outputs of the same shapes.
    """

    name: str
    samples: int
    relative_error: float
    passed: bool


def compare_variants(
    original: onnx.ModelProto,
    result: onnx.ModelProto,
    samples: Samples,
    inputs: Sequence[InputSpec],
    *,
    providers: Sequence[str],
    threads: int,
) -> tuple[Variant, ...]:
    """Run a few samples through both models in every other way; ways that the original does not run in are left out.

    Args:
        original: the reference.
        result: the model to judge.
        samples: the data.
        inputs: what the model declares.
        providers: execution providers of ONNX Runtime.
        threads: intra-op threads, 0 for its own choice.
    """
    runtime: dict[str, Any] = {"providers": providers, "threads": threads}
    # Two sessions at a time are enough to keep in memory.
    allowed, variants = _in_other_shapes(original, result, samples, inputs, runtime)
    plain = _tried(
        "without optimisations",
        lambda: _unoptimised(original, result, runtime),
        samples.batches(limit=SAMPLES),
        allowed,
    )
    return (*plain, *variants)


def _in_other_shapes(
    original: onnx.ModelProto,
    result: onnx.ModelProto,
    samples: Samples,
    inputs: Sequence[InputSpec],
    runtime: Mapping[str, Any],
) -> tuple[float, list[Variant]]:
    """The error that is allowed, and the variants that the usual sessions can run."""
    sessions = open_session(original, **runtime), open_session(result, **runtime)
    allowed = 2 * verify.compare(*sessions, samples.batches(limit=SAMPLES)).relative_error + LOSSLESS_VERIFIED_ERROR
    variants: list[Variant] = []
    for size in BATCHES if samples.free_batch else ():
        batches = samples.batches(limit=SAMPLES, size=size)
        variants += _tried(f"in batches of {size}", lambda: sessions, batches, allowed)
    open_axes = {spec.name: _open_axes(spec) for spec in inputs}
    if any(open_axes.values()):
        stretched = _stretched(samples.batches(limit=SAMPLES // 2), open_axes)
        variants += _tried(f"with open sizes times {STRETCH}", lambda: sessions, stretched, np.finfo(float).max)
    return allowed, variants


def _tried(
    name: str, opened: Callable[[], tuple[Session, Session]], batches: Iterator[Batch], limit: float
) -> Iterator[Variant]:
    try:
        found = verify.compare(*opened(), batches)
    except ModelError:  # the original cannot
        return
    except VerificationError:
        yield Variant(name, 0, float("inf"), False)
        return
    yield Variant(name, found.samples, found.relative_error, bool(found.relative_error <= limit))


def _unoptimised(
    original: onnx.ModelProto, result: onnx.ModelProto, runtime: Mapping[str, Any]
) -> tuple[Session, Session]:
    first = open_session(original, optimised=False, **runtime)
    try:
        return first, open_session(result, optimised=False, **runtime)
    except ModelError as error:
        raise VerificationError(f"The result does not load where the original does: {error}") from error


def _open_axes(spec: InputSpec) -> tuple[int, ...]:
    """Axes behind the sample axis whose size is left open, under a name of their own."""
    shape = spec.shape or ()
    return tuple(axis for axis in range(1, len(shape)) if isinstance(shape[axis], str) and shape[axis] != shape[0])


def _stretched(batches: Iterator[Batch], axes: Mapping[str, Sequence[int]]) -> Iterator[Batch]:
    for batch in batches:
        feeds = dict(batch.feeds)
        for name, own in axes.items():
            times = [STRETCH if axis in own else 1 for axis in range(feeds[name].ndim)]
            feeds[name] = np.tile(feeds[name], times)
        yield dataclasses.replace(batch, feeds=MappingProxyType(feeds))

"""Is the result equal to the original in other ways of running it: other batches, shapes, and optimisations?

A rewritten graph can be right as it was verified and wrong elsewhere: a shape that was written down for one batch size,
or a node that the runtime's optimiser replaced. So a few samples are run in every way that the model declares, and the
result may not differ from the original by much more than it does in the usual way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lindep_onnx.data.inputs import InputSpec
from lindep_onnx.data.samples import Batch, Samples
from lindep_onnx.errors import ModelError, VerificationError
from lindep_onnx.model.ir import Model
from lindep_onnx.model.randomness import draws
from lindep_onnx.options import LOSSLESS_VERIFIED_ERROR
from lindep_onnx.runtime.backend import Purpose, Runtime, Session, Shares
from lindep_onnx.verify.compare import compare

#: Samples that are run in each way, and batch sizes that are tried: one alone, and one that nobody exports for.
SAMPLES, BATCHES = 4, (1, 3)
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
    original: Model,
    result: Model,
    usual: Callable[[], tuple[Session, Session]],
    samples: Samples,
    inputs: Sequence[InputSpec],
    shares: Shares,
) -> tuple[Variant, ...]:
    """Run a few samples through both models in every other way; ways that the original does not run in are left out.

    `usual` opens sessions of both as they usually run, and their runs have `shares`.
    """
    # Before the usual sessions are opened: two at a time are enough to keep in memory.
    plain = _error(lambda: _unoptimised(original, result, shares.each), samples.batches(limit=SAMPLES), 1)
    sessions = usual()
    error = compare(*sessions, samples.batches(limit=SAMPLES), runs=shares.runs).relative_error
    allowed = 2 * error + LOSSLESS_VERIFIED_ERROR
    tried = [("without optimisations", plain, allowed)]
    for size in BATCHES if samples.free_batch else ():
        found = _error(lambda: sessions, samples.batches(limit=SAMPLES, size=size), max(1, shares.runs // size))
        # A model that draws random numbers gets others for its samples in other batches: it has to run there.
        most = float(np.finfo(float).max) if draws(original.proto) else allowed
        tried.append((f"in batches of {size}", found, most))
    open_axes = {spec.name: _open_axes(spec) for spec in inputs}
    if any(open_axes.values()):
        stretched = _stretched(samples.batches(limit=SAMPLES // 2), open_axes)
        found = _error(lambda: sessions, stretched, 1)
        tried.append((f"with open sizes times {STRETCH}", found, float(np.finfo(float).max)))
    return tuple(
        Variant(name, found[0], found[1], bool(found[1] <= limit)) for name, found, limit in tried if found is not None
    )


def _error(
    opened: Callable[[], tuple[Session, Session]], batches: Iterator[Batch], runs: int
) -> tuple[int, float] | None:
    """Samples and error; infinite if the result does not run, None if the original does not."""
    try:
        found = compare(*opened(), batches, runs=runs)
    except ModelError:
        return None
    except VerificationError:
        return 0, float("inf")
    return found.samples, found.relative_error


def _unoptimised(original: Model, result: Model, runtime: Runtime) -> tuple[Session, Session]:
    first = runtime.open(original, purpose=Purpose.AS_WRITTEN)
    try:
        return first, runtime.open(result, purpose=Purpose.AS_WRITTEN)
    except ModelError as error:
        raise VerificationError(f"The result does not load where the original does: {error}") from error


def _open_axes(spec: InputSpec) -> tuple[int, ...]:
    """Axes beside the sample axis whose size is left open, under a name of their own."""
    sizes = enumerate(spec.shape or ())
    return tuple(axis for axis, size in sizes if isinstance(size, str) and axis != spec.axis and size != spec.samples)


def _stretched(batches: Iterator[Batch], axes: Mapping[str, Sequence[int]]) -> Iterator[Batch]:
    for batch in batches:
        feeds = dict(batch.feeds)
        for name, own in axes.items():
            feeds[name] = np.tile(feeds[name], [STRETCH if axis in own else 1 for axis in range(feeds[name].ndim)])
        yield replace(batch, feeds=feeds)

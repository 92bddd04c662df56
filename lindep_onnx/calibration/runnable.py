"""Does the original run on the data? In which batches, and on which sample does it not?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from lindep_onnx.data.samples import Samples
from lindep_onnx.errors import CalibrationError, one_line
from lindep_onnx.model.shapes import Shape, ShapeInfo
from lindep_onnx.proofs.traced import TracedModel
from lindep_onnx.runtime.backend import Runtime, Session, failure_of_run

#: Samples in a run at most, where a fixed number of them is looked for.
MOST = 256


def baked_batch(traced: TracedModel, samples: Samples, runtime: Runtime) -> int | None:
    """How many samples a model takes that declares any number, because of a fixed size somewhere inside.

    Exports for a fixed batch whose inputs were given a free one later are such models.

    Args:
        traced: the model.
        samples: the data.
        runtime: what models run on.

    Returns:
        The number; None where the model takes any, or none that is found.
    """
    sizes = [size for size in _named_inside(traced) if size <= MOST]
    if not sizes or not samples.free_batch:
        return None
    session = runtime.open(traced.structure.model)
    if _runs(session, samples, min(samples.batch, len(samples))) and _runs(session, samples, 1):
        return None
    return next((size for size in sizes if _runs(session, samples.in_batches_of(size), size)), None)


def _named_inside(traced: TracedModel) -> list[int]:
    """Leading sizes that Reshape and Expand nodes name, and 1: of that size is the batch, if it is baked in."""
    found = {1}
    model, shape_info = traced.structure.model, traced.structure.shape_info
    targets = [shape_info.constants.get(node.input(1)) for node in model.nodes if node.op in ("Reshape", "Expand")]
    leading = {int(target.ravel()[0]) for target in targets if target is not None and target.size > 1}
    found |= {size for size in leading if size > 0}
    return sorted(found) if any(size > 0 for size in leading) else []


def _runs(session: Session, samples: Samples, size: int) -> bool:
    batch = next(samples.batches(limit=size, size=size))
    try:
        session.run(None, dict(batch.feeds))
    except Exception as error:
        if failure_of_run(error) is None:
            raise
        return False
    return True


def shapes_in_batches(traced: TracedModel, size: int) -> dict[str, Shape]:
    """Shapes of the inputs with so many samples."""
    shape_info: ShapeInfo = traced.structure.shape_info
    found: dict[str, Shape] = {}
    for name, axis in traced.structure.model.batch_axes.items():
        shape = shape_info.shapes.get(name)
        if shape and axis is not None:
            found[name] = (*shape[:axis], size, *shape[axis + 1 :])
    return found


@contextmanager
def blamed_on_data(traced: TracedModel, samples: Samples | None, runtime: Runtime) -> Iterator[None]:
    """Say which sample the original cannot run on, where a run fails inside.

    Args:
        traced: the original.
        samples: the data; None without.
        runtime: what models run on.

    Raises:
        CalibrationError: in place of the failure.
    """
    try:
        yield
    except Exception as error:
        failure = failure_of_run(error)
        if samples is None or failure is None:
            raise
        session = runtime.open(traced.structure.model)
        for batch in samples.batches(size=1):
            try:
                session.run(None, dict(batch.feeds))
            except Exception as again:
                numbers = np.unique(batch.samples)
                which = f"sample {numbers[0]}" if len(numbers) == 1 else f"samples {numbers[0]} to {numbers[-1]}"
                raise CalibrationError(
                    f"The original model cannot run on {which} of {samples.where(int(numbers[0]))}: {one_line(again)}\n"
                    "Remove or repair it."
                ) from error
        raise

"""Inner tensors that a smaller model learns from its original, beside the outputs (Romero et al., "FitNets", 2015).

A channel that survives keeps its meaning: where branches are added, it holds what it held in the original. Trained
together with the outputs, these sums say far more about a sample than a few scores do, so that a training with few
samples over-fits less.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from lindep_onnx.channels import Channels
from lindep_onnx.graph import Model
from lindep_onnx.placement import Placement
from lindep_onnx.shapes import resolve

__all__ = ["Hint", "hints"]


@dataclass(frozen=True)
class Hint:
    """An inner tensor that two models have in common.

    Attributes:
        tensor: its name in both.
        axis: along which the smaller model lacks channels; not that of the samples.
        kept: (channels of the smaller model,) which channel of the original each is; None where none is missing.
    """

    tensor: str
    axis: int
    kept: NDArray[np.int64] | None


def hints(original: Channels, removed: NDArray[np.bool_], student: Model) -> tuple[Hint, ...]:
    """What a smaller model can learn from the inside of its original, in the order of the graph.

    Args:
        original: the original model, traced.
        removed: (units,) bool, what the smaller model lacks.
        student: the smaller model.
    """
    placement = Placement(original, removed)
    smaller = resolve(student)
    found = []
    for tensor in dict.fromkeys(_sums(student)):
        shape, own = original.resolved.shapes.get(tensor, ()), smaller.shapes.get(tensor, ())
        # Only what holds one sample after the other can be cut along the samples, and paired.
        samples = {original.resolved.shapes.get(name, (None,))[:1] for name in original.model.inputs}
        floats = {one.dtypes.get(tensor) for one in (original.resolved, smaller)} == {onnx.TensorProto.FLOAT}
        if tensor not in original.model.producer or not floats or len(shape) < 2 or {shape[:1]} != samples:
            continue
        axes = [label.cut for label in original.labels.get(tensor, ())]
        missing = {axis: kept for axis in axes if (kept := placement.chosen_along(tensor, axis)) is not None}
        if len(missing) > 1 or 0 in missing:
            continue
        axis, kept = next(iter(missing.items()), (1, None))
        left = tuple(len(kept) if kept is not None and place == axis else size for place, size in enumerate(shape))
        if left == own:
            found.append(Hint(tensor, axis, kept))
    return tuple(found)


def _sums(model: Model) -> Iterator[str]:
    """Where two computed tensors are added, but for outputs."""
    for node in model.nodes:
        if node.op == "Add" and all(name in model.producer for name in node.inputs):
            yield from (name for name in node.outputs if name not in model.outputs)

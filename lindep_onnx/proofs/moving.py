"""Operators that move, pick or combine positions, the same for every channel: multiples stay multiples behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from lindep_onnx.model.node import Node
from lindep_onnx.proofs.bounds import INF, BoundsContext, ChannelBounds, Rule, of_facts, options_of, widened

#: Reductions that treat positive multiples alike, and whether they are linear.
_REDUCTIONS: Mapping[str, bool] = {
    **dict.fromkeys(("ReduceMean", "ReduceSum"), True),
    **dict.fromkeys(("ReduceL1", "ReduceL2", "ReduceMax", "ReduceMin"), False),
}


def _moved(node: Node, data: ChannelBounds, axis: int) -> ChannelBounds:
    """The same channels on another axis; positions go where the other inputs and the attributes say."""
    return replace(data.renamed(node.op, options_of(node), node.inputs[1:]), axis=axis)


def _gather(node: Node, data: ChannelBounds, known: BoundsContext) -> ChannelBounds | None:
    indices, shape = known.constants.get(node.inputs[1]), known.shapes.get(node.inputs[1])
    rank = len(known.shapes.get(node.inputs[0], ()))
    if shape is None or not rank:
        return None
    picked = node.attributes.get("axis", 0) % rank
    if picked != data.axis:
        return _moved(node, data, data.axis + (len(shape) - 1 if picked < data.axis else 0))
    size = len(data.low)
    if indices is None or indices.ndim != 1 or ((indices < -size) | (indices >= size)).any():
        return None
    return data.take(indices.astype(np.int64) % size)


def _sliced(node: Node, data: ChannelBounds, known: BoundsContext) -> ChannelBounds | None:
    """A range of positions; one of channels only where all sizes are the same, that is where nothing is cut."""
    before, after = known.shapes.get(node.inputs[0], ()), known.shapes.get(node.outputs[0], ())
    same = len(before) == len(after) and before[data.axis] == after[data.axis] == len(data.low)
    backwards = node.op == "Slice" and _steps_back(node, known)
    return _moved(node, data, data.axis) if same and not backwards else None


def _steps_back(node: Node, known: BoundsContext) -> bool:
    steps = known.constants.get(node.input(4))
    return bool(node.input(4)) and (steps is None or bool((steps < 0).any()))


def _resized(node: Node, data: ChannelBounds, known: BoundsContext) -> ChannelBounds | None:
    found = _sliced(node, data, known)
    odd = node.attributes.get("coordinate_transformation_mode") == "tf_crop_and_resize"
    if found is None or odd or node.attributes.get("mode", "nearest") == "nearest":
        return None if odd else found
    return replace(found, low=np.full_like(found.low, -INF), high=np.full_like(found.high, INF))


def _padded(node: Node, data: ChannelBounds, known: BoundsContext) -> ChannelBounds | None:
    """Zeros, or copies of what is there, beyond the border of the positions."""
    found, value = _sliced(node, data, known), known.constants.get(node.input(2))
    other = node.attributes.get("value", 0.0) or (node.input(2) and (value is None or bool(value.any())))
    pads = node.attributes.get("pads", known.constants.get(node.input(1)))
    if pads is None or min(np.ravel(pads), default=0) < 0:
        return None
    if found is None or (other and node.attributes.get("mode", "constant") == "constant"):
        return None
    return replace(found, low=np.minimum(found.low, 0), high=np.maximum(found.high, 0))


def _reshaped(node: Node, data: ChannelBounds, known: BoundsContext) -> ChannelBounds | None:
    """Positions merged or split on one side of the channels, whose axis stays what it is."""
    before, after = known.shapes.get(node.inputs[0], ()), known.shapes.get(node.outputs[0], ())
    size, axis = len(data.low), data.axis
    if not before or not after:
        return None
    if axis == len(before) - 1 and after[-1] == size:
        return replace(data.renamed("Reshape", after), axis=len(after) - 1)
    fixed = axis > 0 and axis < len(after) and before[: axis + 1] == after[: axis + 1] and after[axis] == size
    return data.renamed("Reshape", after) if fixed else None


def _axes(node: Node, known: BoundsContext, rank: int) -> Sequence[int] | None:
    given = node.attributes.get("axes")
    if given is None and node.input(1):
        value = known.constants.get(node.input(1))
        given = None if value is None else value.ravel().tolist()
    return None if given is None else [int(axis) % rank for axis in given]


def _unsqueezed(node: Node, data: ChannelBounds, known: BoundsContext) -> ChannelBounds | None:
    rank = len(known.shapes.get(node.outputs[0], ()))
    axes = _axes(node, known, rank) if rank else None
    if axes is None:
        return None
    left = [axis for axis in range(rank) if axis not in axes]
    return replace(data.renamed("Unsqueeze", sorted(axes)), axis=left[data.axis])


def _squeezed(node: Node, data: ChannelBounds, known: BoundsContext) -> ChannelBounds | None:
    rank = len(known.shapes.get(node.inputs[0], ()))
    axes = _axes(node, known, rank) if rank else None
    if axes is None or data.axis in axes:
        return None
    left = data.axis - sum(axis < data.axis for axis in axes)
    return replace(data.renamed("Squeeze", sorted(axes)), axis=left)


def _reduced(node: Node, data: ChannelBounds, known: BoundsContext) -> ChannelBounds | None:
    rank = len(known.shapes.get(node.inputs[0], ()))
    axes = _axes(node, known, rank) if rank else None
    if not axes or data.axis in axes:
        return None
    axis = data.axis if node.attributes.get("keepdims", 1) else data.axis - sum(one < data.axis for one in axes)
    found = replace(data.renamed(node.op, sorted(axes)), axis=axis)
    low, high = np.full_like(data.low, -INF), np.full_like(data.high, INF)
    if node.op in ("ReduceMax", "ReduceMin"):
        low, high = widened(data.low, data.high, 2 * known.rounding)
    found = replace(found, low=low, high=high)
    return found if _REDUCTIONS[node.op] else replace(found, form=(None,) * len(low))


MOVING: Mapping[str, Rule] = {
    "Gather": of_facts(_gather),
    **dict.fromkeys(("Slice", "Expand", "Tile"), of_facts(_sliced)),
    **dict.fromkeys(("Resize", "Upsample"), of_facts(_resized)),
    "Pad": of_facts(_padded),
    "Unsqueeze": of_facts(_unsqueezed),
    "Squeeze": of_facts(_squeezed),
    **dict.fromkeys(_REDUCTIONS, of_facts(_reduced)),
}
RESHAPED = of_facts(_reshaped)

"""Operators that write to, or read from, places that indices name: what the indices do not move along passes."""

from __future__ import annotations

from collections.abc import Sequence

from lindep_onnx.model.node import Node
from lindep_onnx.structure import reasons
from lindep_onnx.structure.rules.registry import traces
from lindep_onnx.structure.tracer import Tracer
from lindep_onnx.structure.types import Atoms


@traces("ScatterND")
def scatter_nd(node: Node, tracer: Tracer) -> None:
    """Indices name places along the leading axes; the updates hold all that lies behind them."""
    data, indices, updates = node.inputs[:3]
    ranks = tracer.rank(data), tracer.rank(indices), tracer.rank(updates)
    depth = (tracer.shape(indices) or ("",))[-1]
    if None in ranks or not isinstance(depth, int):
        tracer.refuse(node, reasons.RUNTIME_SIZES)
        return
    behind = (ranks[1] or 1) - 1 - depth  # an axis of the data, as the updates count it
    passing = _together(node, tracer, [(0, 0), (2, behind)], range(depth, ranks[0] or 0))
    tracer.label_axes(node.outputs[0], passing)


@traces("GatherND")
def gather_nd(node: Node, tracer: Tracer) -> None:
    """Indices name places along the leading axes; what lies behind them is copied."""
    data, indices = node.inputs[:2]
    rank, depth = tracer.rank(data), (tracer.shape(indices) or ("",))[-1]
    if rank is None or not isinstance(depth, int):
        tracer.refuse(node, reasons.RUNTIME_SIZES)
        return
    tracer.freeze_tensor(indices, reasons.INDEXED, node)
    tracer.claim(node, 1, {})
    batch = int(node.attributes.get("batch_dims", 0))
    offset = (tracer.rank(indices) or 1) - 1 - depth - batch
    passing = _together(node, tracer, [(0, 0)], range(batch + depth, rank))
    tracer.label_axes(node.outputs[0], {axis + offset: atoms for axis, atoms in passing.items()})


@traces("ScatterElements", "Scatter", "GatherElements")
def elements(node: Node, tracer: Tracer) -> None:
    """Indices move along one axis; along the others they, and the updates, have the places of the data.

    Indices of a fixed value are sliced like the rest; computed ones have channels of their own only by chance.
    """
    rank = tracer.rank(node.inputs[0])
    shapes = [tracer.shape(name) for name in node.inputs]
    if rank is None or any(shape is None for shape in shapes) or tracer.constant(node.inputs[1]) is None:
        tracer.refuse(node, reasons.INDEXED)
        return
    moved = node.attributes.get("axis", 0) % rank
    whole = [axis for axis in range(rank) if axis != moved and len({shape[axis] for shape in shapes if shape}) == 1]
    passing = _together(node, tracer, [(position, 0) for position in range(len(node.inputs))], whole)
    tracer.label_axes(node.outputs[0], passing)


def _together(node: Node, tracer: Tracer, operands: Sequence[tuple[int, int]], axes: Sequence[int]) -> dict[int, Atoms]:
    """Link operands along some axes of the first one, slice constants alike, and freeze the other axes.

    Operands are their position, and what to add to an axis of the first one to have their own.
    """
    named = [(node.inputs[place], offset) for place, offset in operands]
    computed = [(name, offset) for name, offset in named if tracer.constant(name) is None]
    for name, offset in computed:
        moved = [axis for axis in tracer.axes(name) if axis - offset not in axes]
        tracer.freeze_tensor(name, reasons.INDEXED, node, moved)
    result = tracer.linked(node, reasons.INDEXED, computed, axes)
    for place, offset in operands:
        tracer.claim(node, place, {axis + offset: atoms for axis, atoms in result.items()})
    return result

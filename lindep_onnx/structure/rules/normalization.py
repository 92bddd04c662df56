"""Operators that rescale channels, or mix along some axes and keep the others."""

from __future__ import annotations

from collections.abc import Iterable

from lindep_onnx.model.node import Node
from lindep_onnx.structure import reasons
from lindep_onnx.structure.rules.registry import traces
from lindep_onnx.structure.tracer import Tracer

REDUCTIONS = (
    *("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd"),
    *("ReduceSum", "ReduceSumSquare"),
)


@traces("BatchNormalization")
def batch_normalization(node: Node, tracer: Tracer) -> None:
    """Scales and shifts each channel by constants of its own."""
    data = node.inputs[0]
    if node.attributes.get("training_mode", 0) or any(node.outputs[1:]):
        tracer.refuse(node, reasons.TRAINING)
        return
    _per_channel(node, tracer, data, positions=range(1, 5))


@traces("InstanceNormalization")
def instance_normalization(node: Node, tracer: Tracer) -> None:
    """Normalizes each channel of each sample over its positions."""
    tracer.freeze_tensor(
        node.inputs[0], reasons.MIXED, node, [axis for axis in tracer.axes(node.inputs[0]) if axis > 1]
    )
    _per_channel(node, tracer, node.inputs[0], positions=range(1, 3))


def _per_channel(node: Node, tracer: Tracer, data: str, positions: Iterable[int]) -> None:
    axes = tracer.axes(data)
    for position in positions:
        if tracer.constant(node.input(position)) is None:
            tracer.freeze_tensor(data, reasons.RUNTIME_PARAMETERS, node, [1])
        else:
            tracer.claim(node, position, {0: axes[1]} if 1 in axes else {})
    tracer.label_axes(node.outputs[0], axes)


@traces("LayerNormalization", "RMSNormalization")
def layer_normalization(node: Node, tracer: Tracer) -> None:
    """Mixes all axes from `axis` on."""
    data = node.inputs[0]
    rank = tracer.rank(data)
    first = node.attributes.get("axis", -1) % rank if rank else 0
    _mix(node, tracer, range(first, rank or 1))
    for position in range(1, len(node.inputs)):
        if tracer.constant(node.input(position)) is not None:
            tracer.claim(node, position, {})


@traces("GroupNormalization")
def group_normalization(node: Node, tracer: Tracer) -> None:
    """Mixes the channels of each group with all positions."""
    _mix(node, tracer, range(1, tracer.rank(node.inputs[0]) or 1))
    for position in range(1, len(node.inputs)):
        tracer.claim(node, position, {})


@traces("Softmax", "LogSoftmax", "Hardmax")
def softmax(node: Node, tracer: Tracer) -> None:
    """Mixes one axis; before opset 13 that one and all behind it."""
    rank = tracer.rank(node.inputs[0]) or 1
    if tracer.model.opset >= 13:
        _mix(node, tracer, [node.attributes.get("axis", -1)])
    else:
        _mix(node, tracer, range(node.attributes.get("axis", 1) % rank, rank))


@traces("LRN")
def local_response_normalization(node: Node, tracer: Tracer) -> None:
    """Mixes neighbouring channels."""
    _mix(node, tracer, [1])


@traces("LpNormalization")
def lp_normalization(node: Node, tracer: Tracer) -> None:
    """Mixes one axis."""
    _mix(node, tracer, [node.attributes.get("axis", -1)])


@traces("MeanVarianceNormalization")
def mean_variance_normalization(node: Node, tracer: Tracer) -> None:
    """Mixes the batch and the spatial axes by default."""
    _mix(node, tracer, node.attributes.get("axes", [0, 2, 3]))


@traces("CumSum")
def cumulative_sum(node: Node, tracer: Tracer) -> None:
    """Mixes one axis, given as an input."""
    axis = tracer.constant(node.input(1))
    _mix(node, tracer, range(tracer.rank(node.inputs[0]) or 0) if axis is None else [int(axis)])


def _mix(node: Node, tracer: Tracer, axes: Iterable[int]) -> None:
    """Freeze the mixed axes, pass the others on; input and output have the same shape."""
    data = node.inputs[0]
    rank = tracer.rank(data) or 0
    mixed = {axis % rank for axis in axes} if rank else set()
    tracer.freeze_tensor(data, reasons.MIXED, node, mixed)
    passing = {axis: atoms for axis, atoms in tracer.axes(data).items() if axis not in mixed}
    for name in node.outputs[:1]:
        tracer.label_axes(name, passing)


@traces(*REDUCTIONS)
def reduce(node: Node, tracer: Tracer) -> None:
    """Mixes the reduced axes, which vanish or become 1."""
    data = node.inputs[0]
    rank = tracer.rank(data)
    if rank is None:
        return
    reduced, unknown = node.attributes.get("axes"), False
    if reduced is None and node.input(1):
        given = tracer.constant(node.input(1))
        reduced, unknown = None if given is None else [int(axis) for axis in given.ravel()], given is None
    if not reduced and not unknown and node.attributes.get("noop_with_empty_axes", 0):
        tracer.label_axes(node.outputs[0], tracer.axes(data))
        return
    mixed = {axis % rank for axis in reduced} if reduced else set(range(rank))
    _remove_axes(node, tracer, mixed, bool(node.attributes.get("keepdims", 1)))


@traces("ArgMax", "ArgMin")
def arg_extreme(node: Node, tracer: Tracer) -> None:
    """Mixes one axis, which vanishes or becomes 1."""
    rank = tracer.rank(node.inputs[0]) or 1
    _remove_axes(node, tracer, {node.attributes.get("axis", 0) % rank}, bool(node.attributes.get("keepdims", 1)))


def _remove_axes(node: Node, tracer: Tracer, mixed: set[int], keepdims: bool) -> None:
    data = node.inputs[0]
    tracer.freeze_tensor(data, reasons.MIXED, node, mixed)
    passing = {axis: atoms for axis, atoms in tracer.axes(data).items() if axis not in mixed}
    if not keepdims:
        passing = {axis - sum(gone < axis for gone in mixed): atoms for axis, atoms in passing.items()}
    tracer.label_axes(node.outputs[0], passing)


@traces("TopK")
def top_k(node: Node, tracer: Tracer) -> None:
    """Mixes one axis; both outputs keep the others."""
    data = node.inputs[0]
    rank = tracer.rank(data) or 1
    mixed = node.attributes.get("axis", -1) % rank
    tracer.freeze_tensor(data, reasons.MIXED, node, [mixed])
    passing = {axis: atoms for axis, atoms in tracer.axes(data).items() if axis != mixed}
    for name in node.outputs:
        tracer.label_axes(name, passing)

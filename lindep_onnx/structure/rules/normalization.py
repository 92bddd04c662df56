"""Operators that rescale channels, or mix along some axes and keep the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

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
    if node.attributes.get("training_mode", 0) or any(node.outputs[1:]):
        tracer.refuse(node, reasons.TRAINING)
    else:
        _per_channel(node, tracer, positions=range(1, 5))


@traces("InstanceNormalization")
def instance_normalization(node: Node, tracer: Tracer) -> None:
    """Normalizes each channel of each sample over its positions."""
    tracer.stop(node, reasons.MIXED, [axis for axis in tracer.axes(node.inputs[0]) if axis > 1])
    _per_channel(node, tracer, positions=range(1, 3))


def _per_channel(node: Node, tracer: Tracer, positions: Iterable[int]) -> None:
    axes = tracer.axes(node.inputs[0])
    for position in positions:
        if tracer.constant(node.input(position)) is None:
            tracer.stop(node, reasons.RUNTIME_PARAMETERS, [1])
        else:
            tracer.claim(node, position, {0: axes[1]} if 1 in axes else {})
    tracer.label_axes(node.outputs[0], axes)


def _softmax_axes(node: Node, tracer: Tracer, rank: int) -> Iterable[int]:
    if tracer.model.opset >= 13:
        return [node.attributes.get("axis", -1)]
    return range(node.attributes.get("axis", 1) % rank, rank)  # that one and all behind it


def _summed_axes(node: Node, tracer: Tracer, rank: int) -> Iterable[int]:
    axis = tracer.constant(node.input(1))
    return range(rank) if axis is None else [int(axis)]


#: Which axes of so many an operator mixes, the shape staying as it is.
_MIXED: Mapping[str, Callable[[Node, Tracer, int], Iterable[int]]] = {
    **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax"), _softmax_axes),
    **dict.fromkeys(
        ("LayerNormalization", "RMSNormalization"),
        lambda node, tracer, rank: range(node.attributes.get("axis", -1) % rank, rank),
    ),
    # The channels of each group with all positions.
    "GroupNormalization": lambda node, tracer, rank: range(1, rank),
    "LRN": lambda node, tracer, rank: [1],  # neighbouring channels
    "LpNormalization": lambda node, tracer, rank: [node.attributes.get("axis", -1)],
    "MeanVarianceNormalization": lambda node, tracer, rank: node.attributes.get("axes", [0, 2, 3]),
    "CumSum": _summed_axes,
}


@traces(*_MIXED)
def mix(node: Node, tracer: Tracer) -> None:
    """Freezes the mixed axes and passes the others on; scales, biases and indices stay whole."""
    rank = tracer.rank(node.inputs[0])
    passing = tracer.stop(node, reasons.MIXED, _MIXED[node.op](node, tracer, rank) if rank else ())
    tracer.label_axes(node.outputs[0], passing)
    for position in range(1, len(node.inputs)):
        tracer.claim(node, position, {})


@traces(*REDUCTIONS)
def reduce(node: Node, tracer: Tracer) -> None:
    """Mixes the reduced axes, which vanish or become 1."""
    data = node.inputs[0]
    rank = tracer.rank(data)
    if rank is None:
        tracer.refuse(node, reasons.UNKNOWN_RANK)
        return
    reduced, unknown = node.attributes.get("axes"), False
    if reduced is None and node.input(1):
        given = tracer.constant(node.input(1))
        reduced, unknown = None if given is None else [int(axis) for axis in given.ravel()], given is None
    if not reduced and not unknown and node.attributes.get("noop_with_empty_axes", 0):
        tracer.label_axes(node.outputs[0], tracer.axes(data))
        return
    _remove_axes(node, tracer, {axis % rank for axis in reduced} if reduced else set(range(rank)))


@traces("ArgMax", "ArgMin")
def arg_extreme(node: Node, tracer: Tracer) -> None:
    """Mixes one axis, which vanishes or becomes 1."""
    _remove_axes(node, tracer, {node.attributes.get("axis", 0) % (tracer.rank(node.inputs[0]) or 1)})


def _remove_axes(node: Node, tracer: Tracer, mixed: set[int]) -> None:
    passing = tracer.stop(node, reasons.MIXED, mixed)
    if not node.attributes.get("keepdims", 1):
        passing = {axis - sum(gone < axis for gone in mixed): atoms for axis, atoms in passing.items()}
    tracer.label_axes(node.outputs[0], passing)


@traces("TopK")
def top_k(node: Node, tracer: Tracer) -> None:
    """Mixes one axis; both outputs keep the others."""
    rank = tracer.rank(node.inputs[0]) or 1
    passing = tracer.stop(node, reasons.MIXED, [node.attributes.get("axis", -1) % rank])
    for name in node.outputs:
        tracer.label_axes(name, passing)

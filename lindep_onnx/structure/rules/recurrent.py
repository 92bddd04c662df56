"""Recurrent layers: what they read can shrink, what they keep in their state cannot."""

from __future__ import annotations

from lindep_onnx.model.node import Node
from lindep_onnx.structure import reasons
from lindep_onnx.structure.rules.registry import traces
from lindep_onnx.structure.tracer import Tracer
from lindep_onnx.structure.types import ConsumerNode, Product


@traces("LSTM", "GRU", "RNN")
def recurrent(node: Node, tracer: Tracer) -> None:
    """X (steps, batch, C) meets W (directions, gates, C); nothing of the state is labelled."""
    data, weight = node.inputs[0], node.inputs[1]
    made = next(filter(None, node.outputs), "")
    rank = tracer.rank(made)
    if tracer.constant(weight) is None or not made or rank is None:
        tracer.refuse(node, reasons.RUNTIME_WEIGHT)
        return
    columns = tracer.axes(data).get(2)
    tracer.freeze_tensor(data, reasons.STEPS, node, [0, 1])
    for name in node.inputs[3:]:
        tracer.freeze_tensor(name, reasons.STEPS, node)
    for position in range(2, len(node.inputs)):
        tracer.claim(node, position, {})
    tracer.claim(node, 1, {} if columns is None else {2: columns})
    if columns is not None:
        reader = ConsumerNode(node.index, data, 2, made, rank - 1)
        tracer.consumer(Product(weight, 1, 2, 1, 1, 1.0, reader, None), affine=False)

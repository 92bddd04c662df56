"""Operators that work on every element alone, with NumPy broadcasting."""

from __future__ import annotations

from lindep_onnx.model.node import Node
from lindep_onnx.structure import reasons
from lindep_onnx.structure.rules.registry import traces
from lindep_onnx.structure.rules.saturation import may_flatten
from lindep_onnx.structure.tracer import Tracer
from lindep_onnx.structure.types import Labelling

UNARY = (
    *("Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "BitwiseNot", "Cast", "Ceil", "Celu", "Cos", "Cosh"),
    *("Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "Identity", "IsInf", "IsNaN", "LeakyRelu"),
    *("Log", "Mish", "Neg", "Not", "Reciprocal", "Relu", "Round", "Selu", "Shrink", "Sigmoid", "Sign", "Sin", "Sinh"),
    *("Softplus", "Softsign", "Sqrt", "Swish", "Tan", "Tanh", "ThresholdedRelu"),
)
BROADCAST = (
    *("Add", "And", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Div", "Equal", "Greater", "GreaterOrEqual", "Less"),
    *("LessOrEqual", "Max", "Mean", "Min", "Mod", "Mul", "Or", "PRelu", "Pow", "Sub", "Sum", "Where", "Xor"),
)


@traces(*UNARY, *BROADCAST, "Clip")
def elementwise(node: Node, tracer: Tracer) -> None:
    """One output; all inputs broadcast to its shape."""
    tracer.label(node.outputs[0], broadcast(node, tracer))


@traces("Dropout")
def dropout(node: Node, tracer: Tracer) -> None:
    """The identity at inference; the mask has the shape of the data."""
    training = tracer.constant(node.input(2))
    if node.input(2) and (training is None or bool(training)):
        tracer.refuse(node, reasons.TRAINING)
        return
    for name in node.outputs:
        tracer.label(name, tracer.labels.get(node.inputs[0], ()))


def broadcast(node: Node, tracer: Tracer) -> list[Labelling]:
    """Link the labellings of all inputs place by place, label constants alike, and return those of the result."""
    ranks = [tracer.rank(name) for name in node.inputs if name]
    rank = max((known or 0 for known in ranks), default=0)
    if None in ranks and len(ranks) > 1:
        tracer.refuse(node, reasons.UNKNOWN_RANK)
        return []
    operands = [position for position, name in enumerate(node.inputs) if name and tracer.constant(name) is None]
    labels = [label for position in operands for label in _aligned(tracer, node.inputs[position], rank)]
    result: list[Labelling] = []
    for cut in sorted({label.cut for label in labels}):
        found = _linked([label for label in labels if label.cut == cut], tracer)
        if may_flatten(node) and len(found.axes) > 1:  # whether channels stay silent is watched along one axis only
            found = tracer.flattened(found)
        result.append(found)
    for position, name in enumerate(node.inputs):
        shape = tracer.shape(name) if name else None
        sizes = None if shape is None else (*(1,) * (rank - len(shape)), *shape)
        wide = [label for label in result if sizes is None or sizes[label.cut] != 1]
        if position in operands:
            own = {label.cut for label in _aligned(tracer, name, rank)}
            for label in wide:
                if label.cut not in own:
                    tracer.freeze(label.atoms.ravel(), reasons.FROZEN_OPERAND, node)
        elif name and shape is not None:
            wanted = {label.cut - rank + len(shape): tracer.flat(label) for label in wide}
            tracer.claim(node, position, wanted)
    return result


def _aligned(tracer: Tracer, name: str, rank: int) -> list[Labelling]:
    """Labellings of an input, counted in the axes of the result."""
    places = range(rank - (tracer.rank(name) or 0), rank)
    return [label.moved(places) for label in tracer.labels.get(name, ())]


def _linked(labels: list[Labelling], tracer: Tracer) -> Labelling:
    first = labels[0]
    if all(label.axes == first.axes and label.atoms.shape == first.atoms.shape for label in labels):
        for label in labels[1:]:
            tracer.link(first.atoms, label.atoms)
        return first
    for label in labels[1:]:
        tracer.link(tracer.flat(first), tracer.flat(label))
    return tracer.flattened(first)

"""Where activation functions are flat: a channel that stays there is constant, but only for as long as it stays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from numpy.typing import NDArray

from lindep_onnx.model.node import Node

Interval: TypeAlias = "tuple[float, float]"
Constant: TypeAlias = Callable[[str], "NDArray[Any] | None"]

INF = float("inf")


def clip_ends(node: Node, constant: Constant) -> Interval | None:
    """What a Clip lets pass; None if that is only known at run time."""
    ends = []
    for position, name, default in ((1, "min", -INF), (2, "max", INF)):
        value = constant(node.input(position))
        if node.input(position) and (value is None or value.size != 1):
            return None
        ends.append(float(node.attributes.get(name, default)) if value is None else float(value.ravel()[0]))
    return ends[0], ends[1]


def _clip(node: Node, constant: Constant) -> tuple[Interval, ...] | None:
    ends = clip_ends(node, constant)
    return None if ends is None else ((-INF, ends[0]), (ends[1], INF))


def _hard_sigmoid(node: Node, constant: Constant) -> tuple[Interval, ...]:
    alpha, beta = float(node.attributes.get("alpha", 0.2)), float(node.attributes.get("beta", 0.5))
    return ((-INF, -beta / alpha), ((1 - beta) / alpha, INF)) if alpha > 0 else ((-INF, INF),)


def _fixed(*parts: Interval) -> Callable[[Node, Constant], tuple[Interval, ...]]:
    return lambda node, constant: parts


# The smooth ones are flat to the last bit of float32 beyond these points.
_FLAT: Mapping[str, Callable[[Node, Constant], tuple[Interval, ...] | None]] = {
    "Clip": _clip,
    "Relu": _fixed((-INF, 0.0)),
    "ThresholdedRelu": lambda node, constant: ((-INF, float(node.attributes.get("alpha", 1.0))),),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _fixed((-INF, -3.0)),
    "Sigmoid": _fixed((-INF, -87.0), (16.0, INF)),
    "Tanh": _fixed((-INF, -9.0), (9.0, INF)),
    **dict.fromkeys(("Exp", "Mish", "Softplus", "Swish"), _fixed((-INF, -87.0))),
    **dict.fromkeys(("Celu", "Elu", "Selu"), _fixed((-INF, -16.0))),
    "Erf": _fixed((-INF, -3.9), (3.9, INF)),
    "Gelu": _fixed((-INF, -5.5)),
}
#: Operators that can make a constant of something that varies, in ways that no margin describes.
_UNPREDICTABLE = (
    *("And", "Ceil", "Equal", "Floor", "Greater", "GreaterOrEqual", "IsInf", "IsNaN", "Less", "LessOrEqual"),
    *("Max", "MaxPool", "GlobalMaxPool", "Min", "Mod", "Not", "Or", "Round", "Shrink", "Sign", "Where", "Xor"),
    *("BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "Cast", "PRelu", "LeakyRelu"),
)


def may_flatten(node: Node) -> bool:
    """Whether the output of a node can be constant over inputs that vary, weights of zero apart."""
    return node.op in _FLAT or node.op in _UNPREDICTABLE


def flat_parts(node: Node, constant: Constant) -> tuple[Interval, ...] | None:
    """Intervals of the first input on which the output does not change; None if that cannot be said."""
    rule = _FLAT.get(node.op)
    return None if rule is None else rule(node, constant)

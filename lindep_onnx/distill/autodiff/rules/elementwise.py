"""Operators that work element by element."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import onnx

from lindep_onnx.distill.autodiff.rules.registry import gradient_of_data, gradients_of_inputs
from lindep_onnx.distill.autodiff.tape import Operand, Tape, Unsupported
from lindep_onnx.model.node import Node

OTHERS = "an input other than the first depends on a weight"

# ---- of several operands ------------------------------------------------------------------------------------------


@gradients_of_inputs("Add", "Sub", "Mul", "Div", "Sum", "Mean")
def _arithmetic(node: Node, dy: str, tape: Tape) -> Mapping[int, Callable[[], str]]:
    def operand(position: int) -> str:
        if node.op == "Mul":
            flowing = tape.Mul(dy, node.inputs[1 - position])
        elif node.op == "Div":
            flowing = tape.Div(dy, node.inputs[1])
            if position == 1:
                flowing = tape.Neg(tape.Mul(flowing, node.outputs[0]))
        elif node.op == "Mean":
            flowing = tape.Mul(dy, 1 / len(node.inputs))
        else:
            flowing = tape.Neg(dy) if node.op == "Sub" and position == 1 else dy
        return tape.unbroadcast(flowing, tape.shape(node.outputs[0]), tape.shape(node.inputs[position]))

    return {position: partial(operand, position) for position in range(len(node.inputs))}


@gradients_of_inputs("PRelu")
def _prelu(node: Node, dy: str, tape: Tape) -> Mapping[int, Callable[[], str]]:
    x, slope = node.inputs

    def data() -> str:
        steep = _positive(tape, x)
        flat = tape.Mul(slope, tape.Sub(1.0, steep))
        return tape.Mul(dy, tape.Add(steep, flat))

    return {
        0: data,
        1: lambda: tape.unbroadcast(tape.Mul(dy, tape.Min(x, 0.0)), tape.shape(x), tape.shape(slope)),
    }


@gradients_of_inputs("Where")
def _where(node: Node, dy: str, tape: Tape) -> Mapping[int, Callable[[], str]]:
    condition, *chosen = node.inputs
    first = tape.mask(condition)

    def summed(share: str, name: str) -> str:
        return tape.unbroadcast(tape.Mul(dy, share), tape.shape(node.outputs[0]), tape.shape(name))

    return {1: lambda: summed(first, chosen[0]), 2: lambda: summed(tape.Sub(1.0, first), chosen[1])}


# ---- of one -------------------------------------------------------------------------------------------------------


@gradient_of_data("Identity", "Neg", "Sqrt", "Log")
def _unary(node: Node, dy: str, tape: Tape) -> str:
    if node.op == "Neg":
        return tape.Neg(dy)
    if node.op == "Sqrt":
        return tape.Div(tape.Mul(dy, 0.5), node.outputs[0])
    return tape.Div(dy, node.inputs[0]) if node.op == "Log" else dy


@gradient_of_data("Dropout", others=OTHERS)
def _dropout(node: Node, dy: str, tape: Tape) -> str:
    if node.input(2) and bool(np.any(tape.required(node.inputs[2]))):
        raise Unsupported("it is in training mode")
    return dy


@gradient_of_data("Pow", others=OTHERS)
def _power(node: Node, dy: str, tape: Tape) -> str:
    x, exponent = node.inputs[0], tape.required(node.inputs[1]).astype(np.float64)
    flowing = tape.Mul(dy, tape.Mul(tape.Pow(x, exponent - 1), exponent))
    return tape.unbroadcast(flowing, tape.shape(node.outputs[0]), tape.shape(x))


@gradient_of_data("Clip", others="a bound depends on a weight")
def _clip(node: Node, dy: str, tape: Tape) -> str:
    highest = float(np.finfo(tape.dtype).max)
    return tape.Mul(dy, _between(tape, node.outputs[0], node.input(1) or -highest, node.input(2) or highest))


@gradient_of_data("Cast")
def _cast(node: Node, dy: str, tape: Tape) -> str:
    if int(node.attributes["to"]) != onnx.helper.np_dtype_to_tensor_dtype(tape.dtype):
        raise Unsupported("it leaves the element type of the weights")
    return dy


def _positive(tape: Tape, name: str) -> str:
    return tape.mask(tape.Greater(name, 0.0))


def _between(tape: Tape, name: str, low: Operand, high: Operand) -> str:
    return tape.mask(tape.And(tape.Greater(name, low), tape.Less(name, high)))


# ---- activations: the gradient times a derivative -----------------------------------------------------------------

#: Called with the tape, the input, the output and the attributes; writes the derivative at the input.
Derivative: TypeAlias = Callable[[Tape, str, str, Mapping[str, Any]], str]


def _alpha(attributes: Mapping[str, Any], default: float) -> float:
    return float(attributes.get("alpha", default))


def _erf(tape: Tape, x: str, y: str, attributes: Mapping[str, Any]) -> str:
    bell = tape.Exp(tape.Neg(tape.Mul(x, x)))
    return tape.Mul(bell, 2 / math.sqrt(math.pi))


def _gelu(tape: Tape, x: str, y: str, attributes: Mapping[str, Any]) -> str:
    if attributes.get("approximate", "none") != "none":
        raise Unsupported("it is approximated by tanh")
    share = tape.Mul(tape.Add(tape.Erf(tape.Mul(x, math.sqrt(0.5))), 1.0), 0.5)
    bell = tape.Exp(tape.Mul(tape.Mul(x, x), -0.5))
    return tape.Add(share, tape.Mul(tape.Mul(x, bell), 1 / math.sqrt(2 * math.pi)))


def _hard_swish(tape: Tape, x: str, y: str, attributes: Mapping[str, Any]) -> str:
    """Of x min(max(x + 3, 0), 6) / 6."""
    inside = tape.Add(tape.Mul(x, 1 / 3), 0.5)
    return tape.Where(tape.Less(tape.Abs(x), 3.0), inside, _positive(tape, x))


def _leaky(tape: Tape, x: str, y: str, attributes: Mapping[str, Any]) -> str:
    alpha = _alpha(attributes, 0.01)
    return tape.Add(tape.Mul(_positive(tape, x), 1 - alpha), alpha)


DERIVATIVES: Mapping[str, Derivative] = {
    "Abs": lambda tape, x, y, attributes: tape.Sign(x),
    "Elu": lambda tape, x, y, attributes: tape.Where(tape.Greater(x, 0.0), 1.0, tape.Add(y, _alpha(attributes, 1.0))),
    "Erf": _erf,
    "Exp": lambda tape, x, y, attributes: y,
    "Gelu": _gelu,
    "HardSigmoid": lambda tape, x, y, attributes: tape.Mul(_between(tape, y, 0.0, 1.0), _alpha(attributes, 0.2)),
    "HardSwish": _hard_swish,
    "LeakyRelu": _leaky,
    "Reciprocal": lambda tape, x, y, attributes: tape.Neg(tape.Mul(y, y)),
    "Relu": lambda tape, x, y, attributes: _positive(tape, y),
    "Sigmoid": lambda tape, x, y, attributes: tape.Mul(y, tape.Sub(1.0, y)),
    "Softplus": lambda tape, x, y, attributes: tape.Sigmoid(x),
    "Tanh": lambda tape, x, y, attributes: tape.Sub(1.0, tape.Mul(y, y)),
}


@gradient_of_data(*DERIVATIVES)
def _activation(node: Node, dy: str, tape: Tape) -> str:
    return tape.Mul(dy, DERIVATIVES[node.op](tape, node.inputs[0], node.outputs[0], node.attributes))

"""Operators that take sums over axes: Softmax, normalizations, reductions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from lindep_onnx.distill.autodiff.rules.registry import axis_of, gradient_of_data, gradients_of_inputs
from lindep_onnx.distill.autodiff.tape import Tape, Unsupported
from lindep_onnx.model.node import Node


@gradient_of_data("Softmax", "LogSoftmax")
def _softmax(node: Node, dy: str, tape: Tape) -> str:
    y = node.outputs[0]
    axes = [axis_of(node, -1, len(tape.shape(y)))]
    if node.op == "Softmax":
        inner = tape.sum(tape.Mul(dy, y), axes)
        return tape.Mul(y, tape.Sub(dy, inner))
    return tape.Sub(dy, tape.Mul(tape.Exp(y), tape.sum(dy, axes)))


@gradients_of_inputs("BatchNormalization", others="its statistics depend on a weight")
def _batch_normalization(node: Node, dy: str, tape: Tape) -> Mapping[int, Callable[[], str]]:
    """Mean and variance are fixed: y = scale (x - mean) / deviation + bias."""
    if node.attributes.get("training_mode", 0):
        raise Unsupported("it is in training mode")
    x, scale, _, mean, variance = node.inputs
    shape = tape.shape(x)
    aligned = [-1, *(1,) * (len(shape) - 2)]
    deviation = tape.Sqrt(tape.Add(variance, float(node.attributes.get("epsilon", 1e-5))))

    def scale_gradient() -> str:
        centred = tape.Sub(x, tape.reshape(mean, aligned))
        return tape.Div(tape.channel_sum(tape.Mul(dy, centred), shape), deviation)

    return {
        0: lambda: tape.Mul(dy, tape.reshape(tape.Div(scale, deviation), aligned)),
        1: scale_gradient,
        2: lambda: tape.channel_sum(dy, shape),
    }


@gradients_of_inputs("LayerNormalization")
def _layer_normalization(node: Node, dy: str, tape: Tape) -> Mapping[int, Callable[[], str]]:
    x, scale = node.inputs[:2]
    shape = tape.shape(x)
    axes = list(range(axis_of(node, -1, len(shape)), len(shape)))
    centred = tape.Sub(x, tape.mean(x, axes))
    variance = tape.mean(tape.Mul(centred, centred), axes)
    deviation = tape.Sqrt(tape.Add(variance, float(node.attributes.get("epsilon", 1e-5))))
    normal = tape.Div(centred, deviation)

    def data() -> str:
        inner = tape.Mul(dy, scale)
        along = tape.Mul(normal, tape.mean(tape.Mul(inner, normal), axes))
        rest = tape.Sub(tape.Sub(inner, tape.mean(inner, axes)), along)
        return tape.Div(rest, deviation)

    return {
        0: data,
        1: lambda: tape.unbroadcast(tape.Mul(dy, normal), shape, tape.shape(scale)),
        2: lambda: tape.unbroadcast(dy, shape, tape.shape(node.inputs[2])),
    }


@gradient_of_data("ReduceSum", "ReduceMean", "GlobalAveragePool")
def _reduction(node: Node, dy: str, tape: Tape) -> str:
    shape = tape.shape(node.inputs[0])
    if node.op == "GlobalAveragePool":
        axes = list(range(2, len(shape)))
    else:
        axes = tape.integers(node, 1, node.attributes.get("axes", ()))
    if not axes and node.attributes.get("noop_with_empty_axes", 0):
        return dy
    axes = sorted(axis % len(shape) for axis in axes) or list(range(len(shape)))
    dy = tape.reshape(dy, [1 if axis in axes else size for axis, size in enumerate(shape)])
    if node.op != "ReduceSum":
        dy = tape.Mul(dy, 1 / math.prod(shape[axis] for axis in axes))
    return tape.Expand(dy, list(shape))

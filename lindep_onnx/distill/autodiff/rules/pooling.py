"""Operators that look around inside each channel: pooling and resizing."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from lindep_onnx.distill.autodiff.rules.linear import Convolution
from lindep_onnx.distill.autodiff.rules.registry import gradient_of_data
from lindep_onnx.distill.autodiff.tape import Tape, Unsupported
from lindep_onnx.model.node import Node
from lindep_onnx.model.weighted import window_of

Array: TypeAlias = NDArray[Any]


@gradient_of_data("MaxPool")
def _max_pool(node: Node, dy: str, tape: Tape) -> str:
    """Each output passes its gradient to the one position that it was read from."""
    if node.attributes.get("storage_order", 0):
        raise Unsupported("its indices count columns first")
    shape = tape.shape(node.inputs[0])
    places = tape.reshape(tape.forward_output(node, 1), [-1])
    flat = tape.reshape(dy, [-1])
    zeros = tape.Expand(np.zeros(1), [math.prod(shape)])
    return tape.reshape(tape.ScatterElements(zeros, places, flat, axis=0, reduction="add"), shape)


@gradient_of_data("AveragePool")
def _average_pool(node: Node, dy: str, tape: Tape) -> str:
    """The adjoint of a depthwise convolution with ones, divided by what each window counts."""
    if node.attributes.get("ceil_mode", 0):
        raise Unsupported("it rounds sizes up")
    shape, out = tape.shape(node.inputs[0]), tape.shape(node.outputs[0])
    kernel = [int(n) for n in node.attributes["kernel_shape"]]
    weight = (shape[1], 1, *kernel)
    window = window_of(node, kernel, shape[2:])
    counts = np.ones(out[2:])
    for axis, width in enumerate(kernel):
        reach = np.arange(width) * window.dilations[axis] - window.pads[axis][0]
        places = np.arange(out[2 + axis])[:, None] * window.strides[axis] + reach
        inside = ((places >= 0) & (places < shape[2 + axis])).sum(axis=1)
        own = np.full(len(inside), width) if node.attributes.get("count_include_pad", 0) else inside
        counts = counts * own.reshape([-1 if place == axis else 1 for place in range(len(kernel))])
    shares = tape.Div(dy, counts)
    return Convolution(window, shape[1], shape, weight, out).adjoint(
        tape, shares, tape.constant(np.ones(weight, tape.dtype))
    )


@gradient_of_data("Resize", others="an input other than the first depends on a weight")
def _resize(node: Node, dy: str, tape: Tape) -> str:
    """Interpolation is linear, an axis at a time: y = A x along each, so that the gradient is A' dy."""
    shape, out = tape.shape(node.inputs[0]), tape.shape(node.outputs[0])
    if node.attributes.get("coordinate_transformation_mode") == "tf_crop_and_resize" or "axes" in node.attributes:
        raise Unsupported("it crops, or names its axes")
    scales = tape.required(node.inputs[2]).ravel().tolist() if node.input(2) else []
    for axis, (size, wanted) in enumerate(zip(shape, out, strict=True)):
        scale = scales[axis] if scales else None
        if size == wanted and scale in (None, 1):
            continue
        last = [*(place for place in range(len(shape)) if place != axis), axis]
        moved = tape.MatMul(tape.transpose(dy, last), _interpolation(node, size, wanted, scale, tape.opset))
        dy = tape.transpose(moved, np.argsort(last).tolist())
    return dy


def _interpolation(node: Node, size: int, wanted: int, scale: float | None, opset: int) -> Array:
    """(wanted, size): what a Resize node does along one axis, asked of the reference implementation."""
    if scale is None:
        names, target = ["x", "", "", "target"], np.array([size, wanted], np.int64)
    else:
        names, target = ["x", "", "target"], np.array([1, scale], np.float32)
    attributes = {key: value for key, value in node.attributes.items() if key != "antialias"}
    function = onnx.helper.make_function(
        "lindep_onnx",
        "along_axis",
        ["x", "target"],
        ["y"],
        [onnx.helper.make_node("Resize", names, ["y"], **attributes)],
        [onnx.helper.make_opsetid("", opset)],
    )
    feeds = {"x": np.eye(size, dtype=np.float32), "target": target}
    (found,) = ReferenceEvaluator(function).run(None, feeds, attributes={})
    return np.asarray(found).T.copy()

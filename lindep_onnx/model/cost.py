"""What a model costs: parameters, multiply-accumulates, bytes, channels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

from lindep_onnx.model.fused import written_out
from lindep_onnx.model.ir import Body, Model, bodies_of
from lindep_onnx.model.node import Node
from lindep_onnx.model.shapes import Shape, ShapeInfo, resolve
from lindep_onnx.model.weighted import GATES, WEIGHTS, macs, weighted
from lindep_onnx.model.weights import is_external, tensor_bytes

WeightShape: TypeAlias = "Callable[[str], tuple[int, ...] | None]"


@dataclass(frozen=True)
class Cost:
    """Sizes of one model.

    Attributes:
        parameters: elements of floating-point constants with more than one element, those in bodies too.
        macs: multiply-accumulates of Conv, ConvTranspose, Gemm, MatMul, Einsum and recurrent layers for one sample.
        bytes: size of the model as one file, weights included.
        channels: output channels of those operators where their weight is constant, in bodies too.
        operators: how many nodes there are of each.
    """

    parameters: int
    macs: int
    bytes: int
    channels: int
    operators: Mapping[str, int]


def cost(model: Model, inputs: Mapping[str, Shape], samples: int = 1) -> Cost:
    """Costs for one of the `samples` that inputs of these shapes hold; dimensions that stay unknown count as 1."""
    plain = written_out(model)
    shape_info = resolve(plain, inputs)
    inside = [body for node in model.nodes for body in bodies_of(node)]
    stored = [*model.stored.values(), *(value for body in inside for value in body.stored.values())]
    floats = [value for value in stored if value.dtype.kind in "fV" and value.size > 1]
    outside = sum(tensor_bytes(tensor) for tensor in model.proto.graph.initializer if is_external(tensor))
    return Cost(
        parameters=sum(value.size for value in floats),
        macs=sum(_macs(node, shape_info) for node in plain.nodes) // max(1, samples),
        bytes=model.proto.ByteSize() + outside,
        channels=sum(
            output_channels(node, shape_info.weight_shape) + channels_inside(node, shape_info.weight_shape)
            for node in plain.nodes
        ),
        operators=dict(sorted(Counter(node.op for node in model.nodes).items())),
    )


def _macs(node: Node, shape_info: ShapeInfo) -> int:
    names = (*node.inputs[:2], next(filter(None, node.outputs), ""))
    if node.op not in (*WEIGHTS, *GATES, "Einsum") or any(name not in shape_info.shapes for name in names):
        return 0
    data, weight, result = ([n if isinstance(n, int) else 1 for n in shape_info.shapes[name]] for name in names)
    return macs(node, data, weight, result)


def output_channels(node: Node, weight_shape: WeightShape) -> int:
    """Output channels of a Conv, ConvTranspose, Gemm or MatMul with a constant weight; 0 for any other node.

    Args:
        node: the node.
        weight_shape: the shape of what counts as constant, None of anything else (`ShapeInfo.weight_shape`).
    """
    for position in (1, 0) if node.op == "MatMul" else (1,):
        layout, weight = weighted(node, position), weight_shape(node.input(position))
        if layout is not None and weight is not None:
            return layout.widths(weight)[1] if node.op != "MatMul" or len(weight) == 2 else 0
    return 0


def channels_inside(node: Node, weight_shape: WeightShape) -> int:
    """Output channels in the bodies of a node (If, Loop, Scan), by `output_channels`."""
    return sum(
        output_channels(inner, partial(_shape_in, body, weight_shape))
        for body in bodies_of(node)
        for inner in body.nodes
    )


def _shape_in(body: Body, weight_shape: WeightShape, name: str) -> tuple[int, ...] | None:
    return body.stored[name].shape if name in body.stored else weight_shape(name)

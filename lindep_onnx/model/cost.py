"""What a model costs: parameters, multiply-accumulates, bytes, channels."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from lindep_onnx.model.ir import Model, Node
from lindep_onnx.model.shapes import Shape, ShapeInfo, resolve
from lindep_onnx.model.weights import is_external, tensor_bytes


@dataclass(frozen=True)
class Cost:
    """Sizes of one model.

    Attributes:
        parameters: elements of floating-point constants with more than one element.
        macs: multiply-accumulates of Conv, ConvTranspose, Gemm and MatMul for one sample.
        bytes: size of the model as one file, weights included.
        channels: output channels of those operators where their weight is constant.
        operators: how many nodes there are of each.
    """

    parameters: int
    macs: int
    bytes: int
    channels: int
    operators: Mapping[str, int]


def cost(model: Model, inputs: Mapping[str, Shape], samples: int = 1) -> Cost:
    """Count what a model costs.

    Args:
        model: the model.
        inputs: shapes of its inputs; dimensions that stay unknown count as 1.
        samples: how many samples these inputs hold.
    """
    shape_info = resolve(model, inputs)
    floats = [value for value in model.stored.values() if value.dtype.kind in "fV" and value.size > 1]
    outside = sum(tensor_bytes(tensor) for tensor in model.proto.graph.initializer if is_external(tensor))
    return Cost(
        parameters=sum(value.size for value in floats),
        macs=sum(_macs(node, shape_info) for node in model.nodes) // max(1, samples),
        bytes=model.proto.ByteSize() + outside,
        channels=sum(output_channels(node, shape_info) for node in model.nodes),
        operators=dict(sorted(Counter(node.op for node in model.nodes).items())),
    )


def _elements(shape_info: ShapeInfo, name: str) -> int:
    return math.prod(size if isinstance(size, int) else 1 for size in shape_info.shapes.get(name, ()))


def _macs(node: Node, shape_info: ShapeInfo) -> int:
    if node.op not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
        return 0
    shape = shape_info.shapes.get(node.inputs[1])
    if shape is None or any(name not in shape_info.shapes for name in (node.inputs[0], node.outputs[0])):
        return 0
    fixed = [size if isinstance(size, int) else 1 for size in shape]
    if node.op == "Conv":
        return _elements(shape_info, node.outputs[0]) * math.prod(fixed[1:])
    if node.op == "ConvTranspose":
        return _elements(shape_info, node.inputs[0]) * math.prod(fixed[1:])
    if node.op == "Gemm":
        return _elements(shape_info, node.outputs[0]) * fixed[1 if node.attributes.get("transB", 0) else 0]
    return _elements(shape_info, node.outputs[0]) * (fixed[-2] if len(fixed) > 1 else fixed[0])


def output_channels(node: Node, shape_info: ShapeInfo) -> int:
    """Output channels of a Conv, ConvTranspose, Gemm or MatMul with a constant weight; 0 for any other node."""
    if node.op == "MatMul":
        for position, axis in ((1, -1), (0, 0)):
            value = shape_info.constants.get(node.input(position))
            if value is not None:
                return value.shape[axis] if value.ndim == 2 else 0
        return 0
    weight = shape_info.constants.get(node.input(1))
    if weight is None:
        return 0
    if node.op == "Conv":
        return int(weight.shape[0])
    if node.op == "ConvTranspose":
        return int(weight.shape[1]) * int(node.attributes.get("group", 1))
    if node.op == "Gemm":
        return int(weight.shape[0 if node.attributes.get("transB", 0) else 1])
    return 0

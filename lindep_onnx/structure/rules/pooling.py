"""Operators that look around inside each channel: pooling and resizing."""

from __future__ import annotations

from lindep_onnx.model.node import Node
from lindep_onnx.structure import reasons
from lindep_onnx.structure.edit_builder import EditBuilder
from lindep_onnx.structure.rules.registry import rewrites, traces
from lindep_onnx.structure.tracer import Tracer


@traces("AveragePool", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "LpPool", "MaxPool")
def pool(node: Node, tracer: Tracer) -> None:
    """Batch and channels pass, spatial axes are mixed."""
    data = node.inputs[0]
    if any(node.outputs[1:]):
        tracer.refuse(node, reasons.POOL_INDICES)
        return
    axes = tracer.axes(data)
    tracer.freeze_tensor(data, reasons.RESAMPLED, node, [axis for axis in axes if axis > 1])
    tracer.label_axes(node.outputs[0], {axis: atoms for axis, atoms in axes.items() if axis < 2})


@traces("Resize", "Upsample")
def resize(node: Node, tracer: Tracer) -> None:
    """Axes that keep their size pass; the others are mixed."""
    data, result = node.inputs[0], node.outputs[0]
    before, after = tracer.shape(data), tracer.shape(result)
    axes = tracer.axes(data)
    if node.attributes.get("coordinate_transformation_mode") == "tf_crop_and_resize" or "axes" in node.attributes:
        tracer.freeze_tensor(data, reasons.RESAMPLED, node)
        axes = {}
    moved = [axis for axis in axes if before is None or after is None or before[axis] != after[axis]]
    tracer.freeze_tensor(data, reasons.RESAMPLED, node, moved)
    tracer.label_axes(result, {axis: atoms for axis, atoms in axes.items() if axis not in moved})


@rewrites("Resize")
def resize_sizes(node: Node, builder: EditBuilder) -> None:
    """`sizes`, where given, holds the number of channels; `scales` are 1 there."""
    if node.input(3):
        builder.set_elements(node, 3, {axis: int(mask.sum()) for axis, mask in builder.kept(node.outputs[0]).items()})

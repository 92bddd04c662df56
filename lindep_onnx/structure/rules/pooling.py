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
    if any(node.outputs[1:]):
        tracer.refuse(node, reasons.POOL_INDICES)
        return
    moved = [axis for axis in tracer.axes(node.inputs[0]) if axis > 1]
    tracer.label_axes(node.outputs[0], tracer.stop(node, reasons.RESAMPLED, moved))


@traces("Resize", "Upsample")
def resize(node: Node, tracer: Tracer) -> None:
    """Axes that keep their size pass; the others are mixed."""
    before, after = tracer.shape(node.inputs[0]), tracer.shape(node.outputs[0])
    odd = node.attributes.get("coordinate_transformation_mode") == "tf_crop_and_resize" or "axes" in node.attributes
    axes = tracer.axes(node.inputs[0])
    moved = [axis for axis in axes if odd or before is None or after is None or before[axis] != after[axis]]
    tracer.label_axes(node.outputs[0], tracer.stop(node, reasons.RESAMPLED, moved))


@rewrites("Resize")
def resize_sizes(node: Node, builder: EditBuilder) -> None:
    """`sizes`, where given, holds the number of channels; `scales` are 1 there."""
    if node.input(3):
        builder.set_elements(node, 3, builder.new_sizes(node.outputs[0]))

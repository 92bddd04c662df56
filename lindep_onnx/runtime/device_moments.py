"""Sums over rows of activations that are made on the device that holds them, so that only matrices leave it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]

#: Input of a graph that sums: how many samples of a batch are no filler. Operator set from which on Slice takes it, and
#: Gemm needs no third input.
COUNTED, SLICED = "lindep_onnx_counted", 11


@dataclass(frozen=True)
class DeviceMoments:
    """Sums over the rows Z of one place in one batch, made inside the graph in float64.

    Attributes:
        gram: (channels, channels) Z'Z.
        sum: (channels,) column sums.
        low: (samples, channels) smallest value of each sample.
        high: (samples, channels) largest value of each sample.
        positions: rows of each sample.
    """

    gram: NDArray[np.float64]
    sum: NDArray[np.float64]
    low: Array
    high: Array
    positions: int


def summing(
    proto: onnx.ModelProto, picked: str, axis: int, width: int, opset: int
) -> tuple[list[onnx.NodeProto], dict[str, str]]:
    """Nodes behind picked rows, and names of what they put out, by field of `DeviceMoments`.

    Rows become float64 before they are multiplied: products of float32 would lose the rank of the Gram matrix.

    Args:
        proto: gets inputs and initializers.
        picked: name of a tensor of picked rows.
        axis: of its channels, 1 or 2.
        width: how many there are.
        opset: version of the default operator set.
    """
    if all(value.name != COUNTED for value in proto.graph.input):
        proto.graph.input.append(onnx.helper.make_tensor_value_info(COUNTED, onnx.TensorProto.INT64, [1]))
    start, size = picked + "_start", picked + "_size"
    numbers = {start: np.zeros(1, dtype=np.int64), size: np.array([-1, width], dtype=np.int64)}
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in numbers.items())
    kept, exact, rows, flat = (picked + what for what in ("_kept", "_exact", "_rows", "_flat"))
    names = {what: f"{picked}_{what}" for what in ("gram", "sum", "low", "high")}
    behind = 2 if axis == 1 else 1  # the axis of the positions
    node = onnx.helper.make_node
    nodes = [
        node("Slice", [picked, start, COUNTED, start], [kept]),
        node("Cast", [kept], [exact], to=onnx.TensorProto.DOUBLE),
        node("Transpose", [exact], [rows], perm=[0, 2, 1]) if behind == 2 else node("Identity", [exact], [rows]),
        node("Reshape", [rows, size], [flat]),
        node("Gemm", [flat, flat], [names["gram"]], transA=1),
        reduction(proto, "ReduceSum", flat, names["sum"], [0], opset),
        reduction(proto, "ReduceMin", kept, names["low"], [behind], opset),
        reduction(proto, "ReduceMax", kept, names["high"], [behind], opset),
    ]
    return nodes, names


def reduction(
    proto: onnx.ModelProto, op: str, source: str, name: str, axes: Sequence[int], opset: int
) -> onnx.NodeProto:
    """A node that reduces some axes, maybe none, away, in the form of the operator set; `proto` gets an initializer."""
    if not axes:
        if op == "ReduceSumSquare":
            return onnx.helper.make_node("Mul", [source, source], [name])
        return onnx.helper.make_node("Identity", [source], [name])
    if opset < (13 if op == "ReduceSum" else 18):
        return onnx.helper.make_node(op, [source], [name], axes=list(axes), keepdims=0)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(axes, dtype=np.int64), name + "_axes"))
    return onnx.helper.make_node(op, [source, name + "_axes"], [name], keepdims=0)

"""Small graphs for tests: ONNX node text plus named weights."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

from lindep_onnx.model.ir import load
from lindep_onnx.model.shapes import resolve
from lindep_onnx.structure.trace import trace
from lindep_onnx.structure.types import Structure

Shape = tuple[int, ...]


def build(
    body: str,
    weights: Mapping[str, Shape | np.ndarray | np.generic],
    *,
    x: Sequence[int | str] = ("N", 3, 8, 8),
    outputs: str = "y",
    opset: int = 17,
    inputs: Mapping[str, Sequence[int | str]] | None = None,
    kind: int = TensorProto.FLOAT,
) -> onnx.ModelProto:
    """A model from one node a line. Shapes in `weights` become seeded random arrays; the input is called x."""
    nodes = [onnx.parser.parse_node(line.strip()) for line in body.strip().splitlines()]
    for number, node in enumerate(nodes):
        node.name = node.name or f"{node.op_type}_{number}"
    initializers = [onnx.numpy_helper.from_array(as_array(name, value), name) for name, value in weights.items()]
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info(name, kind, shape) for name, shape in {"x": x, **(inputs or {})}.items()],
        [helper.make_empty_tensor_value_info(name) for name in outputs.split()],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    del inferred.graph.value_info[:]
    return inferred


def as_array(name: str, value: Shape | np.ndarray | np.generic) -> np.ndarray:
    if not isinstance(value, tuple):
        return np.asarray(value)
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    fan = int(np.prod(value[1:])) if len(value) > 1 else 4
    return (rng.normal(size=value) * np.sqrt(2 / fan)).astype(np.float32)


def traced(model: onnx.ModelProto, **options: Any) -> Structure:
    loaded = load(model)
    return trace(loaded, resolve(loaded), **options)


def feed(model: onnx.ModelProto, samples: int = 3, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        value.name: rng.normal(size=[dim.dim_value or samples for dim in value.type.tensor_type.shape.dim]).astype(
            np.float32
        )
        for value in model.graph.input
    }


def run(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(feeds))


def initializer(model: onnx.ModelProto, name: str) -> np.ndarray:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    return onnx.numpy_helper.to_array(tensor).copy()


def with_initializer(model: onnx.ModelProto, name: str, value: np.ndarray) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    tensor = next(tensor for tensor in copy.graph.initializer if tensor.name == name)
    tensor.CopyFrom(onnx.numpy_helper.from_array(value.astype(onnx.numpy_helper.to_array(tensor).dtype), name))
    return copy


def ignoring(structure: Structure, removed: np.ndarray) -> onnx.ModelProto:
    """The original model with zeros where a site multiplies a removed unit: what removal must be equal to."""
    model = structure.model.proto
    for consumer in structure.consumers:
        gone = np.flatnonzero(~structure.mask(consumer.columns, removed))
        name = consumer.weight
        while name not in structure.model.stored:  # behind a Transpose and the like: go on with the stored one
            name = structure.model.producer[name].input(0)
        value = initializer(model, name) if name == consumer.weight else None
        if value is None:
            raise AssertionError("plain weights only")
        index = [slice(None)] * value.ndim
        index[consumer.inputs] = gone
        consumer.part(value)[tuple(index)] = 0
        model = with_initializer(model, name, value)
    return model


def copied(name: str, shape: Shape, axis: int, count: int) -> np.ndarray:
    """A seeded array whose last `count` slices along an axis are copies of the first ones."""
    value = np.moveaxis(as_array(name, shape), axis, 0)
    value[-count:] = value[:count]
    return np.ascontiguousarray(np.moveaxis(value, 0, axis))

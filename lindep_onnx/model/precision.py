"""Half precision: models in float16 and bfloat16 are worked on in single precision, and rounded once, at the end.

ONNX Runtime has few bfloat16 kernels, and the rounding of half precision would hide what depends exactly on what. So
`to_float32` makes a copy of a model, node by node, which is traced, run and cut like any other; `to_stored_dtype` gives
every tensor of the result the type that it has in the original.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray

from lindep_onnx.model.checks import impossible_sizes
from lindep_onnx.model.ir import Model, model_of
from lindep_onnx.model.weights import graphs, is_external, weights_as_inputs, with_weights, without_weights

Array: TypeAlias = NDArray[Any]

#: Relative spacing of numbers, by type.
NARROW: Mapping[int, float] = {onnx.TensorProto.FLOAT16: 2.0**-10, onnx.TensorProto.BFLOAT16: 2.0**-7}
FLOATS = (*NARROW, onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE)
#: Attributes that name the type of an output.
TYPES = ("to", "dtype")


def epsilon(proto: onnx.ModelProto) -> float:
    """Relative spacing of the coarsest floating-point type that stores a weight; 0 for single and double precision."""
    return max((NARROW.get(tensor.data_type, 0.0) for tensor in _tensors(proto.graph)), default=0.0)


def to_float32(model: Model) -> Model:
    """A copy of a model in which half precision has become single precision; names and nodes stay."""
    copy = without_weights(model.proto)
    for tensor in _tensors(copy.graph):
        if tensor.data_type in NARROW:
            _cast(tensor, onnx.TensorProto.FLOAT)
    for graph in graphs(copy.graph):
        for value in (*graph.input, *graph.output, *graph.value_info):
            if value.type.tensor_type.elem_type in NARROW:
                value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.name in TYPES and attribute.i in NARROW:
                    attribute.i = onnx.TensorProto.FLOAT
    return _of_values(copy, model)


def to_stored_dtype(result: Model, original: Model) -> Model:
    """Give every tensor of a result, made from `to_float32(original)`, the type that it has in the original.

    What the original does not have (a bias, a copy of a shared vector) gets the type of the node that reads it.
    """
    copy = without_weights(result.proto)
    types = _types(original.proto)
    attributes = {node.output[0]: node.attribute for node in original.proto.graph.node if node.output}
    readers: dict[str, int] = {}
    for node in copy.graph.node:
        wanted = next((types[name] for name in (*node.output, *node.input) if name in types), 0)
        for name in node.input:
            readers.setdefault(name, wanted)
        if node.op_type == "Constant" and node.output[0] in types:
            for attribute in node.attribute:
                if attribute.t.data_type == onnx.TensorProto.FLOAT:
                    _cast(attribute.t, types[node.output[0]])
            continue
        before = {attribute.name: attribute for attribute in attributes.get(node.output[0], ())}
        for attribute in node.attribute:
            same = attribute.name in before and attribute.name not in ("group", "axes", "axis", "pads", "split")
            if same and (attribute.name in TYPES or attribute.HasField("t") or attribute.HasField("g")):
                attribute.CopyFrom(before[attribute.name])
    for tensor in copy.graph.initializer:
        wanted = types.get(tensor.name, readers.get(tensor.name, 0))
        if tensor.data_type == onnx.TensorProto.FLOAT and wanted in NARROW:
            _cast(tensor, wanted)
    for value in (*copy.graph.input, *copy.graph.output, *copy.graph.value_info):
        if value.name in types:
            value.type.tensor_type.elem_type = types[value.name]
    return _of_values(copy, result)


def _of_values(proto: onnx.ModelProto, source: Model) -> Model:
    """A copy of a model without data, given its data, as the types of the copy."""
    types = {tensor.name: _numpy_type(tensor.data_type) for tensor in proto.graph.initializer}
    return model_of(*with_weights(proto, lambda name: np.asarray(source.stored[name], dtype=types[name])))


def perturbed_one_ulp(model: Model, seed: int) -> Model:
    """A copy of a model in which every weight moved to the next number above or below, or stayed."""
    copy = without_weights(model.proto)
    rng = np.random.default_rng(seed)

    def moved(value: Array) -> Array:
        bits = np.atleast_1d(value).view(f"i{value.dtype.itemsize}")
        steps = (bits + rng.integers(-1, 2, bits.shape, dtype=bits.dtype)).astype(bits.dtype).view(value.dtype)
        # No neighbours: a zero of either sign, and the ends of the range, whose next bits are no number.
        alone = (np.atleast_1d(value) == 0) | ~np.isfinite(steps) | ~np.isfinite(np.atleast_1d(value))
        changed: Array = np.where(alone, np.atleast_1d(value), steps).reshape(value.shape)
        return changed

    for tensor in _tensors(copy.graph):
        if tensor.data_type in FLOATS and not is_external(tensor):
            tensor.CopyFrom(onnx.numpy_helper.from_array(moved(onnx.numpy_helper.to_array(tensor)), tensor.name))
    return model_of(*with_weights(copy, lambda name: moved(model.stored[name])))


def _types(proto: onnx.ModelProto) -> dict[str, int]:
    """Element type of every tensor of the graph that is known to be a floating-point number."""
    skeleton = weights_as_inputs(proto)
    for dim in impossible_sizes(skeleton.graph):
        dim.Clear()
    inferred = onnx.shape_inference.infer_shapes(skeleton).graph
    values = (*inferred.input, *inferred.output, *inferred.value_info)
    found = {value.name: value.type.tensor_type.elem_type for value in values}
    found.update((tensor.name, tensor.data_type) for tensor in proto.graph.initializer)
    return {name: kind for name, kind in found.items() if kind in FLOATS}


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    for inner in graphs(graph):
        yield from inner.initializer
        for node in inner.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t


def _cast(tensor: onnx.TensorProto, kind: int) -> None:
    """Change the type of a tensor, and of its data where it holds it."""
    if is_external(tensor):
        tensor.data_type = kind
        return
    cast = np.asarray(onnx.numpy_helper.to_array(tensor), dtype=_numpy_type(kind))
    new = onnx.numpy_helper.from_array(cast, tensor.name)
    new.doc_string = tensor.doc_string
    tensor.CopyFrom(new)


def _numpy_type(kind: int) -> np.dtype[Any]:
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind))

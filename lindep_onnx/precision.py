"""Half precision: models in float16 and bfloat16 are worked on in single precision, and rounded once, at the end.

ONNX Runtime has few bfloat16 kernels, and the rounding of half precision would hide what depends exactly on what. So
`widened` makes a float32 copy of a model, node by node, which is traced, run and cut like any other; `narrowed` gives
every tensor of the result the type that it has in the original.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx

from lindep_onnx.graph import impossible_sizes

__all__ = ["narrowed", "neighbour", "resolution", "widened"]

#: Relative spacing of numbers, by type.
NARROW: Mapping[int, float] = {onnx.TensorProto.FLOAT16: 2.0**-10, onnx.TensorProto.BFLOAT16: 2.0**-7}
FLOATS = (*NARROW, onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE)
#: Attributes that name the type of an output.
TYPES = ("to", "dtype")


def resolution(proto: onnx.ModelProto) -> float:
    """Relative spacing of the coarsest floating-point type that stores a weight; 0 for single and double precision.

    Args:
        proto: the model.
    """
    return max((NARROW.get(tensor.data_type, 0.0) for tensor in _tensors(proto.graph)), default=0.0)


def widened(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a model in which half precision has become single precision; names and nodes stay.

    Args:
        proto: the model; not changed.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for tensor in _tensors(copy.graph):
        if tensor.data_type in NARROW:
            _cast(tensor, onnx.TensorProto.FLOAT)
    for graph in _graphs(copy.graph):
        for value in (*graph.input, *graph.output, *graph.value_info):
            if value.type.tensor_type.elem_type in NARROW:
                value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.name in TYPES and attribute.i in NARROW:
                    attribute.i = onnx.TensorProto.FLOAT
    return copy


def narrowed(result: onnx.ModelProto, original: onnx.ModelProto) -> onnx.ModelProto:
    """Give every tensor of a result the type that it has in the original.

    What the original does not have (a bias, a copy of a shared vector) gets the type of the node that reads it.

    Args:
        result: made from `widened(original)`; not changed.
        original: in half precision.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(result)
    types = _types(original)
    attributes = {node.output[0]: node.attribute for node in original.graph.node if node.output}
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
            if attribute.name in before and attribute.name not in ("group", "axes", "axis", "pads", "split"):
                old = before[attribute.name]
                if attribute.name in TYPES or attribute.HasField("t") or attribute.HasField("g"):
                    attribute.CopyFrom(old)
    for tensor in copy.graph.initializer:
        wanted = types.get(tensor.name, readers.get(tensor.name, 0))
        if tensor.data_type == onnx.TensorProto.FLOAT and wanted in NARROW:
            _cast(tensor, wanted)
    for value in (*copy.graph.input, *copy.graph.output, *copy.graph.value_info):
        if value.name in types:
            value.type.tensor_type.elem_type = types[value.name]
    return copy


def neighbour(proto: onnx.ModelProto, seed: int) -> onnx.ModelProto:
    """A copy of a model in which every weight moved to the next number above or below, or stayed.

    Args:
        proto: the model; not changed.
        seed: of the moves.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    rng = np.random.default_rng(seed)
    for tensor in _tensors(copy.graph):
        if tensor.data_type in FLOATS:
            value = onnx.numpy_helper.to_array(tensor)
            bits = np.atleast_1d(value).view(f"i{value.dtype.itemsize}")
            moved = bits + rng.integers(-1, 2, bits.shape, dtype=bits.dtype) * (bits != 0)
            moved = moved.astype(bits.dtype).view(value.dtype).reshape(value.shape)
            tensor.CopyFrom(onnx.numpy_helper.from_array(moved, tensor.name))
    return copy


def _types(proto: onnx.ModelProto) -> dict[str, int]:
    """Element type of every tensor of the graph that is known to be a floating-point number."""
    skeleton = onnx.ModelProto()
    skeleton.CopyFrom(proto)
    for tensor in skeleton.graph.initializer:  # inference needs no values of weights
        if tensor.data_type in NARROW:
            skeleton.graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            )
    kept = [tensor for tensor in skeleton.graph.initializer if tensor.data_type not in NARROW]
    del skeleton.graph.initializer[:]
    skeleton.graph.initializer.extend(kept)
    for dim in impossible_sizes(skeleton.graph):
        dim.Clear()
    inferred = onnx.shape_inference.infer_shapes(skeleton).graph
    values = (*inferred.input, *inferred.output, *inferred.value_info)
    found = {value.name: value.type.tensor_type.elem_type for value in values}
    found.update((tensor.name, tensor.data_type) for tensor in proto.graph.initializer)
    return {name: kind for name, kind in found.items() if kind in FLOATS}


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _graphs(inner)


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    for inner in _graphs(graph):
        yield from inner.initializer
        for node in inner.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t


def _cast(tensor: onnx.TensorProto, kind: int) -> None:
    value = onnx.numpy_helper.to_array(tensor)
    cast = np.asarray(value, dtype=onnx.helper.tensor_dtype_to_np_dtype(kind))
    new = onnx.numpy_helper.from_array(cast, tensor.name)
    new.doc_string = tensor.doc_string
    tensor.CopyFrom(new)

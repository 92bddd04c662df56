"""Half precision: models in float16 and bfloat16 are worked on in single precision, and rounded once, at the end.

ONNX Runtime has few bfloat16 kernels, and the rounding of half precision would hide what depends exactly on what. So
`to_float32` makes a copy of a model, node by node, which is traced, run and cut like any other; `to_stored_dtype` gives
every tensor of the result the type that it has in the original.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray

from lindep_onnx.model.checks import impossible_sizes
from lindep_onnx.model.ir import Model, model_of
from lindep_onnx.model.node import unused
from lindep_onnx.model.shapes import REARRANGING
from lindep_onnx.model.weights import graphs, is_external, weights_as_inputs, with_weights, without_weights

Array: TypeAlias = NDArray[Any]

#: Relative spacing of numbers, by type.
NARROW: Mapping[int, float] = {onnx.TensorProto.FLOAT16: 2.0**-10, onnx.TensorProto.BFLOAT16: 2.0**-7}
FLOATS = (*NARROW, onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE)
#: Attributes that name the type of an output.
TYPES = ("to", "dtype")
#: From which of their inputs on operators are told sizes or places, and operators whose result is not one of the
#: numbers that they read.
_SIZES: Mapping[str, int] = {
    **dict.fromkeys(("ConstantOfShape", "Range"), 0),
    **dict.fromkeys(("Expand", "Pad", "Reshape", "Resize", "Slice", "Split", "Tile", "TopK", "Upsample"), 1),
}
_ANEW = frozenset(["Conv", "ConvTranspose", "Gemm", "MatMul", "Shape", "Size"])


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

    What the original does not have (a bias, a copy of a shared vector) gets the type of the node that reads it. What
    the original stores in one type and widens by a Cast is stored so again, with its Cast.
    """
    copy = without_weights(result.proto)
    types = _types(original.proto)
    stored = _stored_behind(original)
    before = {_first(node.output): node for node in original.proto.graph.node}
    readers: dict[str, int] = {}
    for node in copy.graph.node:
        wanted = next((types[name] for name in (*node.output, *node.input) if name in types), 0)
        source = before.get(_first(node.output))
        read = source.input if source is not None else ()
        for place, name in enumerate(node.input):
            readers.setdefault(name, stored.get(read[place] if place < len(read) else "", wanted))
        if node.op_type == "Constant" and node.output[0] in types:
            for attribute in node.attribute:
                if attribute.t.data_type == onnx.TensorProto.FLOAT:
                    _cast(attribute.t, types[node.output[0]])
            continue
        attributes = {attribute.name: attribute for attribute in (source.attribute if source is not None else ())}
        for attribute in node.attribute:
            same = attribute.name in attributes and attribute.name not in ("group", "axes", "axis", "pads", "split")
            if same and (attribute.name in TYPES or attribute.HasField("t") or attribute.HasField("g")):
                attribute.CopyFrom(attributes[attribute.name])
    for tensor in copy.graph.initializer:
        wanted = stored.get(tensor.name, types.get(tensor.name, readers.get(tensor.name, 0)))
        if tensor.data_type == onnx.TensorProto.FLOAT and wanted in NARROW:
            _cast(tensor, wanted)
    for value in (*copy.graph.input, *copy.graph.output, *copy.graph.value_info):
        if value.name in types:
            value.type.tensor_type.elem_type = types[value.name]
    _cast_where_read(copy.graph, before, types)
    return _of_values(copy, result)


def _first(names: Iterable[str]) -> str:
    return next(filter(None, names), "")


def _stored_behind(model: Model) -> dict[str, int]:
    """The type in which a model stores what it reads, for constants in half precision and what only rearranges them."""
    kinds = {name: int(onnx.helper.np_dtype_to_tensor_dtype(value.dtype)) for name, value in model.stored.items()}
    found = {name: kind for name, kind in kinds.items() if kind in NARROW}
    for node in model.nodes:
        if node.op in REARRANGING and node.inputs[0] in found:
            found[node.outputs[0]] = found[node.inputs[0]]
    return found


def _cast_where_read(graph: onnx.GraphProto, before: Mapping[str, onnx.NodeProto], types: Mapping[str, int]) -> None:
    """Put a Cast between a constant and the nodes that have read another type in the original; `before` has these."""
    kinds = {name: types[name] for node in graph.node for name in node.output if name in types}
    kinds.update((tensor.name, tensor.data_type) for tensor in graph.initializer)
    kinds.update((node.output[0], a.t.data_type) for node in graph.node for a in node.attribute if a.name == "value")
    taken = {*kinds, *(name for node in graph.node for name in node.output), *(value.name for value in graph.input)}
    made: dict[tuple[str, int], str] = {}
    nodes = []
    for node in graph.node:
        source = before.get(_first(node.output))
        for place, name in enumerate(node.input):
            read = source.input[place] if source is not None and place < len(source.input) else ""
            kind = types.get(read, next((types[one] for one in node.output if one in types), 0) if not read else 0)
            if kinds.get(name, kind) == kind or kinds[name] not in FLOATS or not kind:
                continue
            if (name, kind) not in made:
                cast = read if read and read not in taken else unused(f"{name}_cast", taken)
                taken.add(cast)
                made[name, kind] = cast
                nodes.append(onnx.helper.make_node("Cast", [name], [cast], name=cast, to=kind))
            node.input[place] = made[name, kind]
        nodes.append(onnx.NodeProto.FromString(node.SerializeToString()))
    if made:
        del graph.node[:]
        graph.node.extend(nodes)
        stored = {tensor.name for tensor in graph.initializer}
        told = [value for value in graph.value_info if value.name not in stored]
        del graph.value_info[:]
        graph.value_info.extend(told)


def _of_values(proto: onnx.ModelProto, source: Model) -> Model:
    """A copy of a model without data, given its data, as the types of the copy."""
    types = {tensor.name: _numpy_type(tensor.data_type) for tensor in proto.graph.initializer}
    made = with_weights(proto, lambda name: np.asarray(source.stored[name], dtype=types[name]))
    return model_of(*made, told=source.told)


def perturbed_one_ulp(model: Model, seed: int) -> Model:
    """A copy of a model in which every weight moved to the next number above or below, or stayed.

    What sizes follow from stays: a Resize by 2 gives other sizes than one by the number below 2.
    """
    copy = without_weights(model.proto)
    rng = np.random.default_rng(seed)
    sizes = _behind_sizes(copy)

    def moved(value: Array) -> Array:
        bits = np.atleast_1d(value).view(f"i{value.dtype.itemsize}")
        steps = (bits + rng.integers(-1, 2, bits.shape, dtype=bits.dtype)).astype(bits.dtype).view(value.dtype)
        # No neighbours: a zero of either sign, and the ends of the range, whose next bits are no number.
        alone = (np.atleast_1d(value) == 0) | ~np.isfinite(steps) | ~np.isfinite(np.atleast_1d(value))
        changed: Array = np.where(alone, np.atleast_1d(value), steps).reshape(value.shape)
        return changed

    for name, tensor in _named_tensors(copy.graph):
        if tensor.data_type in FLOATS and not is_external(tensor) and name not in sizes:
            tensor.CopyFrom(onnx.numpy_helper.from_array(moved(onnx.numpy_helper.to_array(tensor)), tensor.name))
    return model_of(*with_weights(copy, lambda name: moved(model.stored[name])), told=model.told)


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


def _behind_sizes(proto: onnx.ModelProto) -> set[str]:
    """Names of all tensors that sizes of others are computed from, in bodies too."""
    nodes = [node for graph in graphs(proto.graph) for node in graph.node]
    makers = {name: node for node in nodes for name in node.output}
    waiting = [name for node in nodes for name in node.input[_SIZES.get(node.op_type, len(node.input)) :]]
    found: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            maker = makers.get(name)
            if maker is not None and maker.op_type not in _ANEW:
                waiting.extend(maker.input)
    return found


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    return (tensor for _, tensor in _named_tensors(graph))


def _named_tensors(graph: onnx.GraphProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    """Initializers and tensors within nodes, the latter by the name of what the node gives."""
    for inner in graphs(graph):
        yield from ((tensor.name, tensor) for tensor in inner.initializer)
        for node in inner.node:
            yield from ((_first(node.output), attribute.t) for attribute in node.attribute if attribute.HasField("t"))


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

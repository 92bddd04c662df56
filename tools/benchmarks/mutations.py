"""Ways in which exporters, converters and optimisers change a file without changing what its model computes.

Each kind is a function of a `Case` and a seeded generator that returns another `Case`; `KINDS` has them by name. What
is given is never changed. A kind that has nothing to do in a model says so by an `InapplicableError`.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper, version_converter

Array: TypeAlias = NDArray[Any]
Random: TypeAlias = np.random.Generator

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)
#: Elements of a weight that is worth moving about, and the most of one that is stored sparsely.
WORTH, SPARSE = 16, 300_000
NEWEST, OLDEST = 23, 8
#: What exporters write into names.
ODD = ("/{}/a.b:0", "{}", "onnx::Conv_{}", "é {}", "Identity{}:0;x", "{}.weight", "x|y{}", "'{}'", "p2o.{}[0]")


class InapplicableError(Exception):
    """A mutation finds nothing to do in a model, or its tool does not take it."""


@dataclass(frozen=True)
class Case:
    """A model and what fits it.

    Attributes:
        model: in memory.
        feeds: samples first.
        external: whether its weights are to lie beside its file.
    """

    model: ModelProto
    feeds: Mapping[str, Array]
    external: bool = False


Kind: TypeAlias = Callable[[Case, Random], Case]


def _in_place(change: Callable[[ModelProto, Random], object]) -> Kind:
    """A kind from a function that changes a copy of the model."""

    def kind(case: Case, rng: Random) -> Case:
        copy = ModelProto()
        copy.CopyFrom(case.model)
        change(copy, rng)
        return replace(case, model=copy)

    return kind


def copies(case: Case, _: Random) -> Case:
    """Make every eighth channel the copy of its neighbour, in all weights: then there is something to remove."""
    copy = ModelProto()
    copy.CopyFrom(case.model)
    axes = _channel_axes(copy.graph)
    for tensor in _weights(copy.graph):
        value = np.array(numpy_helper.to_array(tensor))
        long = [axis for axis, size in enumerate(value.shape) if size > 1]
        axis = axes.get(tensor.name, long[0] if len(long) == 1 else None)
        if axis is None or value.shape[axis] < WORTH:
            continue
        rows = np.moveaxis(value, axis, 0)
        first = np.arange(len(rows) // 8) * 2
        rows[first + 1] = rows[first]
        tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    return replace(case, model=copy)


def _channel_axes(graph: GraphProto) -> dict[str, int]:
    """Where the output channels of the weights of Conv, Gemm and MatMul are."""
    found = {}
    for node in graph.node:
        if node.op_type == "Conv":
            found[node.input[1]] = 0
        elif node.op_type == "Gemm":
            turned = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
            found[node.input[1]] = 0 if turned else 1
        elif node.op_type == "MatMul":
            found[node.input[1]] = -1
    named = {node.output[0]: node for node in graph.node if node.op_type == "Constant"}
    for name, node in named.items():
        if name in found:
            found[_value(node).name] = found[name]
    return found


# ---- walking a graph ----------------------------------------------------------------------------------------------


def _value(constant: NodeProto) -> TensorProto:
    """What a Constant node holds, or an empty tensor if it is no tensor."""
    return next((attribute.t for attribute in constant.attribute if attribute.name == "value"), TensorProto())


def _weights(graph: GraphProto) -> Iterator[TensorProto]:
    """Floating-point initializers and constants with something in them; constants get the name of their output."""
    for node in graph.node:
        if node.op_type == "Constant":
            _value(node).name = _value(node).name or node.output[0]
    held = [*graph.initializer, *(_value(node) for node in graph.node if node.op_type == "Constant")]
    yield from (tensor for tensor in held if tensor.data_type in FLOATS and np.prod(tensor.dims) >= WORTH)


def _some(items: list[Any], most: int, rng: Random) -> list[Any]:
    """At least one and at most `most` of them, in their order.

    Raises:
        InapplicableError: there are none.
    """
    if not items:
        raise InapplicableError("there are none")
    count = int(rng.integers(1, min(most, len(items)) + 1))
    return [items[place] for place in sorted(rng.choice(len(items), count, replace=False))]


def _fresh(graph: GraphProto, stem: str) -> Iterator[str]:
    taken = {name for node in graph.node for name in (*node.input, *node.output)}
    taken |= {tensor.name for tensor in graph.initializer} | {value.name for value in graph.input}
    number = 0
    while True:
        number += 1
        if (name := f"{stem}_{number}") not in taken:
            yield name


def _known(model: ModelProto) -> dict[str, onnx.TypeProto.Tensor]:
    """Types and shapes that shape inference finds."""
    try:
        inferred = onnx.shape_inference.infer_shapes(model).graph
    except Exception as error:  # whatever it dislikes
        raise InapplicableError(str(error)) from error
    values = (*inferred.value_info, *inferred.input, *inferred.output)
    return {value.name: value.type.tensor_type for value in values if value.type.HasField("tensor_type")}


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """A graph and those within its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs) if attribute.HasField("g") else attribute.graphs:
                yield from _graphs(inner)


# ---- versions and precision ---------------------------------------------------------------------------------------


def _opset(model: ModelProto) -> int:
    return next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))


def _converted(case: Case, version: int) -> Case:
    try:
        return replace(case, model=version_converter.convert_version(case.model, version))
    except Exception as error:  # it raises what it likes
        raise InapplicableError(str(error)) from error


def opset_up(case: Case, rng: Random) -> Case:
    """Convert to a newer opset."""
    if (now := _opset(case.model)) >= NEWEST:
        raise InapplicableError("it is new")
    return _converted(case, int(rng.integers(now + 1, NEWEST + 1)))


def opset_down(case: Case, rng: Random) -> Case:
    """Convert to an older opset."""
    if (now := _opset(case.model)) <= OLDEST:
        raise InapplicableError("it is old")
    return _converted(case, int(rng.integers(max(OLDEST, now - 5), now)))


def half(case: Case, rng: Random) -> Case:
    """Convert to half precision, with or without its inputs and outputs."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    keep = bool(rng.random() < 0.5)
    copy = ModelProto()
    copy.CopyFrom(case.model)
    try:
        model = convert_float_to_float16(copy, keep_io_types=keep)
    except Exception as error:  # it raises what it likes
        raise InapplicableError(str(error)) from error
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    feeds = {
        name: value.astype(np.float16) if types.get(name) == TensorProto.FLOAT16 and value.dtype.kind == "f" else value
        for name, value in case.feeds.items()
    }
    return replace(case, model=model, feeds=feeds)


# ---- sizes --------------------------------------------------------------------------------------------------------


def _batches(model: ModelProto, feeds: Mapping[str, Array]) -> list[Any]:
    """Leading dimensions of the inputs that are fed."""
    found = [value.type.tensor_type.shape.dim for value in model.graph.input if value.name in feeds]
    if not all(found):
        raise InapplicableError("an input has no leading axis")
    return [dims[0] for dims in found]


def batch_fixed(case: Case, rng: Random) -> Case:
    """Fix the batch, and with it whatever dimension has its name."""
    copy = ModelProto()
    copy.CopyFrom(case.model)
    dims = _batches(copy, case.feeds)
    if any(dim.dim_value > 0 for dim in dims):
        raise InapplicableError("it is fixed")
    size, names = int(rng.choice([1, 2, 4])), {dim.dim_param for dim in dims} - {""}
    for dim in dims:
        dim.dim_value = size
    for value in (*copy.graph.output, *copy.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in names:
                dim.dim_value = size
    return replace(case, model=copy)


def batch_freed(case: Case, rng: Random) -> Case:
    """Free a batch that is fixed; whether the graph works with another is not asked."""
    copy = ModelProto()
    copy.CopyFrom(case.model)
    dims = _batches(copy, case.feeds)
    if not all(dim.dim_value > 0 for dim in dims):
        raise InapplicableError("it is free")
    name = str(rng.choice(["batch", "N", "?", "unk__1", "-1"]))
    for dim in dims:
        dim.dim_param = name
    for value in copy.graph.output:
        if value.type.tensor_type.shape.dim:
            value.type.tensor_type.shape.dim[0].dim_param = name
    del copy.graph.value_info[:]
    return replace(case, model=copy)


def _sizes_renamed(model: ModelProto, rng: Random) -> None:
    """Other names for free dimensions, no names, or names that are all the same."""
    way, number = rng.integers(3), 0
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_value > 0:
                continue
            number += 1
            dim.Clear()
            if way:
                dim.dim_param = f"DynamicDimension.{number}" if way == 1 else "?"
    if not number:
        raise InapplicableError("no dimension is free")
    del model.graph.value_info[:]


# ---- order and names ----------------------------------------------------------------------------------------------


def _reordered(model: ModelProto, rng: Random) -> None:
    """Nodes in another topological order."""
    nodes, ready_at, order = list(model.graph.node), Counter[int](), []
    made = {name: place for place, node in enumerate(nodes) for name in node.output if name}
    readers: dict[int, list[int]] = {}
    for place, node in enumerate(nodes):
        inner = (name for graph in _inner(node) for each in graph.node for name in each.input)
        for needed in {made[name] for name in (*node.input, *inner) if name in made} - {place}:
            readers.setdefault(needed, []).append(place)
            ready_at[place] += 1
    ready = [place for place in range(len(nodes)) if not ready_at[place]]
    while ready:
        place = ready.pop(int(rng.integers(len(ready))))
        order.append(nodes[place])
        for reader in readers.get(place, ()):
            ready_at[reader] -= 1
            if not ready_at[reader]:
                ready.append(reader)
    _replace_nodes(model.graph, order)


def _inner(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            yield from _graphs(graph)


def _replace_nodes(graph: GraphProto, nodes: list[NodeProto]) -> None:
    copied = []
    for node in nodes:
        copy = NodeProto()
        copy.CopyFrom(node)
        copied.append(copy)
    del graph.node[:]
    graph.node.extend(copied)


def _disordered(model: ModelProto, rng: Random) -> None:
    """Nodes in any order, which ONNX Runtime takes and the standard does not."""
    nodes = list(model.graph.node)
    _replace_nodes(model.graph, [nodes[place] for place in rng.permutation(len(nodes))])


def _nameless(model: ModelProto, rng: Random) -> None:
    """Nodes without names, or with numbers for names."""
    numbered = bool(rng.random() < 0.5)
    for number, node in enumerate(node for graph in _graphs(model.graph) for node in graph.node):
        node.name = str(number) if numbered else ""


def renamed(case: Case, rng: Random) -> Case:
    """Odd names for all tensors, inputs and outputs among them."""
    copy = ModelProto()
    copy.CopyFrom(case.model)
    names = {name for graph in _graphs(copy.graph) for node in graph.node for name in (*node.input, *node.output)}
    names |= {tensor.name for graph in _graphs(copy.graph) for tensor in graph.initializer}
    names |= {value.name for graph in _graphs(copy.graph) for value in (*graph.input, *graph.output)}
    style = str(rng.choice(ODD))
    new = {name: style.format(number) for number, name in enumerate(sorted(names - {""}))}
    for graph in _graphs(copy.graph):
        for node in graph.node:
            node.input[:] = [new.get(name, name) for name in node.input]
            node.output[:] = [new.get(name, name) for name in node.output]
        for each in (*graph.initializer, *graph.input, *graph.output, *graph.value_info):
            each.name = new.get(each.name, each.name)
        for sparse in graph.sparse_initializer:
            sparse.values.name = new.get(sparse.values.name, sparse.values.name)
        del graph.quantization_annotation[:]
    return replace(case, model=copy, feeds={new[name]: value for name, value in case.feeds.items()})


def _domain(model: ModelProto, _: Random) -> None:
    """The standard domain by its long name."""
    for entry in model.opset_import:
        if entry.domain == "":
            entry.domain = "ai.onnx"
    for graph in _graphs(model.graph):
        for node in graph.node:
            node.domain = node.domain or "ai.onnx"


# ---- tools --------------------------------------------------------------------------------------------------------


def _tool(call: Callable[[ModelProto], ModelProto]) -> Kind:
    def kind(case: Case, _: Random) -> Case:
        copy = ModelProto()
        copy.CopyFrom(case.model)
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                model = call(copy)
        except (Exception, SystemExit) as error:  # they raise what they like
            raise InapplicableError(str(error)) from error
        if {value.name for value in model.graph.input} != {value.name for value in case.model.graph.input}:
            raise InapplicableError("the inputs are others")
        return replace(case, model=model)

    return kind


def _simplified(model: ModelProto) -> ModelProto:
    import onnxsim

    found, holds = onnxsim.simplify(model)
    if not holds:
        raise InapplicableError("onnxsim changed the outputs")
    return found


def _slimmed(model: ModelProto) -> ModelProto:
    import onnxslim

    found = onnxslim.slim(model)
    if not isinstance(found, ModelProto):
        raise InapplicableError("onnxslim gave nothing")
    return found


def _optimised(level: str) -> Callable[[ModelProto], ModelProto]:
    def call(model: ModelProto) -> ModelProto:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
        options.log_severity_level = 4
        with tempfile.TemporaryDirectory() as folder:
            options.optimized_model_filepath = str(Path(folder) / "model.onnx")
            onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
            return onnx.load(options.optimized_model_filepath)

    return call


def _wrapped(model: ModelProto, rng: Random) -> None:
    """A few neighbouring nodes as a local function."""
    graph = model.graph
    size = int(rng.integers(2, 7))
    if len(graph.node) < size or any(function.domain == "local" for function in model.functions):
        raise InapplicableError("it is too short, or has one")
    at = int(rng.integers(0, len(graph.node) - size + 1))
    nodes, rest = list(graph.node[at : at + size]), [*graph.node[:at], *graph.node[at + size :]]
    if any(node.domain not in ("", "ai.onnx") or any(_inner(node)) for node in nodes):
        raise InapplicableError("a node with graphs in it, or of another domain")
    made = {name for node in nodes for name in node.output if name}
    read = {
        name for node in rest for name in (*node.input, *(n for g in _inner(node) for x in g.node for n in x.input))
    }
    read |= {value.name for value in graph.output}
    inputs = list(dict.fromkeys(name for node in nodes for name in node.input if name and name not in made))
    outputs = sorted(made & read)
    entries = [entry for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    function = helper.make_function("local", "Block", inputs, outputs, nodes, entries)
    call = helper.make_node("Block", inputs, outputs, "block", domain="local")
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("local", 1))
    model.ir_version = max(model.ir_version, 8)
    before = list(graph.node[:at])
    _replace_nodes(graph, [*before, call, *graph.node[at + size :]])


def inlined(case: Case, _: Random) -> Case:
    """Local functions put in the place of their calls."""
    if not case.model.functions:
        raise InapplicableError("there are none")
    return replace(case, model=onnx.inliner.inline_local_functions(case.model))


# ---- weights ------------------------------------------------------------------------------------------------------


def _as_constants(model: ModelProto, rng: Random) -> None:
    """Some or all initializers as Constant nodes."""
    graph = model.graph
    inputs = {value.name for value in graph.input}
    moved = [tensor for tensor in graph.initializer if tensor.name not in inputs and tensor.data_location == 0]
    if rng.random() < 0.5:
        moved = _some(moved, len(moved), rng)
    if not moved:
        raise InapplicableError("there are none")
    names = {tensor.name for tensor in moved}
    constants = [helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in moved]
    kept = [tensor for tensor in graph.initializer if tensor.name not in names]
    _replace_nodes(graph, [*constants, *graph.node])
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _as_initializers(model: ModelProto, _: Random) -> None:
    """Constant nodes as initializers."""
    graph, found = model.graph, []
    outputs = {value.name for value in graph.output}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value" and node.output[0] not in outputs:
            tensor = TensorProto()
            tensor.CopyFrom(_value(node))
            tensor.name = node.output[0]
            found.append(tensor)
    if not found:
        raise InapplicableError("there are none")
    names = {tensor.name for tensor in found}
    _replace_nodes(graph, [node for node in graph.node if not (names & set(node.output))])
    graph.initializer.extend(found)


def _computed(model: ModelProto, rng: Random) -> None:
    """Weights behind a Transpose, a Reshape, a Cast from half precision, or the sum of two halves."""
    graph = model.graph
    names, nodes = _fresh(graph, "stored"), []
    inputs = {value.name for value in graph.input}
    found = [t for t in graph.initializer if t.data_type == TensorProto.FLOAT and np.prod(t.dims) >= WORTH]
    for tensor in _some([tensor for tensor in found if tensor.name not in inputs], 8, rng):
        value, name = numpy_helper.to_array(tensor), tensor.name
        stored, other, way = next(names), next(names), rng.integers(4)
        if way == 0:
            order = rng.permutation(value.ndim)
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value.transpose(order)), stored))
            nodes.append(helper.make_node("Transpose", [stored], [name], perm=np.argsort(order).tolist()))
        elif way == 1:
            tensor.CopyFrom(numpy_helper.from_array(value.ravel(), stored))
            graph.initializer.append(numpy_helper.from_array(np.array(value.shape, np.int64), other))
            nodes.append(helper.make_node("Reshape", [stored, other], [name]))
        elif way == 2:
            tensor.CopyFrom(numpy_helper.from_array(value.astype(np.float16), stored))
            nodes.append(helper.make_node("Cast", [stored], [name], to=TensorProto.FLOAT))
        else:
            tensor.CopyFrom(numpy_helper.from_array(value / 2, stored))
            nodes.append(helper.make_node("Add", [stored, stored], [name]))
    _replace_nodes(graph, [*nodes, *graph.node])


def _sparse(model: ModelProto, rng: Random) -> None:
    """Some initializers as sparse ones."""
    graph = model.graph
    inputs = {value.name for value in graph.input}
    fit = [
        tensor
        for tensor in graph.initializer
        if tensor.data_type == TensorProto.FLOAT and 2 <= np.prod(tensor.dims) <= SPARSE and tensor.name not in inputs
    ]
    for tensor in _some(fit, 3, rng):
        value = numpy_helper.to_array(tensor)
        places = np.flatnonzero(value)
        sparse = helper.make_sparse_tensor(
            numpy_helper.from_array(value.ravel()[places], tensor.name),
            numpy_helper.from_array(places.astype(np.int64), tensor.name + "_places"),
            value.shape,
        )
        graph.sparse_initializer.append(sparse)
        graph.initializer.remove(tensor)


def _typed(model: ModelProto, _: Random) -> None:
    """Values in the field of their type, not as raw bytes."""
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and tensor.HasField("raw_data"):
            values = numpy_helper.to_array(tensor).ravel().tolist()
            tensor.ClearField("raw_data")
            tensor.float_data.extend(values)


def _as_inputs(model: ModelProto, rng: Random) -> None:
    """Initializers as inputs with defaults, as older files have them."""
    graph = model.graph
    inputs = {value.name for value in graph.input}
    fit = [tensor for tensor in graph.initializer if tensor.name not in inputs]
    for tensor in _some(fit, len(fit), rng):
        graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))


def _merged(model: ModelProto, _: Random) -> None:
    """One initializer in the place of all equal ones."""
    graph = model.graph
    inputs = {value.name for value in graph.input}
    first: dict[tuple[Any, ...], str] = {}
    new, kept = {}, []
    for tensor in graph.initializer:
        value = numpy_helper.to_array(tensor)
        key = (tensor.data_type, value.shape, value.tobytes())
        if tensor.name in inputs or first.setdefault(key, tensor.name) == tensor.name:
            kept.append(tensor)
        else:
            new[tensor.name] = first[key]
    if not new:
        raise InapplicableError("no two are equal")
    for inner in _graphs(graph):
        for node in inner.node:
            node.input[:] = [new.get(name, name) for name in node.input]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _split(model: ModelProto, _: Random) -> None:
    """Every reader of an initializer gets one of its own."""
    graph = model.graph
    names, seen, held = _fresh(graph, "own"), set(), {tensor.name: tensor for tensor in graph.initializer}
    inputs, added = {value.name for value in graph.input}, 0
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name in held and name in seen and name not in inputs:
                tensor = graph.initializer.add()
                tensor.CopyFrom(held[name])
                tensor.name = node.input[place] = next(names)
                added += 1
            seen.add(name)
    if not added:
        raise InapplicableError("none is shared")


def external(case: Case, _: Random) -> Case:
    """Weights beside the file."""
    return replace(case, external=True)


# ---- what is not needed -------------------------------------------------------------------------------------------


def _identities(model: ModelProto, rng: Random) -> None:
    """Identity nodes on edges: of weights, of inputs, of activations, and before outputs."""
    graph = model.graph
    names, nodes = _fresh(graph, "same"), []
    edges = [(at, place) for at, node in enumerate(graph.node) for place, name in enumerate(node.input) if name]
    before: dict[int, list[NodeProto]] = {}
    for at, place in _some(edges, 12, rng):
        name = next(names)
        before.setdefault(at, []).append(helper.make_node("Identity", [graph.node[at].input[place]], [name]))
        graph.node[at].input[place] = name
    for at, node in enumerate(graph.node):
        nodes += [*before.get(at, ()), node]
    _replace_nodes(graph, nodes)


def _neutral(model: ModelProto, rng: Random) -> None:
    """Nodes that change nothing: Cast to the same type, Dropout, times one, plus zero."""
    graph, known = model.graph, _known(model)
    names, nodes = _fresh(graph, "neutral"), []
    fit = [
        (at, place)
        for at, node in enumerate(graph.node)
        for place, name in enumerate(node.input)
        if name in known and known[name].elem_type in FLOATS
    ]
    before: dict[int, list[NodeProto]] = {}
    for at, place in _some(fit, 6, rng):
        given, made, number = graph.node[at].input[place], next(names), next(names)
        kind, way = known[given].elem_type, rng.integers(4)
        if way == 0:
            node = helper.make_node("Cast", [given], [made], to=kind)
        elif way == 1:
            node = helper.make_node("Dropout", [given], [made])
        else:
            one = np.array(3 - way, helper.tensor_dtype_to_np_dtype(kind))
            graph.initializer.append(numpy_helper.from_array(one, number))
            node = helper.make_node("Mul" if way == 2 else "Add", [given, number], [made])
        before.setdefault(at, []).append(node)
        graph.node[at].input[place] = made
    for at, node in enumerate(graph.node):
        nodes += [*before.get(at, ()), node]
    _replace_nodes(graph, nodes)


def _unused(model: ModelProto, rng: Random) -> None:
    """Initializers, constants and nodes that nothing reads, and operator sets that nothing is of."""
    graph, names = model.graph, _fresh(model.graph, "unused")
    for _number in range(int(rng.integers(1, 4))):
        graph.initializer.append(numpy_helper.from_array(rng.normal(size=(5, 3)).astype(np.float32), next(names)))
    made = [name for node in graph.node for name in node.output if name]
    for name in _some(made, 4, rng):
        graph.node.append(helper.make_node("Shape" if rng.random() < 0.3 else "Identity", [name], [next(names)]))
    domains = {entry.domain for entry in model.opset_import}
    if "ai.onnx.ml" not in domains:
        model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 2))


def unused_input(case: Case, rng: Random) -> Case:
    """An input that nothing reads."""
    copy = ModelProto()
    copy.CopyFrom(case.model)
    name, count = next(_fresh(copy.graph, "extra")), len(next(iter(case.feeds.values())))
    first = next(value for value in copy.graph.input if value.name in case.feeds)
    dims = first.type.tensor_type.shape.dim
    size = dims[0].dim_value or dims[0].dim_param or None
    copy.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [size, 2]))
    return replace(case, model=copy, feeds={**case.feeds, name: rng.normal(size=(count, 2)).astype(np.float32)})


def _stale(model: ModelProto, rng: Random) -> None:
    """Shapes of when the batch was 1, and of tensors that are no more."""
    graph, known = model.graph, _known(model)
    old = {value.name for value in graph.value_info} | {value.name for value in (*graph.input, *graph.output)}
    size = int(rng.choice([1, 1, 2]))
    for name, kind in known.items():
        if name in old or not kind.shape.dim or rng.random() < 0.3:
            continue
        value = graph.value_info.add()
        value.name = name
        value.type.tensor_type.CopyFrom(kind)
        value.type.tensor_type.shape.dim[0].dim_value = size
    graph.value_info.append(helper.make_tensor_value_info("that was once", TensorProto.FLOAT, [1, 2, 3]))


def _shapeless(model: ModelProto, _: Random) -> None:
    """No shapes but those of the inputs."""
    del model.graph.value_info[:]
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")


def _shapes(model: ModelProto, _: Random) -> None:
    """All shapes that inference finds, stored."""
    try:
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    except Exception as error:  # whatever it dislikes
        raise InapplicableError(str(error)) from error
    model.CopyFrom(inferred)


def _tapped(model: ModelProto, rng: Random) -> None:
    """One or two activations as outputs too."""
    graph, known = model.graph, _known(model)
    outputs = {value.name for value in graph.output}
    made = [name for node in graph.node if node.op_type != "Constant" for name in node.output]
    for name in _some([name for name in made if name in known and name not in outputs], 2, rng):
        value = graph.output.add()
        value.name = name
        value.type.tensor_type.elem_type = known[name].elem_type


KINDS: Mapping[str, Kind] = {
    "opset up": opset_up,
    "opset down": opset_down,
    "half precision": half,
    "batch fixed": batch_fixed,
    "batch freed": batch_freed,
    "sizes renamed": _in_place(_sizes_renamed),
    "another order": _in_place(_reordered),
    "no order": _in_place(_disordered),
    "nodes without names": _in_place(_nameless),
    "odd names": renamed,
    "ai.onnx as domain": _in_place(_domain),
    "onnxsim": _tool(_simplified),
    "onnxslim": _tool(_slimmed),
    "ONNX Runtime, basic": _tool(_optimised("ORT_ENABLE_BASIC")),
    "ONNX Runtime, extended": _tool(_optimised("ORT_ENABLE_EXTENDED")),
    "a local function": _in_place(_wrapped),
    "functions inlined": inlined,
    "initializers to constants": _in_place(_as_constants),
    "constants to initializers": _in_place(_as_initializers),
    "computed weights": _in_place(_computed),
    "sparse initializers": _in_place(_sparse),
    "values typed": _in_place(_typed),
    "initializers as inputs": _in_place(_as_inputs),
    "equal weights merged": _in_place(_merged),
    "shared weights split": _in_place(_split),
    "external data": external,
    "identities": _in_place(_identities),
    "neutral nodes": _in_place(_neutral),
    "unused parts": _in_place(_unused),
    "an unused input": unused_input,
    "stale shapes": _in_place(_stale),
    "no shapes": _in_place(_shapeless),
    "all shapes": _in_place(_shapes),
    "activations as outputs": _in_place(_tapped),
}

"""Reading an ONNX model into plain frozen values, and writing an edited one back.

This module owns the file format: protobuf, external data, and onnx-graphsurgeon, which no other module imports.
Everything else sees a `Model`: nodes in topological order, constants as arrays, a shape for every tensor.
"""

from __future__ import annotations

import filecmp
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx.inliner
import onnx_graphsurgeon as gs
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from lindep_onnx import files
from lindep_onnx.errors import ModelError, OutputError

__all__ = [
    "METADATA_KEY",
    "Edits",
    "Insertion",
    "Model",
    "Node",
    "edit",
    "filled",
    "fingerprint",
    "impossible_sizes",
    "light",
    "load",
    "on_disk",
    "read_model",
    "save",
    "size_of",
    "tensor_bytes",
]

logger = logging.getLogger(__name__)
# graphsurgeon reports on its own logger, straight to the terminal; what matters is raised by us.
gs.logger.G_LOGGER.severity = gs.logger.G_LOGGER.CRITICAL

Array: TypeAlias = NDArray[Any]
Dim: TypeAlias = "int | str"

METADATA_KEY = "lindep_onnx"
#: protobuf cannot hold or serialise a message beyond this.
PROTOBUF_LIMIT = 2**31 - 1
#: Smaller tensors stay in the model file when the others go into a file of their own.
EXTERNAL_BYTES = 1024
#: A larger model is taken to use the file that is looked for.
MOST_SEARCHED = 1 << 28


@dataclass(frozen=True)
class Node:
    """One operator call.

    Attributes:
        index: place in the topological order.
        op: operator type; operators outside the default domain read `domain::type`.
        name: the name in the file, or one made from the operator and its first output.
        inputs: tensor names; an absent optional input is the empty string.
        outputs: tensor names; an absent optional output is the empty string.
        attributes: decoded attribute values; tensors as arrays.
        captures: tensors of this graph that sub-graphs of the node read.
    """

    index: int
    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    captures: tuple[str, ...]

    def input(self, position: int) -> str:
        """Name of the input at `position`, empty where it is absent."""
        return self.inputs[position] if position < len(self.inputs) else ""


@dataclass(frozen=True)
class Model:
    """A model as read from a file; nothing in it is ever changed.

    Attributes:
        proto: the protobuf, weights included.
        nodes: in topological order, `Constant` nodes left out.
        inputs: graph inputs that have to be fed (initializers left out).
        outputs: graph outputs.
        stored: every constant tensor the file holds, initializer or `Constant` node.
        overridable: initializers that are graph inputs too, so that a caller may feed another value.
        opset: version of the default operator set.
    """

    proto: onnx.ModelProto
    nodes: tuple[Node, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    stored: Mapping[str, Array]
    overridable: frozenset[str]
    opset: int

    @cached_property
    def consumers(self) -> Mapping[str, tuple[Node, ...]]:
        """The nodes that read each tensor, once per reading input; captures count."""
        found: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in (*node.inputs, *node.captures):
                if name:
                    found.setdefault(name, []).append(node)
        return MappingProxyType({name: tuple(nodes) for name, nodes in found.items()})

    @cached_property
    def producer(self) -> Mapping[str, Node]:
        """The node that computes each tensor."""
        return MappingProxyType({name: node for node in self.nodes for name in node.outputs if name})


def read_model(source: str | Path | onnx.ModelProto) -> onnx.ModelProto:
    """Read a model file with its weights.

    Args:
        source: a path, or a model that is in memory already and is returned as it is.

    Raises:
        ModelError: the file is missing, is no ONNX model, or refers to external data that cannot be read.
    """
    if isinstance(source, onnx.ModelProto):
        return source
    path = Path(source)
    try:
        is_file = path.is_file()
    except (OSError, ValueError) as error:  # no name for a file: too long, or with a NUL in it
        raise ModelError(f"{str(path)[:80]!r}: cannot be looked up ({error}).") from error
    if not is_file:
        missing = f"no such model file.{files.meant(path)}"
        raise ModelError(f"{path}: {missing if not path.exists() else 'is not a file.'}")
    try:
        proto = onnx.load(path, format="protobuf", load_external_data=False)
    except PermissionError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}).") from error
    except (DecodeError, ValueError, OSError) as error:
        raise ModelError(
            f"{path}: is not a readable ONNX model (damaged or cut short, or another format: export it to ONNX first)."
        ) from error
    if not proto.ir_version or not proto.HasField("graph") or not proto.opset_import:
        raise ModelError(f"{path}: is not an ONNX model (no graph, IR version or operator set in it).")
    for tensor in _external_tensors(proto.graph):
        _check_location(path, tensor)
    try:
        onnx.load_external_data_for_model(proto, str(path.parent))
    except Exception as error:  # file system errors of C++ among them
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{path}: its external data cannot be read: {first}") from error
    return proto


def _external_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    for node in graph.node:
        for attribute in node.attribute:
            yield from (t for t in (attribute.t, *attribute.tensors) if t.data_location == onnx.TensorProto.EXTERNAL)
        for body in _subgraphs(node):
            yield from _external_tensors(body)
    yield from (tensor for tensor in graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL)


def _check_location(path: Path, tensor: onnx.TensorProto) -> None:
    """A model names the files that its weights are in: none but those below its own folder are read.

    onnx checks the same, but not in all versions that are supported.
    """
    location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
    if isinstance(location, bytes):  # what protobuf makes of bytes that are no text
        location = os.fsdecode(location)
    try:
        inside = (path.parent / location).resolve().is_relative_to(path.parent.resolve())
    except (OSError, ValueError, RuntimeError):  # no name for a file, or links in a circle
        inside = False
    if not inside or Path(location).is_absolute():
        raise ModelError(
            f"{path}: tensor {tensor.name!r} is in {location[:80]!r}, outside the folder of the model; "
            "put the file there."
        )


def load(source: str | Path | onnx.ModelProto) -> Model:
    """Read a model into a `Model`.

    Raises:
        ModelError: the file cannot be read, or the graph is not well formed.
    """
    proto = _inlined(read_model(source))
    opset = next((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), 0)
    graph = proto.graph
    where = str(source) if not isinstance(source, onnx.ModelProto) else (graph.name or "the model")

    _check_arity(where, graph, {entry.domain: entry.version for entry in proto.opset_import})
    stored: dict[str, Array] = {}
    try:
        for tensor in graph.initializer:
            if tensor.name in stored:
                raise ModelError(
                    f"{where}: tensor {tensor.name!r} is defined twice; every tensor needs a name of its own."
                )
            stored[tensor.name] = _array(tensor)
        sparse = {tensor.values.name for tensor in graph.sparse_initializer}
        nodes, constants = _read_nodes(graph)
    except Exception as error:  # decoding raises whatever it meets
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{where}: a tensor or attribute in it is damaged: {first}") from error
    for name, value in constants.items():
        if name in stored:
            raise ModelError(f"{where}: tensor {name!r} is defined twice; every tensor needs a name of its own.")
        stored[name] = value

    graph_inputs = [value.name for value in graph.input]
    _check_windows(where, nodes)
    _check_order(where, nodes, {*stored, *sparse, *graph_inputs}, [value.name for value in graph.output])
    return Model(
        proto=proto,
        nodes=tuple(nodes),
        inputs=tuple(name for name in graph_inputs if name not in stored),
        outputs=tuple(value.name for value in graph.output),
        stored=MappingProxyType(stored),
        overridable=frozenset(name for name in graph_inputs if name in stored and proto.ir_version >= 4),
        opset=opset,
    )


def _inlined(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the functions that it defines itself written out, so that their nodes can be read like any."""
    if not proto.functions:
        return proto
    try:
        return onnx.inliner.inline_local_functions(proto)
    except Exception:  # it raises what it likes; a function that stays is an operator without a rule
        logger.debug("could not inline the functions of the model", exc_info=True)
        return proto


def _read_nodes(graph: onnx.GraphProto) -> tuple[list[Node], dict[str, Array]]:
    nodes: list[Node] = []
    constants: dict[str, Array] = {}
    for proto in graph.node:
        if proto.op_type == "Constant" and proto.domain in ("", "ai.onnx"):
            value = _constant_value(proto)
            if value is not None:
                constants[proto.output[0]] = value
                continue
        domain = "" if proto.domain in ("", "ai.onnx") else proto.domain + "::"
        nodes.append(
            Node(
                index=len(nodes),
                op=domain + proto.op_type,
                name=proto.name or f"{proto.op_type}({_first(proto.output)})",
                inputs=tuple(proto.input),
                outputs=tuple(proto.output),
                attributes=MappingProxyType({a.name: _attribute(a) for a in proto.attribute}),
                captures=tuple(sorted(set().union(*(_captures(g) for g in _subgraphs(proto))))),
            )
        )
    return nodes, constants


def _first(names: Iterable[str]) -> str:
    """The first name that is not absent: optional outputs may be, the leading one too (LSTM)."""
    return next(filter(None, names), "")


def _constant_value(proto: onnx.NodeProto) -> Array | None:
    attribute = proto.attribute[0] if len(proto.attribute) == 1 else None
    if attribute is None or attribute.name in ("sparse_value", "value_string", "value_strings"):
        return None
    value = _attribute(attribute)
    dtype = {
        "value_float": np.float32,
        "value_floats": np.float32,
        "value_int": np.int64,
        "value_ints": np.int64,
    }
    return np.asarray(value, dtype.get(attribute.name)) if attribute.name in dtype else np.asarray(value)


def _attribute(proto: onnx.AttributeProto) -> Any:
    value = onnx.helper.get_attribute_value(proto) if not proto.ref_attr_name else None
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return _array(value) if isinstance(value, onnx.TensorProto) else value


def _array(tensor: onnx.TensorProto) -> Array:
    """The values of a tensor that is in memory."""
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        # Without the model's folder the location would be looked up in the working directory.
        raise ValueError(f"{tensor.name!r} is in a file of its own that was not read; give the path of the model")
    values: Array = onnx.numpy_helper.to_array(tensor)
    if values.size * values.itemsize > max(64, 8 * tensor.ByteSize()):
        raise ValueError(f"{tensor.name!r} declares more values than it holds")
    return values


def _subgraphs(proto: onnx.NodeProto) -> list[onnx.GraphProto]:
    single = [a.g for a in proto.attribute if a.type == onnx.AttributeProto.GRAPH]
    return single + [g for a in proto.attribute if a.type == onnx.AttributeProto.GRAPHS for g in a.graphs]


def impossible_sizes(graph: onnx.GraphProto) -> Iterator[onnx.TensorShapeProto.Dimension]:
    """Axes that are declared with a size below 0, in bodies too: some of them make onnx end the process."""
    for value in (*graph.input, *graph.output, *graph.value_info):
        yield from (dim for dim in value.type.tensor_type.shape.dim if dim.dim_value < 0)
    for node in graph.node:
        for body in _subgraphs(node):
            yield from impossible_sizes(body)


def _captures(graph: onnx.GraphProto) -> set[str]:
    own = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    read = {value.name for value in graph.output}
    for node in graph.node:
        read.update(node.input)
        own.update(node.output)
        for body in _subgraphs(node):
            read |= _captures(body)
    return read - own - {""}


def _check_arity(where: str, graph: onnx.GraphProto, versions: Mapping[str, int]) -> None:
    """Refuse nodes that lack inputs or outputs: onnx's shape inference, in C++, takes them for granted."""
    for node in graph.node:
        domain = "" if node.domain == "ai.onnx" else node.domain
        try:
            schema = onnx.defs.get_schema(node.op_type, versions.get(domain, versions.get(node.domain, 1)), domain)
        except (onnx.defs.SchemaError, TypeError, OverflowError, UnicodeError):  # not one of the standard's
            schema = None
        for what, least, found in (
            ("inputs", schema.min_input if schema else 0, len(node.input)),
            ("outputs", schema.min_output if schema else 0, len(node.output)),
        ):
            if found < least:
                raise ModelError(
                    f"{where}: node {node.name or node.op_type!r} ({node.op_type}) has {found} {what}, not the {least} "
                    "that the operator needs."
                )
        for body in _subgraphs(node):
            _check_arity(where, body, versions)


def _check_windows(where: str, nodes: Iterable[Node]) -> None:
    """Refuse windows and steps of nothing: ONNX Runtime divides by them, and a signal ends the process."""
    for node in nodes:
        for name in ("kernel_shape", "strides", "dilations"):
            value = node.attributes.get(name)
            if isinstance(value, (list, tuple)) and any(isinstance(size, int) and size < 1 for size in value):
                raise ModelError(
                    f"{where}: node {node.name!r} ({node.op}) has {name} {list(value)}; every entry must be at least 1."
                )


def _check_order(where: str, nodes: Iterable[Node], known: set[str], outputs: Iterable[str]) -> None:
    produced: set[str] = set()
    for node in nodes:
        for name in (*node.inputs, *node.captures):
            if name and name not in known:
                raise ModelError(
                    f"{where}: node {node.name!r} reads {name!r}, which nothing before it defines "
                    "(a missing initializer, a cycle, or nodes out of order)."
                )
        for name in filter(None, node.outputs):
            if name in known:
                raise ModelError(f"{where}: tensor {name!r} is defined twice; every tensor needs a name of its own.")
            produced.add(name)
            known.add(name)
    for name in outputs:
        if name not in known:
            raise ModelError(f"{where}: the graph output {name!r} is not computed by any node.")


@dataclass(frozen=True)
class Insertion:
    """A node to add. `inputs` are tensor names or constant arrays."""

    op: str
    inputs: tuple[str | Array, ...]
    output: str
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Edits:
    """All changes to a graph, decided beforehand; `edit` carries them out.

    Attributes:
        constants: new values of constant tensors, for all of their readers. The name may also be a tensor that a
            chain of nodes computes from constants: it becomes an initializer and the chain goes.
        inputs: what one node reads at one position, as an array (a constant of its own) or a tensor name.
        attributes: new attribute values of one node; None removes the attribute.
        ops: nodes that become another operator.
        dropped_inputs: nodes of which only the first n inputs stay.
        before: nodes to put before a node, in order.
        after: nodes to put behind a tensor: all readers of the tensor, and the graph output, move to the output of
            the last one. Inside it the tensor goes by its old name.
        dims: new sizes of (tensor, axis) for the shapes that the file records.
    """

    constants: Mapping[str, Array] = field(default_factory=dict)
    inputs: Mapping[tuple[int, int], str | Array] = field(default_factory=dict)
    attributes: Mapping[tuple[int, str], Any] = field(default_factory=dict)
    ops: Mapping[int, str] = field(default_factory=dict)
    dropped_inputs: Mapping[int, int] = field(default_factory=dict)
    before: Mapping[int, Sequence[Insertion]] = field(default_factory=dict)
    after: Mapping[str, Insertion] = field(default_factory=dict)
    dims: Mapping[tuple[str, int], int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return any(getattr(self, entry.name) for entry in fields(self))


def edit(model: Model, edits: Edits, metadata: str) -> onnx.ModelProto:
    """Carry out `edits` on a copy of the model.

    graphsurgeon imports, rewires, cleans up and exports; what it does not carry (documentation strings, metadata,
    annotations, the exact declaration of inputs and outputs) is put back from the original.

    Args:
        model: the original; not changed.
        edits: what to change.
        metadata: value of the metadata entry that names this package and its options.
    """
    result = _edited(model, edits) if edits else _copy(model.proto)
    for entry in [entry for entry in result.metadata_props if entry.key == METADATA_KEY]:
        result.metadata_props.remove(entry)
    result.metadata_props.add(key=METADATA_KEY, value=metadata)
    return result


def _copy(proto: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    return copy


def _edited(model: Model, edits: Edits) -> onnx.ModelProto:
    graph = gs.import_onnx(light(model.proto))
    tensors: dict[str, Any] = graph.tensors(check_duplicates=False)
    by_output = {output.name: node for node in graph.nodes for output in node.outputs if output.name}
    nodes = {node.index: by_output[_first(node.outputs)] for node in model.nodes if any(node.outputs)}
    taken = set(tensors)
    ahead: dict[int, list[Any]] = {}  # what comes right before and right behind a node, by its id
    behind: dict[int, list[Any]] = {}

    def constant(base: str, value: Array) -> Any:
        name = _unused(base, taken)
        return gs.Constant(name, _in_memory(value))

    def operand(value: str | Array, base: str) -> Any:
        return tensors[value] if isinstance(value, str) else constant(base, value)

    for name, new in edits.constants.items():
        _replace_constant(graph, tensors, by_output, name, _in_memory(new))
    for index, insertions in edits.before.items():
        for insertion in insertions:
            output = gs.Variable(_unused(insertion.output, taken))
            tensors[insertion.output] = output
            operands = [operand(value, insertion.output + "_operand") for value in insertion.inputs]
            added = gs.Node(insertion.op, insertion.output, dict(insertion.attributes), operands, [output])
            ahead.setdefault(id(nodes[index]), []).append(added)
    for (index, position), value in edits.inputs.items():
        node = nodes[index]
        while len(node.inputs) <= position:
            node.inputs.append(gs.Variable.empty())
        node.inputs[position] = operand(value, f"{node.outputs[0].name}_input{position}")
    for index, count in edits.dropped_inputs.items():
        nodes[index].inputs = list(nodes[index].inputs)[:count]
    for index, op in edits.ops.items():
        nodes[index].op = op
    for (index, key), value in edits.attributes.items():
        if value is None:
            nodes[index].attrs.pop(key, None)
        else:
            nodes[index].attrs[key] = value
    for name, insertion in edits.after.items():
        producer, added = _inserted_after(tensors, taken, name, insertion)
        behind.setdefault(id(producer), []).append(added)
    graph.nodes = [
        placed for node in graph.nodes for placed in (*ahead.get(id(node), ()), node, *behind.get(id(node), ()))
    ]

    graph.cleanup(remove_unused_node_outputs=False, recurse_subgraphs=False, recurse_functions=False)
    unnamed = [tensor for tensor in _attribute_tensors(model.proto.graph) if not tensor.HasField("name")]
    exported = gs.export_onnx(graph, do_type_check=False)
    for tensor in unnamed:  # graphsurgeon names tensors that are still those of the original
        tensor.ClearField("name")
    return filled(_restored(model.proto, exported, edits), model.proto)


def _attribute_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    for node in graph.node:
        yield from (attribute.t for attribute in node.attribute if attribute.type == onnx.AttributeProto.TENSOR)
        for inner in _subgraphs(node):
            yield from _attribute_tensors(inner)


def _in_memory(value: Array) -> Array:
    # `ascontiguousarray` alone would turn a 0-d array into a 1-d one.
    return np.ascontiguousarray(value).reshape(np.shape(value))


def _unused(base: str, taken: set[str]) -> str:
    name, number = base, 0
    while name in taken:
        number += 1
        name = f"{base}_{number}"
    taken.add(name)
    return name


def _replace_constant(graph: Any, tensors: dict[str, Any], by_output: dict[str, Any], name: str, value: Array) -> None:
    tensor = tensors[name]
    producer = by_output.get(name)
    if producer is None:
        tensor.values = value
    elif producer.op == "Constant":
        producer.attrs = {"value": gs.Constant(name + "_value", value)}
    else:
        replacement = gs.Constant(name, value)
        for consumer in list(tensor.outputs):
            consumer.inputs = [replacement if read is tensor else read for read in consumer.inputs]
        producer.outputs = [gs.Variable.empty() if made is tensor else made for made in producer.outputs]
        tensors[name] = replacement


def _inserted_after(tensors: dict[str, Any], taken: set[str], name: str, insertion: Insertion) -> tuple[Any, Any]:
    """The node that computed the tensor so far, and the new one behind it."""
    tensor = tensors[name]
    inner = gs.Variable(_unused(name + "_before_bias", taken), dtype=tensor.dtype)
    producer = tensor.inputs[0]
    producer.outputs = [inner if made is tensor else made for made in producer.outputs]
    operands = [
        inner if isinstance(value, str) else gs.Constant(_unused(name + "_bias", taken), _in_memory(value))
        for value in insertion.inputs
    ]
    added = gs.Node(insertion.op, _unused(insertion.output, taken), dict(insertion.attributes), operands, [tensor])
    return producer, added


def _restored(original: onnx.ModelProto, exported: onnx.ModelProto, edits: Edits) -> onnx.ModelProto:
    """The exported graph inside everything else of the original."""
    result = onnx.ModelProto()
    for descriptor, value in original.ListFields():
        if descriptor.name == "graph":
            continue
        if descriptor.name in ("metadata_props", "opset_import", "functions", "training_info"):
            getattr(result, descriptor.name).extend(value)
        else:
            setattr(result, descriptor.name, value)
    graph, made = result.graph, exported.graph
    graph.name, graph.doc_string = original.graph.name, original.graph.doc_string
    graph.node.extend(made.node)
    graph.initializer.extend(made.initializer)
    graph.sparse_initializer.extend(original.graph.sparse_initializer)
    graph.quantization_annotation.extend(original.graph.quantization_annotation)
    graph.metadata_props.extend(original.graph.metadata_props)
    graph.output.extend(original.graph.output)

    before = {_first(node.output): node for node in original.graph.node}
    for node in graph.node:
        source = before.get(_first(node.output)) if any(node.output) else None
        if source is not None and source.op_type == node.op_type:
            node.metadata_props.extend(source.metadata_props)
            for name in ("name", "domain", "doc_string"):
                node.ClearField(name)
                if source.HasField(name):
                    setattr(node, name, getattr(source, name))
            _keep_attributes(source, node, edits)
    documented = {tensor.name: tensor.doc_string for tensor in original.graph.initializer if tensor.doc_string}
    for tensor in graph.initializer:
        if tensor.name in documented:
            tensor.doc_string = documented[tensor.name]
        # `save` decides where data goes; what was not edited has none here yet.
        tensor.ClearField("external_data")
        if tensor.HasField("raw_data"):
            tensor.ClearField("data_location")

    _declare(original, result, edits)
    return result


def _declare(original: onnx.ModelProto, result: onnx.ModelProto, edits: Edits) -> None:
    """Inputs and recorded shapes: those of the original that still exist, at their new sizes.

    Before IR version 4 every initializer is a graph input too.
    """
    graph = result.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    gone = {tensor.name for tensor in original.graph.initializer} - stored.keys()
    graph.input.extend(value for value in original.graph.input if value.name not in gone)
    if original.ir_version < 4:
        declared = {value.name for value in graph.input}
        graph.input.extend(
            onnx.helper.make_tensor_value_info(name, tensor.data_type, tensor.dims)
            for name, tensor in stored.items()
            if name not in declared
        )
    alive = stored.keys() | {name for node in graph.node for name in node.output}
    graph.value_info.extend(value for value in original.graph.value_info if value.name in alive)
    for value in (*graph.value_info, *graph.input):
        held = stored[value.name].dims if value.name in stored else ()
        sizes = dict(enumerate(edits.constants[value.name].shape if value.name in edits.constants else held))
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            size = sizes.get(axis, edits.dims.get((value.name, axis)))
            if size is not None:
                dim.dim_value = size


def _keep_attributes(source: onnx.NodeProto, node: onnx.NodeProto, edits: Edits) -> None:
    """Take attributes bit by bit from the original where they were not edited (sub-graphs, types, order)."""
    edited = {key for _, key in edits.attributes}
    current = {attribute.name: attribute for attribute in node.attribute}
    if node.op_type == "Constant" and node.output[0] in edits.constants:
        return
    kept = [
        (attribute if attribute.name not in edited else current.get(attribute.name)) for attribute in source.attribute
    ]
    names = {attribute.name for attribute in source.attribute}
    kept += [attribute for name, attribute in current.items() if name not in names]
    copies = []
    for attribute in kept:
        if attribute is not None:
            copy = onnx.AttributeProto()
            copy.CopyFrom(attribute)
            copies.append(copy)
    del node.attribute[:]
    node.attribute.extend(copies)


def fingerprint(proto: onnx.ModelProto) -> str:
    """A digest of what a model computes: nodes, weights, inputs and outputs, whatever its metadata say."""
    digest = hashlib.blake2b(digest_size=16)
    graph = proto.graph
    for parts in (proto.opset_import, proto.functions, graph.input, graph.output, graph.node, graph.initializer):
        digest.update(f"{len(parts)}:".encode())
        for part in parts:  # one at a time: together they may be larger than protobuf takes
            content = part.SerializeToString(deterministic=True)
            digest.update(f"{len(content)}:".encode())
            digest.update(content)
    return digest.hexdigest()


def tensor_bytes(tensor: onnx.TensorProto) -> int:
    """Size of a tensor's data in bytes, from its shape and type alone."""
    count = int(np.prod(list(tensor.dims), dtype=np.int64)) if tensor.dims else 1
    if tensor.data_type == onnx.TensorProto.STRING:
        return sum(len(item) for item in tensor.string_data)
    bits = {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4}.get(onnx.TensorProto.DataType.Name(tensor.data_type))
    return (count * bits + 7) // 8 if bits else count * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def save(proto: onnx.ModelProto, path: Path, *, external_data: bool = False) -> None:
    """Write a model so that `path` holds either its old content or the complete new one.

    Args:
        proto: the model; not changed.
        path: where to; the folder must exist.
        external_data: put the weights into `<name>.data` beside it (or `<name>.1.data` and so on, where that file
            belongs to another model); done anyway above 2 GB.

    Raises:
        OutputError: the folder is missing or cannot be written to.
    """
    external = external_data or size_of(proto) > PROTOBUF_LIMIT - 2**20
    try:
        for folder in files.abandoned(path.parent):
            if (folder / files.KEEP).is_file():
                _settle(folder)
                shutil.rmtree(folder, ignore_errors=True)
        with files.Scratch(path.parent) as name:
            _save(proto, path, Path(name), external)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error}).") from error


def _save(proto: onnx.ModelProto, path: Path, folder: Path, external: bool) -> None:
    """Write into `folder` and move from there: first the weights, under a name that nothing uses, then the model.

    At any moment the model at `path` is the old one with its old weights, or the new one with its new weights. Weights
    that are not, or no longer, those of the model at `path` are on a list in the folder until they are gone.
    """
    staged, data = folder / path.name, folder / "weights"
    before = _own_data(path)
    after: set[str] = set()
    if external:
        proto = _externalised(proto, data)
        if data.stat().st_size:
            files.flush(data)
            name = _data_name(path, data, before)
            after = {name}
            for tensor in proto.graph.initializer:
                if tensor.data_location == onnx.TensorProto.EXTERNAL:
                    tensor.external_data.add(key="location", value=name)
    staged.write_bytes(proto.SerializeToString(deterministic=True))
    files.flush(staged)
    if before != after:
        (folder / files.KEEP).write_text(json.dumps([path.name, *sorted(before | after)]), encoding="utf-8")
        files.flush(folder / files.KEEP)
    for name in after - before:
        data.replace(path.parent / name)
    staged.replace(path)
    if before != after:
        _settle(folder)


def _settle(folder: Path) -> None:
    """Remove the weights on the list that the model beside the folder does not refer to."""
    try:
        model, *names = json.loads((folder / files.KEEP).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # the run ended before the list was complete, and before anything was moved
        return
    wanted = _own_data(folder.parent / model)
    for name in names:
        if name not in wanted and _is_data_name(name, model) and not _is_named(name, folder.parent, model):
            (folder.parent / name).unlink(missing_ok=True)


def _is_named(name: str, folder: Path, model: str) -> bool:
    """Whether another model in the folder may use that file: somebody may have made a copy of ours."""
    others = (path for path in folder.glob("*.onnx") if path.name != model and path.is_file())
    return any(path.stat().st_size > MOST_SEARCHED or name.encode() in path.read_bytes() for path in others)


def light(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy without the data of large initializers: what a graph is changed in, so that no weight is copied.

    Such a tensor keeps its name, type and sizes, and says that its data is elsewhere, but not where. `filled` and
    `on_disk` put it back.

    Args:
        proto: the model; not changed.
    """
    copy = onnx.ModelProto()
    for descriptor, value in proto.ListFields():
        if descriptor.name == "graph":
            continue
        if hasattr(value, "extend"):
            getattr(copy, descriptor.name).extend(value)
        else:
            setattr(copy, descriptor.name, value)
    for descriptor, value in proto.graph.ListFields():
        if descriptor.name == "initializer":
            continue
        if hasattr(value, "extend"):
            getattr(copy.graph, descriptor.name).extend(value)
        else:
            setattr(copy.graph, descriptor.name, value)
    for tensor in proto.graph.initializer:
        if _is_large(tensor):
            made = copy.graph.initializer.add(
                name=tensor.name, data_type=tensor.data_type, doc_string=tensor.doc_string
            )
            made.dims.extend(tensor.dims)
            made.data_location = onnx.TensorProto.EXTERNAL
        else:
            copy.graph.initializer.append(tensor)
    return copy


def _is_large(tensor: onnx.TensorProto) -> bool:
    return tensor.HasField("raw_data") and tensor_bytes(tensor) >= EXTERNAL_BYTES


def _is_empty(tensor: onnx.TensorProto) -> bool:
    return tensor.data_location == onnx.TensorProto.EXTERNAL and not tensor.external_data


def filled(proto: onnx.ModelProto, weights: onnx.ModelProto) -> onnx.ModelProto:
    """Put the data that `light` left out back in place.

    Args:
        proto: made from a light copy; changed in place, and returned.
        weights: the model that the copy was made of.
    """
    held = {tensor.name: tensor for tensor in weights.graph.initializer}
    for tensor in proto.graph.initializer:
        if _is_empty(tensor):
            tensor.ClearField("data_location")
            tensor.raw_data = held[tensor.name].raw_data
    return proto


def size_of(proto: onnx.ModelProto) -> int:
    """Bytes of the initializers, those that are elsewhere included."""
    return sum(tensor_bytes(tensor) for tensor in proto.graph.initializer)


@contextmanager
def on_disk(proto: onnx.ModelProto, weights: onnx.ModelProto | None = None) -> Iterator[Path]:
    """The model as a file with its weights beside it, for as long as the context lasts.

    Args:
        proto: the model; not changed. May be light.
        weights: where data that `proto` lacks comes from.
    """
    with files.Scratch() as folder:
        path = Path(folder) / "model.onnx"
        copy = _externalised(proto, Path(folder) / "weights", weights)
        for tensor in copy.graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                tensor.external_data.add(key="location", value="weights")
        path.write_bytes(copy.SerializeToString(deterministic=True))
        yield path


def _externalised(proto: onnx.ModelProto, data: Path, weights: onnx.ModelProto | None = None) -> onnx.ModelProto:
    """A copy without the weights, which go into the file `data`; where that will be is still to be added.

    Not by `onnx.save`: it refuses to write if a file of that name is in the working directory, and what it writes
    cannot be read by other users.
    """
    copy = light(proto)
    held = {
        tensor.name: tensor for model in (weights, proto) if model is not None for tensor in model.graph.initializer
    }
    if weights is not None:  # what the model itself lacks
        held.update((tensor.name, tensor) for tensor in weights.graph.initializer if tensor.name in _lacking(proto))
    with data.open("wb") as file:
        for tensor in copy.graph.initializer:
            if _is_empty(tensor):
                raw = held[tensor.name].raw_data
                for key, value in (("offset", file.tell()), ("length", len(raw))):
                    tensor.external_data.add(key=key, value=str(value))
                file.write(raw)
    return copy


def _lacking(proto: onnx.ModelProto) -> set[str]:
    return {tensor.name for tensor in proto.graph.initializer if _is_empty(tensor)}


def _own_data(path: Path) -> set[str]:
    """Names of the files with the weights of the model at `path`, of those that this package names."""
    if not path.is_file():
        return set()
    try:
        old = onnx.load(path, format="protobuf", load_external_data=False)
    except (DecodeError, ValueError):
        logger.debug("%s is no model", path)
        return set()
    found = {entry.value for t in old.graph.initializer for entry in t.external_data if entry.key == "location"}
    return {name for name in found if _is_data_name(name, path.name)}


def _is_data_name(name: str, model: str) -> bool:
    return re.fullmatch(re.escape(model) + r"(\.\d+)?\.data", name) is not None


def _data_name(path: Path, data: Path, own: set[str]) -> str:
    """Its old name if the weights are the same as before, else one that nothing uses."""
    for name in sorted(own):
        if (path.parent / name).is_file() and filecmp.cmp(path.parent / name, data, shallow=False):
            return name
    names = (f"{path.name}{number}.data" for number in ("", *(f".{count}" for count in range(1, 1000))))
    return next(name for name in names if not (path.parent / name).exists())

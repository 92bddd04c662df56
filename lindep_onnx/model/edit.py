"""Changing a graph: edits that were decided beforehand, carried out in one go.

onnx-graphsurgeon does it, which no other module imports.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx_graphsurgeon.ir.tensor import LazyValues

from lindep_onnx.files import WeightsDir
from lindep_onnx.model.ir import Model, first_name, model_of
from lindep_onnx.model.weights import bodies, stand_in, with_weights, without_weights

# graphsurgeon reports on its own logger, straight to the terminal; what matters is raised by us.
gs.logger.G_LOGGER.severity = gs.logger.G_LOGGER.CRITICAL

Array: TypeAlias = NDArray[Any]

METADATA_KEY = "lindep_onnx"


@dataclass(frozen=True)
class Insertion:
    """A node to add. `inputs` are tensor names or constant arrays."""

    op: str
    inputs: tuple[str | Array, ...]
    output: str
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class GraphEdits:
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


def apply_edits(model: Model, edits: GraphEdits, metadata: str) -> Model:
    """Carry out `edits` on a copy of the model.

    graphsurgeon imports, rewires, cleans up and exports; what it does not carry (documentation strings, metadata,
    annotations, the exact declaration of inputs and outputs) is put back from the original. It never sees the data of
    large tensors.

    Args:
        model: the original; not changed.
        edits: what to change.
        metadata: value of the metadata entry that names this package and its options.
    """
    if edits:
        proto, folder = _edited(model, edits)
    else:
        proto, folder = onnx.ModelProto(), model.folder
        proto.CopyFrom(model.proto)
    for entry in [entry for entry in proto.metadata_props if entry.key == METADATA_KEY]:
        proto.metadata_props.remove(entry)
    proto.metadata_props.add(key=METADATA_KEY, value=metadata)
    return model_of(proto, folder)


def _edited(model: Model, edits: GraphEdits) -> tuple[onnx.ModelProto, WeightsDir | None]:
    original = without_weights(model.proto)
    graph = gs.import_onnx(original)
    tensors: dict[str, Any] = graph.tensors(check_duplicates=False)
    by_output = {output.name: node for node in graph.nodes for output in node.outputs if output.name}
    nodes = {node.index: by_output[first_name(node.outputs)] for node in model.nodes if any(node.outputs)}
    taken = set(tensors)
    ahead: dict[int, list[Any]] = {}  # what comes right before and right behind a node, by its id
    behind: dict[int, list[Any]] = {}
    new: dict[str, Array] = {}  # data that graphsurgeon does not see

    def stored(name: str, value: Array) -> Any:
        value = _in_memory(value)
        stand = stand_in(name, value)
        if stand is None:
            return value
        new[name] = value
        return LazyValues(stand)

    def constant(base: str, value: Array) -> Any:
        name = _unused(base, taken)
        return gs.Constant(name, stored(name, value))

    def operand(value: str | Array, base: str) -> Any:
        return tensors[value] if isinstance(value, str) else constant(base, value)

    for name, value in edits.constants.items():
        producer = by_output.get(name)
        if producer is None:
            tensors[name].values = stored(name, value)
        elif producer.op == "Constant":
            producer.attrs = {"value": gs.Constant(name + "_value", _in_memory(value))}
        else:
            tensors[name] = _in_place_of(tensors[name], producer, gs.Constant(name, stored(name, value)))
    for index, insertions in edits.before.items():
        for insertion in insertions:
            output = gs.Variable(_unused(insertion.output, taken))
            tensors[insertion.output] = output
            operands = [operand(value, insertion.output + "_operand") for value in insertion.inputs]
            added = gs.Node(insertion.op, insertion.output, dict(insertion.attributes), operands, [output])
            ahead.setdefault(id(nodes[index]), []).append(added)
    for (index, position), given in edits.inputs.items():
        node = nodes[index]
        while len(node.inputs) <= position:
            node.inputs.append(gs.Variable.empty())
        node.inputs[position] = operand(given, f"{node.outputs[0].name}_input{position}")
    for index, count in edits.dropped_inputs.items():
        nodes[index].inputs = list(nodes[index].inputs)[:count]
    for index, op in edits.ops.items():
        nodes[index].op = op
    for (index, key), attribute in edits.attributes.items():
        if attribute is None:
            nodes[index].attrs.pop(key, None)
        else:
            nodes[index].attrs[key] = attribute
    for name, insertion in edits.after.items():
        producer, added = _inserted_after(tensors, taken, name, insertion)
        behind.setdefault(id(producer), []).append(added)
    graph.nodes = [
        placed for node in graph.nodes for placed in (*ahead.get(id(node), ()), node, *behind.get(id(node), ()))
    ]

    graph.cleanup(remove_unused_node_outputs=False, recurse_subgraphs=False, recurse_functions=False)
    unnamed = [tensor for tensor in _attribute_tensors(original.graph) if not tensor.HasField("name")]
    exported = gs.export_onnx(graph, do_type_check=False)
    for tensor in unnamed:  # graphsurgeon names tensors that are still those of the original
        tensor.ClearField("name")
    captured = {name for node in model.nodes for name in node.captures}
    result = _restored(original, exported, edits, captured)
    return with_weights(result, lambda name: new[name] if name in new else model.stored[name])


def _attribute_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    for node in graph.node:
        yield from (attribute.t for attribute in node.attribute if attribute.type == onnx.AttributeProto.TENSOR)
        for inner in bodies(node):
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


def _in_place_of(tensor: Any, producer: Any, replacement: Any) -> Any:
    """A constant that whoever reads the tensor reads from now on."""
    for consumer in list(tensor.outputs):
        consumer.inputs = [replacement if read is tensor else read for read in consumer.inputs]
    producer.outputs = [gs.Variable.empty() if made is tensor else made for made in producer.outputs]
    return replacement


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


def _restored(
    original: onnx.ModelProto, exported: onnx.ModelProto, edits: GraphEdits, captured: Collection[str]
) -> onnx.ModelProto:
    """The exported graph inside everything else of the original; bodies read what is `captured`."""
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

    before = {first_name(node.output): node for node in original.graph.node}
    for node in graph.node:
        source = before.get(first_name(node.output)) if any(node.output) else None
        if source is not None and source.op_type == node.op_type:
            node.metadata_props.extend(source.metadata_props)
            for name in ("name", "domain", "doc_string"):
                node.ClearField(name)
                if source.HasField(name):
                    setattr(node, name, getattr(source, name))
            _keep_attributes(source, node, edits)
    remaining = {tensor.name: tensor for tensor in original.graph.initializer}
    for tensor in graph.initializer:
        known = remaining.pop(tensor.name, None)
        if known is not None:
            if known.HasField("doc_string"):
                tensor.doc_string = known.doc_string
            del tensor.metadata_props[:]
            tensor.metadata_props.extend(known.metadata_props)
        # `save` decides where data goes; what was not edited has none here yet.
        tensor.ClearField("external_data")
        if tensor.HasField("raw_data"):
            tensor.ClearField("data_location")
    # graphsurgeon keeps what nodes read themselves, not what only their bodies read.
    graph.initializer.extend(tensor for name, tensor in remaining.items() if name in captured)

    _declare(original, result, edits)
    return result


def _declare(original: onnx.ModelProto, result: onnx.ModelProto, edits: GraphEdits) -> None:
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


def _keep_attributes(source: onnx.NodeProto, node: onnx.NodeProto, edits: GraphEdits) -> None:
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

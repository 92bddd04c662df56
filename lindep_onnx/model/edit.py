"""Changing a graph: edits that were decided beforehand, carried out in one go.

onnx-graphsurgeon does it, which no other module imports.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx_graphsurgeon.ir.tensor import LazyValues

from lindep_onnx.files import WeightsDir
from lindep_onnx.model.ir import Model, first_name, model_of
from lindep_onnx.model.node import unused
from lindep_onnx.model.weights import copy_fields, graphs, stand_in, with_weights, without_weights

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
    """All changes to a graph, decided beforehand; `apply_edits` carries them out.

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

    `metadata` is the value of the metadata entry that names this package and its options.
    """
    if edits:
        proto, folder = _edited(model, edits)
    else:
        proto, folder = onnx.ModelProto(), model.folder
        proto.CopyFrom(model.proto)
    for entry in [entry for entry in proto.metadata_props if entry.key == METADATA_KEY]:
        proto.metadata_props.remove(entry)
    proto.metadata_props.add(key=METADATA_KEY, value=metadata)
    return model_of(proto, folder, told=model.told)


def _edited(model: Model, edits: GraphEdits) -> tuple[onnx.ModelProto, WeightsDir | None]:
    changing = _Changing(model)
    for name, value in edits.constants.items():
        changing.set_constant(name, value)
    for index, insertions in edits.before.items():
        for insertion in insertions:
            changing.insert_before(index, insertion)
    for (index, position), given in edits.inputs.items():
        changing.set_input(index, position, given)
    for index, count in edits.dropped_inputs.items():
        changing.nodes[index].inputs = list(changing.nodes[index].inputs)[:count]
    for index, op in edits.ops.items():
        changing.nodes[index].op = op
    for (index, key), attribute in edits.attributes.items():
        if attribute is None:
            changing.nodes[index].attrs.pop(key, None)
        else:
            changing.nodes[index].attrs[key] = attribute
    for name, insertion in edits.after.items():
        changing.insert_after(name, insertion)
    captured = {name for node in model.nodes for name in node.captures}
    result = _restored(changing.original, changing.exported(), edits, captured)
    return with_weights(result, lambda name: changing.data[name] if name in changing.data else model.stored[name])


class _Changing:
    """A graph of graphsurgeon while it is changed; `data` holds new values of large tensors, which it does not see."""

    def __init__(self, model: Model) -> None:
        self.original = without_weights(model.proto)
        self._graph = gs.import_onnx(self.original)
        self._tensors: dict[str, Any] = self._graph.tensors(check_duplicates=False)
        self._makers = {made.name: node for node in self._graph.nodes for made in node.outputs if made.name}
        self.nodes = {node.index: self._makers[first_name(node.outputs)] for node in model.nodes if any(node.outputs)}
        self.data: dict[str, Array] = {}
        self._taken = set(self._tensors)
        self._ahead: dict[int, list[Any]] = {}  # what comes right before and right behind a node, by its id
        self._behind: dict[int, list[Any]] = {}

    def set_constant(self, name: str, value: Array) -> None:
        producer = self._makers.get(name)
        if producer is None:
            self._tensors[name].values = self._stored(name, value)
        elif producer.op == "Constant":
            producer.attrs = {"value": gs.Constant(name + "_value", _in_memory(value))}
        else:  # in place of what was computed, for whoever reads it
            tensor, constant = self._tensors[name], gs.Constant(name, self._stored(name, value))
            for consumer in list(tensor.outputs):
                consumer.inputs = [constant if read is tensor else read for read in consumer.inputs]
            producer.outputs = [gs.Variable.empty() if made is tensor else made for made in producer.outputs]
            self._tensors[name] = constant

    def insert_before(self, index: int, insertion: Insertion) -> None:
        output = gs.Variable(self._unused(insertion.output))
        self._tensors[insertion.output] = output
        operands = [self._operand(value, insertion.output + "_operand") for value in insertion.inputs]
        added = gs.Node(insertion.op, insertion.output, dict(insertion.attributes), operands, [output])
        self._ahead.setdefault(id(self.nodes[index]), []).append(added)

    def insert_after(self, name: str, insertion: Insertion) -> None:
        tensor = self._tensors[name]
        inner = gs.Variable(self._unused(name + "_before_bias"), dtype=tensor.dtype)
        producer = tensor.inputs[0]
        producer.outputs = [inner if made is tensor else made for made in producer.outputs]
        operands = [
            inner if isinstance(value, str) else gs.Constant(self._unused(name + "_bias"), _in_memory(value))
            for value in insertion.inputs
        ]
        output = self._unused(insertion.output)
        added = gs.Node(insertion.op, output, dict(insertion.attributes), operands, [tensor])
        self._behind.setdefault(id(producer), []).append(added)

    def set_input(self, index: int, position: int, given: str | Array) -> None:
        node = self.nodes[index]
        while len(node.inputs) <= position:
            node.inputs.append(gs.Variable.empty())
        node.inputs[position] = self._operand(given, f"{node.outputs[0].name}_input{position}")

    def exported(self) -> onnx.ModelProto:
        """The new graph, without what nothing reads; nothing else of the model."""
        self._graph.nodes = [
            placed
            for node in self._graph.nodes
            for placed in (*self._ahead.get(id(node), ()), node, *self._behind.get(id(node), ()))
        ]
        self._graph.cleanup(remove_unused_node_outputs=False, recurse_subgraphs=False, recurse_functions=False)
        attributes = (a for graph in graphs(self.original.graph) for node in graph.node for a in node.attribute)
        unnamed = [a.t for a in attributes if a.type == onnx.AttributeProto.TENSOR and not a.t.HasField("name")]
        exported: onnx.ModelProto = gs.export_onnx(self._graph, do_type_check=False)
        for tensor in unnamed:  # graphsurgeon names tensors that are still those of the original
            tensor.ClearField("name")
        return exported

    def _operand(self, value: str | Array, base: str) -> Any:
        if isinstance(value, str):
            return self._tensors[value]
        name = self._unused(base)
        return gs.Constant(name, self._stored(name, value))

    def _stored(self, name: str, value: Array) -> Any:
        value = _in_memory(value)
        stand = stand_in(name, value)
        if stand is None:
            return value
        self.data[name] = value
        return LazyValues(stand)

    def _unused(self, base: str) -> str:
        name = unused(base, self._taken)
        self._taken.add(name)
        return name


def _in_memory(value: Array) -> Array:
    # `ascontiguousarray` alone would turn a 0-d array into a 1-d one.
    return np.ascontiguousarray(value).reshape(np.shape(value))


def _restored(
    original: onnx.ModelProto, exported: onnx.ModelProto, edits: GraphEdits, captured: Collection[str]
) -> onnx.ModelProto:
    """The exported graph inside everything else of the original; bodies read what is `captured`."""
    result = onnx.ModelProto()
    copy_fields(original, result, "graph")
    graph, made = result.graph, exported.graph
    graph.name, graph.doc_string = original.graph.name, original.graph.doc_string  # present even if they are empty
    copy_fields(original.graph, graph, "name", "doc_string", "node", "initializer", "input", "value_info")
    graph.node.extend(made.node)
    graph.initializer.extend(made.initializer)

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
    if node.op_type == "Constant" and node.output[0] in edits.constants:
        return
    edited = {key for _, key in edits.attributes}
    current = {attribute.name: attribute for attribute in node.attribute}
    names = {attribute.name for attribute in source.attribute}
    kept = [current.get(old.name) if old.name in edited else old for old in source.attribute]
    kept += [attribute for name, attribute in current.items() if name not in names]
    new = onnx.NodeProto(attribute=[attribute for attribute in kept if attribute is not None])
    del node.attribute[:]
    node.attribute.extend(new.attribute)

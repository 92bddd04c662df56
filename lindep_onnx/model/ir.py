"""An ONNX model as plain frozen values: nodes in topological order, constants as arrays.

Files are read and written by `lindep_onnx.model.weights`, graphs are changed by `lindep_onnx.model.edit`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx.inliner
from numpy.typing import NDArray

from lindep_onnx.errors import ModelError, one_line
from lindep_onnx.files import WeightsDir
from lindep_onnx.model.batch import batch_axes
from lindep_onnx.model.checks import check_arity, check_order, check_sizes, check_windows, defined_twice
from lindep_onnx.model.node import Node
from lindep_onnx.model.order import in_order, of_short_domain, of_true_types
from lindep_onnx.model.randomness import notes_of
from lindep_onnx.model.weights import array_of, bodies, dense_of, graphs, read

logger = logging.getLogger(__name__)

Array: TypeAlias = NDArray[Any]


@dataclass(frozen=True)
class Told:
    """What is said of the inputs of a model, beside what the file says.

    Attributes:
        axes: which axis counts samples, by input; None for none.
        shapes: shapes in place of the declared ones, by input; unknown sizes are strings.
    """

    axes: Mapping[str, int | None] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int | str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Model:
    """A model as read from a file; nothing in it is ever changed.

    Attributes:
        proto: the protobuf; the data of large initializers is external if it is much (see `lindep_onnx.model.weights`).
        folder: of the external data; None where the protobuf holds all.
        nodes: in topological order, `Constant` nodes left out.
        inputs: graph inputs that have to be fed (initializers left out).
        outputs: graph outputs.
        stored: every constant tensor the file holds, initializer or `Constant` node.
        overridable: initializers that are graph inputs too, so that a caller may feed another value.
        sparse: initializers that the file holds as their values and where they are; `stored` has them whole.
        opset: version of the default operator set.
        notes: what was put right when the file was read.
        told: what the user and the data say of inputs.
    """

    proto: onnx.ModelProto
    folder: WeightsDir | None
    nodes: tuple[Node, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    stored: Mapping[str, Array]
    overridable: frozenset[str]
    sparse: frozenset[str]
    opset: int
    notes: tuple[str, ...] = ()
    told: Told = Told()

    @cached_property
    def batch_axes(self) -> Mapping[str, int | None]:
        """Which axis of each input counts samples; None where none does."""
        return MappingProxyType(batch_axes(self.proto.graph, self.inputs, self.told.axes))

    @property
    def fixed(self) -> frozenset[str]:
        """Stored tensors whose values cannot be changed."""
        return self.overridable | self.sparse

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


@dataclass(frozen=True)
class Body:
    """A sub-graph of a node, at any depth.

    Attributes:
        nodes: its own, those of bodies inside it not among them.
        stored: its own constants.
    """

    nodes: tuple[Node, ...]
    stored: Mapping[str, Array]


def bodies_of(node: Node) -> list[Body]:
    """The sub-graphs of a node (If, Loop, Scan), those inside them too."""
    values = (value if isinstance(value, list) else [value] for value in node.attributes.values())
    direct = [value for those in values for value in those if isinstance(value, onnx.GraphProto)]
    found = []
    for graph in (inner for body in direct for inner in graphs(body)):
        nodes, whole, sparse = _read_nodes(graph)
        stored = {tensor.name: array_of(tensor, None) for tensor in graph.initializer}
        found.append(Body(tuple(nodes), MappingProxyType({**stored, **whole, **sparse})))
    return found


def load(source: str | Path | onnx.ModelProto) -> Model:
    """Read a model into a `Model`.

    Raises:
        ModelError: the file cannot be read, or the graph is not well formed.
    """
    where = str(source) if not isinstance(source, onnx.ModelProto) else (source.graph.name or "the model")
    proto, folder = read(source)
    proto, renamed = of_short_domain(proto)
    proto, moved = in_order(_inlined(proto))
    model = model_of(proto, folder, where)
    # Only now: shape inference, in C++, takes for granted what was checked on the way.
    proto, corrected = of_true_types(proto)
    return replace(model, proto=proto, notes=(*renamed, *moved, *corrected, *notes_of(proto)))


def model_of(proto: onnx.ModelProto, folder: WeightsDir | None, where: str = "", told: Told | None = None) -> Model:
    """A protobuf, not to be changed any more, as a `Model`; messages call it `where`.

    Raises:
        ModelError: the graph is not well formed.
    """
    where = where or proto.graph.name or "the model"
    opset = next((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), 0)
    graph = proto.graph

    check_sizes(where, graph)
    check_arity(where, proto)
    stored: dict[str, Array] = {}
    try:
        for tensor in graph.initializer:
            if tensor.name in stored:
                raise defined_twice(where, tensor.name)
            stored[tensor.name] = array_of(tensor, folder)
        sparse = {tensor.values.name: dense_of(tensor) for tensor in graph.sparse_initializer}
        nodes, constants, scattered = _read_nodes(graph)
    except Exception as error:  # decoding raises whatever it meets
        raise ModelError(f"{where}: a tensor or attribute in it is damaged: {one_line(error)}") from error
    for name, value in (*constants.items(), *sparse.items(), *scattered.items()):
        if name in stored:
            raise defined_twice(where, name)
        stored[name] = value

    graph_inputs = [value.name for value in graph.input]
    check_windows(where, nodes)
    check_order(where, nodes, {*stored, *graph_inputs}, [value.name for value in graph.output])
    return Model(
        proto=proto,
        folder=folder,
        nodes=tuple(nodes),
        inputs=tuple(name for name in graph_inputs if name not in stored),
        outputs=tuple(value.name for value in graph.output),
        stored=MappingProxyType(stored),
        overridable=frozenset(name for name in graph_inputs if name in stored and proto.ir_version >= 4),
        sparse=frozenset((*sparse, *scattered)),
        opset=opset,
        told=told or Told(),
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


def _read_nodes(graph: onnx.GraphProto) -> tuple[list[Node], dict[str, Array], dict[str, Array]]:
    """Nodes, and what `Constant` nodes hold: whole tensors and sparse ones."""
    nodes: list[Node] = []
    constants: dict[str, Array] = {}
    sparse: dict[str, Array] = {}
    for proto in graph.node:
        if proto.op_type == "Constant" and proto.domain in ("", "ai.onnx"):
            if [attribute.name for attribute in proto.attribute] == ["sparse_value"]:
                sparse[proto.output[0]] = dense_of(proto.attribute[0].sparse_tensor)
                continue
            value = _constant_value(proto)
            if value is not None:
                constants[proto.output[0]] = value
                continue
        domain = "" if proto.domain in ("", "ai.onnx") else proto.domain + "::"
        nodes.append(
            Node(
                index=len(nodes),
                op=domain + proto.op_type,
                name=proto.name or f"{proto.op_type}({first_name(proto.output)})",
                inputs=tuple(proto.input),
                outputs=tuple(proto.output),
                attributes=MappingProxyType({a.name: _attribute(a) for a in proto.attribute}),
                captures=tuple(sorted(set().union(*(_captures(g) for g in bodies(proto))))),
            )
        )
    return nodes, constants, sparse


def first_name(names: Iterable[str]) -> str:
    """The first name that is not absent: optional outputs may be, the leading one too (LSTM)."""
    return next(filter(None, names), "")


def _constant_value(proto: onnx.NodeProto) -> Array | None:
    attribute = proto.attribute[0] if len(proto.attribute) == 1 else None
    if attribute is None or attribute.name in ("sparse_value", "value_string", "value_strings"):
        return None
    kinds = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}
    return np.asarray(_attribute(attribute), kinds.get(attribute.name))


def _attribute(proto: onnx.AttributeProto) -> Any:
    value = onnx.helper.get_attribute_value(proto) if not proto.ref_attr_name else None
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return array_of(value, None) if isinstance(value, onnx.TensorProto) else value


def _captures(graph: onnx.GraphProto) -> set[str]:
    own = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    read = {value.name for value in graph.output}
    for node in graph.node:
        read.update(node.input)
        own.update(node.output)
        for body in bodies(node):
            read |= _captures(body)
    return read - own - {""}

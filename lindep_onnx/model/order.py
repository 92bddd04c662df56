"""A model file as ONNX Runtime takes it: nodes in an order that can run, types that are those of the operators.

Tools that append nodes at the end, or change types without touching what is recorded of them, write files that differ.
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Iterator

import onnx

from lindep_onnx.model.checks import impossible_sizes
from lindep_onnx.model.weights import bodies, graphs, weights_as_inputs

logger = logging.getLogger(__name__)

#: The long name of the domain of the standard operators.
LONG = "ai.onnx"


def in_order(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """The model with nodes behind those that they read from, in bodies too.

    Returns:
        The same model, or a copy where nodes had to be moved, and sentences that say so.
    """
    if all(order == sorted(order) for order in map(_order, graphs(proto.graph))):
        return proto, ()
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    # From the innermost body outwards, for nodes are copied with their bodies.
    for graph in reversed(list(graphs(copy.graph))):
        ordered = onnx.GraphProto(node=[graph.node[place] for place in _order(graph)])
        del graph.node[:]
        graph.node.extend(ordered.node)
    return copy, ("The file lists nodes before those that they read from; the nodes were put in order.",)


def of_short_domain(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """The model with the standard operators under the empty domain, which is all that onnx itself knows them by.

    Returns:
        The same model, or a copy where they were called by their long name, and sentences that say so.
    """
    owners = (proto, *proto.functions)
    both = any({"", LONG} <= {entry.domain for entry in owner.opset_import} for owner in owners)
    if both or not any(named.domain == LONG for named in _of_domains(proto)):
        return proto, ()  # of two versions, nothing says which one is meant
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for named in _of_domains(copy):
        if named.domain == LONG:
            named.domain = ""
    return copy, (f"The file calls the domain of the standard operators {LONG!r}; it was written as the empty name.",)


def _of_domains(proto: onnx.ModelProto) -> Iterator[onnx.NodeProto | onnx.OperatorSetIdProto]:
    """All nodes, in bodies and functions too, and all imported sets of operators."""
    for owner in (proto, *proto.functions):
        yield from owner.opset_import
    for graph in graphs(proto.graph):
        yield from graph.node
    for function in proto.functions:
        for node in function.node:
            yield node
            yield from (inner for body in bodies(node) for graph in graphs(body) for inner in graph.node)


def of_true_types(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """The model without recorded types of inner tensors that contradict the operators, in bodies too.

    Returns:
        The same model, or a copy where types had to be corrected, and sentences that say so.
    """
    wrong = _contradictions(proto)
    if not wrong:
        return proto, ()
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for number, graph in enumerate(graphs(copy.graph)):
        for value in graph.value_info:
            if (number, value.name) in wrong:
                value.type.tensor_type.elem_type = wrong[number, value.name]
    names = ", ".join(repr(name) for _, name in list(wrong)[:3]) + (", ..." if len(wrong) > 3 else "")
    return copy, (
        f"The file records types of {len(wrong)} inner tensor(s) ({names}) that their operators do not give; they were "
        "corrected, for ONNX Runtime does not load such a file.",
    )


def _order(graph: onnx.GraphProto) -> list[int]:
    """An order in which nodes can run, as close to that of the file as it can be; that of the file in a cycle."""
    makers: dict[str, int] = {}
    for number, node in enumerate(graph.node):
        for name in filter(None, node.output):
            makers.setdefault(name, number)
    waiting = [{makers[name] for name in _read_by(node) if name in makers} for node in graph.node]
    readers: list[list[int]] = [[] for _ in waiting]
    for number, those in enumerate(waiting):
        for maker in those:
            readers[maker].append(number)
    ready = [number for number, those in enumerate(waiting) if not those]
    order: list[int] = []
    while ready:
        number = heapq.heappop(ready)
        order.append(number)
        for reader in readers[number]:
            waiting[reader].discard(number)
            if not waiting[reader]:
                heapq.heappush(ready, reader)
    return order if len(order) == len(waiting) else list(range(len(waiting)))


def _read_by(node: onnx.NodeProto) -> Iterator[str]:
    """What a node reads, its bodies included; names of a body itself are among them, which no graph around it has."""
    yield from filter(None, node.input)
    for body in bodies(node):
        for inner in graphs(body):
            for reader in inner.node:
                yield from filter(None, reader.input)
            yield from (value.name for value in inner.output)


def _contradictions(proto: onnx.ModelProto) -> dict[tuple[int, str], int]:
    """The types that tensors really have, by number of the graph and name, where other ones are recorded."""
    if not any(graph.value_info for graph in graphs(proto.graph)):
        return {}
    bare = weights_as_inputs(proto)
    for graph in graphs(bare.graph):
        del graph.value_info[:]
    for dim in impossible_sizes(bare.graph):
        dim.Clear()
    try:
        inferred = onnx.shape_inference.infer_shapes(bare)
    except Exception:  # it raises bare RuntimeErrors on graphs it cannot follow; then nothing is known to be wrong
        logger.debug("shape inference gave up", exc_info=True)
        return {}
    found = {}
    for number, (graph, known) in enumerate(zip(graphs(proto.graph), graphs(inferred.graph), strict=True)):
        types = {value.name: value.type.tensor_type.elem_type for value in known.value_info}
        for value in graph.value_info:
            said, real = value.type.tensor_type.elem_type, types.get(value.name, 0)
            if said and real and said != real:
                found[number, value.name] = real
    return found

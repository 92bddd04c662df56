"""Reverse-mode differentiation of an ONNX graph: the gradients of a loss with respect to weights, as an ONNX graph.

The weights become inputs and their gradients outputs, so that one session serves all steps of an optimiser. The walk
goes once from the loss to the weights; what each operator does on the way is in `lindep_onnx.distill.autodiff.rules`.

A weight whose effect on the loss runs, wholly or in part, through an operator without a rule is left out: half a
gradient is no gradient.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import onnx

from lindep_onnx.distill.autodiff.rules import FLAT, RULES
from lindep_onnx.distill.autodiff.tape import Tape, Unsupported
from lindep_onnx.files import WeightsDir
from lindep_onnx.model.ir import Model
from lindep_onnx.model.shapes import Shape, resolve


@dataclass(frozen=True)
class Differentiated:
    """A loss and its gradients as a graph.

    Attributes:
        proto: reads the inputs of the model and the weights by their own names; puts out the loss, then the gradients.
        folder: of its external data.
        loss: name of the output with the loss.
        gradients: name of the output with the gradient of each weight, of the shape of the weight.
        obstacles: (node name, operator, why) of what kept other weights out, in the order of the graph.
    """

    proto: onnx.ModelProto
    folder: WeightsDir | None
    loss: str
    gradients: Mapping[str, str]
    obstacles: tuple[tuple[str, str, str], ...]


def differentiate(model: Model, loss: str, weights: Collection[str], inputs: Mapping[str, Shape]) -> Differentiated:
    """Add the backward pass to a graph.

    Args:
        model: of operator set 17 or later, computes the loss.
        loss: name of a tensor with one element.
        weights: stored tensors to differentiate by, all of the element type of the loss.
        inputs: fixed shapes of all inputs of the model.
    """
    shape_info = resolve(model, inputs)
    depends = _dependents(model, weights)
    leading = _ancestors(model, [loss])
    stored = next((model.stored[name].dtype for name in weights if name in model.stored), np.dtype(np.float32))
    obstacles: dict[int, str] = {}
    while True:  # a rule that gives up leaves half a pass behind: start again without the weights behind that node
        tape = Tape(model, shape_info, stored)
        blocked = _ancestors(model, [name for index in obstacles for name in model.nodes[index].inputs])
        wanted = [name for name in weights if name in leading and name not in blocked]
        trouble = _walk(model, tape, loss, _dependents(model, wanted)) if wanted else {}
        if not isinstance(trouble, _Stopped):
            break
        obstacles[trouble.node] = trouble.why
    found = {name: trouble[name] for name in wanted if name in trouble}
    named = tuple(
        (model.nodes[index].name, model.nodes[index].op, obstacles[index])
        for index in sorted(obstacles)
        if depends.intersection(model.nodes[index].inputs)
    )
    return Differentiated(_assembled(model, tape, loss, found, inputs), model.folder, loss, found, named)


@dataclass(frozen=True)
class _Stopped:
    node: int
    why: str


def _walk(model: Model, tape: Tape, loss: str, active: Collection[str]) -> dict[str, str] | _Stopped:
    """Gradients of all active tensors, or the node at which there are none."""
    flowing: dict[str, list[str]] = {loss: [tape.Expand(1.0, np.asarray(tape.shape(loss), np.int64))]}
    total: dict[str, str] = {}

    def summed(name: str) -> str | None:
        if name not in total and flowing.get(name):
            parts = flowing[name]
            total[name] = parts[0] if len(parts) == 1 else tape.Sum(*parts)
        return total.get(name)

    for node in reversed(model.nodes):
        wanted = frozenset(position for position, name in enumerate(node.inputs) if name in active)
        given = [summed(name) if name in active else None for name in node.outputs]
        captured = any(name in active for name in node.captures)
        if not (wanted or captured) or all(name is None for name in given) or node.op in FLAT:
            continue
        rule = RULES.get(node.op)
        if rule is None or captured:
            return _Stopped(node.index, "has no gradient rule")
        try:
            gradients = rule(node, given, wanted, tape)
        except Unsupported as reason:
            return _Stopped(node.index, str(reason))
        for position, gradient in gradients.items():
            flowing.setdefault(node.inputs[position], []).append(gradient)
    for name in flowing:
        summed(name)
    return total


def _dependents(model: Model, names: Collection[str]) -> set[str]:
    """Tensors that change with some others, themselves included."""
    found = set(names)
    for node in model.nodes:
        if node.op not in FLAT and found.intersection((*node.inputs, *node.captures)):
            found.update(name for name in node.outputs if name)
    return found


def _ancestors(model: Model, names: Collection[str]) -> set[str]:
    """Tensors that some others are computed from, themselves included."""
    found = {name for name in names if name}
    for node in reversed(model.nodes):
        if found.intersection(node.outputs) and node.op not in FLAT:
            found.update(name for name in (*node.inputs, *node.captures) if name)
    return found


def _assembled(
    model: Model, tape: Tape, loss: str, gradients: Mapping[str, str], inputs: Mapping[str, Shape]
) -> onnx.ModelProto:
    result = with_inputs(model, gradients, [loss, *gradients.values()])
    graph = result.graph
    for value in graph.input:
        if value.name in inputs:
            kind = value.type.tensor_type.elem_type
            value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, kind, inputs[value.name]))
    nodes = {next(filter(None, node.output)): node for node in graph.node if any(node.output)}
    for (index, position), name in tape.extra.items():
        node = nodes[next(filter(None, model.nodes[index].outputs))]
        node.output.extend([""] * (position + 1 - len(node.output)))
        node.output[position] = name
    tape.append_to(graph)
    return result


def with_inputs(model: Model, weights: Collection[str], outputs: Collection[str]) -> onnx.ModelProto:
    """A copy of a model that reads some of its stored tensors as inputs.

    Args:
        model: not changed.
        weights: their names.
        outputs: what it puts out.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model.proto)
    graph, wanted = result.graph, set(weights)
    del graph.value_info[:], graph.output[:]
    for tensor in [tensor for tensor in graph.initializer if tensor.name in wanted]:
        graph.initializer.remove(tensor)
    for node in [node for node in graph.node if node.op_type == "Constant" and node.output[0] in wanted]:
        graph.node.remove(node)
    for value in [value for value in graph.input if value.name in wanted]:
        graph.input.remove(value)
    for name in weights:
        stored = model.stored[name]
        kind = onnx.helper.np_dtype_to_tensor_dtype(stored.dtype)
        graph.input.append(onnx.helper.make_tensor_value_info(name, kind, stored.shape))
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    return result

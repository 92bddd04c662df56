"""Turn a decision into a smaller graph: the only place that changes a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lindep_onnx.model.edit import GraphEdits, Insertion, apply_edits
from lindep_onnx.model.ir import Model
from lindep_onnx.structure.edit_builder import EditBuilder
from lindep_onnx.structure.rules import rewriting_rule
from lindep_onnx.structure.types import ConsumerNode, Structure

Array: TypeAlias = NDArray[Any]
#: New values of constants by (node index, input position).
Biases: TypeAlias = "Mapping[tuple[int, int], NDArray[np.float64]]"


@dataclass(frozen=True)
class Removal:
    """What goes, and what the surviving weights become.

    Attributes:
        removed: (units,) bool, with equal counts in every group (`lindep_onnx.structure.placement.equalized`).
        weights: new values of the weights of consumers in their original shape and type; what lies on removed rows and
            columns does not matter.
        shifts: (outputs of a consumer,) float64, what to add to the output of a reader, by the reader.
    """

    removed: NDArray[np.bool_]
    weights: Mapping[str, Array] = field(default_factory=dict)
    shifts: Mapping[ConsumerNode, NDArray[np.float64]] = field(default_factory=dict)


def rewrite(structure: Structure, new: Removal, metadata: str) -> Model:
    """Build the model without the removed units; `metadata` names this package and its options in the file."""
    return apply_edits(structure.model, removal_edits(structure, new), metadata)


def removal_edits(structure: Structure, new: Removal) -> GraphEdits:
    """What removing units changes in a graph."""
    builder = EditBuilder(structure, new.removed)
    for node in structure.model.nodes:
        rule = rewriting_rule(node.op)
        if rule is not None and any(builder.kept(name) for name in (*node.inputs, *node.outputs)):
            rule(node, builder)
    biases = _biases(builder, new)
    for name in structure.reads:
        _rewrite_constant(builder, name, new.weights.get(name), biases)
    return builder.edits()


def _rewrite_constant(builder: EditBuilder, name: str, weight: Array | None, biases: Biases) -> None:
    """Slice a constant for its readers: in place where they agree, else with a copy for each."""
    model = builder.model
    original = builder.shape_info.constants[name]
    values = {}
    for reader, axes in builder.structure.reads[name].items():
        value = biases.get(reader, original if weight is None else weight)
        for axis, atoms in sorted(axes.items(), reverse=True):  # axis 0 last, since its blocks tell the others apart
            parts = np.split(value, len(atoms)) if atoms.ndim == 2 else [value]
            chosen = [builder.placement.chosen(own) for own in np.atleast_2d(atoms)]
            value = np.concatenate([part.take(own, axis) for part, own in zip(parts, chosen, strict=True)])
        values[reader] = value.astype(original.dtype)
    first = next(iter(values.values()))
    everyone = sum(node.inputs.count(name) for node in model.consumers.get(name, ()))
    if len(values) == everyone and name not in model.outputs and all(_same(value, first) for value in values.values()):
        if not _same(first, original):
            builder.set_constant(name, first)
        return
    for (index, position), value in values.items():
        if not _same(value, original):
            builder.set_input(model.nodes[index], position, value)


def _same(left: Array, right: Array) -> bool:
    return left.shape == right.shape and left.tobytes() == right.tobytes()


def _biases(builder: EditBuilder, new: Removal) -> Biases:
    """New values, in their original shape, of constants that take a shift; missing ones are added to the graph."""
    found = {}
    weights = {reader: consumer.weight for consumer in builder.structure.consumers for reader in consumer.readers}
    for reader, shift in new.shifts.items():
        bias, output = reader.bias, reader.output
        if bias is None or not shift.any():
            continue
        node = None if bias.node is None else builder.model.nodes[bias.node]
        if node is not None and bias.name:
            added = shift * bias.scale
            added = _along_channels(builder, reader, added) if node.op == "Add" else added
            found[node.index, bias.position] = builder.shape_info.constants[bias.name].astype(np.float64) + added
            continue
        chosen = builder.placement.chosen_along(output, reader.output_axis)
        dtype = builder.shape_info.constants[weights[reader]].dtype
        value = ((shift if chosen is None else shift[chosen]) * bias.scale).astype(dtype)
        if node is not None:
            builder.set_input(node, bias.position, value)
        else:
            addend = _along_channels(builder, reader, value)
            builder.insert_after(output, Insertion("Add", (output, addend), output + "_bias"))
    return found


def _along_channels(builder: EditBuilder, reader: ConsumerNode, values: Array) -> Array:
    """(outputs,) values in a shape that broadcasts to the product."""
    return values.reshape(-1, *(1,) * (len(builder.shape(reader.output)) - reader.output_axis - 1))

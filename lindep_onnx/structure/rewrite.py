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
from lindep_onnx.structure.types import Axes, Bias, ConsumerNode, Structure

Array: TypeAlias = NDArray[Any]


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
    """Build the model without the removed units.

    Args:
        structure: the traced model; not changed.
        new: what goes, and the new weights.
        metadata: value of the metadata entry that names this package and its options.
    """
    return apply_edits(structure.model, removal_edits(structure, new), metadata)


def removal_edits(structure: Structure, new: Removal) -> GraphEdits:
    """What removing units changes in a graph.

    Args:
        structure: the traced model.
        new: what goes, and the new weights.
    """
    builder = EditBuilder(structure, new.removed)
    for node in structure.model.nodes:
        rule = rewriting_rule(node.op)
        if rule is not None and any(builder.kept(name) for name in (*node.inputs, *node.outputs)):
            rule(node, builder)
    biases = _biases(builder, new)
    for name, readers in structure.reads.items():
        _rewrite_constant(builder, name, readers, new.weights.get(name), biases)
    for tensor in structure.labels:
        for axis, mask in builder.kept(tensor).items():
            builder.set_dim(tensor, axis, int(mask.sum()))
    return builder.edits()


def _rewrite_constant(
    builder: EditBuilder,
    name: str,
    readers: Mapping[tuple[int, int], Axes],
    weight: Array | None,
    biases: Mapping[tuple[int, int], NDArray[np.float64]],
) -> None:
    """Slice a constant for its readers: in place where they agree, else with a copy for each."""
    model = builder.structure.model
    original = builder.structure.shape_info.constants[name]
    values = {}
    for (index, position), axes in readers.items():
        value = biases.get((index, position), original if weight is None else weight)
        for axis, atoms in sorted(axes.items(), reverse=True):  # axis 0 last, since its blocks tell the others apart
            parts = np.split(value, len(atoms)) if atoms.ndim == 2 else [value]
            chosen = [builder.placement.chosen(own) for own in np.atleast_2d(atoms)]
            value = np.concatenate([part.take(own, axis) for part, own in zip(parts, chosen, strict=True)])
        values[index, position] = value.astype(original.dtype)
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


def _biases(builder: EditBuilder, new: Removal) -> dict[tuple[int, int], NDArray[np.float64]]:
    """New values, in their original shape, of constants that take a shift; missing ones are added to the graph."""
    found = {}
    weights = {reader: consumer.weight for consumer in builder.structure.consumers for reader in consumer.readers}
    for reader, shift in new.shifts.items():
        bias = reader.bias
        if bias is None or not shift.any():
            continue
        if bias.name:
            found[bias.node or 0, bias.position] = _shifted(builder, reader, bias, shift)
            continue
        model = builder.structure.model
        chosen = builder.placement.chosen_along(reader.output, reader.output_axis)
        dtype = builder.structure.shape_info.constants[weights[reader]].dtype
        value = ((shift if chosen is None else shift[chosen]) * bias.scale).astype(dtype)
        if bias.node is not None:
            builder.set_input(model.nodes[bias.node], bias.position, value)
        else:
            behind = len(builder.shape(reader.output)) - reader.output_axis - 1
            inputs = (reader.output, value.reshape(-1, *(1,) * behind))
            builder.insert_after(reader.output, Insertion("Add", inputs, reader.output + "_bias"))
    return found


def _shifted(builder: EditBuilder, reader: ConsumerNode, bias: Bias, shift: NDArray[np.float64]) -> NDArray[np.float64]:
    """The constant that is there plus the shift, in a shape that still broadcasts."""
    current = builder.structure.shape_info.constants[bias.name].astype(np.float64)
    op = builder.structure.model.nodes[bias.node or 0].op
    if op == "Add":
        behind = len(builder.shape(reader.output)) - reader.output_axis - 1
        return current + (shift * bias.scale).reshape(-1, *(1,) * behind)
    return current + shift * bias.scale

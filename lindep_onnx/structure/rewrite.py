"""Turn a decision into a smaller graph: the only place that changes a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lindep_onnx.model.edit import Insertion, edit
from lindep_onnx.model.ir import Model
from lindep_onnx.structure.edit_builder import Draft
from lindep_onnx.structure.rules import rewriting_rule
from lindep_onnx.structure.types import Axes, Bias, Channels, Reader

__all__ = ["Reconstruction", "rewrite"]

Array: TypeAlias = NDArray[Any]


@dataclass(frozen=True)
class Reconstruction:
    """What goes, and what the surviving weights become.

    Attributes:
        removed: (units,) bool, with equal counts in every group (`lindep_onnx.structure.placement.balanced`).
        weights: new values of site weights in their original shape and type; what lies on removed rows and columns
            does not matter.
        shifts: (site outputs,) float64, what to add to the output of a reader, by the reader.
    """

    removed: NDArray[np.bool_]
    weights: Mapping[str, Array] = field(default_factory=dict)
    shifts: Mapping[Reader, NDArray[np.float64]] = field(default_factory=dict)


def rewrite(channels: Channels, new: Reconstruction, metadata: str) -> Model:
    """Build the model without the removed units.

    Args:
        channels: the traced model; not changed.
        new: what goes, and the new weights.
        metadata: value of the metadata entry that names this package and its options.
    """
    draft = Draft(channels, new.removed)
    for node in channels.model.nodes:
        rule = rewriting_rule(node.op)
        if rule is not None and any(draft.kept(name) for name in (*node.inputs, *node.outputs)):
            rule(node, draft)
    biases = _biases(draft, new)
    for name, readers in channels.reads.items():
        _rewrite_constant(draft, name, readers, new.weights.get(name), biases)
    for tensor in channels.labels:
        for axis, mask in draft.kept(tensor).items():
            draft.set_dim(tensor, axis, int(mask.sum()))
    return edit(channels.model, draft.edits(), metadata)


def _rewrite_constant(
    draft: Draft,
    name: str,
    readers: Mapping[tuple[int, int], Axes],
    weight: Array | None,
    biases: Mapping[tuple[int, int], NDArray[np.float64]],
) -> None:
    """Slice a constant for its readers: in place where they agree, else with a copy for each."""
    model = draft.channels.model
    original = draft.channels.resolved.constants[name]
    values = {}
    for (index, position), axes in readers.items():
        value = biases.get((index, position), original if weight is None else weight)
        for axis, atoms in sorted(axes.items(), reverse=True):  # axis 0 last, since its blocks tell the others apart
            parts = np.split(value, len(atoms)) if atoms.ndim == 2 else [value]
            chosen = [draft.placement.chosen(own) for own in np.atleast_2d(atoms)]
            value = np.concatenate([part.take(own, axis) for part, own in zip(parts, chosen, strict=True)])
        values[index, position] = value.astype(original.dtype)
    first = next(iter(values.values()))
    everyone = sum(node.inputs.count(name) for node in model.consumers.get(name, ()))
    if len(values) == everyone and name not in model.outputs and all(_same(value, first) for value in values.values()):
        if not _same(first, original):
            draft.set_constant(name, first)
        return
    for (index, position), value in values.items():
        if not _same(value, original):
            draft.set_input(model.nodes[index], position, value)


def _same(left: Array, right: Array) -> bool:
    return left.shape == right.shape and left.tobytes() == right.tobytes()


def _biases(draft: Draft, new: Reconstruction) -> dict[tuple[int, int], NDArray[np.float64]]:
    """New values, in their original shape, of constants that take a shift; missing ones are added to the graph."""
    found = {}
    weights = {reader: site.weight for site in draft.channels.sites for reader in site.readers}
    for reader, shift in new.shifts.items():
        bias = reader.bias
        if bias is None or not shift.any():
            continue
        if bias.name:
            found[bias.node or 0, bias.position] = _shifted(draft, reader, bias, shift)
            continue
        model = draft.channels.model
        chosen = draft.placement.chosen_along(reader.output, reader.output_axis)
        dtype = draft.channels.resolved.constants[weights[reader]].dtype
        value = ((shift if chosen is None else shift[chosen]) * bias.scale).astype(dtype)
        if bias.node is not None:
            draft.set_input(model.nodes[bias.node], bias.position, value)
        else:
            behind = len(draft.shape(reader.output)) - reader.output_axis - 1
            inputs = (reader.output, value.reshape(-1, *(1,) * behind))
            draft.insert_after(reader.output, Insertion("Add", inputs, reader.output + "_bias"))
    return found


def _shifted(draft: Draft, reader: Reader, bias: Bias, shift: NDArray[np.float64]) -> NDArray[np.float64]:
    """The constant that is there plus the shift, in a shape that still broadcasts."""
    current = draft.channels.resolved.constants[bias.name].astype(np.float64)
    op = draft.channels.model.nodes[bias.node or 0].op
    if op == "Add":
        behind = len(draft.shape(reader.output)) - reader.output_axis - 1
        return current + (shift * bias.scale).reshape(-1, *(1,) * behind)
    return current + shift * bias.scale

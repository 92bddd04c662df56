"""Operators that put channels together or take them apart: concatenation, splitting, padding, picking."""

from __future__ import annotations

import numpy as np

from lindep_onnx.model.edit import Insertion
from lindep_onnx.model.node import Node
from lindep_onnx.structure import reasons
from lindep_onnx.structure.edit_builder import EditBuilder
from lindep_onnx.structure.rules.registry import rewrites, traces
from lindep_onnx.structure.tracer import Tracer
from lindep_onnx.structure.types import Atoms

#: Channels that a Pad may add: arrays over more would take longer than all else.
MAX_PADDED = 1 << 20
END = np.iinfo(np.int64).max
#: Inputs of a Slice behind the data, once attributes.
RANGES = ("starts", "ends", "axes", "steps")


@traces("Concat")
def concat(node: Node, tracer: Tracer) -> None:
    """Along the axis the operands follow each other; along the others they are linked."""
    rank = tracer.rank(node.outputs[0])
    if rank is None:
        tracer.refuse(node, reasons.FROZEN_OPERAND)
        return
    joined = node.attributes["axis"] % rank
    data = [(name, 0) for name in tracer.computed(node)]
    across = tracer.linked(node, reasons.FROZEN_OPERAND, data, [axis for axis in range(rank) if axis != joined])
    labelled = any(joined in tracer.axes(name) for name in node.inputs)
    found = [_part(node, tracer, name, joined) for name in node.inputs] if labelled else []
    parts = [{joined: part} for part in found if part is not None]
    if len(parts) < len(found):
        for position, name in enumerate(node.inputs):
            tracer.freeze_tensor(name, reasons.FROZEN_OPERAND, node, [joined])
            tracer.claim(node, position, across)
    else:
        for position, part in enumerate(parts or [{}] * len(node.inputs)):
            tracer.claim(node, position, {**across, **part})
        if parts:
            across[joined] = tracer.distinct(np.concatenate([part[joined] for part in parts]))
    tracer.label_axes(node.outputs[0], across)


def _part(node: Node, tracer: Tracer, name: str, axis: int) -> Atoms | None:
    """Atoms of one operand along the joined axis; new ones for constants and for channels that stay."""
    atoms = tracer.axes(name).get(axis)
    shape = tracer.shape(name)
    if atoms is not None and tracer.constant(name) is None:
        return atoms
    if shape is None or not isinstance(shape[axis], int):
        return None
    made = tracer.fresh(int(shape[axis]))
    if tracer.constant(name) is None or len(made) == 1:
        tracer.freeze(made, reasons.FROZEN_OPERAND, node)
    return made


@traces("Split")
def split(node: Node, tracer: Tracer) -> None:
    """Each output takes its part of the axis."""
    data = node.inputs[0]
    rank = tracer.rank(data)
    axes = tracer.axes(data)
    if not axes or rank is None:
        return
    axis = node.attributes.get("axis", 0) % rank
    passing = {other: atoms for other, atoms in axes.items() if other != axis}
    sizes = [(tracer.shape(name) or {axis: None})[axis] if name else None for name in node.outputs]
    fixed = [size for size in sizes if isinstance(size, int)]
    if axis in axes and (len(fixed) != len(sizes) or sum(fixed) != len(axes[axis])):
        tracer.freeze_tensor(data, reasons.RUNTIME_INDICES, node, [axis])
        axes = passing
    start = 0
    for name, size in zip(node.outputs, sizes, strict=True):
        labels = dict(passing)
        if axis in axes and isinstance(size, int):
            labels[axis] = axes[axis][start : start + size]
            start += size
            if size == 1:  # a part of one channel carries no label: it stays
                tracer.freeze(labels[axis], reasons.FROZEN_OPERAND, node)
        tracer.label_axes(name, labels)


@rewrites("Split")
def split_sizes(node: Node, builder: EditBuilder) -> None:
    """Explicit sizes, in the form of the operator set."""
    rank = len(builder.shape(node.inputs[0]))
    axis = node.attributes.get("axis", 0) % rank
    if axis not in builder.kept(node.inputs[0]):
        return
    sizes = [int(builder.new_shape(name)[axis]) for name in node.outputs]
    builder.set_integers(node, 1, "split", sizes, since=13)
    if "num_outputs" in node.attributes:
        builder.set_attribute(node, "num_outputs", None)


@traces("Gather")
def gather(node: Node, tracer: Tracer) -> None:
    """Picks places of one axis; looking rows up in a constant table starts channels."""
    data, result = node.inputs[0], node.outputs[0]
    rank = tracer.rank(data)
    indices, index_rank = tracer.constant(node.inputs[1]), tracer.rank(node.inputs[1])
    if rank is None or index_rank is None:
        tracer.refuse(node, reasons.RUNTIME_INDICES)
        return
    axis = node.attributes.get("axis", 0) % rank
    table = tracer.constant(data)
    tracer.freeze_tensor(node.inputs[1], reasons.RUNTIME_INDICES, node)
    tracer.claim(node, 1, {})
    if table is not None:
        axes = {other: tracer.fresh(size) for other, size in enumerate(table.shape) if other == rank - 1 != axis}
        tracer.claim(node, 0, axes)
    else:
        axes = tracer.axes(data)
    labels = {other + (index_rank - 1 if other > axis else 0): atoms for other, atoms in axes.items() if other != axis}
    if axis in axes:
        size = len(axes[axis])
        if indices is None or index_rank > 1:
            tracer.freeze_tensor(data, reasons.RUNTIME_INDICES, node, [axis])
        elif ((indices < -size) | (indices >= size)).any():
            tracer.freeze_tensor(data, reasons.OUTSIDE, node, [axis])
        elif index_rank == 0 or indices.size == 1:
            tracer.freeze(axes[axis][np.ravel(indices)], reasons.PICKED, node)
        else:
            labels[axis] = tracer.distinct(axes[axis][indices])
    tracer.label_axes(result, labels)


@rewrites("Gather")
def gather_indices(node: Node, builder: EditBuilder) -> None:
    """The picked places, counted among the survivors."""
    rank = len(builder.shape(node.inputs[0]))
    axis = node.attributes.get("axis", 0) % rank
    kept = builder.kept(node.inputs[0]).get(axis)
    indices = builder.constant(node.inputs[1])
    if kept is None or indices is None:
        return
    survivors = builder.kept(node.outputs[0]).get(axis, slice(None)) if indices.ndim else ...
    place = np.cumsum(kept) - 1
    builder.set_input(node, 1, np.asarray(place[indices % len(kept)][survivors], dtype=indices.dtype))


@traces("Slice")
def slice_(node: Node, tracer: Tracer) -> None:
    """Takes a range of some axes."""
    data, result = node.inputs[0], node.outputs[0]
    axes = tracer.axes(data)
    if not axes:
        return
    ranges = _ranges(node, tracer, tracer.rank(data) or 0)
    if ranges is None:
        tracer.freeze_tensor(data, reasons.RUNTIME_INDICES, node)
        return
    for position in range(1, len(node.inputs)):
        tracer.claim(node, position, {})
    labels = {axis: atoms[ranges.get(axis, slice(None))] for axis, atoms in axes.items()}
    for taken in labels.values():
        if len(taken) == 1:
            tracer.freeze(taken, reasons.PICKED, node)
    tracer.label_axes(result, labels)


def _ranges(node: Node, known: Tracer | EditBuilder, rank: int) -> dict[int, slice] | None:
    """The slice of each axis, None if something is only known at run time."""
    given: list[list[int] | None] = []
    for position, name in enumerate(RANGES, start=1):
        value = node.attributes.get(name) if known.model.opset < 10 else known.constant(node.input(position))
        if value is None and node.input(position):
            return None
        given.append(None if value is None else [int(element) for element in np.ravel(value)])
    starts, ends, axes, steps = given
    if starts is None or ends is None:
        return None
    axes = list(range(len(starts))) if axes is None else [axis % rank for axis in axes]
    steps = [1] * len(starts) if steps is None else steps
    # A backward slice that ends before the first element has no end in Python's counting.
    stops = [None if step < 0 and end < -END // 2 else end for end, step in zip(ends, steps, strict=True)]
    return {axis: slice(*part) for axis, *part in zip(axes, starts, stops, steps, strict=True)}


@rewrites("Slice")
def slice_ranges(node: Node, builder: EditBuilder) -> None:
    """A range stays a range of the survivors; a range with a step becomes a Gather."""
    ranges = _ranges(node, builder, len(builder.shape(node.inputs[0])))
    kept = builder.kept(node.inputs[0])
    if ranges is None or not kept.keys() & ranges.keys():
        return
    new, source = dict(ranges), node.inputs[0]
    for axis, mask in kept.items():
        if axis not in ranges:
            continue
        places = np.arange(len(mask))[ranges[axis]]
        chosen = (np.cumsum(mask) - 1)[places[mask[places]]].astype(np.int64)
        if ranges[axis].step == 1:
            new[axis] = slice(int(chosen[0]), int(chosen[-1]) + 1, 1)
        elif len(ranges) == 1:
            builder.set_op(node, "Gather", 2)
            for name in RANGES:
                builder.set_attribute(node, name, None)
            builder.set_attribute(node, "axis", axis)
            builder.set_input(node, 1, chosen)
            return
        else:
            picked = f"{node.outputs[0]}_picked_{axis}"
            builder.insert_before(node, Insertion("Gather", (source, chosen), picked, {"axis": axis}))
            source, new[axis] = picked, slice(0, END, 1)
    if source != node.inputs[0]:
        builder.set_input(node, 0, source)
    starts, steps = [part.start for part in new.values()], [part.step for part in new.values()]
    ends = [-END if part.stop is None else int(part.stop) for part in new.values()]
    for position, (name, values) in enumerate(zip(RANGES, (starts, ends, list(new), steps), strict=True), start=1):
        if name != "steps" or builder.model.opset >= 10:
            builder.set_integers(node, position, name, values, since=10)


@traces("Pad")
def pad(node: Node, tracer: Tracer) -> None:
    """Zeros (or another constant) before and behind: new channels that need not stay."""
    data, result = node.inputs[0], node.outputs[0]
    axes = tracer.axes(data)
    rank = tracer.rank(data)
    if not axes or rank is None:
        return
    pads = _pads(node, tracer, rank)
    constant_mode = node.attributes.get("mode", "constant") == "constant"
    labels = {}
    for axis, atoms in axes.items():
        _, before, after = (0, None, None) if pads is None else pads.get(axis, (0, 0, 0))
        if not isinstance(before, int) or not isinstance(after, int):
            tracer.freeze_tensor(data, reasons.RUNTIME_INDICES, node, [axis])
        elif (before or after) and (not constant_mode or min(before, after) < 0):
            tracer.freeze_tensor(data, reasons.BORDER, node, [axis])
        elif before + after > MAX_PADDED:
            tracer.freeze_tensor(data, reasons.ENORMOUS, node, [axis])
        else:
            labels[axis] = np.concatenate([tracer.fresh(before), atoms, tracer.fresh(after)])
    tracer.label_axes(result, labels)


def _pads(node: Node, known: Tracer | EditBuilder, rank: int) -> dict[int, tuple[int, int | str, int | str]] | None:
    """For each axis that is named its place, and the padding before and behind it."""
    flat = node.attributes.get("pads") if known.model.opset < 11 else known.shape_info.integers(node.input(1))
    axes = known.constant(node.input(3))
    if flat is None or (node.input(3) and axes is None):
        return None
    order = range(rank) if axes is None else [int(axis) % rank for axis in axes]
    return {axis: (place, flat[place], flat[place + len(flat) // 2]) for place, axis in enumerate(order)}


@rewrites("Pad")
def pad_sizes(node: Node, builder: EditBuilder) -> None:
    """As much padding on each side as survives of it."""
    pads = _pads(node, builder, len(builder.shape(node.inputs[0]))) or {}
    changed = {}
    for axis, mask in builder.kept(node.outputs[0]).items():
        place, before, after = pads.get(axis, (0, 0, 0))
        if isinstance(before, int) and isinstance(after, int) and (before or after):
            changed[place] = int(mask[:before].sum())
            changed[place + len(pads)] = int(mask[len(mask) - after :].sum())
    if builder.model.opset < 11:
        if changed:
            flat = enumerate(node.attributes["pads"])
            builder.set_attribute(node, "pads", [changed.get(place, size) for place, size in flat])
    else:
        builder.set_elements(node, 1, changed)

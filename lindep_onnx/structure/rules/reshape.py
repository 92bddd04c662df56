"""Operators that move or regroup elements without computing anything, and the ones that handle shapes as numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from lindep_onnx.model.node import Node
from lindep_onnx.model.shapes import Shape
from lindep_onnx.structure import reasons
from lindep_onnx.structure.edit_builder import EditBuilder
from lindep_onnx.structure.rules.registry import rewrites, traces
from lindep_onnx.structure.tracer import Tracer
from lindep_onnx.structure.types import Atoms, Labelling

#: Channels that an Expand, Tile or ConstantOfShape may make.
MAX_MADE = 1 << 20


@traces("Transpose")
def transpose(node: Node, tracer: Tracer) -> None:
    """Axes change places."""
    data = node.inputs[0]
    rank = tracer.rank(data)
    if rank is None:
        return
    order = list(node.attributes.get("perm", range(rank)[::-1]))
    places = [order.index(axis) for axis in range(rank)]
    tracer.label(node.outputs[0], [label.moved(places) for label in tracer.labels.get(data, ())])


@traces("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def regroup(node: Node, tracer: Tracer) -> None:
    """Elements keep their order; axes are merged and split."""
    data, result = node.inputs[0], node.outputs[0]
    if not tracer.labels.get(data):
        return
    before, after = tracer.shape(data), tracer.shape(result)
    if before is None or after is None:
        tracer.refuse(node, reasons.REGROUPED)
        return
    labels: list[Labelling] = []
    done: set[int] = set()
    blocks = _blocks(before, after)
    renamed = {ins[0]: outs[0] for ins, outs in blocks if len(ins) == len(outs) == 1}
    for ins, outs in blocks:
        inside = [label for label in tracer.labels[data] if label.cut in ins]
        done.update(label.cut for label in inside)
        if len(inside) > 1 and len(outs) != len(ins):
            tracer.freeze_tensor(data, reasons.REGROUPED, node, [label.cut for label in inside])
        elif len(inside) == 1 and all(axis in renamed for axis in inside[0].axes):
            labels.append(inside[0].moved(renamed))
        elif len(inside) == 1:
            sizes = [int(before[axis]) for axis in ins], [int(after[axis]) for axis in outs]
            labels.extend(_regrouped(inside[0], ins, outs, sizes, tracer))
    left = [label.cut for label in tracer.labels[data] if label.cut not in done]
    tracer.freeze_tensor(data, reasons.REGROUPED, node, left)
    tracer.label(result, labels)


def _blocks(before: Shape, after: Shape) -> list[tuple[list[int], list[int]]]:
    """Smallest runs of axes that hold the same elements on both sides, matched from both ends.

    Runs that cannot be matched, because of sizes that are not known, are left out.
    """
    ins = [axis for axis, size in enumerate(before) if size != 1]
    outs = [axis for axis, size in enumerate(after) if size != 1]
    front = _runs(before, after, ins, outs)
    used_in, used_out = sum(len(run[0]) for run in front), sum(len(run[1]) for run in front)
    back = _runs(before, after, ins[used_in:][::-1], outs[used_out:][::-1])
    return front + [(run[0][::-1], run[1][::-1]) for run in back]


def _runs(before: Shape, after: Shape, ins: list[int], outs: list[int]) -> list[tuple[list[int], list[int]]]:
    runs: list[tuple[list[int], list[int]]] = []
    ins, outs = ins[::-1], outs[::-1]
    while ins and outs:
        left, right = [ins.pop()], [outs.pop()]
        while (have := _elements(before, left)) != (want := _elements(after, right)):
            if not isinstance(have, int) or not isinstance(want, int):
                return runs
            smaller, behind = (left, ins) if have < want else (right, outs)
            if not behind:
                return runs
            smaller.append(behind.pop())
        runs.append((left, right))
    return runs


def _elements(shape: Shape, axes: list[int]) -> int | str | None:
    """How many elements some axes hold: a symbol only where it is a single one, None for more that are not known."""
    sizes = [shape[axis] for axis in axes]
    known = [size for size in sizes if isinstance(size, int)]
    return math.prod(known) if len(known) == len(sizes) else sizes[0] if len(sizes) == 1 else None


def _regrouped(
    label: Labelling, ins: list[int], outs: list[int], sizes: tuple[list[int], list[int]], tracer: Tracer
) -> list[Labelling]:
    """A labelling over merged and split axes, whose sizes are given as they were and as they are."""
    if any(axis not in ins for axis in label.axes):
        label = tracer.flattened(label)
    spread = [label.atoms.shape[label.axes.index(axis)] if axis in label.axes else 1 for axis in ins]
    atoms = np.broadcast_to(label.atoms.reshape(spread), sizes[0]).reshape(sizes[1])
    varying = [place for place in range(len(outs)) if (np.diff(atoms, axis=place) != 0).any()]
    if not varying:
        # One unit all along: nothing can be cut here.
        return []
    atoms = atoms[tuple(slice(None) if place in varying else 0 for place in range(len(outs)))]
    axes = [outs[place] for place in varying]
    cut = max(range(len(axes)), key=lambda place: (atoms.shape[place], place))
    made = Labelling(tuple(axes), atoms, axes[cut])
    tracer.align(made.rows())  # what survives has to be a box again
    return [made]


@rewrites("Reshape")
def reshape_target(node: Node, builder: EditBuilder) -> None:
    """New sizes where the target names them; -1 and 0 stay where they still say the right thing."""
    data, result = node.inputs[0], node.outputs[0]
    target = builder.shape_info.integers(node.inputs[1])
    copied, kept = builder.new_sizes(data), builder.kept(result)
    elements = {}
    for axis, size in enumerate(builder.new_shape(result)):
        given = target[axis] if target is not None else None
        if given == 0 and not node.attributes.get("allowzero", 0):
            named = axis in copied and copied[axis] != size
        else:
            named = given != -1 and axis in kept
        if named:
            elements[axis] = int(size)
    builder.set_elements(node, 1, elements)


@rewrites("Squeeze")
def squeeze_axes(node: Node, builder: EditBuilder) -> None:
    """Axes are named, so that a channel axis that shrinks to 1 is not squeezed too."""
    named = node.attributes.get("axes") is not None or node.input(1)
    if named or not builder.kept(node.inputs[0]):
        return
    axes = [axis for axis, size in enumerate(builder.shape(node.inputs[0])) if size == 1]
    builder.set_integers(node, 1, "axes", axes, since=13)


@traces("DepthToSpace")
def depth_to_space(node: Node, tracer: Tracer) -> None:
    """The channels that become one channel, block by block of positions, go together."""
    axes = tracer.stop(node, reasons.MOVED, [2, 3])
    if 1 in axes:
        squares = int(node.attributes["blocksize"]) ** 2
        last = node.attributes.get("mode", "DCR") == "CRD"
        parts = axes[1].reshape(-1, squares).T if last else axes[1].reshape(squares, -1)
        tracer.link(parts, parts[:1])
        axes[1] = parts[0]
    tracer.label_axes(node.outputs[0], axes)


@traces("SpaceToDepth")
def space_to_depth(node: Node, tracer: Tracer) -> None:
    """Each channel becomes one for each place in a block; they go together."""
    axes = tracer.stop(node, reasons.MOVED, [2, 3])
    if 1 in axes:
        axes[1] = tracer.distinct(np.tile(axes[1], int(node.attributes["blocksize"]) ** 2))
    tracer.label_axes(node.outputs[0], axes)


@traces("Expand")
def expand(node: Node, tracer: Tracer) -> None:
    """Axes that keep their size pass; one value over a new or wider axis goes wherever its readers can spare it.

    The sizes of both kinds are rewritten in the target vector.
    """
    data, result = node.inputs[0], node.outputs[0]
    before, after = tracer.shape(data), tracer.shape(result)
    if before is None or after is None or tracer.rank(node.inputs[1]) is None:
        tracer.refuse(node, reasons.RUNTIME_SHAPE)
        return
    offset = len(after) - len(before)
    if tracer.constant(data) is None:
        axes = tracer.axes(data)
    else:
        axes = _made(tracer, {axis: size for axis, size in enumerate(before) if axis + offset > 0})
        tracer.claim(node, 0, axes)
    new = {axis: size for axis, size in enumerate(after) if axis > 0 and (axis < offset or before[axis - offset] == 1)}
    tracer.label_axes(result, {**_made(tracer, new), **{axis + offset: atoms for axis, atoms in axes.items()}})


def _made(tracer: Tracer, sizes: Mapping[int, int | str]) -> dict[int, Atoms]:
    """New atoms along the axes whose size is fixed; beyond a million they are positions, or somebody means harm."""
    fixed = {axis: size for axis, size in sizes.items() if isinstance(size, int) and 1 < size <= MAX_MADE}
    return {axis: tracer.fresh(size) for axis, size in fixed.items()}


@rewrites("Expand")
def expand_target(node: Node, builder: EditBuilder) -> None:
    """The number of channels, where the target names it."""
    target = builder.shape_info.integers(node.inputs[1])
    offset = len(builder.shape(node.outputs[0])) - int(builder.shape(node.inputs[1])[0])
    sizes = {axis - offset: size for axis, size in builder.new_sizes(node.outputs[0]).items() if axis >= offset}
    builder.set_elements(
        node, 1, {place: size for place, size in sizes.items() if target is None or target[place] != 1}
    )


@traces("Tile")
def tile(node: Node, tracer: Tracer) -> None:
    """Each channel comes as often as its axis is repeated; all of them go together."""
    data = node.inputs[0]
    repeats = tracer.shape_info.integers(node.inputs[1])
    labels = {}
    for axis, atoms in tracer.axes(data).items():
        times = None if repeats is None else repeats[axis]
        if not isinstance(times, int) or not 0 < times * len(atoms) <= MAX_MADE:
            tracer.freeze_tensor(data, reasons.REPEATED, node, [axis])
        else:
            labels[axis] = tracer.distinct(np.tile(atoms, times)) if times > 1 else atoms
    tracer.label_axes(node.outputs[0], labels)


@traces("Shape")
def shape(node: Node, tracer: Tracer) -> None:
    """Reads sizes only; the numbers stay as they were, for whoever computes with them."""
    result = node.outputs[0]
    captured = any(result in reader.captures for reader in tracer.model.consumers.get(result, ()))
    if result in tracer.model.outputs or captured:
        tracer.freeze_tensor(node.inputs[0], reasons.COUNTED, node)


@rewrites("Shape")
def original_numbers(node: Node, builder: EditBuilder) -> None:
    """Whoever reads a size that changed gets the original number: removing a channel never changes a number.

    The operators that need the new size of a shape set it themselves, after this.
    """
    result = node.outputs[0]
    shape = builder.shape(node.inputs[0])
    axes = range(len(shape))[slice(node.attributes.get("start", 0), node.attributes.get("end"))]
    changed = {axes.index(axis): int(shape[axis]) for axis in builder.kept(node.inputs[0]) if axis in axes}
    for reader in builder.model.consumers.get(result, ()) if changed else ():
        for position, name in enumerate(reader.inputs):
            if name == result and not _picks_others(reader, position, len(axes), changed, builder):
                builder.set_elements(reader, position, changed)


def _picks_others(reader: Node, position: int, size: int, changed: dict[int, int], builder: EditBuilder) -> bool:
    """Whether a node reads none of the changed elements."""
    indices = builder.constant(reader.input(1))
    if reader.op != "Gather" or position != 0 or indices is None:
        return False
    return not {int(index) % size for index in indices.ravel()} & changed.keys()


@traces("Size")
def size(node: Node, tracer: Tracer) -> None:
    """Counts all elements, and somebody may compute with the number."""
    tracer.freeze_tensor(node.inputs[0], reasons.COUNTED, node)


@traces("ConstantOfShape")
def filled(node: Node, tracer: Tracer) -> None:
    """One value everywhere: as many places may go as its readers want, where their number is fixed."""
    shape = tracer.shape(node.outputs[0]) or ()
    tracer.label_axes(node.outputs[0], _made(tracer, {axis: size for axis, size in enumerate(shape) if axis > 0}))


@rewrites("ConstantOfShape")
def filled_sizes(node: Node, builder: EditBuilder) -> None:
    """The sizes that are left."""
    builder.set_elements(node, 0, builder.new_sizes(node.outputs[0]))


@traces("Range", "RandomNormal", "RandomUniform", "EyeLike", "NonZero")
def made(node: Node, tracer: Tracer) -> None:
    """Makes elements out of sizes: no channels come in or go out."""
    tracer.refuse(node, reasons.RUNTIME_SHAPE)

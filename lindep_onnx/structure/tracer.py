"""What a walk over the graph collects: the operator rules read and write it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from lindep_onnx.model.ir import Model
from lindep_onnx.model.node import Node
from lindep_onnx.model.shapes import Shape, ShapeInfo
from lindep_onnx.structure import reasons
from lindep_onnx.structure.reasons import Reason
from lindep_onnx.structure.types import Array, Atoms, Labelling, Producer, Product


@dataclass
class Tracer:
    """What the operator rules read and write while a graph is traced. It lives inside `trace` only.

    `consumers` are products along a labelled axis, and whether their output can take up a constant.
    """

    model: Model
    shape_info: ShapeInfo
    labels: dict[str, tuple[Labelling, ...]] = field(default_factory=dict)
    atoms: int = 0
    links: list[tuple[Atoms, Atoms]] = field(default_factory=list)
    aligned: list[tuple[Atoms, Atoms]] = field(default_factory=list)
    frozen: list[tuple[Atoms, Reason, Node | None]] = field(default_factory=list)
    claims: dict[str, dict[tuple[int, int], dict[int, Atoms]]] = field(default_factory=dict)
    consumers: list[tuple[Product, bool]] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    producers: list[Producer] = field(default_factory=list)

    # ---- reading -----------------------------------------------------------------------------------------------

    def constant(self, name: str) -> Array | None:
        """Value of a tensor that never changes; None for others and for absent inputs."""
        return self.shape_info.constants.get(name)

    def computed(self, node: Node) -> list[str]:
        """The inputs of a node that are there and no constants."""
        return [name for name in node.inputs if name and self.constant(name) is None]

    def shape(self, name: str) -> Shape | None:
        """Shape of a tensor, None if not even its rank is known."""
        return self.shape_info.shapes.get(name)

    def rank(self, name: str) -> int | None:
        """Number of axes of a tensor, None if unknown."""
        shape = self.shape(name)
        return None if shape is None else len(shape)

    def axes(self, name: str) -> dict[int, Atoms]:
        """The atoms of a tensor by the axis they can be cut along.

        Where ids vary over other axes too, those along them are linked: whoever asks for one axis treats them alike.
        """
        return {label.cut: self.flat(label) for label in self.labels.get(name, ())}

    def flat(self, label: Labelling) -> Atoms:
        """One id for each place along the cut axis, with which all others of the place live and die."""
        rows = label.rows()
        self.link(rows, rows[:1])
        return np.asarray(rows[0])

    def flattened(self, label: Labelling) -> Labelling:
        """The labelling along its cut axis alone."""
        return Labelling((label.cut,), self.flat(label), label.cut)

    # ---- writing -----------------------------------------------------------------------------------------------

    def fresh(self, count: int) -> Atoms:
        """New atoms, linked to nothing."""
        self.atoms += count
        return np.arange(self.atoms - count, self.atoms, dtype=np.int64)

    def distinct(self, atoms: Atoms) -> Atoms:
        """The same atoms with fresh, linked ones wherever an atom occurs again on the axis.

        An axis built from the same channels twice has two features for one unit; only a Reshape puts one atom on an
        axis several times, and means positions of one channel by it.
        """
        again = np.ones(len(atoms), dtype=bool)
        again[np.unique(atoms, return_index=True)[1]] = False
        result = atoms.copy()
        result[again] = self.fresh(int(again.sum()))
        self.link(result[again], atoms[again])
        return result

    def link(self, left: Atoms, right: Atoms) -> None:
        """Make atoms live and die together, pair by pair; the arrays broadcast."""
        left, right = np.broadcast_arrays(left, right)
        differ = left != right
        if differ.any():
            self.links.append((left[differ], right[differ]))

    def linked(
        self, node: Node, reason: Reason, operands: Iterable[tuple[str, int]], axes: Iterable[int]
    ) -> dict[int, Atoms]:
        """Link tensors along axes that mean the same in each, and keep what one of them has no channels for.

        Operands are tensors, and what to add to an axis to have their own.
        """
        found = [(self.axes(name), offset) for name, offset in operands]
        result: dict[int, Atoms] = {}
        for axis in axes:
            asked = [own[axis + offset] for own, offset in found if axis + offset in own]
            for atoms in asked:
                self.link(result.setdefault(axis, atoms), atoms)
            if asked and len(asked) < len(found):
                self.freeze(asked[0], reason, node)
        return result

    def align(self, rows: Atoms) -> None:
        """Make the places (rows, places) of a column vanish together, whichever channels sit on them then."""
        left, right = np.broadcast_arrays(rows, rows[:1])
        self.aligned.append((left[1:], right[1:]))

    def freeze(self, atoms: Atoms, reason: Reason, node: Node | None) -> None:
        """Keep atoms for ever."""
        if atoms.size:
            self.frozen.append((np.unique(atoms), reason, node))

    def freeze_tensor(self, name: str, reason: Reason, node: Node | None, axes: Iterable[int] | None = None) -> None:
        """Keep all channels of a tensor, or those along `axes`."""
        rank = self.rank(name) or 0
        chosen = None if axes is None else {axis % rank if rank else axis for axis in axes}
        for label in self.labels.get(name, ()):
            if chosen is None or label.cut in chosen:
                self.freeze(label.atoms.ravel(), reason, node)

    def stop(self, node: Node, reason: Reason, axes: Iterable[int]) -> dict[int, Atoms]:
        """Keep the channels of the first input of a node along `axes`; returns its atoms along the others."""
        data = node.inputs[0]
        rank = self.rank(data)
        stopped = {axis % rank if rank else axis for axis in axes}
        self.freeze_tensor(data, reason, node, stopped)
        return {axis: atoms for axis, atoms in self.axes(data).items() if axis not in stopped}

    def label(self, name: str, labels: Iterable[Labelling]) -> None:
        """Say which labellings a computed tensor carries. Axes of size 1 never carry one."""
        kept = tuple(label for label in labels if label.atoms.shape[label.axes.index(label.cut)] > 1)
        if name and kept:
            self.labels[name] = kept

    def label_axes(self, name: str, axes: Mapping[int, Atoms]) -> None:
        """`label` with one labelling for each axis."""
        self.label(name, [Labelling((axis,), atoms, axis) for axis, atoms in sorted(axes.items())])

    def claim(self, node: Node, position: int, axes: Mapping[int, Atoms]) -> None:
        """Say that a node can read its constant input at `position` with these axes sliced, and no others.

        Readers of one matrix have to agree (see `structure.trace`); a vector is sliced for each reader alone. Where
        a constant has another size than the channels it belongs to, these stay.
        """
        name = node.input(position)
        value = self.constant(name)
        if value is None:
            return
        wanted = {}
        for axis, atoms in axes.items():
            if axis >= value.ndim or value.shape[axis] != (atoms.size if axis == 0 else atoms.shape[-1]):
                self.freeze(atoms.ravel(), reasons.MISFIT, node)
            elif atoms.shape[-1] > 1:
                wanted[axis] = atoms
        self.claims.setdefault(name, {})[node.index, position] = wanted

    def refuse(self, node: Node, reason: Reason) -> None:
        """Leave everything alone that a node reads; its outputs carry no channels."""
        for name in (*node.inputs, *node.captures):
            self.freeze_tensor(name, reason, node)

    def produce(self, node: Node, channels: int) -> Atoms:
        """Start the output channels of a node with a constant weight."""
        atoms = self.fresh(channels)
        self.producers.append(Producer(node.index, atoms))
        return atoms

    def consumer(self, product: Product, affine: bool) -> None:
        """Record that a node multiplies a constant weight along a labelled axis."""
        self.consumers.append((product, affine))

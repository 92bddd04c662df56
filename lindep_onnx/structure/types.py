"""Which channels must go together: atoms, units, sites, groups and refusals.

A tensor carries labellings. A labelling gives every element along some axes an atom id; elements that share an id, or
whose ids are linked, live and die together. `structure.trace` walks the graph once, forward, and asks the rule of
each operator (see `structure.rules`), which speaks to a `Tracer`; the connected components of all links are the units.
Components that meet something that cannot shrink (an output, an unknown operator) are frozen and become refusals.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lindep_onnx.model.ir import Model, Node
from lindep_onnx.model.shapes import Shape, ShapeInfo

Array: TypeAlias = NDArray[Any]
Atoms: TypeAlias = NDArray[np.int64]
#: Atoms by the axis they can be cut along. Those of a constant may be (blocks, places): its axis 0 is divided into so
#: many blocks, and each has channels of its own along every axis (the weight of a grouped convolution).
Axes: TypeAlias = "Mapping[int, Atoms]"

#: Unit number of atoms that always stay.
FROZEN = -1


@dataclass(frozen=True)
class Reason:
    """Why channels are left alone: a stable code, and what to tell the user."""

    code: str
    message: str


MISFIT = Reason("misfit", "a constant that belongs to them has another size; ONNX Runtime will not run this")


@dataclass(frozen=True)
class Labelling:
    """Atom ids over some axes of one tensor.

    Attributes:
        axes: the axes along which ids vary, ascending.
        atoms: ids, one axis of the array for each of `axes`.
        cut: the axis along which elements may be removed. Places that differ only along the other axes are aligned
            (`Tracer.align`), so that what survives is a box.
    """

    axes: tuple[int, ...]
    atoms: Atoms
    cut: int

    def rows(self) -> Atoms:
        """(rows, places along the cut axis) ids, one row for each index along the other axes."""
        place = self.axes.index(self.cut)
        return np.asarray(np.moveaxis(self.atoms, place, -1).reshape(-1, self.atoms.shape[place]))

    def along_cut(self) -> Atoms:
        """One id for each place along the cut axis, out of all that are aligned."""
        return np.asarray(self.rows()[0])


@dataclass(frozen=True)
class Bias:
    """Where a constant can be added to the output of a reader.

    Attributes:
        node: index of the node that takes the constant as an input; None if an Add has to be inserted.
        position: the input it is, present or not.
        name: the constant that is there now, empty if none.
        scale: what to multiply an addition to the output by before it is stored.
    """

    node: int | None
    position: int = 0
    name: str = ""
    scale: float = 1.0


@dataclass(frozen=True)
class ConsumerNode:
    """One node that multiplies the weight of a site.

    Attributes:
        node: index of the node.
        tensor: the data input.
        axis: the channel axis of `tensor`.
        output: the product, before any bias that is a node of its own.
        output_axis: the channel axis of `output`.
        strides: spacing of the positions of `tensor` that are read at all, one for each axis behind the channel
            axis; empty when all are read.
        bias: where the output can take a constant; None if nowhere.
    """

    node: int
    tensor: str
    axis: int
    output: str
    output_axis: int
    strides: tuple[int, ...] = ()
    bias: Bias | None = None


@dataclass(frozen=True)
class Window:
    """The positions that a convolution combines.

    Attributes:
        kernel: extent by spatial axis.
        strides: by spatial axis.
        dilations: by spatial axis.
        pads: (begin, end) zeros by spatial axis.
        transposed: whether the strides spread the input (ConvTranspose) rather than the windows.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    transposed: bool = False


@dataclass(frozen=True)
class Product:
    """One node that multiplies a constant weight, whether or not its channels can shrink.

    Attributes:
        weight: name of the constant.
        position: which input of the node it is.
        inputs: axis of the weight that meets the channel axis of the data (of one group).
        outputs: axis of the weight that becomes the channel axis of the product.
        group: how many parts the channels are divided into, each with its own share of the weight.
        scale: what the node multiplies the product by.
        reader: the node.
        window: None where single positions are multiplied.
    """

    weight: str
    position: int
    inputs: int
    outputs: int
    group: int
    scale: float
    reader: ConsumerNode
    window: Window | None


@dataclass(frozen=True)
class Consumer:
    """One constant weight, or one block of it, and all nodes that multiply it.

    Attributes:
        weight: name of the constant.
        inputs: axis of the weight that meets the channel axis of the data.
        outputs: axis of the weight that becomes the channel axis of the product.
        readers: the nodes, in topological order.
        columns: atom of each place along the `inputs` axis.
        rows: atom of each place along the `outputs` axis.
        affine: whether a constant added to the output can make up for a constant channel: one reader, which sees no
            zeros beyond the border, and a place for a bias.
        block, blocks: which of how many equal parts along axis 0 of the weight this is. Each part multiplies as many
            channels of the readers' data, in order, and makes as many of their outputs (grouped convolution).
    """

    weight: str
    inputs: int
    outputs: int
    readers: tuple[ConsumerNode, ...]
    columns: Atoms
    rows: Atoms
    affine: bool
    block: int = 0
    blocks: int = 1

    @property
    def first_column(self) -> int:
        """Place of the first column on the channel axis of the readers' data."""
        return self.block * len(self.columns)

    @property
    def first_row(self) -> int:
        """Place of the first row on the channel axis of the readers' output."""
        return self.block * len(self.rows)

    def part(self, weight: Array) -> Array:
        """The block of the weight, as a view."""
        size = len(weight) // self.blocks
        return weight[self.block * size : (self.block + 1) * size]


@dataclass(frozen=True)
class Producer:
    """The output channels of a Conv, ConvTranspose, Gemm or MatMul with a constant weight."""

    node: int
    atoms: Atoms


@dataclass(frozen=True)
class Group:
    """Units that meet at common sites.

    Attributes:
        name: the first producer's node name.
        units: unit numbers, ascending.
        consumers: indices into `Structure.sites`, in topological order.
    """

    name: str
    units: NDArray[np.int64]
    consumers: tuple[int, ...]


@dataclass(frozen=True)
class Refusal:
    """Channels that are left alone.

    Attributes:
        reason: why.
        nodes: names of the nodes that cause it.
        channels: number of output channels it costs.
    """

    reason: Reason
    nodes: tuple[str, ...]
    channels: int


@dataclass(frozen=True)
class Structure:
    """What may be removed from a model, and what goes with what.

    Attributes:
        model: the model that was traced.
        shape_info: its constants and shapes.
        labels: the labellings of every labelled tensor that is computed.
        reads: for each constant, the atoms along its axes as each (node index, input position) reads them.
        unit: unit number of every atom; -1 where it always stays.
        units: number of units.
        aligned: (units,) units of one bundle have aligned places: as many go from each part of a group, or from each
            head (see `lindep_onnx.structure.placement`). Most bundles hold one unit.
        interchangeable: (units,) units of one cell can trade places without changing what the model computes.
        consumers: in topological order of their first reader.
        products: in topological order.
        producers: in topological order.
        groups: in topological order of their first site.
        refusals: the most costly first.
        minimums: sets of units of which at least that many must survive.
    """

    model: Model
    shape_info: ShapeInfo
    labels: Mapping[str, tuple[Labelling, ...]]
    reads: Mapping[str, Mapping[tuple[int, int], Axes]]
    unit: NDArray[np.int64]
    units: int
    aligned: NDArray[np.int64]
    interchangeable: NDArray[np.int64]
    consumers: tuple[Consumer, ...]
    products: tuple[Product, ...]
    producers: tuple[Producer, ...]
    groups: tuple[Group, ...]
    refusals: tuple[Refusal, ...]
    minimums: tuple[tuple[NDArray[np.int64], int], ...]

    def mask(self, atoms: Atoms, removed: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Which of these atoms survive when the units in `removed` go."""
        gone = np.append(removed, False)  # the last entry answers for FROZEN
        return np.asarray(~gone[self.unit[atoms]])


class Bounds:
    """How many units of each set (`Structure.least`) may still go.

    Args:
        structure: of which nothing is gone yet.
    """

    def __init__(self, structure: Structure) -> None:
        self._left = [len(members) - bound for members, bound in structure.minimums]
        self._sets: dict[int, list[int]] = {}
        for number, (members, _) in enumerate(structure.minimums):
            for unit in members.tolist():
                self._sets.setdefault(unit, []).append(number)

    def take(self, unit: int) -> bool:
        """Whether a unit may go without emptying an axis; counts it if so."""
        own = self._sets.get(unit, ())
        if any(self._left[number] <= 0 for number in own):
            return False
        for number in own:
            self._left[number] -= 1
        return True


@dataclass(frozen=True)
class PendingConsumer:
    """A node that multiplies a weight along a labelled axis; the fields are those of `Consumer`."""

    weight: str
    inputs: int
    outputs: int
    reader: ConsumerNode
    affine: bool
    blocks: int


@dataclass
class Tracer:
    """What the operator rules read and write while a graph is traced. It lives inside `trace` only."""

    model: Model
    shape_info: ShapeInfo
    labels: dict[str, tuple[Labelling, ...]] = field(default_factory=dict)
    atoms: int = 0
    links: list[tuple[Atoms, Atoms]] = field(default_factory=list)
    aligned: list[tuple[Atoms, Atoms]] = field(default_factory=list)
    frozen: list[tuple[Atoms, Reason, Node | None]] = field(default_factory=list)
    claims: dict[str, dict[tuple[int, int], dict[int, Atoms]]] = field(default_factory=dict)
    consumers: list[PendingConsumer] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    producers: list[Producer] = field(default_factory=list)

    # ---- reading -----------------------------------------------------------------------------------------------

    def constant(self, name: str) -> Array | None:
        """Value of a tensor that never changes; None for others and for absent inputs."""
        return self.shape_info.constants.get(name)

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

    # ---- writing -----------------------------------------------------------------------------------------------

    def fresh(self, count: int) -> Atoms:
        """New atoms, linked to nothing."""
        self.atoms += count
        return np.arange(self.atoms - count, self.atoms, dtype=np.int64)

    def distinct(self, atoms: Atoms, used: Iterable[Atoms] = ()) -> Atoms:
        """The same atoms with fresh, linked ones wherever an atom occurs again on the axis.

        An axis built from the same channels twice has two features for one unit; only a Reshape puts one atom on an
        axis several times, and means positions of one channel by it.
        """
        seen = np.concatenate([np.empty(0, np.int64), *used])
        first = np.zeros(len(atoms), dtype=bool)
        first[np.unique(atoms, return_index=True)[1]] = True
        again = ~first | np.isin(atoms, seen)
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

    def label(self, name: str, labels: Iterable[Labelling]) -> None:
        """Say which labellings a computed tensor carries. Axes of size 1 never carry one."""
        if name:
            kept = tuple(label for label in labels if label.atoms.shape[label.axes.index(label.cut)] > 1)
            if kept:
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
                self.freeze(atoms.ravel(), MISFIT, node)
            elif atoms.shape[-1] > 1:
                wanted[axis] = atoms
        self.claims.setdefault(name, {})[node.index, position] = wanted

    def refuse(self, node: Node, reason: Reason) -> None:
        """Leave everything alone that a node reads; its outputs carry no channels."""
        for name in (*node.inputs, *node.captures):
            if name:
                self.freeze_tensor(name, reason, node)

    def produce(self, node: Node, channels: int) -> Atoms:
        """Start the output channels of a node with a constant weight."""
        atoms = self.fresh(channels)
        self.producers.append(Producer(node.index, atoms))
        return atoms

    def consumer(
        self, weight: str, inputs: int, outputs: int, reader: ConsumerNode, affine: bool, blocks: int = 1
    ) -> None:
        """Record that a node multiplies a constant weight, in so many blocks, along a labelled axis."""
        self.consumers.append(PendingConsumer(weight, inputs, outputs, reader, affine, blocks))

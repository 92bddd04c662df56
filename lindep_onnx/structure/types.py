"""Which channels must go together: atoms, units, consumers, groups and refusals.

A tensor carries labellings. A labelling gives every element along some axes an atom id; elements that share an id, or
whose ids are linked, live and die together. `structure.trace` walks the graph once, forward, and asks the rule of
each operator (see `structure.rules`), which speaks to a `structure.tracer.Tracer`; the connected components of all
links are the units. Components that meet something that cannot shrink (an output, an unknown operator) are frozen and
become refusals.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lindep_onnx.model.ir import Model
from lindep_onnx.model.shapes import ShapeInfo
from lindep_onnx.model.weighted import Window
from lindep_onnx.structure.reasons import Reason

Array: TypeAlias = NDArray[Any]
Atoms: TypeAlias = NDArray[np.int64]
#: Atoms by the axis they can be cut along. Those of a constant may be (blocks, places): its axis 0 is divided into so
#: many blocks, and each has channels of its own along every axis (the weight of a grouped convolution).
Axes: TypeAlias = "Mapping[int, Atoms]"

#: Unit number of atoms that always stay.
FROZEN = -1


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

    def moved(self, places: Mapping[int, int] | Sequence[int]) -> Labelling:
        """The same ids over other axes: `places` tells where each axis is now."""
        axes = [places[axis] for axis in self.axes]
        return Labelling(tuple(sorted(axes)), np.transpose(self.atoms, np.argsort(axes)), places[self.cut])

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
    """One node that multiplies the weight of a consumer.

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
    """Units that meet at common consumers.

    Attributes:
        name: the first producer's node name.
        units: unit numbers, ascending.
        consumers: indices into `Structure.consumers`, in topological order.
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
        aligned: (units,) the aligned set of each unit, whose places vanish together: as many go from each part of a
            group, or from each head (see `lindep_onnx.structure.placement`). Most sets hold one unit.
        interchangeable: (units,) the interchangeable set of each unit, whose units can trade places without changing
            what the model computes.
        consumers: in topological order of their first reader.
        products: in topological order.
        producers: in topological order.
        groups: in topological order of their first consumer.
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

    def kept_elements(self, name: str, removed: NDArray[np.bool_]) -> int:
        """How many elements of a constant are left when the units in `removed` go."""
        axes = next(iter(self.reads.get(name, {}).values()), {})
        shares = (float(self.mask(atoms, removed).mean()) for atoms in axes.values())
        shape = self.shape_info.weight_shape(name)
        return round(math.prod(self.model.stored[name].shape if shape is None else shape) * math.prod(shares))

    def kept_parameters(self, removed: NDArray[np.bool_]) -> int:
        """Parameters of the model that are left when the units in `removed` go; without biases that folds add."""
        sizes = {name: value.size for name, value in self.model.stored.items() if value.dtype.kind in "fV"}
        return sum(self.kept_elements(name, removed) for name, size in sizes.items() if size > 1)

"""Widths that stay whole: which channels count towards which width, and removals in blocks that leave no odd ones.

Kernels are made for widths that are multiples of something (`lindep_onnx.runtime.targets`). A width is a channel axis
of a tensor that a layer reads or writes. A unit may lie on several, and several tensors may make one width (Concat).
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from lindep_onnx.model.weighted import weighted
from lindep_onnx.runtime.targets import WidthRule
from lindep_onnx.structure.types import FROZEN, Product, Structure


@dataclass(frozen=True)
class Width:
    """A channel axis, or the part of it that one group of a convolution has.

    Attributes:
        units: (channels,) unit of each channel, `FROZEN` for those that always stay.
        multiple: of the number of channels that should be kept.
        odd: whether it is in no fast kernel as it is, so that single channels may go down to the first multiple.
    """

    units: NDArray[np.int64]
    multiple: int
    odd: bool

    def whole(self, kept: int) -> int:
        """The least number from `kept` on that is allowed."""
        up = -(-kept // self.multiple) * self.multiple
        return up if up <= len(self.units) else kept if self.odd else len(self.units)


def widths(structure: Structure, rule: WidthRule) -> tuple[Width, ...]:
    """All widths that should be multiples of something, each once, the narrowest first."""
    found: dict[bytes, Width] = {}
    for product in structure.products:
        reader = product.reader
        weight = structure.shape_info.constants[product.weight].shape
        steps = rule.steps(structure.model.nodes[reader.node], weight)
        for tensor, axis in ((reader.tensor, reader.axis), (reader.output, reader.output_axis)):
            for units in _parts(structure, product, tensor, axis) if steps.block > 1 else ():
                key = units.tobytes()
                if (units != FROZEN).any() and (key not in found or found[key].multiple < steps.block):
                    found[key] = Width(units, steps.block, len(units) % steps.fast > 0)
    return tuple(sorted(found.values(), key=lambda width: len(width.units)))


def _parts(structure: Structure, product: Product, tensor: str, axis: int) -> list[NDArray[np.int64]]:
    """Units along a channel axis, of one group of a convolution after the other; of all groups of a depthwise one."""
    units = along(structure, tensor, axis)
    if units is None:
        return []
    layout = weighted(structure.model.nodes[product.reader.node], product.position)
    whole = layout is None or layout.depthwise(structure.shape_info.constants[product.weight].shape)
    return np.split(units, 1 if whole else product.group)


def along(structure: Structure, tensor: str, axis: int) -> NDArray[np.int64] | None:
    """(channels,) unit of each channel on an axis of a tensor; None where all of them stay."""
    for label in structure.labels.get(tensor, ()):
        if label.cut == axis:
            return np.asarray(structure.unit[label.along_cut()])
    return None


def whole_widths(
    structure: Structure, removed: NDArray[np.bool_], order: NDArray[np.int64], rule: WidthRule
) -> NDArray[np.bool_]:
    """Put back units until every width is whole, or all that it was.

    Args:
        structure: the traced model.
        removed: (units,) bool.
        order: the removed units in the order in which they went; the last ones are put back first.
        rule: which multiples widths keep to.
    """
    gone = np.append(removed, False)  # the last entry answers for FROZEN
    place = np.full(structure.units, -1)
    place[order] = np.arange(len(order))
    every = widths(structure, rule)
    changed = True
    while changed:  # what is put back for one width may leave another odd
        changed = False
        for width in every:
            kept = int((~gone[width.units]).sum())
            own = np.unique(width.units[gone[width.units]])
            for unit in own[np.argsort(-place[own], kind="stable")].tolist():
                if kept == width.whole(kept):
                    break
                gone[unit] = False
                kept += int((width.units == unit).sum())
                changed = True
    return gone[:-1]


def blocks(structure: Structure, order: NDArray[np.int64], rule: WidthRule) -> list[NDArray[np.int64]]:
    """Cut an order of removal into blocks that leave every width whole, in the order in which they are complete.

    Units that lie on the same widths are alike: as soon as so many of them have come up that these widths are whole
    again, they make a block. Where equal numbers go from every group or head (`Structure.aligned`), a block has as many
    of each. What makes no whole block in the end is left out.

    Args:
        structure: the traced model.
        order: (R,) units, in the order in which they would go.
        rule: which multiples widths keep to.
    """
    on, sizes = _alike(structure, rule)
    family, parts = _families(structure)
    waiting: dict[tuple[int, int], dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    taken: dict[tuple[int, int], int] = defaultdict(int)
    found = []
    for unit in order.tolist():
        several = int(parts[family[unit]])
        key = (-1 if several > 1 else int(on[unit]), int(family[unit]))
        queues = waiting[key]
        queues[int(structure.interchangeable[unit]) if several > 1 else -1].append(unit)
        size = sizes[on[unit]].next_after(taken[key])
        if len(queues) < several or any(len(queue) < size for queue in queues.values()):
            continue
        found.append(np.array([gone for queue in queues.values() for gone in queue[:size]]))
        for queue in queues.values():
            del queue[:size]
        taken[key] += size
    return found


@dataclass(frozen=True)
class _Sizes:
    """Numbers of units that go together: so many at first, alone or at once, then `multiple` at a time."""

    multiple: int = 1
    first: int = 0
    alone: bool = False

    def next_after(self, taken: int) -> int:
        if taken >= self.first:
            return self.multiple
        return 1 if self.alone else self.first


def _alike(structure: Structure, rule: WidthRule) -> tuple[NDArray[np.int64], list[_Sizes]]:
    """By unit a number that those on the same widths share, and by number the sizes of their blocks."""
    on = np.zeros(structure.units, dtype=np.int64)
    sizes = [_Sizes()]
    for width in widths(structure, rule):
        units, times = np.unique(width.units[width.units != FROZEN], return_counts=True)
        for number in np.unique(on[units]):
            own = units[on[units] == number]
            often = int(times[on[units] == number].max())
            multiple = width.multiple // math.gcd(width.multiple, often)
            before = sizes[number]
            on[own] = len(sizes)
            if before.multiple == 1:  # the narrowest width decides how it begins
                sizes.append(_Sizes(multiple, len(width.units) % width.multiple // often, width.odd))
            else:
                sizes.append(replace(before, multiple=math.lcm(before.multiple, multiple)))
    return on, sizes


def _families(structure: Structure) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """By unit the number of its family of groups or heads, and by family how many interchangeable sets it has.

    A unit that is aligned with no other has no family: the last number, of which there is one part.
    """
    several = np.bincount(structure.aligned, minlength=structure.units)[structure.aligned] > 1
    members = np.flatnonzero(several)
    family = np.zeros(structure.units, dtype=np.int64)
    if not len(members):
        return family, np.ones(1, dtype=np.int64)
    size = structure.units
    ends = (structure.aligned[members], size + structure.interchangeable[members])
    graph = coo_array((np.ones(len(members)), ends), shape=(2 * size, 2 * size))
    count, component = connected_components(graph, directed=False)
    family[:] = count
    family[members] = component[structure.aligned[members]]
    pairs = np.unique(np.stack([family[members], structure.interchangeable[members]]), axis=1)
    parts = np.bincount(pairs[0], minlength=count + 1)
    parts[count] = 1
    return family, parts

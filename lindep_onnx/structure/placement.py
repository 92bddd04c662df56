"""Which channel sits where once others are gone.

A grouped convolution needs as many channels in each group, attention as many in each head. So places vanish in aligned
sets, one from each group (`Structure.aligned`), while the channels that go may sit anywhere in theirs. Channels of one
interchangeable set (`Structure.interchangeable`) can trade places, so those that go move onto the places that vanish,
and nothing else changes:

    group 0    a B c d         a d c           B and E go: d moves to the second place, f to the fourth,
    group 1    e f g E    ->   e f g           and the last column vanishes.

How many can go is decided here too: where one group has fewer channels to give than the others, these keep some.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lindep_onnx.linalg.linear_map import Selection
from lindep_onnx.structure.types import Atoms, Structure


def equalized(
    structure: Structure, removed: NDArray[np.bool_], order: NDArray[np.int64] | None = None
) -> NDArray[np.bool_]:
    """(units,) bool: as much of `removed` as can go with equal counts in every group.

    `order` is that in which the units went, ascending if None: the last ones are put back first.
    """
    gone = _places(structure, removed)
    own = structure.interchangeable
    excess = np.bincount(own, removed, structure.units) - np.bincount(own, gone, structure.units)
    result = removed.copy()
    for unit in (np.flatnonzero(removed) if order is None else order)[::-1] if excess.any() else ():
        if excess[own[unit]] > 0:
            excess[own[unit]] -= 1
            result[unit] = False
    return result


def _places(structure: Structure, removed: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """(units,) bool: places that vanish: whole aligned sets, as many of each interchangeable one as `removed` has."""
    several = np.bincount(structure.aligned, minlength=1)[structure.aligned] > 1
    result = removed & ~several
    members = np.flatnonzero(several)
    members = members[np.argsort(structure.aligned[members], kind="stable")]
    aligned_sets = np.split(members, np.flatnonzero(np.diff(structure.aligned[members])) + 1)
    left = np.bincount(structure.interchangeable[removed], minlength=structure.units)
    # Sets that go as they are come first, so that nothing moves without need.
    for aligned in sorted(aligned_sets, key=lambda aligned: -float(removed[aligned].mean()) if len(aligned) else 0.0):
        interchangeable_sets, counts = np.unique(structure.interchangeable[aligned], return_counts=True)
        if (left[interchangeable_sets] >= counts).all():
            left[interchangeable_sets] -= counts
            result[aligned] = True
    return result


class Placement:
    """Where the survivors of a removal sit; `removed` is (units,) bool, `equalized`.

    Raises:
        ValueError: the removal leaves groups of different sizes; see `equalized`.
    """

    def __init__(self, structure: Structure, removed: NDArray[np.bool_]) -> None:
        self._structure = structure
        self.removed = removed
        self.gone = _places(structure, removed)
        self._source = np.arange(len(structure.unit))
        if (self.gone == removed).all():
            return
        # In each interchangeable set the channels that stay fill the places that stay, in order, then the others.
        channel = np.lexsort((removed, structure.interchangeable))
        place = np.lexsort((self.gone, structure.interchangeable))
        if (removed[channel] != self.gone[place]).any():
            raise ValueError("a removal must leave equal counts in every group: pass it through `equalized` first")
        given = np.empty(structure.units, dtype=np.int64)
        given[place] = channel
        atoms = np.argsort(structure.unit, kind="stable")
        atoms = atoms[structure.unit[atoms] >= 0]
        own = structure.unit[atoms]
        starts = np.searchsorted(own, np.arange(structure.units))
        self._source[atoms] = atoms[starts[given[own]] + np.arange(len(atoms)) - starts[own]]

    def mask(self, atoms: Atoms) -> NDArray[np.bool_]:
        """Which of these places stay."""
        return self._structure.mask(atoms, self.gone)

    def kept(self, tensor: str) -> dict[int, NDArray[np.bool_]]:
        """Which places stay on each axis of a tensor that loses some."""
        labels = self._structure.labels.get(tensor, ())
        masks = {label.cut: self.mask(label.along_cut()) for label in labels}
        return {axis: mask for axis, mask in masks.items() if not mask.all()}

    def chosen(self, atoms: Atoms) -> NDArray[np.int64]:
        """Which place of the original each place that stays along this axis takes its channel from, in order."""
        kept = np.flatnonzero(self.mask(atoms))
        wanted = self._source[atoms[kept]]
        if (wanted == atoms[kept]).all():
            return kept
        order = np.argsort(atoms, kind="stable")
        ordered = atoms[order]
        # An atom may occur several times: its k-th place takes from the k-th place of the other atom.
        repeat = np.empty(len(atoms), dtype=np.int64)
        repeat[order] = np.arange(len(atoms)) - np.searchsorted(ordered, ordered)
        return np.asarray(order[np.searchsorted(ordered, wanted) + repeat[kept]])

    def of(self, tensor: str, axis: int) -> Selection | None:
        """Which channels of a computed tensor are left on an axis, in order; None where nothing goes."""
        index = self.chosen_along(tensor, axis)
        return None if index is None else Selection(index, len(self.kept(tensor)[axis]))

    def touches(self, tensor: str) -> bool:
        """Whether a tensor loses channels."""
        return bool(self.kept(tensor))

    def chosen_along(self, tensor: str, axis: int) -> NDArray[np.int64] | None:
        """`chosen` for an axis of a computed tensor; None where nothing goes."""
        for label in self._structure.labels.get(tensor, ()):
            if label.cut == axis and not self.mask(label.along_cut()).all():
                return self.chosen(label.along_cut())
        return None

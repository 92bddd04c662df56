"""Where the samples of an input are: along which axis of an array, and along which axis of what a run is fed with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lindep_onnx.model.shapes import Shape

Array: TypeAlias = NDArray[Any]


@dataclass(frozen=True)
class Place:
    """Where the samples of one input are.

    Attributes:
        stored: axis of the array that counts samples; None where every run is fed with the whole array.
        fed: axis of what is fed that counts samples; None where there is none, so that a run takes one entry.
        entries: whether each entry of the array is what a run can be fed with, its sample axis included.
    """

    stored: int | None
    fed: int | None
    entries: bool = False

    def count(self, shape: Sequence[int]) -> int | None:
        """Samples in an array of this shape; None if it counts none."""
        return None if self.stored is None else shape[self.stored]

    def of_sample(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of what belongs to one sample."""
        return tuple(size for axis, size in enumerate(shape) if axis != self.stored)

    def alone(self, shape: Sequence[int]) -> bool:
        """Whether a run can take no more than one sample of an array of this shape."""
        return self.entries and (self.fed is None or shape[1 + self.fed] != 1)

    def taken(self, value: Array, rows: NDArray[np.int64]) -> Array:
        """What a run with these samples is fed with."""
        if self.stored is None:
            return value
        own = value[rows] if self.stored == 0 else np.take(value, rows, self.stored)
        if self.fed is None or (self.entries and len(rows) == 1):
            return np.asarray(own[0])
        return np.concatenate(list(own), self.fed) if self.entries else np.moveaxis(own, self.stored, self.fed)

    def by_sample(self, fed: Array, count: int) -> Array:
        """Something with the axes of what is fed, samples in front."""
        if self.fed is None or fed.shape[self.fed] != count:
            return fed[None]
        return np.moveaxis(fed, self.fed, 0)


#: Of an array that is fed as it is.
WHOLE = Place(None, None)


def place_of(shape: Shape | None, axis: int | None, found: Sequence[int], *, leading: bool) -> Place | None:
    """Where the samples of an array are; None if it does not fit.

    Args:
        shape: declared; None where the rank is not.
        axis: of the input that counts samples; None if none does.
        found: shape of the array.
        leading: whether samples were put in front.
    """
    if shape is None:
        return Place(0 if leading else axis or 0, axis or 0) if len(found) > (axis or 0) else None
    if axis is None:
        if agree(shape, found):
            return WHOLE
    elif axis < len(shape):
        stored = 0 if leading else axis
        if len(found) == len(shape) and agree(_without(shape, axis), _without(found, stored)):
            return Place(stored, axis)
        shape = (*shape[:axis], "", *shape[axis + 1 :])
    return Place(0, axis, entries=True) if found and agree(shape, found[1:]) else None


def agree(wanted: Sequence[int | str], found: Sequence[int]) -> bool:
    """Whether sizes are those that are wanted; symbols stand for any."""
    return len(wanted) == len(found) and all(
        isinstance(size, str) or size == other for size, other in zip(wanted, found, strict=True)
    )


def _without(sizes: Sequence[Any], axis: int) -> tuple[Any, ...]:
    return (*sizes[:axis], *sizes[axis + 1 :])

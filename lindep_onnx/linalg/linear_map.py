"""How the channels of a tensor follow from those of another: a selection of them, or any linear map."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]


@dataclass(frozen=True)
class Selection:
    """z'_i = z_{index_i}: some of the channels, in some order.

    Attributes:
        index: (new,) which of the old channels each new one is.
        size: number of old channels.
    """

    index: NDArray[np.int64]
    size: int

    @property
    def width(self) -> int:
        """Number of new channels."""
        return len(self.index)

    def rows(self, values: Array) -> Array:
        """(..., old) values to (..., new)."""
        return values[..., self.index]

    def along(self, values: Array, axis: int) -> Array:
        """The same for channels on any axis; the type of the values stays."""
        return np.take(values, self.index, axis)

    def moments(self, gram: Array) -> Array:
        """(old, old) second moments to (new, new)."""
        return gram[np.ix_(self.index, self.index)]

    def after(self, first: LinearMap) -> LinearMap:
        """The map that is `first` and then this one."""
        if isinstance(first, Selection):
            return Selection(first.index[self.index], first.size)
        return Mixture(first.matrix[self.index])


@dataclass(frozen=True)
class Mixture:
    """z' = M z: every new channel is a combination of old ones.

    Attributes:
        matrix: (new, old) M.
    """

    matrix: NDArray[np.float64]

    @property
    def width(self) -> int:
        """Number of new channels."""
        return len(self.matrix)

    def rows(self, values: Array) -> Array:
        """(..., old) values to (..., new)."""
        return values @ self.matrix.T

    def along(self, values: Array, axis: int) -> Array:
        """The same for channels on any axis; the type of the values stays."""
        return np.moveaxis(self.rows(np.moveaxis(values, axis, -1)), -1, axis).astype(values.dtype)

    def moments(self, gram: Array) -> Array:
        """(old, old) second moments to (new, new): M G M'."""
        return self.matrix @ gram @ self.matrix.T

    def after(self, first: LinearMap) -> LinearMap:
        """The map that is `first` and then this one."""
        if isinstance(first, Selection):
            wide = np.zeros((len(self.matrix), first.size))
            np.add.at(wide.T, first.index, self.matrix.T)
            return Mixture(wide)
        return Mixture(self.matrix @ first.matrix)


LinearMap: TypeAlias = Selection | Mixture


class ChannelMaps(Protocol):
    """How the tensors of a result follow from those of the model it was made of; they go by the same names.

    Statistics (`calibration.carry`) and the targets of a refit (`refit.targets`) are carried through it.
    """

    def of(self, tensor: str, axis: int) -> LinearMap | None:
        """From the original's channels on this axis to the result's; None where they are the same."""

    def touches(self, tensor: str) -> bool:
        """Whether the change itself gives the tensor other channels or other values."""


@dataclass(frozen=True)
class TensorMaps:
    """A `ChannelMaps` that is written down.

    Attributes:
        maps: by tensor and axis.
        changed: tensors that have the same channels and other values.
    """

    maps: Mapping[tuple[str, int], LinearMap] = field(default_factory=dict)
    changed: frozenset[str] = frozenset()

    def of(self, tensor: str, axis: int) -> LinearMap | None:
        """See `ChannelMaps`."""
        return self.maps.get((tensor, axis))

    def touches(self, tensor: str) -> bool:
        """See `ChannelMaps`."""
        return tensor in self.changed or any(name == tensor for name, _ in self.maps)

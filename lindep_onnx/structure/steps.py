"""A decision about channels: which units go, and how those that stay make up for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

#: How a unit is made up for, in the numbers of `ChannelSteps.kind`; the same as in `linalg`.
KINDS = ("kept", "constant", "collinear", "joint")


@dataclass(frozen=True)
class Fold:
    """How one consumer makes up for its removed features.

    Attributes:
        kept: (F,) bool.
        matrix: (kept, removed) T with Z_R ~ Z_K T.
    """

    kept: NDArray[np.bool_]
    matrix: NDArray[np.float64]


@dataclass(frozen=True)
class ChannelSteps:
    """A decision, ready to be carried out.

    Attributes:
        removed: (units,) bool.
        kind: (units,) index into `KINDS`, how each unit is made up for; zero where nobody asked.
        folds: by consumer index, for those that lose something, as far as they are known already.
    """

    removed: NDArray[np.bool_]
    kind: NDArray[np.int8]
    folds: Mapping[int, Fold]

    @classmethod
    def of(cls, removed: NDArray[np.bool_]) -> ChannelSteps:
        """Units that go for the sake of a budget; every fold is still to be found."""
        return cls(removed, np.zeros(len(removed), dtype=np.int8), {})

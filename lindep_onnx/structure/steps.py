"""Decisions as values: steps and what they cost, and, of channels, which go and how the others make up for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

#: What steps are priced by.
Saving: TypeAlias = Literal["parameters", "macs", "channels"]

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

    @property
    def taken(self) -> NDArray[np.bool_]:
        """(units,) bool; the units are the steps."""
        return self.removed


@dataclass(frozen=True)
class Curve:
    """The steps of one site in the order in which they are taken, cheapest first.

    Attributes:
        site: its number among the sites of its kind.
        steps: (R,) their numbers.
        cost: (R,) squared error of the outputs that is expected once the step and all before it are taken.
        saving: (R,) what that saves, by what the path is priced in.
    """

    site: int
    steps: NDArray[np.int64]
    cost: NDArray[np.float64]
    saving: NDArray[np.float64]


#: The curves of all sites of a kind, by the name of the kind.
Curves: TypeAlias = Mapping[str, Sequence[Curve]]
#: These, by what they are priced in.
Prices: TypeAlias = Mapping[Saving, Curves]

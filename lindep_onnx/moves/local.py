"""The units of a group by numbers of their own, from 0 on: what linear algebra works with."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from lindep_onnx.linalg.fold import ConsumerProblem
from lindep_onnx.structure.types import FROZEN, Structure


class LocalUnits:
    """Numbers of units within their groups.

    Args:
        structure: the traced model.

    Attributes:
        number: (units + 1,) of each unit within its group; the last entry answers for FROZEN.
        minimums: for each group, sets of its units of which so many must survive. Members of other groups are not
            counted on.
    """

    def __init__(self, structure: Structure) -> None:
        self.number = np.full(structure.units + 1, FROZEN, dtype=np.int64)
        owner = np.zeros(structure.units, dtype=np.int64)
        for number, group in enumerate(structure.groups):
            self.number[group.units] = np.arange(len(group.units))
            owner[group.units] = number
        self.minimums: list[list[tuple[NDArray[np.int64], int]]] = [[] for _ in structure.groups]
        for members, bound in structure.minimums:
            for number in np.unique(owner[members]).tolist():
                own = self.number[members[owner[members] == number]]
                self.minimums[number].append((own, min(bound, len(own))))

    def problem(self, posed: ConsumerProblem) -> ConsumerProblem:
        """The same problem in the unit numbers of its group."""
        return replace(posed, unit=self.number[posed.unit])

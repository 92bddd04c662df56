"""One price for the whole graph: the order in which steps are taken when a budget allows errors.

Every kind of change prices the steps of its sites as curves of cost against saving. A site's price is the slope of the
lower convex hull of its curve. Sorted by price, the hull segments of all sites of all kinds are a path of nested plans:
every budget, of whatever kind, is a point of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lindep_onnx.moves.base import Move
from lindep_onnx.structure.steps import Curves
from lindep_onnx.structure.types import Structure

#: Points that a search over measured errors probes, and how they crowd where little is left; a search over sizes uses
#: every step.
STOPS, CROWDING = 96, 1.5


@dataclass(frozen=True)
class Taken:
    """Steps of one kind.

    Attributes:
        move: the kind.
        steps: (steps,) bool, those that are taken.
        order: their numbers in the order in which they are taken.
    """

    move: Move
    steps: NDArray[np.bool_]
    order: NDArray[np.int64]

    @classmethod
    def of(cls, move: Move, steps: NDArray[np.bool_]) -> Taken:
        """Steps in no order but that of their numbers."""
        return cls(move, steps, np.flatnonzero(steps))


@dataclass(frozen=True)
class Path:
    """Nested plans, from nothing to everything that may be done.

    Attributes:
        moves: the kinds of change, in the order in which they are carried out.
        counts: number of steps of each kind.
        kind: (R,) which of `moves` each step belongs to, in the order in which they are taken.
        step: (R,) its number within its kind.
        price: (R,) ascending, cost per saving.
    """

    moves: tuple[Move, ...]
    counts: tuple[int, ...]
    kind: NDArray[np.int64]
    step: NDArray[np.int64]
    price: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.step)

    def at(self, count: int) -> tuple[Taken, ...]:
        """The first `count` steps, by kind."""
        found = []
        for number, (move, size) in enumerate(zip(self.moves, self.counts, strict=True)):
            order = self.step[:count][self.kind[:count] == number]
            steps = np.zeros(size, dtype=bool)
            steps[order] = True
            found.append(Taken(move, steps, order))
        return tuple(found)

    def stops(self) -> list[int]:
        """Counts of steps that searches by measured error probe, ascending: the same for every budget.

        They lie closer where little is left: there a step is a larger share of the model.
        """
        left = np.linspace(1, 0, STOPS + 1) ** CROWDING
        return sorted({round(len(self) * (1 - share)) for share in left.tolist()})


def build_path(
    structure: Structure, moves: Sequence[Move], curves: Curves, first: Mapping[str, NDArray[np.bool_]]
) -> Path:
    """Merge the curves of all sites of all kinds by price.

    Args:
        structure: the traced model.
        moves: the kinds of change.
        curves: by kind.
        first: by kind, (steps,) bool, steps that cost nothing and are taken before all others.
    """
    pieces: list[tuple[float, int, int, int, NDArray[np.int64]]] = []
    for kind, move in enumerate(moves):
        for curve in curves[move.name]:
            begin, spent, saved = 0, 0.0, 0.0
            for place, end in enumerate(lower_hull(curve.saving, curve.cost)):
                slope = (curve.cost[end] - spent) / max(curve.saving[end] - saved, 1e-300)
                pieces.append((float(slope), kind, curve.site, place, curve.steps[begin : end + 1]))
                begin, spent, saved = end + 1, float(curve.cost[end]), float(curve.saving[end])
    pieces.sort(key=lambda piece: piece[:4])
    free = [np.flatnonzero(first[move.name]) for move in moves]
    kind_of = np.concatenate(
        [np.empty(0, np.int64), *(np.full(len(own), number) for number, own in enumerate(free))]
        + [np.full(len(piece[4]), piece[1]) for piece in pieces]
    )
    step = np.concatenate([np.empty(0, np.int64), *free, *(piece[4] for piece in pieces)])
    begun = sum(map(len, free))
    price = np.concatenate([np.zeros(begun), *(np.full(len(piece[4]), piece[0]) for piece in pieces)])
    # A curve may end at a step that is free: it is taken once, at the start.
    wanted = np.ones(len(step), dtype=bool)
    for number, own in enumerate(free):
        wanted[begun:] &= (kind_of[begun:] != number) | ~np.isin(step[begun:], own)
    kind_of, step, price = kind_of[wanted], step[wanted], price[wanted]
    possible = np.ones(len(step), dtype=bool)
    for number, move in enumerate(moves):
        possible[kind_of == number] = move.possible(structure, step[kind_of == number])
    counts = tuple(len(first[move.name]) for move in moves)
    return Path(tuple(moves), counts, kind_of[possible], step[possible], price[possible])


def lower_hull(saving: NDArray[np.float64], cost: NDArray[np.float64]) -> list[int]:
    """Ends of the segments of the lower convex hull from (0, 0) on."""
    ends: list[int] = []
    for place in range(len(saving)):
        while ends:
            before = ends[-2] if len(ends) > 1 else None
            x0, y0 = (saving[before], cost[before]) if before is not None else (0.0, 0.0)
            last = ends[-1]
            # The last corner goes if the new point lies below the line through it.
            if (cost[last] - y0) * (saving[place] - x0) < (cost[place] - y0) * (saving[last] - x0):
                break
            ends.pop()
        ends.append(place)
    return ends

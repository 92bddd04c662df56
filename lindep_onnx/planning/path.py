"""One price for the whole graph: the order in which steps are taken when a budget allows errors.

Every kind of change prices the steps of its sites as curves of cost against saving. What can be bought are blocks of
steps, such as the channels that make a width narrower by a whole block of the kernel (`lindep_onnx.runtime.targets`). A
block's price is the slope of the lower convex hull of its site's curve, drawn through the ends of blocks. Sorted by
price, the blocks of all sites of all kinds are a path of nested plans: the greedy solution of a knapsack with multiple
choices, which is the best there is up to the last block (Sinha and Zoltners, "The Multiple-Choice Knapsack Problem",
1979; over blocks of channels, Shen et al., "HALP", arXiv 2110.10811). Every budget, of whatever kind, is a point of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lindep_onnx.moves.base import Move
from lindep_onnx.runtime.targets import FREE, WidthRule
from lindep_onnx.structure.steps import Curve, Curves
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
    """Nested plans, from what is free to everything that may be done.

    Attributes:
        moves: the kinds of change, in the order in which they are carried out.
        counts: number of steps of each kind.
        kind: (R,) which of `moves` each step belongs to, in the order in which they are taken.
        step: (R,) its number within its kind.
        ends: (B + 1,) how many steps come before each block and, last, how many there are; those before the first are
            free.
        price: (B,) ascending, cost per saving of each block.
        site: (B,) which site each block belongs to; sites of all kinds are numbered together.
    """

    moves: tuple[Move, ...]
    counts: tuple[int, ...]
    kind: NDArray[np.int64]
    step: NDArray[np.int64]
    ends: NDArray[np.int64]
    price: NDArray[np.float64]
    site: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.price)

    def without(self, block: int) -> Path:
        """The same without a block and what its site offers after it: the way on where it is larger than is left to go.

        Args:
            block: its number; plans of up to so many blocks stay as they are.
        """
        kept = (np.arange(len(self)) < block) | (self.site != self.site[block])
        sizes = np.diff(self.ends)
        taken = np.concatenate([np.ones(self.ends[0], dtype=bool), np.repeat(kept, sizes)])
        ends = np.cumsum([self.ends[0], *sizes[kept]], dtype=np.int64)
        return replace(
            self, kind=self.kind[taken], step=self.step[taken], ends=ends, price=self.price[kept], site=self.site[kept]
        )

    def at(self, count: int) -> tuple[Taken, ...]:
        """What is free and the first `count` blocks, by kind."""
        found = []
        end = self.ends[count]
        for number, (move, size) in enumerate(zip(self.moves, self.counts, strict=True)):
            order = self.step[:end][self.kind[:end] == number]
            steps = np.zeros(size, dtype=bool)
            steps[order] = True
            found.append(Taken(move, steps, order))
        return tuple(found)

    def stops(self) -> list[int]:
        """Counts of blocks that searches by measured error probe, ascending: the same for every budget.

        They lie closer where little is left: there a block is a larger share of the model.
        """
        left = np.linspace(1, 0, STOPS + 1) ** CROWDING
        return sorted({round(len(self) * (1 - share)) for share in left.tolist()})


@dataclass(frozen=True)
class _Block:
    """Steps of one kind that are taken together, and what they are sorted by."""

    price: float
    kind: int
    site: int
    place: int
    steps: NDArray[np.int64]

    @property
    def key(self) -> tuple[float, int, int, int]:
        return self.price, self.kind, self.site, self.place


def build_path(
    structure: Structure,
    moves: Sequence[Move],
    curves: Curves,
    free: Mapping[str, NDArray[np.bool_]],
    rule: WidthRule = FREE,
) -> Path:
    """Merge the curves of all sites of all kinds by price.

    Args:
        structure: the traced model.
        moves: the kinds of change.
        curves: by kind; each begins with its steps that are free, see `free_first`.
        free: by kind, (steps,) bool, steps that cost nothing and are taken before all others.
        rule: the multiples that widths keep to.
    """
    found = sorted(
        (
            block
            for kind, move in enumerate(moves)
            for curve in curves[move.name]
            for block in _priced(curve, move.blocks(structure, curve.steps, rule), kind, free[move.name])
        ),
        key=lambda block: block.key,
    )
    possible = np.ones(len(found), dtype=bool)
    begun = [np.flatnonzero(free[move.name]) for move in moves]
    for kind, move in enumerate(moves):
        own = [number for number, block in enumerate(found) if block.kind == kind]
        order = np.concatenate([begun[kind], *(_fresh(found[number], free[move.name]) for number in own)])
        can = move.possible(structure, order)
        begun[kind] = begun[kind][can[: len(begun[kind])]]
        place = int((free[move.name]).sum())
        for number in own:
            size = len(_fresh(found[number], free[move.name]))
            possible[number] = can[place : place + size].all()
            place += size
    found = [block for block, can in zip(found, possible.tolist(), strict=True) if can]
    steps = [*begun, *(_fresh(block, free[moves[block.kind].name]) for block in found)]
    kinds = [*range(len(moves)), *(block.kind for block in found)]
    ends = np.cumsum([len(own) for own in steps], dtype=np.int64)[len(moves) - 1 :]
    numbers = {key: number for number, key in enumerate(dict.fromkeys((block.kind, block.site) for block in found))}
    return Path(
        tuple(moves),
        tuple(len(free[move.name]) for move in moves),
        np.repeat(np.array(kinds, dtype=np.int64), [len(own) for own in steps]),
        np.concatenate(steps),
        ends,
        np.array([block.price for block in found]),
        np.array([numbers[block.kind, block.site] for block in found], dtype=np.int64),
    )


def _fresh(block: _Block, free: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The steps of a block that are not free: those are taken from the start."""
    return block.steps[~free[block.steps]]


def _priced(curve: Curve, blocks: Sequence[NDArray[np.int64]], kind: int, free: NDArray[np.bool_]) -> Iterator[_Block]:
    """Blocks of a curve with the slope of the hull over their ends; those that are free as a whole are left out."""
    place = np.full(len(free), -1)
    place[curve.steps] = np.arange(len(curve.steps))
    ends = np.maximum.accumulate([int(place[own].max()) for own in blocks]) if blocks else np.empty(0, np.int64)
    begun = sum(bool(free[own].all()) for own in blocks)
    spent, saved = 0.0, float(curve.saving[ends[begun - 1]]) if begun else 0.0
    blocks, ends = blocks[begun:], ends[begun:]
    saving, cost = curve.saving[ends] - saved, curve.cost[ends]
    first, saved = 0, 0.0
    for end in lower_hull(saving, cost):
        slope = (cost[end] - spent) / max(saving[end] - saved, 1e-300)
        for number in range(first, end + 1):
            yield _Block(float(slope), kind, curve.site, number, blocks[number])
        first, spent, saved = end + 1, float(cost[end]), float(saving[end])


def free_first(curve: Curve, free: NDArray[np.bool_]) -> Curve:
    """The curve of a site whose free steps are taken before all others, at no cost.

    Args:
        curve: of the site.
        free: (steps,) bool, steps of the kind that cost nothing.
    """
    own = free[curve.steps]
    if not own.any():
        return curve
    order = np.argsort(~own, kind="stable")
    alone = np.diff(curve.saving, prepend=0.0)[order]
    return Curve(curve.site, curve.steps[order], np.where(own, 0.0, curve.cost)[order], np.cumsum(alone))


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

"""Find the plan that a budget asks for on a path of nested plans.

Sizes fall with every unit, so that the first plan that is small enough is found among all of them. Measured
errors wobble: they are bisected over fixed stops, so that a looser limit takes the same turns or better ones, and never
ends at a larger model. The cheap fold is bisected over all stops. A refit does better, at a price: it is bisected over
every second stop, and only beyond what the fold allows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

#: One in so many stops is refitted.
COARSE = 2


def first_small_enough(most: int, excess: Callable[[int], float]) -> int | None:
    """The smallest count from 0 to `most` that is small enough; None if none is.

    Sizes fall almost evenly: the next count is where a straight line expects the limit, and then its neighbor. Where
    they do not, every third count halves what is left.

    Args:
        most: the largest count.
        excess: how far a count is above the limit; it falls, and up to 0 is small enough.
    """
    low, above = 0, excess(0)
    if above <= 0:
        return 0
    high, below = most, excess(most) if most else above
    if below > 0:
        return None
    guess = _crossing(low, above, high, below)
    turn = 0
    while high - low > 1:
        guess = min(max(guess, low + 1), high - 1)
        found = excess(guess)
        turn += 1
        if found > 0:
            low, above, neighbor = guess, found, guess + 1
        else:
            high, below, neighbor = guess, found, guess - 1
        guess = (neighbor, (low + high) // 2, _crossing(low, above, high, below))[(turn - 1) % 3]
    return high


def _crossing(low: int, above: float, high: int, below: float) -> int:
    """Where a line through two points meets the limit."""
    share = above / (above - below) if math.isfinite(above) and math.isfinite(below) else 0.5
    return low + math.ceil(share * (high - low))


def last_good_enough(
    stops: Sequence[int], good: Callable[[int], bool], refitted: Callable[[int], bool] | None = None
) -> tuple[int, bool]:
    """The largest stop that is good enough, and whether that is so only once it is refitted.

    Args:
        stops: ascending counts; the first is taken to be good.
        good: whether a plan is good enough with the cheap fold.
        refitted: whether it is with the refit; None does without.
    """
    fold = _last(len(stops), lambda place: good(stops[place]))
    if refitted is None:
        return stops[fold], False
    # What the fold allows the refit is taken to allow too.
    grid = range(0, len(stops), COARSE)
    best = grid[_last(len(grid), lambda at: grid[at] <= fold or refitted(stops[grid[at]]))]
    return (stops[best], True) if best > fold else (stops[fold], False)


def _last(count: int, good: Callable[[int], bool]) -> int:
    """The last of so many places that is good, by bisection; the first is taken to be good."""
    low, high = 0, count - 1
    while low < high:
        middle = (low + high + 1) // 2
        if good(middle):
            low = middle
        else:
            high = middle - 1
    return low


def on_grid(stops: Sequence[int], below: int) -> list[int]:
    """Coarse stops under a count, descending: where to go if unseen samples turn it down."""
    return [count for count in stops[::COARSE] if count < below][::-1]

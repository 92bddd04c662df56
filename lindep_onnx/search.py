"""Find the plan that a budget asks for on a ladder of nested plans.

Sizes fall with every unit, so that the first plan that is small enough is found by bisection over all of them. Measured
errors wobble: they are bisected over fixed rungs, so that a looser limit takes the same turns or better ones, and never
ends at a larger model. Which rung the cheap fold allows says where to start; a refit does better, so that a few coarser
rungs beyond it are refitted and judged themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["COARSE", "first_small_enough", "last_good_enough", "on_grid"]

#: Every so many rungs are refitted, and at most so many refits are tried.
COARSE, MOST_REFITS = 4, 3


def first_small_enough(most: int, small: Callable[[int], bool]) -> int | None:
    """The smallest count from 0 to `most` for which `small` holds; None if it holds nowhere.

    Args:
        most: the largest count.
        small: holds from some count on.
    """
    if not small(most):
        return None
    low, high = 0, most
    while low < high:
        middle = (low + high) // 2
        if small(middle):
            high = middle
        else:
            low = middle + 1
    return low


def last_good_enough(
    rungs: Sequence[int], good: Callable[[int], bool], refitted: Callable[[int], bool] | None = None
) -> tuple[int, bool]:
    """The largest rung that is good enough, and whether that is so only once it is refitted.

    Args:
        rungs: ascending counts; the first removes nothing that matters and is taken to be good.
        good: whether a plan is good enough with the cheap fold.
        refitted: whether it is with the refit; None does without.
    """
    low, high = 0, len(rungs) - 1
    while low < high:
        middle = (low + high + 1) // 2
        if good(rungs[middle]):
            low = middle
        else:
            high = middle - 1
    if refitted is None:
        return rungs[low], False
    best: int | None = None
    start = -(-low // COARSE) * COARSE
    for place in range(start, min(start + MOST_REFITS * COARSE, len(rungs)), COARSE):
        if not refitted(rungs[place]):
            break
        best = rungs[place]
    return (rungs[low], False) if best is None else (best, True)


def on_grid(rungs: Sequence[int], below: int) -> list[int]:
    """Coarse rungs under a count, descending: where to go if unseen samples turn it down."""
    return [count for count in rungs[::COARSE] if count < below][::-1]

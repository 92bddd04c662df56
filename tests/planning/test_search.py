"""The search for a stop of the path."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lindep_onnx.planning.search import COARSE, first_small_enough, last_good_enough, on_grid

SHAPES = {
    "straight": lambda count, threshold: threshold - 0.5 - count,
    "a cliff": lambda count, threshold: 1.0 if count < threshold else -1.0,
    "unknown": lambda count, threshold: np.inf if count < threshold else -np.inf,
    "late": lambda count, threshold: (threshold - 0.5) ** 5 - count**5,
    "steps": lambda count, threshold: (
        float(threshold // 7 - count // 7) if count < threshold - 7 else threshold - 0.5 - count
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
@settings(derandomize=True)
@given(most=st.integers(0, 300), threshold=st.integers(0, 301))
def test_the_first_small_plan_is_found_whatever_the_sizes_on_the_way(shape: str, most: int, threshold: int) -> None:
    looks: list[int] = []
    found = first_small_enough(most, lambda count: looks.append(count) or SHAPES[shape](count, threshold))
    assert found == (threshold if threshold <= most else None)
    assert len(looks) == len(set(looks)) or most == 0
    assert len(looks) <= 3 * 9 + 2


def test_sizes_that_fall_evenly_take_few_looks() -> None:
    looks: list[float] = []
    rng = np.random.default_rng(0)
    sizes = 1.0 - np.cumsum(rng.uniform(0.5, 1.5, 1001)) / 1001
    found = first_small_enough(1000, lambda count: looks.append(count) or sizes[count] - 0.3)
    assert found == np.flatnonzero(sizes <= 0.3)[0]
    assert len(looks) <= 9  # a bisection takes 12


@settings(derandomize=True, max_examples=300)
@given(st.integers(0, 10_000), st.floats(0, 1), st.floats(0, 1), st.booleans())
def test_a_looser_limit_never_ends_at_a_smaller_count(seed: int, one: float, other: float, refit: bool) -> None:
    rng = np.random.default_rng(seed)
    rungs = list(range(0, 650, 10))
    # Wobbling errors that rise on the whole; the refit does mostly better, sometimes worse.
    fold = dict(zip(rungs, np.linspace(0, 1, len(rungs)) + 0.1 * rng.normal(size=len(rungs)), strict=True))
    again = {rung: error * rng.uniform(0.4, 1.1) for rung, error in fold.items()}

    def end(limit: float) -> int:
        refitted = (lambda rung: again[rung] <= limit) if refit else None
        return last_good_enough(rungs, lambda rung: fold[rung] <= limit, refitted)[0]

    low, high = sorted((one, other))
    assert end(low) <= end(high)


def test_the_refit_goes_on_where_the_fold_had_to_stop() -> None:
    rungs, refits = list(range(65)), []
    assert last_good_enough(rungs, lambda r: r <= 21) == (21, False)
    assert last_good_enough(rungs, lambda r: r <= 21, lambda r: bool(refits.append(r)) or r <= 51) == (50, True)
    assert len(refits) <= 6 and min(refits) > 21  # what the fold allows is not refitted


def test_a_refit_that_fails_leaves_the_fold() -> None:
    assert last_good_enough(list(range(65)), lambda r: r <= 21, lambda r: False) == (21, False)


def test_the_way_down_is_on_coarse_rungs_only() -> None:
    assert on_grid(list(range(65)), 10) == [8, 6, 4, 2, 0]
    assert all(place % COARSE == 0 for place in on_grid(list(range(65)), 64))

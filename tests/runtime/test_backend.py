"""Several runs at a time, taken in one after the other."""

from __future__ import annotations

import threading
import time

import pytest

from lindep_onnx.runtime import backend as sessions
from lindep_onnx.runtime.backend import Crew, crew, in_order

CPU = ("CPUExecutionProvider",)


def test_results_come_in_the_order_of_the_items_whoever_is_done_first() -> None:
    def slow(number: int) -> int:
        time.sleep(0.02 if number % 3 == 0 else 0.0)
        return number * number

    with Crew(3, 1).pool() as pool:
        found = list(in_order(pool, slow, range(20), 3))
    assert found == [(number, number * number) for number in range(20)]


def test_several_are_done_at_a_time_and_only_a_few_are_made_ahead() -> None:
    made: list[int] = []
    together = threading.Barrier(2, timeout=5)  # breaks unless two are under way at once

    def items():
        for number in range(10):
            made.append(number)
            yield number

    with Crew(2, 1).pool() as pool:
        results = in_order(pool, lambda number: together.wait() is None or number, items(), 2)
        next(results)
        assert len(made) <= 6
        assert len(list(results)) == 9


def test_an_error_comes_in_its_turn_and_ends_the_work() -> None:
    def failing(number: int) -> int:
        if number == 3:
            raise ValueError("three")
        return number

    taken = []
    with pytest.raises(ValueError, match="three"), Crew(2, 1).pool() as pool:
        for number, _ in in_order(pool, failing, range(1000), 2):
            taken.append(number)
    assert taken == [0, 1, 2]


@pytest.mark.parametrize(
    ("threads", "activations", "expected"),
    [
        (8, 1, Crew(8, 1)),
        (8, sessions.ACTIVATIONS // 2, Crew(2, 4)),
        (8, 2 * sessions.ACTIVATIONS, Crew(1, 8)),
        (1, 1, Crew(1, 1)),
    ],
)
def test_cores_are_shared_out_as_memory_allows(threads: int, activations: int, expected: Crew) -> None:
    assert crew(threads, CPU, activations) == expected


def test_other_devices_make_one_run_at_a_time() -> None:
    assert crew(0, ("CUDAExecutionProvider", "CPUExecutionProvider"), 1) == Crew(1, 0)

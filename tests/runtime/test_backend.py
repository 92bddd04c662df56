"""Several runs at a time, taken in one after the other."""

from __future__ import annotations

import threading
import time

import pytest

from lindep_onnx.runtime.backend import Pool, Provider, Runtime, Shares, cores


def test_results_come_in_the_order_of_the_items_whoever_is_done_first() -> None:
    def slow(number: int) -> int:
        time.sleep(0.02 if number % 3 == 0 else 0.0)
        return number * number

    with Pool(3) as pool:
        found = list(pool.in_order(slow, range(20)))
    assert found == [(number, number * number) for number in range(20)]


def test_several_are_done_at_a_time_and_only_a_few_are_made_ahead() -> None:
    made: list[int] = []
    together = threading.Barrier(2, timeout=5)  # breaks unless two are under way at once

    def items():
        for number in range(10):
            made.append(number)
            yield number

    with Pool(2) as pool:
        results = pool.in_order(lambda number: together.wait() is None or number, items())
        next(results)
        assert len(made) <= 6
        assert len(list(results)) == 9


def test_an_error_comes_in_its_turn_and_ends_the_work() -> None:
    def failing(number: int) -> int:
        if number == 3:
            raise ValueError("three")
        return number

    taken = []
    with pytest.raises(ValueError, match="three"), Pool(2) as pool:
        for number, _ in pool.in_order(failing, range(1000)):
            taken.append(number)
    assert taken == [0, 1, 2]


@pytest.mark.parametrize(
    ("threads", "activations", "runs", "each"), [(8, 1, 8, 1), (8, 50, 2, 4), (8, 200, 1, 8), (1, 1, 1, 1)]
)
def test_cores_are_shared_out_as_memory_allows(threads: int, activations: int, runs: int, each: int) -> None:
    shares = Runtime(threads=threads, memory=100).shares(activations)
    assert (shares.runs, shares.each.threads) == (runs, each)


def test_other_devices_make_one_run_at_a_time() -> None:
    runtime = Runtime.named(("CUDAExecutionProvider", "CPUExecutionProvider"))
    assert not runtime.on_processor
    assert runtime.shares(1) == runtime.pieces(2) == Shares(1, runtime)


def test_pieces_do_not_depend_on_the_cores() -> None:
    assert [Runtime(threads=threads).pieces(2) for threads in (1, 8)] == [
        Shares(2, Runtime(threads=1)),
        Shares(2, Runtime(threads=4)),
    ]
    assert Runtime(threads=8).pieces(1) == Shares(1, Runtime(threads=8))


def test_processes_of_one_machine_share_its_cores() -> None:
    assert Runtime().beside(2).threads == max(1, cores() // 2)
    assert Runtime(threads=3).beside(2).threads == 3


def test_products_on_cuda_are_not_shortened_unless_asked_for() -> None:
    (plain, _), (asked,) = (
        Runtime.named(("CUDAExecutionProvider", "CPUExecutionProvider")).providers,
        Runtime((Provider("CUDAExecutionProvider", (("use_tf32", "1"), ("device_id", "1"))),)).providers,
    )
    assert plain.settings == {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
    assert asked.settings == {"use_tf32": "1", "cudnn_conv_algo_search": "HEURISTIC", "device_id": "1"}

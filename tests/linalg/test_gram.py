"""Gram matrices that grow in place."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from lindep_onnx.linalg.gram import add_gram


@pytest.mark.parametrize(("rows", "features"), [(1, 1), (7, 3), (3, 7), (300, 129)])
def test_the_lower_triangle_grows_and_the_upper_stays(rows: int, features: int) -> None:
    rng = np.random.default_rng(rows)
    z, start = rng.normal(size=(rows, features)), rng.normal(size=(features, features))
    lower = np.array(start, order="F")
    add_gram(lower, z)
    np.testing.assert_allclose(np.tril(lower), np.tril(start + z.T @ z), rtol=1e-13, atol=1e-13)
    np.testing.assert_array_equal(np.triu(lower, 1), np.triu(start, 1))


def test_no_rows_change_nothing() -> None:
    lower = np.eye(3, order="F")
    add_gram(lower, np.zeros((0, 3)))
    np.testing.assert_array_equal(lower, np.eye(3))


@pytest.mark.parametrize(
    ("lower", "rows"),
    [
        (np.zeros((3, 3), order="F"), np.zeros((5, 4))),
        (np.zeros((3, 3)), np.zeros((5, 3))),
        (np.zeros((3, 3), order="F"), np.zeros((5, 3), order="F")),
        (np.zeros((3, 3), order="F"), np.zeros((5, 3), dtype=np.float32)),
    ],
)
def test_what_is_laid_out_otherwise_is_refused(lower: np.ndarray, rows: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"fit|float64"):
        add_gram(lower, rows)


def test_other_threads_run_meanwhile() -> None:
    lower, z = np.zeros((1500, 1500), order="F"), np.ones((2000, 1500))
    counted, done = [0], threading.Event()

    def count() -> None:
        while not done.is_set():
            counted[0] += 1

    thread = threading.Thread(target=count)
    thread.start()
    before = counted[0]
    add_gram(lower, z)
    meanwhile = counted[0] - before
    done.set()
    thread.join()
    assert meanwhile > 1000  # with the lock held, a handful at most
    assert lower[-1, -1] == 2000

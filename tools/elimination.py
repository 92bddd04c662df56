"""Seconds to order half of the features of one wide site for removal, and what the delayed updates save.

Three lines for each width: NumPy's own product of two matrices of that size, as a measure of the machine; the
elimination as it is; with one column at a time, which is the formula as it stands, and whose order must be the same.

Usage: python tools/elimination.py [--features 2048 4096] [--outputs 1000] [--threads 1] [--reference]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from lindep_onnx.linalg.elimination import Limits, eliminate
from lindep_onnx.linalg.fold import ConsumerProblem


def site(features: int, outputs: int, seed: int = 0) -> ConsumerProblem:
    """Correlated features, each of its own size, as a calibrated ReLU layer has them."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(3 * features, features // 2)) @ rng.normal(size=(features // 2, features))
    rows = np.maximum(rows / np.sqrt(features) + 0.3 * rng.normal(size=rows.shape), 0.0) * rng.uniform(0.1, 2, features)
    weight = rng.normal(size=(features, outputs))
    outer = weight @ weight.T
    gram = rows.T @ rows / len(rows)
    return ConsumerProblem(gram, None, outer, np.arange(features), float(np.vdot(gram, outer)), True)


def _timed(call: Callable[[], Any]) -> tuple[float, float, Any]:
    start, used = time.perf_counter(), time.process_time()
    result = call()
    return time.perf_counter() - start, time.process_time() - used, result


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--outputs", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1, help="of BLAS (default 1)")
    parser.add_argument("--reference", action="store_true", help="with one column at a time too, which takes minutes")
    given = parser.parse_args(arguments)
    print("| features | what | seconds | CPU s |", "|---" * 4 + "|", sep="\n")
    with threadpool_limits(given.threads, user_api="blas"):
        for features in given.features:
            posed = site(features, given.outputs)
            half = {"candidates": np.ones(features, dtype=bool), "limits": Limits(features // 2)}
            seconds, cpu, _ = _timed(lambda posed=posed: posed.gram @ posed.outer)  # type: ignore[misc]
            print(f"| {features:,} | one matrix product | {seconds:.2f} | {cpu:.2f} |", flush=True)
            seconds, cpu, found = _timed(lambda posed=posed, half=half: eliminate([posed], **half))  # type: ignore[misc]
            print(f"| {features:,} | elimination | {seconds:.2f} | {cpu:.2f} |", flush=True)
            if given.reference:
                seconds, cpu, slow = _timed(
                    lambda posed=posed, half=half: eliminate([posed], block=1, **half)  # type: ignore[misc]
                )
                same = np.array_equal(found.order, slow.order)
                print(f"| {features:,} | one by one, order the same: {same} | {seconds:.2f} | {cpu:.2f} |", flush=True)


if __name__ == "__main__":
    main()

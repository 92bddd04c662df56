"""Checks on a real model that budgets mean what they say.

- No budget is exceeded: sizes are counted again from the result, errors are those that the report verified.
- Along each sweep, from the mildest limit to the most severe, the result never grows.
- The same options give the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lindep_onnx.api import Result, compress
from lindep_onnx.errors import BudgetError
from lindep_onnx.model import ir as graph
from lindep_onnx.model.cost import cost

__all__ = ["SWEEPS", "check_budgets"]

#: Limits by budget. A share is severe where it is small, an error where it is large: that asks for the smaller model.
SWEEPS: dict[str, tuple[float, ...]] = {
    "params": (0.97, 0.9, 0.8, 0.65, 0.5),
    "macs": (0.97, 0.9, 0.8, 0.65, 0.5),
    "max_error": (0.003, 0.01, 0.03, 0.1, 0.3),
}
SHARES = ("params", "macs")


def check_budgets(
    model: Path,
    calib: Mapping[str, NDArray[np.float32]],
    refit: str,
    sweeps: Mapping[str, Sequence[float]] | None = None,
) -> bool:
    """Print one line for each run, and whether all is well.

    Args:
        model: the original.
        calib: calibration data.
        refit: the refit to check.
        sweeps: limits by budget, instead of `SWEEPS`.

    Returns:
        Whether nothing was found wrong.
    """
    violations = []
    print("| budget | limit | achieved | parameters | macs |", "|---" * 5 + "|", sep="\n", flush=True)
    for kind, limits in (sweeps or SWEEPS).items():
        last: int | None = None
        for limit in limits:
            try:
                result = compress(model, calib, refit=refit, **{kind: limit})
            except BudgetError as problem:
                print(f"| {kind} | {limit:g} | {problem} | - | - |", flush=True)
                # A milder error than one that was met can be met; a smaller share need not be.
                if last is not None and kind not in SHARES:
                    violations.append(f"{kind} {limit:g} is refused, though a smaller one was met")
                continue
            reached, sizes = _achieved(model, result, kind, calib)
            print(f"| {kind} | {limit:g} | {reached:.5f} | {sizes[0]} | {sizes[1]} |", flush=True)
            if not reached <= limit:
                violations.append(f"{kind} {limit:g} is exceeded: {reached}")
            size = sizes[1] if kind == "macs" else sizes[0]
            if last is not None and size > last:
                violations.append(f"{kind} {limit:g} gives {size}, more than the {last} of the limit before it")
            last = size
    violations += _different_bytes(model, calib, refit)
    for violation in violations:
        print(f"WRONG: {violation}")
    print("Budgets hold." if not violations else f"{len(violations)} violation(s).")
    return not violations


def _achieved(
    model: Path, result: Result, kind: str, calib: Mapping[str, NDArray[np.float32]]
) -> tuple[float, tuple[int, int]]:
    """What was reached, and the parameters and MACs of the result."""
    shapes = {name: (1, *value.shape[1:]) for name, value in calib.items()}
    after, before = cost(graph.load(result.model), shapes), cost(graph.load(model), shapes)
    sizes = (after.parameters, after.macs)
    if kind in SHARES:
        return sizes[SHARES.index(kind)] / (before.parameters, before.macs)[SHARES.index(kind)], sizes
    (budget,) = (budget for budget in result.report.budget if budget.kind == kind)
    return float("nan") if budget.achieved is None else budget.achieved, sizes


def _different_bytes(model: Path, calib: Mapping[str, NDArray[np.float32]], refit: str) -> list[str]:
    first, second = (
        hashlib.sha256(compress(model, calib, refit=refit, params=0.8).model.SerializeToString()).hexdigest()
        for _ in range(2)
    )
    print(f"Two runs at params 0.8: sha256 {first[:16]}, {second[:16]}")
    return [] if first == second else ["two runs with the same options give different bytes"]

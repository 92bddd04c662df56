"""Few samples, or many copies of few: how many are wanted is said, and nothing is passed that they cannot judge."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from build import build

import lindep_onnx
from lindep_onnx.report.values import Report


def report(count: int, copies: int = 1, **options: Any) -> Report:
    rng = np.random.default_rng(0)
    net = build("h = MatMul(x, w)\nr = Relu(h)\ny = MatMul(r, v)", {"w": (6, 40), "v": (40, 5)}, x=("N", 6))
    x = np.repeat(rng.normal(size=(count, 6)).astype(np.float32), copies, axis=0)
    return lindep_onnx.compress(net, {"x": x}, force=True, **options).report


BUDGETS = [{"params": 0.5, "max_error": 1e9}, {"params": 0.5, "min_agreement": 0.0}]


@pytest.mark.parametrize("budget", BUDGETS, ids=["max_error", "min_agreement"])
@pytest.mark.parametrize(("count", "copies"), [(4, 1), (26, 1), (4, 100), (26, 20)])
def test_a_limit_that_few_samples_judge_is_unchecked(budget: dict[str, float], count: int, copies: int) -> None:
    found = report(count, copies, **budget).verification
    assert found is not None and found.status != "passed"
    if found.status == "unchecked":
        assert re.match(r"[1-9] (different )?held-out samples? cannot judge --m", found.reason)
        assert ("different" in found.reason) == (copies > 1)
    else:
        assert count == 4 and "close to a random model" in found.reason


@pytest.mark.parametrize("holdout", [0.3, 0.6])
@pytest.mark.parametrize("budget", [{}, *BUDGETS], ids=["lossless", "max_error", "min_agreement"])
def test_as_many_as_are_asked_for_can_judge(budget: dict[str, float], holdout: float) -> None:
    few = report(12, holdout=holdout, **budget).verification
    assert few is not None and few.status == "unchecked"
    wanted = int(re.search(r"about ([\d,]+) in all", few.reason)[1].replace(",", ""))  # type: ignore[index]
    assert wanted == (67 if holdout == 0.3 else 34)
    enough = report(int(1.4 * wanted), holdout=holdout, **budget).verification
    assert enough is not None and (enough.status, enough.samples >= 10) == ("passed", True)


@pytest.mark.parametrize("budget", [{}, {"params": 0.5}], ids=["lossless", "params"])
@pytest.mark.parametrize("copies", [1, 60])
def test_how_many_samples_a_width_needs_is_said_in_one_line_whatever_copies_there_are(
    budget: dict[str, float], copies: int
) -> None:
    (note,) = [note for note in report(20, copies, **budget).notes if "Too little data" in note]
    wanted, there = (int(number.replace(",", "")) for number in re.findall(r"([\d,]*\d)(?: samples|\.$)", note))
    assert "\n" not in note and there == 20 and 120 < wanted < 300
    assert not [note for note in report(300, **budget).notes if "Too little data" in note]


def test_copies_of_few_samples_are_no_evidence_that_channels_depend_on_each_other() -> None:
    few = report(20, 60)
    assert few.after.channels == few.before.channels and few.verification is not None
    assert few.verification.status != "failed"

"""Wrong first attempts are answered with what to do."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "wrong_attempts.py"
spec = importlib.util.spec_from_file_location("wrong_attempts", TOOL)
assert spec is not None and spec.loader is not None
wrong_attempts = importlib.util.module_from_spec(spec)
sys.modules["wrong_attempts"] = wrong_attempts
spec.loader.exec_module(wrong_attempts)

ANSWERS = dict(wrong_attempts.answers())


@pytest.mark.parametrize("attempt", wrong_attempts.ATTEMPTS, ids=lambda attempt: attempt.mistake)
def test_a_mistake_is_answered_in_three_lines_with_what_to_do(attempt: object) -> None:
    answer = ANSWERS[attempt]
    assert not answer.misses(attempt), answer.lines


def test_a_bad_answer_is_noticed() -> None:
    attempt = wrong_attempts.ATTEMPTS[1]
    good = ANSWERS[attempt]
    assert len(wrong_attempts.ATTEMPTS) >= 20 and not good.misses(attempt)
    for bad in (
        {"code": 0},
        {"lines": ()},
        {"lines": (*good.lines, "", "", "")},
        {"lines": (*good.lines, "unexpected")},
    ):
        assert dataclasses.replace(good, **bad).misses(attempt)

"""What all tests share."""

from __future__ import annotations

import os

# Before NumPy is imported: test processes run side by side, and threads that spin on each other's cores only wait.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest

from lindep_onnx.runtime.backend import Runtime


@pytest.fixture(autouse=True)
def _short_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Timings are not what most tests are about."""
    timed = Runtime.time
    monkeypatch.setattr(
        Runtime, "time", lambda *given, seconds: timed(*given, seconds=seconds if seconds >= 1 else min(seconds, 0.05))
    )

"""What all tests share."""

from __future__ import annotations

import os

# Before NumPy is imported: test processes run side by side, and threads that spin on each other's cores only wait.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest
from timings import by_work

from lindep_onnx.runtime.timing import Stopwatch


@pytest.fixture(autouse=True)
def _work_for_time(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Latency is not what most tests are about: they start no processes, and their models take as long as they work."""
    if request.node.get_closest_marker("timed") is None:
        monkeypatch.setattr(Stopwatch, "compare", by_work)
        monkeypatch.setattr(Stopwatch, "glance", lambda stopwatch, model: stopwatch.compare(model).ratio)

"""Real runs that several tests of reports look at."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import lindep_onnx

MODELS = Path(__file__).parents[2] / "models"


@pytest.fixture(scope="session")
def demo_data() -> dict[str, np.ndarray]:
    return {name: value[:300] for name, value in dict(np.load(MODELS / "calib.npz")).items()}


@pytest.fixture(scope="session")
def result(demo_data: dict[str, np.ndarray]) -> lindep_onnx.Result:
    """The demonstration model at half its parameters, compared on stress data too."""
    return lindep_onnx.compress(MODELS / "demo.onnx", demo_data, params=0.5, min_agreement=0.1, stress=demo_data)

"""Planted dependence end to end: exactly what was planted goes, and nothing goes a second time."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from build import as_array, build, initializer, run

from lindep_onnx.api import compress

sys.path.append(str(Path(__file__).parents[1] / "tools"))
planted_figures = importlib.import_module("planted_figures")

SAMPLES = 64

NET = """
    a = Conv<pads=[1,1,1,1]>(x, w1, b1)
    h = Relu(a)
    c = Conv(h, w2, b2)
    r = Relu(c)
    p = GlobalAveragePool(r)
    f = Flatten(p)
    y = Gemm<transB=1>(f, w3, b3)
"""


def _net(*, planted: bool) -> onnx.ModelProto:
    """conv - conv - dense. Planted: a copy, a dead one and a combination of three in each axis, a constant before Gemm."""
    weights: dict[str, Any] = {name: as_array(name, shape) for name, shape in SHAPES.items()}
    if planted:
        for w, b in (("w1", "b1"), ("w2", "b2")):
            # Parents of a combination are never clipped: what they read is never negative.
            weights[w][2:5], weights[b][2:5] = np.abs(weights[w][2:5]), 0.5
            for weight in (weights[w], weights[b]):
                weight[5] = 1.5 * weight[2]
                weight[6] = 0.5 * weight[2] + 0.25 * weight[3] + 0.75 * weight[4]
            weights[w][7], weights[b][7] = 0.0, -1.0
        weights["w2"][8], weights["b2"][8] = 0.0, 2.0
    return build(NET, weights, x=("N", 3, 8, 8))


SHAPES = {"w1": (10, 3, 3, 3), "b1": (10,), "w2": (12, 10, 3, 3), "b2": (12,), "w3": (4, 12), "b3": (4,)}


def _images(samples: int, seed: int) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).uniform(size=(samples, 3, 8, 8)).astype(np.float32)}


def _widths(model: onnx.ModelProto) -> tuple[int, int]:
    return len(initializer(model, "w1")), len(initializer(model, "w2"))


def test_exactly_the_planted_channels_of_a_small_net_go_and_a_second_run_finds_nothing() -> None:
    model, calib = _net(planted=True), _images(SAMPLES, 1)
    smaller = compress(model, calib).model
    assert _widths(smaller) == (10 - 3, 12 - 4)
    fresh = _images(50, 2)
    (y,), (other,) = run(model, fresh), run(smaller, fresh)
    assert np.abs(y - other).max() < 1e-5 * np.abs(y - y.mean(0)).max()
    assert _widths(compress(smaller, calib).model) == _widths(smaller)


def test_nothing_goes_from_a_small_net_without_dependence() -> None:
    model = _net(planted=False)
    assert _widths(compress(model, _images(SAMPLES, 1)).model) == _widths(model)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["squeezenet", "inception_v1"])
def test_the_planted_channels_of_a_real_topology_go_and_nothing_else(name: str, tmp_path: Path) -> None:
    found = planted_figures.figures(name, tmp_path, samples=SAMPLES, seed=0)
    assert found.recall >= 0.99
    assert found.error <= max(1e-5, 2 * found.rounding)
    assert (found.extra, found.plain, found.again) == (0, 0, 0)

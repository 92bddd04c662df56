"""A small net that holds planted dependence, and images for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from build import as_array, build, initializer

NET = """
    a = Conv<pads=[1,1,1,1]>(x, w1, b1)
    h = Relu(a)
    c = Conv(h, w2, b2)
    r = Relu(c)
    p = GlobalAveragePool(r)
    f = Flatten(p)
    y = Gemm<transB=1>(f, w3, b3)
"""
SHAPES = {"w1": (10, 3, 3, 3), "b1": (10,), "w2": (12, 10, 3, 3), "b2": (12,), "w3": (4, 12), "b3": (4,)}


def net(*, planted: bool) -> onnx.ModelProto:
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


def images(samples: int, seed: int) -> dict[str, np.ndarray]:
    """Feeds of `net`."""
    return {"x": np.random.default_rng(seed).uniform(size=(samples, 3, 8, 8)).astype(np.float32)}


def widths(model: onnx.ModelProto) -> tuple[int, int]:
    """Of the two convolutions."""
    return len(initializer(model, "w1")), len(initializer(model, "w2"))

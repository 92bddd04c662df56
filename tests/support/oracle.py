"""An oracle for removals that needs no data: with zeros in the weights that multiply some units, nothing changes."""

from __future__ import annotations

import numpy as np
import onnx
from build import feed, ignoring, run, traced

from lindep_onnx.structure.placement import equalized
from lindep_onnx.structure.rewrite import Removal, rewrite
from lindep_onnx.structure.types import Structure


def removal(structure: Structure, share: float, seed: int) -> np.ndarray:
    """Random units that can go together; the first always does."""
    removed = np.random.default_rng(seed).random(structure.units) < share
    removed[0] = True
    for members, least in structure.minimums:
        short = least - int((~removed[members]).sum())
        if short > 0:
            removed[members[removed[members]][:short]] = False
    return equalized(structure, removed)


def removed_like_zeros(model: onnx.ModelProto, share: float = 0.4, seed: int = 7) -> Structure:
    """Remove random units, and hold the smaller model to the original with these units multiplied by zero."""
    structure = traced(model)
    removed = removal(structure, share, seed)
    assert removed.any()
    smaller, data = rewrite(structure, Removal(removed), "test").proto, feed(model)
    got, want = run(smaller, data), run(ignoring(structure, removed), data)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4 * np.abs(other).max() + 1e-7)
    # The negative control: these units do matter to the original model.
    assert any(not np.allclose(one, original, rtol=1e-3) for one, original in zip(got, run(model, data), strict=True))
    return structure

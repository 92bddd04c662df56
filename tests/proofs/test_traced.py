"""What a model alone says, by its names of today and of version 0.1."""

from __future__ import annotations

from build import build

import lindep_onnx

NET = build("h = MatMul(x, w)\nr = Relu(h)\ny = MatMul(r, v)", {"w": (4, 6), "v": (6, 2)}, x=("N", 4))


def test_names_of_version_0_1_still_work() -> None:
    traced = lindep_onnx.trace(NET)
    assert isinstance(traced, lindep_onnx.Understood)
    assert traced.channels is traced.structure and traced.structure.units == 6
    with lindep_onnx.calibrate(traced, None, proven_only=True) as calibrated:
        assert calibrated.understood is calibrated.traced is traced

"""What a model has to be before anything reads it."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from build import build

from lindep_onnx.errors import VerificationError
from lindep_onnx.model.checks import check_model, full_check_passes


def test_stale_shapes_fail_the_check_only_if_the_original_passed(tmp_path: Path) -> None:
    model = build("h = Gemm(x, w)\ny = Relu(h)", {"w": (6, 5)}, x=("N", 6))
    assert full_check_passes(model) is None
    check_model(model, original_passed=True)
    stale = onnx.ModelProto()
    stale.CopyFrom(model)
    stale.graph.value_info.append(onnx.helper.make_tensor_value_info("h", onnx.TensorProto.FLOAT, ["N", 9]))
    onnx.save(stale, tmp_path / "stale.onnx")
    for given in (stale, tmp_path / "stale.onnx"):
        line = full_check_passes(given)
        assert line and "\n" not in line
        with pytest.raises(VerificationError, match="fails the ONNX checker"):
            check_model(given, original_passed=True)
        check_model(given, original_passed=False)

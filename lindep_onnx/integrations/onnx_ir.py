"""A pass for pipelines of onnx-ir: `ir.passes.Sequential(..., CompressPass(data, params=0.5))`."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from lindep_onnx.api import compress
from lindep_onnx.report.values import Report


class CompressPass(ir.passes.FunctionalPass):  # type: ignore[misc, unused-ignore]
    """Remove channels that are linear combinations of others.

    The model that goes in stays as it is. Symbolic names of dimensions, metadata and documentation survive.

    Attributes:
        report: of the last model that went through; None before.

    Args:
        calib: calibration data, as `lindep_onnx.compress` takes it; it is read anew for each model.
        **options: fields of `lindep_onnx.Config`, and `stress`.
    """

    def __init__(self, calib: Any = None, **options: Any) -> None:
        super().__init__()
        self.report: Report | None = None
        self._calib, self._options = calib, options

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Compress one model.

        Raises:
            LindepError: as `lindep_onnx.compress`.
        """
        result = compress(ir.to_proto(model), self._calib, **self._options)
        self.report = result.report
        return ir.passes.PassResult(ir.from_proto(result.model), modified=bool(result.report.changed))

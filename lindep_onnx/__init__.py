"""Make a trained ONNX model smaller and faster by removing linearly dependent channels."""

from __future__ import annotations

from lindep_onnx._version import __version__
from lindep_onnx.api import Calibrated, Result, Understood, apply, calibrate, compress, plan, trace
from lindep_onnx.errors import (
    BudgetError,
    CalibrationError,
    LindepError,
    ModelError,
    OutputError,
    UsageError,
    VerificationError,
)
from lindep_onnx.options import Config
from lindep_onnx.planning.plan_file import Plan

__all__ = [
    "BudgetError",
    "Calibrated",
    "CalibrationError",
    "Config",
    "LindepError",
    "ModelError",
    "OutputError",
    "Plan",
    "Result",
    "Understood",
    "UsageError",
    "VerificationError",
    "__version__",
    "apply",
    "calibrate",
    "compress",
    "plan",
    "trace",
]

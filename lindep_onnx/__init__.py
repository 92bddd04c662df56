"""Make a trained ONNX model smaller and faster by removing linearly dependent channels."""

from __future__ import annotations

from lindep_onnx._version import __version__
from lindep_onnx.api import Result, apply, calibrate, compress, plan, trace
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
from lindep_onnx.pipeline import Calibrated
from lindep_onnx.planning.plan_file import Plan
from lindep_onnx.proofs.traced import TracedModel

#: Its name up to version 0.1.
Understood = TracedModel

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
    "TracedModel",
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

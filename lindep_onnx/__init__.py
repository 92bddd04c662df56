"""Make a trained ONNX model smaller and faster by removing linearly dependent channels."""

from __future__ import annotations

from lindep_onnx._version import __version__
from lindep_onnx.api import Result, apply, calibrate, compare, compress, inspect, plan, sweep, trace
from lindep_onnx.errors import (
    BudgetError,
    CalibrationError,
    LindepError,
    ModelError,
    OutputError,
    UsageError,
    VerificationError,
)
from lindep_onnx.inspection import Inspection
from lindep_onnx.options import Config
from lindep_onnx.pipeline import Calibrated
from lindep_onnx.planning.plan_file import Plan
from lindep_onnx.proofs.traced import TracedModel
from lindep_onnx.sweeping import Sweep

#: Its name up to version 0.1.
Understood = TracedModel

__all__ = [
    "BudgetError",
    "Calibrated",
    "CalibrationError",
    "Config",
    "Inspection",
    "LindepError",
    "ModelError",
    "OutputError",
    "Plan",
    "Result",
    "Sweep",
    "TracedModel",
    "Understood",
    "UsageError",
    "VerificationError",
    "__version__",
    "apply",
    "calibrate",
    "compare",
    "compress",
    "inspect",
    "plan",
    "sweep",
    "trace",
]

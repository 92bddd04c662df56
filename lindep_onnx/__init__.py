"""Make a trained ONNX model smaller and faster by removing linearly dependent channels."""

from __future__ import annotations

from lindep_onnx._version import __version__
from lindep_onnx.api import Result, compress
from lindep_onnx.config import Config
from lindep_onnx.errors import (
    BudgetError,
    CalibrationError,
    LindepError,
    ModelError,
    OutputError,
    UsageError,
    VerificationError,
)

__all__ = [
    "BudgetError",
    "CalibrationError",
    "Config",
    "LindepError",
    "ModelError",
    "OutputError",
    "Result",
    "UsageError",
    "VerificationError",
    "__version__",
    "compress",
]

"""Make a trained ONNX model smaller and faster by removing linearly dependent channels."""

from __future__ import annotations

from lindep_onnx._version import __version__

__all__ = ["__version__"]

"""What each operator does to gradients: one file per behaviour, one registry.

Sources: a convolution is linear in its data and in its weight, so that both gradients are its adjoints: of the data a
transposed convolution, of the weight the product of the output gradient with the patches (Goodfellow, Bengio and
Courville, "Deep Learning", 9.5). The others are derivatives of the formulas in the ONNX operator documentation.
"""

from __future__ import annotations

from lindep_onnx.distill.autodiff.rules import elementwise, linear, normalization, pooling, reshape
from lindep_onnx.distill.autodiff.rules.registry import FLAT, RULES

__all__ = ["FLAT", "RULES", "elementwise", "linear", "normalization", "pooling", "reshape"]

"""What each operator does to channels: one file per behaviour, one registry.

A tracing rule reads the labellings of a node's inputs and writes those of its outputs through a
`structure.tracer.Tracer`; a rewriting rule, for the few operators that hold sizes or indices, adjusts the node through
a `structure.edit_builder.EditBuilder`. An operator without a tracing rule is a refusal.
"""

from __future__ import annotations

from lindep_onnx.structure.rules import elementwise, join, linear, normalization, pooling, recurrent, reshape, scatter
from lindep_onnx.structure.rules.registry import rewriting_rule, supported, tracing_rule

__all__ = ["elementwise", "join", "linear", "normalization", "pooling", "recurrent", "reshape", "scatter"]
__all__ += ["rewriting_rule", "supported", "tracing_rule"]

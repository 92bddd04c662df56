"""The table of operator rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from lindep_onnx.channels import Reason, Tracer
from lindep_onnx.draft import Draft
from lindep_onnx.graph import Node

__all__ = ["UNKNOWN", "Rewriting", "Tracing", "rewrites", "rewriting_rule", "supported", "traces", "tracing_rule"]

Tracing: TypeAlias = Callable[[Node, Tracer], None]
Rewriting: TypeAlias = Callable[[Node, Draft], None]

UNKNOWN = Reason("unknown_operator", "an operator without a rule reads them")

_TRACING: dict[str, Tracing] = {}
_REWRITING: dict[str, Rewriting] = {}


def traces(*ops: str) -> Callable[[Tracing], Tracing]:
    """Register a tracing rule for some operator types."""

    def register(rule: Tracing) -> Tracing:
        for op in ops:
            if op in _TRACING:
                raise KeyError(f"two tracing rules for {op}")
            _TRACING[op] = rule
        return rule

    return register


def rewrites(*ops: str) -> Callable[[Rewriting], Rewriting]:
    """Register a rewriting rule for some operator types."""

    def register(rule: Rewriting) -> Rewriting:
        for op in ops:
            if op in _REWRITING:
                raise KeyError(f"two rewriting rules for {op}")
            _REWRITING[op] = rule
        return rule

    return register


def tracing_rule(op: str) -> Tracing | None:
    """The tracing rule of an operator type, None where there is none."""
    return _TRACING.get(op)


def rewriting_rule(op: str) -> Rewriting | None:
    """The rewriting rule of an operator type, None where the node itself stays as it is."""
    return _REWRITING.get(op)


def supported() -> tuple[str, ...]:
    """All operator types that have a tracing rule, sorted."""
    return tuple(sorted(_TRACING))

"""The table of operator rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

from lindep_onnx.model.node import Node
from lindep_onnx.structure.edit_builder import EditBuilder
from lindep_onnx.structure.tracer import Tracer

Tracing: TypeAlias = Callable[[Node, Tracer], None]
Rewriting: TypeAlias = Callable[[Node, EditBuilder], None]
Rule = TypeVar("Rule", bound=Callable[..., Any])

_TRACING: dict[str, Tracing] = {}
_REWRITING: dict[str, Rewriting] = {}


def registering(rules: dict[str, Rule], ops: Sequence[str]) -> Callable[[Rule], Rule]:
    """A decorator that enters a rule into a table, for each of some operator types.

    Raises:
        KeyError: when it is applied, if one of them has a rule already.
    """

    def register(rule: Rule) -> Rule:
        for op in ops:
            if op in rules:
                raise KeyError(f"two rules for {op}")
            rules[op] = rule
        return rule

    return register


def traces(*ops: str) -> Callable[[Tracing], Tracing]:
    """Register a tracing rule for some operator types."""
    return registering(_TRACING, ops)


def rewrites(*ops: str) -> Callable[[Rewriting], Rewriting]:
    """Register a rewriting rule for some operator types."""
    return registering(_REWRITING, ops)


def tracing_rule(op: str) -> Tracing | None:
    """The tracing rule of an operator type, None where there is none."""
    return _TRACING.get(op)


def rewriting_rule(op: str) -> Rewriting | None:
    """The rewriting rule of an operator type, None where the node itself stays as it is."""
    return _REWRITING.get(op)


def supported() -> tuple[str, ...]:
    """All operator types that have a tracing rule, sorted."""
    return tuple(sorted(_TRACING))

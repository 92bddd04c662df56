"""The table of gradient rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeAlias

from lindep_onnx.distill.autodiff.tape import Tape, Unsupported
from lindep_onnx.model.node import Node
from lindep_onnx.structure.rules.registry import registering

#: Called with the node, the gradient of each output (None where nothing reads it), the positions of the inputs whose
#: gradients are wanted, and the tape; returns gradients by position.
Rule: TypeAlias = Callable[[Node, Sequence["str | None"], frozenset[int], Tape], Mapping[int, str]]
#: Called with the node, the gradient of its output and the tape; writes the gradient of the first input.
DataRule: TypeAlias = Callable[[Node, str, Tape], str]
#: The same for several inputs: what writes the gradient of each, called for those that are wanted, in this order.
InputsRule: TypeAlias = Callable[[Node, str, Tape], Mapping[int, Callable[[], str]]]

RULES: dict[str, Rule] = {}

#: Operators whose outputs do not change under small changes of their inputs: nothing flows back through them.
FLAT = frozenset([
    "And", "ArgMax", "ArgMin", "Ceil", "ConstantOfShape", "Equal", "Floor", "Greater", "GreaterOrEqual", "IsInf",
    "IsNaN", "Less", "LessOrEqual", "NonZero", "Not", "Or", "Round", "Shape", "Sign", "Size", "Xor",
])  # fmt: skip


def gradient_of_data(*ops: str, others: str = "") -> Callable[[DataRule], DataRule]:
    """Register a rule for operators that pass gradients to their first input only.

    Args:
        ops: operator types.
        others: why no gradient of another input can be had; empty where none can be asked for.
    """

    def register(rule: DataRule) -> DataRule:
        def inputs(node: Node, dy: str, tape: Tape) -> Mapping[int, Callable[[], str]]:
            return {0: partial(rule, node, dy, tape)}

        gradients_of_inputs(*ops, others=others)(inputs)
        return rule

    return register


def gradients_of_inputs(*ops: str, others: str = "") -> Callable[[InputsRule], InputsRule]:
    """Register a rule for operators that pass gradients to several inputs.

    Args:
        ops: operator types.
        others: why no gradient of the inputs that a rule leaves out can be had; empty where none can be asked for.
    """

    def register(rule: InputsRule) -> InputsRule:
        def full(node: Node, given: Sequence[str | None], wanted: frozenset[int], tape: Tape) -> Mapping[int, str]:
            found = rule(node, _only(given), tape)
            if others and wanted - found.keys():
                raise Unsupported(others)
            return {position: write() for position, write in found.items() if position in wanted}

        registering(RULES, ops)(full)
        return rule

    return register


def _only(given: Sequence[str | None]) -> str:
    """The gradient of the first output, where no other output may carry one."""
    if given[0] is None or any(name is not None for name in given[1:]):
        raise Unsupported("an output other than the first is read")
    return given[0]


def axis_of(node: Node, default: int, rank: int) -> int:
    """The `axis` of a node, not negative."""
    return int(node.attributes.get("axis", default)) % rank

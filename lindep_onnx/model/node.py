"""One operator call, as every other module sees it."""

from __future__ import annotations

import itertools
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Node:
    """One operator call.

    Attributes:
        index: place in the topological order.
        op: operator type; operators outside the default domain read `domain::type`.
        name: the name in the file, or one made from the operator and its first output.
        inputs: tensor names; an absent optional input is the empty string.
        outputs: tensor names; an absent optional output is the empty string.
        attributes: decoded attribute values; tensors as arrays.
        captures: tensors of this graph that sub-graphs of the node read.
    """

    index: int
    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    captures: tuple[str, ...]

    def input(self, position: int) -> str:
        """Name of the input at `position`, empty where it is absent."""
        return self.inputs[position] if position < len(self.inputs) else ""


def unused(base: str, taken: Container[str]) -> str:
    """A name that nothing has yet: the base, or with the first number behind it that is free."""
    numbered = (f"{base}_{number}" for number in itertools.count(1))
    return next(name for name in itertools.chain([base], numbered) if name not in taken)

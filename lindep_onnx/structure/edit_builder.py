"""Edits in the making: what the rewriting rules of the operators read and write."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lindep_onnx.model.edit import GraphEdits, Insertion
from lindep_onnx.model.node import Node
from lindep_onnx.model.shapes import Shape
from lindep_onnx.structure.placement import Placement
from lindep_onnx.structure.types import Structure

Array: TypeAlias = NDArray[Any]


class EditBuilder:
    """Collects the changes that removing units asks of the nodes. It lives inside `lindep_onnx.structure.rewrite` only.

    Attributes:
        structure: the traced model.
        model, shape_info: of the structure.
        placement: what goes, and where the others sit then.
    """

    def __init__(self, structure: Structure, removed: NDArray[np.bool_]) -> None:
        self.structure, self.model, self.shape_info = structure, structure.model, structure.shape_info
        self.placement = Placement(structure, removed)
        self._constants: dict[str, Array] = {}
        self._inputs: dict[tuple[int, int], str | Array] = {}
        self._attributes: dict[tuple[int, str], Any] = {}
        self._ops: dict[int, str] = {}
        self._dropped: dict[int, int] = {}
        self._before: dict[int, list[Insertion]] = {}
        self._after: dict[str, Insertion] = {}
        self._elements: dict[tuple[int, int], dict[int, int]] = {}

    def kept(self, tensor: str) -> dict[int, NDArray[np.bool_]]:
        """Masks of what survives, for the axes of a tensor that lose something."""
        return self.placement.kept(tensor)

    def constant(self, name: str) -> Array | None:
        """Original value of a constant tensor, None for others."""
        return self.shape_info.constants.get(name)

    def shape(self, name: str) -> Shape:
        """Original shape."""
        return self.shape_info.shapes[name]

    def new_sizes(self, tensor: str) -> dict[int, int]:
        """How many places are left on the axes of a tensor that lose something."""
        return {axis: int(mask.sum()) for axis, mask in self.kept(tensor).items()}

    def new_shape(self, name: str) -> Shape:
        """Shape once the units are gone."""
        sizes = self.new_sizes(name)
        return tuple(sizes.get(axis, size) for axis, size in enumerate(self.shape(name)))

    def set_constant(self, name: str, value: Array) -> None:
        """Replace a constant for all of its readers."""
        self._constants[name] = value

    def set_input(self, node: Node, position: int, value: str | Array) -> None:
        """Let one input read another tensor, or a constant of its own."""
        self._inputs[node.index, position] = value

    def set_attribute(self, node: Node, name: str, value: Any) -> None:
        """Set an attribute; None takes it away."""
        self._attributes[node.index, name] = value

    def set_integers(self, node: Node, position: int, name: str, values: list[int], *, since: int) -> None:
        """Set what is an input from the operator set `since` on, and an attribute before."""
        if self.model.opset >= since:
            self.set_input(node, position, np.array(values, dtype=np.int64))
        else:
            self.set_attribute(node, name, values)

    def set_op(self, node: Node, op: str, inputs: int) -> None:
        """Turn a node into another operator that has only the first `inputs` inputs."""
        self._ops[node.index] = op
        self._dropped[node.index] = inputs

    def insert_before(self, node: Node, insertion: Insertion) -> None:
        """Put a node right before another."""
        self._before.setdefault(node.index, []).append(insertion)

    def insert_after(self, tensor: str, insertion: Insertion) -> None:
        """Put a node between a tensor and all of its readers."""
        self._after[tensor] = insertion

    def set_elements(self, node: Node, position: int, elements: Mapping[int, int]) -> None:
        """Change some elements of an integer vector that a node reads as a shape; later calls win.

        A constant vector is replaced. One that is computed at run time keeps its other elements: two inserted nodes
        mask out the old numbers and add the new ones.
        """
        if elements:
            self._elements.setdefault((node.index, position), {}).update(elements)

    def _apply_elements(self) -> None:
        for (index, position), elements in self._elements.items():
            node = self.model.nodes[index]
            name = node.input(position)
            value = self.constant(name)
            places, numbers = list(elements), list(elements.values())
            if value is not None:
                changed = value.copy()
                changed[places] = numbers
                if (changed != value).any():
                    self.set_input(node, position, changed)
                continue
            (size,) = self.shape(name)
            mask, new = np.ones(int(size), np.int64), np.zeros(int(size), np.int64)
            mask[places], new[places] = 0, numbers
            base = f"{name}_for_{node.outputs[0]}"
            self.insert_before(node, Insertion("Mul", (name, mask), base + "_masked"))
            self.insert_before(node, Insertion("Add", (base + "_masked", new), base))
            self.set_input(node, position, base)
        self._elements.clear()

    def edits(self) -> GraphEdits:
        """Everything collected so far, and the new sizes."""
        self._apply_elements()
        dims = {(name, axis): size for name in self.structure.labels for axis, size in self.new_sizes(name).items()}
        changed = self._constants, self._inputs, self._attributes, self._ops, self._dropped
        return GraphEdits(*changed, self._before, self._after, dims)

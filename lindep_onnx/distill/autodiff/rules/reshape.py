"""Operators that move elements and compute nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from lindep_onnx.distill.autodiff.rules.registry import RULES, axis_of, gradient_of_data, gradients_of_inputs
from lindep_onnx.distill.autodiff.tape import Tape, Unsupported
from lindep_onnx.model.node import Node
from lindep_onnx.structure.rules.registry import registering


@gradient_of_data("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def _reshaped(node: Node, dy: str, tape: Tape) -> str:
    return tape.reshape(dy, tape.shape(node.inputs[0]))


@gradient_of_data("Transpose")
def _transposed(node: Node, dy: str, tape: Tape) -> str:
    rank = len(tape.shape(node.inputs[0]))
    return tape.transpose(dy, np.argsort(list(node.attributes.get("perm", range(rank)[::-1]))).tolist())


@gradient_of_data("Expand")
def _expanded(node: Node, dy: str, tape: Tape) -> str:
    return tape.unbroadcast(dy, tape.shape(node.outputs[0]), tape.shape(node.inputs[0]))


@gradients_of_inputs("Concat")
def _concatenated(node: Node, dy: str, tape: Tape) -> Mapping[int, Callable[[], str]]:
    axis = axis_of(node, 0, len(tape.shape(node.outputs[0])))
    ends = np.cumsum([0, *(tape.shape(name)[axis] for name in node.inputs)]).tolist()

    def part(position: int) -> Callable[[], str]:
        return lambda: tape.Slice(dy, [ends[position]], [ends[position + 1]], [axis])

    return {position: part(position) for position in range(len(node.inputs))}


@registering(RULES, ["Split"])
def _split(node: Node, given: Sequence[str | None], wanted: frozenset[int], tape: Tape) -> Mapping[int, str]:
    parts = [
        name if name is not None else tape.constant(np.zeros(tape.shape(output), tape.dtype))
        for name, output in zip(given, node.outputs, strict=True)
    ]
    return {0: tape.Concat(*parts, axis=axis_of(node, 0, len(tape.shape(node.inputs[0]))))}


@gradient_of_data("Slice")
def _sliced(node: Node, dy: str, tape: Tape) -> str:
    shape, out = tape.shape(node.inputs[0]), list(tape.shape(node.outputs[0]))
    starts, ends = tape.integers(node, 1, ()), tape.integers(node, 2, ())
    axes = tape.integers(node, 3, range(len(starts)))
    steps = tape.integers(node, 4, [1] * len(starts))
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        size = shape[axis]
        # Bounds beyond the axis mean its end, as in Python; -1 of a negative step has no Python form but None.
        stop = None if step < 0 and end < -size else end
        dy = tape.pick_back(dy, out, axis % len(shape), np.arange(size)[start:stop:step], size)
        out[axis] = size
    return dy


@gradient_of_data("Gather")
def _gathered(node: Node, dy: str, tape: Tape) -> str:
    shape = tape.shape(node.inputs[0])
    axis = axis_of(node, 0, len(shape))
    picked = tape.required(node.inputs[1]).ravel()
    flat = [*shape[:axis], picked.size, *shape[axis + 1 :]]
    return tape.pick_back(tape.reshape(dy, flat), flat, axis, picked % shape[axis], shape[axis])


@gradient_of_data("Pad", others="what it pads with depends on a weight")
def _padded(node: Node, dy: str, tape: Tape) -> str:
    if node.attributes.get("mode", "constant") != "constant" or node.input(3):
        raise Unsupported("it repeats what is there, or names its axes")
    shape, pads = tape.shape(node.inputs[0]), tape.integers(node, 1, ())
    if min(pads) < 0:
        raise Unsupported("it cuts")
    before = pads[: len(shape)]
    return tape.Slice(dy, before, np.add(before, shape), list(range(len(shape))))

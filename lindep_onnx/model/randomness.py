"""Models that draw random numbers: fixed ones take their place wherever a model is run to be looked at or compared.

Else the original differs from itself, and no result could be held against it. The fixed numbers depend on nothing but
their place in the tensor (a hash of it, and Box and Muller's transform for normal ones), so that they are the same in
every model whose tensor has the same shape, and in a part of a model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from lindep_onnx.model.weights import graphs

#: Operators that draw, those of them that cannot be repeated last.
REPEATED = ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli")
DRAWING = (*REPEATED, "Multinomial")
#: The operators that fixed numbers are made with are there from here on.
OPSET = 11


def notes_of(proto: onnx.ModelProto) -> tuple[str, ...]:
    """What the user should know of a model that draws; nothing of any other."""
    found = [node.op_type for graph in graphs(proto.graph) for node in graph.node if _draws(node, DRAWING)]
    if not found:
        return ()
    kinds = ", ".join(dict.fromkeys(found))
    left = [kind for kind in found if kind not in REPEATED or _opset(proto) < OPSET]
    if left:
        return (
            f"The model draws random numbers ({kinds}) that cannot be fixed ({', '.join(dict.fromkeys(left))}): two "
            "runs differ, and so do original and result.",
        )
    return (f"The model draws random numbers ({kinds}): it was compared with fixed ones in their place.",)


def draws(proto: onnx.ModelProto) -> bool:
    """Whether a model draws random numbers."""
    return bool(notes_of(proto))


def repeatable(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model itself if it draws nothing, else a copy with fixed numbers in the place of random ones."""
    if _opset(proto) < OPSET or not any(_draws(node, REPEATED) for graph in graphs(proto.graph) for node in graph.node):
        return proto
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for graph in reversed(list(graphs(copy.graph))):
        placed = [
            put for node in graph.node for put in (_fixed(node, _opset(proto)) if _draws(node, REPEATED) else [node])
        ]
        rest = onnx.GraphProto(node=placed)
        del graph.node[:]
        graph.node.extend(rest.node)
    return copy


def _opset(proto: onnx.ModelProto) -> int:
    return next((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), 0)


def _draws(node: onnx.NodeProto, ops: tuple[str, ...]) -> bool:
    return node.op_type in ops and node.domain in ("", "ai.onnx")


def _fixed(node: onnx.NodeProto, opset: int) -> Iterator[onnx.NodeProto]:
    """Nodes that put out fixed numbers in the place of a node that draws."""
    given = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    name = f"lindep_onnx_fixed_{node.output[0]}_"

    def put(op: str, *inputs: str, to: str, **attributes: Any) -> onnx.NodeProto:
        return helper.make_node(op, list(inputs), [name + to], **attributes)

    def constant(to: str, value: object) -> onnx.NodeProto:
        return put("Constant", to=to, value=numpy_helper.from_array(np.asarray(value)))

    like = node.op_type.endswith("Like") or node.op_type == "Bernoulli"
    if like:
        yield put("Shape", node.input[0], to="shape")
    else:
        yield constant("shape", np.array(given["shape"], np.int64))
    yield put("ReduceProd", name + "shape", to="size", keepdims=0)
    yield from (constant(to, np.int64(value)) for to, value in (("zero", 0), ("one", 1)))
    yield put("Range", name + "zero", name + "size", name + "one", to="places")
    yield helper.make_node("Cast", [name + "places"], [name + "numbers"], to=onnx.TensorProto.DOUBLE)
    yield constant("spread", np.float64(65537.123))
    for number, step in (("1", 0.754877666), ("2", 0.569840296)):  # two steps that fill a square evenly
        yield constant("step" + number, np.float64(step))
        yield put("Mul", name + "numbers", name + "step" + number, to="far" + number)
        yield put("Floor", name + "far" + number, to="whole" + number)
        yield put("Sub", name + "far" + number, name + "whole" + number, to="even" + number)
        # Evenly spread numbers follow from their neighbours; the digits further on of their squares do not.
        yield put("Mul", name + "even" + number, name + "even" + number, to="squared" + number)
        yield put("Mul", name + "squared" + number, name + "spread", to="digits" + number)
        yield put("Floor", name + "digits" + number, to="leading" + number)
        yield put("Sub", name + "digits" + number, name + "leading" + number, to="uniform" + number)
    low, high = (0.0, 1.0) if node.op_type == "Bernoulli" else (float(given.get("low", 0)), float(given.get("high", 1)))
    last, scale, shift = "uniform1", high - low, low
    if "Normal" in node.op_type:
        yield from _normal(name)
        last, scale, shift = "normal", float(given.get("scale", 1)), float(given.get("mean", 0))
    yield from (constant(to, np.float64(value)) for to, value in (("scale", scale), ("shift", shift)))
    yield put("Mul", name + last, name + "scale", to="scaled")
    yield put("Add", name + "scaled", name + "shift", to="shifted")
    yield put("Reshape", name + "shifted", name + "shape", to="shaped")
    source = name + "shaped"
    if node.op_type == "Bernoulli":
        yield helper.make_node("Cast", [node.input[0]], [name + "chance"], to=onnx.TensorProto.DOUBLE)
        yield put("Less", source, name + "chance", to="drawn")
        source = name + "drawn"
    if "dtype" not in given and like and opset >= 15:
        yield helper.make_node("CastLike", [source, node.input[0]], [node.output[0]], node.name)
    else:
        kind = given.get("dtype", onnx.TensorProto.FLOAT)
        yield helper.make_node("Cast", [source], [node.output[0]], node.name, to=kind)


def _normal(name: str) -> Iterator[onnx.NodeProto]:
    """Normal numbers from two uniform ones: sqrt(-2 log u) cos(2 pi v)."""
    for to, value in (("tiny", 1e-9), ("minus_two", -2.0), ("turn", 2 * math.pi)):
        yield helper.make_node("Constant", [], [name + to], value=numpy_helper.from_array(np.asarray(value)))
    steps = (
        ("Max", ("uniform1", "tiny"), "above"), ("Log", ("above",), "log"), ("Mul", ("log", "minus_two"), "square"),
        ("Sqrt", ("square",), "radius"), ("Mul", ("uniform2", "turn"), "angle"), ("Cast", ("angle",), "angle32"),
        ("Cos", ("angle32",), "cosine32"), ("Cast", ("cosine32",), "cosine"), ("Mul", ("radius", "cosine"), "normal"),
    )  # fmt: skip
    for op, inputs, to in steps:
        kinds = {"angle32": onnx.TensorProto.FLOAT, "cosine": onnx.TensorProto.DOUBLE}
        more: dict[str, Any] = {"to": kinds[to]} if op == "Cast" else {}
        yield helper.make_node(op, [name + read for read in inputs], [name + to], **more)

"""Operators into which ONNX Runtime fuses others when it optimizes a model, written out as the standard ones again.

A file that was saved after such an optimization has them. Channels pass through what they fuse by rules that are known,
and ONNX Runtime fuses the result again when it loads it. What is not written out here stays, by its name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx

from lindep_onnx.model.ir import Model, model_of
from lindep_onnx.model.node import unused

DOMAIN = "com.microsoft"
#: From which version of the standard operators on these are among them.
LAYER_NORMALIZATION, GELU = 17, 20
#: Attributes of an activation inside another operator, in the order of `activation_params`.
_PARAMETERS: Mapping[str, tuple[tuple[str, float], ...]] = {
    **dict.fromkeys(("Relu", "Sigmoid", "Tanh"), ()),
    "LeakyRelu": (("alpha", 0.01),),
    "HardSigmoid": (("alpha", 0.2), ("beta", 0.5)),
    "Clip": (("min", float(np.finfo(np.float32).min)), ("max", float(np.finfo(np.float32).max))),
}
_Rule: TypeAlias = "Callable[[_Writer], bool]"


def fused_operators(model: Model) -> tuple[str, ...]:
    """The fused operators of a model that `written_out` takes apart, sorted."""
    return tuple(
        sorted({node.op for node in model.nodes if node.op.removeprefix(f"{DOMAIN}::") in _RULES and "::" in node.op})
    )


def written_out(model: Model) -> Model:
    """A copy in which fused operators are the standard ones that they fuse; the model itself where there are none."""
    if not fused_operators(model):
        return model
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    taken = {name for node in proto.graph.node for name in (*node.input, *node.output)} | set(model.stored)
    nodes: list[onnx.NodeProto] = []
    for node in proto.graph.node:
        writer = _Writer(node, model, taken)
        rule = _RULES.get(node.op_type) if node.domain == DOMAIN else None
        if rule is not None and rule(writer):
            taken.update(name for made in writer.nodes for name in made.output)
            nodes.extend(writer.nodes)
        else:
            nodes.append(onnx.NodeProto.FromString(node.SerializeToString()))
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    return model_of(proto, model.folder)


class _Writer:
    """Writes the nodes that take the place of one."""

    def __init__(self, node: onnx.NodeProto, model: Model, taken: Iterable[str]) -> None:
        self.node, self.model, self._taken = node, model, set(taken)
        self.attributes = {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}
        self.nodes: list[onnx.NodeProto] = []

    def input(self, position: int) -> str:
        return str(self.node.input[position]) if position < len(self.node.input) else ""

    def add(self, op: str, inputs: Sequence[str | float], output: str = "", **attributes: Any) -> str:
        """One more node; without an output it gets one of its own. Where weights are multiplied, the name is kept."""
        names = [self._constant(value) if isinstance(value, float) else value for value in inputs]
        while names and not names[-1]:
            names.pop()
        output = output or self._unused(op)
        name = self.node.name if op in ("Conv", "Gemm", "MatMul") else ""
        self.nodes.append(onnx.helper.make_node(op, names, [output], name=name, **attributes))
        return output

    def _constant(self, value: float) -> str:
        name = self._unused("value")
        tensor = onnx.numpy_helper.from_array(np.array(value, dtype=np.float32), name)
        self.nodes.append(onnx.helper.make_node("Constant", [], [name], value=tensor))
        return name

    def _unused(self, word: str) -> str:
        name = unused(f"{self.node.output[0]}_{word}", self._taken)
        self._taken.add(name)
        return name


def _activated(writer: _Writer, source: str, name: str, values: Sequence[float]) -> None:
    """The activation of what a fused node computes, as its output."""
    given = {key: float(value) for (key, _), value in zip(_PARAMETERS[name], values, strict=False)}
    options = {key: given.get(key, default) for key, default in _PARAMETERS[name]}
    if name == "Clip" and writer.model.opset >= 11:
        writer.add(name, [source, *options.values()], writer.node.output[0])
    else:
        writer.add(name, [source], writer.node.output[0], **options)


def _convolution(writer: _Writer) -> bool:
    own = {key: value for key, value in writer.attributes.items() if not key.startswith("activation")}
    activation = writer.attributes.get("activation", b"").decode()
    if activation and activation not in _PARAMETERS:
        return False
    added = writer.input(3)
    result = writer.node.output[0]
    made = writer.add("Conv", [writer.input(place) for place in range(3)], "" if activation or added else result, **own)
    if added:
        made = writer.add("Add", [made, added], "" if activation else result)
    if activation:
        _activated(writer, made, activation, writer.attributes.get("activation_params", ()))
    return True


def _gemm(writer: _Writer) -> bool:
    own = {key: value for key, value in writer.attributes.items() if not key.startswith("activation")}
    activation = writer.attributes.get("activation", b"").decode()
    if activation not in ("", *_PARAMETERS) or activation == "Clip":
        return False
    inputs = [writer.input(place) for place in range(3)]
    made = writer.add("Gemm", inputs, "" if activation else writer.node.output[0], **own)
    if activation:
        named = {key: writer.attributes.get(f"activation_{key}", default) for key, default in _PARAMETERS[activation]}
        _activated(writer, made, activation, list(named.values()))
    return True


def _product(writer: _Writer) -> bool:
    """A factor that is transposed has to be a stored matrix, whose axes are known to be two."""
    read = writer.attributes.get
    if read("transBatchA", 0) or read("transBatchB", 0):
        return False
    factors = [writer.input(0), writer.input(1)]
    turned = [bool(read(key, 0)) for key in ("transA", "transB")]
    stored = [writer.model.stored.get(name) for name in factors]
    if any(turn and (value is None or value.ndim != 2) for turn, value in zip(turned, stored, strict=True)):
        return False
    result, scale = writer.node.output[0], float(read("alpha", 1.0))
    factors = [
        writer.add("Transpose", [one], perm=[1, 0]) if turn else one for one, turn in zip(factors, turned, strict=True)
    ]
    made = writer.add("MatMul", factors, "" if scale != 1 else result)
    if scale != 1:
        writer.add("Mul", [made, scale], result)
    return True


def _biased(writer: _Writer) -> str:
    return writer.add("Add", [writer.input(0), writer.input(1)]) if writer.input(1) else writer.input(0)


def _gelu(writer: _Writer) -> bool:
    source, result = _biased(writer), writer.node.output[0]
    if writer.model.opset >= GELU:
        writer.add("Gelu", [source], result)
        return True
    share = writer.add("Erf", [writer.add("Mul", [source, math.sqrt(0.5)])])
    writer.add("Mul", [source, writer.add("Mul", [writer.add("Add", [share, 1.0]), 0.5])], result)
    return True


def _fast_gelu(writer: _Writer) -> bool:
    source, result = _biased(writer), writer.node.output[0]
    if writer.model.opset >= GELU:
        writer.add("Gelu", [source], result, approximate="tanh")
        return True
    square = writer.add("Mul", [source, source])
    inner = writer.add("Mul", [source, writer.add("Add", [writer.add("Mul", [square, 0.044715]), 1.0])])
    share = writer.add("Tanh", [writer.add("Mul", [inner, math.sqrt(2 / math.pi)])])
    writer.add("Mul", [source, writer.add("Mul", [writer.add("Add", [share, 1.0]), 0.5])], result)
    return True


def _quick_gelu(writer: _Writer) -> bool:
    source, alpha = writer.input(0), float(writer.attributes.get("alpha", 1.702))
    gate = writer.add("Sigmoid", [writer.add("Mul", [source, alpha])])
    writer.add("Mul", [source, gate], writer.node.output[0])
    return True


def _skip_normalization(writer: _Writer) -> bool:
    outputs = [*writer.node.output, "", "", ""]
    if writer.model.opset < LAYER_NORMALIZATION or outputs[1] or outputs[2]:
        return False
    bias = writer.input(4)
    total = writer.add("Add", [writer.input(0), writer.input(1)], "" if bias else outputs[3])
    total = writer.add("Add", [total, bias], outputs[3]) if bias else total
    epsilon = float(writer.attributes.get("epsilon", 1e-12))
    writer.add("LayerNormalization", [total, writer.input(2), writer.input(3)], outputs[0], axis=-1, epsilon=epsilon)
    return True


_RULES: Mapping[str, _Rule] = {
    "FusedConv": _convolution,
    "FusedGemm": _gemm,
    "FusedMatMul": _product,
    "Gelu": _gelu,
    "BiasGelu": _gelu,
    "FastGelu": _fast_gelu,
    "QuickGelu": _quick_gelu,
    "SkipLayerNormalization": _skip_normalization,
}

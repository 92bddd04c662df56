"""The copy of a model that is worked on: in single precision, and with each weight under one name.

Exporters write weights that modules share as one initializer, and give it another name for every use: through Identity,
or through a Transpose of its own. What is computed in the same way from the same constants is the same, so all of its
readers read one of them. A weight that is stored in half precision and widened by a Cast is in single precision
already in the copy, where that Cast is one more name. Operators that ONNX Runtime fused are those that they fuse.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import onnx

from lindep_onnx.model.fused import written_out
from lindep_onnx.model.ir import Model, first_name, model_of
from lindep_onnx.model.node import Node
from lindep_onnx.model.precision import epsilon, to_float32, to_stored_dtype
from lindep_onnx.model.shapes import FOLDABLE

#: Operators whose result follows from the values of their inputs alone.
_FUNCTIONS = FOLDABLE - {"ConstantOfShape", "Expand", "Range", "Shape", "Size", "Tile"}
_Call: TypeAlias = tuple[Any, ...]


def working_copy(model: Model) -> Model:
    """The model as it is worked on; itself where nothing has to be different."""
    # What is written out has no types in the original: half precision, which is rounded by these, stays fused.
    return _with_one_name_each(to_float32(model) if epsilon(model.proto) else written_out(model))


def as_stored(result: Model, original: Model) -> Model:
    """A result that was made from the working copy of a model, with the types that the model stores."""
    return to_stored_dtype(result, original) if epsilon(original.proto) else result


def _with_one_name_each(model: Model) -> Model:
    names = _second_names(model)
    if not names:
        return model
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    kept = set(model.outputs).union(*(node.captures for node in model.nodes))
    idle = {node.outputs for node in model.nodes if all(name in names and name not in kept for name in node.outputs)}
    nodes = []
    for node in proto.graph.node:
        if tuple(node.output) not in idle:
            node.input[:] = [names.get(name, name) for name in node.input]
            nodes.append(node)
    alive = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del proto.graph.node[:]
    proto.graph.node.extend(alive)
    return model_of(proto, model.folder)


def _second_names(model: Model) -> Mapping[str, str]:
    """Floating-point constants that are the same as an earlier one, which stands behind them."""
    kinds = {name: value.dtype for name, value in model.stored.items()}
    names: dict[str, str] = {}
    known: dict[_Call, tuple[str, ...]] = {}
    for node in model.nodes:
        read = [names.get(name, name) for name in node.inputs]
        if node.op not in _FUNCTIONS or node.captures or not all(name in kinds for name in read if name):
            continue
        source = first_name(read)
        kind = (
            np.dtype(onnx.helper.tensor_dtype_to_np_dtype(node.attributes["to"]))
            if node.op == "Cast"
            else kinds[source]
        )
        kinds.update((name, kind) for name in node.outputs if name)
        if kind.kind not in "fV":
            continue
        if node.op == "Identity" or (node.op == "Cast" and kind == kinds[source]):
            same: tuple[str, ...] = (source,)
        else:
            same = known.setdefault(_call(node, read), node.outputs)
        names.update((name, one) for name, one in zip(node.outputs, same, strict=True) if name and one and name != one)
    return names


def _call(node: Node, read: list[str]) -> _Call:
    attributes = (
        (key, value.tobytes() if isinstance(value, np.ndarray) else repr(value))
        for key, value in node.attributes.items()
    )
    return (node.op, tuple(read), len(node.outputs), *sorted(attributes))

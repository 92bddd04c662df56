"""What is known before anything runs: constants behind chains of nodes, tensor shapes, and shape arithmetic.

Exporters compute pads, Reshape targets and Slice bounds with small integer sub-graphs. `resolve` evaluates them:
wholly where everything is constant, element by element where only some dimensions are fixed. A dimension that is
not fixed is a symbol: the name the file gives it, or a fresh name that starts with `?`. Two equal symbols are the
same number; two different ones may be.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from lindep_onnx.model.checks import MAX_DECLARED, impossible_sizes
from lindep_onnx.model.ir import Model, Node

logger = logging.getLogger(__name__)

Array: TypeAlias = NDArray[Any]
Shape: TypeAlias = "tuple[int | str, ...]"

#: Integer tensors up to this size are followed as possible shapes.
SHAPE_VALUE_LIMIT = 4096
#: Constants that nodes make out of nothing (ConstantOfShape, Expand, Range) are evaluated up to this size.
MADE_LIMIT = 1 << 16
#: Arithmetic on whole weights (a scale, a weight norm) is evaluated up to this size.
WEIGHT_LIMIT = 1 << 24

#: Operators that compute the same from the same constants, evaluated by the ONNX reference implementation.
FOLDABLE = frozenset(
    [
        "Abs",
        "Add",
        "And",
        "Cast",
        "Ceil",
        "Concat",
        "ConstantOfShape",
        "Div",
        "Equal",
        "Expand",
        "Flatten",
        "Floor",
        "Gather",
        "Greater",
        "Identity",
        "Less",
        "Max",
        "Min",
        "Mod",
        "Mul",
        "Neg",
        "Not",
        "Or",
        "Pow",
        "Range",
        "Reciprocal",
        "ReduceL2",
        "ReduceMean",
        "ReduceProd",
        "ReduceSum",
        "ReduceSumSquare",
        "Reshape",
        "Shape",
        "Size",
        "Slice",
        "Split",
        "Sqrt",
        "Squeeze",
        "Sub",
        "Tile",
        "Transpose",
        "Unsqueeze",
        "Where",
    ]
)
#: Of these, the ones that only view what is there, and so may be of any size.
REARRANGING = frozenset(["Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"])

#: Operators that give floats in the shape of their input, of which ONNX's inference says nothing.
SCALING = frozenset(["ai.onnx.ml::Normalizer", "ai.onnx.ml::Scaler"])


@dataclass(frozen=True)
class ShapeInfo:
    """All that is known about tensors without running the model.

    Attributes:
        constants: value of every tensor that is the same in every run.
        shapes: shape of every tensor whose rank is known; symbols are strings.
        values: partly known integer tensors as object arrays of int and str.
        dtypes: element type (`onnx.TensorProto.DataType`) of tensors where inference found one.
    """

    constants: Mapping[str, Array]
    shapes: Mapping[str, Shape]
    values: Mapping[str, Array]
    dtypes: Mapping[str, int]

    @property
    def activation_bytes(self) -> int:
        """Of all tensors that one sample makes, in single precision; unknown sizes count as 1."""
        computed = (shape for name, shape in self.shapes.items() if name not in self.constants)
        return 4 * sum(math.prod(size for size in shape[1:] if isinstance(size, int)) for shape in computed)

    def integers(self, name: str) -> list[int | str] | None:
        """Elements of a small integer tensor, flat; symbols where they are not known; None if nothing is known."""
        if name in self.constants:
            return [int(value) for value in np.ravel(self.constants[name])]
        return list(np.ravel(self.values[name])) if name in self.values else None


def resolve(model: Model, inputs: Mapping[str, Shape] = MappingProxyType({})) -> ShapeInfo:
    """Fold constants, infer shapes and follow shape arithmetic, until nothing new is found.

    Args:
        model: the model.
        inputs: shapes of graph inputs to assume instead of the ones the file declares.
    """
    constants: dict[str, Array] = dict(model.stored)
    for name in model.overridable:
        del constants[name]
    symbols = (f"?{number}" for number in itertools.count())
    shapes: dict[str, Shape] = {}
    values: dict[str, Array] = {}
    dtypes: dict[str, int] = {}
    _fold(model, constants)
    for _ in range(8):
        _infer(model, inputs, constants, shapes, dtypes, symbols)
        known = len(constants), len(values), sum(_fixed(shape) for shape in shapes.values())
        values = _follow(model, constants, shapes, dtypes, symbols)
        _fold(model, constants)
        if known == (len(constants), len(values), sum(_fixed(shape) for shape in shapes.values())):
            break
    return ShapeInfo(
        constants=MappingProxyType(constants),
        shapes=MappingProxyType(shapes),
        values=MappingProxyType(values),
        dtypes=MappingProxyType(dtypes),
    )


def _fixed(shape: Shape) -> int:
    return 1 + sum(isinstance(dim, int) for dim in shape)


# ---- whole constants -------------------------------------------------------------------------------------------


def _fold(model: Model, constants: dict[str, Array]) -> None:
    for node in model.nodes:
        if node.op not in FOLDABLE or node.outputs[0] in constants or node.captures:
            continue
        if not all(name in constants for name in node.inputs if name) or _is_filling(model, node):
            continue
        operands = {name: constants[name] for name in node.inputs if name}
        if not _small_enough(node, operands):
            continue
        try:
            results = _evaluate(model, node, operands)
        except Exception:  # the reference implementation raises whatever it likes; the node just stays unknown
            logger.debug("could not evaluate %s", node.name, exc_info=True)
            continue
        constants.update((name, np.asarray(value)) for name, value in zip(node.outputs, results, strict=False) if name)


def _is_filling(model: Model, node: Node) -> bool:
    """Whether a node makes channels of one value to go beside others: as many may go as the others lose."""
    if node.op != "ConstantOfShape":
        return False
    value = np.asarray(node.attributes.get("value", np.float32(0)))
    readers = model.consumers.get(node.outputs[0], ())
    return value.dtype.kind == "f" and bool(readers) and all(reader.op == "Concat" for reader in readers)


def _small_enough(node: Node, operands: Mapping[str, Array]) -> bool:
    if node.op in ("ConstantOfShape", "Expand", "Tile", "Range"):
        target = [abs(int(value)) for name in node.inputs[-1:] for value in np.ravel(operands[name])]
        return math.prod(target) * max(1, operands[node.inputs[0]].size) <= MADE_LIMIT
    return node.op in REARRANGING or all(value.size <= WEIGHT_LIMIT for value in operands.values())


def _evaluate(model: Model, node: Node, operands: Mapping[str, Array]) -> Sequence[Any]:
    inputs = [
        onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in operands.items()
    ]
    outputs = [onnx.helper.make_empty_tensor_value_info(name) for name in node.outputs if name]

    made = onnx.helper.make_node(node.op, node.inputs, node.outputs, **_plain(node.attributes))
    graph = onnx.helper.make_graph([made], "constant", inputs, outputs)
    alone = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", model.opset)])
    return list(ReferenceEvaluator(alone).run(None, dict(operands)))


def _plain(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: onnx.numpy_helper.from_array(value) if isinstance(value, np.ndarray) else value
        for key, value in attributes.items()
    }


# ---- shapes ----------------------------------------------------------------------------------------------------


def _infer(
    model: Model,
    inputs: Mapping[str, Shape],
    constants: Mapping[str, Array],
    shapes: dict[str, Shape],
    dtypes: dict[str, int],
    symbols: Iterator[str],
) -> None:
    """ONNX shape inference on a skeleton: weights become inputs, so that no weight is copied or serialised."""
    for name, value in constants.items():
        shapes[name] = tuple(value.shape)
    skeleton = _skeleton(model, inputs, constants, shapes, dtypes)
    try:
        inferred = onnx.shape_inference.infer_shapes(skeleton, data_prop=True).graph
    except Exception:  # it raises bare RuntimeErrors on graphs it cannot follow; what is unknown stays unknown
        logger.debug("shape inference gave up", exc_info=True)
        inferred = skeleton.graph
    for info in (*inferred.value_info, *inferred.input, *inferred.output):
        tensor = info.type.tensor_type
        if tensor.elem_type:
            dtypes[info.name] = tensor.elem_type
        if tensor.HasField("shape"):
            found = tuple(_dim(dim, symbols) for dim in tensor.shape.dim)
            shapes[info.name] = _merged(shapes.get(info.name), found)
    # What the file says of its inner tensors may be stale: it only completes what follows from the operators.
    for info in model.proto.graph.value_info:
        tensor = info.type.tensor_type
        if tensor.elem_type:
            dtypes.setdefault(info.name, tensor.elem_type)
        if tensor.HasField("shape"):
            said = tuple(_dim(dim, symbols) for dim in tensor.shape.dim)
            shapes[info.name] = _completed(shapes.get(info.name), said)


def _dim(dim: onnx.TensorShapeProto.Dimension, symbols: Iterator[str]) -> int | str:
    if dim.HasField("dim_value") and dim.dim_value >= 0:
        return int(dim.dim_value)
    name = dim.dim_param
    if isinstance(name, bytes):  # what protobuf makes of bytes that are no text
        name = name.decode(errors="backslashreplace")
    # `?` and the empty string are exporters' words for "unknown": they do not make two dimensions equal.
    return name if name.strip("?") else next(symbols)


def _merged(known: Shape | None, found: Shape) -> Shape:
    if known is None or len(known) != len(found):
        return found
    return tuple(
        old if isinstance(old, int) or not isinstance(new, int) else new for old, new in zip(known, found, strict=True)
    )


def _completed(known: Shape | None, said: Shape) -> Shape:
    if known is None:
        return said
    if len(known) != len(said):
        return known
    return tuple(old if isinstance(old, int) else new for old, new in zip(known, said, strict=True))


def _skeleton(
    model: Model,
    inputs: Mapping[str, Shape],
    constants: Mapping[str, Array],
    shapes: Mapping[str, Shape],
    dtypes: Mapping[str, int],
) -> onnx.ModelProto:
    graph = onnx.GraphProto(name="skeleton")
    graph.output.extend(model.proto.graph.output)
    declared = {value.name for value in model.proto.graph.input if value.name not in constants}
    graph.input.extend(value for value in model.proto.graph.input if value.name in declared)
    for value in graph.input:
        if value.name in inputs:
            dtype = value.type.tensor_type.elem_type
            value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, dtype, inputs[value.name]))
    for name, value in constants.items():
        if value.size <= 64 and value.dtype.kind in "iufb":
            graph.initializer.append(onnx.numpy_helper.from_array(value, name))
        elif value.dtype.kind in "iufbV":
            dtype = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
            graph.input.append(onnx.helper.make_tensor_value_info(name, dtype, value.shape))
    for proto in model.proto.graph.node:
        if not any(name in constants for name in proto.output):
            graph.node.append(proto)
    for dim in impossible_sizes(graph):
        dim.Clear()
    for node in model.nodes:
        for name in node.outputs:
            if name and name in shapes and name not in constants and name in dtypes:
                most = MAX_DECLARED if len(shapes[name]) == 1 else math.inf
                dims = [dim if isinstance(dim, int) and dim <= most else None for dim in shapes[name]]
                graph.value_info.append(onnx.helper.make_tensor_value_info(name, dtypes[name], dims))
    # Before version 4 inference gives up on an initializer that is no graph input.
    result = onnx.ModelProto(ir_version=max(4, model.proto.ir_version), graph=graph)
    result.opset_import.extend(model.proto.opset_import)
    result.functions.extend(model.proto.functions)
    return result


# ---- shape arithmetic ------------------------------------------------------------------------------------------


def _follow(
    model: Model,
    constants: dict[str, Array],
    shapes: dict[str, Shape],
    dtypes: dict[str, int],
    symbols: Iterator[str],
) -> dict[str, Array]:
    """Evaluate integer tensors element by element; wholly known results join `constants`."""
    values: dict[str, Array] = {}

    def read(name: str) -> Array:
        if name in constants:
            if constants[name].size > SHAPE_VALUE_LIMIT or constants[name].dtype.kind not in "iub":
                raise KeyError(name)
            return constants[name].astype(object)
        return values[name]

    unknown = (KeyError, ValueError, IndexError, TypeError)
    for node in model.nodes:
        if all(name in constants for name in node.outputs if name):
            continue
        if node.op in PARTIAL:
            with contextlib.suppress(*unknown):
                result = np.asarray(PARTIAL[node.op](node, read, shapes, model.opset, symbols), dtype=object)
                if result.size <= SHAPE_VALUE_LIMIT:
                    _record(node.outputs[0], result, constants, values)
        if node.op in SCALING and node.inputs[0] in shapes:
            shapes[node.outputs[0]] = _merged(shapes.get(node.outputs[0]), shapes[node.inputs[0]])
            dtypes.setdefault(node.outputs[0], onnx.TensorProto.FLOAT)
        if node.op in TARGETS:
            with contextlib.suppress(*unknown):
                found = TARGETS[node.op](node, read, shapes, symbols)
                shapes[node.outputs[0]] = _merged(shapes.get(node.outputs[0]), found)
    return values


def _record(name: str, result: Array, constants: dict[str, Array], values: dict[str, Array]) -> None:
    if all(isinstance(element, int | np.integer) for element in result.flat):
        constants[name] = result.astype(np.int64)
    else:
        values[name] = result


ConsumerNode: TypeAlias = Callable[[str], Array]


def _shape(node: Node, read: ConsumerNode, shapes: Mapping[str, Shape], opset: int, symbols: Iterator[str]) -> Array:
    dims = np.array(shapes[node.inputs[0]], dtype=object)
    return dims[slice(node.attributes.get("start", 0), node.attributes.get("end"))]


def _gather(node: Node, read: ConsumerNode, shapes: Mapping[str, Shape], opset: int, symbols: Iterator[str]) -> Array:
    return np.take(read(node.inputs[0]), read(node.inputs[1]).astype(np.int64), axis=node.attributes.get("axis", 0))


def _concat(node: Node, read: ConsumerNode, shapes: Mapping[str, Shape], opset: int, symbols: Iterator[str]) -> Array:
    return np.concatenate([read(name) for name in node.inputs], axis=node.attributes["axis"])


def _slice(node: Node, read: ConsumerNode, shapes: Mapping[str, Shape], opset: int, symbols: Iterator[str]) -> Array:
    data = read(node.inputs[0])
    names = ("starts", "ends", "axes", "steps")
    if opset < 10:
        given = [node.attributes.get(name) for name in names]
    else:
        given = [list(read(node.input(i + 1)).astype(np.int64)) if node.input(i + 1) else None for i in range(4)]
    starts, ends, axes, steps = given
    if starts is None or ends is None:
        raise KeyError(node.name)
    index: list[Any] = [slice(None)] * data.ndim
    for place, axis in enumerate(axes if axes is not None else range(len(starts))):
        step = int(steps[place]) if steps is not None else 1
        stop = int(ends[place])
        index[axis] = slice(int(starts[place]), None if step < 0 and stop < -data.shape[axis] else stop, step)
    return np.asarray(data[tuple(index)])


def _same(node: Node, read: ConsumerNode, shapes: Mapping[str, Shape], opset: int, symbols: Iterator[str]) -> Array:
    if node.op == "Cast" and node.attributes.get("to") not in (
        onnx.TensorProto.INT64,
        onnx.TensorProto.INT32,
    ):
        raise KeyError(node.name)
    return read(node.inputs[0])


def _reshaped(node: Node, read: ConsumerNode, shapes: Mapping[str, Shape], opset: int, symbols: Iterator[str]) -> Array:
    data = read(node.inputs[0])
    if node.op == "Reshape":
        return data.reshape([int(size) for size in read(node.inputs[1])])
    axes = node.attributes.get("axes")
    if axes is None and node.input(1):
        axes = [int(axis) for axis in read(node.inputs[1])]
    if node.op == "Squeeze":
        return np.squeeze(data, None if axes is None else tuple(axes))
    if axes is None:
        raise KeyError(node.name)
    return np.expand_dims(data, tuple(axes))


def _arithmetic(
    node: Node, read: ConsumerNode, shapes: Mapping[str, Shape], opset: int, symbols: Iterator[str]
) -> Array:
    left, right = np.broadcast_arrays(read(node.inputs[0]), read(node.inputs[1]))

    def one(a: Any, b: Any) -> Any:
        if isinstance(a, str) or isinstance(b, str):
            neutral = {"Add": 0, "Sub": 0, "Mul": 1, "Div": 1}[node.op]
            if b == neutral:
                return a
            return b if a == neutral and node.op in ("Add", "Mul") else next(symbols)
        if node.op == "Div":
            return int(a / b) if b else next(symbols)
        return int({"Add": a + b, "Sub": a - b, "Mul": a * b}[node.op])

    result = np.empty(left.shape, dtype=object)
    for place in np.ndindex(*left.shape):
        result[place] = one(left[place], right[place])
    return result


PARTIAL: Mapping[str, Callable[..., Array]] = {
    "Shape": _shape,
    "Gather": _gather,
    "Concat": _concat,
    "Slice": _slice,
    "Cast": _same,
    "Identity": _same,
    "Reshape": _reshaped,
    "Squeeze": _reshaped,
    "Unsqueeze": _reshaped,
    "Add": _arithmetic,
    "Sub": _arithmetic,
    "Mul": _arithmetic,
    "Div": _arithmetic,
}


def _reshape_target(node: Node, read: ConsumerNode, shapes: Mapping[str, Shape], symbols: Iterator[str]) -> Shape:
    data = shapes[node.inputs[0]]
    target: list[int | str] = [
        element if isinstance(element, str) else int(element) for element in read(node.inputs[1])
    ]
    if not node.attributes.get("allowzero", 0):
        target = [data[axis] if size == 0 else size for axis, size in enumerate(target)]
    if -1 in target:
        place = target.index(-1)
        target[place] = _inferred(list(data), target[:place] + target[place + 1 :], symbols)
    return tuple(target)


def _inferred(data: list[int | str], others: list[int | str], symbols: Iterator[str]) -> int | str:
    """The size that -1 stands for: what is left of the data once the other sizes are divided out."""
    left = list(data)
    for size in [size for size in others if isinstance(size, str)]:
        if size not in left:
            return next(symbols)
        left.remove(size)
    fixed = math.prod(size for size in others if isinstance(size, int))
    count = math.prod(size for size in left if isinstance(size, int))
    free = [size for size in left if isinstance(size, str)]
    if not free and fixed and count % fixed == 0:
        return count // fixed
    return free[0] if len(free) == 1 and count == fixed else next(symbols)


def _expand_target(node: Node, read: ConsumerNode, shapes: Mapping[str, Shape], symbols: Iterator[str]) -> Shape:
    data = list(shapes[node.inputs[0]])
    target: list[int | str] = [
        element if isinstance(element, str) else int(element) for element in read(node.inputs[1])
    ]
    rank = max(len(data), len(target))
    data = [*[1] * (rank - len(data)), *data]
    target = [*[1] * (rank - len(target)), *target]
    return tuple(wanted if size == 1 else size for size, wanted in zip(data, target, strict=True))


def _constant_target(node: Node, read: ConsumerNode, shapes: Mapping[str, Shape], symbols: Iterator[str]) -> Shape:
    return tuple(element if isinstance(element, str) else int(element) for element in read(node.inputs[0]))


TARGETS: Mapping[str, Callable[..., Shape]] = {
    "Reshape": _reshape_target,
    "Expand": _expand_target,
    "ConstantOfShape": _constant_target,
}

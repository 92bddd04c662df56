"""What is known before anything runs: constants behind chains of nodes, tensor shapes, and shape arithmetic.

Exporters compute pads, Reshape targets and Slice bounds with small integer sub-graphs. `resolve` evaluates them:
wholly where everything is constant, element by element where only some dimensions are fixed. A dimension that is
not fixed is a symbol: the name the file gives it, or a fresh name that starts with `?`. Two equal symbols are the
same number; two different ones may be.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from lindep_onnx.model.checks import MAX_DECLARED, impossible_sizes
from lindep_onnx.model.ir import Model
from lindep_onnx.model.node import Node
from lindep_onnx.model.shape_values import Known, follow
from lindep_onnx.model.shape_values import Shape as Shape

logger = logging.getLogger(__name__)

Array: TypeAlias = NDArray[Any]

#: The symbol of sample axes that the file gives no name.
SAMPLES = "lindep_onnx_samples"
#: Constants that nodes make out of nothing (ConstantOfShape, Expand, Range) are evaluated up to this size.
MADE_LIMIT = 1 << 16
#: Arithmetic on whole weights (a scale, a weight norm) is evaluated up to this size.
WEIGHT_LIMIT = 1 << 24

#: Operators that compute the same from the same constants, evaluated by the ONNX reference implementation.
FOLDABLE = frozenset(
    [
        *("Abs", "Add", "And", "Cast", "Ceil", "Concat", "ConstantOfShape", "Div", "Equal", "Expand", "Flatten"),
        *("Floor", "Gather", "Greater", "Identity", "Less", "Max", "Min", "Mod", "Mul", "Neg", "Not", "Or", "Pow"),
        *("Range", "Reciprocal", "ReduceL2", "ReduceMean", "ReduceProd", "ReduceSum", "ReduceSumSquare", "Reshape"),
        *("Shape", "Size", "Slice", "Split", "Sqrt", "Squeeze", "Sub", "Tile", "Transpose", "Unsqueeze", "Where"),
    ]
)
#: Of these, the ones that only view what is there, and so may be of any size.
REARRANGING = frozenset(["Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"])


@dataclass(frozen=True)
class ShapeInfo:
    """All that is known about tensors without running the model.

    Attributes:
        constants: value of every tensor that is the same in every run.
        shapes: shape of every tensor whose rank is known; symbols are strings.
        values: partly known integer tensors as object arrays of int and str.
        dtypes: element type (`onnx.TensorProto.DataType`) of tensors where inference found one.
        samples: symbols of the axes of inputs that count samples.
        overridable: tensors that would be the same in every run if no caller replaced the stored tensor that this
            names: it is an input too.
    """

    constants: Mapping[str, Array]
    shapes: Mapping[str, Shape]
    values: Mapping[str, Array]
    dtypes: Mapping[str, int]
    samples: frozenset[str]
    overridable: Mapping[str, str]

    def sample_axis(self, name: str) -> int | None:
        """The axis of a tensor that counts samples, wherever it lies; None where that is not known."""
        found = [axis for axis, size in enumerate(self.shapes.get(name, ())) if size in self.samples]
        return found[0] if len(found) == 1 else None

    def moved_samples(self, names: Iterable[str]) -> dict[str, int]:
        """The sample axes of those among some tensors where it is not the leading one."""
        found = ((name, self.sample_axis(name)) for name in names)
        return {name: axis for name, axis in found if axis}

    def weight_shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of what is the same in every run, or would be if no caller replaced it; None of anything else."""
        if name in self.constants:
            return self.constants[name].shape
        shape = self.shapes.get(name) if name in self.overridable else None
        sizes = tuple(size for size in shape or () if isinstance(size, int))
        return sizes if shape is not None and len(sizes) == len(shape) else None

    @property
    def activation_bytes(self) -> int:
        """Of all tensors that one sample makes, in single precision; unknown sizes count as 1."""
        computed = {name: shape for name, shape in self.shapes.items() if name not in self.constants}
        own = (shape if self.sample_axis(name) is not None else shape[1:] for name, shape in computed.items())
        return 4 * sum(math.prod(size for size in sizes if isinstance(size, int)) for sizes in own)

    def integers(self, name: str) -> list[int | str] | None:
        """Elements of a small integer tensor, flat; symbols where they are not known; None if nothing is known."""
        if name in self.constants:
            return [int(value) for value in np.ravel(self.constants[name])]
        return list(np.ravel(self.values[name])) if name in self.values else None


def resolve(model: Model, inputs: Mapping[str, Shape] = MappingProxyType({})) -> ShapeInfo:
    """Fold constants, infer shapes and follow shape arithmetic, until nothing new is found.

    Graph inputs have the shapes that `inputs` gives in place of those that the file declares.
    """
    inputs = {**model.told.shapes, **inputs}
    known = Known(model.opset, {name: value for name, value in model.stored.items() if name not in model.overridable})
    _fold(model, known.constants)
    for _ in range(8):
        _infer(model, inputs, known)
        before = _progress(known)
        follow(model, known)
        _fold(model, known.constants)
        if before == _progress(known):
            break
    return ShapeInfo(
        constants=MappingProxyType(known.constants),
        shapes=MappingProxyType(known.shapes),
        values=MappingProxyType(known.values),
        dtypes=MappingProxyType(known.dtypes),
        samples=_samples(model, known.shapes),
        overridable=MappingProxyType(_overridable(model, known)),
    )


def _samples(model: Model, shapes: Mapping[str, Shape]) -> frozenset[str]:
    leading = (shapes[name][axis] for name, axis in model.batch_axes.items() if axis is not None and shapes.get(name))
    return frozenset(size for size in leading if isinstance(size, str))


def _overridable(model: Model, known: Known) -> dict[str, str]:
    """Tensors that depend on nothing but constants and inputs with a stored value, and one such input of each."""
    roots = {name: name for name in sorted(model.overridable)}
    for name in roots:
        known.shapes[name] = model.stored[name].shape
    for node in model.nodes if roots else ():
        read = [name for name in node.inputs if name]
        named = next((roots[name] for name in read if name in roots), "")
        if named and not node.captures and all(name in roots or name in known.constants for name in read):
            roots.update((name, named) for name in node.outputs if name)
    return roots


def _progress(known: Known) -> tuple[int, int, int]:
    sizes = sum(1 + sum(isinstance(size, int) for size in shape) for shape in known.shapes.values())
    return len(known.constants), len(known.values), sizes


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
    attributes = {
        key: onnx.numpy_helper.from_array(value) if isinstance(value, np.ndarray) else value
        for key, value in node.attributes.items()
    }
    made = onnx.helper.make_node(node.op, node.inputs, node.outputs, **attributes)
    graph = onnx.helper.make_graph([made], "constant", inputs, outputs)
    alone = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", model.opset)])
    return list(ReferenceEvaluator(alone).run(None, dict(operands)))


# ---- shapes ----------------------------------------------------------------------------------------------------


def _infer(model: Model, inputs: Mapping[str, Shape], known: Known) -> None:
    """ONNX shape inference on a skeleton: weights become inputs, so that no weight is copied or serialised."""
    for name, value in known.constants.items():
        known.shapes[name] = tuple(value.shape)
    skeleton = _skeleton(model, inputs, known)
    try:
        inferred = onnx.shape_inference.infer_shapes(skeleton, data_prop=True).graph
    except Exception:  # it raises bare RuntimeErrors on graphs it cannot follow; what is unknown stays unknown
        logger.debug("shape inference gave up", exc_info=True)
        inferred = skeleton.graph
    for info in (*inferred.value_info, *inferred.input, *inferred.output):
        tensor = info.type.tensor_type
        if tensor.elem_type:
            known.dtypes[info.name] = tensor.elem_type
        if tensor.HasField("shape"):
            known.merge_shape(info.name, tuple(_dim(dim, known.symbols) for dim in tensor.shape.dim))
    # What the file says of its inner tensors may be stale: it only completes what follows from the operators.
    for info in model.proto.graph.value_info:
        tensor = info.type.tensor_type
        if tensor.elem_type:
            known.dtypes.setdefault(info.name, tensor.elem_type)
        if tensor.HasField("shape"):
            said = tuple(_dim(dim, known.symbols) for dim in tensor.shape.dim)
            known.shapes[info.name] = _completed(known.shapes.get(info.name), said)


def _is_name(symbol: str | bytes) -> bool:
    """Whether a file names an axis: `?` and the empty string are exporters' words for "unknown"."""
    return bool(symbol.strip("?") if isinstance(symbol, str) else symbol)


def _dim(dim: onnx.TensorShapeProto.Dimension, symbols: Iterator[str]) -> int | str:
    if dim.HasField("dim_value") and dim.dim_value >= 0:
        return int(dim.dim_value)
    name = dim.dim_param
    if isinstance(name, bytes):  # what protobuf makes of bytes that are no text
        name = name.decode(errors="backslashreplace")
    return name if _is_name(name) else next(symbols)  # what is unknown does not make two dimensions equal


def _completed(known: Shape | None, said: Shape) -> Shape:
    if known is None:
        return said
    if len(known) != len(said):
        return known
    return tuple(old if isinstance(old, int) else new for old, new in zip(known, said, strict=True))


def _skeleton(model: Model, inputs: Mapping[str, Shape], known: Known) -> onnx.ModelProto:
    constants, shapes, dtypes = known.constants, known.shapes, known.dtypes
    graph = onnx.GraphProto(name="skeleton")
    graph.output.extend(model.proto.graph.output)
    declared = {value.name for value in model.proto.graph.input if value.name not in constants}
    graph.input.extend(value for value in model.proto.graph.input if value.name in declared)
    for value in graph.input:
        if value.name in inputs:
            dtype = value.type.tensor_type.elem_type
            value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, dtype, inputs[value.name]))
        axis, dims = model.batch_axes.get(value.name), value.type.tensor_type.shape.dim
        free = axis is not None and axis < len(dims) and not dims[axis].HasField("dim_value")
        if free and not _is_name(dims[axis].dim_param):
            # Without a name it would be lost on the way, and nobody could tell where samples lie further on.
            dims[axis].dim_param = SAMPLES
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

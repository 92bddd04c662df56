"""What a model has to be before anything reads it: what would crash C++ is refused, the rest `onnx.checker` says."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import onnx

from lindep_onnx.errors import LindepError, ModelError, VerificationError, one_line
from lindep_onnx.model.node import Node
from lindep_onnx.model.weights import graphs, is_large, weights_as_inputs

#: Longer vectors are of unknown length to inference, which makes a list of the elements of integer ones.
MAX_DECLARED = 1 << 20
#: More cannot be fed.
MAX_FED = 1 << 40
INTEGERS = (onnx.TensorProto.INT32, onnx.TensorProto.INT64)


def impossible_sizes(graph: onnx.GraphProto) -> Iterator[onnx.TensorShapeProto.Dimension]:
    """Axes that are declared with a size below 0, or vectors of integers with endless ones, in bodies too.

    Either may make onnx end the process: the first by a crash, the second since some versions make a list of the
    elements.
    """
    for inner in graphs(graph):
        for value in (*inner.input, *inner.output, *inner.value_info):
            dims = value.type.tensor_type.shape.dim
            vector = len(dims) == 1 and value.type.tensor_type.elem_type in INTEGERS
            yield from (dim for dim in dims if dim.dim_value < 0 or (vector and dim.dim_value > MAX_DECLARED))


def check_sizes(where: str, graph: onnx.GraphProto) -> None:
    """Refuse vectors of integers that nobody can feed: some versions of ONNX Runtime make a list of the elements."""
    for value in graph.input:
        dims = value.type.tensor_type.shape.dim
        if value.type.tensor_type.elem_type in INTEGERS and len(dims) == 1 and dims[0].dim_value > MAX_FED:
            count = dims[0].dim_value
            raise ModelError(f"{where}: input {value.name!r} is declared with {count} values, which no machine holds.")


def check_arity(where: str, proto: onnx.ModelProto) -> None:
    """Refuse nodes that lack inputs or outputs: onnx's shape inference, in C++, takes them for granted."""
    versions = {entry.domain: entry.version for entry in proto.opset_import}
    for node in (node for graph in graphs(proto.graph) for node in graph.node):
        least = _least_arity(node, versions)
        for what, number, found in zip(("inputs", "outputs"), least, (len(node.input), len(node.output)), strict=True):
            if found < number:
                name = f"{(node.name or node.op_type)!r} ({node.op_type})"
                need = f"not the {number} that the operator needs"
                raise ModelError(f"{where}: node {name} has {found} {what}, {need}.")


def _least_arity(node: onnx.NodeProto, versions: Mapping[str, int]) -> tuple[int, int]:
    domain = "" if node.domain == "ai.onnx" else node.domain
    try:
        schema = onnx.defs.get_schema(node.op_type, versions.get(domain, versions.get(node.domain, 1)), domain)
    except (onnx.defs.SchemaError, TypeError, OverflowError, UnicodeError):  # not one of the standard's
        return 0, 0
    return schema.min_input, schema.min_output


def check_windows(where: str, nodes: Iterable[Node]) -> None:
    """Refuse windows and steps of nothing: ONNX Runtime divides by them, and a signal ends the process."""
    for node in nodes:
        for name in ("kernel_shape", "strides", "dilations"):
            value = node.attributes.get(name)
            if isinstance(value, (list, tuple)) and any(isinstance(size, int) and size < 1 for size in value):
                raise ModelError(
                    f"{where}: node {node.name!r} ({node.op}) has {name} {list(value)}; every entry must be at least 1."
                )


def check_order(where: str, nodes: Iterable[Node], known: set[str], outputs: Iterable[str]) -> None:
    """Refuse what is read before it is there, and what is there twice; `known` are constants and graph inputs."""
    for node in nodes:
        for name in (*node.inputs, *node.captures):
            if name and name not in known:
                raise ModelError(
                    f"{where}: node {node.name!r} reads {name!r}, which nothing before it defines "
                    "(a missing initializer, or a cycle)."
                )
        for name in filter(None, node.outputs):
            if name in known:
                raise defined_twice(where, name)
            known.add(name)
    for name in outputs:
        if name not in known:
            raise ModelError(f"{where}: the graph output {name!r} is not computed by any node.")


def defined_twice(where: str, name: str) -> ModelError:
    """The error for a name that two tensors have."""
    return ModelError(f"{where}: tensor {name!r} is defined twice; every tensor needs a name of its own.")


def full_check_passes(model: onnx.ModelProto | str | Path) -> str | None:
    """Run `onnx.checker` with shape inference.

    Args:
        model: a model in memory, or a path. The data of large initializers of a large one is not looked at.

    Returns:
        None if the model passes, else what the checker says, in one line.
    """
    source: str | bytes
    if isinstance(model, onnx.ModelProto):
        if next(impossible_sizes(model.graph), None) is not None:
            return "an axis is declared with a size that it cannot have"
        source = (weights_as_inputs(model) if is_large(model) else model).SerializeToString()
    else:
        source = str(model)
    try:
        onnx.checker.check_model(source, full_check=True)
    except Exception as error:  # the checker's exceptions have no common base
        return one_line(error)
    return None


def check_model(model: onnx.ModelProto | str | Path, *, original_passed: bool) -> None:
    """Hold a result to the checker that its original passed, if it did.

    Raises:
        VerificationError: the result does not pass.
    """
    found = full_check_passes(model) if original_passed else None
    if found is not None:
        raise VerificationError(f"The result fails the ONNX checker, which the original passes: {found}")


@contextmanager
def as_model_error(proto: onnx.ModelProto, source: object = None) -> Iterator[None]:
    """Blame what goes wrong inside on the model: rules rely on what the ONNX standard says, and nothing has run it yet.

    Raises:
        ModelError: instead of any other exception.
    """
    try:
        yield
    except LindepError:
        raise
    except Exception as error:
        name = source if isinstance(source, (str, Path)) else proto.graph.name or "the model"
        fault = full_check_passes(proto)
        if fault is not None:
            raise ModelError(f"{name}: is not a valid ONNX model, and cannot be followed: {fault}") from error
        raise ModelError(
            f"{name}: cannot be followed ({type(error).__name__}: {str(error)[:200]}).\n"
            "If ONNX Runtime runs it, run again with --debug and report it."
        ) from error

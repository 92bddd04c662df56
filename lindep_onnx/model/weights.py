"""Model files, and where the data of initializers is: inside the protobuf, or in files that are mapped into memory.

A model of up to `IN_MEMORY` bytes is one protobuf, weights included. The weights of a larger one stay in files, those
that the model came with or a temporary one: its large initializers are external data, `WeightsDir` says beside which
model file, and their values are arrays over the mapped file. No copy of them is made in memory, and the operating
system takes back what it needs. Everywhere in this package a `ModelProto` goes together with such a folder, or with
None if it holds all of its data. Integers, tensors in attributes and in bodies, and types that do not fill whole bytes
stay inside, whatever their size.
"""

from __future__ import annotations

import hashlib
import logging
import math
import mmap
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from lindep_onnx import files
from lindep_onnx.errors import ModelError, OutputError, one_line
from lindep_onnx.files import WeightsDir

logger = logging.getLogger(__name__)

Array: TypeAlias = NDArray[Any]

#: Bytes of weights up to which a model is held in memory.
IN_MEMORY = 1 << 28
#: Smaller tensors stay in the model file when the others go into a file of their own.
EXTERNAL_BYTES = 1024
#: Every tensor in a file of weights begins at a multiple of this.
ALIGNMENT = 64
#: A sparse tensor of more elements is not written out.
MOST_DENSE = 1 << 28
#: Bits of an element, of types that do not fill whole bytes.
PACKED = {"INT2": 2, "UINT2": 2, "INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4}
EXTERNAL = onnx.TensorProto.EXTERNAL
#: Types of tensors whose bytes are those of an array, and that are no sizes.
FLOATS = tuple(getattr(onnx.TensorProto, name) for name in ("FLOAT", "DOUBLE", "FLOAT16", "BFLOAT16"))


# ---- reading ------------------------------------------------------------------------------------------------------


def read(source: str | Path | onnx.ModelProto) -> tuple[onnx.ModelProto, WeightsDir | None]:
    """Read a model; where its weights are many, they stay on the disk.

    Args:
        source: a path, or a model in memory that holds all of its data; it is not changed.

    Returns:
        The model, and the folder of its external data.

    Raises:
        ModelError: the file is missing, is no ONNX model, or refers to external data that cannot be read.
    """
    if isinstance(source, onnx.ModelProto):
        return _spilled(source, source.graph.name or "the model")
    path = Path(source)
    proto = _parsed(path)
    for tensor in _external_tensors(proto.graph):
        _check_location(path, tensor)
    try:
        large = is_large(proto)
        for tensor in list(_external_tensors(proto.graph, mapped=large)):
            onnx.external_data_helper.load_external_data_for_tensor(tensor, str(path.parent))
            tensor.ClearField("data_location")
            tensor.ClearField("external_data")
        folder = WeightsDir(path.parent.absolute())
        mapped = [tensor for tensor in proto.graph.initializer if is_external(tensor)]
        for tensor in mapped:
            array_of(tensor, folder)
    except Exception as error:  # file system errors of C++ among them
        raise ModelError(f"{path}: its external data cannot be read: {one_line(error)}") from error
    held = sum(tensor.ByteSize() for tensor in proto.graph.initializer if not is_external(tensor))
    return (proto, folder) if mapped and held <= IN_MEMORY else _spilled(proto, str(path), folder if mapped else None)


def _parsed(path: Path) -> onnx.ModelProto:
    try:
        is_file = path.is_file()
    except (OSError, ValueError) as error:  # no name for a file: too long, or with a NUL in it
        raise ModelError(f"{str(path)[:80]!r}: cannot be looked up ({error}).") from error
    if not is_file:
        missing = f"no such model file.{files.suggestion(path)}"
        raise ModelError(f"{path}: {missing if not path.exists() else 'is not a file.'}")
    proto = onnx.ModelProto()
    try:
        with path.open("rb") as file:
            if path.stat().st_size <= IN_MEMORY:
                proto.ParseFromString(file.read())
            else:  # not through a string of bytes, which would be one more copy
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content, memoryview(content) as view:
                    proto.ParseFromString(view)
    except PermissionError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}).") from error
    except (DecodeError, ValueError, OSError) as error:
        raise ModelError(
            f"{path}: is not a readable ONNX model (damaged or cut short, or another format: export it to ONNX first)."
        ) from error
    if not proto.ir_version or not proto.HasField("graph") or not proto.opset_import:
        raise ModelError(f"{path}: is not an ONNX model (no graph, IR version or operator set in it).")
    return proto


def _spilled(
    proto: onnx.ModelProto, where: str, folder: WeightsDir | None = None
) -> tuple[onnx.ModelProto, WeightsDir | None]:
    """The model as it is, or a copy whose large initializers are in one file."""
    try:
        return with_weights(without_weights(proto), values_of(proto, folder)) if is_large(proto) else (proto, folder)
    except (ValueError, KeyError, TypeError) as error:  # what onnx raises for unknown types
        raise ModelError(f"{where}: a tensor in it is damaged: {error}") from error


def values_of(proto: onnx.ModelProto, folder: WeightsDir | None) -> Callable[[str], Array]:
    """The values of an initializer, by its name."""
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    return lambda name: array_of(tensors[name], folder)


def _external_tensors(graph: onnx.GraphProto, *, mapped: bool = False) -> Iterator[onnx.TensorProto]:
    """Those in attributes and bodies too; with `mapped` without the large initializers of the graph itself."""
    for inner in graphs(graph):
        for attribute in (attribute for node in inner.node for attribute in node.attribute):
            yield from (tensor for tensor in (attribute.t, *attribute.tensors) if is_external(tensor))
        for tensor in inner.initializer:
            if is_external(tensor) and not (mapped and inner is graph and _goes_outside(tensor)):
                yield tensor


def bodies(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The sub-graphs of a node."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == onnx.AttributeProto.GRAPHS:
            yield from attribute.graphs


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and the sub-graphs of all of its nodes, at any depth."""
    yield graph
    for node in graph.node:
        for body in bodies(node):
            yield from graphs(body)


def _check_location(path: Path, tensor: onnx.TensorProto) -> None:
    """A model names the files that its weights are in: none but those below its own folder are read.

    onnx checks the same, but not in all versions that are supported.
    """
    location = external_entries(tensor).get("location", "")
    try:
        inside = (path.parent / location).resolve().is_relative_to(path.parent.resolve())
    except (OSError, ValueError, RuntimeError):  # no name for a file, or links in a circle
        inside = False
    if not inside or Path(location).is_absolute():
        raise ModelError(
            f"{path}: tensor {tensor.name!r} is in {location[:80]!r}, outside the folder of the model; "
            "put the file there."
        )


def external_entries(tensor: onnx.TensorProto) -> dict[str, str]:
    """What a tensor says about its external data; bytes are what protobuf makes of text that is none."""
    values = ((entry.key, entry.value) for entry in tensor.external_data)
    return {key: value if isinstance(value, str) else value.decode("utf-8", "surrogateescape") for key, value in values}


# ---- values -------------------------------------------------------------------------------------------------------


def is_external(tensor: onnx.TensorProto) -> bool:
    """Whether the data of a tensor is in a file."""
    return bool(tensor.data_location == EXTERNAL)


def array_of(tensor: onnx.TensorProto, folder: WeightsDir | None) -> Array:
    """The values of a tensor, mapped where they are in a file.

    Raises:
        ValueError: there are more or fewer values than it declares.
        OSError: their file cannot be read.
    """
    if not is_external(tensor):
        values: Array = onnx.numpy_helper.to_array(tensor)
        if values.size * values.itemsize > max(64, 8 * tensor.ByteSize()):
            raise ValueError(f"{tensor.name!r} declares more values than it holds")
        return values
    if folder is None:
        # Without the model's folder the location would be looked up in the working directory.
        raise ValueError(f"{tensor.name!r} is in a file of its own that was not read; give the path of the model")
    entries = external_entries(tensor)
    offset, size = int(entries.get("offset", 0)), tensor_bytes(tensor)
    name = entries.get("location", "")
    content = folder.content(name)
    held = len(content) - offset
    if offset < 0 or not size <= int(entries.get("length", held)) <= held:
        raise ValueError(f"{tensor.name!r} needs {size} bytes of {name} from {offset} on; there are {held}")
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
    own = content[offset : offset + size]
    # Kernels may rely on aligned numbers.
    return (np.array(own) if offset % dtype.itemsize else own).view(dtype).reshape(tuple(tensor.dims))


def dense_of(tensor: onnx.SparseTensorProto) -> Array:
    """The whole of a sparse tensor.

    Raises:
        ValueError: an index lies outside of it, or there are more or fewer indices than values.
    """
    values, indices = array_of(tensor.values, None), array_of(tensor.indices, None)
    shape = tuple(tensor.dims)
    if math.prod(shape) > MOST_DENSE:
        raise ValueError(f"the sparse tensor {tensor.values.name!r} has {math.prod(shape):,} elements")
    dense = np.zeros(shape, values.dtype)
    places = tuple(indices.T) if indices.ndim == 2 else np.unravel_index(indices, shape)
    if len(indices) != len(values) or any((np.asarray(place) < 0).any() for place in places):
        raise ValueError(f"the sparse tensor {tensor.values.name!r} has indices that do not fit its values")
    dense[places] = values
    return dense


def _goes_outside(tensor: onnx.TensorProto) -> bool:
    """Whether an initializer goes into a file if the model is large.

    Integers do not: they may be sizes, which ONNX Runtime has to know when it infers shapes.
    """
    held = tensor.HasField("raw_data") or is_external(tensor)
    return held and tensor.data_type in FLOATS and tensor_bytes(tensor) >= EXTERNAL_BYTES


def tensor_bytes(tensor: onnx.TensorProto) -> int:
    """Size of a tensor's data in bytes, from its shape and type alone."""
    count: int = math.prod(tensor.dims)
    if tensor.data_type == onnx.TensorProto.STRING:
        return sum(len(item) for item in tensor.string_data)
    bits = PACKED.get(onnx.TensorProto.DataType.Name(tensor.data_type))
    itemsize = int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
    return (count * bits + 7) // 8 if bits else count * itemsize


def size_of(proto: onnx.ModelProto) -> int:
    """Bytes of the initializers, those that are elsewhere included."""
    return sum(tensor_bytes(tensor) if is_external(tensor) else tensor.ByteSize() for tensor in proto.graph.initializer)


def is_large(proto: onnx.ModelProto) -> bool:
    """Whether there are too many weights to be held in memory."""
    return size_of(proto) > IN_MEMORY


def fingerprint(proto: onnx.ModelProto, folder: WeightsDir | None) -> str:
    """A digest of what a model computes: nodes, weights, inputs and outputs, whatever its metadata say."""
    digest = hashlib.blake2b(digest_size=16)
    graph = proto.graph
    tensors = (graph.initializer, graph.sparse_initializer)
    for parts in (proto.opset_import, proto.functions, graph.input, graph.output, graph.node, *tensors):
        digest.update(f"{len(parts)}:".encode())
        for part in parts:  # one at a time: together they may be larger than protobuf takes
            outside = isinstance(part, onnx.TensorProto) and is_external(part)
            content = (without_data(part) if outside else part).SerializeToString(deterministic=True)
            digest.update(f"{len(content)}:".encode() + content)
            if outside:
                digest.update(content_of(array_of(part, folder)))
    return digest.hexdigest()


# ---- models without their data, and with it -----------------------------------------------------------------------


def without_weights(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy without the data of large initializers: what a graph is changed in, so that no weight is copied.

    Such a tensor keeps its name, type and sizes, and says that its data is elsewhere, but not where. `with_weights`
    puts data back.
    """
    copy = onnx.ModelProto()
    copy_fields(proto, copy, "graph")
    copy_fields(proto.graph, copy.graph, "initializer")
    for tensor in proto.graph.initializer:
        copy.graph.initializer.append(placeholder(tensor) if _goes_outside(tensor) else tensor)
    return copy


def copy_fields(source: Any, target: Any, *without: str) -> None:
    """Copy the fields of one protobuf message into an empty one of the same type, some left out."""
    for descriptor, value in source.ListFields():
        if descriptor.name not in without:
            if hasattr(value, "extend"):
                getattr(target, descriptor.name).extend(value)
            else:
                setattr(target, descriptor.name, value)


def weights_as_inputs(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which large initializers are inputs: shape inference needs only their types and sizes."""
    copy = without_weights(proto)
    present = {value.name for value in copy.graph.input}
    copy.graph.input.extend(
        onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        for tensor in without_external(copy)
        if tensor.name not in present
    )
    return copy


def without_external(proto: onnx.ModelProto) -> list[onnx.TensorProto]:
    """Take the external initializers out of a model, and return them."""
    tensors = list(proto.graph.initializer)
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(tensor for tensor in tensors if not is_external(tensor))
    return [tensor for tensor in tensors if is_external(tensor)]


def placeholder(tensor: onnx.TensorProto) -> onnx.TensorProto:
    """A tensor without its data."""
    made = onnx.TensorProto(data_location=EXTERNAL)
    copy_fields(tensor, made, "raw_data", "data_location", "external_data")
    return made


def stand_in(name: str, value: Array) -> onnx.TensorProto | None:
    """A tensor without data in the place of an array, None if that is small."""
    large = value.nbytes >= EXTERNAL_BYTES and value.dtype.kind in "fV"
    kind = onnx.helper.np_dtype_to_tensor_dtype(value.dtype) if large else None
    if kind not in FLOATS:
        return None
    return onnx.TensorProto(name=name, data_type=kind, dims=value.shape, data_location=EXTERNAL)


def with_weights(proto: onnx.ModelProto, value_of: Callable[[str], Array]) -> tuple[onnx.ModelProto, WeightsDir | None]:
    """Put the data that `without_weights` left out in place: inside, or in a temporary file if it is much.

    Args:
        proto: a model whose external tensors say nothing of where they are; changed in place.
        value_of: the values of one of these, by its name; asked for once each, in their order.

    Returns:
        The same model, and the folder of its external data.
    """
    if not is_large(proto):
        return _filled(proto, value_of), None
    try:
        folder = WeightsDir.temporary()
        write_external(proto, value_of, folder.path / "weights")
    except OSError as error:
        what = f"{size_of(proto) / 1e6:.0f} MB of weights ({error.strerror or error})"
        raise OutputError(
            f"{tempfile.gettempdir()}: cannot hold {what}; set TMPDIR to a folder with more room."
        ) from error
    locate_external(proto, "weights")
    return proto, folder


def content_of(value: Array) -> memoryview:
    """The bytes of an array, without a copy where they lie in order."""
    return np.ascontiguousarray(value).reshape(-1).view(np.uint8).data


def without_data(tensor: onnx.TensorProto) -> onnx.TensorProto:
    """All but the data of a tensor that is going to hold it."""
    made = placeholder(tensor)
    made.ClearField("data_location")
    return made


def _filled(proto: onnx.ModelProto, value_of: Callable[[str], Array]) -> onnx.ModelProto:
    """The same model, with the data of external initializers put inside."""
    for tensor in proto.graph.initializer:
        if is_external(tensor):
            made = without_data(tensor)
            made.raw_data = bytes(content_of(value_of(tensor.name)))
            tensor.CopyFrom(made)
    return proto


def write_external(proto: onnx.ModelProto, value_of: Callable[[str], Array], data: Path) -> None:
    """Write what is external into one file; where that will be is still to be added (`_locate`).

    Not by `onnx.save`: it refuses to write if a file of that name is in the working directory, and what it writes
    cannot be read by other users.
    """
    with data.open("wb") as file:
        for tensor in proto.graph.initializer:
            if is_external(tensor):
                content = content_of(value_of(tensor.name))
                file.write(bytes(-file.tell() % ALIGNMENT))
                del tensor.external_data[:]
                for key, number in (("offset", file.tell()), ("length", content.nbytes)):
                    tensor.external_data.add(key=key, value=str(number))
                file.write(content)


def locate_external(proto: onnx.ModelProto, name: str) -> None:
    """Say which file, beside the model, holds what is external."""
    for tensor in proto.graph.initializer:
        if is_external(tensor):
            tensor.external_data.add(key="location", value=name)


def embedded(proto: onnx.ModelProto, folder: WeightsDir | None) -> onnx.ModelProto:
    """The model with all of its data inside: itself if that is so already, else a copy."""
    if folder is None:
        return proto
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    _filled(copy, values_of(proto, folder))
    check_unchanged(folder)
    return copy


def check_unchanged(folder: WeightsDir | None) -> None:
    """Make sure that mapped weights are still those that everything was computed from.

    Raises:
        ModelError: one of its files was written to or replaced.
    """
    changed = folder.changed() if folder is not None else None
    if changed is not None:
        raise ModelError(f"{changed}: has changed since it was read; run again on a model that nothing else writes to.")

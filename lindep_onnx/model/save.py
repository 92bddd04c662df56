"""Writing model files: at any moment there is the old model or the new one, each with its own weights."""

from __future__ import annotations

import filecmp
import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import onnx
from google.protobuf.message import DecodeError, EncodeError

from lindep_onnx import files
from lindep_onnx.errors import OutputError, UsageError
from lindep_onnx.files import WeightsDir, check_writable
from lindep_onnx.model.weights import (
    Array,
    array_of,
    check_unchanged,
    content_of,
    external_entries,
    locate_external,
    read,
    size_of,
    tensor_bytes,
    values_of,
    without_data,
    without_external,
    without_weights,
    write_external,
)

logger = logging.getLogger(__name__)

#: protobuf cannot hold or serialise a message beyond this.
PROTOBUF_LIMIT = 2**31 - 1
#: A larger model is taken to use the file that is looked for.
MAX_SEARCHED = 1 << 28


def check_output(source: str | Path | onnx.ModelProto, output: Path) -> None:
    """Find out before the work whether a model can be written, and not over the one that is read.

    Raises:
        UsageError: it is the input model.
        OutputError: it cannot be written.
    """
    in_file = not isinstance(source, onnx.ModelProto) and Path(source).exists()
    if in_file and output.exists() and output.samefile(source):
        raise UsageError(f"{output}: is the input model; name another file to write.")
    check_writable(output)


def save(
    proto: onnx.ModelProto,
    folder: WeightsDir | None,
    path: Path,
    *,
    external_data: bool = False,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write a model so that `path` holds either its old content or the complete new one.

    Args:
        proto: the model; not changed.
        folder: of its external data.
        path: where to; the folder must exist.
        external_data: put the weights into `<name>.data` beside it (or `<name>.1.data` and so on, where that file
            belongs to another model); done anyway above 2 GB.
        check: is given the path of the complete file before it takes its name; what it raises goes on, and leaves
            `path` as it was.

    Raises:
        OutputError: the folder is missing or cannot be written to, what is no external data fills 2 GB, or what is
            read back is not what was written.
        ModelError: its external data is no longer what it was.
    """
    external = external_data or size_of(proto) > PROTOBUF_LIMIT - 2**20
    try:
        for left in files.stale_scratch(path.parent):
            if (left / files.KEEP).is_file():
                settle(left)
                shutil.rmtree(left, ignore_errors=True)
        with files.Scratch(path.parent) as name:
            staged, after = _staged(proto, folder, path, Path(name), external)
            if not _reads_back(staged, proto, folder):
                raise OutputError(
                    f"{path}: what was written could not be read back as it was: is the disk full or bad?"
                )
            if check is not None:
                check(staged)
            _put(staged, path, after)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error}).") from error
    except (EncodeError, ValueError) as error:  # which of them depends on the version of protobuf
        if size_of(proto) < PROTOBUF_LIMIT:
            raise
        what = "the tensors that cannot go into a file of their own (integers, typed lists) are more than 2 GB"
        raise OutputError(f"{path}: cannot be written: {what}.") from error


def _staged(
    proto: onnx.ModelProto, folder: WeightsDir | None, path: Path, scratch: Path, external: bool
) -> tuple[Path, set[str]]:
    """Write into `scratch`: the model, and beside it its weights by the name that they will have; returns these."""
    staged, data, copy, source = scratch / path.name, scratch / "weights", proto, folder
    after: set[str] = set()
    if external:
        copy = without_weights(proto)
        write_external(copy, values_of(proto, folder), data)
        if data.stat().st_size:
            files.flush(data)
            name = _data_name(path, data, _own_data(path))
            after = {name}
            locate_external(copy, name)
            data.replace(scratch / name)
        folder = None
    with staged.open("wb") as file:
        serialise(copy, folder, file)
    check_unchanged(source)
    files.flush(staged)
    return staged, after


def _reads_back(staged: Path, proto: onnx.ModelProto, folder: WeightsDir | None) -> bool:
    """Whether a file holds the same nodes and values; where its tensors keep their data does not matter."""
    found, beside = read(staged)
    for field in ("node", "input", "output", "sparse_initializer"):
        one, other = getattr(found.graph, field), getattr(proto.graph, field)
        if len(one) != len(other) or any(left != right for left, right in zip(one, other, strict=True)):
            return False
    there = {tensor.name: tensor for tensor in found.graph.initializer}
    if len(there) != len(proto.graph.initializer):
        return False
    return all(
        tensor.name in there
        and (
            there[tensor.name] == tensor or _same_values(array_of(there[tensor.name], beside), array_of(tensor, folder))
        )
        for tensor in proto.graph.initializer
    )


def _same_values(left: Array, right: Array) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and content_of(left) == content_of(right)


def _put(staged: Path, path: Path, after: set[str]) -> None:
    """Move from the folder of `staged`: first the weights, under a name that nothing uses, then the model.

    At any moment the model at `path` is the old one with its old weights, or the new one with its new weights. Weights
    that are not, or no longer, those of the model at `path` are on a list in the folder until they are gone.
    """
    scratch, before = staged.parent, _own_data(path)
    if before != after:
        (scratch / files.KEEP).write_text(json.dumps([path.name, *sorted(before | after)]), encoding="utf-8")
        files.flush(scratch / files.KEEP)
    for name in after - before:
        (scratch / name).replace(path.parent / name)
    staged.replace(path)
    if before != after:
        settle(scratch)


def serialise(proto: onnx.ModelProto, folder: WeightsDir | None, file: BinaryIO) -> None:
    """Write the bytes of a model, the data of the tensors in a folder included.

    protobuf would need the whole model in memory, and its bytes beside it. So large tensors are framed here: a message
    in a message is its field number, its length and its bytes, and the elements of a list may stand in several places.
    """
    if folder is None:
        file.write(proto.SerializeToString(deterministic=True))
        return
    copy = without_weights(proto)
    heads, size = {}, 0
    for tensor in without_external(copy):
        length = tensor_bytes(tensor)
        head = without_data(tensor).SerializeToString(deterministic=True)
        head += field_header(onnx.TensorProto.RAW_DATA_FIELD_NUMBER, length)
        heads[tensor.name] = field_header(onnx.GraphProto.INITIALIZER_FIELD_NUMBER, len(head) + length) + head
        size += len(heads[tensor.name]) + length
    graph = copy.graph.SerializeToString(deterministic=True)
    copy.ClearField("graph")
    file.write(copy.SerializeToString(deterministic=True))
    file.write(field_header(onnx.ModelProto.GRAPH_FIELD_NUMBER, len(graph) + size) + graph)
    value_of = values_of(proto, folder)
    for name, head in heads.items():
        file.write(head)
        file.write(content_of(value_of(name)))


def field_header(field: int, length: int) -> bytes:
    """What stands before the bytes of a field: its number and that a length follows (2), and the length, in varints."""
    found = bytearray()
    for number in (field << 3 | 2, length):
        while number > 127:
            found.append(number & 127 | 128)
            number >>= 7
        found.append(number)
    return bytes(found)


def settle(folder: Path) -> None:
    """Remove the weights on the list that the model beside the folder does not refer to."""
    try:
        model, *names = json.loads((folder / files.KEEP).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # the run ended before the list was complete, and before anything was moved
        return
    wanted = _own_data(folder.parent / model)
    for name in names:
        if name not in wanted and _is_data_name(name, model) and not _is_named(name, folder.parent, model):
            files.discard(folder.parent / name)


def _is_named(name: str, folder: Path, model: str) -> bool:
    """Whether another model in the folder may use that file: somebody may have made a copy of ours."""
    others = (path for path in folder.glob("*.onnx") if path.name != model and path.is_file())
    return any(
        path.stat().st_size > MAX_SEARCHED or name.encode().lower() in path.read_bytes().lower() for path in others
    )


def _own_data(path: Path) -> set[str]:
    """Names of the files with the weights of the model at `path`, of those that this package names."""
    if not path.is_file():
        return set()
    try:
        old = onnx.load(path, format="protobuf", load_external_data=False)
    except (DecodeError, ValueError):
        logger.debug("%s is no model", path)
        return set()
    found = {external_entries(tensor).get("location", "") for tensor in old.graph.initializer}
    return {name for name in found if _is_data_name(name, path.name)}


def _is_data_name(name: str, model: str) -> bool:
    return re.fullmatch(re.escape(model) + r"(\.\d+)?\.data", name) is not None


def _data_name(path: Path, data: Path, own: set[str]) -> str:
    """The name of a file with the same weights, which another run may just have written, else one that is free."""
    numbered = (f"{path.name}{number}.data" for number in ("", *(f".{count}" for count in range(1, 1000))))
    names = ((name, path.parent / name) for name in (*sorted(own), *numbered))
    return next(
        name
        for name, place in names
        if (place.is_file() and filecmp.cmp(place, data, shallow=False)) or not (place.exists() or name in own)
    )

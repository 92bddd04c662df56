"""Where calibration data comes from: files, folders, images, functions, arrays, readers. Nothing is ever unpickled."""

from __future__ import annotations

import importlib.util
import inspect
import math
import secrets
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError

from lindep_onnx.data.images import SUFFIXES as IMAGE_SUFFIXES
from lindep_onnx.data.images import image_files, images
from lindep_onnx.data.inputs import (
    UNNAMED,
    Array,
    Arrays,
    Header,
    InputSpec,
    Shard,
    kind_of,
    listed,
)
from lindep_onnx.data.npz import UNREADABLE, npy_header, npz_headers
from lindep_onnx.data.spool import Reading, in_memory, plain, spooled
from lindep_onnx.errors import CalibrationError, UsageError, one_line
from lindep_onnx.files import discard, in_order, suggestion

#: What is said first where there is no real data.
RANDOM = (
    "WARNING: random inputs took the place of calibration data. They are nothing like real ones: errors, agreement and "
    "refits are about noise, and the accuracy on real data may be far below. Give --calib DATA before using the result."
)
#: What `FILE.py` alone names, as in polygraphy.
DEFAULT_FUNCTION = "load_data"
SUFFIXES = (".npz", ".npy")


@dataclass(frozen=True)
class RandomInputs:
    """A source of random samples: a last resort, since they are nothing like real ones.

    Attributes:
        count: how many.
    """

    count: int


@dataclass(frozen=True)
class Sources:
    """What a source came to.

    Attributes:
        shards: the arrays.
        notes: what was made of them on the way.
    """

    shards: Sequence[Shard]
    notes: tuple[str, ...] = ()


def shards_of(source: Any, reading: Reading) -> Sources:
    """Find out what a source is, and read as much of it as is needed to know what it holds.

    Args:
        source: as `lindep_onnx.data.open_samples` takes it.
        reading: how to read it.

    Raises:
        CalibrationError: the data is missing, damaged or does not fit.
        UsageError: `FILE.py:NAME` names nothing that data can come from, or image options are given without images.
    """
    if isinstance(source, str | Path):
        found = _from_text(str(source), reading)
        if found is not None:
            return found
    if reading.options.asked_for:
        raise UsageError(
            "--image-size, --resize, --scale, --mean, --std, --layout and --color are for folders of images, and the "
            "calibration data is none; drop them, or prepare the data there."
        )
    if isinstance(source, str | Path):
        text = str(source)
        if _is_code(text):
            return Sources(spooled(_called(text, "--calib"), text, reading))
        return Sources(_from_path(Path(text), [spec.name for spec in reading.specs], reading.folder))
    where = "the calibration data"
    if isinstance(source, RandomInputs):
        feeds = _random_feeds(source.count, reading)
        return Sources(spooled(feeds, "random inputs", reading, source.count))
    if isinstance(source, Mapping):
        return Sources([in_memory(where, source)])
    if hasattr(source, "__array__"):
        return Sources([in_memory(where, {UNNAMED: source})])
    if source is None:
        return Sources([in_memory("no calibration data", {})])
    return Sources(spooled(_feeds(source, where), where, reading))


def _is_code(text: str) -> bool:
    return not Path(text).is_dir() and (text.endswith(".py") or (".py:" in text and not Path(text).exists()))


def _from_text(text: str, reading: Reading) -> Sources | None:
    """A folder of images; None if it is something else."""
    path = Path(text)
    try:
        is_folder = path.is_dir()
        path.exists()
    except (OSError, ValueError) as error:  # no name for a file: too long, or with a NUL in it
        raise CalibrationError(f"{text[:80]!r}: cannot be looked up ({error}).") from error
    if not is_folder or (_has_arrays(path) and not reading.options.asked_for):
        return None
    files = image_files(path)
    if not files:
        return None
    count, feeds, note = images(path, files, reading.specs, reading.options)
    return Sources(spooled(feeds, str(path), reading, count), (note,))


def _has_arrays(folder: Path) -> bool:
    return bool(_sets(folder) or any(item.suffix.lower() in SUFFIXES for item in folder.iterdir()))


def _sets(folder: Path) -> list[Path]:
    found = sorted(folder.glob("test_data_set_*"), key=in_order)
    return found or ([folder] if (folder / "input_0.pb").is_file() else [])


def _called(text: str, flag: str) -> Iterator[Any]:
    # A generator of its own, so that what the function raises is treated like what its items raise.
    named = _load_named(text, flag, DEFAULT_FUNCTION)
    if not callable(named) and not hasattr(named, "get_next") and not isinstance(named, Iterable):
        raise UsageError(
            f"{flag}: {text} is of type {type(named).__name__}; name a function that yields dicts of arrays."
        )
    needed = _needed_arguments(named)
    if needed:
        raise UsageError(
            f"{flag}: {text} needs the argument(s) {', '.join(needed)}, and is called without any; give them defaults."
        )
    made = isinstance(named, type) or (callable(named) and not hasattr(named, "get_next"))
    yield from _feeds(named() if made else named, text)


def _needed_arguments(named: Any) -> list[str]:
    if not callable(named):
        return []
    try:
        parameters = inspect.signature(named).parameters.values()
    except (ValueError, TypeError):  # a builtin that tells nothing
        return []
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in several]


def _random_feeds(count: int, reading: Reading) -> Iterator[dict[str, Array]]:
    """Standard normal values, or evenly spread ones where a range is known."""
    rng = np.random.default_rng(reading.options.seed)
    shapes = {}
    for spec in reading.specs:
        shape = spec.shape
        fixed = [size for axis, size in enumerate(shape or ()) if axis != spec.axis]
        free = [str(size) for size in fixed if not isinstance(size, int)]
        if shape is None or free:
            raise CalibrationError(
                f"random inputs: input {spec.name!r} leaves sizes open ({', '.join(free) or 'all'}), so that there is "
                "nothing to draw; give --calib DATA, or export with fixed sizes."
            )
        kind = kind_of(spec.dtype)
        if kind not in ("float", "bool") and spec.range is None:
            raise CalibrationError(
                f"random inputs: nobody knows which values of {spec.dtype} input {spec.name!r} takes; say so with "
                f"--input-range {spec.name}=LO:HI, or give --calib DATA."
            )
        sizes = enumerate(shape)
        shapes[spec.name] = tuple(1 if axis == spec.axis else int(size) for axis, size in sizes)
    for _ in range(count):
        yield {spec.name: _drawn(rng, spec, shapes[spec.name]) for spec in reading.specs}


def _drawn(rng: np.random.Generator, spec: InputSpec, size: tuple[int, ...]) -> Array:
    if kind_of(spec.dtype) == "bool":
        return np.asarray(rng.random(size) < 0.5)
    if spec.range is None:
        return np.asarray(rng.normal(size=size)).astype(spec.dtype)
    low, high = spec.range
    if kind_of(spec.dtype) == "integer":
        return np.asarray(rng.integers(math.ceil(low), math.floor(high), size=size, endpoint=True)).astype(spec.dtype)
    return np.asarray(rng.uniform(low, high, size)).astype(spec.dtype)


def _from_path(path: Path, inputs: Sequence[str], folder: Path) -> list[Shard]:
    if path.is_dir():
        sets = _sets(path)
        if sets:
            return [_onnx_set(item, inputs) for item in sets]
        files = sorted((item for item in path.iterdir() if item.suffix.lower() in SUFFIXES), key=in_order)
        if not files:
            raise CalibrationError(
                f"{path}: holds neither .npz or .npy files, nor images, nor test_data_set_* folders."
            )
        return [_file(item, folder) for item in files]
    if not path.exists():
        raise CalibrationError(f"{path}: no such calibration data.{suggestion(path)}")
    if path.suffix.lower() not in SUFFIXES:
        image = " For images give their folder." if path.suffix.lower() in IMAGE_SUFFIXES else ""
        raise CalibrationError(
            f"{path}: calibration data is .npz, .npy, a folder or FILE.py:FUNC, not {path.suffix or 'a plain file'}."
            f"{image}"
        )
    return [_file(path, folder)]


def _file(path: Path, folder: Path) -> Shard:
    try:
        if path.suffix.lower() == ".npz":
            found = npz_headers(path)
        else:
            with path.open("rb") as file:
                found = {UNNAMED: npy_header(file, path.stat().st_size)}
    except PermissionError as error:
        raise CalibrationError(f"{path}: cannot be read ({error.strerror}).") from error
    except UNREADABLE as error:
        raise CalibrationError(f"{path}: is not a readable {path.suffix} file ({one_line(error)}).") from error
    headers = {name: Header(*header) for name, header in found.items()}
    for name, header in headers.items():
        if header.dtype.hasobject:
            raise CalibrationError(
                f"{path}: array {name!r} holds pickled Python objects, which are never loaded; save plain numbers."
            )
    if path.suffix.lower() == ".npy":
        return Shard(str(path), headers, lambda: {UNNAMED: np.load(path, mmap_mode="r", allow_pickle=False)})
    return Shard(str(path), headers, lambda: _npz_arrays(path, headers, folder))


def _npz_arrays(path: Path, headers: Mapping[str, Header], folder: Path) -> Arrays:
    """Memory maps of the arrays of an archive, unpacked into `folder` first."""
    arrays: dict[str, Array] = {}
    for old in folder.glob("unpacked_*"):  # of the shard before this one; open maps outlive the name
        discard(old)
    with zipfile.ZipFile(path) as archive:
        for number, (name, header) in enumerate(headers.items()):
            item = archive.getinfo(name + ".npy")
            if not math.prod(header.shape):
                arrays[name] = np.zeros(header.shape, header.dtype)
                continue
            target = folder / f"unpacked_{number}_{secrets.token_hex(4)}.npy"  # the name may still be taken
            free = shutil.disk_usage(folder).free
            if item.file_size > free:
                raise CalibrationError(
                    f"{path}: array {name!r} unpacks to {item.file_size:,} bytes, but only {free:,} are free for it."
                )
            try:
                with archive.open(item) as packed, target.open("wb") as file:
                    shutil.copyfileobj(packed, file, 1 << 20)
            except UNREADABLE as error:
                raise CalibrationError(f"{path}: array {name!r} is damaged ({error}).") from error
            arrays[name] = np.load(target, mmap_mode="r", allow_pickle=False)
    return arrays


def _onnx_set(folder: Path, inputs: Sequence[str]) -> Shard:
    def read() -> dict[str, Array]:
        arrays = {}
        for file in sorted(folder.glob("input_*.pb")):
            number = file.stem.removeprefix("input_")
            if number.isdigit():
                name, value = _onnx_tensor(file)
                at = int(number)
                arrays[name if name in inputs or at >= len(inputs) else inputs[at]] = value
        return arrays

    return Shard(str(folder), in_memory(str(folder), read()).headers, read, feed=True)


def _onnx_tensor(file: Path) -> tuple[str, Array]:
    tensor = onnx.TensorProto()
    try:
        tensor.ParseFromString(file.read_bytes())
        return tensor.name, plain(onnx.numpy_helper.to_array(tensor), f"{file}: the tensor")
    except (DecodeError, ValueError, TypeError, OSError, KeyError) as error:
        raise CalibrationError(f"{file}: is not a readable ONNX tensor.") from error


def _feeds(source: Any, where: str) -> Iterator[Any]:
    """Dicts of arrays from an iterable, a generator, or an object with `get_next()` that ends with None."""
    if hasattr(source, "get_next"):
        yield from iter(source.get_next, None)
        return
    if isinstance(source, Mapping) or hasattr(source, "__array__"):
        yield source
        return
    if not isinstance(source, Iterable):
        raise CalibrationError(f"{where}: expected dicts of arrays by input name, found {type(source).__name__}.")
    yield from source


def load_function(text: str, flag: str) -> Callable[..., Any]:
    """Load the function that `FILE.py:FUNC` names.

    Args:
        text: what the user wrote.
        flag: the option it was given to, for messages.

    Raises:
        UsageError: the file or the function is not there, or the file fails to load.
    """
    function = _load_named(text, flag, "")
    if not callable(function):
        raise UsageError(f"{flag}: {text} is no function.")
    return function  # type: ignore[no-any-return]


def _load_named(text: str, flag: str, default: str) -> Any:
    """What `FILE.py:NAME` names; `FILE.py` alone names `default`, if there is one."""
    path, _, name = (text, "", default) if default and text.endswith(".py") else text.rpartition(":")
    if not path or not name.isidentifier() or not Path(path).is_file():
        raise UsageError(f"{flag} takes FILE.py:FUNC with an existing file, not {text!r}.")
    spec = importlib.util.spec_from_file_location(f"lindep_onnx_user_{Path(path).stem}", path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{flag}: {path} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    beside = str(Path(path).resolve().parent)  # what lies beside a script can be imported from it
    sys.path.insert(0, beside)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UsageError(f"{flag}: {path} cannot be loaded: {type(error).__name__}: {error}") from error
    finally:
        if beside in sys.path:
            sys.path.remove(beside)
    if not hasattr(module, name):
        defined = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        there = f" It has {listed(defined)}." if defined else ""
        raise UsageError(f"{flag}: {path} has no function {name!r}.{there}")
    return getattr(module, name)

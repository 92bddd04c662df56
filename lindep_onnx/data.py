"""Calibration data: where it comes from, whether it fits the model, and which samples are used for what.

Whatever the source, samples end up in *shards*: arrays by input name whose leading axis counts samples. Arrays in files
are memory maps and what a generator yields is spooled to a temporary folder, so that memory does not grow with the
number of samples and every pass reads the same data. Nothing is ever unpickled.
"""

from __future__ import annotations

import enum
import hashlib
import importlib.util
import itertools
import math
import shutil
import struct
import sys
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.lib import format as npy
from numpy.typing import NDArray

from lindep_onnx.errors import CalibrationError, UsageError
from lindep_onnx.files import Scratch
from lindep_onnx.shapes import Shape

__all__ = ["Batch", "InputSpec", "Part", "Samples", "load_function", "open_samples"]

Array: TypeAlias = NDArray[Any]
Arrays: TypeAlias = "Mapping[str, Array]"

#: The name under which an unnamed array arrives (`.npy`, `numpy.savez` without keywords).
UNNAMED = "arr_0"
#: Fewer different samples than this cannot be split into three parts.
LEAST_SAMPLES = 3
EMPTY = np.empty(0, dtype=np.int64)
#: A model with a larger fixed batch means harm: its last batch is filled up.
MOST_BATCH = 1 << 16
SUFFIXES = (".npz", ".npy")
#: What the standard library and NumPy raise on damaged files; a locked archive is a RuntimeError.
UNREADABLE = (
    OSError,
    ValueError,
    EOFError,
    KeyError,
    RuntimeError,
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)


class Part(enum.Enum):
    """What a sample is used for."""

    FIT = "fit"
    SELECT = "select"
    VERIFY = "verify"


@dataclass(frozen=True)
class InputSpec:
    """What the model declares about one of its inputs.

    Attributes:
        name: of the graph input.
        dtype: element type.
        shape: sizes; symbols are strings. Empty for scalars, None where the rank is not declared.
        range: lowest and highest value that the user allows; None for any.
    """

    name: str
    dtype: np.dtype[Any]
    shape: Shape | None
    range: tuple[float, float] | None = None


@dataclass(frozen=True)
class Batch:
    """What one run is fed with.

    Attributes:
        feeds: arrays by input name.
        samples: (n,) numbers of the samples that count; what the feeds hold beyond them is filler.
        size: samples in the feeds, filler included.
    """

    feeds: Arrays
    samples: NDArray[np.int64]
    size: int


@dataclass(frozen=True)
class _Header:
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Shard:
    """Arrays that are read when they are needed.

    Attributes:
        where: for messages.
        headers: type and shape of each array.
        read: returns the arrays, memory maps wherever that is possible.
    """

    where: str
    headers: Mapping[str, _Header]
    read: Callable[[], Arrays]


class Samples:
    """Calibration samples that fit the model, split into parts. A context manager: it may own temporary files.

    Attributes:
        parts: sample numbers of each part, ascending.
        notes: what the user should know about the data.
    """

    def __init__(self, shards: Sequence[_Shard], plan: _Feeding, folder: Scratch) -> None:
        self._shards = shards
        self._plan = plan
        self._folder = folder
        self._open: tuple[int, Arrays] | None = None
        self._starts = np.concatenate([[0], np.cumsum([plan.count(shard) for shard in shards])])
        self.parts: Mapping[Part, NDArray[np.int64]] = {}
        self.notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts.values())

    def __enter__(self) -> Samples:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open = None
        self._folder.cleanup()

    @property
    def free_batch(self) -> bool:
        """Whether the model takes any number of samples in a run."""
        return self._plan.fixed_batch is None

    def batches(self, *parts: Part, limit: int | None = None, size: int | None = None) -> Iterator[Batch]:
        """Feeds for one pass over some parts (all by default), in ascending order of the samples.

        Args:
            *parts: which samples.
            limit: stop after so many samples.
            size: samples per run, where the model leaves that free; None for the usual number.

        Raises:
            CalibrationError: a value is NaN, infinite or outside the declared range, naming input and sample.
        """
        for numbers in self.numbers(*parts, limit=limit, size=size):
            yield self._batch(int(self._shard_of(numbers[:1])[0]), numbers)

    def numbers(self, *parts: Part, limit: int | None = None, size: int | None = None) -> Iterator[NDArray[np.int64]]:
        """The sample numbers of every batch that `batches` gives."""
        numbers = np.sort(np.concatenate([self.parts[part] for part in (parts or Part)]))[:limit]
        shard = self._shard_of(numbers)
        step = size if size is not None and self.free_batch else self._plan.batch
        for index in np.unique(shard).tolist():
            own = numbers[shard == index]
            for start in range(0, len(own), step):
                yield own[start : start + step]

    def _shard_of(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.asarray(np.searchsorted(self._starts, numbers, side="right") - 1)

    @property
    def batch(self) -> int:
        """Samples in a full run."""
        return self._plan.batch

    @property
    def uniform(self) -> bool:
        """Whether all samples have the same shapes."""
        specs = [spec for spec in self._plan.specs if spec.name not in self._plan.shared]
        shapes = {
            tuple(shard.headers[_source(spec, shard.headers)].shape[1:] for spec in specs) for shard in self._shards
        }
        return len(shapes) == 1

    def take(self, numbers: NDArray[np.int64]) -> Arrays:
        """Feeds for chosen samples of a `uniform` source, in the order asked for.

        Args:
            numbers: sample numbers, at most `batch`; filled up by repetition where the model fixes the batch.

        Raises:
            CalibrationError: a value is NaN or infinite.
        """
        numbers = self._filled(numbers)
        shard = np.searchsorted(self._starts, numbers, side="right") - 1
        parts = [self._feeds(index, numbers[shard == index]) for index in np.unique(shard).tolist()]
        places = np.argsort(np.argsort(shard, kind="stable"))
        return {
            name: value if name in self._plan.shared else np.concatenate([part[name] for part in parts])[places]
            for name, value in parts[0].items()
        }

    def _batch(self, index: int, numbers: NDArray[np.int64]) -> Batch:
        filled = self._filled(numbers)
        return Batch(MappingProxyType(self._feeds(index, filled)), numbers, len(filled))

    def _filled(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        fixed = self._plan.fixed_batch
        return numbers if fixed is None else np.concatenate([numbers, np.repeat(numbers[-1:], fixed - len(numbers))])

    def _feeds(self, index: int, numbers: NDArray[np.int64]) -> dict[str, Array]:
        """Samples of one shard."""
        rows = numbers - self._starts[index]
        arrays = self._arrays(index)
        feeds = {}
        for spec in self._plan.specs:
            value = arrays[_source(spec, arrays)]
            taken = np.asarray(value if spec.name in self._plan.shared else value[rows])
            where = f"{self._shards[index].where}: input {spec.name!r}"
            feeds[spec.name] = _cast(taken, spec.dtype, where)
            fed = feeds[spec.name]
            # What counts comes first; filler repeats it.
            good = np.isfinite(fed) if _kind(spec.dtype) == "float" else np.ones(1, dtype=bool)
            if not good.all():
                raise _not_finite(where, spec.dtype, taken, self._sample(spec, numbers, good))
            if spec.range is not None and fed.size:
                low, high = spec.range
                inside = (fed >= low) & (fed <= high)
                if not inside.all():
                    raise _outside(where, spec.range, fed[~inside].flat[0], self._sample(spec, numbers, inside))
        return feeds

    def _sample(self, spec: InputSpec, numbers: NDArray[np.int64], good: Array) -> int | None:
        """The first sample that is not good throughout; None if the array belongs to no sample."""
        if spec.name in self._plan.shared:
            return None
        return int(numbers[np.argmin([row.all() for row in good])])

    def _arrays(self, index: int) -> Arrays:
        if self._open is None or self._open[0] != index:
            self._open = (index, self._shards[index].read())
        return self._open[1]

    def digests(self) -> list[bytes]:
        """A digest of the content of every sample, in order."""
        found = []
        for index, shard in enumerate(self._shards):
            arrays = self._arrays(index)
            alike = hashlib.blake2b(digest_size=16)
            names = []
            for spec in self._plan.specs:
                name = _source(spec, arrays)
                if spec.name in self._plan.shared:
                    alike.update(np.asarray(arrays[name]).tobytes())
                else:
                    names.append(name)
            for row in range(self._plan.count(shard)):
                digest = alike.copy()
                for name in names:
                    digest.update(np.asarray(arrays[name][row]).tobytes())
                found.append(digest.digest())
        return found


def open_samples(
    source: Any,
    inputs: Sequence[InputSpec],
    *,
    seed: int,
    holdout: float,
    max_samples: int | None,
    batch_size: int,
    parts: Mapping[Part, NDArray[np.int64]] | None = None,
) -> Samples:
    """Open calibration data, hold it against the inputs of the model, and split it.

    Args:
        source: a path (`.npz`, `.npy`, a folder of them or of ONNX `test_data_set_*` folders), `FILE.py:FUNC`, a dict
            of arrays, an iterable of such dicts, or an object with `get_next()`.
        inputs: what the model declares.
        seed: of the split.
        holdout: share of the samples that is not fitted: half of it selects, half verifies.
        max_samples: use at most this many: spread over arrays, the first ones of a generator.
        batch_size: samples per run where the model leaves the batch free.
        parts: sample numbers of the parts, where they are known: then nothing is read to split the samples.

    Raises:
        CalibrationError: the data is missing, damaged or does not fit.
        UsageError: `FILE.py:FUNC` names nothing that can be called.
    """
    folder = Scratch()
    try:
        shards = _shards(source, inputs, Path(folder.name), max_samples)
        plan = _feeding(shards, inputs, batch_size)
        samples = Samples(shards, plan, folder)
        total = int(samples._starts[-1])
        if not total:
            raise CalibrationError(f"{shards[0].where}: holds no samples; give at least {LEAST_SAMPLES}.")
        split_notes: tuple[str, ...] = ()
        if parts is None:
            samples.parts, split_notes = _split(samples.digests(), seed, holdout, max_samples)
        else:
            samples.parts = MappingProxyType({part: parts.get(part, EMPTY) for part in Part})
        samples.notes = (*plan.notes, *split_notes)
    except BaseException:
        folder.cleanup()
        raise
    return samples


def _split(
    digests: Sequence[bytes], seed: int, holdout: float, max_samples: int | None
) -> tuple[Mapping[Part, NDArray[np.int64]], tuple[str, ...]]:
    """Part of every sample by a seeded hash of its number; identical samples share the number of the first."""
    first: dict[bytes, int] = {}
    number = np.array([first.setdefault(digest, index) for index, digest in enumerate(digests)])
    ranks = {index: _hash(seed, index) for index in first.values()}
    distinct = sorted(ranks, key=lambda index: (ranks[index], index))
    notes = []
    if len(distinct) < len(digests):
        copies = len(digests) - len(distinct)
        notes.append(f"{copies:,} of {len(digests):,} calibration samples are copies of others and share their part.")
    if max_samples is not None:
        # Not by the hash that decides the part: the lowest of it are all of one part.
        used = set(sorted(distinct, key=lambda index: _hash(seed, index, ":used"))[:max_samples])
        distinct = [index for index in distinct if index in used]
    if len(distinct) < LEAST_SAMPLES:
        notes.append(
            f"{len(distinct)} different calibration sample(s) prove nothing about others: only what the weights "
            f"imply can go. Give at least {LEAST_SAMPLES}, better some hundreds."
        )
        chosen: dict[Part, list[int]] = {Part.FIT: [], Part.SELECT: [], Part.VERIFY: list(distinct)}
    else:
        chosen = {Part.FIT: [], Part.SELECT: [], Part.VERIFY: []}
        for index in distinct:
            part = Part.FIT if ranks[index] >= holdout else Part.SELECT if ranks[index] >= holdout / 2 else Part.VERIFY
            chosen[part].append(index)
        for part in (Part.VERIFY, Part.SELECT, Part.FIT):
            if not chosen[part]:
                largest = max(Part, key=lambda other: len(chosen[other]))
                chosen[part].append(chosen[largest].pop(0 if largest is Part.FIT else -1))
    parts = {part: np.array(sorted(members), dtype=np.int64) for part, members in chosen.items()}
    if max_samples is None:
        # Copies weigh in where the original is: a data set that repeats a sample means to.
        parts = {part: np.flatnonzero(np.isin(number, members)) for part, members in parts.items()}
    return MappingProxyType(parts), tuple(notes)


def _hash(seed: int, index: int, purpose: str = "") -> float:
    digest = hashlib.blake2b(f"{seed}:{index}{purpose}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big") / 2**56


# ---- does it fit the model ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Feeding:
    """How shards are fed to the model.

    Attributes:
        specs: the inputs.
        shared: names of inputs that have no sample axis and are fed whole with every run.
        batch: samples per run at most.
        fixed_batch: samples per run exactly, where the model fixes it.
        notes: casts.
    """

    specs: Sequence[InputSpec]
    shared: frozenset[str]
    batch: int
    fixed_batch: int | None
    notes: tuple[str, ...]

    def count(self, shard: _Shard) -> int:
        """Number of samples in a shard."""
        sampled = [spec for spec in self.specs if spec.name not in self.shared]
        return shard.headers[_source(sampled[0], shard.headers)].shape[0] if sampled else 1


def _feeding(shards: Sequence[_Shard], specs: Sequence[InputSpec], batch_size: int) -> _Feeding:
    notes: dict[str, None] = {}
    for shard in shards:
        _check_arrays(shard, specs, notes)
    shared = _shared([shard.headers for shard in shards], specs)
    sampled = [spec for spec in specs if spec.name not in shared]
    for shard in shards:
        _check_lengths(shard.where, {spec.name: shard.headers[_source(spec, shard.headers)] for spec in sampled})
    fixed = {spec.shape[0] for spec in sampled if spec.shape and isinstance(spec.shape[0], int)}
    if len(fixed) > 1:
        raise CalibrationError(
            f"The model fixes different leading sizes for its inputs ({sorted(map(int, fixed))}), so that it is not "
            "clear what a sample is; export it with a free batch axis."
        )
    fixed_batch = int(fixed.pop()) if fixed else None
    if fixed_batch is not None and not 0 < fixed_batch <= MOST_BATCH:
        raise CalibrationError(
            f"The model declares a batch of {fixed_batch:,} samples; it must be from 1 to {MOST_BATCH:,}, or free."
        )
    return _Feeding(specs, shared, fixed_batch or batch_size, fixed_batch, tuple(notes))


def _source(spec: InputSpec, arrays: Mapping[str, object]) -> str:
    """The key of the array for an input."""
    return spec.name if spec.name in arrays else UNNAMED


def _is_whole(spec: InputSpec, header: _Header) -> bool:
    """Whether an array has exactly the fixed shape that the model declares."""
    return spec.shape is not None and header.shape == spec.shape


def _shared(layouts: Sequence[Mapping[str, _Header]], specs: Sequence[InputSpec]) -> frozenset[str]:
    """Names of the inputs whose arrays have no sample axis.

    An array of exactly the declared shape may be one batch of samples or something that all samples share. It is
    shared if the model leaves the batch of another input free, or fixes it to another size, or if there are not as
    many of it as there are of the inputs that have a sample axis beyond doubt.
    """
    found = [(spec, [layout[_source(spec, layout)] for layout in layouts]) for spec in specs]
    whole = [(spec, headers) for spec, headers in found if all(_is_whole(spec, header) for header in headers)]
    certain = [(spec, headers) for spec, headers in found if spec.name not in {other.name for other, _ in whole}]
    if any(not spec.shape or isinstance(spec.shape[0], str) for spec, _ in certain):
        return frozenset(spec.name for spec, _ in whole)
    ranked = [(spec, headers) for spec, headers in whole if spec.shape]
    samples = {(spec.shape[0], _lengths(headers)) for spec, headers in (certain or ranked[:1]) if spec.shape}
    return frozenset(
        spec.name for spec, headers in whole if not spec.shape or (spec.shape[0], _lengths(headers)) not in samples
    )


def _lengths(headers: Iterable[_Header]) -> tuple[int, ...]:
    return tuple(header.shape[0] for header in headers)


def _check_lengths(where: str, headers: Mapping[str, _Header]) -> None:
    lengths = {name: header.shape[0] for name, header in headers.items()}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{name}: {length}" for name, length in lengths.items())
        raise CalibrationError(
            f"{where}: the arrays hold different numbers of samples along their leading axis ({found})."
        )


def _check_arrays(shard: _Shard, specs: Sequence[InputSpec], notes: dict[str, None]) -> None:
    _check_names(shard, specs)
    for spec in specs:
        header = shard.headers[_source(spec, shard.headers)]
        _check_type(shard, spec, header, notes)
        if not _is_whole(spec, header):
            _check_shape(shard, spec, header)


def _check_names(shard: _Shard, specs: Sequence[InputSpec]) -> None:
    names = [spec.name for spec in specs]
    found = list(shard.headers)
    if found == [UNNAMED] and len(names) == 1:
        return
    missing = [name for name in names if name not in found]
    if missing:
        raise CalibrationError(
            f"{shard.where}: no array for the model input {missing[0]!r}; the inputs are {_listed(names)}, "
            f"the arrays {_listed(found)}. Name the arrays after the inputs."
        )
    extra = [name for name in found if name not in names]
    if extra:
        raise CalibrationError(
            f"{shard.where}: the model has no input {extra[0]!r}; the inputs are {_listed(names)}, "
            f"the arrays {_listed(found)}. Leave it out."
        )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:8])) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _kind(dtype: np.dtype[Any]) -> str:
    if dtype.kind in "iu":
        return "integer"
    if dtype.kind == "f" or (dtype.kind == "V" and "float" in dtype.name):
        return "float"
    return {"b": "bool", "U": "string", "S": "string", "O": "string"}.get(dtype.kind, dtype.name)


def _check_type(shard: _Shard, spec: InputSpec, header: _Header, notes: dict[str, None]) -> None:
    if _kind(header.dtype) != _kind(spec.dtype):
        hint = " Scale and normalise images the way the model was trained." if header.dtype == np.uint8 else ""
        raise CalibrationError(
            f"{shard.where}: input {spec.name!r} wants {spec.dtype}, the array is {header.dtype}; convert it.{hint}"
        )
    if header.dtype != spec.dtype and _kind(spec.dtype) != "string":
        notes[f"Input {spec.name!r}: {header.dtype} data is cast to {spec.dtype}."] = None


def _check_shape(shard: _Shard, spec: InputSpec, header: _Header) -> None:
    wanted, found = spec.shape, header.shape
    if wanted is None and found:
        return
    fits = wanted is not None and len(wanted) == len(found) > 0
    for axis in range(1, len(found) if fits else 0):
        assert wanted is not None
        fits = fits and (not isinstance(wanted[axis], int) or wanted[axis] == found[axis])
    if not fits:
        sizes = ["?" if isinstance(size, str) and size.startswith("?") else str(size) for size in (wanted or ())[1:]]
        raise CalibrationError(
            f"{shard.where}: input {spec.name!r} wants arrays of shape [{', '.join(['samples', *sizes])}], "
            f"this one is [{', '.join(map(str, found))}]."
        )


def _cast(value: Array, dtype: np.dtype[Any], where: str) -> Array:
    if dtype.kind == "O":
        return value.astype(object)
    if dtype.kind in "iu" and value.dtype != dtype and value.size:
        limits = np.iinfo(dtype)
        if int(value.min()) < limits.min or int(value.max()) > limits.max:
            raise CalibrationError(f"{where} holds integers that do not fit {dtype}.")
    try:
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(value, dtype=dtype).reshape(value.shape)
    except UnicodeDecodeError:
        raise CalibrationError(f"{where} holds bytes that are no ASCII text; store it as strings.") from None


def _not_finite(where: str, dtype: np.dtype[Any], stored: Array, sample: int | None) -> CalibrationError:
    what = "NaN or infinite values" if not np.isfinite(stored).all() else f"values too large for {dtype}"
    which, remedy = ("", "repair it") if sample is None else (f" (sample {sample})", "remove or repair this sample")
    return CalibrationError(f"{where} holds {what}{which}; {remedy}.")


def _outside(where: str, allowed: tuple[float, float], found: Any, sample: int | None) -> CalibrationError:
    which = "" if sample is None else f" (sample {sample})"
    return CalibrationError(
        f"{where} holds {float(found):.6g}{which}, outside the --input-range {allowed[0]:g}:{allowed[1]:g}; "
        "widen the range or repair the data."
    )


# ---- sources ------------------------------------------------------------------------------------------------------


def _shards(source: Any, specs: Sequence[InputSpec], folder: Path, max_samples: int | None) -> list[_Shard]:
    if isinstance(source, str | Path):
        text = str(source)
        path = Path(text)
        try:
            exists = path.exists()
        except (OSError, ValueError) as error:  # no name for a file: too long, or with a NUL in it
            raise CalibrationError(f"{text[:80]!r}: cannot be looked up ({error}).") from error
        if exists or ".py:" not in text:
            return _from_path(path, [spec.name for spec in specs], folder)
        return _spooled(_called(load_function(text, "--calib"), text), text, folder, max_samples, specs)
    where = "the calibration data"
    if isinstance(source, Mapping):
        return [_in_memory(where, source)]
    if source is None:
        return [_in_memory("no calibration data", {})]
    return _spooled(_feeds(source, where), where, folder, max_samples, specs)


def _called(function: Callable[[], Any], where: str) -> Iterator[Any]:
    # A generator of its own, so that what the function raises is treated like what its items raise.
    yield from _feeds(function(), where)


def _from_path(path: Path, inputs: Sequence[str], folder: Path) -> list[_Shard]:
    if path.is_dir():
        sets = sorted(path.glob("test_data_set_*")) or ([path] if (path / "input_0.pb").is_file() else [])
        if sets:
            return [_onnx_set(item, inputs) for item in sets]
        files = sorted(item for item in path.iterdir() if item.suffix in SUFFIXES)
        if not files:
            raise CalibrationError(f"{path}: holds neither .npz or .npy files nor ONNX test_data_set_* folders.")
        return [_file(item, folder) for item in files]
    if not path.exists():
        raise CalibrationError(f"{path}: no such calibration data.")
    if path.suffix not in SUFFIXES:
        raise CalibrationError(
            f"{path}: calibration data is .npz, .npy, a folder or FILE.py:FUNC, not {path.suffix or 'a plain file'}."
        )
    return [_file(path, folder)]


def _file(path: Path, folder: Path) -> _Shard:
    read_headers = _npz_headers if path.suffix == ".npz" else _npy_headers
    try:
        headers = read_headers(path)
    except PermissionError as error:
        raise CalibrationError(f"{path}: cannot be read ({error.strerror}).") from error
    except UNREADABLE as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CalibrationError(f"{path}: is not a readable {path.suffix} file ({reason}).") from error
    for name, header in headers.items():
        if header.dtype.hasobject:
            raise CalibrationError(
                f"{path}: array {name!r} holds pickled Python objects, which are never loaded; save plain numbers."
            )
    if path.suffix == ".npy":
        return _Shard(str(path), headers, lambda: {UNNAMED: np.load(path, mmap_mode="r", allow_pickle=False)})
    return _Shard(str(path), headers, lambda: _npz_arrays(path, headers, folder))


def _npy_headers(path: Path) -> dict[str, _Header]:
    with path.open("rb") as file:
        return {UNNAMED: _header(file, path.stat().st_size)}


def _header(file: Any, size: int) -> _Header:
    """The header of an array, held against the size of the file: what is read later is there."""
    version = npy.read_magic(file)
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"version {version} of the npy format is not supported")
    shape, _, dtype = read(file)
    if any(not 0 <= length < 2**63 for length in shape):
        raise ValueError(f"its shape {shape} is impossible")
    wanted, there = math.prod(map(int, shape)) * dtype.itemsize, size - file.tell()
    if not dtype.hasobject and wanted > there:
        raise ValueError(f"cut short: {wanted:,} bytes of data declared, {there:,} there")
    return _Header(dtype, tuple(int(length) for length in shape))


def _npz_headers(path: Path) -> dict[str, _Header]:
    headers = {}
    with zipfile.ZipFile(path) as archive:
        for item in archive.infolist():
            if not item.filename.endswith(".npy"):
                continue
            with archive.open(item) as file:
                headers[item.filename[: -len(".npy")]] = _header(file, item.file_size)
    if not headers:
        raise ValueError("there is no array in it")
    return headers


def _npz_arrays(path: Path, headers: Mapping[str, _Header], folder: Path) -> Arrays:
    """Memory maps of the arrays of an archive, unpacked into `folder` first."""
    arrays: dict[str, Array] = {}
    for old in folder.glob("unpacked_*"):  # of the shard before this one; open maps outlive the name
        old.unlink()
    with zipfile.ZipFile(path) as archive:
        for number, (name, header) in enumerate(headers.items()):
            item = archive.getinfo(name + ".npy")
            if not math.prod(header.shape):
                arrays[name] = np.zeros(header.shape, header.dtype)
                continue
            target = folder / f"unpacked_{number}.npy"
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


def _onnx_set(folder: Path, inputs: Sequence[str]) -> _Shard:
    def read() -> dict[str, Array]:
        arrays = {}
        for file in sorted(folder.glob("input_*.pb")):
            number = file.stem.removeprefix("input_")
            if number.isdigit():
                name, value = _onnx_tensor(file)
                at = int(number)
                arrays[name if name in inputs or at >= len(inputs) else inputs[at]] = value
        return arrays

    return _Shard(str(folder), _in_memory(str(folder), read()).headers, read)


def _onnx_tensor(file: Path) -> tuple[str, Array]:
    tensor = onnx.TensorProto()
    try:
        tensor.ParseFromString(file.read_bytes())
        return tensor.name, _plain(onnx.numpy_helper.to_array(tensor), f"{file}: the tensor")
    except (DecodeError, ValueError, TypeError, OSError, KeyError) as error:
        raise CalibrationError(f"{file}: is not a readable ONNX tensor.") from error


def _in_memory(where: str, values: Mapping[str, Any]) -> _Shard:
    arrays = {str(name): _plain(value, f"{where}: array {name!r}") for name, value in values.items()}
    headers = {name: _Header(value.dtype, value.shape) for name, value in arrays.items()}
    return _Shard(where, headers, lambda: arrays)


def _plain(value: Any, what: str) -> Array:
    """An array of numbers or strings."""
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise CalibrationError(f"{what} is no array of equally long rows ({error}).") from error
    if not array.dtype.hasobject:
        return array
    if array.dtype != object or not all(isinstance(item, str) for item in array.flat):
        raise CalibrationError(f"{what} holds Python objects; give plain numbers.")
    return array.astype(np.str_)


def _feeds(source: Any, where: str) -> Iterator[Mapping[str, Any]]:
    """Dicts of arrays from an iterable, a generator, or an object with `get_next()` that ends with None."""
    if hasattr(source, "get_next"):
        yield from iter(source.get_next, None)
        return
    if isinstance(source, Mapping):
        yield source
        return
    if not isinstance(source, Iterable):
        raise CalibrationError(f"{where}: expected dicts of arrays by input name, found {type(source).__name__}.")
    yield from source


def _spooled(
    feeds: Iterator[Any], where: str, folder: Path, max_samples: int | None, specs: Sequence[InputSpec]
) -> list[_Shard]:
    """Write what a generator yields to disk; dicts of the same layout follow each other in one shard."""
    runs: list[_Spool] = []
    count = 0
    try:
        for number in itertools.count():
            try:
                item = next(feeds)
            except StopIteration:
                break
            except CalibrationError:
                raise
            except Exception as error:
                raise CalibrationError(f"{where}: failed after {number} item(s): {error}") from error
            if not isinstance(item, Mapping):
                raise CalibrationError(
                    f"{where}: item {number} is a {type(item).__name__}, not a dict of arrays by input name."
                )
            shard = _in_memory(f"{where}: item {number}", item)
            _check_arrays(shard, specs, {})
            shared = _shared([shard.headers], specs)
            _check_lengths(shard.where, {n: h for n, h in shard.headers.items() if h.shape and n not in shared})
            if not runs or not runs[-1].takes(shard, shared):
                if runs:
                    runs[-1].close()
                runs.append(_Spool(folder, len(runs), shard, shared))
            try:
                count += runs[-1].write(shard.read())
            except OSError as error:
                raise CalibrationError(
                    f"{where}: cannot be kept in {folder} ({error.strerror or error}); use --max-samples."
                ) from error
            if max_samples is not None and count >= max_samples:
                break
    finally:
        if runs:
            runs[-1].close()
    if not runs:
        raise CalibrationError(f"{where}: yields nothing; give at least {LEAST_SAMPLES} samples.")
    return [spool.shard(where) for spool in runs]


class _Spool:
    """Files that arrays of one layout are appended to; arrays without a sample axis are the same for all of them."""

    def __init__(self, folder: Path, number: int, first: _Shard, shared: frozenset[str]) -> None:
        arrays = first.read()
        self._layout = self._of(first, shared)
        self._shared = {name: np.array(arrays[name]) for name in arrays if name not in self._layout}
        self._paths = {name: folder / f"spool_{number}_{place}.bin" for place, name in enumerate(self._layout)}
        self._files: dict[str, BinaryIO] = {name: path.open("wb") for name, path in self._paths.items()}
        self._rows = 0

    @staticmethod
    def _of(shard: _Shard, shared: frozenset[str]) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Type and shape of one sample, for all arrays that have a sample axis."""
        return {
            name: (header.dtype, header.shape[1:])
            for name, header in shard.headers.items()
            if header.shape and name not in shared
        }

    def takes(self, shard: _Shard, shared: frozenset[str]) -> bool:
        """Whether an item has the same layout, and the same arrays without a sample axis."""
        arrays = shard.read()
        return self._of(shard, shared) == self._layout and all(
            name in arrays and arrays[name].dtype == value.dtype and np.array_equal(arrays[name], value)
            for name, value in self._shared.items()
        )

    def write(self, arrays: Arrays) -> int:
        """Append an item and return how many samples it holds."""
        for name, file in self._files.items():
            file.write(arrays[name].tobytes())
            file.flush()  # a full disk shows here, not when the file is closed
        added = len(arrays[next(iter(self._files))]) if self._files else 1
        self._rows += added
        return added

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def shard(self, where: str) -> _Shard:
        """What was written, to be read back as memory maps."""
        spooled = {name: _Header(dtype, (self._rows, *rest)) for name, (dtype, rest) in self._layout.items()}
        shared = {name: _Header(value.dtype, value.shape) for name, value in self._shared.items()}

        def read() -> Arrays:
            maps = {
                name: np.memmap(self._paths[name], header.dtype, "r", shape=header.shape)
                if math.prod(header.shape) and header.dtype.itemsize
                else np.zeros(header.shape, header.dtype)
                for name, header in spooled.items()
            }
            return {**self._shared, **maps}

        return _Shard(where, {**shared, **spooled}, read)


def load_function(text: str, flag: str) -> Callable[..., Any]:
    """Load the function that `FILE.py:FUNC` names.

    Args:
        text: what the user wrote.
        flag: the option it was given to, for messages.

    Raises:
        UsageError: the file or the function is not there, or the file fails to load.
    """
    path, _, name = text.rpartition(":")
    if not path or not name.isidentifier() or not Path(path).is_file():
        raise UsageError(f"{flag} takes FILE.py:FUNC with an existing file, not {text!r}.")
    spec = importlib.util.spec_from_file_location(f"lindep_onnx_user_{Path(path).stem}", path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{flag}: {path} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UsageError(f"{flag}: {path} cannot be loaded: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UsageError(f"{flag}: {path} has no function {name!r}.")
    return function  # type: ignore[no-any-return]

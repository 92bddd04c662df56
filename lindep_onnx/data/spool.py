"""What a generator yields, kept on disk, so that memory does not grow with it and every pass reads the same."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lindep_onnx.data.inputs import (
    Array,
    Arrays,
    Header,
    InputSpec,
    Shard,
    check_arrays,
    check_lengths,
    without_samples,
)
from lindep_onnx.data.split import MIN_SAMPLES
from lindep_onnx.errors import CalibrationError, UsageError
from lindep_onnx.log import Log
from lindep_onnx.options import DataOptions


@dataclass(frozen=True)
class Reading:
    """How a source is read.

    Attributes:
        specs: inputs of the model.
        folder: for temporary files.
        options: what to make of images, and how many samples to use, where they have to be read one by one.
        log: told how far it is.
    """

    specs: Sequence[InputSpec]
    folder: Path
    options: DataOptions
    log: Log


def in_memory(where: str, values: Mapping[str, Any]) -> Shard:
    """Arrays that are there already."""
    arrays = {str(name): plain(value, f"{where}: array {name!r}") for name, value in values.items()}
    headers = {name: Header(value.dtype, value.shape) for name, value in arrays.items()}
    return Shard(where, headers, lambda: arrays)


def plain(value: Any, what: str) -> Array:
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


def _by_name(item: Any, where: str, specs: Sequence[InputSpec]) -> Mapping[str, Any]:
    """What a source yields as a dict; a bare array is taken for the only input."""
    if isinstance(item, Mapping):
        return item
    if len(specs) == 1 and hasattr(item, "__array__"):
        return {specs[0].name: item}
    names = ", ".join(f"{spec.name!r}: array" for spec in specs[:3]) + (", ..." if len(specs) > 3 else "")
    raise CalibrationError(
        f"{where} is a {type(item).__name__}, not a dict of arrays by input name; make it yield {{{names}}}."
    )


def spooled(feeds: Iterator[Any], where: str, reading: Reading, total: int | None = None) -> list[Shard]:
    """Write what a generator yields to disk; dicts of the same layout follow each other in one shard.

    Args:
        feeds: dicts of arrays.
        where: for messages.
        reading: how it is read.
        total: how many samples there are, if that is known.

    Raises:
        CalibrationError: what it yields is damaged or does not fit, or it fails.
    """
    specs, most = reading.specs, reading.options.max_samples
    total = min((number for number in (total, most) if number is not None), default=0)
    runs: list[Spool] = []
    count = 0
    try:
        for number, item in enumerate(_yielded(feeds, where)):
            shard = in_memory(f"{where}: item {number}", _by_name(item, f"{where}: item {number}", specs))
            check_arrays(shard, specs, {})
            shared = without_samples([shard.headers], specs)
            check_lengths(shard.where, {n: h for n, h in shard.headers.items() if h.shape and n not in shared})
            if not runs or not runs[-1].takes(shard, shared):
                if runs:
                    runs[-1].close()
                runs.append(Spool(reading.folder, len(runs), shard, shared))
            try:
                count += runs[-1].write(shard.read())
            except OSError as error:
                raise CalibrationError(
                    f"{where}: cannot be kept in {reading.folder} ({error.strerror or error}); use --max-samples."
                ) from error
            if total:
                reading.log.progress("read data", min(count, total), total)
            if most is not None and count >= most:
                break
    finally:
        if runs:
            runs[-1].close()
    if not runs:
        raise CalibrationError(
            f"{where}: yields nothing; give at least {MIN_SAMPLES} samples (a reader that was read before has to be "
            "rewound)."
        )
    return [spool.shard(where) for spool in runs]


def _yielded(feeds: Iterator[Any], where: str) -> Iterator[Any]:
    """The same; what fails is told after how many items."""
    count = 0
    try:
        for item in feeds:
            yield item
            count += 1
    except (CalibrationError, UsageError):
        raise
    except Exception as error:
        raise CalibrationError(f"{where}: failed after {count} item(s): {error}") from error


class Spool:
    """Files that arrays of one layout are appended to; arrays without a sample axis are the same for all of them.

    Args:
        folder: where the files go.
        number: of the spool in that folder.
        first: the first item, which is not written yet.
        shared: names of its arrays without a sample axis.
    """

    def __init__(self, folder: Path, number: int, first: Shard, shared: frozenset[str]) -> None:
        arrays = first.read()
        self._layout = self._of(first, shared)
        self._shared = {name: np.array(arrays[name]) for name in arrays if name not in self._layout}
        self._paths = {name: folder / f"spool_{number}_{place}.bin" for place, name in enumerate(self._layout)}
        self._files: dict[str, BinaryIO] = {name: path.open("wb") for name, path in self._paths.items()}
        self._rows = 0

    @staticmethod
    def _of(shard: Shard, shared: frozenset[str]) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Type and shape of one sample, for all arrays that have a sample axis."""
        return {
            name: (header.dtype, header.shape[1:])
            for name, header in shard.headers.items()
            if header.shape and name not in shared
        }

    def takes(self, shard: Shard, shared: frozenset[str]) -> bool:
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
        """Write no more."""
        for file in self._files.values():
            file.close()

    def shard(self, where: str) -> Shard:
        """What was written, to be read back as memory maps."""
        spooled = {name: Header(dtype, (self._rows, *rest)) for name, (dtype, rest) in self._layout.items()}
        shared = {name: Header(value.dtype, value.shape) for name, value in self._shared.items()}

        def read() -> Arrays:
            maps = {
                name: np.memmap(self._paths[name], header.dtype, "r", shape=header.shape)
                if math.prod(header.shape) and header.dtype.itemsize
                else np.zeros(header.shape, header.dtype)
                for name, header in spooled.items()
            }
            return {**self._shared, **maps}

        return Shard(where, {**shared, **spooled}, read)

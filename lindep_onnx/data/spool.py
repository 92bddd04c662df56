"""What a generator yields, kept on disk, so that memory does not grow with it and every pass reads the same."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
    is_whole_feed,
    places_in,
    source_of,
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
    count, whole = 0, False
    try:
        for number, item in enumerate(_yielded(feeds, where)):
            shard = in_memory(f"{where}: item {number}", _by_name(item, f"{where}: item {number}", specs))
            check_arrays(shard, specs, {})
            places = places_in(shard, specs, without_samples([shard.headers], specs))
            whole = whole or is_whole_feed(replace(shard, feed=True), specs, places)
            arranged = _apart(shard, specs, whole=whole)
            if not runs or not runs[-1].takes(arranged):
                if runs:
                    runs[-1].close()
                runs.append(Spool(reading.folder, len(runs), arranged))
            try:
                count += runs[-1].write(arranged)
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
    return [shard for spool in runs for shard in (spool.feeds(where) if whole else [spool.shard(where)])]


@dataclass(frozen=True)
class Arranged:
    """What a generator yielded, samples in front.

    Attributes:
        sampled: arrays whose leading axis counts samples.
        shared: the others.
        axes: where samples were before, of those that were moved.
        count: how many samples.
    """

    sampled: Arrays
    shared: Arrays
    axes: Mapping[str, int]
    count: int


def _apart(shard: Shard, specs: Sequence[InputSpec], *, whole: bool) -> Arranged:
    """One item; `whole` makes one sample of it."""
    arrays = shard.read()
    if whole:
        return Arranged({name: value[None] for name, value in arrays.items()}, {}, {}, 1)
    places = places_in(shard, specs, without_samples([shard.headers], specs))
    sampled: dict[str, Array] = {}
    axes: dict[str, int] = {}
    counts: dict[str, int] = {}
    for spec in specs:
        name, place = source_of(spec, arrays), places[spec.name]
        if place.stored is not None:
            sampled[name] = np.moveaxis(arrays[name], place.stored, 0)
            counts[spec.name] = len(sampled[name])
            axes |= {} if place.entries else {name: place.stored}
    check_lengths(shard.where, counts)
    shared = {name: value for name, value in arrays.items() if name not in sampled}
    return Arranged(sampled, shared, axes, next(iter(counts.values()), 1))


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
    """

    def __init__(self, folder: Path, number: int, first: Arranged) -> None:
        self._layout, self._axes = self._of(first), first.axes
        self._shared = {name: np.array(value) for name, value in first.shared.items()}
        self._paths = {name: folder / f"spool_{number}_{place}.bin" for place, name in enumerate(self._layout)}
        self._files: dict[str, BinaryIO] = {name: path.open("wb") for name, path in self._paths.items()}
        self._items: list[int] = []

    @staticmethod
    def _of(item: Arranged) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Type and shape of one sample, for all arrays that have a sample axis."""
        return {name: (value.dtype, value.shape[1:]) for name, value in item.sampled.items()}

    def takes(self, item: Arranged) -> bool:
        """Whether an item has the same layout, and the same arrays without a sample axis."""
        return (
            self._of(item) == self._layout
            and item.axes == self._axes
            and item.shared.keys() == self._shared.keys()
            and all(
                item.shared[name].dtype == value.dtype and np.array_equal(item.shared[name], value)
                for name, value in self._shared.items()
            )
        )

    def write(self, item: Arranged) -> int:
        """Append an item and return how many samples it holds."""
        for name, file in self._files.items():
            file.write(item.sampled[name].tobytes())
            file.flush()  # a full disk shows here, not when the file is closed
        self._items.append(item.count)
        return item.count

    def close(self) -> None:
        """Write no more."""
        for file in self._files.values():
            file.close()

    def shard(self, where: str) -> Shard:
        """What was written, to be read back as memory maps."""
        return self._shard(where, 0, sum(self._items))

    def feeds(self, where: str) -> list[Shard]:
        """The same with every item as one sample, for runs of its own."""
        if not self._axes:  # they are samples already
            return [self.shard(where)]
        ends = np.cumsum([0, *self._items]).tolist()
        return [self._feed(self._shard(where, begin, end)) for begin, end in itertools.pairwise(ends)]

    def _feed(self, part: Shard) -> Shard:
        """An item as one entry, which a run can be fed with."""

        def read() -> Arrays:
            arrays = part.read()
            return {name: np.moveaxis(arrays[name], 0, self._axes.get(name, 0))[None] for name in arrays}

        shapes = {name: header.shape for name, header in part.headers.items()}
        moved = {name: np.moveaxis(np.empty(shapes[name], bool), 0, self._axes[name]).shape for name in self._axes}
        headers = {
            name: Header(header.dtype, (1, *moved.get(name, header.shape))) for name, header in part.headers.items()
        }
        return Shard(part.where, headers, read, leading=True)

    def _shard(self, where: str, begin: int, end: int) -> Shard:
        """Samples from `begin` up to `end`."""
        spooled = {name: Header(dtype, (end - begin, *rest)) for name, (dtype, rest) in self._layout.items()}
        shared = {name: Header(value.dtype, value.shape) for name, value in self._shared.items()}

        def read() -> Arrays:
            maps = {}
            for name, header in spooled.items():
                offset = begin * math.prod(header.shape[1:]) * header.dtype.itemsize
                maps[name] = (
                    np.memmap(self._paths[name], header.dtype, "r", offset, header.shape)
                    if math.prod(header.shape) and header.dtype.itemsize
                    else np.zeros(header.shape, header.dtype)
                )
            return {**self._shared, **maps}

        return Shard(where, {**shared, **spooled}, read, leading=True)

"""Calibration samples that fit the model, and which of them are used for what.

Arrays in files are memory maps and what a generator yields is spooled to a temporary folder (see
`lindep_onnx.data.sources`), so that memory does not grow with the number of samples and every pass reads the same data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lindep_onnx.data.inputs import (
    Array,
    Arrays,
    Feeding,
    InputSpec,
    Shard,
    cast,
    feeding,
    kind_of,
    not_finite,
    outside,
    source_of,
)
from lindep_onnx.data.places import Place
from lindep_onnx.data.sources import shards_of
from lindep_onnx.data.split import MIN_SAMPLES, Part, Split, split
from lindep_onnx.data.spool import Reading
from lindep_onnx.errors import CalibrationError
from lindep_onnx.files import Scratch
from lindep_onnx.log import Log
from lindep_onnx.options import DataOptions


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


class _Feeder:
    """The samples of all shards by their numbers; one shard is open at a time.

    Attributes:
        plan: how they are fed.
        starts: (shards + 1,) number of the first sample of each shard, and of all samples.
    """

    def __init__(self, shards: Sequence[Shard], plan: Feeding) -> None:
        self.shards, self.plan = shards, plan
        self.starts = np.concatenate([[0], np.cumsum([plan.count(index, shard) for index, shard in enumerate(shards)])])
        self._open: tuple[int, Arrays] | None = None

    def close(self) -> None:
        self._open = None

    def shard_of(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.asarray(np.searchsorted(self.starts, numbers, side="right") - 1)

    def filled(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """The last one repeated until there are as many as the model takes."""
        fixed = self.plan.fixed_batch
        return numbers if fixed is None else np.concatenate([numbers, np.repeat(numbers[-1:], fixed - len(numbers))])

    def feeds(self, index: int, numbers: NDArray[np.int64]) -> dict[str, Array]:
        """Samples of one shard."""
        rows, arrays, feeds = numbers - self.starts[index], self._arrays(index), {}
        for spec in self.plan.specs:
            value = arrays[source_of(spec, arrays)]
            place = self.plan.places[index][spec.name]
            taken = np.asarray(place.taken(value, rows))
            where = f"{self.shards[index].where}: input {spec.name!r}"
            fed = feeds[spec.name] = cast(taken, spec.dtype, where)
            # What counts comes first; filler repeats it.
            good = _usable(fed, taken) if kind_of(spec.dtype) == "float" else np.ones(1, dtype=bool)
            if not good.all():
                raise not_finite(where, spec.dtype, taken, _first_bad(place, numbers, good))
            if spec.range is not None and fed.size:
                inside = (fed >= spec.range[0]) & (fed <= spec.range[1])
                if not inside.all():
                    raise outside(where, spec.range, fed[~inside].flat[0], _first_bad(place, numbers, inside))
        return feeds

    def _arrays(self, index: int) -> Arrays:
        if self._open is None or self._open[0] != index:
            self._open = (index, self.shards[index].read())
        return self._open[1]

    def digests(self) -> list[bytes]:
        """A digest of the content of every sample, in order."""
        found = []
        for index, shard in enumerate(self.shards):
            arrays = self._arrays(index)
            alike = hashlib.sha256()  # processors have instructions for it
            sampled = []
            for spec in self.plan.specs:
                value, place = arrays[source_of(spec, arrays)], self.plan.places[index][spec.name]
                if place.stored is None:
                    alike.update(np.asarray(value).tobytes())
                else:
                    sampled.append(np.moveaxis(value, place.stored, 0) if place.stored else value)
            for row in range(self.plan.count(index, shard)):
                digest = alike.copy()
                for value in sampled:
                    digest.update(np.asarray(value[row]).tobytes())
                found.append(digest.digest())
        return found


def _first_bad(place: Place, numbers: NDArray[np.int64], good: Array) -> int | None:
    """The first sample that is not good throughout; None if the array belongs to no sample."""
    if place.stored is None:
        return None
    rows = place.by_sample(good, len(numbers)) if good.ndim else good[None]
    return int(numbers[np.argmin([row.all() for row in rows])])


def _usable(fed: Array, stored: Array) -> NDArray[np.bool_]:
    """Which values may be fed: minus infinity, as in the masks of attention, where it is stored like that."""
    return np.asarray(np.isfinite(fed) | ((fed == -np.inf) & (stored == -np.inf)))


@dataclass(frozen=True, eq=False)
class Samples:
    """Calibration samples that fit the model, split into parts. A context manager: it may own temporary files.

    Attributes:
        parts: sample numbers of each part, ascending.
        notes: what the user should know about the data.
        fingerprint: a digest of the samples, their split and their batches.
    """

    parts: Mapping[Part, NDArray[np.int64]]
    notes: tuple[str, ...]
    fingerprint: str
    _feeder: _Feeder
    _folder: Scratch
    _different: Mapping[Part, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts.values())

    def __enter__(self) -> Samples:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._feeder.close()
        self._folder.cleanup()

    def different(self, part: Part) -> int:
        """How many samples of a part are no copies of others: a copy is no further evidence."""
        return min(len(self.parts[part]), self._different.get(part, len(self)))

    def subset(self, parts: Mapping[Part, NDArray[np.int64]]) -> Samples:
        """The same source with fewer samples; valid as long as the whole is."""
        return replace(self, parts=Split.given(parts).parts)

    def in_batches_of(self, size: int) -> Samples:
        """The same samples in runs of exactly so many; valid as long as the whole is."""
        plan = replace(self._feeder.plan, batch=size, fixed_batch=size)
        return replace(self, _feeder=_Feeder(self._feeder.shards, plan))

    def where(self, number: int) -> str:
        """What a sample came from, by its number."""
        return self._feeder.shards[int(self._feeder.shard_of(np.array([number]))[0])].where

    @property
    def inputs(self) -> Sequence[InputSpec]:
        """What the model declares."""
        return self._feeder.plan.specs

    @property
    def free_batch(self) -> bool:
        """Whether the model takes any number of samples in a run."""
        return self._feeder.plan.fixed_batch is None and not self._feeder.plan.alone

    @property
    def leading(self) -> bool:
        """Whether samples are on the leading axis of everything that is fed."""
        return self._feeder.plan.leading

    @property
    def ranks(self) -> dict[str, int]:
        """Number of axes of what each input is fed with."""
        plan, shard = self._feeder.plan, self._feeder.shards[0]
        shapes = {spec.name: shard.headers[source_of(spec, shard.headers)].shape for spec in plan.specs}
        return {name: len(shape) - plan.places[0][name].entries for name, shape in shapes.items()}

    @property
    def batch(self) -> int:
        """Samples in a full run."""
        return self._feeder.plan.batch

    @property
    def uniform(self) -> bool:
        """Whether all samples have the same shapes."""
        plan = self._feeder.plan
        shapes = {
            tuple(own[spec.name].of_sample(shard.headers[source_of(spec, shard.headers)].shape) for spec in plan.specs)
            for own, shard in zip(plan.places, self._feeder.shards, strict=True)
        }
        return len(shapes) == 1

    def batches(self, *parts: Part, limit: int | None = None, size: int | None = None) -> Iterator[Batch]:
        """Feeds for one pass over some parts (all by default), in ascending order of the samples.

        Args:
            *parts: which samples.
            limit: stop after so many samples.
            size: samples per run, where the model leaves that free; None for the usual number.

        Raises:
            CalibrationError: a value is NaN, plus infinity or outside the declared range, naming input and sample.
        """
        for numbers in self.numbers(*parts, limit=limit, size=size):
            filled = self._feeder.filled(numbers)
            feeds = self._feeder.feeds(int(self._feeder.shard_of(numbers[:1])[0]), filled)
            yield Batch(MappingProxyType(feeds), numbers, len(filled))

    def numbers(self, *parts: Part, limit: int | None = None, size: int | None = None) -> Iterator[NDArray[np.int64]]:
        """The sample numbers of every batch that `batches` gives."""
        numbers = np.sort(np.concatenate([self.parts[part] for part in (parts or Part)]))[:limit]
        shard = self._feeder.shard_of(numbers)
        step = size if size is not None and self.free_batch else self.batch
        for index in np.unique(shard).tolist():
            own = numbers[shard == index]
            for start in range(0, len(own), step):
                yield own[start : start + step]

    def run_of(self, count: int) -> Batch:
        """One run of the first samples, repeated where there are too few; of the fixed batch where it is fixed.

        Args:
            count: samples wanted in the run.

        Raises:
            CalibrationError: a value is NaN, infinite or outside the declared range, naming input and sample.
        """
        numbers = np.sort(np.concatenate([self.parts[part] for part in Part]))
        shard = self._feeder.shard_of(numbers)  # samples of one shard have the same shapes
        own = numbers[shard == shard[0]][: count if self.free_batch else 1]
        filled = self._feeder.filled(np.resize(own, count if self.free_batch else 1))
        return Batch(MappingProxyType(self._feeder.feeds(int(shard[0]), filled)), own, len(filled))

    def take(self, numbers: NDArray[np.int64]) -> Arrays:
        """Feeds for chosen samples of a `uniform` source, in the order asked for.

        Args:
            numbers: sample numbers, at most `batch`; filled up by repetition where the model fixes the batch.

        Raises:
            CalibrationError: a value is NaN or plus infinity.
        """
        numbers = self._feeder.filled(numbers)
        shard = self._feeder.shard_of(numbers)
        parts = [self._feeder.feeds(index, numbers[shard == index]) for index in np.unique(shard).tolist()]
        places = np.argsort(np.argsort(shard, kind="stable"))
        axes = {name: place.fed for name, place in self._feeder.plan.places[int(shard[0])].items()}
        return {
            name: value if axis is None else np.take(np.concatenate([part[name] for part in parts], axis), places, axis)
            for (name, value), axis in zip(parts[0].items(), axes.values(), strict=True)
        }


def open_samples(
    source: Any,
    inputs: Sequence[InputSpec],
    options: DataOptions,
    log: Log | None = None,
    parts: Mapping[Part, NDArray[np.int64]] | None = None,
) -> Samples:
    """Open calibration data, hold it against the inputs of the model, and split it.

    Args:
        source: a path (`.npz`, `.npy`, a folder of them, of images or of ONNX `test_data_set_*` folders),
            `FILE.py:NAME` of a function, a class or an object, a dict of arrays, an array for the only input, an
            iterable of either, or an object with `get_next()`.
        inputs: what the model declares.
        options: how to read, split and feed it. `max_samples` are spread over arrays and images, and the first ones of
            a generator. Without `batch_size` they are run one by one, where the model leaves the batch free.
        log: told how far it is, where it is known how many samples there are.
        parts: sample numbers of the parts, where they are known: then nothing is read to split the samples.

    Raises:
        CalibrationError: the data is missing, damaged or does not fit.
        UsageError: `FILE.py:NAME` names nothing that data can come from, or an option does not fit images or model.
    """
    folder = Scratch()
    try:
        found = shards_of(source, Reading(inputs, Path(folder.name), options, log or Log()))
        plan = feeding(found.shards, inputs, options.batch_size or 1)
        feeder = _Feeder(found.shards, plan)
        if not feeder.starts[-1]:
            raise CalibrationError(f"{found.shards[0].where}: holds no samples; give at least {MIN_SAMPLES}.")
        chosen = split(feeder.digests(), plan.batch, options) if parts is None else Split.given(parts)
    except BaseException:
        folder.cleanup()
        raise
    notes = (*found.notes, *plan.notes, *chosen.notes)
    return Samples(chosen.parts, notes, chosen.fingerprint, feeder, folder, chosen.different)

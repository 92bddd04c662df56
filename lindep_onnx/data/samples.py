"""Calibration samples that fit the model, and which of them are used for what.

Arrays in files are memory maps and what a generator yields is spooled to a temporary folder (see
`lindep_onnx.data.sources`), so that memory does not grow with the number of samples and every pass reads the same data.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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
from lindep_onnx.data.sources import MIN_SAMPLES, Reading, shards_of
from lindep_onnx.errors import CalibrationError
from lindep_onnx.files import Scratch
from lindep_onnx.log import Log
from lindep_onnx.options import DataOptions

EMPTY = np.empty(0, dtype=np.int64)


class Part(enum.Enum):
    """What a sample is used for."""

    FIT = "fit"
    SELECT = "select"
    VERIFY = "verify"


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


class Samples:
    """Calibration samples that fit the model, split into parts. A context manager: it may own temporary files.

    Attributes:
        parts: sample numbers of each part, ascending.
        notes: what the user should know about the data.
        fingerprint: a digest of the samples, their split and their batches.
    """

    def __init__(self, shards: Sequence[Shard], plan: Feeding, folder: Scratch) -> None:
        self._shards = shards
        self._plan = plan
        self._folder = folder
        self._open: tuple[int, Arrays] | None = None
        self._starts = np.concatenate([[0], np.cumsum([plan.count(shard) for shard in shards])])
        self.parts: Mapping[Part, NDArray[np.int64]] = {}
        self.notes: tuple[str, ...] = ()
        self.fingerprint = ""

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
    def inputs(self) -> Sequence[InputSpec]:
        """What the model declares."""
        return self._plan.specs

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
            tuple(shard.headers[source_of(spec, shard.headers)].shape[1:] for spec in specs) for shard in self._shards
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
            value = arrays[source_of(spec, arrays)]
            taken = np.asarray(value if spec.name in self._plan.shared else value[rows])
            where = f"{self._shards[index].where}: input {spec.name!r}"
            feeds[spec.name] = cast(taken, spec.dtype, where)
            fed = feeds[spec.name]
            # What counts comes first; filler repeats it.
            good = np.isfinite(fed) if kind_of(spec.dtype) == "float" else np.ones(1, dtype=bool)
            if not good.all():
                raise not_finite(where, spec.dtype, taken, self._sample(spec, numbers, good))
            if spec.range is not None and fed.size:
                low, high = spec.range
                inside = (fed >= low) & (fed <= high)
                if not inside.all():
                    raise outside(where, spec.range, fed[~inside].flat[0], self._sample(spec, numbers, inside))
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
            alike = hashlib.sha256()  # processors have instructions for it
            names = []
            for spec in self._plan.specs:
                name = source_of(spec, arrays)
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
        reading = Reading(inputs, Path(folder.name), options, log or Log())
        found = shards_of(source, reading)
        plan = feeding(found.shards, inputs, options.batch_size or 1)
        samples = Samples(found.shards, plan, folder)
        total = int(samples._starts[-1])
        if not total:
            raise CalibrationError(f"{found.shards[0].where}: holds no samples; give at least {MIN_SAMPLES}.")
        split_notes: tuple[str, ...] = ()
        if parts is None:
            digests = samples.digests()
            samples.parts, split_notes = _split(digests, options)
            samples.fingerprint = _fingerprint(digests, samples)
        else:
            samples.parts = MappingProxyType({part: parts.get(part, EMPTY) for part in Part})
        samples.notes = (*found.notes, *plan.notes, *split_notes)
    except BaseException:
        folder.cleanup()
        raise
    return samples


def _fingerprint(digests: Sequence[bytes], samples: Samples) -> str:
    total = hashlib.blake2b(f"{samples.batch}:".encode(), digest_size=16)
    for digest in digests:
        total.update(digest)
    for part in Part:
        total.update(f":{part.value}:".encode())
        total.update(samples.parts[part].astype("<i8").tobytes())
    return total.hexdigest()


def _split(digests: Sequence[bytes], options: DataOptions) -> tuple[Mapping[Part, NDArray[np.int64]], tuple[str, ...]]:
    """Part of every sample by a seeded hash of its number; identical samples share the number of the first."""
    seed, holdout, max_samples = options.seed, options.holdout, options.max_samples
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
    if len(distinct) < MIN_SAMPLES:
        notes.append(
            f"{len(distinct)} different calibration sample(s) prove nothing about others: only what the weights "
            f"imply can go. Give at least {MIN_SAMPLES}, better some hundreds."
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

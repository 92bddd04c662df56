"""Calibration on several machines: moments are sums, so shards of the samples are run wherever there is a worker.

The engine is Dask (`distributed`), an optional extra; why not another one is told in `docs/cluster.md`. A shard is a
pure function of the model, the data and its sample numbers, and what it gives is taken in once, in the order of the
shards, however often Dask had to run it. So a worker that dies costs the time of its shards and changes nothing.
"""

from __future__ import annotations

import concurrent.futures
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from lindep_onnx import files
from lindep_onnx.calibration.collect import Watched, collect_local
from lindep_onnx.calibration.measure import MEASURED, Calibration, Draw, StatisticsAccumulator
from lindep_onnx.calibration.range_probe import Ranges
from lindep_onnx.data.inputs import InputSpec
from lindep_onnx.data.samples import Samples, open_samples
from lindep_onnx.data.split import Part
from lindep_onnx.errors import CalibrationError, LindepError, UsageError, one_line
from lindep_onnx.log import Log
from lindep_onnx.model.ir import Told, model_of
from lindep_onnx.model.shapes import resolve
from lindep_onnx.options import Config, DataOptions, declared
from lindep_onnx.runtime.backend import Runtime, cores
from lindep_onnx.structure.trace import trace
from lindep_onnx.structure.types import Structure

Numbers: TypeAlias = "Mapping[Part, NDArray[np.int64]]"

#: Shards for each worker: more of them lose less when one dies, and send more matrices.
SHARDS = 3
#: So often a job is sent again after all workers that had it died.
TRIES = 3
#: Seconds to wait for the scheduler, and for a worker to come back.
PATIENCE = 8


@dataclass(frozen=True)
class Job:
    """All that a worker needs to know beside the numbers of its samples.

    A large model goes without its weights, which workers map where they are.
    """

    model: bytes
    folder: str | None
    trace: tuple[tuple[str, ...], tuple[str, ...], int]
    source: Any
    inputs: tuple[InputSpec, ...]
    data: DataOptions
    told: Told
    watched: Watched
    draw: Draw
    runtime: Runtime
    sharing: int


class Workers:
    """Runs phases of the data on the workers of a Dask client.

    Args:
        client: a `distributed.Client`.
        source: the calibration data, as given: a path that every worker can read, or a dict of arrays.
        config: the options that model and data were opened with.

    Raises:
        UsageError: other processes cannot read the data.
    """

    def __init__(self, client: Any, source: Any, config: Config) -> None:
        _check_source(source)
        self._client = client
        self._source = str(Path(source).resolve()) if isinstance(source, (str, Path)) else dict(source)
        self._trace = config.include, config.exclude, config.min_channels
        options: Mapping[str, Any] = {name: getattr(config, name) for name in declared(DataOptions)}
        self._data = DataOptions(**options)  # alone: a metric of the user's need not be known on the workers

    def __call__(
        self, structure: Structure, samples: Samples, watched: Watched, draw: Draw, runtime: Runtime, log: Log
    ) -> tuple[Calibration, Ranges]:
        """Moments and ranges of the samples, as one process would take them; see `lindep_onnx.calibration.collect`."""
        model, folder = structure.model.proto.SerializeToString(deterministic=True), structure.model.folder
        beside = None if folder is None else str(folder.path)
        workers = self._client.scheduler_info()["workers"].values()
        sharing = max(Counter(worker["host"] for worker in workers).values(), default=1)
        job = Job(
            model, beside, self._trace, self._source, tuple(samples.inputs),
            replace(self._data, batch_size=samples.batch), structure.model.told, watched, draw, runtime, sharing,
        )  # fmt: skip
        shards = shards_of(samples, max(1, SHARDS * len(workers)))
        found: tuple[Calibration, Ranges] | None = None
        done = 0
        try:
            for shard, (seen, ranges) in zip(shards, self._results(job, shards), strict=True):
                found = (seen, ranges) if found is None else (found[0].merge(seen), _both(found[1], ranges))
                done += sum(len(own) for own in shard.values())
                log.progress("calibrate", done, done)
        except LindepError:
            raise
        except Exception as error:
            raise CalibrationError(
                f"The cluster gave up on a part of the calibration data: {one_line(error)}. Every worker needs this "
                "package, the same file paths, and the memory for one session."
            ) from error
        assert found is not None
        return found

    def _results(self, job: Job, shards: Sequence[Numbers]) -> Iterator[tuple[Calibration, Ranges]]:
        """What the shards give, in their order: sums of floats depend on it.

        Dask runs the shards of a dead worker again by itself. Where all that knew the job are dead, it is sent again.
        """
        done = 0
        for tries in itertools.count():
            job_there = self._client.scatter(job, broadcast=True, hash=False)
            futures = [self._client.submit(run_shard, job_there, shard, pure=False) for shard in shards[done:]]
            try:
                for future in futures:
                    yield future.result()
                    future.release()
                    done += 1
                return
            except concurrent.futures.CancelledError:
                if tries == TRIES:
                    raise
                self._client.wait_for_workers(1, timeout=PATIENCE)
            finally:
                with suppress(Exception):
                    self._client.cancel([*futures, job_there])


def elsewhere(client: Any, source: Any, config: Config) -> Workers | None:
    """Who runs the calibration in the place of this process; None if nobody does, or there is none.

    Args:
        client: a `distributed.Client`; None for this process.
        source: the calibration data; None for none.
        config: the options that model and data are opened with.

    Raises:
        UsageError: other processes cannot read the data.
    """
    return None if client is None or source is None else Workers(client, source, config)


def _check_source(source: Any) -> None:
    """Refuse data that other processes cannot read again."""
    if isinstance(source, (str, Path)) and Path(source).exists():
        return
    if isinstance(source, Mapping):
        return
    raise UsageError(
        "--cluster: every worker reads the calibration data itself, so it must be an .npz, .npy or folder that all of "
        "them see, or a dict of arrays; not a generator."
    )


def shards_of(samples: Samples, count: int) -> list[Numbers]:
    """Whole batches, as evenly as they go: then every batch is what it is in one process."""
    batches = [(part, numbers) for part in MEASURED for numbers in samples.numbers(part)]
    cut = np.array_split(np.arange(len(batches)), min(count, max(1, len(batches))))
    return [
        {
            part: np.concatenate([np.empty(0, np.int64), *(batches[at][1] for at in own if batches[at][0] is part)])
            for part in MEASURED
        }
        for own in cut
    ]


def _both(own: Ranges, more: Ranges) -> Ranges:
    return {key: (flat, seen.merge(more[key][1])) for key, (flat, seen) in own.items()}


# ---- on the workers ---------------------------------------------------------------------------------------------


def run_shard(job: Job, numbers: Numbers) -> tuple[Calibration, Ranges]:
    """Moments and ranges of some samples, on a worker."""
    with threadpool_limits(max(1, cores() // (2 * job.sharing)), user_api="blas"):
        structure = _traced(job)
        with open_samples(job.source, job.inputs, job.data, parts=numbers) as samples:
            sums = StatisticsAccumulator(structure)
            runtime = job.runtime.beside(job.sharing)
            ranges = collect_local(samples, job.watched, sums, job.draw, runtime, Log())
    return sums.result(), ranges


def _traced(job: Job) -> Structure:
    """Traced once in every process."""
    key = job.model, job.folder, job.trace, repr(job.told)
    if key not in _TRACED:
        include, exclude, least = job.trace
        folder = None if job.folder is None else files.WeightsDir(Path(job.folder))
        loaded = model_of(onnx.ModelProto.FromString(job.model), folder, told=job.told)
        _TRACED.clear()
        _TRACED[key] = trace(loaded, resolve(loaded), include=include, exclude=exclude, min_channels=least)
    return _TRACED[key]


#: What a worker traced last.
_TRACED: dict[tuple[Any, ...], Structure] = {}

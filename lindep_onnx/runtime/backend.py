"""Where and how models run: sessions of ONNX Runtime, devices, and several runs of one session at a time.

A run on one thread takes less of a processor than the same run on several, which wait for each other at every node. So
many runs are made at the same time, each on few threads, and what they give is taken in one after the other, always in
the same order.
"""

from __future__ import annotations

import enum
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import onnx
import onnxruntime

from lindep_onnx.errors import LindepError, ModelError, UsageError, one_line
from lindep_onnx.files import Scratch, WeightsDir
from lindep_onnx.model.ir import Model
from lindep_onnx.model.randomness import repeatable
from lindep_onnx.model.weights import read

Item = TypeVar("Item")
Found = TypeVar("Found")
Session: TypeAlias = onnxruntime.InferenceSession

#: Option with the folder of the external data of a model that is handed over as a string of bytes.
FOLDER = "session.model_external_initializers_file_folder_path"
#: Options of providers where the caller sets no others. The products of TF32 have 10 bits: with them a result fails its
#: own verification. And an exhaustive search for convolutions is made again for every shape.
PROVIDER_OPTIONS: Mapping[str, Mapping[str, str]] = {
    "CUDAExecutionProvider": {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
}
CPU = "CPUExecutionProvider"


class Purpose(enum.Enum):
    """What a session is for.

    RUN: many runs, beside other work. Waiting threads do not spin: between two runs they would take the cores from
        NumPy (measured: least squares on two cores are 8 times slower). And weights in files are used where they lie,
        not copied into an order that some kernels are faster with.
    TIME: as ONNX Runtime does it by default.
    AS_WRITTEN: the graph as it is written, without optimisations.
    """

    RUN = enum.auto()
    TIME = enum.auto()
    AS_WRITTEN = enum.auto()


@dataclass(frozen=True)
class Provider:
    """An execution provider of ONNX Runtime.

    Attributes:
        name: as ONNX Runtime knows it.
        options: of the provider; those of `PROVIDER_OPTIONS` hold beside them.
    """

    name: str
    options: tuple[tuple[str, str], ...] = ()

    @property
    def settings(self) -> dict[str, str]:
        """All options by name."""
        return {**PROVIDER_OPTIONS.get(self.name, {}), **dict(self.options)}


@dataclass(frozen=True)
class Runtime:
    """What models run on; made once, and handed to everything that runs one.

    Attributes:
        providers: in order of preference.
        threads: that may be used; 0 for one on each core.
        memory: bytes of activations that runs may have at the same time, all tensors counted; few are alive together.
    """

    providers: tuple[Provider, ...] = (Provider(CPU),)
    threads: int = 0
    memory: int = 1 << 30

    @classmethod
    def named(cls, providers: Iterable[str], threads: int = 0) -> Runtime:
        """A runtime on providers by their names, with the options that suit them."""
        return cls(tuple(map(Provider, providers)), threads)

    @property
    def on_processor(self) -> bool:
        """Whether nothing but the processor runs models."""
        return all(provider.name == CPU for provider in self.providers)

    def shares(self, activations: int) -> Shares:
        """As many runs, of so many bytes of activations, as cores and memory allow; on other devices one at a time."""
        if not self.on_processor:
            return Shares(1, self)
        own = self.threads or cores()
        runs = max(1, min(own, self.memory // max(1, activations)))
        return Shares(runs, replace(self, threads=own // runs))

    def pieces(self, count: int) -> Shares:
        """So many runs at a time whatever the number of cores, which must not change results; one on other devices."""
        if count == 1 or not self.on_processor:
            return Shares(1, self)
        return Shares(count, replace(self, threads=max(1, (self.threads or cores()) // count)))

    def beside(self, processes: int) -> Runtime:
        """What one of several processes on this machine uses: its part of the cores, if threads are not given."""
        return replace(self, threads=self.threads or max(1, cores() // processes))

    def open(
        self,
        model: Model | onnx.ModelProto | str | Path,
        folder: WeightsDir | None = None,
        *,
        purpose: Purpose = Purpose.RUN,
        profile: Path | None = None,
    ) -> Session:
        """Make a model ready to run.

        Args:
            model: a model in memory, or a path.
            folder: of the external data of a `ModelProto`.
            purpose: what the session is for.
            profile: folder that the session writes its profile to; None for a session that is not profiled.

        Raises:
            UsageError: a provider is not available here.
            ModelError: ONNX Runtime cannot load the model.
        """
        available = onnxruntime.get_available_providers()
        for provider in self.providers:
            if provider.name not in available:
                raise UsageError(
                    f"--providers: {provider.name!r} is not available here; choose from {', '.join(available)}."
                )
        source = model
        try:
            if isinstance(source, Model):
                source, folder = source.proto, source.folder
            if isinstance(source, onnx.ModelProto) and folder is None:
                source, folder = read(source)  # a large one that was put together here goes by way of the disk
            options = self._session_options(purpose, folder)
            if profile is not None:
                options.enable_profiling, options.profile_file_prefix = True, str(profile / "profile")
            if isinstance(source, onnx.ModelProto) and purpose is not Purpose.TIME:
                source = repeatable(source)
            content = source.SerializeToString() if isinstance(source, onnx.ModelProto) else str(source)
            return Session(content, options, providers=[(own.name, own.settings) for own in self.providers])
        except LindepError:
            raise
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            raise ModelError(f"{_where(model)}: ONNX Runtime cannot load it: {one_line(error)}") from error

    def _session_options(self, purpose: Purpose, folder: WeightsDir | None) -> onnxruntime.SessionOptions:
        timed, optimised = purpose is Purpose.TIME, purpose is not Purpose.AS_WRITTEN
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what fails is raised
        options.intra_op_num_threads = self.threads
        options.enable_cpu_mem_arena = optimised  # an arena pays in many runs
        # Planned memory is kept beside the arena, for every run that is made at the same time.
        options.enable_mem_pattern = timed
        options.add_session_config_entry("session.intra_op.allow_spinning", "1" if timed else "0")
        levels = onnxruntime.GraphOptimizationLevel
        options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimised else levels.ORT_DISABLE_ALL
        if folder is not None:
            options.add_session_config_entry(FOLDER, str(folder.path.absolute()))
            if not timed:
                options.add_session_config_entry("session.disable_prepacking", "1")
                if optimised:
                    options.graph_optimization_level = levels.ORT_ENABLE_EXTENDED
        return options

    def profile(
        self, model: Model | onnx.ModelProto, feeds: Mapping[str, Any], runs: int, seconds: float = math.inf
    ) -> str:
        """Run a model a few times, as ONNX Runtime does it by default, and look at its nodes.

        Args:
            model: what to run.
            feeds: arrays by input name.
            runs: how often it runs after its warm-up.
            seconds: after which no further run begins, but for the first.

        Returns:
            The profile of ONNX Runtime, JSON; the first run in it is the warm-up.

        Raises:
            ModelError: ONNX Runtime cannot load or run the model.
        """
        with Scratch() as folder:
            session = self.open(model, purpose=Purpose.TIME, profile=Path(folder))
            try:
                session.run(None, dict(feeds))
                start = time.perf_counter()
                for run in range(runs):
                    if run == 0 or time.perf_counter() < start + seconds:
                        session.run(None, dict(feeds))
            except Exception as error:  # ONNX Runtime's exceptions have no common base
                raise ModelError(f"{_where(model)}: ONNX Runtime cannot run it: {one_line(error)}") from error
            return Path(session.end_profiling()).read_text(encoding="utf-8")


@dataclass(frozen=True)
class Shares:
    """How the cores are shared out.

    Attributes:
        runs: at the same time.
        each: what one of them may use.
    """

    runs: int
    each: Runtime

    def pool(self) -> Pool:
        """Threads for the runs; a context manager."""
        return Pool(self.runs)


class Pool(ThreadPoolExecutor):
    """Threads that do some work beside the caller's own."""

    def __init__(self, runs: int) -> None:
        super().__init__(runs)
        self._runs = runs

    def in_order(self, work: Callable[[Item], Found], items: Iterable[Item]) -> Iterator[tuple[Item, Found]]:
        """Do some work for every item.

        Args:
            work: what to do; several threads do it at a time.
            items: what to do it for; they are made in the caller's thread, a few ahead.

        Yields:
            Items and what was found, in the order of the items, whatever the order in which they are done.
        """
        waiting: deque[tuple[Item, Future[Found]]] = deque()
        try:
            for item in items:
                waiting.append((item, self.submit(work, item)))
                if len(waiting) > 2 * self._runs:
                    done, future = waiting.popleft()
                    yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


def failure_of_run(error: BaseException) -> BaseException | None:
    """The failure of ONNX Runtime behind an error; None if another one is."""
    cause: BaseException | None = error
    while cause is not None and not type(cause).__module__.startswith("onnxruntime."):
        cause = cause.__cause__
    return cause


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def version() -> str:
    """Of ONNX Runtime."""
    return str(onnxruntime.__version__)


def _where(model: Model | onnx.ModelProto | str | Path) -> str:
    if isinstance(model, (str, Path)):
        return str(model)
    return (model.proto if isinstance(model, Model) else model).graph.name or "the model"

"""Sessions of ONNX Runtime, and several runs of one at a time.

A run on one thread takes less of a processor than the same run on several, which wait for each other at every node. So
many runs are made at the same time, each on few threads, and what they give is taken in one after the other, always in
the same order.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, TypeVar

import onnx
import onnxruntime

from lindep_onnx.errors import LindepError, ModelError, UsageError
from lindep_onnx.files import WeightsDir
from lindep_onnx.model import weights as storage

Item = TypeVar("Item")
Found = TypeVar("Found")
Session: TypeAlias = onnxruntime.InferenceSession

#: Option with the folder of the external data of a model that is handed over as a string of bytes.
FOLDER = "session.model_external_initializers_file_folder_path"
#: Bytes of activations that runs may have at the same time, all tensors counted; few are alive together.
ACTIVATIONS = 1 << 30


@dataclass(frozen=True)
class Crew:
    """How the cores are shared out.

    Attributes:
        runs: at the same time.
        threads: intra-op threads of each; 0 lets ONNX Runtime choose.
    """

    runs: int
    threads: int

    def pool(self) -> ThreadPoolExecutor:
        """Threads for the runs; a context manager."""
        return ThreadPoolExecutor(self.runs)


def crew(threads: int, providers: Sequence[str], activations: int) -> Crew:
    """As many runs at a time as there are cores and memory.

    Args:
        threads: that may be used; 0 for one on each core.
        providers: execution providers; runs on other devices than the CPU are made one after the other.
        activations: bytes of all tensors of a run.
    """
    if not on_processor(providers):
        return Crew(1, threads)
    own = threads or cores()
    runs = max(1, min(own, ACTIVATIONS // max(1, activations)))
    return Crew(runs, own // runs)


def on_processor(providers: Sequence[str]) -> bool:
    """Whether nothing but the processor runs models.

    Args:
        providers: execution providers.
    """
    return all(provider == "CPUExecutionProvider" for provider in providers)


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(
    pool: Executor, work: Callable[[Item], Found], items: Iterable[Item], runs: int
) -> Iterator[tuple[Item, Found]]:
    """Do some work for every item beside the caller's own.

    Args:
        pool: where it is done.
        work: what to do; several threads do it at a time.
        items: what to do it for; they are made in the caller's thread, a few ahead.
        runs: how many may wait at a time, beside as many that are done or being done.

    Yields:
        Items and what was found, in the order of the items, whatever the order in which they are done.
    """
    waiting: deque[tuple[Item, Future[Found]]] = deque()
    try:
        for item in items:
            waiting.append((item, pool.submit(work, item)))
            if len(waiting) > 2 * runs:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()
    finally:
        for _, future in waiting:
            future.cancel()


def open_session(
    model: onnx.ModelProto | str | Path,
    folder: WeightsDir | None = None,
    *,
    providers: Sequence[str],
    threads: int,
    optimised: bool = True,
    timed: bool = False,
) -> Session:
    """Make a model ready to run.

    Args:
        model: a model in memory, or a path.
        folder: of the external data of a model in memory.
        providers: execution providers, in order of preference.
        threads: intra-op threads; 0 lets ONNX Runtime choose.
        optimised: False runs the graph as it is written.
        timed: True runs it as ONNX Runtime does by default. Else waiting threads do not spin: between two runs they
            would take the cores from NumPy (measured: least squares on two cores are 8 times slower). And weights in
            files are used where they lie, not copied into an order that some kernels are faster with.

    Raises:
        UsageError: a provider is not available here.
        ModelError: ONNX Runtime cannot load the model.
    """
    available = onnxruntime.get_available_providers()
    unknown = [name for name in providers if name not in available]
    if unknown:
        raise UsageError(f"--providers: {unknown[0]!r} is not available here; choose from {', '.join(available)}.")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.enable_cpu_mem_arena = optimised  # an arena pays in many runs
    # Planned memory is kept beside the arena, for every run that is made at the same time.
    options.enable_mem_pattern = timed
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if timed else "0")
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimised else levels.ORT_DISABLE_ALL
    try:
        if not isinstance(model, onnx.ModelProto):
            return Session(str(model), options, providers=list(providers))
        if folder is None:  # a large one that was put together here goes by way of the disk, not of a string
            model, folder = storage.read(model)
        if folder is not None:
            options.add_session_config_entry(FOLDER, str(folder.path.absolute()))
            if not timed:
                options.add_session_config_entry("session.disable_prepacking", "1")
                if optimised:
                    options.graph_optimization_level = levels.ORT_ENABLE_EXTENDED
        return Session(model.SerializeToString(), options, providers=list(providers))
    except LindepError:
        raise
    except Exception as error:  # ONNX Runtime's exceptions have no common base
        raise ModelError(f"{_where(model)}: ONNX Runtime cannot load it: {one_line(error)}") from error


def _where(model: onnx.ModelProto | str | Path) -> str:
    return (model.graph.name or "the model") if isinstance(model, onnx.ModelProto) else str(model)


def one_line(error: Exception) -> str:
    """The first line of what a C++ library says, without error codes, source files and signatures."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    place = r"\S+\.(?:cc|cpp|cu|h):\d+ "
    trimmed = re.sub(place + r".*?\) (?:const )?(?=[A-Z])", "", text, count=1)
    return re.sub(place, "", trimmed) or text

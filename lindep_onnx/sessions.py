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
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, TypeVar

import onnx
import onnxruntime

from lindep_onnx import graph
from lindep_onnx.errors import LindepError, ModelError, UsageError

__all__ = ["Crew", "Session", "cores", "crew", "in_order", "one_line", "open_session", "readable"]

Item = TypeVar("Item")
Found = TypeVar("Found")
Session: TypeAlias = onnxruntime.InferenceSession

#: Bytes of weights up to which a model is handed over as one string of bytes; larger ones by way of the disk.
IN_MEMORY = 1 << 28
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
    if any(provider != "CPUExecutionProvider" for provider in providers):
        return Crew(1, threads)
    own = threads or cores()
    runs = max(1, min(own, ACTIVATIONS // max(1, activations)))
    return Crew(runs, own // runs)


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
    *,
    providers: Sequence[str],
    threads: int,
    optimised: bool = True,
    timed: bool = False,
    weights: onnx.ModelProto | None = None,
) -> Session:
    """Make a model ready to run.

    Args:
        model: a model in memory, or a path.
        providers: execution providers, in order of preference.
        threads: intra-op threads; 0 lets ONNX Runtime choose.
        optimised: False runs the graph as it is written.
        weights: where the data comes from that a light model (`lindep_onnx.graph.light`) lacks.
        timed: True leaves waiting threads spinning, as ONNX Runtime does by default. Between two runs they then take
            the cores from NumPy (measured: least squares on two cores are 8 times slower).

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
        with readable(model, weights) as source:
            return Session(source, options, providers=list(providers))
    except LindepError:
        raise
    except Exception as error:  # ONNX Runtime's exceptions have no common base
        raise ModelError(f"{_where(model)}: ONNX Runtime cannot load it: {one_line(error)}") from error


def _where(model: onnx.ModelProto | str | Path) -> str:
    return (model.graph.name or "the model") if isinstance(model, onnx.ModelProto) else str(model)


@contextmanager
def readable(model: onnx.ModelProto | str | Path, weights: onnx.ModelProto | None = None) -> Iterator[bytes | str]:
    """What ONNX Runtime and the checker take: a path, or the bytes of a model that is not too large for that."""
    if not isinstance(model, onnx.ModelProto):
        yield str(model)
    elif graph.size_of(model) > IN_MEMORY:
        with graph.on_disk(model, weights) as path:
            yield str(path)
    else:
        # Large models go without this copy, and those over 2 GB have no bytes at all.
        yield (model if weights is None else graph.filled(model, weights)).SerializeToString()


def one_line(error: Exception) -> str:
    """The first line of what a C++ library says, without error codes, source files and signatures."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    place = r"\S+\.(?:cc|cpp|cu|h):\d+ "
    trimmed = re.sub(place + r".*?\) (?:const )?(?=[A-Z])", "", text, count=1)
    return re.sub(place, "", trimmed) or text

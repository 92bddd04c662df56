"""What a case works with, and processes of their own: what a call or a command takes there."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tasks import Places

from lindep_onnx.runtime.timing import Ratio, Timing

#: Starts a process and writes down what it took. A process counts the memory of the one that started it, so that must
#: be a small one.
LAUNCHER = """
import os, sys, time
start = time.perf_counter()
_, status, used = os.wait4(os.posix_spawn(sys.argv[2], sys.argv[2:], os.environ), 0)
with open(sys.argv[1], "w") as figures:
    print(time.perf_counter() - start, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024 / 1e6, file=figures)
sys.exit(os.waitstatus_to_exitcode(status))
"""


@dataclass(frozen=True)
class Bench:
    """What a case works with.

    Attributes:
        benchmark: that of pytest-benchmark.
        rows: of the table that is printed in the end.
        folder: to write to.
        places: where models and images are.
        held_out: whether to judge by held-out calibration images, not by test images.
        write: a file to write to; None for none.
    """

    benchmark: Any
    rows: list[dict[str, str]]
    folder: Path
    places: Places
    held_out: bool
    write: Path | None

    def once(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call a function one time and measure it."""
        return self.benchmark.pedantic(call, arguments, options, rounds=1, iterations=1)

    def row(self, **cells: object) -> None:
        """Add a row, cells by column, to the table and to the JSON."""
        texts = {column: str(cell) for column, cell in cells.items()}
        self.rows.append(texts)
        self.benchmark.extra_info.setdefault("rows", []).append(texts)


class Taken(NamedTuple):
    """What a process took and what came of it; megabytes at the peak."""

    seconds: float
    cpu: float
    peak: float
    code: int
    said: str


def ratio(found: Ratio | Timing) -> str:
    """A latency as a share of the original's, with its 95 % interval."""
    return f"{found.ratio:.2f} ({found.low:.2f} to {found.high:.2f})"


def run(*line: object) -> Taken:
    """Run a program; what it says is that of both streams."""
    with tempfile.NamedTemporaryFile("r") as figures:
        launched = [sys.executable, "-S", "-c", LAUNCHER, figures.name, *map(str, line)]
        found = subprocess.run(launched, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        return Taken(*map(float, figures.read().split()), found.returncode, found.stdout)


def command(*arguments: object) -> Taken:
    """Run the command line of this project, start-up included."""
    return run(sys.executable, "-m", "lindep_onnx", *arguments, "--quiet")


def apart(call: Callable[..., Any], *arguments: Any) -> tuple[Any, float, int]:
    """Call in a fresh process.

    Returns:
        What the call returns, its seconds, and the peak of the memory of its process in MB.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measured, call, arguments).result()


def _measured(call: Callable[..., Any], arguments: Sequence[Any]) -> tuple[Any, float, int]:
    start = time.perf_counter()
    result = call(*arguments)
    seconds = time.perf_counter() - start
    # getrusage would count the parent too.
    status = Path("/proc/self/status").read_text(encoding="ascii").split()
    return result, seconds, int(status[status.index("VmHWM:") + 1]) // 1000

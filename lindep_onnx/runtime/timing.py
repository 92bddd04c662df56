"""Latency of models as a user meets it: each alone in a process of its own, with ONNX Runtime's default options.

Two sessions of one process disturb each other: threads of the one that has just run spin on while the other is timed.
So every model has a process; they run in turns, in blocks of some runs, of which the first are discarded, until threads
of the others sleep and caches hold what is needed. Of the others the fastest counts: whatever else a machine does only
ever makes a run slower (on two busy cores the median of a block of a model against itself spread by 37 %, the fastest
run by 6 %). A turn of all is a round, and gives one ratio. The interval of their median comes from their order alone,
so that it holds whatever their distribution. A copy of the original is timed beside it: what it differs by is what
this machine adds.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom

from lindep_onnx.errors import TimingError, one_line
from lindep_onnx.files import Scratch, discard
from lindep_onnx.model.ir import Model
from lindep_onnx.runtime.backend import FOLDER, Runtime

#: Rounds: as many as give an interval that leaves out the outermost on both sides, and as few as give one at all.
ROUNDS, MIN_ROUNDS = 21, 6
#: Rounds of a glance: a median that one disturbed round does not move.
LOOKS = 13
CONFIDENCE = 0.95
#: Seconds of a block, and before it those in which threads of the other processes still spin and caches fill.
BLOCK, DISCARDED = 0.03, 0.01
#: Runs that take longer than this (seconds) are not discarded: what the first of a block loses is no share of it.
LONG = 0.5
#: Seconds that the runs of all rounds may take, where none is asked for, before there are fewer rounds.
PATIENCE = 10.0
#: Seconds that a process may take to answer, beyond those that it was asked to run for.
MAX_WAIT = 900.0
ORIGINAL = "original"
#: A result that takes this share of the original's time is slower; less is not worth a word.
SLOWER = 1.02


@dataclass(frozen=True)
class Ratio:
    """A time as a share of another, measured in several rounds.

    Attributes:
        ratio: the median over the rounds.
        low, high: ends of its 95 % interval.
    """

    ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class Timing:
    """How long a run of the original takes, and of a model that is to take its place.

    Attributes:
        before: milliseconds of the original, the median over the rounds of the fastest run of a block.
        after: milliseconds of the other model, likewise.
        ratio: after as a share of before, the median over the rounds.
        low, high: ends of the 95 % interval of the ratio.
        control: a copy of the original against the original, measured alike.
        rounds: how many ratios there are.
        batch: samples in a run.
        threads: of each model; 0 for as many as ONNX Runtime takes by itself.
    """

    before: float
    after: float
    ratio: float
    low: float
    high: float
    control: Ratio
    rounds: int
    batch: int
    threads: int

    @property
    def differs(self) -> bool:
        """Whether there is a difference: 1 is not in the interval, and a copy of the original differs by less."""
        return not self.low <= 1.0 <= self.high and not self.control.low <= self.ratio <= self.control.high

    @property
    def slower(self) -> bool:
        """Whether the model is slower than the original beyond doubt, by more than 2 %."""
        return self.differs and self.low > SLOWER

    @property
    def faster(self) -> bool:
        """Whether the model is faster than the original beyond doubt."""
        return self.differs and self.high < 1.0


class Stopwatch:
    """Times models against an original. A context manager; no process outlives it.

    The processes of the original and of its copy start with the first comparison and stay for the next. Weights in
    files are used where they lie. An original with such weights is its own copy: each process holds all of them.

    Args:
        original: a model in memory, or the path of one.
        feeds: arrays by input name; all models take the same.
        runtime: providers and threads of all models.
        batch: samples in the feeds.
        seconds: that a comparison runs models for, what is discarded left out; None for about `BLOCK` a block. At
            least `MIN_ROUNDS` runs of each model are made, however long they take.
    """

    def __init__(
        self,
        original: Model | Path,
        feeds: Mapping[str, NDArray[Any]],
        runtime: Runtime,
        *,
        batch: int = 1,
        seconds: float | None = None,
    ) -> None:
        self.original, self.feeds, self.runtime = original, feeds, runtime
        self.batch, self.seconds = batch, seconds
        self._opened = ExitStack()
        self._folder: Path | None = None
        self._starts = 0
        self._own: tuple[_Process, _Process] | None = None

    def __enter__(self) -> Stopwatch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._own = self._folder = None
        self._opened.close()

    def compare(self, model: Model | Path) -> Timing:
        """Time a model against the original.

        Args:
            model: takes the same inputs.

        Raises:
            TimingError: a process does not start, or a model cannot be loaded or run in it.
        """
        times = self._taken(model, ROUNDS, copy=True)
        ratio, control = median_ratio(times[1] / times[0]), median_ratio(times[2] / times[0])
        one, two = (float(np.median(taken)) * 1e3 for taken in times[:2])
        spread = ratio.ratio, ratio.low, ratio.high
        return Timing(one, two, *spread, control, times.shape[1], self.batch, self.runtime.threads)

    def glance(self, model: Model | Path) -> float:
        """The share of the original's time that a model takes, of few rounds: for a search, which ends with `compare`.

        Args:
            model: takes the same inputs.

        Raises:
            TimingError: a process does not start, or a model cannot be loaded or run in it.
        """
        before, after = self._taken(model, LOOKS, copy=False)
        return float(np.median(after / before))

    def _taken(self, model: Model | Path, rounds: int, *, copy: bool) -> NDArray[np.float64]:
        """(2 or 3, rounds) seconds of the original, of a model, and of the copy."""
        with ExitStack() as own:
            other = own.enter_context(self._started(model, "result"))
            before, again = self._originals()
            models = (before, other, again) if copy else (before, other)
            quick = [process.run(0.0, 0.0)[0] for process in models]
            return self._rounds(models, quick, rounds, self.seconds if copy else None)

    def _originals(self) -> tuple[_Process, _Process]:
        if self._own is None:
            first = self._opened.enter_context(self._started(self.original, ORIGINAL))
            large = isinstance(self.original, Model) and self.original.folder is not None
            self._own = first, first if large else self._opened.enter_context(self._started(self.original, ORIGINAL))
        return self._own

    def _started(self, model: Model | Path, name: str) -> _Process:
        """A process for a model, which goes on loading it."""
        if self._folder is None:
            self._folder = Path(self._opened.enter_context(Scratch()))
            names = np.array(list(self.feeds), dtype=np.str_)
            values: dict[str, Any] = {str(place): _plain(value) for place, value in enumerate(self.feeds.values())}
            np.savez(self._folder / "feeds.npz", names=names, **values)
        self._starts += 1
        path, folder = model, None
        if isinstance(model, Model):
            path, folder = self._folder / f"{name}_{self._starts}.onnx", model.folder
            written = list(self._folder.glob(f"{name}_*.onnx"))
            if name == ORIGINAL and written:  # the process of its copy reads it, too
                path = written[0]
            else:
                for old in written:
                    discard(old)
                path.write_bytes(model.proto.SerializeToString())
        asked = {
            "path": [str(place) for place in sys.path],
            "model": str(path),
            "folder": None if folder is None else str(folder.path.absolute()),
            "folder_option": FOLDER,
            "feeds": str(self._folder / "feeds.npz"),
            "threads": self.runtime.threads,
            "providers": [(own.name, own.settings) for own in self.runtime.providers],
        }
        return _Process(asked, name, self._folder / f"{self._starts}.log")

    def _rounds(
        self, models: Sequence[_Process], quick: Sequence[float], most: int, seconds: float | None
    ) -> NDArray[np.float64]:
        """(models, rounds) seconds of a run, the fastest of a block; `quick` holds those of one run of each."""
        rounds = most if most * sum(quick) <= (seconds or PATIENCE) else min(most, MIN_ROUNDS)
        block = BLOCK if seconds is None else seconds / rounds / len(models)
        block = max(block, 1.5 * max(quick))  # two runs at least
        discard = 0.0 if max(quick) > LONG else DISCARDED
        times = np.zeros((len(models), rounds))
        for number in range(rounds):
            # Two rounds, forwards and backwards, begin with each of them: none is always behind the same one.
            turn = np.roll(np.arange(len(models)), number // 2)
            for place in turn if number % 2 == 0 else turn[::-1]:
                times[place, number] = min(models[place].run(block, discard))
        return times


class _Process:
    """A model in a process of its own, which starts at once and ends with the context.

    Args:
        asked: what `timed_process` has to know.
        what: the model, in messages.
        log: a file for what the process says beside its answers.

    Raises:
        TimingError: there is no process.
    """

    def __init__(self, asked: Mapping[str, Any], what: str, log: Path) -> None:
        self._what, self._log, self._ready = what, log, False
        if not sys.executable or getattr(sys, "frozen", False):  # a program that is frozen would start itself
            raise self._failure("there is no Python interpreter to start one with")
        command = [sys.executable, str(Path(__file__).with_name("timed_process.py"))]
        try:
            with log.open("wb") as said:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, encoding="utf-8"
                )
        except OSError as error:
            raise self._failure(str(error)) from error
        self._send({**asked, "discard": 0.0, "seconds": 0.0})

    def __enter__(self) -> _Process:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()  # closes its pipes too

    def run(self, seconds: float, discard: float) -> list[float]:
        """Seconds of every run of a block; waits first until the model is loaded and was run once.

        Args:
            seconds: that the block lasts, at least one run.
            discard: seconds before it in which runs do not count.

        Raises:
            TimingError: the model cannot be loaded or run, or the process is gone.
        """
        if not self._ready:
            self._answer(0.0)
            self._ready = True
        self._send({"discard": discard, "seconds": seconds})
        return self._answer(seconds + discard)

    def _send(self, asked: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        with suppress(OSError):  # it is gone: there will be no answer
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()

    def _answer(self, seconds: float) -> list[float]:
        assert self._process.stdout is not None
        limit = threading.Timer(seconds + MAX_WAIT, self._process.kill)
        limit.daemon = True
        limit.start()
        try:
            line = self._process.stdout.readline()
        finally:
            limit.cancel()
        if not line:
            said = self._log.read_text(encoding="utf-8", errors="replace").split("\n")
            last = next((text.strip() for text in reversed(said) if text.strip()), "it said nothing")
            raise self._failure(f"it ended with code {self._process.wait()} ({last[:200]})")
        answer = json.loads(line)
        if "error" in answer:
            raise self._failure(one_line(RuntimeError(answer["error"])))
        return [float(taken) for taken in answer["seconds"]]

    def _failure(self, why: str) -> TimingError:
        return TimingError(f"The {self._what} cannot be timed in a process of its own: {why}.")


def median_ratio(shares: NDArray[np.float64]) -> Ratio:
    """The median of (rounds,) ratios, at least `MIN_ROUNDS`, with its interval from order statistics."""
    ordered = np.sort(shares)
    # How many of them lie below the true median is binomial; as likely as not each does.
    place = int(binom.ppf((1 - CONFIDENCE) / 2, len(shares), 0.5))
    return Ratio(float(np.median(shares)), float(ordered[place - 1]), float(ordered[-place]))


def _plain(value: NDArray[Any]) -> NDArray[Any]:
    """An array that goes into an archive without pickling; text becomes fixed-width."""
    return np.asarray(value, dtype=np.str_) if value.dtype.kind in "OS" else np.asarray(value)

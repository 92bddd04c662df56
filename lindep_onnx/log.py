"""What a run tells while it goes: which stage it is in, how far that is, and how long each took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Log:
    """Times stages and passes on their progress; made once for a run. It says nothing unless told where to.

    Args:
        tell: called with (stage, done, all); None to be silent.

    Attributes:
        seconds: time taken by each stage so far.
    """

    def __init__(self, tell: Callable[[str, int, int], None] | None = None) -> None:
        self._tell = tell
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count what is done inside as part of a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def progress(self, stage: str, done: int, total: int) -> None:
        """Say how far a stage is."""
        if self._tell is not None:
            self._tell(stage, done, total)

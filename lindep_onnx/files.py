"""Files that are never seen half written, and temporary folders that do not outlive their run for long.

A run that is killed cannot clean up. So the name of a temporary folder says which process on which machine made it, and
whoever makes the next one beside it removes those whose process is gone.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import os
import platform
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

#: A folder with a file of this name is left to whoever wrote it: there is more to clean up than the folder.
KEEP = "keep"
#: Names that are compared with one that is not there, and how much alike they must be, from 0 to 1.
MAX_BESIDE, LIKENESS = 1000, 0.75
#: Not the name of the machine itself: it may hold any character.
_PREFIX = f".lindep_onnx.{hashlib.blake2b(platform.node().encode(), digest_size=4).hexdigest()}."


class Scratch:
    """A temporary folder; what dead runs left beside it goes first.

    Not `tempfile.TemporaryDirectory`: a process that was forked meanwhile would remove it too when it ends.

    Args:
        parent: where to make it; None for the system's place.

    Attributes:
        name: its path.
    """

    def __init__(self, parent: Path | None = None) -> None:
        for folder in stale_scratch(Path(tempfile.gettempdir()) if parent is None else parent):
            if not (folder / KEEP).exists():
                shutil.rmtree(folder, ignore_errors=True)
        self.name = tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}.", dir=parent)
        self._end = weakref.finalize(self, _removed, self.name, os.getpid())

    def __enter__(self) -> str:
        return self.name

    def __exit__(self, *_: object) -> None:
        self.cleanup()

    def cleanup(self) -> None:
        """Remove it, if this process made it."""
        self._end()


def _removed(name: str, process: int) -> None:
    if os.getpid() == process:
        shutil.rmtree(name, ignore_errors=True)


@dataclass(frozen=True)
class WeightsDir:
    """A folder with files that somebody needs.

    Attributes:
        path: where it is.
    """

    path: Path
    _contents: dict[str, NDArray[np.uint8]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _states: dict[str, tuple[int, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def content(self, name: str) -> NDArray[np.uint8]:
        """The bytes of a file in it, mapped once for all who read them.

        Args:
            name: of the file, relative to the folder.

        Raises:
            OSError: it cannot be read.
            ValueError: it is empty.
        """
        if name not in self._contents:
            self._states[name] = self._state(name)
            self._contents[name] = np.asarray(np.memmap(self.path / name, np.uint8, "r"))
        return self._contents[name]

    def changed(self) -> Path | None:
        """A file that is no longer what was mapped, if there is one: what was computed from it is worth nothing."""
        return next((self.path / name for name, state in self._states.items() if self._state(name) != state), None)

    def _state(self, name: str) -> tuple[int, ...]:
        try:
            found = (self.path / name).stat()
        except OSError:
            return ()
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns

    @classmethod
    def temporary(cls) -> WeightsDir:
        """A folder that is there as long as this value, and what is found in it stays for whoever has mapped it."""
        scratch = Scratch()
        folder = cls(Path(scratch.name))
        weakref.finalize(folder, scratch.cleanup)
        return folder


def stale_scratch(parent: Path) -> Iterator[Path]:
    """Temporary folders in `parent` that processes of this machine made which are gone."""
    if os.name != "posix":  # elsewhere one cannot ask whether a process is there
        return
    for folder in sorted(parent.glob(f"{_PREFIX}*")):
        number = folder.name.removeprefix(_PREFIX).partition(".")[0]
        if number.isdigit() and not folder.is_symlink() and not _is_alive(int(number)):
            yield folder


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        return True
    return True


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A place to write to; its content takes the place of `path` in one step if nothing goes wrong inside.

    Raises:
        OSError: it cannot be written; `path` is as it was.
    """
    with Scratch(path.parent) as name:
        staged = Path(name) / path.name
        yield staged
        flush(staged)
        staged.replace(path)


def suggestion(path: Path) -> str:
    """A question to put behind "no such file": the name beside it that is most like this one; empty if none is."""
    try:
        beside = [entry.name for entry in itertools.islice(path.parent.iterdir(), MAX_BESIDE)]
    except (OSError, ValueError):
        return ""
    close = difflib.get_close_matches(path.name, sorted(beside), 1, LIKENESS)
    return f" Did you mean {path.with_name(close[0])}?" if close else ""


def flush(path: Path) -> None:
    """Wait until a file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())

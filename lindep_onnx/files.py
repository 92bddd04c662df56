"""Files that are never seen half written, and temporary folders that do not outlive their run for long.

A run that is killed cannot clean up. So the name of a temporary folder says which process on which machine made it, and
whoever makes the next one beside it removes those whose process is gone.

On Windows a file that is open or mapped cannot be replaced, removed or rewritten. So no name is written to twice
while its first content may be mapped, and whatever cannot be removed yet is left to the next run.
"""

from __future__ import annotations

import atexit
import difflib
import hashlib
import itertools
import os
import platform
import secrets
import shutil
import stat
import sys
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lindep_onnx.errors import OutputError

#: A folder with a file of this name is left to whoever wrote it: there is more to clean up than the folder.
KEEP = "keep"
#: Names that are compared with one that is not there, and how much alike they must be, from 0 to 1.
MAX_BESIDE, LIKENESS = 1000, 0.75
#: Of Windows: the right to wait for a process, that there is none, and that it has not ended.
SYNCHRONIZE, NO_SUCH_PROCESS, STILL_RUNS = 0x00100000, 87, 0x102
#: Not the name of the machine itself: it may hold any character.
_PREFIX = f".lindep_onnx.{hashlib.blake2b(platform.node().encode(), digest_size=4).hexdigest()}."
#: Folders that could not be removed yet, and the process that made each.
_IN_USE: dict[str, int] = {}


class Scratch:
    """A temporary folder; what dead runs left beside it goes first.

    Not `tempfile.TemporaryDirectory`: a process that was forked meanwhile would remove it too when it ends.

    Args:
        parent: where to make it; None for the system's place.

    Attributes:
        name: its path.
    """

    def __init__(self, parent: Path | None = None) -> None:
        _removed_at_last()
        for folder in stale_scratch(Path(tempfile.gettempdir()) if parent is None else parent):
            if not (folder / KEEP).exists():
                shutil.rmtree(folder, ignore_errors=True)
        self.name = _made(f"{_PREFIX}{os.getpid()}.", parent)
        self._end = weakref.finalize(self, _removed, self.name, os.getpid())

    def __enter__(self) -> str:
        return self.name

    def __exit__(self, *_: object) -> None:
        self.cleanup()

    def cleanup(self) -> None:
        """Remove it, if this process made it."""
        self._end()


def _made(prefix: str, parent: Path | None) -> str:
    """A new folder. On Windows a file that is moved out of a private one would stay private, so it is none there."""
    if parent is None or sys.platform != "win32":
        return tempfile.mkdtemp(prefix=prefix, dir=parent)
    folder = parent / f"{prefix}{secrets.token_hex(4)}"
    folder.mkdir()
    return str(folder)


def _removed(name: str, process: int) -> None:
    if os.getpid() == process:
        shutil.rmtree(name, ignore_errors=True)
        if Path(name).exists():
            _IN_USE[name] = process


@atexit.register
def _removed_at_last() -> None:
    """Remove folders again that held files which were still mapped."""
    for name in tuple(_IN_USE):
        _removed(name, _IN_USE.pop(name))


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
    for folder in sorted(parent.glob(f"{_PREFIX}*")):
        number = folder.name.removeprefix(_PREFIX).partition(".")[0]
        if number.isdigit() and not folder.is_symlink() and not _is_alive(int(number)):
            yield folder


def _is_alive(process: int) -> bool:
    if sys.platform == "win32":
        return _is_alive_on_windows(process)
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def _is_alive_on_windows(process: int) -> bool:
    """The same where `os.kill` would end the process."""
    import ctypes

    kernel: Any = ctypes.WinDLL("kernel32", use_last_error=True)  # type: ignore[attr-defined, unused-ignore]
    kernel.OpenProcess.restype = ctypes.c_void_p
    handle = kernel.OpenProcess(SYNCHRONIZE, False, process & 0xFFFFFFFF)
    if not handle:
        return bool(ctypes.get_last_error() != NO_SUCH_PROCESS)  # type: ignore[attr-defined, unused-ignore]
    try:  # a process that has ended is there as long as anybody holds on to it
        return bool(kernel.WaitForSingleObject(ctypes.c_void_p(handle), 0) == STILL_RUNS)
    finally:
        kernel.CloseHandle(ctypes.c_void_p(handle))


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


def check_writable(path: Path) -> None:
    """Find out before the work whether a file can be written.

    Raises:
        OutputError: it is a directory, its folder is missing or takes no files, its path is too long, it is protected,
            or another program holds it open where that keeps it from being replaced.
    """
    try:
        check_folder(path)
    except OSError as error:  # no name for a file: too long, for instance
        raise OutputError(f"{path}: cannot be looked up ({error.strerror or error}); name another file.") from error
    try:  # nothing short of writing tells: `os.access` knows nothing of the rights of Windows
        with Scratch(path.parent) as name:
            (Path(name) / path.name).touch()
    except OSError as error:
        why = error.strerror or error
        raise OutputError(f"{path}: the folder {path.parent} cannot be written to ({why}); name another.") from error
    try:
        if path.exists():
            if getattr(path.stat(), "st_file_attributes", 0) & stat.FILE_ATTRIBUTE_READONLY:
                raise OSError("it is write-protected")
            path.replace(path)  # changes nothing, and fails where a file that is open keeps its name
    except OSError as error:
        why = error.strerror or error
        raise OutputError(f"{path}: cannot be replaced ({why}); close what uses it, or name another file.") from error


def in_order(path: Path) -> tuple[str, ...]:
    """What paths are sorted by, so that data is in the same order everywhere: Windows knows no capital letters."""
    return path.parts


def check_folder(path: Path) -> None:
    """Raise an `OutputError` where a file cannot be because a directory is, or because its folder is missing."""
    if path.is_dir():
        raise OutputError(f"{path}: is a directory; name a file to write.")
    if not path.parent.is_dir():
        raise OutputError(f"{path}: the folder {path.parent} does not exist; create it or name another.")


def discard(path: Path) -> None:
    """Remove a file, if that can be done: one that is mapped stays, on Windows, until its folder goes."""
    with suppress(OSError):
        path.unlink()


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
    with path.open("r+b") as file:  # what can only be read cannot be flushed on Windows
        os.fsync(file.fileno())

"""A file layer with the rules of Windows, on Linux: what is refused there is refused here.

Whether a file is in use is asked of the kernel, for this process and those that it started: files that are open or
mapped by anybody, ONNX Runtime included, keep their name and their length there.
"""

from __future__ import annotations

import builtins
import errno
import fcntl
import io
import os
import shutil
import stat
import tempfile
from pathlib import Path
from typing import Any

import pytest


def _processes() -> list[Path]:
    own = Path("/proc/self")
    children = [number for task in (own / "task").iterdir() for number in (task / "children").read_text().split()]
    return [own, *(Path("/proc") / number for number in children)]


def is_open(path: Any) -> bool:
    """Whether a process has a file open."""
    wanted = os.path.realpath(path)
    return any(os.path.realpath(link) == wanted for process in _processes() for link in (process / "fd").iterdir())


def is_mapped(path: Any) -> bool:
    """Whether a process has a file mapped."""
    wanted = os.path.realpath(path)
    maps = (line for process in _processes() for line in (process / "maps").read_text().splitlines())
    return any(line.endswith(" " + wanted) for line in maps)


def _refuse(path: Any) -> None:
    if is_open(path) or is_mapped(path):
        raise PermissionError(errno.EACCES, "The process cannot access the file: it is being used", str(path))


def impose(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse, until the test ends, what Windows refuses."""
    replace, unlink, fsync, open_file = os.replace, os.unlink, os.fsync, io.open

    def moving(source: Any, target: Any, **rest: Any) -> None:
        for path in (source, target):
            if os.path.lexists(path):
                _refuse(path)
        replace(source, target, **rest)

    def removing(path: Any, **rest: Any) -> None:
        _refuse(path)
        unlink(path, **rest)

    def waiting(file: int) -> None:
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:  # a folder cannot be opened otherwise
            raise OSError(errno.EBADF, "Bad file descriptor")
        fsync(file)

    def opening(file: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
        if "w" in mode and not isinstance(file, int) and Path(file).exists() and is_mapped(file):
            raise OSError(errno.EINVAL, "The file has a user-mapped section open", str(file))
        return open_file(file, mode, *rest, **named)

    def reopened(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "A named temporary file cannot be opened a second time")

    for name, own in (("replace", moving), ("rename", moving), ("unlink", removing), ("remove", removing)):
        monkeypatch.setattr(os, name, own)
    monkeypatch.setattr(os, "fsync", waiting)
    monkeypatch.setattr(io, "open", opening)
    monkeypatch.setattr(builtins, "open", opening)
    monkeypatch.setattr(tempfile, "NamedTemporaryFile", reopened)
    monkeypatch.setattr(shutil, "_use_fd_functions", False)  # folders are removed by the names of their files
    for name in ("fork", "sched_getaffinity"):
        monkeypatch.delattr(os, name)


def protect(monkeypatch: pytest.MonkeyPatch, protected: Path) -> None:
    """Give a file the attribute that keeps it from being replaced on Windows."""
    plain = Path.stat

    class Protected:
        def __init__(self, found: os.stat_result) -> None:
            self._found, self.st_file_attributes = found, stat.FILE_ATTRIBUTE_READONLY

        def __getattr__(self, name: str) -> Any:
            return getattr(self._found, name)

    def looked_up(path: Path, **rest: Any) -> Any:
        found = plain(path, **rest)
        return Protected(found) if path == protected else found

    monkeypatch.setattr(Path, "stat", looked_up)

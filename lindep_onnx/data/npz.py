"""Headers of `.npy` and `.npz` files, held against the size of the file: what is read later is there, and no more."""

from __future__ import annotations

import math
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

#: What the standard library and NumPy raise on damaged files, and on sizes that nobody has the memory for; a locked
#: archive is a RuntimeError.
UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    EOFError,
    TypeError,
    RuntimeError,
    MemoryError,
    OverflowError,
    SyntaxError,
    AttributeError,
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)


def npy_header(file: Any, size: int) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """Type and shape of an array.

    Args:
        file: open for reading, at the start of the array.
        size: bytes from there to its end.

    Raises:
        ValueError: the header is damaged, or declares more than there is. Others of `UNREADABLE` are possible too.
    """
    version = npy.read_magic(file)
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"version {version} of the npy format is not supported")
    shape, _, dtype = read(file)
    if any(not 0 <= length < 2**63 for length in shape):
        raise ValueError(f"its shape {shape} is impossible")
    wanted, there = math.prod(map(int, shape)) * dtype.itemsize, size - file.tell()
    if not dtype.hasobject and wanted > there:
        raise ValueError(f"cut short: {wanted:,} bytes of data declared, {there:,} there")
    return dtype, tuple(int(length) for length in shape)


def npz_headers(path: Path, *, stored: bool = False) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    """Type and shape of every array in an archive.

    Args:
        path: the file.
        stored: refuse compressed arrays, so that no more is read than the file is long.

    Raises:
        ValueError: it is damaged, empty or compressed. Others of `UNREADABLE` are possible too.
    """
    headers = {}
    with zipfile.ZipFile(path) as archive:
        for item in archive.infolist():
            if not item.filename.endswith(".npy"):
                continue
            if stored and item.compress_type != zipfile.ZIP_STORED:
                raise ValueError("it is compressed")
            with archive.open(item) as file:
                headers[item.filename[: -len(".npy")]] = npy_header(file, item.file_size)
    if not headers:
        raise ValueError("there is no array in it")
    return headers

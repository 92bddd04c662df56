"""The files of Fashion-MNIST, without PyTorch."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["read_idx"]


def read_idx(path: Path) -> NDArray[np.uint8]:
    """The array of a gzipped idx file of bytes: a 4-byte magic number whose last byte is the rank, sizes, data."""
    raw = gzip.decompress(path.read_bytes())
    rank = raw[3]
    sizes = np.frombuffer(raw, ">i4", count=rank, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(sizes)

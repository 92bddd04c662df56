"""A routine of BLAS that lets other threads run.

SciPy's Python wrappers hold the lock of the interpreter while BLAS computes, so that Gram matrices of several tensors
could not grow at the same time, nor sessions return what they found. The routine itself is part of SciPy's interface
for Cython (`scipy.linalg.cython_blas`) and is called here without the lock.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cython_blas

_name = ctypes.pythonapi.PyCapsule_GetName
_name.restype, _name.argtypes = ctypes.c_char_p, [ctypes.py_object]
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def _routine(name: str, *arguments: Any) -> Any:
    routines: dict[str, Any] = vars(cython_blas)["__pyx_capi__"]
    capsule = routines[name]
    return ctypes.CFUNCTYPE(None, *arguments)(_pointer(capsule, _name(capsule)))


_CHAR, _INT, _DOUBLE = ctypes.c_char_p, ctypes.POINTER(ctypes.c_int), ctypes.POINTER(ctypes.c_double)
_dsyrk = _routine("dsyrk", _CHAR, _CHAR, _INT, _INT, _DOUBLE, _DOUBLE, _INT, _DOUBLE, _DOUBLE, _INT)


def add_gram(lower: NDArray[np.float64], rows: NDArray[np.float64]) -> None:
    """Add Z'Z to the lower triangle of a matrix, in place.

    Args:
        lower: (F, F) in column order; what is above its diagonal is left as it is.
        rows: Z, (R, F) in row order.

    Raises:
        ValueError: an array is not laid out like that.
    """
    count, features = rows.shape
    if lower.shape != (features, features) or not (lower.flags.f_contiguous and rows.flags.c_contiguous):
        raise ValueError(f"a matrix of {lower.shape} does not fit rows of {rows.shape}, or their order in memory")
    if lower.dtype != np.float64 or rows.dtype != np.float64:
        raise ValueError(f"float64 is needed, not {lower.dtype} and {rows.dtype}")
    if not rows.size:
        return
    # Rows in row order are columns in column order: Z' as BLAS sees it.
    size, one = ctypes.byref(ctypes.c_int(features)), ctypes.byref(ctypes.c_double(1.0))
    z, c = (array.ctypes.data_as(_DOUBLE) for array in (rows, lower))
    _dsyrk(b"L", b"N", size, ctypes.byref(ctypes.c_int(count)), one, z, size, one, c, size)

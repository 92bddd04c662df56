"""A product as a matrix product: rows of what a weight multiplies, and the weight in the same order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lindep_onnx.linalg.fold import Matrix
from lindep_onnx.model.weighted import Window
from lindep_onnx.runtime.rows import rows_at
from lindep_onnx.structure.types import Product

Array: TypeAlias = NDArray[Any]


def unknowns(product: Product, shape: Sequence[int]) -> int:
    """How many weights of one output there are, from the shape of the weight."""
    inputs = shape[0] // product.group if product.inputs == 0 else shape[1]
    return int(inputs) * math.prod(shape[2:])


def patches_of(data: Array, product: Product, positions: NDArray[np.int64]) -> Array:
    """(groups, samples x rows, channels of a group x taps) float32.

    Args:
        data: what the product reads.
        product: the product.
        positions: (rows,) of its output.
    """
    if product.window is None:
        rows = rows_at(data, product.reader.axis, positions)
        return np.ascontiguousarray(rows.reshape(1, -1, rows.shape[-1]), dtype=np.float32)
    taps = _taps(product.window, data.shape[2:], positions)  # (rows, T), the last place is a zero
    count, channels = data.shape[:2]
    flat = np.concatenate([data.reshape(count, channels, -1), np.zeros((count, channels, 1), data.dtype)], axis=2)
    picked = flat[:, :, taps]  # (samples, channels, rows, T)
    grouped = picked.reshape(count, product.group, channels // product.group, *taps.shape)
    ordered = grouped.transpose(1, 0, 3, 2, 4)  # (groups, samples, rows, channels, T)
    return np.ascontiguousarray(ordered.reshape(product.group, count * len(positions), -1), dtype=np.float32)


def _taps(window: Window, sizes: Sequence[int], positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """(rows, T) flat input positions that each output position combines; the number of positions means a zero."""
    outputs = [window.output_size(axis, size) for axis, size in enumerate(sizes)]
    places = np.unravel_index(positions, outputs)
    flat = np.zeros((len(positions), 1), dtype=np.int64)
    valid = np.ones((len(positions), 1), dtype=bool)
    for axis, size in enumerate(sizes):
        offsets = np.arange(window.kernel[axis]) * window.dilations[axis]
        begin, stride = window.pads[axis][0], window.strides[axis]
        if window.transposed:
            at, rest = np.divmod(places[axis][:, None] + begin - offsets, stride)
        else:
            at, rest = places[axis][:, None] * stride - begin + offsets, np.zeros(1)
        inside = (rest == 0) & (at >= 0) & (at < size)
        flat = (flat[:, :, None] * size + np.clip(at, 0, size - 1)[:, None, :]).reshape(len(positions), -1)
        valid = (valid[:, :, None] & inside[:, None, :]).reshape(len(positions), -1)
    return np.where(valid, flat, math.prod(sizes))


def matrix_of(weight: Array, product: Product) -> Matrix:
    """(groups, channels of a group x taps, outputs of a group): the weight with its scale, ordered like the patches."""
    value = weight.astype(np.float64) * product.scale
    parts = value.reshape(product.group, len(value) // product.group, value.shape[1], -1)
    parts = parts.transpose(_order(product))
    return parts.reshape(product.group, -1, parts.shape[-1])


def weight_of(matrix: Matrix, product: Product, like: Array) -> Array:
    """Undo `matrix_of`, in shape and type of another weight."""
    groups, _, outputs = matrix.shape
    parts = (matrix / product.scale).reshape(groups, -1, math.prod(like.shape[2:]), outputs)
    plain = parts.transpose(np.argsort(_order(product)))
    return np.ascontiguousarray(plain.reshape(like.shape)).astype(like.dtype)


def _order(product: Product) -> tuple[int, int, int, int]:
    """Axes of (groups, axis 0, axis 1, taps) of a weight as groups, inputs, taps and outputs."""
    return (0, 1, 3, 2) if product.inputs == 0 else (0, 2, 3, 1)

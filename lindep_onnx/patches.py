"""A product as one matrix: the patches of its input (im2col), and its weight in the order of these.

A product of G groups multiplies patches p (K = channels of one group x kernel taps; the zeros of a padding are data) by
V (K x M). Some rows of patches are enough for least squares and second moments; no tensor is ever unfolded as a
whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lindep_onnx.channels import Product, Window
from lindep_onnx.sampling import rows_at

__all__ = ["as_matrix", "as_weight", "patches_at", "positions", "unknowns"]

Array: TypeAlias = NDArray[Any]
Matrix: TypeAlias = NDArray[np.float64]


def unknowns(product: Product, weight: Array) -> int:
    """K: how many numbers one output of a product is a combination of.

    Args:
        product: the product.
        weight: its weight.
    """
    taps = math.prod(product.window.kernel) if product.window is not None else 1
    inputs = weight.shape[product.inputs]
    if product.window is not None and product.window.transposed:
        inputs //= product.group
    return int(inputs) * taps


def positions(product: Product, shape: Sequence[int]) -> int:
    """How many outputs of one channel a product makes of a sample.

    Args:
        product: the product.
        shape: of its input, samples first.
    """
    if product.window is None:
        return math.prod(shape[1:]) // shape[product.reader.axis]
    return math.prod(_output_size(product.window, axis, size) for axis, size in enumerate(shape[2:]))


def patches_at(data: Array, product: Product, chosen: NDArray[np.int64]) -> Array:
    """(G, samples x rows, K) float32: the patches behind some outputs of each sample.

    Args:
        data: the input of the product, samples first.
        product: the product.
        chosen: (rows,) positions of its output, counted over all axes but samples and channels.
    """
    if product.window is None:
        rows = rows_at(data, product.reader.axis, chosen)
        return np.ascontiguousarray(rows.reshape(1, -1, rows.shape[-1]), dtype=np.float32)
    taps = _taps(product.window, data.shape[2:], chosen)  # (rows, T), the last place is a zero
    count, channels = data.shape[:2]
    flat = np.concatenate([data.reshape(count, channels, -1), np.zeros((count, channels, 1), data.dtype)], axis=2)
    picked = flat[:, :, taps]  # (samples, channels, rows, T)
    grouped = picked.reshape(count, product.group, channels // product.group, *taps.shape)
    ordered = grouped.transpose(1, 0, 3, 2, 4)  # (groups, samples, rows, channels, T)
    return np.ascontiguousarray(ordered.reshape(product.group, count * len(chosen), -1), dtype=np.float32)


def _taps(window: Window, sizes: Sequence[int], chosen: NDArray[np.int64]) -> NDArray[np.int64]:
    """(rows, T) flat input positions that each output position combines; the number of positions means a zero."""
    outputs = [_output_size(window, axis, size) for axis, size in enumerate(sizes)]
    places = np.unravel_index(chosen, outputs)
    flat = np.zeros((len(chosen), 1), dtype=np.int64)
    valid = np.ones((len(chosen), 1), dtype=bool)
    for axis, size in enumerate(sizes):
        offsets = np.arange(window.kernel[axis]) * window.dilations[axis]
        begin, stride = window.pads[axis][0], window.strides[axis]
        if window.transposed:
            spread = places[axis][:, None] + begin - offsets
            at, inside = spread // stride, spread % stride == 0
        else:
            at = places[axis][:, None] * stride - begin + offsets
            inside = np.ones(at.shape, dtype=bool)
        inside = inside & (at >= 0) & (at < size)
        flat = (flat[:, :, None] * size + np.clip(at, 0, size - 1)[:, None, :]).reshape(len(chosen), -1)
        valid = (valid[:, :, None] & inside[:, None, :]).reshape(len(chosen), -1)
    return np.where(valid, flat, math.prod(sizes))


def _output_size(window: Window, axis: int, size: int) -> int:
    reach = (window.kernel[axis] - 1) * window.dilations[axis] + 1
    pads = sum(window.pads[axis])
    if window.transposed:
        return window.strides[axis] * (size - 1) + reach - pads
    return (size + pads - reach) // window.strides[axis] + 1


def as_matrix(weight: Array, product: Product) -> Array:
    """(G, K, M): a weight, or something of its shape, ordered like the patches.

    Args:
        weight: of the shape of the stored weight.
        product: the product; its scale is left out.
    """
    groups = product.group
    if product.window is None:
        return np.moveaxis(weight, (product.inputs, product.outputs), (0, 1))[None]
    taps = math.prod(product.window.kernel)
    parts = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], taps)
    if product.window.transposed:  # (C, M of a group, *kernel)
        return parts.transpose(0, 1, 3, 2).reshape(groups, -1, weight.shape[1])
    return parts.transpose(0, 2, 3, 1).reshape(groups, -1, weight.shape[0] // groups)


def as_weight(matrix: Array, product: Product, shape: Sequence[int]) -> Array:
    """Undo `as_matrix`.

    Args:
        matrix: (G, K, M).
        product: the product.
        shape: of the stored weight.
    """
    if product.window is None:
        plain = np.moveaxis(matrix[0], (0, 1), (product.inputs, product.outputs))
    else:
        parts = matrix.reshape(product.group, -1, math.prod(product.window.kernel), matrix.shape[2])
        plain = parts.transpose((0, 1, 3, 2) if product.window.transposed else (0, 3, 1, 2))
    return np.ascontiguousarray(plain.reshape(tuple(shape)))

"""New weights for the survivors: what the removed channels carried moves onto the ones that stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lindep_onnx.analysis import SiteEvidence, site_weight
from lindep_onnx.channels import Channels, Reader
from lindep_onnx.plan import Fold
from lindep_onnx.rewrite import Reconstruction

__all__ = ["fold_sites"]


def fold_sites(
    channels: Channels,
    folds: Mapping[int, Fold],
    evidence: Sequence[SiteEvidence],
    removed: NDArray[np.bool_],
) -> Reconstruction:
    """Fold the removed features of every site into the kept ones.

    With Z_R ~ Z_K T the weight becomes W_K + W_R T' on the kept features, tap by tap. A site that can absorb a constant
    gets the rest of the mean as a shift of its output: d = W_R (mean_R - T' mean_K), summed over taps.

    Args:
        channels: the traced model.
        folds: by site index.
        evidence: of every site.
        removed: (units,) bool.
    """
    weights: dict[str, NDArray[Any]] = {}
    shifts: dict[Reader, NDArray[np.float64]] = {}
    for number, fold in folds.items():
        kept, matrix = fold.kept, fold.matrix
        seen = evidence[number]
        site = seen.site
        weight = site_weight(channels, seen)  # (F, T, outputs, kernel)
        gone = weight[~kept].copy()
        weight[kept] += np.tensordot(matrix, gone, axes=1)
        weight[~kept] = 0.0
        whole = weights.setdefault(site.weight, channels.resolved.constants[site.weight].copy())
        site.part(whole)[...] = _original_layout(channels, seen, weight)
        if site.affine:
            rest = seen.mean[~kept] - matrix.T @ seen.mean[kept]
            shift = shifts.setdefault(site.readers[0], np.zeros(site.blocks * len(site.rows)))
            shift[site.first_row :][: len(site.rows)] = np.tensordot(rest, gone, axes=1).sum(axis=(0, 2))
    return Reconstruction(removed, weights, shifts)


def _original_layout(channels: Channels, seen: SiteEvidence, weight: NDArray[np.float64]) -> NDArray[np.float64]:
    """Undo `site_weight`."""
    site = seen.site
    shape = site.part(channels.resolved.constants[site.weight]).shape
    kernel = tuple(size for axis, size in enumerate(shape) if axis not in (site.inputs, site.outputs))
    ordered = np.empty((shape[site.inputs], shape[site.outputs], *kernel))
    ordered[seen.index] = weight.reshape(*weight.shape[:3], *kernel)
    return np.moveaxis(ordered, (0, 1), (site.inputs, site.outputs))

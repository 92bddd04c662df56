"""New weights for the survivors: what the removed channels carried moves onto the ones that stay."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lindep_onnx.calibration.statistics import SiteEvidence, site_weight
from lindep_onnx.moves.channels import Fold
from lindep_onnx.structure.rewrite import Reconstruction
from lindep_onnx.structure.types import Channels, Reader

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
    shifts: dict[Reader, NDArray[np.float64]] = {}
    for number, fold in folds.items():
        seen = evidence[number]
        site = seen.site
        if site.affine:
            gone = site_weight(channels, seen)[~fold.kept]
            rest = seen.mean[~fold.kept] - fold.matrix.T @ seen.mean[fold.kept]
            shift = shifts.setdefault(site.readers[0], np.zeros(site.blocks * len(site.rows)))
            shift[site.first_row :][: len(site.rows)] = np.tensordot(rest, gone, axes=1).sum(axis=(0, 2))
    return Reconstruction(removed, _Folded(channels, folds, evidence), shifts)


class _Folded(Mapping[str, NDArray[Any]]):
    """Folded weights by name, each made when it is asked for: all at once would be one more copy of the model."""

    def __init__(self, channels: Channels, folds: Mapping[int, Fold], evidence: Sequence[SiteEvidence]) -> None:
        self._channels, self._folds, self._evidence = channels, folds, evidence
        self._sites: dict[str, list[int]] = {}
        for number in folds:
            self._sites.setdefault(evidence[number].site.weight, []).append(number)

    def __getitem__(self, name: str) -> NDArray[Any]:
        sites = self._sites[name]
        whole = self._channels.resolved.constants[name].copy()
        for number in sites:
            seen, fold = self._evidence[number], self._folds[number]
            weight = site_weight(self._channels, seen)  # (F, T, outputs, kernel)
            weight[fold.kept] += np.tensordot(fold.matrix, weight[~fold.kept], axes=1)
            weight[~fold.kept] = 0.0
            seen.site.part(whole)[...] = _original_layout(self._channels, seen, weight)
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)


def _original_layout(channels: Channels, seen: SiteEvidence, weight: NDArray[np.float64]) -> NDArray[np.float64]:
    """Undo `site_weight`."""
    site = seen.site
    shape = site.part(channels.resolved.constants[site.weight]).shape
    kernel = tuple(size for axis, size in enumerate(shape) if axis not in (site.inputs, site.outputs))
    ordered = np.empty((shape[site.inputs], shape[site.outputs], *kernel))
    ordered[seen.index] = weight.reshape(*weight.shape[:3], *kernel)
    return np.moveaxis(ordered, (0, 1), (site.inputs, site.outputs))

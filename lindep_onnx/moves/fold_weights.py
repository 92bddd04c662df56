"""New weights for the survivors: what the removed channels carried moves onto the ones that stay."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lindep_onnx.structure.layout import ConsumerLayout, consumer_weight
from lindep_onnx.structure.rewrite import Removal
from lindep_onnx.structure.steps import Fold
from lindep_onnx.structure.types import ConsumerNode, Structure


def fold_weights(
    structure: Structure,
    folds: Mapping[int, Fold],
    statistics: Sequence[ConsumerLayout],
    removed: NDArray[np.bool_],
) -> Removal:
    """Fold the removed features of every site into the kept ones.

    With Z_R ~ Z_K T the weight becomes W_K + W_R T' on the kept features, tap by tap. A site that can absorb a constant
    gets the rest of the mean as a shift of its output: d = W_R (mean_R - T' mean_K), summed over taps.

    Args:
        structure: the traced model.
        folds: by site index.
        statistics: of every site.
        removed: (units,) bool.
    """
    shifts: dict[ConsumerNode, NDArray[np.float64]] = {}
    for number, fold in folds.items():
        seen = statistics[number]
        consumer = seen.consumer
        if consumer.affine:
            gone = consumer_weight(structure, seen)[~fold.kept]
            rest = seen.mean[~fold.kept] - fold.matrix.T @ seen.mean[fold.kept]
            shift = shifts.setdefault(consumer.readers[0], np.zeros(consumer.blocks * len(consumer.rows)))
            shift[consumer.first_row :][: len(consumer.rows)] = np.tensordot(rest, gone, axes=1).sum(axis=(0, 2))
    return Removal(removed, _Folded(structure, folds, statistics), shifts)


class _Folded(Mapping[str, NDArray[Any]]):
    """Folded weights by name, each made when it is asked for: all at once would be one more copy of the model."""

    def __init__(self, structure: Structure, folds: Mapping[int, Fold], statistics: Sequence[ConsumerLayout]) -> None:
        self._structure, self._folds, self._statistics = structure, folds, statistics
        self._consumers: dict[str, list[int]] = {}
        for number in folds:
            self._consumers.setdefault(statistics[number].consumer.weight, []).append(number)

    def __getitem__(self, name: str) -> NDArray[Any]:
        consumers = self._consumers[name]
        whole = self._structure.shape_info.constants[name].copy()
        for number in consumers:
            seen, fold = self._statistics[number], self._folds[number]
            weight = consumer_weight(self._structure, seen)  # (F, T, outputs, kernel)
            weight[fold.kept] += np.tensordot(fold.matrix, weight[~fold.kept], axes=1)
            weight[~fold.kept] = 0.0
            seen.consumer.part(whole)[...] = _original_layout(self._structure, seen, weight)
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter(self._consumers)

    def __len__(self) -> int:
        return len(self._consumers)


def _original_layout(structure: Structure, seen: ConsumerLayout, weight: NDArray[np.float64]) -> NDArray[np.float64]:
    """Undo `consumer_weight`."""
    consumer = seen.consumer
    shape = consumer.part(structure.shape_info.constants[consumer.weight]).shape
    kernel = tuple(size for axis, size in enumerate(shape) if axis not in (consumer.inputs, consumer.outputs))
    ordered = np.empty((shape[consumer.inputs], shape[consumer.outputs], *kernel))
    ordered[seen.index] = weight.reshape(*weight.shape[:3], *kernel)
    return np.moveaxis(ordered, (0, 1), (consumer.inputs, consumer.outputs))

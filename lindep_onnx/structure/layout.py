"""How the input axis of a weight is made of features, and what folding has to know about each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lindep_onnx.structure.types import Atoms, Consumer, Structure


@dataclass(frozen=True)
class Features:
    """How the places of a weight's input axis are features and taps.

    Attributes:
        atoms: (F,) atom of each feature.
        index: (F, T) places of each feature. T is 1 but behind a Flatten, where the positions of a channel follow
            each other: they are taps of one feature, so that the Gram matrix stays channels by channels.
    """

    atoms: Atoms
    index: NDArray[np.int64]


def features(columns: Atoms) -> Features:
    """Group the places of an axis by atom; where atoms occur unequally often, every place is its own feature."""
    atoms, inverse, counts = np.unique(columns, return_inverse=True, return_counts=True)
    if (counts != counts[0]).any():
        return Features(columns, np.arange(len(columns))[:, None])
    places = np.argsort(inverse, kind="stable").reshape(len(atoms), int(counts[0]))
    order = np.argsort(places[:, 0])
    return Features(atoms[order], places[order])


@dataclass(frozen=True)
class ConsumerLayout:
    """The features of one consumer.

    Attributes:
        consumer: the consumer.
        index: (F, T) places of each feature on the input axis of the consumer's part of the weight, by tap.
        unit: (F,) unit of each feature, -1 where it stays.
        mean: (F,) what is taken for the value of each where it goes; zero where the consumer cannot absorb a constant.
        constant: (F,) bool, the feature never changes.
    """

    consumer: Consumer
    index: NDArray[np.int64]
    unit: NDArray[np.int64]
    mean: NDArray[np.float64]
    constant: NDArray[np.bool_]


def consumer_weight(structure: Structure, layout: ConsumerLayout) -> NDArray[np.float64]:
    """The weight of a consumer as (features, taps, outputs, kernel) in float64."""
    consumer = layout.consumer
    weight = np.asarray(consumer.part(structure.shape_info.constants[consumer.weight]), dtype=np.float64)
    first = np.moveaxis(weight, (consumer.inputs, consumer.outputs), (0, 1))
    return first.reshape(*first.shape[:2], -1)[layout.index]

"""Statistics of a changed model from those of the model it was made of, without running the data again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeAlias

import numpy as np

from lindep_onnx.calibration.statistics import ConsumerStatistics, Statistics
from lindep_onnx.linalg.linear_map import ChannelMaps, LinearMap, Selection
from lindep_onnx.structure.layout import features
from lindep_onnx.structure.types import Consumer, Structure

#: Tensor, axis, block and, where it is the very consumer, its product.
Key: TypeAlias = tuple[str, int, int, str]


def carried(statistics: Statistics, before: Structure, after: Structure, maps: ChannelMaps) -> Statistics:
    """What the data would say of the changed model if every tensor were its map of the original's.

    A fold or a fit makes up for what a change does to values, not exactly; the difference is what a refit, which runs
    both models, is for.

    Args:
        statistics: of the original.
        before: the original, traced.
        after: the changed model, traced; tensors go by the same names.
        maps: from the tensors of the original to those of the changed model.

    Raises:
        ValueError: a consumer of the changed model reads what no consumer of the original read, or a mixture reaches
            one whose channels have several positions each (behind a Flatten).
    """
    known: dict[Key, ConsumerStatistics] = {}
    for consumer, found in zip(before.consumers, statistics.consumers, strict=True):
        for key in _keys(consumer):
            known.setdefault(key, found)
    consumers = tuple(_carried(known, consumer, after, maps) for consumer in after.consumers)
    constant = np.ones(after.units, dtype=bool)
    inactive, active = np.zeros(after.units, dtype=bool), np.ones(after.units, dtype=bool)
    for own in consumers:
        live = own.unit >= 0
        inactive[own.unit[live & own.constant]] = True
        constant[own.unit[live & ~own.constant]] = False
        active[own.unit[live & ~own.constant & (own.active < statistics.enough)]] = False
    pairs = {
        pair: moments.carried(maps.of(pair.left.tensor, pair.left.axis), maps.of(pair.right.tensor, pair.right.axis))
        for pair, moments in statistics.pairs.items()
    }
    return Statistics(consumers, constant, inactive, active, statistics.samples, statistics.enough, pairs)


def _keys(consumer: Consumer) -> tuple[Key, Key]:
    """What a consumer is found by: what it reads and makes, else what it reads, which is all that statistics are of."""
    reader = consumer.readers[0]
    read = reader.tensor, reader.axis, consumer.block
    return (*read, reader.output), (*read, "")


def _carried(
    known: Mapping[Key, ConsumerStatistics],
    consumer: Consumer,
    after: Structure,
    maps: ChannelMaps,
) -> ConsumerStatistics:
    reader = consumer.readers[0]
    own = next((known[key] for key in _keys(consumer) if key in known), None)
    if own is None:
        raise ValueError(f"nothing is known of what {reader.output} reads")
    layout = features(consumer.columns)
    unit = after.unit[layout.atoms]
    channels = maps.of(reader.tensor, reader.axis)
    if channels is None:
        return replace(own, consumer=consumer, index=layout.index, unit=unit)
    through = _of_features(channels, own, consumer, layout.index[:, 0] + consumer.first_column)
    mean, offset = through.rows(own.mean), through.rows(own.offset)
    selected = through.index if isinstance(through, Selection) else None
    return replace(
        own,
        consumer=consumer,
        index=layout.index,
        unit=unit,
        mean=mean,
        gram=through.moments(own.gram),
        holdout=None if own.holdout is None else through.moments(own.holdout),
        offset=offset,
        # A mixture of channels has no rest of its own: it counts as one that moves in every sample.
        constant=np.zeros(len(unit), dtype=bool) if selected is None else own.constant[selected],
        active=np.full(len(unit), own.active.max(initial=0)) if selected is None else own.active[selected],
    )


def _of_features(
    channels: LinearMap, own: ConsumerStatistics, consumer: Consumer, places: np.ndarray[tuple[int], np.dtype[np.int64]]
) -> LinearMap:
    """The map from the features of the original's consumer to those of the changed one."""
    first = own.consumer.first_column
    feature = {int(place) + first: number for number, place in enumerate(own.index[:, 0])}
    if isinstance(channels, Selection):
        return Selection(np.array([feature[int(channels.index[place])] for place in places], np.int64), len(own.index))
    if own.index.shape[1] > 1 or consumer.blocks > 1:
        raise ValueError(f"channels of {consumer.readers[0].tensor} have several positions each and cannot be mixed")
    order = np.array(sorted(feature, key=lambda place: feature[place]), dtype=np.int64)
    return type(channels)(channels.matrix[np.ix_(places, order)])

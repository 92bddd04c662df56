"""What a result costs each group, measured where its weights are read."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lindep_onnx.data.samples import Samples
from lindep_onnx.data.split import Part
from lindep_onnx.model.ir import Model
from lindep_onnx.model.shapes import resolve
from lindep_onnx.runtime.backend import Runtime
from lindep_onnx.runtime.rows import ChannelAxis, RowSampler
from lindep_onnx.structure.placement import Placement
from lindep_onnx.structure.types import ConsumerNode, Structure

#: Positions of one sample, and samples, that are compared.
POSITIONS, SAMPLES = 64, 12


def measure_groups(
    structure: Structure, removed: NDArray[np.bool_], smaller: Model, samples: Samples, runtime: Runtime, *, seed: int
) -> dict[int, float]:
    """RMS error of what the readers of each changed group compute, relative to its centred RMS, worst reader.

    Both models, the `smaller` one without what is `removed` (units,), run on VERIFY samples, which nothing was fitted
    to, so that errors from further up are included. They are compared at positions drawn by the `seed`.
    """
    wanted: dict[int, list[ChannelAxis]] = {}
    for number, group in enumerate(structure.groups):
        if removed[group.units].any():
            readers = (reader for index in group.consumers for reader in structure.consumers[index].readers)
            wanted[number] = [_place(structure, reader) for reader in readers]
    places = (place for places in wanted.values() for place in places)
    most = {place: POSITIONS for place in places if place.tensor in smaller.producer}
    if not most or not len(samples.parts[Part.VERIFY]):
        return {}
    before = RowSampler(structure.model, structure.shape_info, most, runtime)
    after = RowSampler(smaller, resolve(smaller), most, runtime)
    sums = {place: [0, 0.0, 0.0, 0.0] for place in most}
    placement = Placement(structure, removed)
    kept = {place: placement.chosen_along(place.tensor, place.axis) for place in most}

    for batch in samples.batches(Part.VERIFY, limit=SAMPLES):
        drawn = seed, int(batch.samples[0])
        original, result = (sampler.run(batch, np.random.default_rng(drawn)).rows for sampler in (before, after))
        for place in most:
            _add(sums[place], original[place].values, result[place].values, kept[place])
    errors = {}
    for place, (count, total, square, difference) in sums.items():
        spread = square - total * total / max(1, count)
        errors[place] = float(np.sqrt(difference / max(spread, 1e-30))) if difference else 0.0
    by_group = {number: [errors[place] for place in places if place in errors] for number, places in wanted.items()}
    return {number: max(own) for number, own in by_group.items() if own}


def _place(structure: Structure, reader: ConsumerNode) -> ChannelAxis:
    """Behind the bias: what a refit shifts there is no error."""
    adds = None if reader.bias is None else reader.bias.node
    last = reader.output if adds is None or adds == reader.node else structure.model.nodes[adds].outputs[0]
    return ChannelAxis(last, reader.output_axis)


def _add(sums: list[Any], original: NDArray[Any], result: NDArray[Any], kept: NDArray[np.int64] | None) -> None:
    y = original.astype(np.float64)
    if kept is not None:
        y = y[:, :, kept]
    if y.shape != result.shape:
        return
    sums[0] += y.size
    sums[1] += float(y.sum())
    sums[2] += float(np.square(y).sum())
    sums[3] += float(np.square(result - y).sum())

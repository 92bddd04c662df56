"""What the pictures of a report show: widths of layers, redundancy of groups, what a larger reduction would cost.

Everything is bounded in size: a curve is told by at most `POINTS` of its points, whatever the model's width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from lindep_onnx.calibration.statistics import Statistics
from lindep_onnx.model.cost import output_channels
from lindep_onnx.moves.prices import curves
from lindep_onnx.planning.values import FrontierPoint
from lindep_onnx.report.values import Layer, NextStep, Spectrum
from lindep_onnx.structure.types import Structure

#: Points that a curve is told by.
POINTS = 40
#: Share of the original that a further reduction takes.
NEXT = 0.1
#: Groups with more units, or consumers with more features, are not drawn: both curves take cubic time.
MAX_UNITS = 1024
#: Smaller singular values are rounding: they are square roots of eigenvalues in float64.
ROUNDING = 1e-8


def layers(structure: Structure, removed: NDArray[np.bool_]) -> Iterator[Layer]:
    """The weighted layers, in the order of the model, without what is `removed`, (units,) bool."""
    atoms = {producer.node: producer.atoms for producer in structure.producers}
    for number, node in enumerate(structure.model.nodes):
        width = output_channels(node, structure.shape_info.weight_shape)
        if not width:
            continue
        kept = int(structure.mask(atoms[number], removed).sum()) if number in atoms else width
        shapes = {name: structure.shape_info.weight_shape(name) for name in (node.input(1), node.input(0))}
        weight, shape = next((name, shape) for name, shape in shapes.items() if shape is not None)
        yield Layer(
            name=node.name,
            op=node.op,
            channels_before=width,
            channels_after=kept,
            parameters_before=math.prod(shape),
            parameters_after=structure.kept_elements(weight, removed),
        )


def next_step(points: Sequence[FrontierPoint], parameters: float, latency: float | None = None) -> NextStep | None:
    """What the next 10 % would cost: of the latency where the frontier has it, else of the parameters.

    Args:
        points: the frontier.
        parameters: share of the original's that the result has.
        latency: the same of the latency; None if it was not measured.

    Returns:
        Errors between the points of the frontier; None where it ends before, or has no expected errors.
    """
    if any(point.expected is None for point in points):
        return None
    by_time = latency is not None and all(point.latency is not None for point in points)
    left = latency if by_time and latency is not None else parameters
    shares = [(point.latency if by_time else point.parameters) or 0.0 for point in points]
    known = sorted({1.0: 0.0, **dict(zip(shares, (point.expected or 0.0 for point in points), strict=True))}.items())
    if not points or left - NEXT < known[0][0]:
        return None
    at, costs = np.array(known).T
    now, then = (float(np.interp(share, at, costs)) for share in (left, left - NEXT))
    return NextStep("latency" if by_time else "parameters", left, left - NEXT, now, then)


def spectra(structure: Structure, statistics: Statistics, widest: int = MAX_UNITS) -> dict[int, Spectrum]:
    """The redundancy of every group with no more than `widest` units, and features at each consumer."""
    narrow = [
        number
        for number, group in enumerate(structure.groups)
        if max(len(group.units), *(len(statistics.consumers[index].unit) for index in group.consumers)) <= widest
    ]
    alike = np.ones(structure.units)
    # The errors are of the rows that were fitted: no unseen ones are needed to choose a ridge.
    fitted = replace(statistics, consumers=tuple(replace(seen, holdout=None) for seen in statistics.consumers))
    found = {}
    for curve in curves(structure, fitted, np.ones(len(structure.consumers)).tolist(), alike, narrow):
        group = structure.groups[curve.site]
        consumer = max((statistics.consumers[index] for index in group.consumers), key=lambda seen: len(seen.unit))
        values = _singular_values(consumer.gram - np.outer(consumer.offset, consumer.offset))
        ranks, places = _spread(len(values)), _spread(len(curve.steps))
        errors = np.sqrt(curve.cost / len(group.consumers))
        found[curve.site] = Spectrum(
            rank=int((values > 0).sum()),
            ranks=tuple((ranks + 1).tolist()),
            singular_values=tuple(_rounded(values[ranks])),
            removed=tuple((places + 1).tolist()),
            errors=tuple(_rounded(errors[places])),
        )
    return found


def _singular_values(gram: NDArray[np.float64]) -> NDArray[np.float64]:
    """(F,) of the rows whose second moments these are, as shares of the largest."""
    values = np.sqrt(np.maximum(np.linalg.eigvalsh(gram)[::-1], 0.0))
    shares = values / values[0] if values[0] > 0 else values
    return np.where(shares > ROUNDING, shares, 0.0)


def _spread(count: int) -> NDArray[np.int64]:
    """Places of at most `POINTS` of so many points, both ends among them."""
    return np.unique(np.linspace(0, max(0, count - 1), min(count, POINTS)).round().astype(np.int64))


def _rounded(values: NDArray[np.float64]) -> Iterator[float]:
    """Three digits are as many as a picture shows."""
    return (float(f"{value:.3g}") for value in values)

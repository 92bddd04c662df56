"""What the pictures of a report show: widths of layers, redundancy of groups, what a larger reduction would cost.

Everything is bounded in size: a curve is told by at most `POINTS` of its points, whatever the model's width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lindep_onnx.calibration.statistics import Evidence
from lindep_onnx.model.cost import output_channels
from lindep_onnx.planning.path import curves
from lindep_onnx.structure.types import Channels

__all__ = ["FrontierPoint", "Layer", "Redundancy", "kept_parameters", "layers", "redundancy"]

#: Points that a curve is told by.
POINTS = 40
#: Groups with more units, or sites with more features, are not drawn: both curves take cubic time.
MOST_UNITS = 1024
#: Smaller singular values are rounding: they are square roots of eigenvalues in float64.
ROUNDING = 1e-8


@dataclass(frozen=True)
class Layer:
    """One Conv, ConvTranspose, Gemm or MatMul with a constant weight.

    Attributes:
        name: of its node.
        op: its operator.
        channels_before: its output channels in the original.
        channels_after: its output channels in the result.
        parameters_before: elements of its weight in the original; a shared weight counts at each reader.
        parameters_after: elements of its weight in the result.
    """

    name: str
    op: str
    channels_before: int
    channels_after: int
    parameters_before: int
    parameters_after: int


@dataclass(frozen=True)
class Redundancy:
    """How redundant the channels of one group are on the data.

    Attributes:
        rank: singular values that are no rounding.
        ranks: places of the singular values that are listed, from 1 on.
        singular_values: of the group's centred input rows at the site with most features, largest first, as shares of
            the largest.
        removed: numbers of channels removed, ascending.
        errors: RMS over the group's sites of the relative error once so many channels are gone, cheapest first, and the
            others are refitted; on the rows that were fitted.
    """

    rank: int
    ranks: tuple[int, ...]
    singular_values: tuple[float, ...]
    removed: tuple[int, ...]
    errors: tuple[float, ...]


@dataclass(frozen=True)
class FrontierPoint:
    """What one plan on the ladder gives without a refit.

    Attributes:
        parameters: share of the original's parameters that is left.
        relative_error: worst output error, as `lindep_onnx.verify` defines it, on samples that choose between plans.
        agreement: share of them with the same arg-max; None if no output has one.
        channels: how many went.
        expected: root of the squared relative error of the outputs, averaged over them, that the plan was priced at.
    """

    parameters: float
    relative_error: float
    agreement: float | None
    channels: int = 0
    expected: float | None = None


def layers(channels: Channels, removed: NDArray[np.bool_]) -> Iterator[Layer]:
    """The weighted layers, in the order of the model.

    Args:
        channels: the traced model.
        removed: (units,) bool.
    """
    atoms = {producer.node: producer.atoms for producer in channels.producers}
    for number, node in enumerate(channels.model.nodes):
        width = output_channels(node, channels.resolved)
        if not width:
            continue
        kept = int(channels.mask(atoms[number], removed).sum()) if number in atoms else width
        weight = next(name for name in (node.input(1), node.input(0)) if name in channels.resolved.constants)
        yield Layer(
            name=node.name,
            op=node.op,
            channels_before=width,
            channels_after=kept,
            parameters_before=channels.resolved.constants[weight].size,
            parameters_after=_kept_elements(channels, weight, removed),
        )


def kept_parameters(channels: Channels, removed: NDArray[np.bool_]) -> int:
    """Parameters of the model without some units; biases that folds add are not counted.

    Args:
        channels: the traced model.
        removed: (units,) bool.
    """
    sizes = {name: value.size for name, value in channels.model.stored.items() if value.dtype.kind in "fV"}
    return sum(_kept_elements(channels, name, removed) for name, size in sizes.items() if size > 1)


def _kept_elements(channels: Channels, name: str, removed: NDArray[np.bool_]) -> int:
    elements = channels.resolved.constants[name].size
    readers = channels.reads.get(name, {})
    axes: Mapping[int, NDArray[np.int64]] = next(iter(readers.values()), {})
    return round(elements * math.prod(float(channels.mask(atoms, removed).mean()) for atoms in axes.values()))


def redundancy(channels: Channels, evidence: Evidence) -> dict[int, Redundancy]:
    """The redundancy of every group that is not too wide.

    Args:
        channels: the traced model.
        evidence: what the data says.
    """
    narrow = [
        number
        for number, group in enumerate(channels.groups)
        if max(len(group.units), *(len(evidence.sites[index].unit) for index in group.sites)) <= MOST_UNITS
    ]
    alike = np.ones(channels.units)
    # The errors are of the rows that were fitted: no unseen ones are needed to choose a ridge.
    fitted = replace(evidence, sites=tuple(replace(seen, holdout=None) for seen in evidence.sites))
    found = {}
    for curve in curves(channels, fitted, np.ones(len(channels.sites)).tolist(), alike, narrow):
        group = channels.groups[curve.group]
        site = max((evidence.sites[index] for index in group.sites), key=lambda seen: len(seen.unit))
        values = _singular_values(site.gram - np.outer(site.offset, site.offset))
        ranks, places = _spread(len(values)), _spread(len(curve.units))
        errors = np.sqrt(curve.cost / len(group.sites))
        found[curve.group] = Redundancy(
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

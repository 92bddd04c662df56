"""Removing channels: the kind of change that all others are measured against.

A site is a group of units that meet at common consumers, a step is one unit. A removed channel is made up for by
folding its weight into those that stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lindep_onnx.calibration.pairs import Pair
from lindep_onnx.calibration.statistics import Statistics
from lindep_onnx.errors import UsageError
from lindep_onnx.linalg.elimination import Allowance
from lindep_onnx.model.edit import GraphEdits
from lindep_onnx.moves.base import Exactness, Site, Steps
from lindep_onnx.moves.fold_weights import fold_weights
from lindep_onnx.moves.lossless import lossless_steps
from lindep_onnx.moves.prices import curves, folds_of, savings
from lindep_onnx.runtime.targets import WidthRule
from lindep_onnx.structure.layout import ConsumerLayout
from lindep_onnx.structure.placement import Placement, equalized
from lindep_onnx.structure.rewrite import removal_edits
from lindep_onnx.structure.steps import ChannelSteps, Curve, Saving
from lindep_onnx.structure.types import FROZEN, Refusal, Structure
from lindep_onnx.structure.widths import blocks, whole_widths


class ChannelRemoval:
    """Removes units; see `lindep_onnx.moves.base.Move` for what each method is for."""

    name = "channels"

    def count(self, structure: Structure) -> int:
        """The units."""
        return structure.units

    def sites(self, structure: Structure) -> tuple[Site, ...]:
        """The groups."""
        return tuple(Site(group.name, group.units) for group in structure.groups)

    def refusals(self, structure: Structure) -> tuple[Refusal, ...]:
        """Channels that meet something that cannot shrink."""
        return structure.refusals

    def pairs(self, structure: Structure) -> tuple[Pair, ...]:
        """None: the Gram matrices of the consumers say all."""
        return ()

    def savings(self, structure: Structure, saving: Saving) -> NDArray[np.float64]:
        """All other units kept."""
        return savings(structure, saving)

    def price(
        self, structure: Structure, statistics: Statistics, sensitivity: Sequence[float], saving: NDArray[np.float64]
    ) -> list[Curve]:
        """By elimination."""
        return curves(structure, statistics, sensitivity, saving)

    def possible(self, structure: Structure, order: NDArray[np.int64]) -> NDArray[np.bool_]:
        """No axis is emptied."""
        allowance = Allowance(structure.units, structure.minimums)
        return np.array([allowance.take(unit) for unit in order.tolist()], dtype=bool)

    def admissible(
        self, structure: Structure, taken: NDArray[np.bool_], order: NDArray[np.int64], rule: WidthRule
    ) -> NDArray[np.bool_]:
        """Widths are whole, and equal counts go from every group of a convolution and from every head."""
        while True:
            found = equalized(structure, whole_widths(structure, taken, order, rule), order)
            if (found == taken).all():
                return found
            taken, order = found, order[found[order]]

    def blocks(self, structure: Structure, order: NDArray[np.int64], rule: WidthRule) -> list[NDArray[np.int64]]:
        """See `lindep_onnx.structure.widths`."""
        return blocks(structure, order, rule)

    def exact(self, structure: Structure, statistics: Statistics, bounds: Exactness) -> ChannelSteps:
        """Constants, multiples and combinations."""
        return lossless_steps(structure, statistics, bounds)

    def unfitted(self, structure: Structure, taken: NDArray[np.bool_]) -> ChannelSteps:
        """Without folds."""
        return ChannelSteps.of(taken)

    def fit(self, structure: Structure, steps: Steps, statistics: Statistics) -> ChannelSteps:
        """With the fold of every consumer that loses something."""
        own = _own(steps)
        return ChannelSteps(own.removed, own.kind, folds_of(structure, statistics, own.removed, own.folds))

    def apply(self, structure: Structure, steps: Steps, statistics: Statistics | None) -> GraphEdits:
        """Fold, then slice."""
        return channel_edits(structure, _own(steps), () if statistics is None else statistics.consumers)

    def maps(self, structure: Structure, steps: Steps) -> Placement:
        """What is left is a selection of what was there."""
        return Placement(structure, _own(steps).removed)

    def refound(self, before: Structure, taken: NDArray[np.bool_], after: Structure) -> NDArray[np.bool_]:
        """By the names of tensors with as many channels as before."""
        found = np.zeros(after.units, dtype=bool)
        gone = np.append(taken, False)  # the last entry answers for FROZEN
        for tensor, labels in after.labels.items():
            known = {label.cut: label.along_cut() for label in before.labels.get(tensor, ())}
            for label in labels:
                atoms, old = label.along_cut(), known.get(label.cut, np.empty(0, np.int64))
                if len(atoms) == len(old):
                    units = after.unit[atoms[gone[before.unit[old]]]]
                    found[units[units != FROZEN]] = True
        order = np.flatnonzero(found)
        found[order[~self.possible(after, order)]] = False
        return equalized(after, found)

    def to_names(self, structure: Structure, steps: Steps) -> dict[str, Any]:
        """Numbers of the channels that go, and how many channels there were, by tensor."""
        removed = _own(steps).removed
        found: dict[str, list[int]] = {}
        counts: dict[str, int] = {}
        for name, units in _channels_by_tensor(structure).items():
            gone = [number for number, unit in enumerate(units.tolist()) if unit != FROZEN and removed[unit]]
            if gone:
                found[name], counts[name] = gone, len(units)
        return {"removed": found, "channels": counts}

    def from_names(self, structure: Structure, names: Mapping[str, Any]) -> NDArray[np.bool_]:
        """See `to_names`; counts may be missing."""
        return _named_units(structure, names["removed"], names.get("channels", {}))


def _own(steps: Steps) -> ChannelSteps:
    assert isinstance(steps, ChannelSteps)
    return steps


def channel_edits(structure: Structure, steps: ChannelSteps, consumers: Sequence[ConsumerLayout]) -> GraphEdits:
    """What carrying out steps with their folds changes in the graph.

    Args:
        structure: the traced model.
        steps: what goes.
        consumers: statistics of all consumers, for the means; not asked for where there are no folds.
    """
    return removal_edits(structure, fold_weights(structure, steps.folds, consumers, steps.removed))


def _channels_by_tensor(structure: Structure) -> dict[str, NDArray[np.int64]]:
    """Unit of each channel of the tensors that name units: of each unit, the first tensor that has it."""
    found: dict[str, NDArray[np.int64]] = {}
    known = np.zeros(structure.units + 1, dtype=bool)
    known[FROZEN] = True
    for tensor, labels in structure.labels.items():
        for label in labels:
            units = structure.unit[label.along_cut()]
            new = ~known[units]
            if new.any():
                name = tensor if tensor not in found else f"{tensor} (axis {label.cut})"
                found[name] = np.where(new, units, FROZEN)
                known[units] = True
    return found


def _named_units(
    structure: Structure, named: Mapping[str, Sequence[int]], counts: Mapping[str, int]
) -> NDArray[np.bool_]:
    places = _channels_by_tensor(structure)
    removed = np.zeros(structure.units, dtype=bool)
    for name, numbers in named.items():
        units = places.get(name)
        if units is None:
            raise UsageError(f"The plan does not fit: the model has no tensor {name[:80]!r} with channels that may go.")
        count = counts.get(name, len(units))
        if count != len(units):
            raise UsageError(
                f"The plan does not fit: {name[:80]!r} has {len(units)} channels, and {count} in the plan."
            )
        for number in numbers:
            if number >= len(units) or units[number] == FROZEN:
                raise UsageError(
                    f"The plan does not fit: channel {number} of {name[:80]!r} has to stay, or is not there."
                )
            removed[units[number]] = True
    for members, least in structure.minimums:
        if int((~removed[members]).sum()) < least:
            owner = next(name for name, units in places.items() if np.isin(units, members).any())
            raise UsageError(
                f"The plan cannot be carried out: at least {least} channel(s) like those of {owner[:80]!r} stay."
            )
    missing = removed & ~equalized(structure, removed)
    if missing.any():
        owner = next(name for name, units in places.items() if np.isin(units, np.flatnonzero(missing)).any())
        raise UsageError(
            f"The plan cannot be carried out: {owner[:80]!r} is in groups or heads, which all lose as many channels; "
            f"{int(missing.sum())} of the plan's have no counterpart."
        )
    return removed

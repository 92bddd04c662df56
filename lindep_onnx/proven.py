"""Channels that the weights alone prove redundant, for every input: constants and multiples of others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lindep_onnx.analysis import SiteEvidence
from lindep_onnx.calibration import features
from lindep_onnx.channels import FROZEN, Channels, Site
from lindep_onnx.dependence import COLLINEAR_KIND, CONSTANT
from lindep_onnx.ops.facts import Facts, Known, output_facts
from lindep_onnx.placement import balanced
from lindep_onnx.plan import Fold, Plan

__all__ = ["Proof", "prove"]


@dataclass(frozen=True)
class Proof:
    """What follows from the weights.

    Attributes:
        plan: removes every unit that is proven redundant.
        constant: (units,) bool, units that are constant at every site, whatever the input.
        evidence: what folding needs to know of each site.
    """

    plan: Plan
    constant: NDArray[np.bool_]
    evidence: tuple[SiteEvidence, ...]


def prove(channels: Channels) -> Proof:
    """Propagate bounds and identities through the graph, and see what they mean at the sites.

    Args:
        channels: the traced model.
    """
    known = Known(channels.resolved.constants, channels.resolved.shapes, facts := {})
    for node in channels.model.nodes:
        if node.outputs and node.outputs[0] and node.outputs[0] not in channels.resolved.constants:
            found = output_facts(node, known)
            if found is not None:
                facts[node.outputs[0]] = found
    seen = [_site(channels, site, known) for site in channels.sites]
    evidence = tuple(entry[0] for entry in seen)
    constant = np.ones(channels.units, dtype=bool)
    for site_evidence, _, _ in seen:
        # A constant other than zero can only go where the output can take it up.
        gone = site_evidence.constant & (site_evidence.site.affine | (site_evidence.mean == 0))
        live = site_evidence.unit != FROZEN
        constant[site_evidence.unit[live & ~gone]] = False
    kind = np.zeros(channels.units, dtype=np.int8)
    bounds = _Bounds(channels)
    partner = np.full(channels.units, -1)
    for unit in np.flatnonzero(constant)[::-1].tolist():
        if bounds.take(unit):
            kind[unit] = CONSTANT
    for unit, other in _multiples(channels, seen, kind):
        if bounds.take(unit):
            kind[unit], partner[unit] = COLLINEAR_KIND, other
    kind[~balanced(channels, kind > 0)] = 0
    return Proof(Plan(kind > 0, kind, _folds(seen, kind, partner)), constant, evidence)


def _site(channels: Channels, site: Site, known: Known) -> tuple[SiteEvidence, list[bytes], NDArray[np.float64]]:
    """The site's features as evidence, with their keys and scales."""
    layout = features(site.columns)
    index = layout.index + site.first_column
    size = len(index)
    first = index[:, 0]
    found: list[Facts | None] = [known.of(reader.tensor, reader.axis) for reader in site.readers]
    facts = found[0] if len(site.readers) == 1 else None
    low, high, scale = np.full(size, -np.inf), np.full(size, np.inf), np.ones(size)
    keys = [b"" for _ in range(size)]
    if facts is not None:
        every = facts.low[index], facts.high[index]
        low, high, scale = every[0].min(axis=1), every[1].max(axis=1), facts.scale[first]
        ratios = facts.scale[index] / np.where(scale > 0, scale, 1.0)[:, None]
        same = (np.abs(ratios - 1) < 1e-9).all(axis=1) | (scale == 0)
        # Behind a Flatten a channel is known by all of its positions.
        keys = [b"".join(facts.key[place] for place in row) if ok else b"" for row, ok in zip(index, same, strict=True)]
    constant = np.isfinite(low) & (low == high)
    mean = np.where(constant, low, 0.0) if site.affine else np.zeros(size)
    if not site.affine:
        constant = constant & (low == 0)
    empty = np.zeros((0, 0))
    seen = SiteEvidence(
        site=site, index=layout.index, unit=channels.unit[layout.atoms], mean=mean, gram=empty, holdout=None,
        offset=np.zeros(size), constant=constant, active=np.zeros(size, dtype=np.int64), joint=False,
    )  # fmt: skip
    return seen, keys, scale


class _Bounds:
    """How many units of each set (`Channels.least`) may still go."""

    def __init__(self, channels: Channels) -> None:
        self._left = [len(members) - bound for members, bound in channels.least]
        self._sets: dict[int, list[int]] = {}
        for number, (members, _) in enumerate(channels.least):
            for unit in members.tolist():
                self._sets.setdefault(unit, []).append(number)

    def take(self, unit: int) -> bool:
        """Whether a unit may go without emptying an axis; counts it if so."""
        own = self._sets.get(unit, ())
        if any(self._left[number] <= 0 for number in own):
            return False
        for number in own:
            self._left[number] -= 1
        return True


def _multiples(
    channels: Channels,
    seen: list[tuple[SiteEvidence, list[bytes], NDArray[np.float64]]],
    kind: NDArray[np.int8],
) -> list[tuple[int, int]]:
    """(unit, the unit it is a multiple of) at every site it is read at."""
    found = []
    for group in channels.groups:
        signature: dict[int, list[object]] = {int(unit): [] for unit in group.units if not kind[unit]}
        for index in group.sites:
            evidence, keys, scale = seen[index]
            for feature, unit in enumerate(evidence.unit.tolist()):
                if unit in signature:
                    usable = bool(keys[feature]) and scale[feature] > 0
                    signature[unit].append((index, keys[feature] if usable else unit))
        first: dict[tuple[object, ...], int] = {}
        for unit in sorted(signature):
            other = first.setdefault(tuple(signature[unit]), unit)
            if other != unit and signature[unit]:
                found.append((unit, other))
    return found[::-1]


def _folds(
    seen: list[tuple[SiteEvidence, list[bytes], NDArray[np.float64]]],
    kind: NDArray[np.int8],
    partner: NDArray[np.int64],
) -> dict[int, Fold]:
    folds = {}
    for index, (evidence, _, scale) in enumerate(seen):
        gone = np.append(kind > 0, False)[evidence.unit]
        if not gone.any():
            continue
        places = {int(unit): np.flatnonzero(evidence.unit == unit) for unit in np.unique(evidence.unit) if unit >= 0}
        full = np.zeros((len(gone), len(gone)))
        for unit, own in places.items():
            if kind[unit] == COLLINEAR_KIND:
                others = places[int(partner[unit])]
                full[others, own] = scale[own] / scale[others]
        folds[index] = Fold(~gone, full[np.ix_(~gone, gone)])
    return folds

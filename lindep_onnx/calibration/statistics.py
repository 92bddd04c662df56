"""From moments to linear algebra: the problem that every site poses, and the units that may be asked to go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lindep_onnx.calibration.measure import Calibration, Tap, features, tap
from lindep_onnx.calibration.moments import Moments
from lindep_onnx.linalg.elimination import SiteProblem
from lindep_onnx.structure.types import FROZEN, Channels, Site

__all__ = [
    "CONSTANT_TOLERANCE",
    "JOINT_ROWS",
    "Evidence",
    "SiteEvidence",
    "constant_features",
    "evidence",
    "outer_product",
    "problem",
]

#: What differs by less than this share of its size is constant: it is rounding.
CONSTANT_TOLERANCE = 1e-6
#: Samples in which a feature must leave its rest before anything but silence is concluded from it; half, of fewer.
LEAST_ACTIVE_SAMPLES = 8
#: Rows for each feature, at most 16 counted per sample, that a dependence on several others needs.
JOINT_ROWS = 3.0


@dataclass(frozen=True)
class SiteEvidence:
    """What is known about the input of one site.

    Attributes:
        site: the site.
        index: (F, T) places of each feature on the input axis of the site's part of the weight, by tap.
        unit: (F,) unit of each feature, -1 where it stays.
        mean: (F,) mean over the fit rows; zero where the site cannot absorb a constant.
        gram: (F, F) second moments per row about `mean`, fit samples.
        holdout: the same over unseen samples, about the same `mean`; None if there are none.
        offset: (F,) mean over the fit rows, less `mean`.
        constant: (F,) bool, the feature never changes.
        active: (F,) number of fit samples in which the feature leaves its rest (`Moments.moving`).
        joint: whether there are rows enough for dependence on several others.
        rows: number of rows that were fitted to.
        effective_rows: the same, but at most 16 for each sample.
    """

    site: Site
    index: NDArray[np.int64]
    unit: NDArray[np.int64]
    mean: NDArray[np.float64]
    gram: NDArray[np.float64]
    holdout: NDArray[np.float64] | None
    offset: NDArray[np.float64]
    constant: NDArray[np.bool_]
    active: NDArray[np.int64]
    joint: bool
    rows: int = 0
    effective_rows: float = 0.0


@dataclass(frozen=True)
class Evidence:
    """What the data says about a model.

    Attributes:
        sites: in the order of `Channels.sites`.
        constant: (units,) bool, constant at every site.
        silent: (units,) bool, constant at some site: only a margin tells whether it will stay so.
        active: (units,) bool, seen often enough to conclude something from its values.
        samples: number of fit and unseen samples.
    """

    sites: tuple[SiteEvidence, ...]
    constant: NDArray[np.bool_]
    silent: NDArray[np.bool_]
    active: NDArray[np.bool_]
    samples: int


def evidence(channels: Channels, calibration: Calibration) -> Evidence:
    """Put the moments of all readers of each site together."""
    sites = tuple(_site_evidence(channels, site, calibration) for site in channels.sites)
    constant = np.ones(channels.units, dtype=bool)
    silent = np.zeros(channels.units, dtype=bool)
    active = np.ones(channels.units, dtype=bool)
    enough = min(LEAST_ACTIVE_SAMPLES, max(1, calibration.samples[0] // 2))
    for site in sites:
        live = site.unit != FROZEN
        silent[site.unit[live & site.constant]] = True
        constant[site.unit[live & ~site.constant]] = False
        active[site.unit[live & ~site.constant & (site.active < enough)]] = False
    return Evidence(sites, constant, silent, active, sum(calibration.samples))


class Extremes(Protocol):
    """Moments, or what still grows to be moments."""

    @property
    def low(self) -> NDArray[np.float64]:
        """(F,) smallest value."""

    @property
    def high(self) -> NDArray[np.float64]:
        """(F,) largest value."""


def constant_features(site: Site, *parts: Mapping[Tap, Extremes]) -> NDArray[np.bool_]:
    """(F,) bool, features of a site that never changed; more data can only make them fewer.

    Args:
        site: the site.
        parts: extremes by tap, of some samples and of others.
    """
    seen = [part[tap(site, reader)] for part in parts for reader in site.readers if tap(site, reader) in part]
    low = np.min([own.low for own in seen], axis=0)
    high = np.max([own.high for own in seen], axis=0)
    return np.asarray(high - low <= CONSTANT_TOLERANCE * np.maximum(np.abs(low), np.abs(high)))


def _site_evidence(channels: Channels, site: Site, calibration: Calibration) -> SiteEvidence:
    layout = features(site.columns)
    fit = _merged([calibration.fit[tap(site, reader)] for reader in site.readers])
    unseen = None
    if calibration.select is not None:
        unseen = _merged([calibration.select[tap(site, reader)] for reader in site.readers])
    constant = constant_features(site, calibration.fit, calibration.select or {})
    mean = fit.mean if site.affine else np.zeros(len(constant))
    gram = fit.about(mean)
    holdout = None if unseen is None else unseen.about(mean)
    if site.affine:
        # Rounding left over from the subtraction must not look like a signal.
        for matrix in (gram, holdout):
            if matrix is not None:
                matrix[constant] = 0.0
                matrix[:, constant] = 0.0
    return SiteEvidence(
        site=site,
        index=layout.index,
        unit=channels.unit[layout.atoms],
        mean=mean,
        gram=gram,
        holdout=holdout,
        offset=fit.mean - mean,
        constant=constant,
        active=fit.moving,
        joint=fit.effective_rows >= JOINT_ROWS * len(constant),
        rows=fit.rows,
        effective_rows=fit.effective_rows,
    )


def _merged(parts: Sequence[Moments]) -> Moments:
    total = parts[0]
    for part in parts[1:]:
        total = total.merge(part)
    return total


def site_weight(channels: Channels, seen: SiteEvidence) -> NDArray[np.float64]:
    """The weight of a site as (features, taps, outputs, kernel) in float64."""
    weight = np.asarray(seen.site.part(channels.resolved.constants[seen.site.weight]), dtype=np.float64)
    first = np.moveaxis(weight, (seen.site.inputs, seen.site.outputs), (0, 1))
    return first.reshape(*first.shape[:2], -1)[seen.index]


def outer_product(channels: Channels, seen: SiteEvidence, removed: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(F, F) sum of w w' over the taps and the outputs that survive `removed`."""
    own = seen.site.part(channels.resolved.constants[seen.site.weight])
    weight = np.moveaxis(own, (seen.site.inputs, seen.site.outputs), (0, 1))
    rows = channels.mask(seen.site.rows, removed)
    total = np.zeros((len(seen.index), len(seen.index)))
    for places in seen.index.T:  # tap by tap: the whole of a large weight in float64 is not needed
        tap = weight[places].compress(rows, axis=1).reshape(len(places), -1).astype(np.float64)
        total += tap @ tap.T
    return total


def problem(channels: Channels, seen: SiteEvidence, removed: NDArray[np.bool_]) -> SiteProblem:
    """The least-squares problem of a site, without the outputs that are gone.

    A feature that nothing multiplies counts as zero: what it does makes no difference.
    """
    outer = outer_product(channels, seen, removed)
    unread = np.diagonal(outer) == 0.0
    # The centred second moment is G - o o', so that the matrix need not be kept.
    energy = float(np.vdot(seen.gram, outer) - seen.offset @ outer @ seen.offset)
    return SiteProblem(
        gram=_without(unread, seen.gram),
        holdout=None if seen.holdout is None else _without(unread, seen.holdout),
        outer=outer,
        unit=seen.unit,
        energy=energy if energy > 0 else 1.0,
        joint=seen.joint,
    )


def _without(unread: NDArray[np.bool_], moments: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(unread[:, None] | unread, 0.0, moments) if unread.any() else moments

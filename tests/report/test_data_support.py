"""The statistics of the report: right where an independent formula says so, and followed by what they promise."""

from __future__ import annotations

import re

import numpy as np
import pytest
import scipy.stats
from build import build

import lindep_onnx
from lindep_onnx.report.data_support import never_seen_bound
from lindep_onnx.report.values import Report


def net(bias: float = 0.0):
    rng = np.random.default_rng(0)
    w, b = rng.normal(size=(6, 40)).astype(np.float32), np.zeros(40, np.float32)
    b[3] = bias
    return build("h = Gemm(x, w, b)\nr = Relu(h)\ny = Gemm(r, v)", {"w": w, "b": b, "v": (40, 5)}, x=("N", 6))


def report(count: int, bias: float = 0.0, **options: object) -> Report:
    x = np.random.default_rng(count).normal(size=(count, 6)).astype(np.float32)
    return lindep_onnx.compress(net(bias), {"x": x}, **options).report


@pytest.mark.parametrize("samples", [1, 10, 59, 300, 10_000])
def test_the_bound_is_that_of_clopper_and_pearson(samples: int) -> None:
    assert never_seen_bound(samples) == pytest.approx(scipy.stats.beta.ppf(0.95, 1, samples), rel=1e-9)
    assert never_seen_bound(samples) <= 3 / samples and never_seen_bound(0) == 1.0


def test_silent_channels_are_counted_with_their_bound() -> None:
    found = report(300, bias=-100.0)
    (group,) = found.groups
    assert group.support is not None and (group.support.silent, group.observed) == (1, 1)
    assert group.support.silent_bound == never_seen_bound(group.support.samples)
    assert group.support.samples == 300 - found.verification.samples
    assert any("never changed" in note and "95 % confidence" in note for note in found.notes)
    assert not any("never changed" in note for note in report(300).notes)


def test_rows_are_counted_as_they_are() -> None:
    (group,) = report(300).groups
    assert group.support is not None and group.support.features == 40
    assert 150 < group.support.rows < 250 and group.support.effective_rows == group.support.rows  # one row a sample


def test_with_the_samples_that_are_asked_for_there_are_enough() -> None:
    first = report(60)
    note = next(note for note in first.notes if "Too little data" in note)
    wanted = int(re.search(r"about ([\d,]+) samples", note)[1].replace(",", ""))
    assert first.groups[0].support.samples_needed is not None and wanted > 60
    assert not any("Too little data" in note for note in report(int(1.15 * wanted)).notes)
    assert any("Too little data" in note for note in report(int(0.85 * wanted)).notes)


def test_folds_err_less_where_they_were_fitted() -> None:
    (group,) = report(90, params=0.5, refit="fold").groups
    assert group.support.heldout_error > group.support.fit_error > 0

"""Planted dependence end to end: exactly what was planted goes, and nothing goes a second time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from bench_trust import planted_in
from build import run
from free_widths import compress
from planted_net import images, net, widths

SAMPLES = 64


def test_exactly_the_planted_channels_of_a_small_net_go_and_a_second_run_finds_nothing() -> None:
    model, calib = net(planted=True), images(SAMPLES, 1)
    smaller = compress(model, calib).model
    assert widths(smaller) == (10 - 3, 12 - 4)
    fresh = images(50, 2)
    (y,), (other,) = run(model, fresh), run(smaller, fresh)
    assert np.abs(y - other).max() < 1e-5 * np.abs(y - y.mean(0)).max()
    assert widths(compress(smaller, calib).model) == widths(smaller)


def test_nothing_goes_from_a_small_net_without_dependence() -> None:
    model = net(planted=False)
    assert widths(compress(model, images(SAMPLES, 1)).model) == widths(model)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["squeezenet", "inception_v1"])
def test_the_planted_channels_of_a_real_topology_go_and_nothing_else(name: str, tmp_path: Path) -> None:
    found = planted_in(name, tmp_path, samples=SAMPLES)
    assert found.recall >= 0.99
    assert found.error <= max(1e-5, 2 * found.rounding)
    assert (found.extra, found.plain, found.again) == (0, 0, 0)

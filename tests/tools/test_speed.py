"""Costs are measured beside a plain pass, on nets that hold what they say."""

from __future__ import annotations

from pathlib import Path

import bench_speed
import numpy as np
import onnx
import pytest
from build import traced

import lindep_onnx


def test_the_command_is_measured_beside_a_plain_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_speed, "REPEAT", 1)
    onnx.save(bench_speed.plain_net(2, 8), tmp_path / "net.onnx")
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(64, 3, 16, 16)).astype(np.float32))
    found = bench_speed.costs(tmp_path / "net.onnx", tmp_path / "x.npy", tmp_path)
    assert 0 < found.plain[0] < found.command[0] and found.command[2] > 20
    assert found.stages["calibrate"] > 0 and found.stages["verify"] > 0
    cells = found.cells()
    assert float(cells["whole"]) > 1 and float(cells["over plain"]) > 0


def test_built_nets_hold_the_copies_they_say() -> None:
    x = {"x": np.random.default_rng(0).normal(size=(100, 3, 16, 16)).astype(np.float32)}
    sizes = lindep_onnx.compress(bench_speed.plain_net(2, 16), x, benchmark=0.01, round_to=1).report
    assert sizes.before.channels - sizes.after.channels == 4
    assert len(traced(bench_speed.dense_net(6, 4, 3)).producers) == 7


def test_half_of_a_wide_consumer_goes() -> None:
    problem = bench_speed.wide_consumer(64, 10)
    limits = bench_speed.Limits(removals=32)
    assert len(bench_speed.eliminate([problem], np.ones(64, dtype=bool), limits=limits).order) == 32

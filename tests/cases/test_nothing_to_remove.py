"""A model that nothing can be removed from is done with when that is known: no data is needed for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from build import build, run

import lindep_onnx
from lindep_onnx import cli, pipeline
from lindep_onnx.calibration import collect
from lindep_onnx.distill import rounds
from lindep_onnx.errors import BudgetError
from lindep_onnx.planning import judge, pricing, strategies
from lindep_onnx.proofs import prove
from lindep_onnx.runtime.timing import Stopwatch

X = np.random.default_rng(1).normal(size=(80, 8)).astype(np.float32)
#: What takes long, by where it is called.
LONG = [
    (pipeline, "collect_statistics"), (pipeline, "collect_pairs"), (pipeline, "compare_variants"),
    (pipeline, "measure_groups"), (pipeline, "contract_in_rounds"), (strategies, "frontier"),
    (strategies, "by_latency"), (Stopwatch, "compare"), (Stopwatch, "glance"),
    (prove, "output_bounds"), (judge.Judge, "layer_times"), (rounds, "distill"), (collect, "statistics"),
    (pricing, "consumer_sensitivity"),
]  # fmt: skip


def net(mixes: bool) -> onnx.ModelProto:
    """Two products, and where it `mixes` a normalization of all channels between them."""
    between = "LayerNormalization<axis=-1>(h, g)" if mixes else "Mul(h, g)"
    weights = {"w": (8, 12), "g": np.ones(12, np.float32), "v": (12, 4)}
    return build(f"h = MatMul(x, w)\nn = {between}\ny = MatMul(n, v)", weights, x=("N", 8))


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what takes long, as it is called."""
    found: list[str] = []

    def noticed(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def noting(*given: Any, **named: Any) -> Any:
            found.append(name)
            return original(*given, **named)

        monkeypatch.setattr(owner, name, noting)

    for owner, name in LONG:
        noticed(owner, name)
    return found


BUDGETS: list[dict[str, Any]] = [{"params": 0.8}, {"macs": 0.5}, {"latency": 0.8},
    {"params": 0.5, "rounds": 2, "recover": 3}, {"params": 0.5, "max_error": 0.1}]  # fmt: skip


@pytest.mark.parametrize("budget", BUDGETS, ids=" ".join)
def test_a_budget_on_it_is_refused_without_calibration_prices_or_timings(
    budget: dict[str, Any], called: list[str]
) -> None:
    with pytest.raises(BudgetError) as failure:
        lindep_onnx.compress(net(mixes=True), {"x": X}, **budget)
    assert failure.value.exit_code == 3 and "\n" not in str(failure.value)
    assert "All 16 channels have to stay, 12 of them because an operator mixes" in str(failure.value)
    assert not called


@pytest.mark.parametrize("options", [{}, {"max_error": 0.1}, {"proven_only": True}], ids=str)
def test_without_a_size_it_is_written_as_it_is(options: dict[str, Any], called: list[str]) -> None:
    found = lindep_onnx.compress(net(mixes=True), {"x": X}, **options)
    np.testing.assert_array_equal(run(found.model, {"x": X})[0], run(net(mixes=True), {"x": X})[0])
    assert strategies.UNCHANGED in found.report.notes and found.report.verification is not None
    assert found.report.verification.status == "passed" and found.report.verification.relative_error == 0
    assert not called


def test_the_command_says_so_and_writes_its_report(
    called: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    onnx.save(net(mixes=True), "in.onnx")
    np.savez("data.npz", x=X)
    command = ["in.onnx", "out.onnx", "--calib", "data.npz", "--report", "r.json", "-v"]
    assert cli.main([*command, "--params", "0.8"]) == 3 and not Path("out.onnx").exists()
    assert cli.main(command) == 0 and Path("out.onnx").exists()
    assert cli.main([*command, "--dry-run"]) == 0
    assert "Nothing was removed: all 16 channels have to stay" in capsys.readouterr().out
    assert json.loads(Path("r.json").read_text(encoding="utf-8"))["refusals"] and not called


@pytest.mark.parametrize("budget", BUDGETS[:3], ids=" ".join)
def test_all_of_that_is_done_where_something_can_go(budget: dict[str, Any], called: list[str]) -> None:
    lindep_onnx.compress(net(mixes=False), {"x": X}, force=True, **budget)
    assert {"collect_statistics", "output_bounds", "compare_variants", "measure_groups"} <= set(called)
    assert strategies.UNCHANGED not in lindep_onnx.compress(net(mixes=False), {"x": X}).report.notes

"""What is said of a result: passed only where a limit on quality was judged, never written near chance."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from build import build

import lindep_onnx
from lindep_onnx.cli import main
from lindep_onnx.errors import BudgetError
from lindep_onnx.model.cost import Cost
from lindep_onnx.planning.budgets import Budgets
from lindep_onnx.report.values import Report
from lindep_onnx.verify.metrics import Comparison
from lindep_onnx.verify.verdict import MIN_JUDGED

DEMO = Path(__file__).parents[2] / "models" / "demo.onnx"
CALIB = Path(__file__).parents[2] / "models" / "calib.npz"
COST = Cost(1000, 1000, 1000, 100, {})
COMPARED = Comparison(40, (), 0.05, 0.1, 0.95, (), agreement_output="y", decisions=40)


def budgets(mode: str = "budgeted", **limits: float) -> Budgets:
    return Budgets(limits, COST, mode)


@pytest.fixture(scope="module")
def data() -> Mapping[str, np.ndarray]:
    with np.load(CALIB) as archive:
        return {name: value[:200] for name, value in archive.items()}


# ---- the three states ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "samples", "status"),
    [
        (budgets(params=0.5), 40, "unchecked"),
        (budgets(latency=0.5), 40, "unchecked"),
        (budgets(params=0.5, max_error=0.1), 40, "passed"),
        (budgets(min_agreement=0.9), MIN_JUDGED, "passed"),
        (budgets(min_agreement=0.9), MIN_JUDGED - 1, "unchecked"),
        (budgets(max_error=0.1, params=0.9), 1, "unchecked"),
        (budgets(max_drop=0.01), 1, "passed"),  # the user's metric has samples of its own
        (budgets("lossless"), 40, "passed"),
        (budgets("lossless"), MIN_JUDGED - 1, "unchecked"),
        (budgets("proven"), 40, "passed"),
    ],
)
def test_only_a_limit_on_quality_that_was_judged_passes(asked: Budgets, samples: int, status: str) -> None:
    found = dataclasses.replace(COMPARED, samples=samples)
    verdict = asked.verdict(found, None)
    assert verdict.status == status and bool(verdict.reason) == (status != "passed")
    assert asked.verdict(found, None, random=True).status == "unchecked"
    assert asked.verdict(None, None).status == "unchecked"
    failed = asked.verdict(found, BudgetError("too large"))
    assert (failed.status, failed.reason) == ("failed", "too large")


def test_the_metric_of_the_user_says_nothing_of_stress_data() -> None:
    assert budgets(max_drop=0.01).verdict(COMPARED, None, judged=("max_error", "min_agreement")).status == "unchecked"


def test_it_says_which_limit_to_set_and_how_many_samples_judge() -> None:
    assert "--min-agreement" in budgets(params=0.5).verdict(COMPARED, None).reason
    scoreless = dataclasses.replace(COMPARED, agreement=None)
    assert budgets(params=0.5).verdict(scoreless, None).reason.endswith("set one with --max-error")
    few = dataclasses.replace(COMPARED, samples=1)
    assert (
        budgets(min_agreement=0.9)
        .verdict(few, None)
        .reason.startswith("1 held-out sample cannot judge --min-agreement")
    )


def test_a_missed_agreement_is_counted() -> None:
    message = str(budgets(min_agreement=0.98).failure({"min_agreement": 0.95}, COMPARED))
    assert "keeps the predicted class on 38 of 40 held-out samples" in message


def test_a_lossless_result_has_its_own_bound() -> None:
    chance = dataclasses.replace(
        COMPARED,
        agreement=0.1,
        outputs=(lindep_onnx.verify.metrics.OutputComparison("y", 1.0, 1.0, 1.0, 0, None),),
    )
    assert isinstance(budgets(params=0.5).chance_failure(chance), BudgetError)
    assert budgets("lossless").chance_failure(chance) is None is budgets(params=0.5).chance_failure(None)


# ---- commands -----------------------------------------------------------------------------------------------------


def reported(folder: Path, *options: str) -> tuple[int, Report]:
    """The exit code and the report of a command on the demo, with some of its samples unless random ones are wanted."""
    given = [] if "--random-calib" in options else ["--calib", str(CALIB)]
    given += [] if "--max-samples" in options else ["--max-samples", "200"]
    report = folder / "r.json"
    code = main([str(DEMO), str(folder / "o.onnx"), *given, *options, "--report", str(report), "-q"])
    return code, Report.from_json(report.read_text())


#: Options that leave little of the demo, or little to say about it; none of them limits the quality.
DESTROYING = {
    "params .001": ("--params", ".001"),
    "params .01": ("--params", ".01"),
    "params .05": ("--params", ".05"),
    "macs .1": ("--macs", ".1"),
    "4 samples": ("--max-samples", "4"),
    "4 samples, params .5": ("--max-samples", "4", "--params", ".5"),
    "4 samples, agreement": ("--max-samples", "4", "--min-agreement", ".5"),
    "random": ("--random-calib", "64"),
    "random, params .1": ("--random-calib", "64", "--params", ".1"),
}


@pytest.mark.parametrize("name", DESTROYING)
def test_what_destroys_a_model_never_passes(name: str, tmp_path: Path) -> None:
    code, report = reported(tmp_path, *DESTROYING[name])
    found = report.verification
    assert found is not None and found.status == ("failed" if code == 3 else "unchecked") and code in (0, 3)
    assert (tmp_path / "o.onnx").exists() == (code == 0) == found.passed
    assert code == 3 or (found.agreement is not None and found.agreement >= 0.5)
    assert code == 3 or name not in ("params .001",)


def test_a_result_near_chance_is_written_only_by_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reported(tmp_path, "--params", ".005", "--refit", "fold")[0] == 3
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and not (tmp_path / "o.onnx").exists()
    assert "With --params 0.005 the result keeps the predicted class on" in said and "--min-agreement" in said
    code, report = reported(tmp_path, "--params", ".005", "--refit", "fold", "--force")
    assert code == 3 and (tmp_path / "o.onnx").exists()
    assert report.verification is not None and report.verification.status == "failed"


@pytest.mark.parametrize(
    ("options", "code"),
    [(("--params", ".3"), 3), (("--params", ".8", "--min-agreement", ".9"), 0), ((), 0), (("--max-samples", "20"), 3)],
)
def test_strict_takes_nothing_that_is_unchecked(
    options: tuple[str, ...], code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, report = reported(tmp_path, *options, "--strict", "--refit", "fold")
    assert (found, (tmp_path / "o.onnx").exists()) == (code, code == 0)
    assert report.verification is not None and report.verification.passed
    assert report.verification.status == ("unchecked" if code else "passed")
    if code:
        assert capsys.readouterr().err.startswith("lindep-onnx: --strict: the quality was not checked: ")
        assert reported(tmp_path, *options, "--strict", "--refit", "fold", "--force")[0] == 3
        assert (tmp_path / "o.onnx").exists()


# ---- from Python --------------------------------------------------------------------------------------------------


def test_plans_are_held_to_the_same(data: Mapping[str, np.ndarray]) -> None:
    options: dict[str, Any] = {"params": 0.005, "refit": "fold"}
    with lindep_onnx.calibrate(lindep_onnx.trace(DEMO), data) as seen:
        with pytest.raises(BudgetError, match="close to a random model"):
            lindep_onnx.plan(seen, **options)
        with pytest.raises(BudgetError, match="--strict: the quality was not checked"):
            lindep_onnx.plan(seen, params=0.3, refit="fold", strict=True)
        forced = lindep_onnx.plan(seen, **options, force=True)
    with pytest.raises(BudgetError, match="the result keeps the predicted class on"):
        lindep_onnx.apply(DEMO, forced, data)


def test_strict_is_told_nowhere_so_that_it_changes_no_byte() -> None:
    assert lindep_onnx.Config(params=0.5, strict=True).described() == {"params": 0.5}


def test_a_search_for_quality_ends_at_the_smallest_result_that_is_not_near_chance(
    data: Mapping[str, np.ndarray],
) -> None:
    report = lindep_onnx.compress(DEMO, data, max_error=50.0, refit="fold").report
    assert report.verification.status == "passed" and report.verification.agreement >= 0.5
    assert report.after.parameters < 0.5 * report.before.parameters


def test_recovery_may_bring_a_result_back(data: Mapping[str, np.ndarray]) -> None:
    options: dict[str, Any] = {"params": 0.02, "refit": "fold"}
    with pytest.raises(BudgetError, match="close to a random model"):
        lindep_onnx.compress(DEMO, data, **options)
    found = lindep_onnx.compress(DEMO, data, **options, recover=60).report.verification
    assert found.status == "unchecked" and found.agreement >= 0.5


def test_an_embedding_is_judged_by_its_cosine_unless_an_agreement_is_asked_for() -> None:
    rng = np.random.default_rng(0)
    body = "h = MatMul(x, w)\nr = Relu(h)\nz = MatMul(r, v)\nn = ReduceL2<axes=[1], keepdims=1>(z)\ny = Div(z, n)"
    model = build(body, {"w": (48, 40), "v": (40, 48)}, x=("N", 48))
    x = {"x": rng.normal(size=(200, 48)).astype(np.float32)}
    found = lindep_onnx.compress(model, x, params=0.9).report.verification
    assert found.agreement is None and found.outputs[0].holds == "embedding" and found.outputs[0].mean_cosine > 0.5
    with pytest.raises(BudgetError, match=r"errs by 0.9. of what the direction of output 'y'"):
        lindep_onnx.compress(model, x, params=0.05)
    asked = lindep_onnx.compress(model, x, params=0.9, agreement_output="y").report.verification
    assert asked.agreement is not None and asked.outputs[0].holds == ""

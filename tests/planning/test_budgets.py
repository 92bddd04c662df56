"""Budgets, end to end on small nets: what is promised holds, and looser promises give smaller models."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from build import build, run, traced
from timings import timing

import lindep_onnx
from lindep_onnx.errors import BudgetError, UsageError
from lindep_onnx.moves.kinds import MOVES
from lindep_onnx.moves.prices import savings
from lindep_onnx.planning.path import Path as PlanPath
from lindep_onnx.planning.path import build_path, free_first, lower_hull
from lindep_onnx.runtime.timing import Stopwatch, Timing
from lindep_onnx.structure.rewrite import Removal, rewrite
from lindep_onnx.structure.steps import Curve

MODELS = Path(__file__).parents[2] / "models"
BODY = """
a = Conv<pads=[1,1,1,1]>(x, w0, b0)
r = Relu(a)
c = Conv<pads=[1,1,1,1]>(r, w1, b1)
s = Relu(c)
d = Conv<pads=[1,1,1,1]>(s, w2, b2)
e = Add(d, r)
f = Relu(e)
g = GlobalAveragePool(f)
h = Flatten(g)
y = Gemm(h, w3, b3)
"""
WEIGHTS = {
    "w0": (16, 3, 3, 3), "b0": (16,), "w1": (24, 16, 3, 3), "b1": (24,), "w2": (16, 24, 3, 3), "b2": (16,),
    "w3": (16, 5), "b3": (5,),
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    return build(BODY, WEIGHTS, x=("N", 3, 6, 6))


@pytest.fixture(scope="module")
def data() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    mix = rng.normal(size=(6, 108))  # images on a subspace: neighbouring channels depend on each other
    return {"x": (rng.normal(size=(160, 6)) @ mix).reshape(160, 3, 6, 6).astype(np.float32)}


def parameters(model: onnx.ModelProto) -> int:
    return sum(int(np.prod(tensor.dims)) for tensor in model.graph.initializer)


@pytest.mark.parametrize("kind", ["params", "macs", "size", "channels"])
@pytest.mark.parametrize("share", [0.9, 0.6, 0.35])
def test_a_size_is_never_exceeded_and_nearly_reached(model, data, kind: str, share: float) -> None:
    found = lindep_onnx.compress(model, data, round_to=1, **{kind: share}).report
    attribute = {"params": "parameters", "macs": "macs", "size": "bytes", "channels": "channels"}[kind]
    reached = getattr(found.after, attribute) / getattr(found.before, attribute)
    assert share - 0.12 < reached <= share
    assert found.budget[0].kind == kind and found.budget[0].achieved == pytest.approx(reached)


@pytest.mark.parametrize("refit", ["fold", "sequential"])
def test_a_looser_budget_never_gives_a_larger_model(model, data, refit: str) -> None:
    sizes = [
        parameters(lindep_onnx.compress(model, data, max_error=limit, refit=refit).model)
        for limit in (0.003, 0.05, 0.3)
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < sizes[0] < parameters(model) + 1
    sizes = [parameters(lindep_onnx.compress(model, data, params=p, refit=refit).model) for p in (0.3, 0.6, 0.9)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]


@pytest.mark.parametrize("limit", [0.02, 0.2])
def test_the_error_that_is_allowed_holds_on_samples_nothing_looked_at(model, data, limit: float) -> None:
    found = lindep_onnx.compress(model, data, max_error=limit, round_to=1).report
    assert found.verification.passed and found.verification.relative_error <= limit
    assert found.after.parameters < found.before.parameters


def test_agreement_holds_and_costs_less_than_all(model, data) -> None:
    found = lindep_onnx.compress(model, data, min_agreement=0.9).report
    assert found.verification.agreement >= 0.9
    assert found.after.parameters < found.before.parameters


def test_a_metric_of_the_user_is_held(model, data) -> None:
    wanted = run(model, data)[0].argmax(1)

    def accuracy(session: onnxruntime.InferenceSession) -> float:
        return float((session.run(None, data)[0].argmax(1) == wanted).mean())

    found = lindep_onnx.compress(model, data, eval=accuracy, max_drop=0.05)
    session = onnxruntime.InferenceSession(found.model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert accuracy(session) >= 0.95
    assert found.report.budget[0].kind == "max_drop" and found.report.budget[0].achieved <= 0.05
    assert found.report.after.parameters < found.report.before.parameters


def test_several_budgets_all_hold_or_none_is_written(model, data) -> None:
    found = lindep_onnx.compress(model, data, params=0.8, max_error=0.5).report
    assert found.after.parameters <= 0.8 * found.before.parameters and found.verification.relative_error <= 0.5
    with pytest.raises(BudgetError, match=r"--max-error 1e-06 does not hold .* it is "):
        lindep_onnx.compress(model, data, params=0.3, max_error=1e-6)


def test_a_size_that_cannot_be_reached_is_said_with_what_can(model, data) -> None:
    with pytest.raises(BudgetError, match=r"--params 0.001 cannot be reached: .* 0\.\d+ of the original") as caught:
        lindep_onnx.compress(model, data, params=0.001)
    assert caught.value.exit_code == 3


def test_refits_lose_less_than_the_fold_and_the_fold_less_than_a_cut(model, data) -> None:
    errors = {
        refit: lindep_onnx.compress(model, data, params=0.5, refit=refit).report.verification.relative_error
        for refit in ("fold", "kernel", "sequential")
    }
    assert errors["sequential"] < errors["fold"]
    assert errors["kernel"] < errors["fold"]


def test_two_runs_give_the_same_bytes(model, data) -> None:
    first, second = (lindep_onnx.compress(model, data, params=0.5).model for _ in range(2))
    assert first.SerializeToString(deterministic=True) == second.SerializeToString(deterministic=True)


@pytest.mark.parametrize("multiple", [4, 8])
def test_widths_are_rounded_up(model, data, multiple: int) -> None:
    found = lindep_onnx.compress(model, data, params=0.6, round_to=multiple).report
    assert all(group.channels_after % multiple == 0 for group in found.groups)
    assert found.after.parameters <= 0.6 * found.before.parameters


def test_widths_of_a_lossless_result_are_rounded_without_losing_exactness(data) -> None:
    rng = np.random.default_rng(0)
    w0 = rng.normal(size=(16, 3, 3, 3)).astype(np.float32)
    w0[[3, 7, 12]] = 0  # dead; 13 are left
    weights = {**WEIGHTS, "w0": w0, "b0": np.zeros(16, np.float32)}
    model = build("a = Conv<pads=[1,1,1,1]>(x, w0, b0)\nr = Relu(a)\ny = Conv<pads=[1,1,1,1]>(r, w1, b1)", weights, x=("N", 3, 6, 6))  # fmt: skip
    plain = lindep_onnx.compress(model, data, round_to=1).report
    even = lindep_onnx.compress(model, data, round_to=4).report
    assert [group.channels_after for group in plain.groups] == [13]
    assert [group.channels_after for group in even.groups] == [16]
    two = lindep_onnx.compress(model, data, round_to=2).report
    assert [group.channels_after for group in two.groups] == [14] and two.verification.relative_error < 1e-5


@pytest.mark.parametrize(("after", "removed"), [(0.9, True), (2.0, False)])
def test_automatic_widths_are_never_slower(model, data, monkeypatch, after: float, removed: bool) -> None:
    monkeypatch.setattr(Stopwatch, "compare", lambda *_: timing(after))
    report = lindep_onnx.compress(model, data, max_error=0.5, round_to="auto").report
    assert (report.after.parameters < report.before.parameters) == removed
    assert any(note.startswith("Nothing was removed") for note in report.notes) != removed


# ---- the path -----------------------------------------------------------------------------------------------------


def path_of(structure, curves: list[Curve], free: np.ndarray) -> PlanPath:
    return build_path(structure, MOVES, {"channels": curves}, {"channels": free})


def test_a_stop_holds_all_stops_before_it(model) -> None:
    channels = traced(model)
    rng = np.random.default_rng(0)
    found = [
        Curve(n, units, np.cumsum(rng.random(len(units))), np.cumsum(rng.random(len(units)) + 0.1))
        for n, units in enumerate(group.units[1:] for group in channels.groups)
    ]
    path = path_of(channels, found, np.zeros(channels.units, dtype=bool))
    assert sorted(path.step.tolist()) == sorted(int(u) for group in channels.groups for u in group.units[1:])
    assert (np.diff(path.price) >= 0).all()
    masks = [path.at(count)[0].steps for count in path.stops()]
    assert all((small <= large).all() for small, large in itertools.pairwise(masks))


def test_inside_a_group_the_order_of_the_elimination_is_kept(model) -> None:
    channels = traced(model)
    units = channels.groups[0].units[:0:-1]
    curve = Curve(0, units, np.array([5.0, *np.linspace(6, 7, len(units) - 1)]), np.arange(1.0, len(units) + 1))
    path = path_of(channels, [curve], np.zeros(channels.units, dtype=bool))
    assert path.step.tolist() == units.tolist()


def test_a_way_around_a_block_has_neither_it_nor_what_its_site_offers_behind_it(model) -> None:
    channels = traced(model)
    rng = np.random.default_rng(0)
    found = [
        Curve(n, group.units[1:], np.cumsum(rng.random(len(group.units) - 1)), np.arange(1.0, len(group.units)))
        for n, group in enumerate(channels.groups)
    ]
    free = np.zeros(channels.units, dtype=bool)
    free[found[0].steps[0]] = True
    path = path_of(channels, [free_first(found[0], free), *found[1:]], free)
    block = 5
    other = path.without(block)
    assert all((path.at(count)[0].steps == other.at(count)[0].steps).all() for count in range(block + 1))
    (own,) = (curve.steps for curve in found if path.step[path.ends[block]] in curve.steps)
    gone, whole = (way.at(len(way))[0].steps for way in (other, path))
    assert gone[own].sum() == path.at(block)[0].steps[own].sum() < whole[own].sum()
    rest = np.setdiff1d(np.arange(channels.units), own)
    assert (gone[rest] == whole[rest]).all() and len(other) < len(path)


def test_free_units_go_first(model) -> None:
    channels = traced(model)
    free = np.zeros(channels.units, dtype=bool)
    free[[2, 5]] = True
    group = channels.groups[0]
    curve = Curve(0, group.units, np.arange(1.0, len(group.units) + 1), np.arange(1.0, len(group.units) + 1))
    assert path_of(channels, [curve], free).step[:2].tolist() == [2, 5]


def test_no_stop_empties_an_axis(model) -> None:
    channels = traced(model)
    group = channels.groups[0]
    curve = Curve(0, group.units[1:], np.arange(1.0, len(group.units)), np.arange(1.0, len(group.units)))
    free = np.zeros(channels.units, dtype=bool)
    assert len(path_of(channels, [curve], free)) == len(group.units) - 1
    free[group.units[0]] = True  # what the curve lets stay
    whole = path_of(channels, [curve], free)
    assert whole.step[0] == group.units[0]
    assert whole.step.tolist() == group.units[:-1].tolist()


def test_the_hull_is_the_largest_convex_minorant() -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        saving, cost = np.cumsum(rng.random(12) + 0.05), np.cumsum(rng.random(12) ** 3)
        ends = lower_hull(saving, cost)
        corners_x, corners_y = np.append(0, saving[ends]), np.append(0, cost[ends])
        slopes = np.diff(corners_y) / np.diff(corners_x)
        assert ends[-1] == 11 and (np.diff(slopes) >= 0).all()
        assert (np.interp(saving, corners_x, corners_y) <= cost + 1e-12).all()


def test_savings_are_what_a_unit_takes_along(model) -> None:
    channels = traced(model)
    expected = savings(channels, "parameters")
    for unit in (0, int(channels.units - 1)):
        removed = np.zeros(channels.units, dtype=bool)
        removed[unit] = True
        smaller = rewrite(channels, Removal(removed), "").proto
        assert parameters(model) - parameters(smaller) == expected[unit]
    macs = savings(channels, "macs")
    assert macs[0] > expected[0]  # every weight is used at 36 positions


def test_results_pass_the_full_check(model, data) -> None:
    for options in ({"params": 0.5}, {"max_error": 0.1, "round_to": "auto"}, {"macs": 0.5, "refit": "kernel"}):
        onnx.checker.check_model(lindep_onnx.compress(model, data, **options).model, full_check=True)


def test_what_costs_nothing_is_not_refitted() -> None:
    with np.load(MODELS / "calib.npz") as archive:
        data = {name: value[:200] for name, value in archive.items()}
    # What is constant is all that this budget takes.
    auto, forced = (
        lindep_onnx.compress(MODELS / "demo.onnx", data, params=0.6, refit=refit, round_to=1).report
        for refit in ("auto", "sequential")
    )
    assert auto.after.parameters == forced.after.parameters
    assert auto.verification.relative_error < 1e-5 < forced.verification.relative_error


def test_latencies_are_measured_as_asked(model, data, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def told(stopwatch: Stopwatch, result: object) -> Timing:
        asked.append((stopwatch.seconds, stopwatch.batch, stopwatch.runtime.threads, stopwatch.feeds["x"].shape))
        return timing(0.5)

    monkeypatch.setattr(Stopwatch, "compare", told)
    options = {"params": 0.8, "refit": "fold", "threads": 1}
    report = lindep_onnx.compress(
        model, data, benchmark=2.5, benchmark_batch=300, benchmark_threads=2, **options
    ).report
    lindep_onnx.compress(model, data, **options)
    assert asked == [(2.5, 300, 2, (300, 3, 6, 6)), (None, 1, 1, (1, 3, 6, 6))]
    assert report.before.latency_ms == 2 * report.after.latency_ms
    with pytest.raises(UsageError, match="--benchmark is a number of seconds"):
        lindep_onnx.compress(model, data, benchmark=0.0)


@pytest.mark.parametrize(("slow", "multiple"), [(0, 4), (1, 8), (2, 16)])
def test_a_lossless_result_that_is_slower_takes_wider_steps(slow: int, multiple: int, monkeypatch) -> None:
    weights = {"w": (64, 3, 3, 3), "v": (5, 64, 1, 1)}
    w = np.random.default_rng(0).normal(size=weights["w"]).astype(np.float32)
    w[:27] = 0  # 37 are left
    model = build("a = Conv<pads=[1,1,1,1]>(x, w)\nr = Relu(a)\ny = Conv(r, v)", {**weights, "w": w}, x=("N", 3, 6, 6))
    ratios = iter([1.5 - 0.1 * place for place in range(slow)])
    monkeypatch.setattr(Stopwatch, "compare", lambda *_: timing(next(ratios, 0.9)))
    x = np.random.default_rng(1).normal(size=(60, 3, 6, 6)).astype(np.float32)
    result = lindep_onnx.compress(model, {"x": x}, target="cpu-avx2")
    assert [group.channels_after for group in result.report.groups] == [-(-37 // multiple) * multiple]
    assert any("without them" in note for note in result.report.notes) == bool(slow)
    assert result.plan is not None and f"multiples of {multiple} (conv)" in result.plan.widths


def test_a_size_that_can_only_be_met_slower_is_met(model, data, monkeypatch) -> None:
    monkeypatch.setattr(Stopwatch, "compare", lambda *_: timing(1.3))
    report = lindep_onnx.compress(model, data, params=0.6).report
    assert report.after.parameters <= 0.6 * report.before.parameters
    assert report.latency is not None and report.latency.ratio == 1.3


def test_a_given_width_is_never_widened(model, data, monkeypatch) -> None:
    monkeypatch.setattr(Stopwatch, "compare", lambda *_: timing(1.3))
    one = lindep_onnx.compress(model, data, max_error=0.5, round_to=1)
    monkeypatch.setattr(Stopwatch, "compare", lambda *_: timing(0.7))
    assert one.model.SerializeToString() == lindep_onnx.compress(model, data, max_error=0.5, round_to=1).model.SerializeToString()  # fmt: skip

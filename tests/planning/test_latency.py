"""Latency as a budget: the table of layers, and results held to it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from build import as_array, build
from onnx import TensorProto
from timings import timing

import lindep_onnx
from lindep_onnx.errors import TimingError, UsageError
from lindep_onnx.model import ir as graph
from lindep_onnx.planning import latency as planned
from lindep_onnx.planning.round import Round
from lindep_onnx.runtime import layer_latency as latency
from lindep_onnx.runtime.backend import Runtime
from lindep_onnx.runtime.timing import Stopwatch, Timing

RUNTIME = Runtime(threads=1)
NET = (
    "a = Conv<pads=[1,1,1,1]>(x, w)\nb = Relu(a)\nc = Conv<pads=[1,1,1,1], group=64>(b, k)\nd = Relu(c)\n"
    "e = Conv(d, v)\nf = GlobalAveragePool(e)\ng = Flatten(f)\ny = Gemm<transB=1>(g, u)"
)
WEIGHTS = {"w": (64, 3, 3, 3), "k": (64, 1, 3, 3), "v": (96, 64, 1, 1), "u": (10, 96)}


def net():
    return build(NET, WEIGHTS, x=("N", 3, 24, 24))


def images(count: int = 60) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, 3, 24, 24)).astype(np.float32)


def test_layers_are_found_with_their_widths() -> None:
    found = latency.layers(graph.load(net()), {"x": (1, 3, 24, 24)})
    assert [layer.widths for layer in found] == [(3, 64), (64, 64), (64, 96), (96, 10)]
    assert [layer.depthwise for layer in found] == [False, True, False, False]
    narrow = latency.layers(
        graph.load(build(NET, {**WEIGHTS, "v": (40, 64, 1, 1), "u": (10, 40)})), {"x": (1, 3, 24, 24)}
    )
    assert narrow[2].kind == found[2].kind != latency.layers(graph.load(net()), {"x": (1, 3, 48, 48)})[2].kind


def test_a_table_reads_back_and_interpolates(tmp_path: Path) -> None:
    (layer, *_) = latency.layers(graph.load(net()), {"x": (1, 3, 24, 24)})[2:]
    table = latency.LatencyTable({layer.kind: ((16, 64), (24, 96), np.array([[1.0, 2.0], [4.0, 8.0]]))})
    assert table.predict(layer) == 8.0
    table.save(tmp_path / "t.json")
    again = latency.LatencyTable.load(tmp_path / "t.json")
    (half,) = latency.layers(
        graph.load(build(NET, {**WEIGHTS, "w": (40, 3, 3, 3), "k": (40, 1, 3, 3), "v": (60, 40, 1, 1), "u": (10, 60)})),
        {"x": (1, 3, 24, 24)},
    )[2:3]
    assert again.predict(half) == pytest.approx((1.5 + 6.0) / 2)
    assert again.total([layer, half]) == 8.0 + again.predict(half)


@pytest.mark.parametrize("text", ["", "[]", '{"version": 9}', '{"version": 1, "seconds": {"a": [[1], [1], [[-1]]]}}'])
def test_a_damaged_table_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(UsageError, match="--latency-table"):
        latency.LatencyTable.load(tmp_path / "t.json")


def test_widths_count_in_whole_blocks() -> None:
    first, depthwise, *_ = latency.layers(graph.load(net()), {"x": (1, 3, 24, 24)})
    seconds = {first.kind: ((3,), (8, 32, 64), np.array([[1.0, 4.0, 8.0]]))}
    table = latency.LatencyTable(seconds, lambda layer: 16)
    narrow = [replace(first, widths=(3, width)) for width in (33, 40, 48, 49, 64)]
    assert [table.predict(layer) for layer in narrow] == [6.0, 6.0, 6.0, 8.0, 8.0]
    grouped = replace(first, widths=(36, 40), layout=replace(first.layout, group=4))
    assert grouped.whole(lambda layer: 8) == (64, 64) and depthwise.whole(lambda layer: 48) == (96, 96)
    thin = replace(depthwise, widths=(17, 17))
    assert thin.whole(lambda layer: 8) == (24, 24) and thin.weight_shape == (17, 1, 3, 3)
    assert thin.macs / depthwise.macs == pytest.approx(17 / 64)


def test_layers_of_which_nothing_is_known_are_named_and_count_like_the_others() -> None:
    found = latency.layers(graph.load(net()), {"x": (1, 3, 24, 24)})
    table = latency.LatencyTable({found[0].kind: ((3,), (64,), np.array([[2.0]]))})
    assert table.unknown(found) == tuple(layer.node.name for layer in found[1:])
    assert table.predict(found[1]) is None
    macs = sum(layer.macs for layer in found) / found[0].macs
    assert table.total(found) == pytest.approx(2.0 * macs) and table.total(found[:1]) == 2.0


def test_nodes_that_are_no_layers_are_named() -> None:
    model = graph.load(build("a = MatMul(x, x)\ny = MatMul(a, w)", {"w": (8, 8)}, x=("N", 8, 8)))
    assert latency.untimed(model, {"x": (1, 8, 8)}) == ("MatMul_0",)


def test_the_documented_table_loads(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "latency.md").read_text("utf-8")
    (tmp_path / "t.json").write_text(page.split("```json")[1].split("```")[0])
    body, weights = "a = Conv<pads=[1,1,1,1]>(x, w)\nb = Flatten(a)\ny = Gemm<transB=1>(b, v)", {"w": (16, 8, 3, 3)}
    model = graph.load(build(body, {**weights, "v": (10, 3136)}, x=("N", 8, 14, 14)))
    times, notes = latency.load_times([tmp_path / "t.json"], model, {"x": (1, 8, 14, 14)})
    assert [times.predict(layer) for layer in latency.layers(model, {"x": (1, 8, 14, 14)})] == [3.0e-05, 6e-06]
    assert notes == ()


def test_what_cannot_be_timed_alone_is_said() -> None:
    model, shapes = graph.load(net()), {"x": (1, 3, 24, 24)}
    found = latency.layers(model, shapes)
    assert latency.notes(latency.measure_table(found, 17, RUNTIME), model, shapes) == ()
    (note,) = latency.notes(latency.measure_table(found[1:], 17, RUNTIME), model, shapes)
    assert found[0].node.name in note and found[1].node.name not in note


def test_measured_layers_cost_time_at_every_width() -> None:
    found = latency.layers(graph.load(net()), {"x": (1, 3, 24, 24)})
    table = latency.measure_table(found, 17, RUNTIME)
    assert set(table.seconds) == {layer.kind for layer in found}
    assert all((grid > 0).all() for _, _, grid in table.seconds.values())


def test_a_layer_of_a_kind_is_timed_at_the_widths_of_all() -> None:
    body, weights = "a = Conv(x, w)\nb = Conv(a, v)\ny = Conv(b, u)", {"w": (8, 64, 1, 1), "v": (96, 8, 1, 1)}
    proto = build(body, {**weights, "u": (8, 96, 1, 1)}, x=("N", 64, 24, 24))
    found = latency.layers(graph.load(proto), {"x": (1, 64, 24, 24)})
    ((inputs, outputs, _),) = latency.measure_table(found, 17, RUNTIME, lambda layer: 8).seconds.values()
    assert inputs == outputs == (8, 48, 96)


def test_a_profile_is_a_table_too(tmp_path: Path) -> None:
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file in files:
        file.write_text(RUNTIME.profile(net(), {"x": images(1)}, 2))
    options = {"refit": "fold", "force": True, "benchmark": 0.2}
    for given in (str(files[0]), tuple(map(str, files))):
        report = lindep_onnx.compress(net(), {"x": images()}, latency=0.9, latency_table=given, **options).report
        assert report.options["latency_table"] == given and report.after.macs < report.before.macs
    with pytest.raises(UsageError, match=r"--latency-table.*there\.json"):
        lindep_onnx.compress(net(), {"x": images()}, latency=0.9, latency_table=(str(files[0]), "there.json"))


def test_a_kept_table_makes_the_widths_a_function_of_the_inputs(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    options = {"latency": 0.9, "latency_table": str(path), "refit": "fold", "force": True, "benchmark": 0.2}
    first = lindep_onnx.compress(net(), {"x": images()}, **options).report
    assert path.exists() and json.loads(path.read_text())["version"] == 1
    (budget,) = first.budget
    assert budget.kind == "latency" and budget.achieved is not None
    assert first.after.latency_ms / first.before.latency_ms == pytest.approx(budget.achieved)
    kept = path.read_bytes()
    lindep_onnx.compress(net(), {"x": images()}, **options)
    assert path.read_bytes() == kept


def test_what_cannot_be_reached_is_a_failure() -> None:
    with pytest.raises(lindep_onnx.BudgetError, match=r"--latency.*most is in (Conv|Gemm)\w+ \d+%"):
        lindep_onnx.compress(net(), {"x": images()}, latency=1e-4, refit="fold", benchmark=0.2)


def test_options_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(UsageError, match="--rounds"):
        lindep_onnx.Config(latency=0.5, rounds=2)
    with pytest.raises(UsageError, match="--latency-table"):
        lindep_onnx.Config(latency_table="t.json")


@pytest.mark.parametrize(("share", "timed"), [(0.5, False), (0.9, True)])
def test_time_is_a_price_only_where_the_sizes_alone_are_not_fast_enough(
    share: float, timed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []
    table = latency.measure_table
    monkeypatch.setattr(latency, "measure_table", lambda *a, **k: measured.append(1) or table(*a, **k))
    monkeypatch.setattr(Stopwatch, "compare", lambda *_: timing(share))
    options = {"macs": 0.7, "latency": 0.6, "refit": "fold", "force": True, "benchmark": 0.2}
    report = lindep_onnx.compress(net(), {"x": images()}, **options).report
    assert bool(measured) is timed
    assert {budget.kind: budget.achieved for budget in report.budget}["latency"] == share
    widths = [layer.channels_after for layer in report.layers[:3]]
    assert all(width % 8 == 0 for width in widths) and report.after.macs <= 0.7 * report.before.macs


def test_prices_by_time_are_not_kept_as_prices_by_size(tmp_path: Path) -> None:
    saved, options = tmp_path / "m.npz", {"refit": "fold", "force": True, "benchmark": 0.2}
    lindep_onnx.compress(net(), {"x": images()}, latency=0.9, save_moments=saved, **options)
    first = lindep_onnx.compress(net(), {"x": images()}, macs=0.7, load_moments=saved, **options)
    second = lindep_onnx.compress(net(), {"x": images()}, macs=0.7, **options)
    assert first.model.SerializeToString() == second.model.SerializeToString()


@pytest.mark.timed
def test_half_precision_is_timed_as_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    half = {name: as_array(name, shape).astype(np.float16) for name, shape in WEIGHTS.items()}
    model = build(NET, half, x=("N", 3, 24, 24), kind=TensorProto.FLOAT16)
    compared: list[Stopwatch] = []
    compare = Stopwatch.compare
    monkeypatch.setattr(Stopwatch, "compare", lambda own, model: compared.append(own) or compare(own, model))
    result = lindep_onnx.compress(model, {"x": images()}, benchmark=0.1, benchmark_batch=2)
    assert compared[0].feeds["x"].dtype == np.float16 and compared[0].feeds["x"].shape == (2, 3, 24, 24)
    assert result.report.latency.batch == 2 and result.report.before.latency_ms > 0 and result.report.seconds["latency"]


def test_what_cannot_be_timed_is_noted_and_a_budget_on_it_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def unable(stopwatch: Stopwatch, model: object) -> Timing:
        raise TimingError("The result cannot be timed in a process of its own: it ended with code -9.")

    monkeypatch.setattr(Stopwatch, "compare", unable)
    report = lindep_onnx.compress(net(), {"x": images()}).report
    assert report.latency is None and report.before.latency_ms is None
    assert any("No latency was measured. The result cannot be timed" in note for note in report.notes)
    with pytest.raises(TimingError, match="code -9"):
        lindep_onnx.compress(net(), {"x": images()}, latency=0.9, refit="fold")


@pytest.mark.parametrize("wrong", [0.93, 1.0, 1.07])
@pytest.mark.parametrize("share", [0.8, 0.6, 0.4])
def test_a_latency_is_hit_from_below_whatever_a_glance_says(share: float, wrong: float, monkeypatch) -> None:
    weights = {"w": (64, 3, 3, 3), "v": (96, 64, 3, 3), "u": (10, 96)}
    text = "a = Conv<pads=[1,1,1,1]>(x, w)\nb = Relu(a)\nc = Conv(b, v)\nd = Relu(c)\ne = GlobalAveragePool(d)\nf = Flatten(e)\ny = Gemm<transB=1>(f, u)"  # fmt: skip
    model = build(text, weights, x=("N", 3, 12, 12))
    monkeypatch.setattr(Stopwatch, "glance", lambda own, other: wrong * own.compare(other).ratio)
    x = np.random.default_rng(0).normal(size=(80, 3, 12, 12)).astype(np.float32)
    options = {"refit": "fold", "force": True, "target": "cpu-avx2"}
    report = lindep_onnx.compress(model, {"x": x}, latency=share, **options).report
    assert report.latency is not None and share - 0.1 < report.latency.ratio <= share
    assert all(layer.channels_after % 8 == 0 for layer in report.layers[:2])


def test_what_is_free_and_fast_enough_is_all_that_is_done() -> None:
    w = np.random.default_rng(0).normal(size=(64, 3, 3, 3)).astype(np.float32)
    w[:40] = 0
    body = "a = Conv<pads=[1,1,1,1]>(x, w)\nr = Relu(a)\ny = Conv(r, v)"
    model = build(body, {"w": w, "v": (5, 64, 3, 3)}, x=("N", 3, 12, 12))
    x = np.random.default_rng(0).normal(size=(80, 3, 12, 12)).astype(np.float32)
    report = lindep_onnx.compress(model, {"x": x}, latency=0.5, target="cpu-avx2").report
    assert [group.channels_after for group in report.groups] == [24]
    assert report.verification is not None and report.verification.relative_error < 1e-5


@pytest.mark.parametrize("ways", [1, 3])
def test_a_block_that_is_larger_than_what_is_left_to_go_is_left_out(ways: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planned, "WAYS", ways)
    monkeypatch.setattr(Round, "timed_path", Round.path)  # times of layers are measured, and differ
    body = (
        "a = Conv<pads=[1,1,1,1]>(x, w)\nb = Relu(a)\nc = Conv<pads=[1,1,1,1]>(b, v)\nd = Relu(c)\n"
        "e = Conv<pads=[1,1,1,1]>(d, t)\nf = Relu(e)\ng = GlobalAveragePool(f)\nh = Flatten(g)\ny = Gemm<transB=1>(h, u)"
    )
    rng = np.random.default_rng(0)
    weights = {"v": (64, 16, 7, 7), "t": (64, 64, 1, 1), "u": (10, 64)}
    w = rng.normal(size=(16, 3, 3, 3)).astype(np.float32)
    w[8:] = w[:8] + 0.5 * rng.normal(size=(8, 3, 3, 3))  # at a price, and half of the work behind it
    model = build(body, {"w": w, **weights}, x=("N", 3, 12, 12))
    x = rng.normal(size=(80, 3, 12, 12)).astype(np.float32)
    options = {"refit": "fold", "force": True, "target": "cpu-avx2"}
    found = lindep_onnx.compress(model, {"x": x}, latency=0.8, **options).report.latency
    assert found is not None and (0.7 < found.ratio <= 0.8 if ways > 1 else found.ratio < 0.7)

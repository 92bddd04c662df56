"""Plans: saved, edited, carried out again with the same bytes, or refused in one line."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from build import build

import lindep_onnx
from lindep_onnx import cli
from lindep_onnx.errors import BudgetError, LindepError, UsageError
from lindep_onnx.planning.plan_file import Plan


@functools.cache
def net() -> onnx.ModelProto:
    """Of the 12 channels of the first layer the odd ones up to 9 copy the one before, of the next 7 doubles 6."""
    rng = np.random.default_rng(3)
    w = rng.normal(size=(12, 3, 3, 3)).astype(np.float32)
    w[1:10:2] = w[0:10:2]
    k = rng.normal(size=(10, 12, 1, 1)).astype(np.float32)
    k[7] = 2 * k[6]
    body = "h = Conv<pads=[1,1,1,1]>(x, w, b)\nr = Relu(h)\nl = Conv(r, k)\nt = Relu(l)\nz = Conv(t, v)\ny = GlobalAveragePool(z)"
    return build(body, {"w": w, "b": np.zeros(12, np.float32), "k": k, "v": (5, 10, 1, 1)}, x=("N", 3, 6, 6))


@functools.cache
def data() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(80, 3, 6, 6)).astype(np.float32)


def content(model: onnx.ModelProto) -> bytes:
    return model.SerializeToString(deterministic=True)


@functools.cache
def compressed(**options: Any) -> lindep_onnx.Result:
    return lindep_onnx.compress(net(), data(), **{"round_to": 1, **options})


def edited(plan: Plan, **changes: Any) -> Plan:
    return Plan.from_json(json.dumps({**json.loads(plan.to_json()), **changes}))


RUNS: dict[str, dict[str, Any]] = {
    "lossless": {},
    "lossless with a refit": {"refit": "sequential"},
    "lossless in multiples": {"round_to": 4},
    "proven": {"proven_only": True},
    "size": {"params": 0.6},
    "size in multiples": {"macs": 0.6, "round_to": 4},
    "size by folds": {"channels": 0.9, "refit": "fold"},
    "kernels": {"params": 0.7, "refit": "kernel"},
    "error": {"max_error": 0.3},
    "recovery": {"params": 0.6, "recover": 20},
    "another split": {"params": 0.7, "seed": 5, "holdout": 0.4, "max_samples": 60, "exclude": ("Conv_4",)},
}


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS.keys())
def test_an_unedited_plan_gives_the_same_bytes_again(options: dict[str, Any], tmp_path: Path) -> None:
    first = compressed(**options)
    assert first.plan is not None and len(first.plan)
    first.plan.save(tmp_path / "plan.json")
    again = lindep_onnx.apply(net(), tmp_path / "plan.json", data())
    assert content(again.model) == content(first.model)
    assert again.plan == first.plan and again.report.mode == first.plan.mode
    other = lindep_onnx.apply(net(), edited(first.plan, removed={}), data())  # the negative control
    assert content(other.model) != content(first.model)


def test_a_plan_names_channels_of_tensors_that_are_in_the_model() -> None:
    plan = compressed().plan
    assert plan is not None and plan.mode == "lossless"
    assert set(plan.removed) == {"h", "l"} and plan.channels == {"h": 12, "l": 10}
    assert [number // 2 for number in plan.removed["h"]] == [0, 1, 2, 3, 4] and plan.removed["l"] in ([6], [7])


@pytest.mark.parametrize("options", [{}, {"params": 0.5}, {"proven_only": True}], ids=["lossless", "size", "proven"])
def test_channels_that_are_taken_off_the_list_stay(options: dict[str, Any]) -> None:
    first = compressed(**options)
    assert first.plan is not None
    result = lindep_onnx.apply(net(), edited(first.plan, removed={"h": first.plan.removed["h"][1:]}), data())
    kept = {group.name: group.channels_after for group in result.report.groups}
    assert kept == {"Conv_0": 13 - len(first.plan.removed["h"]), "Conv_2": 10}
    assert result.report.verification is not None and result.report.verification.passed
    if not options.get("params"):
        assert result.report.verification.relative_error < 1e-4


def test_what_goes_is_up_to_the_person_but_not_what_passes() -> None:
    plan = compressed().plan
    assert plan is not None
    more = {**plan.removed, "l": [2, *plan.removed["l"]]}
    with pytest.raises(UsageError, match=r"removes 1 channel\(s\) that are no combination of others on this data"):
        lindep_onnx.apply(net(), edited(plan, removed=more), data())
    result = lindep_onnx.apply(net(), edited(plan, removed=more, mode="budgeted", refit="sequential"), data())
    assert {group.name: group.removed for group in result.report.groups} == {"Conv_0": 5, "Conv_2": 2}
    with pytest.raises(BudgetError, match="--max-error"):
        lindep_onnx.apply(net(), edited(plan, removed=more, mode="budgeted"), data(), max_error=1e-6)


def test_a_size_is_asked_for_again_only_if_it_is_said_again() -> None:
    plan = compressed(params=0.6).plan
    assert plan is not None
    fewer = edited(plan, removed={"h": plan.removed["h"][:1]})
    report = lindep_onnx.apply(net(), fewer, data()).report
    assert report.budget[0].achieved is not None and report.budget[0].achieved > 0.6
    with pytest.raises(BudgetError, match=r"--params 0\.6 cannot be reached"):
        lindep_onnx.apply(net(), fewer, data(), params=0.6)


def test_what_is_given_now_goes_before_the_options_of_the_plan() -> None:
    plan = compressed(params=0.6).plan
    assert plan is not None
    trained = lindep_onnx.apply(net(), plan, data(), recover=20)
    assert content(trained.model) == content(compressed(params=0.6, recover=20).model)
    folded = lindep_onnx.apply(net(), plan, data(), refit="fold")
    assert content(folded.model) == content(compressed(params=0.6, refit="fold").model)
    with pytest.raises(UsageError, match="Unknown option 'magic'"):
        lindep_onnx.apply(net(), plan, data(), magic=1)


def test_a_plan_for_other_weights_is_carried_out_with_a_note() -> None:
    plan = compressed(params=0.6).plan
    other = onnx.ModelProto()
    other.CopyFrom(net())
    other.graph.initializer[2].CopyFrom(onnx.numpy_helper.from_array(np.ones((10, 12, 1, 1), np.float32), "k"))
    assert plan is not None
    notes = lindep_onnx.apply(other, plan, data()).report.notes
    assert any("other weights" in note for note in notes)
    assert not any("other weights" in note for note in lindep_onnx.apply(net(), plan, data()).report.notes)


MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "another tensor": ({"removed": {"nothing": [0]}}, "the model has no tensor 'nothing'"),
    "too many channels": ({"channels": {"h": 64}}, "'h' has 12 channels, and 64 in the plan"),
    "no such channel": ({"removed": {"h": [12]}}, "channel 12 of 'h' has to stay, or is not there"),
    "all channels": ({"removed": {"h": list(range(12))}}, "at least 1 channel.*'h'"),
    "another format": ({"lindep_onnx_plan": 3}, 'lacks "lindep_onnx_plan": 1'),
    "no list": ({"removed": {"h": 3}}, "'h' is no list of different channel numbers"),
    "twice": ({"removed": {"h": [3, 3]}}, "no list of different"),
    "below zero": ({"removed": {"h": [-1]}}, "no list of different"),
    "a truth": ({"removed": {"h": [True]}}, "no list of different"),
    "another mode": ({"mode": "magic"}, '"mode" is one of proven, lossless, budgeted'),
    "an unknown option": ({"options": {"magic": 1}}, "its options are no options"),
    "an option of another type": ({"options": {"seed": 1.5}}, "its options are no options"),
    "an option out of range": ({"options": {"params": 3}}, "--params is a share"),
    "rounds": ({"options": {"params": 0.5, "rounds": 3}}, "A plan is one cut"),
}


@pytest.mark.parametrize(("changes", "match"), MISFITS.values(), ids=MISFITS.keys())
def test_a_plan_that_does_not_fit_is_refused_in_one_line(changes: dict[str, Any], match: str, tmp_path: Path) -> None:
    plan = compressed(params=0.6).plan
    assert plan is not None
    (tmp_path / "plan.json").write_text(json.dumps({**json.loads(plan.to_json()), **changes}))
    with pytest.raises(UsageError, match=match) as caught:
        lindep_onnx.apply(net(), tmp_path / "plan.json", data())
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "null",
        "[" * 100_000,
        '{"lindep_onnx_plan": 1}',
        "9" * 5000,
        "\ud800",
        '{"lindep_onnx_plan": NaN}',
    ],
)
def test_what_is_no_plan_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(UsageError, match=r"plan\.json"):
        Plan.load(tmp_path / "plan.json")
    with pytest.raises(UsageError, match="no plan can be read there"):
        Plan.load(tmp_path / "missing.json")


def test_changed_bytes_never_escape_as_another_error() -> None:
    plan = compressed(params=0.6).plan
    assert plan is not None
    rng = np.random.default_rng(0)
    whole = dataclasses.replace(plan, options={"params": 0.6, "proven_only": False, "include": ["*"]}).to_json()
    for _ in range(2000):
        broken = bytearray(whole.encode())
        for place in rng.integers(0, len(broken), rng.integers(1, 4)):
            broken[place] = rng.integers(32, 127)
        try:
            found = Plan.from_json(broken.decode())
            lindep_onnx.planning.plan_file.options_of(found, {})
        except LindepError as error:
            assert len(str(error).splitlines()) == 1


def test_groups_of_a_convolution_lose_as_many_channels_each() -> None:
    body = "h = Conv(x, w)\nr = Relu(h)\ng = Conv<group=2>(r, k)\nt = Relu(g)\ny = Conv(t, v)"
    model = build(body, {"w": (8, 3, 1, 1), "k": (8, 4, 1, 1), "v": (4, 8, 1, 1)}, x=("N", 3, 6, 6))
    plan = lindep_onnx.compress(model, data(), params=0.7).plan
    assert plan is not None and plan.removed
    name = next(iter(plan.removed))
    low = [number for number in range(8) if number < 4][:1]
    with pytest.raises(UsageError, match="all lose as many channels"):
        lindep_onnx.apply(model, edited(plan, removed={name: low}), data())


# ---- stages -------------------------------------------------------------------------------------------------------


def test_stages_alone_come_to_the_same_as_compress() -> None:
    traced = lindep_onnx.trace(net(), exclude=("Conv_9",))
    with lindep_onnx.calibrate(traced, data(), seed=1, round_to=1) as seen:
        plans = [lindep_onnx.plan(seen, params=share) for share in (0.8, 0.5)]
        nothing = lindep_onnx.plan(seen)
    assert len(nothing) == 6 and 0 < len(plans[0]) < len(plans[1])
    expected = compressed(params=0.5, seed=1, exclude=("Conv_9",))
    assert plans[1] == expected.plan
    assert content(lindep_onnx.apply(net(), plans[1], data()).model) == content(expected.model)


def test_an_option_that_an_earlier_stage_used_is_refused_later() -> None:
    traced = lindep_onnx.trace(net())
    with pytest.raises(UsageError, match="exclude comes too late here: give it to trace"):
        lindep_onnx.calibrate(traced, data(), exclude=("x",))
    with lindep_onnx.calibrate(traced, data()) as seen, pytest.raises(UsageError, match="seed comes too late"):
        lindep_onnx.plan(seen, seed=3)
    with lindep_onnx.calibrate(traced, data()) as seen, pytest.raises(UsageError, match="rounds"):
        lindep_onnx.plan(seen, params=0.5, rounds=2)


def test_the_command_line_saves_and_repeats_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(net(), tmp_path / "m.onnx")
    np.save(tmp_path / "x.npy", data())
    paths = {name: str(tmp_path / name) for name in ("m.onnx", "x.npy", "a.onnx", "b.onnx", "p.json")}
    plan = [paths["m.onnx"], "--calib", paths["x.npy"], "-q"]
    assert cli.main([*plan, paths["a.onnx"], "--params", "0.6", "--save-plan", paths["p.json"]]) == 0
    assert cli.main([*plan, paths["b.onnx"], "--plan", paths["p.json"]]) == 0
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert cli.main([*plan, paths["b.onnx"], "--plan", paths["m.onnx"]]) == 2
    assert cli.main([*plan, paths["b.onnx"], "--params", "0.6", "--rounds", "2", "--save-plan", paths["p.json"]]) == 2
    assert "a plan is one cut" in capsys.readouterr().err

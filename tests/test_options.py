"""Options: what is declared about them holds in Python, on the command line and in plans."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import pytest

import lindep_onnx
from lindep_onnx import cli, commands
from lindep_onnx.errors import UsageError
from lindep_onnx.options import GROUPS, Config, DataOptions, ImageOptions, TraceOptions, declared, flag
from lindep_onnx.planning.plan_file import Plan, options_of


def test_every_option_is_in_one_group_and_is_a_flag() -> None:
    names = [name for group in GROUPS for name in declared(group)]
    assert len(set(names)) == len(names) and set(names) == declared(Config).keys()
    text = cli.parser().format_help()
    assert all(flag(name) in text for name in names)
    assert all(f"`{flag(name)}" in commands.reference() for name in names)


def test_a_config_is_every_group_and_stays_a_value() -> None:
    config = Config(params=0.5, seed=3, exclude=("a",))
    assert all(isinstance(config, group) for group in GROUPS)
    assert config == Config(exclude=("a",), seed=3, params=0.5) != Config(params=0.5)
    assert dataclasses.replace(config, seed=0) == Config(params=0.5, exclude=("a",))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 4  # type: ignore[misc]


def test_what_is_told_of_a_run_is_what_differs_from_the_defaults() -> None:
    config = Config(params=0.5, input_range={"x": (0.0, 1.0)}, save_moments="m", recover=20, augment=len)
    told = {"params": 0.5, "recover": 20, "augment": "len", "input_range": {"x": (0.0, 1.0)}}
    assert config.described() == told and Config().described() == {}
    json.dumps(config.described())


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "a share": ({"params": 0}, "--params is a share to keep, above 0 and at most 1 .0.5 for half., not 0."),
    "no number": ({"max_error": float("nan")}, "--max-error must be at least 0, not nan"),
    "a word": ({"layout": "nhcw"}, "--layout is nchw or nhwc, not 'nhcw'"),
    "a color": ({"color": "red"}, "--color is rgb, bgr or gray, not 'red'"),
    "a refit": ({"refit": "best"}, "--refit is one of auto, fold, kernel, sequential, not 'best'"),
    "three sides": ({"image_size": (8, 8, 3)}, r"--image-size is one number, or HxW, not \(8, 8, 3\)"),
    "no side": ({"image_size": (8, 0)}, "--image-size must be at least 1"),
    "division by 0": ({"scale": 0}, "--scale divides, and must be above 0, not 0"),
    "one of several": ({"std": (1.0, 0.0, 1.0)}, "--std divides, and must be above 0"),
    "too many": ({"random_calib": 10**6}, "--random-calib must be at most 100,000"),
    "no multiple": ({"round_to": 0}, "--round-to must be at least 1"),
    "an augmentation": ({"params": 0.5, "recover": 9, "augment": "x"}, "--augment is mix or FILE.py:FUNC, not 'x'"),
    "no effort": (
        {"params": 0.5, "recover": "long"},
        "--recover is a number of steps .300. or minutes .5min., not 'long'",
    ),
    "a range": ({"input_range": {"x": (1.0, 0.0)}}, "--input-range of 'x' goes from LO up to HI, not 1.0:0.0"),
}


@pytest.mark.parametrize(("options", "match"), BAD.values(), ids=BAD.keys())
def test_a_value_without_a_meaning_is_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        Config(**options)


def test_a_group_alone_knows_its_bounds() -> None:
    assert DataOptions(seed=2).holdout == 0.3 and not DataOptions(seed=2).asked_for
    assert ImageOptions(image_size=8).sides == (8, 8) and ImageOptions(mean=0.5).asked_for
    with pytest.raises(UsageError, match="--seed must be at least 0, not -1"):
        DataOptions(seed=-1)


def plan(**options: Any) -> Plan:
    return Plan.from_json(json.dumps({**json.loads(Plan({}).to_json()), "options": options}))


def test_a_plan_brings_its_options_but_for_those_of_the_run_that_made_it() -> None:
    made = Config(params=0.5, mean=(0.1, 0.2), image_size=(4, 8), round_to="auto", input_range={"x": (0, 1.5)},
                  recover="5min", include=("a*",), proven_only=False, force=True, eval=len, max_drop=1)  # fmt: skip
    found = options_of(plan(**made.described()), {"seed": 1})
    assert found == dataclasses.replace(made, force=False, eval=None, max_drop=None, seed=1)


@pytest.mark.parametrize(
    "options",
    [{"params": "0.5"}, {"seed": True}, {"seed": 1.0}, {"proven_only": 1}, {"include": "a"}, {"include": [1]}, {"mean": ["a"]},
     {"input_range": {"x": 1}}, {"input_range": [0, 1]}, {"holdout": None}, {"save_moments": "m"}, {"nonsense": 1},
     {"image_size": {"x": [1, 2]}}, {"threads": "2"}],
    ids=str,
)  # fmt: skip
def test_a_plan_with_options_of_another_type_is_damaged(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="its options are no options of this version"):
        options_of(plan(**options), {})


@pytest.mark.parametrize("name", [*declared(TraceOptions), *declared(DataOptions), "save_moments"])
def test_what_the_stages_before_have_used_is_refused_by_plan(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} comes too late here: give it to trace or calibrate"):
        lindep_onnx.plan(SimpleNamespace(config=Config()), **{name: 1})  # type: ignore[arg-type]

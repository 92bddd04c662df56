"""A plan as a file that a person can read, edit and have carried out again.

It names what goes by tensor and channel, so that it fits every model with the same layers, and holds the options that
it was made with: an unedited plan gives the same bytes again. Weights are not in it. They are made up for anew from the
data, so that an edited plan is as good as one of our own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from lindep_onnx._version import __version__
from lindep_onnx.errors import OutputError, UsageError
from lindep_onnx.files import replacing
from lindep_onnx.model.weights import fingerprint
from lindep_onnx.moves.kinds import MOVES
from lindep_onnx.options import Config, declared
from lindep_onnx.planning.values import Result
from lindep_onnx.structure.types import Structure

#: The format of plans that only remove channels, and of those that hold steps of other kinds too; both are read.
CHANNELS_ONLY, ALL_KINDS = 1, 2
#: A longer file is no plan.
MAX_BYTES = 1 << 26
MODES = ("proven", "lossless", "budgeted")
REFITS = ("fold", "kernel", "sequential")


@dataclass(frozen=True)
class Plan:
    """What goes, by name, and how it is made up for.

    Attributes:
        removed: channel numbers that go, ascending, by the tensor that they are channels of.
        channels: how many channels each of these tensors has.
        mode: "proven", "lossless" or "budgeted".
        refit: how the survivors are refitted: "fold", "kernel" or "sequential".
        options: of the run that made it, those that differ from their defaults.
        model: fingerprint of the model that it was made for.
        version: of this package.
        steps: of other kinds of change, by kind and by name.
        widths: the rule that the remaining widths keep to, in words; empty in plans of earlier versions.
    """

    removed: Mapping[str, Sequence[int]]
    channels: Mapping[str, int] = field(default_factory=dict)
    mode: str = "budgeted"
    refit: str = "sequential"
    options: Mapping[str, Any] = field(default_factory=dict)
    model: str = ""
    version: str = __version__
    steps: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    widths: str = ""

    def __len__(self) -> int:
        return sum(len(numbers) for numbers in self.removed.values())

    def to_json(self) -> str:
        """One tensor a line, so that a person finds them and `diff` shows what was edited."""
        form = ALL_KINDS if self.steps else CHANNELS_ONLY
        head = {"lindep_onnx_plan": form, "version": self.version, "model": self.model, "mode": self.mode,
                "refit": self.refit, "widths": self.widths, "options": dict(self.options)}  # fmt: skip
        lines = [f"  {json.dumps(key)}: {json.dumps(value, sort_keys=True)}," for key, value in head.items()]
        if self.steps:
            lines.append(f'  "steps": {json.dumps(self.steps, sort_keys=True)},')
        for key, table in (("channels", self.channels), ("removed", self.removed)):
            rows = [f"    {json.dumps(name)}: {json.dumps(value)}" for name, value in table.items()]
            lines.append(f'  "{key}": {{' + ("\n" + ",\n".join(rows) + "\n  }" if rows else "}"))
        lines[-2] += ","
        return "{\n" + "\n".join(lines) + "\n}\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan; what it says is checked as far as that goes without a model.

        Raises:
            UsageError: it is none, naming what is wrong.
        """
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"This is no plan of lindep_onnx, nor JSON ({str(error)[:80]}).") from error
        if not isinstance(values, dict) or values.get("lindep_onnx_plan") not in (CHANNELS_ONLY, ALL_KINDS):
            raise UsageError(f'This is no plan of lindep_onnx: it lacks "lindep_onnx_plan": {CHANNELS_ONLY}.')
        values.setdefault("widths", "")
        if values["lindep_onnx_plan"] == CHANNELS_ONLY:
            values["steps"] = {}
        kinds = {
            "removed": dict,
            "channels": dict,
            "options": dict,
            "mode": str,
            "refit": str,
            "model": str,
            "version": str,
            "steps": dict,
            "widths": str,
        }
        for key, kind in kinds.items():
            if not isinstance(values.get(key), kind):
                raise UsageError(f'This plan is damaged: "{key}" is missing, or of another type.')
        for name, numbers in values["removed"].items():
            whole = isinstance(numbers, list) and all(type(number) is int for number in numbers)
            if not whole or len(set(numbers)) < len(numbers) or min(numbers, default=0) < 0:
                raise UsageError(
                    f'This plan is damaged: "removed" of {name!r} is no list of different channel numbers.'
                )
        if not all(isinstance(entry, dict) for entry in values["steps"].values()):
            raise UsageError('This plan is damaged: "steps" holds something else than tables by kind.')
        if not all(type(count) is int for count in values["channels"].values()):
            raise UsageError('This plan is damaged: "channels" holds something else than counts.')
        for key, allowed in (("mode", MODES), ("refit", REFITS)):
            if values[key] not in allowed:
                raise UsageError(f'This plan is damaged: "{key}" is one of {", ".join(allowed)}.')
        return cls(**{key: values[key] for key in kinds})

    def save(self, path: str | Path) -> None:
        """Write the plan so that `path` holds either its old content or the complete new one.

        Raises:
            OutputError: it cannot be written.
        """
        path = Path(path)
        try:
            with replacing(path) as staged:
                staged.write_text(self.to_json(), encoding="utf-8", newline="\n")
        except OSError as error:
            raise OutputError(f"{path}: cannot be written ({error.strerror or error}).") from error

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read what `save` wrote.

        Raises:
            UsageError: the file is missing, or holds no plan.
        """
        try:
            with Path(path).open("rb") as file:
                content = file.read(MAX_BYTES + 1)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise UsageError(f"{str(path)[:80]}: no plan can be read there ({reason}).") from error
        if len(content) > MAX_BYTES:
            raise UsageError(f"{path}: is larger than any plan ({MAX_BYTES >> 20} MB).")
        try:
            return cls.from_json(content.decode("utf-8", "replace"))
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from error


@dataclass(frozen=True)
class ResolvedPlan:
    """A plan that fits a model.

    Attributes:
        plan: the plan.
        steps: by kind of change, (steps,) bool.
        enforced: names of size budgets that are asked for now, and not only when the plan was made.
        refit: how the survivors are refitted now.
        notes: what the user should know.
    """

    plan: Plan
    steps: Mapping[str, NDArray[np.bool_]]
    enforced: frozenset[str]
    refit: str
    notes: tuple[str, ...]

    @property
    def removed(self) -> NDArray[np.bool_]:
        """(units,) bool, the channels that go."""
        return self.steps["channels"]


def to_plan(structure: Structure, result: Result, options: Mapping[str, Any]) -> Plan:
    """What was done to a model, as a plan.

    Args:
        structure: the traced model.
        result: what came of it.
        options: that it was made with, those that differ from their defaults.
    """
    candidate = result.candidate
    taken = candidate.decision.steps
    named = {move.name: move.to_names(structure, taken[move.name]) for move in MOVES if move.name in taken}
    channels = named.pop("channels", {"removed": {}, "channels": {}})
    made_for = fingerprint(structure.model.proto, structure.model.folder)
    return Plan(
        channels["removed"],
        channels["channels"],
        candidate.mode,
        candidate.refit,
        dict(options),
        made_for,
        steps=named,
        widths=result.widths,
    )


def options_of(plan: Plan, changed: Mapping[str, Any]) -> Config:
    """The options that a plan is carried out with: its own, but for what is asked for now.

    Args:
        plan: the plan.
        changed: options given now, as fields of `Config`.

    Raises:
        UsageError: they have no meaning.
    """
    types = get_type_hints(Config)
    known = {name: option for name, option in declared(Config).items() if option.recorded}
    try:
        own = {key: _frozen(value) for key, value in plan.options.items() if known[key].repeated}
        for key, value in own.items():
            if not _is_a(types[key], value):
                raise TypeError(f"{key} is {str(value)[:40]!r}")
        config = Config(**{**own, **changed})
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise UsageError(f"This plan is damaged: its options are no options of this version ({error}).") from error
    if config.rounds > 1:
        raise UsageError("A plan is one cut: it cannot be carried out in --rounds.")
    return config


def _frozen(value: Any) -> Any:
    """JSON values as `Config` has them."""
    if isinstance(value, dict):
        return {key: _frozen(entry) for key, entry in value.items()}
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _is_a(kind: Any, value: Any) -> bool:
    """Whether a value from JSON has the type of an option; which words a word may be is for `Config` to say."""
    parts = get_args(kind)
    kind = get_origin(kind) or kind
    if kind in (Union, UnionType):
        return any(_is_a(part, value) for part in parts)
    if kind is Literal:
        return isinstance(value, str)
    if kind is tuple:
        return isinstance(value, tuple) and all(_is_a(parts[0], entry) for entry in value)
    if kind is Mapping:
        return isinstance(value, dict) and all(_is_a(parts[1], entry) for entry in value.values())
    return type(value) in (int, float) if kind is float else type(value) is kind


def resolve_plan(plan: Plan, structure: Structure, changed: Mapping[str, Any]) -> ResolvedPlan:
    """Find the steps of a plan in a model.

    Args:
        plan: the plan.
        structure: the traced model.
        changed: options given now, beside those of the plan.

    Raises:
        UsageError: it does not fit.
    """
    named: dict[str, Mapping[str, Any]] = {"channels": {"removed": plan.removed, "channels": plan.channels}}
    known = {move.name: move for move in MOVES}
    for name, entry in plan.steps.items():
        if name not in known:
            raise UsageError(f"The plan does not fit: this version knows no change of kind {name[:80]!r}.")
        named[name] = entry
    steps = {name: known[name].from_names(structure, entry) for name, entry in named.items()}
    notes = []
    if plan.model and plan.model != fingerprint(structure.model.proto, structure.model.folder):
        notes.append("The plan was made for a model with other weights, or another graph around the same layers.")
    refit = changed.get("refit")
    refit = plan.refit if refit in (None, "auto") else str(refit)
    return ResolvedPlan(plan, steps, frozenset(changed), refit, tuple(notes))

"""Contract in rounds, and recover after each: further down than one cut goes, with the accuracy won back on the way.

A round compresses the model that the round before left: it is traced, calibrated, priced and refitted anew, since what
is redundant changes with the weights. Sizes are always shares of the original, and errors, agreement and metrics are
always against the original, so that rounds do not drift.

Shares of a size fall by the same factor in each round, down to what was asked for. Budgets on errors ask every round
for as much as they allow: what recovery won back, the next round may spend. A round that breaks such a budget is
undone, and the group whose error was largest is left alone in those that follow.
"""

from __future__ import annotations

import dataclasses
import glob
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from lindep_onnx.data.samples import Samples
from lindep_onnx.distill.augment import augmentation
from lindep_onnx.distill.checkpoint import Checkpoint
from lindep_onnx.distill.train import Distilled, Training, distill
from lindep_onnx.log import Log
from lindep_onnx.model.ir import Model
from lindep_onnx.model.shapes import resolve
from lindep_onnx.options import Config
from lindep_onnx.planning.budgets import SIZES
from lindep_onnx.planning.round import Round
from lindep_onnx.planning.strategies import retrained
from lindep_onnx.planning.values import Decision, Result
from lindep_onnx.runtime.backend import Runtime
from lindep_onnx.structure.steps import ChannelSteps
from lindep_onnx.structure.trace import trace
from lindep_onnx.structure.types import Structure
from lindep_onnx.verify.group_errors import measure_groups

#: Decides one round: called with the model as the last round left it and the options of the round.
Decide: TypeAlias = Callable[[Structure, Config], tuple[Round, Result]]


def contract_in_rounds(
    original: Structure, samples: Samples, config: Config, decide: Decide, runtime: Runtime, log: Log
) -> tuple[Round, Result]:
    """Compress a model in rounds.

    Args:
        original: the original model, traced.
        samples: the data.
        config: the options; `rounds` and `recover` say how often and how long.
        decide: decides one round.
        runtime: what models run on.
        log: told of stages and how far they are.

    Returns:
        The first round, and the last result that is good; what it removed is counted in units of the original.
    """
    current = original
    best: Result | None = None
    first: Round | None = None
    frozen: list[str] = []  # globs on the names of nodes whose groups broke a round
    told: list[str] = []  # of all rounds; what else a round has to say matters for the last one only
    if config.rounds > 1 and len(np.unique(original.aligned)) < original.units:
        told.append("Grouped convolutions or attention heads trade places of channels: all rounds were run as one.")
        config = dataclasses.replace(config, rounds=1)
    recovery = Recovery(original.model, samples, config, runtime, log)
    for number, options in enumerate(schedule(config)):
        round_, result = decide(current, options)
        first = first or round_
        if best is not None and not result.removed.any():
            told.append(f"Round {number + 1} found nothing more to remove.")
            break
        before = np.zeros(original.units, dtype=bool) if best is None else best.removed
        gone = to_original_units(original, before, current, result.removed)
        if config.training_budget is not None and gone.any():
            with log.stage("recover"):
                result, notes = recovery.recovered(round_, result, number)
            told.extend(notes)
        if best is not None and best.failure is None and result.failure is not None and not config.sized:
            name = _worst(current, result, samples, config, runtime)
            told.append(
                f"Round {number + 1} broke a budget and was undone; the channels of node {name!r}, where its error was "
                "largest, were left alone from then on."
            )
            frozen.append(glob.escape(name))
            current = _traced(current.model, config, frozen)
            continue
        prices = result.prices if best is None else best.prices  # those of the original
        best = dataclasses.replace(_of_original(result, gone, number), prices=prices)
        if number + 1 < config.rounds:
            current = _traced(result.candidate.model, config, frozen)
    assert best is not None and first is not None
    return first, dataclasses.replace(best, notes=(*best.notes, *told))


def _of_original(result: Result, gone: NDArray[np.bool_], number: int) -> Result:
    """A result that counts in units of the original; what later rounds say of kinds and folds is about others."""
    own = result.candidate.decision.channels
    steps = ChannelSteps.of(gone) if number else ChannelSteps(gone, own.kind, own.folds)
    decision = Decision({**result.candidate.decision.steps, "channels": steps}, len(gone))
    return dataclasses.replace(result, candidate=dataclasses.replace(result.candidate, decision=decision))


def _traced(model: Model, config: Config, frozen: Sequence[str]) -> Structure:
    exclude = (*config.exclude, *frozen)
    return trace(model, resolve(model), include=config.include, exclude=exclude, min_channels=config.min_channels)


def _worst(current: Structure, result: Result, samples: Samples, config: Config, runtime: Runtime) -> str:
    """The first producer of the group whose readers are furthest off."""
    removed = result.removed
    errors = measure_groups(current, removed, result.candidate.model, samples, runtime, seed=config.seed)
    changed = [number for number, group in enumerate(current.groups) if removed[group.units].any()]
    return current.groups[max(changed, key=lambda number: errors.get(number, 0.0))].name


def schedule(config: Config) -> Iterator[Config]:
    """The options of each round: sizes fall by the same factor, other budgets are those asked for.

    Args:
        config: the options of the run.
    """
    for number in range(1, config.rounds + 1):
        shares = {kind: getattr(config, kind) for kind in SIZES}
        yield dataclasses.replace(
            config, **{kind: share ** (number / config.rounds) for kind, share in shares.items() if share is not None}
        )


def to_original_units(
    original: Structure, removed: NDArray[np.bool_], smaller: Structure, gone: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """What is removed from the original once more goes from a smaller model made of it.

    Args:
        original: the original model, traced.
        removed: (units,) bool, units of the original that the smaller model lacks.
        smaller: that model, traced; its tensors have the names of the original's.
        gone: (units of the smaller model,) bool, what goes from it.
    """
    if smaller is original:
        return removed | gone
    result = removed.copy()
    for tensor, labels in smaller.labels.items():
        before = {label.cut: label for label in original.labels.get(tensor, ())}
        for label in labels:
            if label.cut not in before:
                continue
            atoms = before[label.cut].along_cut()
            units = original.unit[atoms[original.mask(atoms, removed)]]
            own = smaller.unit[label.along_cut()]
            if len(units) == len(own):
                away = units[np.append(gone, False)[own]]
                result[away[away >= 0]] = True
    return result


@dataclass(frozen=True)
class Recovery:
    """Trains the result of each round against the original.

    Attributes:
        original: the original model.
        samples: the data.
        config: the options of the run.
        runtime: what models run on.
        log: told how far it is.
    """

    original: Model
    samples: Samples
    config: Config
    runtime: Runtime
    log: Log

    @cached_property
    def _checkpoint(self) -> Checkpoint | None:
        path = self.config.checkpoint
        return Checkpoint(Path(path)) if path is not None else None

    def recovered(self, round_: Round, result: Result, number: int) -> tuple[Result, tuple[str, ...]]:
        """The result with trained weights, or as it was if unseen samples turn those down, and what to tell the user.

        Args:
            round_: the one that it was chosen in.
            result: the result.
            number: of the round, from 0 on.
        """
        config, student = self.config, result.candidate.model
        names = [node.name for node in student.nodes]
        assert config.training_budget is not None
        training = Training(
            teacher=self.original,
            student=student,
            budget=config.training_budget,
            seed=config.seed + number,
            frozen=[name for name in names if any(fnmatchcase(name, pattern) for pattern in config.exclude)],
            agreement_output=config.agreement_output,
            augment=augmentation(config.augment),
        )
        found = distill(training, self.samples, self.runtime, self.log, self._checkpoint)
        notes = tuple(_notes(found, number if config.rounds > 1 else None))
        if found.weights:
            trained = retrained(round_, result, found.weights)
            if trained.failure is None or result.failure is not None:
                return trained, notes
            notes = (*notes, "Unseen samples turned the trained weights down; the refitted ones were kept.")
        return result, notes


def _notes(found: Distilled, number: int | None) -> Iterator[str]:
    if not math.isnan(found.before):
        when = "" if number is None else f"Round {number + 1}: "
        yield (
            f"{when}{found.steps} steps of training against the original, without labels, brought the loss on held-out "
            f"samples from {found.before:.3g} to {found.after:.3g}."
        )
    yield from found.notes

"""All that one round decides by, and what every way to look for a result does with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lindep_onnx.errors import TimingError
from lindep_onnx.log import Log
from lindep_onnx.model.ir import Model
from lindep_onnx.moves.base import Exactness
from lindep_onnx.moves.channels import ChannelRemoval
from lindep_onnx.moves.lossless import lossless_steps, part_of
from lindep_onnx.options import LOSSLESS_SITE_ERROR, Config
from lindep_onnx.planning.builder import Builder, Workpiece
from lindep_onnx.planning.judge import Judge
from lindep_onnx.planning.path import Path
from lindep_onnx.planning.pricing import TimeTable, path_of, price
from lindep_onnx.planning.values import Candidate, Evaluation, Result
from lindep_onnx.runtime.backend import Runtime
from lindep_onnx.runtime.targets import WidthRule
from lindep_onnx.structure.steps import ChannelSteps, Curves, Prices

#: Spacings of the numbers of a half-precision model that a consumer may err by in lossless mode, beside the bound.
CONSUMER_ROUNDINGS = 1.0


@dataclass(frozen=True)
class Round:
    """All that one round decides by.

    Attributes:
        piece: the model that is changed, and what is known about it.
        builder: makes candidates of it.
        judge: holds them to what is asked for.
        times: what layers take, where a budget is on time.
        config: the options of the round.
        options: those that differ from their defaults, as they are reported.
        rounding: spacing of the numbers of a model in half precision; 0 for any other.
        prices: curves that are known already.
        rule: the multiples that widths keep to.
    """

    piece: Workpiece
    builder: Builder
    judge: Judge
    times: TimeTable
    config: Config
    options: Mapping[str, Any]
    rounding: float
    prices: Prices
    rule: WidthRule

    @property
    def runtime(self) -> Runtime:
        """What models run on."""
        return self.builder.runtime

    @property
    def log(self) -> Log:
        """Told of stages and how far they are."""
        return self.builder.log

    def exactness(self, uncertain: NDArray[np.bool_], keep: NDArray[np.bool_] | None = None) -> Exactness:
        """What counts as free of cost in this round."""
        tolerance = max(LOSSLESS_SITE_ERROR, CONSUMER_ROUNDINGS * self.rounding)
        return Exactness(tolerance, uncertain, keep, self.piece.proof.steps)

    def free(self, uncertain: NDArray[np.bool_], keep: NDArray[np.bool_] | None = None) -> ChannelSteps:
        """All channels that go for nothing."""
        return lossless_steps(self.piece.structure, self.piece.known, self.exactness(uncertain, keep))

    @property
    def inactive(self) -> NDArray[np.bool_]:
        """(units,) bool, channels that were constant in the data, and not by proof."""
        return self.piece.known.inactive & ~self.piece.proof.constant

    def finish(self, candidate: Candidate) -> tuple[Candidate, Evaluation]:
        """A candidate rounded like what is written, and what it is worth."""
        final = replace(candidate, model=self.judge.rounded(candidate.model))
        return final, self.judge.evaluate(final)

    def result(self, candidate: Candidate, evaluation: Evaluation) -> Result:
        """What the search ends with, timed where that can be done."""
        notes = (*candidate.notes, *self.times.notes)
        try:
            latency = self.judge.latency(candidate.model)
        except TimingError as error:
            latency, notes = None, (*notes, f"No latency was measured. {error}")
        return Result(candidate, evaluation, latency, notes, widths=self.rule.words)

    def proven(self) -> tuple[Candidate, Evaluation]:
        """Without what the weights prove redundant, as far as widths stay whole."""
        structure, own = self.piece.structure, self.piece.proof
        removed = own.steps.removed
        whole = ChannelRemoval().admissible(structure, removed, np.flatnonzero(removed), self.rule)
        steps = own.steps if (whole == removed).all() else part_of(own.steps, own.statistics, whole)
        assert steps is not None
        return self.finish(self.builder.proven(steps))

    # ---- prices and paths --------------------------------------------------------------------------------------

    def priced(self) -> tuple[Curves, Prices]:
        """Curves by the size that is asked for, multiply-accumulates for a time, and all that are known by now."""
        saving = self.judge.budgets.priced_by
        known = self.prices.get(saving, {})
        if all(move.name in known for move in self.piece.moves):
            return known, self.prices
        found = price(self.piece, saving, self.runtime, self.log)
        return found, {**self.prices, saving: found}

    def path(self, curves: Curves, free: ChannelSteps) -> Path:
        """Nested plans in blocks of the rule.

        Args:
            curves: what steps cost and save.
            free: what costs nothing.
        """
        return path_of(self.piece, curves, self._for_nothing(free), self.rule)

    def timed_path(self, curves: Curves, free: ChannelSteps) -> Path:
        """The same, priced by the seconds that blocks save."""
        for_nothing = self._for_nothing(free)
        return path_of(self.piece, self.times.priced(self.piece, curves, for_nothing), for_nothing, self.rule)

    def _for_nothing(self, free: ChannelSteps) -> NDArray[np.bool_]:
        """Random inputs prove nothing: what never changed on them is priced like the rest."""
        return (self.piece.proof.steps if self.config.random_calib is not None else free).removed

    # ---- plans on a path ---------------------------------------------------------------------------------------

    @property
    def refit_mode(self) -> str:
        """How what reads the survivors is refitted: "fold", "kernel" or "sequential"."""
        return self.config.refit if self.config.refit in ("fold", "kernel") else "sequential"

    def candidate(self, path: Path, count: int) -> Candidate:
        """A point of a path, refitted as the options ask for."""
        taken = self.builder.decide(path, count, self.rule)
        return (
            self.builder.fitted(taken) if self.refit_mode == "fold" else self.builder.refitted(taken, self.refit_mode)
        )

    def bare(self, path: Path, count: int) -> Model:
        """A point of a path without any fit: its size and its speed are those of the result."""
        return self.builder.bare(self.builder.decide(path, count, self.rule))

    def excess(self, path: Path, count: int) -> float:
        """How far a point of a path is above the sizes that are asked for; up to 0 is small enough."""
        return self.judge.budgets.excess(self.judge.cost(self.bare(path, count)))

    def small_candidate(self, path: Path, count: int | None) -> Candidate:
        """A count that is small enough, or a little more: a refit may add a few biases that were not there."""
        candidate = self.candidate(path, len(path) if count is None else count)
        excess = self.judge.budgets.excess
        while count is not None and count < len(path) and excess(self.judge.cost(candidate.model)) > 0:
            count = min(len(path), count + max(1, len(path) // 200))
            candidate = self.candidate(path, count)
        return candidate

"""What the search for a result passes on; each value is complete when it exists."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lindep_onnx.errors import LindepError
from lindep_onnx.model.cost import Cost
from lindep_onnx.model.ir import Model
from lindep_onnx.moves.base import Steps
from lindep_onnx.runtime.timing import Timing
from lindep_onnx.structure.steps import ChannelSteps, Prices
from lindep_onnx.verify.metrics import Comparison


@dataclass(frozen=True)
class Decision:
    """What is done to a model.

    Attributes:
        steps: by the name of the kind of change; kinds that do nothing may be missing.
        units: number of units of the model.
    """

    steps: Mapping[str, Steps]
    units: int

    def __bool__(self) -> bool:
        return any(steps.taken.any() for steps in self.steps.values())

    @property
    def channels(self) -> ChannelSteps:
        """What is removed."""
        found = self.steps.get("channels")
        return found if isinstance(found, ChannelSteps) else ChannelSteps.of(np.zeros(self.units, dtype=bool))

    @property
    def removed(self) -> NDArray[np.bool_]:
        """(units,) bool."""
        return self.channels.removed


@dataclass(frozen=True)
class Candidate:
    """A model that might be the result.

    Attributes:
        model: in the precision that is worked in.
        decision: what was done to the model that it was made of.
        mode: why that could be done: "proven", "lossless" or "budgeted".
        refit: how the survivors were refitted: "fold", "kernel" or "sequential".
        notes: what the user should know about how it was made.
    """

    model: Model
    decision: Decision
    mode: str
    refit: str = "fold"
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Evaluation:
    """A candidate held to what is asked for.

    Attributes:
        cost: what it costs.
        comparison: with the original, on samples that nothing was fitted to; None if there are none.
        achieved: what was reached of each budget, by option name.
        failure: why it must not be used; None if all is well.
        lossless: whether it was made, and measured, to be lossless though a budget would have allowed more.
    """

    cost: Cost
    comparison: Comparison | None
    achieved: Mapping[str, float | None]
    failure: LindepError | None
    lossless: bool = False


@dataclass(frozen=True)
class FrontierPoint:
    """What one plan on the path gives without a refit.

    Attributes:
        parameters: share of the original's parameters that is left.
        relative_error: worst output error, as `lindep_onnx.verify` defines it, on samples that choose between plans.
        agreement: share of them with the same arg-max; None if no output has one.
        channels: how many went.
        expected: root of the squared relative error of the outputs, averaged over them, that the plan was priced at.
        decisions: arg-maxes that the agreement was counted on.
        latency: share of the original's latency that times of layers predict; None if there are no such times.
    """

    parameters: float
    relative_error: float
    agreement: float | None
    channels: int = 0
    expected: float | None = None
    decisions: int = 0
    latency: float | None = None


@dataclass(frozen=True)
class Result:
    """What the search ends with, good or bad.

    Attributes:
        candidate: the model, and what was done to it.
        evaluation: what it is worth.
        latency: of the result beside the original; None if not measured.
        notes: what the user should know.
        prices: the curves that it was priced with; empty without a budget on a size.
        frontier: what smaller and larger reductions would cost, largest model first; empty if nobody measured it.
        widths: the rule that the remaining widths keep to, in words; empty where a plan was carried out again.
        kept_for_widths: how many channels cost nothing, but stay so that widths keep to the rule.
    """

    candidate: Candidate
    evaluation: Evaluation
    latency: Timing | None
    notes: tuple[str, ...] = ()
    prices: Prices = field(default_factory=dict)
    frontier: tuple[FrontierPoint, ...] = ()
    widths: str = ""
    kept_for_widths: int = 0

    @property
    def failure(self) -> LindepError | None:
        """Why it must not be used; None if all is well."""
        return self.evaluation.failure

    @property
    def removed(self) -> NDArray[np.bool_]:
        """(units,) bool, what went."""
        return self.candidate.decision.removed

    @property
    def ratio(self) -> float:
        """Latency of the result as a share of the original's; 1 if not measured."""
        return 1.0 if self.latency is None else self.latency.ratio

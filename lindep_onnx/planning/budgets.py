"""What is asked of a result: limits on its size, its quality and its time, and what is said where one does not hold."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lindep_onnx.errors import BudgetError, LindepError, VerificationError
from lindep_onnx.model.cost import Cost
from lindep_onnx.options import LOSSLESS_VERIFIED_ERROR, Config, DataOptions, flag
from lindep_onnx.planning.plan_file import ResolvedPlan
from lindep_onnx.structure.steps import Saving
from lindep_onnx.verify.metrics import Comparison
from lindep_onnx.verify.verdict import MIN_JUDGED, Verdict, kept, near_chance

#: Fields of `Cost` by the options that limit them.
SIZES = {"params": "parameters", "macs": "macs", "size": "bytes", "channels": "channels"}
#: What steps are priced by, when the first of these budgets is given; parameters else.
PRICED_BY: Mapping[str, Saving] = {
    "params": "parameters",
    "size": "parameters",
    "macs": "macs",
    "channels": "channels",
}
#: Options that limit the quality; the first two compare outputs.
COMPARED, QUALITY = ("max_error", "min_agreement"), ("max_error", "min_agreement", "max_drop")


@dataclass(frozen=True)
class Budgets:
    """The limits of one run or round.

    Attributes:
        limits: what is allowed, by option name; only those that are asked for.
        before: what the original costs.
        mode: what is asked for: "proven", "lossless" or "budgeted".
        enforced: names of the size budgets that a result has to meet; None for all of them.
        holdout: share of the samples that is not fitted to; half of it verifies.
    """

    limits: Mapping[str, float]
    before: Cost
    mode: str
    enforced: frozenset[str] | None = None
    holdout: float = DataOptions.holdout

    @classmethod
    def of(cls, config: Config, before: Cost, wanted: ResolvedPlan | None) -> Budgets:
        """The budgets among the options; those of a plan that is carried out again hold where they are asked for."""
        named = {name: getattr(config, name) for name in (*SIZES, *QUALITY, "latency")}
        limits = {name: value for name, value in named.items() if value is not None}
        if wanted is not None:
            return cls(limits, before, wanted.plan.mode, wanted.enforced, config.holdout)
        mode = "proven" if config.proven_only else "budgeted" if config.budgeted else "lossless"
        return cls(limits, before, mode, holdout=config.holdout)

    @property
    def sizes(self) -> dict[str, float]:
        """Shares of the original to keep at most, by option name."""
        return {name: limit for name, limit in self.limits.items() if name in SIZES}

    @property
    def latency(self) -> float | None:
        """Share of the original's time."""
        return self.limits.get("latency")

    @property
    def sized(self) -> bool:
        """Whether a size or a time is asked for."""
        return bool(self.sizes) or self.latency is not None

    @property
    def priced_by(self) -> Saving:
        """What steps are priced by."""
        return next((PRICED_BY[name] for name in PRICED_BY if name in self.limits), "parameters")

    def share(self, name: str, after: Cost) -> float:
        """Of a size, what is left; NaN where the original has nothing that counts: no share of nothing is less."""
        before, left = getattr(self.before, SIZES[name]), getattr(after, SIZES[name])
        return float(left / before) if before else math.nan

    def excess(self, after: Cost) -> float:
        """How far the shares of a model are above what is allowed; up to 0 is small enough."""
        over = [self.share(name, after) - limit for name, limit in self.sizes.items()]
        return max((math.inf if math.isnan(value) else value for value in over), default=-math.inf)

    def holds(self, name: str, value: float | None) -> bool:
        """Whether a quality is good enough; what could not be measured is not."""
        if value is None or np.isnan(value):
            return False
        limit = self.limits[name]
        return bool(value >= limit if name == "min_agreement" else value <= limit)

    def failure(self, achieved: Mapping[str, float | None], found: Comparison | None = None) -> LindepError | None:
        """Why a result misses a budget, or must not be used whatever it meets; None if all is well.

        Args:
            achieved: what was reached, by option name.
            found: the comparison with the original on held-out samples; None without.
        """
        for name, share in self.sizes.items():
            left = achieved[name]
            asked = self.enforced is None or name in self.enforced  # an edited plan may keep more
            if asked and left is not None and not left <= share:
                return _too_large(name, share, left)
        for name in QUALITY:
            if name in achieved and not self.holds(name, achieved[name]):
                return BudgetError(
                    f"{flag(name)} {self.limits[name]:g} does not hold together with the other limits: "
                    f"{reached(name, achieved[name], found)}. Nothing was written; loosen one of them."
                )
        return self.chance_failure(found)

    def chance_failure(self, found: Comparison | None) -> LindepError | None:
        """Why a result is not to be used that is near chance; None if it is not. A lossless one has its own bound.

        Args:
            found: the comparison with the original; None without.
        """
        clause = None if found is None or self.mode != "budgeted" else near_chance(found)
        if clause is None:
            return None
        asked = " ".join(f"{flag(name)} {value:g}" for name, value in self.limits.items()) or "this plan"
        return BudgetError(
            f"With {asked} the result {clause}: close to a random model. Nothing was written; ask for a larger share, "
            "or for a quality such as --min-agreement 0.9 or --max-error 0.3 (--force writes it anyway)."
        )

    def verdict(
        self,
        found: Comparison | None,
        failure: LindepError | None,
        random: bool = False,
        judged: Sequence[str] = QUALITY,
        different: int | None = None,
    ) -> Verdict:
        """What may be said of a result: a limit on its quality was judged and holds, does not, or there was none.

        Args:
            found: the comparison with the original, on held-out samples; None without.
            failure: why it must not be used; None if all is well.
            random: whether it was made on random inputs.
            judged: limits on quality that were judged.
            different: how many of the samples are no copies of others; None for all of them.
        """
        if failure is not None:
            return Verdict("failed", str(failure))
        limited = [name for name in judged if name in self.limits]
        if random:
            return Verdict("unchecked", "random inputs say little about real ones; give --calib DATA")
        if found is None:
            return Verdict("unchecked", "there were no held-out samples; give --calib DATA")
        if self.mode == "budgeted" and not limited:
            return Verdict("unchecked", f"no limit on quality was set; set one with {_judging(found)}")
        count = found.samples if different is None else min(found.samples, different)
        if count < MIN_JUDGED and "max_drop" not in limited:
            what = "the lossless bound" if self.mode != "budgeted" else " and ".join(map(flag, limited))
            kind = "different held-out" if count < found.samples else "held-out"
            wanted = math.ceil(MIN_JUDGED / (self.holdout / 2))
            return Verdict(
                "unchecked",
                f"{count} {kind} sample{'s' * (count != 1)} cannot judge {what}; give so many that {MIN_JUDGED} are "
                f"held out to verify, about {wanted:,} in all",
            )
        return Verdict("passed")

    def latency_failure(self, reached: float) -> LindepError | None:
        """Why a result is too slow; None if it is not."""
        if self.latency is None or reached <= self.latency:
            return None
        return BudgetError(
            f"--latency {self.latency:g} was not reached: the smallest result tried takes {reached:.3f} of the "
            "original's time. Nothing was written; ask for at least that much."
        )

    def stress_failure(self, found: Comparison, lossless: bool | None) -> LindepError | None:
        """Why a result must not be used after what was found on a second data set; None if all is well.

        Args:
            found: the comparison there.
            lossless: whether it counts as lossless there; None where that is not asked for.
        """
        for name, value, holds in self._stressed(found, lossless):
            if not holds:
                reached = "it could not be measured" if value is None else f"it is {value:.4g}"
                worst = ", ".join(map(str, found.worst_samples[:3])) or "none"
                return VerificationError(
                    f"{name} does not hold on the stress data: there {reached} (worst samples: {worst}). Nothing was "
                    "written; add samples like these to the calibration data."
                )
        return None

    def _stressed(self, found: Comparison, lossless: bool | None) -> Iterator[tuple[str, float | None, bool]]:
        values = {"max_error": found.relative_error, "min_agreement": found.agreement}
        for name in COMPARED:
            if name in self.limits:
                yield f"{flag(name)} {self.limits[name]:g}", values[name], self.holds(name, values[name])
        if lossless is not None:
            yield f"the lossless bound {LOSSLESS_VERIFIED_ERROR:g}", found.relative_error, lossless


def _too_large(name: str, share: float, reached: float) -> BudgetError:
    if math.isnan(reached):
        return BudgetError(
            f"--{name} {share:g} cannot be reached: the model has nothing that it counts (a quantized model counts no "
            "parameters). Nothing was written; compress the floating-point model."
        )
    return BudgetError(
        f"--{name} {share:g} cannot be reached: with everything removed that can be removed, "
        f"{math.ceil(1e4 * reached) / 1e4:g} of the original are left. Nothing was written; ask for at least that much."
    )


def _judging(found: Comparison) -> str:
    """Options that limit the quality of a result, as far as its outputs can be compared."""
    if any(output.shapes_differ for output in found.outputs):
        return "--eval and --max-drop, for outputs with another number of rows have no error"
    return "--max-error" if found.agreement is None else "--min-agreement or --max-error"


def reached(name: str, value: float | None, found: Comparison | None, data: str = "held-out samples") -> str:
    """A clause on how far a result is from the limit of that name, on what `data` names."""
    if value is None or math.isnan(value):
        return "it could not be measured"
    if name == "min_agreement" and found is not None and found.agreement is not None:
        return f"the result {kept(found.agreement, found.samples, found.decisions)}"
    differs = next((output for output in found.outputs if output.shapes_differ), None) if found is not None else None
    if name == "max_error" and math.isinf(value) and differs is not None:
        assert found is not None
        return (
            f"output {differs.name!r} has another shape on {differs.shapes_differ:,} of {found.samples:,} held-out "
            "samples, which counts as an infinite error"
        )
    return f"on {data} it is {value:.4g}"

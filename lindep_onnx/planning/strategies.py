"""From options to one result: build plans, hold them to the budgets, round widths, keep the best.

Lossless mode has one plan, and falls back on smaller ones if unseen samples turn it down. With a budget the plan is a
rung of the ladder (see `planning.path`) that a search (see `planning.search`) finds: the cheap fold judges the
rungs first, the refit those beyond. What was found is then held to the budgets on samples that nothing else has looked
at.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lindep_onnx._version import __version__
from lindep_onnx.calibration.statistics import Statistics
from lindep_onnx.data.samples import Batch, Samples
from lindep_onnx.data.split import Part
from lindep_onnx.errors import BudgetError, LindepError, UsageError, VerificationError
from lindep_onnx.log import Log
from lindep_onnx.model import ir as graph
from lindep_onnx.model.cost import Cost, cost
from lindep_onnx.model.edit import GraphEdits, apply_edits
from lindep_onnx.model.precision import epsilon, perturbed_one_ulp, to_float32, to_stored_dtype
from lindep_onnx.model.shapes import resolve
from lindep_onnx.moves.channels import part_of, plan_lossless
from lindep_onnx.moves.fold_weights import fold_weights
from lindep_onnx.moves.sensitivity import PerturbationRunner, consumer_sensitivity, measured_curves
from lindep_onnx.options import LOSSLESS_SITE_ERROR, LOSSLESS_VERIFIED_ERROR, Config
from lindep_onnx.planning.path import (
    RUNGS,
    Curve,
    FrontierPoint,
    Ladder,
    Prices,
    Saving,
    build_ladder,
    curves,
    folds_of,
    savings,
)
from lindep_onnx.planning.plan_file import ResolvedPlan
from lindep_onnx.planning.search import COARSE, first_small_enough, last_good_enough, on_grid
from lindep_onnx.proofs.prove import Proof
from lindep_onnx.refit.sequential import Cut, refit
from lindep_onnx.runtime import layer_latency as latency
from lindep_onnx.runtime.backend import Runtime, Session
from lindep_onnx.structure.layout import ConsumerLayout
from lindep_onnx.structure.placement import equalized
from lindep_onnx.structure.rewrite import Removal, rewrite
from lindep_onnx.structure.steps import ChannelSteps, Fold
from lindep_onnx.structure.trace import trace
from lindep_onnx.structure.types import Structure
from lindep_onnx.verify.compare import compare
from lindep_onnx.verify.metrics import Comparison

#: What counts as lossless beside the bounds: at a site, in half precision, spacings of its numbers; at the outputs
#: errors that the original itself makes when every weight moves to a neighbouring number or stays.
SITE_ROUNDINGS, OUTPUT_ROUNDINGS = 1.0, 2.0
#: Widths that `--round-to auto` tries in turn: ONNX Runtime's kernels work on blocks of 8 or 16 channels.
WIDTHS = (1, 8, 16)
#: Seconds that original and result are timed against each other; where a budget depends on it.
TIMED, DECISIVE = 0.4, 4.0
#: Plans that a search by measured errors tries: two bisections, see `lindep_onnx.planning.search`.
PROBES = math.ceil(math.log2(RUNGS)) + math.ceil(math.log2(RUNGS / COARSE))
#: Shares of the ladder, and samples, that the frontier of errors is measured at.
FRONTIER, FRONTIER_SAMPLES = tuple(step / 10 for step in range(1, 10)), 64
#: A result counts as faster only by more than timings wobble.
FASTER = 0.98
#: How often the widths are corrected by what was measured, and the share of the time asked for that is close enough.
CORRECTIONS, CLOSE = 5, 0.9
#: Share of the time asked for that a plan must take for a second measurement to find the same.
SURE = 0.97
SIZES = {"params": "parameters", "macs": "macs", "size": "bytes", "channels": "channels"}
#: What units are priced by, when the first of these budgets is given; parameters else.
CURRENCIES: Mapping[str, Saving] = {
    "params": "parameters",
    "size": "parameters",
    "macs": "macs",
    "channels": "channels",
}


@dataclass(frozen=True)
class Chosen:
    """A result, good or bad.

    Attributes:
        model: the smaller model.
        removed: (units,) bool.
        kind: (units,) index into `plan.KINDS`; zero for units that a budget removed.
        cost: what it costs.
        comparison: with the original, on samples that nothing was fitted to; None if there are none.
        latency: milliseconds of the original and of the result; None if not measured.
        achieved: what was reached of each budget, by option name.
        failure: why it must not be used; None if all is well.
        notes: what the user should know.
        folds: how sites make up for what went, as far as the plan says.
        mode: why what went could go: "proven", "lossless" or "budgeted".
        refit: how the survivors were refitted.
        prices: the curves that the budget was priced with, by currency.
        frontier: what smaller and larger reductions would cost, largest model first; empty without a budget.
    """

    model: graph.Model
    removed: NDArray[np.bool_]
    kind: NDArray[np.int8]
    cost: Cost
    comparison: Comparison | None
    latency: tuple[float, float] | None
    achieved: Mapping[str, float | None]
    failure: LindepError | None
    notes: tuple[str, ...] = ()
    folds: Mapping[int, Fold] = field(default_factory=dict)
    mode: str = "budgeted"
    refit: str = "fold"
    prices: Prices = field(default_factory=dict)
    frontier: tuple[FrontierPoint, ...] = ()


class Workshop:
    """Builds results for one model and one set of samples.

    Args:
        structure: the traced model.
        statistics: what the data says; None if it is too little to say anything.
        uncertain: (units,) bool, constant so far but without a margin.
        proof: what the weights alone prove.
        samples: the data; None if there are none.
        config: the options.
        runtime: what models run on.
        log: told of stages and how far they are.
        half: the model in half precision of which `channels` is the widened copy; None for any other model.
        reference: what results are compared with, and their sizes are shares of; None if it is the traced model.
        prices: curves of this model that are known already, by currency.
        replayed: a plan to carry out, in place of one of our own.
    """

    def __init__(
        self,
        structure: Structure,
        statistics: Statistics | None,
        uncertain: NDArray[np.bool_],
        proof: Proof,
        samples: Samples | None,
        config: Config,
        runtime: Runtime,
        log: Log,
        half: graph.Model | None = None,
        reference: graph.Model | None = None,
        prices: Prices | None = None,
        replayed: ResolvedPlan | None = None,
    ) -> None:
        self._prices, self._replayed = prices or {}, replayed
        self._reference = reference or structure.model
        self._half = half
        rounding = 0.0 if half is None else epsilon(half.proto)
        self._tolerance = max(LOSSLESS_SITE_ERROR, SITE_ROUNDINGS * rounding)
        self._structure, self._proof, self._samples, self._config = structure, proof, samples, config
        self._observed = statistics
        self._uncertain = uncertain & ~proof.constant
        self._runtime, self._log = runtime, log
        activations = structure.shape_info.activation_bytes * (1 if samples is None else samples.batch)
        self.shares = runtime.shares(activations)
        original = self._opened(self._reference)  # first of all, for damaged models do not load
        self._original = original if self._reference.folder is None else None
        self._shapes, self._batch = _first_shapes(samples)
        self.before = cost(self._reference if half is None else half, self._shapes, self._batch)
        self.options = {**(replayed.plan.options if replayed is not None else {}), **config.described()}
        self.metadata = json.dumps({"version": __version__, "options": self.options}, sort_keys=True)
        self._metric: float | None = None

    @property
    def mode(self) -> str:
        """What is asked for: "proven", "lossless" or "budgeted"."""
        if self._replayed is not None:
            return self._replayed.plan.mode
        return "proven" if self._config.proven_only else "budgeted" if self._config.budgeted else "lossless"

    def choose(self) -> Chosen:
        """The result that the options ask for; look at its `failure`."""
        if self._replayed is not None:
            chosen = self._carried_out_again(self._replayed)
            chosen = dataclasses.replace(chosen, latency=self._latency(chosen.model))
            return dataclasses.replace(chosen, notes=(*self._replayed.notes, *chosen.notes, *self._slower(chosen)))
        if self._observed is None or self._config.proven_only:
            return self._proven()
        prices: Prices = {}
        ladder = None
        priced: Sequence[Curve] = ()
        frontier: tuple[FrontierPoint, ...] = ()
        with self._log.stage("plan"):
            lossless = self._lossless_plan(self._uncertain)
            if self._config.budgeted:
                prices = self._priced() if self._by_size else {}
                priced = prices[self._currency] if self._by_size else self._priced_by_time()
                ladder = self._ladder(priced, lossless)
        if ladder is not None and self._reference is self._structure.model:
            frontier = self._frontier(ladder, priced)
        if ladder is not None and self._config.latency is not None:
            fast = self._in_time(ladder, lossless)
            return dataclasses.replace(fast, notes=(*fast.notes, *self._slower(fast)), prices=prices, frontier=frontier)
        best: Chosen | None = None
        widths = WIDTHS if self._config.round_to == "auto" else (self._config.round_to,)
        for width in widths:
            chosen = self._verified(lossless, width) if ladder is None else self._budgeted(ladder, width)
            if chosen.latency is None:
                chosen = dataclasses.replace(chosen, latency=self._latency(chosen.model))
            if best is None or (best.failure is not None, _ratio(best)) > (chosen.failure is not None, _ratio(chosen)):
                best = chosen
            if self._config.round_to == "auto" and best.failure is None and _ratio(best) <= FASTER:
                break
        assert best is not None
        if self._config.round_to == "auto" and not self._config.sized and _ratio(best) > 1 / FASTER:
            best = self._unchanged()
        return dataclasses.replace(best, notes=(*best.notes, *self._slower(best)), prices=prices, frontier=frontier)

    def preview(self) -> tuple[FrontierPoint, ...]:
        """What budgets would cost, where none is asked for; empty without data."""
        if self._observed is None:
            return ()
        with self._log.stage("plan"):
            prices = self._priced()[self._currency]
            ladder = self._ladder(prices, self._lossless_plan(self._uncertain))
        return self._frontier(ladder, prices)

    def judge(self, model: graph.Model, weights: Mapping[str, NDArray[Any]], chosen: Chosen) -> Chosen:
        """A result with other weights, held to the budgets anew.

        Args:
            model: the model of `chosen`.
            weights: new values of stored tensors.
            chosen: the result so far.
        """
        model = apply_edits(model, GraphEdits(constants=weights), self.metadata)
        found = self._finished(model, chosen.removed, chosen.kind, chosen.notes)
        # Other values do not make the same widths slower.
        kept = {"latency": chosen.achieved["latency"]} if "latency" in chosen.achieved else {}
        return dataclasses.replace(
            found,
            latency=chosen.latency,
            achieved={**found.achieved, **kept},
            mode=chosen.mode,
            refit=chosen.refit,
            prices=chosen.prices,
        )

    def _unchanged(self) -> Chosen:
        nothing = ChannelSteps(
            np.zeros(self._structure.units, dtype=bool), np.zeros(self._structure.units, dtype=np.int8), {}
        )
        chosen = self._carried_out(nothing, self._statistics.consumers, "lossless")
        note = (
            "Nothing was removed: no width made the result as fast in ONNX Runtime here. Try without --round-to auto."
        )
        return dataclasses.replace(chosen, latency=self._latency(chosen.model), notes=(note,))

    def _slower(self, chosen: Chosen) -> Iterator[str]:
        if chosen.latency is None or _ratio(chosen) <= 1.1 or not chosen.removed.any():
            return
        if self._config.round_to == "auto":
            yield "No width of the result was faster in ONNX Runtime here; it is smaller all the same."
        else:
            yield (
                f"The result is {_ratio(chosen):.2f} times slower in ONNX Runtime here, whose kernels like widths that "
                "are multiples of 8 or 16: try --round-to auto."
            )

    @property
    def _statistics(self) -> Statistics:
        assert self._observed is not None
        return self._observed

    @property
    def _data(self) -> Samples:
        assert self._samples is not None
        return self._samples

    def _proven(self) -> Chosen:
        chosen = self._carried_out(self._proof.steps, self._proof.statistics, "proven")
        return dataclasses.replace(chosen, latency=self._latency(chosen.model))

    def _lossless_plan(self, uncertain: NDArray[np.bool_], keep: NDArray[np.bool_] | None = None) -> ChannelSteps:
        return plan_lossless(self._structure, self._statistics, uncertain, tolerance=self._tolerance, keep=keep)

    # ---- plans that were saved ---------------------------------------------------------------------------------

    def _carried_out_again(self, wanted: ResolvedPlan) -> Chosen:
        """The same steps that led from the plan to the result when it was made."""
        removed = wanted.removed
        if wanted.plan.mode == "proven":
            plan = part_of(self._proof.steps, self._proof.statistics, removed)
            if plan is None:
                raise UsageError(
                    "The plan removes channels that the weights do not prove redundant; drop them from it."
                )
            return self._carried_out(plan, self._proof.statistics, "proven")
        if self._observed is None:
            raise UsageError(
                f"A {wanted.plan.mode} plan is fitted to calibration data: give --calib, with more samples if you did."
            )
        if wanted.plan.mode == "budgeted":
            model = self._folded(removed)
            model, notes = self._refit(removed, model, wanted.refit) if wanted.refit != "fold" else (model, ())
            chosen = self._finished(model, removed, _budget_kind(removed), notes)
            return dataclasses.replace(chosen, refit=wanted.refit)
        with self._log.stage("plan"):
            plan = self._lossless_again(removed)
        return self._built(plan, wanted.refit)

    def _lossless_again(self, removed: NDArray[np.bool_]) -> ChannelSteps:
        """Our own plan if it is the same, else as much of it as is asked for."""
        whole = self._lossless_plan(self._uncertain)
        if (whole.removed == removed).all():
            return whole
        conservative = self._lossless_plan(self._statistics.inactive & ~self._proof.constant)
        if (conservative.removed == removed).all():
            return conservative
        part = self._lossless_plan(self._uncertain, ~removed)
        if (part.removed == removed).all():
            return part
        rest = part_of(whole, self._statistics.consumers, removed)
        if rest is None:
            raise UsageError(
                f"The plan removes {int((removed & ~part.removed).sum())} channel(s) that are no combination of others "
                'on this data; drop them from it, or set its "mode" to "budgeted".'
            )
        return rest

    def _carried_out(self, plan: ChannelSteps, statistics: tuple[ConsumerLayout, ...], mode: str) -> Chosen:
        with self._log.stage("rewrite"):
            model = rewrite(
                self._structure, fold_weights(self._structure, plan.folds, statistics, plan.removed), self.metadata
            )
        return dataclasses.replace(self._finished(model, plan.removed, plan.kind, ()), mode=mode)

    # ---- lossless ----------------------------------------------------------------------------------------------

    def _verified(self, plan: ChannelSteps, width: int) -> Chosen:
        """The whole plan, or as much of it as unseen samples confirm."""
        first = chosen = self._lossless(plan, self._uncertain, width)
        if chosen.failure is None or self._config.force:
            return chosen
        inactive = self._statistics.inactive & ~self._proof.constant
        if (plan.removed & inactive).any():
            with self._log.stage("plan"):
                conservative = self._lossless_plan(inactive)
            chosen = self._lossless(conservative, inactive, width)
        if chosen.failure is not None:
            chosen = self._carried_out(self._proof.steps, self._proof.statistics, "proven")
        if chosen.failure is not None:
            return first
        error = float("nan") if first.comparison is None else first.comparison.relative_error
        note = (
            f"Unseen samples turned down a removal of {first.removed.sum()} channels, which changed an output by "
            f"{error:.2g}; the {chosen.removed.sum()} of them that depend less on the data went. Give more varied data."
        )
        return dataclasses.replace(chosen, notes=(*chosen.notes, note))

    def _lossless(self, plan: ChannelSteps, uncertain: NDArray[np.bool_], width: int) -> Chosen:
        asked: NDArray[np.bool_] | None = None
        while (
            True
        ):  # what stays for the sake of widths may keep others: until nothing moves, so that it can be repeated
            order = np.flatnonzero(plan.removed)
            removed = equalized(self._structure, rounded(self._structure, plan.removed, order, width), order)
            if (removed == plan.removed).all() and (asked is None or (removed == asked).all()):
                return self._built(plan, self._config.refit)
            asked = removed
            with self._log.stage("plan"):
                plan = self._lossless_plan(uncertain, ~removed)

    def _built(self, plan: ChannelSteps, refit: str) -> Chosen:
        with self._log.stage("reconstruct"):
            new = fold_weights(self._structure, plan.folds, self._statistics.consumers, plan.removed)
        with self._log.stage("rewrite"):
            model = rewrite(self._structure, new, self.metadata)
        notes: tuple[str, ...] = ()
        refit = refit if refit in ("kernel", "sequential") else "fold"
        if refit != "fold" and plan.removed.any():
            model, notes = self._refit(plan.removed, model, refit)
        chosen = self._finished(model, plan.removed, plan.kind, notes)
        return dataclasses.replace(chosen, folds=plan.folds, mode="lossless", refit=refit)

    # ---- budgets -----------------------------------------------------------------------------------------------

    @property
    def _currency(self) -> Saving:
        return next((CURRENCIES[name] for name in CURRENCIES if name in self._sizes()), "parameters")

    @property
    def _by_size(self) -> bool:
        """Whether units are priced by a size that they save, not by the time."""
        return self._config.latency is None or bool(self._sizes())

    def _priced(self) -> Prices:
        """Curves by currency; the one that is wanted is added if it is not known."""
        if self._currency in self._prices:
            return self._prices
        return {**self._prices, self._currency: self._curves(self._currency, {})}

    def _priced_by_time(self) -> Sequence[Curve]:
        """Curves whose saving is multiply-accumulates times what one of them takes in its layer."""
        assert self._table is not None
        found = latency.layers(self._structure.model, self._timed_shapes)
        return self._curves("macs", {layer.node.index: self._table.rate(layer) for layer in found})

    def _curves(self, kind: Saving, rates: Mapping[int, float]) -> tuple[Curve, ...]:
        perturbations = PerturbationRunner(self._structure, self._statistics, self._data, self._runtime)
        sensitivity = consumer_sensitivity(self._structure, self._statistics, perturbations, self._log)
        expected = curves(self._structure, self._statistics, sensitivity, savings(self._structure, kind, rates))
        return tuple(measured_curves(self._structure, self._statistics, expected, perturbations, self._log))

    def _ladder(self, prices: Sequence[Curve], lossless: ChannelSteps) -> Ladder:
        # Random inputs prove nothing: what never changed on them is priced like the rest.
        free = self._proof.steps if self._config.random_calib is not None else lossless
        return build_ladder(self._structure, prices, free.removed)

    def _frontier(self, ladder: Ladder, priced: Sequence[Curve]) -> tuple[FrontierPoint, ...]:
        """Measured with folds, which are cheap: a refit does better."""
        points = []
        with self._log.stage("frontier"):
            whole = self._structure.kept_parameters(ladder.removed(0))
            for done, share in enumerate(FRONTIER):
                order = ladder.order[: round(share * len(ladder))]
                removed = equalized(self._structure, ladder.removed(len(order)), order)
                batches = self._data.batches(Part.SELECT, limit=FRONTIER_SAMPLES)
                found = self._against(self._folded(removed), batches)
                left = self._structure.kept_parameters(removed) / max(1, whole)
                expected = sum(float(np.append(0.0, curve.cost)[int(removed[curve.units].sum())]) for curve in priced)
                channels = int(removed.sum())
                points.append(FrontierPoint(left, found.relative_error, found.agreement, channels, expected**0.5))
                self._log.progress("frontier", done + 1, len(FRONTIER))
        return tuple(points)

    def _in_time(self, ladder: Ladder, lossless: ChannelSteps) -> Chosen:
        """The sizes decide alone where they are fast enough in widths that kernels like; else time is the price."""
        allowed = self._config.latency
        assert allowed is not None
        given = self._config.round_to
        widths = (given,) if isinstance(given, int) and given > 1 else WIDTHS[1:]  # others leave the fast kernels
        for width in widths if self._by_size else ():
            with self._log.stage("search"):
                count = first_small_enough(len(ladder), functools.partial(self._rung_is_small, ladder, width))
            if count is None or self._share_of_time(self._bare(ladder, count, width)) > SURE * allowed:
                continue
            chosen = self._held_to_latency(self._budgeted(ladder, width), allowed)
            if chosen.failure is None:
                return chosen
        if self._by_size:
            with self._log.stage("plan"):
                ladder = self._ladder(self._priced_by_time(), lossless)
        return self._budgeted(ladder, widths[0], allowed)

    def _removed_at(self, ladder: Ladder, count: int, width: int) -> NDArray[np.bool_]:
        order = ladder.order[:count]
        return equalized(self._structure, rounded(self._structure, ladder.removed(count), order, width), order)

    def _bare(self, ladder: Ladder, count: int, width: int) -> graph.Model:
        """A rung without folds: its size and its speed are those of the result."""
        return rewrite(self._structure, Removal(self._removed_at(ladder, count, width)), "")

    def _rung_is_small(self, ladder: Ladder, width: int, count: int) -> bool:
        return self._is_small(self._cost(self._bare(ladder, count, width)))

    def _budgeted(self, ladder: Ladder, width: int, allowed: float | None = None) -> Chosen:
        """Sizes alone ask for the largest model that is small enough; errors alone for the smallest good one.

        Args:
            ladder: the plans.
            width: kept counts are rounded up to multiples of it.
            allowed: share of the original's time that the plan may take; None if time plays no part in it.
        """
        refitted = self._config.refit in ("auto", "kernel", "sequential")
        judged = self._judged()

        def build(count: int, refit_it: bool) -> tuple[graph.Model, NDArray[np.bool_], tuple[str, ...]]:
            removed = self._removed_at(ladder, count, width)
            model = self._folded(removed)
            if not refit_it or not removed.any():
                return model, removed, ()
            model, notes = self._refit(removed, model, self._refit_mode)
            return model, removed, notes

        if self._config.sized:
            chosen = self._small_enough(ladder, width, build, refitted, allowed)
            return dataclasses.replace(chosen, refit=self._refit_mode if refitted else "fold")
        with self._log.stage("search"):
            count, needs_refit = last_good_enough(
                ladder.rungs(),
                lambda rung: judged(build(rung, False)[0]),
                (lambda rung: judged(build(rung, True)[0])) if refitted else None,
            )
        tries = [(count, needs_refit)] + [(count, True)] * (refitted and not needs_refit)
        tries += [(rung, refitted) for rung in on_grid(ladder.rungs(), count)]
        turned_down = 0
        while True:
            rung, refit_it = tries[turned_down]
            model, removed, notes = build(rung, refit_it)
            chosen = self._finished(model, removed, _budget_kind(removed), notes)
            chosen = dataclasses.replace(chosen, refit=self._refit_mode if refit_it else "fold")
            if chosen.failure is None or turned_down == len(tries) - 1:
                break
            turned_down += 1
        if rung < count:
            note = f"Unseen samples turned down {turned_down} larger reduction(s) that the others had allowed."
            chosen = dataclasses.replace(chosen, notes=(*chosen.notes, note))
        return chosen

    def _small_enough(
        self,
        ladder: Ladder,
        width: int,
        build: Callable[[int, bool], tuple[graph.Model, NDArray[np.bool_], tuple[str, ...]]],
        refitted: bool,
        allowed: float | None,
    ) -> Chosen:
        """Where time counts, what was measured corrects what the table says, a few times."""
        aim = allowed

        def small(count: int) -> bool:
            model = self._bare(ladder, count, width)
            return self._is_small(self._cost(model)) and (aim is None or self._predicted(model) <= aim)

        best: Chosen | None = None
        for _ in range(CORRECTIONS if allowed is not None else 1):
            with self._log.stage("search"):
                count = first_small_enough(len(ladder), small)
            model, removed, notes = build(len(ladder) if count is None else count, refitted)
            # A refit may add a few biases that were not there.
            while count is not None and count < len(ladder) and not self._is_small(self._cost(model)):
                count = min(len(ladder), count + max(1, len(ladder) // 200))
                model, removed, notes = build(count, refitted)
            chosen = self._finished(model, removed, _budget_kind(removed), notes)
            if allowed is None or aim is None:
                return chosen
            chosen = self._held_to_latency(chosen, allowed)
            reached = _ratio(chosen)
            if best is None or _merit(best) < _merit(chosen):
                best = chosen
            if (count is None and reached > allowed) or (count == 0) or CLOSE * allowed <= reached <= allowed:
                break
            aim = min(1.0, aim * (1 + CLOSE) / 2 * allowed / reached)
        assert best is not None
        return best

    def _share_of_time(self, model: graph.Model) -> float:
        found = self._latency(model)
        return 1.0 if found is None else found[1] / max(found[0], 1e-9)

    def _held_to_latency(self, chosen: Chosen, allowed: float) -> Chosen:
        """The result with its measured latency, failed where that is more than allowed."""
        chosen = dataclasses.replace(chosen, latency=self._latency(chosen.model))
        reached = _ratio(chosen)
        failure = chosen.failure
        if failure is None and reached > allowed:
            failure = BudgetError(
                f"--latency {allowed:g} was not reached: the smallest result tried takes {reached:.3f} of the "
                "original's time. Nothing was written; ask for at least that much."
            )
        return dataclasses.replace(chosen, failure=failure, achieved={**chosen.achieved, "latency": reached})

    @functools.cached_property
    def _timed_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the inputs in the run that latency is measured on."""
        feeds = next(iter(self._data.batches(limit=1))).feeds
        return {name: tuple(value.shape) for name, value in feeds.items()}

    @functools.cached_property
    def _table(self) -> latency.LatencyTable | None:
        """Latencies of the original's layers; None where latency is not asked for."""
        if self._config.latency is None:
            return None
        path = Path(self._config.latency_table) if self._config.latency_table is not None else None
        if path is not None and path.exists():
            return latency.LatencyTable.load(path)
        with self._log.stage("latency table"):
            found = latency.layers(self._structure.model, self._timed_shapes)
            table = latency.measure_table(found, self._structure.model.opset, self._runtime)
        if path is not None:
            table.save(path)
        return table

    def _predicted(self, model: graph.Model) -> float:
        """Share of the original's latency that the table expects of a result."""
        assert self._table is not None
        shapes = self._timed_shapes
        before = self._table.total(latency.layers(self._reference, shapes))
        return self._table.total(latency.layers(model, shapes)) / max(before, 1e-12)

    def _sizes(self) -> dict[str, float]:
        given = {kind: getattr(self._config, kind) for kind in SIZES}
        return {kind: share for kind, share in given.items() if share is not None}

    def _is_small(self, after: Cost) -> bool:
        return all(self._share(kind, after) <= share for kind, share in self._sizes().items())

    def _share(self, kind: str, after: Cost) -> float:
        return float(getattr(after, SIZES[kind]) / max(1, getattr(self.before, SIZES[kind])))

    def _judged(self) -> Callable[[graph.Model], bool]:
        """Whether a result is good enough on the samples that decide."""
        probes = itertools.count(1)

        def good(model: graph.Model) -> bool:
            measured = self._quality(model, self._compared(model, Part.SELECT))
            done = next(probes)
            self._log.progress("search", done, max(done, PROBES))
            return all(self._holds(kind, value) for kind, value in measured.items())

        return good

    def _quality(self, model: graph.Model, found: Comparison | None) -> dict[str, float | None]:
        measured: dict[str, float | None] = {}
        if self._config.max_error is not None:
            measured["max_error"] = None if found is None else found.relative_error
        if self._config.min_agreement is not None:
            measured["min_agreement"] = None if found is None else found.agreement
        if self._config.eval is not None:
            if self._metric is None:
                self._metric = float(self._config.eval(self._runtime.open(self._reference)))
            measured["max_drop"] = self._metric - float(self._config.eval(self._runtime.open(model)))
        return measured

    def _holds(self, kind: str, value: float | None) -> bool:
        if value is None or np.isnan(value):
            return False
        limit = getattr(self._config, kind)
        return bool(value >= limit if kind == "min_agreement" else value <= limit)

    # ---- building and judging ----------------------------------------------------------------------------------

    def _folded(self, removed: NDArray[np.bool_]) -> graph.Model:
        folds = folds_of(self._structure, self._statistics, removed, {})
        return rewrite(
            self._structure, fold_weights(self._structure, folds, self._statistics.consumers, removed), self.metadata
        )

    @property
    def _refit_mode(self) -> str:
        return "kernel" if self._config.refit == "kernel" else "sequential"

    def _refit(self, removed: NDArray[np.bool_], model: graph.Model, mode: str) -> tuple[graph.Model, tuple[str, ...]]:
        if not removed.any():
            return model, ()
        with self._log.stage("refit"):
            cut = Cut(self._structure, removed, trace(model, resolve(model)))
            found = refit(
                cut, self._data, self._runtime, self._log,
                mode="kernel" if mode == "kernel" else "sequential",
                seed=self._config.seed,
            )  # fmt: skip
            notes = []
            if found.skipped:
                names = ", ".join(found.skipped[:3]) + (" and others" if len(found.skipped) > 3 else "")
                notes.append(f"{len(found.skipped)} layer(s) are too wide to be refitted and keep their fold: {names}.")
            refitted = apply_edits(model, found.edits, self.metadata)
            if self._config.refit == "auto" and self._errs_less(model, refitted):
                return model, ("The folds err less than a refit, on the samples that choose; they were kept.",)
            return refitted, tuple(notes)

    def _errs_less(self, folded: graph.Model, refitted: graph.Model) -> bool:
        """Whether SELECT samples speak for the folds: where these are exact a refit only adds noise."""
        if not len(self._data.parts[Part.SELECT]):
            return False
        one, other = (self.compared(model, self._data, Part.SELECT) for model in (folded, refitted))
        return one.relative_error < other.relative_error and (one.agreement or 0.0) >= (other.agreement or 0.0)

    def _cost(self, model: graph.Model) -> Cost:
        return cost(self.stored(model), self._shapes, self._batch)

    def _is_lossless(self, error: float) -> bool:
        """Whether an output error is small enough, or rounding: on few samples any difference can look large."""
        return error <= LOSSLESS_VERIFIED_ERROR or error <= OUTPUT_ROUNDINGS * self._rounding_error

    @functools.cached_property
    def _rounding_error(self) -> float:
        """What one rounding of all weights does to the outputs of the original; no error below it counts."""
        moved = perturbed_one_ulp(self._reference if self._half is None else self._half, self._config.seed)
        found = self._compared(moved if self._half is None else to_float32(moved), Part.VERIFY)
        return 0.0 if found is None else found.relative_error

    def stored(self, model: graph.Model) -> graph.Model:
        """A result as it is written: in the precision of the original."""
        return model if self._half is None else to_stored_dtype(model, self._half)

    def _compared(self, model: graph.Model, part: Part) -> Comparison | None:
        if self._samples is None or not len(self._samples.parts[part]):
            return None
        return self.compared(model, self._samples, part)

    def compared(self, model: graph.Model, samples: Samples, *parts: Part) -> Comparison:
        """A result against the original, on some parts of some samples; on all without a part."""
        return self._against(model, samples.batches(*parts))

    def _against(self, model: graph.Model, batches: Iterator[Batch]) -> Comparison:
        wanted, runs = self._config.agreement_output, self.shares.runs
        return compare(*self.sessions(model), batches, agreement_output=wanted, runs=runs)

    def sessions(self, model: graph.Model) -> tuple[Session, Session]:
        """Of what a result is compared with, and of the result."""
        return self._original or self._opened(self._reference), self._opened(model)

    def _opened(self, model: graph.Model) -> Session:
        """A session for several runs at a time."""
        return self.shares.each.open(model)

    def stress_failure(self, found: Comparison) -> LindepError | None:
        """Why a result must not be used after what was found on a second data set; None if all is well."""
        limits: list[tuple[str, float | None, bool]] = []
        if self._config.max_error is not None:
            kept = self._holds("max_error", found.relative_error)
            limits.append((f"--max-error {self._config.max_error:g}", found.relative_error, kept))
        if self._config.min_agreement is not None:
            kept = self._holds("min_agreement", found.agreement)
            limits.append((f"--min-agreement {self._config.min_agreement:g}", found.agreement, kept))
        if self.mode != "budgeted":
            kept = self._is_lossless(found.relative_error)
            limits.append((f"the lossless bound {LOSSLESS_VERIFIED_ERROR:g}", found.relative_error, kept))
        for name, value, kept in limits:
            if not kept:
                reached = "it could not be measured" if value is None else f"it is {value:.4g}"
                worst = ", ".join(map(str, found.worst_samples[:3])) or "none"
                return VerificationError(
                    f"{name} does not hold on the stress data: there {reached} (worst samples: {worst}). Nothing was "
                    "written; add samples like these to the calibration data."
                )
        return None

    def _finished(
        self, model: graph.Model, removed: NDArray[np.bool_], kind: NDArray[np.int8], notes: tuple[str, ...]
    ) -> Chosen:
        with self._log.stage("verify"):
            if self._half is not None:  # what is judged has been rounded like what is written
                model = to_float32(self.stored(model))
            found = self._compared(model, Part.VERIFY)
            after = self._cost(model)
            achieved: dict[str, float | None] = {name: self._share(name, after) for name in self._sizes()}
            achieved.update(self._quality(model, found))
        return Chosen(model, removed, kind, after, found, None, achieved, self._failure(achieved, found), notes)

    def _failure(self, achieved: Mapping[str, float | None], found: Comparison | None) -> LindepError | None:
        for name, share in self._sizes().items():
            reached = achieved[name]
            asked = self._replayed is None or name in self._replayed.enforced  # an edited plan may keep more
            if asked and reached is not None and reached > share:
                return BudgetError(
                    f"--{name} {share:g} cannot be reached: with everything removed that can go, "
                    f"{math.ceil(1e4 * reached) / 1e4:g} of the "
                    "original are left. Nothing was written; ask for at least that much."
                )
        for name in ("max_error", "min_agreement", "max_drop"):
            if name in achieved and not self._holds(name, achieved[name]):
                value = achieved[name]
                reached_text = "could not be measured" if value is None else f"is {value:.4g}"
                flag = "--" + name.replace("_", "-")
                return BudgetError(
                    f"{flag} {getattr(self._config, name):g} does not hold together with the other budgets: on unseen "
                    f"samples it {reached_text}. Nothing was written; loosen one of them."
                )
        if self.mode != "budgeted" and found is not None and not self._is_lossless(found.relative_error):
            return VerificationError(
                f"The result differs from the original by {found.relative_error:.2g} on unseen samples, more than "
                f"the {LOSSLESS_VERIFIED_ERROR:.2g} allowed. Nothing was written; give more or more varied data."
            )
        return None

    def _latency(self, model: graph.Model) -> tuple[float, float] | None:
        if self._samples is None:
            return None
        feeds = next(iter(self._samples.batches(limit=1))).feeds
        seconds = self._config.benchmark or (TIMED if self._config.latency is None else DECISIVE)
        before, after = self._runtime.time((self._reference, model), feeds, seconds=seconds)
        return before, after


def rounded(
    structure: Structure, removed: NDArray[np.bool_], order: NDArray[np.int64], multiple: int
) -> NDArray[np.bool_]:
    """Put back the units that went last until each group keeps a multiple of `multiple`, or all it had.

    Args:
        structure: the traced model.
        removed: (units,) bool.
        order: the removed units in the order in which they went.
        multiple: of the number that is kept.
    """
    result = removed.copy()
    place = np.zeros(structure.units, dtype=np.int64)
    place[order] = np.arange(len(order))
    for group in structure.groups if multiple > 1 else ():
        gone = group.units[removed[group.units]]
        kept = len(group.units) - len(gone)
        wanted = min(len(group.units), -(-kept // multiple) * multiple)
        back = gone[np.argsort(-place[gone], kind="stable")][: wanted - kept]
        result[back] = False
    return result


def _budget_kind(removed: NDArray[np.bool_]) -> NDArray[np.int8]:
    return np.zeros(len(removed), dtype=np.int8)


def _merit(chosen: Chosen) -> tuple[bool, float]:
    """Of results that are fast enough the slowest removed least; of the others the fastest is the best."""
    return (True, _ratio(chosen)) if chosen.failure is None else (False, -_ratio(chosen))


def _ratio(chosen: Chosen) -> float:
    return chosen.latency[1] / max(chosen.latency[0], 1e-9) if chosen.latency is not None else 1.0


def _first_shapes(samples: Samples | None) -> tuple[dict[str, tuple[int, ...]], int]:
    if samples is None:
        return {}, 1
    first = next(iter(samples.batches(limit=1)))
    return {name: tuple(value.shape) for name, value in first.feeds.items()}, first.size

"""From options to one result: one function for each way to look for it.

Lossless mode has one plan, and falls back on smaller ones if held-out samples turn it down. With a budget the plan is a
point of the path (see `planning.path`) that a search (see `planning.search`) finds: the cheap fold judges the points
first, the refit those beyond. What was found is then held to the budgets on samples that nothing else has looked at.

Widths keep to the multiples of a rule that no timing decides. A measurement can only turn a result down: then the same
is looked for with wider steps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lindep_onnx.errors import BudgetError, UsageError
from lindep_onnx.moves.channels import ChannelRemoval
from lindep_onnx.moves.lossless import part_of
from lindep_onnx.planning.latency import by_latency
from lindep_onnx.planning.lossless import lossless, lossless_anyway
from lindep_onnx.planning.path import Path, Taken
from lindep_onnx.planning.plan_file import ResolvedPlan
from lindep_onnx.planning.pricing import frontier
from lindep_onnx.planning.round import Round
from lindep_onnx.planning.search import first_small_enough, last_good_enough, on_grid
from lindep_onnx.planning.values import Candidate, Evaluation, FrontierPoint, Result
from lindep_onnx.structure.steps import ChannelSteps, Curves

#: What the steps of widths are widened to, one after the other, where a result is slower than the original.
WIDER = (8, 16)
UNCHANGED = "Nothing can be removed from this model, so that nothing was calibrated, priced or timed."


def choose(round_: Round) -> Result:
    """The result that the options ask for; look at its `failure`."""
    config = round_.config
    if not any(move.count(round_.piece.structure) for move in round_.piece.moves):
        return _unchanged(round_)
    if round_.piece.statistics is None or config.proven_only:
        best = round_.result(*round_.proven())
        return _with_kept(round_, best, round_.piece.proof.steps)
    with round_.log.stage("plan"):
        free = round_.free(round_.piece.uncertain)
        curves, prices = round_.priced() if config.budgeted else ({}, {})
    if config.latency is not None:
        best = by_latency(round_, curves, free)
    else:
        best = _never_slower(round_, lambda own: _found(own, curves, free))
    if not config.budgeted:
        best = _with_kept(round_, best, free)
    return replace(best, prices=prices)


def _unchanged(round_: Round) -> Result:
    """The original, where nothing can be removed: nothing is priced, searched for or timed."""
    candidate, evaluation = round_.proven()
    if round_.judge.budgets.latency is not None:
        evaluation = round_.judge.timed(evaluation, 1.0)
    if isinstance(evaluation.failure, BudgetError):
        evaluation = replace(evaluation, failure=BudgetError(f"{evaluation.failure} {_why(round_)}"))
    return Result(candidate, evaluation, None, (*candidate.notes, UNCHANGED), widths=round_.rule.words)


def _why(round_: Round) -> str:
    """Why nothing can be removed: the reason that holds the most channels."""
    structure = round_.piece.structure
    held = Counter[str]()
    for refusal in (refusal for move in round_.piece.moves for refusal in move.refusals(structure)):
        held[refusal.reason.message] += refusal.channels
    if not held.total():
        return "The model has no channels to remove."
    ((reason, most),) = held.most_common(1)
    return f"All {held.total():,} channels have to stay, {most:,} of them because {reason}."


def _with_kept(round_: Round, result: Result, free: ChannelSteps) -> Result:
    """A result that says how many channels cost nothing but stay: the rest of a step, or all where it is unchanged."""
    order = np.flatnonzero(free.removed)
    whole = ChannelRemoval().admissible(round_.piece.structure, free.removed, order, round_.rule)
    kept = len(order) - int((whole if result.removed.any() else result.removed).sum())
    return replace(result, kept_for_widths=kept)


def _found(round_: Round, curves: Curves, free: ChannelSteps) -> tuple[Candidate, Evaluation]:
    """What the options ask for, by the rule of the round."""
    if not round_.config.budgeted:
        return lossless(round_, free)
    with round_.log.stage("plan"):
        path = round_.path(curves, free)
    return (by_size if round_.judge.budgets.sized else by_quality)(round_, path, free)


def preview(round_: Round) -> tuple[FrontierPoint, ...]:
    """What other reductions would cost; empty without data."""
    if round_.piece.statistics is None:
        return ()
    with round_.log.stage("plan"):
        curves, _ = round_.priced()
        path = round_.path(curves, round_.free(round_.piece.uncertain))
    timed = round_.judge.budgets.latency is not None and not round_.judge.budgets.sizes  # sizes may be fast enough
    times = round_.times if timed else None
    return frontier(path, curves, round_.builder, round_.judge, round_.rule, times)


def retrained(round_: Round, result: Result, weights: Mapping[str, NDArray[Any]]) -> Result:
    """A result with other weights, held to the budgets anew. They do not make the same widths slower.

    Args:
        round_: the one that it was chosen in.
        result: the result so far.
        weights: new values of stored tensors.
    """
    candidate, evaluation = round_.finish(round_.builder.with_weights(result.candidate, weights))
    if "latency" in result.evaluation.achieved:
        evaluation = replace(
            evaluation, achieved={**evaluation.achieved, "latency": result.evaluation.achieved["latency"]}
        )
    return replace(result, candidate=candidate, evaluation=evaluation)


# ---- plans that were saved --------------------------------------------------------------------------------------


def replayed(round_: Round, wanted: ResolvedPlan) -> Result:
    """The same steps that led from the plan to the result when it was made."""
    result = round_.result(*round_.finish(_again(round_, wanted)))
    return replace(result, notes=(*wanted.notes, *result.notes))


def _again(round_: Round, wanted: ResolvedPlan) -> Candidate:
    proof, builder, removed = round_.piece.proof, round_.builder, wanted.removed
    if wanted.plan.mode == "proven":
        steps = part_of(proof.steps, proof.statistics, removed)
        if steps is None:
            raise UsageError("The plan removes channels that the weights do not prove redundant; drop them from it.")
        return builder.proven(steps)
    if round_.piece.statistics is None:
        raise UsageError(
            f"A {wanted.plan.mode} plan is fitted to calibration data: give --calib, with more samples if you did."
        )
    if wanted.plan.mode == "budgeted":
        taken = tuple(
            Taken.of(move, wanted.steps[move.name]) for move in round_.piece.moves if move.name in wanted.steps
        )
        return builder.fitted(taken) if wanted.refit == "fold" else builder.refitted(taken, wanted.refit)
    with round_.log.stage("plan"):
        steps = _lossless_again(round_, removed)
    return builder.lossless(steps, wanted.refit)


def _lossless_again(round_: Round, removed: NDArray[np.bool_]) -> ChannelSteps:
    """Our own decision if it is the same, else as much of it as is asked for."""
    whole = round_.free(round_.piece.uncertain)
    if (whole.removed == removed).all():
        return whole
    conservative = round_.free(round_.inactive)
    if (conservative.removed == removed).all():
        return conservative
    part = round_.free(round_.piece.uncertain, ~removed)
    if (part.removed == removed).all():
        return part
    rest = part_of(whole, round_.piece.known.consumers, removed)
    if rest is None:
        raise UsageError(
            f"The plan removes {int((removed & ~part.removed).sum())} channel(s) that are no combination of others "
            'on this data; drop them from it, or set its "mode" to "budgeted".'
        )
    return rest


# ---- widths -----------------------------------------------------------------------------------------------------


def _never_slower(round_: Round, find: Callable[[Round], tuple[Candidate, Evaluation]]) -> Result:
    """The result by the rule; by wider steps, up to the original's widths, where that is measured to be slower.

    A size that is asked for has to be met: where every width is slower, the least slow result is the one.
    """
    first = best = round_.result(*find(round_))
    if round_.rule.fixed is not None:
        return first
    for least in WIDER:
        if not _slow(best):
            break
        wider = replace(round_, rule=round_.rule.widened(least))
        found = wider.result(*find(wider))
        if found.failure is None and found.ratio < best.ratio:
            best = replace(found, notes=(*found.notes, _widened(first, f"Widths are multiples of {least}")))
    if not _slow(best) or round_.judge.budgets.sized:
        return best
    nothing = ChannelSteps.of(np.zeros(round_.piece.structure.units, dtype=bool))
    unchanged = round_.result(*round_.finish(round_.builder.lossless(nothing, "fold")))
    channels = int(first.removed.sum())
    note = _widened(first, f"Nothing was removed: {channels} channels could be")
    return replace(unchanged, notes=(f"{note} Use --round-to 1 to remove them anyway.",))


def _slow(result: Result) -> bool:
    return result.failure is None and result.latency is not None and result.latency.slower


def _widened(first: Result, what: str) -> str:
    return f"{what}, because without them the result takes {first.ratio:.2f} times as long as the original here."


# ---- budgets ----------------------------------------------------------------------------------------------------


def by_size(round_: Round, path: Path, free: ChannelSteps) -> tuple[Candidate, Evaluation]:
    """The largest model that is small enough; the smallest there is where none is.

    What costs nothing comes first: where that is small enough, nothing else is done.

    Args:
        round_: the model and what holds its results to account.
        path: the plans.
        free: what costs nothing.
    """
    with round_.log.stage("search"):
        count = first_small_enough(len(path), lambda count: round_.excess(path, count))
    found = lossless_anyway(round_, free) if count == 0 else None
    return found or round_.finish(round_.small_candidate(path, count))


def by_quality(round_: Round, path: Path, free: ChannelSteps) -> tuple[Candidate, Evaluation]:
    """The smallest model that is good enough.

    Args:
        round_: the model and what holds its results to account.
        path: the plans.
        free: what costs nothing.
    """
    builder, mode, good = round_.builder, round_.refit_mode, round_.judge.good()

    def build(count: int, refitted: bool) -> Candidate:
        taken = builder.decide(path, count, round_.rule)
        return builder.refitted(taken, mode) if refitted else builder.fitted(taken)

    may_refit = mode != "fold"
    with round_.log.stage("search"):
        count, needs_refit = last_good_enough(
            path.stops(),
            lambda stop: good(build(stop, False).model),
            (lambda stop: good(build(stop, True).model)) if may_refit else None,
        )
    tries = [(count, needs_refit)] + [(count, True)] * (may_refit and not needs_refit)
    tries += [(stop, may_refit) for stop in on_grid(path.stops(), count)]
    for stop, refitted in tries:
        candidate, evaluation = round_.finish(build(stop, refitted))
        if evaluation.failure is None:
            break
    found = lossless_anyway(round_, free) if stop == 0 else None
    if found is not None:
        candidate, evaluation = found
    if stop < count:
        turned_down = tries.index((stop, refitted))
        note = f"Held-out samples turned down {turned_down} larger reduction(s) that the others had allowed."
        candidate = replace(candidate, notes=(*candidate.notes, note))
    return candidate, evaluation

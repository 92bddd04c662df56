"""From options to one result: one function for each way to look for it.

Lossless mode has one plan, and falls back on smaller ones if unseen samples turn it down. With a budget the plan is a
point of the path (see `planning.path`) that a search (see `planning.search`) finds: the cheap fold judges the points
first, the refit those beyond. What was found is then held to the budgets on samples that nothing else has looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lindep_onnx.errors import TimingError, UsageError
from lindep_onnx.log import Log
from lindep_onnx.model.ir import Model
from lindep_onnx.moves.base import Exactness
from lindep_onnx.moves.channels import rounded
from lindep_onnx.moves.lossless import lossless_steps, part_of
from lindep_onnx.options import LOSSLESS_SITE_ERROR, Config
from lindep_onnx.planning.budgets import Budgets
from lindep_onnx.planning.builder import Builder, Workpiece
from lindep_onnx.planning.judge import Judge
from lindep_onnx.planning.path import Path, Taken
from lindep_onnx.planning.plan_file import ResolvedPlan
from lindep_onnx.planning.pricing import TimeTable, frontier, path_of, price
from lindep_onnx.planning.search import first_small_enough, last_good_enough, on_grid
from lindep_onnx.planning.values import Candidate, Evaluation, FrontierPoint, Result
from lindep_onnx.runtime.backend import Runtime
from lindep_onnx.structure.placement import equalized
from lindep_onnx.structure.steps import ChannelSteps, Curves, Prices

#: Spacings of the numbers of a half-precision model that a consumer may err by in lossless mode, beside the bound.
CONSUMER_ROUNDINGS = 1.0
#: Widths that `--round-to auto` tries in turn: ONNX Runtime's kernels work on blocks of 8 or 16 channels.
WIDTHS = (1, 8, 16)
#: A result counts as faster only by more than timings wobble.
FASTER = 0.98
#: How often the widths are corrected by what was measured, and the share of the time asked for that is close enough.
CORRECTIONS, CLOSE = 5, 0.9
#: Share of the time asked for that a plan must take for a second measurement to find the same.
SURE = 0.97


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
        original: whether the model is the original, and not what an earlier round left of it.
    """

    piece: Workpiece
    builder: Builder
    judge: Judge
    times: TimeTable
    config: Config
    options: Mapping[str, Any]
    rounding: float
    prices: Prices
    original: bool

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
        return Exactness(max(LOSSLESS_SITE_ERROR, CONSUMER_ROUNDINGS * self.rounding), uncertain, keep)

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
        """What the search ends with, timed.

        Raises:
            TimingError: it cannot be timed, and a budget depends on it.
        """
        notes = (*candidate.notes, *self.times.notes)
        try:
            latency = self.judge.latency(candidate.model)
        except TimingError as error:
            if self.judge.budgets.latency is not None:
                raise
            latency, notes = None, (*notes, f"No latency was measured. {error}")
        return Result(candidate, evaluation, latency, notes)

    def proven(self) -> tuple[Candidate, Evaluation]:
        """Without what the weights prove redundant."""
        return self.finish(self.builder.proven(self.piece.proof.steps))


def choose(round_: Round) -> Result:
    """The result that the options ask for; look at its `failure`."""
    config = round_.config
    if round_.piece.statistics is None or config.proven_only:
        return round_.result(*round_.proven())
    with round_.log.stage("plan"):
        free = round_.free(round_.piece.uncertain)
        curves, prices = _priced(round_) if config.budgeted else ({}, {})
        path = path_of(round_.piece, curves, _for_nothing(round_, free)) if config.budgeted else None
    points: tuple[FrontierPoint, ...] = ()
    if path is None:
        best = _automatic(round_, lambda width: lossless(round_, free, width))
    else:
        if round_.original:
            points = frontier(path, curves, round_.builder, round_.judge, round_.log)
        if config.latency is not None:
            best = by_latency(round_, path, free)
        else:
            search = by_size if round_.judge.budgets.sized else by_quality
            best = _automatic(round_, lambda width: search(round_, path, width))
    return replace(best, notes=(*best.notes, *_slower(config, best)), prices=prices, frontier=points)


def preview(round_: Round) -> tuple[FrontierPoint, ...]:
    """What budgets would cost, where none is asked for; empty without data."""
    if round_.piece.statistics is None:
        return ()
    with round_.log.stage("plan"):
        curves, _ = _priced(round_)
        path = path_of(round_.piece, curves, _for_nothing(round_, round_.free(round_.piece.uncertain)))
    return frontier(path, curves, round_.builder, round_.judge, round_.log)


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
    return replace(result, candidate=candidate, evaluation=evaluation, frontier=())


# ---- plans that were saved --------------------------------------------------------------------------------------


def replayed(round_: Round, wanted: ResolvedPlan) -> Result:
    """The same steps that led from the plan to the result when it was made."""
    result = round_.result(*round_.finish(_again(round_, wanted)))
    return replace(result, notes=(*wanted.notes, *result.notes, *_slower(round_.config, result)))


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


def _automatic(round_: Round, find: Callable[[int], tuple[Candidate, Evaluation]]) -> Result:
    """The first width that makes the result faster, the fastest else; nothing at all where that is slower and free."""
    config = round_.config
    best: Result | None = None
    for width in WIDTHS if config.round_to == "auto" else (int(config.round_to),):
        found = round_.result(*find(width))
        if best is None or (best.failure is not None, best.ratio) > (found.failure is not None, found.ratio):
            best = found
        if best.failure is None and best.ratio <= FASTER:
            break
    assert best is not None
    if config.round_to == "auto" and not round_.judge.budgets.sized and best.ratio > 1 / FASTER:
        nothing = ChannelSteps.of(np.zeros(round_.piece.structure.units, dtype=bool))
        unchanged = round_.result(*round_.finish(round_.builder.lossless(nothing, "fold")))
        note = (
            "Nothing was removed: no width made the result as fast in ONNX Runtime here. Try without --round-to auto."
        )
        best = replace(unchanged, notes=(note,))
    return best


def _slower(config: Config, result: Result) -> Iterator[str]:
    if result.latency is None or result.ratio <= 1.1 or not result.candidate.decision:
        return
    if config.round_to == "auto":
        yield "No width of the result was faster in ONNX Runtime here; it is smaller all the same."
    else:
        yield (
            f"The result is {result.ratio:.2f} times slower in ONNX Runtime here, whose kernels like widths that "
            "are multiples of 8 or 16: try --round-to auto."
        )


# ---- lossless ---------------------------------------------------------------------------------------------------


def lossless(round_: Round, free: ChannelSteps, width: int) -> tuple[Candidate, Evaluation]:
    """Everything that costs nothing, or as much of it as unseen samples confirm.

    Args:
        round_: the model and what holds its results to account.
        free: what costs nothing.
        width: kept counts are rounded up to multiples of it.
    """
    first = found = _in_widths(round_, free, round_.piece.uncertain, width)
    if found[1].failure is None or round_.config.force:
        return found
    if (free.removed & round_.inactive).any():
        with round_.log.stage("plan"):
            conservative = round_.free(round_.inactive)
        found = _in_widths(round_, conservative, round_.inactive, width)
    if found[1].failure is not None:
        found = round_.proven()
    if found[1].failure is not None:
        return first
    candidate, evaluation = found
    error = float("nan") if first[1].comparison is None else first[1].comparison.relative_error
    wanted, went = (int(own.decision.removed.sum()) for own in (first[0], candidate))
    note = (
        f"Unseen samples turned down a removal of {wanted} channels, which changed an output by "
        f"{error:.2g}; the {went} of them that depend less on the data went. Give more "
        "varied data."
    )
    return replace(candidate, notes=(*candidate.notes, note)), evaluation


def _in_widths(
    round_: Round, steps: ChannelSteps, uncertain: NDArray[np.bool_], width: int
) -> tuple[Candidate, Evaluation]:
    """What stays for the sake of widths may keep others: until nothing moves, so that it can be repeated."""
    structure = round_.piece.structure
    asked: NDArray[np.bool_] | None = None
    while True:
        order = np.flatnonzero(steps.removed)
        removed = equalized(structure, rounded(structure, steps.removed, order, width), order)
        if (removed == steps.removed).all() and (asked is None or (removed == asked).all()):
            return round_.finish(round_.builder.lossless(steps, round_.config.refit))
        asked = removed
        with round_.log.stage("plan"):
            steps = round_.free(uncertain, ~removed)


# ---- budgets ----------------------------------------------------------------------------------------------------


def _priced(round_: Round) -> tuple[Curves, Prices]:
    """Curves, and all that are known by now of those that sizes are priced by."""
    if not _by_size(round_.judge.budgets):
        return _priced_by_time(round_), {}
    saving = round_.judge.budgets.priced_by
    known = round_.prices.get(saving, {})
    if all(move.name in known for move in round_.piece.moves):
        return known, round_.prices
    found = price(round_.piece, saving, round_.runtime, round_.log)
    return found, {**round_.prices, saving: found}


def _priced_by_time(round_: Round) -> Curves:
    """Curves whose saving is multiply-accumulates times what one of them takes in its layer."""
    return price(round_.piece, "macs", round_.runtime, round_.log, round_.times.rates())


def _by_size(budgets: Budgets) -> bool:
    """Whether steps are priced by a size that they save, not by the time."""
    return budgets.latency is None or bool(budgets.sizes)


def _for_nothing(round_: Round, free: ChannelSteps) -> NDArray[np.bool_]:
    """Random inputs prove nothing: what never changed on them is priced like the rest."""
    return (round_.piece.proof.steps if round_.config.random_calib is not None else free).removed


def _refit_mode(config: Config) -> str:
    if config.refit == "fold":
        return "fold"
    return "kernel" if config.refit == "kernel" else "sequential"


def _candidate(round_: Round, path: Path, count: int, width: int) -> Candidate:
    """A point of the path, refitted as the options ask for."""
    taken, mode = round_.builder.decide(path, count, width), _refit_mode(round_.config)
    return round_.builder.fitted(taken) if mode == "fold" else round_.builder.refitted(taken, mode)


def by_size(round_: Round, path: Path, width: int) -> tuple[Candidate, Evaluation]:
    """The largest model that is small enough; the smallest there is where none is.

    Args:
        round_: the model and what holds its results to account.
        path: the plans.
        width: kept counts are rounded up to multiples of it.
    """
    with round_.log.stage("search"):
        count = first_small_enough(len(path), lambda count: _small(round_, path, count, width))
    return round_.finish(_small_candidate(round_, path, count, width))


def _small(round_: Round, path: Path, count: int, width: int) -> bool:
    return round_.judge.budgets.small(round_.judge.cost(_bare(round_, path, count, width)))


def _bare(round_: Round, path: Path, count: int, width: int) -> Model:
    return round_.builder.bare(round_.builder.decide(path, count, width))


def _small_candidate(round_: Round, path: Path, count: int | None, width: int) -> Candidate:
    """The first count that is small enough, or a little more: a refit may add a few biases that were not there."""
    candidate = _candidate(round_, path, len(path) if count is None else count, width)
    while (
        count is not None and count < len(path) and not round_.judge.budgets.small(round_.judge.cost(candidate.model))
    ):
        count = min(len(path), count + max(1, len(path) // 200))
        candidate = _candidate(round_, path, count, width)
    return candidate


def by_quality(round_: Round, path: Path, width: int) -> tuple[Candidate, Evaluation]:
    """The smallest model that is good enough.

    Args:
        round_: the model and what holds its results to account.
        path: the plans.
        width: kept counts are rounded up to multiples of it.
    """
    builder, mode, good = round_.builder, _refit_mode(round_.config), round_.judge.good()

    def build(count: int, refitted: bool) -> Candidate:
        taken = builder.decide(path, count, width)
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
    if stop < count:
        turned_down = tries.index((stop, refitted))
        note = f"Unseen samples turned down {turned_down} larger reduction(s) that the others had allowed."
        candidate = replace(candidate, notes=(*candidate.notes, note))
    return candidate, evaluation


def by_latency(round_: Round, path: Path, free: ChannelSteps) -> Result:
    """The sizes decide alone where they are fast enough in widths that kernels like; else time is the price.

    Args:
        round_: the model and what holds its results to account.
        path: the plans, by size where one is asked for.
        free: what costs nothing.
    """
    judge, allowed = round_.judge, round_.judge.budgets.latency
    assert allowed is not None
    given = round_.config.round_to
    widths = (given,) if isinstance(given, int) and given > 1 else WIDTHS[1:]  # others leave the fast kernels
    if _by_size(judge.budgets):
        for width in widths:
            found = _fast_by_size(round_, path, width, allowed)
            if found is not None:
                return found
        with round_.log.stage("plan"):
            path = path_of(round_.piece, _priced_by_time(round_), _for_nothing(round_, free))
    return _fast_enough(round_, path, widths[0], allowed)


def _fast_by_size(round_: Round, path: Path, width: int, allowed: float) -> Result | None:
    """The largest model that is small enough, if it is fast enough too."""
    with round_.log.stage("search"):
        count = first_small_enough(len(path), lambda count: _small(round_, path, count, width))
    if count is None:
        return None
    found = round_.judge.latency(_bare(round_, path, count, width))
    if found is not None and found.ratio > SURE * allowed:
        return None
    result = _held_to_time(round_, round_.result(*round_.finish(_small_candidate(round_, path, count, width))))
    return result if result.failure is None else None


def _fast_enough(round_: Round, path: Path, width: int, allowed: float) -> Result:
    """What was measured corrects what the table says, a few times."""
    judge, times = round_.judge, round_.times
    aim = allowed
    best: Result | None = None
    for _ in range(CORRECTIONS):

        def small(count: int, aim: float = aim) -> bool:
            model = _bare(round_, path, count, width)
            return judge.budgets.small(judge.cost(model)) and times.predicted(model) <= aim

        with round_.log.stage("search"):
            count = first_small_enough(len(path), small)
        result = _held_to_time(round_, round_.result(*round_.finish(_small_candidate(round_, path, count, width))))
        if best is None or _merit(best) < _merit(result):
            best = result
        if (count is None and result.ratio > allowed) or count == 0 or CLOSE * allowed <= result.ratio <= allowed:
            break
        aim = min(1.0, aim * (1 + CLOSE) / 2 * allowed / result.ratio)
    assert best is not None
    return best


def _held_to_time(round_: Round, result: Result) -> Result:
    return replace(result, evaluation=round_.judge.timed(result.evaluation, result.ratio))


def _merit(result: Result) -> tuple[bool, float]:
    """Of results that are fast enough the slowest removed least; of the others the fastest is the best."""
    return (True, result.ratio) if result.failure is None else (False, -result.ratio)

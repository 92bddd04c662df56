"""A share of the original's time, hit by measuring: prices sort the blocks, the clock says where to stop.

Two paths compete: one priced by the seconds that layers alone take at the widths that they would have, one by their
multiply-accumulates, which know nothing of kernels but are never disturbed. How fast a whole model is that adds up to
is measured, each model alone (`lindep_onnx.runtime.timing`): a bisection over the path whose next point is where the
predictions, scaled to what was measured on both sides, expect the time that is asked for. Of the two points the one
whose outputs differ least is refitted, on samples that nothing was fitted to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from lindep_onnx.data.split import Part
from lindep_onnx.errors import BudgetError
from lindep_onnx.planning.lossless import lossless_anyway
from lindep_onnx.planning.path import Path
from lindep_onnx.planning.round import Round
from lindep_onnx.planning.search import first_small_enough, last_good_enough
from lindep_onnx.planning.values import Result
from lindep_onnx.runtime.timing import Stopwatch
from lindep_onnx.structure.steps import ChannelSteps, Curves
from lindep_onnx.verify.metrics import Comparison
from lindep_onnx.verify.verdict import near_chance

#: Shares of the original's time under what is asked for: what the search aims at, and what is close enough to stop.
AIM, CLOSE = 0.02, 0.04
#: How far under what is asked for a result may end before a slower one is looked for.
WITHIN = 0.05
#: Models that are measured at most on one path, and results that are refitted and measured again.
MEASURED, RESULTS = 9, 3
#: Ways that are followed from one path where a block is larger than what is left to go.
WAYS = 3


@dataclass
class _Clock:
    """Times points of a path; each once."""

    round_: Round
    path: Path
    free: ChannelSteps
    watch: Stopwatch
    known: dict[int, float] = field(default_factory=dict)
    timed: set[int] = field(default_factory=set)  # those whose ratio is of a whole comparison

    def ratio(self, count: int) -> float:
        """Share of the original's time that a plan takes."""
        if count not in self.known:
            self.known[count] = self.watch.glance(self.round_.judge.stored(self.round_.bare(self.path, count)))
            self.round_.log.progress("search", len(self.known), max(MEASURED, len(self.known)))
        return self.known[count]

    def between(self, low: int, high: int, wanted: float) -> int:
        """The count between two that were measured where a share of the time is expected."""
        slow, fast = self._predicted(low), self._predicted(high)
        above, below = self.ratio(low), self.ratio(high)
        share = (above - wanted) / max(above - below, 1e-9)
        seconds = slow - share * (slow - fast)
        first, last = low + 1, high - 1
        while first < last:
            middle = (first + last) // 2
            if self._predicted(middle) <= seconds:
                last = middle
            else:
                first = middle + 1
        return first

    def _predicted(self, count: int) -> float:
        structure, taken = self.round_.piece.structure, self.round_.builder.decide(self.path, count, self.round_.rule)
        removed = next(own.steps for own in taken if own.move.name == "channels")
        return self.round_.times.seconds(structure, removed)


def by_latency(round_: Round, curves: Curves, free: ChannelSteps) -> Result:
    """The largest model that is small and fast enough.

    Sizes that are asked for beside the time decide alone where they are fast enough.

    Args:
        round_: the model and what holds its results to account.
        curves: of all kinds of change, by the size that is asked for.
        free: what costs nothing.
    """
    allowed = round_.judge.budgets.latency
    assert allowed is not None
    with round_.judge.stopwatch() as watch:
        with round_.log.stage("plan"):
            by_size = _Clock(round_, round_.path(curves, free), free, watch)
            least = _small(by_size)
        if round_.judge.budgets.sizes and least is not None and by_size.ratio(least) <= allowed:
            found = _held(by_size, least)
            if found.failure is None:
                return found
        with round_.log.stage("plan"):
            by_time = _Clock(round_, round_.timed_path(curves, free), free, watch)
        return _fast_enough(*_best(round_, (by_time, by_size), allowed), allowed)


def _best(round_: Round, clocks: Sequence[_Clock], allowed: float) -> tuple[_Clock, int | None]:
    """The path on which what is fast enough errs least, and its first count; the fastest path where none is."""
    found: list[tuple[float, int, int]] = []
    ways: list[_Clock] = []
    for clock in clocks:
        least, begun = _small(clock), len(ways)
        with round_.log.stage("search"):
            count = None if least is None else _bisected(clock, least, len(clock.path), allowed)
        while count is not None:
            found.append((_error(clock, count), len(ways), count))
            ways.append(clock)
            with round_.log.stage("search"):
                around = _around(clock, count, allowed) if len(ways) < begun + WAYS else None
                clock, count = around or (clock, None)
    if not found:
        return min(clocks, key=lambda clock: clock.ratio(len(clock.path))), None
    _, way, count = min(found)
    return ways[way], count


def _around(clock: _Clock, count: int, allowed: float) -> tuple[_Clock, int] | None:
    """The way on from a plan that is too slow where its next block is faster than was asked for: without that block."""
    before = count - 1
    if clock.ratio(count) >= allowed - WITHIN or not clock.known.get(before, 0.0) > allowed:
        return None
    known = {own: ratio for own, ratio in clock.known.items() if own <= before}
    other = replace(clock, path=clock.path.without(before), known=known, timed=set())
    found = _bisected(other, before, len(other.path), allowed, most=MEASURED + len(known))
    return None if found is None else (other, found)


def _error(clock: _Clock, count: int) -> float:
    """How far the outputs are off before any refit, on the samples that choose."""
    taken = clock.round_.builder.decide(clock.path, count, clock.round_.rule)
    found = clock.round_.judge.compare_part(clock.round_.builder.fitted(taken).model, Part.SELECT)
    return 0.0 if found is None else max(output.whole_error for output in found.outputs)


def _small(clock: _Clock) -> int | None:
    """The first count that is small enough; None where none is."""
    if not clock.round_.judge.budgets.sizes:
        return 0
    with clock.round_.log.stage("search"):
        return first_small_enough(len(clock.path), lambda count: clock.round_.excess(clock.path, count))


def _fast_enough(clock: _Clock, count: int | None, allowed: float) -> Result:
    """The result at a count, or near it; refused where it is too slow or no longer like the original."""
    most = len(clock.path)
    best = result = _held(clock, most if count is None else count)
    for _ in range(RESULTS - 1):
        if count is None or allowed - WITHIN <= result.ratio <= allowed:
            break
        # The refit added a bias, or a glance was disturbed: what was timed last is what is known best.
        clock.known[count] = result.ratio
        clock.timed.add(count)
        with clock.round_.log.stage("search"):
            after = _next(clock, count, allowed)
        if after is None:
            break
        count, result = after, _held(clock, after)
        best = max(best, result, key=lambda own: (own.ratio <= allowed, -abs(own.ratio - allowed)))
    return best if best.failure is None else _refused(clock, best, allowed)


def _next(clock: _Clock, count: int, allowed: float) -> int | None:
    """Where to look after a result that is too slow, or faster than it has to be; None where there is nothing."""
    if clock.ratio(count) > allowed:
        ends = count, len(clock.path)
    else:
        slower = [own for own, ratio in clock.known.items() if own < count and ratio > allowed]
        if not slower:
            return None
        ends = max(slower), count
    if ends[1] - ends[0] < 2:
        other = sum(ends) - count
        return other if other not in clock.timed and clock.ratio(other) <= allowed + WITHIN else None
    return clock.between(*ends, allowed - AIM)


def _bisected(clock: _Clock, low: int, high: int, allowed: float, most: int = MEASURED) -> int | None:
    """The first count that is fast enough, as far as `most` measurements tell; None where none is."""
    if allowed < clock.ratio(low) <= allowed + CLOSE:  # what costs least is not given up for a glance
        clock.known[low] = clock.watch.compare(clock.round_.judge.stored(clock.round_.bare(clock.path, low))).ratio
    if clock.ratio(low) <= allowed:
        return low
    if clock.ratio(high) > allowed:
        return None
    while high - low > 1 and len(clock.known) < most and clock.ratio(high) < allowed - CLOSE:
        middle = clock.between(low, high, allowed - AIM)
        if clock.ratio(middle) <= allowed:
            high = middle
        else:
            low = middle
    return high


def _held(clock: _Clock, count: int) -> Result:
    """A point of the path as a result, timed as it is."""
    round_ = clock.round_
    found = lossless_anyway(round_, clock.free) if count == 0 else None
    candidate, evaluation = found or round_.finish(round_.small_candidate(clock.path, count))
    timing = clock.watch.compare(round_.judge.stored(candidate.model))
    evaluation = round_.judge.timed(evaluation, timing.ratio)
    notes = (*candidate.notes, *round_.times.notes)
    return Result(candidate, evaluation, timing, notes, widths=round_.rule.words)


def _refused(clock: _Clock, result: Result, allowed: float) -> Result:
    """The failure of a result with what can be had instead, and where the time is."""
    failure = result.failure
    if failure is None:
        return result
    why = str(failure)
    if result.ratio > allowed:
        why = (
            f"--latency {allowed:g} cannot be reached: with everything removed that can go, the model takes "
            f"{result.ratio:.2f} of the original's time. Nothing was written."
        )
    said = " ".join(filter(None, (why, _possible(clock), clock.round_.times.where())))
    return replace(result, evaluation=replace(result.evaluation, failure=BudgetError(said)))


def _possible(clock: _Clock) -> str:
    """A sentence on the fastest plan whose outputs are still like the original's, before any refit."""
    round_, compared = clock.round_, dict[int, Comparison | None]()

    def usable(stop: int) -> bool:
        model = round_.builder.fitted(round_.builder.decide(clock.path, stop, round_.rule)).model
        found = compared[stop] = round_.judge.compare_part(model, Part.SELECT)
        return found is not None and near_chance(found) is None

    with round_.log.stage("search"):
        stop, _ = last_good_enough(clock.path.stops(), usable)
        ratio = clock.ratio(stop)
    found = compared.get(stop)
    if found is None:
        return ""
    agreement = found.agreement
    kept = f"error {found.relative_error:.2g}" if agreement is None else f"agreement {agreement:.2f}"
    return f"About {ratio:.2f} can be reached with outputs that are like the original's ({kept} before the refit)."

"""How well the data supports what was removed: numbers that a reader of the report can check."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from lindep_onnx.calibration.statistics import JOINT_ROWS, ConsumerStatistics, Statistics, problem
from lindep_onnx.linalg.fold import ConsumerProblem, removal_cost
from lindep_onnx.moves.prices import folds_of
from lindep_onnx.report.values import Support
from lindep_onnx.structure.steps import KINDS, ChannelSteps, Fold
from lindep_onnx.structure.types import Structure

CONFIDENCE = 0.95


def never_seen_bound(samples: int) -> float:
    """Upper confidence bound of the probability of what was not seen in `samples` samples (Clopper and Pearson).

    About 3 / samples.
    """
    return 1.0 - (1.0 - CONFIDENCE) ** (1.0 / samples) if samples else 1.0


def support(
    structure: Structure, statistics: Statistics, steps: ChannelSteps, proven: NDArray[np.bool_]
) -> dict[int, Support]:
    """The support of every group by its number; what is `proven`, (units,) bool, needs none."""
    folds = folds_of(structure, statistics, steps.removed, steps.folds)
    silent = steps.removed & (steps.kind == KINDS.index("constant")) & ~proven
    found = {}
    for number, group in enumerate(structure.groups):
        consumers = [statistics.consumers[index] for index in group.consumers]
        lost = [index for index in group.consumers if index in folds] if steps.removed[group.units].any() else []
        problems = ((problem(structure, statistics.consumers[index], steps.removed), folds[index]) for index in lost)
        errors = [(_error(posed, posed.gram, fold), _error(posed, posed.holdout, fold)) for posed, fold in problems]
        found[number] = _support(statistics.samples, consumers, errors, int(silent[group.units].sum()))
    return found


def _support(
    samples: int,
    consumers: Sequence[ConsumerStatistics],
    errors: Sequence[tuple[float | None, float | None]],
    silent: int,
) -> Support:
    least = min(consumers, key=lambda seen: seen.effective_rows / max(1, len(seen.unit)))
    needed = None
    if not least.joint and least.effective_rows:
        needed = math.ceil(samples * (JOINT_ROWS * len(least.unit) / least.effective_rows))
    return Support(
        samples=samples,
        rows=least.rows,
        effective_rows=least.effective_rows,
        features=len(least.unit),
        fit_error=max((fit or 0.0 for fit, _ in errors), default=None),
        heldout_error=max((held for _, held in errors if held is not None), default=None),
        silent=silent,
        silent_bound=never_seen_bound(samples) if silent else None,
        samples_needed=needed,
    )


def _error(posed: ConsumerProblem, gram: NDArray[np.float64] | None, fold: Fold) -> float | None:
    """RMS error of a fold on the rows that these moments are of."""
    if gram is None:
        return None
    return math.sqrt(removal_cost(gram, posed.outer, fold.kept, fold.matrix) / posed.energy)


def sentences(found: Mapping[int, Support], uncertain: int, given: int) -> Iterator[str]:
    """What the reader should know without looking at every group.

    `uncertain` channels never changed in the data but may well; `given` different samples there are in all.
    """
    silent = sum(entry.silent for entry in found.values())
    if silent:
        samples, bound = next((entry.samples, entry.silent_bound) for entry in found.values() if entry.silent)
        yield (
            f"{silent:,} removed channel(s) never changed in {samples:,} samples: with 95 % confidence one like that "
            f"changes in no more than {100 * (bound or 0.0):.2g} % of samples like these."
        )
    samples = next((entry.samples for entry in found.values()), 0)
    short = [entry.samples_needed for entry in found.values() if entry.samples_needed is not None]
    if short:
        times = given / max(1, samples)
        least, most = (f"{math.ceil(count * times):,}" for count in (min(short), max(short)))
        about = f"{most} samples" if least == most else f"{least} samples for one of them and {most} for all"
        yield (
            f"Too little data to look for combinations of several channels in {len(short)} of {len(found)} groups: "
            f"about {about} would be needed, all different; there are {given:,}."
        )
    if uncertain:
        yield (
            f"{uncertain:,} channel(s) never changed in {samples:,} samples but may well: they stay. After four times "
            "as many samples half the distance from changing is enough."
        )

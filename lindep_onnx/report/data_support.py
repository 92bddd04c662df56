"""How well the data supports what was removed: numbers that a reader of the report can check."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from lindep_onnx.calibration.statistics import JOINT_ROWS, Statistics, problem
from lindep_onnx.linalg.fold import removal_cost
from lindep_onnx.planning.path import folds_of
from lindep_onnx.planning.strategies import Chosen
from lindep_onnx.proofs.prove import Proof
from lindep_onnx.report.values import Support
from lindep_onnx.structure.steps import KINDS, Fold
from lindep_onnx.structure.types import Structure

CONFIDENCE = 0.95


def never_seen_bound(samples: int) -> float:
    """Upper confidence bound of the probability of what was not seen in `samples` samples (Clopper and Pearson).

    About 3 / samples.
    """
    return 1.0 - (1.0 - CONFIDENCE) ** (1.0 / samples) if samples else 1.0


def support(structure: Structure, statistics: Statistics, chosen: Chosen, proof: Proof) -> dict[int, Support]:
    """The support of every group.

    Args:
        structure: the traced model.
        statistics: what the data says.
        chosen: the result.
        proof: what needs no data.
    """
    folds = folds_of(structure, statistics, chosen.removed, chosen.folds)
    silent = (chosen.kind == KINDS.index("constant")) & ~proof.steps.removed
    bound = never_seen_bound(statistics.samples)
    found = {}
    for number, group in enumerate(structure.groups):
        errors: list[tuple[float, float | None]] = []
        for index in group.consumers:
            if index in folds and chosen.removed[group.units].any():
                errors.append(_errors(structure, statistics, index, chosen.removed, folds))
        consumers = [statistics.consumers[index] for index in group.consumers]
        least = min(consumers, key=lambda seen: seen.effective_rows / max(1, len(seen.unit)))
        needed = None
        if not least.joint and least.effective_rows:
            short = JOINT_ROWS * len(least.unit) / least.effective_rows
            needed = math.ceil(statistics.samples * short)
        own = int((silent & chosen.removed)[group.units].sum())
        heldout = [error for _, error in errors if error is not None]
        found[number] = Support(
            samples=statistics.samples,
            rows=least.rows,
            effective_rows=least.effective_rows,
            features=len(least.unit),
            fit_error=max((error for error, _ in errors), default=None),
            heldout_error=max(heldout, default=None),
            silent=own,
            silent_bound=bound if own else None,
            samples_needed=needed,
        )
    return found


def _errors(
    structure: Structure,
    statistics: Statistics,
    index: int,
    removed: NDArray[np.bool_],
    folds: Mapping[int, Fold],
) -> tuple[float, float | None]:
    posed, fold = problem(structure, statistics.consumers[index], removed), folds[index]
    fit, held = (
        None if gram is None else math.sqrt(removal_cost(gram, posed.outer, fold.kept, fold.matrix) / posed.energy)
        for gram in (posed.gram, posed.holdout)
    )
    return fit or 0.0, held


def sentences(found: Mapping[int, Support], uncertain: int, given: int) -> Iterator[str]:
    """What the reader should know without looking at every group.

    Args:
        found: what `support` gave.
        uncertain: number of channels that never changed but may well.
        given: number of samples in all.
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
        yield (
            f"Too little data to look for combinations of several channels in {len(short)} of {len(found)} groups: "
            + (
                f"about {most} samples"
                if least == most
                else f"about {least} samples for one of them and {most} for all"
            )
            + f" would be needed; there are {given:,}."
        )
    if uncertain:
        yield (
            f"{uncertain:,} channel(s) never changed in {samples:,} samples but may well: they stay. After four times "
            "as many samples half the distance from changing is enough."
        )

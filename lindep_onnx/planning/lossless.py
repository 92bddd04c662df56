"""What costs nothing: lossless mode, and what every budget starts from.

Lossless mode has one plan, and falls back on smaller ones if held-out samples turn it down.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from lindep_onnx.moves.channels import ChannelRemoval
from lindep_onnx.planning.round import Round
from lindep_onnx.planning.values import Candidate, Evaluation
from lindep_onnx.structure.steps import ChannelSteps


def lossless(round_: Round, free: ChannelSteps) -> tuple[Candidate, Evaluation]:
    """Everything that costs nothing, or as much of it as held-out samples confirm.

    Args:
        round_: the model and what holds its results to account.
        free: what costs nothing.
    """
    first = found = _in_widths(round_, free, round_.piece.uncertain)
    if found[1].failure is None or round_.config.force:
        return found
    if (free.removed & round_.inactive).any():
        with round_.log.stage("plan"):
            conservative = round_.free(round_.inactive)
        found = _in_widths(round_, conservative, round_.inactive)
    if found[1].failure is not None:
        found = round_.proven()
    if found[1].failure is not None:
        return first
    candidate, evaluation = found
    error = float("nan") if first[1].comparison is None else first[1].comparison.relative_error
    wanted, went = (int(own.decision.removed.sum()) for own in (first[0], candidate))
    note = (
        f"Held-out samples turned down a removal of {wanted} channels, which changed an output by "
        f"{error:.2g}; the {went} of them that depend less on the data went. Give more "
        "varied data."
    )
    return replace(candidate, notes=(*candidate.notes, note)), evaluation


def _in_widths(round_: Round, steps: ChannelSteps, uncertain: NDArray[np.bool_]) -> tuple[Candidate, Evaluation]:
    """What stays for the sake of widths may keep others: until nothing moves, so that it can be repeated."""
    structure = round_.piece.structure
    asked: NDArray[np.bool_] | None = None
    while True:
        order = np.flatnonzero(steps.removed)
        removed = ChannelRemoval().admissible(structure, steps.removed, order, round_.rule)
        if (removed == steps.removed).all() and (asked is None or (removed == asked).all()):
            return round_.finish(round_.builder.lossless(steps, round_.config.refit))
        asked = removed
        with round_.log.stage("plan"):
            steps = round_.free(uncertain, ~removed)


def lossless_anyway(round_: Round, free: ChannelSteps) -> tuple[Candidate, Evaluation] | None:
    """What lossless mode gives, where that is lossless on held-out samples and all that is asked for holds."""
    if round_.config.random_calib is not None:  # random inputs prove nothing
        return None
    candidate, evaluation = _in_widths(round_, free, round_.piece.uncertain)
    found = evaluation.comparison
    exact = found is not None and round_.judge.is_lossless(found.relative_error)
    return (candidate, replace(evaluation, lossless=True)) if exact and evaluation.failure is None else None

"""What ONNX Runtime refuses is left out before any work goes into it, and never written."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lindep_onnx.errors import ModelError, VerificationError
from lindep_onnx.linalg.elimination import Allowance
from lindep_onnx.model.ir import Model
from lindep_onnx.proofs.prove import prove
from lindep_onnx.proofs.traced import TracedModel
from lindep_onnx.runtime.backend import Runtime
from lindep_onnx.structure.placement import equalized
from lindep_onnx.structure.rewrite import Removal, rewrite
from lindep_onnx.structure.trace import trace
from lindep_onnx.structure.types import Structure

logger = logging.getLogger(__name__)


def without_refused(
    traced: TracedModel, runtime: Runtime, feeds: Mapping[str, NDArray[np.generic]] | None
) -> tuple[TracedModel, tuple[str, ...]]:
    """The model without the groups whose channels cannot go because ONNX Runtime refuses what is left, and a note.

    Every second channel of every group goes on trial; only where that cannot be loaded, or run, groups are tried apart.

    Args:
        traced: the model.
        runtime: what models run on.
        feeds: one run; None to load only.
    """
    structure = traced.structure
    groups = list(range(len(structure.groups)))
    if not groups or _runs(structure, groups, runtime, feeds) or not _runs(structure, [], runtime, feeds):
        return traced, ()
    refused = _refused(structure, groups, runtime, feeds)
    places = {
        (reader.tensor, reader.axis)
        for number in refused
        for index in structure.groups[number].consumers
        for reader in structure.consumers[index].readers
    }
    config, model = traced.config, structure.model
    smaller = trace(
        model,
        structure.shape_info,
        include=config.include,
        exclude=config.exclude,
        min_channels=config.min_channels,
        refused=frozenset(places),
    )
    proof = prove(smaller, traced.ranges, half=traced.rounding > 0)
    names = ", ".join(structure.groups[number].name for number in refused[:3])
    more = f" and {len(refused) - 3} others" if len(refused) > 3 else ""
    note = (
        f"ONNX Runtime refuses the model once channels of {names}{more} go: these were left alone. This is a fault of "
        "this package, please report it with the model."
    )
    return replace(traced, structure=smaller, proof=proof), (note,)


def _refused(
    structure: Structure, groups: list[int], runtime: Runtime, feeds: Mapping[str, NDArray[np.generic]] | None
) -> list[int]:
    """Which of the groups, that do not run together, do not run; halves are tried until single ones are found."""
    if len(groups) == 1:
        return groups
    middle = len(groups) // 2
    found = []
    for half in (groups[:middle], groups[middle:]):
        if not _runs(structure, half, runtime, feeds):
            found += _refused(structure, half, runtime, feeds)
    return found or groups  # only together: none of them can be told apart


def _runs(
    structure: Structure, groups: Sequence[int], runtime: Runtime, feeds: Mapping[str, NDArray[np.generic]] | None
) -> bool:
    removed = np.zeros(structure.units, dtype=bool)
    allowance = Allowance(structure.units, structure.minimums)
    for number in groups:
        for unit in structure.groups[number].units[1::2].tolist():
            removed[unit] = allowance.take(unit)
    removed = equalized(structure, removed)
    if groups and not removed.any():
        return True
    try:
        session = runtime.open(rewrite(structure, Removal(removed), "trial"))
        if feeds is not None:
            session.run(None, dict(feeds))
    except Exception:  # ONNX Runtime's exceptions have no common base, and a rewrite that fails is refused like them
        logger.debug("a trial without some channels does not run", exc_info=True)
        return False
    return True


def check_opens(runtime: Runtime, original: Model, path: Path) -> None:
    """Hold a file that was written to ONNX Runtime, which has to load it as it loads the original.

    Raises:
        VerificationError: it does not.
    """
    try:
        runtime.open(path)
    except ModelError as error:
        try:
            runtime.open(original)
        except ModelError:  # a type that the provider has no kernels for
            return
        raise VerificationError(
            f"ONNX Runtime loads the original, but not the result as it was written: {error} Nothing was written; this "
            "is a fault of this package, please report it with the model."
        ) from error

"""Run two models on the same data and compare what they put out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lindep_onnx.data.samples import Batch
from lindep_onnx.errors import ModelError, VerificationError, one_line
from lindep_onnx.runtime.backend import Pool, Session
from lindep_onnx.verify.metrics import Comparison, OutputErrors

Array: TypeAlias = NDArray[Any]


def compare(
    original_session: Session,
    result_session: Session,
    batches: Iterable[Batch],
    *,
    agreement_output: str | None = None,
    holds: Mapping[str, str] = MappingProxyType({}),
    runs: int = 1,
) -> Comparison:
    """Run two models on the same batches and compare what they put out.

    Args:
        original_session: the reference.
        result_session: the model to judge; same inputs.
        batches: what to feed.
        agreement_output: see `OutputErrors`.
        holds: see `OutputErrors`.
        runs: batches that are run at the same time.

    Raises:
        ModelError: the original cannot run on the data.
        UsageError: `agreement_output` names no output.
        VerificationError: the result cannot run on the data or lacks an output, or there is no batch.
    """
    wanted = [output.name for output in original_session.get_outputs()]
    errors = OutputErrors(agreement_output=agreement_output, holds=holds)
    numbers: list[int] = []

    def both(batch: Batch) -> tuple[dict[str, Array], dict[str, Array]]:
        try:
            reference = _run(original_session, wanted, batch.feeds)
        except Exception as error:
            raise ModelError(f"The original model cannot run on the data: {one_line(error)}") from error
        try:
            return reference, _run(result_session, wanted, batch.feeds)
        except Exception as error:
            raise VerificationError(f"The result cannot run on data the original runs on: {one_line(error)}") from error

    with Pool(runs) as pool:
        for batch, (reference, candidate) in pool.in_order(both, batches):
            errors.update(reference, candidate, len(batch.samples), fed=batch.size)
            numbers += batch.samples.tolist()
    found = errors.result()
    return replace(
        found,
        worst_samples=tuple(numbers[place] for place in found.worst_samples),
        outputs=tuple(replace(output, worst_sample=numbers[output.worst_sample]) for output in found.outputs),
    )


def _run(session: Session, names: Sequence[str], feeds: Mapping[str, Array]) -> dict[str, Array]:
    return {name: as_array(value) for name, value in zip(names, session.run(names, dict(feeds)), strict=True)}


def as_array(value: Any) -> Array:
    """An output as an array: sequences of tensors end to end, maps (one a sample) as rows ordered by key."""
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        return np.asarray(() if value is None else value)
    if value and all(isinstance(item, dict) for item in value):
        return np.asarray([[item[key] for key in sorted(item)] for item in value])
    if value and all(isinstance(item, np.ndarray) for item in value):
        return np.concatenate([item.ravel() for item in value])
    return np.asarray(value)

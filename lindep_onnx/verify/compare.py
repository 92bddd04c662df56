"""Run two models on the same data and compare what they put out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lindep_onnx.data.samples import Batch
from lindep_onnx.errors import ModelError, VerificationError, one_line
from lindep_onnx.runtime.backend import Pool, Session
from lindep_onnx.verify.metrics import Comparison, OutputErrors

Array: TypeAlias = NDArray[Any]


@dataclass(frozen=True)
class Outputs:
    """What is known of the outputs that are compared.

    Attributes:
        agreement_output: see `OutputErrors`; axes are counted as in the model.
        holds: see `OutputErrors`.
        sample_axes: which axis counts samples, by output, where it is not the leading one.
    """

    agreement_output: str | None = None
    holds: Mapping[str, str] = field(default_factory=dict)
    sample_axes: Mapping[str, int] = field(default_factory=dict)

    def errors(self, first: Mapping[str, Array]) -> OutputErrors:
        """What accumulates differences; it is told of the outputs of the first run, samples in front."""
        return OutputErrors(agreement_output=self._decision(first), holds=self.holds)

    def _decision(self, first: Mapping[str, Array]) -> str | None:
        """Output and axis of the decision, counted with samples in front."""
        name, _, text = (self.agreement_output or "").rpartition(":")
        place = self.sample_axes.get(name)
        if self.agreement_output in first or not place or not re.fullmatch(r"-?\d+", text):
            return self.agreement_output
        axis = int(text) + (first[name].ndim if text.startswith("-") else 0)
        return f"{name}:{axis + 1 if axis < place else 0 if axis == place else axis}"


def compare(
    original_session: Session,
    result_session: Session,
    batches: Iterable[Batch],
    *,
    outputs: Outputs | None = None,
    runs: int = 1,
) -> Comparison:
    """Run two models on the same batches and compare what they put out.

    Args:
        original_session: the reference.
        result_session: the model to judge; same inputs.
        batches: what to feed.
        outputs: what is known of what they put out.
        runs: batches that are run at the same time.

    Raises:
        ModelError: the original cannot run on the data.
        UsageError: the output of the agreement is none of them.
        VerificationError: the result cannot run on the data or lacks an output, or there is no batch.
    """
    wanted = [output.name for output in original_session.get_outputs()]
    known = outputs or Outputs()
    errors: OutputErrors | None = None
    numbers: list[int] = []

    def both(batch: Batch) -> tuple[dict[str, Array], dict[str, Array]]:
        try:
            reference = _run(original_session, wanted, batch.feeds, known.sample_axes)
        except Exception as error:
            raise ModelError(f"The original model cannot run on the data: {one_line(error)}") from error
        try:
            return reference, _run(result_session, wanted, batch.feeds, known.sample_axes)
        except Exception as error:
            raise VerificationError(f"The result cannot run on data the original runs on: {one_line(error)}") from error

    with Pool(runs) as pool:
        for batch, (reference, candidate) in pool.in_order(both, batches):
            errors = errors or known.errors(reference)
            errors.update(reference, candidate, len(batch.samples), fed=batch.size)
            numbers += batch.samples.tolist()
    found = (errors or OutputErrors()).result()
    return replace(
        found,
        worst_samples=tuple(numbers[place] for place in found.worst_samples),
        outputs=tuple(replace(output, worst_sample=numbers[output.worst_sample]) for output in found.outputs),
    )


def _run(
    session: Session, names: Sequence[str], feeds: Mapping[str, Array], sample_axes: Mapping[str, int]
) -> dict[str, Array]:
    """Outputs by name, samples in front."""
    made = {name: as_array(value) for name, value in zip(names, session.run(names, dict(feeds)), strict=True)}
    return {
        name: np.moveaxis(value, sample_axes[name], 0) if 0 < sample_axes.get(name, 0) < value.ndim else value
        for name, value in made.items()
    }


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

"""What a comparison is worth: whether a result is near chance, and what may be said of it.

A model that has lost what it knew still runs, and a budget on its size alone would take it. So a result is near chance,
and not to be used unless the user insists, where for one of its outputs

- which holds class scores: under half of the arg-maxes stay, and the scores differ (`centered_error` above a quarter:
  an arg-max that changes while the values hardly do is that of a picture, or of coordinates, not of scores);
- which is an embedding (`verify.outputs`): the mean cosine to the original's is under a half, or the error that is left
  at the best scale is above nine tenths of what it varies by: embeddings that all point about the same way have a large
  cosine whatever became of them;
- which is anything else: what is wrong is above nine tenths of what the output varies by (`centered_error`; of the
  whole output with too few samples to know its mean). Half of the class numbers behind an ArgMax have to stay.

An output whose number of rows depends on the data and differs is not judged: where as many boxes are found, they need
not be the same ones in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from lindep_onnx.verify.metrics import Comparison, OutputComparison

Status = Literal["passed", "failed", "unchecked"]

#: Held-out samples that a limit on quality has to be judged by.
MIN_JUDGED = 10
#: Fewer are counted rather than given in percent.
MIN_PERCENT = 100
#: What a result has to keep: of the arg-maxes, and as the mean cosine of an embedding.
MIN_AGREEMENT, MIN_COSINE = 0.5, 0.5
#: The largest error of a whole output, and that at which class scores count as the same.
MAX_WHOLE, MIN_SCORES = 0.9, 0.25


@dataclass(frozen=True)
class Verdict:
    """What may be said of a result.

    Attributes:
        status: "passed" only where a limit on quality was judged and holds; "unchecked" where none was; "failed" where
            anything that was asked for does not hold.
        reason: why it did not pass; empty where it did.
    """

    status: Status
    reason: str = ""


def near_chance(found: Comparison) -> str | None:
    """What of a result is near chance, as a clause about it; None if nothing is.

    Args:
        found: how it compares with the original, on held-out samples.
    """
    return next(_clauses(found), None)


def _clauses(found: Comparison) -> Iterator[str]:
    for output in found.outputs:
        if output.shapes_differ:
            continue
        error = _whole(output, found.samples)
        if output.name == found.agreement_output and found.agreement is not None:
            if found.agreement < MIN_AGREEMENT and error > MIN_SCORES:
                yield kept(found.agreement, found.samples, found.decisions)
        elif output.holds == "embedding" and output.mean_cosine is not None:
            if output.mean_cosine < MIN_COSINE:
                yield f"gives {output.name!r} with a mean cosine of {output.mean_cosine:.2g} to the original's"
            elif (turned := _turned(output, error)) > MAX_WHOLE:
                yield f"errs by {turned:.2g} of what the direction of output {output.name!r} varies by"
        elif output.changed_share is not None:
            allowed = MIN_AGREEMENT if output.holds == "decisions" else MAX_WHOLE
            if output.changed_share > allowed:
                yield f"changes {output.changed_share:.1%} of the elements of output {output.name!r}"
        elif error > MAX_WHOLE:
            yield f"errs by {error:.2g} of what output {output.name!r} varies by"


def _whole(output: OutputComparison, samples: int) -> float:
    centered = output.centered_error if samples >= MIN_JUDGED else None
    return output.whole_error if centered is None else centered


def _turned(output: OutputComparison, error: float) -> float:
    """The error of an embedding that is left at the best scale, as a share of what it varies by."""
    if output.cosine is None or not 0 < output.whole_error < math.inf:
        return 0.0
    return math.sqrt(1.0 - output.cosine**2) * error / output.whole_error


def kept(agreement: float, samples: int, decisions: int) -> str:
    """How many predictions stay, as a clause about the result: a count below 100 samples, else a share.

    Args:
        agreement: share of the arg-maxes that stay.
        samples: how many were compared.
        decisions: arg-maxes that were counted; as many as samples, but for maps.
    """
    if decisions != samples:
        return f"keeps the predicted class at {100 * agreement:.4g} % of the positions of {samples:,} held-out samples"
    return f"keeps the predicted class on {round(agreement * samples):,} of {samples:,} held-out samples"

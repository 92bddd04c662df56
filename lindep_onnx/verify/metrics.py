"""How far the outputs of two models are apart.

The error of an output. A relative error of the whole tensor passes a detector whose class scores are all destroyed,
because the box coordinates outweigh them. So the error of a float output is the worst over slices k of axis 1 and of
the last axis,

    e_k = ||y_k - y'_k|| / (||y_k - mean(y_k)|| + 1e-6 max_j ||y_j||),

where y_k is everything in slice k over all samples, mean(y_k) is one number, and j runs over the slices of the same
axis. Centring makes a slice that hides a small signal behind a large offset count by its signal; the second term keeps
a slice that never varies from dividing by zero. Integer, bool and string outputs count the elements that differ.

Beside it stands the error of the whole output as the prediction of something that varies: `centered_error` is
||y - y'|| over what the original is away from its own mean, the mean of each slice of an axis. One is what a model
gives that answers with that mean whatever it is fed. Of axis 1, the last axis and the tensor as one slice that one
counts which explains most by its means. An offset that all samples share, such as the place of a box in a large
picture, hides nothing there.

Everything is streamed: for each slice the count, the mean, the centred sum of squares (merged as in Chan, Golub and
LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979, so that centring does not
cancel) and the sum of squared differences, in float64.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lindep_onnx.errors import UsageError, VerificationError

Array: TypeAlias = NDArray[Any]
Floats: TypeAlias = NDArray[np.float64]

#: Axes with more slices than this are skipped: they are positions rather than channels.
MAX_SLICES = 4096
#: Axes longer than this have no means of their own to be centered by.
MAX_MEANS = 1 << 18
#: Share of the largest slice norm that every slice is at least measured by.
FLOOR = 1e-6
#: A 4-D output with more channels than this is no map of class scores.
MAX_CLASSES = 1000
WORST_SAMPLES = 5


@dataclass(frozen=True)
class OutputComparison:
    """How one output differs between two models.

    Attributes:
        name: of the output.
        relative_error: worst slice, see the module; `changed_share` where that is given; inf where shapes differ.
        whole_error: ||y - y'|| / ||y|| of the whole tensor; `changed_share` where that is given.
        max_abs_error: largest absolute difference, in the unit of the output; of strings inf if any differs.
        worst_sample: the sample with the largest ||y - y'|| / ||y||.
        changed_share: share of elements that differ, of an integer, bool or string output; None for floats.
        cosine: y.y' / (||y|| ||y'||) of the whole tensor; None for other outputs than floats, and where one is zero.
        centered_error: of the whole tensor relative to how far y is from its mean, see the module; `whole_error` where
            y does not vary, and for other outputs than floats.
        mean_cosine: mean of the cosines of single samples; None where `cosine` is.
        worst_cosine: lowest of them.
        holds: what the graph says of it, see `lindep_onnx.verify.outputs`: "embedding", "decisions" or nothing.
        shapes_differ: samples on which the shape differs, such as the number of boxes found. They make `relative_error`
            infinite; `centered_error` and the cosines are of the others.
        shared_error: `relative_error` of the samples whose shapes agree; None where all or none of them do.
    """

    name: str
    relative_error: float
    whole_error: float
    max_abs_error: float
    worst_sample: int
    changed_share: float | None
    cosine: float | None = None
    centered_error: float | None = None
    mean_cosine: float | None = None
    worst_cosine: float | None = None
    holds: str = ""
    shapes_differ: int = 0
    shared_error: float | None = None


@dataclass(frozen=True)
class Comparison:
    """How two models differ on some samples. Whether that is good enough is for the caller to say.

    Attributes:
        samples: how many were compared.
        outputs: one entry per output.
        relative_error: worst over outputs.
        max_abs_error: worst over float outputs, and inf if the shapes of any output differ.
        agreement: share of samples (times positions, of a 4-D output) with the same arg-max; None if no output has one.
        worst_samples: up to five samples that differ most, worst first: by the numbers that `compare` was given, by
            order of the updates without any.
        worst_errors: ||y - y'|| / ||y|| of each of them, for the output that differs most.
        agreement_output: name of the output whose arg-max is counted; None if there is none.
        decisions: how many arg-maxes were counted: samples, times positions of a 4-D output.
    """

    samples: int
    outputs: tuple[OutputComparison, ...]
    relative_error: float
    max_abs_error: float
    agreement: float | None
    worst_samples: tuple[int, ...]
    worst_errors: tuple[float, ...] = ()
    agreement_output: str | None = None
    decisions: int = 0


class OutputErrors:
    """Accumulates the difference between the outputs of two models; memory does not grow with the samples.

    Args:
        agreement_output: `NAME` or `NAME:AXIS`, the output and axis of the arg-max. None takes the first float
            output that looks like class scores: the last axis in 2-D, axis 1 in 4-D with at most 1000 channels,
            and in both more than one class; none that holds an embedding.
        holds: what the graph says of outputs, by name, see `lindep_onnx.verify.outputs`.
        chunk: elements of an output that are worked on at a time, so that float64 copies of large outputs stay small.
    """

    def __init__(
        self,
        *,
        agreement_output: str | None = None,
        holds: Mapping[str, str] = MappingProxyType({}),
        chunk: int = 1 << 20,
    ) -> None:
        self._chunk, self._holds = chunk, holds
        self._outputs: dict[str, _Output] = {}
        self._samples = 0
        self._worst: list[tuple[float, int]] = []
        self._wanted = agreement_output
        self._arg_max: tuple[str, int] | None = None
        self._agreeing = 0
        self._positions = 0

    def update(
        self,
        reference: Mapping[str, Array],
        candidate: Mapping[str, Array],
        count: int | None = None,
        *,
        fed: int | None = None,
    ) -> None:
        """Add the outputs of one run.

        Args:
            reference: outputs of the original by name, samples along the leading axis.
            candidate: outputs of the other model, same names.
            count: only the first `count` samples count; None for all.
            fed: samples in the run, filler included. An output whose leading axis is a multiple of it has that many
                rows for each sample. None takes every entry of a leading axis as one sample.

        Raises:
            UsageError: the output named for the agreement does not exist or has no such axis.
            VerificationError: the candidate lacks an output.
        """
        missing = [name for name in reference if name not in candidate]
        if missing:
            raise VerificationError(f"The result lacks the output {missing[0]!r} that the original has.")
        if count is None:
            # A run that found nothing (no boxes) is a sample too.
            count = fed if fed is not None else max(1, next((len(y) for y in reference.values() if np.ndim(y)), 1))
        if not self._outputs:
            self._arg_max = decision(reference, self._wanted, self._holds)
        worst = np.zeros(count)
        for name, value in reference.items():
            y, other = np.asarray(value), np.asarray(candidate[name])
            rows = _rows_per_sample(y, count, fed)
            if rows and y.shape == other.shape:  # trimmed shapes must not hide that they differ
                y, other = y[: rows * count], other[: rows * count]
            output = self._outputs.setdefault(name, _Output(name, y, self._chunk))
            errors = output.update(y, other, count if rows else 1)
            worst = np.maximum(worst, errors)
            output.note_worst(errors, self._samples)
            if self._arg_max is not None and name == self._arg_max[0]:
                self._update_agreement(y, other, self._arg_max[1])
        ranked = [(-worst[i], self._samples + int(i)) for i in np.argsort(-worst, kind="stable")[:WORST_SAMPLES]]
        self._worst = sorted(self._worst + [entry for entry in ranked if entry[0] < 0])[:WORST_SAMPLES]
        self._samples += count

    def _update_agreement(self, y: Array, other: Array, axis: int) -> None:
        if y.ndim <= axis or not y.size:
            return
        self._positions += y.size // y.shape[axis]
        if y.shape == other.shape:
            # arg-max takes NaN for the largest, so that a NaN could pass for the first class.
            same = y.argmax(axis) == other.argmax(axis)
            self._agreeing += int((same & (np.isnan(y).any(axis) == np.isnan(other).any(axis))).sum())

    def result(self) -> Comparison:
        """What was found so far.

        Raises:
            VerificationError: no sample was compared, so that nothing can be said.
        """
        if not self._samples or not self._outputs:
            raise VerificationError("There was no sample to compare the models on; give more calibration data.")
        outputs = tuple(
            replace(output.result(), holds=self._holds.get(name, "")) for name, output in self._outputs.items()
        )
        absolute = (o.max_abs_error for o in outputs if o.changed_share is None or o.relative_error == np.inf)
        return Comparison(
            samples=self._samples,
            outputs=outputs,
            relative_error=max(output.relative_error for output in outputs),
            max_abs_error=max(absolute, default=0.0),
            agreement=self._agreeing / self._positions if self._positions else None,
            worst_samples=tuple(sample for _, sample in self._worst),
            worst_errors=tuple(-error for error, _ in self._worst),
            agreement_output=self._arg_max[0] if self._arg_max is not None and self._positions else None,
            decisions=self._positions,
        )


def _rows_per_sample(y: Array, count: int, fed: int | None) -> int:
    """How many entries of the leading axis belong to one sample; 0 if it is no sample axis."""
    if not y.ndim:
        return 0
    if fed is None:
        return 1 if len(y) >= count else 0
    return len(y) // fed if fed and len(y) % fed == 0 else 0


def _is_float(dtype: np.dtype[Any]) -> bool:
    return dtype.kind == "f" or (dtype.kind == "V" and "float" in dtype.name)


def decision(
    outputs: Mapping[str, Array], wanted: str | None, holds: Mapping[str, str] = MappingProxyType({})
) -> tuple[str, int] | None:
    """Name and axis of the output whose arg-max is the decision of the model; None if none is.

    Args:
        outputs: by name, samples along the leading axis.
        wanted: `NAME` or `NAME:AXIS`; None finds one.
        holds: what the graph says of them: an embedding is not found.

    Raises:
        UsageError: the output does not exist or has no such axis.
    """
    shapes = {name: np.shape(value) for name, value in outputs.items()}
    if wanted is None:
        for name, shape in shapes.items():
            if not _is_float(np.asarray(outputs[name]).dtype) or len(shape) not in (2, 4) or name in holds:
                continue
            if shape[1] > 1 and (len(shape) == 2 or shape[1] <= MAX_CLASSES):
                return name, 1
        return None
    # A name may itself hold a colon ("scores:0"): an output of exactly that name goes first.
    name, _, text = (wanted, "", "") if wanted in shapes else wanted.rpartition(":")
    if name not in shapes or (text and not re.fullmatch(r"-?\d+", text)):
        listed = ", ".join(shapes)
        raise UsageError(f"--agreement-output takes NAME or NAME:AXIS, not {wanted!r}; the outputs are: {listed}.")
    rank = len(shapes[name])
    axis = int(text) if text else (1 if rank == 4 else rank - 1)
    axis += rank if axis < 0 else 0
    if not 1 <= axis < rank or shapes[name][axis] < 2:
        raise UsageError(
            f"--agreement-output: {name!r} of shape {shapes[name]} has no axis {text or axis} of two or more classes "
            "behind its sample axis."
        )
    return name, axis


class _Output:
    """What has been seen of one output."""

    def __init__(self, name: str, y: Array, chunk: int) -> None:
        self._name, self._chunk = name, chunk
        self._is_float = _is_float(y.dtype)
        self._whole = _Slices(None)
        axes = {1, y.ndim - 1} if y.ndim > 1 and self._is_float else set()
        self._slices = {axis: _Slices(axis) for axis in sorted(axes) if y.shape[axis] <= MAX_MEANS}
        self._rank = y.ndim
        self._first: tuple[int, ...] | None = None  # shape of the first arrays that hold anything
        self._shapes_differ = self._shapes_agree = 0
        self._changed = 0
        self._elements = 0
        self._max_abs = 0.0
        self._products = np.zeros(3)  # y.y, y'.y', y.y'
        self._cosines = _Cosines()
        self._worst = (-1.0, 0)

    def update(self, y: Array, other: Array, samples: int) -> Floats:
        """Add arrays whose leading axis holds `samples` samples; returns the error of each, (samples,)."""
        if y.shape != other.shape:
            differ = bool(y.size or other.size)
            self._shapes_differ += samples if differ else 0
            return np.full(samples, np.inf if differ else 0.0)
        self._shapes_agree += samples
        if not y.size:
            return np.zeros(samples)
        first = self._first = self._first or y.shape
        same = (axis for axis in self._slices if y.ndim == self._rank and y.shape[axis] == first[axis])
        self._slices = {axis: self._slices[axis] for axis in same}
        # Of the difference and of y squares, of y' squares and its products with y, for each leading entry.
        squares = np.zeros((4, len(y) if y.ndim else 1))
        y, other = (y, other) if y.ndim else (y[None], other[None])
        step = max(1, self._chunk // (y.size // len(y)))
        for start in range(0, len(y), step):
            piece = slice(start, start + step)
            rows = self._update_floats if self._is_float else self._update_others
            squares[:, piece] = rows(y[piece], other[piece])
        difference, size, others, products = squares.reshape(4, samples, -1).sum(axis=2)
        if self._is_float:
            self._products += (size.sum(), others.sum(), products.sum())
            self._cosines.update(size, others, products)
        return _quotient(np.sqrt(difference), np.sqrt(size))

    def _update_floats(self, y: Array, other: Array) -> tuple[Floats, ...]:
        y, other = y.astype(np.float64), other.astype(np.float64)
        finite = np.isfinite(y)
        with np.errstate(invalid="ignore", over="ignore"):
            difference = np.abs(other - y)
            difference[~np.isfinite(other)] = np.inf
            difference[~finite] = np.where((other == y) | (np.isnan(other) & np.isnan(y)), 0.0, np.inf)[~finite]
            y[~finite] = 0.0
            seen = np.where(finite, other, 0.0)
            self._max_abs = max(self._max_abs, float(difference.max()))
            difference *= difference
            for slices in (self._whole, *self._slices.values()):
                slices.update(y, difference, finite)
            inside = tuple(range(1, y.ndim))
            return tuple(term.sum(axis=inside) for term in (difference, y * y, seen * seen, y * seen))

    def _update_others(self, y: Array, other: Array) -> tuple[Floats, ...]:
        changed = np.asarray(y != other, dtype=bool)
        self._changed += int(changed.sum())
        self._elements += changed.size
        if changed.any():
            numbers = y.dtype.kind in "iub" and other.dtype.kind in "iub"
            apart = np.abs(y.astype(np.float64) - other.astype(np.float64)).max() if numbers else np.inf
            self._max_abs = max(self._max_abs, float(apart))
        nothing = np.zeros(len(y))
        count = np.full(len(y), float(changed[0].size))
        return changed.reshape(len(y), -1).sum(axis=1, dtype=np.float64), count, nothing, nothing

    def note_worst(self, errors: Floats, first: int) -> None:
        """Remember the worst sample; `first` is the number of the first one in `errors`."""
        if len(errors) and errors.max() > self._worst[0]:
            self._worst = (float(errors.max()), first + int(errors.argmax()))

    def result(self) -> OutputComparison:
        share = None if self._is_float else self._changed / max(1, self._elements)
        if share is not None:
            relative, whole = share, share
            centered = share
        else:
            # With one entry in each slice nothing is left after centring: the next larger slice answers.
            channels = [slices for slices in self._slices.values() if slices.number <= MAX_SLICES]
            several = [slices.error() for slices in channels if slices.most_entries > 1]
            whole = self._whole.uncentred_error()
            relative = max(several) if several else self._whole.error() if self._whole.most_entries > 1 else whole
            centered = self._centered(whole)
        largest, shared = self._max_abs, None
        if self._shapes_differ:
            shared = relative if self._shapes_agree else None
            relative = whole = largest = np.inf
        found = OutputComparison(self._name, relative, whole, largest, self._worst[1], share)
        cosine = self._cosine()
        mean, lowest = (None, None) if cosine is None else self._cosines.result()
        return replace(
            found,
            cosine=None if self._shapes_differ else cosine,
            centered_error=np.inf if self._shapes_differ and not self._shapes_agree else centered,
            mean_cosine=mean,
            worst_cosine=lowest,
            shapes_differ=self._shapes_differ,
            shared_error=shared,
        )

    def _centered(self, whole: float) -> float:
        """`OutputComparison.centered_error`, and `whole` where nothing varies."""
        found = (slices.explained_error() for slices in (self._whole, *self._slices.values()))
        return max((error for error in found if error is not None), default=whole)

    def _cosine(self) -> float | None:
        one, two, both = self._products
        if not self._is_float or not (one > 0 and 0 < two < np.inf):
            return None
        return float(np.clip(both / (np.sqrt(one) * np.sqrt(two)), -1.0, 1.0))


class _Cosines:
    """The cosines of single samples; those in which the original is zero have none."""

    def __init__(self) -> None:
        self._count, self._sum, self._lowest = 0, 0.0, 1.0

    def update(self, one: Floats, two: Floats, both: Floats) -> None:
        """Add samples: squared norms of both models' outputs, and their products, each (samples,)."""
        counted = (one > 0) & np.isfinite(one)
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            cosines = both[counted] / np.sqrt(one[counted]) / np.sqrt(two[counted])
        cosines = np.clip(np.nan_to_num(cosines, nan=0.0, posinf=0.0, neginf=0.0), -1.0, 1.0)
        self._count += len(cosines)
        self._sum += float(cosines.sum())
        self._lowest = min(self._lowest, float(cosines.min(initial=1.0)))

    def result(self) -> tuple[float, float]:
        """Mean and lowest."""
        return self._sum / max(1, self._count), self._lowest


class _Slices:
    """Running sums over the slices of one axis, or over the whole tensor as one slice."""

    def __init__(self, axis: int | None) -> None:
        self._axis = axis
        self._count: Any = 0.0
        self._mean: Any = 0.0
        self._spread: Any = 0.0
        self._difference: Any = 0.0

    def update(self, y: Floats, squared_difference: Floats, counted: NDArray[np.bool_]) -> None:
        """Add entries; those not `counted` are zero in `y`."""
        others = tuple(axis for axis in range(y.ndim) if axis != self._axis)
        count = counted.sum(axis=others, keepdims=True, dtype=np.float64)
        mean = y.sum(axis=others, keepdims=True) / np.maximum(count, 1.0)
        spread = np.square((y - mean) * counted).sum(axis=others)
        count, mean = count.reshape(spread.shape), mean.reshape(spread.shape)
        total = np.maximum(self._count + count, 1.0)
        apart = mean - self._mean
        self._spread = self._spread + spread + apart**2 * self._count * count / total
        self._mean = self._mean + apart * count / total
        self._count = self._count + count
        self._difference = self._difference + squared_difference.sum(axis=others)

    @property
    def number(self) -> int:
        """Slices that there are."""
        return int(np.size(self._count))

    @property
    def most_entries(self) -> int:
        return int(np.max(self._count))

    def error(self) -> float:
        """The formula of the module, worst slice."""
        floor = FLOOR * np.max(self._norms())
        return float(np.max(_quotient(np.sqrt(self._difference), np.sqrt(self._spread) + floor)))

    def explained_error(self) -> float | None:
        """`OutputComparison.centered_error` of this axis; None where no slice varies, or has two entries."""
        several = self._count > 1
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            # The mean is fitted to the same entries, so that few of them seem to be nearer to it than others would be.
            spread = np.where(several, self._spread * self._count / (self._count - 1), 0.0).sum()
            size = np.sqrt(np.square(self._norms())[several].sum() if np.ndim(several) else self._norms())
        if not spread > (FLOOR * size) ** 2:
            return None
        return float(_quotient(np.sqrt(np.sum(np.where(several, self._difference, 0.0))), np.sqrt(spread)))

    def uncentred_error(self) -> float:
        return float(np.max(_quotient(np.sqrt(self._difference), self._norms())))

    def _norms(self) -> Any:
        return np.sqrt(self._spread + self._count * np.square(self._mean))


def _quotient(difference: Any, size: Any) -> Floats:
    """Error as difference / size: 0 if equal, whatever the size; inf if it cannot be computed, so as not to pass."""
    with np.errstate(invalid="ignore", divide="ignore"):
        error = np.where(np.equal(difference, 0.0), 0.0, np.divide(difference, size))
    return np.where(np.isnan(error), np.inf, error)

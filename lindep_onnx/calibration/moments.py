"""Mergeable moments of activations: what calibration keeps instead of the activations themselves."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lindep_onnx.data.npz import UNREADABLE, npz_headers
from lindep_onnx.errors import CalibrationError, OutputError, one_line
from lindep_onnx.files import replacing
from lindep_onnx.linalg.gram import add_gram

#: Rows of one sample are alike: so many of them count, at most, when it is asked what was seen often enough.
ROWS_PER_SAMPLE = 16
#: What differs by less than this share of its size is constant: it is rounding.
CONSTANT_TOLERANCE = 1e-6
#: Rows that wait to be added up, or a quarter of the number of features if that is more.
MIN_BUFFERED = 128
#: In the place of second moments that are kept elsewhere.
NO_GRAM = np.zeros((0, 0))


def never_changes(low: NDArray[np.float64], high: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether smallest and largest values differ by no more than rounding."""
    return np.asarray(high - low <= CONSTANT_TOLERANCE * np.maximum(np.abs(low), np.abs(high)))


@dataclass(frozen=True)
class Moments:
    """Sums over the rows of Z (rows x F features).

    Attributes:
        rows: number of rows.
        samples: number of samples the rows come from.
        effective_rows: rows, but at most 16 for each sample.
        sum: (F,) float64 column sums.
        gram: (F, F) float64 uncentred second moments Z'Z.
        low: (F,) smallest value.
        high: (F,) largest value.
        active: (F,) int64, number of samples with a value other than zero.
        at_low: (F,) int64, number of samples all of whose values are `low`.
        at_high: (F,) int64, number of samples all of whose values are `high`.
    """

    rows: int
    samples: int
    effective_rows: float
    sum: NDArray[np.float64]
    gram: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    active: NDArray[np.int64]
    at_low: NDArray[np.int64]
    at_high: NDArray[np.int64]

    @property
    def moving(self) -> NDArray[np.int64]:
        """(F,) number of samples in which a feature leaves its rest: zero, or the value at an end of its range."""
        return np.asarray(np.minimum(self.active, self.samples - np.maximum(self.at_low, self.at_high)))

    @property
    def mean(self) -> NDArray[np.float64]:
        """(F,) column means."""
        return self.sum / max(1, self.rows)

    def merge(self, other: Moments) -> Moments:
        """Moments of the rows of both."""
        return Moments(
            rows=self.rows + other.rows,
            samples=self.samples + other.samples,
            effective_rows=self.effective_rows + other.effective_rows,
            sum=self.sum + other.sum,
            gram=self.gram + other.gram,
            low=np.minimum(self.low, other.low),
            high=np.maximum(self.high, other.high),
            active=self.active + other.active,
            at_low=_at_end(self.low, self.at_low, other.low, other.at_low),
            at_high=_at_end(-self.high, self.at_high, -other.high, other.at_high),
        )

    def about(self, center: NDArray[np.float64]) -> NDArray[np.float64]:
        """(F, F) second moments per row about `center`: E z z' - c m' - m c' + c c'."""
        about = self.gram / max(1, self.rows)  # and then in place, for it may be large
        if np.array_equal(center, self.mean):
            about -= np.outer(center, center)
        elif center.any():
            cross = np.outer(center, self.mean)
            about -= cross
            about -= cross.T
            about += np.outer(center, center)
        return about


def batch_moments(
    gram: NDArray[np.float64], total: NDArray[np.float64], lows: NDArray[Any], highs: NDArray[Any], positions: int
) -> Moments:
    """Moments of some samples from what is known of each.

    Args:
        gram: (F, F) second moments of all rows.
        total: (F,) column sums.
        lows: (S, F) smallest value of each sample.
        highs: (S, F) largest value of each sample.
        positions: rows of each sample.

    Raises:
        CalibrationError: a value is NaN or infinite.
    """
    lows, highs = lows.astype(np.float64), highs.astype(np.float64)
    low, high = lows.min(axis=0), highs.max(axis=0)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise CalibrationError("An activation is NaN or infinite.")
    samples = len(lows)
    return Moments(
        rows=samples * positions,
        samples=samples,
        effective_rows=samples * min(positions, ROWS_PER_SAMPLE),
        sum=total,
        gram=gram,
        low=low,
        high=high,
        active=((lows != 0) | (highs != 0)).sum(axis=0),
        at_low=(highs == low).sum(axis=0),
        at_high=(lows == high).sum(axis=0),
    )


class MomentsAccumulator:
    """Takes batches of rows and adds them up in float64.

    Rows wait until there are enough of them for one large matrix product; memory is that of the Gram matrix and
    a few rows.

    Args:
        features: F, the number of columns.
    """

    def __init__(self, features: int) -> None:
        self._waiting: list[NDArray[Any]] = []
        self._waiting_rows = 0
        self._most = max(MIN_BUFFERED, features // 4)
        self._gram = np.zeros((features, features), order="F")  # its lower triangle, until the end
        ends, nothing = np.full(features, np.inf), np.zeros(features, dtype=np.int64)
        #: All but the Gram matrix.
        self._sums = Moments(0, 0, 0.0, np.zeros(features), NO_GRAM, ends, -ends, nothing, nothing, nothing)

    @property
    def low(self) -> NDArray[np.float64]:
        """(F,) smallest value that was added up."""
        return self._sums.low

    @property
    def high(self) -> NDArray[np.float64]:
        """(F,) largest value that was added up."""
        return self._sums.high

    def absorb(self, moments: Moments) -> None:
        """Add what rows elsewhere came to."""
        self._gram += moments.gram.T  # in the order of memory; it is symmetric
        self._sums = self._sums.merge(replace(moments, gram=NO_GRAM))

    def take(self, rows: NDArray[Any]) -> bool:
        """Keep rows for later; whether they are enough to be added up.

        Args:
            rows: (S, P, F) array: P rows of each of S samples.
        """
        if rows.size:
            # A copy: what comes in may be a view of a tensor that is much larger.
            self._waiting.append(np.array(rows, order="C"))
            self._waiting_rows += rows.shape[0] * rows.shape[1]
        return self._waiting_rows >= self._most

    def add_up(self) -> None:
        """Add up what was taken. Different accumulators may do so at the same time.

        Raises:
            CalibrationError: a value added so far is NaN or infinite.
        """
        waiting, self._waiting, self._waiting_rows = self._waiting, [], 0
        for _, alike in itertools.groupby(waiting, key=lambda rows: rows.shape[1:]):
            self._add(np.concatenate(list(alike)))

    def _add(self, rows: NDArray[Any]) -> None:
        _, positions, features = rows.shape
        # float32 products would lose the rank of the Gram matrix.
        flat = np.ascontiguousarray(rows, dtype=np.float64).reshape(-1, features)
        found = batch_moments(NO_GRAM, flat.sum(axis=0), rows.min(axis=1), rows.max(axis=1), positions)
        # In place and one triangle: twice as fast as a product that is then added, and without its memory.
        add_gram(self._gram, flat)
        self._sums = self._sums.merge(found)

    def result(self) -> Moments:
        """Everything added so far.

        Raises:
            CalibrationError: a value is NaN or infinite.
        """
        self.add_up()
        return replace(self._sums, gram=_mirrored(self._gram))


def _mirrored(lower: NDArray[np.float64], block: int = 256) -> NDArray[np.float64]:
    """A symmetric matrix from its lower triangle, block by block: whole transposes read memory against its order."""
    whole = np.empty(lower.shape)
    for start in range(0, len(lower), block):
        own = slice(start, start + block)
        whole[:start, own] = lower[own, :start].T
        whole[own, :start] = lower[own, :start]
        corner = np.tril(lower[own, own])
        whole[own, own] = corner + np.tril(corner, -1).T
    return whole


def _at_end(
    end: NDArray[np.float64], count: NDArray[np.int64], other: NDArray[np.float64], more: NDArray[np.int64]
) -> NDArray[np.int64]:
    """(F,) how many samples lie at the lower of two ends."""
    return np.where(other < end, 0, count) + np.where(other > end, 0, more)


_FIELDS = ("sum", "gram", "low", "high", "active", "at_low", "at_high")
#: Prefix of arrays that are kept beside moments.
_BESIDE = "beside."


def save_moments(
    path: Path, named: Mapping[str, Moments], beside: Mapping[str, NDArray[Any]] = MappingProxyType({})
) -> None:
    """Write moments to one `.npz`, so that `path` holds either its old content or the complete new one.

    Args:
        path: where to.
        named: the moments.
        beside: other arrays to keep in the same file, numbers or texts.

    Raises:
        OutputError: the file cannot be written.
    """
    arrays: dict[str, NDArray[Any]] = {"names": np.array(list(named), dtype=np.str_)}
    for number, moments in enumerate(named.values()):
        arrays[f"{number}.counts"] = np.array([moments.rows, moments.samples, moments.effective_rows])
        arrays.update({f"{number}.{field}": getattr(moments, field) for field in _FIELDS})
    arrays.update({_BESIDE + name: value for name, value in beside.items()})
    try:
        with replacing(path) as staged, staged.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error}).") from error


def load_moments(path: Path) -> tuple[dict[str, Moments], dict[str, NDArray[Any]]]:
    """Read what `save_moments` wrote, and what was kept beside it. No more is read than the file is long.

    Raises:
        CalibrationError: the file is missing or damaged.
    """
    try:
        npz_headers(path, stored=True)  # `numpy.load` takes more than archives, and believes every header
        with np.load(path, allow_pickle=False) as data:
            result = {}
            for number, name in enumerate(data["names"].tolist()):
                rows, samples, effective = data[f"{number}.counts"].tolist()
                fields = {field: data[f"{number}.{field}"] for field in _FIELDS}
                vector = fields["sum"].shape
                if any(fields[field].shape != (vector * 2 if field == "gram" else vector) for field in _FIELDS):
                    raise ValueError(f"the sizes of {name!r} do not agree")
                result[name] = Moments(int(rows), int(samples), float(effective), **fields)
            beside = {name.removeprefix(_BESIDE): data[name] for name in data.files if name.startswith(_BESIDE)}
            return result, beside
    except UNREADABLE as error:
        raise CalibrationError(f"{path}: is not a readable file of moments ({one_line(error)}).") from error

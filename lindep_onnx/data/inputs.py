"""What a model wants to be fed with, and whether arrays fit it.

Whatever the source of calibration data, samples end up in *shards*: arrays by input name whose leading axis counts
samples, some of them without that axis and the same for all. They are held against the inputs of the model before
anything runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lindep_onnx.errors import CalibrationError
from lindep_onnx.model.shapes import Shape

Array: TypeAlias = NDArray[Any]
Arrays: TypeAlias = "Mapping[str, Array]"

#: The name under which an unnamed array arrives (`.npy`, `numpy.savez` without keywords).
UNNAMED = "arr_0"
#: A model with a larger fixed batch means harm: its last batch is filled up.
MAX_BATCH = 1 << 16


@dataclass(frozen=True)
class InputSpec:
    """What the model declares about one of its inputs.

    Attributes:
        name: of the graph input.
        dtype: element type.
        shape: sizes; symbols are strings. Empty for scalars, None where the rank is not declared.
        range: lowest and highest value that the user allows; None for any.
    """

    name: str
    dtype: np.dtype[Any]
    shape: Shape | None
    range: tuple[float, float] | None = None


@dataclass(frozen=True)
class Header:
    """Type and shape of an array that may not be read yet."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Shard:
    """Arrays that are read when they are needed.

    Attributes:
        where: for messages.
        headers: type and shape of each array.
        read: returns the arrays, memory maps wherever that is possible.
    """

    where: str
    headers: Mapping[str, Header]
    read: Callable[[], Arrays]


@dataclass(frozen=True)
class Feeding:
    """How shards are fed to the model.

    Attributes:
        specs: the inputs.
        shared: names of inputs that have no sample axis and are fed whole with every run.
        batch: samples per run at most.
        fixed_batch: samples per run exactly, where the model fixes it.
        notes: casts.
    """

    specs: Sequence[InputSpec]
    shared: frozenset[str]
    batch: int
    fixed_batch: int | None
    notes: tuple[str, ...]

    @property
    def sampled(self) -> Sequence[InputSpec]:
        """The inputs that have a sample axis."""
        return [spec for spec in self.specs if spec.name not in self.shared]

    def count(self, shard: Shard) -> int:
        """Number of samples in a shard."""
        sampled = self.sampled
        return shard.headers[source_of(sampled[0], shard.headers)].shape[0] if sampled else 1


def feeding(shards: Sequence[Shard], specs: Sequence[InputSpec], batch_size: int) -> Feeding:
    """Hold shards against the inputs of a model, and find out what a sample is.

    Args:
        shards: the data.
        specs: the inputs.
        batch_size: samples per run where the model leaves that free.

    Raises:
        CalibrationError: they do not fit, naming what was expected and found.
    """
    notes: dict[str, None] = {}
    for shard in shards:
        check_arrays(shard, specs, notes)
    shared = without_samples([shard.headers for shard in shards], specs)
    sampled = [spec for spec in specs if spec.name not in shared]
    for shard in shards:
        check_lengths(shard.where, {spec.name: shard.headers[source_of(spec, shard.headers)] for spec in sampled})
    fixed = {spec.shape[0] for spec in sampled if spec.shape and isinstance(spec.shape[0], int)}
    if len(fixed) > 1:
        raise CalibrationError(
            f"The model fixes different leading sizes for its inputs ({sorted(map(int, fixed))}), so that it is not "
            "clear what a sample is; export it with a free batch axis."
        )
    fixed_batch = int(fixed.pop()) if fixed else None
    if fixed_batch is not None and not 0 < fixed_batch <= MAX_BATCH:
        raise CalibrationError(
            f"The model declares a batch of {fixed_batch:,} samples; it must be from 1 to {MAX_BATCH:,}, or free."
        )
    return Feeding(specs, shared, fixed_batch or batch_size, fixed_batch, tuple(notes))


def source_of(spec: InputSpec, arrays: Mapping[str, object]) -> str:
    """The key of the array for an input."""
    return spec.name if spec.name in arrays else UNNAMED


def _is_whole(spec: InputSpec, header: Header) -> bool:
    """Whether an array has exactly the fixed shape that the model declares."""
    return spec.shape is not None and header.shape == spec.shape


def without_samples(layouts: Sequence[Mapping[str, Header]], specs: Sequence[InputSpec]) -> frozenset[str]:
    """Names of the inputs whose arrays have no sample axis.

    An array of exactly the declared shape may be one batch of samples or something that all samples share. It is
    shared if the model leaves the batch of another input free, or fixes it to another size, or if there are not as
    many of it as there are of the inputs that have a sample axis beyond doubt.
    """
    found = [(spec, [layout[source_of(spec, layout)] for layout in layouts]) for spec in specs]
    whole = [(spec, headers) for spec, headers in found if all(_is_whole(spec, header) for header in headers)]
    certain = [(spec, headers) for spec, headers in found if spec.name not in {other.name for other, _ in whole}]
    if any(not spec.shape or isinstance(spec.shape[0], str) for spec, _ in certain):
        return frozenset(spec.name for spec, _ in whole)
    ranked = [(spec, headers) for spec, headers in whole if spec.shape]
    samples = {(spec.shape[0], _lengths(headers)) for spec, headers in (certain or ranked[:1]) if spec.shape}
    return frozenset(
        spec.name for spec, headers in whole if not spec.shape or (spec.shape[0], _lengths(headers)) not in samples
    )


def _lengths(headers: Iterable[Header]) -> tuple[int, ...]:
    return tuple(header.shape[0] for header in headers)


def check_lengths(where: str, headers: Mapping[str, Header]) -> None:
    """Raise a CalibrationError if arrays hold different numbers of samples."""
    lengths = {name: header.shape[0] for name, header in headers.items()}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{name}: {length}" for name, length in lengths.items())
        raise CalibrationError(
            f"{where}: the arrays hold different numbers of samples along their leading axis ({found})."
        )


def check_arrays(shard: Shard, specs: Sequence[InputSpec], notes: dict[str, None]) -> None:
    """Raise a CalibrationError if arrays do not fit the inputs by name, type and shape; casts are added to `notes`."""
    _check_names(shard, specs)
    for spec in specs:
        header = shard.headers[source_of(spec, shard.headers)]
        _check_type(shard, spec, header, notes)
        if not _is_whole(spec, header):
            _check_shape(shard, spec, header)


def _check_names(shard: Shard, specs: Sequence[InputSpec]) -> None:
    names = [spec.name for spec in specs]
    found = list(shard.headers)
    if found == [UNNAMED] and len(names) == 1:
        return
    missing = [name for name in names if name not in found]
    if missing:
        raise CalibrationError(
            f"{shard.where}: no array for the model input {missing[0]!r}; the inputs are {listed(names)}, "
            f"the arrays {listed(found)}. Name the arrays after the inputs."
        )
    extra = [name for name in found if name not in names]
    if extra:
        raise CalibrationError(
            f"{shard.where}: the model has no input {extra[0]!r}; the inputs are {listed(names)}, "
            f"the arrays {listed(found)}. Leave it out."
        )


def listed(names: Sequence[str]) -> str:
    """Some names in quotes, and how many more there are."""
    return ", ".join(map(repr, names[:8])) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def kind_of(dtype: np.dtype[Any]) -> str:
    """The kind of a type: values are cast within a kind, never to another."""
    if dtype.kind in "iu":
        return "integer"
    if dtype.kind == "f" or (dtype.kind == "V" and "float" in dtype.name):
        return "float"
    return {"b": "bool", "U": "string", "S": "string", "O": "string"}.get(dtype.kind, dtype.name)


def _check_type(shard: Shard, spec: InputSpec, header: Header, notes: dict[str, None]) -> None:
    if kind_of(header.dtype) != kind_of(spec.dtype):
        hint = " Scale and normalise images the way the model was trained." if header.dtype == np.uint8 else ""
        raise CalibrationError(
            f"{shard.where}: input {spec.name!r} wants {spec.dtype}, the array is {header.dtype}; convert it.{hint}"
        )
    if header.dtype != spec.dtype and kind_of(spec.dtype) != "string":
        notes[f"Input {spec.name!r}: {header.dtype} data is cast to {spec.dtype}."] = None


def _check_shape(shard: Shard, spec: InputSpec, header: Header) -> None:
    wanted, found = spec.shape, header.shape
    if wanted is None and found:
        return
    if not (wanted and found and _agree(wanted[1:], found[1:])):
        sizes = ["?" if isinstance(size, str) and size.startswith("?") else str(size) for size in (wanted or ())[1:]]
        raise CalibrationError(
            f"{shard.where}: input {spec.name!r} wants arrays of shape [{', '.join(['samples', *sizes])}], "
            f"this one is [{', '.join(map(str, found))}].{_shape_hint(wanted, found)}"
        )


def _shape_hint(wanted: Shape | None, found: tuple[int, ...]) -> str:
    """What to do about a shape that is not the one that is wanted, where that is plain."""
    if wanted is None or not found:
        return ""
    if _agree(wanted[1:], found):
        return " Add a leading axis that counts samples, even for one: array[None]."
    if len(wanted) == len(found) > 2:
        first, last = (found[-1], *found[1:-1]), (*found[2:], found[1])
        for axes, moved in (("-1, 1", first), ("1, -1", last)):
            if _agree(wanted[1:], moved):
                return f" Its channels are on another axis: numpy.moveaxis(array, {axes}) moves them."
    return ""


def _agree(wanted: Sequence[int | str], found: Sequence[int]) -> bool:
    return len(wanted) == len(found) and all(
        isinstance(size, str) or size == other for size, other in zip(wanted, found, strict=True)
    )


def cast(value: Array, dtype: np.dtype[Any], where: str) -> Array:
    """An array of the type that the model takes; a CalibrationError if values do not fit it."""
    if dtype.kind == "O":
        return value.astype(object)
    if dtype.kind in "iu" and value.dtype != dtype and value.size:
        limits = np.iinfo(dtype)
        if int(value.min()) < limits.min or int(value.max()) > limits.max:
            raise CalibrationError(f"{where} holds integers that do not fit {dtype}.")
    try:
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(value, dtype=dtype).reshape(value.shape)
    except UnicodeDecodeError:
        raise CalibrationError(f"{where} holds bytes that are no ASCII text; store it as strings.") from None


def not_finite(where: str, dtype: np.dtype[Any], stored: Array, sample: int | None) -> CalibrationError:
    """The error for an array that holds what may not be fed once it is cast; minus infinity may, where it is stored."""
    wrong = np.isnan(stored).any() or (stored == np.inf).any()
    what = "NaN or infinite values" if wrong else f"values too large for {dtype}"
    which, remedy = ("", "repair it") if sample is None else (f" (sample {sample})", "remove or repair this sample")
    return CalibrationError(f"{where} holds {what}{which}; {remedy}.")


def outside(where: str, allowed: tuple[float, float], found: Any, sample: int | None) -> CalibrationError:
    """The error for a value outside the range that was declared."""
    which = "" if sample is None else f" (sample {sample})"
    return CalibrationError(
        f"{where} holds {float(found):.6g}{which}, outside the --input-range {allowed[0]:g}:{allowed[1]:g}; "
        "widen the range or repair the data."
    )

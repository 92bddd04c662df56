"""What a model wants to be fed with, and whether arrays fit it.

Whatever the source of calibration data, samples end up in *shards*: arrays by input name, one axis of which counts
samples (the leading one, where the names of axes say nothing else), some of them without that axis and the same for
all. They are held against the inputs of the model before anything runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lindep_onnx.data.places import WHOLE, Place, agree, place_of
from lindep_onnx.errors import CalibrationError
from lindep_onnx.model.shapes import SAMPLES, Shape

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
        axis: which axis counts samples; None if none does, as in a scalar.
    """

    name: str
    dtype: np.dtype[Any]
    shape: Shape | None
    range: tuple[float, float] | None = None
    axis: int | None = 0

    def __post_init__(self) -> None:
        if self.shape == ():
            object.__setattr__(self, "axis", None)  # a scalar has no axes at all

    @property
    def samples(self) -> int | str | None:
        """Declared size of the sample axis; None if there is none, or no rank."""
        return self.shape[self.axis] if self.shape and self.axis is not None and self.axis < len(self.shape) else None


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
        leading: whether samples were put on the leading axis, wherever the model has them.
        feed: whether the arrays are what one run can be fed with, so that they need no common sample axis.
    """

    where: str
    headers: Mapping[str, Header]
    read: Callable[[], Arrays]
    leading: bool = False
    feed: bool = False


@dataclass(frozen=True)
class Feeding:
    """How shards are fed to the model.

    Attributes:
        specs: the inputs.
        places: where the samples of each input are, shard by shard.
        batch: samples per run at most.
        fixed_batch: samples per run exactly, where the model fixes it.
        alone: whether every run takes one sample, since runs cannot be put together.
        notes: casts, and inputs whose samples lie elsewhere than in front.
    """

    specs: Sequence[InputSpec]
    places: Sequence[Mapping[str, Place]]
    batch: int
    fixed_batch: int | None
    alone: bool
    notes: tuple[str, ...]

    def count(self, index: int, shard: Shard) -> int:
        """Number of samples in a shard, by its number."""
        return next(iter(_counts(self.places[index], shard).values()), 1)

    @property
    def leading(self) -> bool:
        """Whether samples are on the leading axis of everything that is fed."""
        return all(place.fed == 0 for places in self.places for place in places.values())


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
    places = [places_in(shard, specs, shared) for shard in shards]
    if any(is_whole_feed(shard, specs, own) for shard, own in zip(shards, places, strict=True)):
        places = [dict.fromkeys(own, WHOLE) if shard.feed else own for shard, own in zip(shards, places, strict=True)]
    for shard, own in zip(shards, places, strict=True):
        check_lengths(shard.where, _counts(own, shard))
    shapes = [
        (own[spec.name], shard.headers[source_of(spec, shard.headers)].shape)
        for shard, own in zip(shards, places, strict=True)
        for spec in specs
    ]
    several = any(place.alone(shape) and place.fed is not None for place, shape in shapes)
    alone = (
        several
        or any(place.alone(shape) for place, shape in shapes)
        or not any(p.stored is not None for p, _ in shapes)
    )
    sampled = [spec for spec in specs if any(own[spec.name].fed is not None for own in places)]
    fixed_batch = None if several else _fixed_batch(sampled)
    for spec in sampled:
        if spec.axis:
            notes[f"Input {spec.name!r}: axis {spec.axis} is taken to count samples (--batch-axis says otherwise)."] = (
                None
            )
    if any(place.alone(shape) for place, shape in shapes):
        notes["Samples are run one by one, for inputs of several do not go into one run."] = None
    return Feeding(specs, places, 1 if alone else fixed_batch or batch_size, fixed_batch, alone, tuple(notes))


def _fixed_batch(sampled: Sequence[InputSpec]) -> int | None:
    """Samples per run where the model fixes them."""
    fixed = {spec.samples for spec in sampled if isinstance(spec.samples, int)}
    if len(fixed) > 1:
        raise CalibrationError(
            f"The model fixes different leading sizes for its inputs ({sorted(map(int, fixed))}), so that it is not "
            "clear what a sample is; export it with a free batch axis, or name the axis (--batch-axis NAME=AXIS)."
        )
    fixed_batch = int(fixed.pop()) if fixed else None
    if fixed_batch is not None and not 0 < fixed_batch <= MAX_BATCH:
        raise CalibrationError(
            f"The model declares a batch of {fixed_batch:,} samples; it must be from 1 to {MAX_BATCH:,}, or free."
        )
    return fixed_batch


def places_in(shard: Shard, specs: Sequence[InputSpec], shared: frozenset[str]) -> dict[str, Place]:
    """Where the samples of every input are in a shard that fits.

    Args:
        shard: the arrays.
        specs: the inputs.
        shared: names of those whose arrays have no sample axis.
    """
    found = {}
    for spec in specs:
        header = shard.headers[source_of(spec, shard.headers)]
        place = place_of(spec.shape, spec.axis, header.shape, leading=shard.leading)
        found[spec.name] = WHOLE if place is None or spec.name in shared else place
    return found


def _counts(places: Mapping[str, Place], shard: Shard) -> dict[str, int]:
    """Samples by input, of those that have a sample axis."""
    shapes = {name: shard.headers[name if name in shard.headers else UNNAMED].shape for name in places}
    counts = {name: place.count(shapes[name]) for name, place in places.items()}
    return {name: count for name, count in counts.items() if count is not None}


def is_whole_feed(shard: Shard, specs: Sequence[InputSpec], places: Mapping[str, Place]) -> bool:
    """Whether arrays that one run can be fed with have no common number of samples, and need none by their names."""
    if not shard.feed:
        return False
    counts = _counts(places, shard)
    by_symbol: dict[Any, set[int]] = {}
    for spec in specs:
        if spec.name in counts:
            named = isinstance(spec.samples, str) and spec.samples != SAMPLES and not spec.samples.startswith("?")
            by_symbol.setdefault(spec.samples if named else (spec.name,), set()).add(counts[spec.name])
    differ = len(set(counts.values())) > 1
    return not counts or (differ and all(len(own) == 1 for own in by_symbol.values()))


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
    if any(spec.axis is not None and not isinstance(spec.samples, int) for spec, _ in certain):
        return frozenset(spec.name for spec, _ in whole)
    fixed = [(spec, headers) for spec, headers in certain if spec.axis is not None]
    ranked = [(spec, headers) for spec, headers in whole if spec.shape and spec.axis is not None]
    samples = {(spec.samples, _lengths(spec, headers)) for spec, headers in (fixed or ranked[:1])}
    return frozenset(
        spec.name
        for spec, headers in whole
        if not spec.shape or spec.axis is None or (spec.samples, _lengths(spec, headers)) not in samples
    )


def _lengths(spec: InputSpec, headers: Iterable[Header]) -> tuple[int, ...]:
    return tuple(header.shape[min(spec.axis or 0, len(header.shape) - 1)] for header in headers)


def check_lengths(where: str, lengths: Mapping[str, int]) -> None:
    """Raise a CalibrationError if arrays hold different numbers of samples."""
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{name}: {length}" for name, length in lengths.items())
        raise CalibrationError(
            f"{where}: the arrays hold different numbers of samples ({found}). Name the axis that counts them with "
            "--batch-axis NAME=AXIS, or give a generator or test_data_set folders, whose items are fed as they are."
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
    if place_of(wanted, spec.axis, found, leading=shard.leading) is not None:
        return
    sizes = ["?" if isinstance(size, str) and size.startswith("?") else str(size) for size in wanted or ()]
    if spec.axis is None:
        shape = f"one value of shape [{', '.join(sizes)}], shared by all samples, or one for each"
    else:
        sizes[spec.axis : spec.axis + 1] = ["samples"]
        shape = f"arrays of shape [{', '.join(sizes)}]"
    raise CalibrationError(
        f"{shard.where}: input {spec.name!r} wants {shape}, this one is [{', '.join(map(str, found))}]."
        f"{_shape_hint(wanted, found) if spec.axis == 0 else ''}"
    )


def _shape_hint(wanted: Shape | None, found: tuple[int, ...]) -> str:
    """What to do about a shape that is not the one that is wanted, where that is plain."""
    if wanted is None or not found:
        return ""
    if agree(wanted[1:], found):
        return " Add a leading axis that counts samples, even for one: array[None]."
    if len(wanted) == len(found) > 2:
        first, last = (found[-1], *found[1:-1]), (*found[2:], found[1])
        for axes, moved in (("-1, 1", first), ("1, -1", last)):
            if agree(wanted[1:], moved):
                return f" Its channels are on another axis: numpy.moveaxis(array, {axes}) moves them."
    return ""


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

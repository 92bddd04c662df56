"""What calibration found, kept in a file, so that budgets can be swept without running the calibration again.

Moments depend on the model, on the samples and their split, and on the options that say which channels take part. The
file holds a fingerprint of each, and is refused where one is another: moments of something else would be wrong without
a sign.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from lindep_onnx.calibration.measure import Calibration, MeasuringPoint, measuring_points
from lindep_onnx.calibration.moments import Moments, load_moments, save_moments
from lindep_onnx.data.samples import Samples
from lindep_onnx.data.split import Part
from lindep_onnx.errors import CalibrationError
from lindep_onnx.model.weights import fingerprint
from lindep_onnx.options import Config, TraceOptions, declared
from lindep_onnx.structure.steps import Curve, Prices, Saving
from lindep_onnx.structure.types import Structure

#: Changes whenever older files must not be read any more.
FORMAT = 1
#: What a file is refused for, by field of its key.
ABOUT = {
    "model": "another model",
    "data": "other calibration data, or split or fed otherwise (--seed, --holdout, --max-samples, --batch-size)",
    "options": "other options (--include, --exclude, --min-channels, --input-range, --seed)",
}


@dataclass(frozen=True)
class SavedStatistics:
    """What data says about a model, as far as running it is what takes time.

    Attributes:
        calibration: moments of all measuring points; None where nobody will ask for them any more.
        uncertain: (units,) bool, constant so far but without a margin.
        prices: the curves that budgets were priced with so far; those of channels are kept in the file.
    """

    calibration: Calibration | None
    uncertain: NDArray[np.bool_]
    prices: Prices


@dataclass(frozen=True)
class Key:
    """What moments depend on, as fingerprints.

    Attributes:
        model: of graph and weights.
        data: of the samples, their split and how they are fed.
        options: of the options that matter.
    """

    model: str
    data: str
    options: str


def key(structure: Structure, samples: Samples, config: Config) -> Key:
    """The fingerprints of one run."""
    given = [getattr(config, name) for name in declared(TraceOptions)]
    plain = [sorted(value.items()) if isinstance(value, Mapping) else value for value in given]
    text = json.dumps([*plain, config.seed]).encode()
    digest = hashlib.blake2b(text, digest_size=16).hexdigest()
    return Key(fingerprint(structure.model.proto, structure.model.folder), samples.fingerprint, digest)


def save(path: Path, learned: SavedStatistics, made_with: Key) -> None:
    """Write a file that `load` reads.

    Raises:
        OutputError: it cannot be written.
    """
    seen = learned.calibration
    assert seen is not None
    named = {f"{part}|{point.key}": found for part, moments in (("fit", seen.fit), ("select", seen.select or {}))
             for point, found in moments.items()}  # fmt: skip
    beside: dict[str, NDArray[Any]] = {
        "format": np.array(FORMAT),
        "key": np.array([made_with.model, made_with.data, made_with.options]),
        "doubtful": learned.uncertain,
        "currencies": np.array(list(learned.prices), dtype=np.str_),
    }
    for currency, curves in learned.prices.items():
        for place, curve in enumerate(curves["channels"]):
            values = {"group": np.array(curve.site), "units": curve.steps, "cost": curve.cost, "saving": curve.saving}
            beside.update({f"{currency}.{place}.{name}": value for name, value in values.items()})
    save_moments(path, named, beside)


def load(path: Path, structure: Structure, samples: Samples, wanted: Key) -> SavedStatistics:
    """Read what `save` wrote, for the same model, data and options.

    Raises:
        CalibrationError: the file is missing, damaged, or about something else.
    """
    named, beside = load_moments(path)
    found = beside.get("key")
    if found is None or found.shape != (3,) or int(beside.get("format", np.array(0)).ravel()[:1].sum()) != FORMAT:
        raise CalibrationError(f"{path}: holds no moments that --save-moments of this version wrote; write it anew.")
    for (field, what), value in zip(ABOUT.items(), found.tolist(), strict=True):
        if value != getattr(wanted, field):
            raise CalibrationError(
                f"{path}: was made with {what}; make it anew with --save-moments, or drop --load-moments."
            )
    try:
        return _checked(structure, samples, named, beside)
    except (KeyError, ValueError, TypeError) as error:
        raise CalibrationError(f"{path}: its contents do not agree with each other; write it anew.") from error


def _checked(
    structure: Structure, samples: Samples, named: Mapping[str, Moments], beside: Mapping[str, NDArray[Any]]
) -> SavedStatistics:
    counts = (len(samples.parts[Part.FIT]), len(samples.parts[Part.SELECT]))
    wanted = measuring_points(structure)
    parts: list[dict[MeasuringPoint, Moments]] = []
    for part in ("fit", "select") if counts[1] else ("fit",):
        parts.append({place: named[f"{part}|{place.key}"] for place in wanted})
        for place, moments in parts[-1].items():
            _require(moments.sum.shape == (len(wanted[place]),) and moments.rows >= 0 and moments.samples >= 0)
            _require(all(np.isfinite(values).all() for values in (moments.sum, moments.gram)))
            _require(not any(np.isnan(values).any() for values in (moments.low, moments.high)))
    uncertain = beside["doubtful"]
    _require(uncertain.shape == (structure.units,) and uncertain.dtype == np.bool_)
    known: tuple[Saving, ...] = get_args(Saving)
    prices = {
        name: {"channels": _curves(structure, beside, name)} for name in known if name in beside["currencies"].tolist()
    }
    calibration = Calibration(parts[0], parts[1] if counts[1] else None, counts)
    return SavedStatistics(calibration, uncertain, prices)


def _curves(structure: Structure, beside: Mapping[str, NDArray[Any]], currency: str) -> tuple[Curve, ...]:
    found = []
    for place, group in enumerate(structure.groups):
        values = {name: beside[f"{currency}.{place}.{name}"] for name in ("group", "units", "cost", "saving")}
        units, cost, saving = values["units"], values["cost"], values["saving"]
        _require(int(values["group"]) == place and units.dtype == np.int64 and units.ndim == 1)
        _require(len(np.unique(units)) == len(units) and bool(np.isin(units, group.units).all()))
        _require(cost.shape == units.shape == saving.shape and cost.dtype == saving.dtype == np.float64)
        _require(bool(np.isfinite(cost).all() and np.isfinite(saving).all()))
        found.append(Curve(place, units, cost, saving))
    return tuple(found)


def _require(holds: bool) -> None:
    if not holds:
        raise ValueError

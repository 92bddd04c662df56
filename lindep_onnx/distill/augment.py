"""More to learn from than the calibration samples: variations of them, which the original labels like any input."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lindep_onnx.errors import UsageError

Array: TypeAlias = NDArray[Any]
#: Takes the inputs of one run by name, samples along the leading axis, and a generator; returns inputs like them.
Augment: TypeAlias = Callable[[Mapping[str, Array], np.random.Generator], Mapping[str, Array]]

#: Both parameters of the Beta distribution of the weight of a pair.
EVENNESS = 0.3


def augmentation(option: str | Augment | None) -> Augment | None:
    """What `--augment` asks for.

    Args:
        option: "mix", a function, or nothing.
    """
    if option is None or isinstance(option, str):
        return mix if option == "mix" else None
    return checked(option)


def mix(feeds: Mapping[str, Array], rng: np.random.Generator) -> Mapping[str, Array]:
    """Every other run as it is; in the others each sample is mixed with another (Zhang et al., "mixup", 2018).

    The targets are not mixed: the original says what it makes of a mixture. Inputs that are not all floating point stay
    as they are.

    Args:
        feeds: inputs by name, samples along the leading axis.
        rng: of pairs and weights.
    """
    whole = {len(value) if value.ndim else 0 for value in feeds.values()}
    if any(value.dtype.kind != "f" for value in feeds.values()) or len(whole) != 1 or rng.random() < 0.5:
        return feeds
    count = whole.pop()
    share, other = rng.beta(EVENNESS, EVENNESS, count), rng.permutation(count)
    mixed = {}
    for name, value in feeds.items():
        weight = share.reshape(-1, *[1] * (value.ndim - 1))
        mixed[name] = (weight * value + (1 - weight) * value[other]).astype(value.dtype)
    return mixed


def checked(augment: Augment) -> Augment:
    """The same, held to its contract.

    Args:
        augment: anything a user wrote.

    Raises:
        UsageError: (when called) it fails, or returns other than it was given: names, shapes, types, finite numbers.
    """

    def called(feeds: Mapping[str, Array], rng: np.random.Generator) -> Mapping[str, Array]:
        name = getattr(augment, "__name__", "the function")
        try:
            found = augment({key: value.copy() for key, value in feeds.items()}, rng)
            arrays = {key: np.asarray(found[key]) for key in feeds}
        except Exception as error:
            raise UsageError(f"--augment: {name} fails with {type(error).__name__}: {error}") from error
        for key, value in feeds.items():
            other = arrays[key]
            if other.shape != value.shape or other.dtype != value.dtype:
                raise UsageError(
                    f"--augment: {name} must return {key!r} as it gets it, {value.dtype} {list(value.shape)}; "
                    f"it returns {other.dtype} {list(other.shape)}."
                )
            if other.dtype.kind == "f" and not np.isfinite(other).all():
                raise UsageError(f"--augment: {name} returns {key!r} with values that are not finite.")
        return arrays

    return called

"""Dataclasses as strict JSON values, and back by the types of their fields."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

import numpy as np


def to_json_values(value: Any) -> Any:
    """What `json.dumps` writes of a dataclass: infinity is the string "inf", a number that is none is null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {entry.name: to_json_values(getattr(value, entry.name)) for entry in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json_values(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [to_json_values(entry) for entry in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else ("inf" if value > 0 else "-inf")
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


_hints = functools.cache(typing.get_type_hints)


def from_json_values(hint: Any, value: Any) -> Any:
    """A value of this type from what `to_json_values` made of it; keys that the type does not know are left out.

    Args:
        hint: a dataclass, or the type of one of its fields.
        value: from JSON.

    Raises:
        TypeError, ValueError: it is none; numbers and texts are not checked.
    """
    arguments = typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        hints = _hints(hint)
        names = [entry.name for entry in dataclasses.fields(hint) if entry.name in value]
        return hint(**{name: from_json_values(hints[name], value[name]) for name in names})
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return None if value is None else from_json_values(arguments[0], value)
    if typing.get_origin(hint) is tuple:
        return tuple(from_json_values(arguments[0], entry) for entry in value)
    return float(value) if hint is float and isinstance(value, str) else value

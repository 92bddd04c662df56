"""The JSON schema of a report, made from the dataclasses that it consists of and from what their docstrings say.

`python -m lindep_onnx.report.schema` prints it.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any

from lindep_onnx.report.values import Report

#: What a float becomes in strict JSON: one that is infinite is written as a string, one that is none as null.
_NUMBER = {"anyOf": [{"type": "number"}, {"enum": ["inf", "-inf", None]}]}
_SIMPLE: Mapping[type, dict[str, Any]] = {
    int: {"type": "integer"},
    bool: {"type": "boolean"},
    str: {"type": "string"},
    float: _NUMBER,
}


def report_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of what `Report.to_json` writes.

    Later versions add keys and never rename or remove one, so unknown keys are allowed.
    """
    definitions: dict[str, Any] = {}
    root = _reference(Report, definitions)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Report of lindep_onnx",
        **root,
        "$defs": dict(sorted(definitions.items())),
    }


def _reference(kind: type, definitions: dict[str, Any]) -> dict[str, Any]:
    if kind.__name__ not in definitions:
        definitions[kind.__name__] = {}  # a place, so that a class may contain itself
        hints, told = typing.get_type_hints(kind), _described(kind)
        names = [entry.name for entry in dataclasses.fields(kind)]
        definitions[kind.__name__] = {
            "type": "object",
            "description": (inspect.getdoc(kind) or "").partition("\n")[0],
            "properties": {name: {**_schema(hints[name], definitions), "description": told[name]} for name in names},
            "required": names,
        }
    return {"$ref": f"#/$defs/{kind.__name__}"}


def _schema(hint: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in _SIMPLE:
        return dict(_SIMPLE[hint])
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _reference(hint, definitions)
    if origin is tuple and arguments[1:] == (Ellipsis,):
        return {"type": "array", "items": _schema(arguments[0], definitions)}
    if origin is Mapping:
        return {"type": "object", "additionalProperties": _schema(arguments[1], definitions)}
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [{"type": "null"} if one is type(None) else _schema(one, definitions) for one in arguments]}
    if hint is Any:
        return {}
    raise TypeError(f"no JSON schema is known for {hint!r}")


def _described(kind: type) -> dict[str, str]:
    """What the docstring says of each attribute; `low, high: ...` speaks of both."""
    section = (inspect.getdoc(kind) or "").partition("Attributes:\n")[2]
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?=    \w)", "\n" + section):
        names, _, text = entry.strip().partition(": ")
        found.update(dict.fromkeys(re.split(r",\s*", names), " ".join(text.split())))
    return found


if __name__ == "__main__":
    sys.stdout.write(json.dumps(report_schema(), indent=2) + "\n")

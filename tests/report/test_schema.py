"""The published JSON schema is that of the reports."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lindep_onnx
from lindep_onnx.report.schema import report_schema
from lindep_onnx.report.values import Report

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "docs" / "report.schema.json"
jsonschema = pytest.importorskip("jsonschema")


@pytest.fixture(scope="module")
def reports(result: lindep_onnx.Result, demo_data: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Real ones: with a budget and stress data, lossless, and without data."""
    model = ROOT / "models" / "demo.onnx"
    made = [result, lindep_onnx.compress(model, demo_data), lindep_onnx.compress(model, proven_only=True)]
    return [json.loads(one.report.to_json()) for one in made]


def test_the_published_schema_is_made_from_the_dataclasses() -> None:
    text = json.dumps(report_schema(), indent=2) + "\n"
    assert PUBLISHED.read_text(encoding="utf-8") == text, (
        "run: python -m lindep_onnx.report.schema > docs/report.schema.json"
    )


def test_every_report_follows_it(reports: list[dict[str, Any]]) -> None:
    validator = jsonschema.Draft202012Validator(report_schema())
    validator.check_schema(report_schema())
    for values in reports:
        validator.validate(values)
    assert reports[0]["frontier"] and reports[0]["stress"] and reports[0]["groups"][0]["redundancy"]
    assert reports[2]["verification"] is None
    infinite = copy.deepcopy(reports[0])
    infinite["verification"]["relative_error"] = "inf"
    validator.validate(infinite)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda r: r.pop("before"),
        lambda r: r["before"].update(parameters="many"),
        lambda r: r["groups"][0]["sites"].append(3),
        lambda r: r["verification"].update(passed="yes"),
        lambda r: r["groups"][0]["support"].pop("rows"),
    ],
)
def test_what_is_no_report_does_not(spoil: Any, reports: list[dict[str, Any]]) -> None:
    values = copy.deepcopy(reports[0])
    spoil(values)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(values, report_schema())


def test_every_key_has_a_description() -> None:
    definitions = report_schema()["$defs"]
    assert {"Report", "Size", "GroupReport", "Spectrum", "Support", "OutputComparison"} <= definitions.keys()
    for name, schema in definitions.items():
        assert all(entry["description"] for entry in schema["properties"].values()), name


def test_a_report_read_back_is_the_same_report(reports: list[dict[str, Any]]) -> None:
    for values in reports:
        assert json.loads(Report.from_json(json.dumps(values)).to_json()) == values

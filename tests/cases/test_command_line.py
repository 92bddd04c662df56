"""Values on the command line that begin with a minus."""

from __future__ import annotations

import pytest

from lindep_onnx.cli import parser, with_negatives


@pytest.mark.parametrize(
    ("given", "field", "wanted"),
    [
        (["--input-range", "-5:5"], "input_range", [("*", (-5.0, 5.0))]),
        (
            ["--input-range", "-.5:5", "--input-range", "x=-1:1"],
            "input_range",
            [("*", (-0.5, 5.0)), ("x", (-1.0, 1.0))],
        ),
        (["--input-range", "-inf:0"], "input_range", [("*", (float("-inf"), 0.0))]),
        (["--input-range=-5:5"], "input_range", [("*", (-5.0, 5.0))]),
        (["--mean", "-0.5,0.5,-1"], "mean", (-0.5, 0.5, -1.0)),
        (["--seed", "-1"], "seed", -1),
    ],
)
def test_a_value_may_begin_with_a_minus(given: list[str], field: str, wanted: object) -> None:
    options = parser().parse_intermixed_args(with_negatives(["in.onnx", *given, "out.onnx"]))
    assert getattr(options, field) == wanted and options.output == "out.onnx"


def test_what_follows_no_option_and_other_options_are_left_alone() -> None:
    given = ["in.onnx", "-5", "-v", "--dry-run", "--seed", "--quiet", "--x=1", "-2"]
    assert with_negatives(given) == given

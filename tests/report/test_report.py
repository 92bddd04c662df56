"""What a run reports, and how it is shown."""

from __future__ import annotations

import dataclasses
import json
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from reports import HOSTILE, VERIFIED, a_report, group, refusal
from rich.console import Console

from lindep_onnx.errors import OutputError, UsageError
from lindep_onnx.planning.values import FrontierPoint
from lindep_onnx.report import wording
from lindep_onnx.report.figures import next_step
from lindep_onnx.report.terminal import render
from lindep_onnx.report.values import BudgetReport, NextStep, Report, Size
from lindep_onnx.report.writing import check_path, write_report
from lindep_onnx.runtime.timing import Ratio
from lindep_onnx.structure import reasons


def shown(report: Report, *, verbose: bool = False, preview: bool = False, width: int = 80) -> str:
    stream = StringIO()
    console = Console(file=stream, width=width, highlight=False, force_terminal=False)
    render(report, console, verbose=verbose, preview=preview)
    return stream.getvalue()


# ---------------------------------------------------------------------------------------------------------------- JSON


def test_a_report_survives_json_and_back() -> None:
    assert Report.from_json(a_report().to_json()) == a_report()
    without = a_report(verification=None, groups=())
    assert Report.from_json(without.to_json()) == without != a_report()


def test_json_has_the_stable_keys_in_sorted_order() -> None:
    text = a_report().to_json()
    values = json.loads(text)
    assert text.endswith("}\n")
    assert list(values) == sorted(values)
    wanted = {
        "before": {"parameters", "macs", "bytes", "channels", "latency_ms"},
        "verification": {"samples", "relative_error", "max_abs_error", "agreement", "passed", "data"},
        "groups": {"name", "channels_before", "channels_after", "error", "proven", "sites"},
        "refusals": {"reason", "nodes", "channels", "message"},
        "budget": {"kind", "requested", "achieved"},
    }
    for key, keys in wanted.items():
        entry = values[key][0] if isinstance(values[key], list) else values[key]
        assert keys <= entry.keys(), key
    assert {"after", "seconds", "versions"} <= values.keys()


def test_json_is_strict_where_numbers_are_not_finite() -> None:
    def forbid(token: str) -> None:
        raise AssertionError(token)

    bad = dataclasses.replace(a_report().verification, relative_error=np.inf, agreement=np.nan, worst_errors=(np.inf,))
    text = a_report(verification=bad).to_json()
    values = json.loads(text, parse_constant=forbid)["verification"]
    assert (values["relative_error"], values["agreement"]) == ("inf", None)
    again = Report.from_json(text).verification
    assert again is not None and again.relative_error == np.inf and again.worst_errors == (np.inf,)
    with pytest.raises(AssertionError, match="Infinity"):
        json.loads(json.dumps(np.inf), parse_constant=forbid)


def test_numbers_of_numpy_and_tuples_become_plain_json() -> None:
    sized = Size(np.int64(3), np.int32(2), 1, 1, np.float32(0.5))  # type: ignore[arg-type]
    values = json.loads(a_report(after=sized, options={"include": ("a*", "b*"), "file": Path("x")}).to_json())
    sizes = {"parameters": 3, "macs": 2, "bytes": 1, "channels": 1, "latency_ms": 0.5, "operators": {}}
    assert values["after"] == sizes
    assert values["options"] == {"include": ["a*", "b*"], "file": "x"}


def test_a_key_of_a_later_version_is_skipped_and_a_missing_one_is_an_error() -> None:
    values = json.loads(a_report().to_json())
    values["groups"][0]["colour"] = "red"
    assert Report.from_json(json.dumps(values)) == a_report()
    nothing = json.dumps({**values, "before": None})
    del values["before"]
    for text in (json.dumps(values), nothing, "[]", "null", "no json"):
        with pytest.raises(UsageError, match="no JSON report") as raised:
            Report.from_json(text)
        assert "\n" not in str(raised.value)


# ------------------------------------------------------------------------------------------------------------- console


def test_totals_groups_and_verification_are_shown_in_80_columns() -> None:
    text = shown(a_report())
    flat = " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 80
    for part in ("4,000,000 3,000,000 -25.0 %", "16 MB 12 MB", "12.5 ms 10 ms -20.0 %", "64 -> 48", "12 joint",
                 "Verification passed: 39 of 40 held-out samples keep their predicted class; output error 0.00015",
                 "Limit --max-error 0.001: 0.00015 reached", "Never active in 280 samples"):  # fmt: skip
        assert part in flat
    assert "conv3" not in text  # it did not change


def test_latency_that_was_not_measured_is_left_out() -> None:
    size = Size(1, 1, 1, 1)
    assert "latency" in shown(a_report())
    assert "atency" not in shown(a_report(before=size, after=size, latency=None))


def test_latency_is_said_with_its_interval_and_a_difference_only_where_there_is_one() -> None:
    found = a_report().latency
    assert found is not None
    assert "Latency 0.80 of the original's (95 % interval 0.78 to 0.83; batch 1, 2 threads)." in flat(a_report())
    same = dataclasses.replace(found, ratio=0.99, low=0.96, high=1.03, differs=False, threads=0, batch=32)
    text = flat(a_report(latency=same))
    assert (
        "10 ms 0 %" in text
        and "No measurable difference in latency (0.99, 95 % interval 0.96 to 1.03; batch 32, default threads)" in text
    )
    noisy = dataclasses.replace(found, control=Ratio(0.9, 0.7, 1.3), differs=False)
    assert "a copy of the original takes 0.70 to 1.30" in flat(a_report(latency=noisy))
    assert "No measurable" not in flat(a_report(latency=None)) and "Latency 0" not in flat(a_report(latency=None))


def flat(report: Report) -> str:
    return " ".join(shown(report).split())


def test_failed_and_missing_verification_are_said_in_plain_words() -> None:
    failed = dataclasses.replace(a_report().verification, passed=False, relative_error=np.inf)
    text = " ".join(shown(a_report(verification=failed)).split())
    assert "VERIFICATION FAILED" in text and "output error infinite" in text and "differ most: 3, 17" in text
    assert "passed" not in text
    assert "Not verified" in shown(a_report(verification=None))


def told(**changes: object) -> str:
    return " ".join(shown(a_report(verification=dataclasses.replace(VERIFIED, **changes)), width=400).split())


def test_what_no_limit_judged_is_yellow_and_says_what_to_set() -> None:
    unchecked = dataclasses.replace(VERIFIED, status="unchecked", reason="no limit was set; set one with --max-error")
    report = a_report(verification=unchecked)
    text = told(status="unchecked", reason="no limit was set; set one with --max-error")
    assert "Quality not checked: no limit was set; set one with --max-error. 39 of 40 held-out samples keep" in text
    assert wording.tone(report, unchecked) == "warn" and "passed" not in text
    assert wording.tone(a_report(), VERIFIED) == "good" and wording.tone(a_report(verification=None), None) == "warn"
    assert wording.tone(report, dataclasses.replace(VERIFIED, status="failed")) == "bad"
    old = dataclasses.replace(VERIFIED, status="unchecked", passed=False)  # a report of a version without a status
    assert wording.tone(report, old) == "bad" and "VERIFICATION FAILED" in shown(a_report(verification=old))


def test_what_is_slower_is_never_green() -> None:
    latency = dataclasses.replace(a_report().latency, ratio=1.12, low=1.08, high=1.2)
    slow, unsure = (a_report(latency=dataclasses.replace(latency, low=low)) for low in (1.08, 1.01))
    assert "Verification passed, smaller but 12 % slower: 39 of 40" in " ".join(shown(slow).split())
    assert wording.tone(slow, VERIFIED) == "warn" and wording.tone(unsure, VERIFIED) == "good"
    assert "slower" not in shown(a_report(latency=latency, groups=(group(after=64),)))  # nothing was removed


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"samples": 25, "decisions": 25, "agreement": 22 / 25},
            "22 of 25 held-out samples keep their predicted class",
        ),
        ({"samples": 1, "decisions": 1, "agreement": 0.0}, "0 of 1 held-out sample keep"),
        ({"samples": 162, "decisions": 162, "agreement": 0.8827}, "88.27 % of 162 held-out samples keep"),
        ({"samples": 25, "decisions": 25 * 64, "agreement": 0.88}, "88 % of the positions of 25 held-out samples keep"),
        ({"agreement": None}, "40 held-out samples, output error 0.00015"),
    ],
)
def test_samples_are_counted_where_they_are_few(changes: dict[str, object], words: str) -> None:
    assert words in told(**changes)


def test_limits_are_named_like_their_options_and_say_where_they_are_missed() -> None:
    kinds = (("params", 0.8, 0.794), ("min_agreement", 0.98, 0.975), ("max_error", 0.1, 0.2), ("macs", 0.5, None))
    text = shown(a_report(budget=tuple(BudgetReport(*kind) for kind in kinds)))
    for line in (
        "Limit --params 0.8: 0.794 reached\n",
        "Limit --min-agreement 0.98: 0.975 reached (39 of 40), NOT MET\n",
        "Limit --max-error 0.1: 0.2 reached, NOT MET\n",
        "Limit --macs 0.5: not measured\n",
    ):
        assert line in text


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"groups": ()}, "all 10 channels have to stay"),
        ({"groups": (), "refusals": ()}, "it has no channels"),
        ({"groups": (group(after=64),)}, "no channel is an exact combination"),
        ({"groups": (group(after=64),), "mode": "proven"}, "the weights alone prove"),
        ({"groups": (group(after=64),), "mode": "budgeted"}, "no removal fits the budgets"),
    ],
)
def test_when_nothing_was_removed_it_says_so_first_and_why(changes: dict[str, object], why: str) -> None:
    text = shown(a_report(**changes), width=200)
    assert text.startswith("Nothing was removed") and why in text.splitlines()[0]
    assert not shown(a_report()).startswith("Nothing")


@pytest.mark.parametrize(("proven", "words"), [(0, "16 constant"), (4, "4 of them proven"), (16, "all proven")])
def test_what_is_proven_is_part_of_what_went(proven: int, words: str) -> None:
    told = wording.removal(dataclasses.replace(group(kinds={"constant": 16}), proven=proven))
    assert words in told and ("proven" in told) == bool(proven)


def test_the_most_changed_groups_come_first_and_verbose_shows_all() -> None:
    groups = tuple(group(f"layer{k:02}", 64, 63 - k) for k in range(20))
    short, full = (shown(a_report(groups=groups), verbose=v) for v in (False, True))
    assert "layer19" in short and "layer14" not in short and "15 more groups" in short
    assert short.index("layer19") < short.index("layer18")
    assert "layer00" in full and "more groups" not in full


def test_refusals_are_summed_by_reason_with_one_line_of_advice() -> None:
    costs = {"reshape": 5, "subgraph": 4, "picked": 3, "repeated": 2, "pad_mode": 1}
    refusals = (refusal(node="A"), refusal(node="B"), *(refusal(reason, cost) for reason, cost in costs.items()))
    short, full = (" ".join(shown(a_report(refusals=refusals), verbose=v).split()) for v in (False, True))
    assert "20 channels stay: an operator without a rule reads them (at A, B) [unknown_operator]" in short
    assert short.index("unknown_operator") < short.index("[reshape]")
    assert reasons.ADVICE["subgraph"] in short
    assert "1 channel stays" not in short and "1 more reason (" in short
    assert "1 channel stays" in full


def test_every_reason_has_advice_of_its_own_code() -> None:
    known = [value for value in vars(reasons).values() if isinstance(value, reasons.Reason)]
    assert len({reason.code for reason in known}) > 10
    assert {reason.code for reason in known} == reasons.ADVICE.keys() and all(reasons.ADVICE.values())


def test_names_that_look_like_markup_or_terminal_codes_are_printed_as_they_are() -> None:
    hostile = a_report(groups=(group(HOSTILE),), refusals=(refusal(node=HOSTILE),), notes=(HOSTILE,))
    for verbose in (False, True):
        text = shown(hostile, verbose=verbose, width=200)
        assert text.count("[red]x") == 3 + verbose  # with what supports it
        assert "\x1b" not in text and "\u202e" not in text and r"\x1b[2J\u202e" in text


@pytest.mark.parametrize(
    ("share", "text"),
    [(1.0, "100 %"), (0.9999999, "99.99 %"), (0.975, "97.5 %"), (0.1, "10 %"), (1e-9, "0.01 %"), (0.0, "0 %")],
)
def test_a_share_is_never_rounded_to_all_or_nothing(share: float, text: str) -> None:
    assert wording.percent(share) == text


# --------------------------------------------------------------------------------------------------------------- files


def test_writing_replaces_the_file_whole_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text("old")
    write_report(a_report(), str(path))
    first = path.read_bytes()
    assert Report.from_json(first.decode()) == a_report()
    write_report(a_report(), path)
    assert path.read_bytes() == first
    assert [entry.name for entry in tmp_path.iterdir()] == ["r.json"]


def test_a_failed_write_keeps_the_old_file_and_cleans_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.json"
    path.write_text("old")

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OutputError, match=r"r\.json: cannot be written \(No space left on device\)"):
        write_report(a_report(), path)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["r.json"]


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("r.txt", UsageError, r"written as \.json or \.html, not \.txt"),
        ("r", UsageError, "not without a suffix"),
        ("missing/r.json", OutputError, "does not exist"),
        ("folder.html", OutputError, "is a directory"),
    ],
)
def test_a_path_that_cannot_be_written_is_one_line(
    tmp_path: Path, name: str, error: type[Exception], message: str
) -> None:
    (tmp_path / "folder.html").mkdir()
    for attempt in (lambda p: write_report(a_report(), p), check_path):
        with pytest.raises(error, match=message) as raised:
            attempt(tmp_path / name)
        assert "\n" not in str(raised.value)


def test_wins_are_those_of_most_parameters_and_nodes_are_counted() -> None:
    groups = (group("many", 64, 4, saved=10), group("heavy", 64, 60, saved=50_000))
    before = Size(10, 10, 10, 10, None, {"Conv": 3, "Relu": 2})
    after = dataclasses.replace(before, operators={"Conv": 3, "Relu": 2, "Add": 1})
    report = a_report(groups=groups, before=before, after=after)
    text = shown(report)
    assert text.index("heavy") < text.index("many") and "-50,000" in text
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert "nodes 5 6 +1" in rows and "Add 0 1 +1" in rows and not any(row.startswith("Relu") for row in rows)
    assert "Relu 2 2 0" in [" ".join(line.split()) for line in shown(report, verbose=True).splitlines()]


def test_a_preview_is_a_table_of_budgets() -> None:
    text = shown(a_report(), preview=True)
    assert "0.913 -12 4e-05 0.0001 100 %" in " ".join(text.split()) and max(map(len, text.splitlines())) <= 80
    assert "What would go" not in shown(a_report())


def test_the_slowest_layers_of_the_result_are_shown() -> None:
    text = flat(a_report())
    assert "Where the time goes" in text and "conv1 (Conv) 6 ms 4.5 ms 56 %" in text
    assert text.index("conv1 (Conv)") < text.index("fc7 (Gemm)") < text.index("other 0.25 ms 0.5 ms 6 %")
    assert "relu9" not in text and "Where the time goes" not in flat(a_report(layer_times=()))


def test_the_next_tenth_is_priced_between_the_points_of_the_frontier() -> None:
    points = [
        FrontierPoint(left, 0.1, 1.0, 1, cost, latency=time) for left, cost, time in ((0.8, 0.2, 0.9), (0.4, 1.0, 0.6))
    ]
    step = next_step(points, 0.9)
    assert step == NextStep("parameters", 0.9, pytest.approx(0.8), pytest.approx(0.1), pytest.approx(0.2))
    by_time = next_step(points, 0.9, 0.75)
    assert by_time == NextStep("latency", 0.75, pytest.approx(0.65), pytest.approx(0.6), pytest.approx(2.6 / 3))
    assert next_step(points, 0.45) is None and next_step([], 0.9) is None
    assert next_step([dataclasses.replace(points[0], expected=None)], 0.95) is None
    assert next_step([dataclasses.replace(point, latency=None) for point in points], 0.9, 0.75) == step


def test_what_the_next_tenth_would_cost_is_said_beside_the_frontier() -> None:
    said = "next 10 % of the parameters, from 75 % to 65 % of the original's, would raise the expected error from 0.03 to 0.052"
    assert said in " ".join(shown(a_report(), preview=True).split())
    assert "next 10 %" not in shown(a_report(next_step=None), preview=True) + flat(a_report())

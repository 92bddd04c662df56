"""A report as one HTML file to be looked at: no scripts, no network, light and dark, on paper and on a phone.

Tables, bars and plots are made here as values; `page.html.j2` arranges and explains them. It escapes whatever it
writes, so that names from a model, which may hold anything, cannot become markup. Every picture says the same as a
number or a table near it, and tells its parts apart by shape as well as by colour.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, TypeAlias

from lindep_onnx.options import LOSSLESS_SITE_ERROR
from lindep_onnx.report import wording
from lindep_onnx.report.charts import MIN_ERROR, Axis, Plot, Strip, errors_axis, strips
from lindep_onnx.report.json_values import to_json_values
from lindep_onnx.report.values import GroupReport, Report, Verification

#: Groups that are drawn, nodes that a refusal names: the JSON report has all.
MAX_CARDS, MAX_NODES = 12, 8

#: Rows of (what, share of the longest bar, number).
Bars: TypeAlias = Sequence[tuple[str, float, str]]


class Table(NamedTuple):
    """Titles, rows, and which columns hold numbers; whole numbers are written with separators."""

    titles: Sequence[str]
    rows: Sequence[Sequence[object]]
    numbers: Collection[int] = ()


def page(report: Report) -> str:
    """The report as one HTML file that needs nothing else."""
    import jinja2  # here, for only those who want a page wait for it

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lindep_onnx.report", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_written,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template("page.html.j2").render(
        report=report,
        wording=wording,
        short=_short,
        max_nodes=MAX_NODES,
        totals=Table(("", "before", "after", "change"), [total[:4] for total in wording.totals(report)], {1, 2, 3}),
        layers=_layers(report),
        frontier=_frontier(report),
        groups=_groups(report),
        fits=_fits(report),
        outputs=_outputs,
        variants=_variants,
        worst=_worst,
        latency=_latency(report),
        layer_times=_layer_times(report),
        seconds=_seconds(report),
        options=Table(("option", "value"), [(name, _json(value)) for name, value in report.options.items()]),
    )
    return text.strip() + "\n"


def _written(value: object) -> object:
    """What the template writes for a value: two digits of a coordinate, and text that cannot act on the page."""
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return value if hasattr(value, "__html__") else wording.safe(value)


def _short(count: float) -> str:
    """Four digits at most; a table nearby has all of them."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if count >= size:
            scaled = count / (1e3 if unit == "k" else size)
            return f"{scaled:.3g} {unit}" if scaled < 1000 else f"{scaled:,.0f} {unit}"
    return f"{count:,.0f}"


def _json(value: Any) -> str:
    return json.dumps(to_json_values(value))


def _layers(report: Report) -> tuple[list[Strip], Table, int, int] | None:
    """The widths of the layers, in pictures and as a table; the widest, and how many became narrower."""
    if not report.layers:
        return None
    rows = [(str(number), *dataclasses.astuple(layer)) for number, layer in enumerate(report.layers, 1)]
    titles = ("no.", "layer", "operator", "channels before", "after", "parameters before", "after")
    widest = max(1, *(layer.channels_before for layer in report.layers))
    narrower = sum(layer.channels_after < layer.channels_before for layer in report.layers)
    return list(strips(report.layers, widest)), Table(titles, rows, {0, 3, 4, 5, 6}), widest, narrower


def _frontier(report: Report) -> tuple[list[Plot], Table] | None:
    """Plans beside the result."""
    found, points = report.verification, report.frontier
    if not points:
        return None
    errors = [point.relative_error for point in points] + ([] if found is None else [found.relative_error])
    what = "Worst output error against the parameters that are left; the table below has the numbers"
    axis = errors_axis("worst output error", errors, 1e-6)
    plots = [_plans(report, what, axis, "relative_error", "max_error")]
    agreements = [point.agreement for point in points if point.agreement is not None]
    if len(agreements) == len(points):
        what = "Share of samples with the same decision against the parameters that are left"
        axis = Axis("same decision", math.floor(5 * min(0.8, *agreements)) / 5, 1.0, percent=True)
        plots.append(_plans(report, what, axis, "agreement", "min_agreement"))
    plans: list[tuple[str, Any]] = [(wording.percent(point.parameters), point) for point in points]
    if found is not None:
        plans.append((f"{wording.percent(_left(report))} (this result)", found))
    rows = [
        (
            left,
            wording.error(of.relative_error),
            "" if of.agreement is None else wording.agreement(of.agreement, of.decisions),
        )
        for left, of in plans
    ]
    return plots, Table(("parameters left", "worst output error", "same decision"), rows)


def _left(report: Report) -> float:
    return report.after.parameters / max(1, report.before.parameters)


def _plans(report: Report, label: str, axis: Axis, measure: str, budget: str) -> Plot:
    """What the plans of the frontier and the result measure, against their size."""
    across = Axis("parameters left", 0.0, 1.0, percent=True)
    asked = {entry.kind: entry.requested for entry in report.budget}
    guides = []
    if "params" in asked:
        guides.append(((asked["params"], axis.high), (asked["params"], axis.low)))
    if budget in asked:
        guides.append(((across.low, asked[budget]), (across.high, asked[budget])))
    show: Callable[[float], str] = wording.percent if axis.percent else wording.error
    points = [(point.parameters, getattr(point, measure)) for point in report.frontier]
    result = None if report.verification is None else getattr(report.verification, measure)
    chosen = None if result is None or math.isnan(result) else (_left(report), result)
    dots = [((x, y), f"{wording.percent(x)}: {show(y)}") for x, y in points]
    notes = [] if chosen is None else [(chosen, "this result", not axis.percent)]
    return Plot(label, across, axis, points, guides, dots, chosen, notes)


class Card(NamedTuple):
    """One group as a picture."""

    title: str
    told: str
    plots: tuple[Plot, Plot]


def _groups(report: Report) -> tuple[list[Card], Table]:
    """The groups that are drawn, and a table of those that changed."""
    number = {id(group): str(place) for place, group in enumerate(report.groups, 1)}
    drawn = [group for group in report.changed if group.redundancy is not None]
    if not drawn:  # show at least how far from redundant they are
        widest = sorted(report.groups, key=lambda group: -group.channels_before)
        drawn = [group for group in widest if group.redundancy is not None][: MAX_CARDS // 2]
    rows = []
    for group in report.changed:
        told = (wording.error(group.error), wording.removal(group), wording.support(group), ", ".join(group.sites))
        rows.append((number[id(group)], group.name, group.channels_before, group.channels_after, *told))
    titles = ("no.", "group", "before", "after", "error", "removed", "support", "read by")
    cards = [_card(group, number[id(group)]) for group in drawn[:MAX_CARDS]]
    return cards, Table(titles, rows, {0, 2, 3, 4})


def _card(group: GroupReport, number: str) -> Card:
    found = group.redundancy
    assert found is not None
    count = found.ranks[-1] if found.ranks else 1

    def plot(label: str, x: str, y: Axis, curve: Sequence[tuple[float, float]], at: int) -> Plot:
        guides = [((at, y.high), (at, y.low))] if group.removed else []
        return Plot(label, Axis(x, 0, max(1, count)), y, curve, guides, width=176, height=120, ticks=(4, 4))

    values = list(zip(found.ranks, found.singular_values, strict=True))
    label, y = f"Singular values, from 1 down to {values[-1][1] if values else 0:.2g}", "singular value"
    spectrum = plot(label, "channel", Axis(y, 1e-8, 1.0, log=True), values, group.channels_after)
    errors = [(0, 0.0), *zip(found.removed, found.errors, strict=True)]
    label = f"Error, from 0 with none removed up to {errors[-1][1]:.2g} with {errors[-1][0]}"
    error = plot(label, "removed", Axis("error", 1e-6, 1.0, log=True), errors, group.removed)
    told = (
        f"{group.channels_before:,} → {group.channels_after:,} channels",
        "" if group.error is None else f"measured error {wording.error(group.error)}",
        f"rank {found.rank:,} of {count:,}" if found.rank < count else "",
        wording.removal(group),
    )
    return Card(f"{number}. {group.name}", "; ".join(filter(None, told)), (spectrum, error))


class Fits(NamedTuple):
    """Errors on held-out rows beside those on fitted rows.

    Attributes:
        groups: how many have both.
        plot: of them; None if all are exact.
        over: how many err more than twice as much on held-out rows.
        least: the error that counts as exact.
    """

    groups: int
    plot: Plot | None = None
    over: int = 0
    least: str = f"{MIN_ERROR:.0e}"


def _fits(report: Report) -> Fits | None:
    supports = [(number, group.name, group.support) for number, group in enumerate(report.groups, 1) if group.support]
    found = [
        (number, name, own.fit_error, own.heldout_error)
        for number, name, own in supports
        if own.fit_error is not None and own.heldout_error is not None
    ]
    if not found:
        return None
    both = [max(error, MIN_ERROR) for *_, fit, held in found for error in (fit, held)]
    if max(both) <= MIN_ERROR:
        return Fits(len(found))
    axis = errors_axis("error on rows that were fitted", both)
    number, _, fit, held = max(found, key=lambda entry: entry[3])
    label = f"Error on held-out rows against error on fitted rows, for {wording.many(len(found), 'group')}; "
    label += "the table of groups has the numbers"
    diagonal = ((axis.low, axis.low), (axis.high, axis.high))
    dots = [
        ((x, y), f"{place}: {name}, {wording.error(x)} fitted, {wording.error(y)} held out")
        for place, name, x, y in found
    ]
    notes = [((fit, held), f"group {number}", True)]
    across = dataclasses.replace(axis, title="error on held-out rows")
    plot = Plot(label, axis, across, guides=[diagonal], dots=dots, notes=notes, height=300)
    return Fits(len(found), plot, sum(held > max(2 * fit, LOSSLESS_SITE_ERROR) for *_, fit, held in found))


def _outputs(found: Verification) -> Table:
    rows = [
        (out.name, wording.output(out), wording.error(out.max_abs_error), str(out.worst_sample))
        for out in found.outputs
    ]
    return Table(("output", "difference", "largest absolute", "worst sample"), rows, {2, 3})


def _variants(found: Verification) -> Table:
    rows = [
        (way.name, way.samples, wording.error(way.relative_error), "yes" if way.passed else "NO")
        for way in found.variants
    ]
    return Table(("how", "samples", "error", "passed"), rows, {1, 2})


def _worst(found: Verification) -> Bars:
    errors = found.worst_errors or (math.nan,) * len(found.worst_samples)
    most = max((error for error in errors if math.isfinite(error)), default=0.0) or 1.0
    return [
        (f"sample {sample}", 0.0 if math.isnan(error) else min(1.0, error / most), wording.error(error))
        for sample, error in zip(found.worst_samples, errors, strict=True)
    ]


def _latency(report: Report) -> tuple[Bars, str] | None:
    """Milliseconds of both models, and what they say."""
    before, after = report.before.latency_ms, report.after.latency_ms
    if before is None or after is None:
        return None
    longest = max(before, after) or 1.0
    bars = [("original", before / longest, f"{before:.3g} ms"), ("result", after / longest, f"{after:.3g} ms")]
    copy = report.latency and report.latency.control
    control = f" A copy of the original takes {copy.low:.2f} to {copy.high:.2f} of its time." if copy else ""
    return bars, (wording.latency(report) or "") + control


def _layer_times(report: Report) -> tuple[Table, Table] | None:
    """Milliseconds of the slowest layers, and of all."""
    if not report.layer_times:
        return None
    most = Table(("layer", "before", "after", "share of the result"), wording.slowest_layers(report), {1, 2, 3})
    rows = [
        (
            entry.name,
            entry.op,
            *("" if taken is None else f"{taken:.4f}" for taken in (entry.before_ms, entry.after_ms)),
        )
        for entry in report.layer_times
    ]
    return most, Table(("layer", "operator", "before, ms", "after, ms"), rows, {2, 3})


def _seconds(report: Report) -> Bars:
    longest = max(report.seconds.values(), default=0.0) or 1.0
    return [(stage, taken / longest, f"{taken:.2f} s") for stage, taken in report.seconds.items()]

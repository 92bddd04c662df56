"""A report as one HTML file to be looked at: no scripts, no network, light and dark, on paper and on a phone.

Elements are built as a tree and written out in one go, so that names from a model, which may hold anything, cannot
become markup. Every picture says the same as a number or a table near it, and tells its parts apart by shape as well
as by colour.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from lindep_onnx.options import LOSSLESS_SITE_ERROR
from lindep_onnx.report import wording as words
from lindep_onnx.report.json_values import to_json_values
from lindep_onnx.report.values import GroupReport, Report, Verification

Element = ElementTree.Element

#: Layers in one row of the strip, groups that are drawn, nodes that a refusal names: the JSON report has all.
ROW, MAX_CARDS, MAX_NODES = 64, 12, 8
#: Smaller relative errors are drawn at the lower edge.
MIN_ERROR = 1e-7

_STYLE = """
:root { color-scheme: light dark; --ink: #17202a; --dim: #56616d; --line: #d9dfe5; --page: #fff; --card: #f5f7f9;
  --before: #b9c7d5; --after: #1f6fb5; --mark: #b4480a; --good: #18713a; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8ecf0; --dim: #a3aeb9; --line: #34404b; --page: #11161b;
  --card: #1a2129; --before: #4a5b6c; --after: #6cb4f5; --mark: #ffae57; --good: #5fca80; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 62rem;
  margin: 0 auto; padding: 1.25rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; padding-top: .75rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.25rem 0 .25rem; overflow-wrap: anywhere; } p { margin: .5rem 0; max-width: 46rem; }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1rem; margin: 1rem 0; font-size: .9rem; }
a { color: var(--after); } .eyebrow, .dim, figcaption, summary { color: var(--dim); }
.eyebrow { font-size: .85rem; margin: 0; } .good { color: var(--good); } .bad { color: var(--bad); }
.verdict { border-left: .3rem solid; padding-left: .75rem; } .verdict b { font-weight: 650; }
.verdict span { color: var(--ink); }
.tiles { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); margin: 1rem 0;
  padding: 0; list-style: none; }
.tile, .card { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .75rem; }
.tile b { display: block; font-size: 1.35rem; line-height: 1.25; } .tile small { color: var(--dim); }
.tile svg { height: .4rem; margin-top: .4rem; }
.cards { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 27rem), 1fr)); }
.card h3 { margin-top: 0; } .card p { margin: .25rem 0 .5rem; font-size: .9rem; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .5rem; }
.charts { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
figure { margin: .75rem 0 0; } figcaption { font-size: .9rem; max-width: 46rem; } summary { cursor: pointer; }
details { margin: .75rem 0; }
svg { width: 100%; display: block; } svg text { fill: var(--dim); font: 10px system-ui, sans-serif; }
svg .said { fill: var(--ink); font-weight: 600; } .strip { height: 8rem; } .plot { max-width: 32rem; }
.before { fill: var(--before); } .after { fill: var(--after); } .cut { fill: var(--mark); }
.axis { stroke: var(--line); stroke-width: 1; vector-effect: non-scaling-stroke; fill: none; }
.curve { stroke: var(--after); stroke-width: 2; fill: none; stroke-linejoin: round; }
.guide { stroke: var(--mark); stroke-width: 1.5; stroke-dasharray: 4 3; fill: none; }
.dot { fill: var(--page); stroke: var(--after); stroke-width: 1.75; } .chosen { fill: var(--mark); }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; margin: .5rem 0; font-size: .92rem; }
caption { text-align: left; color: var(--dim); }
th, td { text-align: left; vertical-align: top; padding: .3rem .75rem .3rem 0; border-bottom: 1px solid var(--line);
  overflow-wrap: anywhere; } td:not(.n), th:not(.n) { min-width: 6rem; } th { color: var(--dim); font-weight: 600; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.bars { display: grid; grid-template-columns: fit-content(40%) 1fr max-content; gap: .3rem .75rem;
  align-items: center; margin: .5rem 0; max-width: 46rem; } .bars > * { overflow-wrap: anywhere; }
.bars svg { height: .8rem; } .bars .n { font-variant-numeric: tabular-nums; }
ul.plain { padding: 0; list-style: none; } ul.plain li { margin: .75rem 0; overflow-wrap: anywhere; }
@media (max-width: 36rem) { body { font-size: 15px; padding: 1rem; } h1 { font-size: 1.4rem; }
  .tiles { grid-template-columns: 1fr 1fr; } .strip { height: 6rem; } }
@media print { :root { color-scheme: light; --ink: #000; --dim: #444; --line: #bbb; --page: #fff; --card: #fff;
  --before: #b9c7d5; --after: #1f6fb5; --mark: #b4480a; --good: #18713a; --bad: #b3261e; }
  * { print-color-adjust: exact; } body { font-size: 10pt; padding: 0; max-width: none; }
  nav, details:not([open]) { display: none; } .cards, .charts { grid-template-columns: 1fr 1fr; }
  tr, svg, li, figure, .card, .tile { break-inside: avoid; } h2, h3 { break-after: avoid; } }
"""


def page(report: Report) -> str:
    """The report as one HTML file that needs nothing else."""
    sections = [
        ("layers", "Width of every layer", _layers(report)),
        ("frontier", "Error against size", _frontier(report)),
        ("groups", "Groups of channels", _groups(report)),
        ("evidence", "Fitted and held-out error", _statistics(report)),
        ("refusals", "Left alone, and what to do", _refusals(report)),
        ("verification", "Verification", _verification(report)),
        ("latency", "Latency", _latency(report)),
        ("notes", "Notes", [_e("p", note) for note in report.notes]),
        ("run", "This run", _run(report)),
    ]
    shown = [(key, title, content) for key, title, content in sections if content]
    title = f"{report.model or 'Model'} - lindep_onnx report"
    root = _e(
        "html",
        _e(
            "head",
            _e("meta", charset="utf-8"),
            _e("meta", name="viewport", content="width=device-width, initial-scale=1"),
            _e("meta", http_equiv="Content-Security-Policy", content="default-src 'none'; style-src 'unsafe-inline'"),
            _e("title", title),
            _e("style", _STYLE),
        ),
        _e(
            "body",
            _header(report),
            _e("nav", *(_e("a", name, href=f"#{key}") for key, name, _ in shown), aria_label="Contents"),
            _e(
                "main",
                *(
                    _e("section", _e("h2", name, id=f"{key}-title"), *content, id=key, aria_labelledby=f"{key}-title")
                    for key, name, content in shown
                ),
            ),
        ),
        lang="en",
    )
    return "<!DOCTYPE html>\n" + ElementTree.tostring(root, encoding="unicode", method="html") + "\n"


# ---------------------------------------------------------------------------------------------------------- elements


def _e(tag: str, *children: Element | str, **attributes: object) -> Element:
    """An element; `class_` is class, other underscores in names are hyphens."""
    named = {key.rstrip("_").replace("_", "-"): words.safe(value) for key, value in attributes.items()}
    element = Element(tag, named)
    for child in children:
        if not isinstance(child, str):
            element.append(child)
        elif len(element):
            element[-1].tail = (element[-1].tail or "") + words.safe(child)
        else:
            element.text = (element.text or "") + (child if tag == "style" else words.safe(child))
    return element


def _svg(width: float, height: float, label: str, *children: Element, class_: str, phase: bool = False) -> Element:
    shape = {"preserveAspectRatio": "none"} if phase else {}
    return _e(
        "svg", *children, viewBox=f"0 0 {_n(width)} {_n(height)}", role="img", aria_label=label, class_=class_, **shape
    )


def _hidden_bar(share: float, class_: str = "after") -> Element:
    """A bar on a pale track; the number is beside it, so that nobody needs to hear about it twice."""
    track = _e("rect", class_="before", x="0", y="0", width="100", height="10", opacity="0.45")
    bar = _e("rect", class_=class_, x="0", y="0", width=_n(100 * min(1.0, max(0.0, share))), height="10")
    return _e("svg", track, bar, viewBox="0 0 100 10", preserveAspectRatio="none", aria_hidden="true")


def _n(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _short(count: float) -> str:
    """Four digits at most; a table nearby has all of them."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if count >= size:
            scaled = count / (1e3 if unit == "k" else size)
            return f"{scaled:.3g} {unit}" if scaled < 1000 else f"{scaled:,.0f} {unit}"
    return f"{count:,.0f}"


def _table(titles: Sequence[str], rows: Iterable[Sequence[object]], numbers: Iterable[int] = ()) -> Element:
    numeric = set(numbers)

    def line(tag: str, cells: Sequence[object], **more: str) -> Element:
        marks = ({"class_": "n"} if place in numeric else {} for place in range(len(cells)))
        return _e("tr", *(_e(tag, str(cell), **mark, **more) for mark, cell in zip(marks, cells, strict=True)))

    table = _e(
        "table", _e("thead", line("th", titles, scope="col")), _e("tbody", *(line("td", cells) for cells in rows))
    )
    return _e("div", table, class_="wide")


def _bars(rows: Iterable[tuple[str, float, str]], class_: str = "after") -> Element:
    """Rows of (what, share of the longest bar, number)."""
    cells: list[Element] = []
    for name, share, number in rows:
        cells += [_e("span", name), _hidden_bar(share, class_), _e("span", number, class_="n")]
    return _e("div", *cells, class_="bars")


def _folded(title: str, *content: Element) -> Element:
    return _e("details", _e("summary", title), *content)


# ------------------------------------------------------------------------------------------------------------ charts


@dataclass(frozen=True)
class _Axis:
    """Values along one side of a plot.

    Attributes:
        title: what is measured.
        low, high: values at its ends.
        log: whether steps are decades.
        percent: whether values are shares.
    """

    title: str
    low: float
    high: float
    log: bool = False
    percent: bool = False

    def place(self, value: float) -> float:
        """From 0 at `low` to 1 at `high`, what lies outside at the end."""
        value = min(max(value, self.low), self.high)
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low or 1.0)

    def ticks(self, most: int) -> list[tuple[float, str]]:
        """At most so many values and what to write beside them."""
        if self.log:
            first, last = round(math.log10(self.low)), round(math.log10(self.high))
            every = -(-(last - first + 1) // most)
            return [(10.0**power, _power(power)) for power in range(last, first - 1, -every)]
        rough = (self.high - self.low) / max(1, most - 1)
        unit = 10.0 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
        step = next(unit * times for times in (1.0, 2.0, 5.0, 10.0) if unit * times >= rough * 0.999)
        if not self.percent:
            step = max(1.0, step)
        count = int((self.high - self.low) / step + 1e-9)
        values = [self.low + step * number for number in range(count + 1)]
        return [(value, f"{100 * value:.0f} %" if self.percent else f"{value:,.0f}") for value in values]


def _power(exponent: int) -> str:
    raised = str(exponent).translate(
        str.maketrans("-0123456789", "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079")
    )
    return {0: "1", 1: "10"}.get(exponent, f"10{raised}")


def _errors_axis(title: str, values: Iterable[float], least: float = MIN_ERROR) -> _Axis:
    """Whole decades around these errors, at least two of them."""
    positive = [value for value in values if value > 0 and math.isfinite(value)]
    high = 10.0 ** math.ceil(math.log10(max([*positive, 10 * least])) - 1e-9)
    low = 10.0 ** math.floor(math.log10(max(least, min([*positive, high]))))
    return _Axis(title, min(low, high / 100), high, log=True)


@dataclass(frozen=True)
class _Plot:
    """A plot of so many units, with room for the numbers on its axes."""

    x: _Axis
    y: _Axis
    width: float = 360
    height: float = 230
    ticks: tuple[int, int] = (6, 6)

    @property
    def _box(self) -> tuple[float, float, float, float]:
        return 40, 18, self.width - 16, self.height - 32

    def at(self, x: float, y: float) -> tuple[float, float]:
        left, top, right, bottom = self._box
        return left + (right - left) * self.x.place(x), bottom - (bottom - top) * self.y.place(y)

    def axes(self) -> Iterator[Element]:
        left, _, right, bottom = self._box
        for value, text in self.y.ticks(self.ticks[1]):
            y = self.at(self.x.low, value)[1]
            yield _line(left, y, right, y, "axis")
            yield _e("text", text, x=_n(left - 4), y=_n(y + 3.5), text_anchor="end")
        for value, text in self.x.ticks(self.ticks[0]):
            x = self.at(value, self.y.low)[0]
            yield _line(x, bottom, x, bottom + 3, "axis")
            yield _e("text", text, x=_n(x), y=_n(bottom + 14), text_anchor="middle")
        yield _e("text", self.x.title, x=_n((left + right) / 2), y=_n(self.height - 5), text_anchor="middle")
        yield _e("text", self.y.title, x="2", y="9")

    def curve(self, points: Iterable[tuple[float, float]], class_: str = "curve") -> Element:
        places = (self.at(*point) for point in points)
        return _e("polyline", points=" ".join(f"{_n(x)},{_n(y)}" for x, y in places), class_=class_)

    def dot(self, point: tuple[float, float], title: str, radius: float = 3.5) -> Element:
        x, y = self.at(*point)
        return _e("circle", _e("title", title), cx=_n(x), cy=_n(y), r=_n(radius), class_="dot")

    def diamond(self, point: tuple[float, float], title: str) -> Element:
        x, y = self.at(*point)
        corners = f"M{_n(x)} {_n(y - 7)}l7 7l-7 7l-7 -7z"
        return _e("path", _e("title", title), d=corners, class_="chosen")

    def upright(self, x: float) -> Element:
        _, top, _, bottom = self._box
        place = self.at(x, self.y.low)[0]
        return _line(place, top, place, bottom, "guide")

    def level(self, y: float) -> Element:
        left, _, right, _ = self._box
        place = self.at(self.x.low, y)[1]
        return _line(left, place, right, place, "guide")

    def label(self, point: tuple[float, float], text: str, above: bool = True) -> Element:
        """Words beside a point, on the side where there is room."""
        x, y = self.at(*point)
        early = x < self.width / 2
        return _e(
            "text",
            text,
            x=_n(x + (10 if early else -10)),
            y=_n(y + (-6 if above else 13)),
            text_anchor="start" if early else "end",
            class_="said",
        )

    def svg(self, label: str, *marks: Element) -> Element:
        return _svg(self.width, self.height, label, *self.axes(), *marks, class_="plot")


def _line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Element:
    return _e("line", x1=_n(x1), y1=_n(y1), x2=_n(x2), y2=_n(y2), class_=class_)


# ---------------------------------------------------------------------------------------------------------- sections


def _header(report: Report) -> Element:
    verdicts = [_verdict_line(found, text) for found, text in words.verdicts(report)]
    verdicts += [_e("p", line) for line in words.budgets(report)]
    totals = _table(("", "before", "after", "change"), (total[:4] for total in words.totals(report)), numbers={1, 2, 3})
    return _e(
        "header",
        _e("p", "lindep_onnx report", class_="eyebrow"),
        _e("h1", report.model or "Model"),
        _e("p", words.headline(report)),
        *verdicts,
        _tiles(report),
        _folded("Totals as a table", totals),
    )


def _verdict_line(found: Verification | None, text: str) -> Element:
    tone = "dim" if found is None else "good" if found.passed else "bad"
    sign = "" if found is None else "\u2713 " if found.passed else "\u2717 "
    start, colon, rest = text.partition(":")
    return _e("p", _e("b", sign + start + colon), _e("span", rest), class_=f"verdict {tone}")


def _tiles(report: Report) -> Element:
    tiles: list[Element] = []
    shares: dict[str, tuple[float, float]] = {
        "parameters": (report.before.parameters, report.after.parameters),
        "MACs": (report.before.macs, report.after.macs),
        "size": (report.before.bytes, report.after.bytes),
        "channels": (report.before.channels, report.after.channels),
        "latency": (report.before.latency_ms or 0.0, report.after.latency_ms or 0.0),
    }
    for name, before, after, change, _ in words.totals(report):
        bar: list[Element] = []
        if name in ("parameters", "MACs", "channels"):
            before, after = (_short(count) for count in shares[name])
        if name in shares and shares[name][0]:
            bar = [_hidden_bar(shares[name][1] / shares[name][0])]
        told = [_e("small", change or "new"), _e("br"), _e("small", f"was {before}")]
        tiles.append(_e("li", _e("small", name), _e("b", after), *told, *bar, class_="tile"))
    found = report.verification
    if found is not None and found.agreement is not None:
        seen = _e("small", f"on {words.many(found.samples, 'unseen sample')}")
        share = words.percent(found.agreement)
        tiles.append(
            _e(
                "li",
                _e("small", "same decision"),
                _e("b", share),
                seen,
                _hidden_bar(found.agreement),
                class_="tile",
            )
        )
    return _e("ul", *tiles, class_="tiles")


def _layers(report: Report) -> list[Element]:
    if not report.layers:
        return []
    most = max(1, *(layer.channels_before for layer in report.layers))
    changed = sum(layer.channels_after < layer.channels_before for layer in report.layers)
    rows = -(-len(report.layers) // ROW)
    size = -(-len(report.layers) // rows)
    figures = []
    for first in range(0, len(report.layers), size):
        bars = []
        for place, layer in enumerate(report.layers[first : first + size]):
            before, after = (70 * math.sqrt(count / most) for count in (layer.channels_before, layer.channels_after))
            gone = 1 - layer.channels_after / max(1, layer.channels_before)
            title = (
                f"{first + place + 1}: {layer.name} ({layer.op}), {layer.channels_before:,} to "
                f"{layer.channels_after:,} channels"
            )
            x, wide = _n(10 * place + 0.8), "8.4"
            marks = [
                _e("rect", class_="before", x=x, y=_n(35 - before / 2), width=wide, height=_n(before)),
                _e("rect", class_="after", x=x, y=_n(35 - after / 2), width=wide, height=_n(after)),
            ]
            if gone:
                marks.append(_e("rect", class_="cut", x=x, y="74", width=wide, height=_n(max(1.5, 26 * gone))))
            bars.append(_e("g", _e("title", title), *marks))
        width = 10 * max(size, 8)  # a lone layer is no wall
        last = min(first + size, len(report.layers))
        label = f"Output channels of layers {first + 1} to {last} before and after; the table below has the numbers"
        line = _line(0, 73, width, 73, "axis")
        figures.append(_svg(width, 100, label, *bars, line, class_="strip", phase=True))
        if rows > 1:
            figures.append(_e("p", f"Layers {first + 1} to {last}", class_="dim"))
    caption = (
        f"One bar a layer, from input to output; {changed:,} of {len(report.layers):,} became narrower. Pale: output "
        f"channels of the original, {most:,} at most; solid: of the result (heights grow with the square root). "
        "Hanging below the line: the share that went."
    )
    numbers = [
        (
            str(place + 1),
            layer.name,
            layer.op,
            f"{layer.channels_before:,}",
            f"{layer.channels_after:,}",
            f"{layer.parameters_before:,}",
            f"{layer.parameters_after:,}",
        )
        for place, layer in enumerate(report.layers)
    ]
    titles = ("no.", "layer", "operator", "channels before", "after", "parameters before", "after")
    return [
        _e("figure", *figures, _e("figcaption", caption)),
        _folded("Widths as a table", _table(titles, numbers, numbers={0, 3, 4, 5, 6})),
    ]


def _frontier(report: Report) -> list[Element]:
    if not report.frontier:
        return []
    found = report.verification
    left = report.after.parameters / max(1, report.before.parameters)
    across = _Axis("parameters left", 0.0, 1.0, percent=True)
    budgets = {budget.kind: budget.requested for budget in report.budget}
    errors = [point.relative_error for point in report.frontier]
    chosen = [] if found is None else [found.relative_error]
    plot = _Plot(across, _errors_axis("worst output error", [*errors, *chosen], 1e-6))
    charts = [
        plot.svg(
            "Worst output error against the parameters that are left; the table below has the numbers",
            *([plot.upright(budgets["params"])] if "params" in budgets else []),
            *([plot.level(budgets["max_error"])] if "max_error" in budgets else []),
            plot.curve((point.parameters, point.relative_error) for point in report.frontier),
            *(
                plot.dot(
                    (p.parameters, p.relative_error), f"{words.percent(p.parameters)}: {words.error(p.relative_error)}"
                )
                for p in report.frontier
            ),
            *_chosen(plot, left, None if found is None else found.relative_error),
        )
    ]
    if all(point.agreement is not None for point in report.frontier):
        low = min(0.8, *(point.agreement or 0.0 for point in report.frontier))
        plot = _Plot(across, _Axis("same decision", math.floor(5 * low) / 5, 1.0, percent=True))
        charts.append(
            plot.svg(
                "Share of samples with the same decision against the parameters that are left",
                *([plot.upright(budgets["params"])] if "params" in budgets else []),
                *([plot.level(budgets["min_agreement"])] if "min_agreement" in budgets else []),
                plot.curve((point.parameters, point.agreement or 0.0) for point in report.frontier),
                *(
                    plot.dot(
                        (p.parameters, p.agreement or 0.0),
                        f"{words.percent(p.parameters)}: {words.percent(p.agreement or 0.0)}",
                    )
                    for p in report.frontier
                ),
                *_chosen(plot, left, None if found is None else found.agreement, above=False),
            )
        )
    caption = (
        "Circles: plans on the way from the whole model to the smallest one, measured with folds alone on samples that "
        "choose between plans. Diamond: this result, with its refit and recovery, measured on unseen samples. "
        "Dashed: the budget."
    )
    rows = [
        (
            words.percent(point.parameters),
            words.error(point.relative_error),
            "" if point.agreement is None else words.percent(point.agreement),
        )
        for point in report.frontier
    ]
    if found is not None:
        agreement = "" if found.agreement is None else words.percent(found.agreement)
        rows.append((f"{words.percent(left)} (this result)", words.error(found.relative_error), agreement))
    return [
        _e("figure", _e("div", *charts, class_="charts"), _e("figcaption", caption)),
        _folded("Frontier as a table", _table(("parameters left", "worst output error", "same decision"), rows)),
    ]


def _chosen(plot: _Plot, left: float, value: float | None, above: bool = True) -> list[Element]:
    if value is None or math.isnan(value):
        return []
    return [plot.diamond((left, value), "this result"), plot.label((left, value), "this result", above)]


def _groups(report: Report) -> list[Element]:
    if not report.groups:
        return []
    number = {id(group): place + 1 for place, group in enumerate(report.groups)}
    drawn = [group for group in report.changed if group.redundancy is not None]
    if not drawn:  # show at least how far from redundant they are
        widest = sorted(report.groups, key=lambda group: -group.channels_before)
        drawn = [group for group in widest if group.redundancy is not None][: MAX_CARDS // 2]
    cards = [_card(group, number[id(group)]) for group in drawn[:MAX_CARDS]]
    content = []
    if cards:
        which = f"the {len(cards)} that lost most" if report.changed else f"the {len(cards)} widest"
        text = (
            "A group is a set of channels that must stay or go together because the same weights read them. Left: the "
            "singular values of what its readers see, relative to the largest; channels beyond the rank carry nothing "
            "of their own. Right: the error at the readers once so many channels are gone and the others make up for "
            "them. Dashed: what was kept, and what was removed."
        )
        if len(report.groups) > len(cards):
            text += f" Shown are {which} of {len(report.groups):,} groups."
        content += [_e("p", text), _e("div", *cards, class_="cards")]
    rows = [
        (
            str(number[id(group)]),
            group.name,
            f"{group.channels_before:,}",
            f"{group.channels_after:,}",
            words.error(group.error),
            words.removal(group),
            words.support(group),
            ", ".join(group.sites),
        )
        for group in report.changed
    ]
    titles = ("no.", "group", "before", "after", "error", "removed", "support", "read by")
    if rows:
        content.append(_folded("Changed groups as a table", _table(titles, rows, numbers={0, 2, 3, 4})))
    rest = len(report.groups) - len(rows)
    if rest:
        content.append(_e("p", f"{words.many(rest, 'group')} unchanged.", class_="dim"))
    return content


def _card(group: GroupReport, number: int) -> Element:
    found = group.redundancy
    assert found is not None
    count = found.ranks[-1] if found.ranks else 1
    places = _Axis("channel", 0, max(1, count)), _Axis("removed", 0, max(1, count))
    spectrum, error = (
        _Plot(x, y, width=176, height=120, ticks=(4, 4))
        for x, y in zip(
            places, (_Axis("singular value", 1e-8, 1.0, log=True), _Axis("error", 1e-6, 1.0, log=True)), strict=True
        )
    )
    values = list(zip(found.ranks, found.singular_values, strict=True))
    errors = [(0, 0.0), *zip(found.removed, found.errors, strict=True)]
    charts = [
        spectrum.svg(
            f"Singular values, from 1 down to {found.singular_values[-1] if values else 0:.2g}",
            spectrum.curve(values),
            *([spectrum.upright(group.channels_after)] if group.removed else []),
        ),
        error.svg(
            f"Error, from 0 with none removed up to {found.errors[-1] if found.errors else 0:.2g} with "
            f"{found.removed[-1] if found.removed else 0}",
            error.curve(errors),
            *([error.upright(group.removed)] if group.removed else []),
        ),
    ]
    told = [f"{group.channels_before:,} \u2192 {group.channels_after:,} channels"]
    if group.error is not None:
        told.append(f"measured error {words.error(group.error)}")
    if found.rank < count:
        told.append(f"rank {found.rank:,} of {count:,}")
    how = words.removal(group)
    return _e(
        "div",
        _e("h3", f"{number}. {group.name}"),
        _e("p", "; ".join([*told, *([how] if how else [])])),
        _e("div", *charts, class_="pair"),
        class_="card",
    )


def _statistics(report: Report) -> list[Element]:
    points = [
        (place + 1, group, group.support.fit_error, group.support.heldout_error)
        for place, group in enumerate(report.groups)
        if group.support is not None and group.support.fit_error is not None and group.support.heldout_error is not None
    ]
    if not points:
        return []
    both = [max(error, MIN_ERROR) for *_, fit, held in points for error in (fit, held)]
    if max(both) <= MIN_ERROR:
        text = f"In {words.many(len(points), 'changed group')} every fold errs by less than {MIN_ERROR:.0e}"
        return [_e("p", f"{text}, on rows that it was fitted to and on others: what went is made up for exactly.")]
    axis = _errors_axis("error on rows that were fitted", both)
    plot = _Plot(axis, _Axis("error on held-out rows", axis.low, axis.high, log=True), height=300)
    worst = sorted(points, key=lambda point: -point[3])[:1]
    marks = [
        plot.dot((fit, held), f"{number}: {group.name}, {words.error(fit)} fitted, {words.error(held)} held out")
        for number, group, fit, held in points
    ]
    chart = plot.svg(
        f"Error on held-out rows against error on fitted rows, for {words.many(len(points), 'group')}; "
        "the table of groups has the numbers",
        plot.curve([(axis.low, axis.low), (axis.high, axis.high)], "guide"),
        *marks,
        *(plot.label((fit, held), f"group {number}") for number, _, fit, held in worst),
    )
    over = sum(held > max(2 * fit, LOSSLESS_SITE_ERROR) for *_, fit, held in points)
    caption = (
        "One circle a group that lost channels. On the dashed line a fold errs as much on rows it was not fitted to as "
        "on those it was; far above it, there was too little data. "
        + (
            f"Groups that err more than twice as much on held-out rows: {over:,}."
            if over
            else "No group errs more than twice as much on held-out rows."
        )
    )
    return [_e("figure", chart, _e("figcaption", caption))]


def _refusals(report: Report) -> list[Element]:
    found = words.refusals(report)
    if not found:
        return []
    most = max(1, *(refusal.channels for refusal in found))
    items = []
    for refusal in found:
        what, advice = words.refusal(refusal, MAX_NODES)
        bar = _bars([(refusal.reason, refusal.channels / most, f"{refusal.channels:,}")])
        items.append(_e("li", bar, what, _e("br"), _e("b", "What to do: "), advice))
    return [_e("p", "Channels that could not take part, by reason."), _e("ul", *items, class_="plain")]


def _verification(report: Report) -> list[Element]:
    content: list[Element] = []
    for found, text in words.verdicts(report):
        if found is None:
            continue
        if report.stress is not None:
            content.append(_e("h3", text.partition(":")[0]))
        if found.outputs:
            rows = [(o.name, words.output(o), words.error(o.max_abs_error), str(o.worst_sample)) for o in found.outputs]
            content.append(_table(("output", "difference", "largest absolute", "worst sample"), rows, numbers={2, 3}))
        if found.worst_samples:
            content.append(_e("h3", "Worst samples"))
            content.append(_e("p", "By their place in the data, with the relative error of the output.", class_="dim"))
            content.append(_worst(found))
        if found.variants:
            ways = [
                (v.name, f"{v.samples:,}", words.error(v.relative_error), "yes" if v.passed else "NO")
                for v in found.variants
            ]
            content.append(_e("h3", "Run otherwise"))
            content.append(_table(("how", "samples", "error", "passed"), ways, numbers={1, 2}))
    return content


def _worst(found: Verification) -> Element:
    errors = found.worst_errors or (math.nan,) * len(found.worst_samples)
    most = max((error for error in errors if math.isfinite(error)), default=0.0) or 1.0
    return _bars(
        (
            (
                f"sample {sample}",
                1.0 if math.isinf(error) else 0.0 if math.isnan(error) else error / most,
                words.error(error),
            )
            for sample, error in zip(found.worst_samples, errors, strict=True)
        ),
        "cut",
    )


def _latency(report: Report) -> list[Element]:
    before, after = report.before.latency_ms, report.after.latency_ms
    if before is None or after is None:
        return []
    longest = max(before, after) or 1.0
    change = before / after if after else math.inf
    text = (
        "Median time of one run in ONNX Runtime on the machine of this run, both models in turn: the result is "
        f"{change:.2f} times as fast. Other machines and other widths differ."
    )
    rows = [("original", before / longest, f"{before:.3g} ms"), ("result", after / longest, f"{after:.3g} ms")]
    return [_bars(rows), _e("p", text, class_="dim")]


def _run(report: Report) -> list[Element]:
    content = []
    seconds = dict(report.seconds)
    if seconds:
        total, longest = sum(seconds.values()), max(seconds.values()) or 1.0
        rows = [(stage, taken / longest, f"{taken:.2f} s") for stage, taken in seconds.items()]
        content += [_e("h3", f"Seconds: {total:.2f} in all"), _bars(rows)]
    if report.options:
        options = [(name, json.dumps(to_json_values(value))) for name, value in report.options.items()]
        content += [_e("h3", "Options"), _table(("option", "value"), options)]
    if report.versions:
        content += [_e("h3", "Versions"), _table(("package", "version"), report.versions.items())]
    return content

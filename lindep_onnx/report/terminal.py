"""A report in the terminal, readable at 80 columns."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from lindep_onnx.report import wording
from lindep_onnx.report.values import GroupReport, Report

#: What is shown without `verbose`.
MAX_GROUPS, MAX_REFUSALS = 5, 5
TONES = {"good": "green", "warn": "yellow", "bad": "bold red"}


def render(report: Report, console: Console, *, verbose: bool, preview: bool = False) -> None:
    """Print a report for a person, readable at 80 columns; `preview` shows too what other budgets would cost."""
    # All text goes in as `Text`, which knows no markup: tensor names may look like it.
    console.print(Text(wording.headline(report), style="bold"))
    totals = _table(Column(""), "before", "after", "change")
    for row in (*(total[:4] for total in wording.totals(report)), *wording.operators(report, every=verbose)):
        totals.add_row(*map(Text, row))
    console.print(totals)
    latency = wording.latency(report)
    if latency is not None:
        console.print(Text(latency + "\n"))
    _print_slowest(report, console)
    _print_groups(report, console, verbose)
    _print_verdicts(report, console, verbose)
    if (preview or verbose) and report.frontier:
        _print_preview(report, console)
        step = wording.next_step(report)
        if step is not None:
            console.print(Text(step))
    _print_refusals(report, console, verbose)
    loud = [note for note in report.notes if note.startswith("WARNING")]
    for note in loud:  # last but for the other notes, where nobody can miss it
        console.print(Text("\n" + wording.safe(note), style="bold red"))
    _print_list(console, "Notes", [Text(wording.safe(note)) for note in report.notes if note not in loud])


def _table(*columns: Column | str) -> Table:
    """A table without rows; a column that is only a title holds numbers."""
    given = [Column(one, justify="right") if isinstance(one, str) else one for one in columns]
    return Table(*given, box=box.SIMPLE_HEAD, pad_edge=False)


def _print_list(console: Console, title: str, items: Sequence[Text]) -> None:
    if not items:
        return
    grid = Table.grid(padding=(0, 1))
    for item in items:
        grid.add_row("-", item)
    console.print(Text(f"\n{title}", style="bold"))
    console.print(grid)


def _print_more(console: Console, count: int, noun: str, end: str = "") -> None:
    if count:
        console.print(Text(f"... {wording.many(count, f'more {noun}')} (-v shows all){end}", style="dim"))


def _print_slowest(report: Report, console: Console) -> None:
    """The layers that hold most of the time of the result, where it was profiled."""
    rows = wording.slowest_layers(report)
    if rows:
        table = _table(
            Column("layer", overflow="fold", max_width=max(12, console.width - 44)), "before", "after", "share"
        )
        for row in rows:
            table.add_row(*map(Text, row))
        console.print(Text("Where the time goes", style="bold"))
        console.print(table)


def _print_groups(report: Report, console: Console, verbose: bool) -> None:
    changed = report.changed
    shown = changed if verbose else changed[:MAX_GROUPS]
    if shown:
        title = "Largest wins" if len(shown) < len(changed) else "Where"
        console.print(Text(title, style="bold"))
        console.print(_group_table(shown, None if verbose else max(12, console.width - 54)))
    if verbose:
        supported = [group for group in report.groups if group.support]
        lines = [Text(f"{wording.safe(group.name)}: {wording.support(group)}") for group in supported]
        _print_list(console, "Support", lines)
    _print_more(console, len(changed) - len(shown), "group", "\n")


def _group_table(groups: Sequence[GroupReport], name_width: int | None) -> Table:
    """One row a group. Names longer than `name_width` go on in the next line: both ends may tell them apart."""
    measured = any(group.error is not None for group in groups)
    name = Column("group", overflow="fold", max_width=name_width)
    titles = ("channels", "parameters", *["error"] * measured)
    numbers = (Column(title, justify="right", no_wrap=True) for title in titles)
    table = _table(name, *numbers, Column("removed"))
    for group in groups:
        cells = [wording.safe(group.name), f"{group.channels_before:,} -> {group.channels_after:,}"]
        cells += [f"-{group.saved:,}" if group.saved else "", *[wording.error(group.error)] * measured]
        table.add_row(*map(Text, [*cells, wording.removal(group) or f"{group.removed:,}"]))
    return table


def _print_verdicts(report: Report, console: Console, verbose: bool) -> None:
    for found, verdict in wording.verdicts(report):
        console.print(Text(verdict, style=TONES[wording.tone(report, found)]))
        if verbose and found is not None:
            for output in found.outputs:
                console.print(Text(f"  output {wording.safe(output.name)}: {wording.output(output)}"))
            if found.variants:
                console.print(Text(f"  also run {', '.join(map(wording.variant, found.variants))}"))
    for line in wording.budgets(report):
        console.print(Text(line))


def _print_preview(report: Report, console: Console) -> None:
    """What would go at several budgets."""
    agreement = all(point.agreement is not None for point in report.frontier)
    table = _table("--params", "channels", "expected error", "measured error", *["agreement"] * agreement)
    for point in report.frontier:
        cells = [f"{point.parameters:.3f}", f"-{point.channels:,}"]
        cells += [wording.error(point.expected), wording.error(point.relative_error)]
        cells += (
            [wording.agreement(point.agreement, point.decisions)] if point.agreement is not None and agreement else []
        )
        table.add_row(*map(Text, cells))
    console.print(Text("\nWhat would go at other budgets", style="bold"))
    console.print(table)
    note = "Expected: on average. Measured: worst slice of an output, on up to 64 samples, before a refit."
    console.print(Text(note, style="dim"))


def _print_refusals(report: Report, console: Console, verbose: bool) -> None:
    refusals = wording.refusals(report)
    lines = []
    for refusal in refusals if verbose else refusals[:MAX_REFUSALS]:
        what, advice = wording.refusal(refusal, None if verbose else 3)
        lines.append(Text.assemble(what, "\n", (advice, "dim")))
    _print_list(console, "Left alone, most costly first" if len(refusals) > 1 else "Left alone", lines)
    _print_more(console, len(refusals) - len(lines), "reason")

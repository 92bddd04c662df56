"""What a run did and measured: plain values that are the JSON report, and three ways to show them.

The dataclasses below are the JSON report, key by key. Names in a report come from the model file and may hold
anything, so that every renderer treats them as hostile: no markup, no control characters.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lindep_onnx.errors import OutputError, UsageError
from lindep_onnx.files import replacing
from lindep_onnx.planning.path import FrontierPoint
from lindep_onnx.report.data_support import Support
from lindep_onnx.report.figures import Layer, Spectrum
from lindep_onnx.structure.reasons import ADVICE
from lindep_onnx.verify.compare import OutputComparison
from lindep_onnx.verify.variants import Variant

#: What is shown without `verbose`.
MAX_GROUPS, MAX_REFUSALS = 5, 5


@dataclass(frozen=True)
class Size:
    """What a model costs.

    Attributes:
        parameters: elements of floating-point tensors with more than one element.
        macs: multiply-accumulates for one sample.
        bytes: size of the file, weights included.
        channels: output channels over Conv, ConvTranspose, Gemm and MatMul with constant weights.
        latency_ms: milliseconds of one run, the lower decile; None if it was not measured.
        operators: how many nodes there are of each operator.
    """

    parameters: int
    macs: int
    bytes: int
    channels: int
    latency_ms: float | None = None
    operators: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Verification:
    """The result against the original, on samples that nothing was fitted to.

    Attributes:
        samples: how many were compared.
        relative_error: worst output error, as `lindep_onnx.verify` defines it.
        max_abs_error: largest absolute difference of a float output.
        agreement: share of samples (0 to 1) with the same arg-max; None if no output has one.
        passed: whether all that was asked for holds.
        data: what the samples were, in words.
        worst_samples: the samples that differ most, worst first, by their place in the data.
        outputs: one entry per output.
        variants: the same comparison with other batches, shapes and optimisations.
        worst_errors: relative error of each of the worst samples.
    """

    samples: int
    relative_error: float
    max_abs_error: float
    agreement: float | None
    passed: bool
    data: str
    worst_samples: tuple[int, ...] = ()
    outputs: tuple[OutputComparison, ...] = ()
    variants: tuple[Variant, ...] = ()
    worst_errors: tuple[float, ...] = ()


@dataclass(frozen=True)
class GroupReport:
    """One group of channels that stay or go together with the same weights.

    Attributes:
        name: of the group.
        channels_before: its channels in the original.
        channels_after: its channels in the result.
        error: measured error, never the surrogate; None if it was not measured.
        proven: how many of the removed channels the weights prove redundant for all inputs.
        sites: names of the nodes that read the group.
        observed: how many of the removed channels are redundant on data like the calibration data.
        kinds: removed channels by kind of redundancy.
        note: a sentence on this group, or nothing.
        support: how well the data supports what was removed; None without data.
        redundancy: singular values and the error of removing so many; None without data, and for very wide groups.
        saved: parameters that went with the channels, each counted as if all others had stayed.
    """

    name: str
    channels_before: int
    channels_after: int
    error: float | None
    proven: int
    sites: tuple[str, ...]
    observed: int = 0
    kinds: Mapping[str, int] = field(default_factory=dict)
    note: str = ""
    support: Support | None = None
    redundancy: Spectrum | None = None
    saved: int = 0

    @property
    def removed(self) -> int:
        """Channels that went."""
        return self.channels_before - self.channels_after


@dataclass(frozen=True)
class RefusalReport:
    """Channels that were left alone.

    Attributes:
        reason: code of the reason.
        nodes: names of the nodes that cause it.
        channels: how many channels it costs.
        message: the reason in words, a clause about "they", the channels.
    """

    reason: str
    nodes: tuple[str, ...]
    channels: int
    message: str


@dataclass(frozen=True)
class BudgetReport:
    """One budget and what became of it.

    Attributes:
        kind: its option, without dashes.
        requested: the value asked for.
        achieved: the value reached; None if it was not measured.
    """

    kind: str
    requested: float
    achieved: float | None


@dataclass(frozen=True)
class Report:
    """Everything a run did and measured.

    Attributes:
        before: cost of the original.
        after: cost of the result.
        verification: None without unseen samples.
        groups: in model order.
        refusals: channels left alone.
        budget: one entry per budget named.
        seconds: time taken by each stage.
        versions: of the packages that took part.
        options: that differ from their defaults.
        notes: sentences for the user.
        mode: "lossless", "budgeted" or "proven".
        stress: the comparison on a second data set that the user gave; None without one.
        model: name of the file, or of the graph of a model in memory.
        layers: widths before and after, in the order of the model.
        frontier: what other reductions cost without a refit, largest model first; empty without a budget.
    """

    before: Size
    after: Size
    verification: Verification | None
    groups: tuple[GroupReport, ...]
    refusals: tuple[RefusalReport, ...]
    budget: tuple[BudgetReport, ...]
    seconds: Mapping[str, float]
    versions: Mapping[str, str]
    options: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    mode: str = "lossless"
    stress: Verification | None = None
    model: str = ""
    layers: tuple[Layer, ...] = ()
    frontier: tuple[FrontierPoint, ...] = ()

    def to_json(self) -> str:
        """Strict JSON with sorted keys; infinity becomes the string "inf", a number that is none becomes null."""
        return json.dumps(_plain(self), sort_keys=True, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read a report back; unknown keys are left out, so that a later version's report can be read.

        Raises:
            UsageError: the text is not such a report.
        """
        try:
            values = json.loads(text)
            parts = {
                "before": _build(Size, values["before"]),
                "after": _build(Size, values["after"]),
                "verification": _built_verification(values["verification"]),
                "stress": _built_verification(values.get("stress")),
                "groups": tuple(_built_group(group) for group in values["groups"]),
                "refusals": tuple(_build(RefusalReport, refusal) for refusal in values["refusals"]),
                "budget": tuple(_build(BudgetReport, budget) for budget in values["budget"]),
                "layers": tuple(_build(Layer, layer) for layer in values.get("layers", ())),
                "frontier": tuple(_build(FrontierPoint, point) for point in values.get("frontier", ())),
            }
            report: Report = _build(cls, {**values, **parts})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UsageError(f"This is no JSON report of lindep_onnx ({reason}); write one with --report.") from error
        return report

    @property
    def changed(self) -> list[GroupReport]:
        """Groups that lost channels, those first with which most parameters went."""
        return sorted((group for group in self.groups if group.removed), key=lambda g: (-g.saved, -g.removed))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {entry.name: _plain(getattr(value, entry.name)) for entry in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(entry) for entry in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else ("inf" if value > 0 else "-inf")
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _built_verification(values: Mapping[str, Any] | None) -> Verification | None:
    if values is None:
        return None
    outputs = tuple(_build(OutputComparison, output) for output in values["outputs"])
    variants = tuple(_build(Variant, variant) for variant in values.get("variants", ()))
    built: Verification = _build(Verification, {**values, "outputs": outputs, "variants": variants})
    return built


def _built_group(values: Mapping[str, Any]) -> GroupReport:
    parts = {}
    for name, kind in (("support", Support), ("redundancy", Spectrum)):
        given = values.get(name)
        parts[name] = None if given is None else _build(kind, given)
    built: GroupReport = _build(GroupReport, {**values, **parts})
    return built


def _build(kind: type[Any], values: Mapping[str, Any]) -> Any:
    """An instance of a dataclass from JSON values: lists become tuples, "inf" a number where one is expected."""
    given = {}
    for entry in dataclasses.fields(kind):
        if entry.name not in values:
            continue
        value = values[entry.name]
        if isinstance(value, str) and "float" in str(entry.type):
            value = float(value)
        given[entry.name] = tuple(value) if isinstance(value, list) else value
    return kind(**given)


def check_path(path: Path) -> None:
    """Find out before the work whether a report can be written.

    Raises:
        UsageError: the suffix is neither .json nor .html.
        OutputError: the folder is missing, or cannot be written to.
    """
    if path.suffix.lower() not in (".json", ".html"):
        raise UsageError(f"{path}: a report is written as .json or .html, not {path.suffix or 'without a suffix'}.")
    if path.is_dir():
        raise OutputError(f"{path}: is a directory; name a file to write the report to.")
    if not path.parent.is_dir():
        raise OutputError(f"{path}: the folder {path.parent} does not exist; create it or name another.")
    if not os.access(path.parent, os.W_OK):
        raise OutputError(f"{path}: the folder {path.parent} cannot be written to; name another.")


def write_report(report: Report, path: str | Path) -> None:
    """Write a report so that `path` holds either its old content or the complete new one.

    Args:
        report: what to write.
        path: a .json or .html file.

    Raises:
        UsageError: another suffix.
        OutputError: the file cannot be written.
    """
    path = Path(path)
    check_path(path)
    if path.suffix.lower() == ".json":
        text = report.to_json()
    else:
        from lindep_onnx.report.html import page  # which shows what is defined here

        text = page(report)
    try:
        with replacing(path) as staged:
            staged.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error}).") from error


# ---------------------------------------------------------------------------------------------- words and numbers


def _safe(text: object) -> str:
    """Control and direction characters spelled out, so that a name cannot act on a terminal or a page."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def _share(value: float) -> str:
    """A share of 1 in percent, never rounded up to all or down to nothing."""
    percent = 100.0 * value if value in (0.0, 1.0) else min(max(100.0 * value, 0.01), 99.99)
    return f"{percent:.2f}".rstrip("0").rstrip(".") + " %"


def _error(value: float | None) -> str:
    if value is None or math.isnan(value):
        return ""
    return f"{value:.2g}" if math.isfinite(value) else "infinite"


def _bytes(count: float) -> str:
    unit = 0
    while count >= 1000 and unit < 4:
        count, unit = count / 1000, unit + 1
    return f"{count:,.0f} B" if not unit else f"{count:.3g} {('kB', 'MB', 'GB', 'TB')[unit - 1]}"


def _totals(report: Report) -> Iterator[tuple[str, str, str, str]]:
    """Rows of (what, before, after, change)."""
    before, after = report.before, report.after
    for name, attribute in (
        ("parameters", "parameters"),
        ("MACs", "macs"),
        ("size", "bytes"),
        ("channels", "channels"),
    ):
        old, new = getattr(before, attribute), getattr(after, attribute)
        show = _bytes if attribute == "bytes" else "{:,}".format
        yield name, show(old), show(new), _change(old, new)
    if before.latency_ms is not None and after.latency_ms is not None:
        old, new = before.latency_ms, after.latency_ms
        yield "latency", f"{old:.3g} ms", f"{new:.3g} ms", _change(old, new)


def _operators(report: Report, *, every: bool) -> Iterator[tuple[str, str, str, str]]:
    """Rows like those of `_totals`: all nodes, and the operators whose number changed, or all."""
    before, after = report.before.operators, report.after.operators
    if not before:
        return
    counts = [("nodes", sum(before.values()), sum(after.values()))]
    names = sorted(before.keys() | after.keys())
    counts += [(f"  {_safe(name)[:20]}", before.get(name, 0), after.get(name, 0)) for name in names]
    for name, old, new in counts:
        if every or old != new or name == "nodes":
            yield name, f"{old:,}", f"{new:,}", "0" if old == new else f"{new - old:+,}"


def _change(old: float, new: float) -> str:
    if not old or old == new:
        return "0 %" if old == new else ""
    return f"{100 * (new - old) / old:+.1f} %"


def _headline(report: Report) -> str:
    removed = sum(group.removed for group in report.changed)
    if removed:
        way = {"lossless": "Lossless mode", "proven": "Proven-only mode"}.get(report.mode, "Budgeted mode")
        channels = sum(group.channels_before for group in report.groups)
        return f"{way}: {removed:,} of {channels:,} removable channels went, in {_many(len(report.changed), 'group')}."
    if not report.groups:
        held = sum(refusal.channels for refusal in report.refusals)
        why = f"all {held:,} channels have to stay, for the reasons below" if held else "it has no channels to remove"
    elif report.mode == "proven":
        why = "the weights alone prove no channel redundant"
    elif report.mode == "lossless":
        why = "no channel is an exact combination of others on this data; a budget such as --max-error allows more"
    else:
        why = "no removal fits the budgets"
    return f"Nothing was removed: {why}."


def _many(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def _verdict(found: Verification | None, what: str = "Verification") -> str:
    if found is None:
        return "Not verified: there were no unseen samples to compare the two models on."
    passed = f"{what} passed" if found.passed else f"{what} FAILED".upper()
    text = f"{passed}: on {_many(found.samples, 'sample')} ({_safe(found.data)}) "
    text += f"the worst output error is {_error(found.relative_error)}"
    text += f" and the largest absolute difference {_error(found.max_abs_error)}"
    if found.agreement is not None:
        text += f"; the arg-max agrees in {_share(found.agreement)}"
    if (not found.passed or what != "Verification") and found.worst_samples:
        text += f". Samples that differ most: {', '.join(map(str, found.worst_samples))}"
    failed = [variant for variant in found.variants if not variant.passed]
    if failed:
        text += ". Run otherwise, it differs by more: " + ", ".join(map(_variant_words, failed))
    return text + "."


def _variant_words(variant: Variant) -> str:
    return f"{_safe(variant.name)} ({_error(variant.relative_error)})"


def _verdicts(report: Report) -> Iterator[tuple[Verification | None, str]]:
    yield report.verification, _verdict(report.verification)
    if report.stress is not None:
        yield report.stress, _verdict(report.stress, "Stress test")


def _budget_lines(report: Report) -> Iterator[str]:
    for budget in report.budget:
        achieved = "not measured" if budget.achieved is None else f"{budget.achieved:.4g}"
        yield f"Budget {_safe(budget.kind)}: {budget.requested:.4g} asked for, {achieved} reached."


def _how(group: GroupReport) -> str:
    """The kinds of redundancy of a group, in words."""
    kinds = ", ".join(f"{count:,} {_safe(kind)}" for kind, count in sorted(group.kinds.items()) if count)
    share = "all" if group.proven == group.removed else f"{group.proven:,} of them"
    proven = f"{share} proven" if group.proven else ""
    return "; ".join(part for part in (kinds, proven, _safe(group.note)) if part)


def _support(group: GroupReport) -> str:
    """What the data of a group is worth, in words."""
    found = group.support
    if found is None:
        return ""
    parts = [
        f"{_many(found.rows, 'row')}, at most {found.effective_rows:,.0f} of them independent, for "
        f"{_many(found.features, 'feature')}"
    ]
    if found.fit_error is not None:
        held = "" if found.heldout_error is None else f", {_error(found.heldout_error)} held out"
        parts.append(f"error {_error(found.fit_error)} fitted{held}")
    if found.silent_bound is not None:
        parts.append(
            f"{found.silent:,} never changed in {found.samples:,} samples (95 % bound {_share(found.silent_bound)})"
        )
    if found.samples_needed is not None:
        parts.append(f"combinations of several channels need {found.samples_needed:,} samples that decide")
    return "; ".join(parts)


def _refusals(report: Report) -> list[RefusalReport]:
    """Refusals by reason, the one that costs most channels first."""
    by_reason: dict[str, list[RefusalReport]] = {}
    for refusal in sorted(report.refusals, key=lambda refusal: -refusal.channels):
        by_reason.setdefault(refusal.reason, []).append(refusal)
    merged = [
        RefusalReport(
            reason,
            tuple(dict.fromkeys(node for refusal in found for node in refusal.nodes)),
            sum(refusal.channels for refusal in found),
            found[0].message,
        )
        for reason, found in by_reason.items()
    ]
    return sorted(merged, key=lambda refusal: -refusal.channels)


def _refusal_lines(refusal: RefusalReport, most_nodes: int | None) -> tuple[str, str]:
    """What was refused and why; what to do about it."""
    nodes = [_safe(node) for node in refusal.nodes]
    rest = 0 if most_nodes is None else max(0, len(nodes) - most_nodes)
    where = ", ".join(nodes[: len(nodes) - rest]) + (f" and {rest:,} more" if rest else "")
    at = f" (at {where})" if where else ""
    stays = "stays" if refusal.channels == 1 else "stay"
    what = f"{_many(refusal.channels, 'channel')} {stays}: {_safe(refusal.message)}{at} [{_safe(refusal.reason)}]"
    return what, ADVICE.get(refusal.reason, "No option changes this.")


# ----------------------------------------------------------------------------------------------------- console


def render(report: Report, console: Console, *, verbose: bool, preview: bool = False) -> None:
    """Print a report for a person; readable at 80 columns.

    Args:
        report: what to print.
        console: where to.
        verbose: everything, instead of the groups and refusals that matter most.
        preview: also what other budgets would cost.
    """
    # All text goes in as `Text`, which knows no markup: tensor names may look like it.
    console.print(Text(_headline(report), style="bold"))
    totals = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    totals.add_column("")
    for title in ("before", "after", "change"):
        totals.add_column(title, justify="right")
    for row in (*_totals(report), *_operators(report, every=verbose)):
        totals.add_row(*map(Text, row))
    console.print(totals)

    changed = report.changed
    shown = changed if verbose else changed[:MAX_GROUPS]
    if shown:
        title = "Largest wins" if len(shown) < len(changed) else "Where"
        console.print(Text(title, style="bold"))
        console.print(_group_table(shown, None if verbose else max(12, console.width - 54)))
    if verbose:
        _print_list(console, "Support", [Text(f"{_safe(g.name)}: {_support(g)}") for g in report.groups if g.support])
    if len(shown) < len(changed):
        console.print(Text(f"... {_many(len(changed) - len(shown), 'more group')} (-v shows all)\n", style="dim"))

    for found, verdict in _verdicts(report):
        style = "yellow" if found is None else "green" if found.passed else "bold red"
        console.print(Text(verdict, style=style))
        if verbose and found is not None:
            for output in found.outputs:
                console.print(Text(f"  output {_safe(output.name)}: {_output_words(output)}"))
            if found.variants:
                console.print(Text(f"  also run {', '.join(map(_variant_words, found.variants))}"))
    for line in _budget_lines(report):
        console.print(Text(line))
    if (preview or verbose) and report.frontier:
        _print_outlook(report, console)

    refusals = _refusals(report)
    lines = []
    for refusal in refusals if verbose else refusals[:MAX_REFUSALS]:
        what, advice = _refusal_lines(refusal, None if verbose else 3)
        lines.append(Text.assemble(what, "\n", (advice, "dim")))
    _print_list(console, "Left alone, most costly first" if len(refusals) > 1 else "Left alone", lines)
    if not verbose and len(refusals) > MAX_REFUSALS:
        console.print(Text(f"... {_many(len(refusals) - MAX_REFUSALS, 'more reason')} (-v shows all)", style="dim"))
    loud = [note for note in report.notes if note.startswith("WARNING")]
    for note in loud:  # last but for the other notes, where nobody can miss it
        console.print(Text("\n" + _safe(note), style="bold red"))
    _print_list(console, "Notes", [Text(_safe(note)) for note in report.notes if note not in loud])


def _print_outlook(report: Report, console: Console) -> None:
    """What would go at several budgets."""
    agreement = all(point.agreement is not None for point in report.frontier)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("--params", "channels", "expected error", "measured error", *(["agreement"] * agreement)):
        table.add_column(title, justify="right")
    for point in report.frontier:
        cells = [
            f"{point.parameters:.3f}",
            f"-{point.channels:,}",
            _error(point.expected),
            _error(point.relative_error),
        ]
        cells += [_share(point.agreement)] if point.agreement is not None and agreement else []
        table.add_row(*map(Text, cells))
    console.print(Text("\nWhat would go at other budgets", style="bold"))
    console.print(table)
    console.print(
        Text(
            "Expected: on average. Measured: worst slice of an output, on up to 64 samples, before a refit.",
            style="dim",
        )
    )


def _print_list(console: Console, title: str, items: Sequence[Text]) -> None:
    if not items:
        return
    grid = Table.grid(padding=(0, 1))
    for item in items:
        grid.add_row("-", item)
    console.print(Text(f"\n{title}", style="bold"))
    console.print(grid)


def _group_table(groups: Sequence[GroupReport], name_width: int | None) -> Table:
    """One row a group. Names longer than `name_width` go on in the next line: both ends may tell them apart."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("group", overflow="fold", max_width=name_width)
    table.add_column("channels", justify="right", no_wrap=True)
    table.add_column("parameters", justify="right", no_wrap=True)
    measured = any(group.error is not None for group in groups)
    if measured:
        table.add_column("error", justify="right", no_wrap=True)
    table.add_column("removed")
    for group in groups:
        cells = [_safe(group.name), f"{group.channels_before:,} -> {group.channels_after:,}"]
        cells += [f"-{group.saved:,}" if group.saved else "", *[_error(group.error)] * measured]
        table.add_row(*map(Text, [*cells, _how(group) or f"{group.removed:,}"]))
    return table


def _output_words(output: OutputComparison) -> str:
    if output.changed_share is not None:
        return f"{_share(output.changed_share)} of the elements differ"
    text = f"error {_error(output.relative_error)}, as one tensor {_error(output.whole_error)}"
    return text if output.cosine is None else f"{text}, 1 - cosine {_error(1 - output.cosine)}"

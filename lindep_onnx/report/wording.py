"""Every sentence and number of a report in words, for the terminal and the page alike.

Names in a report come from the model file and may hold anything: what is said here went through `safe`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

from lindep_onnx.report.values import GroupReport, RefusalReport, Report, Verification
from lindep_onnx.structure.reasons import ADVICE
from lindep_onnx.verify.metrics import OutputComparison
from lindep_onnx.verify.variants import Variant

# ------------------------------------------------------------------------------------------------------------ numbers


def safe(text: object) -> str:
    """Control and direction characters spelled out, so that a name cannot act on a terminal or a page."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def percent(share: float) -> str:
    """A share of 1 in percent, never rounded up to all or down to nothing."""
    value = 100.0 * share if share in (0.0, 1.0) else min(max(100.0 * share, 0.01), 99.99)
    return f"{value:.2f}".rstrip("0").rstrip(".") + " %"


def error(value: float | None) -> str:
    """An error with two digits; nothing where none was measured."""
    if value is None or math.isnan(value):
        return ""
    return f"{value:.2g}" if math.isfinite(value) else "infinite"


def size(count: float) -> str:
    """Bytes with three digits and their unit."""
    unit = 0
    while count >= 1000 and unit < 4:
        count, unit = count / 1000, unit + 1
    return f"{count:,.0f} B" if not unit else f"{count:.3g} {('kB', 'MB', 'GB', 'TB')[unit - 1]}"


def many(count: int, noun: str) -> str:
    """So many of something."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


# ------------------------------------------------------------------------------------------------------------- totals


class Total(NamedTuple):
    """One quantity of the whole model.

    Attributes:
        name: of the quantity.
        before, after: its values.
        change: of it.
        left: after as a share of before; None where there was none.
    """

    name: str
    before: str
    after: str
    change: str
    left: float | None


def totals(report: Report, count: Callable[[float], str] = "{:,}".format) -> Iterator[Total]:
    """What the model costs, each count written by `count`; the latency only where it was measured."""
    for name, attribute, show in (
        ("parameters", "parameters", count),
        ("MACs", "macs", count),
        ("size", "bytes", size),
        ("channels", "channels", count),
        ("latency", "latency_ms", _milliseconds),
    ):
        old, new = getattr(report.before, attribute), getattr(report.after, attribute)
        if old is not None and new is not None:
            left = new / old if old else None
            if show is _milliseconds and report.latency is not None:  # the median of ratios, not a ratio of medians
                left = report.latency.ratio if report.latency.differs else 1.0
            change = "" if left is None and new else "0 %" if left in (None, 1.0) else f"{100 * (left - 1):+.1f} %"
            yield Total(name, show(old), show(new), change, left)


def _milliseconds(taken: float) -> str:
    return f"{taken:.3g} ms"


def latency(report: Report) -> str | None:
    """What the latencies of both models say; None where they were not measured, or by an earlier version."""
    found = report.latency
    if found is None:
        return None
    threads = many(found.threads, "thread") if found.threads else "default threads"
    interval = f"95 % interval {_times(found.low)} to {_times(found.high)}; batch {found.batch:,}, {threads}"
    if found.differs:
        return f"Latency {_times(found.ratio)} of the original's ({interval})."
    copy = ""
    if not found.low <= 1.0 <= found.high:
        copy = f"; a copy of the original takes {_times(found.control.low)} to {_times(found.control.high)}"
    return f"No measurable difference in latency ({_times(found.ratio)}, {interval}{copy})."


def _times(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.2g}"


def operators(report: Report, *, every: bool) -> Iterator[tuple[str, str, str, str]]:
    """(what, before, after, change) of all nodes, and of the operators whose number changed, or of all."""
    before, after = report.before.operators, report.after.operators
    if not before:
        return
    counts = [("nodes", sum(before.values()), sum(after.values()))]
    names = sorted(before.keys() | after.keys())
    counts += [(f"  {safe(name)[:20]}", before.get(name, 0), after.get(name, 0)) for name in names]
    for name, old, new in counts:
        if every or old != new or name == "nodes":
            yield name, f"{old:,}", f"{new:,}", "0" if old == new else f"{new - old:+,}"


def headline(report: Report) -> str:
    """What was removed, or why nothing was."""
    removed = sum(group.removed for group in report.changed)
    if removed:
        way = {"lossless": "Lossless mode", "proven": "Proven-only mode"}.get(report.mode, "Budgeted mode")
        channels = sum(group.channels_before for group in report.groups)
        return f"{way}: {removed:,} of {channels:,} removable channels went, in {many(len(report.changed), 'group')}."
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


# ----------------------------------------------------------------------------------------------------------- verdicts


def verdicts(report: Report) -> Iterator[tuple[Verification | None, str]]:
    """The comparison with the original and that on stress data, each with a sentence."""
    yield report.verification, _verdict(report.verification, "Verification")
    if report.stress is not None:
        yield report.stress, _verdict(report.stress, "Stress test")


def _verdict(found: Verification | None, what: str) -> str:
    if found is None:
        return "Not verified: there were no unseen samples to compare the two models on."
    passed = f"{what} passed" if found.passed else f"{what} FAILED".upper()
    text = f"{passed}: on {many(found.samples, 'sample')} ({safe(found.data)}) the worst output error is "
    text += f"{error(found.relative_error)} and the largest absolute difference {error(found.max_abs_error)}"
    if found.agreement is not None:
        text += f"; the arg-max agrees in {percent(found.agreement)}"
    if (not found.passed or what != "Verification") and found.worst_samples:
        text += f". Samples that differ most: {', '.join(map(str, found.worst_samples))}"
    failed = [entry for entry in found.variants if not entry.passed]
    if failed:
        text += ". Run otherwise, it differs by more: " + ", ".join(map(variant, failed))
    return text + "."


def variant(found: Variant) -> str:
    """Another way of running the model, and its error."""
    return f"{safe(found.name)} ({error(found.relative_error)})"


def output(found: OutputComparison) -> str:
    """How much an output differs."""
    if found.changed_share is not None:
        return f"{percent(found.changed_share)} of the elements differ"
    text = f"error {error(found.relative_error)}, as one tensor {error(found.whole_error)}"
    return text if found.cosine is None else f"{text}, 1 - cosine {error(1 - found.cosine)}"


def budgets(report: Report) -> Iterator[str]:
    """What was asked for and what was reached."""
    for budget in report.budget:
        achieved = "not measured" if budget.achieved is None else f"{budget.achieved:.4g}"
        yield f"Budget {safe(budget.kind)}: {budget.requested:.4g} asked for, {achieved} reached."


# ------------------------------------------------------------------------------------------------ groups and refusals


def removal(group: GroupReport) -> str:
    """The kinds of redundancy of a group."""
    kinds = ", ".join(f"{count:,} {safe(kind)}" for kind, count in sorted(group.kinds.items()) if count)
    share = "all" if group.proven == group.removed else f"{group.proven:,} of them"
    proven = f"{share} proven" if group.proven else ""
    return "; ".join(part for part in (kinds, proven, safe(group.note)) if part)


def support(group: GroupReport) -> str:
    """What the data of a group is worth."""
    found = group.support
    if found is None:
        return ""
    rows = f"{many(found.rows, 'row')}, at most {found.effective_rows:,.0f} of them independent"
    parts = [f"{rows}, for {many(found.features, 'feature')}"]
    if found.fit_error is not None:
        held = "" if found.heldout_error is None else f", {error(found.heldout_error)} held out"
        parts.append(f"error {error(found.fit_error)} fitted{held}")
    if found.silent_bound is not None:
        bound = percent(found.silent_bound)
        parts.append(f"{found.silent:,} never changed in {found.samples:,} samples (95 % bound {bound})")
    if found.samples_needed is not None:
        parts.append(f"combinations of several channels need {found.samples_needed:,} samples that decide")
    return "; ".join(parts)


def refusals(report: Report) -> list[RefusalReport]:
    """Refusals by what is said of them, the one that costs most channels first."""
    by_reason: dict[tuple[str, str], list[RefusalReport]] = {}
    for found in sorted(report.refusals, key=lambda entry: -entry.channels):
        by_reason.setdefault((found.reason, found.message), []).append(found)
    merged = []
    for same in by_reason.values():
        nodes = dict.fromkeys(node for entry in same for node in entry.nodes)
        merged.append(replace(same[0], nodes=tuple(nodes), channels=sum(entry.channels for entry in same)))
    return sorted(merged, key=lambda entry: -entry.channels)


def refusal(found: RefusalReport, most_nodes: int | None) -> tuple[str, str]:
    """What was refused and why, naming so many nodes or all; what to do about it."""
    nodes = [safe(node) for node in found.nodes]
    rest = 0 if most_nodes is None else max(0, len(nodes) - most_nodes)
    where = ", ".join(nodes[: len(nodes) - rest]) + (f" and {rest:,} more" if rest else "")
    at = f" (at {where})" if where else ""
    stays = "stays" if found.channels == 1 else "stay"
    what = f"{many(found.channels, 'channel')} {stays}: {safe(found.message)}{at} [{safe(found.reason)}]"
    return what, ADVICE.get(found.reason, "No option changes this.")

"""Every sentence and number of a report in words, for the terminal and the page alike.

Names in a report come from the model file and may hold anything: what is said here went through `safe`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

from lindep_onnx.report.values import GroupReport, RefusalReport, Report, Verification
from lindep_onnx.runtime.node_times import LayerTime, slowest
from lindep_onnx.runtime.timing import SLOWER
from lindep_onnx.structure.reasons import ADVICE
from lindep_onnx.verify.metrics import OutputComparison
from lindep_onnx.verify.variants import Variant
from lindep_onnx.verify.verdict import MIN_PERCENT

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


def next_step(report: Report) -> str | None:
    """What a further reduction would cost; None where nothing tells."""
    found = report.next_step
    if found is None:
        return None
    shares, errors = (found.left, found.left_next), (found.expected, found.expected_next)
    from_to = [f"from {first} to {then}" for first, then in (map(percent, shares), map(error, errors))]
    return (
        f"The next 10 % of the {safe(found.what)}, {from_to[0]} of the original's, would raise the expected error "
        f"{from_to[1]}, before a refit."
    )


def slowest_layers(report: Report) -> list[tuple[str, str, str, str]]:
    """(layer, before, after, share of the result) of those that hold most of its time; nothing if not profiled."""
    return [
        (safe(entry.name) + (f" ({safe(entry.op)})" if entry.op else ""), *_before_after(entry), f"{100 * share:.0f} %")
        for entry, share in slowest(report.layer_times)
    ]


def _before_after(entry: LayerTime) -> tuple[str, str]:
    before, after = ("" if taken is None else _milliseconds(taken) for taken in (entry.before_ms, entry.after_ms))
    return before, after


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
    if report.mode == "compared":
        return f"Compared with {safe(report.model) or 'the original'}:"
    if removed:
        way = {"lossless": "Lossless mode", "proven": "Proven-only mode"}.get(report.mode, "Budgeted mode")
        channels = sum(group.channels_before for group in report.groups)
        groups = many(len(report.changed), "group")
        more = f"; {report.kept_for_widths:,} more stay for the sake of fast widths" if report.kept_for_widths else ""
        return f"{way}: {removed:,} of {channels:,} removable channels went, in {groups}{more}."
    if not report.groups:
        held = sum(refusal.channels for refusal in report.refusals)
        why = f"all {held:,} channels have to stay, for the reasons below" if held else "it has no channels to remove"
    elif report.kept_for_widths:
        why = (
            f"{many(report.kept_for_widths, 'channel')} could be, but widths would leave the fast kernels "
            f"({report.widths}). Use --round-to 1 to remove them anyway"
        )
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
    slow = slowdown(report)
    yield report.verification, _verdict(report.verification, "Verification", "" if slow is None else f", {slow}")
    if report.stress is not None:
        yield report.stress, _verdict(report.stress, "Stress test", "")


def tone(report: Report, found: Verification | None) -> str:
    """How a verdict is to be taken: "good", "warn" or "bad"; what is slower than the original is never good."""
    status = None if found is None else _status(found)
    if status == "failed":
        return "bad"
    return "good" if status == "passed" and slowdown(report) is None else "warn"


def _status(found: Verification) -> str:
    """Reports of versions without a status say only that a verification failed."""
    return found.status if found.passed else "failed"


def slowdown(report: Report) -> str | None:
    """By how much the result is slower, where the measurement leaves no doubt; None else."""
    found = report.latency
    changed = report.changed or report.mode == "compared"
    if found is None or not found.differs or found.low <= SLOWER or not changed:
        return None
    return slower(found.ratio, smaller=report.after.bytes < report.before.bytes)


def slower(ratio: float, *, smaller: bool) -> str:
    """What is said of a result that takes `ratio` times as long."""
    share = f"{100 * (ratio - 1):.0f} % slower"
    return f"smaller but {share}" if smaller else share


def _verdict(found: Verification | None, what: str, slow: str) -> str:
    if found is None:
        return f"Not verified{slow}: there were no held-out samples to compare the two models on."
    status, start = _status(found), {"passed": f"{what} passed", "failed": f"{what} FAILED".upper()}
    quality = "Quality" if what == "Verification" else what
    text = start.get(status, f"{quality} not checked") + slow + ": "
    text += f"{safe(found.reason)}. " if status == "unchecked" and found.reason else ""
    text += f"{_compared(found)}output error {_output_error(found)}"
    if not any(output.shapes_differ for output in found.outputs):
        text += f", largest absolute difference {error(found.max_abs_error)}"
    text += "."
    text += "".join(f" {shapes(output, found)}." for output in found.outputs if output.shapes_differ)
    if (status == "failed" or what != "Verification") and found.worst_samples:
        text += f" Samples that differ most: {', '.join(map(str, found.worst_samples))}."
    failed = [entry for entry in found.variants if not entry.passed]
    if failed:
        text += " Run otherwise, it differs by more: " + ", ".join(map(variant, failed)) + "."
    return text


def _compared(found: Verification) -> str:
    noun = safe(found.data)
    samples = f"{found.samples:,} {noun.removesuffix('s') if found.samples == 1 else noun}"
    if found.agreement is None or math.isnan(found.agreement):
        return f"{samples}, "
    if found.decisions != found.samples:
        return f"{percent(found.agreement)} of the positions of {samples} keep their predicted class; "
    if found.samples < MIN_PERCENT:
        return f"{round(found.agreement * found.samples):,} of {samples} keep their predicted class; "
    return f"{percent(found.agreement)} of {samples} keep their predicted class; "


def agreement(share: float, decisions: int) -> str:
    """A share of so many decisions that stay: counted where they are few, in percent else."""
    return f"{round(share * decisions)} of {decisions}" if 0 < decisions < MIN_PERCENT else percent(share)


def _output_error(found: Verification) -> str:
    """The worst error of outputs that can be compared: on samples on which their shapes agree."""
    if not any(output.shapes_differ for output in found.outputs):
        return error(found.relative_error)
    errors = [output.shared_error if output.shapes_differ else output.relative_error for output in found.outputs]
    known = [value for value in errors if value is not None]
    return error(max(known)) if known else "unknown"


def shapes(output: OutputComparison, found: Verification) -> str:
    """What is said of an output whose shape depends on the data and differs."""
    others = "" if output.shared_error is None else f"; error {error(output.shared_error)} on the others"
    count = f"{output.shapes_differ:,} of {many(found.samples, 'sample')}"
    return f"Output {safe(output.name)!r} has another number of rows on {count} (it depends on the data){others}"


def variant(found: Variant) -> str:
    """Another way of running the model, and its error."""
    return f"{safe(found.name)} ({error(found.relative_error)})"


def output(found: OutputComparison) -> str:
    """How much an output differs."""
    if found.changed_share is not None:
        return f"{percent(found.changed_share)} of the elements differ"
    if found.shapes_differ:
        others = "" if found.shared_error is None else f", error {error(found.shared_error)} on the others"
        return f"another number of rows on {many(found.shapes_differ, 'sample')}{others}"
    text = f"error {error(found.relative_error)}, as one tensor {error(found.whole_error)}"
    return text if found.cosine is None else f"{text}, 1 - cosine {error(1 - found.cosine)}"


def budgets(report: Report) -> Iterator[str]:
    """What was asked for and what was reached."""
    for budget in report.budget:
        reached = budget.achieved
        name = "--" + safe(budget.kind).replace("_", "-")
        if reached is None or math.isnan(reached):
            yield f"Limit {name} {budget.requested:.4g}: not measured"
            continue
        few = budget.kind == "min_agreement" and report.verification is not None
        text = agreement(reached, report.verification.decisions) if few and report.verification else ""
        met = reached >= budget.requested if budget.kind == "min_agreement" else reached <= budget.requested
        counted = f" ({text})" if " of " in text else ""
        yield f"Limit {name} {budget.requested:.4g}: {reached:.4g} reached{counted}{'' if met else ', NOT MET'}"


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

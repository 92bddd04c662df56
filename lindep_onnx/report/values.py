"""What a run did and measured: the JSON report, key by key.

Names in a report come from the model file and may hold anything, so that whatever shows them treats them as hostile:
no markup, no control characters.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lindep_onnx.errors import UsageError
from lindep_onnx.planning.values import FrontierPoint
from lindep_onnx.report.json_values import from_json_values, to_json_values
from lindep_onnx.runtime.node_times import LayerTime
from lindep_onnx.runtime.timing import Ratio
from lindep_onnx.verify.metrics import OutputComparison
from lindep_onnx.verify.variants import Variant


@dataclass(frozen=True)
class Size:
    """What a model costs.

    Attributes:
        parameters: elements of floating-point tensors with more than one element.
        macs: multiply-accumulates for one sample.
        bytes: size of the file, weights included.
        channels: output channels over Conv, ConvTranspose, Gemm and MatMul with constant weights.
        latency_ms: milliseconds of one run that nothing disturbs; None if it was not measured.
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
        passed: whether nothing that was asked for is broken: `status` is not "failed". It is true where no limit on
            quality was set as well, and says nothing of the quality then: look at `status`.
        data: what the samples were, in words.
        worst_samples: the samples that differ most, worst first, by their place in the data.
        outputs: one entry per output.
        variants: the same comparison with other batches, shapes and optimisations.
        worst_errors: relative error of each of the worst samples.
        status: "passed" where a limit on quality was set and holds, or the lossless bound does, on at least 10 samples;
            "unchecked" where no limit on quality was set, or too few samples judged it; "failed" else.
        reason: why it is not "passed", in words; empty where it is.
        agreement_output: name of the output whose arg-max is counted; None if there is none.
        decisions: how many arg-maxes were counted: samples, times positions of a 4-D output.
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
    status: str = "unchecked"
    reason: str = ""
    agreement_output: str | None = None
    decisions: int = 0


@dataclass(frozen=True)
class Support:
    """What the data of one group is worth.

    Rows of one sample resemble each other, so that at most 16 of each count as effective. Rows and features are those
    of the consumer that has the fewest effective rows for each feature.

    Attributes:
        samples: number of samples that decisions were made on, those that only verify left out.
        rows: number of rows of activations that were fitted to.
        effective_rows: how many independent ones they are worth at most.
        features: how many channels a combination could be made of.
        fit_error: RMS error of the folds relative to the centred RMS of the output, on the rows they were fitted to;
            worst consumer. None if nothing was removed.
        heldout_error: the same on rows that they were not fitted to; None if there are none.
        silent: how many of the removed channels never changed in the data, without a proof.
        silent_bound: with 95 % confidence each of them changes in no more than this share of samples like these.
        samples_needed: samples that combinations of several channels could be looked for with; None if there are
            enough.
    """

    samples: int
    rows: int
    effective_rows: float
    features: int
    fit_error: float | None
    heldout_error: float | None
    silent: int
    silent_bound: float | None
    samples_needed: int | None


@dataclass(frozen=True)
class Layer:
    """One Conv, ConvTranspose, Gemm or MatMul with a constant weight.

    Attributes:
        name: of its node.
        op: its operator.
        channels_before: its output channels in the original.
        channels_after: its output channels in the result.
        parameters_before: elements of its weight in the original; a shared weight counts at each reader.
        parameters_after: elements of its weight in the result.
    """

    name: str
    op: str
    channels_before: int
    channels_after: int
    parameters_before: int
    parameters_after: int


@dataclass(frozen=True)
class Spectrum:
    """How redundant the channels of one group are on the data.

    Attributes:
        rank: singular values that are no rounding.
        ranks: places of the singular values that are listed, from 1 on.
        singular_values: of the group's centred input rows at the consumer with most features, largest first, as shares
            of the largest.
        removed: numbers of channels removed, ascending.
        errors: RMS over the group's consumers of the relative error once so many channels are gone, cheapest first, and
            the others are refitted; on the rows that were fitted.
    """

    rank: int
    ranks: tuple[int, ...]
    singular_values: tuple[float, ...]
    removed: tuple[int, ...]
    errors: tuple[float, ...]


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
class Latency:
    """How long a run takes, each model alone in a process of its own, in turns.

    Attributes:
        before_ms: milliseconds of a run of the original that nothing disturbs.
        after_ms: milliseconds of a run of the result, likewise.
        ratio: time of the result as a share of the original's, the median over the rounds.
        low, high: ends of the 95 % interval of the ratio.
        control: a copy of the original as a share of the original, measured alike.
        differs: whether there is a difference: 1 is not in the interval, and the copy differs by less.
        rounds: turns of all models; each gives one ratio.
        batch: samples in a run.
        threads: of each model; 0 for as many as ONNX Runtime takes by itself.
    """

    before_ms: float
    after_ms: float
    ratio: float
    low: float
    high: float
    control: Ratio
    differs: bool
    rounds: int
    batch: int
    threads: int


@dataclass(frozen=True)
class NextStep:
    """What a further reduction by 10 % of the original would cost, before a refit.

    Attributes:
        what: goes: "latency" or "parameters".
        left: share of the original's that the result has.
        left_next: share that would be left.
        expected: error that a plan of the result's size is priced at, averaged over the outputs.
        expected_next: that of the smaller plan.
    """

    what: str
    left: float
    left_next: float
    expected: float
    expected_next: float


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
        kept_for_widths: channels that cost nothing, but stay so that widths keep to the rule; 0 with a budget.
        widths: the rule that the remaining widths keep to, in words; empty where a plan was carried out again.
        frontier: what other reductions cost without a refit, largest model first; empty without a budget.
        latency: of the result beside the original; None if it was not measured.
        layer_times: of the nodes of both models, by ONNX Runtime's profiler; empty if it was not asked for.
        next_step: what a further 10 % would cost; None without a frontier that reaches so far.
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
    kept_for_widths: int = 0
    widths: str = ""
    latency: Latency | None = None
    layer_times: tuple[LayerTime, ...] = ()
    next_step: NextStep | None = None

    def to_json(self) -> str:
        """Strict JSON with sorted keys; infinity becomes the string "inf", a number that is none becomes null."""
        return json.dumps(to_json_values(self), sort_keys=True, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read a report back; unknown keys are left out, so that a later version's report can be read.

        Raises:
            UsageError: the text is not such a report.
        """
        try:
            report: Report = from_json_values(cls, json.loads(text))
        except (ValueError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UsageError(f"This is no JSON report of lindep_onnx ({reason}); write one with --report.") from error
        return report

    @property
    def changed(self) -> list[GroupReport]:
        """Groups that lost channels, those first with which most parameters went."""
        return sorted((group for group in self.groups if group.removed), key=lambda g: (-g.saved, -g.removed))

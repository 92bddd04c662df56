"""A small report that has everything, for tests of what shows reports."""

from __future__ import annotations

import dataclasses

from lindep_onnx.planning.values import FrontierPoint
from lindep_onnx.report.values import (
    BudgetReport,
    GroupReport,
    Latency,
    Layer,
    NextStep,
    RefusalReport,
    Report,
    Size,
    Spectrum,
    Support,
    Verification,
)
from lindep_onnx.runtime.node_times import LayerTime
from lindep_onnx.runtime.timing import Ratio
from lindep_onnx.verify.metrics import OutputComparison
from lindep_onnx.verify.variants import Variant

HOSTILE = '[red]x</title></style><script>alert("1")</script>\x1b[2J\u202e'

VERIFIED = Verification(
    samples=40,
    relative_error=1.5e-4,
    max_abs_error=2e-5,
    agreement=0.975,
    passed=True,
    data="held-out samples",
    worst_samples=(3, 17),
    outputs=(OutputComparison("scores", 1.5e-4, 1e-5, 2e-5, 3, None), OutputComparison("ids", 0.0, 0.0, 0.0, 0, 0.0)),
    variants=(Variant("in batches of 1", 8, 1e-4, True),),
    worst_errors=(0.4, 0.1),
    status="passed",
    agreement_output="scores",
    decisions=40,
)


def group(
    name: str = "conv1", before: int = 64, after: int = 48, fit: float = 1e-3, held: float = 2e-3, **changes: object
) -> GroupReport:
    support = Support(28, 900, 448.0, 64, fit, held, 0, None, None)
    redundancy = Spectrum(3, (1, 2, 3, 4), (1.0, 0.5, 0.1, 0.0), (1, 2, 3), (0.0, 0.02, 0.4))
    made = GroupReport(name, before, after, 1e-6, 2, ("conv2",), support=support, redundancy=redundancy)
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def refusal(reason: str = "unknown_operator", channels: int = 10, node: str = "Foo_1") -> RefusalReport:
    return RefusalReport(reason, (node,), channels, "an operator without a rule reads them")


def a_report(**changes: object) -> Report:
    report = Report(
        before=Size(4_000_000, 900_000_000, 16_000_000, 1000, 12.5),
        after=Size(3_000_000, 600_000_000, 12_000_000, 900, 10.0),
        verification=VERIFIED,
        groups=(group(kinds={"joint": 12, "constant": 4}), group("conv3", 32, 32, error=None, redundancy=None)),
        refusals=(refusal(),),
        budget=(BudgetReport("params", 0.75, 0.75), BudgetReport("max_error", 1e-3, 1.5e-4)),
        latency=Latency(12.5, 10.0, 0.8, 0.78, 0.83, Ratio(1.0, 0.97, 1.04), True, 10, 1, 2),
        seconds={"load": 0.5, "calibrate": 2.25},
        versions={"onnx": "1.2.3"},
        options={"seed": 3},
        notes=("Never active in 280 samples (95 % bound 3/n = 1.1 %).",),
        mode="lossless",
        model="net.onnx",
        layers=(Layer("conv1", "Conv", 64, 48, 1728, 1296), Layer("conv3", "Conv", 16, 16, 9216, 6912)),
        layer_times=(
            LayerTime("conv1", "Conv", 6.0, 4.5),
            LayerTime("fc7", "Gemm", 3.0, 3.0),
            LayerTime("relu9", "Relu", 0.5, None),
            LayerTime("other", "", 0.25, 0.5),
        ),
        next_step=NextStep("parameters", 0.75, 0.65, 0.03, 0.052),
        frontier=(FrontierPoint(0.913, 1e-4, 1.0, 12, 4e-5), FrontierPoint(0.4, 0.2, 0.5, 340, 0.1)),
    )
    return dataclasses.replace(report, **changes)  # type: ignore[arg-type]


def a_hostile_report() -> Report:
    """Every name is one that would act on a page or a terminal."""
    return a_report(
        verification=dataclasses.replace(
            VERIFIED,
            data=HOSTILE,
            outputs=(OutputComparison(HOSTILE, 0.1, 0.1, 0.1, 0, None),),
            variants=(Variant(HOSTILE, 1, 0.0, True),),
        ),
        groups=(group(HOSTILE, sites=(HOSTILE,), kinds={HOSTILE: 1}, note=HOSTILE),),
        refusals=(RefusalReport(HOSTILE, (HOSTILE,), 3, HOSTILE),),
        budget=(BudgetReport(HOSTILE, 1.0, None),),
        seconds={HOSTILE: 1.0},
        versions={HOSTILE: HOSTILE},
        options={HOSTILE: HOSTILE},
        notes=(HOSTILE,),
        model=HOSTILE,
        layers=(Layer(HOSTILE, HOSTILE, 4, 2, 4, 2),),
        layer_times=(LayerTime(HOSTILE, HOSTILE, 1.0, 1.0),),
    )

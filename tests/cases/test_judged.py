"""Models whose results were said to be verified, or to meet a budget, and were not."""

from __future__ import annotations

from io import StringIO

import numpy as np
import onnx
import pytest
from build import build
from rich.console import Console

import lindep_onnx
from lindep_onnx.errors import BudgetError
from lindep_onnx.report.html import page
from lindep_onnx.report.terminal import render


def shown(report: lindep_onnx.report.values.Report) -> str:
    stream = StringIO()
    render(report, Console(file=stream, width=400), verbose=True)
    return stream.getvalue()


def quantized() -> onnx.ModelProto:
    weights = {"s": np.float32(0.03), "z": np.uint8(128), "sw": np.float32(0.01), "zw": np.int8(0)}
    body = """
        q = QuantizeLinear(x, s, z)
        d = DequantizeLinear(q, s, z)
        w = DequantizeLinear(wq, sw, zw)
        h = MatMul(d, w)
        r = Relu(h)
        v = DequantizeLinear(vq, sw, zw)
        y = MatMul(r, v)"""
    rng = np.random.default_rng(0)
    kinds = {name: rng.integers(-90, 90, shape).astype(np.int8) for name, shape in (("wq", (8, 16)), ("vq", (16, 8)))}
    return build(body, {**weights, **kinds}, x=("N", 8))


@pytest.mark.parametrize("budget", ["params", "channels"])
def test_nothing_of_nothing_is_not_a_budget_met(budget: str) -> None:
    data = {"x": np.random.default_rng(1).normal(size=(120, 8)).astype(np.float32)}
    with pytest.raises(BudgetError, match=f"--{budget} 0.7 cannot be reached.*quantized"):
        lindep_onnx.compress(quantized(), data, **{budget: 0.7})
    forced = lindep_onnx.compress(quantized(), data, **{budget: 0.7}, force=True).report
    assert forced.verification.status == "failed" and not forced.verification.passed
    assert f"Limit --{budget} 0.7: not measured" in shown(forced)


def test_a_size_that_nothing_can_be_taken_from_is_missed_not_met() -> None:
    data = {"x": np.random.default_rng(1).normal(size=(120, 8)).astype(np.float32)}
    with pytest.raises(BudgetError, match=r"--macs 0.7 cannot be reached: .* 1 of the original are left"):
        lindep_onnx.compress(quantized(), data, macs=0.7)


def detector() -> onnx.ModelProto:
    weights = {
        "w": (16, 3, 3, 3), "wb": (4, 16, 1, 1), "ws": (3, 16, 1, 1), "s4": np.array([1, 4, 64]),
        "s2": np.array([1, 3, 64]), "most": np.array([10]), "iou": np.array([0.5], np.float32),
        "least": np.array([0.5], np.float32), "one": np.array([1]), "two": np.array([2]), "three": np.array([3]),
    }  # fmt: skip
    body = """
        h = Conv<pads=[1,1,1,1]>(x, w)
        r = Relu(h)
        b = Conv(r, wb)
        s = Conv(r, ws)
        p = Sigmoid(s)
        b1 = Reshape(b, s4)
        boxes = Transpose<perm=[0,2,1]>(b1)
        scores = Reshape(p, s2)
        sel = NonMaxSuppression(boxes, scores, most, iou, least)
        i = Slice(sel, two, three, one)
        flat = Squeeze(i, one)
        y = Gather<axis=1>(boxes, flat)"""
    return build(body, weights, x=(1, 3, 8, 8), outputs="y sel")


def test_rows_that_the_data_decides_on_are_no_infinite_error_that_passes() -> None:
    data = {"x": np.random.default_rng(1).normal(size=(100, 3, 8, 8)).astype(np.float32)}
    report = lindep_onnx.compress(detector(), data, params=0.7).report
    found = report.verification
    assert found.status == "unchecked" and "--max-drop" in found.reason
    by_name = {output.name: output for output in found.outputs}
    assert 0 < by_name["y"].shapes_differ < found.samples and np.isfinite(by_name["y"].shared_error)
    for text in (shown(report), page(report)):
        differ = by_name["sel"].shapes_differ
        assert f"has another number of rows on {differ} of {found.samples}" in text
    assert "infinite" not in shown(report).partition("  output ")[0]
    with pytest.raises(BudgetError, match=r"has another shape on \d+ of \d+ held-out samples"):
        lindep_onnx.compress(detector(), data, params=0.7, max_error=10.0)

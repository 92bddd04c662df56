"""Moments that are made on the device that holds the activations: here the processor plays the device."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from build import build, run, traced
from free_widths import compress

from lindep_onnx.calibration.measure import Calibration, Draw, MeasuringPoint, StatisticsAccumulator, measure
from lindep_onnx.calibration.moments import Moments
from lindep_onnx.data.inputs import InputSpec
from lindep_onnx.data.samples import open_samples
from lindep_onnx.data.split import Part
from lindep_onnx.errors import CalibrationError
from lindep_onnx.log import Log
from lindep_onnx.options import DataOptions
from lindep_onnx.runtime.backend import Runtime
from lindep_onnx.runtime.rows import ChannelAxis, summable

GPU = ("CUDAExecutionProvider", "CPUExecutionProvider")
CPU = ("CPUExecutionProvider",)
NETS = {
    "convolutions": (
        "h = Conv<pads=[1,1,1,1]>(x, w)\nr = Relu(h)\ns = Conv<strides=[2,2]>(r, v)\nt = Relu(s)\n"
        "f = Flatten(t)\ny = Gemm(f, g)",
        {"w": (12, 3, 3, 3), "v": (8, 12, 1, 1), "g": (72, 4)},
    ),
    "groups and a product at the end": (
        "h = Conv(x, w)\nr = Relu(h)\ns = Conv<group=2>(r, v)\nt = Relu(s)\nn = Transpose<perm=[0,2,3,1]>(t)\n"
        "y = MatMul(n, m)",
        {"w": (12, 3, 1, 1), "v": (8, 6, 1, 1), "m": (8, 5)},
    ),
}


def moments(
    model: onnx.ModelProto, x: np.ndarray, monkeypatch: pytest.MonkeyPatch, *, device: bool, batch: int = 16
) -> Calibration:
    channels = traced(model)
    spec = InputSpec("x", np.dtype(np.float32), channels.shape_info.shapes["x"])
    with (
        monkeypatch.context() as patch,
        open_samples({"x": x}, [spec], DataOptions(batch_size=batch)) as samples,
    ):
        patch.setattr(Runtime, "on_processor", not device)
        sums = StatisticsAccumulator(channels)
        measure(samples, sums, Draw(3, len(samples.parts[Part.FIT])), Runtime(threads=1), Log())
        return sums.result()


def data(count: int = 90) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(count, 3, 6, 6)).astype(np.float32)


def pairs(one: Calibration, other: Calibration) -> list[tuple[MeasuringPoint, Moments, Moments]]:
    assert one.select is not None and other.select is not None and one.samples == other.samples
    return [
        (at, own[at], theirs[at]) for own, theirs in ((one.fit, other.fit), (one.select, other.select)) for at in own
    ]


@pytest.mark.parametrize("leading", ["N", 16])
@pytest.mark.parametrize("net", NETS)
def test_sums_of_the_graph_are_those_of_rows(net: str, leading: str | int, monkeypatch: pytest.MonkeyPatch) -> None:
    body, weights = NETS[net]
    model = build(body, weights, x=(leading, 3, 6, 6))
    on_host, on_device = (moments(model, data(), monkeypatch, device=device) for device in (False, True))
    for at, want, found in pairs(on_host, on_device):
        assert (found.rows, found.samples, found.effective_rows) == (want.rows, want.samples, want.effective_rows), at
        np.testing.assert_allclose(found.gram, want.gram, rtol=1e-12, atol=1e-12 * np.abs(want.gram).max())
        np.testing.assert_allclose(found.sum, want.sum, rtol=1e-12, atol=1e-10)
        for field in ("low", "high", "active", "at_low", "at_high"):
            np.testing.assert_array_equal(getattr(found, field), getattr(want, field))


def test_places_are_summed_only_where_samples_lead(monkeypatch: pytest.MonkeyPatch) -> None:
    body, weights = NETS["convolutions"]
    channels = traced(build(body, weights, x=("N", 3, 6, 6)))
    assert summable(channels.model, channels.shape_info, ChannelAxis("r", 1))
    assert not summable(channels.model, channels.shape_info, ChannelAxis("r", 2))
    turned = traced(build("t = Transpose<perm=[1,0,2,3]>(x)\ny = Conv(t, w)", {"w": (4, 7, 1, 1)}, x=(7, 3, 6, 6)))
    assert not summable(turned.model, turned.shape_info, ChannelAxis("t", 1))


def test_nearly_dependent_channels_keep_their_rank_as_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two channels that differ by 1e-5 of their size: the smallest eigenvalue is 1e-10 of the largest, which products
    # of float32 cannot show.
    weight = np.random.default_rng(0).normal(size=(8, 3, 1, 1)).astype(np.float32)
    weight[7] = weight[6] + 1e-5 * weight[5]
    model = build("h = Conv(x, w)\nr = Abs(h)\ny = Conv(r, v)", {"w": weight, "v": (4, 8, 1, 1)}, x=("N", 3, 6, 6))
    (at,) = [at for at in moments(model, data(), monkeypatch, device=True).fit if at.tensor == "r"]
    exact, found = (moments(model, data(), monkeypatch, device=device).fit[at] for device in (False, True))
    least = [np.linalg.eigvalsh(one.gram)[0] for one in (exact, found)]
    assert 0 < least[0] < 1e-8 * np.linalg.eigvalsh(exact.gram)[-1]
    np.testing.assert_allclose(least[1], least[0], rtol=1e-3)
    rows = np.abs(np.einsum("oi,nihw->nohw", weight[:, :, 0, 0], data()))
    flat = np.moveaxis(rows, 1, -1).reshape(-1, 8)
    coarse = np.linalg.eigvalsh((flat.T @ flat).astype(np.float64))  # the same in float32
    assert not np.isclose(coarse[0] / coarse[-1], least[0] / np.linalg.eigvalsh(exact.gram)[-1], rtol=0.1, atol=0.0)


def test_an_activation_that_is_not_finite_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    body, weights = NETS["convolutions"]
    huge = {**weights, "w": np.full((12, 3, 3, 3), 1e30, np.float32)}
    with pytest.raises(CalibrationError, match=r"Tensor 'r' becomes NaN or infinite"):
        moments(build(body, huge, x=("N", 3, 6, 6)), 1e30 * data(), monkeypatch, device=True)


def test_the_result_is_the_same_wherever_moments_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    body, weights = NETS["convolutions"]
    weight = np.random.default_rng(0).normal(size=(12, 3, 3, 3)).astype(np.float32)
    weight[9:] = 2 * weight[:3]
    model = build(body, {**weights, "w": weight}, x=("N", 3, 6, 6))
    here = compress(model, {"x": data()})
    monkeypatch.setattr(Runtime, "on_processor", False)
    there = compress(model, {"x": data()})
    assert here.report.before.channels - here.report.after.channels == 3
    assert here.report.after.channels == there.report.after.channels
    feeds = {"x": data(8)}
    np.testing.assert_allclose(run(here.model, feeds)[0], run(there.model, feeds)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(GPU[0] not in onnxruntime.get_available_providers(), reason="there is no GPU")
def test_a_gpu_finds_what_the_processor_finds() -> None:
    body, weights = NETS["convolutions"]
    weight = np.random.default_rng(0).normal(size=(12, 3, 3, 3)).astype(np.float32)
    weight[9:] = 2 * weight[:3]
    model = build(body, {**weights, "w": weight}, x=("N", 3, 6, 6))
    for options in ({}, {"params": 0.6, "recover": 5}):
        here, there = (compress(model, {"x": data()}, providers=own, **options) for own in (CPU, GPU))
        assert here.report.after.channels == there.report.after.channels
        feeds = {"x": data(8)}
        np.testing.assert_allclose(run(here.model, feeds)[0], run(there.model, feeds)[0], rtol=1e-2, atol=1e-2)

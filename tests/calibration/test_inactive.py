"""Channels that never changed: which may go, and which only happened to be silent."""

from __future__ import annotations

import numpy as np
import pytest
from build import as_array, build, run, traced
from free_widths import compress

from lindep_onnx.calibration.collect import collect_statistics
from lindep_onnx.calibration.inactive import MIN_SAMPLES, margin, uncertain_units, violated_margin, watched_tensors
from lindep_onnx.calibration.measure import Draw, StatisticsAccumulator, measure
from lindep_onnx.calibration.range_probe import RangeProbe, RangeStats, WatchedTensor
from lindep_onnx.calibration.statistics import constant_features, statistics
from lindep_onnx.data.inputs import InputSpec
from lindep_onnx.data.samples import Batch, open_samples
from lindep_onnx.data.split import Part
from lindep_onnx.log import Log
from lindep_onnx.options import DataOptions
from lindep_onnx.runtime.backend import Runtime
from lindep_onnx.runtime.rows import RowSampler

NET = "h = Conv(x, w, b)\nr = Relu(h)\ny = Conv(r, v)"
RUNTIME = Runtime()


def net(bias: np.ndarray, w: np.ndarray | None = None):
    w = as_array("w", (8, 3, 1, 1)) if w is None else w
    return build(NET, {"w": w, "b": bias.astype(np.float32), "v": (4, 8, 1, 1)}, x=("N", 3, 16, 16))


def images(count: int, seed: int = 0, *, tails: float = 0.0) -> np.ndarray:
    """Gaussian images; with tails, the size of a whole image varies by as much, on a log scale."""
    rng = np.random.default_rng(seed)
    size = np.exp(tails * rng.normal(size=(count, 1, 1, 1)))
    return (rng.normal(size=(count, 3, 16, 16)) * size).astype(np.float32)


def seen(model, data: np.ndarray):
    channels = traced(model)
    specs = [InputSpec("x", np.dtype(np.float32), ("N", 3, 16, 16))]
    with open_samples({"x": data}, specs, DataOptions(batch_size=8)) as samples:
        sums = StatisticsAccumulator(channels)
        measure(samples, sums, Draw(0, len(samples.parts[Part.FIT])), RUNTIME, Log())
        found = sums.result()
        constant = [constant_features(consumer, found.fit, found.select or {}) for consumer in channels.consumers]
        watched = watched_tensors(channels, constant)
        watch = RangeProbe(channels, watched)
        sampler = RowSampler(channels.model, channels.shape_info, {}, RUNTIME, probe=watch)
        for batch in samples.batches(Part.FIT, Part.SELECT):
            watch.update(sampler.run(batch, np.random.default_rng(0)).probed, batch)
        ranges = watch.ranges()
        return statistics(channels, found), watched, [ranges[flat.key][1] for flat in watched]


def removed(model, data: np.ndarray, **options: object) -> int:
    report = compress(model, {"x": data}, **options).report
    return sum(group.removed for group in report.groups)


def test_a_channel_far_inside_the_flat_part_goes() -> None:
    assert removed(net(np.r_[-60.0, np.zeros(7)]), images(100)) == 1


def test_a_channel_near_the_end_of_the_flat_part_stays() -> None:
    # Silent on all samples, but not by much more than the largest value seen.
    w = as_array("w", (8, 3, 1, 1))
    top = np.einsum("i,nihw->nhw", w[0, :, 0, 0], images(100)).max()
    assert removed(net(np.r_[-1.05 * top, np.zeros(7)]), images(100)) == 0


def speaking_in(part: Part) -> np.ndarray:
    """Images of which one, in this part of the split, wakes channel 0 of the net at one position."""
    data = images(100)
    specs = [InputSpec("x", np.dtype(np.float32), ("N", 3, 16, 16))]
    with open_samples({"x": data}, specs, DataOptions(batch_size=8)) as samples:
        one = samples.parts[part][0]
    w = as_array("w", (8, 3, 1, 1))[0, :, 0, 0]
    data[one, :, 3, 5] = 100 * w / np.square(w).sum()
    return data


@pytest.mark.parametrize("part", [Part.FIT, Part.SELECT])
def test_a_channel_that_speaks_at_one_position_of_one_sample_stays(part: Part) -> None:
    model, data = net(np.r_[-60.0, np.zeros(7)]), speaking_in(part)
    # Few of the 256 positions are sampled: the moments alone see a constant.
    assert seen(model, data)[0].inactive[0]
    assert removed(model, data) == 0


def test_channels_that_woke_show_how_far_is_not_far_enough() -> None:
    w = np.tile(as_array("w", (1, 3, 1, 1)), (8, 1, 1, 1)).astype(np.float32)
    model = net(-np.geomspace(400, 25, 8), w)
    calm, wild = images(120), images(120, tails=1.5)
    (_, _, tame), (found, watched, ranges) = seen(model, calm), seen(model, wild)
    assert violated_margin(tame) == 0.0  # nothing woke
    assert violated_margin(ranges) > 0.0
    uncertain = uncertain_units(8, watched, ranges, 120)
    assert uncertain.tolist() == [False, False, False, True, True, False, False, False]  # the last three are awake
    assert found.inactive.tolist() == [True] * 5 + [False] * 3
    assert (removed(model, calm), removed(model, wild)) == (7, 3)


def test_what_unseen_samples_turn_down_is_taken_back() -> None:
    w = as_array("w", (8, 3, 1, 1))
    w[5] = 2 * w[4]  # what does not hang on silence still goes
    report = compress(net(np.r_[-60.0, np.zeros(7)], w), {"x": speaking_in(Part.VERIFY)}).report
    assert sum(group.removed for group in report.groups) == 1
    assert report.verification is not None and report.verification.passed
    assert any("turned down a removal of 2 channels" in note for note in report.notes)


@pytest.mark.parametrize("pieces", [1, 5])
def test_the_statistics_of_batches_add_up(pieces: int) -> None:
    rng = np.random.default_rng(1)
    low = rng.normal(size=(40, 6)) - 1.0
    high = low + rng.random((40, 6))
    flat = WatchedTensor("x", 1, ((-np.inf, 0.0), (2.0, np.inf)), np.arange(6), np.arange(6))
    parts = [
        RangeStats.of(flat, [{"low": a, "high": b, "sum": a + b, "square": a * a + b * b}], 2)
        for a, b in zip(np.array_split(low, pieces), np.array_split(high, pieces), strict=True)
    ]
    whole = parts[0]
    for part in parts[1:]:
        whole = whole.merge(part)
    inside = high <= 0
    distance = np.where(inside, -high, np.nan)
    margin = np.nanmin(distance, axis=0) / np.nanstd(distance, axis=0)
    np.testing.assert_array_equal(whole.margins[0].count, inside.sum(axis=0))
    np.testing.assert_allclose(whole.margins[0].margin, margin, rtol=1e-9)
    assert whole.samples == 40 and whole.rows == 80


def test_a_part_without_an_end_counts_nobody_and_warns_of_nothing() -> None:
    flat = WatchedTensor("x", 1, ((-np.inf, np.inf),), np.arange(2), np.arange(2))
    values = np.ones((3, 2))
    found = RangeStats.of(flat, [dict.fromkeys(("low", "high", "sum", "square"), values)], 1)
    assert found.margins[0].count.tolist() == [0, 0] and np.isinf(found.margins[0].margin).all()


def test_after_four_times_as_many_samples_half_the_margin_is_enough() -> None:
    flat = WatchedTensor("x", 1, ((-np.inf, 0.0),), np.arange(1), np.arange(1))

    def uncertain(samples: int, distance: float) -> bool:
        values = -distance + np.resize([-1.0, 1.0], (samples, 1))  # deviation 1, nearest to 0 by distance - 1
        seen = RangeStats.of(flat, [{"low": values, "high": values, "sum": values, "square": values**2}], 1)
        return bool(uncertain_units(1, [flat], [seen], samples)[0])

    assert margin(64) == 2 * margin(256) == 4.0
    assert (uncertain(64, 4.9), uncertain(64, 5.1)) == (True, False)
    assert (uncertain(256, 2.9), uncertain(256, 3.1)) == (True, False)
    assert uncertain(MIN_SAMPLES - 1, 1e6)


PADDED = "p = Pad(x, pads, zero)\n"


@pytest.mark.parametrize(
    ("body", "w", "channels", "apart"),
    [
        ("h = Conv<strides=[2, 2]>(x, w, b)\nr = Relu(h)\ny = Conv(r, v)", (16, 16, 3, 3), 16, True),
        ("h = Conv<group=16, pads=[1, 1, 1, 1]>(x, w, b)\nr = Relu(h)\ny = Conv(r, v)", (16, 1, 3, 3), 16, True),
        (PADDED + "h = Conv<group=16>(p, w, b)\nr = Relu(h)\ny = Conv(r, v)", (16, 1, 3, 3), 16, True),
        (PADDED + "h = Conv<dilations=[2, 2]>(p, w)\nr = Relu(h)\ny = Conv(r, v)", (16, 16, 3, 3), 16, True),
        ("k = Pad(x, wide)\nh = Conv<group=16>(k, w, b)\nr = Relu(h)\ny = Conv(r, v)", (16, 1, 3, 3), 14, False),
        ("k = Pad(x, wide)\nh = Conv(k, w, b)\nr = Relu(h)\ny = Conv(r, v)", (16, 16, 3, 3), 14, False),
        ("h = Conv<group=2>(x, w, b)\nr = Relu(h)\ny = Conv(r, v)", (16, 8, 3, 3), 16, False),
        ("g = Conv(x, w, b)\nh = Tanh(g)\nr = Relu(h)\ny = Conv(r, v)", (16, 16, 1, 1), 16, False),
    ],
)
def test_a_few_channels_are_measured_apart_as_they_are_in_the_whole(body, w, channels, apart) -> None:
    pads = np.array([0, 0, 1, 1, 0, 0, 1, 1])
    weights = {"w": w, "b": (16,), "v": (4, 16, 1, 1), "pads": pads, "zero": np.float32(0.5)}
    weights["wide"] = np.array([0, 1, 0, 0, 0, 1, 0, 0])
    used = {name: value for name, value in weights.items() if name in body}
    model = build(body, used, x=("N", channels, 9, 9), outputs="y h")
    data = np.random.default_rng(0).normal(size=(6, channels, 9, 9)).astype(np.float32)
    channels = traced(model)
    places = np.array([3, 11])
    flat = WatchedTensor("h", 1, ((-np.inf, 0.0),), places[:1], places[:1], np.isin(np.arange(16), places))
    watch = RangeProbe(channels, [flat])
    sampler = RowSampler(channels.model, channels.shape_info, {}, RUNTIME, probe=watch)
    batch = Batch({"x": data}, np.arange(5), 6)  # the last sample is filler
    watch.update(sampler.run(batch, np.random.default_rng(0)).probed, batch)
    _, found = watch.ranges()[flat.key]
    copy = type(model).FromString(model.SerializeToString())
    added = [node for node in watch.extend(copy)[0].get("h", ()) if node.op_type == "Gather"]
    assert bool(added) is not apart  # else this is no test of it
    whole = run(model, {"x": data})[1][:5].astype(np.float64)
    np.testing.assert_allclose(found.low[places], whole[:, places].min((0, 2, 3)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.high[places], whole[:, places].max((0, 2, 3)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.sum, whole[:, 3:4].sum((0, 2, 3)), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.square, np.square(whole[:, 3:4]).sum((0, 2, 3)), rtol=1e-4)
    assert found.rows == whole[:, 0].size and np.isinf(found.low[0])


def test_a_channel_whose_extremes_are_no_numbers_is_doubted() -> None:
    flat = WatchedTensor("x", 1, ((-np.inf, 0.0),), np.arange(1), np.arange(1))
    for value, doubted in ((np.nan, True), (np.inf, True), (-5.0, False)):
        values = np.full((64, 1), value)
        seen = RangeStats.of(flat, [dict.fromkeys(("low", "high", "sum", "square"), values)], 1)
        assert bool(uncertain_units(1, [flat], [seen], 64)[0]) is doubted


@pytest.mark.parametrize(("samples", "goes"), [(40, 0), (80, 1)])
def test_nothing_is_concluded_from_silence_in_a_few_samples(samples: int, goes: int) -> None:
    w = as_array("w", (8, 3, 1, 1))
    assert removed(net(np.r_[-60.0, np.zeros(7)], w), images(samples)[: samples * 9 // 10]) == goes


def test_channels_that_leave_a_rest_other_than_zero_together_once_are_no_multiples() -> None:
    # Behind the BatchNormalization rest is not zero: only what changes tells how often a channel spoke.
    rng = np.random.default_rng(3)
    w, x = rng.normal(size=(8, 3, 1, 1)), rng.normal(size=(60, 3, 1, 1)).astype(np.float32)
    w[1], b = 0.5 * w[0] + 1e-3, np.zeros(8)
    spoken = np.sort(np.einsum("i,nihw->n", w[0, :, 0, 0], x.astype(np.float64)))
    b[:2] = -(spoken[-1] + spoken[-2]) / 2 * np.array([1.0, 0.5])  # one sample wakes both
    weights = {
        "w": w.astype(np.float32), "b": b.astype(np.float32), "v": (4, 8, 1, 1), "c": (4,),
        "s": np.ones(8, np.float32), "o": np.full(8, 3, np.float32),
        "m": np.zeros(8, np.float32), "n": np.ones(8, np.float32),
    }  # fmt: skip
    net = "h = Conv(x, w, b)\nr = Relu(h)\nq = BatchNormalization(r, s, o, m, n)\ny = Conv(q, v, c)"
    assert removed(build(net, weights, x=("N", 3, 1, 1)), x) == 0


@pytest.mark.parametrize("seed", [0, 1])
def test_one_pass_concludes_what_two_would(seed: int) -> None:
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(24, 3, 1, 1)).astype(np.float32)
    data = images(160, seed, tails=1.5)
    model = build(
        NET, {"w": w, "b": -np.geomspace(3000, 0.1, 24).astype(np.float32), "v": (4, 24, 1, 1)}, x=("N", 3, 16, 16)
    )
    two, watched, ranges = seen(model, data)
    specs = [InputSpec("x", np.dtype(np.float32), ("N", 3, 16, 16))]
    with open_samples({"x": data}, specs, DataOptions(batch_size=8)) as samples:
        _, found, uncertain = collect_statistics(traced(model), samples, RUNTIME, Log(), seed=0)
    expected = uncertain_units(24, watched, ranges, two.samples)
    assert (found.inactive == two.inactive).all()
    assert (uncertain == expected)[found.inactive].all()
    assert 0 < expected[found.inactive].sum() <= found.inactive.sum() < 24
    for one, other in zip(found.consumers, two.consumers, strict=True):
        np.testing.assert_allclose(one.gram, other.gram, rtol=1e-12, atol=1e-12 * other.gram.max())


def test_several_readers_of_one_tensor_are_told_apart() -> None:
    w, b = as_array("w", (8, 3, 1, 1)), np.array([-60, -60, -60, 0, 0, 0, 0, 0], np.float32)
    body = "h = Conv(x, w, b)\nr = Relu(h)\np = MaxPool<kernel_shape=[2,2]>(r)\ny = Conv(p, v)\nz = Conv(r, u)"
    model = build(body, {"w": w, "b": b, "v": (4, 8, 1, 1), "u": (4, 8, 1, 1)}, x=("N", 3, 16, 16), outputs="y z")
    _, watched, ranges = seen(model, images(120))
    assert len({flat.key for flat in watched}) == len(watched) == len(ranges) >= 3
    assert {flat.tensor for flat in watched} >= {"h", "r"} and sum(flat.tensor == "r" for flat in watched) == 2
    assert removed(model, images(120)) == 3

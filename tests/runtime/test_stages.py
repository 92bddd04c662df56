"""A model run in stages computes what it computes at once."""

from __future__ import annotations

import numpy as np
import pytest
from build import build, feed, initializer, run, with_initializer

from lindep_onnx.data.samples import Batch
from lindep_onnx.model.ir import load
from lindep_onnx.model.shapes import resolve
from lindep_onnx.runtime.backend import Runtime
from lindep_onnx.runtime.rows import ChannelAxis, RowSampler, rows_at
from lindep_onnx.runtime.stages import Stages

RUNTIME = Runtime(threads=1)
BODY = """
a = Conv<pads=[1,1,1,1]>(x, w)
b = Relu(a)
s = Shape(b)
c = Conv<pads=[1,1,1,1]>(b, k)
d = Add(c, a)
e = Reshape(d, s)
f = Relu(e)
y = Conv(f, v)
"""
WEIGHTS = {"w": (6, 3, 3, 3), "k": (6, 6, 3, 3), "v": (2, 6, 1, 1)}


def batches(model, count: int = 3, filler: int = 0) -> list[Batch]:
    return [
        Batch(feed(model, samples=4 + filler, seed=number), np.arange(4) + 4 * number, 4 + filler)
        for number in range(count)
    ]


@pytest.mark.parametrize("memory", [1 << 30, 0], ids=["in memory", "in files"])
@pytest.mark.parametrize("stops", [[8], [1, 3, 4, 8], list(range(9))])
def test_stages_give_the_tensors_of_one_run(memory: int, stops: list[int]) -> None:
    model = build(BODY, WEIGHTS, outputs="y")
    loaded = load(model)
    data = batches(model)
    with Stages(loaded, resolve(loaded), data, RUNTIME, memory=memory) as stages:
        for stop in stops[:-1]:
            stages.run_to(stop)
        stages.run_to(7)
        got = [stages.tensor(number, "f") for number in range(len(data))]
    probe = build(BODY, WEIGHTS, outputs="f")
    for value, batch in zip(got, data, strict=True):
        np.testing.assert_allclose(value, run(probe, batch.feeds)[0], rtol=1e-5, atol=1e-6)


def test_only_what_is_still_read_is_kept_and_filler_is_left_out() -> None:
    model = build(BODY, WEIGHTS)
    loaded = load(model)
    with Stages(loaded, resolve(loaded), batches(model, filler=3), RUNTIME) as stages:
        stages.run_to(5)  # behind the Add
        assert stages.tensor(0, "a") is None
        assert stages.tensor(0, "d").shape == (4, 6, 8, 8)


def test_a_weight_that_changes_on_the_way_takes_effect_from_there_on() -> None:
    model = build(BODY, WEIGHTS)
    loaded = load(model)
    new = initializer(model, "k") * 2
    data = batches(model, 1)
    with Stages(loaded, resolve(loaded), data, RUNTIME) as stages:
        stages.run_to(3)
        stages.set_weight("k", new)
        stages.set_operand(loaded.nodes[3], 2, np.full(6, 3, np.float32))
        stages.run_to(7)
        got = stages.tensor(0, "f")
    changed = with_initializer(build(BODY.replace("c = Conv<pads=[1,1,1,1]>(b, k)", "c0 = Conv<pads=[1,1,1,1]>(b, k)\nc = Add(c0, q)"), {**WEIGHTS, "q": np.float32(3)}, outputs="f"), "k", new)  # fmt: skip
    (want,) = run(changed, data[0].feeds)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    (untouched,) = run(build(BODY, WEIGHTS, outputs="f"), data[0].feeds)
    assert not np.allclose(got, untouched, rtol=1e-2)


# ---- rows ---------------------------------------------------------------------------------------------------------


def sampled(model, place: ChannelAxis, most: int, filler: int = 0):
    loaded = load(model)
    sampler = RowSampler(loaded, resolve(loaded), {place: most}, RUNTIME)
    data = batches(model, 1, filler)[0]
    return sampler.run(data, np.random.default_rng(3)).rows[place], data


@pytest.mark.parametrize("x", [("N", 3, 8, 8), ("N", 3, "h", "w")], ids=["inside the graph", "whole tensors"])
def test_rows_are_those_of_the_tensor_at_the_positions(x: tuple) -> None:
    model = build("a = Conv(x, w)\ny = Relu(a)", {"w": (5, 3, 1, 1)}, x=x)
    data = Batch({"x": np.random.default_rng(0).normal(size=(6, 3, 8, 8)).astype(np.float32)}, np.arange(4), 6)
    loaded = load(model)
    place = ChannelAxis("a", 1, (2, 1))
    rows = RowSampler(loaded, resolve(loaded), {place: 7}, RUNTIME).run(data, np.random.default_rng(1)).rows[place]
    (whole,) = run(build("a = Conv(x, w)\ny = Relu(a)", {"w": (5, 3, 1, 1)}, x=x, outputs="a"), data.feeds)
    assert rows.values.shape == (4, 7, 5)
    assert len(set(rows.positions.tolist())) == 7
    assert all((position // 8) % 2 == 0 for position in rows.positions)
    want = whole[:4].reshape(4, 5, 64)[:, :, rows.positions].transpose(0, 2, 1)
    np.testing.assert_allclose(rows.values, want, rtol=1e-5, atol=1e-6)


def test_rows_of_a_last_axis() -> None:
    model = build("a = MatMul(x, w)\ny = Relu(a)", {"w": (6, 5)}, x=("N", 9, 6))
    rows, data = sampled(model, ChannelAxis("a", 2), 4)
    (whole,) = run(build("a = MatMul(x, w)\ny = Relu(a)", {"w": (6, 5)}, x=("N", 9, 6), outputs="a"), data.feeds)
    np.testing.assert_allclose(rows.values, whole[:, rows.positions], rtol=1e-5, atol=1e-6)


def test_all_positions_are_rows_in_order() -> None:
    value = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    np.testing.assert_array_equal(rows_at(value, 1, np.arange(4)), value.transpose(0, 2, 1))
    np.testing.assert_array_equal(rows_at(value, 1, np.array([2, 0])), value.transpose(0, 2, 1)[:, [2, 0]])


def test_a_tensor_without_a_sample_axis_is_one_sample() -> None:
    model = build("a = ReduceMean<axes=[0], keepdims=0>(x)\nb = Conv(x, w)\ny = Add(b, a)", {"w": (3, 3, 1, 1)})
    rows, _ = sampled(model, ChannelAxis("a", 0), 100)
    assert rows.values.shape == (1, 64, 3)


def test_positions_are_the_same_for_the_same_seed() -> None:
    model = build("a = Conv(x, w)\ny = Relu(a)", {"w": (5, 3, 1, 1)})
    first, second = (sampled(model, ChannelAxis("a", 1), 5)[0] for _ in range(2))
    np.testing.assert_array_equal(first.positions, second.positions)

"""Grouped convolutions, shuffles and heads: as many channels go from each group, whichever they are."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from build import as_array, build, feed, initializer, run, traced
from free_widths import compress

from lindep_onnx.structure.placement import Placement, equalized

SHUFFLED = """
    a = Conv<group=2, pads=[1,1,1,1]>(x, w1, b1)
    h = Relu(a)
    p = Reshape(h, apart)
    t = Transpose<perm=[0,2,1,3,4]>(p)
    s = Reshape(t, together)
    d = Conv<group=16, pads=[1,1,1,1]>(s, w2, b2)
    c = Conv<group=2>(d, w3, b3)
    r = Relu(c)
    y = Conv(r, w4)
"""
SHAPES = {"w1": (16, 2, 3, 3), "b1": (16,), "w2": (16, 1, 3, 3), "b2": (16,), "w3": (12, 8, 1, 1), "b3": (12,)}
TARGETS = {
    "apart": np.array([0, 2, 8, 8, 8]),
    "together": np.array([0, 16, 8, 8]),
}


def net(copies: dict[int, int]) -> onnx.ModelProto:
    """conv in two groups, shuffle, depthwise, conv in two groups; output channel k of the first is twice channel v."""
    weights = {name: as_array(name, shape) for name, shape in SHAPES.items()}
    weights["w1"], weights["b1"] = weights["w1"], np.abs(weights["b1"])
    place = {channel: channel % 8 * 2 + channel // 8 for channel in range(16)}  # behind the shuffle
    for copy, source in copies.items():
        for name in ("w1", "b1"):
            weights[name][copy] = 2 * weights[name][source]
        weights["w2"][place[copy]] = weights["w2"][place[source]]
        weights["b2"][place[copy]] = 2 * weights["b2"][place[source]]
    return build(SHUFFLED, {**weights, "w4": (4, 12, 1, 1), **TARGETS}, x=("N", 4, 8, 8))


# Channels 0 to 3 and 8 to 11 are read by the first group of the second convolution, the others by the second.
@pytest.mark.parametrize(
    ("copies", "width"),
    [
        ({1: 0, 9: 8, 5: 4, 13: 12}, 12),  # at the same place of each group
        ({1: 0, 11: 9, 6: 4, 12: 15}, 12),  # anywhere
        ({1: 0, 2: 0, 9: 8, 5: 4, 13: 12}, 12),  # one group has one more to give
        ({1: 0, 2: 0, 3: 0}, 16),  # one group alone has any
    ],
)
def test_what_every_group_can_spare_goes(copies: dict[int, int], width: int) -> None:
    model = net(copies)
    calib = {"x": np.random.default_rng(0).normal(size=(64, 4, 8, 8)).astype(np.float32)}
    smaller = compress(model, calib).model
    assert initializer(smaller, "w1").shape == (width, 2, 3, 3)
    assert initializer(smaller, "w2").shape == (width, 1, 3, 3)
    assert initializer(smaller, "w3").shape == (12, width // 2, 1, 1)
    data = feed(model, 5, seed=3)
    np.testing.assert_allclose(run(smaller, data)[0], run(model, data)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("copies", "width"), [({1: 0, 7: 5}, 6), ({1: 0, 2: 0, 7: 5}, 6), ({1: 0}, 8)])
def test_the_weights_alone_prove_it_group_by_group(copies: dict[int, int], width: int) -> None:
    w = as_array("w", (8, 12, 1, 1))
    for copy, source in copies.items():
        w[copy] = 3 * w[source]
    model = build(
        "h = Conv(x, w)\ng = Conv<group=2>(h, k)\ny = Conv(g, v)",
        {"w": w, "k": (8, 4, 1, 1), "v": (4, 8, 1, 1)},
        x=("N", 12, 4, 4),
    )
    smaller = compress(model, proven_only=True).model
    assert initializer(smaller, "w").shape[0] == width
    data = feed(model)
    np.testing.assert_allclose(run(smaller, data)[0], run(model, data)[0], rtol=1e-4, atol=1e-4)


def test_a_budget_is_met_with_equal_groups_and_refitted_targets_follow_their_channels() -> None:
    model = net({1: 0, 11: 9, 6: 4, 12: 15})
    calib = {"x": np.random.default_rng(0).normal(size=(200, 4, 8, 8)).astype(np.float32)}
    result = compress(model, calib, channels=0.85)
    assert result.report.verification is not None
    # Were targets mixed up between the channels that changed places, the error would be about 1.
    assert result.report.verification.relative_error < 0.5
    onnx.checker.check_model(result.model, full_check=True)


def test_an_unbalanced_removal_is_reduced_to_what_all_groups_can_give() -> None:
    channels = traced(net({}))
    removed = np.zeros(channels.units, dtype=bool)
    first = channels.unit[next(consumer for consumer in channels.consumers if consumer.weight == "w3").columns]
    removed[first[:3]] = True
    assert not equalized(channels, removed).any()
    with pytest.raises(ValueError, match="equal counts"):
        Placement(channels, removed)


def test_what_is_put_back_went_last() -> None:
    channels = traced(
        build(
            "h = Conv(x, w)\ng = Conv<group=2>(h, k)\ny = Conv(g, v)",
            {"w": (8, 3, 1, 1), "k": (8, 4, 1, 1), "v": (4, 8, 1, 1)},
        )
    )
    removed = np.zeros(channels.units, dtype=bool)
    order = np.array([2, 6, 0, 1])
    removed[order] = True
    assert set(np.flatnonzero(equalized(channels, removed, order))) == {2, 6}


def test_channels_of_different_groups_never_trade_places() -> None:
    channels = traced(net({}))
    consumers = [consumer for consumer in channels.consumers if consumer.weight == "w3"]
    interchangeable_sets = [set(channels.interchangeable[channels.unit[consumer.columns]]) for consumer in consumers]
    assert len(interchangeable_sets) == 2 and not interchangeable_sets[0] & interchangeable_sets[1]

"""Copies that the weights show are found behind whatever treats all channels alike, with data and without."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from build import as_array, build, run

from lindep_onnx.api import compress

COPIES, HIDDEN = 4, 12


def planted(name: str, *shape: int, axis: int) -> np.ndarray:
    """A weight whose last few channels are copies of its first ones."""
    whole = as_array(name, shape)
    order = [*range(shape[axis] - COPIES), *range(COPIES)]
    return whole.take(order, axis)


SEQUENCE = "m = MatMul(x, w)\na = Add(m, b)\nh = Relu(a)\n"
IMAGE = "a = Conv<pads=[1,1,1,1]>(x, w, b)\nh = Relu(a)\n"
PICKED = np.array([2, 0, 4])


#: What lies between the channels and the product that reads them: of positions along axis 1, or of images.
ALONG_POSITIONS = {
    "Gather": ("t = Gather<axis=1>(h, i)", {"i": PICKED}),
    "Gather of one": ("t = Gather<axis=1>(h, i)", {"i": np.array(3)}),
    "Slice": ("t = Slice(h, s, e, p)", {"s": np.array([1]), "e": np.array([4]), "p": np.array([1])}),
    "Pad": ("t = Pad(h, i)", {"i": np.array([0, 1, 0, 0, 2, 0])}),
    "ReduceMean": ("t = ReduceMean<axes=[1]>(h)", {}),
    "ReduceMax without keepdims": ("t = ReduceMax<axes=[1], keepdims=0>(h)", {}),
    "Reshape of positions": ("t = Reshape(h, i)", {"i": np.array([-1, 12])}),
    "Unsqueeze": ("u = Unsqueeze(h, i)\nt = Squeeze(u, i)", {"i": np.array([2])}),
    "Tile": ("t = Tile(h, i)", {"i": np.array([1, 2, 1])}),
    "Erf": ("t = Erf(h)", {}),
    "Elu and Exp": ("u = Elu(a)\nt = Exp(u)", {}),
    "Gelu in pieces": ("u = Erf(a)\nv2 = Add(u, o)\nt = Mul(a, v2)", {"o": np.float32(1)}),
}


@pytest.mark.parametrize("name", ALONG_POSITIONS)
def test_copies_stay_copies_behind_what_moves_positions(name: str) -> None:
    middle, extra = ALONG_POSITIONS[name]
    weights = {"w": planted("w", 6, HIDDEN, axis=1), "b": planted("b", HIDDEN, axis=0), "v": (HIDDEN, 3), **extra}
    model = build(SEQUENCE + middle + "\ny = MatMul(t, v)", weights, x=("N", 5, 6))
    check(model, (9, 5, 6))


@pytest.mark.parametrize(
    ("middle", "extra"),
    [
        ("t = Resize(h, , s)", {"s": np.array([1, 1, 2, 2], np.float32)}),
        ('t = Resize<mode="linear">(h, , s)', {"s": np.array([1, 1, 2, 2], np.float32)}),
        ("u = Reshape(h, i)\nt = Reshape(u, j)", {"i": np.array([0, 12, 64]), "j": np.array([0, 12, 4, 16])}),
        ("t = ReduceMean<axes=[2,3]>(h)", {}),
    ],
)
def test_copies_stay_copies_in_images(middle: str, extra: dict) -> None:
    weights = {"w": planted("w", HIDDEN, 3, 3, 3, axis=0), "b": planted("b", HIDDEN, axis=0), "v": (4, HIDDEN, 1, 1)}
    check(build(IMAGE + middle + "\ny = Conv(t, v)", {**weights, **extra}), (9, 3, 8, 8))


def check(model: onnx.ModelProto, size: tuple[int, ...]) -> None:
    result = compress(model, proven_only=True, round_to=1)
    assert [group.removed for group in result.report.groups] == [COPIES]
    x = np.random.default_rng(1).normal(size=size).astype(np.float32)
    np.testing.assert_allclose(*(run(one, {"x": x})[0] for one in (model, result.model)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "middle",
    [
        "t = Gather<axis=1>(h, i)",  # channels are put where others were: of the copies some are picked twice
        "s = Softmax<axis=1>(h)\nt = Gather<axis=1>(s, i)",
    ],
)
def test_what_treats_channels_differently_proves_nothing_wrong(middle: str) -> None:
    order = np.array([3, 1, 2, 0, 5, 4, 7, 6, 8, 9, 10, 11])
    weights = {"w": planted("w", HIDDEN, 3, 3, 3, axis=0), "b": planted("b", HIDDEN, axis=0), "v": (4, HIDDEN, 1, 1)}
    model = build(IMAGE + middle + "\ny = Conv(t, v)", {**weights, "i": order})
    result = compress(model, proven_only=True, round_to=1)
    x = np.random.default_rng(1).normal(size=(9, 3, 8, 8)).astype(np.float32)
    np.testing.assert_allclose(*(run(one, {"x": x})[0] for one in (model, result.model)), rtol=1e-4, atol=1e-5)


def test_copies_that_one_weight_reads_in_two_places_are_proven() -> None:
    body = "m = MatMul(x, w)\nh = Relu(m)\np = MatMul(h, v)\nn = Tanh(p)\nq = MatMul(n, u)\ns = Relu(q)\nr = MatMul(s, v)\ny = Add(p, r)"
    weights = {"w": planted("w", 6, HIDDEN, axis=1), "u": planted("u", 5, HIDDEN, axis=1), "v": (HIDDEN, 5)}
    model = build(body, weights, x=("N", 6))
    check(model, (9, 6))
    weights["u"][:, -1] *= 2  # one of the copies is twice as large for the second reader only
    result = compress(build(body, weights, x=("N", 6)), proven_only=True, round_to=1)
    assert [group.removed for group in result.report.groups] == [COPIES - 1]


@pytest.mark.parametrize("samples", [4, 12, 40, 400])
@pytest.mark.parametrize("seed", range(3))
def test_lossless_removes_all_that_the_weights_prove_whatever_the_data(samples: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    w, u = planted("w", 6, HIDDEN, axis=1), rng.normal(size=(HIDDEN, 16)).astype(np.float32)
    u[:, -3:] = u[:, :3] @ rng.normal(size=(3, 3)).astype(np.float32) / 4  # combinations, in front of no activation
    u[:, 4:6] = 2 * u[:, 2:4]
    body = "m = MatMul(x, w)\nh = Relu(m)\np = MatMul(h, u)\nq = MatMul(p, v)\ny = Tanh(q)"
    model = build(body, {"w": w, "u": u, "v": (16, 5)}, x=("N", 6))
    x = rng.normal(size=(samples, 6)).astype(np.float32)
    proven, lossless = compress(model, proven_only=True, round_to=1), compress(model, x, round_to=1)
    counts = [[group.removed for group in result.report.groups] for result in (proven, lossless)]
    assert sum(counts[0]) >= COPIES + 4 and all(less <= more for less, more in zip(*counts, strict=True))
    # On inputs of another kind too: what is proven does not depend on the data.
    far = 9 * rng.normal(size=(64, 6)).astype(np.float32)
    np.testing.assert_allclose(*(run(one, {"x": far})[0] for one in (proven.model, model)), atol=1e-4)

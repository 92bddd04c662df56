"""Refits against explicit least squares, and what they buy."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from build import as_array, build, initializer, run, traced

from lindep_onnx.data.inputs import InputSpec
from lindep_onnx.data.samples import Samples, open_samples
from lindep_onnx.data.split import Part
from lindep_onnx.linalg.least_squares import Rows, Weights, fitted
from lindep_onnx.log import Log
from lindep_onnx.model.edit import apply_edits
from lindep_onnx.options import DataOptions
from lindep_onnx.refit.patches import matrix_of, patches_of, weight_of
from lindep_onnx.refit.sequential import Cut, Refitted, refit
from lindep_onnx.refit.targets import WIDEST
from lindep_onnx.runtime.backend import Runtime
from lindep_onnx.structure.placement import Placement
from lindep_onnx.structure.rewrite import Removal, rewrite

RUNTIME = Runtime(threads=1)


def samples(shape: tuple[int, ...], count: int = 60, seed: int = 0) -> Samples:
    x = np.random.default_rng(seed).normal(size=(count, *shape)).astype(np.float32)
    spec = InputSpec("x", np.dtype(np.float32), ("N", *shape))
    return open_samples({"x": x}, [spec], DataOptions(batch_size=16))


def refitted(
    model: onnx.ModelProto, removed: list[int], mode: str = "sequential"
) -> tuple[onnx.ModelProto, onnx.ModelProto, Refitted]:
    """The model without some units: cut only, and refitted."""
    channels = traced(model)
    gone = np.zeros(channels.units, dtype=bool)
    gone[removed] = True
    cut = rewrite(channels, Removal(gone), "")
    shape = tuple(d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim[1:])
    with samples(shape) as data:
        found = refit(
            Cut(channels, Placement(channels, gone), traced(cut.proto)), data, RUNTIME, Log(), mode=mode, seed=0
        )
    result = apply_edits(cut, found.edits, "").proto
    onnx.checker.check_model(result, full_check=True)
    return cut.proto, result, found


def error(model: onnx.ModelProto, other: onnx.ModelProto) -> float:
    """Relative error on fresh inputs, the worst output."""
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim[1:]]
    feeds = {"x": np.random.default_rng(99).normal(size=(40, *shape)).astype(np.float32)}
    pairs = zip(run(model, feeds), run(other, feeds), strict=True)
    return max(float(np.linalg.norm(a - b) / np.linalg.norm(a - a.mean())) for a, b in pairs)


# ---- patches ------------------------------------------------------------------------------------------------------

WINDOWS = [
    ("1-D", "y = Conv<strides=[2], pads=[1,2]>(x, w, b)", {"w": (6, 4, 3), "b": (6,)}, (4, 11)),
    ("2-D", "y = Conv<pads=[1,1,1,1]>(x, w, b)", {"w": (6, 4, 3, 3), "b": (6,)}, (4, 5, 6)),
    ("strides and dilations", "y = Conv<strides=[2,1], dilations=[1,2], pads=[2,0,1,3]>(x, w)", {"w": (6, 4, 3, 2)}, (4, 7, 8)),
    ("same, upper", 'y = Conv<auto_pad="SAME_UPPER", strides=[2,2]>(x, w)', {"w": (6, 4, 3, 3)}, (4, 7, 6)),
    ("3-D", "y = Conv(x, w)", {"w": (6, 4, 2, 2, 2)}, (4, 3, 4, 3)),
    ("groups", "y = Conv<group=2, pads=[1,1,1,1]>(x, w)", {"w": (6, 2, 3, 3)}, (4, 5, 5)),
    ("depthwise", "y = Conv<group=4, pads=[1,1,1,1]>(x, w, b)", {"w": (8, 1, 3, 3), "b": (8,)}, (4, 5, 5)),
    ("transposed", "y = ConvTranspose<strides=[2,2], pads=[1,0,0,1]>(x, w, b)", {"w": (4, 6, 3, 3), "b": (6,)}, (4, 4, 5)),
    ("transposed, groups and dilations", "y = ConvTranspose<group=2, strides=[2,1], dilations=[1,2]>(x, w)", {"w": (4, 3, 2, 3)}, (4, 4, 5)),
    ("Gemm", "y = Gemm<alpha=0.5, transB=1>(x, w)", {"w": (6, 4)}, (4,)),
    ("MatMul", "y = MatMul(x, w)", {"w": (4, 6)}, (5, 4)),
    ("MatMul from the left", "y = MatMul(w, x)", {"w": (6, 4)}, (4, 5)),
]  # fmt: skip


@pytest.mark.parametrize("case", WINDOWS, ids=lambda case: case[0])
def test_patches_times_the_matrix_are_the_output_of_the_node(case: tuple) -> None:
    _, body, weights, shape = case
    model = build(body, weights, x=("N", *shape))
    channels = traced(model)
    (product,) = channels.products
    x = np.random.default_rng(0).normal(size=(3, *shape)).astype(np.float32)
    (y,) = run(model, {"x": x})
    rows = np.moveaxis(y, product.reader.output_axis, -1)
    positions = np.random.default_rng(1).permutation(rows[0].size // rows.shape[-1])[:7]
    patches = patches_of(x, product, positions)
    matrix = matrix_of(initializer(model, product.weight), product)
    got = np.concatenate(np.matmul(patches, matrix.astype(np.float32)), axis=1)
    want = rows.reshape(3, -1, rows.shape[-1])[:, positions].reshape(got.shape)
    if "b" in weights:
        want = want - initializer(model, "b")
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    back = weight_of(matrix, product, initializer(model, product.weight))
    np.testing.assert_allclose(back, initializer(model, product.weight), rtol=1e-6)


# ---- the solution -------------------------------------------------------------------------------------------------

CHAIN = "h = Conv<pads=[1,1,1,1]>(x, w, b)\nr = Relu(h)\ny = Conv<pads=[1,1,1,1]>(r, v, c)"
CHAIN_WEIGHTS = {"w": (8, 3, 3, 3), "b": (8,), "v": (5, 8, 3, 3), "c": (5,)}


def test_the_refit_of_one_layer_is_the_least_squares_solution() -> None:
    model = build(CHAIN, CHAIN_WEIGHTS, x=("N", 3, 6, 6))
    cut, result, found = refitted(model, [1, 4])
    inner, kept = build(CHAIN, CHAIN_WEIGHTS, x=("N", 3, 6, 6), outputs="r"), [0, 2, 3, 5, 6, 7]
    rows = {}
    with samples((3, 6, 6)) as data:
        for part in (Part.FIT, Part.SELECT):
            x = np.concatenate([batch.feeds["x"] for batch in data.batches(part)])
            padded = np.pad(run(inner, {"x": x})[0][:, kept], ((0, 0), (0, 0), (1, 1), (1, 1)))
            patches = np.stack([padded[:, :, i : i + 6, j : j + 6] for i in range(3) for j in range(3)], axis=2)
            target = run(model, {"x": x})[0].transpose(0, 2, 3, 1).reshape(1, -1, 5)
            rows[part] = Rows(patches.transpose(0, 3, 4, 1, 2).reshape(1, -1, 54), target.astype(np.float64))
    prior = Weights(initializer(cut, "v").reshape(1, 5, 54).transpose(0, 2, 1), initializer(model, "c")[None, None])
    want, before, after = fitted(rows[Part.FIT], rows[Part.SELECT], prior, free=True)
    np.testing.assert_allclose(initializer(result, "v"), want.matrix[0].T.reshape(5, 6, 3, 3), rtol=1e-4, atol=1e-5)
    bias = next(node for node in result.graph.node if node.output[0] == "y").input[2]
    np.testing.assert_allclose(initializer(result, bias), want.constant.ravel(), rtol=1e-4, atol=1e-5)
    energy = np.square(rows[Part.SELECT].target - rows[Part.SELECT].target.mean((0, 1))).sum()
    np.testing.assert_allclose(found.errors["y"], np.sqrt(np.divide([before, after], energy)), rtol=1e-4)
    assert not np.allclose(initializer(cut, "v"), initializer(result, "v"), rtol=1e-2)  # the refit did something


BATCH = {"s": (6,), "t": (6,), "m": (6,), "q": np.linspace(0.5, 2, 6, dtype=np.float32)}
DEEP = [
    ("chain", CHAIN + "\n", CHAIN_WEIGHTS, (3, 6, 6)),
    ("unfused normalization", "h = Conv(x, w)\nr = Relu(h)\na = Conv(r, k)\nn = BatchNormalization(a, s, t, m, q)\nb = Relu(n)\ny = Conv(b, v)",
     {"w": (8, 3, 3, 3), "k": (6, 8, 1, 1), "v": (4, 6, 1, 1), **BATCH}, (3, 6, 6)),
    ("residual", "h = Conv<pads=[1,1,1,1]>(x, w)\nr = Relu(h)\na = Conv<pads=[1,1,1,1]>(r, k)\nb = Relu(a)\nc = Conv<pads=[1,1,1,1]>(b, l)\nd = Add(c, r)\ne = Relu(d)\ny = Conv(e, v)",
     {"w": (8, 3, 3, 3), "k": (8, 8, 3, 3), "l": (8, 8, 3, 3), "v": (4, 8, 1, 1)}, (3, 6, 6)),
    ("depthwise", "h = Conv(x, w)\nr = Relu(h)\nd = Conv<group=8, pads=[1,1,1,1]>(r, k, b)\ne = Clip(d, lo, hi)\ny = Conv(e, v)",
     {"w": (8, 3, 3, 3), "k": (8, 1, 3, 3), "b": (8,), "v": (4, 8, 1, 1), "lo": np.float32(0), "hi": np.float32(6)}, (3, 6, 6)),
    ("Gemm", "h = Gemm<alpha=0.5, beta=2.0>(x, w, b)\nr = Relu(h)\ny = Gemm<transB=1>(r, v, c)", {"w": (6, 12), "b": (12,), "v": (5, 12), "c": (5,)}, (6,)),
    ("MatMul", "h = MatMul(x, w)\na = Add(h, b)\nr = Relu(a)\nc = MatMul(r, v)\ny = Add(c, e)", {"w": (6, 12), "b": (12,), "v": (12, 5), "e": (5,)}, (4, 6)),
    ("MatMul without a bias", "h = MatMul(x, w)\nr = Relu(h)\ny = MatMul(r, v)", {"w": (6, 12), "v": (12, 5)}, (4, 6)),
    ("Flatten", "h = Conv(x, w)\nr = Relu(h)\nf = Flatten(r)\ny = Gemm(f, v, c)", {"w": (8, 3, 3, 3), "v": (128, 5), "c": (5,)}, (3, 6, 6)),
    ("ConvTranspose", "h = Conv(x, w)\nr = Relu(h)\ny = ConvTranspose<strides=[2,2]>(r, v, c)", {"w": (8, 3, 3, 3), "v": (8, 4, 2, 2), "c": (4,)}, (3, 6, 6)),
]  # fmt: skip


@pytest.mark.parametrize("mode", ["kernel", "sequential"])
@pytest.mark.parametrize("case", DEEP, ids=lambda case: case[0])
def test_a_refit_comes_closer_to_the_original_on_unseen_data(case: tuple, mode: str) -> None:
    _, body, weights, shape = case
    model = build(body, weights, x=("N", *shape))
    cut, result, found = refitted(model, [0, 3], mode)
    assert found.errors
    assert error(model, result) < 0.95 * error(model, cut)
    assert error(model, cut) > 1e-2  # the negative control: the removal did cost something


def test_sequential_beats_layer_by_layer_where_errors_add_up() -> None:
    body, weights, shape = DEEP[2][1:]
    model = build(body, weights, x=("N", *shape))
    errors = {mode: error(model, refitted(model, [0, 3, 9, 12], mode)[1]) for mode in ("kernel", "sequential")}
    assert errors["sequential"] < errors["kernel"]


def test_removing_a_copy_is_exact_after_a_refit_too() -> None:
    w, b, v = as_array("w", (8, 3, 3, 3)), as_array("b", (8,)), as_array("v", (5, 8, 3, 3))
    w[5], b[5] = 2 * w[2], 2 * b[2]
    model = build(CHAIN, {"w": w, "b": b, "v": v, "c": (5,)}, x=("N", 3, 6, 6))
    cut, result, _ = refitted(model, [5])
    assert error(model, result) < 1e-4 < error(model, cut)


def test_nothing_removed_is_nothing_refitted() -> None:
    model = build(CHAIN, CHAIN_WEIGHTS, x=("N", 3, 6, 6))
    _, result, found = refitted(model, [])
    assert not found.errors and error(model, result) == 0.0


def test_a_problem_that_is_too_wide_keeps_its_fold_and_is_named() -> None:
    model = build(
        "h = Gemm(x, w)\nr = Relu(h)\ny = Gemm(r, v)", {"w": (3, WIDEST + 2), "v": (WIDEST + 2, 2)}, x=("N", 3)
    )
    cut, result, found = refitted(model, [1])
    assert found.skipped == ("y",)
    assert error(cut, result) == 0.0


def test_two_refits_give_the_same_bytes() -> None:
    model = build(CHAIN, CHAIN_WEIGHTS, x=("N", 3, 6, 6))
    first, second = (refitted(model, [1, 4])[1].SerializeToString(deterministic=True) for _ in range(2))
    assert first == second


def test_a_sum_is_the_target_as_it_is_added_not_as_later_nodes_scale_it() -> None:
    """A pre-activation block: what is behind the Add scales both of its operands."""
    body = """
a = Conv<pads=[1,1,1,1]>(x, w0, b0)
r = Relu(a)
c = Conv<pads=[1,1,1,1]>(r, w1, b1)
s = Relu(c)
d = Conv(s, w2, b2)
e = Add(d, r)
n = BatchNormalization(e, scale, shift, mean, variance)
q = Relu(n)
g = GlobalAveragePool(q)
h = Flatten(g)
y = Gemm(h, w3)
"""
    weights = {
        "w0": (8, 3, 3, 3), "b0": (8,), "w1": (16, 8, 3, 3), "b1": (16,), "w2": (8, 16, 1, 1), "b2": (8,),
        "scale": np.linspace(3, 5, 8, dtype=np.float32), "shift": np.linspace(-1, 1, 8, dtype=np.float32),
        "mean": np.zeros(8, np.float32), "variance": np.ones(8, np.float32), "w3": (8, 4),
    }  # fmt: skip
    model = build(body, weights, x=("N", 3, 6, 6))
    inner = traced(model)
    (units,) = [group.units for group in inner.groups if len(group.units) == 16]
    cut, whole, found = refitted(model, units[:6].tolist())
    before, after = found.errors["d"]
    assert after < before
    assert error(whole, model) < 0.7 * error(cut, model)
    assert error(whole, model) < 0.95 * error(refitted(model, units[:6].tolist(), "kernel")[1], model)

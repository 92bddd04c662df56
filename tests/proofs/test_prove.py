"""What the weights alone prove: found wherever it is planted, and true for every input that is tried."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from bench_trust import TOLERANCE, proven_in, worst_error
from build import as_array, build, run, traced
from free_widths import compress

import lindep_onnx
from lindep_onnx.proofs.bounds import BoundsContext
from lindep_onnx.proofs.prove import prove
from lindep_onnx.proofs.rules import output_bounds


def shrunk(model: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    found = compress(model, proven_only=True)
    onnx.checker.check_model(found.model, full_check=True)
    return found.model, sum(group.channels_before - group.channels_after for group in found.report.groups)


def worst(model: onnx.ModelProto, other: onnx.ModelProto, shape: tuple[int, ...]) -> float:
    """Largest relative error over inputs of all sizes, corners of boxes and spikes among them."""
    rng = np.random.default_rng(3)
    inputs = [rng.normal(size=(4, *shape)) * size for size in (1e-3, 1, 1e3)]
    inputs += [np.sign(rng.normal(size=(4, *shape))) * size for size in (0.1, 50)]
    spike = np.zeros((2, *shape))
    spike.reshape(2, -1)[:, ::7] = 1e4
    errors = []
    for x in [*inputs, spike, -spike]:
        (one,), (two,) = run(model, {"x": x.astype(np.float32)}), run(other, {"x": x.astype(np.float32)})
        errors.append(np.abs(one - two).max() / (np.abs(one).max() + 1e-30))
    return float(max(errors))


BN = {"s": (8,), "t": (8,), "m": (8,), "q": np.linspace(0.5, 2, 8, dtype=np.float32)}
NETS = {
    "relu": ("h = Conv<pads=[1,1,1,1]>(x, w, b)\nr = Relu(h)\ny = Conv<pads=[1,1,1,1]>(r, v)", {}),
    "leaky": ("h = Conv(x, w, b)\nr = LeakyRelu(h)\np = MaxPool<kernel_shape=[2,2]>(r)\ny = Conv(p, v)", {}),
    "clip": ("h = Conv(x, w, b)\nr = Clip(h, lo, hi)\ny = Conv(r, v)", {"lo": np.float32(0), "hi": np.float32(6)}),
    "depthwise": ("h = Conv(x, w, b)\nr = Relu(h)\nd = Conv<group=8, pads=[1,1,1,1]>(r, k)\ny = Conv(d, v)", {"k": np.ones((8, 1, 3, 3), np.float32)}),
    "flatten": ("h = Conv(x, w, b)\nr = Relu(h)\nf = Flatten(r)\ny = Gemm(f, g)", {"g": (128, 5)}),
    "average": ("h = Conv(x, w, b)\nr = Relu(h)\np = GlobalAveragePool(r)\ny = Conv(p, v1)", {"v1": (4, 8, 1, 1)}),
}  # fmt: skip


def weights(extra: dict) -> dict:
    return {"w": as_array("w", (8, 3, 3, 3)), "b": as_array("b", (8,)), "v": (4, 8, 3, 3), **extra}


@pytest.mark.parametrize("name", NETS)
def test_planted_proofs_are_found_and_hold_for_every_input(name: str) -> None:
    body, extra = NETS[name]
    given = weights(extra)
    given["w"][1], given["b"][1] = given["w"][6], given["b"][6]  # a copy
    given["w"][3], given["b"][3] = 0, -1 if name != "leaky" else 0  # dead, whatever comes
    planted = 2
    if name != "clip":  # a multiple of another, where the activation keeps it one
        given["w"][5], given["b"][5] = 2 * given["w"][2], 2 * given["b"][2]
        planted = 3
    model = build(body, given, x=("N", 3, 6, 6))
    smaller, removed = shrunk(model)
    assert removed == planted
    assert worst(model, smaller, (3, 6, 6)) < 2e-6


@pytest.mark.parametrize("name", NETS)
def test_nothing_is_proven_of_ordinary_weights(name: str) -> None:
    body, extra = NETS[name]
    assert shrunk(build(body, weights(extra), x=("N", 3, 6, 6)))[1] == 0


def test_a_multiple_ahead_of_a_clip_proves_nothing() -> None:
    body, extra = NETS["clip"]
    given = weights(extra)
    given["w"][5], given["b"][5] = 2 * given["w"][2], 2 * given["b"][2]
    assert shrunk(build(body, given, x=("N", 3, 6, 6)))[1] == 0


def test_a_negative_multiple_ahead_of_relu_proves_nothing() -> None:
    body, extra = NETS["relu"]
    given = weights(extra)
    given["w"][5], given["b"][5] = -given["w"][2], -given["b"][2]
    assert shrunk(build(body, given, x=("N", 3, 6, 6)))[1] == 0


def test_copies_that_differ_in_one_digit_are_two_channels() -> None:
    body, extra = NETS["relu"]
    given = weights(extra)
    given["w"][1], given["b"][1] = given["w"][6], given["b"][6]
    given["w"][1, 0, 0, 0] *= 1.001
    assert shrunk(build(body, given, x=("N", 3, 6, 6)))[1] == 0


def test_a_constant_ahead_of_padding_has_to_stay() -> None:
    given = weights({})
    given["w"][3], given["b"][3] = 0, 2
    padded = build(NETS["relu"][0], given, x=("N", 3, 6, 6))
    plain = build(NETS["relu"][0].replace("<pads=[1,1,1,1]>(r", "(r"), given, x=("N", 3, 6, 6))
    assert shrunk(padded)[1] == 0
    smaller, removed = shrunk(plain)
    assert removed == 1 and worst(plain, smaller, (3, 6, 6)) < 2e-6


def test_scale_zero_of_an_unfused_normalization_is_a_proof() -> None:
    body = "h = Conv(x, w)\nn = BatchNormalization(h, s, t, m, q)\nr = Relu(n)\ny = Conv(r, v)"
    given = weights(BN)
    given["s"] = as_array("s", (8,))
    given["s"][[2, 7]] = 0
    model = build(body, given, x=("N", 3, 6, 6))
    smaller, removed = shrunk(model)
    assert removed == 2 and worst(model, smaller, (3, 6, 6)) < 2e-6


def test_channels_that_saturation_makes_dead_are_proven_by_bounds() -> None:
    body = "h = Conv(x, w, b)\nr = Sigmoid(h)\na = Conv(r, k, c)\nt = Relu(a)\ny = Conv(t, v)"
    k, c = as_array("k", (8, 8, 1, 1)), np.zeros(8, np.float32)
    c[4] = -np.abs(k[4]).sum() - 0.1  # no input in [0, 1] brings it above zero
    model = build(body, {**weights({}), "k": k, "c": c}, x=("N", 3, 6, 6))
    smaller, removed = shrunk(model)
    assert removed == 1 and worst(model, smaller, (3, 6, 6)) < 2e-6
    c[4] += 0.3 + np.abs(k[4]).sum()
    assert shrunk(build(body, {**weights({}), "k": k, "c": c}, x=("N", 3, 6, 6)))[1] == 0


def test_an_axis_of_copies_keeps_one() -> None:
    given = weights({})
    given["w"][:], given["b"][:] = given["w"][0], given["b"][0]
    model = build(NETS["relu"][0], given, x=("N", 3, 6, 6))
    smaller, removed = shrunk(model)
    assert removed == 7 and worst(model, smaller, (3, 6, 6)) < 2e-6
    given["w"][:], given["b"][:] = 0, 0
    assert shrunk(build(NETS["relu"][0], given, x=("N", 3, 6, 6)))[1] == 7


def test_bounds_hold_on_random_nets() -> None:
    rng = np.random.default_rng(0)
    body = "h = Conv<pads=[1,1,1,1]>(x, w, b)\nr = Clip(h, lo, hi)\na = Conv<pads=[1,1,1,1]>(r, k, c)\ns = Add(a, r)\np = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1], count_include_pad=1>(s)\nt = Sigmoid(p)\nz = Mul(t, s)\ny = Conv(z, v)"  # fmt: skip
    for seed in range(20):
        given = weights({"k": rng.normal(size=(8, 8, 3, 3)).astype(np.float32), "c": rng.normal(size=8).astype(np.float32), "lo": np.float32(-1), "hi": np.float32(2)})  # fmt: skip
        model = build(body, given, x=("N", 3, 6, 6))
        channels = traced(model)
        known = BoundsContext(channels.shape_info.constants, channels.shape_info.shapes, facts := {})
        for node in channels.model.nodes:
            found = output_bounds(node, known)
            if found is not None:
                facts[node.outputs[0]] = found
        x = (np.random.default_rng(seed).normal(size=(8, 3, 6, 6)) * 100).astype(np.float32)
        for name in ("r", "a", "s", "p", "t", "z"):
            (value,) = run(build(body, given, x=("N", 3, 6, 6), outputs=name), {"x": x})
            flat = np.moveaxis(value, 1, 0).reshape(8, -1)
            assert np.isfinite(facts[name].low).all() and np.isfinite(facts[name].high).all()
            assert (flat.min(1) >= facts[name].low - 1e-3).all() and (flat.max(1) <= facts[name].high + 1e-3).all()


def test_proven_channels_are_counted_apart_from_observed_ones() -> None:
    given = weights({})
    given["w"][3], given["b"][3] = 0, -1
    given["b"][5] = -100.0  # dead on any data of usual size, but not for every input
    model = build(NETS["relu"][0], given, x=("N", 3, 6, 6))
    data = {"x": np.random.default_rng(0).normal(size=(200, 3, 6, 6)).astype(np.float32)}
    (group,) = compress(model, data).report.groups
    assert (group.proven, group.observed) == (1, 1)
    assert prove(traced(model)).steps.removed.sum() == 1


@pytest.mark.parametrize("count", [1, 2])
def test_one_or_two_samples_prove_nothing_by_themselves(count: int) -> None:
    given = weights({})
    given["w"][3], given["b"][3] = 0, -1
    given["b"][5] = -100.0
    model = build(NETS["relu"][0], given, x=("N", 3, 6, 6))
    data = {"x": np.random.default_rng(0).normal(size=(count, 3, 6, 6)).astype(np.float32)}
    found = compress(model, data).report
    assert [group.channels_after for group in found.groups] == [7]
    assert "only what the weights imply" in " ".join(found.notes)


# ---------------------------------------------------------------------------------------------------- declared ranges


BOX = {"x": (-1.0, 1.0)}


def in_the_box(model: onnx.ModelProto, other: onnx.ModelProto, shape: tuple[int, ...]) -> float:
    """Largest error over random inputs, corners and constants of the box -1 to 1, relative to the largest output."""
    rng = np.random.default_rng(5)
    tries = [
        rng.uniform(-1, 1, (16, *shape)),
        np.sign(rng.normal(size=(64, *shape))),
        np.ones((1, *shape)),
        -np.ones((1, *shape)),
    ]
    pairs = [(run(model, {"x": x.astype(np.float32)})[0], run(other, {"x": x.astype(np.float32)})[0]) for x in tries]
    return float(max(np.abs(a - b).max() for a, b in pairs) / max(np.abs(a).max() for a, _ in pairs))


def bounded(model: onnx.ModelProto, ranges: dict, shape: tuple[int, ...] = (3, 6, 6)) -> int:
    found = compress(model, proven_only=True, input_range=ranges)
    if ranges:
        assert in_the_box(model, found.model, shape) < 2e-6
    return sum(group.proven for group in found.report.groups)


def test_a_channel_that_no_input_in_the_range_wakes_goes() -> None:
    given = weights({})
    given["b"][3] = -np.abs(given["w"][3]).sum() - 0.01
    model = build(NETS["relu"][0], given, x=("N", 3, 6, 6))
    assert [bounded(model, ranges) for ranges in (BOX, {"*": (-1, 1)}, {"x": (-1.1, 1.1)}, {})] == [1, 1, 0, 0]


def test_a_bound_that_only_rounding_passes_is_no_proof() -> None:
    given = weights({})
    given["b"][3] = np.nextafter(-np.abs(given["w"][3].astype(np.float64)).sum(), -np.inf).astype(np.float32)
    assert bounded(build(NETS["relu"][0], given, x=("N", 3, 6, 6)), BOX) == 0


def test_a_channel_that_is_always_saturated_is_a_constant() -> None:
    given = weights({"lo": np.float32(0), "hi": np.float32(6)})
    given["b"][3] = np.abs(given["w"][3]).sum() + 6.01
    model = build("h = Conv(x, w, b)\nr = Clip(h, lo, hi)\ny = Conv(r, v)", given, x=("N", 3, 6, 6))
    assert [bounded(model, ranges) for ranges in (BOX, {})] == [1, 0]


@pytest.mark.parametrize("activation", ["Relu(h)", "Clip(h, lo)", "LeakyRelu(h)", "HardSwish(h)"])
def test_combinations_of_channels_that_are_always_linear_go(activation: str) -> None:
    given = weights({"lo": np.float32(0)} if "Clip" in activation else {})
    given["w"][5], given["w"][6] = (given["w"][2] + given["w"][3]) / 2, (given["w"][0] + 3 * given["w"][1]) / 4
    given["b"][:] = 20  # a combination too, as the factors add up to 1
    body = f"h = Conv<pads=[1,1,1,1]>(x, w, b)\nr = {activation}\np = AveragePool<kernel_shape=[2,2]>(r)\ny = Conv<pads=[1,1,1,1]>(p, v)"
    model = build(body, given, x=("N", 3, 6, 6))
    assert [bounded(model, ranges) for ranges in (BOX, {"x": (-100, 100)}, {})] == [2, 0, 0]


def test_a_product_of_low_rank_without_activation_needs_no_range() -> None:
    rng = np.random.default_rng(2)
    w = (rng.normal(size=(7, 3)) @ rng.normal(size=(3, 9))).astype(np.float32)
    model = build(
        "h = MatMul(x, w)\ns = Add(h, c)\ny = Gemm(s, v)",
        {"w": w, "c": np.zeros(9, np.float32), "v": (9, 4)},
        x=("N", 7),
    )
    smaller, removed = shrunk(model)
    assert removed == 6 and worst(model, smaller, (7,)) < 5e-6
    shifted = build(
        "h = MatMul(x, w)\ns = Add(h, c)\ny = Gemm(s, v)",
        {"w": w, "c": rng.normal(size=9).astype(np.float32), "v": (9, 4)},
        x=("N", 7),
    )
    smaller, removed = shrunk(shifted)
    assert removed == 5 and worst(shifted, smaller, (7,)) < 5e-6  # the shifts take one dimension more


def test_a_copy_of_a_combination_goes_with_it() -> None:
    given = {"w": as_array("w", (8, 3, 1, 1)), "v": (4, 8, 1, 1)}
    given["w"][7] = 2 * given["w"][6]
    model = build("h = Conv(x, w)\ny = Conv(h, v)", given, x=("N", 3, 6, 6))
    smaller, removed = shrunk(model)  # of rank 3
    assert removed == 5 and worst(model, smaller, (3, 6, 6)) < 5e-6


def test_two_readers_that_see_different_channels_combined_prove_nothing() -> None:
    given = weights({"m": as_array("m", (8, 1, 1)), "v": (4, 8, 1, 1), "u": (4, 8, 1, 1)})
    given["w"] = as_array("w", (8, 3, 1, 1))
    body = "h = Conv(x, w)\na = Conv(h, v)\nr = Relu(h)\nb = Conv(r, u)\ny = Add(a, b)"
    del given["m"], given["b"]
    assert shrunk(build(body, given, x=("N", 3, 6, 6)))[1] == 0


def test_a_leaky_relu_that_turns_is_not_monotone() -> None:
    given = weights({})
    given["b"][3], given["w"][3] = 0.0, 0.25
    model = build("h = Conv(x, w, b)\nr = LeakyRelu<alpha=-1.0>(h)\ny = Conv(r, v)", given, x=("N", 3, 6, 6))
    assert bounded(model, BOX) == 0


def test_a_gemm_with_one_addend_a_sample_proves_nothing_of_its_channels() -> None:
    c = np.array([[-100.0], [0], [0], [0]], np.float32)  # the first sample, not the first channel
    model = build("h = Gemm(x, w, c)\nr = Relu(h)\ny = MatMul(r, v)", {"w": (3, 4), "c": c, "v": (4, 2)}, x=(4, 3))
    assert sum(g.proven for g in compress(model, proven_only=True, input_range=BOX).report.groups) == 0


def test_images_of_bytes_bring_their_range_along() -> None:
    given = weights({"d": np.float32(255), "s": np.array([0.2, 0.5, 0.9], np.float32).reshape(3, 1, 1)})
    given["b"][3] = -np.abs(given["w"][3]).sum() - 0.01
    body = "f = Cast<to=1>(x)\ng = Div(f, d)\nk = Sub(g, s)\nh = Conv(k, w, b)\nr = Relu(h)\ny = Conv(r, v)"
    model = build(body, given, x=("N", 3, 6, 6))
    assert shrunk(model)[1] == 0
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.UINT8
    assert shrunk(model)[1] == 1


def test_a_range_along_the_last_axis_reaches_channels_behind_a_transpose() -> None:
    given = weights({})
    given["b"][3] = -np.abs(given["w"][3]).sum() - 0.01
    body = "t = Transpose<perm=[0,3,1,2]>(x)\nh = Conv(t, w, b)\nr = Relu(h)\ny = Conv(r, v)"
    model = build(body, given, x=("N", 6, 6, 3))
    assert bounded(model, BOX, (6, 6, 3)) == 1


@pytest.mark.parametrize(
    ("ranges", "match"),
    [
        ({"z": (0, 1)}, "no numeric input 'z'; it has: x"),
        ({"x": (1, 0)}, "from LO up to HI, not 1:0"),
        ({"x": (float("nan"), 1)}, "from LO up to HI"),
    ],
)
def test_a_range_without_a_meaning_is_refused(ranges: dict, match: str) -> None:
    model = build(NETS["relu"][0], weights({}), x=("N", 3, 6, 6))
    with pytest.raises(lindep_onnx.UsageError, match=match):
        compress(model, proven_only=True, input_range=ranges)


def test_data_outside_the_declared_range_is_refused() -> None:
    model = build(NETS["relu"][0], weights({}), x=("N", 3, 6, 6))
    x = np.random.default_rng(0).uniform(0, 1, (40, 3, 6, 6)).astype(np.float32)
    assert compress(model, {"x": x}, input_range={"x": (0, 1)}).report.options["input_range"] == {"x": (0, 1)}
    x[17, 1, 2, 3] = 1.5
    with pytest.raises(
        lindep_onnx.CalibrationError, match=r"'x' holds 1.5 \(sample 17\), outside the --input-range 0:1"
    ):
        compress(model, {"x": x}, input_range={"x": (0, 1)})


@pytest.mark.parametrize("seed", range(8))
def test_bounds_in_a_box_hold_for_what_is_computed(seed: int) -> None:
    rng = np.random.default_rng(seed)
    body = "h = Conv<pads=[1,1,1,1]>(x, w, b)\nn = BatchNormalization(h, s, t, m, q)\nr = HardSwish(n)\na = Conv(r, k)\ns1 = Softplus(a)\np = GlobalAveragePool(s1)\nu = Tanh(p)\nz = Sub(u, p)\ng = Neg(z)\ne = HardSigmoid(g)\ny = Conv(e, v1)"
    given = {**weights({"v1": (4, 8, 1, 1)}), **BN, "k": rng.normal(size=(8, 8, 3, 3)).astype(np.float32)}
    del given["v"]
    channels = traced(build(body, given, x=("N", 3, 6, 6)))
    known = BoundsContext(channels.shape_info.constants, channels.shape_info.shapes, facts := {})
    facts["x"] = known.bounded("x", 1, -1.0, 1.0)
    for node in channels.model.nodes:
        facts[node.outputs[0]] = output_bounds(node, known)
    x = np.concatenate([rng.uniform(-1, 1, (32, 3, 6, 6)), np.sign(rng.normal(size=(64, 3, 6, 6)))]).astype(np.float32)
    for name in ("h", "n", "r", "a", "s1", "p", "u", "z", "g", "e"):
        (value,) = run(build(body, given, x=("N", 3, 6, 6), outputs=name), {"x": x})
        flat = np.moveaxis(value, 1, 0).reshape(8, -1)
        assert (flat.min(1) >= facts[name].low).all() and (flat.max(1) <= facts[name].high).all(), name


def test_the_search_for_counterexamples_finds_one_where_there_is_one() -> None:
    given = weights({})
    given["b"][3] = -0.6 * np.abs(given["w"][3]).sum()  # only near one corner of the box it wakes
    given["v"] = as_array("v", (4, 8, 3, 3))
    wrong = {**given, "v": given["v"].copy()}
    wrong["v"][:, 3] = 0
    one, two = (build(NETS["relu"][0], values, x=("N", 3, 6, 6)) for values in (given, wrong))
    x = np.random.default_rng(0).uniform(-1, 1, (500, 3, 6, 6)).astype(np.float32)
    assert (run(one, {"x": x})[0] == run(two, {"x": x})[0]).all()  # which random inputs do not show
    found = [worst_error(one, other, (-1.0, 1.0), np.random.default_rng(0)) for other in (one, two)]
    assert found[0] == 0 and found[1] > TOLERANCE


def test_planted_proofs_in_random_nets_are_found_and_not_refuted() -> None:
    planted, found, worst = proven_in(range(500, 520))
    assert found == planted and worst <= TOLERANCE

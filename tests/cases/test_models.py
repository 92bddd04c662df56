"""Models as they come: outputs that are no tensors, bodies, empty optional inputs, outputs of varying length."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from build import as_array as seeded
from build import build, copied, run
from onnx import TensorProto, helper, numpy_helper

import lindep_onnx
from lindep_onnx.errors import CalibrationError
from lindep_onnx.model.ir import load
from lindep_onnx.model.shapes import resolve
from lindep_onnx.verify.compare import as_array

W, V = copied("w", (8, 16), 1, 4), seeded("v", (16, 5))
PLAIN = "h = MatMul(x, w)\nr = Relu(h)\ny = MatMul(r, v)"


def data(count: int = 80, *shape: int) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(1).normal(size=(count, *(shape or (8,)))).astype(np.float32)}


def told(result: lindep_onnx.Result) -> dict[str, int]:
    """Channels that stay, by reason."""
    found: dict[str, int] = {}
    for refusal in result.report.refusals:
        found[refusal.reason] = found.get(refusal.reason, 0) + refusal.channels
    return found


# ---- outputs that are no tensors -------------------------------------------------------------------------------------


def classifier(*, maps: bool) -> onnx.ModelProto:
    """A net as scikit-learn exports it: a label, and probabilities as maps or as a tensor."""
    model = build(PLAIN.replace("y =", "s =") + "\nl = ArgMax<axis=1,keepdims=0>(s)\np = Softmax(s)",
                  {"w": W, "v": V}, x=("N", 8), outputs="l p")  # fmt: skip
    if maps:
        zipped = helper.make_node("ZipMap", ["p"], ["z"], domain="ai.onnx.ml", classlabels_int64s=range(5))
        model.graph.node.append(zipped)
        model.graph.output[1].CopyFrom(onnx.ValueInfoProto(name="z"))
        model.graph.output[1].type.sequence_type.elem_type.map_type.key_type = TensorProto.INT64
        value = model.graph.output[1].type.sequence_type.elem_type.map_type.value_type
        value.tensor_type.elem_type = TensorProto.FLOAT
        model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 1))
    return model


@pytest.mark.parametrize("options", [{"params": 0.7}, {"max_error": 0.3}, {"min_agreement": 0.9}, {}], ids=str)
def test_a_sequence_of_maps_counts_like_the_tensor_that_it_was_made_of(options: dict[str, float]) -> None:
    plain, zipped = (
        lindep_onnx.compress(classifier(maps=maps), calib=data(), **options).report for maps in (False, True)
    )
    assert zipped.after.parameters == plain.after.parameters < zipped.before.parameters
    assert zipped.verification.relative_error == pytest.approx(plain.verification.relative_error, rel=1e-4)


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ([{2: 0.5, 1: 0.25}, {1: 1.0, 2: 0.0}], [[0.25, 0.5], [1.0, 0.0]]),
        ({"b": 2.0, "a": 1.0}, [[1.0, 2.0]]),
        ([np.eye(2), np.zeros(1)], [1, 0, 0, 1, 0]),
        ([], []),
        (None, []),
    ],
    ids=["maps", "map", "tensors", "nothing", "none"],
)
def test_what_an_output_may_be_becomes_an_array(value: object, wanted: object) -> None:
    np.testing.assert_array_equal(as_array(value), np.asarray(wanted))


# ---- bodies ----------------------------------------------------------------------------------------------------------


def body(*nodes: str, inputs: dict[str, list[object]], outputs: str, weights: dict[str, np.ndarray]) -> onnx.GraphProto:
    return helper.make_graph(
        [onnx.parser.parse_node(node) for node in nodes],
        "body",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs.split()],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )


def scanning(*, captured: bool) -> onnx.ModelProto:
    """A recurrence with a product of 16 channels inside; the weight is the body's own or the model's."""
    model = build("t = Transpose<perm=[1,0,2]>(x)\ns, os = Identity(t)\nom = ReduceMean<axes=[0],keepdims=0>(os)\n"
                  "y = MatMul(om, v)".replace("s, os = Identity(t)", "os = Relu(t)"),
                  {"v": V, **({"w": W} if captured else {})}, x=("N", 3, 16))  # fmt: skip
    inner = body("s2 = Add(s, e)", "h = MatMul(s2, w)", "o = Relu(h)", inputs={"s": ["N", 8], "e": ["N", 8]},
                 outputs="s2 o", weights={} if captured else {"w": W})  # fmt: skip
    model.graph.node[1].CopyFrom(helper.make_node("Scan", ["s0", "t"], ["s", "os"], body=inner, num_scan_inputs=1))
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 8]))
    model.graph.input.append(helper.make_tensor_value_info("s0", TensorProto.FLOAT, ["N", 8]))
    return model


@pytest.mark.parametrize("captured", [True, False])
def test_channels_inside_a_body_are_counted_and_named(captured: bool) -> None:
    feeds = {"x": data(40, 3, 8)["x"], "s0": data(40)["x"]}
    result = lindep_onnx.compress(scanning(captured=captured), calib=feeds)
    assert told(result) == {"subgraph": 16, "graph_output": 5}
    assert any("body" in r.message and "Scan" in r.message for r in result.report.refusals)
    assert result.report.before.channels == 21 and result.report.before.parameters == W.size + V.size


# ---- shapes ----------------------------------------------------------------------------------------------------------

RESIZE = {
    "sizes of the shape": "n = Shape(r)\nb = Slice(n, i0, i2)\nz = Concat<axis=0>(b, hw)\nu = Resize<mode=\"linear\">(r, e, e, z)",
    "constant sizes": "n = Shape(r)\nb = Slice(n, i0, i1)\nz = Concat<axis=0>(b, chw)\nu = Resize<mode=\"linear\">(r, e, e, z)",
    "scales": "u = Resize<mode=\"linear\">(r, e, s)",
    "scales and an empty roi left out": "u = Resize<mode=\"linear\">(r, , s)",
}  # fmt: skip


@pytest.mark.parametrize("resize", RESIZE.values(), ids=RESIZE.keys())
@pytest.mark.parametrize("opset", [11, 13, 18])
def test_an_empty_roi_or_scales_is_an_absent_one(resize: str, opset: int) -> None:
    if opset == 11 and "(r, ," in resize:
        pytest.skip("roi was no optional input")
    given = {
        "w": copied("w", (16, 3, 3, 3), 0, 4), "v": (2, 16, 1, 1), "e": np.zeros(0, np.float32),
        "s": np.array([1, 1, 2, 2], np.float32), "i0": np.array([0]), "i1": np.array([1]), "i2": np.array([2]),
        "hw": np.array([16, 16]), "chw": np.array([16, 16, 16]),
    }  # fmt: skip
    text = f"h = Conv<pads=[1,1,1,1]>(x, w)\nr = Relu(h)\n{resize}\ny = Conv(u, v)"
    read = text.replace("(", " ").replace(")", " ").replace(",", " ").split()
    model = build(text, {name: value for name, value in given.items() if name in read}, opset=opset)
    result = lindep_onnx.compress(model, calib=data(24, 3, 8, 8))
    assert result.report.after.channels == result.report.before.channels - 4
    feeds = data(2, 3, 8, 8)
    np.testing.assert_allclose(run(result.model, feeds)[0], run(model, feeds)[0], rtol=1e-4, atol=1e-5)


def test_a_name_that_the_file_gives_outlives_one_that_inference_makes_up() -> None:
    given = {"i0": np.array([0]), "i2": np.array([2]), "hw": np.array([16, 16]), "e": np.zeros(0, np.float32)}
    model = build(RESIZE["sizes of the shape"].replace("(r", "(x").replace("u =", "y ="), given, opset=13)
    assert resolve(load(model)).shapes["y"] == ("N", 3, 16, 16)


# ---- recovery --------------------------------------------------------------------------------------------------------


def test_an_output_whose_rows_depend_on_the_data_is_not_trained_towards() -> None:
    rows = "m = ReduceMax<axes=[1],keepdims=0>(z)\nk = Greater(m, t)\ny = Compress<axis=0>(z, k)"
    model = build(PLAIN.replace("y =", "z =") + "\n" + rows, {"w": W, "v": V, "t": np.float32(1.5)}, x=("N", 8))
    result = lindep_onnx.compress(model, calib=data(), params=0.8, recover=3)
    assert any("was not trained" in note for note in result.report.notes)


def test_beside_such_an_output_others_are_trained_towards() -> None:
    rows = "m = ReduceMax<axes=[1],keepdims=0>(y)\nk = Greater(m, t)\ns = Compress<axis=0>(y, k)"
    model = build(f"{PLAIN}\n{rows}", {"w": W, "v": V, "t": np.float32(1.5)}, x=("N", 8), outputs="y s")
    result = lindep_onnx.compress(model, calib=data(), params=0.6, recover=20)
    assert not any("was not trained" in note for note in result.report.notes)


# ---- infinite masks --------------------------------------------------------------------------------------------------


def test_minus_infinity_in_a_mask_is_fed_as_it_is() -> None:
    body = "h = MatMul(x, w)\nr = Relu(h)\ns = MatMul(r, u)\nm = Add(s, mask)\np = Softmax(m)\ny = MatMul(p, t)"
    model = build(body, {"w": W, "u": (16, 6), "t": (6, 3)}, x=("N", 8), inputs={"mask": ("N", 6)})
    mask = np.where(np.arange(6) < 1 + np.arange(80)[:, None] % 6, 0, -np.inf).astype(np.float32)
    result = lindep_onnx.compress(model, calib={**data(), "mask": mask})
    assert result.report.after.channels == result.report.before.channels - 4
    feeds = {"x": data(5)["x"], "mask": mask[:5]}
    np.testing.assert_allclose(run(result.model, feeds)[0], run(model, feeds)[0], rtol=1e-4, atol=1e-5)


def test_a_tensor_that_becomes_infinite_is_told_with_the_sample() -> None:
    values = data()["x"]
    values[20:30, 3] = -np.inf
    with pytest.raises(CalibrationError, match=r"Tensor 'r' becomes NaN or infinite on sample 2\d"):
        lindep_onnx.compress(build(PLAIN, {"w": W, "v": V}, x=("N", 8)), calib={"x": values})

"""Inputs as they are: where samples lie, what all of them share, what is fed as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from build import build, copied, run
from onnx import TensorProto, helper, numpy_helper

import lindep_onnx
from lindep_onnx.data.inputs import InputSpec
from lindep_onnx.data.places import Place, place_of
from lindep_onnx.data.samples import open_samples
from lindep_onnx.errors import CalibrationError, UsageError
from lindep_onnx.model.batch import batch_axes
from lindep_onnx.model.ir import load
from lindep_onnx.model.shapes import resolve
from lindep_onnx.options import DataOptions

RNG = np.random.default_rng
W = copied("w", (8, 16), 1, 4)
V = RNG(7).normal(size=(16, 5)).astype(np.float32)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return RNG(seed).normal(size=shape).astype(np.float32)


# ---- which axis counts samples ---------------------------------------------------------------------------------------

NAMED: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, int | None]]] = {
    "images": ({"x": ["N", 3, 8, 8]}, {"y": ["N", 5]}, {"x": 0}),
    "no names": ({"x": [None, 3], "z": ["?", 4]}, {"y": [None, 3]}, {"x": 0, "z": 0}),
    "fixed": ({"x": [4, 3], "z": [4, 2]}, {"y": [4, 3]}, {"x": 0, "z": 0}),
    "no shape": ({"x": None}, {"y": None}, {"x": 0}),
    "a scalar": ({"x": ["N", 3], "g": []}, {"y": ["N", 3]}, {"x": 0, "g": None}),
    "a mask of steps": ({"x": ["N", "S", 8], "m": ["S", "S"]}, {"y": ["N", "S", 8]}, {"x": 0, "m": None}),
    "a mask, other names": ({"x": ["a", "b", 8], "m": ["b", "b"]}, {"y": ["a", "b", 8]}, {"x": 0, "m": None}),
    "positions": ({"x": ["batch", "seq"], "p": [1, "seq"]}, {"y": ["batch", "seq", 9]}, {"x": 0, "p": None}),
    "a state": ({"x": ["N", 8], "h": [2, "N", 8]}, {"y": ["N", 1]}, {"x": 0, "h": 1}),
    "time first": ({"x": [12, "N", 8]}, {"y": ["N", 5]}, {"x": 1}),
    "time first, free": ({"x": ["T", "N", 8]}, {"y": ["T", "N", 5]}, {"x": 1}),
    "time first, other names": ({"x": [12, "k", 8]}, {"y": ["k", 5]}, {"x": 1}),
    "free image sizes": ({"x": [1, 3, "H", "W"]}, {"y": [1, 2, "H", "W"]}, {"x": 0}),
    "free length": ({"x": [1, "T", 80]}, {"y": [1, "T", 5]}, {"x": 0}),
    "a name for each": ({"x": ["x_dim_0", 3], "z": ["z_dim_0", 4]}, {"y": ["y_dim_0", 4]}, {"x": 0, "z": 0}),
    "a graph": (
        {"n": ["nodes", 6], "f": ["edges", 4], "e": [2, "edges"], "g": ["nodes"], "s": ["graphs"]},
        {"y": ["graphs", 4]},
        {"n": None, "f": None, "e": None, "g": None, "s": None},
    ),
}


@pytest.mark.parametrize(("inputs", "outputs", "wanted"), NAMED.values(), ids=NAMED.keys())
def test_the_names_of_axes_say_which_one_counts_samples(inputs: dict, outputs: dict, wanted: dict) -> None:
    declared = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in those.items()]
        for those in (inputs, outputs)
    ]
    graph = helper.make_graph([], "g", *declared)
    assert batch_axes(graph, tuple(inputs), {}) == wanted
    assert batch_axes(graph, tuple(inputs), {"x": 1}) == {**wanted, "x": 1}


def test_the_sample_axis_is_followed_inside() -> None:
    body = "t = Transpose<perm=[2,0,1]>(x)\nh = MatMul(t, w)\nu = Transpose<perm=[1,0,2]>(h)\ny = MatMul(u, v)"
    for shape in (("N", 8, 6), (None, 8, 6)):
        model = build(body, {"w": W, "v": V}, x=("N", 8, 6))
        model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", TensorProto.FLOAT, shape))
        model.graph.output[0].type.tensor_type.ClearField("shape")
        found = resolve(load(model))
        assert {name: found.sample_axis(name) for name in "xthuyw"} == {
            "x": 0,
            "t": 1,
            "h": 1,
            "u": 0,
            "y": 0,
            "w": None,
        }
        assert found.moved_samples(["h", "y"]) == {"h": 1}


# ---- arrays and what runs are fed with -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "axis", "found", "wanted"),
    [
        (("N", 8), 0, (5, 8), Place(0, 0)),
        (("N", 8), 0, (5, 1, 8), Place(0, 0, entries=True)),
        ((2, "N", 8), 1, (2, 5, 8), Place(1, 1)),
        ((2, "N", 8), 1, (5, 2, 1, 8), Place(0, 1, entries=True)),
        (("S", "S"), None, (5, 5), Place(None, None)),
        (("S", "S"), None, (9, 5, 5), Place(0, None, entries=True)),
        ((), None, (), Place(None, None)),
        ((), None, (9,), Place(0, None, entries=True)),
        (None, 0, (9, 3), Place(0, 0)),
        (("N", 8), 0, (5, 7), None),
        (("N", 8), 0, (5,), None),
        ((2, "N", 8), 1, (5, 3, 8), None),
        ((), None, (9, 1), None),
    ],
)
def test_where_the_samples_of_an_array_are(shape: Any, axis: int | None, found: Any, wanted: Place | None) -> None:
    assert place_of(shape, axis, found, leading=False) == wanted


def opened(source: Any, *specs: InputSpec, **options: Any) -> Any:
    return open_samples(source, specs, DataOptions(**{"batch_size": 3, **options}))


def spec(name: str, axis: int | None, *shape: int | str, dtype: Any = np.float32) -> InputSpec:
    return InputSpec(name, np.dtype(dtype), shape, axis=axis)


X, H, G = spec("x", 0, "N", 8), spec("h", 1, 2, "N", 8), spec("g", None)
STATES = {
    "flat": lambda x, h: {"x": x, "h": h},
    "entries": lambda x, h: {"x": x, "h": np.moveaxis(h, 1, 0)[:, :, None]},
    "entries of both": lambda x, h: {"x": x[:, None], "h": np.moveaxis(h, 1, 0)[:, :, None]},
    "a generator": lambda x, h: ({"x": x[n : n + 1], "h": h[:, n : n + 1]} for n in range(len(x))),
    "a generator of several": lambda x, h: ({"x": x[n : n + 2], "h": h[:, n : n + 2]} for n in range(0, len(x), 2)),
}


@pytest.mark.parametrize("source", STATES.values(), ids=STATES.keys())
def test_samples_are_fed_along_the_axis_of_each_input(source: Any) -> None:
    x, h = normal(10, 8), normal(2, 10, 8, seed=1)
    with opened(source(x, h), X, H) as samples:
        assert len(samples) == 10 and samples.uniform and samples.free_batch and not samples.leading
        for _ in range(2):
            batches = list(samples.batches())
            assert [batch.size for batch in batches] == [3, 3, 3, 1]
            for batch in batches:
                np.testing.assert_array_equal(batch.feeds["x"], x[batch.samples])
                np.testing.assert_array_equal(batch.feeds["h"], h[:, batch.samples])
        taken = samples.take(np.array([7, 2, 9]))
        np.testing.assert_array_equal(taken["h"], h[:, [7, 2, 9]])
        np.testing.assert_array_equal(taken["x"], x[[7, 2, 9]])


def test_a_fixed_batch_on_another_axis_is_filled_up() -> None:
    h = normal(2, 10, 8)
    with opened({"x": normal(10, 8, seed=1), "h": h}, spec("x", 0, 4, 8), spec("h", 1, 2, 4, 8)) as samples:
        batch = list(samples.batches())[-1]
        assert batch.size == 4 and len(batch.samples) == 2 and not samples.free_batch
        np.testing.assert_array_equal(batch.feeds["h"], h[:, [8, 9, 9, 9]])


def test_a_value_without_a_sample_axis_may_differ_from_sample_to_sample() -> None:
    x, gains = normal(10, 8), normal(10, seed=1)
    with opened({"x": x, "g": gains}, X, G) as samples:
        assert any("one by one" in note for note in samples.notes) and not samples.free_batch
        for batch in samples.batches():
            assert batch.size == 1 and batch.feeds["g"].shape == () and batch.feeds["g"] == gains[batch.samples[0]]
            np.testing.assert_array_equal(batch.feeds["x"], x[batch.samples])
    with opened({"x": x, "g": np.float32(2)}, X, G) as samples:
        assert samples.free_batch and all(batch.feeds["g"] == 2 for batch in samples.batches())


def test_what_has_no_sample_axis_by_its_names_is_fed_as_it_is() -> None:
    mask = normal(5, 5)
    with opened({"x": normal(10, 5, 8), "m": mask}, spec("x", 0, "N", "S", 8), spec("m", None, "S", "S")) as samples:
        assert len(samples) == 10 and all((batch.feeds["m"] == mask).all() for batch in samples.batches())


NODES, EDGES = spec("n", None, "nodes", 6), spec("e", None, 2, "edges", dtype=np.int64)


def graphs(count: int, sizes: tuple[int, ...] = (3, 5, 4)) -> Iterator[dict[str, np.ndarray]]:
    for number in range(count):
        size = sizes[number % len(sizes)]
        yield {"n": normal(size, 6, seed=number), "e": RNG(number).integers(0, size, (2, size + number % 2))}


@pytest.mark.parametrize("sizes", [(3, 5, 4), (4,), (3, 3, 7)], ids=str)
def test_ragged_items_are_runs_of_their_own(sizes: tuple[int, ...]) -> None:
    with opened(graphs(9, sizes), NODES, EDGES) as samples:
        assert len(samples) == 9 and not samples.free_batch
        batches = list(samples.batches())
        assert sorted(batch.size for batch in batches) == [1] * 9
        fed = {batch.feeds["n"].tobytes(): batch.feeds["e"] for batch in batches}
        for item in graphs(9, sizes):
            np.testing.assert_array_equal(fed[item["n"].tobytes()], item["e"])


def test_test_sets_are_runs_of_their_own(tmp_path: Path) -> None:
    for number, item in enumerate(graphs(6)):
        folder = tmp_path / f"test_data_set_{number}"
        folder.mkdir()
        for place, (name, value) in enumerate(item.items()):
            (folder / f"input_{place}.pb").write_bytes(numpy_helper.from_array(value, name).SerializeToString())
    with opened(tmp_path, NODES, EDGES) as samples:
        shapes = [batch.feeds["n"].shape[0] for batch in samples.batches()]
    assert shapes == [3, 5, 4, 3, 5, 4]


def test_an_item_that_does_not_agree_makes_items_of_all_unless_the_names_say_otherwise() -> None:
    def items(*lengths: tuple[int, int]) -> Iterator[dict[str, np.ndarray]]:
        yield from ({"a": normal(left, 3, seed=left), "b": normal(right, 2)} for left, right in lengths)

    lengths = (2, 2), (4, 4), (3, 5)
    with opened(items(*lengths), spec("a", 0, "?", 3), spec("b", 0, "?", 2)) as samples:
        assert [(len(b.feeds["a"]), len(b.feeds["b"])) for b in samples.batches()] == list(lengths)
    with opened(items(*lengths[:2]), spec("a", 0, "?", 3), spec("b", 0, "?", 2)) as samples:
        assert len(samples) == 6
    with pytest.raises(CalibrationError, match=r"different numbers of samples \(a: 3, b: 5\)"):
        opened(items(*lengths), spec("a", 0, "N", 3), spec("b", 0, "N", 2))


def test_an_archive_of_arrays_that_do_not_agree_is_refused_with_a_way_out() -> None:
    with pytest.raises(CalibrationError, match=r"a: 3, b: 5.*--batch-axis"):
        opened({"a": normal(3, 3), "b": normal(5, 2)}, spec("a", 0, "p", 3), spec("b", 0, "q", 2))


def test_a_fault_is_told_by_the_sample_on_any_axis() -> None:
    h = normal(2, 10, 8)
    h[1, 7, 3] = np.nan
    with opened({"x": normal(10, 8), "h": h}, X, H) as samples, pytest.raises(CalibrationError, match=r"sample 7\)"):
        list(samples.batches())


# ---- from end to end -------------------------------------------------------------------------------------------------


def gone(result: lindep_onnx.Result) -> int:
    return result.report.before.channels - result.report.after.channels


def same(model: onnx.ModelProto, result: lindep_onnx.Result, feeds: dict[str, np.ndarray]) -> None:
    for got, wanted in zip(run(result.model, feeds), run(model, feeds), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-4)


def test_an_input_without_a_shape_has_the_rank_of_its_data() -> None:
    model = build("h = MatMul(x, w)\nr = Relu(h)\ny = MatMul(r, v)", {"w": W, "v": V}, x=("N", 8))
    model.graph.input[0].type.tensor_type.ClearField("shape")
    model.graph.output[0].type.tensor_type.ClearField("shape")
    for shape in ((80, 8), (40, 3, 8)):
        result = lindep_onnx.compress(model, calib=normal(*shape))
        assert gone(result) == 4
        same(model, result, {"x": normal(*shape, seed=1)})
    with lindep_onnx.calibrate(lindep_onnx.trace(model), normal(80, 8)) as calibrated:
        assert calibrated.traced.structure.units == 16


def test_a_mask_without_a_sample_axis_is_fed_to_every_run() -> None:
    body = "h = MatMul(x, w)\nr = Relu(h)\ns = MatMul(r, v)\ny = MatMul(m, s)"
    model = build(body, {"w": W, "v": V}, x=("N", "S", 8), inputs={"m": ("S", "S")})
    result = lindep_onnx.compress(model, calib={"x": normal(60, 5, 8), "m": normal(5, 5)})
    assert gone(result) == 4 and result.report.verification.passed


TIME_MAJOR = (
    "h = MatMul(x, w)\nr = Relu(h)\nl, k, c = LSTM<hidden_size=6>(r, lw, lr)\nq = Squeeze(k, a)\ny = MatMul(q, u)"
)
RECURRENT = {"w": W, "lw": (1, 24, 16), "lr": (1, 24, 6), "a": np.array([0]), "u": (6, 5)}


@pytest.mark.parametrize("name", ["N", "?", "q0"])
def test_sequences_with_time_in_front_are_the_samples(name: str) -> None:
    model = build(TIME_MAJOR, RECURRENT, x=(4, "N", 8))
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = name
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_param = name
    axis = {} if name != "?" else {"batch_axis": {"x": 1}}
    data = normal(4, 120, 8)
    result = lindep_onnx.compress(model, calib=data, **axis)
    assert gone(result) == 4 and result.report.verification.samples > 10
    assert result.report.before.macs < 4 * (8 * 16 + 24 * 22) + 31
    same(model, result, {"x": data[:, :7]})
    lossy = lindep_onnx.compress(model, calib=data, params=0.7, **axis)
    assert lossy.report.budget[0].achieved <= 0.7


@pytest.mark.parametrize("samples", [24, 45, 64])
@pytest.mark.parametrize("refit", ["sequential", "kernel"])
def test_layers_behind_a_transpose_to_time_first_are_refitted(samples: int, refit: str) -> None:
    body = (
        "c = Conv<pads=[1,1]>(x, k, d)\nr = Relu(c)\nt = Transpose<perm=[2,0,1]>(r)\nm = MatMul(t, w)\na = Add(m, b)\n"
        "s = Relu(a)\nn = MatMul(s, v)\ny = Add(n, e)"
    )
    weights = {"k": (16, 4, 3), "d": (16,), "w": (16, 16), "b": (16,), "v": (16, 5), "e": (5,)}
    model = build(body, weights, x=("N", 4, "T"))
    data = normal(samples, 4, 12)
    result = lindep_onnx.compress(model, calib=data, params=0.6, refit=refit)
    assert result.report.budget[0].achieved <= 0.6
    assert not any("keep their fold" in note for note in result.report.notes)
    alone = lindep_onnx.compress(model, calib=data, params=0.6, refit=refit, batch_size=1)
    error, one_by_one = (found.report.verification.relative_error for found in (result, alone))
    assert error < 1.5 * one_by_one + 0.02


def test_the_decision_of_an_output_with_time_in_front_is_found() -> None:
    body = "t = Transpose<perm=[2,0,1]>(x)\nh = MatMul(t, w)\nr = Relu(h)\ny = MatMul(r, v)"
    model = build(body, {"w": (8, 16), "v": V}, x=("N", 8, "T"))
    data = normal(90, 8, 6)
    for name in ("y", "y:2", "y:-1"):
        report = lindep_onnx.compress(model, calib=data, params=0.8, agreement_output=name).report
        assert 0.5 < report.verification.agreement < 1
    with pytest.raises(UsageError, match="has no axis"):
        lindep_onnx.compress(model, calib=data, params=0.8, agreement_output="y:1")


def graph_network() -> onnx.ModelProto:
    body = (
        "m = MatMul(n, w)\nh = Relu(m)\ns = Gather<axis=0>(e, zero)\ng = Gather<axis=0>(h, s)\nf = MatMul(g, v)\n"
        "p = Shape(n)\nc = Gather<axis=0>(p, first)\no = Concat<axis=0>(c, five)\nz = ConstantOfShape(o)\n"
        'd = Unsqueeze(s, last)\nq = Shape(f)\nx = Expand(d, q)\ny = ScatterElements<axis=0,reduction="add">(z, x, f)'
    )
    weights = {"w": copied("gw", (6, 16), 1, 4), "v": V, "zero": np.array(0), "first": np.array([0]),
               "five": np.array([5]), "last": np.array([1])}  # fmt: skip
    nodes = [onnx.parser.parse_node(line) for line in body.splitlines()]
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()]
    inputs = [
        helper.make_tensor_value_info("n", TensorProto.FLOAT, ["nodes", 6]),
        helper.make_tensor_value_info("e", TensorProto.INT64, [2, "edges"]),
        helper.make_tensor_value_info("k", TensorProto.FLOAT, ["edges"]),
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["nodes", 5])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


@pytest.mark.parametrize("options", [{}, {"params": 0.8}, {"max_error": 0.3}], ids=str)
def test_a_network_on_graphs_is_fed_graph_by_graph(options: dict[str, float]) -> None:
    model = graph_network()
    items = [{**item, "k": np.ones(item["e"].shape[1], np.float32)} for item in graphs(40, (9, 12, 7))]
    result = lindep_onnx.compress(model, calib=items, **options)
    assert gone(result) >= 4 and result.report.verification.passed
    if not options:
        same(model, result, items[0])


@pytest.mark.parametrize("axes", [{"z": 0}, {"x": 2}])
def test_an_axis_of_nothing_is_a_mistake_of_usage(axes: dict[str, int]) -> None:
    model = build("y = Relu(x)", {}, x=("N", 8))
    with pytest.raises(UsageError, match="--batch-axis: "):
        lindep_onnx.compress(model, calib=normal(9, 8), batch_axis=axes)

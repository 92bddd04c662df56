"""Models as files come: nodes in any order, stale types, sparse weights, weights that are inputs too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from build import build, copied, feed, run
from onnx import TensorProto, helper, numpy_helper

import lindep_onnx
from lindep_onnx.errors import BudgetError, ModelError
from lindep_onnx.model.ir import load

BODY = "h = Gemm(x, w, b)\nr = Relu(h)\nt = Gemm(r, v)\ns = Relu(t)\ny = Gemm(s, u)"
WEIGHTS = {
    "w": copied("w", (8, 16), 1, 4), "b": copied("b", (16,), 0, 4),
    "v": copied("v", (16, 12), 1, 3), "u": (12, 5),
}  # fmt: skip


def net() -> onnx.ModelProto:
    """16 channels of which 4 are copies, then 12 of which 3 are."""
    return build(BODY, WEIGHTS, x=("N", 8))


def widths(model: onnx.ModelProto) -> dict[str, int]:
    """Channels of the two hidden layers."""
    sizes = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    return {name: sizes[reader][0] for name, reader in (("h", "v"), ("t", "u")) if reader in sizes}


def compressed(model: onnx.ModelProto, **options: object) -> lindep_onnx.Result:
    """A result that loads and gives what the original gives."""
    result = lindep_onnx.compress(model, **{"proven_only": True, **options})
    feeds = feed(result.model)
    for got, wanted in zip(run(result.model, feeds), run(net(), feeds), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)
    return result


# ---- nodes in any order ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [[4, 3, 2, 1, 0], [1, 0, 2, 3, 4], [2, 4, 0, 3, 1]])
def test_nodes_are_put_in_order_and_the_report_says_so(order: list[int]) -> None:
    model = net()
    nodes = [model.graph.node[place] for place in order]
    shuffled = onnx.GraphProto(node=nodes)
    del model.graph.node[:]
    model.graph.node.extend(shuffled.node)
    result = compressed(model)
    assert widths(result.model) == {"h": 12, "t": 9}
    assert any("put in order" in note for note in result.report.notes)
    assert [node.name for node in load(model).nodes] == [node.name for node in load(net()).nodes]


def test_an_order_that_can_run_is_left_as_it_is() -> None:
    model = build("h = Relu(x)\na = Abs(x)\nb = Neg(h)\nc = Neg(a)\ny = Add(c, b)", {}, x=("N", 4))
    assert load(model).proto is model and not load(model).notes


def branch(name: str, *nodes: onnx.NodeProto) -> onnx.GraphProto:
    return helper.make_graph(nodes, name, [], [helper.make_tensor_value_info("out_" + name, TensorProto.FLOAT, None)])


def with_if(*nodes: onnx.NodeProto) -> onnx.ModelProto:
    """A model whose `then` branch has these nodes; they read the computed tensor r."""
    model = build("r = Relu(x)\ny = Identity(r)", {"which": np.array(True)}, x=("N", 4))
    otherwise = branch("else", helper.make_node("Neg", ["r"], ["out_else"]))
    body = branch("then", *nodes)
    model.graph.node[1].CopyFrom(helper.make_node("If", ["which"], ["y"], then_branch=body, else_branch=otherwise))
    return model


@pytest.mark.parametrize("function", (False, True))
def test_the_long_name_of_the_standard_domain_is_that_domain(function: bool) -> None:
    model = net()
    if function:
        entries = [helper.make_opsetid("ai.onnx", 17)]
        inputs = ["x", "w", "b"]
        gemm = helper.make_node("Gemm", inputs, ["h"], domain="ai.onnx")
        model.functions.append(helper.make_function("local", "Block", inputs, ["h"], [gemm], entries))
        model.graph.node[0].CopyFrom(helper.make_node("Block", inputs, ["h"], domain="local"))
        model.opset_import.append(helper.make_opsetid("local", 1))
    for named in (*model.graph.node, model.opset_import[0]):
        named.domain = named.domain or "ai.onnx"
    result = compressed(model)
    assert widths(result.model) == {"h": 12, "t": 9}
    assert any("'ai.onnx'" in note for note in result.report.notes)


def test_nodes_of_a_body_are_put_in_order_and_what_a_body_reads_comes_before_it() -> None:
    late = helper.make_node("Abs", ["inner"], ["out_then"])
    model = with_if(late, helper.make_node("Neg", ["r"], ["inner"]))
    swapped = onnx.GraphProto(node=[model.graph.node[1], model.graph.node[0]])
    del model.graph.node[:]
    model.graph.node.extend(swapped.node)
    loaded = load(model)
    assert [node.op for node in loaded.nodes] == ["Relu", "If"] and loaded.notes
    then = next(a.g for a in loaded.proto.graph.node[1].attribute if a.name == "then_branch")
    assert [node.op_type for node in then.node] == ["Neg", "Abs"]
    np.testing.assert_array_equal(run(loaded.proto, feed(model))[0], np.maximum(feed(model)["x"], 0))


def test_nodes_in_a_circle_are_refused() -> None:
    model = net()
    model.graph.node[0].input[0] = "s"
    with pytest.raises(ModelError, match="cycle"):
        load(model)


# ---- types that are recorded -----------------------------------------------------------------------------------------


def stale(kind: int, *names: str) -> onnx.ModelProto:
    """A net in half precision inside, with types of another kind recorded."""
    body = "a = Cast<to=10>(x)\nh = MatMul(a, w)\nr = Relu(h)\nz = MatMul(r, v)\ny = Cast<to=1>(z)"
    half = {name: WEIGHTS[name].astype(np.float16) for name in ("w", "v")}
    model = build(body, half, x=("N", 8))
    model.graph.value_info.extend(helper.make_tensor_value_info(name, kind, None) for name in names)
    return model


@pytest.mark.parametrize("names", [("a",), ("a", "r", "z")])
def test_a_recorded_type_that_no_operator_gives_is_corrected(names: tuple[str, ...]) -> None:
    model = stale(TensorProto.FLOAT, *names)
    with pytest.raises(Exception, match="does not match expected type"):
        run(model, feed(model))
    result = lindep_onnx.compress(model, proven_only=True)
    assert result.model.graph.initializer[1].dims[0] == 12
    assert any(repr(names[0]) in note for note in result.report.notes)
    np.testing.assert_allclose(run(result.model, feed(model))[0], run(stale(0), feed(model))[0], rtol=0.02, atol=0.02)


def test_recorded_types_that_are_right_are_left_as_they_are() -> None:
    model = stale(TensorProto.FLOAT16, "a", "r", "z")
    assert load(model).proto is model and not load(model).notes


def test_a_recorded_type_inside_a_body_is_corrected() -> None:
    model = with_if(helper.make_node("Neg", ["r"], ["inner"]), helper.make_node("Abs", ["inner"], ["out_then"]))
    then = next(a.g for a in model.graph.node[1].attribute if a.name == "then_branch")
    then.value_info.append(helper.make_tensor_value_info("inner", TensorProto.DOUBLE, None))
    with pytest.raises(Exception, match="does not match expected type"):
        run(model, feed(model))
    run(load(model).proto, feed(model))


# ---- weights that are sparse, or inputs too --------------------------------------------------------------------------


def sparse(name: str, value: np.ndarray, *, flat: bool = True) -> onnx.SparseTensorProto:
    places = np.flatnonzero(value) if flat else np.argwhere(value)
    values = numpy_helper.from_array(value[value != 0], name)
    return helper.make_sparse_tensor(values, numpy_helper.from_array(places, name + "_places"), value.shape)


def taken(model: onnx.ModelProto, name: str) -> np.ndarray:
    """Take an initializer out of a model."""
    place = next(place for place, tensor in enumerate(model.graph.initializer) if tensor.name == name)
    return numpy_helper.to_array(model.graph.initializer.pop(place))


def sparse_initializer(model: onnx.ModelProto) -> None:
    model.graph.sparse_initializer.append(sparse("w", taken(model, "w")))


def sparse_by_places(model: onnx.ModelProto) -> None:
    model.graph.sparse_initializer.append(sparse("w", taken(model, "w"), flat=False))


def sparse_constant(model: onnx.ModelProto) -> None:
    node = helper.make_node("Constant", [], ["w"], sparse_value=sparse("w", taken(model, "w")))
    model.graph.node.insert(0, node)


def sparse_behind_transpose(model: onnx.ModelProto) -> None:
    model.graph.sparse_initializer.append(sparse("w_stored", np.ascontiguousarray(taken(model, "w").T)))
    model.graph.node.insert(0, helper.make_node("Transpose", ["w_stored"], ["w"], perm=[1, 0]))


@pytest.mark.parametrize(
    "change", [sparse_initializer, sparse_by_places, sparse_constant, sparse_behind_transpose], ids=lambda f: f.__name__
)
def test_a_sparse_weight_stays_and_the_others_are_compressed(change: Callable[[onnx.ModelProto], None]) -> None:
    model = net()
    change(model)
    result = compressed(model)
    assert widths(result.model) == {"h": 16, "t": 9}
    assert [(r.reason, r.channels) for r in result.report.refusals if r.reason != "graph_output"] == [
        ("sparse_weight", 16)
    ]
    assert result.report.before.channels == 33 and result.report.before.parameters == 8 * 16 + 16 + 16 * 12 + 60
    lossy = lindep_onnx.compress(model, calib=feed(model, 60), params=0.7)
    assert lossy.report.budget[0].achieved <= 0.7
    run(lossy.model, feed(model))


def test_a_sparse_weight_whose_places_do_not_exist_is_refused() -> None:
    model = net()
    taken(model, "w")
    model.graph.sparse_initializer.append(sparse("w", np.eye(4, dtype=np.float32)))
    del model.graph.sparse_initializer[0].dims[:]
    model.graph.sparse_initializer[0].dims.extend([2, 2])
    with pytest.raises(ModelError, match="damaged"):
        load(model)


def listed(model: onnx.ModelProto, *names: str) -> onnx.ModelProto:
    """List initializers among the inputs."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    model.graph.input.extend(
        helper.make_tensor_value_info(name, tensors[name].data_type, tensors[name].dims) for name in names
    )
    return model


LISTED = {
    ("w",): ({"h": 16, "t": 9}, {"w": 16}),
    ("v",): ({"h": 16, "t": 12}, {"v": 28}),
    ("b",): ({"h": 16, "t": 9}, {"b": 16}),
    ("u",): ({"h": 12, "t": 12}, {"u": 17}),
    ("w", "u"): ({"h": 16, "t": 12}, {"w": 16, "u": 17}),
}


@pytest.mark.parametrize("names", LISTED, ids=" ".join)
def test_a_weight_that_is_an_input_too_stays_and_is_named(names: tuple[str, ...]) -> None:
    model, (wanted, told) = listed(net(), *names), LISTED[names]
    result = lindep_onnx.compress(model, proven_only=True)
    assert widths(result.model) == wanted
    found = [(r.message, r.channels) for r in result.report.refusals if r.reason == "overridable"]
    assert {name: sum(count for message, count in found if f"{name!r}" in message) for name in names} == told
    assert result.report.before.channels == 33
    feeds = {"x": feed(net())["x"], **{name: np.float32(2) * WEIGHTS[name] for name in names if name != "u"}}
    if "u" in names:
        feeds["u"] = feed(model)["u"]
    np.testing.assert_allclose(run(result.model, feeds)[0], run(model, feeds)[0], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("budget", ["params", "macs", "size", "channels"])
def test_a_budget_that_weights_among_the_inputs_rule_out_is_not_met(budget: str) -> None:
    model = listed(net(), *WEIGHTS)
    with pytest.raises(BudgetError, match="cannot be reached"):
        lindep_onnx.compress(model, calib={"x": feed(net(), 40)["x"]}, **{budget: 0.7})


def test_before_version_4_an_input_with_a_value_is_a_constant() -> None:
    model = listed(net(), *WEIGHTS)
    model.ir_version = 3
    assert widths(lindep_onnx.compress(model, proven_only=True).model) == {"h": 12, "t": 9}


def test_a_weight_computed_from_an_input_with_a_value_is_named(tmp_path: Path) -> None:
    body = "k = Transpose<perm=[1,0]>(w)\n" + BODY.replace("(x, w, b)", "(x, k, b)")
    model = listed(build(body, {**WEIGHTS, "w": np.ascontiguousarray(WEIGHTS["w"].T)}, x=("N", 8)), "w")
    result = lindep_onnx.compress(model, proven_only=True)
    assert ("overridable", 16) in [(r.reason, r.channels) for r in result.report.refusals]
    assert widths(result.model) == {"h": 16, "t": 9}

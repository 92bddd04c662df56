"""Weights as they come: shared by several nodes, behind names of their own, of odd shapes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from build import as_array, build, run, traced
from oracle import removed_like_zeros

from lindep_onnx.api import compress
from lindep_onnx.model.ir import load
from lindep_onnx.model.working import working_copy

MLP = {"w": (4, 8), "v": (8, 4), "b": (8,), "k": (4, 3)}
BLOCK = "h{0} = MatMul(x{0}, w)\na{0} = Add(h{0}, b)\nr{0} = Relu(a{0})\no{0} = MatMul(r{0}, v)\nx{1} = Add(x{0}, o{0})"


def block(first: str = "x0 = Identity(x)") -> str:
    return "\n".join([first, BLOCK.format(0, 1), BLOCK.format(1, 2), "y = MatMul(x2, k)"])


def test_a_block_used_twice_loses_its_hidden_channels_whatever_its_uses_read() -> None:
    # The first use reads the input of the model, whose channels have no units, the second a residual sum.
    structure = removed_like_zeros(build(block(), MLP, x=("N", 4)))
    assert structure.units == 8
    assert {consumer.weight for consumer in structure.consumers} == {"v"}
    assert "shared_weight" not in {refusal.reason.code for refusal in structure.refusals}


def test_a_weight_met_by_channels_once_and_by_a_whole_input_once_keeps_what_it_reads() -> None:
    body = "h = MatMul(x, u)\nr = Relu(h)\na = MatMul(r, w)\nb = MatMul(x, w)\ns = Relu(a)\nt = Relu(b)\n"
    model = build(
        body + "p = MatMul(s, v)\nq = MatMul(t, v)\ny = Add(p, q)", {"u": (4, 4), "w": (4, 8), "v": (8, 3)}, x=("N", 4)
    )
    structure = removed_like_zeros(model)
    assert structure.units == 8  # of w; those of u meet rows of w that the input of the model needs
    assert ("shared_weight", 4) in [(refusal.reason.code, refusal.channels) for refusal in structure.refusals]


def test_a_column_that_two_products_share_is_one_weight() -> None:
    body = "h = MatMul(x, w)\na = Relu(h)\ng = MatMul(x, u)\nb = Relu(g)\np = MatMul(a, v)\nq = MatMul(b, v)\ny = Add(p, q)"
    structure = removed_like_zeros(build(body, {"w": (4, 8), "u": (4, 8), "v": (8, 1)}, x=("N", 4)))
    assert structure.units == 8
    (consumer,) = structure.consumers
    assert len(consumer.readers) == 2


def test_a_column_that_is_multiplied_once_and_scales_once_takes_no_fold() -> None:
    body = "h = MatMul(x, w)\na = Relu(h)\nz = Unsqueeze(a, i)\np = MatMul(a, v)\nq = Mul(z, v)\nr = Squeeze(q, i)\n"
    weights = {"w": (4, 8), "v": (8, 1), "k": (8, 3), "i": np.array([2])}
    model = build(body + "s = MatMul(r, k)\ny = Concat<axis=1>(p, s)", weights, x=("N", 4))
    assert not traced(model).units


# ---- one initializer under several names ----------------------------------------------------------------------------


def named_anew(model: onnx.ModelProto, op: str = "Identity", **attributes: object) -> onnx.ModelProto:
    """The same model with a node of its own before every use of a weight; `op` has to undo itself."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    stored = {tensor.name: tensor for tensor in copy.graph.initializer}
    nodes = []
    for node in copy.graph.node:
        for place, name in enumerate(node.input):
            if name in stored:
                node.input[place] = f"{name}_{len(nodes)}"
                nodes.append(onnx.helper.make_node(op, [name], [node.input[place]], **attributes))
        nodes.append(onnx.NodeProto.FromString(node.SerializeToString()))
    del copy.graph.node[:]
    copy.graph.node.extend(nodes)
    if op == "Transpose":
        for tensor in stored.values():
            tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor).T.copy(), tensor.name))
    return copy


@pytest.mark.parametrize("op", ["Identity", "Transpose", "Cast"])
def test_names_of_its_own_for_each_use_make_no_second_weight(op: str) -> None:
    plain = build(block(), planted(), x=("N", 4))
    model = named_anew(plain, op, **({"to": 1} if op == "Cast" else {}))
    data = np.random.default_rng(0).normal(size=(2000, 4)).astype(np.float32)
    results = [compress(one, data, round_to=1) for one in (plain, model)]
    assert [sum(group.removed for group in result.report.groups) for result in results] == [3, 3]
    assert results[0].report.after.parameters == results[1].report.after.parameters
    for result in results:
        onnx.checker.check_model(result.model, full_check=True)
        np.testing.assert_allclose(
            *(run(one, {"x": data[:9]})[0] for one in (plain, result.model)), rtol=1e-5, atol=1e-6
        )


def planted() -> dict[str, np.ndarray]:
    """Weights of `block` with 3 of 8 hidden channels copies of others."""
    weights = {name: as_array(name, shape) for name, shape in MLP.items()}
    for name, axis in (("w", 1), ("b", 0)):
        weights[name] = np.concatenate([weights[name].take(range(5), axis), weights[name].take(range(3), axis)], axis)
    return weights


def test_what_is_known_by_a_second_name_outside_keeps_that_name() -> None:
    body = "w2 = Identity(w)\nh = MatMul(x, w)\nr = Relu(h)\ng = MatMul(x, w2)\nq = Relu(g)\ns = Add(r, q)\ny = MatMul(s, v)"
    model = working_copy(load(build(body, {"w": (4, 8), "v": (8, 3)}, x=("N", 4), outputs="y w2")))
    assert [node.op for node in model.nodes].count("Identity") == 1 and len(model.consumers["w"]) == 3
    model = build(body, {"w": (4, 8), "v": (8, 3)}, x=("N", 4))
    assert [node.op for node in working_copy(load(model)).nodes].count("Identity") == 0


def test_a_model_whose_weights_have_several_names_comes_back_as_it_was_if_nothing_goes() -> None:
    model = named_anew(build(block(), MLP, x=("N", 4)))
    result = compress(model, np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)).model
    del result.metadata_props[:]
    assert result == model

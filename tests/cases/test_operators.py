"""Operators as they come: odd axes, unknown ranks, operators of ONNX Runtime."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
from build import build, traced
from oracle import removed_like_zeros

from lindep_onnx.model.cost import cost
from lindep_onnx.model.ir import load
from lindep_onnx.model.node import Node
from lindep_onnx.model.shapes import resolve
from lindep_onnx.moves.prices import savings
from lindep_onnx.structure.rules import registry
from lindep_onnx.structure.trace import trace
from lindep_onnx.structure.tracer import Tracer


def codes(model: onnx.ModelProto) -> dict[str, int]:
    """How many channels each reason costs."""
    found: Counter[str] = Counter()
    for refusal in traced(model).refusals:
        found[refusal.reason.code] += refusal.channels
    return dict(found)


@pytest.mark.parametrize("node", ["Conv", "ConvTranspose"])
def test_channels_on_the_batch_axis_of_a_convolution_pass_it(node: str) -> None:
    body = f"h = Conv(x, w)\nt = Transpose<perm=[1,0,2,3]>(h)\nc = {node}(t, k)\nu = Transpose<perm=[1,0,2,3]>(c)\n"
    weights = {"w": (8, 3, 1, 1), "k": (2, 2, 1, 1), "v": (4, 8, 1, 1), "q": (5, 8, 1, 1)}
    model = build(body + "y = Conv(u, v)\nz = Conv(h, q)", weights, x=(2, 3, 4, 4), outputs="y z")
    assert removed_like_zeros(model).units == 8


def unknown_rank(body: str, weights: dict, outputs: str) -> onnx.ModelProto:
    """A model in which the rank of tensor u is unknown: it goes through an operator that inference does not know."""
    body = body.replace("u = Hidden(h)", "u = custom.Hidden(h)")
    nodes = [onnx.parser.parse_node(line) for line in body.splitlines()]
    graph = onnx.helper.make_graph(
        nodes,
        "test",
        [onnx.helper.make_tensor_value_info("x", 1, ("N", 4)), onnx.helper.make_tensor_value_info("e", 1, None)],
        [onnx.helper.make_empty_tensor_value_info(name) for name in outputs.split()],
        [onnx.numpy_helper.from_array(np.ones(shape, np.float32), name) for name, shape in weights.items()],
    )
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("custom", 1)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8)


def test_what_a_reduction_of_unknown_rank_reads_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def spread(node: Node, tracer: Tracer) -> None:
        tracer.label(node.outputs[0], tracer.labels[node.inputs[0]])

    monkeypatch.setitem(registry._TRACING, "custom::Hidden", spread)
    body = "h = MatMul(x, w)\nu = Hidden(h)\nr = ReduceMean(u)\ny = MatMul(h, v)"
    model = unknown_rank(body, {"w": (4, 8), "v": (8, 3)}, "y r")
    assert codes(model)["unknown_rank"] == 8


def test_an_axis_that_a_rule_says_nothing_about_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._TRACING, "Softsign", lambda node, tracer: None)
    model = build(
        "h = MatMul(x, w)\ns = Softsign(h)\ny = MatMul(h, v)", {"w": (4, 8), "v": (8, 3)}, x=("N", 4), outputs="y s"
    )
    assert codes(model)["not_followed"] == 8
    monkeypatch.undo()
    assert codes(model) == {"graph_output": 11}


def test_a_constant_beside_an_operand_of_unknown_size_is_sliced_like_the_rest() -> None:
    body = "h = MatMul(x, w)\nt = Concat<axis=1>(h, c, e)\ny = MatMul(t, v)"
    weights = {"w": (4, 8), "c": np.ones((3, 2, 8), np.float32), "v": (8, 3)}
    model = build(body, weights, x=(3, "T", 4), inputs={"e": (3, "S", 8)})
    assert codes(model) == {"unlabelled_operand": 8, "graph_output": 3}
    body = "h = MatMul(x, w)\ng = MatMul(e, u)\nt = Concat<axis=1>(h, c, g)\ny = MatMul(t, v)"
    model = build(body, {**weights, "u": (4, 8)}, x=(3, "T", 4), inputs={"e": (3, "S", 4)})
    assert removed_like_zeros(model).units == 8


@pytest.mark.parametrize(
    ("body", "weight", "channels"),
    [
        ("y = Gemm(x, v)", (8, 5), 5),
        ("y = Gemm<transB=1>(x, v)", (5, 8), 5),
        ("y = MatMul(x, v)", (8, 5), 5),
        ("y = Conv<group=2>(x, v)", (6, 4, 1, 1), 6),
        ("y = ConvTranspose<group=2>(x, v)", (8, 3, 1, 1), 6),
    ],
)
def test_a_quantised_model_counts_all_channels_that_stay(body: str, weight: tuple, channels: int) -> None:
    weights = {"q": np.ones(weight, np.int8), "s": np.float32(0.5), "z": np.int8(0)}
    size = ("N", 8, *weight[2:]) if len(weight) == 4 else ("N", 8)
    model = build("v = DequantizeLinear(q, s, z)\n" + body, weights, x=size)
    assert codes(model) == {"quantised": channels}


# ---- multiply-accumulates -------------------------------------------------------------------------------------------

RECURRENT = [
    (op, gates, directions, layout)
    for op, gates in (("RNN", 1), ("GRU", 3), ("LSTM", 4))
    for directions, layout in ((1, 0), (2, 0), (1, 1))
]


@pytest.mark.parametrize(("op", "gates", "directions", "layout"), RECURRENT)
def test_every_step_of_a_recurrent_layer_counts(op: str, gates: int, directions: int, layout: int) -> None:
    state, width, steps, batch = 5, 8, 7, 2
    options = f'hidden_size={state}, layout={layout}, direction="{("forward", "bidirectional")[directions - 1]}"'
    weights = {"w": (6, width), "k": (directions, gates * state, width), "r": (directions, gates * state, state)}
    size = (batch, steps, 6) if layout else (steps, batch, 6)
    model = load(build(f"h = MatMul(x, w)\n, y = {op}<{options}>(h, k, r)", weights, x=size))
    own = steps * directions * gates * state * (width + state)
    assert cost(model, {}, batch).macs == own + steps * 6 * width
    structure = trace(model, resolve(model))
    assert structure.units == width
    saved = savings(structure, "macs")  # of one sample; what comes before it is priced by its own positions
    assert (saved >= steps * directions * gates * state).all()


def test_an_einsum_counts_as_the_product_that_it_is() -> None:
    model = load(build('y = Einsum<equation="bti,io->bto">(x, w)', {"w": (6, 5)}, x=(2, 4, 6)))
    assert cost(model, {}, 2).macs == 4 * 6 * 5

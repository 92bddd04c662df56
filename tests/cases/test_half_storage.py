"""Weights that are stored in half precision and widened by a Cast before use stay so."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
from build import as_array, build, run
from onnx import TensorProto

from lindep_onnx.api import compress

MLP = {"w": (12, 16), "b": (16,), "v": (16, 24), "c": (24,), "k": (24, 5)}
BODY = "h = MatMul(x, {w})\na = Add(h, {b})\nr = Relu(a)\ng = MatMul(r, {v})\nd = Add(g, {c})\ns = Relu(d)\ny = MatMul(s, {k})"
#: What leads from a stored weight to what is multiplied, and whether it is stored transposed.
CHAINS = {
    "Cast": ("{0}_f = Cast<to=1>({0})", False),
    "Cast of a name": ("{0}_n = Identity({0})\n{0}_f = Cast<to=1>({0}_n)", False),
    "Transpose, Cast": ("{0}_t = Transpose({0})\n{0}_f = Cast<to=1>({0}_t)", True),
    "Cast, Transpose": ("{0}_t = Cast<to=1>({0})\n{0}_f = Transpose({0}_t)", True),
}
KINDS = {TensorProto.FLOAT16: np.float16, TensorProto.BFLOAT16: ml_dtypes.bfloat16}


def stored_in_half(chain: str, kind: int = TensorProto.FLOAT16, copies: int = 4) -> onnx.ModelProto:
    """A net with planted copies whose weights are all in half precision, and its nodes in single precision."""
    lines, transposed = CHAINS[chain]
    weights = {name: as_array(name, shape) for name, shape in MLP.items()}
    for name, axis in (("w", 1), ("b", 0)):
        weights[name] = np.concatenate(
            [weights[name].take(range(16 - copies), axis), weights[name].take(range(copies), axis)], axis
        )
    casts = "\n".join(lines.format(name) for name in MLP)
    weights = {name: (value.T if transposed else value).astype(KINDS[kind]) for name, value in weights.items()}
    return build(casts + "\n" + BODY.format(**{name: f"{name}_f" for name in MLP}), weights, x=("N", 12))


def rows(count: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, 12)).astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize(
    "options", [{}, {"params": 0.7}, {"params": 0.7, "refit": "fold"}], ids=["lossless", "refit", "fold"]
)
def test_what_is_written_is_stored_in_half_with_a_cast(chain: str, kind: int, options: dict) -> None:
    model = stored_in_half(chain, kind)
    result = compress(model, rows(400), **options)
    onnx.checker.check_model(result.model, full_check=True)
    assert {tensor.data_type for tensor in result.model.graph.initializer} == {kind}
    before, after = result.report.before, result.report.after
    assert after.parameters < before.parameters and after.bytes < before.bytes
    error = np.abs(np.subtract(*(run(one, {"x": rows(9)})[0] for one in (model, result.model)))).max()
    assert error <= (0.02 if kind == TensorProto.FLOAT16 else 0.1) if not options else error < 3


def test_exactly_the_copies_go() -> None:
    result = compress(stored_in_half("Cast"), rows(400))
    assert [group.removed for group in result.report.groups] == [4, 0]
    assert [node.op_type for node in result.model.graph.node].count("Cast") == 5


def test_a_constant_node_in_half_keeps_its_type() -> None:
    model = stored_in_half("Cast")
    nodes = [onnx.helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in model.graph.initializer]
    nodes += model.graph.node
    del model.graph.initializer[:], model.graph.node[:]
    model.graph.node.extend(nodes)
    result = compress(model, rows(400))
    onnx.checker.check_model(result.model, full_check=True)
    assert [group.removed for group in result.report.groups] == [4, 0]
    stored = [*(node.attribute[0].t for node in result.model.graph.node if node.op_type == "Constant")]
    assert {tensor.data_type for tensor in (*stored, *result.model.graph.initializer)} == {TensorProto.FLOAT16}
    assert result.report.after.bytes < result.report.before.bytes


def test_nothing_changes_where_nothing_goes() -> None:
    model = stored_in_half("Cast", copies=0)
    result = compress(model, rows(400)).model
    del result.metadata_props[:]
    assert result.SerializeToString(deterministic=True) == model.SerializeToString(deterministic=True)

"""Models that draw random numbers are compared with fixed ones in their place."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from build import build, copied, run

import lindep_onnx
from lindep_onnx.model.ir import load
from lindep_onnx.model.randomness import repeatable

W, A = copied("w", (8, 16), 1, 4), copied("a", (4, 16), 1, 4)


def drawing(draw: str, opset: int = 17) -> onnx.ModelProto:
    """A variational net: noise goes between two layers, each with four copies among 16 channels."""
    body = f"h = MatMul(x, w)\nr = Relu(h)\nm = MatMul(r, u)\ng = Sigmoid(m)\n{draw}\nz = Mul(m, e)\nk = MatMul(z, a)\nq = Relu(k)\ny = MatMul(q, b)"
    return build(body, {"w": W, "u": (16, 4), "a": A, "b": (16, 8)}, x=("N", 8), opset=opset)


DRAWS = {
    "normal": "e = RandomNormalLike(m)",
    "normal of a type": "e = RandomNormalLike<dtype=1,mean=2.0,scale=0.5>(m)",
    "uniform": "e = RandomUniformLike<low=-1.0,high=2.0>(m)",
    "of a fixed shape": "e = RandomNormal<shape=[4]>()",
    "uniform of a fixed shape": "e = RandomUniform<shape=[1,4]>()",
    "bernoulli": "e = Bernoulli(g)",
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS.keys())
@pytest.mark.parametrize("options", [{}, {"params": 0.7}], ids=str)
def test_a_model_that_draws_is_compressed_and_the_report_says_how_it_was_compared(draw: str, options: dict) -> None:
    model = drawing(draw)
    x = np.random.default_rng(0).normal(size=(90, 8)).astype(np.float32)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert not np.array_equal(session.run(None, {"x": x})[0], session.run(None, {"x": x})[0])
    result = lindep_onnx.compress(model, calib=x, **options)
    assert any("fixed ones in their place" in note for note in result.report.notes)
    assert result.report.before.channels - result.report.after.channels >= 8 and result.report.verification.passed
    kinds = {node.op_type for node in result.model.graph.node}
    assert onnx.parser.parse_node(draw).op_type in kinds and "Range" not in kinds


@pytest.mark.parametrize("opset", [11, 13, 15, 18])
@pytest.mark.parametrize(
    ("draw", "mean", "variance"),
    [
        ("e = RandomNormalLike(x)", 0, 1),
        ("e = RandomNormalLike<mean=2.0,scale=0.5>(x)", 2, 0.25),
        ("e = RandomUniformLike<low=-1.0,high=2.0>(x)", 0.5, 0.75),
    ],
)
def test_fixed_numbers_are_spread_like_random_ones(opset: int, draw: str, mean: float, variance: float) -> None:
    fixed = repeatable(build(draw + "\ny = Identity(e)", {}, x=("N", 50), opset=opset))
    values = [run(fixed, {"x": np.zeros((400, 50), np.float32)})[0] for _ in range(2)]
    np.testing.assert_array_equal(*values)
    assert abs(values[0].mean() - mean) < 0.02 and abs(values[0].var() - variance) < 0.03 * variance + 0.01
    assert abs(np.corrcoef(values[0][:, 0], values[0][:, 1])[0, 1]) < 0.15
    assert np.isfinite(values[0]).all()


def test_a_chance_is_kept() -> None:
    fixed = repeatable(build("e = Bernoulli(x)\ny = Identity(e)", {}, x=("N", 50)))
    for chance in (0.0, 0.3, 1.0):
        drawn = run(fixed, {"x": np.full((200, 50), chance, np.float32)})[0]
        assert set(np.unique(drawn)) <= {0, 1} and abs(drawn.mean() - chance) < 0.02


def test_what_cannot_be_fixed_is_said() -> None:
    body = "l = Log(x)\nd = Multinomial(l)\ny = Cast<to=1>(d)"
    assert "cannot be fixed (Multinomial)" in load(build(body, {}, x=("N", 5))).notes[0]
    old = build("e = RandomNormalLike(x)\ny = Add(x, e)", {}, x=("N", 5), opset=9)
    assert "cannot be fixed (RandomNormalLike)" in load(old).notes[0] and repeatable(old) is old


def test_a_model_that_draws_nothing_is_left_as_it_is() -> None:
    model = build("y = Relu(x)", {}, x=("N", 5))
    assert repeatable(model) is model and not load(model).notes

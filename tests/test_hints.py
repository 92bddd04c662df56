"""What a smaller model learns from the inside of its original: the right channels, and only where branches are added."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from build import build, initializer, run, traced, with_initializer

from lindep_onnx import graph
from lindep_onnx.config import Effort
from lindep_onnx.data import InputSpec, Samples, open_samples
from lindep_onnx.hints import Hint, hints
from lindep_onnx.recover import Recovered, recover
from lindep_onnx.rewrite import Reconstruction, rewrite

BODY = """
a = Conv<pads=[1,1,1,1]>(x, w0, b0)
r = Relu(a)
c = Conv<pads=[1,1,1,1]>(r, w1, b1)
sum = Add(r, c)
s = Relu(sum)
g = GlobalAveragePool(s)
h = Flatten(g)
m = Gemm(h, w2, b2)
y = Add(m, b3)
"""
WEIGHTS = {
    "w0": (12, 3, 3, 3), "b0": (12,), "w1": (12, 12, 3, 3), "b1": (12,), "w2": (12, 4), "b2": (4,), "b3": (4,)
}  # fmt: skip
#: Channels of the sum that are never awake, so that they can go without loss.
SILENT = (0, 3, 7)


@pytest.fixture(scope="module")
def teacher() -> onnx.ModelProto:
    weights = {name: initializer(build(BODY, WEIGHTS, x=("N", 3, 6, 6)), name) for name in WEIGHTS}
    for name in ("w0", "b0", "w1", "b1"):
        weights[name] = weights[name].copy()
        weights[name][list(SILENT)] = 0
    return build(BODY, weights, x=("N", 3, 6, 6))


def cut(teacher: onnx.ModelProto) -> tuple[np.ndarray, onnx.ModelProto]:
    channels = traced(teacher)
    (label,) = channels.labels["sum"]
    removed = np.zeros(channels.units, dtype=bool)
    removed[channels.unit[label.along_cut()[list(SILENT)]]] = True
    return removed, rewrite(channels, Reconstruction(removed), "")


def inside(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    other = onnx.ModelProto()
    other.CopyFrom(model)
    other.graph.output.append(onnx.helper.make_tensor_value_info("sum", onnx.TensorProto.FLOAT, None))
    return run(other, {"x": x})[1]


def test_a_hint_pairs_the_channels_that_survive_with_those_of_the_original(teacher: onnx.ModelProto) -> None:
    removed, student = cut(teacher)
    (hint,) = hints(traced(teacher), removed, graph.load(student))
    assert hint.tensor == "sum" and hint.axis == 1 and hint.kept is not None  # neither the biased output nor a Conv
    x = np.random.default_rng(1).normal(size=(5, 3, 6, 6)).astype(np.float32)
    before, after = inside(teacher, x), inside(student, x)
    np.testing.assert_allclose(before[:, hint.kept], after, rtol=1e-5, atol=1e-5)
    assert not np.allclose(before[:, np.roll(hint.kept, 1)], after, rtol=1e-2)
    (whole,) = hints(traced(teacher), np.zeros_like(removed), graph.load(teacher))
    assert whole.kept is None


def test_a_model_without_branches_has_no_hints() -> None:
    plain = build(
        "a = Gemm(x, w0)\nr = Relu(a)\nz = Gemm(r, w1)\ny = Add(z, z)", {"w0": (4, 6), "w1": (6, 3)}, x=("N", 4)
    )
    channels = traced(plain)
    assert not hints(channels, np.zeros(channels.units, dtype=bool), graph.load(plain))


def samples() -> Samples:
    x = np.random.default_rng(0).normal(size=(48, 3, 6, 6)).astype(np.float32)
    spec = InputSpec("x", np.dtype(np.float32), ("N", 3, 6, 6))
    return open_samples({"x": x}, [spec], seed=0, holdout=0.3, max_samples=None, batch_size=16)


def trained(teacher: onnx.ModelProto, student: onnx.ModelProto, told: tuple[Hint, ...]) -> Recovered:
    with samples() as data:
        return recover(
            teacher, graph.load(student), data, Effort(steps=80), hints=told,
            providers=["CPUExecutionProvider"], threads=1, seed=0, progress=lambda *_: None,
        )  # fmt: skip


def test_hints_bring_inner_tensors_back_and_do_not_judge(teacher: onnx.ModelProto) -> None:
    removed, student = cut(teacher)
    value = initializer(student, "w1")
    noise = np.random.default_rng(7).normal(size=value.shape) * value.std()
    worn = with_initializer(student, "w1", value + 0.5 * noise)
    told = hints(traced(teacher), removed, graph.load(worn))
    x = np.random.default_rng(9).normal(size=(60, 3, 6, 6)).astype(np.float32)
    wanted = inside(student, x)
    errors, found = [], [trained(teacher, worn, ()), trained(teacher, worn, told)]
    for one in found:
        result = graph.edit(graph.load(worn), graph.Edits(constants=one.weights), "")
        errors.append(float(np.linalg.norm(inside(result, x) - wanted)))
    assert errors[1] < 0.8 * errors[0]
    assert found[0].before == pytest.approx(found[1].before, rel=1e-5)  # the held-out loss is of outputs
    again = trained(teacher, worn, told)
    assert all(np.array_equal(value, found[1].weights[name]) for name, value in again.weights.items())

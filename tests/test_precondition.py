"""Directions of products against ONNX Runtime: what a step changes, and where none is measured."""

from __future__ import annotations

import numpy as np
import pytest
from build import build, initializer, run, traced, with_initializer

from lindep_onnx import graph, precondition
from lindep_onnx.config import Effort
from lindep_onnx.data import InputSpec, Part, Samples, open_samples
from lindep_onnx.precondition import DAMPING, Layer, measured
from lindep_onnx.recover import recover

RUNTIME = {"providers": ["CPUExecutionProvider"], "threads": 1}
CASES = [
    ("strides, pads and dilations", "y = Conv<strides=[2,1], pads=[1,0,2,1], dilations=[1,2]>(x, w, b)", {"w": (6, 4, 3, 2), "b": (6,)}, (4, 7, 6), 1, 1),
    ("groups", "y = Conv<group=2>(x, w, b)", {"w": (6, 2, 2, 2), "b": (6,)}, (4, 5, 4), 2, 1),
    ("depthwise, no bias", "y = Conv<group=4, pads=[1,1,1,1]>(x, w)", {"w": (8, 1, 3, 3)}, (4, 5, 4), 4, 1),
    ("transposed", "y = ConvTranspose<strides=[2,2], pads=[1,0,0,1], group=2>(x, w, b)", {"w": (4, 3, 3, 3), "b": (6,)}, (4, 4, 5), 2, 1),
    ("Gemm", "r = Reshape(x, s)\ny = Gemm<alpha=0.5, beta=3.0, transB=1>(r, w, b)", {"w": (6, 4), "b": (6,), "s": np.array([-1, 4])}, (5, 4), 1, 1),
    ("MatMul and Add", "z = MatMul(x, w)\ny = Add(b, z)", {"w": (4, 6), "b": (6,)}, (5, 4), 1, 2),
    ("MatMul from the left", "z = MatMul(w, x)\ny = Add(z, b)", {"w": (6, 4), "b": (6, 1)}, (4, 5), 1, 1),
]  # fmt: skip


def samples(shape: tuple[int, ...], count: int = 60) -> Samples:
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(count, *shape)) + rng.normal(size=(count, *(1,) * len(shape))) + 1).astype(np.float32)
    spec = InputSpec("x", np.dtype(np.float32), ("N", *shape))
    return open_samples({"x": x}, [spec], seed=0, holdout=0.3, max_samples=None, batch_size=16)


def layers(model, shape: tuple[int, ...], trained: set[str]) -> tuple[Layer, ...]:
    with samples(shape) as data:
        return measured(traced(model), data, trained, rng=np.random.default_rng(0), **RUNTIME)


def outputs(model, shape: tuple[int, ...]) -> np.ndarray:
    with samples(shape) as data:
        return np.concatenate([run(model, dict(batch.feeds))[0] for batch in data.batches(Part.FIT)]).astype(np.float64)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_a_direction_is_measured_by_what_the_outputs_change(case: tuple) -> None:
    _, body, weights, shape, groups, channels = case
    model = build(body, weights, x=("N", *shape))
    trained = weights.keys() - {"s"}
    (layer,) = layers(model, shape, trained)
    assert set(layer.names) == trained and len(layer.inverse) == groups
    y = outputs(model, shape)
    np.testing.assert_allclose(layer.size, np.sqrt(np.mean(np.square(y))), rtol=1e-5)
    rng = np.random.default_rng(5)
    gradients = {name: rng.normal(size=initializer(model, name).shape).astype(np.float32) for name in sorted(trained)}
    direction, power = layer.direction(gradients)
    moved = model
    for name, step in direction.items():
        moved = with_initializer(moved, name, initializer(model, name) + step)
    changed = np.mean(np.square(outputs(moved, shape) - y))
    width = layer.inverse.shape[1] - ("b" in weights)
    moments = np.linalg.inv(layer.inverse.astype(np.float64))[:, range(width), range(width)]
    damping = (moments.mean(axis=1) * DAMPING / (1 + DAMPING))[:, None]

    def damped(step: np.ndarray) -> float:
        return float((np.square(step.reshape(groups, -1)) * damping).sum()) / y.shape[channels]

    np.testing.assert_allclose(changed + damped(direction["w"]), power, rtol=2e-3)
    assert abs(changed - power) > 1e-3 * power  # the damping shows
    # Of all directions that change the outputs as much, none goes down as far.
    down = sum(float(np.vdot(gradients[name], step)) for name, step in direction.items())
    for _ in range(20):
        other = {name: step + 0.3 * step.std() * rng.normal(size=step.shape) for name, step in direction.items()}
        there = model
        for name, step in other.items():
            there = with_initializer(there, name, initializer(model, name) + step.astype(np.float32))
        measure = np.mean(np.square(outputs(there, shape) - y)) + damped(other["w"])
        least = sum(float(np.vdot(gradients[name], step)) for name, step in other.items())
        assert least / np.sqrt(measure) < down / np.sqrt(power)


def test_the_inverse_is_that_of_the_moments_of_patches() -> None:
    model = build("y = Conv(x, w, b)", {"w": (3, 2, 2, 2), "b": (3,)}, x=("N", 2, 3, 3))
    (layer,) = layers(model, (2, 3, 3), {"w", "b"})
    with samples((2, 3, 3)) as data:
        x = np.concatenate([batch.feeds["x"] for batch in data.batches(Part.FIT)]).astype(np.float64)
    patches = np.concatenate([x[:, :, i : i + 2, j : j + 2].reshape(len(x), -1) for i in (0, 1) for j in (0, 1)])
    patches = np.concatenate([patches, np.ones((len(patches), 1))], axis=1)
    moments = patches.T @ patches / len(patches)
    damped = moments + np.diag([DAMPING * np.diag(moments)[:-1].mean()] * 8 + [0.0])
    np.testing.assert_allclose(layer.inverse[0] @ damped, np.eye(9), atol=1e-4)
    assert not np.allclose(layer.inverse[0] @ moments, np.eye(9), atol=1e-3)


def test_what_cannot_be_measured_steps_like_any_other_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    body = "a = MatMul(x, v)\nr = Relu(a)\nc = MatMul(r, v)\ns = Add(c, q)\nm = MatMul(s, w)\ny = Add(m, q)"
    model = build(body, {"v": (4, 4), "w": (4, 4), "q": (4,)}, x=("N", 5, 4))
    (layer,) = layers(model, (5, 4), {"v", "w", "q"})  # v is multiplied twice, q added twice
    assert layer.names == ("w",) and layer.inverse.shape == (1, 4, 4)
    assert not layers(model, (5, 4), {"q"})
    monkeypatch.setattr(precondition, "WIDEST", 4)
    assert not layers(model, (5, 4), {"v", "w", "q"})


@pytest.mark.parametrize(("shape", "layers_found"), [((40,), 0), ((2, 40), 0), ((3, 40), 1), ((4,), 0)])
def test_a_step_that_sees_few_rows_is_left_to_adam(shape: tuple[int, ...], layers_found: int) -> None:
    model = build("y = MatMul(x, w)", {"w": (shape[-1], 4)}, x=("N", *shape))
    assert len(layers(model, shape, {"w"})) == layers_found  # 16 samples make a step


def test_an_input_that_is_dead_moves_nothing_and_a_constant_one_is_a_single_row() -> None:
    body = "z = Mul(x, zero)\ng = MatMul(z, w)\na = Add(g, b)\nk = Relu(c)\nm = MatMul(k, v)\ny = Add(a, m)"
    weights = {"w": (4, 3), "b": (3,), "zero": np.zeros(1, np.float32), "c": (1, 1, 4), "v": (4, 3)}
    (dead,) = layers(build(body, weights, x=("N", 5, 4)), (5, 4), {"w", "b", "v"})
    direction, _ = dead.direction({"w": np.zeros((4, 3), np.float32), "b": np.ones(3, np.float32)})
    np.testing.assert_allclose(direction["b"], np.ones(3), rtol=1e-5)
    assert not direction["w"].any()


def test_training_gets_further_where_channels_depend_on_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """What all 16 inputs have in common is ten times what tells them apart."""
    rng = np.random.default_rng(1)
    x = (rng.normal(size=(200, 3, 16)) + 10 * rng.normal(size=(200, 3, 1))).astype(np.float32)
    teacher = build("y = MatMul(x, w)", {"w": (16, 4)}, x=("N", 3, 16))
    w = initializer(teacher, "w")
    student = with_initializer(teacher, "w", w * (1 + 0.5 * rng.normal(size=w.shape).astype(np.float32)))
    spec = InputSpec("x", np.dtype(np.float32), ("N", 3, 16))

    def left() -> float:
        with open_samples({"x": x}, [spec], seed=0, holdout=0.3, max_samples=None, batch_size=16) as data:
            found = recover(
                graph.load(teacher), graph.load(student), data, Effort(steps=300), seed=0,
                progress=lambda *_: None, **RUNTIME,
            )  # fmt: skip
        return found.after / found.before

    by_outputs = left()
    monkeypatch.setattr("lindep_onnx.recover.measured", lambda *_, **__: ())
    assert by_outputs < 0.3 * left()

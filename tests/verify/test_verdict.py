"""What outputs hold by the graph, and which results are near chance."""

from __future__ import annotations

import numpy as np
import pytest
from build import build

from lindep_onnx.model.ir import load
from lindep_onnx.verify.metrics import Comparison, OutputErrors
from lindep_onnx.verify.outputs import held
from lindep_onnx.verify.verdict import near_chance

EMBEDDING, DECISIONS = {"y": "embedding"}, {"y": "decisions"}
WEIGHTS = {"w": (6, 5), "one": np.float32(1), "gamma": (5,), "last": np.array([-1])}
NORM = "n = ReduceL2<axes=[1], keepdims=1>(h)\n"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("y = Softmax<axis=1>(h)", {}),
        ("y = Add(h, gamma)", {}),
        ("y = LpNormalization<axis=1, p=2>(h)", EMBEDDING),
        (NORM + "y = Div(h, n)", EMBEDDING),
        (NORM + "c = Clip(n, one)\ne = Div(h, c)\ny = Mul(e, one)", EMBEDDING),
        ("s = ReduceSumSquare<axes=[1]>(h)\nr = Sqrt(s)\nq = Reciprocal(r)\ny = Mul(h, q)", EMBEDDING),
        ("e = Exp(h)\ns = ReduceSum(e, last)\ny = Div(e, s)", {}),  # a Softmax in single operators
        ("l = LayerNormalization<axis=-1>(h, gamma)\ny = Cast<to=1>(l)", EMBEDDING),
        ("l = LayerNormalization<axis=-1>(h, gamma)\nt = Transpose(w)\ny = MatMul(l, t)", {}),  # a head behind it
        ("s = Sigmoid(h)\ny = Mul(h, s)", {}),
        ("y = ArgMax<axis=1>(h)", DECISIONS),
        (NORM + "a = Div(h, n)\nt = Transpose(w)\ny = MatMul(a, t)", {}),  # scores: products of two embeddings
    ],
)
def test_embeddings_are_behind_a_normalization_or_a_pooling(body: str, expected: dict[str, str]) -> None:
    assert held(load(build("h = MatMul(x, w)\n" + body, WEIGHTS, x=("N", 6)))) == expected


@pytest.mark.parametrize("pooling", ["GlobalAveragePool(h)", "AveragePool<kernel_shape=[8,8]>(h)", "ReduceMean(h)"])
def test_a_pooling_before_the_head_makes_no_embedding(pooling: str) -> None:
    body = f"h = Conv(x, w)\np = {pooling}\nf = Flatten(p)\n"
    assert held(load(build(body + "y = Identity(f)", {"w": (5, 3, 1, 1)}))) == EMBEDDING
    if not pooling.startswith("Reduce"):
        assert held(load(build(body + "y = MatMul(f, v)", {"w": (5, 3, 1, 1), "v": (5, 4)}))) == {}


def test_tokens_are_pooled_by_the_sum_of_a_mask() -> None:
    body = "h = MatMul(x, w)\ns = ReduceSum(h, one)\nm = ReduceSum(mask, one)\nc = Clip(m, low)\ny = Div(s, c)"
    weights = {"w": (6, 5), "one": np.array([1]), "low": np.float32(1e-9)}
    model = build(body, weights, x=("N", 7, 6), inputs={"mask": ("N", 7, 1)})
    assert held(load(model)) == EMBEDDING


# ---- near chance ------------------------------------------------------------------------------------------------


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(3)


def compared(y: np.ndarray, other: np.ndarray, holds: str = "", batch: int = 8) -> Comparison:
    errors = OutputErrors(holds={"y": holds} if holds else {})
    for start in range(0, len(y), batch):
        errors.update({"y": y[start : start + batch]}, {"y": other[start : start + batch]}, None)
    return errors.result()


def test_class_scores_are_near_chance_with_most_of_their_decisions(rng: np.random.Generator) -> None:
    y = rng.normal(size=(40, 10))
    assert near_chance(compared(y, y + 0.2 * rng.normal(size=y.shape))) is None
    for moved, clause in ((20, None), (21, "keeps the predicted class on 19 of 40 held-out samples")):
        other = y.copy()
        other[:moved] = np.roll(y[:moved], 1, axis=1)
        assert near_chance(compared(y, other)) == clause


def test_a_picture_is_no_map_of_classes(rng: np.random.Generator) -> None:
    gray = np.repeat(rng.uniform(size=(12, 1, 8, 8)), 3, axis=1)
    y, other = (gray + 1e-3 * rng.normal(size=gray.shape) for _ in range(2))
    found = compared(y, other)
    assert found.agreement is not None and found.agreement < 0.5 and near_chance(found) is None
    clause = near_chance(compared(y, rng.uniform(size=y.shape)))
    assert clause is not None and "% of the positions of 12 held-out samples" in clause


def test_an_embedding_is_judged_by_its_direction(rng: np.random.Generator) -> None:
    y = rng.normal(size=(30, 64))
    turned = 0.4 * y + rng.normal(size=y.shape)
    assert near_chance(compared(y, 3 * y + 0.5 * rng.normal(size=y.shape), "embedding")) is None
    found = compared(y, turned, "embedding")
    cosines = (y * turned).sum(1) / np.linalg.norm(y, axis=1) / np.linalg.norm(turned, axis=1)
    (output,) = found.outputs
    assert found.agreement is None and output.mean_cosine == pytest.approx(cosines.mean())
    assert output.worst_cosine == pytest.approx(cosines.min())
    assert near_chance(found) == f"gives 'y' with a mean cosine of {cosines.mean():.2g} to the original's"


def test_embeddings_that_all_point_the_same_way_are_told_apart(rng: np.random.Generator) -> None:
    y = 3 + rng.normal(size=(60, 64))
    found = compared(y, np.broadcast_to(y.mean(0), y.shape), "embedding")
    clause = near_chance(found)
    assert (
        found.outputs[0].mean_cosine > 0.9
        and clause is not None
        and "what the direction of output 'y' varies by" in clause
    )
    assert near_chance(compared(y, y + 0.5 * rng.normal(size=y.shape), "embedding")) is None


def test_an_answer_that_ignores_the_input_is_near_chance_whatever_its_offset(rng: np.random.Generator) -> None:
    y = 1000 + rng.normal(size=(200, 7, 3)) * np.array([1.0, 2.0, 5.0])
    ignoring = np.broadcast_to(y.mean(0), y.shape)
    found = compared(y, ignoring)
    (output,) = found.outputs
    assert output.whole_error < 0.01 and output.centered_error == pytest.approx(1, abs=0.02)
    assert near_chance(found) == f"errs by {output.centered_error:.2g} of what output 'y' varies by"
    assert near_chance(compared(y, 0.7 * (y - 1000) + 1000)) is None


def test_a_recognizer_that_only_sees_blanks_is_near_chance(rng: np.random.Generator) -> None:
    """More classes than a slice is measured of, and one that is right at most positions: (samples, places, classes)."""
    y = np.zeros((20, 30, 5000), np.float32)
    letters = np.where(rng.random((20, 30)) < 0.8, 0, rng.integers(1, 5000, (20, 30)))
    np.put_along_axis(y, letters[..., None], 1.0, axis=2)
    blank = np.zeros_like(y)
    blank[..., 0] = 1
    found = compared(y, blank)
    assert found.outputs[0].whole_error < 0.7 and near_chance(found) is not None


def test_on_few_samples_the_mean_is_not_known(rng: np.random.Generator) -> None:
    y = 10 + 1e-3 * rng.normal(size=(4, 5, 3))
    assert near_chance(compared(y, y + 0.1)) is None and near_chance(compared(y, 0 * y)) is not None


def test_decisions_of_the_model_itself_are_counted(rng: np.random.Generator) -> None:
    y = rng.integers(0, 1000, size=30)
    other = np.where(np.arange(30) < 12, y, y + 1)
    assert near_chance(compared(y, other, "decisions")) == "changes 60.0% of the elements of output 'y'"
    assert near_chance(compared(y, other)) is None  # indices that may have moved
    assert near_chance(compared(y, np.where(np.arange(30) < 18, y, y + 1), "decisions")) is None


def test_outputs_that_never_vary_are_not_near_chance_for_rounding(rng: np.random.Generator) -> None:
    y = np.ones((20, 6)) * np.arange(1, 7)
    assert near_chance(compared(y, y * (1 + 1e-7 * rng.normal(size=y.shape)))) is None


def test_rows_that_the_data_decides_on_are_counted_and_not_judged(rng: np.random.Generator) -> None:
    errors = OutputErrors()
    for boxes in (3, 4, 5, 3):
        y = rng.normal(size=(1, boxes, 4))
        errors.update({"y": y}, {"y": 1.1 * y if boxes < 5 else y[:, 1:]}, None)
    (output,) = errors.result().outputs
    assert output.relative_error == np.inf and output.shapes_differ == 1
    assert output.shared_error is not None and output.shared_error < 0.2
    assert near_chance(errors.result()) is None

"""Mutations keep what a model computes, and a try can fail."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import mutate
import numpy as np
import onnx
import pytest
from build import build, feed, run
from mutations import KINDS, Case, InapplicableError, copies

ROOT = Path(__file__).parents[2]
SAME = [kind for kind in KINDS if kind not in ("half precision", "computed weights", "activations as outputs")]


@pytest.fixture(autouse=True)
def _audible() -> Iterator[None]:
    """Tries silence logging in a process of their own, which here is that of the tests."""
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def case() -> Case:
    body = "h = Conv(x, w, b)\nr = Relu(h)\nk = Conv(r, v)\ng = GlobalAveragePool(k)\nf = Flatten(g)\ny = MatMul(f, m)"
    model = build(body, {"w": (16, 3, 3, 3), "b": (16,), "v": (16, 16, 1, 1), "m": (16, 5)}, opset=15)
    return Case(model, feed(model, 8))


@pytest.mark.parametrize("kind", SAME)
def test_a_mutation_keeps_the_outputs(kind: str, case: Case) -> None:
    before = run(case.model, case.feeds)
    case = KINDS["a local function"](case, np.random.default_rng(1)) if kind == "functions inlined" else case
    kept = case.model.SerializeToString()
    try:
        found = KINDS[kind](case, np.random.default_rng(0))
    except (InapplicableError, ImportError) as error:
        pytest.skip(str(error))
    assert case.model.SerializeToString() == kept
    after = mutate._outputs(found.model, found)
    np.testing.assert_allclose(np.concatenate([batch[0] for batch in after]), before[0], rtol=1e-4, atol=1e-5)


def test_copies_are_channels_that_can_go(case: Case) -> None:
    weight = onnx.numpy_helper.to_array(copies(case, np.random.default_rng(0)).model.graph.initializer[0])
    assert np.array_equal(weight[0], weight[1])
    assert not np.array_equal(weight[4], weight[5])


@pytest.mark.parametrize("seed", (2, 4))
def test_a_try_on_the_demonstration_model(seed: int) -> None:
    found = mutate.attempt(seed, ROOT / "models" / "demo.onnx", None, "lossless")
    assert (found.outcome, found.gone[1] > 100) == ("fine", True), found.text


def test_a_result_that_differs_is_called_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    real = mutate.compress

    def lies(source: onnx.ModelProto, *given: object, **options: object) -> object:
        result = real(source, *given, **options)
        weight = result.model.graph.initializer[0]
        weight.CopyFrom(onnx.numpy_helper.from_array(2 * onnx.numpy_helper.to_array(weight), weight.name))
        return result

    monkeypatch.setattr(mutate, "compress", lies)
    assert mutate.attempt(3, ROOT / "models" / "demo.onnx", None, "lossless").outcome == "wrong"


def test_channels_lost_without_a_reason_are_found() -> None:
    with pytest.raises(mutate.WrongError, match="2 channels may no longer go"):
        mutate._kept(mutate.Coverage(10, 8, 1.0, ()), mutate.Coverage(10, 6, 1.0, ()))
    mutate._kept(mutate.Coverage(10, 8, 1.0, ()), mutate.Coverage(10, 6, 1.0, (("mixed_axis", 2),)))

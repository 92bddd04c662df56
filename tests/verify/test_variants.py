"""Other ways of running the two models: which are tried, and that a result which is right in the usual way only fails."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from build import build

import lindep_onnx
from lindep_onnx import pipeline
from lindep_onnx.data.inputs import InputSpec
from lindep_onnx.data.samples import open_samples
from lindep_onnx.model.ir import load
from lindep_onnx.options import DataOptions
from lindep_onnx.runtime.backend import Runtime
from lindep_onnx.verify.variants import SAMPLES, Variant, compare_variants

SHAPE = {"fixed": (8, 3, 8, 8), "batch": ("N", 3, 8, 8), "open": ("N", 3, "H", "W")}


def model(shape: tuple, target: list[int]) -> onnx.ModelProto:
    body = "h = Conv<pads=[1,1,1,1]>(x, w)\ns = Reshape(h, t)\np = ReduceMax<axes=[2], keepdims=0>(s)\ny = Gemm(p, v)"
    weights = {"w": (4, 3, 3, 3), "t": np.array(target), "v": (4, 5)}
    made = build(body, weights, x=("N", 3, "H", "W"), opset=17)
    made.graph.input[0].CopyFrom(onnx.helper.make_tensor_value_info("x", 1, shape))
    return made


def variants(original: onnx.ModelProto, result: onnx.ModelProto, shape: tuple) -> dict[str, Variant]:
    x = np.random.default_rng(0).normal(size=(16, 3, 8, 8)).astype(np.float32)
    spec = InputSpec("x", np.dtype(np.float32), shape)
    with open_samples({"x": x}, [spec], DataOptions(batch_size=8)) as samples:
        runtime = Runtime(threads=1)
        sessions = runtime.open(original), runtime.open(result)
        found = compare_variants(load(original), load(result), lambda: sessions, samples, [spec], runtime.shares(0))
        return {variant.name: variant for variant in found}


@pytest.mark.parametrize(("kind", "count"), [("fixed", 1), ("batch", 3), ("open", 4)])
def test_every_way_that_is_declared_is_tried(kind: str, count: int) -> None:
    one = model(SHAPE[kind], [0, 4, -1])
    found = variants(one, one, SHAPE[kind])
    assert len(found) == count and all(v.passed and v.relative_error < 1e-5 and v.samples for v in found.values())


@pytest.mark.parametrize(
    ("target", "failing"),
    [([SAMPLES, 4, -1], {"in batches of 1", "in batches of 3"}), ([-1, 4, 64], {"with open sizes times 2"})],
)
def test_a_size_that_was_written_down_is_found(target: list[int], failing: set[str]) -> None:
    found = variants(model(SHAPE["open"], [0, 4, -1]), model(SHAPE["open"], target), SHAPE["open"])
    assert {name for name, variant in found.items() if not variant.passed} >= failing
    assert found["without optimisations"].passed
    assert all(found[name].relative_error == np.inf for name in failing)


def test_ways_that_the_original_does_not_run_in_are_left_out() -> None:
    one = model(SHAPE["open"], [SAMPLES, 4, 64])
    assert set(variants(one, one, SHAPE["open"])) == {"without optimisations"}


def test_a_result_that_differs_when_it_is_run_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Variant("in batches of 3", 8, 0.5, False)
    monkeypatch.setattr(pipeline, "compare_variants", lambda *_, **__: (wrong,))
    data = {"x": np.random.default_rng(0).normal(size=(60, 3, 8, 8)).astype(np.float32)}
    one = model(SHAPE["batch"], [0, 4, -1])
    with pytest.raises(lindep_onnx.VerificationError, match=r"Run in batches of 3, .* by 0.5"):
        lindep_onnx.compress(one, data)
    verification = lindep_onnx.compress(one, data, force=True).report.verification
    assert verification is not None and verification.variants == (wrong,) and not verification.passed

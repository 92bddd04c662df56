"""What the pictures of a report show is what the model has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import lindep_onnx
from lindep_onnx.model.cost import cost
from lindep_onnx.options import Config
from lindep_onnx.report import figures as portrait
from lindep_onnx.report.figures import layers
from lindep_onnx.structure.rewrite import Removal, rewrite
from lindep_onnx.structure.traced import load_and_trace

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "demo.onnx"


@pytest.fixture(scope="module")
def result() -> lindep_onnx.Result:
    data = dict(np.load(ROOT / "models" / "calib.npz"))
    return lindep_onnx.compress(MODEL, {name: value[:300] for name, value in data.items()}, params=0.5)


def test_layers_have_the_widths_of_the_two_models(result: lindep_onnx.Result) -> None:
    weights = [{w.name: w.dims for w in m.graph.initializer} for m in (onnx.load(MODEL), result.model)]
    found = {layer.name: layer for layer in result.report.layers}
    assert list(found) == [n.name for n in result.model.graph.node if n.op_type in ("Conv", "Gemm")]
    for model, sizes, after in zip((onnx.load(MODEL), result.model), weights, (False, True), strict=True):
        for node in model.graph.node:
            if node.name in found:
                layer, shape = found[node.name], sizes[node.input[1]]
                width = layer.channels_after if after else layer.channels_before
                count = layer.parameters_after if after else layer.parameters_before
                assert (width, count) == (shape[0], np.prod(shape)), node.name
    report = result.report
    assert sum(layer.channels_before for layer in report.layers) == report.before.channels
    assert sum(layer.channels_after for layer in report.layers) == report.after.channels < report.before.channels
    assert report.model == "demo.onnx"


def test_parameters_that_stay_are_counted_without_rewriting() -> None:
    channels = load_and_trace(MODEL, Config(proven_only=True)).channels
    rng = np.random.default_rng(0)
    for share in (0.0, 0.3, 0.6):
        removed = rng.random(channels.units) < share
        smaller = cost(rewrite(channels, Removal(removed), ""), {})
        assert channels.kept_parameters(removed) == smaller.parameters
        assert sum(layer.channels_after for layer in layers(channels, removed)) == smaller.channels


def test_the_frontier_goes_from_large_to_small_and_from_good_to_bad(result: lindep_onnx.Result) -> None:
    points = result.report.frontier
    sizes, errors = zip(*((p.parameters, p.relative_error) for p in points), strict=True)
    assert len(points) == 9 and list(sizes) == sorted(sizes, reverse=True) and sizes[0] < 1
    assert errors[0] < 1e-3 < 0.5 < errors[-1]
    assert points[0].agreement == 1.0


def test_singular_values_end_where_the_rank_does(result: lindep_onnx.Result) -> None:
    for group in result.report.groups:
        found = group.redundancy
        assert found is not None
        values = np.array(found.singular_values)
        assert values[0] == 1.0 and (np.diff(values) <= 0).all()
        assert [value > 0 for value in found.singular_values] == [rank <= found.rank for rank in found.ranks]
        assert len(values) <= portrait.POINTS and len(found.errors) <= portrait.POINTS
        assert found.errors == tuple(sorted(found.errors))
        # What is exactly dependent goes for nothing; what is not, does not.
        first = next(k for k, e in zip(found.removed, found.errors, strict=True) if e > 1e-5)
        assert first > group.proven
        assert max(found.removed) < group.channels_before


def test_a_group_that_is_too_wide_is_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portrait, "MAX_UNITS", 40)
    data = dict(np.load(ROOT / "models" / "calib.npz"))
    found = lindep_onnx.compress(MODEL, {name: value[:60] for name, value in data.items()}).report
    assert {g.name for g in found.groups if g.redundancy is None} == {
        g.name for g in found.groups if g.channels_before > 40
    }


def test_rounds_keep_the_frontier_of_the_original() -> None:
    data = dict(np.load(ROOT / "models" / "calib.npz"))
    some = {name: value[:60] for name, value in data.items()}
    once, twice = (lindep_onnx.compress(MODEL, some, params=0.5, rounds=n).report.frontier for n in (1, 2))
    assert once == twice and once

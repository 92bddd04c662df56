"""What the pictures of a report show is what the model has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

import lindep_onnx
from lindep_onnx.model.cost import cost
from lindep_onnx.options import Config
from lindep_onnx.proofs.traced import load_and_trace
from lindep_onnx.report.figures import POINTS, layers, spectra
from lindep_onnx.structure.rewrite import Removal, rewrite

MODEL = Path(__file__).parents[2] / "models" / "demo.onnx"


def test_layers_have_the_widths_of_the_two_models(result: lindep_onnx.Result) -> None:
    report = result.report
    found = {layer.name: layer for layer in report.layers}
    assert list(found) == [n.name for n in result.model.graph.node if n.op_type in ("Conv", "Gemm")]
    for model, after in ((onnx.load(MODEL), False), (result.model, True)):
        sizes = {weight.name: weight.dims for weight in model.graph.initializer}
        for node in model.graph.node:
            if node.name in found:
                layer, shape = found[node.name], sizes[node.input[1]]
                width = layer.channels_after if after else layer.channels_before
                count = layer.parameters_after if after else layer.parameters_before
                assert (width, count) == (shape[0], np.prod(shape)), node.name
    assert sum(layer.channels_before for layer in report.layers) == report.before.channels
    assert sum(layer.channels_after for layer in report.layers) == report.after.channels < report.before.channels
    assert report.model == "demo.onnx"


def test_parameters_that_stay_are_counted_without_rewriting() -> None:
    structure = load_and_trace(MODEL, Config(proven_only=True)).structure
    rng = np.random.default_rng(0)
    for share in (0.0, 0.3, 0.6):
        removed = rng.random(structure.units) < share
        smaller = cost(rewrite(structure, Removal(removed), ""), {})
        assert structure.kept_parameters(removed) == smaller.parameters
        assert sum(layer.channels_after for layer in layers(structure, removed)) == smaller.channels


def test_the_frontier_goes_from_large_to_small_and_from_good_to_bad(result: lindep_onnx.Result) -> None:
    points = result.report.frontier
    sizes, errors = zip(*((p.parameters, p.relative_error) for p in points), strict=True)
    assert len(points) == 9 and list(sizes) == sorted(sizes, reverse=True) and sizes[0] < 1
    assert errors[0] < 1e-2 < 0.5 < errors[-1]
    assert points[0].agreement == 1.0


def test_rounds_keep_the_frontier_of_the_original(demo_data: dict[str, np.ndarray]) -> None:
    some = {name: value[:60] for name, value in demo_data.items()}
    once, twice = (lindep_onnx.compress(MODEL, some, params=0.5, rounds=n).report.frontier for n in (1, 2))
    assert once == twice and once


def test_singular_values_end_where_the_rank_does(result: lindep_onnx.Result) -> None:
    for group in result.report.groups:
        found = group.redundancy
        assert found is not None
        values = np.array(found.singular_values)
        assert values[0] == 1.0 and (np.diff(values) <= 0).all()
        assert [value > 0 for value in found.singular_values] == [rank <= found.rank for rank in found.ranks]
        assert len(values) <= POINTS and len(found.errors) <= POINTS
        assert found.errors == tuple(sorted(found.errors))
        # What is exactly dependent goes for nothing; what is not, does not.
        first = next(k for k, e in zip(found.removed, found.errors, strict=True) if e > 1e-5)
        assert first > group.proven
        assert max(found.removed) < group.channels_before


def test_a_group_that_is_too_wide_is_not_drawn(demo_data: dict[str, np.ndarray]) -> None:
    calibrated = lindep_onnx.calibrate(lindep_onnx.trace(MODEL), {name: v[:60] for name, v in demo_data.items()})
    structure = calibrated.traced.structure
    assert calibrated.statistics is not None
    found = spectra(structure, calibrated.statistics, widest=40)
    assert set(found) == {number for number, group in enumerate(structure.groups) if len(group.units) <= 40}

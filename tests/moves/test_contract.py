"""The contract of `lindep_onnx.moves.base.Move`, held to every kind of change: those that ship and the two toys."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from build import build, feed, run, traced
from scipy.stats import spearmanr
from toy_kinds import Bypass, Narrowing

from lindep_onnx.calibration.carry import carried
from lindep_onnx.calibration.collect import collect_statistics
from lindep_onnx.calibration.pairs import collect_pairs
from lindep_onnx.calibration.statistics import Statistics
from lindep_onnx.data.inputs import InputSpec
from lindep_onnx.data.samples import Samples, open_samples
from lindep_onnx.data.split import Part
from lindep_onnx.errors import UsageError
from lindep_onnx.log import Log
from lindep_onnx.model.cost import cost
from lindep_onnx.model.edit import apply_edits
from lindep_onnx.model.ir import Model
from lindep_onnx.moves.base import Composed, Exactness, Move
from lindep_onnx.moves.channels import ChannelRemoval
from lindep_onnx.moves.kinds import MOVES
from lindep_onnx.moves.sensitivity import PerturbationRunner, consumer_sensitivity
from lindep_onnx.options import Config, DataOptions
from lindep_onnx.pipeline import Calibrated, open_round
from lindep_onnx.planning.pricing import path_of, price
from lindep_onnx.planning.strategies import by_size
from lindep_onnx.proofs.traced import load_and_trace
from lindep_onnx.refit.sequential import Cut, refit
from lindep_onnx.runtime.backend import Runtime
from lindep_onnx.runtime.targets import FREE
from lindep_onnx.structure.reasons import ADVICE
from lindep_onnx.structure.types import Structure

RUNTIME = Runtime(threads=1)
CONV = (
    "a = Conv<pads=[1,1,1,1]>(x, w0, b0)\nr = Relu(a)\nc = Conv(r, w1, b1)\ns = Relu(c)\ng = GlobalAveragePool(s)\n"
    "f = Flatten(g)\ny = Gemm(f, w2, b2)"
)
BOTTLENECK = "a = Gemm(x, w0, b0)\nr = Relu(a)\nh = Gemm(r, w1, b1)\ns = Gemm(h, w2, b2)\nt = Relu(s)\ny = Gemm(t, w3)"
BRANCH = (
    "a = Gemm(x, w0, b0)\np = Relu(a)\nm = Gemm(p, w1, b1)\nn = Relu(m)\nt = Gemm(n, w2, b2)\ns = Add(t, p)\n"
    "q = Relu(s)\ny = Gemm(q, w3)"
)


@dataclass(frozen=True)
class Net:
    """A model that a kind can change, and what the data says about it."""

    model: onnx.ModelProto
    structure: Structure
    samples: Samples
    statistics: Statistics

    @property
    def feeds(self) -> dict[str, np.ndarray]:
        return feed(self.model, 40, seed=9)


def net(body: str, weights: dict[str, tuple[int, ...]], x: tuple[int | str, ...], kind: Move) -> Net:
    model = build(body, weights, x=x)
    structure = traced(model)
    rng = np.random.default_rng(3)
    shape = tuple(int(n) for n in x[1:])
    data = (rng.normal(size=(400, 6)) @ rng.normal(size=(6, int(np.prod(shape))))).reshape(400, *shape)
    given = data + 0.3 * rng.normal(size=data.shape)
    spec = InputSpec("x", np.dtype(np.float32), x)
    samples = open_samples({"x": given.astype(np.float32)}, [spec], DataOptions(batch_size=32))
    found = collect_statistics(structure, samples, RUNTIME, Log(), seed=0)[1]
    pairs = collect_pairs(structure, samples, kind.pairs(structure), runtime=RUNTIME, seed=0, log=Log())
    return Net(model, structure, samples, replace(found, pairs=pairs))


NETS = {
    "channels": (
        CONV,
        {"w0": (12, 3, 3, 3), "b0": (12,), "w1": (10, 12, 3, 3), "b1": (10,), "w2": (10, 4), "b2": (4,)},
        ("N", 3, 6, 6),
    ),
    "narrowing": (
        BOTTLENECK,
        {"w0": (6, 16), "b0": (16,), "w1": (16, 8), "b1": (8,), "w2": (8, 14), "b2": (14,), "w3": (14, 4)},
        ("N", 6),
    ),
    "bypass": (
        BRANCH,
        {"w0": (6, 8), "b0": (8,), "w1": (8, 20), "b1": (20,), "w2": (20, 8), "b2": (8,), "w3": (8, 4)},
        ("N", 6),
    ),
}
KINDS = [*MOVES, Narrowing(), Bypass()]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.name)
def case(request: pytest.FixtureRequest) -> tuple[Move, Net]:
    return request.param, net(*NETS[request.param.name], request.param)


def taken(kind: Move, own: Net, steps: np.ndarray) -> tuple[Model, object]:
    """The model with some steps, and the steps as they were carried out."""
    mask = np.zeros(kind.count(own.structure), dtype=bool)
    mask[steps] = True
    chosen = kind.fit(own.structure, kind.unfitted(own.structure, mask), own.statistics)
    edits = kind.apply(own.structure, chosen, own.statistics)
    return apply_edits(own.structure.model, edits, ""), chosen


def curves(kind: Move, own: Net) -> list:
    weighed = PerturbationRunner(own.structure, own.samples, RUNTIME)
    sensitivity = consumer_sensitivity(own.structure, own.statistics, weighed, Log())
    return kind.price(own.structure, own.statistics, sensitivity, kind.savings(own.structure, "parameters"))


def whole_order(kind: Move, own: Net) -> np.ndarray:
    order = np.concatenate([curve.steps for curve in curves(kind, own)])
    return order[kind.possible(own.structure, order)]


def test_every_step_belongs_to_one_site(case: tuple[Move, Net]) -> None:
    kind, own = case
    steps = np.concatenate([site.steps for site in kind.sites(own.structure)])
    assert len(steps) and sorted(steps.tolist()) == list(range(kind.count(own.structure)))


def test_no_step_changes_no_byte(case: tuple[Move, Net]) -> None:
    kind, own = case
    model, chosen = taken(kind, own, np.array([], dtype=np.int64))
    unchanged = apply_edits(own.structure.model, type(kind.apply(own.structure, chosen, own.statistics))(), "")
    assert model.proto.SerializeToString() == unchanged.proto.SerializeToString()
    assert taken(kind, own, whole_order(kind, own)[:1])[0].proto != unchanged.proto  # the negative control


def test_all_steps_that_can_be_taken_give_a_valid_model_and_leave_the_original_alone(case: tuple[Move, Net]) -> None:
    kind, own = case
    before = own.structure.model.proto.SerializeToString()
    order = whole_order(kind, own)
    mask = np.zeros(kind.count(own.structure), dtype=bool)
    mask[order] = True
    model, _ = taken(kind, own, np.flatnonzero(kind.admissible(own.structure, mask, order, FREE)))
    onnx.checker.check_model(onnx.shape_inference.infer_shapes(model.proto), full_check=True)
    assert [y.shape for y in run(model.proto, own.feeds)] == [y.shape for y in run(own.model, own.feeds)]
    assert own.structure.model.proto.SerializeToString() == before


def test_a_step_saves_what_it_says(case: tuple[Move, Net]) -> None:
    kind, own = case
    says = kind.savings(own.structure, "parameters")
    whole = cost(own.structure.model, {}).parameters
    for site, curve in zip(kind.sites(own.structure), curves(kind, own), strict=True):
        first = curve.steps[:1]
        saved = whole - cost(taken(kind, own, first)[0], {}).parameters
        assert saved == says[first[0]], site.name


def test_costs_never_fall_along_a_curve(case: tuple[Move, Net]) -> None:
    kind, own = case
    for curve in curves(kind, own):
        assert (np.diff(curve.cost) >= -1e-12).all() and (np.diff(curve.saving) > 0).all()


def test_expected_and_measured_errors_agree_in_rank(case: tuple[Move, Net]) -> None:
    kind, own = case
    perturbations = PerturbationRunner(own.structure, own.samples, RUNTIME)
    expected, measured = [], []
    for curve in curves(kind, own):
        for depth in {1, len(curve.steps) // 3, 2 * len(curve.steps) // 3, len(curve.steps) - 1} - {0}:
            _, chosen = taken(kind, own, curve.steps[:depth])
            expected.append(curve.cost[depth - 1])
            measured.append(perturbations.error(kind.apply(own.structure, chosen, own.statistics)))
    if len(expected) > 2:
        assert spearmanr(expected, measured).statistic > 0.7
    else:  # one step: not better than doing nothing to the branch at all
        assert 0 < measured[0] < 1 if measured else kind.name == "bypass"


def test_steps_survive_a_plan_file(case: tuple[Move, Net]) -> None:
    kind, own = case
    order = whole_order(kind, own)[: max(1, kind.count(own.structure) // 2)]
    mask = np.zeros(kind.count(own.structure), dtype=bool)
    mask[order] = True
    if kind.name != "channels":  # the toys name how many steps of a site are taken, from the first on
        mask[:] = np.arange(len(mask)) < len(order)
    named = json.loads(json.dumps(kind.to_names(own.structure, kind.unfitted(own.structure, mask))))
    assert (kind.from_names(own.structure, named) == mask).all()
    broken = {"removed": {"nowhere": [0]}} if kind.name == "channels" else {"nowhere": 1}
    with pytest.raises(UsageError, match="does not fit"):
        kind.from_names(own.structure, broken)


def test_steps_are_found_again_where_nothing_changed(case: tuple[Move, Net]) -> None:
    kind, own = case
    mask = np.zeros(kind.count(own.structure), dtype=bool)
    mask[np.sort(whole_order(kind, own))[:1]] = True
    assert (kind.refound(own.structure, mask, own.structure) == mask).all()
    other = traced(build("y = Relu(x)", {}, x=("N", 3)))
    assert not kind.refound(own.structure, mask, other).any()


def test_every_refusal_has_a_reason_and_advice(case: tuple[Move, Net]) -> None:
    kind, own = case
    for refusal in kind.refusals(own.structure):
        assert refusal.reason.code in ADVICE and refusal.nodes


def test_what_is_exact_costs_nothing(case: tuple[Move, Net]) -> None:
    kind, own = case
    uncertain = np.zeros(own.structure.units, dtype=bool)
    chosen = kind.exact(own.structure, own.statistics, Exactness(1e-5, uncertain))
    model = apply_edits(own.structure.model, kind.apply(own.structure, chosen, own.statistics), "")
    for before, after in zip(run(own.model, own.feeds), run(model.proto, own.feeds), strict=True):
        assert np.linalg.norm(after - before) <= 1e-4 * np.linalg.norm(before)


# ---- what is carried through a change ---------------------------------------------------------------------------


def measured(model: Model, own: Net) -> tuple[Structure, Statistics]:
    structure = traced(model.proto)
    return structure, collect_statistics(structure, own.samples, RUNTIME, Log(), seed=0)[1]


def spread(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


def test_statistics_follow_a_linear_map() -> None:
    kind = Narrowing()
    own = net(*NETS["narrowing"], kind)
    model, chosen = taken(kind, own, np.arange(3))
    structure, anew = measured(model, own)
    maps = kind.maps(own.structure, chosen)
    found = carried(own.statistics, own.structure, structure, maps)
    (place,) = [n for n, consumer in enumerate(structure.consumers) if consumer.readers[0].tensor == "h"]
    assert found.consumers[place].gram.shape == (5, 5)
    assert spread(found.consumers[place].gram, anew.consumers[place].gram) < 1e-4
    assert spread(found.consumers[place].mean, anew.consumers[place].mean) < 1e-4
    assert spread(1.01 * found.consumers[place].gram, anew.consumers[place].gram) > 5e-3  # the negative control


def test_statistics_follow_a_selection() -> None:
    kind = ChannelRemoval()
    own = net(*NETS["channels"], kind)
    model, chosen = taken(kind, own, whole_order(kind, own)[:4])
    structure, anew = measured(model, own)
    found = carried(own.statistics, own.structure, structure, kind.maps(own.structure, chosen))
    first = (
        structure.consumers[0].readers[0].tensor
    )  # what the first weight reads is no different for the fold behind it
    (place,) = [n for n, consumer in enumerate(structure.consumers) if consumer.readers[0].tensor == first]
    assert found.consumers[place].gram.shape == anew.consumers[place].gram.shape
    assert spread(found.consumers[place].gram, anew.consumers[place].gram) < 1e-6


def test_refit_targets_follow_a_linear_map() -> None:
    """Behind removed channels the first Gemm of a narrowed pair is refitted to M h of the original, not to h."""
    channels, kind = ChannelRemoval(), Narrowing()
    own = net(*NETS["narrowing"], kind)
    removed = np.zeros(own.structure.units, dtype=bool)
    removed[np.unique(own.structure.unit[own.structure.consumers[0].columns])[:6]] = True
    folded = channels.fit(own.structure, channels.unfitted(own.structure, removed), own.statistics)
    once = apply_edits(own.structure.model, channels.apply(own.structure, folded, own.statistics), "")
    middle = traced(once.proto)
    through = channels.maps(own.structure, folded)
    statistics = carried(own.statistics, own.structure, middle, through)
    mask = np.zeros(kind.count(middle), dtype=bool)
    mask[:3] = True
    chosen = kind.fit(middle, kind.unfitted(middle, mask), statistics)
    twice = apply_edits(once, kind.apply(middle, chosen, statistics), "")
    maps = Composed((through, kind.maps(middle, chosen)))
    cut = Cut(own.structure, maps, traced(twice.proto))
    found = refit(cut, own.samples, RUNTIME, Log(), mode="sequential", seed=0)
    assert "h" in found.errors and found.errors["h"][1] <= found.errors["h"][0] < 1
    refitted = apply_edits(twice, found.edits, "")
    reference = run(own.model, own.feeds)[0]
    errors = [np.linalg.norm(run(model.proto, own.feeds)[0] - reference) for model in (twice, refitted)]
    assert errors[1] <= errors[0]


def test_moments_of_a_pair_are_those_of_the_rows() -> None:
    kind = Bypass()
    own = net(*NETS["bypass"], kind)
    (pair,) = kind.pairs(own.structure)
    found = own.statistics.pairs[pair]
    shown = onnx.ModelProto()
    shown.CopyFrom(own.model)
    shown.graph.output.extend(onnx.ValueInfoProto(name=name) for name in (pair.left.tensor, pair.right.tensor))
    rows = [batch.feeds["x"][: len(batch.samples)] for batch in own.samples.batches(Part.FIT)]
    _, left, right = run(shown, {"x": np.concatenate(rows)})
    x, y = left.astype(np.float64), right.astype(np.float64)
    assert found.rows == len(x)
    assert spread(found.cross, x.T @ y / len(x)) < 1e-6 and spread(found.left_gram, x.T @ x / len(x)) < 1e-6
    matrix, rest = found.best_map(0.0)
    oracle, *_ = np.linalg.lstsq(np.c_[y, np.ones(len(y))], x, rcond=None)
    active = np.flatnonzero(y.std(axis=0) > 0)
    assert spread(y[:, active] @ matrix[:, active].T + rest, np.c_[y, np.ones(len(y))] @ oracle) < 1e-4


def test_the_page_on_extending_shows_a_kind_that_keeps_the_contract() -> None:
    page = (Path(__file__).parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")
    source = inspect.getsource(Bypass)
    assert source in page and len(source.splitlines()) < 60


def test_kinds_meet_on_one_path_and_one_size() -> None:
    """Both kinds are priced, chosen together, carried out one after the other, and refitted."""
    kinds = (Bypass(), ChannelRemoval())
    own = net(*NETS["bypass"], kinds[0])
    config = Config(params=0.45, batch_size=32)
    traced_model = load_and_trace(own.model, config)
    calibrated = Calibrated(traced_model, own.samples, None, own.statistics, config)
    plain = open_round(calibrated, config, RUNTIME, Log())
    piece = replace(plain.piece, moves=kinds)
    round_ = replace(plain, piece=piece, builder=replace(plain.builder, piece=piece))
    found = price(piece, "parameters", RUNTIME, Log())
    path = path_of(piece, found, np.zeros(own.structure.units, dtype=bool), FREE)
    assert set(path.kind.tolist()) == {0, 1} and (np.diff(path.price) >= 0).all()
    candidate, evaluation = by_size(round_, path, round_.free(round_.piece.uncertain))
    assert evaluation.failure is None and evaluation.achieved["params"] <= 0.45
    assert candidate.decision.steps["bypass"].taken.all() and candidate.decision.removed.any()
    onnx.checker.check_model(candidate.model.proto, full_check=True)
    assert evaluation.comparison is not None and evaluation.comparison.relative_error < 0.9

"""Training against the original: it works, it is the same on every run, and what it cannot train it names."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from build import build, initializer, run, traced, with_initializer
from scipy.special import softmax

import lindep_onnx
from lindep_onnx.cli import main
from lindep_onnx.data.inputs import InputSpec
from lindep_onnx.data.samples import Samples, open_samples
from lindep_onnx.data.split import Part
from lindep_onnx.distill.augment import checked, mix
from lindep_onnx.distill.checkpoint import Checkpoint
from lindep_onnx.distill.optimizer import Optimizer, TrainingState
from lindep_onnx.distill.rounds import Recovery, schedule, to_original_units
from lindep_onnx.distill.train import Distilled, Training, distill, trainable
from lindep_onnx.errors import BudgetError, UsageError
from lindep_onnx.log import Log
from lindep_onnx.model import ir as graph
from lindep_onnx.model.edit import GraphEdits, apply_edits
from lindep_onnx.options import Config, DataOptions, TrainingBudget
from lindep_onnx.runtime.backend import Runtime
from lindep_onnx.structure.rewrite import Removal, rewrite

BODY = """
a = Conv<pads=[1,1,1,1]>(x, w0, b0)
n = BatchNormalization(a, scale, shift, mean, variance)
r = Relu(n)
c = Conv<pads=[1,1,1,1]>(r, w1, b1)
s = Relu(c)
p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(s)
g = GlobalAveragePool(p)
h = Flatten(g)
y = Gemm(h, w2, b2)
"""
WEIGHTS = {
    "w0": (12, 3, 3, 3), "b0": (12,), "scale": (12,), "shift": (12,), "mean": (12,), "variance": np.linspace(0.5, 2, 12, dtype=np.float32),
    "w1": (10, 12, 3, 3), "b1": (10,), "w2": (10, 4), "b2": (4,),
}  # fmt: skip
TRAINED = {"w0", "b0", "scale", "shift", "w1", "b1", "w2", "b2"}

RUNTIME = Runtime(threads=1)


def samples(shape: tuple[int, ...] = (3, 6, 6), count: int = 200, model_batch: int | str = "N") -> Samples:
    x = np.random.default_rng(0).normal(size=(count, *shape)).astype(np.float32)
    spec = InputSpec("x", np.dtype(np.float32), (model_batch, *shape))
    return open_samples({"x": x}, [spec], DataOptions(batch_size=16))


def worn(model: onnx.ModelProto, name: str = "w1", seed: int = 7) -> onnx.ModelProto:
    """The model with noise on one weight."""
    value = initializer(model, name)
    noise = np.random.default_rng(seed).normal(size=value.shape) * value.std()
    return with_initializer(model, name, value + 0.5 * noise)


def distilled(
    teacher: onnx.ModelProto,
    student: onnx.ModelProto,
    steps: int = 60,
    *,
    data: Samples | None = None,
    log: Log | None = None,
    checkpoint: Path | None = None,
    **options,
) -> Distilled:
    training = Training(graph.load(teacher), graph.load(student), TrainingBudget(steps=steps), **{"seed": 0, **options})
    with data or samples() as taken:
        return distill(training, taken, RUNTIME, log or Log(), Checkpoint(checkpoint) if checkpoint else None)


def error(model: onnx.ModelProto, other: onnx.ModelProto) -> float:
    feeds = {"x": np.random.default_rng(99).normal(size=(60, 3, 6, 6)).astype(np.float32)}
    (a,), (b,) = run(model, feeds), run(other, feeds)
    return float(np.linalg.norm(a - b) / np.linalg.norm(a - a.mean()))


@pytest.fixture(scope="module")
def teacher() -> onnx.ModelProto:
    return build(BODY, WEIGHTS, x=("N", 3, 6, 6))


def test_training_brings_a_worn_model_back_towards_the_original(teacher: onnx.ModelProto) -> None:
    student = worn(teacher)
    found = distilled(teacher, student)
    assert set(found.weights) == TRAINED and not found.notes
    result = apply_edits(graph.load(student), GraphEdits(constants=found.weights), "").proto
    assert error(teacher, result) < 0.4 * error(teacher, student)
    assert found.after < 0.2 * found.before and found.steps == 60


def test_the_loss_is_the_squared_error_relative_to_what_varies_and_the_divergence_of_decisions(
    teacher: onnx.ModelProto,
) -> None:
    student = worn(teacher)
    with samples() as data:
        batches = {part: list(data.batches(part)) for part in data.parts}
    fit, select = (
        np.concatenate([b.feeds["x"] for part, bs in batches.items() if part.value == name for b in bs])
        for name in ("fit", "select")
    )
    (y,), (t,), (all_t,) = run(student, {"x": select}), run(teacher, {"x": select}), run(teacher, {"x": fit})
    spread = all_t.var(axis=0) + 0.01 * all_t.var(axis=0).mean()
    squares = (np.square(y - t).mean(axis=0) / spread).mean()
    sharpness = 4 / np.sqrt(all_t.var(axis=1).mean())
    p, q = softmax(sharpness * t, axis=1), softmax(sharpness * y, axis=1)
    divergence = (p * np.log(p / q)).sum(axis=1).mean()
    found = distilled(teacher, student, 1).before
    assert found == pytest.approx(squares + divergence, rel=1e-4)
    assert found != pytest.approx(squares, rel=1e-3)  # the term counts


def test_scores_that_never_decide_add_no_divergence(teacher: onnx.ModelProto) -> None:
    flat = build(
        BODY.replace("y = Gemm", "z = Gemm") + "y = Unsqueeze(z, one)\n",
        {**WEIGHTS, "one": np.array([1])},
        x=("N", 3, 6, 6),
    )
    student = worn(flat)
    with samples() as data:
        select = np.concatenate([b.feeds["x"] for b in data.batches(Part.SELECT)])
        fit = np.concatenate([b.feeds["x"] for b in data.batches(Part.FIT)])
    (y,), (t,), (all_t,) = run(student, {"x": select}), run(flat, {"x": select}), run(flat, {"x": fit})
    wanted = np.square(y - t).sum(axis=(1, 2)).mean() / (1.01 * np.square(all_t - all_t.mean()).sum(axis=(1, 2)).mean())
    assert distilled(flat, student, 1).before == pytest.approx(wanted, rel=1e-4)


def test_the_loss_of_a_softmax_is_the_divergence(teacher: onnx.ModelProto) -> None:
    body = BODY.replace("y = Gemm", "z = Gemm") + "y = Softmax(z)\n"
    original = build(body, WEIGHTS, x=("N", 3, 6, 6))
    student = worn(original)
    with samples() as data:
        select = np.concatenate(
            [b.feeds["x"] for part in data.parts if part.value == "select" for b in data.batches(part)]
        )
    (y,), (t,) = run(student, {"x": select}), run(original, {"x": select})
    found = distilled(original, student)
    assert found.before == pytest.approx(float((t * np.log(t / y)).sum() / len(t)), rel=1e-3)
    assert found.after < 0.3 * found.before


def test_two_runs_are_the_same_and_another_seed_is_not(teacher: onnx.ModelProto) -> None:
    first, second, third = (distilled(teacher, worn(teacher), 8, seed=seed) for seed in (0, 0, 1))
    assert all(np.array_equal(first.weights[name], second.weights[name]) for name in first.weights)
    assert any(not np.array_equal(first.weights[name], third.weights[name]) for name in first.weights)


def test_what_cannot_be_improved_stays_as_it_is(teacher: onnx.ModelProto) -> None:
    assert not distilled(teacher, teacher, 5).weights  # every other state is worse on held-out samples


def test_frozen_nodes_and_shared_weights(teacher: onnx.ModelProto) -> None:
    found = distilled(teacher, worn(teacher), 8, frozen=["Conv_0", "Gemm_8"])
    assert set(found.weights) == TRAINED - {"w0", "b0", "w2", "b2"}
    tied = graph.load(build("a = Gemm(x, w)\nb = Relu(a)\nc = Gemm(b, w)\ny = Mul(c, w)", {"w": (4, 4)}, x=(4, 4)))
    assert trainable(tied, []) == []  # read as a factor too


def test_statistics_masks_and_bounds_are_no_weights() -> None:
    body = "a = MatMul(x, w)\nb = Add(a, bias)\nc = Add(b, grid)\nd = Mul(c, half)\ne = Clip(d, low)\ny = Sub(e, mean)"
    weights = {"w": (4, 5), "bias": (5,), "grid": (3, 5), "half": np.float32(0.5), "low": np.float32(0), "mean": (5,)}
    assert trainable(graph.load(build(body, weights, x=(3, 4))), []) == ["w", "bias"]


def test_what_stands_in_the_way_is_named() -> None:
    body = "a = Gemm(x, w)\nb = CumSum(a, axis)\ny = Gemm(b, v)"
    model = build(body, {"w": (4, 6), "v": (6, 3), "axis": np.array(1)}, x=("N", 4))
    found = distilled(model, worn(model, "v"), data=samples((4,)))
    assert set(found.weights) == {"v"}
    assert found.notes == ("Weights in front of node 'CumSum_1' (CumSum) were not trained: has no gradient rule.",)
    model = build("a = Gemm(x, w)\ny = CumSum(a, axis)", {"w": (4, 6), "axis": np.array(1)}, x=("N", 4))
    found = distilled(model, worn(model, "w"), data=samples((4,)))
    assert not found.weights and found.steps == 0 and "CumSum" in found.notes[0]


def test_a_fixed_batch_and_an_old_operator_set() -> None:
    model = build(
        "a = MatMul(x, w)\nb = Clip<min=0.0>(a)\ny = MatMul(b, v)", {"w": (4, 6), "v": (6, 3)}, x=(8, 4), opset=9
    )
    found = distilled(model, worn(model, "v"), data=samples((4,), model_batch=8))
    assert found.after < 0.5 * found.before


# ---- options, rounds ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "budget"),
    [("300", TrainingBudget(steps=300)), (20, TrainingBudget(steps=20)), ("1.5min", TrainingBudget(seconds=90))],
)
def test_steps_or_minutes(text: str | int, budget: TrainingBudget) -> None:
    assert Config(params=0.5, recover=text).training_budget == budget


@pytest.mark.parametrize("text", ["0", "5 hours", "2.5", "-3", "min"])
def test_other_efforts_have_no_meaning(text: str) -> None:
    with pytest.raises(UsageError, match="--recover is a number of steps"):
        Config(params=0.5, recover=text)


def test_without_a_budget_there_is_nothing_to_recover() -> None:
    with pytest.raises(UsageError, match="name one"):
        Config(recover="300")


def test_rounds_shrink_by_the_same_factor() -> None:
    shares = [step.params for step in schedule(Config(params=0.25, rounds=2))]
    assert shares == pytest.approx([0.5, 0.25])


def test_removals_of_two_rounds_add_up_in_units_of_the_original(teacher: onnx.ModelProto) -> None:
    channels = traced(teacher)
    rng = np.random.default_rng(0)
    removed = rng.random(channels.units) < 0.3
    smaller = traced(rewrite(channels, Removal(removed), "").proto)
    gone = rng.random(smaller.units) < 0.3
    both = to_original_units(channels, removed, smaller, gone)
    assert both.sum() == removed.sum() + gone.sum() and both[removed].all()
    twice, once = (rewrite(*pair, "").proto for pair in ((smaller, Removal(gone)), (channels, Removal(both))))
    x = {"x": np.ones((2, 3, 6, 6), np.float32)}
    np.testing.assert_allclose(run(twice, x)[0], run(once, x)[0], rtol=1e-5)


@pytest.fixture(scope="module")
def wide() -> onnx.ModelProto:
    """A net of which half is missed."""
    body = "a = Gemm(x, w0, b0)\nr = Tanh(a)\nc = Gemm(r, w1, b1)\ns = Tanh(c)\ny = Gemm(s, w2)"
    return build(body, {"w0": (8, 24), "b0": (24,), "w1": (24, 24), "b1": (24,), "w2": (24, 4)}, x=("N", 8))


@pytest.fixture(scope="module")
def inputs() -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(3).normal(size=(2000, 8)).astype(np.float32)}


@pytest.mark.parametrize("rounds", [1, 2])
def test_compress_recovers_and_says_so(wide: onnx.ModelProto, inputs: dict, rounds: int) -> None:
    plain = lindep_onnx.compress(wide, inputs, params=0.5)
    found = lindep_onnx.compress(wide, inputs, params=0.5, recover=200, rounds=rounds)
    assert found.report.after.parameters <= 0.5 * found.report.before.parameters
    assert sum("steps of training" in note for note in found.report.notes) == rounds
    assert found.report.verification.relative_error < 0.9 * plain.report.verification.relative_error
    removed = sum(group.removed for group in found.report.groups)
    assert removed == found.report.before.channels - found.report.after.channels


def test_rounds_spend_what_recovery_won_back(wide: onnx.ModelProto, inputs: dict) -> None:
    once, thrice = (
        lindep_onnx.compress(wide, inputs, max_error=0.2, recover=150, rounds=rounds).report for rounds in (1, 3)
    )
    assert thrice.after.parameters < once.after.parameters
    assert thrice.verification is not None and thrice.verification.relative_error <= 0.2


def test_the_group_that_broke_a_round_is_left_alone(
    wide: onnx.ModelProto, inputs: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine, seen = Recovery.recovered, []

    def breaking(recovery, round_, result, number):
        result, notes = genuine(recovery, round_, result, number)
        seen.append(result)
        failure = BudgetError("made up") if len(seen) == 2 else None
        return dataclasses.replace(result, evaluation=dataclasses.replace(result.evaluation, failure=failure)), notes

    monkeypatch.setattr(Recovery, "recovered", breaking)
    report = lindep_onnx.compress(wide, inputs, max_error=0.2, recover=150, rounds=3).report
    told = [note for note in report.notes if "broke a budget" in note]
    assert len(told) == 1 and told[0].startswith("Round 2") and report.verification.passed
    weight = {"Gemm_0": "w0", "Gemm_2": "w1"}[told[0].split("'")[1]]
    first, broken, last = (initializer(result.candidate.model.proto, weight).shape[1] for result in seen)
    assert broken < first == last


def test_the_command_line_trains_too(wide: onnx.ModelProto, inputs: dict, tmp_path: Path) -> None:
    onnx.save(wide, tmp_path / "in.onnx")
    np.savez(tmp_path / "data.npz", **inputs)
    paths = [str(tmp_path / name) for name in ("in.onnx", "out.onnx")]
    options = ["--calib", str(tmp_path / "data.npz"), "--params", "0.5", "--recover", "0.02min", "--rounds", "2"]
    assert main([*paths, *options, "--report", str(tmp_path / "r.json"), "-q"]) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["options"]["recover"] == "0.02min" and report["seconds"]["recover"] > 2
    assert [note[:8] for note in report["notes"]] == ["Round 1:", "Round 2:"]


def test_a_model_that_cannot_be_trained_keeps_its_refit_and_says_why() -> None:
    body = "a = Gemm(x, w)\nb = Relu(a)\nc = Gemm(b, v)\ny = CumSum(c, axis)"
    model = build(body, {"w": (8, 24), "v": (24, 3), "axis": np.array(1)}, x=("N", 8))
    x = {"x": np.random.default_rng(0).normal(size=(400, 8)).astype(np.float32)}
    plain, found = (lindep_onnx.compress(model, x, params=0.5, **extra) for extra in ({}, {"recover": 10}))
    assert found.model.graph.initializer == plain.model.graph.initializer
    assert any("CumSum" in note and "not trained" in note for note in found.report.notes)


# ---- augmentation -------------------------------------------------------------------------------------------------


def test_mixing_pairs_teaches_what_the_original_makes_of_mixtures(teacher: onnx.ModelProto) -> None:
    student = worn(teacher)
    plain, mixed = distilled(teacher, student), distilled(teacher, student, augment=mix)
    assert mixed.after < 0.3 * mixed.before
    assert not np.array_equal(plain.weights["w1"], mixed.weights["w1"])
    again = distilled(teacher, student, augment=mix)
    assert all(np.array_equal(value, again.weights[name]) for name, value in mixed.weights.items())


def test_mixtures_lie_between_their_samples_and_integers_stay() -> None:
    feeds = {"x": np.arange(24, dtype=np.float32).reshape(8, 3), "z": np.ones((8, 2), np.float32)}
    runs = [mix(feeds, np.random.default_rng(seed)) for seed in range(20)]
    changed = [found for found in runs if found is not feeds]
    assert 4 < len(changed) < 16
    for found in changed:
        assert (found["x"] >= 0).all() and (found["x"] <= 23).all() and np.allclose(found["z"], 1)
        assert np.allclose(np.diff(found["x"], axis=1), 1, atol=1e-5)  # whole samples are mixed
    ids = {**feeds, "ids": np.zeros((8, 1), np.int64)}
    assert all(mix(ids, np.random.default_rng(seed)) is ids for seed in range(20))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda feeds, rng: {"x": feeds["x"][:1]}, "must return 'x' as it gets it"),
        (lambda feeds, rng: {"x": feeds["x"].astype(np.float64)}, "float64"),
        (lambda feeds, rng: {}, "KeyError"),
        (lambda feeds, rng: {"x": feeds["x"] * np.float32(np.inf)}, "not finite"),
    ],
)
def test_a_function_that_breaks_its_contract_is_named(teacher: onnx.ModelProto, function, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        distilled(teacher, worn(teacher), 2, augment=checked(function))


def test_a_function_cannot_change_the_samples(teacher: onnx.ModelProto) -> None:
    def spoil(feeds, rng):
        feeds["x"][:] = 0
        return feeds

    x = {"x": np.ones((4, 2), np.float32)}
    assert not checked(spoil)(x, np.random.default_rng(0))["x"].any() and x["x"].all()


# ---- interruptions and steps that are too long --------------------------------------------------------------------


class StoppedError(Exception):
    pass


def test_an_interrupted_training_ends_where_it_would_have_ended(teacher: onnx.ModelProto, tmp_path: Path) -> None:
    student, path = worn(teacher), tmp_path / "state"
    whole = distilled(teacher, student, augment=mix)

    def stop(stage: str, done: int, total: int) -> None:
        if done == 33:
            raise StoppedError

    with pytest.raises(StoppedError):
        distilled(teacher, student, augment=mix, checkpoint=path, log=Log(stop))
    seen = []
    log = Log(lambda stage, done, total: seen.append(done))
    rest = distilled(teacher, student, augment=mix, checkpoint=path, log=log)
    assert seen[0] == 31 and rest.history[1:] == whole.history[1:]
    assert all(np.array_equal(value, rest.weights[name]) for name, value in whole.weights.items())
    assert distilled(teacher, student, augment=mix, checkpoint=path).steps == 60  # nothing left to do


def test_the_checkpoint_of_another_training_is_refused_and_kept(teacher: onnx.ModelProto, tmp_path: Path) -> None:
    path = tmp_path / "state"
    distilled(teacher, worn(teacher), 2, checkpoint=path)
    before = path.read_bytes()
    for other, seed in ((worn(teacher, seed=8), 0), (worn(teacher), 1)):
        with pytest.raises(UsageError, match="is of another run"):
            distilled(teacher, other, 2, seed=seed, checkpoint=path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x05\x06" + b"\0" * 18])
def test_a_file_that_is_no_checkpoint_is_refused_and_kept(
    teacher: onnx.ModelProto, tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "state"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="is not a checkpoint"):
        distilled(teacher, worn(teacher), 2, checkpoint=path)
    assert path.read_bytes() == content


def test_steps_that_are_too_long_are_taken_back() -> None:
    old, new = {"w": np.zeros(2, np.float32)}, {"w": np.ones(2, np.float32)}
    state = TrainingState(new, old, new, new, averaged=5, norm=1.0, steps=10, history=((0, np.nan, 1.0),))
    judged = Optimizer().judged
    assert judged(state, 0.0, 0.5).best is new
    assert judged(state, 0.0, 1.4).weights is new and judged(state, 0.0, 1.4).rate == 1.0
    back = judged(state, 0.0, 1.6)
    assert back.weights is old and back.rate == 0.3 and back.averaged == 0 and not back.mean["w"].any()


def test_a_model_that_steps_too_long_would_ruin_is_trained_all_the_same(teacher: onnx.ModelProto) -> None:
    found = distilled(teacher, worn(teacher), 240, optimizer=Optimizer(rate=100 * Optimizer().rate))
    assert max(entry[2] for entry in found.history) > 1.2 * found.before  # it did go wrong on the way
    assert found.after < 0.5 * found.before


def test_the_command_line_goes_on_where_it_was_interrupted(wide: onnx.ModelProto, inputs: dict, tmp_path: Path) -> None:
    onnx.save(wide, tmp_path / "in.onnx")
    np.savez(tmp_path / "calib.npz", **inputs)
    (tmp_path / "vary.py").write_text(
        "def noise(feeds, rng):\n    return {n: v + 0.01 * rng.standard_normal(v.shape).astype(v.dtype) for n, v in feeds.items()}\n"
    )
    options = ["--calib", str(tmp_path / "calib.npz"), "--params", "0.6", "--recover", "30", "-q"]
    options += ["--augment", f"{tmp_path / 'vary.py'}:noise", "--checkpoint", str(tmp_path / "state")]
    for name in "ab":
        assert main([str(tmp_path / "in.onnx"), str(tmp_path / f"{name}.onnx"), *options]) == 0
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert main([str(tmp_path / "in.onnx"), str(tmp_path / "c.onnx"), *options, "--seed", "1"]) == 2  # another run
    assert not (tmp_path / "c.onnx").exists()


def test_a_batch_in_two_pieces_trains_like_the_whole() -> None:
    teacher = build(BODY, WEIGHTS, x=("N", 3, 6, 6))
    halves = distilled(teacher, worn(teacher))
    whole = distilled(teacher, worn(teacher), pieces=1)
    assert halves.weights.keys() == whole.weights.keys() and halves.after < 0.5 * halves.before
    assert halves.history[1][1] == pytest.approx(whole.history[1][1], rel=1e-5)  # the first step
    assert halves.after == pytest.approx(whole.after, rel=0.05)  # rounding grows in the many that follow
    uneven = distilled(teacher, worn(teacher), pieces=5)  # 16 samples cannot be cut like that
    assert uneven.after == whole.after

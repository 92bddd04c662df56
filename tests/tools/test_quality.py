"""The benchmark compares like with like: rivals reach the size, stay valid models, and do what they are known for."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench_quality
import numpy as np
import onnx
import pytest
import rivals
import tasks
from bench_quality import build as made
from build import as_array, build, run, traced

from lindep_onnx.model.checks import full_check_passes

#: A chain, a depthwise convolution, a residual Add and a dense layer.
NET = """
    a = Conv<pads=[1,1,1,1]>(x, w1, b1)
    h = Relu(a)
    d = Conv<group=16, pads=[1,1,1,1]>(h, w2, b2)
    e = Relu(d)
    c = Conv<pads=[1,1,1,1]>(e, w3, b3)
    s = Add(c, h)
    r = Relu(s)
    p = GlobalAveragePool(r)
    f = Flatten(p)
    g = Gemm<transB=1>(f, w4, b4)
    k = Relu(g)
    y = Gemm<transB=1>(k, w5, b5)
"""
SHAPES = {
    "w1": (16, 3, 3, 3), "b1": (16,), "w2": (16, 1, 3, 3), "b2": (16,), "w3": (16, 16, 3, 3), "b3": (16,),
    "w4": (24, 16), "b4": (24,), "w5": (5, 24), "b5": (5,),
}  # fmt: skip
SAMPLES = 120


@pytest.fixture(scope="module")
def net() -> onnx.ModelProto:
    weights: dict[str, Any] = {name: as_array(name, shape) for name, shape in SHAPES.items()}
    # Large, but nearly multiples of others: small weights are no sign of redundancy here.
    noise = np.random.default_rng(5)
    for place in range(12, 24):
        weights["w4"][place] = 2.0 * weights["w4"][place - 12] + 0.02 * noise.normal(size=16)
        weights["b4"][place] = 2.0 * weights["b4"][place - 12]
    return build(NET, weights)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(SAMPLES, 3, 8, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def files(net: onnx.ModelProto, images: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("frontier")
    onnx.save(net, folder / "model.onnx")
    np.savez(folder / "calib.npz", x=images)
    return folder / "model.onnx", folder / "calib.npz"


@pytest.fixture
def unseen() -> np.ndarray:
    return np.random.default_rng(2).normal(size=(64, 3, 8, 8)).astype(np.float32)


def built(method: str, files: tuple[Path, Path], target: int, tmp_path: Path) -> onnx.ModelProto:
    share = target / rivals.parameters(onnx.load(files[0]))
    made(method, *files, target, tmp_path / "out.onnx", {"params": share})
    return onnx.load(tmp_path / "out.onnx")


@pytest.mark.parametrize("share", [0.8, 0.4])
@pytest.mark.parametrize("method", ["magnitude-all", "interpolative-all"])
def test_rivals_reach_the_count_and_stay_valid(method, share, net, files, unseen, tmp_path):
    before = rivals.parameters(net)
    target = int(share * before)
    result = built(method, files, target, tmp_path)
    # At least the target, and less than it plus the dearest channel.
    assert target <= rivals.parameters(result) < target + 16 * 9 * 2 + 60
    assert full_check_passes(result) is None
    (found,) = run(result, {"x": unseen})
    assert found.shape == (64, 5) and np.isfinite(found).all()


@pytest.mark.parametrize("method", ["magnitude", "magnitude-global", "interpolative"])
def test_residual_streams_are_left_alone_as_published(method, net, files, tmp_path):
    target = int(0.9 * rivals.parameters(net))
    result = built(method, files, target, tmp_path)
    assert target <= rivals.parameters(result) < target + 30
    shapes = {tensor.name: tuple(tensor.dims) for tensor in result.graph.initializer}
    assert shapes["w1"] == SHAPES["w1"] and shapes["w3"] == SHAPES["w3"] and shapes["w5"][1] < SHAPES["w5"][1]


def test_a_count_below_every_plan_is_no_comparison(net):
    with pytest.raises(rivals.UnreachedError, match="parameters are left"):
        rivals.magnitude(net, Path(), 10)


def test_norms_are_over_all_that_makes_and_reads_a_channel(net):
    channels = traced(net)
    norms = rivals._norms(channels)
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor).astype(np.float64) for tensor in net.graph.initializer}
    residual = sum(np.square(weights[name]).sum(axis=(1, 2, 3)) for name in ("w1", "w2", "w3"))
    residual += np.square(weights["w3"]).sum(axis=(0, 2, 3)) + np.square(weights["w4"]).sum(axis=0)
    dense = np.square(weights["w4"]).sum(axis=1) + np.square(weights["w5"]).sum(axis=0)
    np.testing.assert_allclose(np.sort(norms), np.sort(np.sqrt(np.concatenate([residual, dense]))))


def test_interpolation_is_exact_where_the_dependence_is(tmp_path, images):
    rng = np.random.default_rng(3)
    basis = rng.normal(size=(4, 6)).astype(np.float32)
    # Ten neurons without a constant or an activation: six of them follow from any four.
    net = build(
        "h = Gemm<transB=1>(x, w1)\ny = Gemm<transB=1>(h, w2)",
        {"w1": (rng.normal(size=(10, 4)) @ basis).astype(np.float32), "w2": (3, 10)},
        x=("N", 6),
    )
    data = rng.normal(size=(60, 6)).astype(np.float32)
    np.savez(tmp_path / "calib.npz", x=data)
    result = rivals.interpolative(net, tmp_path / "calib.npz", 4 * (6 + 3))
    assert rivals.parameters(result) == 36
    (exact,), (found,) = run(net, {"x": data}), run(result, {"x": data})
    np.testing.assert_allclose(found, exact, atol=1e-4 * np.abs(exact).max())


def test_ours_beats_its_rivals_where_redundancy_is_not_small_weights(files, net, unseen, tmp_path):
    target = int(0.8 * rivals.parameters(net))
    (exact,) = run(net, {"x": unseen})
    errors = {}
    for method in ("fold", "kernel", "sequential", "magnitude-all", "interpolative-all"):
        result = built(method, files, target, tmp_path)
        errors[method] = tasks.error(exact, run(result, {"x": unseen})[0])
        ours = method in bench_quality.REFITS
        assert (rivals.parameters(result) <= target) if ours else (rivals.parameters(result) >= target)
    assert max(errors[method] for method in bench_quality.REFITS) < 0.5 * errors["magnitude-all"]
    assert errors["sequential"] < errors["interpolative-all"]


def test_ratio_is_the_largest_that_leaves_enough():
    before = 1000
    asked: list[float] = []

    def prune(ratio: float) -> SimpleNamespace:
        asked.append(ratio)
        return SimpleNamespace(left=before - 20 * int(50 * ratio))  # steps of 2 %

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rivals, "parameters", lambda model: model.left)
        assert rivals._largest_ratio(prune, 655, before).left == 660
        assert len(asked) <= rivals.STEPS
        with pytest.raises(rivals.UnreachedError, match=r"nearest ratios leave 20.0% or 80.0%"):
            rivals._largest_ratio(lambda ratio: SimpleNamespace(left=800 if ratio < 0.5 else 200), 500, before)


@pytest.mark.parametrize("method", ["onnxsim", "onnxsim-global", "onnxsim-wanda-finetune"])
def test_onnxsim_is_brought_to_the_count(method, net, files, unseen, tmp_path):
    pytest.importorskip("onnxsim")
    before = rivals.parameters(net)
    target = int(0.9 * before)
    result = built(method, files, target, tmp_path)
    assert target <= rivals.parameters(result) <= target + rivals.TOLERANCE * before
    assert run(result, {"x": unseen})[0].shape == (64, 5)


def test_budget_of_a_number_of_neurons(files):
    for removed in (10, 3):
        before = bench_quality.compress(*files, proven_only=True).report.before.channels
        share = (before - removed) / before
        target = bench_quality.neuron_target(*files, share)
        report = bench_quality.compress(*files, channels=share, refit="fold").report
        assert report.before.channels - report.after.channels == removed
        assert report.after.parameters == target


@pytest.fixture
def tiny(images: np.ndarray, files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> tasks.Places:
    def load(_: tasks.Places, test: bool) -> tuple[np.ndarray, np.ndarray]:
        count = 40 if test else 100
        return images[:count] + (100 if test else 0), np.arange(count)

    subject = tasks.Subject("model.onnx", load, lambda pixels: pixels, "agreement", (0.7,))
    monkeypatch.setitem(tasks.SUBJECTS, "tiny", subject)
    return tasks.Places(files[0].parent)


def test_test_images_stay_closed_until_the_final_run(tiny, images):
    task = tasks.open_task("tiny", tiny, final=False, samples=30, limit=10)
    assert task.input == "x" and len(task.calib) == 30 and len(task.judged) == len(task.labels) == 10
    assert not {image.tobytes() for image in task.calib} & {image.tobytes() for image in task.judged}
    assert task.judged.max() < 50
    np.testing.assert_array_equal(task.judged, images[task.labels])
    final = tasks.open_task("tiny", tiny)
    assert len(final.calib) == 100 and len(final.judged) == 40 and final.judged.min() > 50


def test_a_model_that_was_not_given_is_named():
    with pytest.raises(tasks.MissingError, match=r"resnet56\.onnx"):
        tasks.open_task("resnet56", tasks.Places())


def test_scores():
    reference = np.array([[0.1, 0.9], [0.8, 0.2], [0.4, 0.6]], dtype=np.float32)
    found = np.array([[0.7, 0.3], [0.8, 0.2], [0.4, 0.6]], dtype=np.float32)
    assert tasks.score("agreement", reference, found) == pytest.approx(2 / 3)
    assert tasks.score("accuracy", reference, found, np.array([0, 0, 0])) == pytest.approx(2 / 3)
    assert tasks.score("edges", reference, found) == pytest.approx(4 / 6)
    assert tasks.error(reference, reference) == 0.0
    assert tasks.error(reference, np.full_like(reference, reference.mean())) == pytest.approx(1.0)


def test_a_method_that_cannot_be_compared_is_named(tiny, tmp_path, monkeypatch):
    def unable(*_: object) -> None:
        raise rivals.UnreachedError("no")

    monkeypatch.setitem(bench_quality.RIVALS, "interpolative", unable)
    task = tasks.open_task("tiny", tiny)
    here = partial(bench_quality.frontier, task, folder=tmp_path, measured=lambda call, *given: (call(*given), 0.0, 0))
    (row,) = here("fold")
    assert row["point"] == "70%" and float(row["params"].rstrip("%")) <= 70 and row["original"] == "100.00%"
    (row,) = here("interpolative")
    assert row["score"] == "no comparison: no"

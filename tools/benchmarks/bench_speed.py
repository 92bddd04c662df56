"""What everything costs, as a ratio to one plain ONNX Runtime pass over the same samples in the same run.

The plain pass reads one sample after the other from a memory map, which is as little as anybody can do. It and the
command take turns, each in a process of its own, so that what else the machine does falls on both alike; of `REPEAT`
turns the fastest of each counts.

`stages`: real and built models. `growth`: one small net with more samples, channels and nodes; `--write FILE.svg` draws
it. `beside_others`: other tools with the same samples. `elimination`: half of the features of one wide consumer on one
core. `saved_moments`: a sweep over budgets with and without the moments of the first run. `workers`: shards of a
calibration on local processes of one thread each.

| column | what |
|---|---|
| plain | seconds of the plain pass |
| one column for each stage | seconds of the stage over seconds of the plain pass |
| whole | seconds of the whole command over the same, start-up and report included |
| CPU | CPU seconds of the command over those of the process of the plain pass, start-up included in both |
| peak, over plain | MB of memory of the command, and beyond those of the plain pass |
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from measure import Bench, apart, command, run
from numpy.typing import NDArray
from onnx import TensorProto, helper
from tasks import Places, model_of, shuffled
from threadpoolctl import threadpool_limits

import lindep_onnx
from lindep_onnx.calibration.shards import Job, run_shard, shards_of
from lindep_onnx.data.samples import open_samples
from lindep_onnx.integrations.dask import connected
from lindep_onnx.linalg.elimination import Limits, eliminate
from lindep_onnx.linalg.fold import ConsumerProblem
from lindep_onnx.options import DataOptions
from lindep_onnx.proofs.traced import inputs_of
from lindep_onnx.runtime.backend import Runtime

REPEAT = 2
STAGES = ("load", "trace", "prove", "read data", "calibrate", "plan", "reconstruct", "rewrite", "verify", "statistics")
#: A pass with nothing around it, started like the command.
PLAIN = """
import sys, time, numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.add_session_config_entry("session.intra_op.allow_spinning", "0")
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
samples = numpy.load(sys.argv[2], mmap_mode="r")
name, size = session.get_inputs()[0].name, session.get_inputs()[0].shape[0]
step = size if isinstance(size, int) else 1 if samples[0].size > 10000 else 32
start = time.perf_counter()
for first in range(0, len(samples) // step * step, step):
    session.run(None, {name: samples[first : first + step]})
print(time.perf_counter() - start)
"""


# ---- the whole command ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Costs:
    """One model, measured.

    Attributes:
        plain: seconds, CPU seconds and peak MB of the plain pass.
        command: the same of the command.
        stages: seconds by stage.
    """

    plain: tuple[float, float, float]
    command: tuple[float, float, float]
    stages: dict[str, float]

    def cells(self) -> dict[str, str]:
        """A row of the table."""
        plain, command = self.plain, self.command
        return {
            "plain": f"{plain[0]:.2f}",
            **{stage: f"{self.stages.get(stage, 0.0) / plain[0]:.2f}" for stage in STAGES},
            "whole": f"{command[0] / plain[0]:.2f}",
            "CPU": f"{command[1] / plain[1]:.2f}",
            "peak": f"{command[2]:.0f}",
            "over plain": f"{command[2] - plain[2]:.0f}",
        }


def costs(model: Path, samples: Path, folder: Path) -> Costs:
    """Measure one model."""
    plain, whole = [], []
    report = folder / "report.json"
    for _ in range(REPEAT):
        found = run(sys.executable, "-c", PLAIN, model, samples)
        plain.append((float(found.said), found.cpu, found.peak))
        found = command(model, folder / "small.onnx", "--calib", samples, "--report", report)
        assert found.code == 0, found.said
        whole.append((found[:3], json.loads(report.read_text(encoding="utf-8"))["seconds"]))
    best, stages = min(whole, key=lambda turn: turn[0])
    return Costs(min(plain), best, stages)


@pytest.mark.parametrize(
    ("name", "count"), [("demo", 400), ("resnet56", 1000), ("efficientnet_lite0", 400), ("hed_vgg16", 32)]
)
def test_stages(bench: Bench, name: str, count: int) -> None:
    model, samples = model_of(name, bench.places), _stored(name, count, bench.places, bench.folder)
    bench.row(model=f"{name}, {count}", **bench.once(costs, model, samples, bench.folder).cells())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [("dense net of 1,000 nodes", 200), ("MLP 784-4096-4096-10", 20_000)])
def test_stages_of_built(bench: Bench, name: str, count: int) -> None:
    built, shape = (dense_net(), (3, 16, 16)) if "dense" in name else (wide_mlp(), (784,))
    model, samples = _written(built, bench.folder), _noise(bench.folder, count, *shape)
    bench.row(model=f"{name}, {count:,}", **bench.once(costs, model, samples, bench.folder).cells())


@pytest.mark.slow
def test_growth(bench: Bench) -> None:
    grown = bench.once(lambda: [(kind, n, costs(*files, bench.folder)) for kind, n, *files in _growing(bench.folder)])
    for kind, number, found in grown:
        bench.row(more=kind, number=f"{number:,}", **found.cells())
    if bench.write is not None:
        _draw(grown, bench.write)


def _growing(folder: Path) -> Iterator[tuple[str, int, Path, Path]]:
    for count in (100, 300, 1000, 3000, 10_000):
        yield "samples", count, _written(plain_net(8, 64), folder), _noise(folder, count, 3, 16, 16)
    for width in (32, 64, 128, 256, 512):
        yield "channels", width, _written(plain_net(8, width), folder), _noise(folder, 300, 3, 16, 16)
    for depth in (8, 32, 128, 512):
        yield "nodes", 2 * depth + 1, _written(plain_net(depth, 32), folder), _noise(folder, 300, 3, 16, 16)


def _draw(found: Sequence[tuple[str, int, Costs]], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "lindep_onnx"
    import matplotlib.pyplot as plt

    kinds = list(dict.fromkeys(kind for kind, _, _ in found))
    figure, axes = plt.subplots(2, len(kinds), figsize=(4 * len(kinds), 6.5), layout="constrained", squeeze=False)
    for column, kind in enumerate(kinds):
        own = [(number, cost) for of, number, cost in found if of == kind]
        numbers = [number for number, _ in own]
        top, bottom = axes[0][column], axes[1][column]
        top.plot(numbers, [cost.command[0] for _, cost in own], "o-", label="whole command")
        for stage, mark in (("calibrate", "s-"), ("plan", "^-")):
            top.plot(numbers, [cost.stages.get(stage, 0) for _, cost in own], mark, label=stage)
        top.plot(numbers, [cost.plain[0] for _, cost in own], "k--", label="plain pass")
        top.set(xscale="log", yscale="log", ylabel="seconds" if not column else "", title=f"more {kind}")
        bottom.plot(numbers, [cost.command[2] for _, cost in own], "o-", label="command")
        bottom.plot(numbers, [cost.plain[2] for _, cost in own], "k--", label="plain pass")
        bottom.set(xscale="log", ylim=(0, None), xlabel=kind, ylabel="peak MB" if not column else "")
        for axis in (top, bottom):
            axis.set_xticks(numbers, [f"{number:,}" for number in numbers], fontsize="small")
            axis.minorticks_off()
    axes[0][-1].legend(loc="lower right")
    axes[1][0].legend()
    figure.savefig(path, metadata={"Date": None})


# ---- beside others ----------------------------------------------------------------------------------------------

#: What is done to a model; lists are options of the command.
OTHERS: dict[str, list[str] | Callable[[Path, Path, Path], None] | None] = {
    "plain pass": None,
    "lossless": [],
    "65 %, fold": ["--params", "0.65", "--refit", "fold"],
    "65 %, sequential refit": ["--params", "0.65"],
    "onnxsim, Wanda": lambda *files: _onnxsim(*files, finetune=False),
    "onnxsim, Wanda and finetune": lambda *files: _onnxsim(*files, finetune=True),
    "static int8, min-max": lambda *files: _int8(*files, "MinMax"),
    "static int8, entropy": lambda *files: _int8(*files, "Entropy"),
}


@pytest.mark.parametrize("what", OTHERS)
@pytest.mark.parametrize(("name", "count"), [("demo", 400), ("resnet56", 1000)])
def test_beside_others(bench: Bench, name: str, count: int, what: str) -> None:
    if what.startswith("onnxsim"):
        pytest.importorskip("onnxsim")
    model, samples = model_of(name, bench.places), _stored(name, count, bench.places, bench.folder)
    first = bench.once(_spent, what, model, samples, bench.folder)
    seconds, cpu, peak = min(first, *(_spent(what, model, samples, bench.folder) for _ in range(REPEAT - 1)))
    bench.row(model=f"{name}, {count}", what=what, seconds=f"{seconds:.1f}", cpu=f"{cpu:.1f}", peak=f"{peak:.0f}")


def _spent(what: str, model: Path, samples: Path, folder: Path) -> tuple[float, float, float]:
    doing = OTHERS[what]
    if doing is None:
        found = run(sys.executable, "-c", PLAIN, model, samples)
    elif isinstance(doing, list):
        found = command(model, folder / "small.onnx", "--calib", samples, *doing)
    else:  # start-up included, like all others
        start = f"import sys, pathlib; sys.path.insert(0, {str(Path(__file__).parent)!r}); import bench_speed as own"
        call = f"own.OTHERS[{what!r}](*map(pathlib.Path, sys.argv[1:]))"
        found = run(sys.executable, "-c", f"{start}; {call}", model, samples, folder / "small.onnx")
    assert found.code == 0, found.said
    return found[:3]


def _batches(model: Path, samples: Path) -> list[dict[str, NDArray[np.float32]]]:
    given = onnx.load(model, load_external_data=False).graph.input[0]
    rows = np.load(samples, mmap_mode="r")
    step = given.type.tensor_type.shape.dim[0].dim_value or (1 if rows[0].size > 10_000 else 32)
    starts = range(0, len(rows) // step * step, step)
    return [{given.name: np.ascontiguousarray(rows[at : at + step])} for at in starts]


def _onnxsim(model: Path, samples: Path, target: Path, *, finetune: bool) -> None:
    import onnxsim

    original, data = onnx.load(model), _batches(model, samples)
    pruned = onnxsim.apply_structured_wanda_pruning(original, calibration_data=data, sparsity=0.35)
    if finetune:
        pruned = onnxsim.apply_pruning_finetune(original, pruned, calibration_data=data)
    onnx.save(pruned, target)


def _int8(model: Path, samples: Path, target: Path, method: str) -> None:
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, quantize_static

    feeds = iter(_batches(model, samples))
    reader = type("Reader", (CalibrationDataReader,), {"get_next": lambda _: next(feeds, None)})
    options = {"per_channel": True, "calibrate_method": CalibrationMethod[method]}
    quantize_static(str(model), str(target), reader(), **options)


# ---- parts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [512, 2048, pytest.param(4096, marks=pytest.mark.slow)])
def test_elimination(bench: Bench, features: int) -> None:
    """Beside NumPy's own product of two matrices of that size, as a measure of the machine."""
    problem = wide_consumer(features, 1000)
    candidates, half = np.ones(features, dtype=bool), Limits(removals=features // 2)
    with threadpool_limits(1, user_api="blas"):
        start = time.perf_counter()
        _ = problem.gram @ problem.outer
        product = time.perf_counter() - start
        bench.once(eliminate, [problem], candidates, limits=half)
    seconds = bench.benchmark.stats.stats.min
    bench.row(features=f"{features:,}", seconds=f"{seconds:.2f}", matrix_products=f"{seconds / product:.1f}")


def wide_consumer(features: int, outputs: int, seed: int = 0) -> ConsumerProblem:
    """Correlated features, each of its own size, as a calibrated ReLU layer has them."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(3 * features, features // 2)) @ rng.normal(size=(features // 2, features))
    rows = np.maximum(rows / np.sqrt(features) + 0.3 * rng.normal(size=rows.shape), 0.0) * rng.uniform(0.1, 2, features)
    weight = rng.normal(size=(features, outputs))
    outer, gram = weight @ weight.T, rows.T @ rows / len(rows)
    return ConsumerProblem(gram, None, outer, np.arange(features), float(np.vdot(gram, outer)), True)


@pytest.mark.parametrize("name", ["demo", "resnet56", "efficientnet_lite0"])
def test_saved_moments(bench: Bench, name: str) -> None:
    model, samples = model_of(name, bench.places), _stored(name, 400, bench.places, bench.folder)
    moments = bench.folder / "moments.npz"
    for share in (0.8, 0.65, 0.5):
        fresh, seconds, _ = apart(_compressed, model, samples, share, {"save_moments": moments})
        again, less, _ = apart(_compressed, model, samples, share, {"load_moments": moments})
        bench.row(model=name, params=share, seconds=f"{seconds:.1f}", with_moments=f"{less:.1f}")
        assert fresh == again
    bench.once(_compressed, model, samples, 0.5, {"load_moments": moments})


def _compressed(model: Path, samples: Path, share: float, files: dict[str, Path]) -> bytes:
    return lindep_onnx.compress(model, samples, params=share, **files).model.SerializeToString()


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "workers"), [("dask", 1), ("dask", 2), ("ray", 2)])
@pytest.mark.parametrize(("name", "count"), [("demo", 400), ("efficientnet_lite0", 400)])
def test_workers(bench: Bench, engine: str, workers: int, name: str, count: int) -> None:
    """Ray is not a dependency; install it beside to try it."""
    pytest.importorskip("distributed" if engine == "dask" else engine)
    model, samples = model_of(name, bench.places), str(_stored(name, count, bench.places, bench.folder))
    traced = lindep_onnx.trace(model)
    specs = tuple(inputs_of(traced))
    with open_samples(samples, specs, DataOptions(batch_size=1)) as opened:
        shards = shards_of(opened, 6)
    runtime = Runtime.named(("CPUExecutionProvider",), 1)
    proto = traced.structure.model.proto.SerializeToString()
    data = DataOptions(batch_size=1)
    job = Job(proto, None, ((), (), 1), samples, specs, data, (), None, runtime, workers)
    up, done, fitted = bench.once(_on_dask if engine == "dask" else _on_ray, job, shards, workers)
    bench.row(engine=engine, workers=workers, model=name, up=f"{up:.1f} s", fitted=fitted, seconds=f"{done:.1f}")


def _on_dask(job: Job, shards: Sequence[Any], workers: int) -> tuple[float, float, int]:
    start = time.perf_counter()
    with connected(str(workers)) as client:
        up = time.perf_counter()
        everywhere = client.scatter(job, broadcast=True, hash=False)
        found = client.gather([client.submit(run_shard, everywhere, one, pure=False) for one in shards])
        return up - start, time.perf_counter() - up, sum(seen.samples[0] for seen, _ in found)


def _on_ray(job: Job, shards: Sequence[Any], workers: int) -> tuple[float, float, int]:
    import ray

    start = time.perf_counter()
    ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False)
    up = time.perf_counter()
    everywhere, remote = ray.put(job), ray.remote(max_retries=3)(run_shard)
    found = ray.get([remote.remote(everywhere, one) for one in shards])
    return up - start, time.perf_counter() - up, sum(seen.samples[0] for seen, _ in found)


# ---- models and samples -----------------------------------------------------------------------------------------


def _stored(name: str, count: int, places: Places, folder: Path) -> Path:
    np.save(folder / "samples.npy", shuffled(name, places)[:count])
    return folder / "samples.npy"


def _noise(folder: Path, count: int, *shape: int) -> Path:
    """Random samples, written one after the other."""
    rng = np.random.default_rng(1)
    stored = np.lib.format.open_memmap(folder / "samples.npy", "w+", np.float32, (count, *shape))
    for row in stored:
        row[...] = rng.normal(size=shape) * rng.uniform(0.5, 2)
    stored.flush()
    return folder / "samples.npy"


def _written(model: onnx.ModelProto, folder: Path) -> Path:
    onnx.save(model, folder / "built.onnx")
    return folder / "built.onnx"


def _model(
    nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], x: Sequence[int | str], last: str
) -> onnx.ModelProto:
    tensors = [onnx.numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()]
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, x)
    graph = helper.make_graph(nodes, "built", [given], [helper.make_empty_tensor_value_info(last)], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return onnx.shape_inference.infer_shapes(model)


def plain_net(depth: int, width: int, size: int = 16) -> onnx.ModelProto:
    """`depth` times Conv and ReLU; a quarter of the channels of every layer are scaled copies of others."""
    rng = np.random.default_rng(0)
    nodes, weights = [], {}
    last, channels = "x", 3
    for layer in range(depth):
        weight = rng.normal(size=(width, channels, 3, 3)) * np.sqrt(2 / (9 * channels))
        weight[: width // 4] = weight[width // 4 : 2 * (width // 4)]
        weights[f"w{layer}"] = weight
        nodes.append(helper.make_node("Conv", [last, f"w{layer}"], [f"c{layer}"], f"conv{layer}", pads=[1] * 4))
        nodes.append(helper.make_node("Relu", [f"c{layer}"], [f"r{layer}"], f"relu{layer}"))
        last, channels = f"r{layer}", width
    nodes.append(helper.make_node("GlobalAveragePool", [last], ["pooled"]))
    return _model(nodes, weights, ["N", 3, size, size], "pooled")


def dense_net(layers: int = 248, growth: int = 8, block: int = 31) -> onnx.ModelProto:
    """Blocks of BatchNormalization, ReLU, Conv and Concat, four nodes a layer; a thousand nodes by default."""
    rng = np.random.default_rng(0)
    nodes, weights = [], {"first": rng.normal(size=(growth, 3, 3, 3)) / 5}
    nodes.append(helper.make_node("Conv", ["x", "first"], ["h0"], "first", pads=[1] * 4))
    channels = growth
    for layer in range(layers):
        names = {f"{what}{layer}": value for what, value in zip("sbmv", (1.0, 0.0, 0.0, 1.0), strict=True)}
        weights.update({name: np.full(channels, value) for name, value in names.items()})
        nodes.append(helper.make_node("BatchNormalization", [f"h{layer}", *names], [f"n{layer}"], f"norm{layer}"))
        nodes.append(helper.make_node("Relu", [f"n{layer}"], [f"r{layer}"], f"relu{layer}"))
        made = 2 * growth if (layer + 1) % block == 0 else growth
        weights[f"w{layer}"] = rng.normal(size=(made, channels, 3, 3)) * np.sqrt(2 / (9 * channels))
        nodes.append(helper.make_node("Conv", [f"r{layer}", f"w{layer}"], [f"c{layer}"], f"conv{layer}", pads=[1] * 4))
        if (layer + 1) % block == 0:  # the next block starts narrow
            nodes.append(helper.make_node("Identity", [f"c{layer}"], [f"h{layer + 1}"], f"next{layer}"))
            channels = made
        else:
            nodes.append(helper.make_node("Concat", [f"h{layer}", f"c{layer}"], [f"h{layer + 1}"], axis=1))
            channels += made
    nodes.append(helper.make_node("GlobalAveragePool", [f"h{layers}"], ["pooled"]))
    return _model(nodes, weights, ["N", 3, 16, 16], "pooled")


def wide_mlp(widths: Sequence[int] = (784, 4096, 4096, 10)) -> onnx.ModelProto:
    """Gemm and ReLU in turn; a quarter of the neurons of every hidden layer are copies of others."""
    rng = np.random.default_rng(0)
    nodes, weights = [], {}
    last = "x"
    for layer, (before, after) in enumerate(itertools.pairwise(widths)):
        weight = rng.normal(size=(after, before)) * np.sqrt(2 / before)
        hidden = layer < len(widths) - 2
        if hidden:
            weight[: after // 4] = weight[after // 4 : 2 * (after // 4)]
        weights[f"w{layer}"] = weight
        nodes.append(helper.make_node("Gemm", [last, f"w{layer}"], [f"g{layer}"], f"gemm{layer}", transB=1))
        last = f"g{layer}"
        if hidden:
            nodes.append(helper.make_node("Relu", [last], [f"r{layer}"], f"relu{layer}"))
            last = f"r{layer}"
    return _model(nodes, weights, ["N", widths[0]], last)

"""What every stage of the command costs, as a ratio to one plain ONNX Runtime pass over the same samples.

The plain pass and the command take turns, each in a process of its own, so that what else the machine does falls on
both alike; of `--repeat` turns the fastest of each counts. The plain pass reads one sample after the other from a
memory map, which is as little as anybody can do.

| column | what |
|---|---|
| plain | seconds of the plain pass |
| one column for each stage | seconds of the stage over seconds of the plain pass |
| whole | seconds of the whole command over the same, start-up and report included |
| beyond 3 | seconds of the whole command beyond three plain passes |
| CPU | CPU seconds of the command over those of the process of the plain pass, start-up included in both |
| peak, over plain | MB of memory of the command, and beyond those of the plain pass |

Two tables: `models` for real and built models, `growth` for one small net with more samples, channels and nodes.

Usage: python tools/stage_costs.py MODELS DATA [--tables models growth] [--repeat 2] [--plot docs/stage_costs.svg]
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

__all__ = ["Costs", "costs", "dense_net", "measured", "plain_net", "wide_mlp"]

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
#: Starts a process and writes down what it took. A process counts the memory of the one that started it, so that must
#: be a small one.
LAUNCHER = """
import os, sys, time
start = time.perf_counter()
_, status, used = os.wait4(os.posix_spawn(sys.argv[2], sys.argv[2:], os.environ), 0)
with open(sys.argv[1], "w") as figures:
    print(time.perf_counter() - start, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024 / 1e6, file=figures)
sys.exit(os.waitstatus_to_exitcode(status))
"""


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

    @property
    def ratio(self) -> float:
        """The command over the plain pass."""
        return self.command[0] / self.plain[0]


def costs(model: Path, samples: Path, repeat: int = 2, options: Sequence[str] = ()) -> Costs:
    """Measure one model.

    Args:
        model: its file.
        samples: `.npy` of its only input.
        repeat: turns.
        options: of the command.
    """
    plain: list[tuple[float, float, float]] = []
    command: list[tuple[float, float, float, dict[str, float]]] = []
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        line = [sys.executable, "-m", "lindep_onnx", str(model), f"{folder}/small.onnx", "--calib", str(samples)]
        for _ in range(repeat):
            _, cpu, peak, said = measured([sys.executable, "-c", PLAIN, str(model), str(samples)])
            plain.append((float(said), cpu, peak))
            seconds, cpu, peak, _ = measured([*line, "--report", str(report), "--quiet", *options])
            command.append((seconds, cpu, peak, json.loads(report.read_text(encoding="utf-8"))["seconds"]))
    best = min(command, key=lambda turn: turn[0])
    return Costs(min(plain), best[:3], best[3])


def measured(line: Sequence[str]) -> tuple[float, float, float, str]:
    """Seconds, CPU seconds, peak MB and output of a process."""
    with tempfile.NamedTemporaryFile("r") as figures:
        launched = [sys.executable, "-S", "-c", LAUNCHER, figures.name, *line]
        found = subprocess.run(launched, stdout=subprocess.PIPE, text=True, check=False)
        if found.returncode:
            raise SystemExit(f"{' '.join(line)}: exit code {found.returncode}")
        seconds, cpu, peak = map(float, figures.read().split())
    return seconds, cpu, peak, found.stdout


# ---- models -----------------------------------------------------------------------------------------------------


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
        if layer < len(widths) - 2:
            weight[: after // 4] = weight[after // 4 : 2 * (after // 4)]
        weights[f"w{layer}"] = weight
        out = f"g{layer}"
        nodes.append(helper.make_node("Gemm", [last, f"w{layer}"], [out], f"gemm{layer}", transB=1))
        if layer < len(widths) - 2:
            nodes.append(helper.make_node("Relu", [out], [f"r{layer}"], f"relu{layer}"))
            out = f"r{layer}"
        last = out
    return _model(nodes, weights, ["N", widths[0]], last)


def _noise(path: Path, count: int, *shape: int) -> Path:
    """Smooth random samples, written one after the other."""
    rng = np.random.default_rng(1)
    stored = np.lib.format.open_memmap(path, "w+", np.float32, (count, *shape))
    for row in stored:
        row[...] = rng.normal(size=shape) * rng.uniform(0.5, 2)
    stored.flush()
    return path


# ---- tables -----------------------------------------------------------------------------------------------------


def _models(models: Path, data: Path, folder: Path) -> Iterator[tuple[str, Path, Path]]:
    import real_figures

    for name, count in (("resnet56", 1000), ("efficientnet_lite0", 400), ("hed_vgg16", 32)):
        path, target = models / f"{name}.onnx", folder / "samples.npy"
        chosen, _ = real_figures._picked(name, data, 0, count, 0)
        rows = real_figures.prepared(name, data, chosen)
        first = next(rows)
        stored = np.lib.format.open_memmap(target, "w+", np.float32, (count, *first.shape))
        stored[0] = first
        for number, row in enumerate(rows, 1):
            stored[number] = row
        stored.flush()
        yield f"{name}, {count}", path, target
    for name, built, count, shape in (
        ("dense net of 1,000 nodes, 200", dense_net(), 200, (3, 16, 16)),
        ("MLP 784-4096-4096-10, 20,000", wide_mlp(), 20_000, (784,)),
    ):
        onnx.save(built, folder / "built.onnx")
        yield name, folder / "built.onnx", _noise(folder / "samples.npy", count, *shape)


def _growing(folder: Path) -> Iterator[tuple[str, int, Path, Path]]:
    for count in (100, 300, 1000, 3000, 10_000):
        onnx.save(plain_net(8, 64), folder / "built.onnx")
        yield "samples", count, folder / "built.onnx", _noise(folder / "samples.npy", count, 3, 16, 16)
    for width in (32, 64, 128, 256, 512):
        onnx.save(plain_net(8, width), folder / "built.onnx")
        yield "channels", width, folder / "built.onnx", _noise(folder / "samples.npy", 300, 3, 16, 16)
    for depth in (8, 32, 128, 512):
        onnx.save(plain_net(depth, 32), folder / "built.onnx")
        yield "nodes", 2 * depth + 1, folder / "built.onnx", _noise(folder / "samples.npy", 300, 3, 16, 16)


def _row(found: Costs) -> str:
    plain, command = found.plain, found.command
    stages = [f"{found.stages.get(stage, 0.0) / plain[0]:.2f}" for stage in STAGES]
    cells = [f"{plain[0]:.2f}", *stages, f"{found.ratio:.2f}", f"{command[0] - 3 * plain[0]:.1f}"]
    cells += [f"{command[1] / plain[1]:.2f}", f"{command[2]:.0f}", f"{command[2] - plain[2]:.0f}"]
    return " | ".join(cells)


def _title(*first: str) -> None:
    columns = (*first, "plain", *STAGES, "whole", "beyond 3", "CPU", "peak", "over plain")
    print(f"\n| {' | '.join(columns)} |", "|---" * len(columns) + "|", sep="\n", flush=True)


def _plot(found: Sequence[tuple[str, int, Costs]], path: Path) -> None:
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
        top.plot(numbers, [cost.stages.get("calibrate", 0) for _, cost in own], "s-", label="calibrate")
        top.plot(numbers, [cost.stages.get("plan", 0) for _, cost in own], "^-", label="plan")
        top.plot(numbers, [cost.plain[0] for _, cost in own], "k--", label="plain pass")
        top.set(xscale="log", yscale="log", ylabel="seconds" if not column else "", title=f"more {kind}")
        bottom.plot(numbers, [cost.command[2] for _, cost in own], "o-", label="command")
        bottom.plot(numbers, [cost.plain[2] for _, cost in own], "k--", label="plain pass")
        bottom.set(xscale="log", ylim=(0, None), xlabel=kind, ylabel="peak MB" if not column else "")
    for axis, kind in ((axis, kind) for column, kind in enumerate(kinds) for axis in axes[:, column]):
        numbers = [number for of, number, _ in found if of == kind]
        axis.set_xticks(numbers, [f"{number:,}" for number in numbers], fontsize="small")
        axis.minorticks_off()
    axes[0][-1].legend(loc="lower right")
    axes[1][0].legend()
    figure.savefig(path, metadata={"Date": None})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, metavar="MODELS")
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("--tables", nargs="+", choices=("models", "growth"), default=["models", "growth"])
    parser.add_argument("--only", nargs="+", default=None, metavar="NAME", help="models whose name starts like this")
    parser.add_argument("--repeat", type=int, default=2, help="turns of plain pass and command (default 2)")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw the growth")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if "models" in given.tables:
            _title("model, samples")
            for name, model, samples in _models(given.models, given.data, folder):
                if given.only is None or any(name.startswith(start) for start in given.only):
                    print(f"| {name} | {_row(costs(model, samples, given.repeat))} |", flush=True)
        if "growth" in given.tables:
            _title("more", "number")
            grown = []
            for kind, number, model, samples in _growing(folder):
                grown.append((kind, number, costs(model, samples, given.repeat)))
                print(f"| {kind} | {number:,} | {_row(grown[-1][2])} |", flush=True)
            if given.plot is not None:
                _plot(grown, given.plot)


if __name__ == "__main__":
    main()

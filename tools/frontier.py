"""This project and its rivals on the same model, images and number of parameters: one table and one picture.

| column | meaning |
|---|---|
| point | share of the parameters to keep, or of the hidden neurons to remove |
| params | share of the parameters that was kept |
| channels | output channels that went |
| score, drop | the metric of the task (see `tools/tasks.py`), and how far it is below the original's |
| error | of the first output against the original's, relative to how much that varies |
| seconds, peak MB | of the method, in a process of its own |

Methods: `fold`, `kernel` and `sequential` are the refits of this project; see `tools/rivals.py` for the others. No
rival is left with fewer parameters than this project. Where a point counts hidden neurons, this project removes exactly
so many, and the others are brought to the parameters that leaves.

Without --final the results are judged by held-out calibration images, and the test images stay unopened.
--check-budgets checks instead, on the same task, that budgets hold (see `tools/budget_checks.py`).

Usage: python tools/frontier.py TASK MODEL.onnx DATA --final --out frontier.png
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from budget_checks import check_budgets
from rivals import RIVALS, parameters
from tasks import TASKS, Task, error, open_task, outputs, score

from lindep_onnx.api import compress
from lindep_onnx.model import ir as graph
from lindep_onnx.model.cost import cost

__all__ = ["METHODS", "Row", "build", "main", "neuron_target"]

REFITS = ("fold", "kernel", "sequential")
METHODS = (*REFITS, *RIVALS)
COLUMNS = ("method", "point", "params", "channels", "score", "drop", "error", "seconds", "peak MB")


@dataclass(frozen=True)
class Row:
    """One method at one point; see the module for the meaning of the fields."""

    method: str
    point: float
    params: float
    channels: int
    score: float
    drop: float
    error: float
    seconds: float
    peak: int

    def line(self) -> str:
        """The figures as a line of a Markdown table."""
        cells = (
            self.method,
            f"{self.point:.0%}",
            f"{self.params:.2%}",
            str(self.channels),
            f"{self.score:.2%}",
            f"{self.drop:.2%}",
            f"{self.error:.3f}",
            f"{self.seconds:.0f}",
            str(self.peak),
        )
        return f"| {' | '.join(cells)} |"


def build(method: str, model: Path, calib: Path, target: int, out: Path, *, channels: float | None = None) -> None:
    """Write what a method makes of a model.

    Args:
        method: one of `METHODS`.
        model: the original.
        calib: npz of calibration images.
        target: the number of parameters to come down to.
        out: the file to write.
        channels: share of the channels that this project is asked for instead of parameters.
    """
    original = onnx.load(model)
    if method in REFITS:
        share = target / parameters(original)
        budget = {"params": share} if channels is None else {"channels": channels}
        result = compress(model, calib, **budget, refit=method).model
    else:
        result = RIVALS[method](original, calib, target)
    onnx.save(result, out)


def neuron_target(model: Path, calib: Path, removed: int) -> tuple[int, float]:
    """The number of parameters that is left once exactly so many channels are removed by this project.

    Args:
        model: the original.
        calib: npz of calibration images.
        removed: the number of channels.

    Returns:
        The parameters, and the share of the channels that is left.
    """
    before = _size(model)[1]
    share = (before - removed) / before
    found = compress(model, calib, channels=share, refit="fold").report
    gone = found.before.channels - found.after.channels
    if gone != removed:
        raise LookupError(f"No budget removes {removed} channels; the nearest one removes {gone}.")
    return found.after.parameters, share


def rows(task: Task, methods: Sequence[str], points: Sequence[float], folder: Path) -> Iterator[Row | str]:
    """Run every method at every point; a string says why there is no row.

    Args:
        task: model and images.
        methods: of `METHODS`.
        points: see `tasks.Recipe`.
        folder: where models and images go meanwhile.
    """
    calib, result = folder / "calib.npz", folder / "result.onnx"
    np.savez(calib, allow_pickle=False, **{task.input: task.calib})
    reference = outputs(task.model, task.input, task.judged)
    base = score(task, reference, reference)
    before = _size(task.model)
    for point in points:
        target, channels = int(point * before[0]), None
        if task.of_neurons:
            hidden = before[1] - reference.shape[1]
            target, channels = neuron_target(task.model, calib, round(point * hidden))
        for method in methods:
            try:
                seconds, peak = _measured(method, task.model, calib, target, result, channels)
                found = outputs(result, task.input, task.judged)
            except Exception as problem:
                yield f"{method} at {point:.0%}: {type(problem).__name__}: {problem}"
                continue
            after = _size(result)
            reached = score(task, reference, found)
            yield Row(
                method=method,
                point=point,
                params=after[0] / before[0],
                channels=before[1] - after[1],
                score=reached,
                drop=base - reached,
                error=error(reference, found),
                seconds=seconds,
                peak=peak,
            )


def _size(path: Path) -> tuple[int, int]:
    """Parameters and output channels."""
    found = cost(graph.load(path), {})
    return found.parameters, found.channels


def _measured(
    method: str, model: Path, calib: Path, target: int, out: Path, channels: float | None
) -> tuple[float, int]:
    """Build in a fresh process; returns seconds and the peak of its memory in MB."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_build, method, model, calib, target, out, channels).result()


def _build(method: str, model: Path, calib: Path, target: int, out: Path, channels: float | None) -> tuple[float, int]:
    start = time.perf_counter()
    build(method, model, calib, target, out, channels=channels)
    seconds = time.perf_counter() - start
    # getrusage would count the parent too.
    status = Path("/proc/self/status").read_text(encoding="ascii").split()
    return seconds, int(status[status.index("VmHWM:") + 1]) // 1000


# ---- picture ---------------------------------------------------------------------------------------------------


def draw(found: Sequence[Row], title: str, base: float, out: Path) -> None:
    """Score against parameters; of the many modes of a rival the best one at each point.

    Args:
        found: the table.
        title: what is shown.
        base: score of the original.
        out: PNG to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    best: dict[tuple[str, float], Row] = {}
    for row in found:
        key = (row.method if row.method in REFITS else row.method.split("-")[0], row.point)
        if key not in best or best[key].score < row.score:
            best[key] = row
    figure, axes = pyplot.subplots(figsize=(7.0, 4.5), layout="constrained")
    axes.axhline(100 * base, color="0.6", linewidth=1, linestyle=":", label="original")
    for family in dict.fromkeys(name for name, _ in best):
        ours = family in REFITS
        line = sorted((row.params, row.score) for (name, _), row in best.items() if name == family)
        label = f"lindep_onnx, {family}" if ours else family
        shares, scores = 100 * np.array(line).T
        axes.plot(shares, scores, marker="o" if ours else "s", linestyle="-" if ours else "--", label=label)
    axes.set(xlabel="parameters kept [%]", ylabel="score [%]", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out, dpi=150)
    pyplot.close(figure)


# ---- command line ----------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare this project with its rivals at the same size.")
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("model", type=Path, metavar="MODEL.onnx")
    parser.add_argument("data", type=Path, metavar="DATA", help="file or folder of images, see tools/tasks.py")
    parser.add_argument("--final", action="store_true", help="judge by the test images, calibrate with all others")
    parser.add_argument("--points", type=float, nargs="+", metavar="SHARE", help="default: those of the task")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD")
    parser.add_argument("--samples", type=int, metavar="N", help="calibrate with at most N images")
    parser.add_argument("--test-limit", type=int, metavar="N", help="judge by at most N images")
    parser.add_argument("--out", type=Path, metavar="PNG", help="picture to write")
    parser.add_argument("--check-budgets", action="store_true", help="check that budgets hold, with the first method")
    options = parser.parse_args(arguments)
    task = open_task(
        options.task,
        options.model,
        options.data,
        final=options.final,
        samples=options.samples,
        limit=options.test_limit,
    )
    if options.check_budgets:
        refit = next((method for method in options.methods if method in REFITS), "fold")
        return int(not check_budgets(task.model, {task.input: task.calib}, refit))
    reference = outputs(task.model, task.input, task.judged)
    base = score(task, reference, reference)
    kind = "test" if options.final else "held-out calibration"
    title = f"{task.name}: {task.metric} on {len(task.judged)} {kind} images"
    print(f"{title}, calibrated with {len(task.calib)}; original {base:.2%}\n")
    print(f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|", sep="\n", flush=True)
    found, problems = [], []
    with tempfile.TemporaryDirectory(prefix="lindep_onnx_") as folder:
        for row in rows(task, options.methods, options.points or task.points, Path(folder)):
            if isinstance(row, Row):
                print(row.line(), flush=True)
                found.append(row)
            else:
                problems.append(row)
    for problem in problems:
        print(f"\nNo comparison: {problem}")
    if options.out is not None and found:
        draw(found, title, base, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())

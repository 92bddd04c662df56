"""What training against the original wins back, beside the refit alone: no labels but for the accuracy in the table.

| column | meaning |
|---|---|
| point | share of the parameters to keep, or of the hidden neurons to remove |
| params | share of the parameters that was kept |
| original, refit, recovered | the metric of the task (see `tools/tasks.py`) |
| held-out | loss on calibration samples that were not trained on: before, after |
| trained | loss on trained samples at the end: the gap between the two is over-fitting |
| best at | steps after which the held-out loss was lowest |
| seconds | of the refit and all before it, and of the training |
| PyTorch, its seconds | with --torch: as many steps of `tools/torch_recover.py` from the same start |

`--augment` is that of the command line; `tools/augmentations.py` has what suits images. With --rounds the cut is made
in so many rounds, each with its own training; losses are then not shown. Without --final the results are judged by
held-out calibration images, and the test images stay unopened.

Usage: python tools/recover_figures.py TASK MODEL.onnx DATA --points 0.5 0.35 --steps 300 --final
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from tasks import TASKS, Task, open_task, outputs, score

from lindep_onnx.api import compress
from lindep_onnx.data.inputs import InputSpec
from lindep_onnx.data.samples import Part, Samples, open_samples
from lindep_onnx.data.sources import load_function
from lindep_onnx.distill.augment import Augment, augmentation
from lindep_onnx.distill.train import Training, distill
from lindep_onnx.log import Log
from lindep_onnx.model import ir as graph
from lindep_onnx.model.cost import cost
from lindep_onnx.model.edit import GraphEdits, apply_edits
from lindep_onnx.options import TrainingBudget
from lindep_onnx.runtime.backend import Runtime

__all__ = ["main", "row"]

COLUMNS = (
    "point",
    "params",
    "original",
    "refit",
    "recovered",
    "held-out before",
    "held-out after",
    "trained",
    "best at",
    "seconds refit",
    "seconds training",
    "PyTorch",
    "its seconds",
)


def row(
    task: Task,
    point: float,
    steps: int,
    rounds: int,
    holdout: float,
    folder: Path,
    *,
    batch: int,
    augment: Augment | Literal["mix"] | None,
    beside: bool,
) -> str:
    """A line of the table.

    Args:
        task: model and images.
        point: see `tasks.Recipe`.
        steps: of training after each round.
        rounds: in how many the cut is made.
        holdout: share of the calibration images that is not trained on.
        folder: where models go.
        batch: samples in a step.
        augment: see `lindep_onnx.Config`.
        beside: whether PyTorch trains too.
    """
    original = graph.load(task.model)
    before = cost(original, {})
    reference = outputs(task.model, task.input, task.judged)
    budget = {"params": point}
    if task.of_neurons:
        hidden = before.channels - reference.shape[1]
        budget = {"channels": (before.channels - round(point * hidden)) / before.channels}
    calib = {task.input: task.calib}
    start = time.perf_counter()
    refitted = compress(original.proto, calib, **budget, holdout=holdout).model
    seconds = [time.perf_counter() - start]
    start = time.perf_counter()
    losses = ["", "", "", ""]
    if rounds == 1:
        student = graph.load(refitted)
        with _samples(task, original, holdout, batch) as samples:
            training = Training(original, student, TrainingBudget(steps=steps), seed=0, augment=augmentation(augment))
            found = distill(training, samples, Runtime(), Log())
        recovered = apply_edits(student, GraphEdits(constants=found.weights), "").proto
        best = min(found.history, key=lambda entry: entry[2])
        losses = [f"{found.before:.4f}", f"{found.after:.4f}", f"{found.history[-1][1]:.4f}", f"{best[0]} of {steps}"]
    else:
        options = {"rounds": rounds, "recover": steps, "augment": augment, "batch_size": batch}
        recovered = compress(original.proto, calib, **budget, holdout=holdout, **options).model
    seconds.append(time.perf_counter() - start)
    models = {"refit": refitted, "recovered": recovered}
    if beside:
        from torch_recover import RATES, distil  # only this column needs PyTorch

        start = time.perf_counter()
        student = graph.load(refitted)
        with _samples(task, original, holdout, batch) as samples:
            fit, held_out = (
                np.concatenate([batch.feeds[task.input] for batch in samples.batches(part)])
                for part in (Part.FIT, Part.SELECT)
            )
        varied = augmentation(augment)
        weights = distil(original, student, fit, held_out, steps=steps * rounds, augment=varied)
        models["PyTorch"] = apply_edits(student, GraphEdits(constants=weights), "").proto
        seconds.append((time.perf_counter() - start) / len(RATES))
    reached = []
    for label, model in models.items():
        path = folder / f"{task.name}_{point:g}_{label}.onnx"
        onnx.save(model, path)
        reached.append(score(task, reference, outputs(path, task.input, task.judged)))
    cells = [
        f"{point:.0%}",
        f"{cost(graph.load(recovered), {}).parameters / before.parameters:.1%}",
        *(f"{value:.2%}" for value in (score(task, reference, reference), *reached[:2])),
        *losses,
        *(f"{value:.0f}" for value in seconds[:2]),
        *((f"{reached[2]:.2%}", f"{seconds[2]:.0f}") if beside else ("", "")),
    ]
    return f"| {' | '.join(cells)} |"


def _samples(task: Task, model: graph.Model, holdout: float, batch: int) -> Samples:
    """The split that `compress` makes."""
    declared = model.proto.graph.input[0].type.tensor_type.shape.dim
    shape = tuple(dim.dim_value or dim.dim_param for dim in declared)
    spec = InputSpec(task.input, np.dtype(np.float32), shape)
    return open_samples({task.input: task.calib}, [spec], seed=0, holdout=holdout, max_samples=None, batch_size=batch)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("model", type=Path, metavar="MODEL.onnx")
    parser.add_argument("data", type=Path, metavar="DATA", help="see tools/tasks.py")
    parser.add_argument("--points", type=float, nargs="+", metavar="F", help="default: those of the task")
    parser.add_argument(
        "--steps", type=int, default=300, metavar="N", help="of training after each round (default 300)"
    )
    parser.add_argument("--rounds", type=int, default=1, metavar="N")
    parser.add_argument("--holdout", type=float, default=0.15, metavar="F", help="not trained on (default 0.15)")
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="samples in a step (default 32)")
    parser.add_argument("--augment", metavar="mix|FILE.py:FUNC", help="vary what is trained on")
    parser.add_argument("--torch", action="store_true", help="train with PyTorch too")
    parser.add_argument("--final", action="store_true", help="judge by the test images")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the models here")
    options = parser.parse_args(arguments)
    task = open_task(options.task, options.model, options.data, final=options.final)
    augment = load_function(options.augment, "--augment") if ".py:" in (options.augment or "") else options.augment
    print(f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|", sep="\n")
    with tempfile.TemporaryDirectory() as folder:
        for point in options.points or task.points:
            where = options.keep or Path(folder)
            line = row(
                task,
                point,
                options.steps,
                options.rounds,
                options.holdout,
                where,
                batch=options.batch,
                augment=augment,
                beside=options.torch,
            )
            print(line, flush=True)


if __name__ == "__main__":
    main()

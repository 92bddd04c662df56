"""What a model is still good for, by method and size: one row for each task, method and point. See `tasks.py`.

`frontier`: this project (`fold`, `kernel`, `sequential` are its refits) and its rivals (see `rivals.py`) at the same
number of parameters. No rival is left with fewer than this project. Where a point counts hidden neurons, this project
removes exactly so many, and the others are brought to the parameters that leaves.

`recovery`: what training against the original wins back, beside the refit alone and beside PyTorch's Adam with as many
steps from the same start (see `torch_rival.py`); no labels but for the accuracy in the table. Samples are varied as the
models met them in training, or nearly: `augmentations.py`.

`within_a_drop`: the largest reduction of an over-wide net whose accuracy on training images that it was not trained on
drops by at most 0.003, without any training; the test images are opened for the figures that are printed.

`quantised`: static int8 quantisation of the original and of what is left of it.

`latency_budget`: half of the multiply-accumulates, and the same with a latency budget that asks for 85 % of what that
promises. Both are then timed against the original as reports do (`lindep_onnx.runtime.timing`); the ratio, its 95 %
interval, and in the last column the same of a copy of the original.

| column | what |
|---|---|
| point | share of the parameters to keep, or of the hidden neurons to remove |
| params | share of the parameters that was kept |
| channels | output channels that went |
| original, score | the metric of the task |
| error | of the first output against the original's, relative to how much that varies |
| seconds, peak MB | of the method, in a process of its own |
| latency | share of the original's, and its 95 % interval; of a copy of the original in the column `copy` |
| promised, kept | speed-up if time were multiply-accumulates, and the share of it that is measured |
"""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from augmentations import flips_and_shifts, mixtures_and_noise
from measure import Bench, apart, command, ratio
from rivals import RIVALS, UnreachedError
from tasks import SUBJECTS, Task, error, fashion, model_of, normalised, open_task, outputs, score

from lindep_onnx.api import compress
from lindep_onnx.model.cost import cost
from lindep_onnx.model.ir import load
from lindep_onnx.runtime.backend import Runtime
from lindep_onnx.runtime.timing import Stopwatch

REFITS = ("fold", "kernel", "sequential")
METHODS = (*REFITS, *RIVALS)


def _size(model: Path | onnx.ModelProto) -> tuple[int, int]:
    """Parameters and output channels."""
    found = cost(load(model), {})
    return found.parameters, found.channels


def _budget(task: Task, point: float) -> dict[str, float]:
    """What asks this project for a point."""
    if not task.subject.of_neurons:
        return {"params": point}
    channels = _size(task.model)[1]
    hidden = channels - outputs(task.model, task.judged[:1]).shape[1]
    return {"channels": (channels - round(point * hidden)) / channels}


def _judged(task: Task, model: Path | onnx.ModelProto) -> float:
    """The score of a model."""
    reference = outputs(task.model, task.judged)
    return score(task.subject.metric, reference, outputs(model, task.judged), task.labels)


# ---- beside others ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", [name for name, subject in SUBJECTS.items() if subject.points])
def test_frontier(bench: Bench, name: str, method: str) -> None:
    if method.startswith("onnxsim"):
        pytest.importorskip("onnxsim")
    task = open_task(name, bench.places, final=not bench.held_out)
    for cells in bench.once(lambda: list(frontier(task, method, bench.folder))):
        bench.row(task=name, method=method, **cells)


def frontier(
    task: Task, method: str, folder: Path, measured: Callable[..., Any] = apart
) -> Iterator[dict[str, object]]:
    """Run a method at every point of a task; `measured` calls in a fresh process."""
    calib, result = folder / "calib.npz", folder / "result.onnx"
    np.savez(calib, allow_pickle=False, **{task.input: task.calib})
    reference = outputs(task.model, task.judged)
    before = _size(task.model)
    for point in task.subject.points:
        target, budget = int(point * before[0]), _budget(task, point)
        if task.subject.of_neurons:
            target = neuron_target(task.model, calib, budget["channels"])
        try:
            _, seconds, peak = measured(build, method, task.model, calib, target, result, budget)
        except UnreachedError as problem:
            yield {"point": f"{point:.0%}", "score": f"no comparison: {problem}"}
            continue
        found, after = outputs(result, task.judged), _size(result)
        yield {
            "point": f"{point:.0%}",
            "params": f"{after[0] / before[0]:.2%}",
            "channels": before[1] - after[1],
            "original": f"{score(task.subject.metric, reference, reference, task.labels):.2%}",
            "score": f"{score(task.subject.metric, reference, found, task.labels):.2%}",
            "error": f"{error(reference, found):.3f}",
            "seconds": f"{seconds:.0f}",
            "peak MB": peak,
        }


def build(method: str, model: Path, calib: Path, target: int, out: Path, budget: Mapping[str, float]) -> None:
    """Write what a method makes of a model: this project is asked for a budget, its rivals for a target."""
    if method in REFITS:
        onnx.save(compress(model, calib, **budget, refit=method).model, out)
    else:
        onnx.save(RIVALS[method](onnx.load(model), calib, target), out)


def neuron_target(model: Path, calib: Path, share: float) -> int:
    """The number of parameters that is left once this project has come down to a share of the channels.

    Raises:
        LookupError: no budget removes exactly so many.
    """
    found = compress(model, calib, channels=share, refit="fold").report
    removed, gone = round((1 - share) * found.before.channels), found.before.channels - found.after.channels
    if gone != removed:
        raise LookupError(f"No budget removes {removed} channels; the nearest one removes {gone}.")
    return found.after.parameters


# ---- with training ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recovery:
    """One line of the table: so many steps towards a point, with what else differs from the default."""

    name: str
    point: float
    steps: int
    varied: bool = True
    holdout: float = 0.15
    beside: bool = True

    def __str__(self) -> str:
        return f"{self.name}-{self.point:g}-{self.steps}{'-varied' * self.varied}-{self.holdout:g}"


VARIED = {
    "resnet56": flips_and_shifts,
    "lenet": mixtures_and_noise,
    "demo": mixtures_and_noise,
    "overwide": flips_and_shifts,
}
RECOVERIES = (
    Recovery("demo", 0.35, 20),
    Recovery("resnet56", 0.65, 1000, holdout=0.3, beside=False),
    Recovery("resnet56", 0.65, 600, holdout=0.3),
    Recovery("resnet56", 0.65, 600, beside=False),
    *(Recovery("resnet56", point, steps) for point, steps in ((0.5, 600), (0.35, 1000), (0.25, 1000))),
    *(Recovery("resnet56", point, 300, varied=False) for point in (0.5, 0.35)),
    *(Recovery("lenet", point, 20_000) for point in (0.5, 0.7, 0.8, 0.9)),
    Recovery("overwide", 0.05, 500, varied=False),
    Recovery("overwide", 0.03, 9000),
    Recovery("overwide", 0.02, 3000, beside=False),
    Recovery("efficientnet_lite0", 0.9, 40, varied=False),
)


@pytest.mark.parametrize("case", RECOVERIES, ids=str)
def test_recovery(bench: Bench, case: Recovery) -> None:
    task = open_task(case.name, bench.places, final=not bench.held_out)
    augment = VARIED[case.name] if case.varied else None
    calib, budget = {task.input: task.calib}, _budget(task, case.point)
    refitted = compress(task.model, calib, **budget, holdout=case.holdout)
    options = {"recover": case.steps, "augment": augment, "holdout": case.holdout, "batch_size": 32}
    trained = bench.once(compress, task.model, calib, **budget, **options)
    bench.row(
        task=case.name,
        point=f"{case.point:.0%}",
        steps=case.steps,
        varied="yes" if case.varied else "",
        holdout=case.holdout,
        params=f"{trained.report.after.parameters / trained.report.before.parameters:.1%}",
        original=f"{_judged(task, task.model):.2%}",
        refit=f"{_judged(task, refitted.model):.2%}",
        recovered=f"{_judged(task, trained.model):.2%}",
        seconds=f"{trained.report.seconds['recover']:.0f}",
        **(_beside(task, refitted.model, case, augment) if case.beside else {}),
        said="; ".join(note for note in trained.report.notes if "rain" in note),
    )


def _beside(task: Task, refitted: onnx.ModelProto, case: Recovery, augment: Any) -> dict[str, str]:
    if importlib.util.find_spec("torch") is None:
        return {"PyTorch": "not installed"}
    from torch_rival import RATES, distil  # only this column needs it

    order = np.random.default_rng(0).permutation(len(task.calib))
    kept = int(case.holdout * len(order))
    parts = task.calib[order[kept:]], task.calib[order[:kept]]
    start = time.perf_counter()
    model = distil(load(task.model), load(refitted), *parts, steps=case.steps, augment=augment)
    seconds = (time.perf_counter() - start) / len(RATES)
    return {"PyTorch": f"{_judged(task, model):.2%}", "its seconds": f"{seconds:.0f}"}


# ---- by accuracy ------------------------------------------------------------------------------------------------

#: The over-wide net was trained on the images before this one.
TRAINED_ON, MAX_DROP, BATCH = 55_000, 0.003, 500


def test_within_a_drop(bench: Bench) -> None:
    model = model_of("overwide", bench.places)
    (images, labels), (test, truth) = fashion(bench.places, False), fashion(bench.places, True)
    unseen, answers = normalised(images[TRAINED_ON:]), labels[TRAINED_ON:]
    name = onnx.load(model).graph.input[0].name

    def accuracy(running: Any) -> float:
        starts = range(0, len(unseen), BATCH)
        scores = np.concatenate([running.run(None, {name: unseen[at : at + BATCH]})[0] for at in starts])
        return float(np.mean(scores.argmax(axis=1) == answers))

    calib = normalised(images[:TRAINED_ON][:: TRAINED_ON // 4000][:4000])
    result = bench.once(compress, model, {name: calib}, eval=accuracy, max_drop=MAX_DROP, seed=0)
    reached = [np.mean(outputs(one, normalised(test)).argmax(axis=1) == truth) for one in (model, result.model)]
    before, after = result.report.before, result.report.after
    for what in ("parameters", "macs", "channels", "bytes", "latency_ms"):
        old, new = getattr(before, what), getattr(after, what)
        bench.row(what=what, original=f"{old:,.4g}", result=f"{new:,.4g}", left=f"{new / old:.2%}")
    bench.row(what="test accuracy", original=f"{reached[0]:.2%}", result=f"{reached[1]:.2%}")


# ---- in 8 bits --------------------------------------------------------------------------------------------------

QUANTISATION_SAMPLES, KEEP = 256, 0.65


@pytest.mark.parametrize("name", [name for name, subject in SUBJECTS.items() if subject.points])
def test_quantised(bench: Bench, name: str) -> None:
    task = open_task(name, bench.places)
    small, int8, both = (bench.folder / f"{what}.onnx" for what in ("small", "int8", "both"))
    budget = _budget(task, 1 - KEEP if task.subject.of_neurons else KEEP)
    onnx.save(compress(task.model, {task.input: task.calib}, **budget).model, small)
    bench.once(quantise, task.model, int8, task)
    quantise(small, both, task)
    models = {"original": task.model, "int8": int8, "compressed": small, "compressed, int8": both}
    with Stopwatch(task.model, {task.input: task.calib[:1]}, Runtime()) as stopwatch:
        times = {what: stopwatch.compare(model) for what, model in models.items()}
    for what, model in models.items():
        reached, kilobytes = f"{_judged(task, model):.2%}", f"{model.stat().st_size / 1000:,.0f}"
        bench.row(
            **{
                "task": name,
                "model": what,
                task.subject.metric: reached,
                "kB": kilobytes,
                "ms": f"{times[what].after:.2f}",
                "latency": ratio(times[what]),
            }
        )


def quantise(source: Path, target: Path, task: Task) -> None:
    """Static int8 quantisation by ONNX Runtime."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    fixed = onnx.load(source, load_external_data=False).graph.input[0].type.tensor_type.shape.dim[0].dim_value or 32
    images = task.calib[:QUANTISATION_SAMPLES]
    batches = iter([{task.input: images[at : at + fixed]} for at in range(0, len(images), fixed)])
    reader = type("Reader", (CalibrationDataReader,), {"get_next": lambda _: next(batches, None)})
    ready = target.with_suffix(".ready.onnx")
    quant_pre_process(str(source), str(ready))
    types = {"activation_type": QuantType.QInt8, "weight_type": QuantType.QInt8}
    quantize_static(str(ready), str(target), reader(), quant_format=QuantFormat.QDQ, per_channel=True, **types)


# ---- by the clock -----------------------------------------------------------------------------------------------

LATENCY_SAMPLES = {"demo": 200, "resnet56": 400, "mobilenetv2": 128, "efficientnet_lite0": 128, "hed_vgg16": 24}
SHARE, KEPT, TIMED = 0.5, 0.85, 6.0


@pytest.mark.parametrize("limited", [False, True], ids=["macs", "latency"])
@pytest.mark.parametrize("name", LATENCY_SAMPLES)
def test_latency_budget(bench: Bench, name: str, limited: bool) -> None:
    task = open_task(name, bench.places, samples=LATENCY_SAMPLES[name], limit=LATENCY_SAMPLES[name])
    calib, result, report = (bench.folder / what for what in ("calib.npz", "small.onnx", "report.json"))
    np.savez(calib, allow_pickle=False, **{task.input: task.calib})
    asked = ["--macs", f"{SHARE}", *(["--latency", f"{SHARE / KEPT:.3f}"] if limited else [])]
    bench.once(command, task.model, result, "--calib", calib, "--force", "--report", report, "--refit", "fold", *asked)
    found = json.loads(report.read_text(encoding="utf-8"))
    left = found["after"]["macs"] / found["before"]["macs"]
    with Stopwatch(task.model, {task.input: task.calib[:1]}, Runtime(), seconds=TIMED) as stopwatch:
        timing = stopwatch.compare(result)
    agreement = found["verification"]["agreement"]
    bench.row(
        **{"model": name, "asked for": " ".join(asked), "MACs": f"{left:.1%}", "promised": f"{1 / left:.2f}"},
        latency=ratio(timing),
        kept=f"{left / timing.ratio:.0%}",
        agreement="-" if agreement is None else f"{agreement:.1%}",
        copy=ratio(timing.control),
    )

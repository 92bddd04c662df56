"""What the command does to the latency: results timed as reports time them, each model alone (`runtime/timing.py`).

Nothing else may run on the machine. One sample in a run, of resnet56 also 32.

`alone`: originals against copies of themselves: what a difference has to exceed.

`never_slower`: without options, with `--params .8` and with `--macs .7`; and the same with free widths.

`on_time`: `--latency` at .9, .7 and .5: met means from F - .05 to F; a refusal prints its reason.

`reached`: what `--macs` in ten steps and three kinds of widths comes to, to hold `on_time` against.

`destroyed`: commands that leave little of a model. None may end with exit code 0 near chance.

| column | what |
|---|---|
| params | share of the parameters that is left |
| latency | time of a run as a share of the original's, and its 95 % interval |
| copy | the same of a copy of the original |
| said | latency in the report |
| slower | whether the interval begins above 1.02 |
| original, score | the metric of the task |
| error | of the first output against the original's, relative to how much that varies |
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from measure import Bench, Taken, command, ratio
from tasks import Task, error, open_task, outputs, score

from lindep_onnx.runtime.backend import Runtime
from lindep_onnx.runtime.timing import SLOWER, Stopwatch, Timing

#: Samples to calibrate with and to judge by.
SAMPLES = {
    "demo": (400, 1000),
    "mobilenetv2": (128, 200),
    "efficientnet_lite0": (100, 200),
    "resnet56": (400, 1000),
    "cifar10_keras_cnn": (400, 1000),
    "crepe_tiny": (400, 1000),
    "hed_vgg16": (24, 24),
    "realesr_animevideov3_x4": (24, 24),
    "ppocrv6_tiny_rec": (200, 100),
}
WITHOUT_DATA = ("--random-calib", "64")
DESTROYING = (
    ("--params", ".05"), ("--params", ".01"), ("--macs", ".1"), ("--latency", ".3"), ("--max-samples", "4"),
    ("--params", ".5", *WITHOUT_DATA), ("--params", ".001"),
)  # fmt: skip
#: Moments by model.
SHARED = tempfile.TemporaryDirectory()
#: Seconds of one comparison, and how far below the limit a latency may end.
SECONDS, WITHIN = 6.0, 0.05
#: Shares of the multiply-accumulates.
STEPS = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)


def _task(bench: Bench, name: str) -> Task:
    samples, limit = SAMPLES[name]
    return open_task(name, bench.places, final=not bench.held_out, samples=samples, limit=limit)


def _compressed(bench: Bench, task: Task, options: tuple[str, ...]) -> tuple[Taken, Path, dict[str, Any]]:
    """What the command did, its model, and its report (empty where there is none)."""
    calib, result, report = (bench.folder / what for what in ("calib.npz", "small.onnx", "report.json"))
    np.savez(calib, allow_pickle=False, **{task.input: task.calib})
    result.unlink(missing_ok=True)
    report.unlink(missing_ok=True)
    data = () if WITHOUT_DATA[0] in options else ("--calib", calib, *_moments(bench, task, calib, options))
    found: Taken = bench.once(command, task.model, result, *data, "--report", report, *options)
    return found, result, json.loads(report.read_text(encoding="utf-8")) if report.exists() else {}


def _moments(bench: Bench, task: Task, calib: Path, options: tuple[str, ...]) -> tuple[object, ...]:
    """What the runs of one model with the same data share, curves included, so that it is found once."""
    if "--max-samples" in options:
        return ()
    known = Path(SHARED.name) / f"{task.model.stem}.moments"
    if not known.exists():
        command(task.model, bench.folder / "first.onnx", "--calib", calib, "--macs", ".95", "--save-moments", known)
    return "--load-moments", known


def timed(task: Task, model: Path, batch: int = 1) -> Timing:
    """A model beside the original, on so many samples in a run."""
    feeds = {task.input: np.resize(task.calib, (batch, *task.calib.shape[1:]))}
    with Stopwatch(task.model, feeds, Runtime(), batch=batch, seconds=SECONDS) as stopwatch:
        return stopwatch.compare(model)


def _quality(task: Task, model: Path) -> dict[str, str]:
    reference, found = outputs(task.model, task.judged), outputs(model, task.judged)
    own, other = (score(task.subject.metric, reference, given, task.labels) for given in (reference, found))
    return {"original": f"{own:.1%}", "score": f"{other:.1%}", "error": f"{error(reference, found):.2g}"}


def _clock(timing: Timing) -> dict[str, str]:
    return {"latency": ratio(timing), "copy": ratio(timing.control), "slower": "YES" if timing.low > SLOWER else "no"}


def _left(report: dict[str, Any]) -> str:
    return f"{report['after']['parameters'] / report['before']['parameters']:.1%}" if report else "-"


@pytest.mark.parametrize("name", SAMPLES)
def test_alone(bench: Bench, name: str) -> None:
    task = _task(bench, name)
    for batch in (1, 32) if name == "resnet56" else (1,):
        timing = bench.once(timed, task, task.model, batch) if batch == 1 else timed(task, task.model, batch)
        bench.row(model=name, batch=batch, ms=f"{timing.before:.3g}", **_clock(timing))


def _row(bench: Bench, name: str, options: tuple[str, ...]) -> None:
    task = _task(bench, name)
    found, model, report = _compressed(bench, task, options)
    cells = {"model": name, "options": " ".join(options) or "none", "exit": str(found.code), "params": _left(report)}
    if not model.exists():
        bench.row(**cells, latency=found.said.strip()[-200:])
        return
    for batch in (1, 32) if name == "resnet56" else (1,):
        bench.row(**cells, batch=batch, **_clock(timed(task, model, batch)), **_quality(task, model))


@pytest.mark.parametrize("widths", [(), ("--round-to", "1")], ids=["rule", "free"])
@pytest.mark.parametrize("options", [(), ("--params", ".8"), ("--macs", ".7")], ids=["lossless", "params", "macs"])
@pytest.mark.parametrize("name", SAMPLES)
def test_never_slower(bench: Bench, name: str, options: tuple[str, ...], widths: tuple[str, ...]) -> None:
    _row(bench, name, (*options, *widths))


@pytest.mark.slow
@pytest.mark.parametrize("share", STEPS)
@pytest.mark.parametrize("multiple", ["1", "8", "16"])
@pytest.mark.parametrize("name", SAMPLES)
def test_reached(bench: Bench, name: str, multiple: str, share: float) -> None:
    _row(bench, name, ("--macs", f"{share}", "--round-to", multiple, "--force"))


@pytest.mark.parametrize("share", [0.9, 0.7, 0.5])
@pytest.mark.parametrize("name", SAMPLES)
def test_on_time(bench: Bench, name: str, share: float) -> None:
    task = _task(bench, name)
    found, model, report = _compressed(bench, task, ("--latency", f"{share}"))
    cells = {"model": name, "asked for": f"{share}", "exit": str(found.code), "params": _left(report)}
    if not model.exists():
        bench.row(**cells, met="refused", why=found.said.strip()[-300:].replace("\n", " "))
        return
    timing = timed(task, model)
    met = "yes" if share - WITHIN <= timing.ratio <= share else "NO"
    if timing.ratio < share and report["verification"]["passed"] and report["verification"]["status"] == "passed":
        met = "free"  # lossless, and faster than it has to be
    said = f"{report['latency']['ratio']:.2f}"
    bench.row(**cells, met=met, said=said, latency=ratio(timing), copy=ratio(timing.control), **_quality(task, model))


@pytest.mark.parametrize("options", DESTROYING, ids=" ".join)
@pytest.mark.parametrize("name", ["demo", "resnet56", "mobilenetv2", "efficientnet_lite0", "ppocrv6_tiny_rec"])
def test_destroyed(bench: Bench, name: str, options: tuple[str, ...]) -> None:
    task = _task(bench, name)
    found, model, report = _compressed(bench, task, options)
    verified = report.get("verification") or {}
    status = verified.get("status", "passed" if verified.get("passed") else "failed") if verified else "-"
    quality = _quality(task, model) if model.exists() else {}
    kept = verified.get("agreement")
    quality["held out"] = "-" if kept is None else f"{kept:.2f} of {verified['samples']}"
    bench.row(model=name, options=" ".join(options), exit=found.code, status=status, params=_left(report), **quality)
    assert status in ("unchecked", "failed", "-") and model.exists() == (found.code == 0), found.said

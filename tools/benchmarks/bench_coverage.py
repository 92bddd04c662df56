"""What the tool can touch, and that it breaks nothing: a sweep over real models and over the test suite of ONNX.

Every model is compressed without loss on random data of its declared inputs. It has to end in a verified model or in a
named reason: no traceback, no wrong output. Outputs are compared here once more, in ONNX Runtime, on other random data;
a model from which nothing went has to be the original to the last byte, but for the metadata entry.

The report has one row for each real model:

| column | what |
|---|---|
| channels | output channels of Conv, ConvTranspose, Gemm and MatMul with constant weights |
| eligible | those that may go, as far as the graph is concerned |
| parameters | share of the elements of constant matrices and kernels on an eligible channel, read or made |
| outcome | channels that went on random data, or the reason why none could |
| refused | channels by reason |

`python -m pytest tools/benchmarks/bench_coverage.py -m slow --models MODELS --write docs/coverage.md` tries every model
in a folder and every graph of the suite.
"""

from __future__ import annotations

import logging
import math
import multiprocessing
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import TimeoutError as Timeout
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnxruntime
import pytest
from measure import Bench
from numpy.typing import NDArray
from tasks import ROOT, session

from lindep_onnx.api import compress
from lindep_onnx.errors import LindepError
from lindep_onnx.model.edit import METADATA_KEY
from lindep_onnx.model.ir import load
from lindep_onnx.model.shapes import resolve
from lindep_onnx.structure.rules import supported
from lindep_onnx.structure.trace import trace
from lindep_onnx.structure.types import FROZEN, Structure

Array: TypeAlias = NDArray[Any]
Feeds: TypeAlias = "dict[str, Array]"

#: Random samples for each model, and seconds that one may take.
SAMPLES, SECONDS = 16, 600.0
#: Sizes tried for dimensions that a model leaves open, behind the batch.
SIZES = (64, 32, 128, 224, 16, 512, 8, 4, 1)
BAD = ("crash", "wrong")
#: Relative error of an output on other data that counts as wrong.
WRONG = 1e-2


@dataclass(frozen=True)
class Task:
    """A model to try: a file, or serialised, with inputs that are known to fit it."""

    name: str
    source: Path | bytes
    feeds: Feeds = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What came of one model; see the module for the meaning of the fields.

    Attributes:
        name: of the model.
        kind: "verified", "unchanged", "reason", "unrunnable" (ONNX Runtime cannot run it either), "crash" or "wrong".
        text: channels that went, the reason, or the traceback.
        coverage: a row of the table; None where the model cannot be read.
        seconds: of the compression.
    """

    name: str
    kind: str
    text: str
    coverage: Coverage | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Coverage:
    """What tracing says about a model."""

    channels: int
    eligible: int
    parameters: float
    refused: tuple[tuple[str, int], ...]
    messages: tuple[tuple[str, str], ...] = ()


def coverage(structure: Structure) -> Coverage:
    """Count what may go."""
    produced = np.concatenate([np.empty(0, np.int64), *(producer.atoms for producer in structure.producers)])
    matrices = {name: value for name, value in structure.shape_info.constants.items() if _is_weight(structure, name)}
    total = sum(value.size for value in matrices.values())
    touched = sum(value.size * _touched(structure, name) for name, value in matrices.items())
    refused: Counter[str] = Counter()
    for refusal in structure.refusals:
        refused[refusal.reason.code] += refusal.channels
    return Coverage(
        channels=len(produced),
        eligible=int((structure.unit[produced] != FROZEN).sum()),
        parameters=touched / total if total else 0.0,
        refused=tuple(refused.most_common()),
        messages=tuple(sorted({(refusal.reason.code, refusal.reason.message) for refusal in structure.refusals})),
    )


def _is_weight(structure: Structure, name: str) -> bool:
    value = structure.shape_info.constants[name]
    if value.dtype.kind not in "fV" or sum(size > 1 for size in value.shape) < 2:
        return False
    return any(name in node.inputs for node in structure.model.consumers.get(name, ())) and not any(
        output in structure.shape_info.constants
        for node in structure.model.consumers.get(name, ())
        for output in node.outputs
    )


def _touched(structure: Structure, name: str) -> float:
    """Share of the elements that lie on an eligible row or column."""
    for axes in structure.reads.get(name, {}).values():
        left = 1.0
        for atoms in axes.values():
            left *= float((structure.unit[atoms] == FROZEN).mean())
        return 1.0 - left
    return 0.0


# ---- one model ----------------------------------------------------------------------------------------------------


def attempt(task: Task, samples: int) -> Outcome:
    """Compress one model on random data, and compare."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    onnxruntime.set_default_logger_severity(4)
    start = time.perf_counter()
    row: Coverage | None = None
    try:
        proto = onnx.load(task.source) if isinstance(task.source, Path) else onnx.ModelProto.FromString(task.source)
        model = load(proto)
        row = coverage(trace(model, resolve(model)))
        rng = np.random.default_rng(0)
        running, feeds = _fitting(proto, task.feeds, rng)
        if running is None:
            return _finished(task, "unrunnable", feeds, row, start)
        calib = [_varied(feeds, rng) for _ in range(samples)]
        result = compress(proto, calib, round_to=1, benchmark=0.01)
        gone = result.report.before.channels - result.report.after.channels
        if gone == 0 and not _same(proto, result.model):
            return _finished(task, "wrong", "nothing went, and yet the model differs", row, start)
        error = _error(running, result.model, [_varied(feeds, rng) for _ in range(3)]) if gone else 0.0
        if error > WRONG:
            return _finished(task, "wrong", f"error {error:.2g} with {gone} channels gone", row, start)
        return _finished(task, "verified" if gone else "unchanged", str(gone), row, start)
    except LindepError as error:
        return _finished(task, "reason", f"{type(error).__name__}: {str(error).splitlines()[0]}", row, start)
    except Exception:
        return _finished(task, "crash", traceback.format_exc(), row, start)


def _finished(task: Task, kind: str, text: object, row: Coverage | None, start: float) -> Outcome:
    return Outcome(task.name, kind, str(text), row, time.perf_counter() - start)


def _same(before: onnx.ModelProto, after: onnx.ModelProto) -> bool:
    plain = []
    for proto in (before, after):
        copy = onnx.ModelProto()
        copy.CopyFrom(proto)
        for entry in [entry for entry in copy.metadata_props if entry.key == METADATA_KEY]:
            copy.metadata_props.remove(entry)
        plain.append(copy.SerializeToString(deterministic=True))
    return plain[0] == plain[1]


def _fitting(
    proto: onnx.ModelProto, given: Feeds, rng: np.random.Generator
) -> tuple[onnxruntime.InferenceSession | None, Any]:
    """A session and inputs that it accepts; None and why not, if there are none."""
    reason = ""
    try:
        running = session(proto, 1)
        for size in SIZES if not given else SIZES[:1]:
            feeds = given or {
                value.name: _random(value, size, rng)
                for value in proto.graph.input
                if value.name in {known.name for known in running.get_inputs()}
            }
            try:
                running.run(None, feeds)
            except Exception as error:  # ONNX Runtime raises many types
                reason = reason or str(error)
            else:
                return running, feeds
    except Exception as error:  # and so do models it cannot load, and inputs that are no tensors
        reason = str(error)
    return None, reason.strip().splitlines()[0] if reason.strip() else "no inputs fit it"


def _random(value: onnx.ValueInfoProto, size: int, rng: np.random.Generator) -> Array:
    tensor = value.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    shape = [
        dim.dim_value if dim.dim_value > 0 else (1 if axis == 0 else size) for axis, dim in enumerate(tensor.shape.dim)
    ]
    if dtype.kind in "iu":
        return rng.integers(0, 2, shape).astype(dtype)
    return rng.normal(size=shape).astype(dtype) if dtype.kind in "fV" else np.zeros(shape, dtype)


def _varied(feeds: Feeds, rng: np.random.Generator) -> Feeds:
    """Other values of the same sizes; what is no floating-point number stays, since it may be an index."""
    return {
        name: rng.normal(size=value.shape).astype(value.dtype)
        if isinstance(value, np.ndarray) and value.dtype.kind == "f"
        else value
        for name, value in feeds.items()
    }


def _error(original: onnxruntime.InferenceSession, proto: onnx.ModelProto, data: Sequence[Feeds]) -> float:
    other = session(proto, 1)
    worst = 0.0
    for feeds in data:
        for left, right in zip(original.run(None, feeds), other.run(None, feeds), strict=True):
            if isinstance(left, np.ndarray) and left.dtype.kind == "f":
                difference = np.abs(left.astype(np.float64) - right).max(initial=0.0)
                worst = max(worst, float(difference / (np.abs(left).max(initial=0.0) + 1e-12)))
            elif not np.array_equal(left, right):
                return math.inf
    return worst


# ---- many models --------------------------------------------------------------------------------------------------


def sweep(tasks: Iterable[Task], samples: int = SAMPLES, seconds: float = SECONDS) -> list[Outcome]:
    """Try all models, in another process, so that a crash or an endless loop is an outcome too."""
    outcomes = []
    pool = _pool()
    for task in tasks:
        try:
            outcome = pool.submit(attempt, task, samples).result(timeout=seconds)
        except Timeout:
            for process in pool._processes.values():
                process.terminate()
            outcome, pool = Outcome(task.name, "crash", f"no end after {seconds:.0f} s"), _pool()
        except BrokenProcessPool:
            outcome, pool = Outcome(task.name, "crash", "the process died"), _pool()
        outcomes.append(outcome)
        if outcome.kind in BAD:
            print(f"{outcome.kind.upper()} {outcome.name}\n{outcome.text}", flush=True)
    pool.shutdown()
    return outcomes


def _pool() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


def _files(folder: Path) -> Iterator[Task]:
    for path in sorted(folder.rglob("*.onnx")):
        yield Task(path.stem if path.stem != "model" else f"{path.parent.name}/model", path)


def _suite() -> Iterator[Task]:
    """Every graph of the backend test suite of the installed onnx."""
    from onnx.backend.test.case.node import collect_testcases

    warnings.simplefilter("ignore")
    for case in collect_testcases(None):
        names = [value.name for value in case.model.graph.input]
        inputs = case.data_sets[0][0] if case.data_sets else ()
        yield Task(case.name, case.model.SerializeToString(), dict(zip(names, inputs, strict=False)))
    data = Path(onnx.__file__).parent / "backend" / "test" / "data"
    for path in sorted(data.glob("*/*/model.onnx")):
        yield Task(f"{path.parents[1].name}/{path.parent.name}", path, _stored(path))
    for path in sorted(data.glob("light/*.onnx")):
        yield Task(f"light/{path.stem}", path)


def _stored(path: Path) -> Feeds:
    """The inputs of the first data set beside a model; nothing if they are no plain tensors."""
    names = [value.name for value in onnx.load(path, load_external_data=False).graph.input]
    feeds: Feeds = {}
    for name, file in zip(names, sorted(path.parent.glob("test_data_set_0/input_*.pb")), strict=False):
        tensor = onnx.TensorProto.FromString(file.read_bytes())
        feeds[name] = onnx.numpy_helper.to_array(tensor)
    return feeds


# ---- the report ---------------------------------------------------------------------------------------------------


def report(models: Sequence[Outcome], suite: Sequence[Outcome]) -> str:
    """The whole of `docs/coverage.md`."""
    lines = [
        "# Coverage",
        "",
        "Made by `python -m pytest tools/benchmarks/bench_coverage.py -m slow --models MODELS --write FILE`;",
        "the columns are explained there.",
        "",
        "## Operators",
        "",
        f"{len(supported())} operators have a rule; whatever feeds or reads another one is left alone, and the report "
        "of each run says so:",
        "",
        ", ".join(supported()) + ".",
        "",
    ]
    if models:
        lines += ["## Models", "", "| model | channels | eligible | parameters | outcome | refused |", "|---" * 6 + "|"]
        lines += [f"| {' | '.join(_row(outcome).values())} |" for outcome in models] + [""]
        rows = [outcome.coverage for outcome in models if outcome.coverage is not None]
        messages = dict(message for row in rows for message in row.messages)
        lines += ["Why channels are refused:", ""]
        lines += [f"- `{code}`: {text}." for code, text in sorted(messages.items())] + [""]
    for title, outcomes in (("Models", models), ("The test suite of ONNX", suite)):
        if outcomes:
            lines += [f"## {title}: what came of them", "", *_summary(outcomes), ""]
    return "\n".join(lines)


def _row(outcome: Outcome) -> dict[str, str]:
    row = outcome.coverage or Coverage(0, 0, 0.0, ())
    text = f"{outcome.text} channels went" if outcome.kind == "verified" else outcome.kind
    if outcome.kind in ("reason", "unrunnable"):
        text += ": " + outcome.text.replace("|", "/")[:120]
    refused = ", ".join(f"{code} {count}" for code, count in row.refused)
    return {
        "model": outcome.name,
        "channels": str(row.channels),
        "eligible": str(row.eligible),
        "parameters": f"{row.parameters:.1%}",
        "outcome": text,
        "refused": refused,
    }


def _summary(outcomes: Sequence[Outcome]) -> Iterator[str]:
    counts = Counter(outcome.kind for outcome in outcomes)
    meaning = {
        "verified": "smaller, and the same outputs",
        "unchanged": "nothing went; byte for byte the original",
        "reason": "a named reason why the model cannot be handled",
        "unrunnable": "ONNX Runtime does not run the original either",
        "wrong": "WRONG OUTPUT",
        "crash": "TRACEBACK",
    }
    yield from ("| outcome | models |", "|---|---|")
    yield from (f"| {text} | {counts[kind]} |" for kind, text in meaning.items())
    reasons = Counter(outcome.text.split(":")[0] for outcome in outcomes if outcome.kind == "reason")
    for reason, count in reasons.most_common():
        example = next(o for o in outcomes if o.kind == "reason" and o.text.startswith(reason))
        yield f"\n{reason}: {count}, for instance {example.name} ({example.text[len(reason) + 2 :][:150]})"


@pytest.mark.slow
def test_every_model_and_every_graph(bench: Bench) -> None:
    models = bench.once(sweep, _files(bench.places.models) if bench.places.models else ())
    suite = sweep(_suite())
    _tables(models, suite, bench)
    if bench.write is not None:
        bench.write.write_text(report(models, suite) + "\n", encoding="utf-8")
    assert not [outcome.name for outcome in (*models, *suite) if outcome.kind in BAD]


def test_the_demonstration_model(bench: Bench) -> None:
    (found,) = bench.once(sweep, _files(ROOT / "models"))
    _tables([found], [], bench)
    assert found.kind == "verified"


def _tables(models: Sequence[Outcome], suite: Sequence[Outcome], bench: Bench) -> None:
    for outcome in models:
        bench.row(**_row(outcome))
    for kind, count in Counter(outcome.kind for outcome in suite).items():
        bench.row(model=f"ONNX test suite: {count} graphs", outcome=kind)

"""Compress what exporters, converters and optimisers make of real models: nothing may end in a traceback.

    python tools/benchmarks/mutate.py run OUT.json MODEL.onnx ... --data DIR [--seconds S]
            [--count N] [--first SEED] [--mode M]
    python tools/benchmarks/mutate.py one SEED MODEL.onnx --data DIR [--mode M]
    python tools/benchmarks/mutate.py table OUT.json ...

A seed picks one to three kinds of `mutations.KINDS` and whether the model is given channels to remove first
(`mutations.copies`); it also picks whether the model is traced alone, or compressed: by what its weights prove, without
loss, or to 80 % of the parameters.
`DIR/NAME.npz` holds the data of `real_exports.py`; a model without such a file gets random numbers. `run` goes through
the models in turn and keeps one JSON record for each try, by which `one` repeats it, and files of which `table` puts
together.

What is asked of a try, in this order:

- the model is read, traced and planned, or there is an error of this package in one line;
- channels that may go in the original may go, or there are more refusals, with reasons, or fewer channels;
- what is written loads in ONNX Runtime and has outputs of the same shapes, which without loss are those of the mutated
  original within rounding, and else as far from it as the report says.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import TimeoutError as Timeout
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnxruntime
from bench_coverage import Coverage, coverage
from mutations import KINDS, Case, InapplicableError, copies
from numpy.typing import NDArray
from tasks import session

from lindep_onnx.api import Result, compress, load_and_trace
from lindep_onnx.errors import LindepError
from lindep_onnx.options import Config

Array: TypeAlias = NDArray[Any]

SAMPLES, SECONDS = 8, 300.0
#: What is asked for, and how often: the first two go fast.
MODES: Mapping[str, Mapping[str, Any]] = {
    "traced": {},
    "proven": {"proven_only": True, "round_to": 1},
    "lossless": {"round_to": 1},
    "params .8": {"params": 0.8},
}
SHARES = (0.4, 0.4, 0.1, 0.1)
BAD = ("traceback", "wrong", "unloadable", "lost", "died", "timeout")
#: Relative error of an output that is rounding, and what an error on all samples may be of that on held-out ones.
ROUNDING, HALF_ROUNDING, TIMES, PLUS = 1e-3, 3e-2, 4.0, 0.05


@dataclass(frozen=True)
class Try:
    """One mutated model and what came of it.

    Attributes:
        seed: that made it.
        model: name of the file.
        mode: key of `MODES`.
        copied: whether channels were made copies of others first.
        kinds: of mutation, in order.
        outcome: "fine", "error" (one line of this package), "unrunnable" (ONNX Runtime does not take the mutated model
            either), "inapplicable" (no kind found anything to do), or one of `BAD`.
        text: the error or the traceback.
        eligible: channels that may go, of the original and of the mutated one.
        channels: channels in all, of both.
        gone: channels that went, of the original by what its weights prove (-1 where that was not asked) and of the
            mutated one.
        seconds: it took.
    """

    seed: int
    model: str
    mode: str
    copied: bool
    kinds: tuple[str, ...]
    outcome: str
    text: str = ""
    eligible: tuple[int, int] = (0, 0)
    channels: tuple[int, int] = (0, 0)
    gone: tuple[int, int] = (0, 0)
    seconds: float = 0.0


class WrongError(Exception):
    """A result does not keep what was promised: kind of outcome, and how."""


def attempt(seed: int, path: Path, data: Path | None, mode: str | None = None) -> Try:
    """Mutate a model, compress it, and look at the result; a mode that is given is taken in the place of the seed's."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    onnxruntime.set_default_logger_severity(4)
    start, rng = time.perf_counter(), np.random.default_rng(seed)
    case, copied = original(path, data), bool(rng.random() < 0.5)
    case = copies(case, rng) if copied else case
    drawn = str(rng.choice(list(MODES), p=SHARES))
    found = Try(seed, path.stem, mode or drawn, copied, (), "inapplicable")
    kinds: list[str] = []
    wanted = int(rng.integers(1, 4))
    for kind in rng.permutation(list(KINDS)):
        if len(kinds) == wanted:
            break
        try:
            case = KINDS[kind](case, rng)
            kinds.append(str(kind))
        except InapplicableError as error:
            found = replace(found, text=f"{kind}: {str(error).strip()[:200]}")
    if kinds:
        found = _tried(replace(found, kinds=tuple(kinds), text=""), case, path, data)
    return replace(found, seconds=time.perf_counter() - start)


def original(path: Path, data: Path | None) -> Case:
    """A model and its samples."""
    model = onnx.load(path)
    if data is not None and (data / f"{path.stem}.npz").exists():
        with np.load(data / f"{path.stem}.npz") as archive:
            return Case(model, {name: archive[name][:SAMPLES] for name in archive.files})
    held, rng = {tensor.name for tensor in model.graph.initializer}, np.random.default_rng(0)
    feeds = {}
    for value in model.graph.input:
        if value.name not in held:
            shape = [SAMPLES, *(dim.dim_value or 32 for dim in value.type.tensor_type.shape.dim[1:])]
            dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            feeds[value.name] = rng.normal(size=shape).astype(dtype)
    return Case(model, feeds)


def _tried(found: Try, case: Case, path: Path, data: Path | None) -> Try:
    with tempfile.TemporaryDirectory() as folder:
        source: Path | onnx.ModelProto = case.model
        if case.external:
            source = Path(folder) / "model.onnx"
            onnx.save(case.model, source, save_as_external_data=True, location="weights", size_threshold=64)
            case = replace(case, model=onnx.load(source))
        try:
            runs = _runs(case)
            before, after = _coverage(path), coverage(load_and_trace(source, Config()).structure)
            found = replace(
                found, eligible=(before.eligible, after.eligible), channels=(before.channels, after.channels)
            )
            if runs is None:
                return replace(found, outcome="unrunnable")
            _kept(before, after)
            if found.mode == "traced":
                return replace(found, outcome="fine")
            result = compress(source, dict(case.feeds), benchmark=0.01, **MODES[found.mode])
            gone = result.report.before.channels - result.report.after.channels
            proven = _proven(path, data, found.copied) if found.mode == "proven" else -1
            found = replace(found, gone=(proven, gone))
            _agrees(case, runs, result, lossless=found.mode != "params .8")
            return replace(found, outcome="fine")
        except LindepError as error:
            text = f"{type(error).__name__}: {error}"
            lined = len(text.splitlines()) == 1
            return replace(found, outcome="error" if lined else "traceback", text=text)
        except WrongError as error:
            return replace(found, outcome=error.args[0], text=error.args[1])
        except Exception:
            return replace(found, outcome="traceback", text=traceback.format_exc())


@cache
def _proven(path: Path, data: Path | None, copied: bool) -> int:
    """Channels that go from the model without a mutation by what the weights prove; -1 where it cannot be handled."""
    case = original(path, data)
    case = copies(case, np.random.default_rng(0)) if copied else case
    try:
        report = compress(case.model, dict(case.feeds), benchmark=0.01, **MODES["proven"]).report
    except LindepError:
        return -1
    return report.before.channels - report.after.channels


@cache
def _coverage(path: Path) -> Coverage:
    return coverage(load_and_trace(path, Config()).structure)


def _kept(before: Coverage, after: Coverage) -> None:
    """Fewer channels may go only where there are fewer channels, or more refusals.

    Raises:
        WrongError: else.
    """
    less = before.eligible - after.eligible
    fewer = before.channels - after.channels
    refused = sum(count for _, count in after.refused) - sum(count for _, count in before.refused)
    if less > max(fewer, 0) + max(refused, 0):
        raise WrongError("lost", f"{less} channels may no longer go: {fewer} fewer, {refused} more refused")


def _runs(case: Case) -> list[list[Array]] | None:
    """Outputs of the mutated original for all samples; None if ONNX Runtime does not take it."""
    try:
        return _outputs(case.model, case)
    except Exception:  # it raises many types
        return None


def _outputs(model: onnx.ModelProto, case: Case) -> list[list[Array]]:
    running = session(model, 1)
    given = {value.name: value for value in running.get_inputs()}
    sizes = [given[name].shape[0] for name in case.feeds if given[name].shape]
    batch = next((size for size in sizes if isinstance(size, int)), 1)
    found = []
    for at in range(0, SAMPLES, batch):
        found.append(running.run(None, {name: value[at : at + batch] for name, value in case.feeds.items()}))
    return found


def _agrees(case: Case, expected: list[list[Array]], result: Result, *, lossless: bool) -> None:
    """Compare the outputs of a result with those of what it was made from.

    Raises:
        WrongError: it does not load, or they differ by more than is claimed.
    """
    try:
        found = _outputs(result.model, case)
    except Exception as error:  # ONNX Runtime raises many types
        raise WrongError("unloadable", str(error)) from error
    halves = any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in case.model.graph.initializer)
    rounding = HALF_ROUNDING if halves or any(v.dtype == np.float16 for v in case.feeds.values()) else ROUNDING
    claimed = result.report.verification.relative_error
    limit = max(rounding, 10 * claimed) if lossless else max(rounding, TIMES * claimed + PLUS)
    for place in range(len(expected[0])):
        left, right = ([batch[place] for batch in batches] for batches in (expected, found))
        if [value.shape for value in left] != [value.shape for value in right]:
            raise WrongError("wrong", f"output {place} has shape {right[0].shape}, not {left[0].shape}")
        if left[0].dtype.kind == "f" and (error := _error(left, right)) > limit:
            raise WrongError("wrong", f"output {place} differs by {error:.2g}; {claimed:.2g} was claimed")


def _error(left: Sequence[Array], right: Sequence[Array]) -> float:
    """Norm of the difference over that of the original; what is not finite in both is left out."""
    exact, found = (np.concatenate([value.astype(np.float64).ravel() for value in part]) for part in (left, right))
    finite = np.isfinite(exact)
    difference = np.linalg.norm(np.where(finite, found - np.where(finite, exact, 0), 0))
    size = np.linalg.norm(exact[finite])
    return float(difference / size) if size else float(difference)


# ---- many tries ---------------------------------------------------------------------------------------------------


def tries(seeds: Iterable[int], paths: Sequence[Path], data: Path | None, mode: str | None) -> Iterator[Try]:
    """Try one model after the other, in another process, so that a crash or an endless loop is an outcome too."""
    pool = _pool()
    for number, seed in enumerate(seeds):
        path = paths[number % len(paths)]
        try:
            yield pool.submit(attempt, seed, path, data, mode).result(timeout=SECONDS)
            continue
        except Timeout:
            for process in pool._processes.values():
                process.terminate()
            outcome = "timeout"
        except BrokenProcessPool:
            outcome = "died"
        pool = _pool()
        yield Try(seed, path.stem, mode or "", False, (), outcome)
    pool.shutdown()


def _pool() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


def table(found: Sequence[Try]) -> str:
    """Counts by kind of mutation and by model, in Markdown; a try counts at each of its kinds."""
    outcomes = [outcome for outcome in ("fine", "error", "unrunnable", *BAD) if outcome not in ("died", "timeout")]
    heads = ("tries", "as many or more eligible", "proven", "as many or more went")
    lines = []
    by_kind: dict[str, list[Try]] = {kind: [] for kind in KINDS}
    by_model: dict[str, list[Try]] = {}
    for each in found:
        by_model.setdefault(each.model, []).append(each)
        for kind in each.kinds:
            by_kind.setdefault(kind, []).append(each)
    for title, groups in (("mutation", by_kind), ("model", dict(sorted(by_model.items())))):
        lines += [f"| {title} | {' | '.join((*heads, *outcomes))} |"]
        lines += ["|---" * (len(outcomes) + len(heads) + 1) + "|"]
        for name, group in groups.items():
            counted = Counter(each.outcome for each in group)
            as_many = sum(each.eligible[1] >= each.eligible[0] for each in group if each.channels[0])
            proven = [each for each in group if each.mode == "proven" and each.outcome == "fine"]
            cells = [len(group) - counted["inapplicable"], as_many, len(proven)]
            cells += [sum(each.gone[1] >= each.gone[0] for each in proven), *(counted[key] for key in outcomes)]
            lines += [f"| {name} | {' | '.join(map(str, cells))} |"]
        lines += [""]
    return "\n".join(lines)


def read(paths: Iterable[Path]) -> list[Try]:
    """Records of several files; of a seed, a model and a mode that are in several, the last one."""
    found = {}
    for path in paths:
        for record in json.loads(path.read_text(encoding="utf-8")) if path.exists() else ():
            pairs = {key: tuple(record[key]) for key in ("kinds", "eligible", "channels", "gone")}
            found[record["seed"], record["model"], record["mode"]] = Try(**{**record, **pairs})
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run, one, shown = (commands.add_parser(name) for name in ("run", "one", "table"))
    run.add_argument("out", type=Path)
    run.add_argument("models", type=Path, nargs="+")
    run.add_argument("--seconds", type=float, default=600.0)
    run.add_argument("--count", type=int, default=100_000)
    run.add_argument("--first", type=int, default=0)
    one.add_argument("seed", type=int)
    one.add_argument("model", type=Path)
    for each in (run, one):
        each.add_argument("--data", type=Path)
        each.add_argument("--mode", choices=tuple(MODES))
    shown.add_argument("files", type=Path, nargs="+")
    given = parser.parse_args()
    if given.command == "table":
        print(table(read(given.files)))
        return
    if given.command == "one":
        for key, value in asdict(attempt(given.seed, given.model, given.data, given.mode)).items():
            print(f"{key}: {value}")
        return
    end, kept = time.monotonic() + given.seconds, read([given.out])
    for found in tries(range(given.first, given.first + given.count), given.models, given.data, given.mode):
        kept.append(found)
        given.out.write_text(json.dumps([asdict(each) for each in kept], indent=0) + "\n", encoding="utf-8")
        print(
            found.seed,
            found.model,
            found.mode,
            found.kinds,
            found.outcome,
            f"{found.seconds:.1f}",
            found.eligible,
            found.gone,
            flush=True,
        )
        if found.outcome in BAD or found.outcome == "error":
            print(f"    {found.text}", flush=True)
        if time.monotonic() > end:
            break


if __name__ == "__main__":
    main()

"""Whether two checkouts give the same results, byte by byte: for changes that must not change any.

Every case is a command, or two of which the second reads what the first kept, run with the package of either checkout
on the same inputs (the demonstration model and the small graphs are those of BEFORE). Compared are the model's bytes
with the exit codes, and the plan and the report as JSON without what differs from run to run: times and versions.
The exit code is 1 if a model differs. Columns say `same`, `differs`, `none` where there is nothing, or `additions`:
BEFORE's values are all there, and AFTER has keys beside them, or another number of the plan's format.

Compare on one machine: results depend on its processor and threads. No case may depend on time; every case was the
same when a checkout was compared with itself.

Usage: python tools/pin.py BEFORE AFTER [--models MODELS] [--data DATA] [--only NAME ...] [--quick] [--cache DIR]
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import threadpoolctl

VOLATILE = {"seconds", "latency", "latency_ms", "versions", "version"}
TIMED_NOTE = "ONNX Runtime here"  # in notes that hold a measured latency
FORMAT = "lindep_onnx_plan"
CORPUS_SAMPLES, OPEN_AXIS, PHOTOS, SHOWN = 300, 6, 64, 5
IMAGES = {"resnet20": 500, "resnet56": 300, "lenet_300_100": 1500}
ALWAYS = "-q --benchmark 0.01 --report report.json"
MODEL, JSONS = ("out.onnx", "out.onnx.data"), ("plan.json", "report.json")

#: At 0.7 the demonstration model loses only what is proven, at 0.2 data decide.
DEMO = {
    "lossless": ("",),
    "params-7": ("--params .7",),
    "params-2": ("--params .2",),
    "recover-7": ("--params .7 --recover 50 --max-samples 400",),
    "recover-2": ("--params .2 --recover 50 --max-samples 400",),
    "replay-7": ("--params .7 --max-samples 400 --save-plan kept.json", "--plan kept.json"),
    "replay-2": ("--params .2 --max-samples 400 --save-plan kept.json", "--plan kept.json"),
    "fold": ("--params .2 --refit fold",),
    "kernel": ("--params .2 --refit kernel",),
    "proven": ("--proven-only",),
    "range": ("--proven-only --input-range=-1:3",),
    "channels": ("--channels .6 --round-to 8",),
    "costs": ("--macs .2 --size .3 --min-channels 8",),
    "max-error": ("--max-error .1 --max-samples 400",),
    "agreement": ("--min-agreement .9 --exclude *last* --max-samples 400",),
    "stress": ("--params .25 --stress in/demo.npz --max-samples 400",),
    "rounds": ("--rounds 2 --params .2 --max-samples 400",),
    "augment": ("--rounds 2 --params .2 --recover 20 --augment mix --max-samples 400",),
    "moments": (
        "--params .3 --max-samples 400 --refit fold --save-moments kept.npz",
        "--params .2 --max-samples 400 --load-moments kept.npz",
    ),
    "external": ("--params .2 --refit fold --save-as-external-data",),
    "thread": ("--params .2 --threads 1",),
}


@dataclass(frozen=True)
class Case:
    """Commands to run: the options of each, beyond `in/MODEL.onnx`, what is written, and `in/MODEL.npz`."""

    name: str
    model: str
    steps: tuple[str, ...]
    quick: bool = True

    def commands(self) -> Iterator[list[str]]:
        """The arguments of each command; a plan is one cut, and rounds make several."""
        for step in self.steps:
            plan = "" if "--rounds" in step or "--save-plan" in step else "--save-plan plan.json"
            yield f"in/{self.model}.onnx out.onnx --calib in/{self.model}.npz {ALWAYS} {plan} {step}".split()


def cases(corpus: Sequence[str]) -> Iterator[Case]:
    """All of them, those of a corpus of small graphs included; some of these cannot get to half their size."""
    yield from (Case(f"demo-{name}", "demo", steps) for name, steps in DEMO.items())
    yield Case("half-params-7", "half", ("--params .7 --max-samples 400",))
    yield Case("half-params-2", "half", ("--params .2 --max-samples 400",))
    for name in corpus:
        yield Case(f"{name}-lossless", name, ("",))
        yield Case(f"{name}-params", name, ("--params .5 --force",))
    yield Case("lenet-params", "lenet_300_100", ("--params .5",))
    for name in ("resnet20", "resnet56"):
        yield Case(f"{name}-lossless", name, ("",), quick=False)
        yield Case(f"{name}-params-8", name, ("--params .8",), quick=False)
        yield Case(f"{name}-params-5", name, ("--params .5",), quick=False)
    photos = "--calib in/photos --scale 1 --mean 127 --std 128"
    yield Case("efficientnet-params", "efficientnet_lite0", (f"--params .94 {photos}",), quick=False)


@dataclass(frozen=True)
class Inputs:
    """What the cases read, made when it is first asked for, from a checkout's models and from real ones."""

    folder: Path
    checkout: Path
    models: Path
    data: Path

    def make(self, name: str) -> str:
        """Write `NAME.onnx` and its data; returns a digest of both."""
        model, small = self.folder / f"{name}.onnx", self.checkout / "tests" / "corpus" / f"{name}.onnx"
        values = self.folder / ("photos" if name == "efficientnet_lite0" else f"{name}.npz")
        if not model.exists():
            own = self.checkout / "models" / "demo.onnx"
            origin = own if name in ("demo", "half") else small if small.exists() else self.models / model.name
            if values.suffix:
                np.savez(values, **self.arrays(name, onnx.load(origin).graph.input[0]))
            else:
                values.mkdir()
                for photo in sorted((self.data / "imagenet").glob("*.jpg"))[:PHOTOS]:
                    shutil.copyfile(photo, values / photo.name)
            model.write_bytes(halved(origin) if name == "half" else origin.read_bytes())
        return digest(model, *sorted(values.iterdir() if values.is_dir() else [values]))

    def arrays(self, name: str, value: onnx.ValueInfoProto) -> dict[str, Any]:
        """The calibration data of a model with this input; of small graphs random."""
        if name in ("demo", "half"):
            with np.load(self.checkout / "models" / "calib.npz") as data:
                return {key: data[key].astype(np.float16 if name == "half" else np.float32) for key in data.files}
        if name not in IMAGES:
            sizes = [size.dim_value or OPEN_AXIS for size in value.type.tensor_type.shape.dim][1:]
            return {value.name: np.random.default_rng(0).normal(size=(CORPUS_SAMPLES, *sizes)).astype(np.float32)}
        with np.load(self.data / "cifar10_jpeg.npz") as data:
            images = data["calib_x"][: IMAGES[name]] / 255.0
        if name == "lenet_300_100":  # of the size of Fashion-MNIST
            grey = images[:, 2:30, 2:30].mean(axis=3).reshape(len(images), -1)
            return {value.name: ((grey - 0.5) / 0.5).astype(np.float32)}
        images = (images - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
        return {value.name: images.transpose(0, 3, 1, 2).astype(np.float32, order="C")}


def halved(path: Path) -> bytes:
    """A model with weights, inputs and outputs in half precision."""
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor).astype("f2"), tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    del model.graph.value_info[:]
    return bytes(model.SerializeToString(deterministic=True))


def digest(*parts: Path | str) -> str:
    data = (part.read_bytes() if isinstance(part, Path) else part.encode() for part in parts)
    return hashlib.sha256(b"".join(hashlib.sha256(one).digest() for one in data)).hexdigest()


@dataclass(frozen=True)
class Checkout:
    """A checkout, how its package is run, and the folder that keeps its results, if its work tree is clean."""

    environment: dict[str, str]
    kept: Path | None

    @classmethod
    def opened(cls, path: Path, cache: Path | None, room: Path) -> Checkout:
        """Look whether it is this checkout's package that is imported, and at the state of the work tree."""
        environment = {**os.environ, "PYTHONPATH": str(path.resolve())}
        python = [sys.executable, "-c", "import lindep_onnx; print(lindep_onnx.__file__)"]
        found = subprocess.check_output(python, cwd=room, env=environment, text=True).strip()
        print(f"{path}: {found}", file=sys.stderr)
        assert Path(found).resolve().is_relative_to(path.resolve()), "the package of another checkout is imported"
        head, changes = (
            subprocess.check_output(["git", "-C", str(path), *arguments], text=True).strip()
            for arguments in (("rev-parse", "HEAD"), ("status", "--porcelain"))
        )
        return cls(environment, cache / head if cache and not changes else None)


def facts() -> str:
    """What results depend on beside code and inputs: libraries, the kernels they take, threads."""
    versions = [importlib.metadata.version(name) for name in ("numpy", "scipy", "onnx", "onnxruntime")]
    kernels = sorted((pool.get("architecture", ""), pool["num_threads"]) for pool in threadpoolctl.threadpool_info())
    return repr((sys.version, versions, kernels, os.cpu_count()))


def outcome(case: Case, checkout: Checkout, inputs: Inputs) -> tuple[dict[str, Any], str]:
    """What a case gives with a checkout, and what that took."""
    room, commands = inputs.folder.parent, list(case.commands())
    key = digest(inputs.make(case.model), repr(commands), facts())
    kept = checkout.kept / f"{case.name}.json" if checkout.kept else None
    if kept and kept.exists() and (found := json.loads(kept.read_text(encoding="utf-8")))["key"] == key:
        return found, "kept"
    for path in room.iterdir():
        if path.is_file():
            path.unlink()
    found, start = {"key": key, "codes": []}, time.perf_counter()
    for arguments in commands:
        for name in (*MODEL, *JSONS):
            (room / name).unlink(missing_ok=True)
        python = [sys.executable, "-m", "lindep_onnx", *arguments]
        ran = subprocess.run(python, cwd=room, env=checkout.environment, capture_output=True, text=True)
        found["codes"].append(ran.returncode)
        if ran.returncode:
            print(f"{case.name}: exit code {ran.returncode}: {ran.stderr.strip()[-500:]}", file=sys.stderr)
    seconds = time.perf_counter() - start
    found["model"] = [digest(room / name) for name in MODEL if (room / name).exists()]
    for path in (room / name for name in JSONS):
        found[path.stem] = lasting(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None
    if kept:
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(f".{os.getpid()}")  # others may read meanwhile
        part.write_text(json.dumps(found), encoding="utf-8")
        part.replace(kept)
    return found, f"{seconds:.1f} s"


def lasting(value: Any) -> Any:
    """JSON without what differs from run to run."""
    if isinstance(value, dict):
        return {key: lasting(one) for key, one in value.items() if key not in VOLATILE}
    if isinstance(value, list):
        return [lasting(one) for one in value if not (isinstance(one, str) and TIMED_NOTE in one)]
    return value


def differences(before: Any, after: Any, path: str = "$") -> Iterator[tuple[bool, str]]:
    """Where two JSON values differ, and whether it is only by something more in the second."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in {**before, **after}:
            if key not in before or key not in after:
                yield key in after, f"{path}.{key} {'added' if key in after else 'gone'}"
            else:
                inner = differences(before[key], after[key], f"{path}.{key}")
                yield from ((more or key == FORMAT, text) for more, text in inner)
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, (one, other) in enumerate(zip(before, after, strict=True)):
            yield from differences(one, other, f"{path}[{index}]")
    elif json.dumps(before) != json.dumps(after):
        yield False, f"{path}: {json.dumps(before)[:60]} -> {json.dumps(after)[:60]}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path, metavar="BEFORE", help="a checkout")
    parser.add_argument("after", type=Path, metavar="AFTER", help="another")
    parser.add_argument("--models", type=Path, default=Path("../shared/models"), help="folder of real models")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of their data")
    parser.add_argument("--only", nargs="+", metavar="NAME", default=["*"], help="cases, by name or pattern")
    parser.add_argument("--quick", action="store_true", help="only cases that take up to some six seconds")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="keep the results of clean checkouts, by commit")
    args = parser.parse_args(argv)
    known = list(cases(sorted(path.stem for path in (args.before / "tests" / "corpus").glob("*.onnx"))))
    chosen = [case for case in known if any(fnmatch.fnmatch(case.name, name) for name in args.only)]
    chosen = [case for case in chosen if case.quick or not args.quick]
    if not chosen:
        parser.error(f"no such case; there are {', '.join(case.name for case in known)}")
    rows, found, bad = ["| case | model | plan | report | before | after |", "|---|---|---|---|---|---|"], [], 0
    with tempfile.TemporaryDirectory() as folder:
        inputs = Inputs(Path(folder) / "in", args.before, args.models, args.data)
        inputs.folder.mkdir()
        checkouts = [Checkout.opened(path, args.cache, Path(folder)) for path in (args.before, args.after)]
        for case in chosen:
            (before, took), (after, takes) = (outcome(case, checkout, inputs) for checkout in checkouts)
            same = all(before[part] == after[part] for part in ("codes", "model"))
            cells = [("same" if same else "differs") if before["model"] else "no model"]
            bad += cells[0] != "same"
            if any(before["codes"] + after["codes"]):
                cells[0] += f", exit codes {before['codes']} and {after['codes']}"
            for part in ("plan", "report"):
                apart = list(differences(before[part], after[part]))
                verdict = "same" if not apart else "additions" if all(more for more, _ in apart) else "differs"
                cells.append("none" if before[part] is after[part] is None else verdict)
                found += [f"- {case.name}, {part}: {text}" for _, text in apart[:SHOWN]]
            rows.append(f"| {case.name} | {' | '.join(cells)} | {took} | {takes} |")
            print(rows[-1], file=sys.stderr, flush=True)
    print("\n".join([*rows, "", *found, *([""] if found else []), f"{bad} of {len(chosen)} models differ."]))
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()

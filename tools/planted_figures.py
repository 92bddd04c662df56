"""How much of what was planted is found, and at which error: one row for each topology of `tools/planted.py`.

| column | meaning |
|---|---|
| planted, removed, recall | planted channels, and how many of them went, counted axis by axis |
| extra | further channels that went |
| error | of the outputs on images that nothing has seen, as `lindep_onnx.verify` defines it: the worst slice |
| whole | the same over the whole tensor |
| rounding | the error of the original itself once every weight has moved to a neighbouring float32 or stayed |
| plain | channels removed from the same topology with nothing planted |
| again | channels removed from the result by a second run on the same images |
| refused | output channels that tracing leaves alone, in the planted model |
| seconds, peak MB | of the compression, in a process of its own |

No error below `rounding` tells a result from the original: a deep random network amplifies the last bit of its weights.

Usage: python tools/planted_figures.py [NAME ...] --samples 64 --seed 0
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import planted
from numpy.typing import NDArray
from onnx import numpy_helper

from lindep_onnx.api import compress
from lindep_onnx.model.ir import load
from lindep_onnx.model.shapes import resolve
from lindep_onnx.runtime.backend import open_session
from lindep_onnx.structure.trace import trace
from lindep_onnx.structure.types import Structure
from lindep_onnx.verify.compare import OutputComparison, OutputErrors

__all__ = ["Figures", "figures"]

FRESH_IMAGES = 24
COLUMNS = (
    *("topology", "planted", "removed", "recall", "extra", "error", "whole", "rounding"),
    *("plain", "again", "refused", "seconds", "peak MB"),
)


@dataclass(frozen=True)
class Figures:
    """One row; see the module for the meaning of the fields."""

    name: str
    planted: int
    removed: int
    extra: int
    error: float
    whole: float
    rounding: float
    plain: int
    again: int
    refusals: tuple[tuple[str, str, int], ...]
    seconds: float
    peak: int

    @property
    def recall(self) -> float:
        """Share of the planted channels that went; 1 where none are planted."""
        return self.removed / self.planted if self.planted else 1.0

    def row(self) -> str:
        """The figures as a line of a Markdown table."""
        cells = (
            self.name,
            str(self.planted),
            str(self.removed),
            f"{self.recall:.2%}",
            str(self.extra),
            f"{self.error:.1e}",
            f"{self.whole:.1e}",
            f"{self.rounding:.1e}",
            str(self.plain),
            str(self.again),
            str(sum(channels for _, _, channels in self.refusals)),
            f"{self.seconds:.0f}",
            str(self.peak),
        )
        return f"| {' | '.join(cells)} |"


def figures(name: str, folder: Path, *, samples: int, seed: int) -> Figures:
    """Plant, compress, compare.

    Args:
        name: one of `planted.NAMES`.
        folder: where models and data go meanwhile.
        samples: calibration images.
        seed: of weights, planting and images.
    """
    source, result, again, plain, smaller = (folder / f"{what}.onnx" for what in ("a", "b", "c", "p", "q"))
    calib = folder / "calib.npz"
    built = planted.build(name, seed=seed, samples=samples)
    onnx.save(built.model, source)
    np.savez(calib, allow_pickle=False, **built.calibration(samples, seed + 1))
    onnx.save(planted.build_plain(name, seed).model, plain)

    seconds, peak = _compressed(source, calib, result)
    _compressed(result, calib, again)
    _compressed(plain, calib, smaller)

    channels = _traced(source)
    before, after = _widths(channels), _widths(_traced(result))
    wanted = Counter(channel.producers for channel in built.channels)
    axes = [*wanted, *((node,) for node in before if not any(node in axis for axis in wanted))]
    gone = {axis: before[axis[0]] - after[axis[0]] for axis in axes}
    fresh = planted.random_inputs(name, FRESH_IMAGES, seed + 2)
    compared = _compare(built.model, onnx.load(result), fresh)
    return Figures(
        name=name,
        planted=wanted.total(),
        removed=sum(min(gone[axis], count) for axis, count in wanted.items()),
        extra=sum(max(0, count - wanted[axis]) for axis, count in gone.items()),
        error=compared.relative_error,
        whole=compared.whole_error,
        rounding=_compare(built.model, _neighbour(built.model, seed), fresh).relative_error,
        plain=sum(_widths(_traced(plain)).values()) - sum(_widths(_traced(smaller)).values()),
        again=sum(after.values()) - sum(_widths(_traced(again)).values()),
        refusals=tuple((r.reason.code, ", ".join(r.nodes), r.channels) for r in channels.refusals),
        seconds=seconds,
        peak=peak,
    )


def _compressed(source: Path, calib: Path, result: Path) -> tuple[float, int]:
    """Compress in a fresh process; returns seconds and the peak of its memory in MB."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_compress, source, calib, result).result()


def _compress(source: Path, calib: Path, result: Path) -> tuple[float, int]:
    start = time.perf_counter()
    onnx.save(compress(source, calib).model, result)
    seconds = time.perf_counter() - start
    # getrusage would count the parent too.
    status = Path("/proc/self/status").read_text(encoding="ascii").split()
    return seconds, int(status[status.index("VmHWM:") + 1]) // 1000


def _traced(path: Path) -> Structure:
    model = load(path)
    return trace(model, resolve(model))


def _widths(structure: Structure) -> dict[str, int]:
    """Output channels of every Conv and Gemm."""
    return {structure.model.nodes[producer.node].name: len(producer.atoms) for producer in structure.producers}


def _compare(left: onnx.ModelProto, right: onnx.ModelProto, images: NDArray[np.float32]) -> OutputComparison:
    """How the one output differs between two models."""
    sessions = [open_session(model, providers=["CPUExecutionProvider"], threads=0) for model in (left, right)]
    name = sessions[0].get_inputs()[0].name
    errors = OutputErrors()
    for image in images:
        y, other = (session.run(None, {name: image[None]})[0] for session in sessions)
        errors.update({"y": y}, {"y": other})
    (output,) = errors.result().outputs
    return output


def _neighbour(model: onnx.ModelProto, seed: int) -> onnx.ModelProto:
    """The model with every weight moved to the next float32 above or below, or left, at random."""
    rng = np.random.default_rng(seed)
    moved = onnx.ModelProto()
    moved.CopyFrom(model)
    for tensor in moved.graph.initializer:
        value = numpy_helper.to_array(tensor)
        if value.dtype == np.float32:
            towards = rng.choice(np.array([-np.inf, np.nan, np.inf], np.float32), value.shape)
            tensor.CopyFrom(
                numpy_helper.from_array(np.where(np.isnan(towards), value, np.nextafter(value, towards)), tensor.name)
            )
    return moved


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Plant dependent channels in real topologies and count what is found.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(planted.NAMES)}")
    parser.add_argument("--samples", type=int, default=64, help="calibration images (default 64)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    print(f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|", sep="\n", flush=True)
    refusals = []
    for name in options.names or planted.NAMES:
        with tempfile.TemporaryDirectory() as folder:
            found = figures(name, Path(folder), samples=options.samples, seed=options.seed)
        print(found.row(), flush=True)
        refusals += [(name, *refusal) for refusal in found.refusals]
    print("\nRefused channels:")
    for name, code, nodes, channels in refusals:
        print(f"{name}: {channels} at {nodes} ({code})")


if __name__ == "__main__":
    main()

"""What this command costs beside other tools with the same samples: seconds and memory, each in its own process.

| name | what |
|---|---|
| plain pass | ONNX Runtime over the samples |
| lossless | this command without a budget |
| 65 %, fold / refit | this command with `--params 0.65`, without and with the sequential refit |
| onnxsim, Wanda | `onnxsim.apply_structured_wanda_pruning`, 35 % of the channels |
| onnxsim, Wanda and finetune | the same, then `onnxsim.apply_pruning_finetune` |
| static int8 | `onnxruntime.quantization.quantize_static`, min-max |
| static int8, entropy | the same with entropy calibration |

They take turns; of `--repeat` turns the fastest of each counts.

Usage: python tools/rival_costs.py MODEL.onnx SAMPLES.npy [--repeat 2]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from stage_costs import PLAIN, measured

__all__ = ["main"]

COMMAND = {"lossless": [], "65 %, fold": ["--params", "0.65", "--refit", "fold"], "65 %, refit": ["--params", "0.65"]}
OTHERS = ("onnxsim, Wanda", "onnxsim, Wanda and finetune", "static int8", "static int8, entropy")


def _batches(model: onnx.ModelProto, samples: NDArray[np.float32]) -> Iterator[dict[str, NDArray[np.float32]]]:
    given = model.graph.input[0]
    step = given.type.tensor_type.shape.dim[0].dim_value or (1 if samples[0].size > 10_000 else 32)
    for first in range(0, len(samples) // step * step, step):
        yield {given.name: np.ascontiguousarray(samples[first : first + step])}


def _run(name: str, path: Path, samples: NDArray[np.float32], target: Path) -> None:
    """One of the other tools, in this process."""
    model = onnx.load(path)
    if name.startswith("onnxsim"):
        import onnxsim

        data = list(_batches(model, samples))
        pruned = onnxsim.apply_structured_wanda_pruning(model, calibration_data=data, sparsity=0.35)
        if name.endswith("finetune"):
            pruned = onnxsim.apply_pruning_finetune(model, pruned, calibration_data=data)
        onnx.save(pruned, target)
        return
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, quantize_static

    feeds = _batches(model, samples)

    class ConsumerNode(CalibrationDataReader):  # type: ignore[misc]
        """The samples, one run after the other."""

        def get_next(self) -> Mapping[str, Any] | None:
            """The next run; None at the end."""
            return next(feeds, None)

    method = CalibrationMethod.Entropy if name.endswith("entropy") else CalibrationMethod.MinMax
    quantize_static(str(path), str(target), ConsumerNode(), per_channel=True, calibrate_method=method)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, metavar="MODEL.onnx")
    parser.add_argument("samples", type=Path, metavar="SAMPLES.npy")
    parser.add_argument("--repeat", type=int, default=2, metavar="N")
    parser.add_argument("--run", choices=OTHERS, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "small.onnx"
        if given.run is not None:
            _run(given.run, given.model, np.load(given.samples, mmap_mode="r"), target)
            return
        own = [sys.executable, "-m", "lindep_onnx", str(given.model), str(target), "--calib", str(given.samples)]
        again = [sys.executable, __file__, str(given.model), str(given.samples), "--run"]
        lines = {"plain pass": [sys.executable, "-c", PLAIN, str(given.model), str(given.samples)]}
        lines |= {name: [*own, "--quiet", *options] for name, options in COMMAND.items()}
        lines |= {name: [*again, name] for name in OTHERS}
        best: dict[str, tuple[float, float, float]] = {}
        failed: dict[str, str] = {}
        for _ in range(given.repeat):
            for name, line in lines.items():
                try:
                    seconds, cpu, peak, _ = measured(line)
                except SystemExit as error:
                    failed[name] = str(error)[-80:]
                    continue
                best[name] = min(best.get(name, (np.inf,) * 3), (seconds, cpu, peak))
    print("| what | seconds | CPU s | peak MB |", "|---" * 4 + "|", sep="\n")
    for name in lines:
        cells = "{:.1f} | {:.1f} | {:.0f}".format(*best[name]) if name in best else "does not run | | "
        print(f"| {name} | {cells} |")


if __name__ == "__main__":
    main()

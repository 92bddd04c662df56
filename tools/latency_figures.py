"""Latency as a budget: what the MACs promise and what ONNX Runtime keeps.

Two commands for each model: half of the MACs (`--macs 0.5`), and `--macs 0.5 --latency F`, where F is the time that is
left when 85 % of the promise are kept: 0.5 / 0.85. Both results are then timed against the original in turns,
in a process that does nothing else, several times; the median ratio counts.

| column | what |
|---|---|
| MACs | what is left of them |
| promised | speed-up if time were MACs |
| measured | median over the turns of original over result, and its extremes |
| kept | measured over promised |
| agreement | on samples that nothing was fitted to |

Usage: python tools/latency_figures.py MODELS DATA [--turns 7] [--only NAME ...]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import real_figures

from lindep_onnx.runtime.backend import Purpose, Runtime, measure_latency

__all__ = ["main"]

MODELS = {"resnet56": 400, "mobilenetv2": 128, "efficientnet_lite0": 128, "hed_vgg16": 24}
KEPT = 0.85


def _timed(original: Path, result: Path, samples: Path, turns: int) -> tuple[float, float, float]:
    """Median, least and largest of original over result."""
    sessions = [Runtime().open(path, purpose=Purpose.TIME) for path in (original, result)]
    with np.load(samples) as stored:
        feeds = {name: stored[name][:1] for name in stored}
    ratios = []
    for _ in range(turns):
        before, after = measure_latency(sessions, feeds, seconds=1.0)
        ratios.append(before / after)
    return float(np.median(ratios)), min(ratios), max(ratios)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, metavar="MODELS")
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--only", nargs="+", choices=tuple(MODELS), default=list(MODELS)[:3])
    parser.add_argument("--refit", default="fold")
    given = parser.parse_args(arguments)
    print(
        "| model | asked for | MACs | promised | measured | kept | agreement |", "|---" * 7 + "|", sep="\n", flush=True
    )
    for name in given.only:
        path = given.models / f"{name}.onnx"
        with tempfile.TemporaryDirectory() as folder:
            samples, result, report = (Path(folder) / what for what in ("calib.npz", "small.onnx", "report.json"))
            chosen, _ = real_figures._picked(name, given.data, 0, MODELS[name], 0)
            real_figures._write(name, given.data, path, chosen, samples)
            for asked in (["--macs", "0.5"], ["--macs", "0.5", "--latency", f"{0.5 / KEPT:.3f}"]):
                line = [sys.executable, "-m", "lindep_onnx", str(path), str(result), "--calib", str(samples), "--force"]
                line += ["--quiet", "--report", str(report), "--refit", given.refit, *asked]
                subprocess.run(line, check=False, stderr=subprocess.DEVNULL)
                found = json.loads(report.read_text(encoding="utf-8"))
                left = found["after"]["macs"] / found["before"]["macs"]
                median, least, most = _timed(path, result, samples, given.turns)
                agreement = found["verification"]["agreement"]
                cells = (
                    *(name, " ".join(asked), f"{left:.1%}", f"{1 / left:.2f}"),
                    *(f"{median:.2f} ({least:.2f} to {most:.2f})", f"{median * left:.0%}"),
                    "-" if agreement is None else f"{agreement:.1%}",
                )
                print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

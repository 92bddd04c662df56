"""The table of docs/comparison.md: every row is a command, run here, and what came of it.

    python tools/features.py [--write docs/comparison.md]

Needs onnxsim, onnxslim and polygraphy beside this package. All tools work on models/demo.onnx; parameters, bytes and
the worst relative error of an output (over models/calib.npz) are measured on what they wrote, and seconds include the
start of the program.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from lindep_onnx.model.cost import cost
from lindep_onnx.model.ir import load
from lindep_onnx.runtime.backend import Runtime
from lindep_onnx.verify.metrics import OutputErrors

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- made by tools/features.py -->", "<!-- end -->"
QUANTISE = (
    "import numpy as np; from onnxruntime.quantization import CalibrationDataReader, quantize_static; "
    "D = np.load('calib.npz')['image'][:256]; R = type('R', (CalibrationDataReader,), {'get_next': lambda s, "
    "i=iter([{'image': D}]): next(i, None)}); quantize_static('demo.onnx', 'out.onnx', R())"
)
PRUNE = (
    "import onnx, onnxsim; m = onnx.load('demo.onnx'); "
    "onnx.save(onnxsim.apply_structured_pruning(m, sparsity=0.3), 'out.onnx')"
)


@dataclass(frozen=True)
class Row:
    """One thing that somebody may want.

    Attributes:
        wanted: what.
        tool: who does it.
        command: how; `python` is this interpreter, `out.onnx` the result.
    """

    wanted: str
    tool: str
    command: str


ROWS = (
    Row("Channels removed that change nothing", "lindep_onnx", "lindep-onnx demo.onnx out.onnx --calib calib.npz"),
    Row("The same from the weights alone", "lindep_onnx", "lindep-onnx demo.onnx out.onnx --proven-only"),
    Row("Half of the parameters", "lindep_onnx", "lindep-onnx demo.onnx out.onnx --calib calib.npz --params 0.5"),
    Row(
        "As small as an error allows",
        "lindep_onnx",
        "lindep-onnx demo.onnx out.onnx --calib calib.npz --max-error 0.05",
    ),
    Row("Channels removed by the size of weights", "onnxsim", f'python -c "{PRUNE}"'),
    Row("Constants folded, nodes fused", "onnxsim", "onnxsim demo.onnx out.onnx"),
    Row("Constants folded, nodes fused", "onnxslim", "onnxslim demo.onnx out.onnx"),
    Row("Constants folded", "polygraphy", "polygraphy surgeon sanitize demo.onnx --fold-constants -o out.onnx"),
    Row("Weights in 8 bits", "onnxruntime", f'python -c "{QUANTISE}"'),
)
#: What a run has to say about its result besides the file.
SAYS = (
    Row("A check on unseen samples of the data", "lindep_onnx", "lindep-onnx demo.onnx out.onnx --calib calib.npz"),
    Row("A check on random inputs", "onnxsim", "onnxsim demo.onnx out.onnx 3"),
    Row("A check on random inputs", "onnxslim", "onnxslim demo.onnx out.onnx --model-check"),
    Row("A comparison of two models", "polygraphy", "polygraphy run demo.onnx --onnxrt --save-outputs out.json"),
    Row("A report to look at", "lindep_onnx", "lindep-onnx demo.onnx out.onnx --calib calib.npz --report out.html"),
    Row("Why channels stay, and what to do", "lindep_onnx", "lindep-onnx demo.onnx --dry-run --calib calib.npz -v"),
    Row("An inventory of a model", "polygraphy", "polygraphy inspect model demo.onnx"),
    Row("An inventory of a model", "onnxslim", "onnxslim demo.onnx --inspect"),
)


def run(row: Row, folder: Path) -> tuple[int, float, str]:
    """The exit code, the seconds and the words of a command, in a folder with the demonstration model and its data."""
    for name in ("demo.onnx", "calib.npz"):
        (folder / name).write_bytes((ROOT / "models" / name).read_bytes())
    scripts = Path(sys.executable).parent
    command = re.sub(r"^python ", f"{sys.executable} ", row.command)
    command = re.sub(r"^lindep-onnx ", f"{sys.executable} -m lindep_onnx ", command)
    command = re.sub(r"^(onnxsim|onnxslim|polygraphy) ", rf"{scripts}/\1 ", command)
    start = time.perf_counter()
    found = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True)
    return found.returncode, time.perf_counter() - start, found.stdout + found.stderr


def measured(folder: Path) -> str:
    """Parameters, bytes and the worst output error of what was written."""
    result, data = folder / "out.onnx", dict(np.load(folder / "calib.npz"))
    sessions = [Runtime().open(path) for path in (folder / "demo.onnx", result)]
    errors = OutputErrors()
    names = [output.name for output in sessions[0].get_outputs()]
    both = [dict(zip(names, session.run(names, data), strict=True)) for session in sessions]
    errors.update(both[0], both[1])
    sizes = [int(np.prod(tensor.dims)) for tensor in onnx.load(result).graph.initializer]  # of integers too
    elements, size = sum(size for size in sizes if size > 1), result.stat().st_size / 1000
    return f"{elements:,} | {size:,.0f} kB | {errors.result().relative_error:.1g}"


def table() -> list[str]:
    """Markdown."""
    before = cost(load(onnx.load(ROOT / "models" / "demo.onnx")), {})
    lines = [f"The model has {before.parameters:,} parameters in {before.bytes / 1000:,.0f} kB.", ""]
    lines += ["| wanted | tool | parameters | size | worst output error | seconds |", "|---|---|---|---|---|---|"]
    for row in ROWS:
        with tempfile.TemporaryDirectory() as name:
            code, seconds, words = run(row, Path(name))
            if code:
                raise RuntimeError(f"{row.command}: {words[-500:]}")
            lines.append(f"| {row.wanted} | {row.tool} | {measured(Path(name))} | {seconds:.1f} |")
    lines += ["", "| wanted | tool | exit code |", "|---|---|---|"]
    for row in SAYS:
        with tempfile.TemporaryDirectory() as name:
            code, _, words = run(row, Path(name))
            if code:
                raise RuntimeError(f"{row.command}: {words[-500:]}")
            lines.append(f"| {row.wanted} | {row.tool} | {code} |")
    lines += ["", "The commands, row by row:", "", "```text"]
    lines += [row.command for row in (*ROWS, *SAYS)]
    return [*lines, "```"]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, metavar="FILE.md", help="put the table between its markers")
    given = parser.parse_args(argv)
    text = "\n".join(table())
    if given.write is None:
        print(text)
        return
    page = given.write.read_text(encoding="utf-8")
    start, stop = page.index(BEGIN) + len(BEGIN), page.index(END)
    given.write.write_text(f"{page[:start]}\n{text}\n{page[stop:]}", encoding="utf-8")


if __name__ == "__main__":
    main()

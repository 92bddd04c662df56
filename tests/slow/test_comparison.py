"""The tables of docs/comparison.md: every row is a command, run here, and what came of it.

All tools work on models/demo.onnx; parameters, bytes and the worst relative error of an output (over models/calib.npz)
are measured on what they wrote. `-s` prints the rows as they are now, with the seconds of the command, the start of the
program included. Rows of tools that are not installed (onnxsim, onnxslim, polygraphy) are skipped.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from tasks import session

from lindep_onnx.verify.metrics import OutputErrors

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")
#: Cells of the rows, and their commands, which stand below in the same order.
ROWS = [row.strip("| ").split(" | ") for row in re.findall(r"^\| (?!wanted).*\|$", PAGE, flags=re.M)]
COMMANDS = re.findall(r"```text\n(.*?)```", PAGE, flags=re.S)[0].splitlines()


def test_every_row_has_its_command() -> None:
    assert len(ROWS) == len(COMMANDS) > 10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("row", "line"), list(zip(ROWS, COMMANDS, strict=True)), ids=[f"{row[1]}-{place}" for place, row in enumerate(ROWS)]
)
def test_a_command_does_what_its_row_says(row: list[str], line: str, tmp_path: Path) -> None:
    for name in ("demo.onnx", "calib.npz"):
        shutil.copy(ROOT / "models" / name, tmp_path)
    if "lindep" not in row[1]:
        pytest.importorskip(row[1])
    command = re.sub(r"^lindep-onnx ", "python -m lindep_onnx ", line)
    command = re.sub(r"^python ", f"{sys.executable} ", command)
    command = re.sub(r"^(onnxsim|onnxslim|polygraphy) ", rf"{Path(sys.executable).parent}/\1 ", command)
    start = time.perf_counter()
    found = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    assert found.returncode == 0, found.stdout + found.stderr
    if len(row) == 3:  # what a run has to say besides the file
        assert row[2] == "0"
        return
    parameters, kilobytes, error = measured(tmp_path)
    print(f"| {row[0]} | {row[1]} | {parameters:,} | {kilobytes:,.0f} kB | {error:.1g} | {seconds:.1f} |")
    assert parameters == pytest.approx(int(row[2].replace(",", "")), rel=0.01)
    assert kilobytes == pytest.approx(float(row[3].removesuffix(" kB")), rel=0.02, abs=2)
    assert error <= max(2 * float(row[4]), 1e-6)


def measured(folder: Path) -> tuple[int, float, float]:
    """Parameters, kB and the worst output error of what was written."""
    result, data = folder / "out.onnx", dict(np.load(folder / "calib.npz"))
    errors = OutputErrors()
    errors.update(*({"y": session(path).run(None, data)[0]} for path in (folder / "demo.onnx", result)))
    sizes = [int(np.prod(tensor.dims)) for tensor in onnx.load(result).graph.initializer]  # of integers too
    return sum(size for size in sizes if size > 1), result.stat().st_size / 1000, errors.result().relative_error

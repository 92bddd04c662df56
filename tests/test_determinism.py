"""The same result whatever the hash seed and the number of threads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lindep_onnx import graph

ROOT = Path(__file__).parents[1]


def compressed(folder: Path, name: str, *options: str, **environment: str) -> Path:
    output = folder / f"{name}.onnx"
    command = [sys.executable, "-m", "lindep_onnx", str(ROOT / "models" / "demo.onnx"), str(output), "-q"]
    command += ["--calib", str(ROOT / "models" / "calib.npz"), "--max-samples", "300", *options]
    command += ["--report", str(output.with_suffix(".json"))]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT), **environment})
    return output


def widths(output: Path) -> list[int]:
    return [group["channels_after"] for group in json.loads(output.with_suffix(".json").read_text())["groups"]]


@pytest.mark.parametrize("budget", [(), ("--params", "0.5"), ("--channels", "0.5", "--refit", "fold")])
def test_hash_seeds_change_no_byte(budget: tuple[str, ...], tmp_path: Path) -> None:
    first = compressed(tmp_path, "a", *budget, "--threads", "1", PYTHONHASHSEED="0")
    again = compressed(tmp_path, "b", *budget, "--threads", "1", PYTHONHASHSEED="12345")
    assert first.read_bytes() == again.read_bytes()


@pytest.mark.parametrize("budget", [(), ("--params", "0.5", "--refit", "fold")])
def test_thread_counts_change_roundings_and_no_decision(budget: tuple[str, ...], tmp_path: Path) -> None:
    one = compressed(tmp_path, "a", *budget, "--threads", "1", OPENBLAS_NUM_THREADS="1")
    two = compressed(tmp_path, "b", *budget, "--threads", "2", OPENBLAS_NUM_THREADS="2")
    assert widths(one) == widths(two)
    left, right = graph.load(one).stored, graph.load(two).stored
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert value.shape == right[name].shape
        if value.dtype.kind == "f":
            np.testing.assert_allclose(value, right[name], atol=1e-4 * np.abs(value).max())

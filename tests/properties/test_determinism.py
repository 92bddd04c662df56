"""The same result whatever the hash seed and the number of threads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lindep_onnx.model import ir as graph

ROOT = Path(__file__).parents[2]


def compressed(folder: Path, name: str, *options: str, **environment: str) -> Path:
    output = folder / f"{name}.onnx"
    command = [sys.executable, "-m", "lindep_onnx", str(ROOT / "models" / "demo.onnx"), str(output), "-q"]
    command += ["--calib", str(ROOT / "models" / "calib.npz"), "--max-samples", "120", *options]
    command += ["--report", str(output.with_suffix(".json")), "--benchmark", "0.01", "--round-to", "4"]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT), **environment})
    return output


def widths(output: Path) -> list[int]:
    return [group["channels_after"] for group in json.loads(output.with_suffix(".json").read_text())["groups"]]


#: Results on one thread, by budget; three tests hold others against them.
KNOWN: dict[tuple[str, ...], Path] = {}
FOLDED = ("--channels", "0.5", "--refit", "fold")


def on_one_thread(budget: tuple[str, ...], folders: pytest.TempPathFactory) -> Path:
    if budget not in KNOWN:
        environment = {"PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1"}
        KNOWN[budget] = compressed(folders.mktemp("known"), "a", *budget, "--threads", "1", **environment)
    return KNOWN[budget]


@pytest.mark.parametrize("budget", [(), ("--params", "0.5"), FOLDED])
def test_hash_seeds_change_no_byte(
    budget: tuple[str, ...], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    again = compressed(tmp_path, "b", *budget, "--threads", "1", PYTHONHASHSEED="12345")
    assert on_one_thread(budget, tmp_path_factory).read_bytes() == again.read_bytes()


def assert_alike(one: Path, two: Path) -> None:
    """The same widths, and weights that differ by rounding; which is what docs/threat-model.md promises."""
    assert widths(one) == widths(two)
    left, right = graph.load(one).stored, graph.load(two).stored
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert value.shape == right[name].shape
        if value.dtype.kind == "f":
            np.testing.assert_allclose(value, right[name], atol=1e-4 * np.abs(value).max())


@pytest.mark.parametrize("budget", [(), FOLDED])
def test_thread_counts_change_roundings_and_no_decision(
    budget: tuple[str, ...], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    one = on_one_thread(budget, tmp_path_factory)
    two = compressed(tmp_path, "b", *budget, "--threads", "2", OPENBLAS_NUM_THREADS="2")
    assert_alike(one, two)


#: Kernels of OpenBLAS for processors of other makes and ages: each adds up in an order of its own.
KERNELS = ("Prescott", "Haswell", "SkylakeX")


def of_kernel(kernel: str) -> str:
    """What a product gives with a kernel, in bits; empty where this processor or this build does not have it."""
    code = "import numpy as np; a = np.random.default_rng(0).normal(size=(99, 99)); print((a @ a.T).tobytes().hex())"
    ran = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "OPENBLAS_CORETYPE": kernel}, capture_output=True, text=True
    )
    return ran.stdout if ran.returncode == 0 else ""


@pytest.mark.slow
@pytest.mark.parametrize("budget", [(), ("--params", "0.5", "--refit", "fold"), ("--params", "0.5")])
def test_other_linear_algebra_changes_roundings_and_no_decision(budget: tuple[str, ...], tmp_path: Path) -> None:
    bits = {kernel: of_kernel(kernel) for kernel in KERNELS}
    usable = [kernel for kernel, found in bits.items() if found]
    if len({bits[kernel] for kernel in usable}) < 2:
        pytest.skip("NumPy computes alike with all kernels here")
    first, *others = (
        compressed(tmp_path, kernel, *budget, "--threads", "1", OPENBLAS_CORETYPE=kernel) for kernel in usable
    )
    for other in others:
        assert_alike(first, other)

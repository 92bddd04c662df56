"""Kill runs at random moments: the output must be the old one or a complete new one, and the next run cleans up.

Each run replaces the output of the one before it by another one, with weights inside the model or beside it in turn. It
is killed (SIGKILL) after a random part of the time it takes; half of the moments lie around its end, where files are
written. After every kill the output is loaded and compared with what complete runs give. Every tenth run is let to its
end; after it there may be nothing in the folders but what it wrote.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from lindep_onnx.cli import main as lindep

WIDTH = 600
#: What the runs differ in.
VARIANTS = tuple(
    ("--min-channels", str(width), *external)
    for width, external in (
        (560, ("--save-as-external-data",)),
        (570, ()),
        (580, ("--save-as-external-data",)),
        (590, ()),
    )
)


def prepare(folder: Path) -> None:
    """A model with copies to remove, and data."""
    rng = np.random.default_rng(0)
    w, v = (rng.normal(size=size).astype(np.float32) for size in ((50, WIDTH), (WIDTH, 400)))
    w[:, :50] = w[:, 50:100]
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"]),
            helper.make_node("Relu", ["h"], ["r"]),
            helper.make_node("MatMul", ["r", "v"], ["y"]),
        ],
        "kill",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 50])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 400])],
        [numpy_helper.from_array(w, "w"), numpy_helper.from_array(v, "v")],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "in.onnx")
    np.savez(folder / "data.npz", x=rng.normal(size=(60, 50)).astype(np.float32))


def start(folder: Path, variant: int) -> int:
    """Run in a process of its own, forked so that the time is not spent on imports; returns its number."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        os.chdir(folder)
        tempfile.tempdir = str(folder / "tmp")
        given = ["in.onnx", "out.onnx", "--calib", "data.npz", "--report", "r.json", "-q", "--threads", "1"]
        code = lindep([*given, *VARIANTS[variant]])
    finally:
        os._exit(code)


def complete(folder: Path, variant: int) -> float:
    """Run to the end; returns how long it took."""
    begin = time.monotonic()
    _, status = os.waitpid(start(folder, variant), 0)
    if status:
        raise AssertionError(f"a run that nobody killed ended with {status}")
    return time.monotonic() - begin


def content(folder: Path) -> tuple[bytes, ...] | None:
    """The weights of the output, wherever they are; None if there is no output."""
    if not (folder / "out.onnx").exists():
        return None
    model = onnx.load(folder / "out.onnx")
    return tuple(numpy_helper.to_array(tensor).tobytes() for tensor in model.graph.initializer)


def strays(folder: Path, variant: int) -> list[str]:
    """Files that a complete run does not leave."""
    data = {entry.value for tensor in onnx.load(folder / "out.onnx", load_external_data=False).graph.initializer
            for entry in tensor.external_data if entry.key == "location"}  # fmt: skip
    known = {"in.onnx", "data.npz", "tmp", "out.onnx", "r.json", *data}
    found = [path.name for path in folder.iterdir() if path.name not in known]
    return found + [path.name for path in (folder / "tmp").iterdir() if path.name != ".ses"]  # of ONNX Runtime


def kill_runs(folder: Path, kills: int, seed: int) -> Counter[str]:
    """Kill so many runs and check what they leave; returns what was seen.

    Raises:
        AssertionError: an output that is neither old nor new, or a file that the next run left lying about.
    """
    rng = random.Random(seed)
    (folder / "tmp").mkdir()
    prepare(folder)
    known, seconds = {}, 1.0
    for variant in range(len(VARIANTS)):
        seconds = complete(folder, variant)
        known[content(folder)] = variant
    seen: Counter[str] = Counter()
    current = len(VARIANTS) - 1
    for number in range(kills):
        variant = rng.choice([other for other in range(len(VARIANTS)) if other != current])
        process = start(folder, variant)
        time.sleep(seconds * (rng.uniform(0, 1) if rng.random() < 0.5 else rng.uniform(0.85, 1.1)))
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        found = known.get(content(folder))
        if found not in (current, variant):
            raise AssertionError(f"kill {number}: the output is neither the old nor the new one ({found})")
        ended = "done before the kill" if os.WIFEXITED(status) else "killed"
        seen[f"{ended}, {'new' if found == variant else 'old'} output"] += 1
        seen["left something for the next run"] += bool(strays(folder, variant))
        current = found
        if number % 10 == 9 or number == kills - 1:
            current = (current + 1) % len(VARIANTS)
            seconds = complete(folder, current)
            left = strays(folder, current)
            if left or known.get(content(folder)) != current:
                raise AssertionError(f"kill {number}: after the next run there is still {left}")
    return seen


@pytest.mark.parametrize("kills", [8, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(3000)])])
def test_a_killed_run_leaves_the_old_output_or_a_complete_new_one(kills: int, tmp_path: Path) -> None:
    # In a process of its own: it forks, which does not go with the threads of this one.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        seen = pool.submit(kill_runs, tmp_path, kills, 0).result()
    assert sum(count for what, count in seen.items() if "output" in what) == kills
    assert any(what.startswith("killed") for what in seen)

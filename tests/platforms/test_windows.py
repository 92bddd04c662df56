"""Where files have the rules of Windows: nothing that is open or mapped is replaced, removed or rewritten."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from build import build, run

from lindep_onnx import cli, files, pipeline
from lindep_onnx.model import weights
from lindep_onnx.model.ir import load
from lindep_onnx.model.save import save
from lindep_onnx.runtime.backend import Runtime
from lindep_onnx.runtime.timing import Stopwatch

pytest.importorskip("fcntl", reason="on Windows there is nothing to imitate")
import windows

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
ARGUMENTS = ["in.onnx", "out.onnx", "--calib", "data.npz", "-q"]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a model and data, where files have the rules of Windows and every weight is mapped."""
    w = np.random.default_rng(0).normal(size=(6, 40)).astype(np.float32)
    w[:, :9] = w[:, 10:19]
    net = build("h = MatMul(x, w)\nr = Relu(h)\ny = Gemm(r, v)", {"w": w, "v": (40, 30)}, x=("N", 6))
    onnx.save(net, tmp_path / "in.onnx")
    x = np.random.default_rng(1).normal(size=(200, 6)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x)
    (tmp_path / "shards").mkdir()
    for number in range(3):
        np.savez(tmp_path / "shards" / f"{number}.npz", x=x[50 * number :][:50])
    text = (
        "import numpy\ndef load_data():\n    for row in numpy.load('data.npz')['x']:\n        yield {'x': row[None]}\n"
    )
    (tmp_path / "feed.py").write_text(text)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(weights, "IN_MEMORY", 1 << 10)
    monkeypatch.chdir(tmp_path)
    windows.impose(monkeypatch)
    yield tmp_path


def left(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob("*") if "temporary/" in str(path) or path.name.startswith(".lindep")]


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--params", "0.6", "--save-as-external-data"],
        ["--calib", "shards", "--params", "0.6"],
        ["--calib", "feed.py", "--params", "0.6"],
        ["--report", "r.json", "--save-plan", "p.json", "--save-moments", "m.npz"],
        ["--params", "0.6", "--rounds", "2", "--recover", "4", "--checkpoint", "c.npz"],
    ],
    ids=" ".join,
)
def test_a_run_writes_all_of_its_files_twice_and_leaves_nothing_behind(options: list[str], work: Path) -> None:
    for _ in range(2):
        assert cli.main([*ARGUMENTS, *options]) == 0
    small, x = onnx.load(work / "out.onnx"), np.load(work / "data.npz")["x"]
    assert run(small, {"x": x})[0].shape == (200, 30)
    gc.collect()
    with files.Scratch():  # what was still mapped when its time came goes with the next folder
        pass
    assert not left(work)


@pytest.mark.timed
def test_no_file_of_a_model_that_is_timed_is_written_to_twice(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written, write = [], Path.write_bytes  # the process of one may be reading it
    monkeypatch.setattr(Path, "write_bytes", lambda path, data: written.append(path) or write(path, data))
    model = load(work / "in.onnx")
    with Stopwatch(model, {"x": np.ones((1, 6), np.float32)}, Runtime(), seconds=0.1) as watch:
        for _ in range(2):
            assert watch.glance(model) > 0
        assert watch.compare(model).ratio > 0
    assert len(written) == len(set(written)) == 4  # the original, and three times the model
    del model, watch  # with the weights that are mapped
    with files.Scratch():
        pass
    assert not left(work)


def test_an_output_that_is_open_elsewhere_is_named_before_the_work(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (work / "out.onnx").write_bytes(b"old")
    monkeypatch.setattr(pipeline, "load_and_trace", lambda *_: pytest.fail("work was done"))
    with (work / "out.onnx").open("rb"):
        assert cli.main(ARGUMENTS) == 1
    assert "out.onnx: cannot be replaced" in capsys.readouterr().err
    windows.protect(monkeypatch, Path("out.onnx"))
    assert cli.main(ARGUMENTS) == 1
    assert "out.onnx: cannot be replaced (it is write-protected)" in capsys.readouterr().err
    assert (work / "out.onnx").read_bytes() == b"old" and not left(work)


def test_weights_that_another_program_still_reads_stay_beside_the_new_model(work: Path) -> None:
    net = onnx.load(work / "in.onnx")
    save(net, None, work / "m.onnx", external_data=True)
    held = np.memmap(work / "m.onnx.data", np.uint8, "r")
    for weight in net.graph.initializer:
        weight.raw_data = bytes(len(weight.raw_data))
    save(net, None, work / "m.onnx", external_data=True)
    assert len(held) and {path.name for path in work.glob("m.onnx*")} == {"m.onnx", "m.onnx.data", "m.onnx.1.data"}
    assert not run(onnx.load(work / "m.onnx"), {"x": np.ones((1, 6), np.float32)})[0].any()


def _keep_open(path: Path) -> object:
    return path.open("rb")


def _map(path: Path) -> object:
    return np.memmap(path, np.uint8, "r")


@pytest.mark.parametrize("hold", [_keep_open, _map])
@pytest.mark.parametrize(
    "act",
    [
        lambda path: path.unlink(),
        lambda path: path.replace(path.with_name("moved")),
        lambda path: path.with_name("other").replace(path),
    ],
)
def test_the_layer_refuses_what_windows_refuses(
    hold: Callable[[Path], object], act: Callable[[Path], None], work: Path
) -> None:
    path = work / "file"
    for name in ("file", "other"):
        (work / name).write_bytes(b"content")
    held = hold(path)
    with pytest.raises(PermissionError):
        act(path)
    del held
    act(path)


def test_the_layer_refuses_to_flush_what_is_only_read_and_to_rewrite_what_is_mapped(work: Path) -> None:
    path = work / "file"
    path.write_bytes(b"content")
    with path.open("rb") as file, pytest.raises(OSError, match="Bad file descriptor"):
        os.fsync(file.fileno())
    mapped = np.memmap(path, np.uint8, "r")
    with pytest.raises(OSError, match="mapped"):
        path.write_bytes(b"other")
    assert bytes(mapped) == b"content"
    assert not hasattr(os, "fork")

"""What is written: all of it or nothing, and nothing is left behind, not even by a run that was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from build import build, run

from lindep_onnx import files
from lindep_onnx.files import Scratch
from lindep_onnx.model import save as saving

ROOT = Path(__file__).parents[1]
X = {"x": np.ones((2, 30), np.float32)}


def model(seed: int) -> onnx.ModelProto:
    rng = np.random.default_rng(seed)
    return build("y = MatMul(x, w)", {"w": rng.normal(size=(30, 20)).astype(np.float32)}, x=("N", 30))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def left_behind(folder: Path, process: int) -> Path:
    with Scratch(folder) as name:
        path = Path(name.replace(f".{os.getpid()}.", f".{process}."))
    path.mkdir()
    (path / "half").write_text("written")
    return path


def test_what_a_dead_run_left_goes_and_what_others_use_stays(tmp_path: Path) -> None:
    dead, alive = left_behind(tmp_path, dead_process()), left_behind(tmp_path, os.getppid())
    foreign = tmp_path / ".lindep_onnx.00000000.1.x"  # of another machine
    foreign.mkdir()
    with Scratch(tmp_path):
        assert not dead.exists() and alive.exists() and foreign.exists()
    assert names(tmp_path) == {alive.name, foreign.name}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_leaves_the_folder_of_its_parent(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from lindep_onnx.files import WeightsDir, Scratch\n"
        "made, scratch = WeightsDir.temporary(), Scratch(Path(sys.argv[1]))\n"
        "folder, child = made.path, os.fork()\n"
        "if not child:\n"
        "    del made, scratch\n"
        "    os._exit(0)\n"
        "os.waitpid(child, 0)\n"
        "print(folder.exists(), Path(scratch.name).exists())\n"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", code, str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert found.stdout.split() == ["True", "True"]
    assert not list(tmp_path.glob(".lindep_onnx.*"))  # nothing is left when both are gone


def test_a_link_in_place_of_a_folder_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "precious").write_text("x")
    dead = left_behind(tmp_path, dead_process())
    (dead / "half").unlink()
    dead.rmdir()
    dead.symlink_to(target)
    with Scratch(tmp_path):
        pass
    assert (target / "precious").exists()


@pytest.mark.parametrize("step", ["before the weights", "before the model", "before the old weights go"])
def test_killed_between_two_moves_the_model_has_its_own_weights(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.onnx"
    saving.save(model(0), None, path, external_data=True)
    process = dead_process()

    class Killed(BaseException):
        pass

    def killed(*_: object) -> None:
        raise Killed

    replace = Path.replace

    def until_the_model(self: Path, target: Path) -> None:
        if self.name == "m.onnx":
            raise Killed
        replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(files, "_removed", lambda *_: None)
        patch.setattr(Scratch, "__exit__", lambda *_: None)
        patch.setattr(files.os, "getpid", lambda: process)
        if step == "before the old weights go":
            patch.setattr(saving, "settle", killed)
        else:
            patch.setattr(Path, "replace", killed if step == "before the weights" else until_the_model)
        with pytest.raises(Killed):
            saving.save(model(1), None, path, external_data=True)
    expected = model(1 if step == "before the old weights go" else 0)
    np.testing.assert_array_equal(run(onnx.load(path), X)[0], run(expected, X)[0])
    assert any(name.startswith(".lindep_onnx") for name in names(tmp_path))
    saving.save(model(2), None, path, external_data=True)
    np.testing.assert_array_equal(run(onnx.load(path), X)[0], run(model(2), X)[0])
    assert len(names(tmp_path)) == 2 and not any(name.startswith(".") for name in names(tmp_path))


def test_weights_that_a_copy_of_the_model_uses_stay(tmp_path: Path) -> None:
    saving.save(model(0), None, tmp_path / "m.onnx", external_data=True)
    (tmp_path / "copy.onnx").write_bytes((tmp_path / "m.onnx").read_bytes())
    saving.save(model(1), None, tmp_path / "m.onnx", external_data=True)
    for name, seed in (("copy", 0), ("m", 1)):
        loaded = onnx.load(tmp_path / f"{name}.onnx")
        np.testing.assert_array_equal(run(loaded, X)[0], run(model(seed), X)[0])


def test_an_old_output_with_a_strange_location_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    saving.save(model(0), None, path, external_data=True)
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"m.onnx.data", b"m.onnx.d\xff\xfea"))
    saving.save(model(1), None, path)
    np.testing.assert_array_equal(run(onnx.load(path), X)[0], run(model(1), X)[0])


def test_a_model_without_external_data_takes_its_old_weights_along(tmp_path: Path) -> None:
    saving.save(model(0), None, tmp_path / "m.onnx", external_data=True)
    assert len(names(tmp_path)) == 2
    saving.save(model(1), None, tmp_path / "m.onnx")
    assert names(tmp_path) == {"m.onnx"}


RUN = [
    sys.executable,
    "-m",
    "lindep_onnx",
    "in.onnx",
    "out.onnx",
    "--calib",
    "data.npz",
    "--save-as-external-data",
    "-q",
]


@pytest.fixture
def work(tmp_path: Path) -> Path:
    w = np.random.default_rng(0).normal(size=(6, 40)).astype(np.float32)
    w[:, :9] = w[:, 10:19]
    onnx.save(
        build("h = MatMul(x, w)\nr = Relu(h)\ny = Gemm(r, v)", {"w": w, "v": (40, 30)}, x=("N", 6)),
        tmp_path / "in.onnx",
    )
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(1).normal(size=(200, 6)).astype(np.float32))
    return tmp_path


def start(folder: Path) -> subprocess.Popen:
    (folder / "tmp").mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder / "tmp")}
    return subprocess.Popen(RUN, cwd=folder, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGINT for another process")
def test_an_interrupted_run_says_so_and_leaves_nothing(work: Path) -> None:
    before = names(work) | {"tmp"}
    process = start(work)
    deadline = time.monotonic() + 60
    while not any((work / "tmp").glob(".lindep*")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.skip("it was done before it could be interrupted")
    assert errors == "lindep-onnx: interrupted; nothing was written.\n" and process.returncode == 1
    assert names(work) == before and names(work / "tmp") <= {".ses"}  # of ONNX Runtime


def test_two_runs_at_once_leave_one_complete_output(work: Path) -> None:
    before = names(work)
    for process in [start(work), start(work)]:
        assert process.wait(timeout=120) == 0, process.communicate()
    assert names(work) - before == {"tmp", "out.onnx", "out.onnx.data"}
    loaded = onnx.load(work / "out.onnx")
    x = {"x": np.ones((3, 6), np.float32)}
    np.testing.assert_allclose(run(loaded, x)[0], run(onnx.load(work / "in.onnx"), x)[0], rtol=1e-4, atol=1e-4)

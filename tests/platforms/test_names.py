"""Names of files and of tensors, where systems differ: letters, lengths, code pages, processes."""

from __future__ import annotations

import ctypes
import io
import sys
from pathlib import Path, PureWindowsPath

import numpy as np
import onnx
import pytest
from build import build

from lindep_onnx import cli, files
from lindep_onnx.errors import OutputError
from lindep_onnx.model.weights import external_entries


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    w = np.random.default_rng(0).normal(size=(6, 12)).astype(np.float32)
    w[:, 0] = w[:, 1]
    net = build("h = MatMul(x, w)\nr = Relu(h)\ny = Gemm(r, v)", {"w": w, "v": (12, 3)}, x=("N", 6))
    for node in net.graph.node:
        node.name = "层/" + node.op_type
    onnx.save(net, tmp_path / "in.onnx")
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(1).normal(size=(64, 6)).astype(np.float32))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", ["cp1252", "cp437", "ascii", "utf-8"])
def test_a_report_fits_every_code_page(page: str, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding=page)
    monkeypatch.setattr(sys, "stdout", out)
    assert cli.main(["in.onnx", "out.onnx", "--calib", "data.npz", "-v"]) == 0
    out.flush()
    text = out.buffer.getvalue().decode(page)  # type: ignore[attr-defined]
    assert ("层/MatMul" if page == "utf-8" else "\\u5c42/MatMul") in text


def test_a_stream_of_a_code_page_takes_no_other_letters(work: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        io.TextIOWrapper(io.BytesIO(), encoding="cp1252").write("层")


@pytest.mark.parametrize("page", ["cp1252", "utf-8"])
def test_errors_about_files_with_any_name_are_printed(page: str, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = io.TextIOWrapper(io.BytesIO(), encoding=page)
    monkeypatch.setattr(sys, "stderr", said)
    assert cli.main(["层.onnx", "out.onnx", "--calib", "data.npz"]) == 1
    said.flush()
    assert b".onnx: no such model file" in said.buffer.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "names",
    [
        ("OUT.onnx", "--report", "out.json", "--save-plan", "OUT.JSON"),
        ("OUT.onnx", "--report", "a.json", "--save-moments", "out.ONNX"),
        ("IN.onnx",),
        ("OUT.onnx", "--report", "Data.json"),
    ],
)
def test_files_in_other_letters_are_the_same(
    names: tuple[str, ...], work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A second name for a file that is there is what a system without capital letters would find.
    if not (work / "IN.onnx").exists():
        (work / "IN.onnx").hardlink_to(work / "in.onnx")
    (work / "Data.json").hardlink_to(work / "data.npz")
    assert cli.main(["in.onnx", *names, "--calib", "data.npz", "-q"]) == 2
    assert "name another file" in capsys.readouterr().err


def test_other_files_in_other_letters_are_others(work: Path) -> None:
    if (work / "IN.ONNX").exists():
        pytest.skip("no capital letters here")
    assert cli.main(["in.onnx", "IN.ONNX", "--calib", "data.npz", "--report", "In.json", "-q"]) == 0


@pytest.mark.parametrize("options", [[], ["--save-as-external-data"]])
def test_a_path_that_is_too_long_is_named_before_the_work(
    options: list[str], work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli.pipeline, "load_and_trace", lambda *_: pytest.fail("work was done"))
    long = "a" * (246 if options else 251) + ".onnx"
    assert cli.main(["in.onnx", long, "--calib", "data.npz", *options]) in (1, 2)
    assert "name another" in capsys.readouterr().err
    assert len(list(work.iterdir())) == 2


def test_whether_a_path_fits_is_asked_with_the_folder_that_it_goes_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit, touch = len(str(tmp_path)) + 30, Path.touch  # the file itself fits, its staged copy does not

    def touched(path: Path) -> None:
        if len(str(path)) > limit:
            raise OSError(2, "The system cannot find the path specified")
        touch(path)

    monkeypatch.setattr(Path, "touch", touched)
    with pytest.raises(OutputError, match=r"cannot be written to .The system cannot find"):
        files.check_writable(tmp_path / "out.onnx")


def test_data_is_in_the_same_order_whatever_letters_mean() -> None:
    found = [PureWindowsPath(name) for name in ("b.npz", "A.npz", "a.npz", "B.npz")]
    assert [path.name for path in sorted(found, key=files.in_order)] == ["A.npz", "B.npz", "a.npz", "b.npz"]  # type: ignore[arg-type]
    assert [path.name for path in sorted(found)] != ["A.npz", "B.npz", "a.npz", "b.npz"]


def test_data_with_capital_letters_in_its_suffix_is_read(work: Path) -> None:
    (work / "data.npz").rename(work / "DATA.NPZ")
    assert cli.main(["in.onnx", "out.onnx", "--calib", "DATA.NPZ", "-q"]) == 0


def test_locations_that_are_no_text_are_read_alike_everywhere() -> None:
    tensor = onnx.TensorProto()
    entry = onnx.StringStringEntryProto.FromString(b"\n\x08location\x12\x03a\xffb")
    tensor.external_data.append(entry)
    assert external_entries(tensor)["location"] in ("a\udcffb", "a\ufffdb")


class Kernel:
    """What the kernel of Windows says of a process."""

    def __init__(self, handle: int | None, waited: int = 0) -> None:
        self.OpenProcess = lambda *_: handle
        self.WaitForSingleObject = lambda *_: waited
        self.closed: list[object] = []
        self.CloseHandle = self.closed.append


@pytest.mark.parametrize(
    ("kernel", "error", "alive"),
    [
        (Kernel(7, files.STILL_RUNS), 0, True),
        (Kernel(7, 0), 0, False),
        (Kernel(None), files.NO_SUCH_PROCESS, False),
        (Kernel(None), 5, True),  # somebody else's
    ],
)
def test_on_windows_processes_are_asked_for_without_a_signal(
    kernel: Kernel, error: int, alive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files.sys, "platform", "win32")
    monkeypatch.setattr(files.os, "kill", lambda *_: pytest.fail("this would end the process"))
    for name, value in (("OpenProcess", None), ("WaitForSingleObject", None)):
        setattr(
            kernel, name, type("Function", (), {"__call__": staticmethod(getattr(kernel, name)), "restype": value})()
        )
    monkeypatch.setattr(ctypes, "WinDLL", lambda *_, **__: kernel, raising=False)
    monkeypatch.setattr(ctypes, "get_last_error", lambda: error, raising=False)
    assert files._is_alive(4242) is alive
    assert len(kernel.closed) == (kernel.OpenProcess() is not None)


def test_on_windows_a_folder_beside_the_output_is_not_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.sys, "platform", "win32")
    monkeypatch.setattr(files, "_is_alive", lambda _: True)
    monkeypatch.setattr(files.tempfile, "mkdtemp", lambda **_: pytest.fail("what moves out of it stays private"))
    with files.Scratch(tmp_path) as name:
        assert Path(name).parent == tmp_path and Path(name).is_dir()
    assert not list(tmp_path.iterdir())

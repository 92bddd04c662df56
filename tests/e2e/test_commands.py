"""The commands beside `compress`, on the command line and from Python."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from build import build
from onnx.reference import ReferenceEvaluator

import lindep_onnx
from lindep_onnx.cli import main
from lindep_onnx.errors import BudgetError, ModelError, UsageError

BODY = "a = Gemm<transB=1>(x, w)\nr = Relu(a)\ny = Gemm<transB=1>(r, v)"


def net(copies: int = 0, **named: str) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    w, v = (rng.normal(size=size).astype(np.float32) for size in ((16, 6), (4, 16)))
    if copies:
        w[-copies:] = w[:copies]
    return build(BODY, {"w": w, "v": v}, x=("N", 6), **named)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    onnx.save(net(copies=3), tmp_path / "net.onnx")
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(1).normal(size=(400, 6)).astype(np.float32))
    return tmp_path


def told(capsys: pytest.CaptureFixture[str], *line: str | Path) -> dict[str, object]:
    assert main([str(part) for part in line]) == 0
    return json.loads(capsys.readouterr().out)


def test_inspect_says_what_may_go_and_what_is_proven_without_data(files: Path, capsys) -> None:
    found = told(capsys, "inspect", files / "net.onnx", "--json", "-")
    (group,) = found["groups"]
    assert (group["channels"], group["proven"], group["readers"]) == (16, 3, [found["groups"][0]["readers"][0]])
    assert found["removable"] == 16 * 6 + 4 * 16 and found["size"]["parameters"] == found["removable"]
    assert [refusal["reason"] for refusal in found["refusals"]] == ["graph_output"]
    assert lindep_onnx.inspect(net()).groups[0].proven == 0


def test_inspect_takes_what_may_go(files: Path, capsys) -> None:
    found = told(capsys, "inspect", files / "net.onnx", "--json", "-", "--exclude", "*")
    assert not found["groups"] and found["removable"] == 0


def test_compare_finds_what_two_runs_differ_by(files: Path, capsys) -> None:
    other = net(copies=3)
    values = onnx.numpy_helper.to_array(other.graph.initializer[0]).copy()
    values[0] *= 1.1
    other.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(values, other.graph.initializer[0].name))
    onnx.save(other, files / "other.onnx")
    line = ("compare", files / "net.onnx", files / "other.onnx", "--calib", files / "x.npz", "--benchmark", "0.05")
    found = told(capsys, *line, "--json", "-")["verification"]
    x = np.load(files / "x.npz")["x"]
    one, two = (ReferenceEvaluator(str(files / name)).run(None, {"x": x})[0] for name in ("net.onnx", "other.onnx"))
    assert found["samples"] == 400 and found["max_abs_error"] == pytest.approx(np.abs(one - two).max(), rel=1e-4)
    assert found["agreement"] == pytest.approx((one.argmax(1) == two.argmax(1)).mean())
    assert main([*map(str, line), "--max-error", "1e-6"]) == 3
    assert "--max-error 1e-06 does not hold" in capsys.readouterr().err


def test_a_model_beside_itself_differs_by_nothing(files: Path) -> None:
    report = lindep_onnx.compare(files / "net.onnx", net(copies=3), files / "x.npz", max_error=1e-9, benchmark=0.05)
    assert report.verification is not None and report.verification.max_abs_error == 0.0
    assert report.verification.status == "passed" and report.before.parameters == report.after.parameters


def test_models_with_other_outputs_are_not_compared(files: Path) -> None:
    other = build(BODY.replace("y =", "z ="), {"w": (16, 6), "v": (4, 16)}, x=("N", 6), outputs="z")
    with pytest.raises(ModelError, match="outputs z, and the original has y"):
        lindep_onnx.compare(files / "net.onnx", other, files / "x.npz")


def test_a_sweep_is_what_single_runs_come_to_and_keeps_the_smallest(files: Path, capsys) -> None:
    options = ("--calib", files / "x.npz", "--round-to", "1", "--benchmark", "0.05")
    line = ("sweep", files / "net.onnx", files / "best.onnx", *options, "--max-error", "0.5")
    found = told(capsys, *line, "--params", "90%,0.7,0.05", "--json", "-")
    assert [point["asked"] for point in found["points"]] == [0.9, 0.7, 0.05]
    assert [point["status"] for point in found["points"]] == ["passed", "passed", "failed"] and found["best"] == 1
    assert (
        main([str(part) for part in (files / "net.onnx", files / "one.onnx", *options, "--params", "0.7", "-q")]) == 0
    )
    best, one = (onnx.load(files / name) for name in ("best.onnx", "one.onnx"))
    assert [entry.raw_data for entry in best.graph.initializer] == [entry.raw_data for entry in one.graph.initializer]


def test_a_sweep_of_which_nothing_holds_fails_and_writes_nothing(files: Path, capsys) -> None:
    line = ("sweep", files / "net.onnx", files / "best.onnx", "--calib", files / "x.npz", "--params", "0.05", "-q")
    assert main([str(part) for part in line]) == 3 and not (files / "best.onnx").exists()


@pytest.mark.parametrize("given", [(), ("--params", "0.5", "--macs", "0.5"), ("--params", "half")])
def test_what_is_swept_over_is_one_list_of_shares(files: Path, given: tuple[str, ...], capsys) -> None:
    assert main(["sweep", str(files / "net.onnx"), "--calib", str(files / "x.npz"), *given]) == 2
    assert "such as" in capsys.readouterr().err


def test_python_says_the_same(files: Path) -> None:
    found = lindep_onnx.sweep(net(copies=3), files / "x.npz", params=[0.9, 0.05], benchmark=0.05)
    assert found.best == 0 and found.result is not None and found.points[1].status == "failed"
    with pytest.raises(UsageError, match="list of shares"):
        lindep_onnx.sweep(net(), files / "x.npz", params=0.5)
    with pytest.raises(BudgetError, match="does not hold"):
        lindep_onnx.compare(net(), net(copies=3), files / "x.npz", min_agreement=1.0, benchmark=0.05)


@pytest.mark.parametrize("command", ["inspect", "compare"])
def test_what_is_read_is_not_overwritten(files: Path, command: str, capsys) -> None:
    kept = (files / "net.onnx").read_bytes()
    models = [str(files / "net.onnx")] * (2 if command == "compare" else 1)
    calib = ["--calib", str(files / "x.npz")] if command == "compare" else []
    assert main([command, *models, *calib, "--json", models[0]]) == 2
    assert (files / "net.onnx").read_bytes() == kept and "name another file" in capsys.readouterr().err


def test_copies_of_a_sample_judge_no_limit(files: Path) -> None:
    one = np.load(files / "x.npz")["x"][:1]
    copies, many = (
        lindep_onnx.compare(net(), net(), {"x": x}, max_error=0.1, benchmark=0.05).verification
        for x in (np.repeat(one, 400, 0), np.load(files / "x.npz")["x"])
    )
    assert copies is not None and many is not None
    assert (copies.status, many.status) == ("unchecked", "passed")


def test_compress_may_be_said(files: Path) -> None:
    assert main(["compress", str(files / "net.onnx"), str(files / "out.onnx"), "--proven-only", "-q"]) == 0
    assert (files / "out.onnx").exists()

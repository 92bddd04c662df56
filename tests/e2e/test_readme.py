"""The README says what is so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from lindep_onnx.cli import parser

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def flags() -> set[str]:
    return {flag for action in parser()._actions for flag in action.option_strings if flag.startswith("--")}


def test_every_option_is_in_the_readme_and_every_one_there_exists() -> None:
    text = re.sub(r"<!-- ci -->\n```.*?```", "", README, flags=re.S)
    text = re.sub(r"`python (-m pytest )?tools/[^`]*`", "", text)  # the tools have options of their own
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))
    assert named == flags()


def test_there_are_exactly_two_set_up_commands() -> None:
    block = re.search(r"<!-- ci -->\n```\n(.*?)```", README, flags=re.S)
    assert block is not None
    lines = block[1].strip().splitlines()
    assert len(lines) == 2
    assert "models/demo.onnx" in lines[0] and "pytest" in lines[1]
    assert "'" not in block[1]  # which is no quote for `cmd`


def test_the_set_up_commands_are_run_as_printed_on_three_systems() -> None:
    block = re.search(r"<!-- ci -->\n```\n(.*?)```", README, flags=re.S)
    workflow = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
    steps = re.findall(r"- run: (.*)", workflow)
    assert block is not None and steps[:2] == block[1].strip().splitlines()
    assert all(f"{system}-latest" in workflow for system in ("ubuntu", "windows", "macos"))
    checks = re.findall(r"^(ruff .*|mypy)$", (ROOT / ".ci/run").read_text(encoding="utf-8"), flags=re.M)
    assert len(checks) == 3 and all(check in steps[2].split(" && ") for check in checks)


def test_the_python_examples_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, stages = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.chdir(tmp_path)
    exec(compile(first, "README.md", "exec"), {})
    kept, _, whole = capsys.readouterr().out.split()[:3]
    assert int(kept) <= 0.5 * int(whole)
    names: dict[str, Any] = {}
    exec(compile(stages, "README.md", "exec"), names)
    assert len(names["plans"][0.35]) < len(names["plans"][0.2]) == len(names["plan"])
    assert "channels: " in capsys.readouterr().out and (tmp_path / "moments.npz").is_file()


def test_every_linked_file_exists() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links and all((ROOT / link).is_file() for link in links)


def test_exit_codes_and_budgets_of_the_readme_are_those_of_the_code() -> None:
    from lindep_onnx import errors

    assert (errors.ModelError.exit_code, errors.UsageError.exit_code, errors.BudgetError.exit_code) == (1, 2, 3)

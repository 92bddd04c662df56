"""The documentation says what is so: its commands run, its links lead somewhere, its options exist.

The blocks of a page run one after the other in a folder of their own, as a reader would run them. A comment before a
block says what it needs (`<!-- needs PACKAGE -->`), that it takes long (`<!-- slow -->`) or how it ends (`<!-- exit 3 -->`).
Blocks marked `text` are patterns with placeholders; their tools and options have to exist.
"""

from __future__ import annotations

import importlib.util
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "tools" / "benchmarks"
DOCS = ROOT / "docs"
PACKAGE = ROOT / "lindep_onnx"
#: Folders of the package that are named as a whole.
BY_FOLDER = ("structure/rules/", "distill/autodiff/rules/")
PAGES = sorted(DOCS.glob("*.md"))
#: Blocks that another test or tool runs: installation, by .ci/newcomer.py.
ELSEWHERE = "pip install ."
#: Samples that the commands of a page use here, so that the default tests stay fast.
SAMPLES = 200


@dataclass(frozen=True)
class Block:
    """A fenced block, and the comment before it."""

    kind: str
    text: str
    note: str

    def noted(self, word: str) -> str | None:
        found = re.search(rf"<!-- {word} ?(\S*) -->", self.note)
        return None if found is None else found[1]


def blocks(page: Path) -> list[Block]:
    pattern = r"((?:<!--[^\n]*-->\n)?)```(\w*)\n(.*?)```"
    return [Block(kind, body, note) for note, kind, body in re.findall(pattern, page.read_text("utf-8"), flags=re.S)]


def runnable() -> Iterator[pytest.param]:
    for page in PAGES:
        found = [block for block in blocks(page) if block.kind in ("sh", "python")]
        slow = [block for block in found if block.noted("slow") is not None]
        quick = [block for block in found if block not in slow]
        if quick:  # each takes some seconds; one of them runs by default
            marks = () if page.stem == "api" else pytest.mark.slow
            yield pytest.param(page, quick, id=page.stem, marks=marks)
        for number, block in enumerate(slow):
            yield pytest.param(page, [block], id=f"{page.stem}-{number}", marks=pytest.mark.slow)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("models", "tools", "tests", "docs", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def run(block: Block, folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "BROWSER": "true %s", "OLIVE_DISABLE_TELEMETRY": "1"}
    if block.kind == "python":
        commands = [[sys.executable, "-c", block.text]]
    elif sys.platform == "win32":
        pytest.skip("these pages are written for the shells of Linux and macOS")
    else:
        commands = [["bash", "-c", prepared(line)] for line in block.text.strip().splitlines() if ELSEWHERE not in line]
    for command in commands:
        found = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)
        assert found.returncode == int(block.noted("exit") or 0), f"{command[-1]}\n{found.stdout}\n{found.stderr}"


def prepared(line: str) -> str:
    line = re.sub(r"^lindep-onnx ", f"{sys.executable} -m lindep_onnx ", line)
    line = re.sub(r"^python ", f"{sys.executable} ", line)
    fewer = "-m lindep_onnx " in line and "--max-samples" not in line and "--calib" in line
    return f"{line} --max-samples {SAMPLES}" if fewer else line


@pytest.mark.parametrize(("page", "found"), list(runnable()))
def test_what_a_page_shows_runs(page: Path, found: list[Block], folder: Path) -> None:
    for block in found:
        needed = block.noted("needs")
        if needed is None or importlib.util.find_spec(needed) is not None:
            run(block, folder)


def test_a_block_that_fails_is_noticed(folder: Path) -> None:
    for block in (Block("python", "assert False", ""), Block("sh", "lindep-onnx missing.onnx\ntrue", ""),
                  Block("sh", "true", "<!-- exit 3 -->\n")):  # fmt: skip
        with pytest.raises(AssertionError):
            run(block, folder)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_options_and_tools_that_a_page_names_exist(page: Path) -> None:
    from lindep_onnx.arguments import parser
    from lindep_onnx.commands import COMMANDS, command_parser

    parsers = [parser(), *map(command_parser, COMMANDS)]
    flags = {flag for one in parsers for action in one._actions for flag in action.option_strings}
    text = page.read_text("utf-8")
    for line in re.findall(r"^lindep-onnx .*$|`--[^`]*`", text, flags=re.M):
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", line)) <= flags, line
    for line in re.findall(r"python (?:tools|\.ci)/[^\n`]*", text):
        tool = ROOT / line.split()[1]
        assert tool.is_file(), line
        assert all(f'"{flag}"' in tool.read_text("utf-8") for flag in re.findall(r"--[a-z][a-z-]+", line)), line
    options = (BENCHMARKS / "conftest.py").read_text("utf-8")
    for line in re.findall(r"python -m pytest tools/[^\n`]*", text):
        assert (ROOT / line.split()[3]).exists(), line
        flags = set(re.findall(r"--[a-z][a-z-]+", line)) - {"--benchmark-json"}
        assert all(f'"{flag}"' in options for flag in flags), line


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.stem)
def test_figures_name_cases_that_exist(page: Path) -> None:
    for bench, case in re.findall(r"`(bench_\w+\.py)`: `(\w+)`", page.read_text("utf-8")):
        assert f"def test_{case}(" in (BENCHMARKS / bench).read_text("utf-8"), (bench, case)


def test_the_reference_of_the_command_line_is_made_from_the_options() -> None:
    from lindep_onnx.commands import reference

    assert (DOCS / "cli.md").read_text("utf-8") == reference()


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CHANGELOG.md", *PAGES], ids=lambda page: page.stem)
def test_modules_that_a_page_names_exist(page: Path) -> None:
    inline = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.S)
    for name in re.findall(r"`([a-z_./]+\.(?:py|j2)|[a-z_]+/(?:[a-z_]+/)*)`", inline):
        assert any((folder / name).exists() for folder in (PACKAGE, PACKAGE / "report", BENCHMARKS, ROOT)), name


def test_the_page_on_architecture_names_every_module() -> None:
    named = set(re.findall(r"`([a-z_/]+(?:\.py|/))`", (DOCS / "architecture.md").read_text("utf-8")))
    for module in PACKAGE.rglob("[a-z]*.py"):
        path = module.relative_to(PACKAGE)
        assert {path.as_posix(), *(folder for folder in BY_FOLDER if path.as_posix().startswith(folder))} & named, path


def test_what_the_page_on_python_describes_can_be_imported() -> None:
    # Steps for other tools need these tools; a module stands for itself.
    absent = [name for name in ("onnx_ir", "olive") if importlib.util.find_spec(name) is None]
    for name in re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text("utf-8"), flags=re.M):
        if name.rpartition(".")[2] in absent:
            assert (ROOT / f"{name.replace('.', '/')}.py").is_file(), name
        else:
            pkgutil.resolve_name(name)


def test_links_and_pictures_lead_somewhere() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text("utf-8")):
            assert link.startswith("http") or (page.parent / link).is_file(), f"{page.name}: {link}"


def test_every_page_is_in_the_navigation_and_the_site_builds(tmp_path: Path) -> None:
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "-q",
        "-f",
        str(ROOT / "mkdocs.yml"),
        "-d",
        str(tmp_path),
    ]
    found = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert found.returncode == 0, found.stderr
    navigation = (ROOT / "mkdocs.yml").read_text("utf-8")
    for page in PAGES:
        assert f": {page.name}" in navigation, page.name
        assert list(tmp_path.glob(f"{page.stem}/index.html" if page.stem != "index" else "index.html"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_newcomer_gets_to_an_opened_report() -> None:
    command = [sys.executable, str(ROOT / ".ci" / "newcomer.py"), "--browser", "true"]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr

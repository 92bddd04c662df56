"""Run the default tests with the oldest and the newest versions that pyproject.toml allows.

For each Python given, a fresh virtual environment is made twice: once with every dependency at its lower bound, once
with the newest release of each. The package is installed from its wheel, and the tests run against that.

    python .ci/matrix.py [--python PYTHON ...] [--only oldest|newest] [-k EXPRESSION]

The last line of each row is what pytest said; the exit code is that of the worst.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import tomllib

ROOT = Path(__file__).parents[1]
EXTRAS = ("test",)


def requirements(name: str) -> list[str]:
    """What to install: the dependencies and the test extra, at their lower bounds for `oldest`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    given = [*project["dependencies"], *(one for extra in EXTRAS for one in project["optional-dependencies"][extra])]
    if name == "newest":
        return [re.split(r"[<>=!~; ]", entry, maxsplit=1)[0] for entry in given]
    return [entry.replace(">=", "==") for entry in given]


def run(python: str, name: str, expression: str | None) -> tuple[int, list[str]]:
    """The exit code of pytest, and what to print about it."""
    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder) / "venv" / "bin" / "python"
        subprocess.run([python, "-m", "venv", str(own.parents[1])], check=True)
        subprocess.run([own, "-m", "pip", "install", "-q", *requirements(name)], check=True)
        subprocess.run([own, "-m", "pip", "install", "-q", "--no-deps", str(ROOT)], check=True)
        listed = subprocess.run([own, "-m", "pip", "freeze"], check=True, capture_output=True, text=True).stdout
        chosen = [] if expression is None else ["-k", expression]
        command = [own, "-m", "pytest", "-n", "2", "-p", "no:cacheprovider", str(ROOT / "tests"), *chosen]
        found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    wanted = ("numpy", "scipy", "onnx", "onnxruntime", "onnx-graphsurgeon", "onnx_graphsurgeon", "rich")
    versions = [line for line in listed.splitlines() if line.partition("==")[0].lower() in wanted]
    failed = [line for line in found.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    last = (found.stdout.strip() or found.stderr.strip()).splitlines()[-1]
    return found.returncode, [" ".join(versions), *failed, last]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", nargs="+", default=[sys.executable])
    parser.add_argument("--only", choices=("oldest", "newest"))
    parser.add_argument("-k", dest="expression")
    given = parser.parse_args(argv)
    worst = 0
    for python in given.python:
        shown = subprocess.run([python, "--version"], check=True, capture_output=True, text=True).stdout.strip()
        for name in ("oldest", "newest") if given.only is None else (given.only,):
            code, lines = run(python, name, given.expression)
            print(f"{shown}, {name}: {lines[0]}", *lines[1:], sep="\n  ", flush=True)
            worst = max(worst, code)
    return worst


if __name__ == "__main__":
    sys.exit(main())

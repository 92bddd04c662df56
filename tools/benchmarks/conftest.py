"""Options, and tables: what a case hands to `Bench.row` is printed at the end and lands in the JSON of the benchmark.

    python -m pytest tools/benchmarks                                     quick cases, on the demonstration model
    python -m pytest tools/benchmarks --models MODELS --data DATA         all whose model and images are there
    python -m pytest tools/benchmarks/bench_trust.py -m slow              what is built here, and takes its time

`-k NAME` picks cases, `--benchmark-json=FILE` keeps the figures, `pytest-benchmark compare` compares two such files.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from measure import Bench
from tasks import MissingError, Places

TABLES = pytest.StashKey[dict[str, list[dict[str, str]]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("benchmarks of lindep_onnx")
    group.addoption("--models", type=Path, metavar="DIR", help="models, see tools/benchmarks/tasks.py")
    group.addoption("--data", type=Path, metavar="DIR", help="cifar10_jpeg.npz and imagenet/*.jpg")
    group.addoption("--fashion", type=Path, metavar="DIR", help="the four idx files of Fashion-MNIST")
    group.addoption("--held-out", action="store_true", help="judge by held-out calibration images, not by test images")
    group.addoption("--write", type=Path, metavar="FILE", help="also write the page (coverage) or picture (growth)")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TABLES] = {}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.timeout(0))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """A case without its model or images is skipped."""
    try:
        return (yield)
    except MissingError as missing:
        pytest.skip(str(missing))


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def bench(request: pytest.FixtureRequest, benchmark: Any, tmp_path: Path) -> Bench:
    """What a case works with."""
    option = request.config.getoption
    title = f"{request.node.path.stem}, {request.node.originalname.removeprefix('test_').replace('_', ' ')}"
    rows = request.config.stash[TABLES].setdefault(title, [])
    places = Places(*(option(name) for name in ("models", "data", "fashion")))
    return Bench(benchmark, rows, tmp_path, places, option("held_out"), option("write"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for title, rows in config.stash[TABLES].items():
        if not rows:
            continue
        columns = list(dict.fromkeys(column for cells in rows for column in cells))
        terminalreporter.write_line(f"\n## {title}\n")
        terminalreporter.write_line(f"| {' | '.join(column.replace('_', ' ') for column in columns)} |")
        terminalreporter.write_line("|---" * len(columns) + "|")
        for cells in rows:
            terminalreporter.write_line(f"| {' | '.join(cells.get(column, '') for column in columns)} |")

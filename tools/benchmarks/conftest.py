"""Options, and tables: what a case hands to `row` is printed at the end and lands in the JSON of the benchmark.

    python -m pytest tools/benchmarks                                     quick cases, on the demonstration model
    python -m pytest tools/benchmarks --models MODELS --data DATA         all whose model and images are there
    python -m pytest tools/benchmarks/bench_trust.py -m slow              what is built here, and takes its time

`-k NAME` picks cases, `--benchmark-json=FILE` keeps the figures, `pytest-benchmark compare` compares two such files.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from subjects import MissingError, Places

Row: TypeAlias = Callable[..., None]
TABLES = pytest.StashKey[dict[str, list[dict[str, str]]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("benchmarks of lindep_onnx")
    group.addoption("--models", type=Path, metavar="DIR", help="models, see tools/benchmarks/subjects.py")
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
def places(request: pytest.FixtureRequest) -> Places:
    """Where models and images are."""
    return Places(*(request.config.getoption(name) for name in ("models", "data", "fashion")))


@pytest.fixture
def row(request: pytest.FixtureRequest, benchmark: Any) -> Row:
    """Called with the cells of a row by column; several rows of one case are several calls."""
    tables = request.config.stash[TABLES]
    title = f"{request.node.path.stem}, {request.node.originalname.removeprefix('test_').replace('_', ' ')}"

    def add(**cells: object) -> None:
        texts = {column: str(cell) for column, cell in cells.items()}
        tables.setdefault(title, []).append(texts)
        benchmark.extra_info.setdefault("rows", []).append(texts)

    return add


@pytest.fixture
def once(benchmark: Any) -> Callable[..., Any]:
    """Calls a function one time and measures it."""
    return lambda call, *arguments, **options: benchmark.pedantic(call, arguments, options, rounds=1, iterations=1)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for title, rows in config.stash[TABLES].items():
        columns = list(dict.fromkeys(column for cells in rows for column in cells))
        terminalreporter.write_line(f"\n## {title}\n")
        terminalreporter.write_line(f"| {' | '.join(column.replace('_', ' ') for column in columns)} |")
        terminalreporter.write_line("|---" * len(columns) + "|")
        for cells in rows:
            terminalreporter.write_line(f"| {' | '.join(cells.get(column, '') for column in columns)} |")

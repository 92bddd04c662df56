"""The command line: arguments to options, errors to exit codes. No logic."""

from __future__ import annotations

import argparse
import ctypes
import io
import logging
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from lindep_onnx import pipeline
from lindep_onnx.arguments import parser, with_negatives
from lindep_onnx.calibration.shards import elsewhere
from lindep_onnx.commands import COMMANDS, COMPRESS, Command, command_parser, write_answer
from lindep_onnx.data.sources import RANDOM, load_function
from lindep_onnx.errors import LindepError, UsageError
from lindep_onnx.integrations.dask import connected
from lindep_onnx.log import Log
from lindep_onnx.options import Config, declared, flag
from lindep_onnx.planning.plan_file import Plan, options_of
from lindep_onnx.report.terminal import render
from lindep_onnx.report.writing import check_path, write_report

OK, FAILURE = 0, 1
#: Options of the commands beside `compress` that name files.
READ = ("model", "original", "other", "calib", "load_moments")
WRITTEN = ("out", "json", "report", "save_moments")
#: Names that nobody gives a model: whoever writes one in its place means data.
NO_MODELS = (".npz", ".npy", ".py", ".json", ".html", ".csv", ".jpg", ".jpeg", ".png")
#: A message is never longer.
MAX_LINES = 3
#: Blocks of memory from this size on go back to the system when they are freed, and the numbers of glibc's options.
GIVEN_BACK, TRIM_THRESHOLD, MMAP_THRESHOLD = 4 << 20, -1, -3


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what follows the program name; None takes `sys.argv`.

    Returns:
        The exit code.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    _spell_out_what_cannot_be_printed()
    _give_memory_back()
    errors = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
    try:
        command = COMMANDS.get(given[0]) if given else None
        made = parser() if command is None else command_parser(given[0])
        rest = given[1:] if given and given[0] in (COMPRESS, *COMMANDS) else given
        options = made.parse_intermixed_args(with_negatives(rest))  # OUT may come behind options
        logging.basicConfig(level=logging.DEBUG if options.debug else logging.ERROR, stream=sys.stderr)
        return _run(options, errors) if command is None else _other(command, options, errors)
    except (Exception, KeyboardInterrupt) as error:
        if "--debug" in given:
            traceback.print_exception(error)
        else:
            errors.print("lindep-onnx: " + _shortened(_message(error)), markup=False)
        return error.exit_code if isinstance(error, LindepError) else FAILURE


def _spell_out_what_cannot_be_printed() -> None:
    """Names of tensors hold any character, and code pages hold few: a report must not end in an error for that."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def _give_memory_back() -> None:
    """Keep glibc from holding on to the memory of sessions that are closed.

    It takes the size of whatever was freed for one that will be wanted again. A run on efficientnet_lite0 needs 200 MB
    less.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(MMAP_THRESHOLD, GIVEN_BACK)
        library.mallopt(TRIM_THRESHOLD, GIVEN_BACK)


def _message(error: BaseException) -> str:
    if isinstance(error, LindepError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; nothing was written."
    if isinstance(error, MemoryError):
        return "out of memory; use fewer samples per run (--batch-size 1)."
    return f"unexpected {type(error).__name__}: {error}\nRun again with --debug and report it."


def _shortened(message: str) -> str:
    """At most three lines, the last one among them: it says what to do."""
    lines = [line for line in message.splitlines() if line.strip()]
    return "\n".join(lines if len(lines) <= MAX_LINES else [*lines[: MAX_LINES - 1], lines[-1]])


def _other(command: Command, options: argparse.Namespace, errors: Console) -> int:
    config = Config(**{name: value for name, value in _changed(options).items() if name not in command.own})
    given = {name: str(value) for name, value in vars(options).items() if isinstance(value, str) and value != "-"}
    read, written = ([given[name] for name in names if name in given] for names in (READ, WRITTEN))
    for path in (*read, *written):
        _check_name(path)
    _check_written([Path(path) for path in written], read)
    with _progress(errors, bool(options.quiet)) as progress:
        answer = command.run(options, config, Log(progress))
    write_answer(answer, options)
    if answer.failure is not None:
        raise answer.failure
    return OK


def _run(options: argparse.Namespace, errors: Console) -> int:
    config, repeated = _config(options)
    files, report_path = _files(options, config)
    if config.random_calib is not None and not options.quiet:
        errors.print(RANDOM, style="bold red", markup=False)
    with ExitStack() as stack:
        client = stack.enter_context(connected(options.cluster)) if options.cluster else None
        progress = stack.enter_context(_progress(errors, bool(options.quiet)))
        request = pipeline.Request(
            options.model, options.calib, options.stress, repeated, elsewhere(client, options.calib, config), files,
            detailed=report_path is not None or bool(options.verbose or options.dry_run), preview=bool(options.dry_run),
        )  # fmt: skip
        result = pipeline.run(request, config, Log(progress))
    if not options.quiet:
        render(result.report, Console(highlight=False), verbose=bool(options.verbose), preview=bool(options.dry_run))
    if report_path is not None:
        write_report(result.report, report_path)
    if result.failure is not None:
        raise result.failure
    return OK


def _config(options: argparse.Namespace) -> tuple[Config, pipeline.Repeated | None]:
    """The options, and the plan that they are given beside."""
    changed = _changed(options)
    if options.plan is None:
        return Config(**changed), None
    _check_name(options.plan)
    saved = Plan.load(options.plan)
    return options_of(saved, changed), pipeline.Repeated(saved, changed)


def _changed(options: argparse.Namespace) -> dict[str, Any]:
    """The options that are given."""
    default, changed = Config(), dict[str, Any]()
    for name in declared(Config):
        value = getattr(options, name, None)  # not every command has every option
        if isinstance(value, list):
            value = dict(value) if isinstance(getattr(default, name), Mapping) else tuple(value)
            if name == "latency_table" and len(value) == 1:  # as it is in reports and plans
                value = value[0]
        if name in ("eval", "augment") and isinstance(value, str) and value != "mix":
            value = load_function(value, flag(name))
        if value is not None:
            changed[name] = value
    return changed


def _files(options: argparse.Namespace, config: Config) -> tuple[pipeline.Files, Path | None]:
    """What is written beside what `config` names, and where the report goes, once all names of files make sense."""
    read = (options.model, options.calib, options.stress, config.load_moments, options.plan)
    written = (options.report, options.save_plan, config.save_moments, config.checkpoint)
    for path in (*read, options.output, *written):
        if path is not None:
            _check_name(str(path))
    if options.output is None and not options.dry_run:
        raise UsageError("OUT.onnx is missing: name the file to write, or use --dry-run.")
    report = Path(options.report) if options.report else None
    if report is not None:
        check_path(report)
    output = Path(options.output) if options.output and not options.dry_run else None
    _check_written([output, *(Path(path) for path in written if path)], read)
    if output is not None and output.suffix.lower() in NO_MODELS:
        raise UsageError(
            f"{output}: is no name for a model; data goes behind --calib, and OUT.onnx is what is written."
        )
    save_plan = Path(options.save_plan) if options.save_plan else None
    return pipeline.Files(output, bool(options.save_as_external_data), save_plan), report


def _check_name(path: str) -> None:
    """Refuse what no file system takes: NUL characters, names that are too long."""
    try:
        if "\0" in path:  # which some questions about a path answer with no, and others with an error
            raise ValueError("it holds a NUL character")
        Path(path).exists()
    except (OSError, ValueError) as error:
        shown = path if len(path) < 80 else path[:60] + "..."
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{shown!r}: cannot be looked up ({reason}); name another file.") from error


def _check_written(written: Sequence[Path | None], read: Sequence[str | Path | None]) -> None:
    """Nothing that is read may be overwritten, and nothing may be written twice."""
    there = [Path(path) for path in read if path and Path(path).exists()]
    taken = {Path(path).resolve() for path in read if path}
    named: list[Path] = []
    for path in filter(None, written):
        exists = path.exists() and any(map(path.samefile, there))
        if path.resolve() in taken or exists or any(_share_a_name(path, other) for other in named):
            raise UsageError(
                f"{path}: is the input model, the calibration data or the other output; name another file."
            )
        taken.add(path.resolve())
        named.append(path)


def _share_a_name(one: Path, other: Path) -> bool:
    """Whether two files that may not be there yet are the same where capital letters make no difference."""
    if one.name.casefold() != other.name.casefold() or not (one.parent.exists() and other.parent.exists()):
        return False
    return one.parent.samefile(other.parent)


@contextmanager
def _progress(console: Console, quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Stages on stderr as they run, with the time left; nothing when it is not a terminal or not wanted."""
    bar = Progress(
        TextColumn("{task.description:<12}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=quiet or not console.is_terminal,
    )
    tasks: dict[str, TaskID] = {}
    reached: dict[str, int] = {}

    def update(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            tasks[stage] = bar.add_task(stage, total=total)
        elif done < reached[stage]:  # it runs again, for the next plan or round
            bar.reset(tasks[stage], total=total)
        reached[stage] = done
        bar.update(tasks[stage], completed=done, total=total)

    bar.start()
    try:
        yield update
    finally:
        if not bar.disable:  # versions of rich before 14.3 end even a hidden bar with an empty line
            bar.stop()

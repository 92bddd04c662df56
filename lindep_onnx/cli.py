"""The command line: arguments to options, errors to exit codes. No logic."""

from __future__ import annotations

import argparse
import ctypes
import difflib
import io
import logging
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

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
from lindep_onnx._version import __version__
from lindep_onnx.calibration.shards import elsewhere
from lindep_onnx.data.sources import RANDOM, load_function
from lindep_onnx.errors import LindepError, UsageError
from lindep_onnx.integrations.dask import connected
from lindep_onnx.log import Log
from lindep_onnx.options import (
    GROUPS,
    Config,
    DataOptions,
    Option,
    OutputOptions,
    RefitOptions,
    RuntimeOptions,
    declared,
    flag,
    several,
)
from lindep_onnx.planning.plan_file import Plan, options_of
from lindep_onnx.report.terminal import render
from lindep_onnx.report.writing import check_path, write_report

OK, FAILURE = 0, 1
#: Names that nobody gives a model: whoever writes one in its place means data.
NO_MODELS = (".npz", ".npy", ".py", ".json", ".html", ".csv", ".jpg", ".jpeg", ".png")
#: A message is never longer.
MAX_LINES = 3
#: Blocks of memory from this size on go back to the system when they are freed, and the numbers of glibc's options.
GIVEN_BACK, TRIM_THRESHOLD, MMAP_THRESHOLD = 4 << 20, -1, -3


class _Parser(argparse.ArgumentParser):
    """Reports a mistake in one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message[:1].upper()}{message[1:]}.{self._hint(message)} See {self.prog} --help.")

    def _hint(self, message: str) -> str:
        """What was probably meant."""
        head, _, rest = message.partition(": ")
        if head != "unrecognized arguments":
            return ""
        for word in rest.split():
            if word.startswith("--"):
                name = word.partition("=")[0].replace("_", "-")
                close = difflib.get_close_matches(name, self._option_string_actions, 1)
                return f" Did you mean {close[0]}?" if close else ""
        if all(re.fullmatch(r"-?[0-9.]+,?", word) for word in rest.split()):
            return " Several numbers have commas between and no spaces: --mean 0.5,0.5,0.5."
        return " There is one IN.onnx and one OUT.onnx; everything else belongs to an option, such as --calib DATA."


REFERENCE = """# Command line

<!-- Made by `python -c "from lindep_onnx.cli import reference; print(reference(), end='')"`; do not edit. -->

```text
lindep-onnx IN.onnx [OUT.onnx] [options]
```

All but those that are about files, data and what is printed are fields of `lindep_onnx.Config` as well, and keywords of
`lindep_onnx.compress`, with `_` for `-`. In brackets: what holds where the option is not given. Exit codes: 0 done,
1 failure, 2 wrong usage, 3 budget or verification not met.
"""
#: What only the command line takes.
RUN_OPTIONS = {
    "calib": Option(
        ".npz with input names as keys, .npy, a directory of shards, images or ONNX test_data_set_* folders, or "
        "FILE.py:FUNC that yields dicts of arrays (FILE.py alone: its load_data)",
        "DATA",
        title=DataOptions.title,
    ),
    "stress": Option(
        "a second data set that the result has to hold on, not fitted to", "DATA", title=DataOptions.title
    ),
    "plan": Option("carry out a plan that --save-plan wrote, edited or not", "FILE.json", title=RefitOptions.title),
    "cluster": Option(
        "calibrate on N processes or on a Dask scheduler's workers", "N|ADDRESS", title=RuntimeOptions.title
    ),
    "dry_run": Option("report only, write no model"),
    "report": Option("write the report", "FILE.json|FILE.html"),
    "save_plan": Option("write what goes, to be edited and given to --plan", "FILE.json"),
    "save_as_external_data": Option("weights go into OUT.onnx.data"),
    "verbose": Option("show every group and refusal"),
    "quiet": Option("print nothing but errors"),
    "debug": Option("full traceback on errors, log of all stages"),
}


def _by_title() -> dict[str, dict[str, Option]]:
    """All options, in the parts of the usage text."""
    found: dict[str, dict[str, Option]] = {group.title: {} for group in GROUPS}
    for name, option in RUN_OPTIONS.items():
        found[option.title or OutputOptions.title][name] = option
    for group in GROUPS:
        for name, option in declared(group).items():
            found[option.title or group.title][name] = option
    return found


def parser() -> argparse.ArgumentParser:
    """What reads the command line."""
    made = _Parser(
        prog="lindep-onnx",
        description="Make a trained ONNX model smaller and faster: find channels that are linear combinations of "
        "others, move their weight onto the survivors, and delete them.",
        epilog="Without a budget only what changes nothing is removed (lossless mode). "
        "Exit codes: 0 done, 1 failure, 2 wrong usage, 3 budget or verification not met.",
        allow_abbrev=False,
    )
    made.add_argument("model", metavar="IN.onnx", help="the model to compress")
    made.add_argument("output", metavar="OUT.onnx", nargs="?", help="where to write the result")
    made.add_argument("--version", action="version", version=f"lindep-onnx {__version__}")
    types = get_type_hints(Config)
    for title, options in _by_title().items():
        part = made.add_argument_group(title)
        for name, option in options.items():
            _add(part, name, option, types.get(name, bool if option.metavar is None else str))
    return made


def _add(part: argparse._ArgumentGroup, name: str, option: Option, kind: Any) -> None:
    """Give the parser one option. What is not given is None, for the defaults are those of `Config`."""
    flags = [f"-{name[0]}", flag(name)] if name in ("verbose", "quiet") else [flag(name)]
    told = _told(name, option)
    kinds = get_args(kind) or (kind,)
    read = option.read or (int if int in kinds else _number if float in kinds else str)
    if kind is bool:
        part.add_argument(*flags, action="store_true", default=None, help=told)
    elif option.metavar is None:  # one of the words of `Literal[...]`, or of `Literal[...] | None`
        part.add_argument(*flags, choices=get_args(kinds[0]) or kinds, help=told)
    elif option.nargs == "append":
        part.add_argument(*flags, action="append", type=read, metavar=option.metavar, help=told)
    else:
        part.add_argument(*flags, nargs=option.nargs, type=read, metavar=option.metavar, help=told)


def _told(name: str, option: Option) -> str:
    """What an option does, and what it is where it is not given, if its help does not say so."""
    default = getattr(Config, name, None)
    known = default is not None and default is not False
    return f"{option.help} ({', '.join(map(str, several(default)))})" if known and default != () else option.help


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        hint = f", such as {float(text[:-1]) / 100:g}" if re.fullmatch(r"[0-9]+(\.[0-9]+)?%", text) else ""
        raise argparse.ArgumentTypeError(f"must be a number{hint}, not {text!r}") from None


def reference() -> str:
    """`docs/cli.md`: every option with its default and its bounds."""
    text = REFERENCE
    for title, options in _by_title().items():
        text += f"\n## {title[0].upper()}{title[1:]}\n\n"
        for name, option in options.items():
            words = "; ".join([_told(name, option), *(bound.words for bound in option.bounds)])
            text += f"- `{flag(name)}{' ' + option.metavar if option.metavar else ''}`: {words}.\n"
    return text


def with_negatives(arguments: Sequence[str]) -> list[str]:
    """The arguments with values that begin with a minus (`-5:5`, `-1,0,1`) joined to their option.

    argparse takes such a value for an option of its own.
    """
    found: list[str] = []
    for argument in arguments:
        if re.match(r"-(\.?[0-9]|inf)", argument) and found and re.fullmatch(r"--[a-z][a-z-]*", found[-1]):
            found[-1] += "=" + argument
        else:
            found.append(argument)
    return found


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
        options = parser().parse_intermixed_args(with_negatives(given))  # OUT may come behind options
        logging.basicConfig(level=logging.DEBUG if options.debug else logging.ERROR, stream=sys.stderr)
        return _run(options, errors)
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
    default, changed = Config(), {}
    for name in declared(Config):
        value = getattr(options, name)
        if isinstance(value, list):
            value = dict(value) if isinstance(getattr(default, name), Mapping) else tuple(value)
            if name == "latency_table" and len(value) == 1:  # as it is in reports and plans
                value = value[0]
        if name in ("eval", "augment") and value not in (None, "mix"):
            value = load_function(value, flag(name))
        if value is not None:
            changed[name] = value
    if options.plan is None:
        return Config(**changed), None
    _check_name(options.plan)
    saved = Plan.load(options.plan)
    return options_of(saved, changed), pipeline.Repeated(saved, changed)


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

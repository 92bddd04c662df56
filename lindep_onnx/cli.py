"""The command line: arguments to options, errors to exit codes. No logic."""

from __future__ import annotations

import argparse
import ctypes
import difflib
import logging
import math
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lindep_onnx import pipeline
from lindep_onnx._version import __version__
from lindep_onnx.data.sources import RANDOM, load_function
from lindep_onnx.errors import LindepError, UsageError
from lindep_onnx.integrations.dask import connected
from lindep_onnx.options import Config
from lindep_onnx.planning.plan_file import Plan, options_of
from lindep_onnx.proofs.prove import EVERY_INPUT
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


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        hint = f", such as {float(text[:-1]) / 100:g}" if re.fullmatch(r"[0-9]+(\.[0-9]+)?%", text) else ""
        raise argparse.ArgumentTypeError(f"must be a number{hint}, not {text!r}") from None


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="lindep-onnx",
        description="Make a trained ONNX model smaller and faster: find channels that are linear combinations of "
        "others, move their weight onto the survivors, and delete them.",
        epilog="Without a budget only what changes nothing is removed (lossless mode). "
        "Exit codes: 0 done, 1 failure, 2 wrong usage, 3 budget or verification not met.",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="IN.onnx", help="the model to compress")
    parser.add_argument("output", metavar="OUT.onnx", nargs="?", help="where to write the result")
    parser.add_argument("--version", action="version", version=f"lindep-onnx {__version__}")

    data = parser.add_argument_group("calibration data")
    data.add_argument(
        "--calib",
        metavar="DATA",
        help=".npz with input names as keys, .npy, a directory of shards, images or ONNX test_data_set_* folders, or "
        "FILE.py:FUNC that yields dicts of arrays (FILE.py alone: its load_data)",
    )
    data.add_argument(
        "--random-calib", type=int, metavar="N", help="N random samples in place of data: a last resort, proves nothing"
    )
    data.add_argument(
        "--stress", metavar="DATA", help="a second data set that the result has to hold on, not fitted to"
    )
    data.add_argument(
        "--input-range",
        action="append",
        metavar="[NAME=]LO:HI",
        help="lowest and highest value of an input, or of all: what holds for every input in there is proven",
    )
    data.add_argument("--image-size", metavar="H[xW]", help="images: crop to this (the size of the input)")
    data.add_argument("--resize", type=int, metavar="N", help="images: shorter side before the crop (just covers it)")
    data.add_argument("--scale", type=_number, metavar="S", help="images: divide pixels of 0 to 255 by S first (255)")
    data.add_argument("--mean", metavar="M[,M,M]", help="images: then subtract this, in the order of --color (0)")
    data.add_argument("--std", metavar="D[,D,D]", help="images: then divide by this (1)")
    data.add_argument("--layout", choices=("nchw", "nhwc"), help="images: where the channels are (as in the input)")
    data.add_argument("--color", choices=("rgb", "bgr", "gray"), help="images: which channels (rgb, or gray for one)")
    data.add_argument("--max-samples", type=int, metavar="N", help="use at most N samples")
    data.add_argument("--batch-size", type=int, metavar="N", help="samples per run, where the batch is dynamic")
    data.add_argument("--holdout", type=_number, metavar="F", help="share of samples kept out of fitting (0.3)")
    data.add_argument("--seed", type=int, metavar="N", help="of the split and of sampled positions (0)")

    budget = parser.add_argument_group("budgets (none: lossless; several: all must hold)")
    budget.add_argument("--max-error", type=_number, metavar="E", help="worst relative error of an output slice")
    budget.add_argument("--min-agreement", type=_number, metavar="A", help="share of samples with the same arg-max")
    budget.add_argument("--agreement-output", metavar="NAME[:AXIS]", help="the output that the arg-max is taken of")
    budget.add_argument("--params", type=_number, metavar="F", help="keep at most this share of the parameters")
    budget.add_argument("--macs", type=_number, metavar="F", help="keep at most this share of the MACs")
    budget.add_argument("--size", type=_number, metavar="F", help="keep at most this share of the file size")
    budget.add_argument("--channels", type=_number, metavar="F", help="keep at most this share of the output channels")
    budget.add_argument("--latency", type=_number, metavar="F", help="keep at most this share of the measured latency")
    budget.add_argument(
        "--latency-table",
        metavar="FILE.json",
        help="latencies of layers: read if it is there, else measured and written",
    )
    budget.add_argument("--eval", metavar="FILE.py:FUNC", help="FUNC(session) -> float, higher is better")
    budget.add_argument("--max-drop", type=_number, metavar="D", help="how far the --eval metric may fall")
    budget.add_argument("--proven-only", action="store_true", default=None, help="only what the weights prove")

    how = parser.add_argument_group("how")
    how.add_argument("--refit", choices=("auto", "fold", "kernel", "sequential"), help="refit of the survivors")
    how.add_argument("--rounds", type=int, metavar="N", help="contract in N rounds (1)")
    how.add_argument("--recover", metavar="N|Nmin", help="train without labels: N steps or minutes after each round")
    how.add_argument(
        "--augment", metavar="mix|FILE.py:FUNC", help="vary what --recover trains on: FUNC(feeds, rng) -> feeds"
    )
    how.add_argument("--checkpoint", metavar="FILE", help="keep the state of --recover here, and take it up from here")
    how.add_argument("--plan", metavar="FILE.json", help="carry out a plan that --save-plan wrote, edited or not")
    how.add_argument("--load-moments", metavar="FILE", help="read what --save-moments kept; --calib still verifies")
    how.add_argument("--min-channels", type=int, metavar="N", help="no channel axis is cut below N")
    how.add_argument("--round-to", metavar="auto|N", help="round kept counts up to a multiple")
    how.add_argument("--include", action="append", metavar="GLOB", help="touch only matching nodes")
    how.add_argument("--exclude", action="append", metavar="GLOB", help="leave matching nodes alone")
    how.add_argument("--providers", nargs="+", metavar="NAME", help="ONNX Runtime execution providers")
    how.add_argument(
        "--benchmark", type=_number, metavar="S", help="time both models against each other for S seconds (1)"
    )
    how.add_argument("--threads", type=int, metavar="N", help="threads of ONNX Runtime")
    how.add_argument("--cluster", metavar="N|ADDRESS", help="calibrate on N processes or on a Dask scheduler's workers")

    out = parser.add_argument_group("output")
    out.add_argument("--dry-run", action="store_true", help="report only, write no model")
    out.add_argument("--report", metavar="FILE.json|FILE.html", help="write the report")
    out.add_argument("--save-plan", metavar="FILE.json", help="write what goes, to be edited and given to --plan")
    out.add_argument("--save-moments", metavar="FILE", help="keep what calibration found, for other budgets")
    out.add_argument("--save-as-external-data", action="store_true", help="weights go into OUT.onnx.data")
    out.add_argument("--force", action="store_true", help="write OUT even if verification fails (exit code stays 3)")
    out.add_argument("-v", "--verbose", action="store_true", help="show every group and refusal")
    out.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    out.add_argument("--debug", action="store_true", help="full traceback on errors, log of all stages")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what follows the program name; None takes `sys.argv`.

    Returns:
        The exit code.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    _give_memory_back()
    errors = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
    try:
        options = _parser().parse_intermixed_args(given)  # OUT may come behind options
        logging.basicConfig(level=logging.DEBUG if options.debug else logging.ERROR, stream=sys.stderr)
        return _run(options, errors)
    except (Exception, KeyboardInterrupt) as error:
        if "--debug" in given:
            traceback.print_exception(error)
        else:
            errors.print("lindep-onnx: " + _shortened(_message(error)), markup=False)
        return error.exit_code if isinstance(error, LindepError) else FAILURE


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
    changed = {
        name: getattr(options, name)
        for name in Config.__dataclass_fields__
        if getattr(options, name, None) is not None and name != "eval"
    }
    for name in ("include", "exclude", "providers"):
        if name in changed:
            changed[name] = tuple(changed[name])
    if options.input_range is not None:
        changed["input_range"] = _ranges(options.input_range)
    if options.round_to is not None:
        changed["round_to"] = _round_to(options.round_to)
    if options.image_size is not None:
        changed["image_size"] = _image_size(options.image_size)
    for name in ("mean", "std"):
        if name in changed:
            changed[name] = _numbers(changed[name], "--" + name)
    if options.eval is not None:
        changed["eval"] = load_function(options.eval, "--eval")
    if options.augment not in (None, "mix"):
        changed["augment"] = load_function(options.augment, "--augment")
    repeated = None
    if options.plan is None:
        config = Config(**changed)
    else:
        _check_name(options.plan)
        saved = Plan.load(options.plan)
        repeated, config = pipeline.Repeated(saved, changed), options_of(saved, changed)
    written = (options.report, options.save_plan, options.save_moments, options.checkpoint)
    read = (options.model, options.calib, options.stress, options.load_moments, options.plan)
    for path in (*read, options.output, *written):
        if path is not None:
            _check_name(path)
    if options.output is None and not options.dry_run:
        raise UsageError("OUT.onnx is missing: name the file to write, or use --dry-run.")
    report_path = Path(options.report) if options.report else None
    if report_path is not None:
        check_path(report_path)
    checkpoint = Path(options.checkpoint) if options.checkpoint else None
    output = Path(options.output) if options.output and not options.dry_run else None
    save_moments, load_moments, save_plan = (
        Path(path) if path else None for path in (options.save_moments, options.load_moments, options.save_plan)
    )
    _check_written([output, report_path, save_moments, save_plan, checkpoint], read)
    if output is not None and output.suffix.lower() in NO_MODELS:
        raise UsageError(
            f"{output}: is no name for a model; data goes behind --calib, and OUT.onnx is what is written."
        )
    if config.random_calib is not None and not options.quiet:
        errors.print(RANDOM, style="bold red", markup=False)
    with ExitStack() as stack:
        client = stack.enter_context(connected(options.cluster)) if options.cluster else None
        progress = stack.enter_context(_progress(errors, options.quiet))
        result = pipeline.run(
            options.model,
            options.calib,
            config,
            files=pipeline.Files(output, options.save_as_external_data, save_moments, load_moments, save_plan),
            stress=options.stress,
            client=client,
            progress=progress,
            repeated=repeated,
            preview=options.dry_run,
        )
    if not options.quiet:
        render(result.report, Console(highlight=False), verbose=options.verbose, preview=options.dry_run)
    if report_path is not None:
        write_report(result.report, report_path)
    if result.failure is not None:
        raise result.failure
    return OK


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


def _check_written(written: Sequence[Path | None], read: Sequence[str | None]) -> None:
    """Nothing that is read may be overwritten, and nothing may be written twice."""
    taken = {Path(path).resolve() for path in read if path}
    for path in filter(None, written):
        if path.resolve() in taken:
            raise UsageError(
                f"{path}: is the input model, the calibration data or the other output; name another file."
            )
        taken.add(path.resolve())


def _ranges(texts: Sequence[str]) -> dict[str, tuple[float, float]]:
    """From `NAME=LO:HI`, or `LO:HI` for every input. A name may itself hold a colon or an equals sign."""
    found = {}
    for text in texts:
        name, _, ends = text.rpartition("=")
        low, _, high = ends.partition(":")
        try:
            found[name or EVERY_INPUT] = float(low), float(high)
        except ValueError:
            raise UsageError(f"--input-range takes NAME=LO:HI or LO:HI, such as image=0:1, not {text!r}.") from None
    return found


def _image_size(text: str) -> tuple[int, int]:
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and len(side) < 7 for side in sides):
        raise UsageError(f"--image-size is one number, or HxW such as 224x192, not {text!r}.")
    height, width = sides if len(sides) == 2 else sides * 2
    return int(height), int(width)


def _numbers(text: str, flag: str) -> tuple[float, ...]:
    try:
        found = tuple(map(float, text.split(",")))
    except ValueError:
        raise UsageError(
            f"{flag} takes numbers with commas between, such as 0.485,0.456,0.406, not {text!r}."
        ) from None
    if not all(map(math.isfinite, found)):
        raise UsageError(f"{flag} takes finite numbers, not {text!r}.")
    return found


def _round_to(text: str) -> int | str:
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"--round-to must be a number or auto, not {text!r}.") from None


class _progress:  # noqa: N801 - used like a function
    """Stages on stderr as they run, with the time left; nothing when it is not a terminal or not wanted."""

    def __init__(self, console: Console, quiet: bool) -> None:
        self._bar = Progress(
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
        self._tasks: dict[str, Any] = {}
        self._done: dict[str, int] = {}

    def __enter__(self) -> Callable[[str, int, int], None]:
        self._bar.start()
        return self._update

    def __exit__(self, *_: object) -> None:
        if not self._bar.disable:  # versions of rich before 14.3 end even a hidden bar with an empty line
            self._bar.stop()

    def _update(self, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._bar.add_task(stage, total=total)
        elif done < self._done[stage]:  # it runs again, for the next plan or round
            self._bar.reset(self._tasks[stage], total=total)
        self._done[stage] = done
        self._bar.update(self._tasks[stage], completed=done, total=total)

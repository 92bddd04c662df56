"""What the command line takes: parsers made from the declarations of the options."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, get_args, get_type_hints

from lindep_onnx._version import __version__
from lindep_onnx.errors import UsageError
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


class Parser(argparse.ArgumentParser):
    """Reports a mistake in one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        """Raise it as one of our own errors."""
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
            return " Several _numbers have commas between and no spaces: --mean 0.5,0.5,0.5."
        return " There is one IN.onnx and one OUT.onnx; everything else belongs to an option, such as --calib DATA."


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


def by_title() -> dict[str, dict[str, Option]]:
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
    made = Parser(
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
    for title, options in by_title().items():
        add_options(made.add_argument_group(title), options)
    return made


def add_options(part: argparse._ArgumentGroup, options: Mapping[str, Option]) -> None:
    """Give the parser some options, by name."""
    types = get_type_hints(Config)
    for name, option in options.items():
        _add(part, name, option, types.get(name, bool if option.metavar is None else str))


def _add(part: argparse._ArgumentGroup, name: str, option: Option, kind: Any) -> None:
    """Give the parser one option. What is not given is None, for the defaults are those of `Config`."""
    flags = [f"-{name[0]}", flag(name)] if name in ("verbose", "quiet") else [flag(name)]
    words = told(name, option)
    kinds = get_args(kind) or (kind,)
    read = option.read or (int if int in kinds else _number if float in kinds else str)
    if kind is bool:
        part.add_argument(*flags, action="store_true", default=None, help=words)
    elif option.metavar is None:  # one of the words of `Literal[...]`, or of `Literal[...] | None`
        part.add_argument(*flags, choices=get_args(kinds[0]) or kinds, help=words)
    elif option.nargs == "append":
        part.add_argument(*flags, action="append", type=read, metavar=option.metavar, help=words)
    else:
        part.add_argument(*flags, nargs=option.nargs, type=read, metavar=option.metavar, help=words)


def told(name: str, option: Option) -> str:
    """What an option does, and what it is where it is not given, if its help does not say so."""
    default = getattr(Config, name, None)
    known = default is not None and default is not False
    return f"{option.help} ({', '.join(map(str, several(default)))})" if known and default != () else option.help


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        hint = f", such as {float(text[:-1]) / 100:g}" if re.fullmatch(r"[0-9]+(\.[0-9]+)?%", text) else ""
        raise argparse.ArgumentTypeError(f"must be a _number{hint}, not {text!r}") from None


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

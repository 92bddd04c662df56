"""The commands beside `compress`: look at a model, compare two, try several budgets. Options in, tables or JSON out."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from lindep_onnx.arguments import RUN_OPTIONS, Parser, add_options, by_title, told
from lindep_onnx.comparison import compare_models
from lindep_onnx.errors import BudgetError, LindepError, UsageError
from lindep_onnx.inspection import Inspection, inspect_model
from lindep_onnx.log import Log
from lindep_onnx.options import (
    BudgetOptions,
    Config,
    DataOptions,
    MomentsOptions,
    Option,
    OutputOptions,
    RefitOptions,
    RuntimeOptions,
    TraceOptions,
    declared,
    flag,
)
from lindep_onnx.report import wording
from lindep_onnx.report.json_values import to_json_values
from lindep_onnx.report.terminal import render
from lindep_onnx.report.writing import check_path, write_report
from lindep_onnx.sweeping import SWEPT, Sweep, Swept, sweep_models

REFERENCE = """# Command line

<!-- Made by `python -c "from lindep_onnx.commands import reference; print(reference(), end='')"`; do not edit. -->

```text
lindep-onnx [compress] IN.onnx [OUT.onnx] [options]
```

All but those that are about files, data and what is printed are fields of `lindep_onnx.Config` as well, and keywords of
`lindep_onnx.compress`, with `_` for `-`. In brackets: what holds where the option is not given. Exit codes: 0 done,
1 failure, 2 wrong usage, 3 budget or verification not met.
"""
#: The command that needs no name.
COMPRESS = "compress"
#: Groups and refusals that are shown without `--verbose`.
MOST = 8
JSON = Option("write the figures here, or print them alone (-)", "FILE|-")


@dataclass(frozen=True)
class Answer:
    """What a command found.

    Attributes:
        values: what `--json` writes.
        show: prints it for a person; told whether everything is wanted.
        failure: why the exit code is not 0; None if all is well.
    """

    values: Any
    show: Callable[[Console, bool], None]
    failure: LindepError | None = None


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        help: what it does.
        models: names and helps of what stands before the options; those in brackets may be missing.
        options: what it takes, by name.
        run: does it.
        own: options that mean something else here than to `compress`.
    """

    help: str
    models: Mapping[str, str]
    options: Mapping[str, Option]
    run: Callable[[argparse.Namespace, Config, Log], Answer]
    own: tuple[str, ...] = ()


def command_parser(name: str) -> argparse.ArgumentParser:
    """What reads the command line of a command.

    Args:
        name: a key of `COMMANDS`.
    """
    command = COMMANDS[name]
    made = Parser(prog=f"lindep-onnx {name}", description=command.help, allow_abbrev=False)
    for place, words in command.models.items():
        optional = place.startswith("[")
        made.add_argument(
            place.strip("[]").lower().replace(".onnx", ""), metavar=place.strip("[]"), help=words,
            nargs="?" if optional else None,
        )  # fmt: skip
    add_options(made.add_argument_group("options"), command.options)
    return made


# ---- inspect ----------------------------------------------------------------------------------------------------


def _inspect(options: argparse.Namespace, config: Config, log: Log) -> Answer:
    found = inspect_model(options.model, config, log)
    return Answer(to_json_values(found), lambda console, every: _show_inspection(found, console, every))


def _show_inspection(found: Inspection, console: Console, every: bool) -> None:
    size = found.size
    console.print(
        Text(
            f"{wording.safe(found.model)}: {size.parameters:,} parameters, {size.macs:,} MACs, "
            f"{wording.size(size.bytes)}, opset {found.opset}",
            style="bold",
        )
    )
    channels, proven = sum(group.channels for group in found.groups), sum(group.proven for group in found.groups)
    share = wording.percent(found.removable / max(1, size.parameters))
    console.print(
        Text(
            f"{channels:,} channels can be removed if the data allows it; {share} of the parameters depend on them. "
            f"The weights alone prove {proven:,} redundant."
        )
    )
    table = _table(Column("channels of", overflow="fold"), "channels", "proven", "parameters")
    for group in found.groups if every else found.groups[:MOST]:
        table.add_row(wording.safe(group.name), f"{group.channels:,}", f"{group.proven:,}", f"{group.parameters:,}")
    if found.groups:
        console.print(table)
    _more(console, len(found.groups), every, "group")
    for refusal in found.refusals if every else found.refusals[:MOST]:
        what, advice = wording.refusal(refusal, None if every else 3)
        console.print(Text.assemble("- ", what, "\n  ", (advice, "dim")))
    _more(console, len(found.refusals), every, "reason")
    for note in found.notes:
        console.print(Text(f"- {wording.safe(note)}"))


# ---- compare ----------------------------------------------------------------------------------------------------


def _compare(options: argparse.Namespace, config: Config, log: Log) -> Answer:
    if options.report:
        check_path(Path(options.report))
    report, failure = compare_models(options.original, options.other, options.calib, config, log)
    if options.report:
        write_report(report, Path(options.report))
    return Answer(to_json_values(report), lambda console, every: render(report, console, verbose=every), failure)


# ---- sweep ------------------------------------------------------------------------------------------------------


def _sweep(options: argparse.Namespace, config: Config, log: Log) -> Answer:
    given = {name: getattr(options, name) for name in SWEPT if getattr(options, name) is not None}
    if len(given) != 1:
        raise UsageError(f"A sweep is over one of {', '.join(map(flag, SWEPT))}, such as --params 0.9,0.8,0.7.")
    ((over, shares),) = given.items()
    output = Path(options.out) if options.out else None
    found = sweep_models(options.model, options.calib, Swept(over, shares, output), config, log)
    failure = None if found.best is not None else BudgetError("No result may be used; the table says why.")
    values = to_json_values(replace(found, result=None))
    return Answer(values, lambda console, _: _show_sweep(found, output, console), failure)


def _show_sweep(found: Sweep, output: Path | None, console: Console) -> None:
    titles = (flag(found.over), "params", "MACs", "size", "latency", "error", "same class")
    table = _table(*(Column(title, justify="right", no_wrap=True) for title in titles), Column("", no_wrap=True))
    for number, point in enumerate(found.points):
        compared, latency = point.comparison, point.latency
        style = "bold" if number == found.best else "dim" if point.status == "failed" else ""
        error = "" if compared is None else wording.error(compared.relative_error)
        agreement = ""
        if compared is not None and compared.agreement is not None:
            agreement = wording.agreement(compared.agreement, compared.decisions).replace(" of ", "/")
        sizes = [f"{share:.1%}" for share in (point.parameters, point.macs, point.bytes)]
        taken = "" if latency is None else f"{latency.ratio:.2f}" if latency.differs else "1.00"
        table.add_row(f"{point.asked:g}", *sizes, taken, error, agreement, point.status, style=style)
    console.print(Text(f"{wording.safe(found.model)}, by {flag(found.over)}", style="bold"))
    console.print(table)
    for point in found.points:
        if point.status == "failed":
            console.print(Text(f"- {flag(found.over)} {point.asked:g}: {wording.safe(point.reason)}", style="dim"))
    if found.best is not None:
        where = f" It was written to {output}." if output is not None else " Name OUT.onnx to have it written."
        console.print(Text(f"Smallest that may be used: {flag(found.over)} {found.points[found.best].asked:g}.{where}"))


def _shares(text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(part[:-1]) / 100 if part.endswith("%") else float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(0 < share <= 1 for share in found):
        raise argparse.ArgumentTypeError(f"takes shares above 0 and at most 1, such as 0.9,0.8,0.7, not {text!r}")
    return found


# ---- what they take ---------------------------------------------------------------------------------------------


def _table(*columns: Column | str) -> Table:
    given = [Column(one, justify="right") if isinstance(one, str) else one for one in columns]
    return Table(*given, box=box.SIMPLE_HEAD, pad_edge=False)


def _more(console: Console, count: int, every: bool, noun: str) -> None:
    if not every and count > MOST:
        console.print(Text(f"... {wording.many(count - MOST, f'more {noun}')} (-v shows all)", style="dim"))


def _of(*groups: type[Any], without: tuple[str, ...] = ()) -> dict[str, Option]:
    """The options of some groups."""
    return {name: option for group in groups for name, option in declared(group).items() if name not in without}


_TALK = {name: RUN_OPTIONS[name] for name in ("verbose", "quiet", "debug")}
_QUALITY = ("max_error", "min_agreement", "agreement_output", "eval", "max_drop")
_LIMITS = {name: declared(BudgetOptions)[name] for name in _QUALITY}
_STRICT = {"strict": declared(OutputOptions)["strict"]}
_CALIB = {"calib": RUN_OPTIONS["calib"]}
_SWEPT = {
    name: replace(declared(BudgetOptions)[name], metavar="F,F,...", read=_shares, help=f"shares to keep: {name}")
    for name in SWEPT
}
COMMANDS: Mapping[str, Command] = {
    "inspect": Command(
        "Say what may be removed from a model, what its weights prove redundant, and what blocks the rest. No data.",
        {"MODEL.onnx": "the model"},
        {**_of(TraceOptions), "json": JSON, **_TALK},
        _inspect,
    ),
    "compare": Command(
        "Run two models on the same data: error, agreement, size and latency of the second beside the first. Exit code "
        "3 where a limit on quality does not hold.",
        {"ORIGINAL.onnx": "the model to compare with", "OTHER.onnx": "the model that is to stand in for it"},
        {
            **_CALIB,
            **_of(DataOptions, without=("holdout", "random_calib")),
            **_LIMITS,
            **_of(RuntimeOptions),
            "batch_axis": declared(TraceOptions)["batch_axis"],
            **_STRICT,
            "report": RUN_OPTIONS["report"],
            "json": JSON,
            **_TALK,
        },
        _compare,
    ),
    "sweep": Command(
        "Compress a model to several budgets on one calibration, and keep the smallest result that may be used.",
        {"MODEL.onnx": "the model", "[OUT.onnx]": "where to write that result"},
        {
            **_CALIB,
            **_SWEPT,
            **_of(DataOptions, MomentsOptions, without=("random_calib",)),
            **_LIMITS,
            "latency_table": declared(BudgetOptions)["latency_table"],
            **_of(TraceOptions, RefitOptions, RuntimeOptions),
            **_STRICT,
            "json": JSON,
            **_TALK,
        },
        _sweep,
        SWEPT,
    ),
}


def write_answer(answer: Answer, options: argparse.Namespace) -> None:
    """Print or write what a command found, as it was asked for."""
    text = json.dumps(answer.values, indent=2)
    if options.json == "-":
        Console(soft_wrap=True, highlight=False).print(text, markup=False, emoji=False)
    elif options.json:
        Path(options.json).write_text(text + "\n", encoding="utf-8")
    if options.json != "-" and not options.quiet:
        answer.show(Console(highlight=False), bool(options.verbose))


def reference() -> str:
    """`docs/cli.md`: every command, every option with its default and its bounds."""
    text = REFERENCE
    for title, options in by_title().items():
        text += f"\n## {title[0].upper()}{title[1:]}\n\n"
        for name, option in options.items():
            words = "; ".join([told(name, option), *(bound.words for bound in option.bounds)])
            text += f"- `{flag(name)}{' ' + option.metavar if option.metavar else ''}`: {words}.\n"
    for name, command in COMMANDS.items():
        line = f"lindep-onnx {name} {' '.join(command.models)} [options]"
        text += f"\n## {name}\n\n```text\n{line}\n```\n\n{command.help}\n\n"
        known = RUN_OPTIONS.keys() | declared(Config).keys() - set(command.own)
        new = [own for own in command.options if own not in known]
        for own in new:
            option = command.options[own]
            text += f"- `{flag(own)} {option.metavar}`: {option.help}.\n"
        shared = ", ".join(f"`{flag(own)}`" for own in command.options if own not in new)
        text += f"\nAs above: {shared}.\n"
    return text

"""All options, each declared once: its default, its bounds, its help, how the command line writes it.

`Config` is made of groups; it is every one of them, so that a stage that names a group as what it takes can be handed a
`Config`, and sees no other option. The command line, its reference in `docs/cli.md` and the check of saved plans are
made from the declarations. (Which is why annotations are values here, and not put off.)
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, get_args, get_type_hints

from lindep_onnx.errors import UsageError

#: An hour.
MAX_SECONDS = 3600
#: More random samples teach nothing.
MAX_RANDOM = 100_000
#: In place of the name of an input: every numeric input that is not named.
EVERY_INPUT = "*"

Refit = Literal["auto", "fold", "kernel", "sequential"]
Layout = Literal["nchw", "nhwc"]
Color = Literal["rgb", "bgr", "gray"]

#: RMS relative error that one site may gain in lossless mode, on samples that were not fitted.
LOSSLESS_SITE_ERROR = 1e-5
#: Output error at which a lossless result is verified.
LOSSLESS_VERIFIED_ERROR = 1e-3


@dataclass(frozen=True)
class Bound:
    """What an option may be.

    Attributes:
        words: this, as it follows the name of the option in a message.
        holds: whether a value is allowed; one that is not given always is.
    """

    words: str
    holds: Callable[[Any], bool]


@dataclass(frozen=True)
class Option:
    """What is said about an option, beside its type and its default.

    Attributes:
        help: what it does.
        metavar: its value on the command line; None for a switch, and for one of few words.
        bounds: what it may be.
        read: makes a value of what the command line gives; None for what its type says.
        nargs: "+" where one flag takes several values, "append" where each value has its flag.
        recorded: whether the result, its report and its plan tell that it was given.
        repeated: whether a plan is carried out with it again.
        title: the part of the usage text that it belongs to; None for that of its group.
    """

    help: str
    metavar: str | None = None
    bounds: tuple[Bound, ...] = ()
    read: Callable[[str], Any] | None = None
    nargs: Literal["+", "append"] | None = None
    recorded: bool = True
    repeated: bool = True
    title: str | None = None


def flag(name: str) -> str:
    """An option's name on the command line."""
    return "--" + name.replace("_", "-")


# ---- bounds, and how values are written on the command line -------------------------------------------------------


def several(value: Any) -> tuple[Any, ...]:
    """A value that may be one for all, or one for each."""
    return value if isinstance(value, tuple) else (value,)


_FROM_0 = Bound("must be at least 0", lambda value: value >= 0)
_FROM_1 = Bound("must be at least 1", lambda value: min(several(value)) >= 1)
_KEPT = Bound("is a share to keep, above 0 and at most 1 (0.5 for half)", lambda value: 0 < value <= 1)
_DIVIDES = Bound("divides, and must be above 0", lambda value: all(part > 0 for part in several(value)))

_SECONDS = Bound(f"is a number of seconds, above 0 and at most {MAX_SECONDS:,}", lambda value: 0 < value <= MAX_SECONDS)


def _range(text: str) -> tuple[str, tuple[float, float]]:
    """From `NAME=LO:HI`, or `LO:HI` for every input. A name may itself hold a colon or an equals sign."""
    name, _, ends = text.rpartition("=")
    low, _, high = ends.partition(":")
    try:
        return name or EVERY_INPUT, (float(low), float(high))
    except ValueError:
        raise UsageError(f"--input-range takes NAME=LO:HI or LO:HI, such as image=0:1, not {text!r}.") from None


def _size(text: str) -> tuple[int, int]:
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and len(side) < 7 for side in sides):
        raise UsageError(f"--image-size is one number, or HxW such as 224x192, not {text!r}.")
    height, width = sides if len(sides) == 2 else sides * 2
    return int(height), int(width)


def _numbers(name: str, text: str) -> tuple[float, ...]:
    try:
        found = tuple(map(float, text.split(",")))
    except ValueError:
        raise UsageError(
            f"{name} takes numbers with commas between, such as 0.485,0.456,0.406, not {text!r}."
        ) from None
    if not all(map(math.isfinite, found)):
        raise UsageError(f"{name} takes finite numbers, not {text!r}.")
    return found


def _multiple(text: str) -> int | str:
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise UsageError(f"--round-to must be a number or auto, not {text!r}.") from None


# ---- the groups ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Options:
    """A group of options, each annotated with what is said about it."""

    title: ClassVar[str] = ""

    def __post_init__(self) -> None:
        """Refuse values without a meaning.

        Raises:
            UsageError: naming the option, what is allowed and what was given.
        """
        for name, option in declared(type(self)).items():
            value = getattr(self, name)
            for bound in option.bounds:
                if value is not None and not bound.holds(value):
                    given = repr(value) if isinstance(value, str) else value
                    raise UsageError(f"{flag(name)} {bound.words}, not {given}.")


def declared(group: type[Options]) -> Mapping[str, Option]:
    """What is said about the options of a group, by name."""
    hints = get_type_hints(group, include_extras=True)
    return {entry.name: hints[entry.name].__metadata__[0] for entry in dataclasses.fields(group)}


@dataclass(frozen=True, kw_only=True)
class BudgetOptions(Options):
    """How small or how good the result has to be."""

    title: ClassVar[str] = "budgets (none: lossless; several: all must hold)"

    max_error: Annotated[float | None, Option("worst relative error of an output slice", "E", (_FROM_0,))] = None
    min_agreement: Annotated[
        float | None,
        Option(
            "share of samples whose arg-max must stay",
            "A",
            (Bound("is a share from 0 to 1", lambda value: 0 <= value <= 1),),
        ),
    ] = None
    agreement_output: Annotated[
        str | None, Option("the output, and its axis, that the arg-max is taken of (finds one)", "NAME[:AXIS]")
    ] = None
    params: Annotated[float | None, Option("keep at most this share of the parameters", "F", (_KEPT,))] = None
    macs: Annotated[float | None, Option("keep at most this share of the MACs", "F", (_KEPT,))] = None
    size: Annotated[float | None, Option("keep at most this share of the file size", "F", (_KEPT,))] = None
    channels: Annotated[float | None, Option("keep at most this share of the output channels", "F", (_KEPT,))] = None
    latency: Annotated[float | None, Option("keep at most this share of the measured latency", "F")] = None
    latency_table: Annotated[
        str | None,
        Option("latencies of layers: read if the file is there, else measured and written; without, measured anew",
               "FILE.json"),
    ] = None  # fmt: skip
    eval: Annotated[
        Callable[[Any], float] | None,
        Option("a metric of your own, FUNC(onnxruntime.InferenceSession) -> float; higher is better", "FILE.py:FUNC",
               repeated=False),
    ] = None  # fmt: skip
    max_drop: Annotated[float | None, Option("how far the --eval metric may fall", "D", (_FROM_0,), repeated=False)] = (
        None
    )
    proven_only: Annotated[bool, Option("remove only what the weights prove; needs no calibration data")] = False

    @property
    def sized(self) -> bool:
        """Whether a size is asked for, so that rounds must reach it."""
        return any(share is not None for share in (self.params, self.macs, self.size, self.channels, self.latency))

    @property
    def budgeted(self) -> bool:
        """Whether any budget is named."""
        quality = (self.max_error, self.min_agreement, self.max_drop)
        return self.sized or any(budget is not None for budget in quality)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.eval is None) != (self.max_drop is None):
            raise UsageError("--eval and --max-drop belong together: give both or neither.")
        if self.proven_only and self.budgeted:
            raise UsageError("--proven-only removes what costs nothing: it takes no budget.")
        if self.latency_table is not None and self.latency is None:
            raise UsageError("--latency-table belongs to --latency: give both or neither.")


@dataclass(frozen=True)
class TrainingBudget:
    """How long to train: so many steps, or so many seconds.

    Attributes:
        steps: number of steps; None where time decides. Only steps give the same result on every run.
        seconds: time to take; None where steps decide.
    """

    steps: int | None = None
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class DistillOptions(Options):
    """How what a budget costs is won back."""

    title: ClassVar[str] = "rounds and recovery"

    rounds: Annotated[int, Option("contract in N rounds, each followed by refit and recovery", "N", (_FROM_1,))] = 1
    recover: Annotated[
        int | str | None,
        Option("train against the original after each round, without labels: N steps or minutes", "N|Nmin", read=str),
    ] = None
    augment: Annotated[
        Literal["mix"] | Callable[..., Any] | None,
        Option(
            "vary what --recover trains on: mix mixes pairs; FUNC(feeds, rng) -> feeds takes the inputs of a run by "
            "name and a numpy.random.Generator, and returns inputs like them",
            "mix|FILE.py:FUNC",
            (Bound("is mix or FILE.py:FUNC", lambda value: value == "mix" or callable(value)),),
        ),
    ] = None
    checkpoint: Annotated[
        str | None,
        Option("keep the state of --recover in this file, and go on from there after an interruption", "FILE"),
    ] = None

    @property
    def training_budget(self) -> TrainingBudget | None:
        """How long `recover` asks to train; None if it does not.

        Raises:
            UsageError: it is neither a positive number of steps nor of minutes.
        """
        if self.recover is None:
            return None
        found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(min)?", str(self.recover).strip())
        amount = float(found[1]) if found is not None else 0.0
        if found is None or amount <= 0 or (found[2] is None and "." in found[1]):
            raise UsageError(f"--recover is a number of steps (300) or minutes (5min), not {self.recover!r}.")
        return TrainingBudget(seconds=60 * amount) if found[2] else TrainingBudget(steps=int(amount))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.training_budget is None and (self.augment is not None or self.checkpoint is not None):
            raise UsageError("--augment and --checkpoint belong to --recover: say how long to train, such as 300.")


@dataclass(frozen=True, kw_only=True)
class RefitOptions(Options):
    """How the survivors are made up for what went."""

    title: ClassVar[str] = "how"

    refit: Annotated[
        Refit,
        Option(
            "refit of what reads the survivors; auto folds in lossless mode, and else refits in sequence",
            bounds=(Bound("is one of auto, fold, kernel, sequential", lambda value: value in get_args(Refit)),),
        ),
    ] = "auto"
    round_to: Annotated[
        int | Literal["auto"],
        Option(
            "round kept counts up to a multiple; auto rounds up to 8 or 16 where the result is not measured to be "
            "faster without",
            "auto|N",
            (Bound("must be at least 1", lambda value: value == "auto" or value >= 1),),
            _multiple,
        ),
    ] = 1


@dataclass(frozen=True, kw_only=True)
class TraceOptions(Options):
    """What may go at all. Saved moments depend on every one of these."""

    title: ClassVar[str] = "what may go"

    include: Annotated[
        tuple[str, ...], Option("touch only nodes whose names match, as producers or consumers", "GLOB", nargs="append")
    ] = ()
    exclude: Annotated[tuple[str, ...], Option("leave nodes whose names match alone", "GLOB", nargs="append")] = ()
    min_channels: Annotated[int, Option("no channel axis is cut below N", "N", (_FROM_1,))] = 1
    input_range: Annotated[
        Mapping[str, tuple[float, float]],
        Option(
            "lowest and highest value of an input, or of all that are not named: what the weights imply for every "
            "input in there is proven, and data outside it is refused",
            "[NAME=]LO:HI",
            read=_range,
            nargs="append",
        ),
    ] = dataclasses.field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, ends in self.input_range.items():
            if len(ends) != 2 or any(math.isnan(end) for end in ends) or not ends[0] <= ends[1]:
                raise UsageError(f"--input-range of {name!r} goes from LO up to HI, not {':'.join(map(str, ends))}.")


@dataclass(frozen=True, kw_only=True)
class RuntimeOptions(Options):
    """What models are run with."""

    title: ClassVar[str] = "execution"

    providers: Annotated[tuple[str, ...], Option("ONNX Runtime execution providers", "NAME", nargs="+")] = (
        "CPUExecutionProvider",
    )
    threads: Annotated[int, Option("intra-op threads of ONNX Runtime; 0 lets it choose", "N", (_FROM_0,))] = 0
    benchmark: Annotated[
        float | None,
        Option("time original and result against each other for S seconds (0.4; 4 with --latency)", "S", (_SECONDS,)),
    ] = None


@dataclass(frozen=True, kw_only=True)
class ImageOptions(Options):
    """What to make of images: (pixels / scale - mean) / std. None leaves it to the input of the model."""

    image_size: Annotated[
        int | tuple[int, int] | None,
        Option(
            "images: crop to this height and width, one number for both (the size of the input)",
            "H[xW]",
            (Bound("is one number, or HxW", lambda value: isinstance(value, int) or len(value) == 2), _FROM_1),
            _size,
        ),
    ] = None
    resize: Annotated[int | None, Option("images: shorter side before the crop (just covers it)", "N", (_FROM_1,))] = (
        None
    )
    scale: Annotated[float | None, Option("images: divide pixels of 0 to 255 by S first (255)", "S", (_DIVIDES,))] = (
        None
    )
    mean: Annotated[
        float | tuple[float, ...] | None,
        Option("images: then subtract this, one number or one for each channel, in the order of --color (0)",
               "M[,M,M]", read=partial(_numbers, "--mean")),
    ] = None  # fmt: skip
    std: Annotated[
        float | tuple[float, ...] | None,
        Option("images: then divide by this, likewise (1)", "D[,D,D]", (_DIVIDES,), partial(_numbers, "--std")),
    ] = None
    layout: Annotated[
        Layout | None,
        Option("images: where the channels are (as in the input)",
               bounds=(Bound("is nchw or nhwc", lambda value: value in get_args(Layout)),)),
    ] = None  # fmt: skip
    color: Annotated[
        Color | None,
        Option("images: which channels (rgb, or gray where the input has one)",
               bounds=(Bound("is rgb, bgr or gray", lambda value: value in get_args(Color)),)),
    ] = None  # fmt: skip

    @property
    def sides(self) -> tuple[int, int] | None:
        """(height, width) in pixels."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    @property
    def asked_for(self) -> bool:
        """Whether any of it was given, so that the data must be images."""
        return any(getattr(self, name) is not None for name in declared(ImageOptions))


@dataclass(frozen=True, kw_only=True)
class DataOptions(ImageOptions):
    """How calibration data is read, split and run. Samples depend on every one of these."""

    title: ClassVar[str] = "calibration data"

    random_calib: Annotated[
        int | None,
        Option(
            "N random samples in place of data, a last resort: they prove nothing, so that without a budget only what "
            "the weights prove goes, and no budget on errors or agreement can be judged by them",
            "N",
            (_FROM_1, Bound(f"must be at most {MAX_RANDOM:,}", lambda value: value <= MAX_RANDOM)),
        ),
    ] = None
    max_samples: Annotated[int | None, Option("use at most N samples", "N", (_FROM_1,))] = None
    batch_size: Annotated[
        int | None,
        Option("samples per run, where the batch is dynamic (bounds the memory of activations)", "N", (_FROM_1,)),
    ] = None
    holdout: Annotated[
        float,
        Option(
            "share of samples kept out of fitting, half to select and half to verify",
            "F",
            (Bound("is a share between 0 and 1", lambda value: 0 < value < 1),),
        ),
    ] = 0.3
    seed: Annotated[int, Option("of the split and of sampled positions", "N", (_FROM_0,))] = 0


@dataclass(frozen=True, kw_only=True)
class MomentsOptions(Options):
    """What calibration found, kept for other runs."""

    title: ClassVar[str] = DataOptions.title

    save_moments: Annotated[
        str | Path | None, Option("keep what calibration found in this file, for other budgets", "FILE", recorded=False)
    ] = None
    load_moments: Annotated[
        str | Path | None,
        Option(
            "read what --save-moments kept, in place of running the calibration; --calib still chooses and verifies",
            "FILE",
            recorded=False,
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class OutputOptions(Options):
    """What is made of the result."""

    title: ClassVar[str] = "output"

    force: Annotated[bool, Option("write OUT even if verification fails (exit code stays 3)", repeated=False)] = False


#: In the order of the usage text.
GROUPS = (DataOptions, MomentsOptions, BudgetOptions, TraceOptions, RefitOptions, DistillOptions, RuntimeOptions,
          OutputOptions)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Config(OutputOptions, MomentsOptions, DataOptions, RuntimeOptions, TraceOptions, RefitOptions, DistillOptions,
             BudgetOptions):  # fmt: skip
    """Options of one compression; `docs/cli.md` tells what each does and may be, as their declarations do.

    Naming any of the budgets (`max_error`, `min_agreement`, `max_drop`, `params`, `macs`, `size`, `channels`,
    `latency`) selects budgeted mode; several must all hold. Without one the mode is lossless.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.random_calib is not None:
            if self.proven_only:
                raise UsageError("--proven-only needs no data: drop --random-calib.")
            for name in ("max_error", "min_agreement"):
                if getattr(self, name) is not None:
                    raise UsageError(
                        f"{flag(name)} cannot be judged on random inputs, which are nothing like real ones: give "
                        "--calib DATA, or a budget on the size such as --params."
                    )
        if self.latency is not None and self.rounds > 1:
            raise UsageError("--latency is reached in one step: leave --rounds at 1.")
        if (self.rounds > 1 or self.recover is not None) and not self.budgeted:
            raise UsageError(
                "--rounds and --recover win back what a budget costs: name one, for instance --params 0.5."
            )

    def described(self) -> dict[str, Any]:
        """The options that differ from their defaults, as JSON values."""
        default = Config()
        values = {name: getattr(self, name) for name, option in declared(Config).items() if option.recorded}
        changed = {name: value for name, value in values.items() if value != getattr(default, name)}
        return {
            name: dict(value) if isinstance(value, Mapping) else getattr(value, "__name__", value)
            for name, value in changed.items()
        }

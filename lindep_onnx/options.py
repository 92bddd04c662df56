"""All options, each declared once: its default, its bounds, its help, how the command line writes it.

`Config` is made of groups; it is every one of them, so that a stage that names a group as what it takes can be handed a
`Config`, and sees no other option. The command line, its reference in `docs/cli.md` and the check of saved plans are
made from the declarations.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal, get_args

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
Target = Literal["cpu", "cpu-avx512", "cpu-avx2", "arm", "cuda", "generic"]

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


def _option(help: str, metavar: str | None = None, *bounds: Bound, default: Any = None, **more: Any) -> Any:
    metadata = {"option": Option(help, metavar, bounds, **more)}
    if isinstance(default, Mapping):  # which not every Python takes for a constant
        return dataclasses.field(default_factory=lambda: default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


# ---- bounds, and how values are written on the command line -------------------------------------------------------


def several(value: Any) -> tuple[Any, ...]:
    """A value that may be one for all, or one for each."""
    return value if isinstance(value, tuple) else (value,)


_FROM_0 = Bound("must be at least 0", lambda value: value >= 0)
_FROM_1 = Bound("must be at least 1", lambda value: min(several(value)) >= 1)
_KEPT = Bound("is a share to keep, above 0 and at most 1 (0.5 for half)", lambda value: 0 < value <= 1)
_SHARE = Bound("is a share from 0 to 1", lambda value: 0 <= value <= 1)
_PROPER_SHARE = Bound("is a share between 0 and 1", lambda value: 0 < value < 1)
_DIVIDES = Bound("divides, and must be above 0", lambda value: all(part > 0 for part in several(value)))
_SECONDS = Bound(f"is a number of seconds, above 0 and at most {MAX_SECONDS:,}", lambda value: 0 < value <= MAX_SECONDS)
_MULTIPLE = Bound("must be at least 1", lambda value: value == "auto" or value >= 1)
_SIDES = Bound("is one number, or HxW", lambda value: isinstance(value, int) or len(value) == 2)
_RANDOM = Bound(f"must be at most {MAX_RANDOM:,}", lambda value: value <= MAX_RANDOM)
_AUGMENT = Bound("is mix or FILE.py:FUNC", lambda value: value == "mix" or callable(value))
_REFIT = Bound("is one of auto, fold, kernel, sequential", lambda value: value in get_args(Refit))
_LAYOUT = Bound("is nchw or nhwc", lambda value: value in get_args(Layout))
_TARGET = Bound(f"is one of {', '.join(get_args(Target))}", lambda value: value in get_args(Target))
_COLOR = Bound("is rgb, bgr or gray", lambda value: value in get_args(Color))


def _range(text: str) -> tuple[str, tuple[float, float]]:
    """From `NAME=LO:HI`, or `LO:HI` for every input. A name may itself hold a colon or an equals sign."""
    name, _, ends = text.rpartition("=")
    low, _, high = ends.partition(":")
    try:
        return name or EVERY_INPUT, (float(low), float(high))
    except ValueError:
        raise UsageError(f"--input-range takes NAME=LO:HI or LO:HI, such as image=0:1, not {text!r}.") from None


def _axis(text: str) -> tuple[str, int]:
    name, _, axis = text.rpartition("=")
    if not name or not re.fullmatch(r"-1|[0-9]{1,2}", axis):
        raise UsageError(f"--batch-axis takes NAME=AXIS, such as x=1, or NAME=-1 for no axis, not {text!r}.")
    return name, int(axis)


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
    """A group of options, each declared with what is said about it."""

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
    return {entry.name: entry.metadata["option"] for entry in dataclasses.fields(group)}


@dataclass(frozen=True, kw_only=True)
class BudgetOptions(Options):
    """How small or how good the result has to be."""

    title: ClassVar[str] = "budgets (none: lossless; several: all must hold)"

    max_error: float | None = _option("worst relative error of an output slice", "E", _FROM_0)
    min_agreement: float | None = _option("share of samples whose arg-max must stay", "A", _SHARE)
    agreement_output: str | None = _option("output and axis that the arg-max is taken of (finds one)", "NAME[:AXIS]")
    params: float | None = _option("keep at most this share of the parameters", "F", _KEPT)
    macs: float | None = _option("keep at most this share of the MACs", "F", _KEPT)
    size: float | None = _option("keep at most this share of the file size", "F", _KEPT)
    channels: float | None = _option("keep at most this share of the output channels", "F", _KEPT)
    latency: float | None = _option("keep at most this share of the measured latency", "F", _KEPT)
    latency_table: str | tuple[str, ...] | None = _option(
        "latencies of layers: a table, read if the file is there, else measured and written; or a profile of the model "
        "by ONNX Runtime, trtexec or benchmark_app, on another machine too. Several are joined; measured anew without",
        "FILE", nargs="append",
    )  # fmt: skip
    eval: Callable[[Any], float] | None = _option(
        "a metric of yours, FUNC(onnxruntime.InferenceSession) -> float, higher is better",
        "FILE.py:FUNC",
        repeated=False,
    )
    max_drop: float | None = _option("how far the --eval metric may fall", "D", _FROM_0, repeated=False)
    proven_only: bool = _option("remove only what the weights prove; needs no calibration data", default=False)

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

    rounds: int = _option("contract in N rounds, each followed by refit and recovery", "N", _FROM_1, default=1)
    recover: int | str | None = _option(
        "train against the original after each round, without labels: N steps or minutes", "N|Nmin", read=str
    )
    augment: Literal["mix"] | Callable[..., Any] | None = _option(
        "vary what --recover trains on: mix mixes pairs; FUNC(feeds, rng) -> feeds takes the inputs of a run by name "
        "and a numpy.random.Generator, and returns inputs like them", "mix|FILE.py:FUNC", _AUGMENT,
    )  # fmt: skip
    checkpoint: str | None = _option("keep the state of --recover here, and go on from here if interrupted", "FILE")

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

    refit: Refit = _option(
        "refit of what reads the survivors: auto folds in lossless mode, and else refits in sequence", None, _REFIT,
        default="auto",
    )  # fmt: skip
    target: Target = _option(
        "what the model will run on, for the widths that its kernels like; cpu is this machine's kind", None, _TARGET,
        default="cpu",
    )  # fmt: skip
    round_to: int | Literal["auto"] = _option(
        "kept widths are multiples of N; auto goes by the rule of the target, with wider steps where the result is "
        "measured to be slower than the original; 1 leaves all widths free", "auto|N", _MULTIPLE, default="auto",
        read=_multiple,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TraceOptions(Options):
    """What may go at all. Saved moments depend on every one of these."""

    title: ClassVar[str] = "what may go"

    include: tuple[str, ...] = _option(
        "touch only nodes whose names match, as producers or consumers", "GLOB", default=(), nargs="append"
    )
    exclude: tuple[str, ...] = _option("leave nodes whose names match alone", "GLOB", default=(), nargs="append")
    min_channels: int = _option("no channel axis is cut below N", "N", _FROM_1, default=1)
    batch_axis: Mapping[str, int] = _option(
        "which axis of an input counts samples, from 0 on, where that is not the leading one and the names of the axes "
        "do not say so; -1 where none does, so that every run is fed with a whole entry of the data", "NAME=AXIS",
        default=MappingProxyType({}), read=_axis, nargs="append",
    )  # fmt: skip
    input_range: Mapping[str, tuple[float, float]] = _option(
        "lowest and highest value of an input, or of all that are not named: what the weights imply for every input in "
        "there is proven, and data outside it is refused", "[NAME=]LO:HI",
        default=MappingProxyType({}), read=_range, nargs="append",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, axis in self.batch_axis.items():
            if isinstance(axis, bool) or not isinstance(axis, int) or axis < -1:
                raise UsageError(f"--batch-axis of {name!r} is a number from 0 on, or -1 for none, not {axis!r}.")
        for name, ends in self.input_range.items():
            if len(ends) != 2 or any(math.isnan(end) for end in ends) or not ends[0] <= ends[1]:
                raise UsageError(f"--input-range of {name!r} goes from LO up to HI, not {':'.join(map(str, ends))}.")


@dataclass(frozen=True, kw_only=True)
class RuntimeOptions(Options):
    """What models are run with."""

    title: ClassVar[str] = "execution"

    providers: tuple[str, ...] = _option(
        "ONNX Runtime execution providers", "NAME", default=("CPUExecutionProvider",), nargs="+"
    )
    threads: int = _option("intra-op threads of ONNX Runtime; 0 lets it choose", "N", _FROM_0, default=0)
    benchmark: float | None = _option(
        "time original, result and a copy of the original for S seconds in all (1.5; more where a run takes long)",
        "S", _SECONDS,
    )  # fmt: skip
    benchmark_batch: int = _option(
        "samples in a run that is timed, where the model leaves its batch free", "N", _FROM_1, default=1
    )
    benchmark_threads: int | None = _option(
        "intra-op threads of the models while they are timed (as --threads)", "N", _FROM_0
    )


@dataclass(frozen=True, kw_only=True)
class ImageOptions(Options):
    """What to make of images: (pixels / scale - mean) / std. None leaves it to the input of the model."""

    image_size: int | tuple[int, int] | None = _option(
        "images: crop to this height and width, one number for both (the size of the input)", "H[xW]", _SIDES, _FROM_1,
        read=_size,
    )  # fmt: skip
    resize: int | None = _option("images: shorter side before the crop (just covers it)", "N", _FROM_1)
    scale: float | None = _option("images: divide pixels of 0 to 255 by S first (255)", "S", _DIVIDES)
    mean: float | tuple[float, ...] | None = _option(
        "images: then subtract this, one number or one for each channel, in the order of --color (0)", "M[,M,M]",
        read=partial(_numbers, "--mean"),
    )  # fmt: skip
    std: float | tuple[float, ...] | None = _option(
        "images: then divide by this, likewise (1)", "D[,D,D]", _DIVIDES, read=partial(_numbers, "--std")
    )
    layout: Layout | None = _option("images: where the channels are (as in the input)", None, _LAYOUT)
    color: Color | None = _option("images: which channels (rgb, or gray where the input has one)", None, _COLOR)

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

    random_calib: int | None = _option(
        "N random samples in place of data, a last resort: they prove nothing, so that without a budget only what the "
        "weights prove goes, and no budget on errors or agreement can be judged by them", "N", _FROM_1, _RANDOM,
    )  # fmt: skip
    max_samples: int | None = _option("use at most N samples", "N", _FROM_1)
    batch_size: int | None = _option(
        "samples per run, where the batch is dynamic (as many as bound the memory of activations)", "N", _FROM_1
    )
    holdout: float = _option(
        "share of samples kept out of fitting, half to select and half to verify", "F", _PROPER_SHARE, default=0.3
    )
    seed: int = _option("of the split and of sampled positions", "N", _FROM_0, default=0)


@dataclass(frozen=True, kw_only=True)
class MomentsOptions(Options):
    """What calibration found, kept for other runs."""

    title: ClassVar[str] = DataOptions.title

    save_moments: str | Path | None = _option(
        "keep what calibration found in this file, for other budgets", "FILE", recorded=False
    )
    load_moments: str | Path | None = _option(
        "read what --save-moments kept, in place of running the calibration; --calib still chooses and verifies",
        "FILE", recorded=False,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class OutputOptions(Options):
    """What is made of the result."""

    title: ClassVar[str] = "output"

    force: bool = _option("write OUT even if verification fails (exit code stays 3)", default=False, repeated=False)
    strict: bool = _option(
        "fail (exit code 3) where no limit on quality was checked: without one, on random inputs, or on fewer than 10 "
        "held-out samples", default=False, recorded=False,
    )  # fmt: skip


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

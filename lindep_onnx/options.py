"""All options with their defaults: the only place where a default is written down."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, get_args

from lindep_onnx.errors import UsageError

#: An hour.
MAX_SECONDS = 3600

Refit = Literal["auto", "fold", "kernel", "sequential"]
Layout = Literal["nchw", "nhwc"]
Color = Literal["rgb", "bgr", "gray"]

#: RMS relative error that one site may gain in lossless mode, on samples that were not fitted.
LOSSLESS_SITE_ERROR = 1e-5
#: More random samples teach nothing.
MAX_RANDOM = 100_000
#: Output error at which a lossless result is verified.
LOSSLESS_VERIFIED_ERROR = 1e-3


@dataclass(frozen=True)
class TrainingBudget:
    """How long to train: so many steps, or so many seconds.

    Attributes:
        steps: number of steps; None where time decides. Only steps give the same result on every run.
        seconds: time to take; None where steps decide.
    """

    steps: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Preprocessing:
    """What to make of images; None leaves it to the input of the model.

    Attributes:
        size: (height, width) in pixels.
        resize: length of the shorter side before the crop, in pixels; None covers `size` just so.
        scale: what pixels of 0 to 255 are divided by first; None for 255.
        mean: what is then subtracted, one number or one for each channel, in the order of `color`; None for 0.
        std: what that is divided by; None for 1.
        layout: where the channels are.
        color: which channels there are, in this order.
    """

    size: tuple[int, int] | None = None
    resize: int | None = None
    scale: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    layout: Layout | None = None
    color: Color | None = None

    @property
    def asked_for(self) -> bool:
        """Whether any of it was given, so that the data must be images."""
        return self != Preprocessing()


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of one compression.

    Naming any of the budgets (`max_error`, `min_agreement`, `max_drop`, `params`, `macs`, `size`, `channels`,
    `latency`) selects budgeted mode; several must all hold. Without one the mode is lossless.

    Attributes:
        max_error: worst output error allowed, as `lindep_onnx.verify` defines it.
        min_agreement: share of samples (0 to 1) whose arg-max must stay.
        agreement_output: `NAME` or `NAME:AXIS`, the output and axis of the arg-max; None finds one.
        params: share of the original parameters to keep at most (0 to 1].
        macs: share of the original multiply-accumulates to keep at most (0 to 1].
        size: share of the original bytes to keep at most (0 to 1].
        channels: share of the original output channels to keep at most (0 to 1].
        latency: share of the original's measured latency to keep at most (0 to 1].
        latency_table: file with the latencies of layers; measured and written there if it does not exist, measured
            anew without.
        eval: a user metric, called with an `onnxruntime.InferenceSession`; higher is better.
        max_drop: how far `eval` may fall.
        proven_only: remove only what the weights prove; needs no calibration data.
        input_range: lowest and highest value of inputs by name, `*` for all that are not named. What the weights imply
            for every input in there counts as proven; data outside it is refused.
        refit: how consumers are refitted; `auto` folds in lossless mode, else refits in sequence.
        rounds: contract in so many rounds, each followed by refit and recovery.
        recover: train against the original after each round, without labels: a number of steps, or `"5min"`.
        augment: vary the samples that `recover` trains on: `"mix"` mixes pairs, a function takes the inputs of a run by
            name and a `numpy.random.Generator` and returns inputs like them.
        checkpoint: file in which `recover` keeps its state, to go on with after an interruption.
        round_to: round kept counts up to this multiple; 1 leaves them as they are; `auto` rounds up to 8 or 16 where
            the result is not measured to be faster without.
        min_channels: no channel axis is cut below this.
        include: glob on node names; when given, only matching consumers or producers are touched.
        exclude: glob on node names that are left alone.
        providers: ONNX Runtime execution providers.
        threads: intra-op threads of ONNX Runtime; 0 lets it choose.
        benchmark: seconds that original and result are timed against each other; None takes 0.4, or four for `latency`.
        batch_size: samples per run for models with a dynamic batch; None bounds the memory of the activations.
        max_samples: use at most this many calibration samples.
        image_size: height and width that images are cropped to, one number for both; None takes those of the input.
        resize: length of the shorter side of images before the crop; None covers `image_size` just so.
        scale: what pixels from 0 to 255 are divided by first; None for 255, so that they go from 0 to 1.
        mean: subtracted next, one number or one for each channel; None for 0.
        std: divided by last, likewise; None for 1.
        layout: `nchw` or `nhwc`; None takes that of the input.
        color: `rgb`, `bgr` or `gray`; None for rgb, or gray where the input has one channel.
        random_calib: draw so many random samples, in place of calibration data. They prove nothing: without a budget
            only what the weights prove goes, and no budget on errors or agreement can be judged by them.
        holdout: share of the samples kept out of fitting, half to select and half to verify.
        seed: of the split and of the sampled positions.
        force: keep a result that failed verification.
    """

    max_error: float | None = None
    min_agreement: float | None = None
    agreement_output: str | None = None
    params: float | None = None
    macs: float | None = None
    size: float | None = None
    channels: float | None = None
    latency: float | None = None
    latency_table: str | None = None
    eval: Callable[[Any], float] | None = None
    max_drop: float | None = None
    proven_only: bool = False
    input_range: Mapping[str, tuple[float, float]] = field(default_factory=lambda: MappingProxyType({}))
    refit: Refit = "auto"
    rounds: int = 1
    recover: int | str | None = None
    augment: Literal["mix"] | Callable[..., Any] | None = None
    checkpoint: str | None = None
    round_to: int | Literal["auto"] = 1
    min_channels: int = 1
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    providers: tuple[str, ...] = ("CPUExecutionProvider",)
    threads: int = 0
    benchmark: float | None = None
    batch_size: int | None = None
    max_samples: int | None = None
    image_size: int | tuple[int, int] | None = None
    resize: int | None = None
    scale: float | None = None
    mean: float | tuple[float, ...] | None = None
    std: float | tuple[float, ...] | None = None
    layout: Layout | None = None
    color: Color | None = None
    random_calib: int | None = None
    holdout: float = 0.3
    seed: int = 0
    force: bool = False

    def __post_init__(self) -> None:
        """Refuse values without a meaning.

        Raises:
            UsageError: naming the option, what is allowed and what was given.
        """
        positive = {"max_error": self.max_error, "max_drop": self.max_drop}
        for name, value in positive.items():
            if value is not None and not value >= 0:
                raise UsageError(f"{_flag(name)} must be at least 0, not {value}.")
        shares = {"params": self.params, "macs": self.macs, "size": self.size, "channels": self.channels}
        for name, value in shares.items():
            if value is not None and not 0 < value <= 1:
                raise UsageError(
                    f"{_flag(name)} is a share to keep, above 0 and at most 1 (0.5 for half), not {value}."
                )
        if self.min_agreement is not None and not 0 <= self.min_agreement <= 1:
            raise UsageError(f"--min-agreement is a share from 0 to 1, not {self.min_agreement}.")
        if (self.eval is None) != (self.max_drop is None):
            raise UsageError("--eval and --max-drop belong together: give both or neither.")
        if not 0 < self.holdout < 1:
            raise UsageError(f"--holdout is a share between 0 and 1, not {self.holdout}.")
        if self.proven_only and self.budgeted:
            raise UsageError("--proven-only removes what costs nothing: it takes no budget.")
        for name, ends in self.input_range.items():
            if len(ends) != 2 or any(math.isnan(end) for end in ends) or not ends[0] <= ends[1]:
                raise UsageError(f"--input-range of {name!r} goes from LO up to HI, not {':'.join(map(str, ends))}.")
        if self.refit not in ("auto", "fold", "kernel", "sequential"):
            raise UsageError(f"--refit is one of auto, fold, kernel, sequential, not {self.refit!r}.")
        least = {
            "rounds": self.rounds,
            "round_to": 1 if self.round_to == "auto" else self.round_to,
            "min_channels": self.min_channels,
            "batch_size": self.batch_size,
            "max_samples": self.max_samples,
            "image_size": None if self.preprocessing.size is None else min(self.preprocessing.size),
            "resize": self.resize,
            "random_calib": self.random_calib,
        }
        for name, count in least.items():
            if count is not None and count < 1:
                raise UsageError(f"{_flag(name)} must be at least 1, not {count}.")
        self._check_images()
        if self.random_calib is not None:
            self._check_random()
        if self.latency is not None and self.rounds > 1:
            raise UsageError("--latency is reached in one step: leave --rounds at 1.")
        if self.latency_table is not None and self.latency is None:
            raise UsageError("--latency-table belongs to --latency: give both or neither.")
        if self.seed < 0:
            raise UsageError(f"--seed must be at least 0, not {self.seed}.")
        if self.benchmark is not None and not 0 < self.benchmark <= MAX_SECONDS:
            raise UsageError(f"--benchmark is a number of seconds, above 0 and at most {MAX_SECONDS:,}.")
        if self.threads < 0:
            raise UsageError(f"--threads must be at least 0, not {self.threads}.")
        if (self.rounds > 1 or self.effort is not None) and not self.budgeted:
            raise UsageError(
                "--rounds and --recover win back what a budget costs: name one, for instance --params 0.5."
            )
        if (self.augment is not None or self.checkpoint is not None) and self.recover is None:
            raise UsageError("--augment and --checkpoint belong to --recover: say how long to train, such as 300.")
        if not (self.augment in ("mix", None) or callable(self.augment)):
            raise UsageError(f"--augment is mix or FILE.py:FUNC, not {self.augment!r}.")

    def _check_images(self) -> None:
        if self.image_size is not None and len(self.preprocessing.size or ()) != 2:
            raise UsageError(f"--image-size is one number, or HxW, not {self.image_size!r}.")
        for name, above in (("scale", (self.preprocessing.scale or 1.0,)), ("std", self.preprocessing.std or (1.0,))):
            if not min(above) > 0:
                raise UsageError(f"{_flag(name)} divides, and must be above 0, not {getattr(self, name)}.")
        if self.layout not in (None, *get_args(Layout)):
            raise UsageError(f"--layout is nchw or nhwc, not {self.layout!r}.")
        if self.color not in (None, *get_args(Color)):
            raise UsageError(f"--color is rgb, bgr or gray, not {self.color!r}.")

    def _check_random(self) -> None:
        if self.random_calib is not None and self.random_calib > MAX_RANDOM:
            raise UsageError(f"--random-calib must be at most {MAX_RANDOM:,}, not {self.random_calib}.")
        if self.proven_only:
            raise UsageError("--proven-only needs no data: drop --random-calib.")
        for name in ("max_error", "min_agreement"):
            if getattr(self, name) is not None:
                raise UsageError(
                    f"{_flag(name)} cannot be judged on random inputs, which are nothing like real ones: give --calib "
                    "DATA, or a budget on the size such as --params."
                )

    @property
    def preprocessing(self) -> Preprocessing:
        """What to make of images."""

        def several(value: float | tuple[float, ...] | None) -> tuple[float, ...] | None:
            return value if value is None or isinstance(value, tuple) else (value,)

        size = (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size
        mean, std = several(self.mean), several(self.std)
        return Preprocessing(size, self.resize, self.scale, mean, std, self.layout, self.color)

    @property
    def budgeted(self) -> bool:
        """Whether any budget is named."""
        sizes = (self.params, self.macs, self.size, self.channels, self.latency)
        budgets = (self.max_error, self.min_agreement, self.max_drop, *sizes)
        return any(budget is not None for budget in budgets)

    @property
    def sized(self) -> bool:
        """Whether a size is asked for, so that rounds must reach it."""
        return any(share is not None for share in (self.params, self.macs, self.size, self.channels, self.latency))

    @property
    def effort(self) -> TrainingBudget | None:
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

    def described(self) -> dict[str, Any]:
        """The options that differ from their defaults, as JSON values."""
        default = Config()
        values = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        changed = {name: value for name, value in values.items() if value != getattr(default, name)}
        if self.input_range:
            changed["input_range"] = dict(self.input_range)
        return {name: getattr(value, "__name__", value) for name, value in changed.items()}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")

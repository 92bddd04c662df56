"""Win back what a compression cost: train the smaller model to put out what the original puts out, without labels.

The original is the teacher and the calibration samples are the data (see `lindep_onnx.distill.loss` for the loss). ONNX
Runtime computes loss and gradients (see `distill.autodiff.differentiate`); Adam (Kingma, Ba, 2015) steps in NumPy, on
weights that stay inputs of one session.

Each tensor moves in proportion to the root mean square of its own values, so that one step length suits all layers,
whatever the scale that folding or the exporter left in them. FIT samples are trained on. SELECT samples say which state
was the best, and that one is kept: the result is never worse on them than what training started from. Where they say
that steps are too long, training goes back to the best state and goes on with shorter ones.

Every random choice is a function of the seed and the step, so that an interrupted training can be taken up from a
checkpoint and ends where it would have ended.
"""

from __future__ import annotations

import functools
import hashlib
import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lindep_onnx.data.samples import Part, Samples
from lindep_onnx.distill.augment import Augment
from lindep_onnx.distill.autodiff.differentiate import differentiate
from lindep_onnx.distill.checkpoint import Checkpoint, TrainingState
from lindep_onnx.distill.loss import LOSS, HeldOut, Teacher, with_loss
from lindep_onnx.errors import LindepError
from lindep_onnx.log import Log
from lindep_onnx.model.ir import Model
from lindep_onnx.model.weighted import WEIGHTS
from lindep_onnx.model.weights import fingerprint
from lindep_onnx.options import TrainingBudget
from lindep_onnx.runtime.backend import Runtime

Array: TypeAlias = NDArray[Any]
Weights: TypeAlias = Mapping[str, Array]

#: Length of a step relative to the root mean square of a tensor, at its peak.
RATE = 1e-2
#: Share of the steps in which the rate rises; it then falls along a cosine.
WARM_UP = 0.05
DECAY, SQUARED_DECAY, TINY = 0.9, 0.999, 1e-12
#: A gradient is cut to so many times the running mean of the norms.
CLIP = 3.0
#: So often the held-out loss is measured, and a few times more at the start.
LOOKS = 12
#: A held-out loss so many times the best tells that steps are too long; they are then so much shorter.
WORSE, SHORTER = 1.5, 0.3
#: A batch is run in so many pieces at the same time.
PIECES = 2
#: Seconds between two checkpoints.
PAUSE = 60.0


@dataclass(frozen=True)
class Recovered:
    """What training changed.

    Attributes:
        weights: new values of stored tensors, by name, of the type they had.
        steps: that were taken.
        history: (step, loss on trained samples since the last look, loss on held-out samples), in order; the first is
            the state before.
        notes: sentences on what kept weights from being trained.
    """

    weights: Mapping[str, Array]
    steps: int
    history: tuple[tuple[int, float, float], ...]
    notes: tuple[str, ...]

    @property
    def before(self) -> float:
        """Held-out loss before."""
        return self.history[0][2] if self.history else math.nan

    @property
    def after(self) -> float:
        """Held-out loss of the weights that were kept."""
        return min((entry[2] for entry in self.history), default=math.nan)


def distill(
    teacher: Model,
    student: Model,
    samples: Samples,
    effort: TrainingBudget,
    runtime: Runtime,
    log: Log,
    *,
    frozen: Collection[str] = (),
    agreement_output: str | None = None,
    augment: Augment | None = None,
    checkpoint: Checkpoint | None = None,
    seed: int,
) -> Recovered:
    """Train a model towards the outputs of another.

    Args:
        teacher: the original.
        student: the smaller model; inputs and outputs as the teacher's.
        samples: the data.
        effort: how long.
        runtime: what models run on.
        log: told how far it is, in steps or seconds.
        frozen: names of nodes whose weights stay as they are.
        agreement_output: see `lindep_onnx.verify.OutputErrors`.
        augment: makes other inputs of those of a run.
        checkpoint: where to keep the state, and to take it up.
        seed: of the order of the samples.

    Raises:
        UsageError: the checkpoint is of another training, or `augment` breaks its contract.
        OutputError: the checkpoint cannot be written.
    """
    fitted = samples.parts[Part.FIT]
    if not samples.uniform or not len(fitted) or not len(samples.parts[Part.SELECT]):
        return _untrained("the samples differ in shape" if not samples.uniform else "there are too few samples")
    guide = Teacher(teacher, samples, runtime, agreement_output=agreement_output)
    if not guide.measures:
        return _untrained("no output of type float32 varies")
    try:
        modern = with_loss(student, guide.measures)
        chosen = [name for name in trainable(student, frozen) if name in modern.stored]
        batch = min(samples.batch, len(fitted))
        whole = guide.feeds(fitted[:batch])
        shares = runtime.pieces(PIECES if _divides(whole, batch, samples) else 1)
        shapes = {name: value.shape for name, value in _split(whole, shares.runs)[0].items()}
        backward = differentiate(modern, LOSS, chosen, shapes)
        notes = tuple(
            f"Weights in front of node {name!r} ({op}) were not trained: {why}." for name, op, why in backward.obstacles
        )
        if not backward.gradients:
            return Recovered({}, 0, (), notes or _untrained("no output depends on a float32 weight").notes)
        session = shares.each.open(backward.proto, backward.folder)
    except LindepError as error:  # the refit is worth keeping without it
        return _untrained(str(error))
    held_out = HeldOut(modern, list(backward.gradients), guide, samples, runtime)
    order = _Order(fitted, batch, seed)

    def slopes(number: int, weights: Weights) -> tuple[float, dict[str, Array]]:
        numbers, rng = order.at(number)
        feeds = guide.feeds(numbers)
        if augment is not None:
            plain = {name: feeds[name] for name in student.inputs if name in feeds}
            varied = augment(plain, rng)
            feeds = feeds if varied is plain else guide.taught(varied)
        wanted = [LOSS, *backward.gradients.values()]
        runs = pool.map(lambda piece: session.run(wanted, {**piece, **weights}), _split(feeds, shares.runs))
        loss, *found = (functools.reduce(np.add, parts) for parts in zip(*runs, strict=True))
        return float(loss) / batch, dict(zip(backward.gradients, found, strict=True))

    start = {name: modern.stored[name] for name in backward.gradients}
    key = _key(student, effort, seed, batch, fitted, augment)
    state = checkpoint.load(key, start) if checkpoint is not None else None
    if state is None:
        none = {name: np.zeros_like(value) for name, value in start.items()}
        state = TrainingState(start, start, none, none, history=((0, math.nan, held_out.loss(start)),))

    def keep(state: TrainingState) -> None:
        if checkpoint is not None:
            checkpoint.save(key, state)

    with shares.pool() as pool:
        state = _trained(state, effort, slopes, held_out.loss, _sizes(start), keep, log)
    changed = {name: value for name, value in state.best.items() if not np.array_equal(value, start[name])}
    return Recovered(changed, state.steps, state.history, notes)


def _divides(feeds: Mapping[str, Array], batch: int, samples: Samples) -> bool:
    """Whether a batch can be run in pieces."""
    apart = samples.free_batch and all(value.ndim and len(value) == batch for value in feeds.values())
    return apart and batch % PIECES == 0


def _split(feeds: Mapping[str, Array], pieces: int) -> list[dict[str, Array]]:
    if pieces == 1:
        return [dict(feeds)]
    return [
        dict(zip(feeds, part, strict=True)) for part in zip(*(np.split(v, pieces) for v in feeds.values()), strict=True)
    ]


def _key(
    student: Model,
    effort: TrainingBudget,
    seed: int,
    batch: int,
    fitted: NDArray[np.int64],
    augment: Augment | None,
) -> str:
    """All that decides the course of a training, in short: the weights of the student tell the data apart."""
    options = f"{effort} {seed} {batch} {getattr(augment, '__name__', augment)}".encode()
    weights = fingerprint(student.proto, student.folder).encode()
    parts = (weights, options, fitted.tobytes())
    return hashlib.blake2b(b"".join(hashlib.blake2b(part).digest() for part in parts), digest_size=16).hexdigest()


def _trained(
    state: TrainingState,
    effort: TrainingBudget,
    slopes: Callable[[int, Weights], tuple[float, dict[str, Array]]],
    held_out: Callable[[Weights], float],
    sizes: Mapping[str, float],
    keep: Callable[[TrainingState], None],
    log: Log,
) -> TrainingState:
    """Train until the effort is spent.

    Args:
        state: where to start from.
        effort: how long in all.
        slopes: loss and gradients of a step.
        held_out: the loss that judges.
        sizes: by which each tensor moves.
        keep: called with a state now and then.
        log: told how far it is.
    """
    begun = saved = time.monotonic()
    earlier, losses = state.seconds, []

    def share() -> float:
        if effort.steps is not None:
            return state.steps / max(1, effort.steps)
        return state.seconds / max(1e-9, effort.seconds or 0.0)

    def looks() -> int:
        regular = int(share() * LOOKS)
        # Before the first of these: after 1, 2, 4, 8 ... steps, since the first ones may be too long already.
        return regular if regular else state.steps.bit_length() - 64

    while share() < 1:
        before = looks()
        loss, gradients = slopes(state.steps, state.weights)
        losses.append(loss)
        state = _moved(state, gradients, _rate(share()), sizes)
        state = replace(state, seconds=earlier + time.monotonic() - begun)
        if effort.steps is not None:
            log.progress("recover", state.steps, effort.steps)
        else:
            log.progress("recover", int(state.seconds), int(effort.seconds or 0))
        if looks() > before or share() >= 1:
            state = _judged(state, float(np.mean(losses)), held_out(state.weights))
            losses = []
            keep(state)
            saved = time.monotonic()
        elif time.monotonic() - saved > PAUSE:
            keep(state)
            saved = time.monotonic()
    return state


def _judged(state: TrainingState, trained: float, found: float) -> TrainingState:
    """The state once held-out samples have had their say."""
    least = min(entry[2] for entry in state.history)
    state = replace(state, history=(*state.history, (state.steps, trained, found)))
    if found < least:
        return replace(state, best=state.weights)
    if found <= WORSE * least:
        return state
    none = {name: np.zeros_like(value) for name, value in state.best.items()}
    return replace(state, weights=state.best, mean=none, square=none, averaged=0, norm=0.0, rate=SHORTER * state.rate)


def _untrained(why: str) -> Recovered:
    return Recovered({}, 0, (), (f"The result was not trained: {why}.",))


def trainable(model: Model, frozen: Collection[str]) -> list[str]:
    """Stored float32 tensors that are weights: matrices, biases, scales and slopes, one value or more a channel.

    Args:
        model: the model.
        runtime: what models run on.
        log: told how far it is, in steps or seconds.
        frozen: names of nodes that keep theirs.
    """
    # Positions of the weights of each operator; constants of arithmetic count where they are vectors (biases).
    places = {
        **WEIGHTS,
        "BatchNormalization": (1, 2),
        "LayerNormalization": (1, 2),
        "PRelu": (1,),
        "Add": (0, 1),
        "Mul": (0, 1),
    }
    found: dict[str, None] = {}
    kept: set[str] = {*model.overridable, *model.outputs}
    for node in model.nodes:
        for position, name in enumerate(node.inputs):
            value = model.stored.get(name)
            if value is None or value.dtype != np.float32:
                continue
            vector = value.size > 1 and value.size == max(value.shape)
            if node.name in frozen:
                kept.add(name)
            elif position in places.get(node.op, ()) and (node.op not in ("Add", "Mul") or vector):
                found[name] = None
            elif node.op not in ("Identity", "Reshape", "Transpose"):
                kept.add(name)  # read as something else too
    return [name for name in found if name not in kept and model.stored[name].ndim]


# ---- optimiser ----------------------------------------------------------------------------------------------------


def _sizes(weights: Weights) -> dict[str, float]:
    """Root mean square of each tensor; next to nothing counts as a thousandth of the usual."""
    sizes = {name: float(np.sqrt(np.mean(np.square(value)))) for name, value in weights.items()}
    typical = float(np.median([size for size in sizes.values() if size > 0] or [1.0]))
    return {name: max(size, 1e-3 * typical) for name, size in sizes.items()}


def _moved(state: TrainingState, gradients: Weights, rate: float, sizes: Mapping[str, float]) -> TrainingState:
    """One step of Adam, relative to the size of each tensor; the weights stay if a gradient is not finite."""
    state = replace(state, steps=state.steps + 1)
    norm = math.sqrt(sum(float(np.vdot(slope, slope)) for slope in gradients.values()))
    if not math.isfinite(norm):
        return state
    count = state.averaged + 1
    factor = min(1.0, CLIP * state.norm / max(norm, TINY)) if state.averaged else 1.0
    running = 0.9 * state.norm + 0.1 * norm * factor if state.averaged else norm
    first, second = 1 - DECAY**count, 1 - SQUARED_DECAY**count
    weights, mean, square = {}, {}, {}
    for name, slope in gradients.items():
        slope = slope * np.float32(factor)
        mean[name] = state.mean[name] + (1 - DECAY) * (slope - state.mean[name])
        square[name] = state.square[name] + (1 - SQUARED_DECAY) * (slope * slope - state.square[name])
        direction = mean[name] / first / (np.sqrt(square[name] / second) + TINY)
        step = state.rate * rate * sizes[name]
        weights[name] = (state.weights[name] - step * direction).astype(np.float32)
    return replace(state, weights=weights, mean=mean, square=square, averaged=count, norm=running)


def _rate(share: float) -> float:
    """The step length when so much of the training is done: up in a line, down along a cosine."""
    if share < WARM_UP:
        return RATE * max(share / WARM_UP, 0.02)
    return RATE * 0.5 * (1 + math.cos(math.pi * (share - WARM_UP) / (1 - WARM_UP)))


class _Order:
    """Which samples each step takes: every sample once before any comes again, but for a rest that fills no batch."""

    def __init__(self, numbers: NDArray[np.int64], batch: int, seed: int) -> None:
        self._numbers, self._batch, self._seed = numbers, batch, seed
        self._turn: tuple[int, NDArray[np.int64]] | None = None

    def at(self, step: int) -> tuple[NDArray[np.int64], np.random.Generator]:
        """The samples of a step, and randomness for it."""
        turn, place = divmod(step, len(self._numbers) // self._batch)
        if self._turn is None or self._turn[0] != turn:
            self._turn = turn, np.random.default_rng([self._seed, turn]).permutation(self._numbers)
        chosen = self._turn[1][place * self._batch :][: self._batch]
        return chosen, np.random.default_rng([self._seed, turn, place])

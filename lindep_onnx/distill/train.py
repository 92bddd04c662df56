"""Win back what a compression cost: train the smaller model to put out what the original puts out, without labels.

The original is the teacher and the calibration samples are the data (see `lindep_onnx.distill.loss` for the loss). ONNX
Runtime computes loss and gradients (see `distill.autodiff.differentiate`); `distill.optimizer` steps in NumPy, on
weights that stay inputs of one session.

FIT samples are trained on. SELECT samples say which state was the best, and that one is kept: the result is never worse
on them than what training started from.

Every random choice is a function of the seed and the step, so that an interrupted training can be taken up from a
checkpoint and ends where it would have ended.
"""

from __future__ import annotations

import functools
import hashlib
import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lindep_onnx.data.samples import Samples
from lindep_onnx.data.split import Part
from lindep_onnx.distill.augment import Augment
from lindep_onnx.distill.autodiff.differentiate import differentiate
from lindep_onnx.distill.checkpoint import Checkpoint
from lindep_onnx.distill.loss import LOSS, HeldOut, Teacher, with_loss
from lindep_onnx.distill.optimizer import History, Optimizer, TrainingState, Weights, sizes_of
from lindep_onnx.errors import LindepError
from lindep_onnx.log import Log
from lindep_onnx.model.ir import Model
from lindep_onnx.model.weighted import WEIGHTS
from lindep_onnx.model.weights import fingerprint
from lindep_onnx.options import TrainingBudget
from lindep_onnx.runtime.backend import Runtime

Feeds: TypeAlias = Mapping[str, NDArray[Any]]

#: So often the held-out loss is measured, and a few times more at the start.
LOOKS = 12
#: Seconds between two checkpoints.
PAUSE = 60.0


@dataclass(frozen=True)
class Training:
    """What is trained, and how.

    Attributes:
        teacher: the original.
        student: the smaller model; inputs and outputs as the teacher's.
        budget: how long.
        seed: of the order of the samples.
        frozen: names of nodes whose weights stay as they are.
        agreement_output: see `lindep_onnx.verify.OutputErrors`.
        augment: makes other inputs of those of a run.
        optimizer: how weights step.
        pieces: a batch is run in so many at the same time, where it can be cut like that.
    """

    teacher: Model
    student: Model
    budget: TrainingBudget
    seed: int
    frozen: Collection[str] = ()
    agreement_output: str | None = None
    augment: Augment | None = None
    optimizer: Optimizer = field(default_factory=Optimizer)
    pieces: int = 2


@dataclass(frozen=True)
class Distilled:
    """What training changed.

    Attributes:
        weights: new values of stored tensors, by name, of the type they had.
        steps: that were taken.
        history: (step, loss on trained samples since the last entry, loss on held-out samples), in order; the first is
            the state before.
        notes: sentences on what kept weights from being trained.
    """

    weights: Weights
    steps: int
    history: History
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
    training: Training, samples: Samples, runtime: Runtime, log: Log, checkpoint: Checkpoint | None = None
) -> Distilled:
    """Train a model towards the outputs of another.

    Args:
        training: what is trained, and how.
        samples: the data.
        runtime: what models run on.
        log: told how far it is, in steps or seconds.
        checkpoint: where to keep the state, and to take it up.

    Raises:
        UsageError: the checkpoint is of another training, or `augment` breaks its contract.
        OutputError: the checkpoint cannot be written.
    """
    if not samples.uniform:
        return _untrained("the samples differ in shape")
    if not len(samples.parts[Part.FIT]) or not len(samples.parts[Part.SELECT]):
        return _untrained("there are too few samples")
    teacher = Teacher(training.teacher, samples, runtime, agreement_output=training.agreement_output)
    if not teacher.measures:
        return _untrained("no output of type float32 varies, with as many rows for every sample")
    try:
        student = with_loss(training.student, teacher.measures)
        steps = _Steps(training, teacher, samples, runtime)
        chosen = [name for name in trainable(training.student, training.frozen) if name in student.stored]
        backward = differentiate(student, LOSS, chosen, steps.shapes)
        notes = tuple(
            f"Weights in front of node {name!r} ({op}) were not trained: {why}." for name, op, why in backward.obstacles
        )
        if not backward.gradients:
            return Distilled({}, 0, (), notes) if notes else _untrained("no output depends on a float32 weight")
        session = steps.shares.each.open(backward.proto, backward.folder)
    except LindepError as error:  # the refit is worth keeping without it
        return _untrained(str(error))
    held_out = HeldOut(student, list(backward.gradients), teacher, samples, runtime)

    def gradients(step: int, weights: Weights) -> tuple[float, Weights]:
        wanted = [LOSS, *backward.gradients.values()]
        runs = pool.map(lambda piece: session.run(wanted, {**piece, **weights}), steps.feeds(step))
        loss, *found = (functools.reduce(np.add, parts) for parts in zip(*runs, strict=True))
        return float(loss) / steps.batch, dict(zip(backward.gradients, found, strict=True))

    start = {name: student.stored[name] for name in backward.gradients}
    key = _key(training, steps.batch, samples)
    state = checkpoint.load(key, start) if checkpoint is not None else None
    if state is None:
        state = TrainingState.at(start, history=((0, math.nan, held_out.loss(start)),))
    keep = functools.partial(checkpoint.save, key) if checkpoint is not None else None
    with steps.shares.pool() as pool:
        state = _trained(state, training, _Objective(gradients, held_out.loss, sizes_of(start)), keep, log)
    changed = {name: value for name, value in state.best.items() if not np.array_equal(value, start[name])}
    return Distilled(changed, state.steps, state.history, notes)


def _untrained(why: str) -> Distilled:
    return Distilled({}, 0, (), (f"The result was not trained: {why}.",))


def _key(training: Training, batch: int, samples: Samples) -> str:
    """All that decides the course of a training, in short: the weights of the student tell the data apart."""
    augment = getattr(training.augment, "__name__", training.augment)
    course = (training.budget, training.optimizer, training.pieces, training.seed, batch, augment)
    weights = fingerprint(training.student.proto, training.student.folder).encode()
    parts = (weights, repr(course).encode(), samples.parts[Part.FIT].tobytes())
    return hashlib.blake2b(b"".join(hashlib.blake2b(part).digest() for part in parts), digest_size=16).hexdigest()


class _Steps:
    """What each step reads, in pieces that are run at the same time.

    Every sample comes once before any comes again, but for a rest that fills no batch.
    """

    def __init__(self, training: Training, teacher: Teacher, samples: Samples, runtime: Runtime) -> None:
        self._training, self._teacher = training, teacher
        self._fitted = samples.parts[Part.FIT]
        self._turn: tuple[int, NDArray[np.int64]] | None = None
        self.batch = min(samples.batch, len(self._fitted))
        first = teacher.feeds(self._fitted[: self.batch])
        apart = (
            samples.free_batch
            and teacher.leading
            and all(value.ndim and len(value) == self.batch for value in first.values())
        )
        self.shares = runtime.pieces(training.pieces if apart and self.batch % training.pieces == 0 else 1)
        self.shapes = {name: value.shape for name, value in self._split(first)[0].items()}

    def feeds(self, step: int) -> list[Feeds]:
        numbers, rng = self._drawn(step)
        feeds = self._teacher.feeds(numbers)
        if self._training.augment is not None:
            plain = {name: feeds[name] for name in self._training.student.inputs if name in feeds}
            varied = self._training.augment(plain, rng)
            feeds = feeds if varied is plain else self._teacher.taught(varied)
        return self._split(feeds)

    def _drawn(self, step: int) -> tuple[NDArray[np.int64], np.random.Generator]:
        """The samples of a step, and randomness for it."""
        seed = self._training.seed
        turn, place = divmod(step, len(self._fitted) // self.batch)
        if self._turn is None or self._turn[0] != turn:
            self._turn = turn, np.random.default_rng([seed, turn]).permutation(self._fitted)
        return self._turn[1][place * self.batch :][: self.batch], np.random.default_rng([seed, turn, place])

    def _split(self, feeds: Feeds) -> list[Feeds]:
        if self.shares.runs == 1:
            return [feeds]
        parts = zip(*(np.split(value, self.shares.runs) for value in feeds.values()), strict=True)
        return [dict(zip(feeds, part, strict=True)) for part in parts]


@dataclass(frozen=True)
class _Objective:
    """What a training is told: loss and gradients of a step, the loss that judges, and by how much tensors move."""

    gradients: Callable[[int, Weights], tuple[float, Weights]]
    held_out: Callable[[Weights], float]
    sizes: Mapping[str, float]


def _trained(
    state: TrainingState,
    training: Training,
    objective: _Objective,
    keep: Callable[[TrainingState], None] | None,
    log: Log,
) -> TrainingState:
    """Train until the budget is spent; `keep` is called with a state now and then."""
    budget, optimizer = training.budget, training.optimizer
    begun = saved = time.monotonic()
    earlier, losses = state.seconds, []
    share = _share(budget, state)
    while share < 1:
        before = _looks(share, state)
        loss, gradients = objective.gradients(state.steps, state.weights)
        losses.append(loss)
        state = optimizer.stepped(state, gradients, share, objective.sizes)
        state = replace(state, seconds=earlier + time.monotonic() - begun)
        share = _share(budget, state)
        if budget.steps is not None:
            log.progress("recover", state.steps, budget.steps)
        else:
            log.progress("recover", int(state.seconds), int(budget.seconds or 0))
        look = share >= 1 or _looks(share, state) > before
        if look:
            state = optimizer.judged(state, float(np.mean(losses)), objective.held_out(state.weights))
            losses = []
        if keep is not None and (look or time.monotonic() - saved > PAUSE):
            keep(state)
            saved = time.monotonic()
    return state


def _share(budget: TrainingBudget, state: TrainingState) -> float:
    """How much of a training is done."""
    if budget.steps is not None:
        return state.steps / max(1, budget.steps)
    return state.seconds / max(1e-9, budget.seconds or 0.0)


def _looks(share: float, state: TrainingState) -> int:
    """How often the held-out loss has been measured, but for a constant."""
    regular = int(share * LOOKS)
    # Before the first of these: after 1, 2, 4, 8 ... steps, since the first ones may be too long already.
    return regular if regular else state.steps.bit_length() - 64


def trainable(model: Model, frozen: Collection[str]) -> list[str]:
    """Stored float32 tensors that are weights: matrices, biases, scales and slopes, one value or more a channel.

    Args:
        model: the model.
        frozen: names of nodes that keep theirs.
    """
    # Positions of the weights of each operator; constants of arithmetic count where they are vectors (biases).
    arithmetic = {"Add": (0, 1), "Mul": (0, 1)}
    places = {"BatchNormalization": (1, 2), "LayerNormalization": (1, 2), "PRelu": (1,), **WEIGHTS, **arithmetic}
    found: dict[str, None] = {}
    kept: set[str] = {*model.fixed, *model.outputs}
    for node in model.nodes:
        for position, name in enumerate(node.inputs):
            value = model.stored.get(name)
            if value is None or value.dtype != np.float32:
                continue
            vector = value.size > 1 and value.size == max(value.shape)
            if node.name in frozen:
                kept.add(name)
            elif position in places.get(node.op, ()) and (node.op not in arithmetic or vector):
                found[name] = None
            elif node.op not in ("Identity", "Reshape", "Transpose"):
                kept.add(name)  # read as something else too
    return [name for name in found if name not in kept and model.stored[name].ndim]

"""Steps of Adam (Kingma, Ba, 2015), and how long they are.

Each tensor moves in proportion to the root mean square of its own values, so that one step length suits all layers,
whatever the scale that folding or the exporter left in them. Where held-out samples say that steps are too long,
training goes back to the best state and goes on with shorter ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Weights: TypeAlias = Mapping[str, NDArray[Any]]
#: (step, loss on trained samples since the last entry, loss on held-out samples), in order.
History: TypeAlias = tuple[tuple[int, float, float], ...]

TINY = 1e-12


@dataclass(frozen=True)
class TrainingState:
    """All that a training has to know to go on.

    Attributes:
        weights: as they are.
        best: as they were when held-out samples liked them best.
        mean, square: running means of gradients and of their squares.
        averaged: number of gradients in those.
        norm: running mean of the norm of the gradient; 0 before the first.
        rate: factor of the step length.
        steps: taken so far.
        seconds: spent so far.
        history: of the losses; the first entry is the state before.
    """

    weights: Weights
    best: Weights
    mean: Weights
    square: Weights
    averaged: int = 0
    norm: float = 0.0
    rate: float = 1.0
    steps: int = 0
    seconds: float = 0.0
    history: History = ()

    @classmethod
    def at(cls, weights: Weights, **others: Any) -> TrainingState:
        """The state of whoever starts from some weights, without gradients so far."""
        none = {name: np.zeros_like(value) for name, value in weights.items()}
        return cls(weights, weights, none, none, **others)


@dataclass(frozen=True)
class Optimizer:
    """How gradients and held-out losses change a state.

    Attributes:
        rate: length of a step relative to the root mean square of a tensor, at its peak.
        warm_up: share of the training in which the rate rises; it then falls along a cosine.
        decay, squared_decay: of the running means of gradients and of their squares.
        clip: a gradient is cut to so many times the running mean of the norms.
        worse: a held-out loss so many times the best tells that steps are too long.
        shorter: they are then so much shorter.
    """

    rate: float = 1e-2
    warm_up: float = 0.05
    decay: float = 0.9
    squared_decay: float = 0.999
    clip: float = 3.0
    worse: float = 1.5
    shorter: float = 0.3

    def stepped(
        self, state: TrainingState, gradients: Weights, share: float, sizes: Mapping[str, float]
    ) -> TrainingState:
        """One step; the weights stay if a gradient is not finite.

        Args:
            state: before.
            gradients: of the loss.
            share: how much of the training is done, 0 to 1.
            sizes: in proportion to which each tensor moves.
        """
        state = replace(state, steps=state.steps + 1)
        norm = math.sqrt(sum(float(np.vdot(gradient, gradient)) for gradient in gradients.values()))
        if not math.isfinite(norm):
            return state
        count = state.averaged + 1
        factor = min(1.0, self.clip * state.norm / max(norm, TINY)) if state.averaged else 1.0
        running = 0.9 * state.norm + 0.1 * norm * factor if state.averaged else norm
        first, second = 1 - self.decay**count, 1 - self.squared_decay**count
        rate = self._rate(share)
        weights, mean, square = {}, {}, {}
        for name, gradient in gradients.items():
            gradient = gradient * np.float32(factor)
            mean[name] = state.mean[name] + (1 - self.decay) * (gradient - state.mean[name])
            square[name] = state.square[name] + (1 - self.squared_decay) * (gradient * gradient - state.square[name])
            direction = mean[name] / first / (np.sqrt(square[name] / second) + TINY)
            step = state.rate * rate * sizes[name]
            weights[name] = (state.weights[name] - step * direction).astype(np.float32)
        return replace(state, weights=weights, mean=mean, square=square, averaged=count, norm=running)

    def _rate(self, share: float) -> float:
        """The step length when so much of the training is done: up in a line, down along a cosine."""
        if share < self.warm_up:
            return self.rate * max(share / self.warm_up, 0.02)
        return self.rate * 0.5 * (1 + math.cos(math.pi * (share - self.warm_up) / (1 - self.warm_up)))

    def judged(self, state: TrainingState, trained: float, held_out: float) -> TrainingState:
        """The state once held-out samples have had their say.

        Args:
            state: before.
            trained: loss on trained samples since the last time.
            held_out: loss on held-out samples.
        """
        least = min(entry[2] for entry in state.history)
        history = (*state.history, (state.steps, trained, held_out))
        if held_out < least:
            return replace(state, history=history, best=state.weights)
        if held_out <= self.worse * least:
            return replace(state, history=history)
        rate = self.shorter * state.rate
        return TrainingState.at(state.best, rate=rate, steps=state.steps, seconds=state.seconds, history=history)


def sizes_of(weights: Weights) -> dict[str, float]:
    """Root mean square of each tensor; next to nothing counts as a thousandth of the usual."""
    sizes = {name: float(np.sqrt(np.mean(np.square(value)))) for name, value in weights.items()}
    typical = float(np.median([size for size in sizes.values() if size > 0] or [1.0]))
    return {name: max(size, 1e-3 * typical) for name, size in sizes.items()}

"""Training that goes on after an interruption: its state in one file, replaced in one step.

A state belongs to one training: a key made of all that decides its course. A file that holds only states of other
trainings is somebody else's and is refused, never overwritten.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lindep_onnx.data.npz import UNREADABLE
from lindep_onnx.distill.optimizer import TrainingState, Weights
from lindep_onnx.errors import OutputError, UsageError
from lindep_onnx.files import replacing

Array: TypeAlias = NDArray[Any]

PARTS = ("weights", "best", "mean", "square")


class Checkpoint:
    """A file of states.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._written: dict[str, TrainingState] = {}

    def load(self, key: str, like: Weights) -> TrainingState | None:
        """The state of a training, None where the file is not there yet.

        Args:
            key: of the training.
            like: its weights: names, shapes and types.

        Raises:
            UsageError: the file is no checkpoint, or of another training.
        """
        if key in self._written or not self._path.exists():
            return self._written.get(key)
        try:
            with zipfile.ZipFile(self._path):  # `numpy.load` takes more than archives
                pass
            with np.load(self._path, allow_pickle=False) as data:
                keys = json.loads(str(data["keys"]))
                if key in keys:
                    self._written[key] = _read(data, keys.index(key), like)
        except UNREADABLE as error:
            raise UsageError(
                f"--checkpoint: {self._path} is not a checkpoint ({error}); delete it or name another file."
            ) from error
        if key not in self._written and not self._written:
            raise UsageError(
                f"--checkpoint: {self._path} is of another run (other model, data or options); delete it or name "
                "another file."
            )
        return self._written.get(key)

    def save(self, key: str, state: TrainingState) -> None:
        """Write a state beside those of earlier rounds.

        Raises:
            OutputError: the file cannot be written.
        """
        self._written[key] = state
        arrays: dict[str, Array] = {"keys": np.array(json.dumps(list(self._written)))}
        for number, one in enumerate(self._written.values()):
            arrays[f"{number}.numbers"] = np.array([one.averaged, one.norm, one.rate, one.steps, one.seconds])
            arrays[f"{number}.history"] = np.array(one.history, np.float64).reshape(-1, 3)
            for part in PARTS:
                for place, value in enumerate(getattr(one, part).values()):
                    arrays[f"{number}.{part}.{place}"] = value
        try:
            with replacing(self._path) as staged, staged.open("wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]
        except OSError as error:
            raise OutputError(
                f"--checkpoint: {self._path} cannot be written ({error.strerror or error}); name another file."
            ) from error


def _read(data: Mapping[str, Array], number: int, like: Weights) -> TrainingState:
    def weights(part: str) -> dict[str, Array]:
        found = {}
        for place, (name, value) in enumerate(like.items()):
            found[name] = data[f"{number}.{part}.{place}"]
            if found[name].shape != value.shape or found[name].dtype != value.dtype:
                raise ValueError(f"the size of {name!r} is another")
        return found

    averaged, norm, rate, steps, seconds = data[f"{number}.numbers"].tolist()
    history = tuple((int(step), trained, held_out) for step, trained, held_out in data[f"{number}.history"].tolist())
    if not history or not math.isfinite(rate):
        raise ValueError("it is incomplete")
    parts = {part: weights(part) for part in PARTS}
    return TrainingState(
        **parts, averaged=int(averaged), norm=norm, rate=rate, steps=int(steps), seconds=seconds, history=history
    )

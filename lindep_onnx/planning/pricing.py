"""What steps cost and save: curves of every kind of change, the path they make, and what plans on it would give."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from lindep_onnx.data.split import Part
from lindep_onnx.log import Log
from lindep_onnx.model.ir import Model
from lindep_onnx.moves.sensitivity import Measured, PerturbationRunner, consumer_sensitivity
from lindep_onnx.options import Config, several
from lindep_onnx.planning.builder import Builder, Workpiece
from lindep_onnx.planning.judge import Judge
from lindep_onnx.planning.path import Path, build_path
from lindep_onnx.planning.values import FrontierPoint
from lindep_onnx.runtime import layer_latency
from lindep_onnx.runtime.backend import Runtime
from lindep_onnx.runtime.layer_latency import LayerTimes, layers
from lindep_onnx.structure.steps import Curves, Saving

#: Shares of the path, and samples, that the frontier of errors is measured at.
FRONTIER, FRONTIER_SAMPLES = tuple(step / 10 for step in range(1, 10)), 64


def price(
    piece: Workpiece, saving: Saving, runtime: Runtime, log: Log, rates: Mapping[int, float] = MappingProxyType({})
) -> Curves:
    """The curves of every kind of change.

    Args:
        piece: the model, and what the data says about it.
        saving: what steps are priced by.
        runtime: what models run on.
        log: told how far it is.
        rates: by node, what a multiply-accumulate of it is worth.
    """
    structure, statistics = piece.structure, piece.known
    perturbations = PerturbationRunner(structure, piece.data, runtime)
    sensitivity = consumer_sensitivity(structure, statistics, perturbations, log)
    measured = Measured(structure, statistics, perturbations)
    found = {}
    for move in piece.moves:
        expected = move.price(structure, statistics, sensitivity, move.savings(structure, saving, rates))
        found[move.name] = tuple(measured.curves(move, expected, log))
    return found


def path_of(piece: Workpiece, curves: Curves, free: NDArray[np.bool_]) -> Path:
    """The path that curves make.

    Args:
        piece: the model.
        curves: by kind of change.
        free: (units,) bool, channels that cost nothing.
    """
    first = {move.name: np.zeros(move.count(piece.structure), dtype=bool) for move in piece.moves}
    return build_path(piece.structure, piece.moves, curves, {**first, "channels": free})


def frontier(path: Path, curves: Curves, builder: Builder, judge: Judge, log: Log) -> tuple[FrontierPoint, ...]:
    """What smaller and larger reductions would cost, measured with folds, which are cheap: a refit does better.

    Args:
        path: the plans.
        curves: what it was made of.
        builder: makes the plans.
        judge: compares them.
        log: told how far it is.
    """
    structure, samples = builder.piece.structure, builder.piece.data
    points = []
    with log.stage("frontier"):
        whole = structure.kept_parameters(np.zeros(structure.units, dtype=bool))
        for done, share in enumerate(FRONTIER):
            taken = builder.decide(path, round(share * len(path)), 1)
            candidate = builder.fitted(taken)
            found = judge.compare(candidate.model, samples.batches(Part.SELECT, limit=FRONTIER_SAMPLES))
            removed = candidate.decision.removed
            left = structure.kept_parameters(removed) / max(1, whole)
            expected = sum(
                float(np.append(0.0, curve.cost)[int(own.steps[curve.steps].sum())])
                for own in taken
                for curve in curves[own.move.name]
            )
            errors = (found.relative_error, found.agreement)
            points.append(FrontierPoint(left, *errors, int(removed.sum()), expected**0.5, found.decisions))
            log.progress("frontier", done + 1, len(FRONTIER))
    return tuple(points)


@dataclass(frozen=True)
class TimeTable:
    """Latencies of the original's layers by their widths, where a budget is on time.

    Attributes:
        original: the model whose time is to be beaten.
        model: the model that is changed, in whose layers time is priced.
        judge: knows the shapes that count.
        config: names the file of the table.
        runtime: what is timed.
        log: told of the stage.
    """

    original: Model
    model: Model
    judge: Judge
    config: Config
    runtime: Runtime
    log: Log

    @property
    def _table(self) -> LayerTimes:
        return self._read[0]

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of times that were read."""
        return self._read[1] if self._files else ()

    @property
    def _files(self) -> list[FilePath]:
        """What there is to read."""
        paths = [FilePath(name) for name in several(self.config.latency_table) if name is not None]
        return paths if len(paths) != 1 or paths[0].exists() else []

    @functools.cached_property
    def _read(self) -> tuple[LayerTimes, tuple[str, ...]]:
        if self._files:
            return layer_latency.load_times(self._files, self.original, self.judge.shapes)
        with self.log.stage("latency table"):
            table = layer_latency.measure_table(layers(self.model, self.judge.shapes), self.model.opset, self.runtime)
        if isinstance(self.config.latency_table, str):
            table.save(FilePath(self.config.latency_table))
        return table, ()

    def rates(self) -> dict[int, float]:
        """By node, seconds for each multiply-accumulate."""
        found = layers(self.model, self.judge.shapes)
        return {layer.node.index: self._table.rate(layer) for layer in found}

    def predicted(self, result: Model) -> float:
        """Share of the original's latency that the table expects of a result."""
        before = self._table.total(layers(self.original, self.judge.shapes))
        return self._table.total(layers(result, self.judge.shapes)) / max(before, 1e-12)

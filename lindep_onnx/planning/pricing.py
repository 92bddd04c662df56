"""What steps cost and save: curves of every kind of change, the path they make, and what plans on it would give."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path as FilePath

import numpy as np
from numpy.typing import NDArray

from lindep_onnx.data.split import Part
from lindep_onnx.log import Log
from lindep_onnx.model.ir import Model
from lindep_onnx.moves.sensitivity import Measured, PerturbationRunner, consumer_sensitivity
from lindep_onnx.options import Config, several
from lindep_onnx.planning.builder import Builder, Workpiece
from lindep_onnx.planning.judge import Judge
from lindep_onnx.planning.path import Path, build_path, free_first
from lindep_onnx.planning.values import FrontierPoint
from lindep_onnx.runtime import layer_latency
from lindep_onnx.runtime.backend import Runtime
from lindep_onnx.runtime.layer_latency import Layer, LayerTimes, layers
from lindep_onnx.runtime.node_times import dominant
from lindep_onnx.runtime.targets import WidthRule
from lindep_onnx.structure.steps import Curve, Curves, Saving
from lindep_onnx.structure.types import Structure
from lindep_onnx.structure.widths import along

#: Shares of the path, and samples, that the frontier of errors is measured at.
FRONTIER, FRONTIER_SAMPLES = tuple(step / 10 for step in range(1, 10)), 64


def price(piece: Workpiece, saving: Saving, runtime: Runtime, log: Log) -> Curves:
    """The curves of every kind of change.

    Args:
        piece: the model, and what the data says about it.
        saving: what steps are priced by.
        runtime: what models run on.
        log: told how far it is.
    """
    structure, statistics = piece.structure, piece.known
    perturbations = PerturbationRunner(structure, piece.data, runtime)
    sensitivity = consumer_sensitivity(structure, statistics, perturbations, log)
    measured = Measured(structure, statistics, perturbations)
    found = {}
    for move in piece.moves:
        expected = move.price(structure, statistics, sensitivity, move.savings(structure, saving))
        found[move.name] = tuple(measured.curves(move, expected, log))
    return found


def path_of(piece: Workpiece, curves: Curves, free: NDArray[np.bool_], rule: WidthRule) -> Path:
    """The path that curves make.

    Args:
        piece: the model.
        curves: by kind of change.
        free: (units,) bool, channels that cost nothing.
        rule: the multiples that widths keep to.
    """
    known = _free(piece, free)
    begun = {name: [free_first(curve, known[name]) for curve in own] for name, own in curves.items()}
    return build_path(piece.structure, piece.moves, begun, known, rule)


def _free(piece: Workpiece, channels: NDArray[np.bool_]) -> dict[str, NDArray[np.bool_]]:
    """By kind of change, (steps,) bool, what is free; of other kinds than channels nothing is."""
    nothing = {move.name: np.zeros(move.count(piece.structure), dtype=bool) for move in piece.moves}
    return {**nothing, "channels": channels}


def frontier(
    path: Path, curves: Curves, builder: Builder, judge: Judge, rule: WidthRule, times: TimeTable | None = None
) -> tuple[FrontierPoint, ...]:
    """What smaller and larger reductions would cost, measured with folds, which are cheap: a refit does better.

    Args:
        path: the plans.
        curves: what it was made of.
        builder: makes the plans.
        judge: compares them.
        rule: the multiples that widths keep to.
        times: what layers take; None where nobody asked for time.
    """
    structure, samples, log = builder.piece.structure, builder.piece.data, builder.log
    points = []
    with log.stage("frontier"):
        whole = structure.kept_parameters(np.zeros(structure.units, dtype=bool))
        for done, share in enumerate(FRONTIER):
            taken = builder.decide(path, round(share * len(path)), rule)
            candidate = builder.fitted(taken)
            found = judge.compare(candidate.model, samples.batches(Part.SELECT, limit=FRONTIER_SAMPLES))
            removed = candidate.decision.removed
            left = structure.kept_parameters(removed) / max(1, whole)
            expected = sum(
                float(np.append(0.0, curve.cost)[int(own.steps[curve.steps].sum())])
                for own in taken
                for curve in curves[own.move.name]
            )
            errors, gone = (found.relative_error, found.agreement), int(removed.sum())
            latency = None if times is None else times.share(structure, removed)
            points.append(FrontierPoint(left, *errors, gone, expected**0.5, found.decisions, latency))
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
        rule: the multiples that widths count in.
    """

    original: Model
    model: Model
    judge: Judge
    config: Config
    runtime: Runtime
    log: Log
    rule: WidthRule

    @property
    def _table(self) -> LayerTimes:
        return self._read[0]

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of times that were read, or measured; nothing as long as nobody needs them."""
        return self._read[1] if self._files or "_read" in vars(self) else ()

    @property
    def _files(self) -> list[FilePath]:
        """What there is to read."""
        paths = [FilePath(name) for name in several(self.config.latency_table) if name is not None]
        return paths if len(paths) != 1 or paths[0].exists() else []

    @functools.cached_property
    def _read(self) -> tuple[LayerTimes, tuple[str, ...]]:
        if self._files:
            return layer_latency.load_times(self._files, self.original, self.judge.shapes, self._block)
        with self.log.stage("latency table"):
            table = layer_latency.measure_table(self._layers, self.model.opset, self.runtime, self._block)
        if isinstance(self.config.latency_table, str):
            table.save(FilePath(self.config.latency_table))
        return table, layer_latency.notes(table, self.model, self.judge.shapes)

    def _block(self, layer: Layer) -> int:
        """Channels of one block of the kernel, whatever multiples are asked for."""
        rule = WidthRule(self.rule.target, self.rule.precision, blocks=True)
        return rule.steps(layer.node, layer.weight_shape).block

    def _predicted(self, layer: Layer, widths: tuple[int, int]) -> float:
        """Seconds of a layer at some widths; what nothing is known of takes what others do, by its work."""
        at = replace(layer, widths=(max(1, widths[0]), max(1, widths[1])))
        known = self._table.predict(at)
        return self._average * at.macs if known is None else known

    def priced(self, piece: Workpiece, curves: Curves, free: NDArray[np.bool_]) -> Curves:
        """Curves whose saving is seconds: what a layer takes at the widths that are left, all other groups whole.

        Args:
            piece: the model.
            curves: by kind of change, priced by a size.
            free: (units,) bool, channels that cost nothing; they are taken first.
        """
        known = _free(piece, free)
        found = {}
        for move in piece.moves:
            own = [free_first(curve, known[move.name]) for curve in curves[move.name]]
            if move.name == "channels":
                found[move.name] = [replace(curve, saving=self._saved(piece.structure, curve)) for curve in own]
            else:
                alone = self._average * move.savings(piece.structure, "macs")
                found[move.name] = [replace(curve, saving=np.cumsum(alone[curve.steps])) for curve in own]
        return found

    def _saved(self, structure: Structure, curve: Curve) -> NDArray[np.float64]:
        """(R,) seconds that a curve has saved after each step."""
        place = np.full(structure.units + 1, -1)  # the last entry answers for FROZEN
        place[curve.steps] = np.arange(len(curve.steps))
        saved = np.zeros(len(curve.steps))
        for layer, axes in self._layers_of(structure):
            gone = [
                np.zeros(len(saved), dtype=np.int64)
                if units is None
                else np.cumsum(np.bincount(place[units][place[units] >= 0], minlength=len(saved)))
                for units in axes
            ]
            if any(own[-1] for own in gone if len(own)):
                before = self._predicted(layer, layer.widths)
                at: dict[tuple[int, int], float] = {}
                for number, (less_in, less_out) in enumerate(zip(*gone, strict=True)):
                    left = layer.widths[0] - int(less_in), layer.widths[1] - int(less_out)
                    if left not in at:
                        at[left] = before - self._predicted(layer, left)
                    saved[number] += at[left]
        return np.maximum.accumulate(saved)

    def _layers_of(self, structure: Structure) -> list[tuple[Layer, tuple[NDArray[np.int64] | None, ...]]]:
        """Layers with the units along their input and output channels."""
        readers = {product.reader.node: product.reader for product in structure.products}
        found = []
        for layer in self._layers:
            reader = readers.get(layer.node.index)
            if reader is not None:
                places = (reader.tensor, reader.axis), (reader.output, reader.output_axis)
                found.append((layer, tuple(along(structure, tensor, axis) for tensor, axis in places)))
        return found

    def seconds(self, structure: Structure, removed: NDArray[np.bool_]) -> float:
        """What the layers of the model take once channels are gone.

        Args:
            structure: the traced model.
            removed: (units,) bool.
        """
        gone = np.append(removed, False)  # the last entry answers for FROZEN
        total = self._table.rest
        for layer, axes in self._layers_of(structure):
            less = [0 if units is None else int(gone[units].sum()) for units in axes]
            left = layer.widths[0] - less[0], layer.widths[1] - less[1]
            total += self._predicted(layer, left)
        return total

    def where(self) -> str:
        """A sentence on the layers that hold most of the time of the model."""
        seconds = {layer.node.name: self._predicted(layer, layer.widths) for layer in self._layers}
        named = ", ".join(f"{name} {share:.0%}" for name, share in dominant(seconds))
        return f"Of the time of the layers, most is in {named}." if named else ""

    def share(self, structure: Structure, removed: NDArray[np.bool_]) -> float:
        """The same as a share of what they take with all channels."""
        return self.seconds(structure, removed) / max(self.seconds(structure, np.zeros_like(removed)), 1e-12)

    @functools.cached_property
    def _average(self) -> float:
        """Seconds of a multiply-accumulate."""
        whole = self._table.total(self._layers) - self._table.rest
        return whole / max(1.0, sum(layer.macs for layer in self._layers))

    @functools.cached_property
    def _layers(self) -> list[Layer]:
        return layers(self.model, self.judge.shapes)

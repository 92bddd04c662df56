"""From a decision to a model: kinds of change in their order, fold, refit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lindep_onnx.calibration.carry import carried
from lindep_onnx.calibration.statistics import Statistics
from lindep_onnx.data.samples import Samples
from lindep_onnx.data.split import Part
from lindep_onnx.linalg.linear_map import ChannelMaps
from lindep_onnx.log import Log
from lindep_onnx.model.edit import GraphEdits, apply_edits
from lindep_onnx.model.ir import Model
from lindep_onnx.model.shapes import resolve
from lindep_onnx.moves.base import Composed, Move, Steps
from lindep_onnx.moves.channels import channel_edits
from lindep_onnx.options import Config
from lindep_onnx.planning.judge import Judge
from lindep_onnx.planning.path import Path, Taken
from lindep_onnx.planning.values import Candidate, Decision
from lindep_onnx.proofs.prove import Proof
from lindep_onnx.refit.sequential import Cut, refit
from lindep_onnx.runtime.backend import Runtime
from lindep_onnx.runtime.targets import WidthRule
from lindep_onnx.structure.placement import Placement
from lindep_onnx.structure.steps import ChannelSteps
from lindep_onnx.structure.trace import trace
from lindep_onnx.structure.types import Structure


@dataclass(frozen=True)
class Workpiece:
    """The model that a round changes, and what is known about it.

    Attributes:
        structure: the traced model.
        proof: what its weights alone prove.
        statistics: what the data says; None if it is too little to say anything.
        uncertain: (units,) bool, constant so far but without a margin, and not by proof.
        samples: the data; None if there are none.
        moves: the kinds of change, in the order in which they are carried out.
    """

    structure: Structure
    proof: Proof
    statistics: Statistics | None
    uncertain: NDArray[np.bool_]
    samples: Samples | None
    moves: tuple[Move, ...]

    @property
    def known(self) -> Statistics:
        """The statistics of a run that has data."""
        assert self.statistics is not None
        return self.statistics

    @property
    def data(self) -> Samples:
        """The samples of a run that has them."""
        assert self.samples is not None
        return self.samples


@dataclass(frozen=True)
class Builder:
    """Makes candidates.

    Attributes:
        piece: what they are made of.
        judge: chooses between a fold and a refit.
        config: the options.
        metadata: written into every model.
        runtime: what models run on.
        log: told of stages and how far they are.
    """

    piece: Workpiece
    judge: Judge
    config: Config
    metadata: str
    runtime: Runtime
    log: Log

    def decide(self, path: Path, count: int, rule: WidthRule) -> tuple[Taken, ...]:
        """As much of what is free on a path and of its first blocks as can be taken together."""
        return tuple(
            Taken(own.move, own.move.admissible(self.piece.structure, own.steps, own.order, rule), own.order)
            for own in path.at(count)
        )

    def bare(self, taken: tuple[Taken, ...]) -> Model:
        """The model without any fit: its size and its speed are those of the result."""
        return self._built(taken, None, "")[0]

    def fitted(self, taken: tuple[Taken, ...]) -> Candidate:
        """The model with the fits that need no run."""
        model, decision, _ = self._built(taken, self.piece.known, self.metadata)
        return Candidate(model, decision, "budgeted")

    def refitted(self, taken: tuple[Taken, ...], mode: str) -> Candidate:
        """The model with its survivors refitted to what the original computes.

        Args:
            taken: what is done.
            mode: "kernel" or "sequential", see `refit.sequential`.
        """
        model, decision, maps = self._built(taken, self.piece.known, self.metadata)
        if decision:
            model, notes = self._refit(model, maps, mode)
        else:
            notes = ()
        return Candidate(model, decision, "budgeted", mode, notes)

    def proven(self, steps: ChannelSteps) -> Candidate:
        """The model without what the weights prove redundant, or without a part of it."""
        with self.log.stage("rewrite"):
            edits = channel_edits(self.piece.structure, steps, self.piece.proof.statistics)
            model = apply_edits(self.piece.structure.model, edits, self.metadata)
        decision = Decision({"channels": steps}, self.piece.structure.units)
        return Candidate(model, decision, "proven")

    def lossless(self, steps: ChannelSteps, mode: str) -> Candidate:
        """The model without what costs nothing.

        Args:
            steps: what goes, with the folds that were found along with it.
            mode: "fold", "kernel" or "sequential".
        """
        structure = self.piece.structure
        with self.log.stage("reconstruct"):
            edits = channel_edits(structure, steps, self.piece.known.consumers)
        with self.log.stage("rewrite"):
            model = apply_edits(structure.model, edits, self.metadata)
        notes: tuple[str, ...] = ()
        mode = mode if mode in ("kernel", "sequential") else "fold"
        decision = Decision({"channels": steps}, structure.units)
        if mode != "fold" and decision:
            model, notes = self._refit(model, Placement(structure, steps.removed), mode)
        return Candidate(model, decision, "lossless", mode, notes)

    def with_weights(self, candidate: Candidate, weights: Mapping[str, NDArray[Any]]) -> Candidate:
        """The same with other values of stored tensors."""
        model = apply_edits(candidate.model, GraphEdits(constants=weights), self.metadata)
        return replace(candidate, model=model)

    # ---- one kind after the other ------------------------------------------------------------------------------

    def _built(
        self, taken: tuple[Taken, ...], statistics: Statistics | None, metadata: str
    ) -> tuple[Model, Decision, ChannelMaps]:
        """Carry out every kind on what the kinds before it left; without statistics nothing is fitted."""
        structure, model = self.piece.structure, None
        steps: dict[str, Steps] = {}
        maps: list[ChannelMaps] = []
        for own in taken:
            move = own.move
            wanted = own.steps
            if model is not None and wanted.any():
                smaller = self._traced(model)
                statistics = None if statistics is None else carried(statistics, structure, smaller, maps[-1])
                structure, wanted = smaller, move.refound(self.piece.structure, wanted, smaller)
            if not wanted.any():
                continue
            chosen = move.unfitted(structure, wanted)
            if statistics is not None:
                chosen = move.fit(structure, chosen, statistics)
            model = apply_edits(structure.model, move.apply(structure, chosen, statistics), metadata)
            steps[move.name] = move.unfitted(self.piece.structure, own.steps) if maps else chosen
            maps.append(move.maps(structure, chosen))
        decision = Decision(steps, self.piece.structure.units)
        return model or apply_edits(structure.model, GraphEdits(), metadata), decision, Composed(tuple(maps))

    def _traced(self, model: Model) -> Structure:
        config = self.config
        return trace(
            model, resolve(model), include=config.include, exclude=config.exclude, min_channels=config.min_channels
        )

    # ---- refit -------------------------------------------------------------------------------------------------

    def _refit(self, model: Model, maps: ChannelMaps, mode: str) -> tuple[Model, tuple[str, ...]]:
        how: Literal["kernel", "sequential"] = "kernel" if mode == "kernel" else "sequential"
        with self.log.stage("refit"):
            compressed = trace(model, resolve(model))
            cut = Cut(self.piece.structure, maps, compressed)
            found = refit(cut, self.piece.data, self.runtime, self.log, mode=how, seed=self.config.seed)
            notes = []
            if found.skipped:
                names = ", ".join(found.skipped[:3]) + (" and others" if len(found.skipped) > 3 else "")
                notes.append(f"{len(found.skipped)} layer(s) are too wide to be refitted and keep their fold: {names}.")
            if found.unplaced:
                names = ", ".join(found.unplaced[:3]) + (" and others" if len(found.unplaced) > 3 else "")
                notes.append(
                    f"{len(found.unplaced)} layer(s) keep their fold, for it is not known which axis counts samples "
                    f"there: {names}. --batch-axis NAME=AXIS says so for an input."
                )
            refitted = apply_edits(model, found.edits, self.metadata)
            if self.config.refit == "auto" and self._errs_less(model, refitted):
                return model, ("The folds err less than a refit, on the samples that choose; they were kept.",)
            return refitted, tuple(notes)

    def _errs_less(self, folded: Model, refitted: Model) -> bool:
        """Whether SELECT samples speak for the folds: where these are exact a refit only adds noise."""
        one, other = (self.judge.compare_part(model, Part.SELECT) for model in (folded, refitted))
        if one is None or other is None:
            return False
        return one.relative_error < other.relative_error and (one.agreement or 0.0) >= (other.agreement or 0.0)

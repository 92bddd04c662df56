"""What the model alone says: which channels may go at all, what their weights prove, and what keeps the others."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from lindep_onnx.log import Log
from lindep_onnx.model.cost import cost
from lindep_onnx.moves.prices import savings
from lindep_onnx.options import Config
from lindep_onnx.proofs.traced import TracedModel, load_and_trace
from lindep_onnx.report.build import refusal_reports
from lindep_onnx.report.values import RefusalReport, Size


@dataclass(frozen=True)
class RemovableGroup:
    """Channels that meet at common readers: any of them may go if the data allows it.

    Attributes:
        name: of the node that makes them.
        channels: how many there are.
        proven: those that the weights alone prove redundant.
        parameters: that would go with all of them.
        readers: names of the nodes that read them.
    """

    name: str
    channels: int
    proven: int
    parameters: int
    readers: tuple[str, ...]


@dataclass(frozen=True)
class Inspection:
    """What the model alone says.

    Attributes:
        model: its name.
        opset: version of the default operator set.
        size: what it costs, for one sample.
        removable: parameters that hang on channels that may go.
        groups: those channels, the largest part of the parameters first.
        refusals: what keeps the others, most channels first.
        notes: what was put right when the file was read.
    """

    model: str
    opset: int
    size: Size
    removable: int
    groups: tuple[RemovableGroup, ...]
    refusals: tuple[RefusalReport, ...]
    notes: tuple[str, ...]


def inspect_model(source: str | Path | onnx.ModelProto, config: Config, log: Log) -> Inspection:
    """Look at a model without any data.

    Args:
        source: the model.
        config: what may go.
        log: told of stages.

    Raises:
        ModelError: the model cannot be read, or is not well formed.
    """
    traced = load_and_trace(source, config, log)
    structure, stored = traced.structure, traced.stored
    found = cost(stored, {})
    everything = np.ones(structure.units, dtype=bool)
    left = structure.kept_parameters(everything) if structure.units else found.parameters
    return Inspection(
        model=traced.name,
        opset=stored.opset,
        size=Size(found.parameters, found.macs, found.bytes, found.channels, None, found.operators),
        removable=found.parameters - left,
        groups=_groups(traced),
        refusals=tuple(sorted(refusal_reports(structure), key=lambda entry: -entry.channels)),
        notes=stored.notes,
    )


def _groups(traced: TracedModel) -> tuple[RemovableGroup, ...]:
    structure, proven = traced.structure, traced.proof.steps.removed
    saved = savings(structure, "parameters")
    found = [
        RemovableGroup(
            group.name,
            len(group.units),
            int(proven[group.units].sum()),
            int(saved[group.units].sum()),
            tuple(structure.model.nodes[structure.consumers[index].readers[0].node].name for index in group.consumers),
        )
        for group in structure.groups
    ]
    return tuple(sorted(found, key=lambda group: -group.parameters))

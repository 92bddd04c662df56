"""What a model alone says, before any data: its structure, and what the weights prove about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx

from lindep_onnx.data.inputs import InputSpec
from lindep_onnx.errors import ModelError
from lindep_onnx.log import Log
from lindep_onnx.model.checks import as_model_error
from lindep_onnx.model.ir import Model, load
from lindep_onnx.model.precision import epsilon
from lindep_onnx.model.shapes import ShapeInfo, resolve
from lindep_onnx.model.working import working_copy
from lindep_onnx.options import Config
from lindep_onnx.proofs.prove import Proof, prove, ranges_of
from lindep_onnx.structure.trace import trace
from lindep_onnx.structure.types import Structure

#: Bytes that the activations of one run may take, were all of them kept, and the most samples in a run.
ACTIVATION_BYTES, MAX_BATCH = 1 << 27, 32


@dataclass(frozen=True)
class TracedModel:
    """What the model alone says.

    Attributes:
        name: of the file, or of the graph of a model in memory.
        structure: the traced model.
        ranges: lowest and highest value of inputs, where they are known.
        proof: what follows from the weights.
        stored: the model as it is stored; all else is about its working copy.
        config: the options so far.
    """

    name: str
    structure: Structure
    ranges: Mapping[str, tuple[float, float]]
    proof: Proof
    stored: Model
    config: Config

    @property
    def rounding(self) -> float:
        """Spacing of the numbers of a model that stores half precision; 0 for any other."""
        return epsilon(self.stored.proto)

    @property
    def as_run(self) -> Model:
        """The original as results are compared with it: as it is stored, or in single precision."""
        return self.structure.model if self.rounding else self.stored

    @property
    def channels(self) -> Structure:
        """The structure, by its name in version 0.1."""
        return self.structure


def load_and_trace(source: str | Path | onnx.ModelProto, config: Config, log: Log | None = None) -> TracedModel:
    """Everything that needs no data.

    Raises:
        ModelError: the model cannot be read, or is not well formed.
        UsageError: an input range names no input.
    """
    log = log or Log()
    with log.stage("load"):
        stored = load(source)
    with as_model_error(stored.proto, source):
        with log.stage("load"):
            model = working_copy(stored)
            shape_info = resolve(model)
        with log.stage("trace"):
            structure = trace(
                model, shape_info, include=config.include, exclude=config.exclude, min_channels=config.min_channels
            )
        with log.stage("prove"):
            ranges = ranges_of(model, config.input_range)
            proof = prove(structure, ranges, half=epsilon(stored.proto) > 0)
    name = Path(source).name if isinstance(source, (str, Path)) else model.proto.graph.name
    return TracedModel(name, structure, ranges, proof, stored, config)


def inputs_of(traced: TracedModel) -> list[InputSpec]:
    """What the model declares about its inputs.

    Raises:
        ModelError: an input is no tensor.
    """
    model, shape_info, ranges = traced.structure.model, traced.structure.shape_info, traced.ranges
    specs = []
    for value in model.proto.graph.input:
        if value.name in model.inputs:
            if not value.type.HasField("tensor_type"):
                kind = (value.type.WhichOneof("value") or "unknown type").removesuffix("_type")
                raise ModelError(
                    f"Input {value.name!r} is a {kind}, and calibration data holds tensors: use --proven-only, which "
                    "needs no data, or export the model with tensor inputs."
                )
            dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            shape = shape_info.shapes.get(value.name, ())
            specs.append(InputSpec(value.name, dtype, shape, ranges.get(value.name)))
    return specs


def samples_per_run(shape_info: ShapeInfo) -> int:
    """As many samples as keep the activations of one run within `ACTIVATION_BYTES`, unknown sizes counted as 1."""
    return max(1, min(MAX_BATCH, ACTIVATION_BYTES // max(1, shape_info.activation_bytes)))

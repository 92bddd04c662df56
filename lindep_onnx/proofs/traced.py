"""What a model alone says, before any data: its structure, and what the weights prove about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import onnx

from lindep_onnx.data.inputs import InputSpec
from lindep_onnx.errors import ModelError, UsageError
from lindep_onnx.log import Log
from lindep_onnx.model.checks import as_model_error
from lindep_onnx.model.ir import Model, Told, load
from lindep_onnx.model.precision import epsilon
from lindep_onnx.model.shapes import Shape, ShapeInfo, resolve
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


def load_and_trace(
    source: str | Path | onnx.ModelProto,
    config: Config,
    log: Log | None = None,
    shapes: Mapping[str, Shape] = MappingProxyType({}),
) -> TracedModel:
    """Everything that needs no data.

    Args:
        source: the model.
        config: the options.
        log: told of stages.
        shapes: shapes of inputs that are known better than from the file.

    Raises:
        ModelError: the model cannot be read, or is not well formed.
        UsageError: an option names no input.
    """
    log = log or Log()
    with log.stage("load"):
        stored = _told(load(source), config.batch_axis, shapes)
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


def _told(model: Model, axes: Mapping[str, int], shapes: Mapping[str, Shape]) -> Model:
    """The model with what is said of its inputs."""
    for name, axis in axes.items():
        if name not in model.inputs:
            raise UsageError(f"--batch-axis: the model has no input {name!r}; it has: {', '.join(model.inputs)}.")
        declared = next(value for value in model.proto.graph.input if value.name == name).type.tensor_type
        rank = len(declared.shape.dim)
        if declared.HasField("shape") and axis >= rank:
            raise UsageError(f"--batch-axis: input {name!r} has {rank} axes, none of which is number {axis}.")
    told = Told({name: None if axis < 0 else axis for name, axis in axes.items()}, shapes)
    return replace(model, told=told) if axes or shapes else model


def with_ranks(
    source: str | Path | onnx.ModelProto, traced: TracedModel, found: Mapping[str, int], log: Log
) -> TracedModel:
    """The model traced again, where it leaves open what its inputs look like and the data says so.

    Args:
        source: the model.
        traced: the model without that knowledge.
        found: number of axes of what each input is fed with.
        log: told of stages.
    """
    known = traced.structure.shape_info.shapes
    shapes: dict[str, Shape] = {
        name: tuple(f"{name}_axis_{axis}" for axis in range(rank)) for name, rank in found.items() if name not in known
    }
    return load_and_trace(source, traced.config, log, shapes) if shapes else traced


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
            shape, axis = shape_info.shapes.get(value.name), model.batch_axes[value.name]
            specs.append(InputSpec(value.name, dtype, shape, ranges.get(value.name), axis))
    return specs


def samples_per_run(shape_info: ShapeInfo) -> int:
    """As many samples as keep the activations of one run within `ACTIVATION_BYTES`, unknown sizes counted as 1."""
    return max(1, min(MAX_BATCH, ACTIVATION_BYTES // max(1, shape_info.activation_bytes)))

"""Distillation in PyTorch, to hold `distill.train` against: the usual Adam, as many steps on the same samples.

A small interpreter runs the nodes of an ONNX graph with PyTorch's functions, weights being leaves of autograd. It knows
the operators of convolutional classifiers and says which one it lacks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import onnx
import torch
import torch.nn.functional as functional
from numpy.typing import NDArray
from torch import Tensor

from lindep_onnx.distill.augment import Augment
from lindep_onnx.distill.train import trainable
from lindep_onnx.model.ir import Model
from lindep_onnx.model.node import Node
from lindep_onnx.model.shapes import ShapeInfo, resolve

Array: TypeAlias = NDArray[Any]

RATES, BATCH = (3e-4, 1e-4), 32
#: Shapes of a model for the sizes it was run with; the model is held so that its id stays its own.
_RESOLVED: dict[Any, tuple[Model, ShapeInfo]] = {}


def evaluate(model: Model, feeds: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> list[Tensor]:
    """The outputs of a model.

    Args:
        model: float32, two spatial axes.
        feeds: by input name.
        weights: tensors to use instead of the stored ones.

    Raises:
        NotImplementedError: an operator is not known here.
    """
    shapes = {name: tuple(value.shape) for name, value in feeds.items()}
    key = id(model), *shapes.items()
    if key not in _RESOLVED:
        _RESOLVED[key] = model, resolve(model, shapes)
    shape_info = _RESOLVED[key][1]
    values: dict[str, Tensor] = {**feeds, **weights}
    for node in model.nodes:
        if any(name in shape_info.constants for name in node.outputs):
            continue
        inputs = [_input(name, values, shape_info) for name in node.inputs]
        values[node.outputs[0]] = _output(node, inputs, shape_info)
    return [values[name] for name in model.outputs]


def distil(
    teacher: Model,
    student: Model,
    images: NDArray[np.float32],
    held_out: NDArray[np.float32],
    *,
    steps: int,
    augment: Augment | None = None,
) -> onnx.ModelProto:
    """A model that is trained to put out what another does: Adam, cosine schedule, squared error.

    As usual, the rate is chosen among `RATES` by what the result makes of images that it was not trained on.

    Args:
        teacher: the original; one input, one output.
        student: the smaller model.
        images: what to train on, samples first.
        held_out: others, to choose the rate by.
        steps: of the optimiser, for each rate.
        augment: makes other inputs of those of a step; None for none.
    """
    name = student.inputs[0]
    wanted = _outputs(teacher, name, held_out, {})
    best: tuple[float, dict[str, Array]] = np.inf, {}
    for rate in RATES:
        found = _trained(teacher, student, images, rate, steps, augment)
        with torch.no_grad():
            weights = {key: torch.from_numpy(value) for key, value in found.items()}
            loss = float(_loss(_outputs(student, name, held_out, weights), wanted, wanted.var(0)))
        if loss < best[0] or not best[1]:
            best = loss, found
    trained = onnx.ModelProto()
    trained.CopyFrom(student.proto)
    for tensor in trained.graph.initializer:
        if tensor.name in best[1]:
            tensor.CopyFrom(onnx.numpy_helper.from_array(best[1][tensor.name], tensor.name))
    return trained


def _trained(
    teacher: Model, student: Model, images: NDArray[np.float32], rate: float, steps: int, augment: Augment | None
) -> dict[str, Array]:
    name = student.inputs[0]
    weights = {key: torch.tensor(student.stored[key], requires_grad=True) for key in trainable(student, ())}
    targets = _outputs(teacher, name, images, {})
    optimiser = torch.optim.Adam(weights.values(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    rng = np.random.default_rng(0)
    for _ in range(steps):
        chosen = rng.choice(len(images), BATCH, replace=False)
        batch, wanted = images[chosen], targets[chosen]
        if augment is not None:
            batch = np.ascontiguousarray(augment({name: batch}, rng)[name])
            wanted = _outputs(teacher, name, batch, {})
        (found,) = evaluate(student, {name: torch.from_numpy(batch)}, weights)
        loss = _loss(found, wanted, targets.var(0))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return {key: value.detach().numpy() for key, value in weights.items()}


def _loss(found: Tensor, wanted: Tensor, variance: Tensor) -> Tensor:
    return ((found - wanted).square().mean(0) / variance).mean()


def _outputs(model: Model, name: str, images: NDArray[np.float32], weights: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad():
        parts = np.array_split(images, -(-len(images) // 128))
        return torch.cat([evaluate(model, {name: torch.from_numpy(part)}, weights)[0] for part in parts])


def _input(name: str, values: Mapping[str, Tensor], shape_info: ShapeInfo) -> Any:
    if not name or name in values:
        return values.get(name)
    return torch.from_numpy(np.array(shape_info.constants[name]))


def _output(node: Node, inputs: list[Any], shape_info: ShapeInfo) -> Tensor:
    x, a = inputs[0], node.attributes
    if node.op == "Conv":
        pads = list(a.get("pads", [0] * 4))
        x = functional.pad(x, (pads[1], pads[3], pads[0], pads[2]))
        bias = inputs[2] if len(inputs) > 2 else None
        return functional.conv2d(
            x, inputs[1], bias, tuple(a.get("strides", (1, 1))), 0, tuple(a.get("dilations", (1, 1))), a.get("group", 1)
        )
    if node.op == "Gemm":
        left, right = (x.T if a.get("transA", 0) else x), (inputs[1].T if a.get("transB", 0) else inputs[1])
        product = a.get("alpha", 1.0) * left @ right
        return product + a.get("beta", 1.0) * inputs[2] if len(inputs) > 2 else product
    if node.op == "BatchNormalization":
        return functional.batch_norm(x, inputs[3], inputs[4], inputs[1], inputs[2], False, 0.0, a.get("epsilon", 1e-5))
    if node.op == "MaxPool":
        return functional.max_pool2d(x, tuple(a["kernel_shape"]), tuple(a.get("strides", (1, 1))))
    if node.op == "Slice":
        for begin, end, axis, step in zip(*(value.tolist() for value in _bounds(inputs)), strict=True):
            x = x.index_select(axis, torch.arange(x.shape[axis])[begin:end:step])
        return x
    if node.op == "Pad":
        pads, rank = inputs[1].tolist(), x.ndim
        return functional.pad(x, [pads[side * rank + axis] for axis in reversed(range(rank)) for side in (0, 1)])
    if node.op in ("Flatten", "Reshape"):
        return x.reshape([int(size) for size in shape_info.shapes[node.outputs[0]]])
    plain = {
        "Relu": lambda: torch.relu(x),
        "Clip": lambda: torch.clamp(x, *(None if bound is None else float(bound) for bound in inputs[1:])),
        "Add": lambda: x + inputs[1],
        "Mul": lambda: x * inputs[1],
        "GlobalAveragePool": lambda: x.mean((2, 3), keepdim=True),
        "Identity": lambda: x,
    }
    if node.op not in plain:
        raise NotImplementedError(f"{node.name}: {node.op} is not known to torch_rival.py")
    return plain[node.op]()


def _bounds(inputs: list[Any]) -> list[Tensor]:
    starts, ends = inputs[1], inputs[2]
    axes = inputs[3] if len(inputs) > 3 and inputs[3] is not None else torch.arange(len(starts))
    steps = inputs[4] if len(inputs) > 4 and inputs[4] is not None else torch.ones_like(starts)
    return [starts, ends, axes, steps]

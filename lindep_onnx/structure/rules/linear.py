"""Operators that multiply by a weight: where channels start, and where their weight can move to others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lindep_onnx.model.ir import Node
from lindep_onnx.structure import reasons
from lindep_onnx.structure.edit_builder import EditBuilder
from lindep_onnx.structure.rules.registry import rewrites, traces
from lindep_onnx.structure.tracer import Tracer
from lindep_onnx.structure.types import Atoms, Bias, ConsumerNode, Labelling, Product, Window

__all__: list[str] = []


_LETTERS = ord("A")  # the capital ones name batch axes


@traces("Conv")
def convolution(node: Node, tracer: Tracer) -> None:
    """Starts output channels; depthwise passes its input channels through."""
    data, weight = node.inputs[0], node.inputs[1]
    kernel = tracer.constant(weight)
    shape = tracer.shape(data)
    if kernel is None or shape is None:
        tracer.refuse(node, reasons.RUNTIME_WEIGHT)
        return
    group = int(node.attributes.get("group", 1))
    axes = tracer.axes(data)
    tracer.freeze_tensor(data, reasons.WINDOWED, node, [axis for axis in axes if axis > 1])
    outputs = {axis: atoms for axis, atoms in axes.items() if axis == 0}
    bias = _convolution_bias(node, tracer)
    window = _window(node, tracer, kernel.shape[2:])
    reader = _convolution_reader(node, window, bias)
    tracer.products.append(Product(weight, 1, 1, 0, group, 1.0, reader, window))
    if group > 1 and kernel.shape[1] == 1:
        _depthwise(node, tracer, group, kernel.shape[0] // group)
        return
    made = tracer.produce(node, kernel.shape[0])
    columns = axes.get(1)
    rows = _by_group(made, group, node, tracer)
    given = None if columns is None else _by_group(columns, group, node, tracer)
    tracer.claim(node, 1, {0: rows} if given is None else {0: rows, 1: given})
    if node.input(2):
        if bias is None:
            tracer.freeze(made, reasons.RUNTIME_WEIGHT, node)
        tracer.claim(node, 2, {0: made})
    tracer.label_axes(node.outputs[0], {**outputs, 1: made})
    if columns is not None:
        affine = bias is not None and not any(map(any, window.pads))
        tracer.consumer(weight, 1, 0, reader, affine, blocks=group)


def _by_group(atoms: Atoms, group: int, node: Node, tracer: Tracer) -> Atoms:
    """(groups, channels of each), aligned, since groups stay of equal size; as it is where there is one group."""
    if group == 1:
        return atoms
    rows = atoms.reshape(group, -1)
    tracer.align(rows)
    if rows.shape[1] == 1:
        tracer.freeze(atoms, reasons.SINGLE, node)
    return rows


def _depthwise(node: Node, tracer: Tracer, group: int, multiplier: int) -> None:
    """Each input channel and the `multiplier` output channels that it alone makes are one unit."""
    data = node.inputs[0]
    axes = tracer.axes(data)
    given = axes.get(1)
    made = tracer.produce(node, group * multiplier)
    if given is None:
        tracer.freeze(made, reasons.FROZEN_INPUT, node)
    else:
        tracer.link(made.reshape(group, multiplier), given[:, None])
    tracer.claim(node, 1, {0: made})
    if node.input(2) and tracer.constant(node.input(2)) is None:
        tracer.freeze(made, reasons.RUNTIME_WEIGHT, node)
    tracer.claim(node, 2, {0: made})
    passing = {axis: atoms for axis, atoms in axes.items() if axis == 0}
    tracer.label_axes(node.outputs[0], {**passing, 1: made})


def _convolution_bias(node: Node, tracer: Tracer) -> Bias | None:
    """The bias of the node, or the mean of a BatchNormalization that alone reads a node without one."""
    name = node.input(2)
    if name:
        return None if tracer.constant(name) is None else Bias(node.index, 2, name)
    readers = tracer.model.consumers.get(node.outputs[0], ())
    if len(readers) == 1 and readers[0].op == "BatchNormalization" and node.outputs[0] not in tracer.model.outputs:
        mean = readers[0].input(3)
        if tracer.constant(mean) is not None and not readers[0].attributes.get("training_mode", 0):
            return Bias(readers[0].index, 3, mean, -1.0)
    return Bias(node.index, 2)


def _window(node: Node, tracer: Tracer, kernel: Sequence[int]) -> Window:
    spatial = len(kernel)
    strides = tuple(node.attributes.get("strides", [1] * spatial))
    dilations = tuple(node.attributes.get("dilations", [1] * spatial))
    return Window(tuple(kernel), strides, dilations, _pads(node, tracer, kernel, strides, dilations))


def _convolution_reader(node: Node, window: Window, bias: Bias | None) -> ConsumerNode:
    # A window of one position skips the others; wider windows are taken to see all of them.
    single = all(size == 1 for size in window.kernel) and not any(map(any, window.pads))
    skipped = window.strides if single and any(step > 1 for step in window.strides) else ()
    return ConsumerNode(node.index, node.inputs[0], 1, node.outputs[0], 1, strides=skipped, bias=bias)


def _pads(
    node: Node, tracer: Tracer, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    spatial = len(kernel)
    mode = node.attributes.get("auto_pad", "NOTSET")
    if mode == "VALID":
        return ((0, 0),) * spatial
    if mode == "NOTSET":
        flat = node.attributes.get("pads", [0] * (2 * spatial))
        return tuple((int(flat[axis]), int(flat[axis + spatial])) for axis in range(spatial))
    pads = []
    shape = tracer.shape(node.inputs[0]) or ()
    for axis in range(spatial):
        reach = (kernel[axis] - 1) * dilations[axis] + 1
        size = shape[axis + 2]
        if isinstance(size, int):
            total = max(0, (-(-size // strides[axis]) - 1) * strides[axis] + reach - size)
        else:
            total = reach - 1  # the size is unknown: at most this much
        small, large = total // 2, total - total // 2
        pads.append((small, large) if mode == "SAME_UPPER" else (large, small))
    return tuple(pads)


@rewrites("Conv")
def convolution_groups(node: Node, builder: EditBuilder) -> None:
    """The `group` of a depthwise convolution follows its input channels."""
    if node.attributes.get("group", 1) > 1 and builder.shape(node.inputs[1])[1] == 1:
        kept = builder.kept(node.inputs[0])
        if 1 in kept:
            builder.set_attribute(node, "group", int(kept[1].sum()))


@traces("ConvTranspose")
def transposed_convolution(node: Node, tracer: Tracer) -> None:
    """Starts output channels; the weight has its input channels first."""
    data, weight = node.inputs[0], node.inputs[1]
    kernel = tracer.constant(weight)
    if kernel is None:
        tracer.refuse(node, reasons.RUNTIME_WEIGHT)
        return
    group = int(node.attributes.get("group", 1))
    axes = tracer.axes(data)
    reader = ConsumerNode(node.index, data, 1, node.outputs[0], 1, bias=_convolution_bias(node, tracer))
    window = _transposed_window(node, tracer, kernel.shape[2:])
    if window is not None:
        tracer.products.append(Product(weight, 1, 0, 1, group, 1.0, reader, window))
    tracer.freeze_tensor(data, reasons.WINDOWED, node, [axis for axis in axes if axis > 1])
    made = tracer.produce(node, kernel.shape[1] * group)
    columns = axes.get(1)
    rows = _by_group(made, group, node, tracer)
    given = None if columns is None else _by_group(columns, group, node, tracer)
    tracer.claim(node, 1, {1: rows} if given is None else {1: rows, 0: given})
    if node.input(2) and tracer.constant(node.input(2)) is None:
        tracer.freeze(made, reasons.RUNTIME_WEIGHT, node)
    tracer.claim(node, 2, {0: made})
    tracer.label_axes(node.outputs[0], {1: made})
    if columns is not None:
        # Its border mixes fewer taps, so that a constant channel is not a constant of the output.
        tracer.consumer(weight, 0, 1, reader, affine=False, blocks=group)


def _transposed_window(node: Node, tracer: Tracer, kernel: Sequence[int]) -> Window | None:
    """None where the padding follows from an output size that is only known at run time."""
    spatial = len(kernel)
    strides = tuple(node.attributes.get("strides", [1] * spatial))
    dilations = tuple(node.attributes.get("dilations", [1] * spatial))
    if node.attributes.get("auto_pad", "NOTSET") != "NOTSET" or "output_shape" in node.attributes:
        return None
    flat = node.attributes.get("pads", [0] * (2 * spatial))
    pads = tuple((int(flat[axis]), int(flat[axis + spatial])) for axis in range(spatial))
    return Window(tuple(kernel), strides, dilations, pads, transposed=True)


@traces("Gemm")
def gemm(node: Node, tracer: Tracer) -> None:
    """Y = alpha A B + beta C with a constant B."""
    data, weight = node.inputs[0], node.inputs[1]
    matrix = tracer.constant(weight)
    if matrix is None:
        tracer.refuse(node, reasons.RUNTIME_WEIGHT)
        return
    inputs, outputs = (1, 0) if node.attributes.get("transB", 0) else (0, 1)
    axes = tracer.axes(data)
    made = tracer.produce(node, matrix.shape[outputs])
    passing = {0: axes[0]} if 0 in axes else {}
    columns = axes.get(1)
    if node.attributes.get("transA", 0):
        tracer.freeze_tensor(data, reasons.TRANSPOSED, node)
        columns, passing = None, {}
    tracer.claim(node, 1, {outputs: made} if columns is None else {outputs: made, inputs: columns})
    bias = _gemm_bias(node, tracer, made, passing)
    reader = ConsumerNode(node.index, data, 1, node.outputs[0], 1, bias=bias)
    if not node.attributes.get("transA", 0):
        alpha = float(node.attributes.get("alpha", 1.0))
        tracer.products.append(Product(weight, 1, inputs, outputs, 1, alpha, reader, None))
    tracer.label_axes(node.outputs[0], {**passing, 1: made})
    if columns is not None:
        tracer.consumer(weight, inputs, outputs, reader, affine=bias is not None)


def _gemm_bias(node: Node, tracer: Tracer, made: Atoms, passing: dict[int, Atoms]) -> Bias | None:
    """Label C, which broadcasts to (M, N), and say whether it can take an addition of shape (N,)."""
    alpha, beta = float(node.attributes.get("alpha", 1.0)), float(node.attributes.get("beta", 1.0))
    name = node.input(2)
    if not name:
        return Bias(node.index, 2, "", alpha / beta) if beta else None
    value = tracer.constant(name)
    if value is None:
        tracer.freeze(made, reasons.RUNTIME_WEIGHT, node)
        tracer.freeze_tensor(name, reasons.RUNTIME_WEIGHT, node)
        return None
    rank = value.ndim
    wanted = {}
    if rank >= 1 and value.shape[-1] > 1:
        wanted[rank - 1] = made
    if rank == 2 and value.shape[0] > 1 and 0 in passing:
        wanted[0] = passing[0]
    tracer.claim(node, 2, wanted)
    rows = rank == 2 and value.shape[0] > 1
    return Bias(node.index, 2, name, alpha / beta) if beta and not rows else None


@traces("MatMul")
def matmul(node: Node, tracer: Tracer) -> None:
    """A product with a constant matrix on either side, or of two computed tensors."""
    left, right = (tracer.constant(name) for name in node.inputs[:2])
    if left is None and right is None:
        _computed_product(node, tracer)
    elif left is not None and right is not None:
        tracer.refuse(node, reasons.RUNTIME_WEIGHT)
    elif right is not None:
        _constant_product(node, tracer, position=1, mixed=-1)
    else:
        _constant_product(node, tracer, position=0, mixed=-2)


def _constant_product(node: Node, tracer: Tracer, position: int, mixed: int) -> None:
    weight, data, result = node.inputs[position], node.inputs[1 - position], node.outputs[0]
    matrix = tracer.shape_info.constants[weight]
    rank = tracer.rank(data)
    if matrix.ndim != 2 or rank is None or rank < 2:
        reason = (
            reasons.WEIGHT_RANK if matrix.ndim > 2 else reasons.UNKNOWN_DATA_RANK if rank is None else reasons.VECTOR
        )
        tracer.refuse(node, reason)
        if matrix.ndim > 1:
            tracer.freeze(tracer.produce(node, matrix.shape[-1 if position else -2]), reason, node)
        return
    inputs, outputs = (0, 1) if position == 1 else (1, 0)
    axis = rank + mixed
    axes = tracer.axes(data)
    made = tracer.produce(node, matrix.shape[outputs])
    columns = axes.get(axis)
    tracer.claim(node, position, {outputs: made} if columns is None else {outputs: made, inputs: columns})
    tracer.label_axes(result, {**{other: atoms for other, atoms in axes.items() if other != axis}, axis: made})
    reader = ConsumerNode(node.index, data, axis, result, axis, bias=_following_bias(node, tracer, axis))
    tracer.products.append(Product(weight, position, inputs, outputs, 1, 1.0, reader, None))
    if columns is not None:
        tracer.consumer(weight, inputs, outputs, reader, affine=True)


@traces("Einsum")
def einsum(node: Node, tracer: Tracer) -> None:
    """A computed tensor times a constant matrix, whose other indices pass in their order, or times another one."""
    inputs, arrow, result = node.attributes["equation"].replace(" ", "").partition("->")
    terms = inputs.split(",")
    constant = [tracer.constant(name) is not None for name in node.inputs]
    odd = "." in inputs or any(len(set(term)) < len(term) for term in (*terms, result))
    if len(terms) != 2 or not arrow or odd or [len(term) for term in terms] != [tracer.rank(n) for n in node.inputs]:
        tracer.refuse(node, reasons.EQUATION)
        return
    if not any(constant):
        _contraction(node, tracer, terms, result)
        return
    position = constant.index(True)
    weight, data = terms[position], terms[1 - position]
    if set(weight) <= set(data) and data == result and not all(constant):
        _einsum_scale(node, tracer, position, weight, data)
        return
    summed, made = set(weight) & set(data) - set(result), set(weight) & set(result) - set(data)
    if all(constant) or len(weight) != 2 or len(summed) != 1 or len(made) != 1:
        tracer.refuse(node, reasons.EQUATION)
        return
    (one,), (other,) = summed, made
    if data.replace(one, "") != result.replace(other, ""):
        tracer.refuse(node, reasons.EQUATION)
        return
    axis, new, name = data.index(one), result.index(other), node.inputs[1 - position]
    outputs = weight.index(other)
    atoms = tracer.produce(node, tracer.shape_info.constants[node.inputs[position]].shape[outputs])
    axes = tracer.axes(name)
    columns = axes.get(axis)
    wanted = {outputs: atoms} if columns is None else {outputs: atoms, 1 - outputs: columns}
    tracer.claim(node, position, wanted)
    passing = {result.index(data[place]): own for place, own in axes.items() if place != axis}
    tracer.label_axes(node.outputs[0], {**passing, new: atoms})
    reader = ConsumerNode(node.index, name, axis, node.outputs[0], new, bias=_following_bias(node, tracer, new))
    tracer.products.append(Product(node.inputs[position], position, 1 - outputs, outputs, 1, 1.0, reader, None))
    if columns is not None:
        tracer.consumer(node.inputs[position], 1 - outputs, outputs, reader, affine=True)


def _einsum_scale(node: Node, tracer: Tracer, position: int, weight: str, data: str) -> None:
    """Every element of a computed tensor times one of a constant."""
    axes = tracer.axes(node.inputs[1 - position])
    tracer.claim(node, position, {weight.index(data[axis]): own for axis, own in axes.items() if data[axis] in weight})
    tracer.label_axes(node.outputs[0], axes)


def _following_bias(node: Node, tracer: Tracer, axis: int) -> Bias:
    """The constant of an Add right behind the product, or a new Add."""
    result = node.outputs[0]
    shape = tracer.shape(result) or ()
    readers = tracer.model.consumers.get(result, ())
    if len(readers) == 1 and readers[0].op == "Add" and result not in tracer.model.outputs:
        add = readers[0]
        place = 1 if add.inputs[0] == result else 0
        value = tracer.constant(add.inputs[place])
        behind = len(shape) - axis
        if value is not None and value.ndim >= behind and value.shape[value.ndim - behind] == shape[axis]:
            return Bias(add.index, place, add.inputs[place])
    return Bias(None)


def _computed_product(node: Node, tracer: Tracer) -> None:
    """The last axis of the left operand meets the last but one of the right."""
    ranks = [tracer.rank(name) for name in node.inputs]
    if None in ranks or min(rank for rank in ranks if rank is not None) < 2:
        tracer.refuse(node, reasons.CONTRACTED)
        return
    batch = [chr(_LETTERS + axis) for axis in range(max(rank for rank in ranks if rank is not None) - 2)]
    left, right = (
        (*batch[len(batch) + 2 - (rank or 2) :], *own) for rank, own in zip(ranks, ("ij", "jk"), strict=True)
    )
    _contraction(node, tracer, (left, right), (*batch, "i", "k"))


def _contraction(node: Node, tracer: Tracer, terms: Sequence[Sequence[str]], result: Sequence[str]) -> None:
    """Computed tensors are multiplied: axes by name, those of no other operand pass, the others stay.

    Nothing takes over what a removed channel of a contracted axis carried: both factors change with the data.
    """
    passing = []
    for name, term, other in zip(node.inputs, terms, terms[::-1], strict=True):
        for label in tracer.labels.get(name, ()):
            if term[label.cut] in other or term[label.cut] not in result:
                tracer.freeze(label.atoms.ravel(), reasons.CONTRACTED, node)
                continue
            if any(term[axis] not in result for axis in label.axes):
                label = Labelling((label.cut,), tracer.flat(label), label.cut)
            # Ids may vary over batch axes: the channels of each head.
            places = [result.index(term[axis]) for axis in label.axes]
            atoms = np.transpose(label.atoms, np.argsort(places))
            passing.append(Labelling(tuple(sorted(places)), atoms, result.index(term[label.cut])))
    tracer.label(node.outputs[0], passing)

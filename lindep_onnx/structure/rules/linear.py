"""Operators that multiply by a weight: where channels start, and where their weight can move to others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lindep_onnx.model.node import Node
from lindep_onnx.model.weighted import Weighted, Window, pads_implicitly, weighted, window_of
from lindep_onnx.structure import reasons
from lindep_onnx.structure.edit_builder import EditBuilder
from lindep_onnx.structure.rules.registry import rewrites, traces
from lindep_onnx.structure.tracer import Tracer
from lindep_onnx.structure.types import Atoms, Bias, ConsumerNode, Product

_LETTERS = ord("A")  # the capital ones name batch axes


@traces("Conv", "ConvTranspose")
def convolution(node: Node, tracer: Tracer) -> None:
    """Starts output channels; depthwise passes its input channels through."""
    data, layout = node.inputs[0], weighted(node)
    kernel, shape = tracer.constant(node.inputs[1]), tracer.shape(data)
    if kernel is None or layout is None or (shape is None and not layout.transposed):
        tracer.refuse(node, reasons.RUNTIME_WEIGHT)
        return
    axes = tracer.axes(data)
    tracer.freeze_tensor(data, reasons.WINDOWED, node, [axis for axis in axes if axis > 1])
    unknown = layout.transposed and pads_implicitly(node)
    window = None if unknown else window_of(node, kernel.shape[2:], (shape or ())[2:])
    bias, strides = _convolution_bias(node, tracer), _read_strides(window)
    reader = ConsumerNode(node.index, data, 1, node.outputs[0], 1, strides=strides, bias=bias)
    product = _product(node, 1, layout, reader, window)
    if window is not None:
        tracer.products.append(product)
    if layout.depthwise(kernel.shape) and not layout.transposed:
        _depthwise(node, tracer, layout.group)
        return
    made = tracer.produce(node, layout.widths(kernel.shape)[1])
    rows, columns = _by_group(made, layout.group, node, tracer), axes.get(1)
    columns = None if columns is None else _by_group(columns, layout.group, node, tracer)
    _claim_weight(tracer, node, product, rows, columns)
    _finish(node, tracer, axes, made)
    if columns is not None:
        # The border of a ConvTranspose mixes fewer taps, so that a constant channel is not a constant of the output.
        affine = bias is not None and window is not None and not window.padded and not window.transposed
        tracer.consumer(product, affine)


def _product(
    node: Node, position: int, layout: Weighted, reader: ConsumerNode, window: Window | None = None
) -> Product:
    weight, axes = node.inputs[position], (layout.inputs, layout.outputs)
    return Product(weight, position, *axes, layout.group, layout.scale, reader, window)


def _claim_weight(tracer: Tracer, node: Node, product: Product, made: Atoms, columns: Atoms | None) -> None:
    given = {} if columns is None else {product.inputs: columns}
    tracer.claim(node, product.position, {product.outputs: made, **given})


def _finish(node: Node, tracer: Tracer, axes: Mapping[int, Atoms], made: Atoms) -> None:
    """Slice the bias of a convolution like the channels made, which the output has behind the batch."""
    if node.input(2) and tracer.constant(node.input(2)) is None:
        tracer.freeze(made, reasons.RUNTIME_WEIGHT, node)
    tracer.claim(node, 2, {0: made})
    tracer.label_axes(node.outputs[0], {axis: atoms for axis, atoms in axes.items() if axis == 0} | {1: made})


def _by_group(atoms: Atoms, group: int, node: Node, tracer: Tracer) -> Atoms:
    """(groups, channels of each), aligned, since groups stay of equal size; as it is where there is one group."""
    if group == 1:
        return atoms
    rows = atoms.reshape(group, -1)
    tracer.align(rows)
    if rows.shape[1] == 1:
        tracer.freeze(atoms, reasons.SINGLE, node)
    return rows


def _depthwise(node: Node, tracer: Tracer, group: int) -> None:
    """Each input channel and the output channels that it alone makes are one unit."""
    axes = tracer.axes(node.inputs[0])
    made = tracer.produce(node, len(tracer.shape_info.constants[node.inputs[1]]))
    if 1 in axes:
        tracer.link(made.reshape(group, -1), axes[1][:, None])
    else:
        tracer.freeze(made, reasons.FROZEN_INPUT, node)
    tracer.claim(node, 1, {0: made})
    _finish(node, tracer, axes, made)


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


def _read_strides(window: Window | None) -> tuple[int, ...]:
    """A window of one position skips the others; wider windows are taken to see all of them."""
    single = window is not None and not window.transposed and not window.padded and set(window.kernel) <= {1}
    return window.strides if window is not None and single and max(window.strides, default=1) > 1 else ()


@rewrites("Conv")
def convolution_groups(node: Node, builder: EditBuilder) -> None:
    """The `group` of a depthwise convolution follows its input channels."""
    if node.attributes.get("group", 1) > 1 and builder.shape(node.inputs[1])[1] == 1:
        sizes = builder.new_sizes(node.inputs[0])
        if 1 in sizes:
            builder.set_attribute(node, "group", sizes[1])


@traces("Gemm")
def gemm(node: Node, tracer: Tracer) -> None:
    """Y = alpha A B + beta C with a constant B."""
    data, layout = node.inputs[0], weighted(node)
    matrix = tracer.constant(node.inputs[1])
    if matrix is None or layout is None:
        tracer.refuse(node, reasons.RUNTIME_WEIGHT)
        return
    axes = tracer.axes(data)
    made = tracer.produce(node, layout.widths(matrix.shape)[1])
    transposed = bool(node.attributes.get("transA", 0))
    if transposed:
        tracer.freeze_tensor(data, reasons.TRANSPOSED, node)
        axes = {}
    reader = ConsumerNode(node.index, data, 1, node.outputs[0], 1, bias=_gemm_bias(node, layout, tracer))
    product = _product(node, 1, layout, reader)
    _claim_weight(tracer, node, product, made, axes.get(1))
    passing = {0: axes[0]} if 0 in axes else {}
    _claim_addend(node, tracer, made, passing)
    if not transposed:
        tracer.products.append(product)
    tracer.label_axes(node.outputs[0], {**passing, 1: made})
    if 1 in axes:
        tracer.consumer(product, affine=reader.bias is not None)


def _gemm_bias(node: Node, layout: Weighted, tracer: Tracer) -> Bias | None:
    """C, if it can take an addition of shape (N,): it is absent, or a constant that is the same in all rows."""
    value = tracer.constant(layout.bias)
    if not layout.bias_scale or (layout.bias and (value is None or (value.ndim == 2 and value.shape[0] > 1))):
        return None
    return Bias(node.index, 2, layout.bias, layout.scale / layout.bias_scale)


def _claim_addend(node: Node, tracer: Tracer, made: Atoms, passing: Mapping[int, Atoms]) -> None:
    """Slice C, which broadcasts to (M, N)."""
    name = node.input(2)
    value = tracer.constant(name)
    if name and value is None:
        tracer.freeze(made, reasons.RUNTIME_WEIGHT, node)
        tracer.freeze_tensor(name, reasons.RUNTIME_WEIGHT, node)
    elif value is not None:
        rank = value.ndim
        wanted = {rank - 1: made} if rank >= 1 and value.shape[-1] > 1 else {}
        if rank == 2 and value.shape[0] > 1 and 0 in passing:
            wanted[0] = passing[0]
        tracer.claim(node, 2, wanted)


@traces("MatMul")
def matmul(node: Node, tracer: Tracer) -> None:
    """A product with a constant matrix on either side, or of two computed tensors."""
    constant = [tracer.constant(name) is not None for name in node.inputs[:2]]
    if all(constant):
        tracer.refuse(node, reasons.RUNTIME_WEIGHT)
    elif any(constant):
        _constant_product(node, tracer, constant.index(True))
    else:
        _computed_product(node, tracer)


def _constant_product(node: Node, tracer: Tracer, position: int) -> None:
    weight, data, result = node.inputs[position], node.inputs[1 - position], node.outputs[0]
    matrix = tracer.shape_info.constants[weight]
    rank = tracer.rank(data)
    if matrix.ndim != 2 or rank is None or rank < 2:
        other = reasons.UNKNOWN_DATA_RANK if rank is None else reasons.VECTOR
        reason = reasons.WEIGHT_RANK if matrix.ndim > 2 else other
        tracer.refuse(node, reason)
        if matrix.ndim > 1:
            tracer.freeze(tracer.produce(node, matrix.shape[-1 if position else -2]), reason, node)
        return
    axis = rank - 2 + position  # a weight on the right meets the last axis, one on the left the one before
    reader = ConsumerNode(node.index, data, axis, result, axis, bias=_following_bias(node, tracer, axis))
    _multiply(node, tracer, position, Weighted(1 - position, position), reader)


def _multiply(node: Node, tracer: Tracer, position: int, layout: Weighted, reader: ConsumerNode) -> None:
    """Product with a constant matrix of which one axis takes the place of another; the others pass in their order."""
    axes = tracer.axes(reader.tensor)
    product = _product(node, position, layout, reader)
    made = tracer.produce(node, tracer.shape_info.constants[product.weight].shape[layout.outputs])
    columns = axes.pop(reader.axis, None)
    _claim_weight(tracer, node, product, made, columns)
    order = [axis for axis in range(tracer.rank(reader.tensor) or 0) if axis != reader.axis]
    order.insert(reader.output_axis, reader.axis)
    passing = {order.index(axis): atoms for axis, atoms in axes.items()}
    tracer.label_axes(reader.output, {**passing, reader.output_axis: made})
    tracer.products.append(product)
    if columns is not None:
        tracer.consumer(product, affine=True)


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
        # Every element of a computed tensor times one of a constant.
        axes = tracer.axes(node.inputs[1 - position])
        sliced = {weight.index(data[axis]): own for axis, own in axes.items() if data[axis] in weight}
        tracer.claim(node, position, sliced)
        tracer.label_axes(node.outputs[0], axes)
        return
    one, other = "".join(set(weight) & set(data) - set(result)), "".join(set(weight) & set(result) - set(data))
    single = len(weight) == 2 and len(one) == len(other) == 1
    if all(constant) or not single or data.replace(one, "") != result.replace(other, ""):
        tracer.refuse(node, reasons.EQUATION)
        return
    axis, new, name = data.index(one), result.index(other), node.inputs[1 - position]
    outputs = weight.index(other)
    reader = ConsumerNode(node.index, name, axis, node.outputs[0], new, bias=_following_bias(node, tracer, new))
    _multiply(node, tracer, position, Weighted(1 - outputs, outputs), reader)


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
    ranks = [tracer.rank(name) or 0 for name in node.inputs]
    if min(ranks) < 2:
        tracer.refuse(node, reasons.CONTRACTED)
        return
    batch = [chr(_LETTERS + axis) for axis in range(max(ranks) - 2)]
    left, right = ((*batch[len(batch) + 2 - rank :], *own) for rank, own in zip(ranks, ("ij", "jk"), strict=True))
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
                label = tracer.flattened(label)
            # Ids may vary over batch axes: the channels of each head.
            passing.append(label.moved({axis: result.index(term[axis]) for axis in label.axes}))
    tracer.label(node.outputs[0], passing)

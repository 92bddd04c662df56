"""What each operator makes of the facts about its inputs.

An operator without a rule says nothing: its output may be anything, but a channel of it is still the same channel
wherever it is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

import numpy as np
import onnx

from lindep_onnx.model.node import Node
from lindep_onnx.model.weighted import Weighted, may_pad, weighted
from lindep_onnx.proofs.bounds import (
    APPROXIMATION,
    INF,
    MORE_ROUNDINGS,
    AffineForm,
    BoundsContext,
    ChannelBounds,
    Product,
    Rule,
    Vector,
    directions,
    hull,
    identity,
    joined,
    levels,
    of_facts,
    options_of,
    product_bounds,
    times,
    widened,
)
from lindep_onnx.proofs.moving import MOVING, RESHAPED
from lindep_onnx.structure.rules.saturation import clip_ends

Function: TypeAlias = Callable[[Vector, Node], Vector]


def output_bounds(node: Node, known: BoundsContext) -> ChannelBounds | None:
    """Facts about the first output of a node; None if nothing can be said."""
    rule = _RULES.get(node.op)
    with np.errstate(all="ignore"):
        found = rule(node, known) if rule is not None else None
    return None if found is None or np.isnan([found.low, found.high]).any() else found


# ---- products -----------------------------------------------------------------------------------------------------


def _addend(layout: Weighted, known: BoundsContext, rows: int) -> Vector | None:
    """(rows,) what is added to each row; None where that is not known, or differs from position to position."""
    value = known.constants.get(layout.bias) if layout.bias else np.zeros(1)
    if value is None or (value.size != 1 and (value.size != rows or value.shape[-1] != rows)):
        return None
    return np.broadcast_to(value.astype(np.float64).ravel() * layout.bias_scale, (rows,))


def _convolution(node: Node, known: BoundsContext) -> ChannelBounds | None:
    layout, weight, data = weighted(node), known.constants.get(node.inputs[1]), known.of(node.inputs[0], 1)
    if layout is None or weight is None or data is None:
        return None
    group, rows, width = layout.group, len(weight), weight.shape[1]
    bias = _addend(layout, known, rows)
    if bias is None or group < 1 or rows % group or group * width != len(data.low):
        return None
    w = weight.reshape(rows, width, -1)
    low, high = (np.minimum(data.low, 0), np.maximum(data.high, 0)) if may_pad(node) else (data.low, data.high)
    source = np.arange(rows) // (rows // group)  # the group of each output
    index = source[:, None] * width + np.arange(width)
    bounds = product_bounds(w, low[index], high[index], bias, known.rounding)
    options = options_of(node)
    if layout.depthwise(weight.shape):  # one channel each: what multiplies it carries over
        length, direction = directions(w[:, 0] * data.scale[source, None], bias)
        names = [identity("depthwise", options, key) for key in data.key]
    else:
        length, direction = directions(w.reshape(rows, -1), bias)
        names = [identity("Conv", node.inputs[0], options, part) for part in range(group)]
    keys = tuple(identity(names[part], own) for part, own in zip(source.tolist(), direction, strict=True))
    product = Product(w.reshape(rows, -1), bias)
    base = [identity("Conv", node.inputs[0], options, weight.shape[1:], part) for part in range(group)]
    forms = tuple(AffineForm(base[part], product, row) for row, part in enumerate(source.tolist()))
    return ChannelBounds(1, *bounds, keys, length, forms)


def _matrix(node: Node, known: BoundsContext) -> ChannelBounds | None:
    layout, weight = weighted(node), known.constants.get(node.inputs[1])
    axis = len(known.shapes.get(node.inputs[0], ())) - 1
    if layout is None or weight is None or weight.ndim != 2 or axis < 1 or node.attributes.get("transA", 0):
        return None
    data = known.of(node.inputs[0], axis)
    w = weight.T if layout.outputs == 1 else weight
    w = w if layout.scale == 1 else w.astype(np.float64) * layout.scale  # a view if that will do: matrices are large
    bias = _addend(layout, known, len(w))
    if data is None or bias is None:
        return None
    box = np.broadcast_to(data.low, w.shape), np.broadcast_to(data.high, w.shape)
    bounds = product_bounds(w[:, :, None], *box, bias, known.rounding)
    length, direction = directions(w, bias)
    base, product = identity("product", node.inputs[0], axis), Product(w, bias)
    forms = tuple(AffineForm(base, product, row) for row in range(len(w)))
    return ChannelBounds(axis, *bounds, tuple(identity(base, own) for own in direction), length, forms)


# ---- channel by channel -------------------------------------------------------------------------------------------


def _affine(
    data: ChannelBounds, factor: Vector, addend: Vector, rounding: float, size: Vector | None = None
) -> ChannelBounds:
    """What factor x + addend is; `size` bounds the terms that the addend is made of."""
    ends = times(factor, data.low) + addend, times(factor, data.high) + addend
    terms = (np.abs(addend) if size is None else size) * 2
    bounds = widened(np.minimum(*ends), np.maximum(*ends), rounding * MORE_ROUNDINGS, terms)
    scale = data.scale * factor
    length, direction = directions(scale[:, None], addend)
    plain = (addend == 0) & (scale > 0)
    found = zip(data.key, plain, direction, strict=True)
    keys = tuple(key if same else identity("affine", key, own) for key, same, own in found)
    forms = tuple(
        None if form is None or not f else replace(form, factor=form.factor * f, shift=form.shift * f + a)
        for form, f, a in zip(data.form, factor.tolist(), addend.tolist(), strict=True)
    )
    return ChannelBounds(data.axis, *bounds, keys, np.where(plain, scale, length), forms)


def _normalization(node: Node, known: BoundsContext) -> ChannelBounds | None:
    data = known.of(node.inputs[0], 1)
    values = [known.constants.get(name) for name in node.inputs[1:5]]
    if data is None or node.attributes.get("training_mode", 0) or any(value is None for value in values):
        return None
    scale, shift, mean, variance = (np.asarray(value, dtype=np.float64) for value in values)
    factor = scale / np.sqrt(variance + float(node.attributes.get("epsilon", 1e-5)))
    return _affine(data, factor, shift - factor * mean, known.rounding, np.abs(shift) + np.abs(factor * mean))


def _arithmetic(node: Node, known: BoundsContext) -> ChannelBounds | None:
    if len(node.inputs) != 2:
        return None
    fixed = [known.constants.get(name) for name in node.inputs]
    rank = len(known.shapes.get(node.outputs[0], ()))
    if (fixed[0] is None) == (fixed[1] is None):
        return _both(node, known, rank) if fixed[0] is None else None
    place = 0 if fixed[0] is None else 1
    found = known.facts.get(node.inputs[place])
    value = fixed[1 - place]
    if found is None or value is None or len(known.shapes.get(node.inputs[place], ())) != rank:
        return None
    size, behind = len(found.low), rank - found.axis
    if value.size == 1:
        constant = np.full(size, float(value.ravel()[0]))
    elif value.size == size and value.ndim >= behind and value.shape[value.ndim - behind] == size:
        constant = value.astype(np.float64).ravel()
    else:
        return None
    one, zero, unit = np.ones(size), np.zeros(size), known.rounding
    if node.op == "Add":
        return _affine(found, one, constant, unit)
    if node.op == "Mul":
        return _affine(found, constant, zero, unit)
    if node.op == "Sub":
        return _affine(found, one, -constant, unit) if place == 0 else _affine(found, -one, constant, unit)
    return _affine(found, 1.0 / constant, zero, unit) if place == 0 and (constant != 0).all() else None


def _negative(node: Node, data: ChannelBounds, known: BoundsContext) -> ChannelBounds:
    return _affine(data, -np.ones(len(data.low)), np.zeros(len(data.low)), known.rounding)


def _both(node: Node, known: BoundsContext, rank: int) -> ChannelBounds | None:
    left, right = (known.facts.get(name) for name in node.inputs)
    if left is None or right is None or left.axis != right.axis or len(left.low) != len(right.low):
        return None
    if any(len(known.shapes.get(name, ())) != rank for name in node.inputs):
        return None
    if node.op in ("Add", "Sub"):
        sign = 1.0 if node.op == "Add" else -1.0
        ends = np.sort(np.stack([sign * right.low, sign * right.high]), axis=0)
        length, direction = directions(left.scale[:, None], right.scale)
        keys = tuple(identity(node.op, *part) for part in zip(left.key, right.key, direction, strict=True))
        share = np.where(left.varies | right.varies, 2 * known.rounding, 0.0)
        bounds = (
            left.low + ends[0] - times(share, np.abs(left.low) + np.abs(ends[0])),
            left.high + ends[1] + times(share, np.abs(left.high) + np.abs(ends[1])),
        )
        return ChannelBounds(left.axis, *bounds, keys, length, (None,) * len(length))
    if node.op == "Mul":
        pairs = [(a, b) for a in (left.low, left.high) for b in (right.low, right.high)]
        corners = np.stack([np.where((a == 0) | (b == 0), 0.0, a * b) for a, b in pairs])
        keys = tuple(identity("Mul", a, b) for a, b in zip(left.key, right.key, strict=True))
        bounds = widened(corners.min(axis=0), corners.max(axis=0), 2 * known.rounding)
        return ChannelBounds(left.axis, *bounds, keys, left.scale * right.scale, (None,) * len(keys))
    return None


def _homogeneous(function: Function) -> Rule:
    """f(s x) = s f(x) for s > 0; monotone on both sides of 0, and the identity above it."""

    def rule(node: Node, data: ChannelBounds, known: BoundsContext) -> ChannelBounds | None:
        if any(node.outputs[1:]):
            return None
        low, high = widened(*hull(data, lambda x: function(x, node), (0.0,)), 2 * known.rounding)
        changed = replace(data.renamed(node.op, options_of(node)), low=low, high=high, form=(None,) * len(low))
        return data.where_not((data.low >= 0.0) & (data.high <= INF), changed)

    return of_facts(rule)


def _pool(node: Node, known: BoundsContext) -> ChannelBounds | None:
    data = known.of(node.inputs[0], 1)
    if data is None or any(node.outputs[1:]):
        return None
    found = data.renamed(node.op, options_of(node))
    if node.op not in ("AveragePool", "GlobalAveragePool"):
        return replace(found, form=(None,) * len(found.key))
    zeros = node.op == "AveragePool" and node.attributes.get("count_include_pad", 0)
    low, high = (np.minimum(data.low, 0), np.maximum(data.high, 0)) if zeros else (data.low, data.high)
    low, high = widened(low, high, min(1.0, known.rounding * (_averaged(node, known) + MORE_ROUNDINGS)))
    return replace(found, low=low, high=high)


def _averaged(node: Node, known: BoundsContext) -> float:
    """How many values an average is over, infinity where that is not known."""
    sizes = node.attributes.get("kernel_shape") or known.shapes.get(node.inputs[0], ())[2:]
    return float(math.prod(sizes)) if all(isinstance(size, int) for size in sizes) else INF


def _monotone(function: Function, least: float = -INF) -> Rule:
    """Monotone and, as runtimes compute it, never below `least`; there is no such upper end (tanh exceeds 1)."""

    def rule(node: Node, data: ChannelBounds, known: BoundsContext) -> ChannelBounds:
        found = _equal_inputs(node, data, lambda x: function(x, node))
        share = max(APPROXIMATION, known.rounding * MORE_ROUNDINGS)
        low, high = widened(found.low, found.high, share, 1.0)
        return replace(found, low=np.maximum(low, least), high=high)

    return of_facts(rule)


def _equal_inputs(
    node: Node, data: ChannelBounds, function: Callable[[Vector], Vector], turns: Sequence[float] = ()
) -> ChannelBounds:
    """No more is said about multiples than that equal inputs give equal outputs."""
    scales = levels(data.scale).tolist()
    options = options_of(node)
    keys = tuple(identity(node.op, options, key, scale) for key, scale in zip(data.key, scales, strict=True))
    return ChannelBounds(data.axis, *hull(data, function, turns), keys, np.ones(len(data.low)), (None,) * len(keys))


def _clip(node: Node, data: ChannelBounds, known: BoundsContext) -> ChannelBounds | None:
    ends = clip_ends(node, known.constants.get)
    if ends is None:
        return None
    start, end = ends
    found = _equal_inputs(node, data, lambda x: np.minimum(np.maximum(x, start), end))
    found = replace(found, key=tuple(identity(key, start, end) for key in found.key))
    return data.where_not((data.low >= start) & (data.high <= end), found)


def _hard_swish(node: Node, data: ChannelBounds, known: BoundsContext) -> ChannelBounds:
    found = _equal_inputs(node, data, lambda x: times(np.clip((x + 3) / 6, 0, 1), x), (-3.0, -1.5))
    low, high = widened(found.low, found.high, known.rounding * MORE_ROUNDINGS)
    return data.where_not((data.low >= 3.0 + 1e-3) & (data.high <= INF), replace(found, low=low, high=high))


def _hard_sigmoid(x: Vector, node: Node) -> Vector:
    return np.clip(float(node.attributes.get("alpha", 0.2)) * x + float(node.attributes.get("beta", 0.5)), 0.0, 1.0)


def _leaky(x: Vector, node: Node) -> Vector:
    slope = float(node.attributes.get("alpha", 0.01))
    return np.where(x >= 0, x, times(slope, x))


# ---- moving channels ----------------------------------------------------------------------------------------------


def _same(node: Node, data: ChannelBounds, known: BoundsContext) -> ChannelBounds | None:
    return data if not node.input(2) else None


def _cast(node: Node, data: ChannelBounds, known: BoundsContext) -> ChannelBounds | None:
    if node.attributes.get("to") not in (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE):
        return None
    low, high = widened(data.low, data.high, 2 * known.rounding)
    return replace(data, low=low, high=high)


def _concat(node: Node, known: BoundsContext) -> ChannelBounds | None:
    rank = len(known.shapes.get(node.outputs[0], ()))
    axis = node.attributes["axis"] % rank if rank else -1
    parts = [part for part in (known.of(name, axis) for name in node.inputs) if part is not None]
    return joined(parts) if len(parts) == len(node.inputs) else None


def _transpose(node: Node, data: ChannelBounds, known: BoundsContext) -> ChannelBounds:
    rank = len(known.shapes.get(node.inputs[0], ()))
    order = list(node.attributes.get("perm", range(rank)[::-1]))
    return replace(data.renamed("Transpose", order), axis=order.index(data.axis))


def _flatten(node: Node, data: ChannelBounds, known: BoundsContext) -> ChannelBounds | None:
    before, after = known.shapes.get(node.inputs[0], ()), known.shapes.get(node.outputs[0], ())
    if data.axis != 1 or len(after) != 2 or not all(isinstance(n, int) for n in before[1:]):
        return None
    count = math.prod(n for n in before[2:] if isinstance(n, int))
    if not count or after[1] != len(data.low) * count:
        return None
    positions = joined([data.renamed("position", place) for place in range(count)])
    return positions.take(np.arange(len(positions.low)).reshape(count, -1).T.ravel())


def _regrouped(node: Node, known: BoundsContext) -> ChannelBounds | None:
    return of_facts(_flatten)(node, known) or RESHAPED(node, known)


#: Functions of single elements of which no bounds are known here, and by which what differs by rounding still does.
_CONTINUOUS = ("Abs", "Celu", "Elu", "Erf", "Exp", "Gelu", "Mish", "Selu", "Softsign", "Swish")


def _alike(node: Node, data: ChannelBounds, known: BoundsContext) -> ChannelBounds:
    found = _equal_inputs(node, data, lambda x: x)
    return replace(found, low=np.full_like(data.low, -INF), high=np.full_like(data.high, INF))


_RULES: Mapping[str, Rule] = {
    "Conv": _convolution,
    **dict.fromkeys(("Gemm", "MatMul"), _matrix),
    "BatchNormalization": _normalization,
    **dict.fromkeys(("Add", "Sub", "Mul", "Div"), _arithmetic),
    "Relu": _homogeneous(lambda x, node: np.maximum(x, 0)),
    "LeakyRelu": _homogeneous(_leaky),
    **dict.fromkeys(("MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool"), _pool),
    "Clip": of_facts(_clip),
    "HardSwish": of_facts(_hard_swish),
    "Neg": of_facts(_negative),
    "Sigmoid": _monotone(lambda x, node: 1.0 / (1.0 + np.exp(-x)), least=0.0),
    "HardSigmoid": _monotone(_hard_sigmoid, least=0.0),
    "Tanh": _monotone(lambda x, node: np.tanh(x)),
    "Softplus": _monotone(lambda x, node: np.logaddexp(0, x), least=0.0),
    **dict.fromkeys(("Identity", "Dropout"), of_facts(_same)),
    "Cast": of_facts(_cast),
    "Concat": _concat,
    "Transpose": of_facts(_transpose),
    **dict.fromkeys(("Flatten", "Reshape"), _regrouped),
    **dict.fromkeys(_CONTINUOUS, of_facts(_alike)),
    **MOVING,
}

"""The walk over the graph that finds units, consumers, groups and refusals (see `structure.types` for the words)."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from lindep_onnx.model.cost import channels_inside, output_channels
from lindep_onnx.model.fused import DOMAIN
from lindep_onnx.model.ir import Model
from lindep_onnx.model.node import Node
from lindep_onnx.model.shapes import ShapeInfo
from lindep_onnx.model.weighted import weighted
from lindep_onnx.structure import reasons
from lindep_onnx.structure.rules import tracing_rule
from lindep_onnx.structure.rules.registry import Tracing
from lindep_onnx.structure.tracer import Tracer
from lindep_onnx.structure.types import FROZEN, Atoms, Consumer, Group, Product, Refusal, Structure

Globs: TypeAlias = "Sequence[str]"

#: Operators that read how many channels there are, and rewrite what becomes of the numbers.
SIZES_ONLY = ("Shape",)

#: Reasons where a tensor is computed that could be a constant.
_OF_COMPUTED = (reasons.RUNTIME_WEIGHT, reasons.RUNTIME_PARAMETERS, reasons.FROZEN_OPERAND, reasons.CONTRACTED)
_QUANTISED = re.compile(
    r"(^|::)(QLinear\w+|QAttention|QGemm|(De|Dynamic)?[Qq]uantizeLinear|\w+Integer\w*|MatMulNBits)$"
)
#: Which input of an operator on integers is the weight, and which of its axes counts output channels.
_QUANTISED_WEIGHT = {
    "ConvInteger": (1, 0),
    "QLinearConv": (3, 0),
    **dict.fromkeys(("MatMulInteger", "DynamicQuantizeMatMul"), (1, -1)),
    **dict.fromkeys(("QLinearMatMul", "QGemm"), (3, -1)),
}


def trace(
    model: Model,
    shape_info: ShapeInfo,
    *,
    include: Globs = (),
    exclude: Globs = (),
    min_channels: int = 1,
    refused: frozenset[tuple[str, int]] = frozenset(),
) -> Structure:
    """Find units, consumers, groups and refusals of a model.

    Args:
        model: not changed.
        shape_info: its constants and shapes.
        include: globs on node names; when given, only channels that a matching node produces or reads are touched.
        exclude: globs on node names whose input and output channels are left alone.
        min_channels: no axis is cut below this.
        refused: tensors and axes whose channels a runtime cannot do without.
    """
    tracer = Tracer(model, shape_info)
    quantised = _quantised(model, shape_info)
    for node in model.nodes if quantised is None else ():
        if all(name in shape_info.constants for name in node.outputs if name) and not node.captures:
            continue
        _follow(tracer, node)
        _leave_alone(tracer, node, include, exclude)
    for name, axis in sorted(refused):
        tracer.freeze_tensor(name, reasons.REFUSED, model.producer.get(name), [axis])
    for name in model.outputs:
        tracer.freeze_tensor(name, reasons.GRAPH_OUTPUT, model.producer.get(name))
    _check_claims(tracer)
    structure = _components(tracer, min_channels)
    return structure if quantised is None else dataclasses.replace(structure, refusals=(quantised,))


def _apply(rule: Tracing, node: Node, tracer: Tracer) -> None:
    """Ask the rule of a node; an axis of its inputs that the rule says nothing about stays."""
    links, frozen = len(tracer.links), len(tracer.frozen)
    rule(node, tracer)
    if node.op in SIZES_ONLY:
        return
    told = [label.atoms for name in node.outputs for label in tracer.labels.get(name, ())]
    told += [atoms for pair in tracer.links[links:] for atoms in pair]
    told += [atoms for atoms, _, _ in tracer.frozen[frozen:]]
    told += [
        atoms
        for position, name in enumerate(node.inputs)
        for atoms in tracer.claims.get(name, {}).get((node.index, position), {}).values()
    ]
    known = np.concatenate([atoms.ravel() for atoms in told] or [np.empty(0, np.int64)])
    for name in node.inputs:
        for label in tracer.labels.get(name, ()):
            if not np.isin(label.atoms, known).any():
                tracer.freeze(label.atoms.ravel(), reasons.LOST, node)


def _count_fused(tracer: Tracer, node: Node) -> None:
    """Channels that an operator of ONNX Runtime makes with a weight, so that the report speaks of them."""
    weight = tracer.shape_info.weight_shape(node.input(1)) if node.op.startswith(f"{DOMAIN}::") else None
    if weight is not None and len(weight) > 1:
        made = weight[0] if "Conv" in node.op else weight[-1]
        tracer.freeze(tracer.produce(node, made), reasons.unknown(node.op), node)


def _follow(tracer: Tracer, node: Node) -> None:
    """Apply the rule of a node; what stops there because of a weight that a caller may replace is told so."""
    known = tracer.shape_info.overridable
    named = next((known[name] for name in (*node.inputs, *node.captures) if name in known), None)
    if named is not None and all(name in known for name in node.outputs if name):
        return
    first, rule = len(tracer.frozen), tracing_rule(node.op)
    if rule is None or node.captures:
        tracer.refuse(node, reasons.SUBGRAPH if node.captures else reasons.unknown(node.op))
        _count_fused(tracer, node)
    else:
        _apply(rule, node, tracer)
    inside = channels_inside(node, tracer.shape_info.weight_shape)
    if inside:
        tracer.freeze(tracer.produce(node, inside), reasons.BODY, node)
    if named is None:
        return
    reason = reasons.OVERRIDABLE.naming(named)
    counted = bool(tracer.producers) and tracer.producers[-1].node == node.index
    for place, (atoms, cause, blame) in enumerate(tracer.frozen[first:], first):
        if cause in _OF_COMPUTED:
            tracer.frozen[place] = atoms, reason, blame
    width = 0 if counted else output_channels(node, tracer.shape_info.weight_shape)
    if width:
        tracer.freeze(tracer.produce(node, width), reason, node)


def _quantised(model: Model, shape_info: ShapeInfo) -> Refusal | None:
    """One refusal for a whole quantised model: its weights are integers, and its scales belong to all that is there."""
    nodes = [node for node in model.nodes if _QUANTISED.search(node.op)]
    if not nodes:
        return None
    channels = sum(_quantised_channels(node, shape_info) for node in model.nodes)
    return Refusal(reasons.QUANTISED, (nodes[0].name,), channels)


def _quantised_channels(node: Node, shape_info: ShapeInfo) -> int:
    """Output channels of a node that multiplies a weight, integers or behind a DequantizeLinear."""
    layout = weighted(node)
    position, axis = (1, -1) if layout else _QUANTISED_WEIGHT.get(node.op.rpartition("::")[2], (-1, -1))
    sizes = shape_info.shapes.get(node.input(position), ()) if position > 0 else ()
    fixed = [size for size in sizes if isinstance(size, int)]
    if len(fixed) < max(2, len(sizes)):
        return 0
    if layout is not None and node.op != "MatMul":  # which may multiply batches
        return layout.widths(fixed)[1]
    return fixed[0 if node.attributes.get("transB", 0) else axis]


def _leave_alone(tracer: Tracer, node: Node, include: Globs, exclude: Globs) -> None:
    def matches(globs: Globs) -> bool:
        return any(fnmatch.fnmatchcase(node.name, glob) for glob in globs)

    multiplies = bool(tracer.producers) and tracer.producers[-1].node == node.index
    if multiplies and (matches(exclude) or (include and not matches(include))):
        for name in (*node.inputs, *node.outputs) if matches(exclude) else node.outputs:
            tracer.freeze_tensor(name, reasons.EXCLUDED, node)


def _check_claims(tracer: Tracer) -> None:
    """Link the readers of each constant, and freeze what some reader needs whole or nothing can replace.

    A vector is cheap and may end up different for each of its readers: exporters share one vector of zeros between
    layers that have nothing else in common. A matrix, and whatever is multiplied, stays one constant.
    """
    model = tracer.model
    multiplied = _by_weight(tracer)

    def keep(those: Sequence[Atoms], reason: reasons.Reason, blame: Node) -> None:
        for atoms in those:
            tracer.freeze(atoms, reason, blame)

    for name, claims in tracer.claims.items():
        first = model.nodes[min(claims)[0]]
        labelled = [atoms for axes in claims.values() for atoms in axes.values()]
        if name in model.overridable:
            keep(labelled, reasons.OVERRIDABLE, first)
        layouts = [product for product, _ in multiplied.get(name, [])]
        vector = sum(size > 1 for size in tracer.shape_info.constants[name].shape) <= 1 and not layouts
        if name in model.sparse:
            keep(labelled, reasons.SPARSE, first)
        if vector or not labelled:
            continue
        readers = {(node.index, place) for node in model.consumers[name] for place in _places(node, name)}
        partial = readers != set(claims) or name in model.outputs
        for axis in {axis for axes in claims.values() for axis in axes}:
            asked = [axes[axis] for axes in claims.values() if axis in axes]
            if len({atoms.shape for atoms in asked}) > 1:
                keep(asked, reasons.TWO_WAYS, first)
                continue
            for atoms in asked:
                tracer.link(atoms, asked[0])
            if partial or len(asked) < len(claims):
                blame = next((model.nodes[index] for index, _ in sorted(readers - set(claims))), first)
                tracer.freeze(asked[0], reasons.TWO_WAYS, blame)
        ways = {(product.inputs, product.outputs, product.group) for product in layouts}
        if len(ways) > 1 or len(layouts) != len(claims):
            # A fold changes the weight for every reader: unless all multiply it in the same way, nothing that it is
            # multiplied with goes. What it makes may go, for every reader slices that alike.
            met = {product.inputs for product in layouts}
            keep([axes[axis] for axes in claims.values() for axis in met & axes.keys()], reasons.TWO_WAYS, first)
        reason = None if name in model.stored else _replaceable(tracer, name)
        if reason is not None:
            keep(labelled, reason, model.producer[name])


def _places(node: Node, name: str) -> list[int]:
    return [place for place, read in enumerate(node.inputs) if read == name] or [-1]  # a capture


def _replaceable(tracer: Tracer, name: str) -> reasons.Reason | None:
    """Why a constant that nodes compute from stored ones must stay as it is; None if a stored one may take its place.

    It may not where the model would grow: where what it is computed from is smaller, or stays for other readers.
    """
    model = tracer.model
    behind: set[int] = set()
    waiting = [name]
    while waiting:
        node = model.producer.get(waiting.pop())
        if node is not None and node.index not in behind:
            behind.add(node.index)
            waiting.extend(filter(None, node.inputs))
    gone: set[int] = set()

    def vanishes(tensor: str) -> bool:
        return tensor not in model.outputs and all(node.index in gone for node in model.consumers.get(tensor, ()))

    for index in sorted(behind, reverse=True):
        if all(made == name or vanishes(made) for made in model.nodes[index].outputs if made):
            gone.add(index)
    stored = {read for index in behind for read in model.nodes[index].inputs if read in model.stored}
    if stored & model.sparse:
        return reasons.SPARSE
    sizes = {read: model.stored[read].size for read in stored}
    needed = tracer.shape_info.constants[name].size
    if sum(size for read, size in sizes.items() if vanishes(read)) >= needed:
        return None
    return reasons.TWO_WAYS if sum(sizes.values()) >= needed else reasons.COMPUTED_WEIGHT


def _components(tracer: Tracer, min_channels: int) -> Structure:
    consumers = _consumers(tracer)
    count = tracer.atoms
    component = _connected(tracer.links, count)
    together = _connected(tracer.links + tracer.aligned, count)
    aligned = np.zeros(component.max(initial=-1) + 1, dtype=np.int64)  # of each component
    aligned[component] = together
    cause = np.full(together.max(initial=-1) + 1, -1, dtype=np.int64)
    for index in reversed(range(len(tracer.frozen))):  # the first cause in graph order is the one to tell
        cause[together[tracer.frozen[index][0]]] = index

    read = np.zeros(len(aligned), dtype=bool)
    for consumer in consumers:
        read[component[consumer.columns]] = True
    whole = np.ones(len(cause), dtype=bool)  # an aligned set of which a part cannot go stays
    whole[aligned[~read]] = False
    free = whole[aligned] & (cause[aligned] < 0)
    number = np.where(free, np.cumsum(free) - 1, FROZEN)
    unit = number[component] if count else np.empty(0, np.int64)
    units = int(free.sum())
    consumers = [consumer for consumer in consumers if (unit[consumer.columns] != FROZEN).any()]
    lines = list(_lines(tracer))
    return Structure(
        model=tracer.model,
        shape_info=tracer.shape_info,
        labels=MappingProxyType(dict(tracer.labels)),
        reads=MappingProxyType(dict(tracer.claims)),
        unit=unit,
        units=units,
        aligned=aligned[free],
        interchangeable=_interchangeable(lines, unit, aligned[free]),
        consumers=tuple(consumers),
        products=tuple(tracer.products),
        producers=tuple(tracer.producers),
        groups=_groups(tracer, consumers, unit, units),
        refusals=_refusals(tracer, together, cause),
        minimums=_minimums(lines, unit, min_channels),
    )


def _connected(links: Sequence[tuple[Atoms, Atoms]], count: int) -> Atoms:
    """(count,) the connected component of each atom."""
    left, right = (np.concatenate([pair[side].ravel() for pair in links] or [np.empty(0, np.int64)]) for side in (0, 1))
    edges = coo_array((np.ones(len(left), dtype=np.int8), (left, right)), shape=(count, count))
    return np.asarray(connected_components(edges, directed=False)[1], dtype=np.int64)


def _by_weight(tracer: Tracer) -> dict[str, list[tuple[Product, bool]]]:
    found: dict[str, list[tuple[Product, bool]]] = {}
    for product, affine in tracer.consumers:
        found.setdefault(product.weight, []).append((product, affine))
    return found


def _consumers(tracer: Tracer) -> list[Consumer]:
    consumers = []
    for name, entries in _by_weight(tracer).items():
        first, affine = entries[0]
        blocks, inputs, outputs = first.group, first.inputs, first.outputs
        claims = tracer.claims[name].items()
        axes = next(axes for (node, _), axes in claims if node == first.reader.node and inputs in axes)
        shape = tracer.shape_info.constants[name].shape
        size = shape[outputs] if outputs == 0 else shape[outputs] * blocks
        rows = axes[outputs] if outputs in axes else tracer.fresh(size)  # a single output is never labelled
        readers = tuple(product.reader for product, _ in entries)
        affine = affine and len(readers) == 1
        parts = zip(axes[inputs].reshape(blocks, -1), rows.reshape(blocks, -1), strict=True)
        for block, (own_columns, own_rows) in enumerate(parts):
            consumers.append(Consumer(name, inputs, outputs, readers, own_columns, own_rows, affine, block, blocks))
    return consumers


def _interchangeable(lines: Sequence[Atoms], unit: Atoms, aligned: Atoms) -> Atoms:
    """(units,) which units can trade places: those whose atoms occur along the very same axes equally often.

    What reads an axis without telling its places apart does not notice the trade, and what tells them apart (a Slice,
    one group of a convolution, one head) has an axis of its own. Only aligned sets of several have use for it.
    """
    interchangeable = np.arange(len(aligned))
    several = np.bincount(aligned, minlength=1)[aligned] > 1 if len(aligned) else np.zeros(0, dtype=bool)
    if not several.any():
        return interchangeable
    atoms = np.concatenate(lines)
    line = np.repeat(np.arange(len(lines)), [len(one) for one in lines])
    wanted = np.append(several, False)[unit[atoms]]
    atoms, line = atoms[wanted], line[wanted]
    order = np.lexsort((line, atoms, unit[atoms]))
    atoms, line = atoms[order], line[order]
    first = np.diff(atoms, prepend=-1) != 0  # where a new atom begins
    marks = np.stack([first, line], axis=1)
    starts = np.flatnonzero(np.diff(unit[atoms], prepend=-1))
    found: dict[bytes, int] = {}
    for begin, end in zip(starts, [*starts[1:], len(atoms)], strict=True):
        own = int(unit[atoms[begin]])
        interchangeable[own] = found.setdefault(marks[begin:end].tobytes(), own)
    return interchangeable


def _lines(tracer: Tracer) -> Iterator[Atoms]:
    """The atoms along every axis of every tensor and constant, one line for each index along the other axes."""
    for tensor in sorted(tracer.labels):
        for label in tracer.labels[tensor]:
            yield from label.rows()
    for name in sorted(tracer.claims):
        for axes in tracer.claims[name].values():
            for atoms in axes.values():
                yield from np.atleast_2d(atoms)


def _groups(tracer: Tracer, consumers: Sequence[Consumer], unit: Atoms, units: int) -> tuple[Group, ...]:
    met = [np.unique(unit[consumer.columns]) for consumer in consumers]
    links = [(own[own != FROZEN], np.full((own != FROZEN).sum(), units + index)) for index, own in enumerate(met)]
    member = _connected(links, units + len(consumers))
    owner: dict[int, str] = {}
    for producer in tracer.producers:
        made = unit[producer.atoms]
        for group in np.unique(member[made[made != FROZEN]]):
            owner.setdefault(int(group), tracer.model.nodes[producer.node].name)
    order = np.argsort(member, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(member[order])) + 1)
    met_at = [(part[part < units], part[part >= units] - units) for part in parts if len(part)]
    groups = []
    for own, indices in sorted(met_at, key=lambda pair: int(pair[1][0])):
        first = tracer.model.nodes[consumers[indices[0]].readers[0].node]
        groups.append(Group(owner.get(int(member[own[0]]), first.name), own, tuple(indices.tolist())))
    return tuple(groups)


def _refusals(tracer: Tracer, component: Atoms, cause: Atoms) -> tuple[Refusal, ...]:
    channels: Counter[int] = Counter()
    for producer in tracer.producers:
        causes = cause[component[producer.atoms]]
        channels.update(sorted(causes[causes >= 0].tolist()))
    merged: dict[tuple[str, str], tuple[reasons.Reason, int]] = {}
    for index, count in channels.items():
        _, reason, node = tracer.frozen[index]
        key = (reason.code, node.name if node is not None else "")
        merged[key] = (reason, merged.get(key, (reason, 0))[1] + count)
    refusals = [Refusal(reason, (name,) if name else (), count) for (_, name), (reason, count) in merged.items()]
    return tuple(sorted(refusals, key=lambda refusal: (-refusal.channels, refusal.reason.code, refusal.nodes)))


def _minimums(lines: Sequence[Atoms], unit: Atoms, min_channels: int) -> tuple[tuple[NDArray[np.int64], int], ...]:
    """Sets of units that make up a whole axis: something of it has to stay."""
    found: dict[bytes, tuple[NDArray[np.int64], int]] = {}
    for atoms in lines:
        on_axis = unit[atoms]
        members = np.unique(on_axis[on_axis != FROZEN])
        # An axis of n places made of fewer units cannot promise more places than each unit brings at least.
        wanted = min(min_channels, len(on_axis)) - int((on_axis == FROZEN).sum())
        if len(members) and wanted > 0:
            _, before = found.get(members.tobytes(), (members, 0))
            found[members.tobytes()] = members, max(before, min(wanted, len(members)))
    return tuple(found.values())

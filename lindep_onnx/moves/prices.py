"""What removing channels saves and costs: savings, the order of elimination with its costs, and the folds.

Inside a group the units are ordered by elimination (see `linalg.elimination`), each consumer weighted by its measured
sensitivity. The costs along that order are not monotone, and savings depend on the order too: the path makes a convex
hull of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from lindep_onnx.calibration.statistics import Statistics, problem
from lindep_onnx.linalg.elimination import eliminate
from lindep_onnx.linalg.fold import ConsumerProblem, choose_ridge
from lindep_onnx.model.node import Node
from lindep_onnx.model.weighted import GATES
from lindep_onnx.moves.local import LocalUnits
from lindep_onnx.structure.steps import Curve, Fold, Saving
from lindep_onnx.structure.types import Product, Structure


def savings(structure: Structure, kind: Saving) -> NDArray[np.float64]:
    """(units,) parameters, MACs or output channels that go with each unit, all others kept.

    Args:
        structure: the traced model.
        kind: the currency.
    """
    if kind == "channels":
        return np.bincount(structure.unit[_produced(structure)] + 1, minlength=structure.units + 1)[1:].astype(
            np.float64
        )
    total = np.zeros(structure.units + 1)  # the last entry takes what stays
    positions = {
        (product.reader.node, product.position): _positions(structure, product) for product in structure.products
    }
    positions.update(((node.index, 1), _steps(structure, node)) for node in structure.model.nodes if node.op in GATES)
    for name, readers in structure.reads.items():
        shape = structure.shape_info.constants[name].shape
        for key, axes in readers.items():
            times = 1.0 if kind == "parameters" else positions.get(key, 0.0)
            for axis, atoms in axes.items():
                blocks = len(atoms) if atoms.ndim == 2 and axis > 0 else 1
                slice_size = math.prod(shape) / max(1, shape[axis]) / blocks
                np.add.at(total, structure.unit[atoms], times * slice_size)
            if kind == "parameters":
                break  # a shared weight is stored once
    return total[:-1]


def _produced(structure: Structure) -> NDArray[np.int64]:
    return np.concatenate([np.empty(0, np.int64), *(producer.atoms for producer in structure.producers)])


def _positions(structure: Structure, product: Product) -> float:
    reader = product.reader
    shape = structure.shape_info.shapes.get(reader.output, ())
    return float(
        math.prod(n for axis, n in enumerate(shape) if axis not in (0, reader.output_axis) and isinstance(n, int))
    )


def _steps(structure: Structure, node: Node) -> float:
    """How often a recurrent layer multiplies its input."""
    shape = structure.shape_info.shapes.get(node.inputs[0], ())
    steps = shape[1 if node.attributes.get("layout", 0) else 0] if len(shape) == 3 else 1
    return float(steps) if isinstance(steps, int) else 1.0


def curves(
    structure: Structure,
    statistics: Statistics,
    sensitivity: Sequence[float],
    saving: NDArray[np.float64],
    numbers: Sequence[int] | None = None,
) -> list[Curve]:
    """Order the units of every group, or of some.

    Args:
        structure: the traced model.
        statistics: what the data says.
        sensitivity: for each site, squared error of the outputs for a squared relative error of 1 at the site.
        saving: (units,) what each unit saves.
        numbers: of the groups; None for all.
    """
    nothing = np.zeros(structure.units, dtype=bool)
    local = LocalUnits(structure)
    found = []
    for number in range(len(structure.groups)) if numbers is None else numbers:
        group = structure.groups[number]
        problems = []
        for index in group.consumers:
            posed = local.problem(problem(structure, statistics.consumers[index], nothing))
            weight = max(sensitivity[index], 1e-12)
            problems.append(replace(posed, energy=posed.energy / weight, ridge=_ridge(posed, len(group.units))))
        gain = np.maximum(saving[group.units], 1e-9)
        order = eliminate(problems, np.ones(len(group.units), dtype=bool), gain=gain, minimums=local.minimums[number])
        found.append(Curve(number, group.units[order.order], order.cost, np.cumsum(gain[order.order])))
    return found


def _ridge(posed: ConsumerProblem, units: int) -> float:
    """The ridge that predicts unseen samples best when half of the units are gone, spread evenly."""
    if posed.holdout is None:
        return 1e-10
    gone = np.zeros(units + 1, dtype=bool)
    gone[:units:2] = True
    kept = ~gone[posed.unit]
    return max(1e-10, choose_ridge(posed, kept)[0]) if 0 < kept.sum() < len(kept) else 1e-10


def folds_of(
    structure: Structure, statistics: Statistics, removed: NDArray[np.bool_], base: Mapping[int, Fold]
) -> dict[int, Fold]:
    """The fold of every site that loses something, with the ridge that does best on unseen samples.

    Args:
        structure: the traced model.
        statistics: what the data says.
        removed: (units,) bool.
        base: folds that are known already, used where they are for the same features.
    """
    found: dict[int, Fold] = {}
    for index, seen in enumerate(statistics.consumers):
        kept = ~np.append(removed, False)[seen.unit]
        if kept.all():
            continue
        if index in base and np.array_equal(base[index].kept, kept):
            found[index] = base[index]
            continue
        found[index] = Fold(kept, choose_ridge(problem(structure, seen, removed), kept)[1])
    return found

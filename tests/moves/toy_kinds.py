"""Two small kinds of change that the contract suite holds like the real ones; `docs/extending.md` shows them.

`Narrowing` drops directions between two Gemms with nothing in between: it sends a tensor's channels through a linear
map. `Bypass` puts a linear map of the stream in the place of a residual branch: it needs second moments of two tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lindep_onnx.calibration.pairs import Pair
from lindep_onnx.calibration.statistics import Statistics
from lindep_onnx.linalg.linear_map import Mixture, TensorMaps
from lindep_onnx.model.edit import GraphEdits, Insertion
from lindep_onnx.model.node import Node
from lindep_onnx.moves.base import FittedSteps, Independent, Site
from lindep_onnx.runtime.rows import ChannelAxis
from lindep_onnx.structure.steps import Curve, Saving
from lindep_onnx.structure.types import Structure


class Narrowing(Independent):
    """Step k of a site leaves the k-th best direction, counted from the last, out of what one Gemm hands to the next.

    With S the second moments of h = W1' x + b1 and S^(1/2) W2 = A D B', h' = M h, M = A_r' S^(-1/2), is what rank r
    leaves; W2 becomes A_r' S^(1/2) W2.
    """

    name = "narrowing"

    def sites(self, structure: Structure) -> tuple[Site, ...]:
        found, begin = [], 0
        for first, second in self._gemms(structure):
            width = structure.shape_info.constants[first.input(1)].shape[1]
            found.append(Site(second.name, np.arange(begin, begin := begin + width - 1)))
        return tuple(found)

    def _gemms(self, structure: Structure) -> list[tuple[Node, Node]]:
        model, constants = structure.model, structure.shape_info.constants
        plain = [
            node for node in model.nodes if node.op == "Gemm" and not node.attributes and node.input(1) in constants
        ]
        pairs = [(model.producer.get(node.input(0)), node) for node in plain]
        return [(a, b) for a, b in pairs if a in plain and len(model.consumers[b.input(0)]) == 1]

    def _moments(self, structure: Structure, statistics: Statistics, tensor: str) -> NDArray[np.float64]:
        own = next(c for c in statistics.consumers if c.consumer.readers[0].tensor == tensor)
        mean = own.mean + own.offset
        return own.gram + np.outer(own.mean, mean) + np.outer(own.offset, own.mean)

    def _svd(self, structure: Structure, statistics: Statistics, second: Node) -> tuple[NDArray[np.float64], ...]:
        values, vectors = np.linalg.eigh(self._moments(structure, statistics, second.input(0)))
        root = np.sqrt(np.maximum(values, 1e-12 * values.max()))
        weight = structure.shape_info.constants[second.input(1)].astype(np.float64)
        left, size, _ = np.linalg.svd((vectors * root) @ vectors.T @ weight)
        return left, size, (vectors / root) @ vectors.T, (vectors * root) @ vectors.T @ weight

    def savings(self, structure: Structure, saving: Saving) -> NDArray[np.float64]:
        found = []
        for first, second in self._gemms(structure):
            one, two = (structure.shape_info.constants[node.input(1)].shape for node in (first, second))
            bias = len(first.inputs) > 2 and saving == "parameters"
            found += [1.0 if saving == "channels" else float(one[0] + two[1] + bias)] * (one[1] - 1)
        return np.array(found)

    def price(
        self, structure: Structure, statistics: Statistics, sensitivity: Sequence[float], saving: NDArray[np.float64]
    ) -> list[Curve]:
        curves = []
        for number, (site, (_, second)) in enumerate(zip(self.sites(structure), self._gemms(structure), strict=True)):
            size = np.zeros(len(site.steps) + 1)
            found = self._svd(structure, statistics, second)[1]
            size[: len(found)] = found[: len(size)]
            cost = np.cumsum(np.square(size[::-1]))[: len(site.steps)] / np.square(size).sum()
            curves.append(Curve(number, site.steps, cost, np.cumsum(saving[site.steps])))
        return curves

    def fit(self, structure: Structure, steps: FittedSteps, statistics: Statistics) -> FittedSteps:
        maps = {}
        for number, (site, (_, second)) in enumerate(zip(self.sites(structure), self._gemms(structure), strict=True)):
            rank = len(site.steps) + 1 - int(steps.taken[site.steps].sum())
            left, _, inverse, product = self._svd(structure, statistics, second)
            maps[number] = (left[:, :rank].T @ inverse, left[:, :rank].T @ product)
        return FittedSteps(steps.taken, maps)

    def apply(self, structure: Structure, steps: FittedSteps, statistics: Statistics | None) -> GraphEdits:
        constants, dims = {}, {}
        shapes = structure.shape_info.constants
        for number, (site, (first, second)) in enumerate(
            zip(self.sites(structure), self._gemms(structure), strict=True)
        ):
            gone = int(steps.taken[site.steps].sum())
            if not gone:
                continue
            width = len(site.steps) + 1
            matrix, product = steps.fits.get(number) or (np.eye(width)[: width - gone], shapes[second.input(1)][gone:])
            constants[first.input(1)] = (shapes[first.input(1)] @ matrix.T).astype(np.float32)
            constants[second.input(1)] = np.asarray(product, dtype=np.float32)
            if len(first.inputs) > 2:
                constants[first.input(2)] = (shapes[first.input(2)] @ matrix.T).astype(np.float32)
            dims[second.input(0), 1] = width - gone
        return GraphEdits(constants=constants, dims=dims)

    def maps(self, structure: Structure, steps: FittedSteps) -> TensorMaps:
        sites = enumerate(zip(self.sites(structure), self._gemms(structure), strict=True))
        return TensorMaps(
            {
                (second.input(0), 1): Mixture(steps.fits[number][0])
                for number, (site, (_, second)) in sites
                if steps.taken[site.steps].any()
            }
        )


class Bypass(Independent):
    """The step of a site puts A p + b in the place of what a branch adds to the stream p that it starts from."""

    name = "bypass"

    def branches(self, structure: Structure) -> list[tuple[Node, int, str, int]]:
        """(the Add, which of its inputs is the branch, the stream, elements of the weights inside the branch)."""
        model, constants = structure.model, structure.shape_info.constants
        found = []
        for node in model.nodes:
            for position in (0, 1) if node.op == "Add" else ():
                above, stream, inside = node.input(position), node.input(1 - position), 0
                while above in model.producer and above != stream and len(model.consumers[above]) == 1:
                    inside += sum(constants[name].size for name in model.producer[above].inputs if name in constants)
                    above = model.producer[above].input(0)
                if above == stream and inside:
                    found.append((node, position, stream, inside))
        return found

    def sites(self, structure: Structure) -> tuple[Site, ...]:
        return tuple(Site(add.name, np.array([n])) for n, (add, *_) in enumerate(self.branches(structure)))

    def pairs(self, structure: Structure) -> tuple[Pair, ...]:
        places = [(ChannelAxis(add.input(at), 1), ChannelAxis(p, 1)) for add, at, p, _ in self.branches(structure)]
        return tuple(Pair(branch, stream) for branch, stream in places)

    def savings(self, structure: Structure, saving: Saving) -> NDArray[np.float64]:
        widths = [(inside, int(structure.shape_info.shapes[p][1])) for _, _, p, inside in self.branches(structure)]
        return np.array([float(inside - width * width - width) for inside, width in widths])

    def price(
        self, structure: Structure, statistics: Statistics, sensitivity: Sequence[float], saving: NDArray[np.float64]
    ) -> list[Curve]:
        moments = [statistics.pairs[pair] for pair in self.pairs(structure)]
        lost = [np.array([own.unexplained(own.best_map(1e-6)[0])]) for own in moments]
        return [Curve(n, np.array([n]), cost, saving[n : n + 1]) for n, cost in enumerate(lost)]

    def fit(self, structure: Structure, steps: FittedSteps, statistics: Statistics) -> FittedSteps:
        fits = {n: statistics.pairs[pair].best_map(1e-6) for n, pair in enumerate(self.pairs(structure))}
        return FittedSteps(steps.taken, fits)

    def apply(self, structure: Structure, steps: FittedSteps, statistics: Statistics | None) -> GraphEdits:
        edits = GraphEdits(before={}, inputs={})
        for n, (add, position, stream, _) in enumerate(self.branches(structure)):
            if steps.taken[n]:
                width, name = int(structure.shape_info.shapes[stream][1]), add.input(position) + "_map"
                matrix, rest = steps.fits.get(n, (np.zeros((width, width)), np.zeros(width)))
                product = Insertion("MatMul", (stream, matrix.T.astype(np.float32)), name)
                edits.before[add.index] = [product, Insertion("Add", (name, rest.astype(np.float32)), name + "_sum")]
                edits.inputs[add.index, position] = name + "_sum"
        return edits

    def maps(self, structure: Structure, steps: FittedSteps) -> TensorMaps:
        sums = [add.outputs[0] for n, (add, *_) in enumerate(self.branches(structure)) if steps.taken[n]]
        return TensorMaps(changed=frozenset(sums))

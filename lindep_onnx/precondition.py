"""Steps of products measured by what they change: gradients times the inverse second moments of patches.

A product puts out y = V' p + b. A step of V and b matters by how much it changes that, E || dV' p + db ||^2, not by how
long it is: neighbouring pixels and channels that depend on each other make some directions of V count a thousand times
more than others. With C = E q q', q = (p, 1), and G the gradient by V and b together,

    D = (C + damping)^-1 G,    || D ||^2 = <D, G>   in that measure

is the steepest descent (Benzing, "Gradient Descent on Neurons and its Link to Approximate Second-Order Optimization",
2022: the curvature that Kronecker factors approximate, without the second factor). C is measured once, on the model
that training starts from.

A gradient that comes from fewer rows than V has unknowns says nothing about most directions, and dividing by what
hardly varies makes noise of it. Such products, and all that see one row of a sample, are left to Adam.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from lindep_onnx.channels import Channels, Product
from lindep_onnx.data import Part, Samples
from lindep_onnx.patches import as_matrix, as_weight, patches_at, positions, unknowns
from lindep_onnx.staging import Stages

__all__ = ["Layer", "measured"]

Array: TypeAlias = NDArray[Any]
Weights: TypeAlias = Mapping[str, Array]

#: Samples that the moments come from, at most, and rows of patches that are wanted.
MEASURED, LEAST_ROWS = 512, 1 << 14
CHUNK = 1 << 12
#: Added to the moments of patches, relative to their mean.
DAMPING = 1e-2
#: Inverses of wider moments take more than 64 MB each.
WIDEST = 4096


@dataclass(frozen=True)
class Layer:
    """A product whose steps are measured by what they change.

    Attributes:
        product: the product.
        bias: the tensor that is added to it, if that is trained too; empty if none.
        inverse: (G, J, J) float32 (C + damping)^-1; J = K, and one more for a bias.
        size: root mean square of its output, over the channels.
    """

    product: Product
    bias: str
    inverse: Array
    size: float

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors that step together."""
        return (self.product.weight, self.bias) if self.bias else (self.product.weight,)

    def direction(self, gradients: Weights) -> tuple[dict[str, Array], float]:
        """D, by tensor, and the mean square of the change of the output that it makes.

        Args:
            gradients: by the names of all that is trained.
        """
        joined = _joined(self.product, self.bias, gradients)
        steepest = self.inverse @ joined
        width = joined.shape[1] - bool(self.bias)
        weight = gradients[self.product.weight]
        found = {self.product.weight: as_weight(steepest[:, :width], self.product, weight.shape)}
        if self.bias:
            found[self.bias] = steepest[:, width].reshape(gradients[self.bias].shape)
        power = float(np.vdot(steepest, joined)) / (joined.shape[0] * joined.shape[2])
        return found, max(power, 0.0)  # below by rounding alone


def measured(
    channels: Channels,
    samples: Samples,
    trained: Collection[str],
    *,
    providers: Sequence[str],
    threads: int,
    rng: np.random.Generator,
) -> tuple[Layer, ...]:
    """The products of a model whose steps can be measured, in topological order.

    Args:
        channels: the model, traced.
        samples: the data; FIT samples are measured, and a step takes a batch of them.
        trained: names of the tensors that are trained.
        providers: execution providers of ONNX Runtime.
        threads: intra-op threads, 0 for its own choice.
        rng: of the positions whose patches are measured.
    """
    products = [product for product in channels.products if _measurable(product, channels, trained)]
    if not products:
        return ()
    layers = []
    batch = min(samples.batch, len(samples.parts[Part.FIT]))
    batches = samples.batches(Part.FIT, limit=MEASURED)
    with Stages(channels.model, channels.resolved, batches, providers=providers, threads=threads) as stages:
        for product in products:
            stages.run_to(product.reader.node)
            data = stages.tensor(0, product.reader.tensor)
            if data is None or data.ndim <= product.reader.axis or not data.size:
                continue
            rows = positions(product, data.shape) * len(data) // stages.sizes[0][0]  # of one sample
            if rows < 2 or rows * batch < unknowns(product, channels.resolved.constants[product.weight]):
                continue
            bias = _bias(product, channels, trained)
            layers.append(_layer(product, bias, _moments(product, stages, bool(bias), rng), channels))
    return tuple(layers)


def _measurable(product: Product, channels: Channels, trained: Collection[str]) -> bool:
    alone = len(channels.model.consumers.get(product.weight, ())) == 1
    return (
        alone
        and product.weight in trained
        and product.reader.axis > 0
        and unknowns(product, channels.resolved.constants[product.weight]) < WIDEST
    )


def _bias(product: Product, channels: Channels, trained: Collection[str]) -> str:
    """What is added to the product and to nothing else, if it is trained and has one value for each output."""
    bias = product.reader.bias
    if bias is None or bias.name not in trained or len(channels.model.consumers.get(bias.name, ())) != 1:
        return ""
    weight, value = (channels.resolved.constants[name] for name in (product.weight, bias.name))
    return bias.name if value.size == as_matrix(weight, product)[:, 0].size else ""


def _moments(product: Product, stages: Stages, biased: bool, rng: np.random.Generator) -> Array:
    """(G, J, J) float64 C."""
    total, rows = np.zeros(()), 0
    samples = sum(counted for counted, _ in stages.sizes)
    for number, _ in enumerate(stages.sizes):
        data = stages.tensor(number, product.reader.tensor)
        assert data is not None
        every = positions(product, data.shape)
        chosen = np.sort(rng.choice(every, min(every, -(-LEAST_ROWS // samples)), replace=False))
        patches = patches_at(data, product, chosen)
        for start in range(0, patches.shape[1], CHUNK):
            part = patches[:, start : start + CHUNK].astype(np.float64) * product.scale
            if biased:
                assert product.reader.bias is not None
                constant = product.scale / product.reader.bias.scale
                part = np.concatenate([part, np.full((*part.shape[:2], 1), constant)], axis=2)
            total = total + part.transpose(0, 2, 1) @ part
        rows += patches.shape[1]
    return np.asarray(total / rows)


def _layer(product: Product, bias: str, moments: Array, channels: Channels) -> Layer:
    width = moments.shape[1] - bool(bias)
    joined = _joined(product, bias, channels.resolved.constants).astype(np.float64)
    power = float(np.vdot(joined, moments @ joined)) / (joined.shape[0] * joined.shape[2])
    damped = moments.copy()
    diagonal = np.arange(width)
    means = np.mean(np.diagonal(moments, axis1=1, axis2=2)[:, :width], axis=1)
    damped[:, diagonal, diagonal] += np.where(means > 0, DAMPING * means, 1.0)[:, None]  # a dead input has no gradient
    inverse = np.stack([scipy.linalg.inv(part, check_finite=False) for part in damped])
    return Layer(product, bias, inverse.astype(np.float32), float(np.sqrt(max(power, 0.0))))


def _joined(product: Product, bias: str, values: Weights) -> Array:
    """(G, J, M): the weight as a matrix, and the bias as one more row of it."""
    matrix = as_matrix(values[product.weight], product)
    if not bias:
        return matrix
    return np.concatenate([matrix, values[bias].reshape(len(matrix), 1, -1)], axis=1)

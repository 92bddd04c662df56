"""Random small nets with redundancy that their weights prove.

Every net has one kind planted into each hidden layer, so that what the rules claim to cover follows from how it was
made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Floats = NDArray[np.float64]

SIZE = 6
INF = float("inf")


@dataclass(frozen=True)
class Activation:
    """An activation and what is known of it from its definition."""

    line: str
    value: Callable[[Floats], Floats]
    zero_below: float = -INF  # it is 0 from here downwards
    linear_above: float = INF  # it is the identity from here upwards
    homogeneous: bool = False


ACTIVATIONS = (
    Activation("Identity", lambda x: x, -INF, -INF, True),
    Activation("Relu", lambda x: np.maximum(x, 0), 0.0, 0.0, True),
    Activation("Relu", lambda x: np.maximum(x, 0), 0.0, 0.0, True),
    Activation("LeakyRelu", lambda x: np.where(x > 0, x, 0.01 * x), -INF, 0.0, True),
    Activation("Clip", lambda x: np.clip(x, 0, 6), 0.0),
    Activation("HardSwish", lambda x: x * np.clip(x / 6 + 0.5, 0, 1), -3.0, 3.1),
    Activation("Sigmoid", lambda x: 1 / (1 + np.exp(-x))),
    Activation("Tanh", np.tanh),
    Activation("Softplus", lambda x: np.logaddexp(0, x)),
)


@dataclass
class Net:
    """A net being made: nodes, weights, bounds of the current tensor, and what was planted."""

    rng: np.random.Generator
    low: Floats
    high: Floats
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: list[onnx.TensorProto] = field(default_factory=list)
    current: str = "x"
    size: int = SIZE
    planted: list[tuple[str, int]] = field(default_factory=list)

    def add(self, op: str, *constants: NDArray, **attributes: object) -> None:
        """Append a node that reads the current tensor and some constants."""
        number = len(self.nodes)
        names = [f"c{number}_{place}" for place in range(len(constants))]
        self.weights += [
            numpy_helper.from_array(np.asarray(value, dtype=np.float32), name)
            for name, value in zip(names, constants, strict=True)
        ]
        self.nodes.append(
            helper.make_node(op, [self.current, *names], [f"t{number}"], name=f"{op}_{number}", **attributes)
        )
        self.current = f"t{number}"

    def model(self) -> onnx.ModelProto:
        """The finished net."""
        value = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, SIZE, SIZE])
        graph = helper.make_graph(
            self.nodes, "net", [value], [helper.make_empty_tensor_value_info(self.current)], self.weights
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        return onnx.shape_inference.infer_shapes(model)


def hidden_layer(net: Net, bounded: bool) -> None:
    """Append product, normalization, activation and pooling, with one kind of redundancy in it."""
    rng = net.rng
    width, kernel = int(rng.integers(4, 11)), int(rng.choice([1, 3] if net.size > 3 else [1]))
    padded = bool(kernel == 3 and rng.integers(2))
    activation = ACTIVATIONS[rng.integers(len(ACTIVATIONS))]
    behind = str(rng.choice(["nothing", "max", "average", "depthwise"]))
    normalised = bool(rng.integers(2))

    kinds = ["copy"]
    if activation.zero_below > -INF:
        kinds.append("zero")
    if activation.homogeneous:
        kinds.append("multiple")
    if bounded and activation.zero_below > -INF:
        kinds += ["dead in the range"] * 5
    if (activation.linear_above == -INF or (bounded and activation.linear_above < INF)) and behind in (
        "nothing",
        "average",
    ):
        kinds += ["combination"] * 5
    kind = str(rng.choice(kinds))

    fan = len(net.low) * kernel * kernel
    if kind == "combination":
        width = min(width, fan)  # all others are independent
    count = int(rng.integers(1, max(2, width // 3) + 1))
    count = min(count, width - 2)
    if count < 1:
        width, count = 4, 1
    chosen = rng.permutation(width)
    gone, left = chosen[:count], chosen[count:]
    w = rng.normal(size=(width, len(net.low), kernel, kernel)) * np.sqrt(2 / fan)
    b = rng.normal(size=width) * 0.3
    gamma, mean = rng.uniform(0.5, 1.5, width) * rng.choice([-1, 1], width), rng.normal(size=width) * 0.2
    beta, variance = rng.normal(size=width) * 0.3, rng.uniform(0.5, 2, width)
    if kind == "combination":
        gamma[:], mean[:], beta[:], variance[:] = 1.25, 0, 0, 1 - 1e-5
        b[:] = 0
        mix = rng.normal(size=(count, len(left))) * rng.integers(0, 2, (count, len(left)))
        mix[:, 0] += 1 - mix.sum(axis=1)  # so that equal shifts are a combination too
        w[gone] = np.tensordot(mix, w[left], axes=1)
    for place, source in zip(gone, rng.choice(left, count), strict=True):
        times = 1.0 if kind == "copy" else float(np.exp(rng.uniform(-2, 2)))
        if kind in ("copy", "multiple"):
            w[place], b[place], mean[place] = times * w[source], times * b[source], times * mean[source]
            gamma[place], beta[place], variance[place] = gamma[source], times * beta[source], variance[source]
        elif kind == "zero":
            w[place], b[place] = 0, mean[place]
            beta[place] = activation.zero_below - rng.uniform(0.1, 1)
            if not normalised:
                b[place] = beta[place]

    low, high = (np.minimum(net.low, 0), np.maximum(net.high, 0)) if padded else (net.low, net.high)
    w, b, gamma, mean, beta, variance = (np.float32(v).astype(float) for v in (w, b, gamma, mean, beta, variance))

    def bounds() -> tuple[Floats, Floats]:
        with np.errstate(over="ignore"):
            return _bounds()

    def _bounds() -> tuple[Floats, Floats]:
        ends = np.stack([_times(w, low[:, None, None]), _times(w, high[:, None, None])])
        first, last = ends.min(axis=0).sum(axis=(1, 2, 3)) + b, ends.max(axis=0).sum(axis=(1, 2, 3)) + b
        if normalised:
            factor = gamma / np.sqrt(variance + 1e-5)
            ends = np.stack([factor * (first - mean) + beta, factor * (last - mean) + beta])
            first, last = ends.min(axis=0), ends.max(axis=0)
        return first, last

    first, last = bounds()
    shift = beta if normalised else b
    if kind == "dead in the range":
        shift[gone] -= last[gone] - activation.zero_below + 0.01 * (last - first)[gone] + 0.01
    elif kind == "combination" and activation.linear_above > -INF:
        shift += (activation.linear_above - first + 0.01 * (last - first)).max() + 0.01
    shift[:] = np.float32(shift)
    first, last = bounds()

    net.add("Conv", w, b, pads=[int(padded)] * 4, kernel_shape=[kernel, kernel])
    net.size += 2 * padded - kernel + 1
    if normalised:
        net.add("BatchNormalization", gamma, beta, mean, variance)
    if activation.line == "Clip":
        net.add("Clip", 0.0, 6.0)
    elif activation.line != "Identity":
        net.add(activation.line)
    with np.errstate(invalid="ignore", over="ignore"):
        turns = [np.clip(turn, first, last) for turn in (-1.5, 0.0)]
        values = np.nan_to_num(np.stack([activation.value(place) for place in (first, last, *turns)]), nan=0.0)
    net.low, net.high = values.min(axis=0), values.max(axis=0)
    if behind in ("max", "average") and net.size > 2:
        net.add("MaxPool" if behind == "max" else "AveragePool", kernel_shape=[2, 2])
        net.size -= 1
    elif behind == "depthwise":
        k = float(np.float32(rng.normal()))
        net.add("Conv", np.full((width, 1, 1, 1), k), group=width)
        ends = np.stack([_times(np.array(k), net.low), _times(np.array(k), net.high)])
        net.low, net.high = ends.min(axis=0), ends.max(axis=0)
    net.planted.append((kind, count))


def _times(a: Floats, b: Floats) -> Floats:
    with np.errstate(invalid="ignore", over="ignore"):
        return np.where(a == 0, 0.0, a * b)


def make(seed: int) -> tuple[Net, tuple[float, float] | None]:
    """A random net, and the range of its input; None for any input."""
    rng = np.random.default_rng(seed)
    ranges = ((0.0, 1.0), (-1.0, 1.0), (-2.5, 0.5), None, None)
    box = ranges[rng.integers(len(ranges))]
    low, high = box or (-INF, INF)
    net = Net(rng, np.full(3, low), np.full(3, high))
    for _ in range(int(rng.integers(1, 4))):
        hidden_layer(net, box is not None)
    width = len(net.low)
    if rng.integers(2):
        net.add("Flatten")
        net.add("Gemm", rng.normal(size=(width * net.size**2, 3)), rng.normal(size=3))
    else:
        net.add("Conv", rng.normal(size=(3, width, 1, 1)))
    return net, box

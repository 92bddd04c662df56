"""Planted dependence in nets that the `onnx` wheel does not ship, as PyTorch's two exporters and tf2onnx write them.

Every net is small, with random weights; in the axes that can shrink a quarter of the channels are overwritten by copies
of others (multiples, where a ReLU follows). The number of channels that go should be the number planted.

| column | meaning |
|---|---|
| planted, removed | channels that were planted, and that went |
| error | of the outputs on data that nothing has seen, relative to the largest |

Usage: python tools/planted_nets.py [NAME ...]; needs PyTorch and onnxscript.
"""

from __future__ import annotations

import argparse
import io
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional

from lindep_onnx import budget
from lindep_onnx.api import compress
from lindep_onnx.precision import widened
from lindep_onnx.verify import open_session

__all__ = ["NETS", "Figures", "Net", "figures"]

SAMPLES = 256


@dataclass(frozen=True)
class Net:
    """A model and what is planted in it.

    Attributes:
        model: the model; its one input has samples along the leading axis.
        shape: of one sample.
        planted: number of planted channels.
    """

    model: onnx.ModelProto
    shape: tuple[int, ...]
    planted: int


@dataclass(frozen=True)
class Figures:
    """One row; see the module for the meaning of the fields."""

    name: str
    planted: int
    removed: int
    error: float

    @property
    def recall(self) -> float:
        """Share of the planted channels that went."""
        return self.removed / self.planted


def plant(rng: np.random.Generator, places: Sequence[int], tensors: Sequence[Tensor], scale: float = 1.0) -> int:
    """Overwrite a quarter of some places along axis 0 by copies of others; returns how many.

    Args:
        rng: chooses them.
        places: along axis 0 of every tensor, alike in all that reads them.
        tensors: weights and biases that make the channels.
        scale: of the copies.
    """
    order = rng.permutation(list(places))
    count = max(1, len(order) // 4)
    with torch.no_grad():
        for copy, source in zip(order[:count], rng.choice(order[count:], count), strict=True):
            for tensor in tensors:
                tensor[copy] = scale * tensor[source]
    return count


def _of(layer: Any) -> list[Tensor]:
    return [layer.weight, layer.bias]


class _Shuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1)
        self.first, self.norm = nn.Conv2d(24, 36, 1, groups=3), nn.BatchNorm2d(36)
        self.depthwise = nn.Conv2d(36, 36, 3, padding=1, groups=36)
        self.second, self.last = nn.Conv2d(36, 24, 1, groups=3), nn.Conv2d(24, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.stem(x))
        h = functional.relu(self.norm(self.first(x)))
        n, c, height, width = h.shape
        h = h.view(n, 3, c // 3, height, width).transpose(1, 2).reshape(n, c, height, width)
        return self.last(functional.relu(x + self.second(self.depthwise(h))))

    def plant(self, rng: np.random.Generator) -> int:
        total = 0
        for group in range(3):
            for reader in range(3):  # four channels of each group of the first go to each group of the second
                own = [i for i in range(12) if (3 * i + group) // 12 == reader]
                places = [12 * group + i for i in own]
                order = rng.permutation(places)
                with torch.no_grad():
                    for tensor in (self.first.weight, self.first.bias):
                        tensor[order[0]] = tensor[order[1]]
                    behind = [3 * (int(place) - 12 * group) + group for place in order]
                    for tensor in (self.depthwise.weight, self.depthwise.bias):
                        tensor[behind[0]] = 2 * tensor[behind[1]]
                total += 1
        return 2 * total  # the depthwise convolution makes them once more


class _Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.ConvTranspose2d(8, 24, 4, 2, 1), nn.ConvTranspose2d(24, 24, 4, 2, 1, groups=2)
        self.c, self.d = nn.ConvTranspose2d(24, 16, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.a, self.b, self.c):
            x = functional.relu(layer(x))
        return self.d(x)

    def plant(self, rng: np.random.Generator) -> int:
        total = plant(rng, range(16), [self.c.weight.transpose(0, 1), self.c.bias], 1.5)
        for group in range(2):
            places = range(12 * group, 12 * group + 12)
            total += plant(rng, places, [self.a.weight.transpose(0, 1), self.a.bias], 0.5)
            own = self.b.weight[12 * group : 12 * group + 12].transpose(0, 1)
            total += plant(rng, range(12), [own, self.b.bias[12 * group : 12 * group + 12]], 2.0)
        return total


class _UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.up, self.c, self.d = nn.ConvTranspose2d(32, 16, 2, 2), nn.Conv2d(32, 16, 3, padding=1), nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = functional.relu(self.a(x))
        low = functional.relu(self.b(functional.max_pool2d(skip, 2)))
        return self.d(functional.relu(self.c(torch.cat([skip, self.up(low)], 1))))

    def plant(self, rng: np.random.Generator) -> int:
        total = sum(plant(rng, range(len(layer.bias)), _of(layer), 2.0) for layer in (self.a, self.b, self.c))
        return total + plant(rng, range(16), [self.up.weight.transpose(0, 1), self.up.bias], 2.0)


class _Chain(nn.Module):
    """A CNN over any number of spatial axes."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        convolution, norm = {
            1: (nn.Conv1d, nn.BatchNorm1d),
            3: (nn.Conv3d, nn.BatchNorm3d),
        }[rank]
        self.a, self.na = convolution(2, 16, 3), norm(16)
        self.b, self.c = convolution(16, 24, 3, padding=1), nn.Linear(24, 12)
        self.d = nn.Linear(12, 5)
        nn.init.uniform_(self.c.bias, 0.5, 1.0)  # none is dead but the planted ones

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.b(functional.relu(self.na(self.a(x)))))
        return self.d(functional.relu(self.c(x.flatten(2).mean(2))))

    def plant(self, rng: np.random.Generator) -> int:
        return plant(rng, range(16), _of(self.a)) + sum(
            plant(rng, range(len(layer.bias)), _of(layer), 2.0) for layer in (self.b, self.c)
        )


class _Encoder(nn.Module):
    """Two blocks of a transformer encoder, with GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block() for _ in range(2))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def plant(self, rng: np.random.Generator) -> int:
        total = 0
        for block in self.blocks:
            total += plant(rng, range(32), _of(block.up))
            for head in range(2):
                total += plant(rng, range(8 * head, 8 * head + 8), _of(block.v), 3.0)
        return total


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.after = nn.LayerNorm(16), nn.LayerNorm(16)
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        n, steps, width = x.shape
        h = self.norm(x)
        q, k, v = (layer(h).view(n, steps, 2, 8).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = torch.softmax(q @ k.transpose(-1, -2) / 8**0.5, -1) @ v
        x = x + self.o(mixed.transpose(1, 2).reshape(n, steps, width))
        return x + self.down(functional.gelu(self.up(self.after(x))))


def _exported(made: Callable[[], Any], shape: tuple[int, ...], *, dynamo: bool) -> Net:
    torch.manual_seed(0)
    module = made().eval()
    planted = module.plant(np.random.default_rng(0))
    example = torch.zeros(2, *shape)
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if dynamo:
            batch = {0: torch.export.Dim("batch")}
            program = torch.onnx.export(module, (example,), dynamo=True, dynamic_shapes=(batch,), verbose=False)
            assert program is not None
            return Net(program.model_proto, shape, planted)
        axes = {"x": {0: "batch"}}
        torch.onnx.export(module, (example,), file, dynamo=False, input_names=["x"], dynamic_axes=axes)
    return Net(onnx.load_from_string(file.getvalue()), shape, planted)


def _nhwc() -> Net:
    """Channels last outside, Transpose at each end, biases and normalization as separate nodes, Pad before a Conv."""
    text = """
        t = Transpose<perm=[0,3,1,2]>(x)
        p = Pad(t, around)
        c = Conv(p, w1)
        n = Mul(c, s1)
        b = Add(n, b1)
        r = Relu(b)
        u = Transpose<perm=[0,2,3,1]>(r)
        v = Transpose<perm=[0,3,1,2]>(u)
        d = Conv(v, w2)
        e = Transpose<perm=[0,2,3,1]>(d)
        f = Add(e, b2)
        g = Relu(f)
        m = ReduceMean<axes=[1,2], keepdims=0>(g)
        h = MatMul(m, w3)
        i = Add(h, b3)
        j = Relu(i)
        y = MatMul(j, w4)
    """
    rng = np.random.default_rng(0)
    shapes = {"w1": (16, 3, 3, 3), "s1": (1, 16, 1, 1), "b1": (1, 16, 1, 1), "w2": (24, 16, 1, 1), "b2": (24,)}
    shapes |= {"w3": (24, 12), "b3": (12,), "w4": (12, 4)}
    weights = {name: torch.tensor(0.4 * rng.normal(size=shape), dtype=torch.float32) for name, shape in shapes.items()}
    for name, least in (("s1", 0.5), ("b1", 0.0), ("b2", 0.0), ("b3", 1.0)):
        weights[name] = weights[name].abs() + least  # so that none is dead
    planted = plant(rng, range(16), [weights["w1"], weights["s1"][0], weights["b1"][0]])
    planted += plant(rng, range(24), [weights["w2"], weights["b2"]], 2.0)
    planted += plant(rng, range(12), [weights["w3"].T, weights["b3"]], 2.0)
    tensors = [numpy_helper.from_array(value.numpy(), name) for name, value in weights.items()]
    tensors.append(numpy_helper.from_array(np.array([0, 0, 1, 1, 0, 0, 1, 1]), "around"))
    nodes = [onnx.parser.parse_node(line.strip()) for line in text.strip().splitlines()]
    given = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", 8, 8, 3])
    made = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["batch", 4])
    graph = helper.make_graph(nodes, "nhwc", [given], [made], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8)
    return Net(model, (8, 8, 3), planted)


def _half(made: Callable[[], Net], kind: int) -> Net:
    """The same net in half precision; copies by powers of two stay exact, and so do copies."""
    net = made()
    for tensor in net.model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            value = numpy_helper.to_array(tensor)
            tensor.CopyFrom(helper.make_tensor(tensor.name, kind, value.shape, value.ravel().tolist()))
    for value in (*net.model.graph.input, *net.model.graph.output):
        value.type.tensor_type.elem_type = kind
    del net.model.graph.value_info[:]
    return net


_MODULES: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "shufflenet": (_Shuffle, (3, 8, 8)),
    "decoder": (_Decoder, (8, 4, 4)),
    "unet": (_UNet, (3, 16, 16)),
    "cnn_1d": (lambda: _Chain(1), (2, 32)),
    "cnn_3d": (lambda: _Chain(3), (2, 6, 6, 6)),
    "encoder": (_Encoder, (6, 16)),
}
NETS: dict[str, Callable[[], Net]] = {
    **{
        f"{name}, {exporter}": lambda made=made, shape=shape, dynamo=exporter == "dynamo": _exported(
            made, shape, dynamo=dynamo
        )
        for name, (made, shape) in _MODULES.items()
        for exporter in ("TorchScript", "dynamo")
    },
    "nhwc": _nhwc,
    "nhwc, float16": lambda: _half(_nhwc, onnx.TensorProto.FLOAT16),
    "nhwc, bfloat16": lambda: _half(_nhwc, onnx.TensorProto.BFLOAT16),
}


def figures(name: str) -> Figures:
    """Build, compress, compare.

    Args:
        name: one of `NETS`.
    """
    net = NETS[name]()
    budget.TIMED = 0.0
    calib = _data(net, SAMPLES, 1)
    result = compress(net.model, calib, round_to=1)
    removed = result.report.before.channels - result.report.after.channels
    fresh = _data(net, 32, 2)
    outputs = []
    for model in (net.model, result.model):
        session = open_session(widened(model), providers=["CPUExecutionProvider"], threads=0)
        outputs.append(session.run(None, fresh)[0])
    error = float(np.abs(outputs[0] - outputs[1]).max() / np.abs(outputs[0]).max())
    return Figures(name, net.planted, removed, error)


def _data(net: Net, count: int, seed: int) -> dict[str, NDArray[np.float32]]:
    values = np.random.default_rng(seed).normal(size=(count, *net.shape)).astype(np.float32)
    return {net.model.graph.input[0].name: values}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Plant dependent channels in small nets and count what is found.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(NETS)}")
    options = parser.parse_args(arguments)
    logging.disable(logging.WARNING)
    print("| net | planted | removed | recall | error |", "|---" * 5 + "|", sep="\n", flush=True)
    for name in options.names or NETS:
        found = figures(name)
        print(f"| {name} | {found.planted} | {found.removed} | {found.recall:.1%} | {found.error:.1e} |", flush=True)


if __name__ == "__main__":
    main()

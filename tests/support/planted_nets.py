"""Planted dependence in nets that the `onnx` wheel does not ship, as PyTorch's two exporters and tf2onnx write them.

Every net is small, with random weights; in the axes that can shrink a quarter of the channels are overwritten. The
number of channels that go should be the number planted, and none of a net in which nothing was planted.

| kind | channel | where |
|---|---|---|
| copy | another one, or its multiple | everywhere; multiples where what follows is linear or a ReLU |
| dead | far below zero | a ReLU follows |
| zero | zero | nothing adds to it |
| constant | the same everywhere | no reader sees zeros beyond a border |
| combination | the mean of others | what follows is linear |
| unclipped | the mean of others that are never negative | what is read is not negative either, and a ReLU follows |

Needs PyTorch and onnxscript.
"""

from __future__ import annotations

import functools
import io
import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional

from lindep_onnx.api import compress
from lindep_onnx.model.ir import load
from lindep_onnx.model.precision import to_float32

SAMPLES = 256
#: How far below zero a dead channel is, the level of a constant one, and how many others a combination adds up.
DEEP, LEVEL, PARENTS = 50.0, 0.75, 2


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
class Found:
    """What came of one net.

    Attributes:
        planted, removed: channels that were planted, and that went.
        error: of the outputs on data that nothing has seen, relative to the largest.
    """

    planted: int
    removed: int
    error: float


def plant(
    rng: np.random.Generator,
    places: Sequence[int],
    weights: Sequence[Tensor],
    bias: Tensor,
    kinds: Sequence[str],
    scale: float = 1.0,
) -> int:
    """Overwrite a quarter of some channels, and at least one for each kind, by planted ones; returns how many.

    Args:
        rng: chooses them.
        places: along axis 0 of every tensor, alike in all that reads them.
        weights: that make the channels.
        bias: added behind them.
        kinds: see the module.
        scale: of the copies.
    """
    order = rng.permutation(list(places)).tolist()
    count = max(len(kinds), len(order) // 4)
    sources = order[count:]
    parents = sources[:PARENTS]
    with torch.no_grad():
        if "unclipped" in kinds:
            for tensor in (*weights, bias):
                tensor[parents] = tensor[parents].abs() + 0.1 * (tensor is bias)
        for channel, kind in zip(order[:count], itertools.cycle(kinds)):
            source = int(rng.choice(sources))
            for tensor in (*weights, bias):
                if kind == "copy":
                    tensor[channel] = scale * tensor[source]
                elif kind in ("combination", "unclipped"):
                    tensor[channel] = tensor[parents].mean(dim=0)
                elif kind == "dead":
                    tensor[channel] = -DEEP if tensor is bias else tensor[channel]
                else:
                    tensor[channel] = LEVEL if tensor is bias and kind == "constant" else 0.0
    return count


def _of(layer: Any) -> tuple[list[Tensor], Tensor]:
    return [layer.weight], layer.bias


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
                own = [12 * group + i for i in range(12) if (3 * i + group) // 12 == reader]
                copy, dead, source, _ = rng.permutation(own).tolist()
                with torch.no_grad():
                    for tensor in (self.first.weight, self.first.bias):
                        tensor[copy] = tensor[source]
                    self.first.bias[dead] = -DEEP
                    shuffled = [3 * (place - 12 * group) + group for place in (copy, source)]
                    for tensor in (self.depthwise.weight, self.depthwise.bias):
                        tensor[shuffled[0]] = 2 * tensor[shuffled[1]]
                total += 2 * 2  # the depthwise convolution makes them once more
        for group in range(3):  # the residual: the same channels of both operands of the sum
            weights = [self.stem.weight, self.second.weight, self.second.bias]
            places = range(8 * group, 8 * group + 8)
            total += 2 * plant(rng, places, weights, self.stem.bias, ("copy",), 2.0)
        return total


class _Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.ConvTranspose2d(8, 24, 4, 2, 1), nn.ConvTranspose2d(24, 24, 4, 2, 1, groups=2)
        self.c, self.d = nn.ConvTranspose2d(24, 16, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)
        nn.init.uniform_(self.c.bias, 0.2, 0.4)  # none is dead but the planted ones

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.a, self.b, self.c):
            x = functional.relu(layer(x))
        return self.d(x)

    def plant(self, rng: np.random.Generator) -> int:
        kinds = ("copy", "dead", "unclipped")
        total = plant(rng, range(16), [self.c.weight.transpose(0, 1)], self.c.bias, kinds, 1.5)
        for group in range(2):
            own = range(12 * group, 12 * group + 12)
            total += plant(rng, own, [self.a.weight.transpose(0, 1)], self.a.bias, ("copy", "dead"), 0.5)
            part = slice(own.start, own.stop)
            total += plant(rng, range(12), [self.b.weight[part].transpose(0, 1)], self.b.bias[part], kinds, 2.0)
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
        total = plant(rng, range(16), *_of(self.a), ("copy", "dead"), 2.0)
        total += plant(rng, range(32), *_of(self.b), ("copy", "dead", "unclipped"), 2.0)
        total += plant(rng, range(16), *_of(self.c), ("copy", "dead", "constant"), 2.0)
        kinds = ("copy", "zero", "combination")
        return total + plant(rng, range(16), [self.up.weight.transpose(0, 1)], self.up.bias, kinds, 2.0)


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
        total = plant(rng, range(16), *_of(self.a), ("copy", "dead"))
        kinds = ("copy", "dead", "constant", "unclipped")
        return total + sum(plant(rng, range(len(layer.bias)), *_of(layer), kinds, 2.0) for layer in (self.b, self.c))


class _Residual(nn.Module):
    """Two residual blocks with a normalization, of random statistics, behind every convolution."""

    def __init__(self) -> None:
        super().__init__()
        sizes = ((3, 16), (16, 24), (24, 16), (16, 24), (24, 16))
        self.layers = nn.ModuleList(nn.Conv2d(*size, 3, padding=1, bias=False) for size in sizes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(made) for _, made in sizes)
        self.head = nn.Linear(16, 5)
        for norm in self.norms:
            for tensor in (norm.weight, norm.bias, norm.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
            nn.init.normal_(norm.running_mean, 0.0, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        convolved = [lambda x, i=i: self.norms[i](self.layers[i](x)) for i in range(5)]
        x = functional.relu(convolved[0](x))
        for first, second in ((1, 2), (3, 4)):
            x = functional.relu(x + convolved[second](functional.relu(convolved[first](x))))
        return self.head(x.mean((2, 3)))

    def plant(self, rng: np.random.Generator) -> int:
        total = 0
        for place in (1, 3):
            norm = self.norms[place]
            weights = [self.layers[place].weight, norm.weight, norm.running_mean, norm.running_var]
            total += plant(rng, range(24), weights, norm.bias, ("copy", "dead"))
        stream = [self.norms[i] for i in (0, 2, 4)]
        weights = [self.layers[i].weight for i in (0, 2, 4)]
        weights += [tensor for norm in stream for tensor in (norm.weight, norm.running_mean, norm.running_var)]
        weights += [norm.bias for norm in stream[1:]]
        return total + 3 * plant(rng, range(16), weights, stream[0].bias, ("copy",))


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
            total += plant(rng, range(32), *_of(block.up), ("copy", "zero", "constant"))
            for head in range(2):
                kinds = ("copy", "zero", "constant", "combination")
                total += plant(rng, range(8 * head, 8 * head + 8), *_of(block.v), kinds, 3.0)
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


def exported(name: str, dependent: bool, *, dynamo: bool = False, fused: bool = True) -> Net:
    """Export one of `MODULES`.

    Args:
        name: of the module.
        dependent: whether anything is planted.
        dynamo: by which exporter.
        fused: whether a BatchNormalization may become part of the convolution before it; else it stays a node.
    """
    made, shape = MODULES[name]
    torch.manual_seed(0)
    module = made().eval()
    planted = module.plant(np.random.default_rng(0)) if dependent else 0
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
        # The optimiser of this exporter fuses a normalization in evaluation mode, and in no other.
        mode = torch.onnx.TrainingMode.EVAL if fused else torch.onnx.TrainingMode.PRESERVE
        torch.onnx.export(
            module,
            (example,),
            file,
            dynamo=False,
            input_names=["x"],
            dynamic_axes=axes,
            training=mode,
            do_constant_folding=fused,
        )
    return Net(onnx.load_from_string(file.getvalue()), shape, planted)


def _nhwc(dependent: bool) -> Net:
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
    for name, least in (("s1", 0.5), ("b1", 0.0), ("b2", 0.0), ("b3", 3.0)):
        weights[name] = weights[name].abs() + least  # so that none is dead
    planted = 0
    if dependent:
        planted += plant(rng, range(16), [weights["w1"], weights["s1"][0]], weights["b1"][0], ("copy", "dead"))
        kinds = ("copy", "dead", "constant", "unclipped")
        planted += plant(rng, range(24), [weights["w2"]], weights["b2"], kinds, 2.0)
        planted += plant(rng, range(12), [weights["w3"].T], weights["b3"], kinds, 2.0)
    tensors = [numpy_helper.from_array(value.numpy(), name) for name, value in weights.items()]
    tensors.append(numpy_helper.from_array(np.array([0, 0, 1, 1, 0, 0, 1, 1]), "around"))
    nodes = [onnx.parser.parse_node(line.strip()) for line in text.strip().splitlines()]
    given = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", 8, 8, 3])
    made = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["batch", 4])
    graph = helper.make_graph(nodes, "nhwc", [given], [made], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8)
    return Net(model, (8, 8, 3), planted)


def _half(net: Net, kind: int) -> Net:
    """The same net in half precision. Copies by powers of two stay exact, combinations but for a rounding."""
    for tensor in net.model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            value = numpy_helper.to_array(tensor)
            tensor.CopyFrom(helper.make_tensor(tensor.name, kind, value.shape, value.ravel().tolist()))
    for value in (*net.model.graph.input, *net.model.graph.output):
        value.type.tensor_type.elem_type = kind
    del net.model.graph.value_info[:]
    return net


MODULES: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "shufflenet": (_Shuffle, (3, 8, 8)),
    "decoder": (_Decoder, (8, 4, 4)),
    "unet": (_UNet, (3, 16, 16)),
    "cnn_1d": (lambda: _Chain(1), (2, 32)),
    "cnn_3d": (lambda: _Chain(3), (2, 6, 6, 6)),
    "residual": (_Residual, (3, 8, 8)),
    "encoder": (_Encoder, (6, 16)),
}
#: Called with whether anything is planted.
NETS: dict[str, Callable[[bool], Net]] = {
    **{
        f"{name}, {exporter}": functools.partial(exported, name, dynamo=exporter == "dynamo")
        for name in MODULES
        for exporter in ("TorchScript", "dynamo")
    },
    "nhwc": _nhwc,
    "nhwc, float16": lambda dependent: _half(_nhwc(dependent), onnx.TensorProto.FLOAT16),
    "nhwc, bfloat16": lambda dependent: _half(_nhwc(dependent), onnx.TensorProto.BFLOAT16),
}


def found_in(name: str, dependent: bool = True) -> Found:
    """Build, compress, compare.

    Args:
        name: one of `NETS`.
        dependent: whether anything is planted.
    """
    net = NETS[name](dependent)
    result = compress(net.model, data(net, SAMPLES, 1), round_to=1, benchmark=0.01)
    fresh = data(net, 32, 2)
    models = [to_float32(load(model)).proto for model in (net.model, result.model)]
    one, other = (onnxruntime.InferenceSession(model.SerializeToString()).run(None, fresh)[0] for model in models)
    removed = result.report.before.channels - result.report.after.channels
    return Found(net.planted, removed, float(np.abs(one - other).max() / np.abs(one).max()))


def data(net: Net, count: int, seed: int) -> dict[str, NDArray[np.float32]]:
    """Random inputs of a net."""
    values = np.random.default_rng(seed).normal(size=(count, *net.shape)).astype(np.float32)
    return {net.model.graph.input[0].name: values}

"""Every operator rule, against an independent oracle.

The oracle needs no statistics: with zeros in the weights that multiply some units, the model without these units has
to compute the same. So random units are removed from each graph, and both models run in ONNX Runtime.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx
import pytest
from build import build, feed, ignoring, run, traced
from onnx import helper
from oracle import removal

from lindep_onnx.api import compress
from lindep_onnx.structure.rewrite import Removal, rewrite
from lindep_onnx.structure.rules import supported


@dataclass(frozen=True)
class Case:
    """A graph, and how many of its channels can shrink."""

    name: str
    body: str
    weights: dict = field(default_factory=dict)
    units: int = 8
    x: tuple = ("N", 3, 8, 8)
    outputs: str = "y"
    opset: int = 17
    inputs: dict = field(default_factory=dict)


W = {"w": (8, 3, 3, 3), "v": (4, 8, 3, 3)}
FIRST = "h = Conv<pads=[1,1,1,1]>(x, w)"
LAST = "y = Conv<pads=[1,1,1,1]>(t, v)"


def unary(op: str, **options: object) -> Case:
    return Case(op, f"{FIRST}\nt = {op}(h)\n{LAST}", W, **options)


def between(name: str, middle: str, extra: dict | None = None, **options: object) -> Case:
    return Case(name, f"{FIRST}\n{middle}\n{LAST}", {**W, **(extra or {})}, **options)


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


C = (8, 1, 1)
CASES = [
    *[unary(op) for op in ("Relu", "Sigmoid", "LeakyRelu", "Elu", "HardSwish", "Abs", "Neg", "Identity", "Exp", "Tanh")],
    *[unary(op) for op in ("Softplus", "HardSigmoid", "Erf", "Floor", "Softsign", "Selu", "Dropout", "Sin", "Ceil")],
    *[between(op, f"t = {op}(h, b)", {"b": C}) for op in ("Add", "Sub", "Mul", "PRelu", "Max", "Min", "Sum", "Mean")],
    between("Div by a constant", "t = Div(h, b)", {"b": np.full(C, 3, np.float32)}),
    between("Pow", "a = Abs(h)\nt = Pow(a, b)", {"b": np.full((1, 8, 1, 1), 2, np.float32)}),
    between("constant of size 1", "t = Add(h, b)", {"b": (1, 1, 1)}),
    between("constant with spatial axes", "t = Mul(h, b)", {"b": (8, 8, 8)}),
    between("PRelu with one slope", "t = PRelu(h, b)", {"b": (1,)}),
    between("Clip", "t = Clip(h, a, b)", {"a": np.float32(0), "b": np.float32(6)}),
    between("Clip of opset 6", "t = Clip<min=0.0, max=6.0>(h)", opset=10),
    between("Where", "c = Greater(h, b)\nt = Where(c, h, b)", {"b": C}),
    between("Cast", "d = Cast<to=11>(h)\nt = Cast<to=1>(d)"),
    between("swish", "s = Sigmoid(h)\nt = Mul(h, s)"),
    between(
        "BatchNormalization",
        "t = BatchNormalization(h, s, b, m, q)",
        {"s": (8,), "b": (8,), "m": (8,), "q": np.linspace(1, 2, 8, dtype=np.float32)},
    ),
    between("InstanceNormalization", "t = InstanceNormalization(h, s, b)", {"s": (8,), "b": (8,)}),
    between("MaxPool", "t = MaxPool<kernel_shape=[2,2], strides=[2,2]>(h)"),
    between("AveragePool", "t = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1]>(h)"),
    between("GlobalAveragePool", "t = GlobalAveragePool(h)"),
    between("GlobalMaxPool", "t = GlobalMaxPool(h)"),
    between("squeeze and excite", "g = GlobalAveragePool(h)\ns = Conv(g, k)\nr = Sigmoid(s)\nt = Mul(h, r)", {"k": (8, 8, 1, 1)}),
    between("ReduceMean", "t = ReduceMean<axes=[2,3]>(h)"),
    between("ReduceSum over an input", "t = ReduceSum(h, a)", {"a": ints(2, 3)}),
    between("ReduceMax without keepdims", "m = ReduceMax<axes=[2], keepdims=0>(h)\nt = Unsqueeze(m, a)", {"a": ints(2)}),
    between("Softmax over positions", "t = Softmax<axis=3>(h)"),
    between("LayerNormalization over positions", "t = LayerNormalization<axis=2>(h, s)", {"s": (8, 8)}),
    between("spatial Pad", "t = Pad(h, p)", {"p": ints(0, 0, 1, 1, 0, 0, 1, 1)}),
    between("reflecting spatial Pad", 't = Pad<mode="reflect">(h, p)', {"p": ints(0, 0, 1, 1, 0, 0, 1, 1)}),
    between("Resize by scales", "t = Resize(h, , s)", {"s": np.array([1, 1, 2, 2], np.float32)}),
    between("Resize to sizes", "n = Shape(h)\nb = Slice(n, z, o)\ns = Concat<axis=0>(b, c)\nt = Resize(h, , , s)", {"z": ints(0), "o": ints(1), "c": ints(8, 16, 16)}),
    between("Transpose there and back", "a = Transpose<perm=[0,2,3,1]>(h)\nt = Transpose<perm=[0,3,1,2]>(a)"),
    between("Reshape there and back", "a = Reshape(h, p)\nt = Reshape(a, q)", {"p": ints(0, 8, 64), "q": ints(0, -1, 8, 8)}),
    between("Reshape with the batch inferred", "a = Reshape(h, p)\nt = Reshape(a, q)", {"p": ints(-1, 8, 64), "q": ints(-1, 8, 8, 8)}),
    between("Reshape to a computed shape", "s = Shape(h)\na = Relu(h)\nt = Reshape(a, s)"),
    between("Reshape to a shape partly computed", "s = Shape(h)\ni = Gather(s, z)\nk = Concat<axis=0>(i, c)\nt = Reshape(h, k)", {"z": ints(0), "c": ints(8, 16, 4)}),
    between("channel shuffle", "a = Reshape(h, p)\nb = Transpose<perm=[0,2,1,3,4]>(a)\nt = Reshape(b, q)", {"p": ints(0, 2, 4, 8, 8), "q": ints(0, 8, 8, 8)}),
    between("Squeeze and Unsqueeze", "p = GlobalAveragePool(h)\na = Squeeze(p, k)\nt = Unsqueeze(a, k)", {"k": ints(2, 3)}),
    between("Squeeze of opset 11", "p = GlobalAveragePool(h)\na = Squeeze<axes=[2,3]>(p)\nt = Unsqueeze<axes=[2,3]>(a)", opset=11),
    between("Expand", "p = GlobalAveragePool(h)\nt = Expand(p, k)", {"k": ints(1, 8, 4, 4)}),
    between("Expand to the shape of another", "p = GlobalAveragePool(h)\ns = Shape(h)\nt = Expand(p, s)"),
    between("Expand over the channels", "m = ReduceMean<axes=[1]>(x)\ne = Expand(m, k)\nt = Mul(h, e)", {"k": ints(1, 8, 1, 1)}),
    between("Expand over the channels to the shape of another", "m = ReduceMean<axes=[1]>(x)\ns = Shape(h)\ne = Expand(m, s)\nt = Mul(h, e)"),
    between("Expand of a constant", "n = Shape(h)\nb = Slice(n, z, o)\ns = Concat<axis=0>(b, c)\ne = Expand(k, s)\nt = Add(h, e)", {"z": ints(0), "o": ints(1), "c": ints(8, 8, 8), "k": (8, 1, 1)}),
    Case("Expand of a token", "h = MatMul(x, w)\nn = Shape(x)\nb = Slice(n, z, o)\ns = Concat<axis=0>(b, c)\ne = Expand(k, s)\nt = Concat<axis=1>(e, h)\ny = MatMul(t, v)", {"w": (6, 8), "z": ints(0), "o": ints(1), "c": ints(1, 8), "k": (1, 1, 8), "v": (8, 5)}, x=("N", 4, 6)),
    Case("Tile over channels", f"{FIRST}\nt = Tile(h, k)\n{LAST}", {"w": (8, 3, 3, 3), "k": ints(1, 3, 1, 1), "v": (4, 24, 3, 3)}),
    between("ScatterND over the batch", "r = Relu(h)\ng = Conv<pads=[1,1,1,1]>(x, k)\nu = Slice(g, z, o)\nt = ScatterND(r, i, u)", {"k": (8, 3, 3, 3), "z": ints(0), "o": ints(1), "i": np.array([[1]])}),
    between("ScatterND of a constant", "t = ScatterND(h, i, u)", {"i": np.array([[1]]), "u": (1, 8, 8, 8)}),
    Case("ScatterND over positions", "h = MatMul(x, w)\nm = MatMul(x, k)\nu = Slice(m, a, b, c)\nt = ScatterND(h, i, u)\ny = MatMul(t, v)", {"w": (6, 8), "k": (6, 8), "a": ints(0), "b": ints(2), "c": ints(1), "i": np.array([[[0, 3], [0, 1]], [[1, 0], [1, 1]], [[2, 3], [2, 2]]]), "v": (8, 5)}, x=(3, 4, 6)),
    Case("ScatterND of computed indices", "h = MatMul(x, w)\nm = MatMul(x, k)\nc = Cast<to=7>(j)\nt = ScatterND(h, c, m)\ny = MatMul(t, v)", {"w": (6, 8), "k": (6, 8), "v": (8, 5)}, x=(3, 6), inputs={"j": (3, 1)}),
    between("ScatterElements over positions", "t = ScatterElements<axis=2>(h, i, u)", {"i": np.arange(8).reshape(1, 8, 1, 1), "u": (1, 8, 1, 1)}, x=(1, 3, 8, 1)),
    between("Scatter of opset 9", "t = Scatter<axis=2>(h, i, h)", {"i": np.tile(np.arange(8)[::-1, None], (1, 8, 1, 1))}, x=(1, 3, 8, 1), opset=9),
    between("GatherElements over positions", "t = GatherElements<axis=3>(h, i)", {"i": np.tile(np.arange(8)[::-1], (2, 8, 8, 1))}, x=(2, 3, 8, 8)),
    Case("GatherND over positions", "h = MatMul(x, w)\nt = GatherND<batch_dims=1>(h, i)\ny = MatMul(t, v)", {"w": (6, 8), "v": (8, 5), "i": np.array([[[3], [1]], [[0], [2]]])}, x=(2, 4, 6)),
    between("Tile over positions", "t = Tile(h, k)", {"k": ints(1, 1, 2, 2)}),
    between("residual", "a = Relu(h)\nb = Conv<pads=[1,1,1,1]>(a, k)\nt = Add(b, h)", {"k": (8, 8, 3, 3)}),
    between("depthwise", "t = Conv<group=8, pads=[1,1,1,1]>(h, k, b)", {"k": (8, 1, 3, 3), "b": (8,)}),
    Case("depthwise with multiplier", f"{FIRST}\nt = Conv<group=8>(h, k)\ny = Conv(t, v)", {**W, "k": (16, 1, 3, 3), "v": (4, 16, 1, 1)}),
    Case("no padding, with bias", "h = Conv(x, w, b)\nr = Relu(h)\ny = Conv(r, v, c)", {**W, "b": (8,), "c": (4,)}),
    Case("grouped convolution", f"{FIRST}\nt = Conv<group=2>(h, k)\ny = Conv(t, v)", {**W, "k": (8, 4, 1, 1), "v": (4, 8, 1, 1)}, units=16),
    Case("grouped convolution with bias", f"{FIRST}\na = Conv<group=4>(h, k, b)\nt = Relu(a)\ny = Conv(t, v)", {**W, "k": (12, 2, 3, 3), "b": (12,), "v": (4, 12, 1, 1)}, units=20),
    Case("grouped convolution with one weight for two nodes", f"{FIRST}\na = Conv<group=2>(h, k)\nb = Conv<group=2>(a, k)\ny = Conv(b, v)", {**W, "k": (8, 4, 1, 1), "v": (4, 8, 1, 1)}, units=8),
    Case("grouped transposed convolution", f"{FIRST}\na = ConvTranspose<group=2>(h, k, b)\nr = Relu(a)\ny = ConvTranspose(r, v)", {**W, "k": (8, 5, 2, 2), "b": (10,), "v": (10, 4, 2, 2)}, units=18),
    Case("ShuffleNet unit", f"{FIRST}\nn = BatchNormalization(h, s, s, m, s)\ng = Conv<group=2>(n, k)\nr = Relu(g)\na = Reshape(r, p)\nb = Transpose<perm=[0,2,1,3,4]>(a)\nc = Reshape(b, q)\nd = Conv<group=12, pads=[1,1,1,1]>(c, e)\nf = Conv<group=2>(d, u)\nt = Add(f, h)\n{LAST}", {**W, "s": np.linspace(1, 2, 8, dtype=np.float32), "m": (8,), "k": (12, 4, 1, 1), "p": ints(0, 2, 6, 8, 8), "q": ints(0, 12, 8, 8), "e": (12, 1, 3, 3), "u": (8, 6, 1, 1)}, units=20),
    Case("attention heads", "a = MatMul(x, wv)\nc = Add(a, bv)\nd = Reshape(c, p)\nv = Transpose<perm=[0,2,1,3]>(d)\nq = MatMul(x, wq)\nr = Reshape(q, p)\ns = Transpose<perm=[0,2,3,1]>(r)\nu = Transpose<perm=[0,2,1,3]>(r)\nz = MatMul(u, s)\nk = Softmax(z)\no = MatMul(k, v)\nm = Transpose<perm=[0,2,1,3]>(o)\nn = Reshape(m, e)\ny = MatMul(n, wo)", {"wv": (6, 12), "bv": (12,), "wq": (6, 12), "wo": (12, 5), "p": ints(0, 0, 3, 4), "e": ints(0, 0, 12)}, x=("N", 5, 6), units=12),
    Case("attention from one product", "a = MatMul(x, w)\nq0, k0, v0 = Split<axis=-1>(a)\nq1 = Reshape(q0, p)\nq = Transpose<perm=[0,2,1,3]>(q1)\nk1 = Reshape(k0, p)\nk = Transpose<perm=[0,2,3,1]>(k1)\nv1 = Reshape(v0, p)\nv = Transpose<perm=[0,2,1,3]>(v1)\nz = MatMul(q, k)\nd = Div(z, f)\ns = Softmax(d)\no = MatMul(s, v)\nm = Transpose<perm=[0,2,1,3]>(o)\nn = Reshape(m, e)\ny = MatMul(n, wo)", {"w": (6, 36), "f": np.float32(2), "p": ints(0, 0, 3, 4), "e": ints(0, 0, 12), "wo": (12, 5)}, x=("N", 5, 6), units=12),
    Case("1-D convolution", "h = Conv(x, w)\nr = Relu(h)\ny = Conv(r, v)", {"w": (8, 3, 3), "v": (4, 8, 3)}, x=("N", 3, 16)),
    Case("3-D convolution", "h = Conv(x, w)\nr = Relu(h)\ny = Conv(r, v)", {"w": (8, 3, 2, 2, 2), "v": (4, 8, 1, 1, 1)}, x=(1, 3, 4, 4, 4)),
    Case("ConvTranspose", "h = ConvTranspose(x, w, b)\nr = Relu(h)\ny = ConvTranspose(r, v)", {"w": (3, 8, 2, 2), "b": (8,), "v": (8, 4, 2, 2)}),
    Case("Concat", f"{FIRST}\ng = Conv<pads=[1,1,1,1]>(x, k)\nt = Concat<axis=1>(h, g)\n{LAST}", {"w": (8, 3, 3, 3), "k": (4, 3, 3, 3), "v": (4, 12, 3, 3)}, units=12),
    Case("Concat of the same tensor twice", f"{FIRST}\nt = Concat<axis=1>(h, h)\n{LAST}", {"w": (8, 3, 3, 3), "v": (4, 16, 3, 3)}),
    Case("Concat with the input", f"{FIRST}\nt = Concat<axis=1>(x, h)\n{LAST}", {"w": (8, 3, 3, 3), "v": (4, 11, 3, 3)}),
    Case("Concat over positions", f"{FIRST}\ng = Conv<pads=[1,1,1,1]>(x, k)\nt = Concat<axis=2>(h, g)\n{LAST}", {**W, "k": (8, 3, 3, 3)}),
    Case("Concat with a constant", f"{FIRST}\nt = Concat<axis=1>(h, k)\n{LAST}", {"w": (8, 3, 3, 3), "k": (1, 2, 8, 8), "v": (4, 10, 3, 3)}, units=10, x=(1, 3, 8, 8)),
    Case("Split", f"{FIRST}\na, b = Split<axis=1>(h, s)\nc = Relu(b)\nt = Concat<axis=1>(c, a)\n{LAST}", {**W, "s": ints(3, 5)}),
    Case("Split in equal parts", f"{FIRST}\na, b = Split<axis=1>(h)\nt = Add(a, b)\n{LAST}", {"w": (8, 3, 3, 3), "v": (4, 4, 3, 3)}, units=4),
    Case("Split of opset 11", f"{FIRST}\na, b = Split<axis=1, split=[3,5]>(h)\nt = Concat<axis=1>(b, a)\n{LAST}", W, opset=11),
    Case("Split with a number of outputs", f"{FIRST}\na, b = Split<axis=1, num_outputs=2>(h)\nt = Concat<axis=1>(b, a)\n{LAST}", W, opset=18),
    Case("Slice", f"{FIRST}\nt = Slice(h, a, b, c)\n{LAST}", {"w": (8, 3, 3, 3), "v": (4, 5, 3, 3), "a": ints(2), "b": ints(7), "c": ints(1)}, units=5),
    Case("Slice with a step", f"{FIRST}\nt = Slice(h, a, b, c, d)\n{LAST}", {"w": (8, 3, 3, 3), "v": (4, 4, 3, 3), "a": ints(0), "b": ints(8), "c": ints(1), "d": ints(2)}, units=4),
    Case("backward Slice of two axes", f"{FIRST}\nt = Slice(h, a, b, c, d)\n{LAST}", {**W, "a": ints(-1, 0), "b": ints(-9, 4), "c": ints(1, 2), "d": ints(-1, 2)}),
    Case("Slice of opset 9", f"{FIRST}\nt = Slice<axes=[1], starts=[2], ends=[7]>(h)\n{LAST}", {"w": (8, 3, 3, 3), "v": (4, 5, 3, 3)}, opset=9, units=5),
    between("spatial Slice", "t = Slice(h, a, b, c, d)", {"a": ints(0), "b": ints(8), "c": ints(2), "d": ints(2)}),
    Case("Gather", f"{FIRST}\nt = Gather<axis=1>(h, i)\n{LAST}", {"w": (8, 3, 3, 3), "v": (4, 4, 3, 3), "i": ints(7, 0, 3, -2)}, units=4),
    Case("Gather the same channel twice", f"{FIRST}\nt = Gather<axis=1>(h, i)\n{LAST}", {"w": (8, 3, 3, 3), "v": (4, 4, 3, 3), "i": ints(1, 1, 3, 2)}, units=3),
    Case("channel Pad", f"{FIRST}\na = Pad(h, p)\nb = Conv<pads=[1,1,1,1]>(x, k)\nt = Add(a, b)\n{LAST}", {"w": (8, 3, 3, 3), "k": (12, 3, 3, 3), "v": (4, 12, 3, 3), "p": ints(0, 1, 0, 0, 0, 3, 0, 0)}, units=12),
    Case("channel Pad of opset 10", f"{FIRST}\nt = Pad<pads=[0,1,0,0,0,3,0,0]>(h)\n{LAST}", {"w": (8, 3, 3, 3), "v": (4, 12, 3, 3)}, units=12, opset=10),
    Case("Flatten into Gemm", f"{FIRST}\nr = Relu(h)\nf = Flatten(r)\ny = Gemm(f, v, b)", {"w": (8, 3, 3, 3), "v": (512, 5), "b": (5,)}),
    Case("Reshape into Gemm", f"{FIRST}\nf = Reshape(h, p)\ny = Gemm<transB=1>(f, v)", {"w": (8, 3, 3, 3), "v": (5, 512), "p": ints(0, -1)}),
    Case("Reshape with a number into Gemm", f"{FIRST}\nf = Reshape(h, p)\ny = Gemm<transB=1>(f, v)", {"w": (8, 3, 3, 3), "v": (5, 512), "p": ints(-1, 512)}),
    Case("NHWC Flatten into Gemm", f"{FIRST}\nr = Transpose<perm=[0,2,3,1]>(h)\nf = Flatten(r)\ny = Gemm(f, v)", {"w": (8, 3, 3, 3), "v": (512, 5)}),
    Case("Gemm chain", "a = Gemm<alpha=0.5, beta=2.0>(x, w, b)\nr = Relu(a)\ny = Gemm<transB=1>(r, v)", {"w": (6, 8), "b": (8,), "v": (5, 8)}, x=("N", 6)),
    Case("Gemm with a row of bias", "a = Gemm(x, w, b)\nr = Relu(a)\ny = Gemm(r, v)", {"w": (6, 8), "b": (1, 8), "v": (8, 5)}, x=("N", 6)),
    Case("Gemm with scalar bias", "a = Gemm(x, w, b)\nr = Relu(a)\ny = Gemm(r, v)", {"w": (6, 8), "b": (1,), "v": (8, 5)}, x=("N", 6)),
    Case("Gemm with a full bias", "a = Gemm(x, w, b)\nr = Relu(a)\ny = Gemm(r, v)", {"w": (6, 8), "b": (3, 8), "v": (8, 5)}, x=(3, 6)),
    Case("MatMul and Add", "a = MatMul(x, w)\nb = Add(a, c)\nr = Relu(b)\ny = MatMul(r, v)", {"w": (6, 8), "c": (8,), "v": (8, 5)}, x=("N", 4, 6)),
    Case("MatMul with the weight on the left", "a = MatMul(w, x)\nr = Relu(a)\ny = MatMul(v, r)", {"w": (8, 6), "v": (5, 8)}, x=("N", 6, 4)),
    Case("mixer", "t = Transpose<perm=[0,2,1]>(x)\na = MatMul(t, w)\nr = Relu(a)\nb = MatMul(r, v)\ny = Transpose<perm=[0,2,1]>(b)", {"w": (6, 8), "v": (8, 6)}, x=("N", 6, 4)),
    Case("product of two computed tensors", "a = MatMul(x, w)\nk = MatMul(x, u)\nt = Transpose<perm=[0,2,1]>(k)\ns = MatMul(a, t)\np = Softmax(s)\nc = MatMul(x, q)\no = MatMul(p, c)\ny = MatMul(o, v)", {"w": (6, 8), "u": (6, 8), "q": (6, 8), "v": (8, 5)}, x=("N", 4, 6)),
    Case("embedding", "i = Cast<to=7>(x)\ne = Gather(k, i)\ny = MatMul(e, v)", {"k": (5, 8), "v": (8, 3)}, x=("N", 4)),
    Case("shared weight", "h = Conv(x, w)\na = Conv<pads=[1,1,1,1]>(h, k)\nb = Relu(a)\nc = Conv<pads=[1,1,1,1]>(b, k)\ny = Conv(c, v)", {"w": (8, 3, 1, 1), "k": (8, 8, 3, 3), "v": (4, 8, 1, 1)}),
    Case("shared bias", "h = Conv(x, w, b)\na = Conv(h, k, b)\ny = Conv(a, v)", {"w": (8, 3, 1, 1), "k": (8, 8, 1, 1), "v": (4, 8, 1, 1), "b": (8,)}, units=16),
    Case("two outputs", "h = Conv(x, w)\ny = Conv(h, v)\nz = Conv(h, k)", {"w": (8, 3, 1, 1), "v": (4, 8, 1, 1), "k": (2, 8, 1, 1)}, outputs="y z"),
    Case("number of channels used as a number", f"{FIRST}\ns = Shape(h)\nc = Gather(s, i)\nf = Cast<to=1>(c)\nt = Div(h, f)\n{LAST}", {**W, "i": np.int64(1)}),
    Case("shape used whole as numbers", f"{FIRST}\ns = Shape(h)\nf = Cast<to=1>(s)\nm = ReduceMax<keepdims=0>(f)\nt = Div(h, m)\n{LAST}", W),
    Case("ArgMax over positions is no channel", f"{FIRST}\na = ArgMax<axis=2>(h)\nt = Cast<to=1>(a)\n{LAST}", W),
    Case("TopK over positions", f"{FIRST}\nt, i = TopK<axis=3>(h, k)\n{LAST}", {**W, "k": ints(4)}),
    Case("CumSum over positions", f"{FIRST}\nt = CumSum(h, k)\n{LAST}", {**W, "k": np.int64(2)}),
    Case("DepthToSpace", f"{FIRST}\nt = DepthToSpace<blocksize=2>(h)\n{LAST}", {"w": (8, 3, 3, 3), "v": (4, 2, 3, 3)}, units=2),
    Case("DepthToSpace channel by channel", f"{FIRST}\nt = DepthToSpace<blocksize=2, mode=\"CRD\">(h)\n{LAST}", {"w": (12, 3, 3, 3), "v": (4, 3, 3, 3)}, units=3),
    Case("SpaceToDepth", f"{FIRST}\nt = SpaceToDepth<blocksize=2>(h)\n{LAST}", {"w": (8, 3, 3, 3), "v": (4, 32, 3, 3)}),
    Case("LSTM", "h = MatMul(x, w)\na = Relu(h)\ny, u = LSTM<hidden_size=3>(a, k, r)", {"w": (6, 8), "k": (1, 12, 8), "r": (1, 12, 3)}, x=(4, "N", 6), outputs="y u"),
    Case("GRU in both directions", 'h = MatMul(x, w)\n, y = GRU<hidden_size=3, direction="bidirectional">(h, k, r, b)', {"w": (6, 8), "k": (2, 9, 8), "r": (2, 9, 3), "b": (2, 18)}, x=(4, "N", 6)),
    Case("Einsum", 'h = Einsum<equation="bti,io->bto">(x, w)\na = Relu(h)\ny = Einsum<equation="ko, bto -> btk">(v, a)', {"w": (6, 8), "v": (5, 8)}, x=("N", 4, 6)),
    Case("Einsum that scales", 'h = Einsum<equation="bti,io->bto">(x, w)\ns = Einsum<equation="bto,to->bto">(h, k)\nt = Einsum<equation="o,bto->bto">(c, s)\ny = MatMul(t, v)', {"w": (6, 8), "k": (4, 8), "c": (8,), "v": (8, 5)}, x=("N", 4, 6)),
    Case("attention in Einsum", 'a = MatMul(x, wv)\nv = Reshape(a, p)\nq = MatMul(x, wq)\nr = Reshape(q, p)\ns = Einsum<equation="bqhd,bkhd->bhqk">(r, r)\nk = Softmax(s)\no = Einsum<equation="bhqk,bkhd->bqhd">(k, v)\nn = Reshape(o, e)\ny = MatMul(n, wo)', {"wv": (6, 12), "wq": (6, 12), "wo": (12, 5), "p": ints(0, 0, 3, 4), "e": ints(0, 0, 12)}, x=("N", 5, 6), units=12),
    Case("Einsum over positions", 'h = Einsum<equation="bti,ot->boi">(x, w)\na = Relu(h)\ny = Einsum<equation="boi,ok->bki">(a, v)', {"w": (8, 4), "v": (8, 5)}, x=("N", 4, 6)),
    Case("zeros beside channels", f"{FIRST}\nz = ConstantOfShape(s)\na = Concat<axis=1>(h, z)\nb = Conv<pads=[1,1,1,1]>(x, k)\nt = Add(a, b)\n{LAST}", {"w": (8, 3, 3, 3), "k": (12, 3, 3, 3), "s": ints(2, 4, 8, 8), "v": (4, 12, 3, 3)}, units=12, x=(2, 3, 8, 8)),
    Case("zeros of a computed shape", f"{FIRST}\nn = Shape(h)\nm = Gather(n, i)\ns = Concat<axis=0>(m, c)\nz = ConstantOfShape(s)\nt = Concat<axis=1>(h, z)\n{LAST}", {"w": (8, 3, 3, 3), "i": ints(0), "c": ints(4, 8, 8), "v": (4, 12, 3, 3)}, units=12),
    between("GELU in pieces", "d = Div(h, r)\ne = Erf(d)\np = Add(e, o)\nm = Mul(h, p)\nt = Mul(m, f)", {"r": np.float32(1.414), "o": np.float32(1), "f": np.float32(0.5)}),
    between("InstanceNormalization in pieces", "m = ReduceMean<axes=[2,3]>(h)\nd = Sub(h, m)\nq = Mul(d, d)\nv2 = ReduceMean<axes=[2,3]>(q)\ne = Add(v2, f)\nr = Sqrt(e)\nt = Div(d, r)", {"f": np.float32(1e-5)}),
    between("BatchNormalization in pieces", "a = Sub(h, m)\nb = Mul(a, s)\nt = Add(b, c)", {"m": (8, 1, 1), "s": (8, 1, 1), "c": (8, 1, 1)}),
    Case("gated MLP", "a = MatMul(x, w)\nb = MatMul(x, k)\ns = Sigmoid(a)\ng = Mul(a, s)\nt = Mul(g, b)\ny = MatMul(t, v)", {"w": (6, 8), "k": (6, 8), "v": (8, 6)}, x=("N", 4, 6)),
    Case("gated MLP split from one product", "h = MatMul(x, w)\na, b = Split<axis=-1>(h)\ns = Sigmoid(a)\ng = Mul(a, s)\nt = Mul(g, b)\ny = MatMul(t, v)", {"w": (6, 16), "v": (8, 6)}, x=("N", 4, 6)),
    Case("U-Net", "a = Conv<pads=[1,1,1,1]>(x, w)\nr = Relu(a)\np = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r)\nb = Conv<pads=[1,1,1,1]>(p, k)\nq = Relu(b)\nu = ConvTranspose<strides=[2,2]>(q, e)\nt = Concat<axis=1>(r, u)\ny = Conv<pads=[1,1,1,1]>(t, v)", {"w": (8, 3, 3, 3), "k": (6, 8, 3, 3), "e": (6, 5, 2, 2), "v": (2, 13, 3, 3)}, units=19),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("share", [0.4, 1.0])
def test_removing_units_equals_multiplying_them_by_zero(case: Case, share: float) -> None:
    model = build(case.body, case.weights, x=case.x, outputs=case.outputs, opset=case.opset, inputs=case.inputs)
    onnx.checker.check_model(model, full_check=True)
    channels = traced(model)
    assert channels.units == case.units
    removed = removal(channels, share, seed=7)
    assert removed.any()
    smaller = rewrite(channels, Removal(removed), "test").proto
    onnx.checker.check_model(smaller, full_check=True)
    data = feed(model)
    got, want, whole = run(smaller, data), run(ignoring(channels, removed), data), run(model, data)
    for one, other, original in zip(got, want, whole, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4 * np.abs(other).max() + 1e-7)
    # The negative control: these units do matter to the original model.
    assert any(not np.allclose(one, original, rtol=1e-3) for one, original in zip(got, whole, strict=True))


def test_every_case_loses_parameters() -> None:
    for case in CASES:
        model = build(case.body, case.weights, x=case.x, outputs=case.outputs, opset=case.opset, inputs=case.inputs)
        channels = traced(model)
        smaller = rewrite(channels, Removal(removal(channels, 1.0, seed=1)), "test").proto
        assert smaller.ByteSize() < model.ByteSize() + 200, case.name


REFUSED = [
    ("graph output", "y = Conv(x, w)", {"w": (8, 3, 1, 1)}, "graph_output"),
    ("unknown operator", f"{FIRST}\nt = Det(h)\ny = Relu(t)", {"w": (8, 3, 3, 3)}, "unknown_operator"),
    ("Softmax over channels", f"{FIRST}\nt = Softmax<axis=1>(h)\n{LAST}", W, "mixed_axis"),
    ("LayerNormalization", "h = MatMul(x, w)\nt = LayerNormalization(h, s)\ny = MatMul(t, v)", {"w": (6, 8), "s": (8,), "v": (8, 4)}, "mixed_axis"),
    ("GroupNormalization", f"{FIRST}\ny = GroupNormalization<num_groups=2>(h, s, s)", {"w": (8, 3, 3, 3), "s": (8,)}, "mixed_axis"),
    ("Einsum of two computed tensors", f'{FIRST}\nt = Einsum<equation="bchw,bchw->bchw">(h, h)\n{LAST}', W, "contracted"),
    ("Einsum with a batch of matrices", f'{FIRST}\ny = Einsum<equation="bchw,cho->bohw">(h, k)', {"w": (8, 3, 3, 3), "k": (8, 8, 5)}, "einsum"),
    ("Einsum with dots", f'{FIRST}\ny = Einsum<equation="...w,wo->...o">(h, k)', {"w": (8, 3, 3, 3), "k": (8, 5)}, "einsum"),
    ("ScatterND over channels", f"{FIRST}\nt = Transpose<perm=[1,0,2,3]>(h)\ny = ScatterND(t, i, u)", {"w": (8, 3, 3, 3), "i": np.array([[1]]), "u": (1, 3, 8, 8)}, "indexed"),
    ("ScatterElements over channels", f"{FIRST}\ny = ScatterElements<axis=1>(h, i, u)", {"w": (8, 3, 3, 3), "i": np.full((3, 1, 8, 8), 7), "u": (3, 1, 8, 8)}, "indexed"),
    ("GatherND over channels", f"{FIRST}\ny = GatherND(h, i)", {"w": (8, 3, 3, 3), "i": np.array([[0, 1]])}, "indexed"),
    ("query, key and value from one Reshape", "a = MatMul(x, w)\nr = Reshape(a, p)\nt = Transpose<perm=[2,0,3,1,4]>(r)\nq = Gather(t, zero)\nk = Gather(t, one)\nv = Gather(t, two)\nu = Transpose<perm=[0,1,3,2]>(k)\nz = MatMul(q, u)\ns = Softmax(z)\no = MatMul(s, v)\nm = Transpose<perm=[0,2,1,3]>(o)\nn = Reshape(m, e)\ny = MatMul(n, wo)", {"w": (6, 36), "zero": np.int64(0), "one": np.int64(1), "two": np.int64(2), "p": ints(0, 0, 3, 3, 4), "e": ints(0, 0, 12), "wo": (12, 5)}, "contracted"),
    ("query and key", "q = MatMul(x, w)\nk = MatMul(x, v)\nt = Transpose<perm=[0,2,1]>(k)\ns = MatMul(q, t)\ny = Softmax(s)", {"w": (6, 8), "v": (6, 8)}, "contracted"),
    ("one channel in each group", "t = Conv<group=3>(x, w)\ny = Conv(t, v)", {"w": (3, 2, 1, 1), "v": (4, 3, 1, 1)}, "grouped_convolution"),
    ("LRN", f"{FIRST}\nt = LRN<size=3>(h)\n{LAST}", W, "mixed_axis"),
    ("reduced channels", f"{FIRST}\nt = ReduceSum(h, a)\ny = Relu(t)", {"w": (8, 3, 3, 3), "a": ints(1)}, "mixed_axis"),
    ("sum with the input", "h = Conv(x, w)\nt = Add(h, x)\ny = Conv(t, v)", {"w": (3, 3, 1, 1), "v": (2, 3, 1, 1)}, "unlabelled_operand"),
    ("weight used in two ways", "h = MatMul(x, w)\nr = Relu(h)\nt = MatMul(r, w)\ny = MatMul(t, v)", {"w": (4, 4), "v": (4, 3)}, "shared_weight"),
    ("transposed Gemm", "h = MatMul(x, w)\ny = Gemm<transA=1>(h, v)", {"w": (6, 8), "v": (3, 5)}, "transposed_data"),
    ("Size", f"{FIRST}\nn = Size(h)\nf = Cast<to=1>(n)\nt = Div(h, f)\n{LAST}", W, "counted"),
    ("reflecting channel Pad", f'{FIRST}\nt = Pad<mode="reflect">(h, p)\ny = Relu(t)', {"w": (8, 3, 3, 3), "p": ints(0, 1, 0, 0, 0, 1, 0, 0)}, "pad_mode"),
    ("indices of a MaxPool", f"{FIRST}\nt, i = MaxPool<kernel_shape=[2,2]>(h)\nj = Cast<to=1>(i)\ns = Add(t, j)\ny = Relu(s)", {"w": (8, 3, 3, 3)}, "pool_indices"),
    ("rank-3 weight", "h = MatMul(x, w)\ny = MatMul(h, v)", {"w": (6, 8), "v": (1, 8, 5)}, "weight_rank"),
    ("BatchNormalization in training mode", f"{FIRST}\nt, a, b = BatchNormalization<training_mode=1>(h, s, s, s, s)\n{LAST}", {**W, "s": np.ones(8, np.float32)}, "training_mode"),
    ("Dropout in training mode", f"{FIRST}\nt = Dropout(h, r, m)\n{LAST}", {**W, "r": np.float32(0.5), "m": np.array(True)}, "training_mode"),
    ("Reshape across channels and positions", f"{FIRST}\nt = Reshape(h, p)\ny = Relu(t)", {"w": (6, 3, 3, 3), "p": ints(0, 4, 12, 8)}, None),
]  # fmt: skip


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case[0])
def test_what_cannot_shrink_is_refused_with_its_reason(case: tuple) -> None:
    name, body, weights, reason = case
    others = {
        "transposed Gemm": (3, 6),
        "rank-3 weight": ("N", 4, 6),
        "LayerNormalization": ("N", 4, 6),
        "one channel in each group": ("N", 6, 4, 4),
        "query and key": ("N", 4, 6),
        "query, key and value from one Reshape": ("N", 5, 6),
        "ScatterND over channels": (3, 3, 8, 8),
        "ScatterElements over channels": (3, 3, 8, 8),
    }
    rank = others.get(name, ("N", 3, 8, 8))
    if name == "weight used in two ways":
        rank = (4, 4)
    channels = traced(build(body, weights, x=rank, opset=21 if name == "GroupNormalization" else 17))
    assert not any(channels.units and consumer.columns.size for consumer in channels.consumers) or channels.units < 8
    if reason is not None:
        assert reason in [refusal.reason.code for refusal in channels.refusals]
        blamed = next(refusal for refusal in channels.refusals if refusal.reason.code == reason)
        assert blamed.nodes and blamed.channels > 0


def test_a_net_of_scikit_learn_shrinks_behind_its_scaler() -> None:
    body = "c = Cast<to=1>(s)\nh = MatMul(c, w)\na = Add(h, b)\nr = Relu(a)\ny = MatMul(r, v)"
    model = build(body, {"w": (6, 8), "b": (1, 8), "v": (8, 5)}, x=("N", 6), inputs={"s": ("N", 6)})
    scaler = helper.make_node("Scaler", ["x"], ["s"], domain="ai.onnx.ml", offset=[0.0] * 6, scale=[2.0] * 6)
    model.graph.node.insert(0, scaler)
    del model.graph.input[1]
    model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 1))
    channels = traced(model)
    assert channels.units == 8
    removed = removal(channels, 0.4, seed=7)
    got, want = (
        run(one, feed(model))[0]
        for one in (rewrite(channels, Removal(removed), "test").proto, ignoring(channels, removed))
    )
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    model.graph.node[0].op_type = "Imputer"  # the control: nothing is known of its output
    assert [(r.reason.code, r.channels) for r in traced(model).refusals] == [("unknown_rank", 8), ("unknown_rank", 5)]


def test_an_axis_never_becomes_empty() -> None:
    channels = traced(build(f"{FIRST}\nt = Relu(h)\n{LAST}", W))
    everything = np.ones(channels.units, dtype=bool)
    assert all(bound >= 1 for _, bound in channels.minimums)
    assert any(set(np.flatnonzero(everything)) == set(members) for members, _ in channels.minimums)


def test_min_channels_bounds_every_axis() -> None:
    channels = traced(build(f"{FIRST}\nt = Relu(h)\n{LAST}", W), min_channels=5)
    assert {bound for _, bound in channels.minimums} == {5}


def test_excluded_nodes_keep_their_channels() -> None:
    body = "h = Conv(x, w)\nr = Relu(h)\ng = Conv(r, k)\ny = Conv(g, v)"
    model = build(body, {"w": (8, 3, 1, 1), "k": (8, 8, 1, 1), "v": (4, 8, 1, 1)})
    assert traced(model).units == 16
    assert traced(model, exclude=["Conv_0"]).units == 8
    assert traced(model, include=["Conv_2"]).units < 16


def test_the_table_of_rules_covers_the_promised_operators() -> None:
    promised = "Conv Gemm MatMul BatchNormalization Relu Add Sub Mul Div Sum Max Min Pow PRelu Clip Where MaxPool "
    promised += "AveragePool GlobalAveragePool Pad Resize Dropout Identity Cast Concat Split Slice Gather Flatten "
    promised += "Reshape Squeeze Unsqueeze Transpose ReduceMean ReduceSum ReduceMax Softmax"
    assert set(promised.split()) <= set(supported())


WEIGHTS_BEHIND = [
    ("a scale", "k = Mul(w0, c)", {"w0": (8, 3, 3, 3), "c": np.float32(0.5)}),
    ("a scale for each channel", "k = Mul(w0, c)", {"w0": (8, 3, 3, 3), "c": (8, 1, 1, 1)}),
    ("a weight norm", "n = ReduceL2<axes=[1,2,3]>(w0)\nd = Div(w0, n)\nk = Mul(g, d)", {"w0": (8, 3, 3, 3), "g": (8, 1, 1, 1)}),
    ("a Transpose and an Identity", "i = Identity(w0)\nk = Transpose<perm=[3,2,0,1]>(i)", {"w0": (3, 3, 3, 8)}),
    ("a Reshape", "k = Reshape(w0, c)", {"w0": (72, 3), "c": ints(8, 3, 3, 3)}),
    ("an Unsqueeze and a Cast", "i = Unsqueeze(w0, c)\nk = Cast<to=1>(i)", {"w0": np.random.default_rng(1).normal(size=(8, 3, 3)), "c": ints(3)}),
    ("a Concat of two", "k = Concat<axis=0>(w0, w1)", {"w0": (3, 3, 3, 3), "w1": (5, 3, 3, 3)}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "chain", "weights"), WEIGHTS_BEHIND, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_weight_is_found_behind(name: str, chain: str, weights: dict) -> None:
    model = build(f"{chain}\nh = Conv(x, k)\nr = Relu(h)\ny = Conv(r, v)", {**weights, "v": (4, 8, 1, 1)})
    channels = traced(model)
    assert channels.units == 8
    removed = np.arange(8) < 3
    smaller = rewrite(channels, Removal(removed), "test").proto
    data = feed(model)
    np.testing.assert_allclose(run(smaller, data)[0], run(ignoring(channels, removed), data)[0], rtol=1e-3, atol=1e-4)
    assert [node.op_type for node in smaller.graph.node] == ["Conv", "Relu", "Conv"]


@pytest.mark.parametrize(
    ("chain", "reason"),
    [
        ("k = Transpose<perm=[3,2,0,1]>(w0)\nz = Relu(w0)", "shared_weight"),  # it would have to be stored twice
        ("k = Tile(w1, c)", "computed_weight"),  # and this is larger than what is stored
    ],
)
def test_a_computed_weight_that_would_make_the_model_grow_is_refused(chain: str, reason: str) -> None:
    weights = {"w0": (3, 3, 3, 8), "w1": (1, 3, 3, 3), "c": ints(8, 1, 1, 1), "v": (4, 8, 1, 1)}
    outputs = "y z" if "z" in chain else "y"
    channels = traced(build(f"{chain}\nh = Conv(x, k)\nr = Relu(h)\ny = Conv(r, v)", weights, outputs=outputs))
    assert channels.units == 0
    assert reason in [refusal.reason.code for refusal in channels.refusals]


def test_a_quantised_model_is_one_refusal_and_comes_back_as_it_was() -> None:
    weights = {"w": np.ones((8, 3), np.int8), "s": np.float32(0.1), "z": np.int8(0), "k": (8, 8), "v": (8, 4)}
    body = "d = DequantizeLinear(w, s, z)\nt = Transpose(d)\nh = MatMul(x, t)\nr = Relu(h)\na = MatMul(r, k)\ny = MatMul(a, v)"
    model = build(body, weights, x=("N", 3))
    result = compress(model, {"x": np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)})
    (refusal,) = result.report.refusals
    assert refusal.reason == "quantised" and refusal.channels == 8 + 8 + 4 and "compress" in refusal.message
    del result.model.metadata_props[:]
    assert result.model.SerializeToString(deterministic=True) == model.SerializeToString(deterministic=True)


def test_the_functions_of_a_model_are_looked_into() -> None:
    body = [onnx.parser.parse_node("h = Conv(x, w)"), onnx.parser.parse_node("y = Conv(r, v)")]
    call = helper.make_node("Swish2", ["h"], ["r"], domain="local")
    inside = [onnx.parser.parse_node("s = Sigmoid(a)"), onnx.parser.parse_node("b = Mul(a, s)")]
    swish = helper.make_function("local", "Swish2", ["a"], ["b"], inside, [helper.make_opsetid("", 17)])
    plain = build(
        "h = Conv(x, w)\ns = Sigmoid(h)\nr = Mul(h, s)\ny = Conv(r, v)", {"w": (8, 3, 1, 1), "v": (4, 8, 1, 1)}
    )
    model = onnx.ModelProto()
    model.CopyFrom(plain)
    del model.graph.node[:]
    model.graph.node.extend([body[0], call, body[1]])
    model.functions.append(swish)
    model.opset_import.append(helper.make_opsetid("local", 1))
    assert traced(model).units == 8
    smaller = rewrite(traced(model), Removal(np.arange(8) < 3), "test").proto
    onnx.checker.check_model(smaller, full_check=True)
    want = rewrite(traced(plain), Removal(np.arange(8) < 3), "test").proto
    np.testing.assert_allclose(run(smaller, feed(model))[0], run(want, feed(model))[0], rtol=1e-5)


def test_what_a_subgraph_captures_stays() -> None:
    model = build("h = Conv(x, w)\nr = Relu(h)\ny = Conv(r, v)", {"w": (8, 3, 1, 1), "v": (4, 8, 1, 1)})
    body = helper.make_graph(
        [helper.make_node("Abs", ["r"], ["c"])], "body", [], [helper.make_empty_tensor_value_info("c")]
    )
    value = helper.make_node("If", ["q"], ["z"], then_branch=body, else_branch=body)
    model.graph.node.append(value)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), "q"))
    model.graph.output.append(helper.make_empty_tensor_value_info("z"))
    channels = traced(model)
    assert channels.units == 0 and channels.refusals[0].reason.code == "subgraph"


def test_what_only_a_subgraph_reads_is_kept() -> None:
    weights = {"w": (8, 3, 1, 1), "v": (4, 8, 1, 1), "o": np.full((1, 4, 1, 1), 3, np.float32), "q": np.array(True)}
    model = build("k = Relu(o)\nh = Conv(x, w)\nr = Relu(h)\ny = Conv(r, v)", weights)
    nodes = [helper.make_node("Add", ["o", "k"], ["s"]), helper.make_node("Mul", ["y", "s"], ["c"])]
    body = helper.make_graph(nodes, "body", [], [helper.make_empty_tensor_value_info("c")])
    model.graph.node.append(helper.make_node("If", ["q"], ["z"], then_branch=body, else_branch=body))
    model.graph.node[0].input[0] = "p"
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.full((1, 4, 1, 1), -1, np.float32), "p"))
    model.graph.output[0].CopyFrom(helper.make_empty_tensor_value_info("z"))
    channels = traced(model)
    assert channels.units == 8
    smaller = rewrite(channels, Removal(np.arange(8) < 3), "test").proto
    result = run(smaller, feed(model))[0]
    del model.graph.node[-1], body.node[:]
    model.graph.output[0].CopyFrom(helper.make_empty_tensor_value_info("y"))
    plain = rewrite(traced(model), Removal(np.arange(8) < 3), "test").proto
    np.testing.assert_allclose(result, 3 * run(plain, feed(model))[0], atol=1e-5)


def test_operators_of_other_domains_are_refused() -> None:
    model = build("h = Conv(x, w)\nr = Relu(h)\ny = Conv(r, v)", {"w": (8, 3, 1, 1), "v": (4, 8, 1, 1)})
    model.graph.node[1].domain = "com.example"
    model.opset_import.append(helper.make_opsetid("com.example", 1))
    channels = traced(model)
    assert channels.units == 0 and channels.refusals[0].reason.code == "unknown_operator"


def test_recorded_shapes_of_constant_nodes_follow_their_values() -> None:
    model = build("h = Conv(x, w)\nr = Relu(h)\ny = Conv(r, v)", {"w": (8, 3, 1, 1), "v": (4, 8, 1, 1)})
    value = next(tensor for tensor in model.graph.initializer if tensor.name == "w")
    model.graph.node.insert(0, helper.make_node("Constant", [], ["w"], value=value))
    model.graph.initializer.remove(value)
    model.graph.value_info.append(helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, (8, 3, 1, 1)))
    smaller = rewrite(traced(model), Removal(np.arange(8) < 3), "test").proto
    onnx.checker.check_model(smaller, full_check=True)
    assert [dim.dim_value for dim in smaller.graph.value_info[0].type.tensor_type.shape.dim] == [5, 3, 1, 1]


def test_sparse_weights_are_refused() -> None:
    model = build("h = Conv(x, w)\nr = Relu(h)\ny = Conv(r, v)", {"w": (8, 3, 1, 1), "v": (4, 8, 1, 1)})
    values = helper.make_tensor("w", onnx.TensorProto.FLOAT, [1], [2.0])
    index = helper.make_tensor("w_index", onnx.TensorProto.INT64, [1], [0])
    dense = next(tensor for tensor in model.graph.initializer if tensor.name == "w")
    model.graph.initializer.remove(dense)
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, index, [8, 3, 1, 1]))
    assert traced(model).units == 0


def test_a_pad_of_millions_of_channels_is_refused_at_once() -> None:
    pads = np.array([0, 0, 0, 0, 0, 1 << 40, 0, 0])
    channels = traced(build("h = Conv(x, w)\np = Pad(h, pads)\ny = Relu(p)", {"w": (8, 3, 1, 1), "pads": pads}))
    assert "enormous" in {refusal.reason.code for refusal in channels.refusals}

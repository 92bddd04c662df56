"""The staircase that kernels make of widths: what two or three layers take with fewer channels between them.

The widths at both ends stay, the one between them shrinks: by a few channels, by blocks, by quarters. All widths of a
chain run in turns in this process on one thread, which spins for nobody, and in every turn the fastest of a few runs
counts, as a share of that of the full width. `again` is a copy of the full width, and tells what is noise.

| column | what |
|---|---|
| chain | operators and their channels; the width that varies is w |
| kernels | the widest instructions that this machine has |
| full | w as it is there, and milliseconds |
| again | time of a copy of it over its own, and half the range in which half of the turns lie |
| -1, -2, .. | time with so many channels fewer over that of the full width |
| 3/4, 1/2, 1/4 | the same with this share of the channels; with one fewer in each group; with 8 more |
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from measure import Bench
from numpy.typing import NDArray
from onnx import helper

from lindep_onnx.runtime.backend import CPU, Provider, Purpose, Runtime, Session

#: Channels that go, and shares that stay.
FEWER, SHARES = (1, 2, 3, 4, 6, 8, 12, 16, 17, 20, 24, 28, 32, 48, 64), (0.75, 0.5, 0.25)
#: Turns, and the seconds of one at one width; of its runs, at least so many, the first does not count.
TURNS, SECONDS, RUNS = 15, 0.006, 3
PRECISIONS = ("float32", "int8 QDQ")


@dataclass(frozen=True)
class Chain:
    """Layers of which one width varies.

    Attributes:
        body: ONNX text, with `{w}` for the width that varies.
        shape: of the input x.
        weights: shapes by name; `w` stands for the width that varies, `w/4` for a quarter of it.
        full: the width that is there.
        parts: what the width must be a multiple of.
    """

    body: str
    shape: tuple[int, ...]
    weights: Mapping[str, tuple[int | str, ...]]
    full: int
    parts: int = 1


def _pair(kernel: str, shape: tuple[int, ...], *kernel_shape: int, full: int, groups: int = 1) -> Chain:
    """Two convolutions of the same kind, from the channels of the input to the full width, and back."""
    outer = shape[1]
    body = f"a = {kernel}(x, w1, b1)\nr = Relu(a)\nb = {kernel}(r, w2, b2)\ny = Relu(b)"
    weights = {"w1": ("w", outer // groups), "b1": ("w",), "w2": (outer, f"w/{groups}"), "b2": (outer,)}
    if kernel.startswith("ConvTranspose"):
        weights |= {"w1": (outer, "w"), "w2": ("w", outer)}
    wide = {name: (*size, *(kernel_shape if len(size) > 1 else ())) for name, size in weights.items()}
    return Chain(body, shape, wide, full, groups)


def _separable(full: int, size: int, outer: int) -> Chain:
    body = (
        "a = Conv(x, w1, b1)\nra = Relu(a)\nd = Conv<pads=[1,1,1,1], group={w}>(ra, k, bk)\nrd = Relu(d)\n"
        "y = Conv(rd, w2, b2)"
    )
    weights: dict[str, tuple[int | str, ...]] = {"w1": ("w", outer, 1, 1), "b1": ("w",), "k": ("w", 1, 3, 3)}
    weights |= {"bk": ("w",), "w2": (outer, "w", 1, 1), "b2": (outer,)}
    return Chain(body, (1, outer, size, size), weights, full)


_GEMM = "a = Gemm<transB=1>(x, w1, b1)\nr = Relu(a)\ny = Gemm<transB=1>(r, w2, b2)"
_MATMUL = "m = MatMul(x, w1)\na = Add(m, b1)\nr = Relu(a)\nn = MatMul(r, w2)\ny = Add(n, b2)"
_GEMM_WEIGHTS: Mapping[str, tuple[int | str, ...]] = {"w1": ("w", 512), "b1": ("w",), "w2": (512, "w"), "b2": (512,)}
_MATMUL_WEIGHTS: Mapping[str, tuple[int | str, ...]] = {
    "w1": (384, "w"), "b1": ("w",), "w2": ("w", 384), "b2": (384,),
}  # fmt: skip
CHAINS: Mapping[str, Chain] = {
    "1x1, depthwise 3x3, 1x1: 64-w-64 at 14 x 14": _separable(384, 14, 64),
    "1x1, depthwise 3x3, 1x1: 24-w-24 at 56 x 56": _separable(96, 56, 24),
    "3x3, 3x3: 128-w-128 at 14 x 14": _pair("Conv<pads=[1,1,1,1]>", (1, 128, 14, 14), 3, 3, full=128),
    "3x3, 3x3: 64-w-64 at 28 x 28": _pair("Conv<pads=[1,1,1,1]>", (1, 64, 28, 28), 3, 3, full=64),
    "1x1, 1x1: 128-w-128 at 14 x 14": _pair("Conv", (1, 128, 14, 14), 1, 1, full=128),
    "3x3, 3x3 in 4 groups: 256-w-256 at 14 x 14": _pair(
        "Conv<pads=[1,1,1,1], group=4>", (1, 256, 14, 14), 3, 3, full=256, groups=4
    ),
    "Conv1d 5, 5: 128-w-128 at 256": _pair("Conv<pads=[2,2]>", (1, 128, 256), 5, full=128),
    "Conv3d 3, 3: 64-w-64 at 6 x 10 x 10": _pair("Conv<pads=[1,1,1,1,1,1]>", (1, 64, 6, 10, 10), 3, 3, 3, full=64),
    "ConvTranspose 3x3, 3x3: 64-w-64 at 14 x 14": _pair(
        "ConvTranspose<pads=[1,1,1,1]>", (1, 64, 14, 14), 3, 3, full=64
    ),
    "MatMul, MatMul: 384-w-384, 64 rows": Chain(_MATMUL, (1, 64, 384), _MATMUL_WEIGHTS, 1536),
    "Gemm, Gemm: 512-w-512, 1 row": Chain(_GEMM, (1, 512), _GEMM_WEIGHTS, 512),
    "Gemm, Gemm: 512-w-512, 32 rows": Chain(_GEMM, (32, 512), _GEMM_WEIGHTS, 512),
}


def build(chain: Chain, width: int) -> onnx.ModelProto:
    """A chain at a width."""

    def size(entry: int | str) -> int:
        if isinstance(entry, int):
            return entry
        return width // int(entry.partition("/")[2] or 1)

    rng = np.random.default_rng(0)
    nodes = [onnx.parser.parse_node(line) for line in chain.body.replace("{w}", str(width)).splitlines()]
    constants = []
    for name, entries in chain.weights.items():
        shape = tuple(map(size, entries))
        scale = np.sqrt(2 / max(1, np.prod(shape[1:]))) if len(shape) > 1 else 0.1
        constants.append(onnx.numpy_helper.from_array((scale * rng.standard_normal(shape)).astype(np.float32), name))
    given = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, chain.shape)
    made = helper.make_empty_tensor_value_info("y")
    graph = helper.make_graph(nodes, "chain", [given], [made], constants)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)


def quantised(proto: onnx.ModelProto, feeds: Mapping[str, NDArray[Any]]) -> onnx.ModelProto:
    """The same in 8 bits, as ONNX Runtime's static quantisation writes it."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left: Iterator[Mapping[str, NDArray[Any]]] = iter([feeds])

        def get_next(self) -> Mapping[str, NDArray[Any]] | None:
            return next(self.left, None)

    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "int8.onnx"
        quantize_static(proto, str(target), Reader(), quant_format=QuantFormat.QDQ, per_channel=True)
        return onnx.load(target)


def widths_of(chain: Chain) -> dict[str, int]:
    """By column, the widths that are timed."""
    full = chain.full
    found = {"full": full, "again": full}
    found |= {f"-{fewer}": full - fewer for fewer in FEWER if fewer % chain.parts == 0 and fewer < full}
    for share, name in zip(SHARES, ("3/4", "1/2", "1/4"), strict=True):
        whole = round(full * share)
        found |= {name: whole, f"{name} -1": whole - chain.parts, f"{name} +8": whole + 8}
    return found


def _turn(session: Session, feeds: Mapping[str, NDArray[Any]]) -> float:
    session.run(None, feeds)
    taken, stop = [], time.perf_counter() + SECONDS
    while len(taken) < RUNS or time.perf_counter() < stop:
        start = time.perf_counter()
        session.run(None, feeds)
        taken.append(time.perf_counter() - start)
    return min(taken)


def staircase(protos: Sequence[onnx.ModelProto], feeds: Mapping[str, NDArray[Any]]) -> NDArray[np.float64]:
    """(turns, models) seconds of a run on one thread, models in turns."""
    runtime = Runtime((Provider(CPU),), threads=1)
    sessions = [runtime.open(proto, purpose=Purpose.TIME) for proto in protos]
    for session in sessions:
        _turn(session, feeds)
    # Forwards and backwards, so that nobody always follows the same one.
    orders = (range(len(sessions)), range(len(sessions) - 1, -1, -1))
    found = np.zeros((TURNS, len(sessions)))
    for turn in range(TURNS):
        for place in orders[turn % 2]:
            found[turn, place] = _turn(sessions[place], feeds)
    return found


def instructions() -> str:
    """The widest instructions of this machine that kernels of ONNX Runtime have versions for."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").split()
    except OSError:
        return "unknown"
    known = {"avx512f": "AVX-512", "avx2": "AVX2", "asimd": "Neon"}
    widest = next((name for flag, name in known.items() if flag in flags), "unknown")
    return widest + (", VNNI" if {"avx512_vnni", "avx_vnni"} & set(flags) else "")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", CHAINS)
def test_staircase(bench: Bench, name: str, precision: str) -> None:
    chain = CHAINS[name]
    feeds = {"x": np.random.default_rng(1).standard_normal(chain.shape, dtype=np.float32)}
    widths = widths_of(chain)
    protos = [build(chain, width) for width in widths.values()]
    if precision != PRECISIONS[0]:
        protos = [quantised(proto, feeds) for proto in protos]
    seconds = bench.once(staircase, protos, feeds)
    ratios = seconds / seconds[:, :1]
    low, high = np.percentile(ratios[:, 1], (25, 75))
    cells = dict(zip(widths, np.median(ratios, axis=0), strict=True))
    bench.row(
        chain=name,
        precision=precision,
        kernels=instructions(),
        full=f"{chain.full}: {np.median(seconds[:, 0]) * 1000:.3f} ms",
        again=f"{cells['again']:.2f} ± {(high - low) / 2:.2f}",
        **{column: f"{ratio:.2f}" for column, ratio in cells.items() if column not in ("full", "again")},
    )
    assert (seconds > 0).all()

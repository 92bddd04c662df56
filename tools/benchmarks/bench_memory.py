"""A model of gigabytes with planted dependence, compressed under a memory limit.

`build` writes a net with external data, parallel branches of 5 x 5 convolutions whose layers hold channels that are
scaled copies of others, one layer at a time, so that building it takes the memory of one layer. `compress_it` runs the
command on it in a process of its own, under a limit (`ulimit -d`) on memory that is no file's: `LIMIT` times the file,
`MATRICES` second-moment matrices of every layer (8 bytes for each pair of its input channels), and `CONSTANT`. Weights
that are mapped from files are not counted: the operating system takes that memory back whenever it needs it.
"""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from measure import Bench
from onnx import TensorProto, helper

#: Copies of the weights and of the moments that the command may hold at once, and megabytes on top.
LIMIT, MATRICES, CONSTANT = 2.0, 6.0, 1000
#: Seconds between two looks at the memory of the command.
LOOK = 0.01
#: Of every layer so many channels are copies, or a quarter of them if that is less.
COPIES = 64
#: Channels of a layer, layers of a branch, size of the kernels and of the images, and how many of these there are.
WIDTH, DEPTH, KERNEL, SIZE, SAMPLES = 1024, 4, 5, 3, 256


@dataclass(frozen=True)
class Ran:
    """One command.

    Attributes:
        code: its exit code.
        seconds: its time.
        peak: its peak resident memory in MB, without that of mapped files.
    """

    code: int
    seconds: float
    peak: float


def file_size(model: Path) -> float:
    """Megabytes of a model that `build` wrote, weights included."""
    return sum((model.parent / name).stat().st_size for name in (model.name, model.name + ".data")) / 1e6


def allowed(model: Path) -> float:
    """The stated limit in MB."""
    moments = sum(8e-6 * width**2 for width in widths_of(model))
    return LIMIT * file_size(model) + MATRICES * moments + CONSTANT


def build(folder: Path, gigabytes: float = 2.5, width: int = WIDTH) -> Path:
    """Write `large.onnx` and `large.onnx.data`, and samples `calib.npy`.

    Returns:
        The path of the model. The last `copies_of(width)` channels of every layer are copies of its first ones, twice
        as large.
    """
    branches = max(1, round(gigabytes * 1e9 / (4 * KERNEL**2 * width * width * (DEPTH - 1))))
    rng = np.random.default_rng(0)
    nodes, tensors, offset, ends = [], [], 0, []
    path = folder / "large.onnx"
    with (folder / "large.onnx.data").open("wb") as file:
        for branch in range(branches):
            last = "x"
            square = KERNEL, KERNEL
            shapes = [(width, 3, *square), *[(width, width, *square)] * (DEPTH - 1), (16, width, 1, 1)]
            for number, shape in enumerate(shapes):
                label = f"{branch}_{number}"
                weight = rng.standard_normal(shape, dtype=np.float32) * np.float32(np.sqrt(2 / np.prod(shape[1:])))
                if number < DEPTH:
                    weight[-copies_of(width) :] = 2 * weight[: copies_of(width)]
                tensor = TensorProto(name=f"w{label}", dims=shape, data_type=TensorProto.FLOAT)
                tensor.data_location = TensorProto.EXTERNAL
                for key, value in (("location", "large.onnx.data"), ("offset", offset), ("length", weight.nbytes)):
                    tensor.external_data.add(key=key, value=str(value))
                file.write(memoryview(weight).cast("B"))
                offset += weight.nbytes
                tensors.append(tensor)
                pads = [weight.shape[-1] // 2] * 4
                nodes.append(helper.make_node("Conv", [last, tensor.name], [f"c{label}"], f"conv{label}", pads=pads))
                last = f"c{label}"
                if number < DEPTH:
                    nodes.append(helper.make_node("Relu", [last], [f"r{label}"], f"relu{label}"))
                    last = f"r{label}"
            ends.append(last)
    nodes.append(helper.make_node("Sum", ends, ["y"], "sum"))
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, SIZE, SIZE])
    made = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 16, SIZE, SIZE])
    graph = helper.make_graph(nodes, "large", [given], [made], tensors)
    path.write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    )
    np.save(folder / "calib.npy", rng.standard_normal((SAMPLES, 3, SIZE, SIZE), dtype=np.float32))
    return path


def copies_of(width: int) -> int:
    """Planted copies in a layer of so many channels."""
    return min(COPIES, width // 4)


def widths_of(path: Path) -> list[int]:
    """Output channels of every layer of such a model."""
    proto = onnx.load(path, load_external_data=False)
    sizes = {tensor.name: tensor.dims[0] for tensor in proto.graph.initializer}
    return [int(sizes[node.input[1]]) for node in proto.graph.node if node.op_type == "Conv"]


def compress_it(model: Path, result: Path, limit: float) -> Ran:
    """Run the command on what `build` wrote; the samples are beside the model, the limit is in MB."""
    line = [sys.executable, "-m", "lindep_onnx", str(model), str(result)]
    line += ["--calib", str(model.parent / "calib.npy"), "--quiet"]
    line = ["/bin/sh", "-c", f'ulimit -d {round(limit * 1000)}; exec "$@"', "sh", *line]
    start, peak = time.perf_counter(), 0.0
    process = subprocess.Popen(line)
    while process.poll() is None:
        peak = max(peak, _own_memory(process.pid))
        time.sleep(LOOK)
    return Ran(process.returncode, time.perf_counter() - start, peak)


def _own_memory(process: int) -> float:
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:  # it has just ended
        return 0.0
    return max((int(line.split()[1]) * 1024 / 1e6 for line in status.splitlines() if "RssAnon" in line), default=0.0)


@pytest.mark.parametrize(
    ("gigabytes", "width"),
    [(0.02, 128), *(pytest.param(*size, marks=pytest.mark.slow) for size in ((0.4, 512), (2.5, WIDTH)))],
)
def test_large(bench: Bench, gigabytes: float, width: int) -> None:
    model, result = build(bench.folder, gigabytes, width), bench.folder / "small.onnx"
    limit = allowed(model)
    ran = bench.once(compress_it, model, result, limit)
    before, after = sum(widths_of(model)), sum(widths_of(result)) if result.exists() else 0
    planted = sum(copies_of(own) for own in widths_of(model) if own == width)
    bench.row(
        **{"file, MB": f"{file_size(model):,.0f}", "exit code": ran.code, "seconds": f"{ran.seconds:.0f}"},
        **{"peak, MB": f"{ran.peak:,.0f}", "limit, MB": f"{limit:,.0f}"},
        **{"channels before": before, "after": after, "planted": planted},
    )
    assert ran.code == 0 and ran.peak < limit and before - after == planted

"""Fuzz everything that reads what others wrote: models, calibration data, reports, moments, plans and options.

Five targets, each a function of random bits: it takes something well formed from `tests/corpus`, damages it at random
(its structure as often as its bytes) and has it read. The only exception allowed is a `LindepError`; the time limit is
10 s and the memory limit 2 GB. A case is determined by target, seed and number, so that it can be repeated:

    python tools/fuzz.py --seconds 300              all targets in turn; stops at the first fault
    python tools/fuzz.py --executions 250000        of each target
    python tools/fuzz.py --target tracer --repeat SEED:NUMBER
    python tools/fuzz.py --make-corpus              writes tests/corpus anew
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import mmap
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from lindep_onnx import cli
from lindep_onnx.calibration.moments import MomentsAccumulator, load_moments, save_moments
from lindep_onnx.data.inputs import InputSpec
from lindep_onnx.data.samples import open_samples
from lindep_onnx.errors import LindepError
from lindep_onnx.model.checks import as_model_error, full_check_passes
from lindep_onnx.moves.fold_weights import fold_weights
from lindep_onnx.options import Config, DataOptions
from lindep_onnx.planning.plan_file import Plan, options_of, resolve_plan
from lindep_onnx.report.values import Report, Size
from lindep_onnx.structure import traced as understanding
from lindep_onnx.structure.rewrite import rewrite

CORPUS = Path(__file__).parents[1] / "tests" / "corpus"
SECONDS, MEMORY = 10.0, 2 << 30
#: A worker is ended by the system beyond this, before it can disturb the machine.
ADDRESS_SPACE = 12 << 30

INTEGERS = (0, 1, -1, 2, 3, 4, 7, 8, 16, 255, -7, 2**31 - 1, 2**31, -(2**31), 2**40, 2**62, -(2**63), 2**63 - 1)
FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-38, 1e38, math.inf, -math.inf, math.nan)
TEXTS = (
    "",
    "x",
    "y",
    "h",
    "\x00",
    "\n",
    "../x",
    "/etc/hostname",
    "é" * 9,
    "a" * 300,
    "%s",
    "[red]",
    "NOTSET",
    "SAME_UPPER",
)
OPS = sorted({schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""})


class HangError(BaseException):
    """The time is up; no `Exception`, so that nothing catches it on the way."""


# ---- corpus -------------------------------------------------------------------------------------------------------

NETS = {
    "mlp": ("h = Gemm(x, w, b)\nr = Relu(h)\ny = Gemm(r, v)", {"w": (4, 6), "b": (6,), "v": (6, 3)}, ("N", 4)),
    "conv": (
        "h = Conv<pads=[1,1,1,1]>(x, w, b)\nn = BatchNormalization(h, s, s, s, s)\nr = Relu(n)\n"
        "p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r)\nf = Flatten(p)\ny = Gemm(f, v)",
        {"w": (6, 2, 3, 3), "b": (6,), "s": (6,), "v": (24, 3)},
        ("N", 2, 4, 4),
    ),
    "residual": (
        "h = Conv(x, w)\nr = Relu(h)\na = Conv(r, k)\ns = Add(r, a)\nt = HardSwish(s)\ny = Conv(t, v)",
        {"w": (4, 2, 1, 1), "k": (4, 4, 1, 1), "v": (3, 4, 1, 1)},
        ("N", 2, "H", "W"),
    ),
    "depthwise": (
        "h = Conv(x, w)\nr = Clip(h, lo, hi)\nd = Conv<group=4, pads=[1,1,1,1]>(r, k)\ng = GlobalAveragePool(d)\n"
        "y = Conv(g, v)",
        {"w": (4, 2, 1, 1), "k": (4, 1, 3, 3), "v": (3, 4, 1, 1), "lo": np.float32(0), "hi": np.float32(6)},
        ("N", 2, 5, 5),
    ),
    "shuffle": (
        "h = Conv(x, w)\na = Reshape(h, one)\nt = Transpose<perm=[0,2,1,3]>(a)\nb = Reshape(t, two)\ny = Conv(b, v)",
        {"w": (4, 2, 1, 1), "one": np.array([0, 2, 2, 16]), "two": np.array([0, 4, 4, 4]), "v": (2, 4, 1, 1)},
        (1, 2, 4, 4),
    ),
    "split": (
        "h = MatMul(x, w)\na, b = Split<axis=1>(h, sizes)\nc = Concat<axis=1>(b, a, b)\nt = Slice(c, i0, i7, i1)\n"
        "q = Gather<axis=1>(t, pick)\ny = MatMul(q, v)",
        {"w": (3, 6), "sizes": np.array([2, 4]), "i0": np.array([0]), "i7": np.array([7]), "i1": np.array([1]),
         "pick": np.array([0, 2, -1, 4]), "v": (4, 2)},
        ("N", 3),
    ),
    "runtime": (
        "h = Conv(x, w)\nn = Shape(h)\nm = Gather<axis=0>(n, zero)\nu = Unsqueeze(m, axis)\n"
        "k = Concat<axis=0>(u, last)\nf = Reshape(h, k)\ny = Gemm(f, v)",
        {"w": (3, 2, 1, 1), "zero": np.int64(0), "axis": np.array([0]), "last": np.array([-1]), "v": (12, 2)},
        ("N", 2, 2, 2),
    ),
    "attention": (
        "q = MatMul(x, a)\nk = MatMul(x, b)\nt = Transpose<perm=[0,2,1]>(k)\ns = MatMul(q, t)\n"
        "p = Softmax<axis=-1>(s)\nc = MatMul(p, x)\nm = ReduceMean<axes=[-1]>(c)\ne = Sub(c, m)\ng = Sigmoid(e)\n"
        "z = Mul(g, e)\ny = MatMul(z, d)",
        {"a": (4, 4), "b": (4, 4), "d": (4, 2)},
        ("N", 3, 4),
    ),
    "pad": (
        "h = Conv<strides=[2,2]>(x, w)\np = Pad(h, pads)\nu = Resize<mode=\"nearest\">(p, , scale)\n"
        "i = InstanceNormalization(u, s, s)\nr = PRelu(i, k)\ny = ConvTranspose(r, v)",
        {"w": (3, 2, 1, 1), "pads": np.array([0, 1, 0, 0, 0, 1, 0, 0]), "scale": np.float32([1, 1, 2, 2]), "s": (5,),
         "k": (5, 1, 1), "v": (5, 2, 2, 2)},
        ("N", 2, 4, 4),
    ),
}  # fmt: skip


def make_corpus() -> None:
    """Write small, well-formed models, data, a report, moments and command lines."""
    rng = np.random.default_rng(0)
    CORPUS.mkdir(exist_ok=True)
    for name, (body, weights, shape) in NETS.items():
        values = {
            key: value if not isinstance(value, tuple) else np.abs(rng.normal(size=value)).astype(np.float32)
            for key, value in weights.items()
        }
        model = helper.make_model(
            helper.make_graph(
                [onnx.parser.parse_node(line) for line in body.splitlines()],
                name,
                [helper.make_tensor_value_info("x", 1, shape)],
                [helper.make_empty_tensor_value_info("y")],
                [numpy_helper.from_array(np.asarray(value), key) for key, value in values.items()],
            ),
            opset_imports=[helper.make_opsetid("", 17)],
            ir_version=8,
        )
        model = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
        onnx.checker.check_model(model, full_check=True)
        (CORPUS / f"{name}.onnx").write_bytes(model.SerializeToString(deterministic=True))
    inside = onnx.load(CORPUS / "mlp.onnx")
    branch = helper.make_graph(
        [helper.make_node("Relu", ["y0"], ["z"])], "branch", [], [helper.make_empty_tensor_value_info("z")]
    )
    inside.graph.node[-1].output[0] = "y0"
    inside.graph.node.append(helper.make_node("If", ["flag"], ["y"], then_branch=branch, else_branch=branch))
    inside.graph.initializer.append(numpy_helper.from_array(np.array(True), "flag"))
    (CORPUS / "if.onnx").write_bytes(inside.SerializeToString(deterministic=True))
    values = rng.normal(size=(6, 4)).astype(np.float32)
    np.save(CORPUS / "data.npy", values)
    np.savez(CORPUS / "data.npz", x=values)
    np.savez_compressed(CORPUS / "packed.npz", x=values, z=np.arange(6))
    (CORPUS / "input_0.pb").write_bytes(numpy_helper.from_array(values, "x").SerializeToString())
    accumulator = MomentsAccumulator(3)
    accumulator.update(rng.normal(size=(4, 2, 3)))
    save_moments(CORPUS / "moments.npz", {"h": accumulator.result()})
    size = Size(10, 10, 10, 4, 1.0)
    report = Report(size, size, None, (), (), (), {"load": 0.5}, {"onnx": "1"}, {"seed": 3}, ("a note",))
    (CORPUS / "report.json").write_text(report.to_json())


# ---- damage -------------------------------------------------------------------------------------------------------


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Bytes with bits flipped, pieces removed, repeated, replaced, or everything behind a place cut off."""
    result = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        if not result:
            break
        at, length = rng.randrange(len(result)), rng.choice((1, 2, 4, 8, 64))
        kind = rng.randrange(6)
        if kind == 0:
            result[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            result[at] = rng.choice((0, 1, 127, 128, 255))
        elif kind == 2:
            del result[at : at + length]
        elif kind == 3:
            result[at:at] = result[at : at + length]
        elif kind == 4:
            result[at : at + 8] = struct.pack("<q", rng.choice(INTEGERS))
        else:
            del result[at:]
    return bytes(result)


def some_model(rng: random.Random, corpus: Corpus) -> onnx.ModelProto:
    """A model with up to six changes to its structure."""
    model = onnx.ModelProto()
    model.ParseFromString(rng.choice(corpus.models))
    for _ in range(rng.randrange(7)):
        with contextlib.suppress(IndexError, ValueError):  # nothing left to change
            rng.choice(CHANGES)(rng, model)
    return model


def _names(model: onnx.ModelProto) -> list[str]:
    names = [name for node in model.graph.node for name in (*node.input, *node.output)]
    return [*names, *(t.name for t in model.graph.initializer), "x", "", "nowhere"]


def _change_wiring(rng: random.Random, model: onnx.ModelProto) -> None:
    node = rng.choice(model.graph.node)
    names = rng.choice((node.input, node.input, node.output))
    kind = rng.randrange(4)
    if kind == 0 or not names:
        names.append(rng.choice(_names(model)))
    elif kind == 1:
        names.pop(rng.randrange(len(names)))
    else:
        names[rng.randrange(len(names))] = rng.choice(_names(model))


def _change_nodes(rng: random.Random, model: onnx.ModelProto) -> None:
    nodes = model.graph.node
    at, other = rng.randrange(len(nodes)), rng.randrange(len(nodes))
    kind = rng.randrange(4)
    if kind == 0:
        del nodes[at]
    elif kind == 1:
        nodes.add().CopyFrom(nodes[at])
    elif kind == 2:
        saved = onnx.NodeProto()
        saved.CopyFrom(nodes[at])
        nodes[at].CopyFrom(nodes[other])
        nodes[other].CopyFrom(saved)
    else:
        made = helper.make_node(
            rng.choice(OPS), [rng.choice(_names(model)) for _ in range(rng.randrange(4))], [rng.choice(_names(model))]
        )
        nodes.insert(at, made)


def _change_op(rng: random.Random, model: onnx.ModelProto) -> None:
    node = rng.choice(model.graph.node)
    node.op_type = rng.choice((*OPS, *OPS, *TEXTS))
    if rng.random() < 0.1:
        node.domain = rng.choice(("ai.onnx", "com.microsoft", "ai.onnx.ml", *TEXTS))


ATTRIBUTES = (
    *(
        "axis",
        "axes",
        "perm",
        "pads",
        "strides",
        "kernel_shape",
        "dilations",
        "group",
        "alpha",
        "beta",
        "transA",
        "transB",
    ),
    *(
        "to",
        "value",
        "mode",
        "auto_pad",
        "epsilon",
        "min",
        "max",
        "split",
        "num_outputs",
        "keepdims",
        "count_include_pad",
    ),
    *(
        "ceil_mode",
        "storage_order",
        "training_mode",
        "allowzero",
        "output_padding",
        "output_shape",
        "then_branch",
        "body",
    ),
)


def _change_attribute(rng: random.Random, model: onnx.ModelProto) -> None:
    node = rng.choice(model.graph.node)
    if node.attribute and rng.random() < 0.2:
        del node.attribute[rng.randrange(len(node.attribute))]
        return
    names = [attribute.name for attribute in node.attribute]
    value: Any = rng.choice(
        (
            rng.choice(INTEGERS),
            rng.choice(FLOATS),
            rng.choice(TEXTS),
            [rng.choice(INTEGERS[:12]) for _ in range(rng.randrange(1, 9))],
            [rng.choice(FLOATS) for _ in range(rng.randrange(1, 5))],
            numpy_helper.from_array(np.zeros([rng.randrange(3) for _ in range(rng.randrange(4))], np.float32)),
            model.graph,
        )
    )
    made = helper.make_attribute(rng.choice((*names, *names, *ATTRIBUTES)), value)
    if rng.random() < 0.1:
        made.type = rng.randrange(15)
    if rng.random() < 0.05:
        made.ref_attr_name = "x"
    for place in reversed([place for place, name in enumerate(names) if name == made.name]):
        del node.attribute[place]
    node.attribute.append(made)


def _change_initializer(rng: random.Random, model: onnx.ModelProto) -> None:
    tensors = model.graph.initializer
    at = rng.randrange(len(tensors))
    tensor = tensors[at]
    kind = rng.randrange(9)
    if kind == 0:
        del tensors[at]
    elif kind == 1:
        tensors.add().CopyFrom(tensor)
    elif kind == 2 and tensor.dims:
        tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice(INTEGERS)
    elif kind == 3:
        tensor.dims.append(rng.choice(INTEGERS))
    elif kind == 4:
        tensor.data_type = rng.choice((*range(24), 99, -1))
    elif kind == 5:
        tensor.raw_data = damaged(rng, tensor.raw_data)
    elif kind == 6:
        count = max(1, len(tensor.raw_data) // 4)
        tensor.raw_data = np.array([rng.choice(FLOATS) for _ in range(count)], np.float32).tobytes()
    elif kind == 7:
        tensor.name = rng.choice(_names(model))
    else:
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=rng.choice((*TEXTS, "data.npy", "no.bin", "../data.npy")))
        for key in ("offset", "length", "checksum"):
            if rng.random() < 0.5:
                tensor.external_data.add(key=key, value=rng.choice((*map(str, INTEGERS), *TEXTS)))


def _change_interface(rng: random.Random, model: onnx.ModelProto) -> None:
    values = rng.choice((model.graph.input, model.graph.input, model.graph.output, model.graph.value_info))
    kind = rng.randrange(8)
    if kind == 0 or not values:
        shape = [rng.choice((*INTEGERS[:8], "N", "")) for _ in range(rng.randrange(5))]
        values.append(helper.make_tensor_value_info(rng.choice(_names(model)), rng.randrange(1, 17), shape))
        return
    value = rng.choice(values)
    dims = value.type.tensor_type.shape.dim
    if kind == 1:
        del values[rng.randrange(len(values))]
    elif kind == 2:
        value.type.tensor_type.elem_type = rng.choice((*range(24), 99))
    elif kind == 3:
        value.type.tensor_type.ClearField("shape")
    elif kind == 4:
        value.type.sequence_type.elem_type.tensor_type.elem_type = 1
    elif kind == 5:
        value.name = rng.choice(_names(model))
    elif dims and kind == 6:
        rng.choice(dims).dim_param = rng.choice(("N", "H", *TEXTS))
    elif dims:
        rng.choice(dims).dim_value = rng.choice(INTEGERS)


def _change_header(rng: random.Random, model: onnx.ModelProto) -> None:
    kind = rng.randrange(5)
    if kind == 0:
        model.ir_version = rng.choice((0, 1, 3, 4, 10, 13, 99, -1, 2**40))
    elif kind == 1:
        model.opset_import[0].version = rng.choice((0, 1, 6, 7, 9, 11, 12, 13, 18, 21, 24, 99, -5, 2**40))
    elif kind == 2:
        model.opset_import.add(domain=rng.choice(("", "ai.onnx", "ai.onnx.ml")), version=rng.choice((1, 9, 17)))
    elif kind == 3:
        del model.opset_import[:]
    else:
        model.functions.add(name=rng.choice(OPS), domain="", input=["a"], output=["b"])


CHANGES = (
    *(_change_wiring, _change_wiring, _change_nodes, _change_op, _change_op, _change_attribute, _change_attribute),
    *(_change_initializer, _change_initializer, _change_interface, _change_header),
)


# ---- targets ------------------------------------------------------------------------------------------------------


class Corpus:
    """The files that cases are made from, and a folder to write them to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.models = [path.read_bytes() for path in sorted(CORPUS.glob("*.onnx"))]
        self.arrays = [
            (path.suffix, path.read_bytes()) for path in sorted(CORPUS.glob("*.np?")) if path.stem != "moments"
        ]
        self.tensor = (CORPUS / "input_0.pb").read_bytes()
        self.moments = (CORPUS / "moments.npz").read_bytes()
        self.report = (CORPUS / "report.json").read_text()
        self.planned = understanding.load_and_trace(CORPUS / "mlp.onnx", Config()).channels
        self.plan = Plan(
            {"h": [1, 4]}, {"h": 6}, options={"params": 0.5, "include": ["*"], "image_size": [2, 3]}
        ).to_json()
        (folder / "data.npy").write_bytes((CORPUS / "data.npy").read_bytes())
        (folder / "data.npz").write_bytes((CORPUS / "data.npz").read_bytes())
        (folder / "mlp.onnx").write_bytes((CORPUS / "mlp.onnx").read_bytes())
        (folder / "f.py").write_text("def feeds():\n    yield {}\n\ndef one(session):\n    return 1.0\n")


def loader(rng: random.Random, corpus: Corpus) -> None:
    """A model file."""
    path = corpus.folder / "case.onnx"
    data = rng.choice(corpus.models) if rng.random() < 0.5 else some_model(rng, corpus).SerializeToString()
    path.write_bytes(damaged(rng, data) if rng.random() < 0.7 else data)
    understanding.load_and_trace(path, Config(proven_only=True))


def tracer(rng: random.Random, corpus: Corpus) -> None:
    """A model in memory, up to the rewritten one."""
    exclude = ("*Gemm*",) if rng.random() < 0.1 else ()
    ranges = {"*": (-1.0, 1.0)} if rng.random() < 0.5 else {}
    found = understanding.load_and_trace(
        some_model(rng, corpus), Config(proven_only=True, exclude=exclude, input_range=ranges)
    )
    if full_check_passes(found.channels.model.proto) is not None:
        return  # ONNX Runtime does not load it, so that nothing is ever rewritten
    plan = found.proof.steps
    with as_model_error(found.channels.model.proto):
        rewrite(found.channels, fold_weights(found.channels, plan.folds, found.proof.statistics, plan.removed), "fuzz")


def _npy(rng: random.Random) -> bytes:
    """An array file with any header and any content."""
    shape = tuple(rng.choice((*INTEGERS[:8], 6, 6, 4)) for _ in range(rng.randrange(4)))
    header = {
        "descr": rng.choice(
            ("<f4", "<f8", ">f4", "|O", "<U3", "|S4", "<i8", "|b1", "<M8[s]", "|V3", "nonsense", [("a", "<f4")])
        ),
        "fortran_order": rng.choice((False, True, 3)),
        "shape": rng.choice((shape, shape, list(shape), "x", (rng.choice(INTEGERS),))),
    }
    text = repr(header).encode() + b"\n"
    if rng.random() < 0.05:
        text = b"(" * rng.choice((10, 300, 60000)) + text
    return (
        b"\x93NUMPY"
        + bytes([rng.choice((1, 1, 2, 3, 9)), 0])
        + struct.pack("<H", len(text) & 0xFFFF)
        + text
        + rng.randbytes(rng.choice((0, 96, 400)))
    )


def calibration(rng: random.Random, corpus: Corpus) -> None:
    """Calibration data of every kind, for inputs of every kind."""
    kind = rng.randrange(5)
    source: Any = corpus.folder / "case.npz"
    if kind == 0:
        suffix, data = rng.choice(corpus.arrays)
        source = source.with_suffix(suffix)
        source.write_bytes(damaged(rng, data))
    elif kind == 1:
        source = source.with_suffix(".npy")
        source.write_bytes(_npy(rng))
    elif kind == 2:
        with warnings.catch_warnings(), zipfile.ZipFile(source, "w", rng.choice((0, 8))) as archive:
            warnings.simplefilter("ignore")  # names that come twice
            for _ in range(rng.randrange(3)):
                content = _npy(rng) if rng.random() < 0.9 else _npy(rng) + bytes(1 << 22)
                archive.writestr(
                    rng.choice(("x.npy", "x.npy", "z.npy", "arr_0.npy", "../x.npy", "/x.npy", "x", ".npy")), content
                )
    elif kind == 3:
        source = corpus.folder / "test_data_set_0"
        source.mkdir(exist_ok=True)
        (source / "input_0.pb").write_bytes(damaged(rng, corpus.tensor))
    else:
        values = (
            np.zeros((6, 4), np.float32),
            [[1.0], [2.0, 3.0]],
            "text",
            None,
            3,
            [],
            np.array([object()]),
            [["a"]],
            1j,
            np.zeros((0, 4)),
            {},
            float("nan"),
            b"x",
            np.array(["a", "b"], dtype=object),
        )
        items = [{rng.choice(("x", "x", "z", 3)): rng.choice(values)} for _ in range(rng.randrange(1, 3))]
        source = rng.choice((items[0], items, iter(items), [*items, 5], 7))
    dims = ("N", 4, 4, 0, 1, "M", -1, 6, 2**40)
    shape = rng.choice((("N", 4), ("N", 4), None, tuple(rng.choice(dims) for _ in range(rng.randrange(4)))))
    dtype = np.dtype(rng.choice((np.float32, np.float32, np.float16, np.int64, np.uint8, np.bool_, np.str_, object)))
    spec = InputSpec("x", dtype, shape, rng.choice((None, (0.0, 1.0))) if dtype.kind in "fiub" else None)
    most = rng.choice((None, 1, 5))
    with open_samples(source, [spec], DataOptions(max_samples=most, batch_size=rng.choice((1, 4)))) as samples:
        for _ in samples.batches():
            pass


def records(rng: random.Random, corpus: Corpus) -> None:
    """Reports, moments and plans: what this package writes itself and reads back."""
    if rng.random() < 0.4:
        path = corpus.folder / "moments.npz"
        path.write_bytes(damaged(rng, corpus.moments))
        load_moments(path)
        return
    is_plan = rng.random() < 0.5
    values = json.loads(corpus.plan if is_plan else corpus.report)
    others = (None, 3, -1.5, "inf", "x", [], {}, [1], [{}], {"a": 1}, [None], True, "nan")
    for _ in range(rng.randrange(4)):
        values[rng.choice([*values, "new"])] = rng.choice(others)
    text = json.dumps(values)
    text = damaged(rng, text.encode()).decode("utf-8", "replace") if rng.random() < 0.3 else text
    if is_plan:
        plan = Plan.from_json(text)
        options_of(plan, {})
        resolve_plan(plan, corpus.planned, {})
    else:
        Report.from_json(text)


#: But for the one that starts processes and waits for other machines.
FLAGS = tuple(
    flag
    for action in cli.parser()._actions
    for flag in action.option_strings
    if flag.startswith("--") and flag != "--cluster"
)
WORDS = (
    *(
        "mlp.onnx",
        "out.onnx",
        "data.npz",
        "data.npy",
        "missing",
        "r.json",
        "r.html",
        ".",
        "f.py:feeds",
        "f.py:one",
        "f.py:no",
    ),
    *(
        "0",
        "1",
        "-1",
        "0.5",
        "1e-3",
        "nan",
        "inf",
        "x=0:1",
        "0:1",
        "1:0",
        "a:b",
        "auto",
        "fold",
        "y",
        "y:1",
        "y:99",
        "*",
    ),
    *(
        "CPUExecutionProvider",
        "nonsense",
        "1e999",
        "99999999999999999999",
        "--",
        "-q",
        "é",
        "\udc80",
        "\x00",
        "a" * 5000,
    ),
)


def options(rng: random.Random, corpus: Corpus) -> None:
    """Command lines; most of them fail before there is anything to do."""
    given = ["mlp.onnx", "out.onnx", "--calib", "data.npz"] if rng.random() < 0.02 else []
    for _ in range(rng.randrange(1, 7)):
        given += [rng.choice(FLAGS), rng.choice(WORDS)] if rng.random() < 0.7 else [rng.choice(WORDS)]
    given = [word for word in given if word != "--debug"]  # which prints whole tracebacks
    errors = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        try:
            code = cli.main(given)
        except SystemExit as end:
            code = end.code
    lines = errors.getvalue().splitlines()
    if (
        code not in (0, 1, 2, 3)
        or "unexpected" in errors.getvalue()
        or len(lines) > cli.MAX_LINES
        or (code and not lines)
    ):
        raise AssertionError(f"{given} gives {code} and says {errors.getvalue()!r}")


TARGETS: dict[str, Callable[[random.Random, Corpus], None]] = {
    "loader": loader,
    "tracer": tracer,
    "calibration": calibration,
    "records": records,
    "options": options,
}


# ---- running ------------------------------------------------------------------------------------------------------


def _time_is_up(number: int, frame: FrameType | None) -> None:
    raise HangError


def execute(target: str, seed: int, number: int, corpus: Corpus) -> str | None:
    """Run one case; returns what went wrong, None if nothing did."""
    rng = random.Random(f"{target}:{seed}:{number}")
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        TARGETS[target](rng, corpus)
    except LindepError as error:
        if not str(error).strip() or len(str(error).splitlines()) > cli.MAX_LINES:
            return f"message of {len(str(error).splitlines())} lines: {error}"
    except HangError:
        return f"hang over {SECONDS:g} s\n{traceback.format_exc(limit=-6)}"
    except Exception:
        return traceback.format_exc(limit=-8)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return f"memory over {MEMORY >> 30} GB: {memory:,} bytes" if memory > MEMORY else None


def work(target: str, seed: int, first: int, count: int, state: Path, seconds: float, keep_going: bool = False) -> int:
    """Run cases in this process; `state` tells how far it came, even if the process dies."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    signal.signal(signal.SIGALRM, _time_is_up)
    warnings.simplefilter("ignore")
    stop = time.monotonic() + seconds
    known: set[str] = set()
    with tempfile.TemporaryDirectory() as name, state.open("r+b") as file, mmap.mmap(file.fileno(), 8) as progress:
        os.chdir(name)
        tempfile.tempdir = name
        corpus = Corpus(Path(name))
        for number in range(first, first + count):
            progress[:] = struct.pack("<q", number)
            fault = execute(target, seed, number, corpus)
            if fault is not None:
                place = (
                    [line for line in fault.splitlines() if "lindep_onnx/" in line][-1:],
                    fault.splitlines()[-1].split(" says ")[-1:],
                )
                if str(place) not in known:
                    print(f"--target {target} --repeat {seed}:{number}\n{fault}", flush=True)
                known.add(str(place))
                if not keep_going:
                    return 1
            if time.monotonic() > stop:
                break
        progress[:] = struct.pack("<q", number + 1)
    return int(bool(known))


def campaign(target: str, seed: int, count: int, seconds: float, keep_going: bool) -> tuple[int, str | None]:
    """Run cases in processes of their own; returns how many ran, and the first fault."""
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder) / "state"
        state.write_bytes(struct.pack("<q", 0))
        command = [sys.executable, __file__, "--worker", "--target", target, "--seed", str(seed), "--state", str(state)]
        command += ["--executions", str(count), "--seconds", str(seconds), *["--keep-going"] * keep_going]
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        last, since = -1, time.monotonic()
        while process.poll() is None:
            time.sleep(0.2)
            now = struct.unpack("<q", state.read_bytes())[0]
            last, since = (now, time.monotonic()) if now != last else (last, since)
            if time.monotonic() - since > 2 * SECONDS:
                process.kill()  # it hangs where no signal reaches it
        said, errors = process.communicate()
        done = struct.unpack("<q", state.read_bytes())[0]
        if process.returncode == 0:
            return done, None
        end = said or f"--target {target} --repeat {seed}:{done}\nended with {process.returncode}\n{errors[-2000:]}"
        return done, end


def main() -> int:
    """Run what the options ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=TARGETS)
    parser.add_argument("--executions", type=int, default=1 << 40, help="of each target")
    parser.add_argument("--seconds", type=float, default=1e9, help="for each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeat", metavar="SEED:NUMBER")
    parser.add_argument("--make-corpus", action="store_true")
    parser.add_argument("--keep-going", action="store_true", help="show every different fault, once")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--state", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.make_corpus:
        make_corpus()
        return 0
    if given.worker:
        return work(given.target, given.seed, 0, given.executions, given.state, given.seconds, given.keep_going)
    if given.repeat:
        seed, number = map(int, given.repeat.split(":"))
        with tempfile.NamedTemporaryFile() as state:
            Path(state.name).write_bytes(bytes(8))
            return work(given.target, seed, number, 1, Path(state.name), given.seconds)
    total = faults = 0
    for target in (given.target,) if given.target else TARGETS:
        start = time.monotonic()
        done, fault = campaign(target, given.seed, given.executions, given.seconds, given.keep_going)
        total += done
        print(f"{target:12} {done:9,} executions in {time.monotonic() - start:.0f} s", flush=True)
        if fault:
            print(fault)
            faults += 1
            if not given.keep_going:
                return 1
    print(f"{'all':12} {total:9,} executions, {faults or 'no'} target(s) with a fault")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())

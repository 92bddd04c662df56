"""Fuzz everything that reads what others wrote: models, calibration data, reports, moments, plans and options.

Five targets, each a function of random bits: it takes something well formed from `tests/corpus`, damages it at random
(its structure as often as its bytes) and has it read. The only exception allowed is a `LindepError`; the time limit is
10 s and the memory limit 2 GB. With `-m slow`, `--hypothesis-seed=N` tries others, or the same once more; a crash in C++ says by its
traceback which target it was.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import random
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from lindep_onnx import cli
from lindep_onnx.calibration.moments import load_moments
from lindep_onnx.data.inputs import InputSpec
from lindep_onnx.data.samples import open_samples
from lindep_onnx.errors import LindepError
from lindep_onnx.model.checks import as_model_error, full_check_passes
from lindep_onnx.moves.fold_weights import fold_weights
from lindep_onnx.options import Config, DataOptions
from lindep_onnx.planning.plan_file import Plan, options_of, resolve_plan
from lindep_onnx.proofs import traced as understanding
from lindep_onnx.report.values import Report
from lindep_onnx.structure.rewrite import rewrite

resource = pytest.importorskip("resource", reason="counts memory as POSIX does")
CORPUS = Path(__file__).parents[1] / "corpus"
DEADLINE, MEMORY, QUICK = timedelta(seconds=10), 2 << 30, 250

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
        self.planned = understanding.load_and_trace(CORPUS / "mlp.onnx", Config()).structure
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
    if full_check_passes(found.structure.model.proto) is not None:
        return  # ONNX Runtime does not load it, so that nothing is ever rewritten
    plan = found.proof.steps
    with as_model_error(found.structure.model.proto):
        rewrite(
            found.structure, fold_weights(found.structure, plan.folds, found.proof.statistics, plan.removed), "fuzz"
        )


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


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Corpus]:
    folder, before = tmp_path_factory.mktemp("fuzz"), Path.cwd()
    os.chdir(folder)
    yield Corpus(folder)
    os.chdir(before)


def execute(target: Callable[[random.Random, Corpus], None], rng: random.Random, corpus: Corpus) -> None:
    """Run one case; nothing but a `LindepError` of a few lines may come of it."""
    before = memory()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target(rng, corpus)
    except LindepError as error:
        assert str(error).strip() and len(str(error).splitlines()) <= cli.MAX_LINES, error
    assert memory() - before < MEMORY


def memory() -> int:
    """The peak so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize(
    "executions", [QUICK, pytest.param(50_000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
)
@pytest.mark.parametrize("target", TARGETS.values(), ids=list(TARGETS))
def test_what_others_wrote_is_read_or_refused(
    target: Callable[[random.Random, Corpus], None], executions: int, corpus: Corpus
) -> None:
    @given(st.randoms(use_true_random=True))
    @settings(
        max_examples=executions,
        deadline=DEADLINE,
        suppress_health_check=list(HealthCheck),
        database=None,
        derandomize=executions == QUICK,
    )
    def run(rng: random.Random) -> None:
        execute(target, rng, corpus)

    run()


@pytest.mark.parametrize("fault", [IndexError, AssertionError])
def test_a_fault_is_noticed(fault: type[Exception], corpus: Corpus) -> None:
    def faulty(*_: object) -> None:
        raise fault

    with pytest.raises(fault):
        execute(faulty, random.Random(0), corpus)

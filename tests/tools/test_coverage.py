"""The sweep can fail, and its shares are those of hand-counted graphs."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import bench_coverage as coverage
import numpy as np
import onnx
import pytest
from build import build, traced
from onnx import TensorProto, helper

from lindep_onnx.api import compress
from lindep_onnx.errors import ModelError


@pytest.fixture(autouse=True)
def _audible() -> Iterator[None]:
    """The sweep silences logging in a process of its own, which here is that of the tests."""
    yield
    logging.disable(logging.NOTSET)


PLAIN = build("h = Conv(x, w)\nr = Relu(h)\ny = Conv(r, v)", {"w": (8, 3, 1, 1), "v": (4, 8, 1, 1)})


def test_shares_are_counted_by_elements() -> None:
    found = coverage.coverage(traced(PLAIN))
    assert (found.channels, found.eligible, found.parameters) == (12, 8, 1.0)
    softmax = build("h = Conv(x, w)\nr = Softmax<axis=1>(h)\ny = Conv(r, v)", {"w": (8, 3, 1, 1), "v": (4, 8, 1, 1)})
    found = coverage.coverage(traced(softmax))
    assert (found.eligible, found.parameters, found.refused) == (0, 0.0, (("mixed_axis", 8), ("graph_output", 4)))


def test_a_wrong_result_is_called_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    task = coverage.Task("plain", PLAIN.SerializeToString())
    assert coverage.attempt(task, 12).kind == "unchanged"
    broken = build("h = Conv(x, w)\nr = Relu(h)\ny = Conv(r, v)", {"w": (7, 3, 1, 1), "v": (4, 7, 1, 1)})

    def lies(proto: onnx.ModelProto, calib: object, **options: object) -> object:
        result = compress(proto, calib, **options)
        object.__setattr__(result, "model", broken)
        return result

    monkeypatch.setattr(coverage, "compress", lies)
    assert coverage.attempt(task, 12).kind == "wrong"
    monkeypatch.setattr(coverage, "compress", None)
    assert coverage.attempt(task, 12).kind == "crash"


def test_an_input_that_is_no_tensor_is_named() -> None:
    given = helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, [2])
    index = onnx.numpy_helper.from_array(np.int64(0), "i")
    made = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
    graph = helper.make_graph([helper.make_node("SequenceAt", ["s", "i"], ["y"])], "g", [given], [made], [index])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    with pytest.raises(ModelError, match="'s' is a sequence"):
        compress(model, {"s": np.zeros((8, 2), np.float32)})

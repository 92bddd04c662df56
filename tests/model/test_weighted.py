"""What is known of the operators that multiply by a weight, and of windows, against onnx and ONNX Runtime."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import onnx.parser
import pytest
from build import run

from lindep_onnx.model.ir import Model, load
from lindep_onnx.model.shapes import resolve
from lindep_onnx.model.weighted import WEIGHTS, macs, may_pad, pads_implicitly, weighted, window_of

CASES = {
    "Conv": ("[2, 6, 9, 9]", "[8, 3, 3, 3]", "<group = 2>", (6, 8), 2),
    "Conv depthwise": ("[2, 6, 9, 9]", "[12, 1, 3, 3]", "<group = 6>", (6, 12), 6),
    "ConvTranspose": ("[2, 6, 9, 9]", "[6, 4, 3, 3]", "<group = 2>", (6, 8), 2),
    "Gemm": ("[2, 6]", "[6, 8]", "", (6, 8), 1),
    "Gemm transposed": ("[2, 6]", "[8, 6]", "<transB = 1>", (6, 8), 1),
    "MatMul": ("[2, 3, 6]", "[6, 8]", "", (6, 8), 1),
}


def single(op: str, data: str, weight: str, attributes: str = "") -> Model:
    text = f'<ir_version: 8, opset_import: ["" : 17]> g (float{data} x, float{weight} w) => (float y) {{ y = {op}{attributes}(x, w) }}'
    proto = onnx.parser.parse_model(text)
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    return load(proto)


@pytest.mark.parametrize("case", CASES)
def test_widths_are_the_channels_that_go_in_and_come_out(case: str) -> None:
    data, weight, attributes, widths, group = CASES[case]
    model = single(case.split()[0], data, weight, attributes)
    shapes, (node,) = resolve(model).shapes, model.nodes
    layout = weighted(node)
    assert layout is not None and node.op in WEIGHTS
    assert layout.widths(shapes["w"]) == widths and layout.group == group
    assert layout.weight_shape(widths, shapes["w"][2:]) == shapes["w"]
    assert layout.depthwise(shapes["w"]) == case.endswith("depthwise")
    axis = 1 if len(shapes["y"]) != 3 else 2
    assert (shapes["x"][axis], shapes["y"][axis]) == widths


@pytest.mark.parametrize("case", CASES)
def test_as_many_products_are_added_up_as_ones_give(case: str) -> None:
    data, weight, attributes, *_ = CASES[case]
    model = single(case.split()[0], data, weight, attributes)
    shapes, (node,) = resolve(model).shapes, model.nodes
    ones = {name: np.ones(shapes[name], np.float32) for name in ("x", "w")}
    assert macs(node, shapes["x"], shapes["w"], shapes["y"]) == run(model.proto, ones)[0].sum()


def test_a_matrix_on_the_left_mixes_rows() -> None:
    (node,) = single("MatMul", "[8, 6]", "[6, 5]").nodes
    layout = weighted(node, position=0)
    assert layout is not None and layout.widths((8, 6)) == (6, 8)
    assert weighted(single("Add", "[2]", "[2]").nodes[0]) is None


@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
@pytest.mark.parametrize("pads", ["", "pads = [1, 0, 2, 1],", 'auto_pad = "SAME_UPPER",', 'auto_pad = "SAME_LOWER",'])
def test_windows_make_outputs_of_the_size_that_onnx_infers(op: str, pads: str) -> None:
    for stride, dilation, kernel in itertools.product((1, 2, 3), (1, 2), (1, 3, 4)):
        attributes = f"<{pads} strides = [{stride}, 1], dilations = [{dilation}, 1]>"
        model = single(op, "[1, 2, 11, 8]", f"[2, 2, {kernel}, 3]", attributes)
        shapes, (node,) = resolve(model).shapes, model.nodes
        assert may_pad(node) == bool(pads)
        if op == "ConvTranspose" and "auto" in pads:
            assert pads_implicitly(node)
            continue
        window = window_of(node, (kernel, 3), (11, 8))
        assert (window.output_size(0, 11), window.output_size(1, 8)) == shapes["y"][2:]
        assert not window.padded or may_pad(node)


def test_where_a_size_is_unknown_the_padding_is_the_most_that_it_may_be() -> None:
    (node,) = single("Conv", "[1, 2, 11]", "[2, 2, 4]", '<auto_pad = "SAME_UPPER", strides = [2]>').nodes
    assert window_of(node, (4,), ("N",)).pads == ((1, 2),)
    assert all(sum(window_of(node, (4,), (size,)).pads[0]) <= 3 for size in range(4, 20))

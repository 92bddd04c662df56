"""Widths that stay whole: which multiples hold where, and removals cut into blocks that keep to them."""

from __future__ import annotations

import numpy as np
import pytest
from build import build, traced
from hypothesis import given
from hypothesis import strategies as st

from lindep_onnx.model.node import Node
from lindep_onnx.moves.channels import ChannelRemoval
from lindep_onnx.runtime.targets import FREE, TABLE, WidthRule, resolved
from lindep_onnx.structure.types import Structure
from lindep_onnx.structure.widths import Width, along, blocks, widths

SIZES = WidthRule("cpu-avx2")
TIMES = WidthRule("cpu-avx2", blocks=True)
CHAIN = "a = Conv(x, w)\nb = Relu(a)\ny = Conv(b, v)"


def chain(width: int) -> Structure:
    return traced(build(CHAIN, {"w": (width, 3, 1, 1), "v": (5, width, 1, 1)}, x=("N", 3, 4, 4)))


def kept(structure: Structure, removed: np.ndarray, tensor: str, axis: int = 1) -> int:
    units = along(structure, tensor, axis)
    assert units is not None
    return int((~np.append(removed, False)[units]).sum())


@pytest.mark.parametrize(
    ("op", "weight", "attributes", "steps"),
    [
        ("Conv", (32, 16, 3, 3), {}, 4),
        ("Conv", (32, 1, 3, 3), {"group": 32}, 4),
        ("Conv", (32, 8, 3, 3), {"group": 4}, 8),
        ("Conv", (32, 16, 3), {}, 1),
        ("Conv", (32, 16, 3, 3, 3), {}, 1),
        ("ConvTranspose", (32, 16, 2, 2), {}, 1),
        ("MatMul", (32, 16), {}, 1),
        ("Gemm", (32, 16), {}, 1),
    ],
)
def test_only_2d_convolutions_have_steps_on_a_processor(op, weight, attributes, steps: int) -> None:
    node = Node(0, op, op, ("x", "w"), ("y",), attributes, ())
    assert SIZES.steps(node, weight).block == steps
    assert FREE.steps(node, weight).block == 1
    assert WidthRule("cpu-avx2", fixed=6).steps(node, weight).block == 6
    assert WidthRule("cuda").steps(node, weight).block == 8


def test_every_target_has_a_row_for_each_precision_and_this_machine_is_one_of_them() -> None:
    assert all(set(rows) == {"float", "int8"} for rows in TABLE.values())
    assert resolved("cpu", ["CPUExecutionProvider"]) in TABLE
    assert resolved("cpu", ["CUDAExecutionProvider", "CPUExecutionProvider"]) == "cuda"
    assert resolved("generic", ["CUDAExecutionProvider"]) == "generic"


@pytest.mark.parametrize(
    ("width", "odd", "kept", "whole"),
    [(16, False, 13, 16), (16, False, 12, 12), (18, True, 17, 17), (18, True, 15, 16), (18, False, 17, 18)],
)
def test_a_width_is_a_multiple_or_what_it_was_and_an_odd_one_is_free_down_to_the_first(width, odd, kept, whole) -> None:
    assert Width(np.arange(width), 4, odd).whole(kept) == whole


@pytest.mark.parametrize(
    ("width", "rule", "sizes"),
    [
        (16, SIZES, [4, 4, 4, 4]),
        (18, SIZES, [1, 1, 4, 4, 4, 4]),
        (20, TIMES, [4, 8, 8]),
        (16, FREE, [1] * 16),
        (12, WidthRule("generic", fixed=5), [2, 5, 5]),
    ],
)
def test_an_order_is_cut_into_blocks_that_leave_whole_widths(width: int, rule: WidthRule, sizes: list[int]) -> None:
    structure = chain(width)
    order = np.random.default_rng(0).permutation(structure.groups[0].units)
    found = blocks(structure, order, rule)
    assert [len(block) for block in found] == sizes
    assert np.concatenate(found).tolist() == order.tolist()


def test_a_concatenation_is_whole_in_every_part() -> None:
    text = "a = Conv(x, w)\nb = Conv(x, u)\nc = Concat<axis=1>(a, b)\nd = Relu(c)\ny = Conv(d, v)"
    structure = traced(build(text, {"w": (8, 3, 1, 1), "u": (12, 3, 1, 1), "v": (5, 20, 1, 1)}, x=("N", 3, 4, 4)))
    order = np.random.default_rng(1).permutation(structure.units)
    removed = np.zeros(structure.units, dtype=bool)
    for block in blocks(structure, order, SIZES):
        removed[block] = True
        assert kept(structure, removed, "a") % 4 == kept(structure, removed, "b") % 4 == 0


def test_groups_of_a_convolution_lose_whole_blocks_each() -> None:
    text = "a = Conv(x, w)\nb = Relu(a)\nc = Conv<group=2>(b, u)\nd = Relu(c)\ny = Conv(d, v)"
    structure = traced(build(text, {"w": (32, 3, 1, 1), "u": (48, 16, 1, 1), "v": (5, 48, 1, 1)}, x=("N", 3, 4, 4)))
    order = np.random.default_rng(2).permutation(along(structure, "b", 1))
    found = blocks(structure, order, SIZES)
    assert [len(block) for block in found] == [16, 16]
    removed = np.zeros(structure.units, dtype=bool)
    removed[found[0]] = True
    parts = np.split(np.append(removed, False)[along(structure, "b", 1)], 2)
    assert [int(part.sum()) for part in parts] == [8, 8]


@given(st.data())
def test_whatever_goes_what_stays_is_whole_and_nothing_else_is_put_back(data) -> None:
    structure = chain(data.draw(st.integers(2, 40)))
    units = structure.groups[0].units
    gone = data.draw(st.lists(st.sampled_from(units.tolist()), unique=True, max_size=len(units) - 1))
    rule = data.draw(st.sampled_from([SIZES, TIMES, FREE, SIZES.widened(16), WidthRule("generic", fixed=3)]))
    removed = np.zeros(structure.units, dtype=bool)
    removed[gone] = True
    found = ChannelRemoval().admissible(structure, removed, np.array(gone, dtype=np.int64), rule)
    assert not (found & ~removed).any()
    width = next((own for own in widths(structure, rule) if len(own.units) == len(units)), None)
    left = len(units) - int(found.sum())
    wanted = len(units) - len(gone) if width is None else width.whole(len(units) - len(gone))
    assert left == wanted
    assert found[gone[: int(found.sum())]].all()  # the last ones are put back

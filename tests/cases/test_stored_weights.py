"""Weights as they come: shared by several nodes, behind names of their own, of odd shapes."""

from __future__ import annotations

import numpy as np
from build import build, traced
from oracle import removed_like_zeros

MLP = {"w": (4, 8), "v": (8, 4), "b": (8,), "k": (4, 3)}
BLOCK = "h{0} = MatMul(x{0}, w)\na{0} = Add(h{0}, b)\nr{0} = Relu(a{0})\no{0} = MatMul(r{0}, v)\nx{1} = Add(x{0}, o{0})"


def block(first: str = "x0 = Identity(x)") -> str:
    return "\n".join([first, BLOCK.format(0, 1), BLOCK.format(1, 2), "y = MatMul(x2, k)"])


def test_a_block_used_twice_loses_its_hidden_channels_whatever_its_uses_read() -> None:
    # The first use reads the input of the model, whose channels have no units, the second a residual sum.
    structure = removed_like_zeros(build(block(), MLP, x=("N", 4)))
    assert structure.units == 8
    assert {consumer.weight for consumer in structure.consumers} == {"v"}
    assert "shared_weight" not in {refusal.reason.code for refusal in structure.refusals}


def test_a_weight_met_by_channels_once_and_by_a_whole_input_once_keeps_what_it_reads() -> None:
    body = "h = MatMul(x, u)\nr = Relu(h)\na = MatMul(r, w)\nb = MatMul(x, w)\ns = Relu(a)\nt = Relu(b)\n"
    model = build(
        body + "p = MatMul(s, v)\nq = MatMul(t, v)\ny = Add(p, q)", {"u": (4, 4), "w": (4, 8), "v": (8, 3)}, x=("N", 4)
    )
    structure = removed_like_zeros(model)
    assert structure.units == 8  # of w; those of u meet rows of w that the input of the model needs
    assert ("shared_weight", 4) in [(refusal.reason.code, refusal.channels) for refusal in structure.refusals]


def test_a_column_that_two_products_share_is_one_weight() -> None:
    body = "h = MatMul(x, w)\na = Relu(h)\ng = MatMul(x, u)\nb = Relu(g)\np = MatMul(a, v)\nq = MatMul(b, v)\ny = Add(p, q)"
    structure = removed_like_zeros(build(body, {"w": (4, 8), "u": (4, 8), "v": (8, 1)}, x=("N", 4)))
    assert structure.units == 8
    (consumer,) = structure.consumers
    assert len(consumer.readers) == 2


def test_a_column_that_is_multiplied_once_and_scales_once_takes_no_fold() -> None:
    body = "h = MatMul(x, w)\na = Relu(h)\nz = Unsqueeze(a, i)\np = MatMul(a, v)\nq = Mul(z, v)\nr = Squeeze(q, i)\n"
    weights = {"w": (4, 8), "v": (8, 1), "k": (8, 3), "i": np.array([2])}
    model = build(body + "s = MatMul(r, k)\ny = Concat<axis=1>(p, s)", weights, x=("N", 4))
    assert not traced(model).units

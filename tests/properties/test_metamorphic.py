"""What must not matter does not: the order of channels, the names of tensors, a second run, the exporter's habits."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from build import as_array, build, feed, initializer, run, with_initializer
from free_widths import compress
from planted_net import images, net, widths


def kept(model: onnx.ModelProto, smaller: onnx.ModelProto, name: str) -> set[int]:
    """Which rows of a weight are still there, found by their values."""
    rows = initializer(smaller, name)
    return {i for i, row in enumerate(initializer(model, name)) if any(np.array_equal(row, other) for other in rows)}


def permuted(model: onnx.ModelProto, order: np.ndarray) -> onnx.ModelProto:
    """The channels between the two convolutions in another order."""
    for name, axis in (("w1", 0), ("b1", 0), ("w2", 1)):
        model = with_initializer(model, name, initializer(model, name).take(order, axis))
    return model


def test_permuting_channels_permutes_the_plan() -> None:
    w = as_array("w1", (10, 3, 3, 3))
    w[7], w[8] = 0, 0  # of a class of equals any may stay; of these two none does
    model = with_initializer(net(planted=False), "w1", w)
    model = with_initializer(model, "b1", np.where(np.isin(np.arange(10), (7, 8)), -1, initializer(model, "b1")))
    order = np.random.default_rng(3).permutation(10)
    other = permuted(model, order)
    np.testing.assert_allclose(run(model, images(4, 9))[0], run(other, images(4, 9))[0], rtol=1e-4, atol=1e-5)
    first, second = (compress(one, images(64, 1)).model for one in (model, other))
    want = kept(model, first, "w1")
    assert want == set(range(10)) - {7, 8}
    assert {int(order[i]) for i in kept(other, second, "w1")} == want


def test_permuting_planted_channels_keeps_their_number() -> None:
    model = net(planted=True)
    for seed in range(3):
        other = permuted(model, np.random.default_rng(seed).permutation(10))
        assert widths(compress(other, images(64, 1)).model) == widths(compress(model, images(64, 1)).model)


def test_renaming_everything_changes_nothing() -> None:
    model = net(planted=True)
    other = onnx.ModelProto()
    other.CopyFrom(model)
    new = {name: f"zz/{len(name)}:{name[::-1]}" for node in model.graph.node for name in (*node.input, *node.output)}
    new |= {"x": "x", "y": "y"}
    for number, node in enumerate(other.graph.node):
        node.name = f"n{-number}"
        for names in (node.input, node.output):
            names[:] = [new[name] for name in names]
    for tensor in other.graph.initializer:
        tensor.name = new[tensor.name]
    left, right = (compress(one, images(64, 1)).model for one in (model, other))
    for before in left.graph.initializer:
        np.testing.assert_array_equal(initializer(right, new[before.name]), onnx.numpy_helper.to_array(before))


def test_a_second_run_removes_nothing_new() -> None:
    once = compress(net(planted=True), images(64, 1)).model
    twice = compress(once, images(64, 1)).model
    for model in (once, twice):
        del model.metadata_props[:]
    assert once.SerializeToString(deterministic=True) == twice.SerializeToString(deterministic=True)


FUSED = "h = Conv<pads=[1,1,1,1]>(x, w, b)\nr = Relu(h)\nf = Flatten(r)\ny = Gemm(f, v, c)"
UNFUSED = {
    "a bias of its own": "a = Conv<pads=[1,1,1,1]>(x, w)\nh = Add(a, b4)\nr = Relu(h)\nf = Flatten(r)\nm = MatMul(f, v)\ny = Add(m, c)",
    "channels last": "p = Transpose<perm=[0,2,3,1]>(x)\nq = Transpose<perm=[0,3,1,2]>(p)\nh = Conv<pads=[1,1,1,1]>(q, w, b)\nr = Relu(h)\nf = Reshape(r, flat)\ny = Gemm(f, v, c)",
    "weights behind nodes": "k = Transpose<perm=[3,2,0,1]>(wt)\nh = Conv<pads=[1,1,1,1]>(x, k, b)\nr = Relu(h)\nf = Flatten(r)\ny = Gemm<transB=1>(f, vt, c)",
}  # fmt: skip


@pytest.mark.parametrize("habit", UNFUSED)
def test_the_same_model_written_in_another_way_loses_as_many_channels(habit: str) -> None:
    w, b = as_array("w", (8, 3, 3, 3)), as_array("b", (8,))
    w[5], b[5] = 2 * w[1], 2 * b[1]
    w[6], b[6] = w[2], b[2]
    v = as_array("v", (128, 4))
    weights = {
        "w": w,
        "b": b,
        "b4": b.reshape(1, 8, 1, 1),
        "wt": w.transpose(2, 3, 1, 0).copy(),
        "v": v,
        "vt": v.T.copy(),
    }
    weights |= {"c": (4,), "flat": np.array([0, -1])}
    models = []
    for body in (FUSED, UNFUSED[habit]):
        used = {
            key: value
            for key, value in weights.items()
            if any(
                key in line.replace("(", " ").replace(")", " ").replace(",", " ").split() for line in body.splitlines()
            )
        }
        models.append(build(body, used, x=("N", 3, 4, 4)))
    data = feed(models[0])
    np.testing.assert_allclose(run(models[0], data)[0], run(models[1], data)[0], rtol=1e-4, atol=1e-4)
    calib = {"x": np.random.default_rng(1).normal(size=(100, 3, 4, 4)).astype(np.float32)}
    results = [compress(model, calib) for model in models]
    assert [result.report.after.channels for result in results] == [6 + 4, 6 + 4]


def spoiled(name: str, shape: tuple[int, ...], dead: tuple[int, ...], axis: int = 0) -> np.ndarray:
    """Random weights that make some channels zero: of these nothing is left to choose."""
    value = as_array(name, shape)
    value[(slice(None),) * axis + (list(dead),)] = 0
    return value


BLOCKS = {
    # name: body, weights, samples, and for each tensor that is permuted its axis and the places on it
    "grouped": (
        "h = Conv(x, w)\nr = Relu(h)\ng = Conv<group=2>(r, k)\ns = Relu(g)\ny = Conv(s, v)",
        {"w": spoiled("w", (12, 3, 1, 1), (2, 9)), "k": (8, 6, 1, 1), "v": (4, 8, 1, 1)},
        (3, 4, 4),
        [("w", 0, 0, 12)],
    ),
    "concat": (
        "h = Conv(x, w)\ng = Conv(x, k)\nt = Concat<axis=1>(h, g)\nr = Relu(t)\ny = Conv(r, v)",
        {"w": spoiled("w", (8, 3, 1, 1), (2, 5)), "k": spoiled("k", (6, 3, 1, 1), (3,)), "v": (4, 14, 1, 1)},
        (3, 4, 4),
        [("w", 0, 0, 8), ("k", 0, 8, 6)],
    ),
    "attention": (
        "a = MatMul(x, w)\nd = Reshape(a, p)\nv = Transpose<perm=[0,2,1,3]>(d)\nq = MatMul(x, wq)\nr = Reshape(q, p)\n"
        "s = Transpose<perm=[0,2,3,1]>(r)\nu = Transpose<perm=[0,2,1,3]>(r)\nz = MatMul(u, s)\nk = Softmax(z)\n"
        "o = MatMul(k, v)\nm = Transpose<perm=[0,2,1,3]>(o)\nn = Reshape(m, e)\ny = MatMul(n, wo)",
        {
            "w": spoiled("w", (6, 12), (1, 8), axis=1),
            "wq": (6, 12),
            "wo": (12, 5),
            "p": np.array([0, 0, 2, 6]),
            "e": np.array([0, 0, 12]),
        },
        (5, 6),
        [("w", 1, 0, 12)],
    ),
}  # fmt: skip


def block(name: str, order: np.ndarray | None = None) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """A model and data; with an order, its channels stand in another one that keeps groups, heads and operands."""
    body, given, shape, moved = BLOCKS[name]
    weights = {key: as_array(key, value) for key, value in given.items()}
    if order is not None:
        for tensor, axis, first, size in moved:
            own = order[(order >= first) & (order < first + size)]
            weights[tensor] = weights[tensor].take(own - first, axis)
        if name == "grouped":
            parts = [weights["k"][4 * g : 4 * g + 4, order[6 * g : 6 * g + 6] - 6 * g] for g in range(2)]
            weights["k"] = np.concatenate(parts)
        else:
            reader, axis = ("v", 1) if name == "concat" else ("wo", 0)
            weights[reader] = weights[reader].take(order, axis)
    x = np.random.default_rng(1).normal(size=(200, *shape)).astype(np.float32)
    return build(body, weights, x=("N", *shape)), {"x": x}


def order_within(name: str, seed: int) -> np.ndarray:
    """Channels trade places within their group, operand or head only."""
    rng = np.random.default_rng(seed)
    sizes = {"grouped": (6, 6), "concat": (8, 6), "attention": (6, 6)}[name]
    starts = np.cumsum((0, *sizes))
    return np.concatenate([first + rng.permutation(size) for first, size in zip(starts, sizes, strict=False)])


def rows(model: onnx.ModelProto, name: str) -> set[bytes]:
    """The filters that are left in a block, whatever their order."""
    found = set()
    for tensor, axis, _, _ in BLOCKS[name][3]:
        found |= {np.ascontiguousarray(row).tobytes() for row in np.moveaxis(initializer(model, tensor), axis, 0)}
    return found


@pytest.mark.parametrize("name", BLOCKS)
def test_permuting_within_groups_heads_and_operands_permutes_the_plan(name: str) -> None:
    model, data = block(name)
    small = compress(model, data).model
    assert len(rows(small, name)) == {"grouped": 10, "concat": 11, "attention": 10}[name]
    for seed in range(2):
        other, _ = block(name, order_within(name, seed))
        np.testing.assert_allclose(run(other, data)[0], run(model, data)[0], rtol=1e-4, atol=1e-4)
        assert rows(compress(other, data).model, name) == rows(small, name)


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_whole_after_one_run(name: str) -> None:
    model, data = block(name)
    once = compress(model, data).model
    again = compress(once, data).report
    assert again.before.channels == again.after.channels


@pytest.mark.parametrize("name", BLOCKS)
def test_names_mean_nothing_in_blocks(name: str) -> None:
    model, data = block(name)
    other = onnx.ModelProto()
    other.CopyFrom(model)
    new = {tensor: f"z{tensor}" for node in model.graph.node for tensor in (*node.input, *node.output)}
    new |= {"x": "x", "y": "y"}
    for node in other.graph.node:
        node.name = f"a/{node.name[::-1]}"
        for names in (node.input, node.output):
            names[:] = [new[tensor] for tensor in names]
    for tensor in other.graph.initializer:
        tensor.name = new[tensor.name]
    left, right = (compress(one, data).model for one in (model, other))
    np.testing.assert_array_equal(run(left, data)[0], run(right, data)[0])
    for tensor, *_ in BLOCKS[name][3]:
        np.testing.assert_array_equal(initializer(right, new[tensor]), initializer(left, tensor))

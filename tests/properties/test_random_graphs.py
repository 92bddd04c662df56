"""Random graphs built from the operator table: whatever is removed, the result equals the model that ignores it."""

from __future__ import annotations

import numpy as np
import onnx
from build import build, feed, ignoring, run, traced
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from lindep_onnx.structure.placement import equalized
from lindep_onnx.structure.rewrite import Removal, rewrite

SIZE = 4  # positions along each spatial axis


class Builder:
    """Grows a graph whose tensors are all (N, channels, SIZE, SIZE)."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.weights: dict = {}
        self.width = {"x": 3}

    def add(self, line: str, width: int, **weights: object) -> str:
        number = len(self.lines)
        name = f"h{number}"
        for key, value in weights.items():
            self.weights[f"{key}{number}"] = value
            line = line.replace(f"@{key}", f"{key}{number}")
        self.lines.append(f"{name} = {line}")
        self.width[name] = width
        return name


def convolution(builder: Builder, data: st.DataObject, source: str) -> str:
    width = data.draw(st.sampled_from([2, 3, 4, 6]))
    return builder.add(
        f"Conv<pads=[1,1,1,1]>({source}, @w, @b)", width, w=(width, builder.width[source], 3, 3), b=(width,)
    )


def pointwise(builder: Builder, data: st.DataObject, source: str) -> str:
    op = data.draw(st.sampled_from(["Relu", "Sigmoid", "LeakyRelu", "HardSwish", "Identity", "Abs", "Neg"]))
    return builder.add(f"{op}({source})", builder.width[source])


def constant(builder: Builder, data: st.DataObject, source: str) -> str:
    width = builder.width[source]
    op = data.draw(st.sampled_from(["Add", "Sub", "Mul", "PRelu", "Max", "Min"]))
    shape = data.draw(st.sampled_from([(width, 1, 1), (1,), (width, SIZE, SIZE)]))
    return builder.add(f"{op}({source}, @c)", width, c=shape)


def normalization(builder: Builder, data: st.DataObject, source: str) -> str:
    width = builder.width[source]
    ones = np.ones(width, np.float32)
    return builder.add(
        f"BatchNormalization({source}, @s, @b, @m, @v)", width, s=(width,), b=(width,), m=(width,), v=ones
    )


def depthwise(builder: Builder, data: st.DataObject, source: str) -> str:
    width, times = builder.width[source], data.draw(st.integers(1, 2))
    assume(width > 1)
    return builder.add(f"Conv<group={width}, pads=[1,1,1,1]>({source}, @w)", width * times, w=(width * times, 1, 3, 3))


def grouped(builder: Builder, data: st.DataObject, source: str) -> str:
    width = builder.width[source]
    groups = data.draw(st.sampled_from([group for group in (2, 3) if width % group == 0 and width > group] or [1]))
    made = groups * data.draw(st.integers(1, 3))
    return builder.add(f"Conv<group={groups}>({source}, @w, @b)", made, w=(made, width // groups, 1, 1), b=(made,))


def pooling(builder: Builder, data: st.DataObject, source: str) -> str:
    op = data.draw(st.sampled_from(["MaxPool", "AveragePool"]))
    return builder.add(f"{op}<kernel_shape=[3,3], pads=[1,1,1,1]>({source})", builder.width[source])


def addition(builder: Builder, data: st.DataObject, source: str) -> str:
    width = builder.width[source]
    other = data.draw(st.sampled_from([name for name in builder.width if builder.width[name] == width]))
    op = data.draw(st.sampled_from(["Add", "Mul", "Max", "Sub"]))
    return builder.add(f"{op}({source}, {other})", width)


def concatenation(builder: Builder, data: st.DataObject, source: str) -> str:
    other = data.draw(st.sampled_from(list(builder.width)))
    return builder.add(f"Concat<axis=1>({source}, {other})", builder.width[source] + builder.width[other])


def slicing(builder: Builder, data: st.DataObject, source: str) -> str:
    width = builder.width[source]
    assume(width > 2)
    step = data.draw(st.sampled_from([1, 2, -1]))
    begin, end = (0, width - 1) if step > 0 else (-1, -width - 1)
    length = len(range(width)[slice(begin, None if step < 0 else end, step)])
    given_ = {"s": begin, "e": end, "a": 1, "t": step}
    weights = {key: np.array([value], dtype=np.int64) for key, value in given_.items()}
    return builder.add(f"Slice({source}, @s, @e, @a, @t)", length, **weights)


def picking(builder: Builder, data: st.DataObject, source: str) -> str:
    width = builder.width[source]
    indices = data.draw(st.lists(st.integers(-width, width - 1), min_size=1, max_size=5))
    return builder.add(f"Gather<axis=1>({source}, @i)", len(indices), i=np.array(indices, dtype=np.int64))


def padding(builder: Builder, data: st.DataObject, source: str) -> str:
    before, after = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 2))
    pads = np.array([0, before, 0, 0, 0, after, 0, 0], dtype=np.int64)
    return builder.add(f"Pad({source}, @p)", builder.width[source] + before + after, p=pads)


def shuffling(builder: Builder, data: st.DataObject, source: str) -> str:
    width = builder.width[source]
    assume(width % 2 == 0)
    split = np.array([0, 2, width // 2, SIZE * SIZE], dtype=np.int64)
    whole = np.array([0, width, SIZE, SIZE], dtype=np.int64)
    first = builder.add(f"Reshape({source}, @r)", 0, r=split)
    second = builder.add(f"Transpose<perm=[0,2,1,3]>({first})", 0)
    del builder.width[first], builder.width[second]
    return builder.add(f"Reshape({second}, @r)", width, r=whole)


STEPS = [
    *[convolution] * 4,
    *[pointwise] * 2,
    constant, normalization, depthwise, grouped, pooling, addition, concatenation, slicing, picking, padding, shuffling,
]  # fmt: skip


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_removal_from_any_graph_is_exact(data: st.DataObject) -> None:
    builder = Builder()
    last = convolution(builder, data, "x")
    for _ in range(data.draw(st.integers(1, 7))):
        source = data.draw(st.sampled_from([last, *builder.width]))
        last = data.draw(st.sampled_from(STEPS))(builder, data, source)
    width = builder.width[last]
    builder.lines.append(f"y = Conv({last}, head)")
    builder.weights["head"] = (2, width, 1, 1)
    model = build("\n".join(builder.lines), builder.weights, x=(2, 3, SIZE, SIZE))
    onnx.checker.check_model(model, full_check=True)
    channels = traced(model)
    removed = np.array([data.draw(st.booleans()) for _ in range(channels.units)], dtype=bool)
    for members, least in channels.minimums:
        short = least - int((~removed[members]).sum())
        if short > 0:
            removed[members[removed[members]][:short]] = False
    removed = equalized(channels, removed)
    smaller = rewrite(channels, Removal(removed), "test").proto
    onnx.checker.check_model(smaller, full_check=True)
    feeds = feed(model)
    (got,), (want,) = run(smaller, feeds), run(ignoring(channels, removed), feeds)
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max() + 1e-7)

"""Where the time of a run goes: how long each node takes in the original and in a result, by ONNX Runtime's profiler.

A node holds the time of those that were fused into it. Times of nodes do not add up to that of a run: the profiler
adds a little to each, and what ONNX Runtime does between nodes is no node's. They tell what is worth changing; `timing`
tells how fast a model is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
from numpy.typing import NDArray

from lindep_onnx.model.ir import Model, first_name
from lindep_onnx.runtime.backend import Runtime
from lindep_onnx.runtime.profiles import Matched, match, parse_profile

#: Runs that are profiled at most, and seconds after which no other begins.
RUNS, SECONDS = 20, 1.0
#: What the times of entries that match no node are called, such as changes of the memory layout.
OTHER = "other"
#: Names of the layers that hold most of the time.
MOST = 5


@dataclass(frozen=True)
class LayerTime:
    """How long a node takes, with those that were fused into it.

    Attributes:
        name: of the node; "other" for what belongs to none, such as changes of the memory layout.
        op: its operator; empty for what belongs to no node.
        before_ms: milliseconds in the original; None if it is not there.
        after_ms: milliseconds in the result; None if it is not there.
    """

    name: str
    op: str
    before_ms: float | None
    after_ms: float | None


def layer_times(
    original: Model, result: Model, feeds: Mapping[str, NDArray[Any]], runtime: Runtime
) -> tuple[LayerTime, ...]:
    """Profile two models, one after the other.

    Args:
        original: the model as it was.
        result: what became of it.
        feeds: arrays by input name.
        runtime: what both run on.

    Returns:
        One entry a node that took time, in the order of the original, then what is new, and last what belongs to none.

    Raises:
        ModelError: a model does not run.
        UsageError: the profile does not tell how long nodes take, as on some devices.
    """
    before, after = (_seconds(model, feeds, runtime) for model in (original, result))
    ops = {node.name: node.op for model in (result, original) for node in model.nodes}
    names = dict.fromkeys(node.name for model in (original, result) for node in model.nodes)
    found = [
        LayerTime(name, ops[name], _ms(before.seconds.get(name)), _ms(after.seconds.get(name)))
        for name in names
        if name in before.seconds or name in after.seconds
    ]
    rest = [sum(seconds for _, seconds in own.other) for own in (before, after)]
    return (*found, LayerTime(OTHER, "", _ms(rest[0]), _ms(rest[1]))) if any(rest) else tuple(found)


def _seconds(model: Model, feeds: Mapping[str, NDArray[Any]], runtime: Runtime) -> Matched:
    text = runtime.profile(_named(model), feeds, RUNS, SECONDS)
    return match(parse_profile(text, "The profile of ONNX Runtime"), model, lambda node: 1.0)


def _named(model: Model) -> Model | onnx.ModelProto:
    """A copy in which every node has the name that it has in `Model.nodes`; the model itself where all are named."""
    if all(node.name for node in model.proto.graph.node):
        return model
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    for node in proto.graph.node:
        node.name = node.name or f"{node.op_type}({first_name(node.output)})"
    return proto


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1000 * seconds


def dominant(times: Mapping[str, float], count: int = MOST) -> tuple[tuple[str, float], ...]:
    """The names that hold most of the time, with their shares of all of it, the largest first.

    Args:
        times: by name, in any unit.
        count: how many names.
    """
    total = sum(times.values())
    ordered = sorted(times.items(), key=lambda own: -own[1])[:count]
    return tuple((name, time / total) for name, time in ordered) if total > 0 else ()


def slowest(times: Sequence[LayerTime], count: int = MOST) -> tuple[tuple[LayerTime, float], ...]:
    """The layers that hold most of the time of the result, with their shares of it, the largest first."""
    shares = dominant({entry.name: entry.after_ms for entry in times if entry.after_ms is not None}, count)
    by_name = {entry.name: entry for entry in times}
    return tuple((by_name[name], share) for name, share in shares)

"""Seconds of layers as a profiler wrote them, here or on another machine.

Read are the profiles of ONNX Runtime (`enable_profiling`), of TensorRT (`trtexec --exportProfile`) and of OpenVINO
(`benchmark_app -report_type average_counters` or `detailed_counters`, CSV or JSON). All of them fuse nodes and rename
them, so that an entry is matched with the nodes of the model by their names, then by the names of their outputs, and an
entry of several nodes is split among those that multiply by a weight, by their multiply-accumulates. What matches no
node, such as a change of the memory layout, is listed.
"""

from __future__ import annotations

import csv
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from lindep_onnx.errors import UsageError, one_line
from lindep_onnx.model.ir import Model
from lindep_onnx.model.node import Node
from lindep_onnx.model.weighted import WEIGHTS

#: Providers that are told what to do and go on: their nodes last as long as it takes to tell them.
ASYNCHRONOUS = ("CUDA", "ROCM", "MIGraphX", "Tensorrt", "NvTensorRTRTX", "Dml", "WebGpu")
#: What ONNX Runtime, OpenVINO and TensorRT add to the names of nodes and tensors that they change.
PREFIX, SUFFIX = re.compile(r"^fused "), re.compile(r"(_token_\d+|_nchwc|/)$")
#: A node that ONNX Runtime made of a BatchNormalization, named by its output.
FROM_NORM = "_bn"
KERNEL = "_kernel_time"


@dataclass(frozen=True)
class Entry:
    """One line of a profile.

    Attributes:
        name: what the tool calls it.
        seconds: in one run.
        op: the operator that the tool names, empty where it names none.
        shapes: of the inputs, where the tool tells.
    """

    name: str
    seconds: float
    op: str = ""
    shapes: frozenset[tuple[int, ...]] = frozenset()

    @property
    def multiplies(self) -> bool:
        """Whether the operator is one of those that multiply by a weight, fused or in 8 bits."""
        return any(kind in self.op for kind in ("Conv", "Gemm", "MatMul"))


@dataclass(frozen=True)
class Profile:
    """What one profiler wrote.

    Attributes:
        tool: that wrote it.
        entries: by name, each once.
    """

    tool: str
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Matched:
    """A profile beside the nodes of a model.

    Attributes:
        seconds: by name of the node.
        other: names and seconds of entries that match no node, the longest first.
    """

    seconds: Mapping[str, float]
    other: tuple[tuple[str, float], ...]


# ---- reading ------------------------------------------------------------------------------------------------------


def parse_profile(text: str, where: str) -> Profile:
    """Read a profile from its text.

    Args:
        text: JSON, or the CSV of OpenVINO.
        where: what messages call it.

    Raises:
        UsageError: it is none of any tool known here, or holds no times.
    """
    try:
        found = _openvino_csv(text) if text.lstrip().startswith("layerName") else _from_json(json.loads(text))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UsageError(
            f"{where} is no profile that can be read ({type(error).__name__}: {one_line(error)}); expected that of "
            "ONNX Runtime, trtexec --exportProfile, or benchmark_app with -report_type."
        ) from error
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error
    times = [entry.seconds for entry in found.entries]
    if not sum(times) > 0 or not np.isfinite(times).all() or min(times) < 0:
        raise UsageError(f"{where}: no layer of this profile of {found.tool} took any time, or a time cannot be.")
    return found


def _from_json(values: Any) -> Profile:
    if isinstance(values, dict):
        return _openvino_json(values)
    if any("averageMs" in entry for entry in values):
        return _tensorrt(values)
    if any("ph" in entry for entry in values):
        return _onnxruntime(values)
    raise ValueError("a list without averageMs or ph")


def _tensorrt(values: Sequence[Mapping[str, Any]]) -> Profile:
    """`{"count": N}`, then name and times of each layer; newer versions write a median."""
    rows = [
        (str(row["name"]), float(row.get("medianMs", row["averageMs"])) / 1000) for row in values if "averageMs" in row
    ]
    return Profile("TensorRT", _summed(rows))


def _openvino_csv(text: str) -> Profile:
    """One table, or one for each request, each with a head and a line of totals."""
    head = text.lstrip().splitlines()[0]
    rows: list[tuple[str, float]] = []
    tables = 0
    for cells in csv.reader(text.splitlines(), delimiter=";" if ";" in head else ","):
        if cells and cells[0] == "layerName":
            tables, column = tables + 1, cells.index("realTime (ms)")
        elif len(cells) > 1 and cells[1].endswith("EXECUTED"):
            rows.append((cells[0], float(cells[column]) / 1000))
    return Profile("OpenVINO", _summed(rows, tables))


def _openvino_json(values: Mapping[str, Any]) -> Profile:
    """The nodes of the average, or of each request."""
    found = values.get("avg_performance", values.get("detailed_performance"))
    tables = found if isinstance(found, list) else [found]
    rows = [
        (str(node["name"]), float(node["real_time"]) / 1000)
        for table in tables
        for node in table["nodes"]
        if str(node["status"]).endswith("EXECUTED")
    ]
    return Profile("OpenVINO", _summed(rows, len(tables)))


def _summed(rows: Iterable[tuple[str, float]], runs: int = 1) -> tuple[Entry, ...]:
    """Entries of one run, from those of several."""
    total: dict[str, float] = defaultdict(float)
    for name, seconds in rows:
        total[name] += seconds / runs
    return tuple(Entry(name, seconds) for name, seconds in total.items())


def _onnxruntime(events: Sequence[Mapping[str, Any]]) -> Profile:
    """Events in microseconds; those of one run lie inside one `model_run`, of which the first is a warm-up."""
    runs = sorted((event["ts"], event["ts"] + event["dur"]) for event in events if event["name"] == "model_run")
    nodes = [event for event in events if event.get("cat") == "Node" and event["name"].endswith(KERNEL)]
    if any(str(event["args"].get("provider", "")).startswith(ASYNCHRONOUS) for event in nodes):
        return _of_kernels(nodes, [event for event in events if event.get("cat") == "Kernel"], len(runs))
    starts = np.array([start for start, _ in runs] or [0])
    taken: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    told: dict[str, Mapping[str, Any]] = {}
    for event in nodes:
        run = int(np.searchsorted(starts, event["ts"], side="right")) - 1
        name = event["name"].removesuffix(KERNEL)
        if run > 0 or len(starts) == 1:
            taken[name][run] += event["dur"] * 1e-6
            told.setdefault(name, event["args"])
    return Profile("ONNX Runtime", tuple(_entry(name, _usual(own.values()), told[name]) for name, own in taken.items()))


def _of_kernels(nodes: Sequence[Mapping[str, Any]], kernels: Sequence[Mapping[str, Any]], runs: int) -> Profile:
    """What the device did for each node, where the profiler saw it."""
    if not kernels:
        raise UsageError(
            "its nodes ran on a device that the host does not wait for, and no event says how long that took. Profile "
            "with a build of ONNX Runtime that profiles the device, or with trtexec."
        )
    told = {event["name"]: event["args"] for event in nodes}
    total: dict[str, float] = defaultdict(float)
    for event in kernels:
        parent = str(event["args"].get("parent_name", event["name"]))
        total[parent] += event["dur"] * 1e-6 / max(1, runs)
    for event in nodes:
        if not str(event["args"].get("provider", "")).startswith(ASYNCHRONOUS):
            total[event["name"]] += event["dur"] * 1e-6 / max(1, runs)
    entries = (_entry(name.removesuffix(KERNEL), taken, told.get(name, {})) for name, taken in total.items())
    return Profile("ONNX Runtime", tuple(entries))


def _entry(name: str, seconds: float, told: Mapping[str, Any]) -> Entry:
    shapes = (tuple(map(int, size)) for known in told.get("input_type_shape", ()) for size in known.values())
    return Entry(name, seconds, str(told.get("op_name", "")), frozenset(shapes))


def _usual(taken: Iterable[float]) -> float:
    """The mean of the faster half: others only ever make a run slower, and a time is a whole number of microseconds."""
    ordered = sorted(taken)
    return float(np.mean(ordered[: (len(ordered) + 1) // 2]))


# ---- matching -----------------------------------------------------------------------------------------------------


def match(profile: Profile, model: Model, weight_of: Callable[[Node], float]) -> Matched:
    """Give the seconds of a profile to the nodes of the model that it was taken of.

    Args:
        profile: the seconds.
        model: whose nodes they are of.
        weight_of: the share of an entry that a node takes beside others, its multiply-accumulates; 0 where unknown.
    """
    names = _Names(model)
    found = {entry.name: names.nodes_of(entry.name) for entry in profile.entries}
    named = {node.index for nodes in found.values() for node in nodes}
    seconds: dict[str, float] = defaultdict(float)
    other = []
    for entry in profile.entries:
        nodes = found[entry.name]
        if entry.multiplies and nodes and not any(node.op in WEIGHTS for node in nodes):
            nodes = names.factors(nodes[-1], named, entry) or nodes
        if not nodes:
            other.append((entry.name, entry.seconds))
        for node, share in _shares(nodes, weight_of):
            seconds[node.name] += share * entry.seconds
    return Matched(dict(seconds), tuple(sorted(other, key=lambda own: -own[1])))


def _shares(nodes: Sequence[Node], weight_of: Callable[[Node], float]) -> Iterator[tuple[Node, float]]:
    """The nodes of an entry, with their shares of it: by what they weigh, else by their number."""
    heavy = [node for node in nodes if node.op in WEIGHTS] or list(nodes)
    weights = [weight_of(node) for node in heavy]
    total = sum(weights)
    for node, weight in zip(heavy, weights, strict=True):
        yield node, weight / total if total > 0 else 1 / len(heavy)


@dataclass(frozen=True)
class _Names:
    """The nodes of a model by what tools call them."""

    model: Model

    @cached_property
    def _nodes(self) -> Mapping[str, Node]:
        """By name, where only one node has it, and by output."""
        by_name: dict[str, list[Node]] = defaultdict(list)
        for node in self.model.nodes:
            by_name[node.name].append(node)
        return {**self.model.producer, **{name: own[0] for name, own in by_name.items() if len(own) == 1}}

    def nodes_of(self, name: str) -> tuple[Node, ...]:
        """The nodes that an entry names: one, or those that the tool joined; nothing for what it made itself."""
        single = self._node(name)
        if single is not None:
            return (single,)
        if name.startswith(("Reformatting", "Reorder")) or "ForeignNode" in name:
            return ()
        parts = re.split(r" \+ | \|\| |, ", name)
        if len(parts) == 1 and not name.startswith("PWN("):
            return ()
        found = (self._node(part.replace("PWN(", "").strip("() ")) for part in parts)
        return tuple({node.index: node for node in found if node is not None}.values())

    def _node(self, name: str) -> Node | None:
        """The node of this name or output, or of what is left without what tools add."""
        seen = name
        while seen:
            for known in (seen, seen.removesuffix(FROM_NORM)):
                if known in self._nodes:
                    return self._nodes[known]
            shorter = SUFFIX.sub("", PREFIX.sub("", seen))
            # A part is put behind the name: /conv/Conv/WithoutBiases, /fc/MatMul/MatMulAddFusion.
            seen = shorter if shorter != seen else seen.rpartition("/")[0]
        return None

    def factors(self, node: Node, named: set[int], entry: Entry) -> tuple[Node, ...]:
        """The node that multiplies, of an entry that is named by the last node that was fused with it.

        Args:
            node: the last one.
            named: nodes that have an entry of their own, and so are no part of this one.
            entry: tells the shapes of the weight, where several nodes come into question.
        """
        nodes, seen = [node], {node.index}
        found: list[Node] = []
        while nodes:
            for name in nodes.pop().inputs:
                source = self.model.producer.get(name)
                if source is None or source.index in seen or source.index in named:
                    continue
                seen.add(source.index)
                (found if source.op in WEIGHTS else nodes).append(source)
        if len(found) > 1:
            found = [own for own in found if np.shape(self.model.stored.get(own.input(1), 0)) in entry.shapes]
        return tuple(found) if len(found) == 1 else ()

"""Run a model in stages over many batches, each node once, with weights that change on the way.

Between stages only the *frontier* is kept: the tensors that are computed and still wanted. It lives in memory up to a
limit and in files beyond it, so that a pass over all layers costs about one run of the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray

from lindep_onnx.data.samples import Batch
from lindep_onnx.files import Scratch
from lindep_onnx.model.ir import Model
from lindep_onnx.model.node import Node
from lindep_onnx.model.shapes import ShapeInfo
from lindep_onnx.runtime.backend import Runtime

Array: TypeAlias = NDArray[Any]

#: Bytes of frontier that stay in memory.
MEMORY_LIMIT = 1 << 29


class Stages:
    """A model on its way through some batches.

    Args:
        model: the model.
        shape_info: its constants.
        batches: what to feed; read once.
        runtime: what models run on.
        memory: bytes of frontier that stay in memory.
    """

    def __init__(
        self,
        model: Model,
        shape_info: ShapeInfo,
        batches: Iterable[Batch],
        runtime: Runtime,
        *,
        memory: int = MEMORY_LIMIT,
    ) -> None:
        self._model = model
        self._constants, self._shape_info = shape_info.constants, shape_info
        self._protos = {name: proto for proto in model.proto.graph.node for name in proto.output if name}
        self._position = 0
        self._weights: dict[str, Array] = {}
        self._operands: dict[tuple[int, int], Array] = {}
        self._last = self._last_uses()
        self._folder = Scratch()
        self._memory = memory
        self.sizes: list[tuple[int, int]] = []
        self._frontier: list[_Store] = []
        for batch in batches:
            store = _Store(Path(self._folder.name) / str(len(self.sizes)))
            store.replace({name: value for name, value in batch.feeds.items() if name in self._last}, memory)
            self._frontier.append(store)
            self.sizes.append((len(batch.samples), batch.size))
        largest = max((size for _, size in self.sizes), default=1)
        self._shares = runtime.shares(shape_info.activation_bytes * largest)

    def __enter__(self) -> Stages:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def set_weight(self, name: str, value: Array) -> None:
        """Use another value of a constant from here on."""
        self._weights[name] = value

    def set_operand(self, node: Node, position: int, value: Array) -> None:
        """Let one input of a node read a constant of its own from here on."""
        self._operands[node.index, position] = value

    def tensor(self, batch: int, name: str) -> Array | None:
        """A tensor of the frontier, filler left out; None if it is not in the frontier."""
        value = self._frontier[batch].read(name)
        counted, size = self.sizes[batch]
        axis = self._shape_info.sample_axis(name) or 0
        if value is None or not value.ndim or value.shape[axis] % size or counted == size:
            return value
        return value[(slice(None),) * axis + (slice(value.shape[axis] * counted // size),)]

    def sample_axis(self, name: str) -> int | None:
        """The axis of a tensor that counts samples; None where that is not known."""
        return self._shape_info.sample_axis(name)

    def run_to(self, index: int) -> None:
        """Run every node before the one with this index.

        Raises:
            ModelError: ONNX Runtime cannot run a part of the model.
        """
        ahead = self._model.nodes[self._position : index]
        nodes = [node for node in ahead if not all(name in self._constants for name in node.outputs if name)]
        self._position = max(self._position, index)
        made = {name for node in nodes for name in node.outputs if name}
        wanted = sorted(name for name in made if self._last.get(name, -1) >= self._position)
        if not nodes:
            return
        inputs = sorted({name for node in nodes for name in (*node.inputs, *node.captures) if name} - made)
        fed = [name for name in inputs if name not in self._constants]
        if not self._frontier:
            return
        limit = self._memory // len(self._frontier)
        segment = self._segment(nodes, inputs, wanted, self._frontier[0].all()) if wanted else None
        session = None if segment is None else self._shares.each.open(segment)

        def advance(store: _Store) -> None:
            held = store.all()
            values = session.run(wanted, {name: held[name] for name in fed}) if session is not None else []
            held = {name: value for name, value in held.items() if self._last.get(name, -1) >= self._position}
            held.update(zip(wanted, values, strict=True))
            store.replace(held, limit)

        with self._shares.pool() as pool:
            list(pool.map(advance, self._frontier))

    def _last_uses(self) -> dict[str, int]:
        """Index of the last node that reads each computed tensor."""
        return {
            name: node.index
            for node in self._model.nodes
            for name in (*node.inputs, *node.captures)
            if name and name not in self._constants
        }

    def _segment(
        self, nodes: Sequence[Node], inputs: Sequence[str], wanted: Sequence[str], held: Mapping[str, Array]
    ) -> onnx.ModelProto:
        source = self._model.proto
        graph = onnx.GraphProto(name="segment")
        for node in nodes:
            proto = graph.node.add()
            proto.CopyFrom(self._protos[next(filter(None, node.outputs))])
            for position in range(max(len(node.inputs), 8)):
                own = self._operands.get((node.index, position))
                if own is not None:
                    name = f"lindep_onnx_operand_{node.index}_{position}"
                    graph.initializer.append(onnx.numpy_helper.from_array(own, name))
                    proto.input.extend([""] * (position + 1 - len(proto.input)))
                    proto.input[position] = name
        for name in inputs:
            if name in self._constants:
                value = self._weights.get(name, self._constants[name])
                graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value), name))
            else:
                dtype, rank = onnx.helper.np_dtype_to_tensor_dtype(held[name].dtype), held[name].ndim
                graph.input.append(onnx.helper.make_tensor_value_info(name, dtype, [None] * rank))
        graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
        model = onnx.ModelProto(ir_version=max(4, source.ir_version), graph=graph)
        model.opset_import.extend(source.opset_import)
        model.functions.extend(source.functions)
        return model


class _Store:
    """Tensors of one batch, in memory or in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._held: Mapping[str, Array] | None = {}
        self._entries: dict[str, tuple[np.dtype[Any], tuple[int, ...], int]] = {}

    def replace(self, tensors: Mapping[str, Array], limit: int) -> None:
        if sum(value.nbytes for value in tensors.values()) <= limit or any(v.dtype.hasobject for v in tensors.values()):
            self._held = dict(tensors)
            return
        self._held, self._entries = None, {}
        with self._path.open("wb") as file:
            for name, value in tensors.items():
                self._entries[name] = (value.dtype, value.shape, file.tell())
                file.write(np.ascontiguousarray(value).data)

    def read(self, name: str) -> Array | None:
        if self._held is not None:
            return self._held.get(name)
        if name not in self._entries:
            return None
        dtype, shape, offset = self._entries[name]
        return np.fromfile(self._path, dtype, math.prod(shape), offset=offset).reshape(shape)

    def all(self) -> dict[str, Array]:
        names = self._entries if self._held is None else self._held
        return {name: value for name in names if (value := self.read(name)) is not None}

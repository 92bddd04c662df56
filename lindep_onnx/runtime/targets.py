"""Widths that run fast: multiples that the channels of a layer should keep to, by target, layer and precision.

ONNX Runtime lays the channels of 2-D convolutions out in blocks, 16 with AVX-512 and 8 with AVX2. A width that is no
multiple of 4 leaves these kernels, at up to twice the time; among the others time is a staircase of whole blocks. A
grouped convolution stays in them only if every group is whole blocks. Products of matrices, and convolutions of one or
three dimensions, which are made of them, have no such steps. `docs/latency.md` has the figures, which
`tools/benchmarks/bench_widths.py` prints; those of `arm`, `cuda` and `generic` are what makers of kernels advise.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np

from lindep_onnx.model.node import Node
from lindep_onnx.model.weighted import weighted

#: Kinds of layers that have rules of their own; all others, products of matrices first of all, have no steps.
Kind: TypeAlias = Literal["conv", "depthwise", "grouped", "other"]
Precision: TypeAlias = Literal["float", "int8"]


@dataclass(frozen=True)
class Steps:
    """What the width of a layer should be a multiple of.

    Attributes:
        fast: so that it stays in the fast kernels.
        block: so that nothing is kept which costs no time.
    """

    fast: int
    block: int


NO_STEPS = Steps(1, 1)
#: By target and precision, the steps of each kind of layer; those that are not listed are free.
TABLE: Mapping[str, Mapping[Precision, Mapping[Kind, Steps]]] = {
    "cpu-avx512": {
        "float": {"conv": Steps(4, 16), "depthwise": Steps(4, 16), "grouped": Steps(16, 16)},
        "int8": {"conv": Steps(4, 4), "depthwise": Steps(16, 16), "grouped": Steps(4, 4)},
    },
    "cpu-avx2": {
        "float": {"conv": Steps(4, 8), "depthwise": Steps(4, 8), "grouped": Steps(8, 8)},
        "int8": {"conv": Steps(8, 8), "depthwise": Steps(16, 16)},
    },
    "arm": {
        "float": {"conv": Steps(4, 16), "depthwise": Steps(4, 16), "grouped": Steps(4, 4)},
        "int8": {"conv": Steps(8, 16), "depthwise": Steps(16, 16), "grouped": Steps(8, 8)},
    },
    "cuda": {
        "float": dict.fromkeys(("conv", "depthwise", "grouped", "other"), Steps(8, 32)),
        "int8": dict.fromkeys(("conv", "depthwise", "grouped", "other"), Steps(16, 32)),
    },
    "generic": {
        "float": dict.fromkeys(("conv", "depthwise", "grouped", "other"), Steps(8, 8)),
        "int8": dict.fromkeys(("conv", "depthwise", "grouped", "other"), Steps(16, 16)),
    },
}
#: Features of NumPy's own dispatch that tell of AVX-512; its versions name them differently.
AVX512 = frozenset({"AVX512F", "AVX512_SKX", "X86_V4"})


@dataclass(frozen=True)
class WidthRule:
    """Which multiples the widths of layers keep to.

    Attributes:
        target: key of `TABLE`.
        precision: that the model will run in.
        blocks: whether widths are whole blocks, so that no channel is kept that costs no time.
        least: every width that has steps keeps to at least this multiple.
        fixed: the multiple of all widths, whatever the target; None for the table.
    """

    target: str
    precision: Precision = "float"
    blocks: bool = False
    least: int = 1
    fixed: int | None = None

    def steps(self, node: Node, weight: tuple[int, ...]) -> Steps:
        """What the widths of a layer, or of each group of it, should be multiples of: `block`.

        A width that is no multiple of `fast` may lose single channels down to the next multiple: it gains nothing from
        keeping them. With whole blocks it gains nothing from losing them either.

        Args:
            node: the layer.
            weight: shape of its weight.
        """
        if self.fixed is not None:
            return Steps(1, self.fixed)
        own = TABLE[self.target][self.precision].get(kind_of(node, weight), NO_STEPS)
        if own == NO_STEPS:
            return own
        return Steps(1, max(own.block, self.least)) if self.blocks else Steps(own.fast, max(own.fast, self.least))

    @property
    def words(self) -> str:
        """The rule as people read it."""
        if self.fixed is not None:
            return "any width" if self.fixed == 1 else f"multiples of {self.fixed}"
        own = TABLE[self.target][self.precision]
        parts = []
        for kind, steps in own.items():
            multiple = max(steps.block if self.blocks else steps.fast, self.least)
            parts.append(f"{multiple} ({kind})")
        return f"{self.target}: multiples of {', '.join(parts)}"

    def widened(self, least: int) -> WidthRule:
        """The same with wider steps."""
        return replace(self, least=least)


#: No width has to be a multiple of anything.
FREE = WidthRule("generic", fixed=1)


def kind_of(node: Node, weight: tuple[int, ...]) -> Kind:
    """Which rules hold for a layer."""
    layout = weighted(node)
    if node.op != "Conv" or layout is None or len(weight) != 4:
        return "other"
    if layout.depthwise(weight):
        return "depthwise"
    return "grouped" if layout.group > 1 else "conv"


def resolved(target: str, providers: Iterable[str]) -> str:
    """The target that a name stands for: `cpu` is what this machine has, or its GPU where models run on one."""
    if target != "cpu":
        return target
    if any(name.startswith(("CUDA", "Tensorrt", "NvTensorRTRTX")) for name in providers):
        return "cuda"
    found = np.show_config(mode="dicts")["SIMD Extensions"]
    here = {*found.get("baseline", ()), *found.get("found", ())}
    if any(name.startswith(("NEON", "ASIMD", "SVE")) for name in here):
        return "arm"
    return "cpu-avx512" if here & AVX512 else "cpu-avx2"

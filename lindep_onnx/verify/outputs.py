"""What outputs hold, as far as the graph tells: class scores, embeddings, decisions.

The arg-max of an embedding means nothing, and neither does an agreement of it: two embeddings are compared by their
direction. The rule follows an output back through operators that only move, scale or shift its values. If it then meets

- a normalization (LpNormalization, LayerNormalization and its kin, BatchNormalization, x / norm of x),
- or a pooling (of windows, or a mean, maximum or sum over axes),

the output is an embedding. Anything else (a Gemm, a Conv, a Softmax, a product of two embeddings) may give class
scores. A classifier that ends in its pooling, as SqueezeNet without its Softmax does, counts as an embedding:
`agreement_output` says that its output holds class scores all the same, and so does asking for an agreement. What
follows an ArgMax in this way is a decision: a class number.
"""

from __future__ import annotations

from lindep_onnx.model.ir import Model
from lindep_onnx.model.node import Node

#: Operators that only move what they read, by their first input.
MOVES = frozenset(
    ("Identity", "Cast", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Dropout", "Gather", "Slice",
     "Expand")
)  # fmt: skip
NORMALIZATIONS = frozenset(
    ("LpNormalization", "LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "GroupNormalization",
     "InstanceNormalization", "BatchNormalization", "MeanVarianceNormalization", "com.microsoft::GroupNorm",
     "com.microsoft::SkipLayerNormalization", "com.microsoft::SkipSimplifiedLayerNormalization")
)  # fmt: skip
POOLINGS = frozenset(
    ("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool", "AveragePool", "MaxPool", "LpPool", "ReduceMean",
     "ReduceMax", "ReduceSum", "ReduceL2")
)  # fmt: skip
#: Operators between a sum of squares and what is divided by it, or multiplied.
OF_A_SUM = frozenset(("Clip", "Max", "Add", "Expand", "Cast", "Identity", "Unsqueeze", "Reshape", "Div", "Reciprocal"))
ROOTS, SUMS = frozenset(("Sqrt", "Pow")), frozenset(("ReduceSum", "ReduceMean", "ReduceSumSquare"))
#: Sums and roots in one.
NORMS = frozenset(("ReduceL1", "ReduceL2"))


def held(model: Model) -> dict[str, str]:
    """By the name of an output "embedding" or "decisions", by the rule of this module; the others are left out.

    Args:
        model: the original.
    """
    found = {name: _holds(model, name) for name in model.outputs}
    return {name: what for name, what in found.items() if what}


def _holds(model: Model, name: str) -> str:
    while (node := model.producer.get(name)) is not None:
        if node.op == "ArgMax":
            return "decisions"
        if node.op in NORMALIZATIONS or node.op in POOLINGS:
            return "embedding"
        if node.op in ("Mul", "Div") and any(_is_norm(model, other) for other in node.inputs):
            return "embedding"
        following = _moved(model, node)
        if following is None:
            return ""
        name = following
    return ""


def _moved(model: Model, node: Node) -> str | None:
    """The tensor that a node passes on, moved, scaled or shifted by a constant; None if it does anything else."""
    if node.op in MOVES:
        return node.input(0)
    if node.op in ("Mul", "Div", "Add", "Sub"):
        computed = [name for name in node.inputs if name not in model.stored]
        if len(computed) == 1:
            return computed[0]
        if node.op == "Div" and _counts(model, node.input(1)):
            return node.input(0)
    return None


def _counts(model: Model, name: str) -> bool:
    """Whether a divisor is a sum, such as that of the mask of a mean over tokens."""
    reached, _ = _behind(model, name)
    # A Softmax in single operators divides by a sum as well, but by one of exponentials.
    summed = None if reached is None else model.producer.get(reached.input(0))
    return reached is not None and reached.op == "ReduceSum" and (summed is None or summed.op != "Exp")


def _is_norm(model: Model, name: str) -> bool:
    """Whether a factor or divisor is the root of a sum, or one by it."""
    reached, rooted = _behind(model, name)
    return reached is not None and (reached.op in NORMS or (rooted and reached.op in SUMS))


def _behind(model: Model, name: str) -> tuple[Node | None, bool]:
    """The first node that is no part of how a sum becomes a factor or divisor, and whether there was a root."""
    rooted = False
    while (node := model.producer.get(name)) is not None and node.op in OF_A_SUM | ROOTS:
        rooted |= node.op in ROOTS
        name = next((one for one in node.inputs if one and one not in model.stored), "")
    return model.producer.get(name), rooted

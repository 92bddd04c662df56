"""Which axis of each input counts samples: the first one, unless the names that the file gives axes say otherwise.

An axis that the inputs share by name, once in each, is the batch, wherever it lies (`state[2,N,8]` beside `x[N,8]`). An
input without it is fed as it is where its names are those of other axes (`mask[S,S]` beside `x[N,S,8]`). Where the
names of the axes that lead are different ones and each is met again (`nodes[num_nodes,6]`, `edges[2,num_edges]`), there
is no batch: what is fed is one sample as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeAlias

import onnx

#: Names by axis; empty for an axis without one, None for a rank that is not declared.
Names: TypeAlias = "tuple[str, ...] | None"

#: What the axis of samples, and what other axes, are called.
_BATCH = re.compile(r"n|b|bs|bsz|nb|.*batch.*|.*samples?", re.IGNORECASE)
_OTHER = re.compile(r"t|s|l|h|w|c|d|.*(seq|time|frame|length|len|height|width|steps?|channel).*", re.IGNORECASE)
#: An axis that scores less is not taken for the batch.
ENOUGH = 2


def batch_axes(
    graph: onnx.GraphProto, inputs: tuple[str, ...], told: Mapping[str, int | None]
) -> dict[str, int | None]:
    """The sample axis of each input; None where it has none.

    Args:
        graph: declares inputs and outputs.
        inputs: names of those that have to be fed.
        told: axes that the user names; None for none.
    """
    declared = {value.name: _names(value) for value in graph.input if value.name in inputs}
    batch = _batch_name(declared, [_names(value) for value in graph.output])
    beside = {name for names in declared.values() if names and batch in names for name in names if name}
    found: dict[str, int | None] = {}
    for name, names in declared.items():
        others = {other for own in declared if own != name for other in declared[own] or ()}
        if names == ():
            found[name] = None
        elif not names or not batch:
            found[name] = 0
        elif batch in names:
            found[name] = names.index(batch)
        else:
            own = {axis for axis in names if axis}
            if own & others and not own <= beside:  # its axes belong to other inputs, and none of them is the batch
                return {**dict.fromkeys(declared), **told}
            found[name] = None if own & beside else 0
    return {**found, **told}


def _names(value: onnx.ValueInfoProto) -> Names:
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return None
    # protobuf gives bytes for what is no text
    names = (dim.dim_param if isinstance(dim.dim_param, str) else "" for dim in tensor.shape.dim)
    return tuple(name if name.strip("?") else "" for name in names)


def _batch_name(inputs: Mapping[str, Names], outputs: list[Names]) -> str:
    """The name that is the batch's, if any is."""
    read, made = ([names for names in those if names] for those in (inputs.values(), outputs))
    scores: dict[str, int] = {}
    for name in (name for names in read for name in names if name):
        having = [names for names in read if name in names]
        written = [names for names in made if name in names]
        if name in scores or any(names.count(name) > 1 for names in having):
            continue
        scores[name] = (
            4 * bool(_BATCH.fullmatch(name))
            - 2 * bool(_OTHER.fullmatch(name))
            + 2 * all(names[0] == name for names in having)
            + (bool(written) and all(names[0] == name for names in written))
            + (len(having) == len(read))
        )
    best = max(scores, key=lambda name: scores[name], default="")
    return best if best and scores[best] >= ENOUGH else ""

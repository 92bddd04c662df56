"""All kinds of change, in the order in which they are carried out; a new one is a module and an entry here."""

from __future__ import annotations

from lindep_onnx.moves.base import Move
from lindep_onnx.moves.channels import ChannelRemoval
from lindep_onnx.structure.types import Structure

MOVES: tuple[Move, ...] = (ChannelRemoval(),)


def changeable(structure: Structure) -> bool:
    """Whether any kind of change has something to do in a model; where none has, no data will tell more."""
    return any(move.count(structure) for move in MOVES)

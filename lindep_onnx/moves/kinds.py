"""All kinds of change, in the order in which they are carried out; a new one is a module and an entry here."""

from __future__ import annotations

from lindep_onnx.moves.base import Move
from lindep_onnx.moves.channels import ChannelRemoval

MOVES: tuple[Move, ...] = (ChannelRemoval(),)

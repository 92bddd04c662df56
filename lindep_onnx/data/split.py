"""Which samples are used for what."""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from lindep_onnx.options import DataOptions

#: Fewer different samples than this cannot be split into three parts.
MIN_SAMPLES = 3


class Part(enum.Enum):
    """What a sample is used for."""

    FIT = "fit"
    SELECT = "select"
    VERIFY = "verify"


@dataclass(frozen=True)
class Split:
    """Samples by what they are used for.

    Attributes:
        parts: sample numbers of each part, ascending.
        notes: what the user should know about it.
        fingerprint: a digest of the samples, their split and their batches; empty where nobody asks for it.
        different: how many samples of each part are no copies of others; empty where that is not known.
    """

    parts: Mapping[Part, NDArray[np.int64]]
    notes: tuple[str, ...] = ()
    fingerprint: str = ""
    different: Mapping[Part, int] = field(default_factory=dict)

    @classmethod
    def given(cls, parts: Mapping[Part, NDArray[np.int64]]) -> Split:
        """Numbers that are known already; a part that is not named is empty."""
        return cls(MappingProxyType({part: parts.get(part, np.empty(0, dtype=np.int64)) for part in Part}))


def split(digests: Sequence[bytes], batch: int, options: DataOptions) -> Split:
    """Part of every sample by a seeded hash of its number; identical samples share the number of the first.

    Args:
        digests: of the content of every sample, in order.
        batch: samples in a full run.
        options: the seed, the share that is not fitted, half of which selects and half verifies, and how many are used.
    """
    first: dict[bytes, int] = {}
    number = np.array([first.setdefault(digest, index) for index, digest in enumerate(digests)])
    ranks = {index: _hash(options.seed, index) for index in first.values()}
    distinct = sorted(ranks, key=lambda index: (ranks[index], index))
    notes = []
    if len(distinct) < len(digests):
        copies = len(digests) - len(distinct)
        notes.append(f"{copies:,} of {len(digests):,} calibration samples are copies of others and share their part.")
    if options.max_samples is not None:
        # Not by the hash that decides the part: the lowest of it are all of one part.
        used = set(sorted(distinct, key=lambda index: _hash(options.seed, index, ":used"))[: options.max_samples])
        distinct = [index for index in distinct if index in used]
    if len(distinct) < MIN_SAMPLES:
        notes.append(
            f"{len(distinct)} different calibration sample(s) prove nothing about others: only what the weights "
            f"imply can go. Give at least {MIN_SAMPLES}, better some hundreds."
        )
        chosen = {Part.FIT: [], Part.SELECT: [], Part.VERIFY: distinct}
    else:
        chosen = _by_rank(distinct, ranks, options.holdout)
    parts = {part: np.array(sorted(members), dtype=np.int64) for part, members in chosen.items()}
    different = MappingProxyType({part: len(members) for part, members in parts.items()})
    if options.max_samples is None:
        # Copies weigh in where the original is: a data set that repeats a sample means to.
        parts = {part: np.flatnonzero(np.isin(number, members)) for part, members in parts.items()}
    return Split(MappingProxyType(parts), tuple(notes), _fingerprint(digests, parts, batch), different)


def _by_rank(distinct: Sequence[int], ranks: Mapping[int, float], holdout: float) -> dict[Part, list[int]]:
    """Three parts, none of which is empty."""
    chosen: dict[Part, list[int]] = {part: [] for part in Part}
    for index in distinct:
        part = Part.FIT if ranks[index] >= holdout else Part.SELECT if ranks[index] >= holdout / 2 else Part.VERIFY
        chosen[part].append(index)
    for part in reversed(Part):
        if not chosen[part]:
            largest = max(Part, key=lambda other: len(chosen[other]))
            chosen[part].append(chosen[largest].pop(0 if largest is Part.FIT else -1))
    return chosen


def _hash(seed: int, index: int, purpose: str = "") -> float:
    digest = hashlib.blake2b(f"{seed}:{index}{purpose}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big") / 2**56


def _fingerprint(digests: Sequence[bytes], parts: Mapping[Part, NDArray[np.int64]], batch: int) -> str:
    total = hashlib.blake2b(f"{batch}:".encode(), digest_size=16)
    for digest in digests:
        total.update(digest)
    for part in Part:
        total.update(f":{part.value}:".encode())
        total.update(parts[part].astype("<i8").tobytes())
    return total.hexdigest()

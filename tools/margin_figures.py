"""How far a silent channel must be from waking: what the constant of `calibration.inactive` costs and prevents.

Each model runs once over all of its samples. Then many times some of these are drawn at random, the rule decides from
them alone which channels behind activations will stay silent, and the others tell.

| column | meaning |
|---|---|
| samples | that the rule sees |
| silent | channels that were silent in all of them |
| trusted | of these, how many the rule lets go |
| woke | of these, how many were not silent in some other sample |
| touched | share of the other samples in which one of them was not: no more decisions can change |

All are means over the draws; one column for each value of the constant, 0 being no margin at all.

Usage: python tools/margin_figures.py MODELS DATA [--fashion FOLDER] [--only MODEL ...] [--draws 20]
MODELS and DATA are those of tools/real_figures.py; crepe_tiny hears tones made here; lenet_300_100 needs the folder of
the idx files of Fashion-MNIST.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import real_figures
from fashion_mnist import read_idx
from numpy.typing import NDArray

from lindep_onnx.calibration import inactive as silence
from lindep_onnx.calibration.measure import features
from lindep_onnx.data.inputs import InputSpec
from lindep_onnx.data.samples import Part, Samples, open_samples
from lindep_onnx.model import ir as graph
from lindep_onnx.model.shapes import resolve
from lindep_onnx.runtime.rows import RowSampler
from lindep_onnx.structure.trace import trace
from lindep_onnx.structure.types import Structure

__all__ = ["Drawn", "Observed", "draw", "observe"]

Floats: TypeAlias = NDArray[np.float32]

MODELS = (
    *("lenet_300_100", "crepe_tiny", "resnet20", "resnet56", "cifar10_keras_cnn", "mtcnn_onet", "mobilenetv2"),
    "efficientnet_lite0",
)
#: What is left for decisions of 38, 64, 128, 256, 512 and 1,000 samples, once a share only verifies.
SIZES = (32, 54, 108, 216, 432, 850)
CERTAINTIES = (0.0, 16.0, 24.0, 32.0, 48.0)
WHAT = ("trusted", "woke", "touched")
RATE, FRAME, TONES, MIN_UNSEEN = 16_000, 1024, 2000, 100


@dataclass(frozen=True)
class Observed:
    """One model and what every sample does behind its activations.

    Attributes:
        units: number of units.
        watched: where to look.
        samples: what was seen there, each array with one more axis in front, over the samples.
    """

    units: int
    watched: tuple[silence.WatchedTensor, ...]
    samples: tuple[silence.RangeStats, ...]

    def over(self, chosen: Sequence[int]) -> tuple[silence.RangeStats, ...]:
        """What was seen in some of the samples."""
        return tuple(_reduced(seen, np.asarray(chosen)) for seen in self.samples)


@dataclass(frozen=True)
class Drawn:
    """What came of one draw; see the module for the meaning of the fields."""

    inactive: int
    trusted: int
    woke: int
    touched: float


def observe(model: Path, images: Floats) -> Observed:
    """Run a model over all images, one by one.

    Args:
        model: has one input.
        images: samples first.
    """
    loaded = graph.load(model)
    channels = trace(loaded, resolve(loaded))
    everything = [np.ones(len(features(consumer.columns).atoms), dtype=bool) for consumer in channels.consumers]
    watched = silence.flats(channels, everything)
    watched = tuple(flat for flat in watched if flat.parts)
    name = loaded.proto.graph.input[0].name
    spec = InputSpec(name, np.dtype(np.float32), ("N", *images.shape[1:]))
    with open_samples({name: images}, [spec], seed=0, holdout=0.0, max_samples=None, batch_size=1) as samples:
        found = list(_each(channels, watched, samples)) if watched else []
    places = range(len(watched))
    return Observed(channels.units, watched, tuple(_stacked([sample[place] for sample in found]) for place in places))


def _each(
    structure: Structure, watched: Sequence[silence.WatchedTensor], samples: Samples
) -> Iterator[tuple[silence.RangeStats, ...]]:
    """What is seen in each sample alone."""
    whole = silence.RangeProbe(structure, watched)
    sampler = RowSampler(
        structure.model, structure.shape_info, {}, probe=whole, providers=("CPUExecutionProvider",), threads=0
    )
    for batch in samples.batches(Part.FIT, Part.SELECT):
        alone = silence.RangeProbe(structure, watched)
        alone.update(sampler.run(batch, np.random.default_rng(0))[1], batch)
        ranges = alone.ranges()
        yield tuple(ranges[silence.key(flat)][1] for flat in watched)


def _stacked(samples: Sequence[silence.RangeStats]) -> silence.RangeStats:
    def stack(what: str, of: Sequence[object]) -> NDArray[Any]:
        return np.stack([getattr(one, what) for one in of])

    quiet = []
    for part in zip(*(seen.quiet for seen in samples), strict=True):
        arrays = {what: stack(what, part) for what in ("count", "sum", "square", "least", "most")}
        quiet.append(silence.MarginStats(**arrays, end=part[0].end))
    arrays = {what: stack(what, samples) for what in ("low", "high", "sum", "square")}
    return silence.RangeStats(**arrays, rows=samples[0].rows, samples=1, quiet=tuple(quiet))


def _reduced(seen: silence.RangeStats, chosen: NDArray[np.int64]) -> silence.RangeStats:
    quiet = [
        silence.MarginStats(
            part.count[chosen].sum(axis=0),
            part.sum[chosen].sum(axis=0),
            part.square[chosen].sum(axis=0),
            part.minimums[chosen].min(axis=0),
            part.most[chosen].max(axis=0),
            part.end,
        )
        for part in seen.quiet
    ]
    return silence.RangeStats(
        low=seen.low[chosen].min(axis=0),
        high=seen.high[chosen].max(axis=0),
        sum=seen.sum[chosen].sum(axis=0),
        square=seen.square[chosen].sum(axis=0),
        rows=seen.rows * len(chosen),
        samples=len(chosen),
        quiet=tuple(quiet),
    )


def draw(model: Observed, chosen: Sequence[int], others: Sequence[int], certainties: Sequence[float]) -> list[Drawn]:
    """Let the rule see some samples, and judge it by others.

    Args:
        model: what `observe` gave.
        chosen: samples that the rule sees.
        others: samples that it does not.
        certainties: the constants to try.
    """
    known = model.over(chosen)
    found = []
    for certainty in certainties:
        uncertain = silence.unexplained(model.units, model.watched, known, len(chosen), certainty)
        inactive = trusted = woke = 0
        touched = np.zeros(len(others), dtype=bool)
        for flat, seen, all_seen in zip(model.watched, known, model.samples, strict=True):
            for now, ever in zip(seen.quiet, all_seen.quiet, strict=True):
                quiet = now.count[flat.inactive] == len(chosen)
                goes = quiet & ~uncertain[flat.units]
                awake = ever.count[np.ix_(others, flat.inactive[goes])] == 0
                inactive, trusted, woke = inactive + quiet.sum(), trusted + goes.sum(), woke + awake.any(axis=0).sum()
                touched |= awake.any(axis=1)
        found.append(Drawn(int(inactive), int(trusted), int(woke), float(touched.mean())))
    return found


def _rows(model: Observed, count: int, draws: int) -> Iterator[str]:
    rng = np.random.default_rng(0)
    for size in (size for size in SIZES if size + MIN_UNSEEN <= count):
        orders = [rng.permutation(count).tolist() for _ in range(draws)]
        tried = [draw(model, order[:size], order[size:], CERTAINTIES) for order in orders]
        cells = [f"{size}", f"{np.mean([found[0].silent for found in tried]):.1f}"]
        for found in zip(*tried, strict=True):
            trusted, woke, touched = (np.mean([getattr(one, what) for one in found]) for what in WHAT)
            cells.append(f"{trusted:.1f}, {woke:.2f}, {touched:.2%}")
        yield f"| {' | '.join(cells)} |"


def _images(name: str, data: Path, fashion: Path | None) -> Floats | None:
    if name == "crepe_tiny":
        return _tones(TONES)
    if name == "lenet_300_100":
        if fashion is None:
            return None
        pixels = read_idx(fashion / "train-images-idx3-ubyte.gz")[:TONES].reshape(-1, 28 * 28)
        return ((pixels / 255.0 - 0.5) / 0.5).astype(np.float32)
    numbers = range(real_figures.images(name, data))
    return np.stack(list(real_figures.prepared(name, data, numbers)))


def _tones(count: int) -> Floats:
    """(count, FRAME) harmonic tones of random pitch in noise of random size, standardised."""
    rng = np.random.default_rng(0)
    time = np.arange(FRAME) / RATE
    sounds = []
    for pitch in np.exp(rng.uniform(np.log(60), np.log(1500), count)):
        partials = np.arange(1, 6)[:, None]
        sizes, phases = rng.random((5, 1)), rng.uniform(0, 2 * np.pi, (5, 1))
        tone = (sizes * np.sin(2 * np.pi * pitch * partials * time + phases)).sum(axis=0)
        tone += 10 ** rng.uniform(-3, -0.5) * rng.normal(size=FRAME)
        sounds.append((tone - tone.mean()) / tone.std())
    return np.array(sounds, dtype=np.float32)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, metavar="MODELS")
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("--fashion", type=Path, metavar="FOLDER", help="of the idx files of Fashion-MNIST")
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL")
    parser.add_argument("--draws", type=int, default=20, help="for each number of samples (default 20)")
    given = parser.parse_args(arguments)
    logging.disable(logging.WARNING)
    for name in given.only:
        images = _images(name, given.data, given.fashion)
        if images is None:
            continue
        model = observe(given.models / f"{name}.onnx", images)
        print(f"\n## {name}: trusted, woke, touched\n", flush=True)
        if not model.samples:
            print("No activation of this model is flat anywhere.", flush=True)
            continue
        titles = ("samples", "silent", *(f"{certainty:g}" for certainty in CERTAINTIES))
        print(f"| {' | '.join(titles)} |", "|---" * len(titles) + "|", sep="\n", flush=True)
        for row in _rows(model, len(model.samples[0].low), given.draws):
            print(row, flush=True)


if __name__ == "__main__":
    main()

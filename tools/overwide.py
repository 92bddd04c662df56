"""How much of an over-wide net goes while its accuracy stays: the largest reduction within a given drop, no training.

The model is that of `tools/train_vgg.py`. It is calibrated with training images, the accuracy on the training images
that it was not trained on decides how far to go, and the test images are opened once, for the figures that are printed.

Usage: python tools/overwide.py MODEL.onnx DATA_DIR --max-drop 0.003
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from accuracy import normalised, predictions
from fashion_mnist import read_idx
from onnxruntime import InferenceSession
from train_vgg import TRAINED_ON

from lindep_onnx.api import compress

__all__ = ["main"]

BATCH = 500


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, metavar="MODEL.onnx")
    parser.add_argument("data_dir", type=Path, metavar="DATA_DIR", help="the four idx .gz files of Fashion-MNIST")
    parser.add_argument("--samples", type=int, default=4000, metavar="N", help="calibrate with N images (default 4000)")
    parser.add_argument("--max-drop", type=float, default=0.003, help="of accuracy on unseen training images")
    parser.add_argument("--out", type=Path, default=Path("overwide_small.onnx"), metavar="OUT.onnx")
    options = parser.parse_args(arguments)
    images = read_idx(options.data_dir / "train-images-idx3-ubyte.gz")
    labels = read_idx(options.data_dir / "train-labels-idx1-ubyte.gz")
    unseen, answers = normalised(images[TRAINED_ON:]), labels[TRAINED_ON:]
    name = onnx.load(options.model).graph.input[0].name

    def accuracy(session: InferenceSession) -> float:
        starts = range(0, len(unseen), BATCH)
        scores = np.concatenate([session.run(None, {name: unseen[at : at + BATCH]})[0] for at in starts])
        return float(np.mean(scores.argmax(axis=1) == answers))

    start = time.perf_counter()
    calib = normalised(images[:TRAINED_ON][:: TRAINED_ON // options.samples][: options.samples])
    result = compress(options.model, {name: calib}, eval=accuracy, max_drop=options.max_drop, seed=0)
    seconds = time.perf_counter() - start
    onnx.save(result.model, options.out)
    test = read_idx(options.data_dir / "t10k-images-idx3-ubyte.gz")
    truth = read_idx(options.data_dir / "t10k-labels-idx1-ubyte.gz")
    reached = [float(np.mean(predictions(path, test) == truth)) for path in (options.model, options.out)]
    before, after = result.report.before, result.report.after
    print("| | original | result | left |", "|---|---|---|---|", sep="\n")
    for what in ("parameters", "macs", "channels", "bytes"):
        counts = getattr(before, what), getattr(after, what)
        print(f"| {what} | {counts[0]} | {counts[1]} | {counts[1] / counts[0]:.2%} |")
    old, new = before.latency_ms or np.nan, after.latency_ms or np.nan
    print(f"| latency, ms | {old:.2f} | {new:.2f} | {new / old:.0%} |")
    print(f"| test accuracy | {reached[0]:.2%} | {reached[1]:.2%} | {reached[1] - reached[0]:+.2%} |")
    print(f"\n{seconds:.0f} s; {'; '.join(result.report.notes) or 'no notes'}")


if __name__ == "__main__":
    main()

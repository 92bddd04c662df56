"""Top-1 accuracy of ONNX classifiers on labelled uint8 images, and how often further models agree with the first.

DATA.npz holds `images` (uint8, [count, height, width]) and `labels` (integer, [count]). Every image is turned into
the input that the demonstration model was trained on, float32 [N, 1, height, width]: `(pixel / 255 - MEAN) / STD`.

Usage: python tools/accuracy.py MODEL.onnx DATA.npz [MODEL2.onnx ...]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

__all__ = ["MEAN", "STD", "main", "normalised", "predictions"]

#: Mean and standard deviation of the Fashion-MNIST training pixels on the scale 0 to 1.
MEAN, STD = 0.2860, 0.3530


def normalised(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The model input for grey images.

    Args:
        images: [count, height, width], 0 to 255.

    Returns:
        float32 [count, 1, height, width], normalised with the statistics of the training set.
    """
    return ((images[:, None] / 255.0 - MEAN) / STD).astype(np.float32)


def predictions(model: Path, images: NDArray[np.uint8], *, batch: int = 500) -> NDArray[np.int64]:
    """The class with the highest score of each image.

    Args:
        model: a classifier with one input [N, 1, height, width] and the scores [N, classes] as its first output.
        images: [count, height, width], 0 to 255.
        batch: images per run.

    Returns:
        int64 [count].
    """
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    starts = range(0, len(images), batch)
    scores = [session.run(None, {name: normalised(images[start : start + batch])})[0] for start in starts]
    classes: NDArray[np.int64] = np.concatenate(scores).argmax(axis=1)
    return classes


def _labelled(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.integer]]:
    """The images and labels of an npz; exits with a one-line message when they do not fit."""
    with np.load(path) as data:
        if missing := {"images", "labels"} - set(data.files):
            sys.exit(f"{path}: expected the arrays 'images' and 'labels', but {sorted(missing)} is missing.")
        images, labels = data["images"], data["labels"]
    if images.dtype != np.uint8 or images.ndim != 3 or labels.shape != (len(images),):
        sys.exit(
            f"{path}: expected uint8 images [count, height, width] with one label each, "
            f"found {images.dtype} {list(images.shape)} and labels {list(labels.shape)}."
        )
    return images, labels


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, metavar="MODEL.onnx")
    parser.add_argument("data", type=Path, metavar="DATA.npz")
    parser.add_argument("others", type=Path, nargs="*", metavar="MODEL2.onnx", help="compared with the first model")
    args = parser.parse_args(argv)
    images, labels = _labelled(args.data)
    first = predictions(args.model, images)
    print(f"{args.model}: top-1 {np.mean(first == labels):.2%} of {len(labels)} images")
    for path in args.others:
        other = predictions(path, images)
        agreement = np.mean(other == first)
        print(f"{path}: top-1 {np.mean(other == labels):.2%}, agrees with {args.model.name} on {agreement:.2%}")


if __name__ == "__main__":
    main()

"""Variations of images for `--augment`: what the models of `tasks.py` met in training, or nearly.

Use: lindep-onnx IN.onnx OUT.onnx ... --recover 600 --augment tools/benchmarks/augmentations.py:flips_and_shifts
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]

#: Largest shift as a share of the width.
SHIFT = 0.125
#: Standard deviation of the noise relative to that of the images; both parameters of the weights of a mixture.
NOISE, EVENNESS = 0.2, 0.3


def flips_and_shifts(feeds: Mapping[str, Array], rng: np.random.Generator) -> dict[str, Array]:
    """Half of the images mirrored, all of them shifted, the border repeated.

    Args:
        feeds: [count, channels, height, width] images.
        rng: of both.
    """
    return {name: np.stack([_moved(image, rng) for image in images]) for name, images in feeds.items()}


def _moved(image: Array, rng: np.random.Generator) -> Array:
    height, width = image.shape[1:]
    most = round(SHIFT * width)
    down, right = rng.integers(0, 2 * most + 1, 2)
    wide = np.pad(image, ((0, 0), (most, most), (most, most)), mode="edge")
    found = wide[:, down : down + height, right : right + width]
    return found[:, :, ::-1] if rng.random() < 0.5 else found


def mixtures_and_noise(feeds: Mapping[str, Array], rng: np.random.Generator) -> dict[str, Array]:
    """Every sample mixed with another, and noise on top.

    Args:
        feeds: samples along the leading axis.
        rng: of pairs, weights and noise.
    """
    found = {}
    for name, value in feeds.items():
        share = rng.beta(EVENNESS, EVENNESS, len(value)).reshape(-1, *[1] * (value.ndim - 1))
        mixed = share * value + (1 - share) * value[rng.permutation(len(value))]
        noise = NOISE * value.std() * rng.standard_normal(value.shape)
        found[name] = (mixed + noise).astype(value.dtype)
    return found

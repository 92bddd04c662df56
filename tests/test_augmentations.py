"""Variations of images: what is pasted comes from another image of the same run, and samples stay as they are."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).parents[1] / "tools"))

from augmentations import collages


def test_half_of_a_collage_shows_a_box_of_one_other_image() -> None:
    colours = np.arange(40, dtype=np.float32)  # each image has one of its own
    images = np.broadcast_to(colours[:, None, None, None], (40, 3, 16, 12)).copy()
    found = collages({"x": images}, np.random.default_rng(0))["x"]
    assert found.shape == images.shape and found.dtype == images.dtype and (images[:, 0, 0, 0] == colours).all()
    shares = []
    for place, image in enumerate(found):
        foreign = image != colours[place]
        assert len(np.unique(image)) <= (2 if place < 20 else 1)
        rows, columns = np.nonzero(foreign[0])
        box = np.zeros((16, 12), bool)
        if len(rows):
            box[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = True
        assert (foreign == box).all()
        shares.append(foreign.mean())
    assert 0.2 < np.mean(shares[:20]) < 0.8 and not np.any(shares[20:])


def test_collages_are_a_function_of_the_seed() -> None:
    images = {"x": np.random.default_rng(1).normal(size=(8, 3, 16, 16)).astype(np.float32)}
    one, same, other = (collages(images, np.random.default_rng(seed))["x"] for seed in (0, 0, 1))
    assert np.array_equal(one, same) and not np.array_equal(one, other)

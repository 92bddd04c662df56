"""What methods are compared on: a model, images to calibrate it with, other images to judge the results by.

| task | calibrated with | judged by | metric |
|---|---|---|---|
| lenet | 10,000 training images of Fashion-MNIST | its test images | accuracy |
| overwide | 4,000 training images of Fashion-MNIST, for the net of tools/train_vgg.py | its test images | accuracy |
| resnet56 | `calib_x` of cifar10_jpeg.npz | `test_x` | accuracy |
| efficientnet_lite0, mobilenetv2 | 400 photographs | the others | agreement |
| hed_vgg16 | 48 of them, resized to 320 x 320 | 24 others | edges |

DATA is the folder of the four idx `.gz` files, the npz (`calib_x`, `calib_y`, `test_x`, `test_y`), or a folder of
JPEG files of 224 x 224 pixels, listed in the first column of its labels.csv.

Agreement is the share of images whose arg-max stays that of the original; edges is the share of pixels that stay on
their side of the threshold. The test images are opened for final figures only: while methods are developed, every
fourth calibration image is kept out of calibration and judges.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import onnx
import onnxruntime
from accuracy import normalised
from fashion_mnist import read_idx
from numpy.typing import NDArray

__all__ = ["TASKS", "Recipe", "Task", "error", "open_task", "outputs", "score"]

Floats: TypeAlias = NDArray[np.float32]
Labels: TypeAlias = NDArray[np.int64]
Metric: TypeAlias = Literal["accuracy", "agreement", "edges"]

LENET_CALIBRATION, OVERWIDE_CALIBRATION = 10_000, 4_000
IMAGES, HED_CALIBRATION, HED_TEST = 400, 48, 24
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HED_MEAN = (104.00699, 116.66877, 122.67892)  # blue, green, red
#: An edge map holds probabilities.
EDGE = 0.5
#: One image in so many is held out of calibration when the test images are not to be touched.
HELD_OUT = 4
BATCH = 32


@dataclass(frozen=True)
class Recipe:
    """How a task is made.

    Attributes:
        load: called with DATA and whether the test images are wanted; returns inputs, and labels if there are any.
        metric: what is measured.
        points: what is compared at: shares of the parameters that are kept, or of the hidden neurons that go.
        of_neurons: whether it is the latter.
    """

    load: Callable[[Path, bool], tuple[Floats, Labels | None]]
    metric: Metric
    points: tuple[float, ...]
    of_neurons: bool = False


@dataclass(frozen=True)
class Task:
    """A model and its images.

    Attributes:
        name: key of `TASKS`.
        model: the original.
        input: name of its input.
        calib: images that methods may look at.
        judged: images that the results are judged by.
        labels: of the latter, for their accuracy.
        metric: what is measured.
        points: see `Recipe`.
        of_neurons: see `Recipe`.
    """

    name: str
    model: Path
    input: str
    calib: Floats
    judged: Floats
    labels: Labels | None
    metric: Metric
    points: tuple[float, ...]
    of_neurons: bool


def open_task(
    name: str, model: Path, data: Path, *, final: bool, samples: int | None = None, limit: int | None = None
) -> Task:
    """Load the images of a task.

    Args:
        name: key of `TASKS`.
        model: the original.
        data: see the module.
        final: whether to judge by the test images; else by held-out calibration images.
        samples: calibrate with at most so many images.
        limit: judge by at most so many images.
    """
    recipe = TASKS[name]
    calib, labels = recipe.load(data, False)
    if final:
        judged, labels = recipe.load(data, True)
    else:
        kept_out = np.arange(len(calib)) % HELD_OUT == HELD_OUT - 1
        calib, judged = calib[~kept_out], calib[kept_out]
        labels = None if labels is None else labels[kept_out]
    return Task(
        name=name,
        model=model,
        input=onnx.load(model, load_external_data=False).graph.input[0].name,
        calib=calib[_spread(len(calib), samples)],
        judged=judged[_spread(len(judged), limit)],
        labels=None if labels is None else labels[_spread(len(labels), limit)],
        metric=recipe.metric,
        points=recipe.points,
        of_neurons=recipe.of_neurons,
    )


def _spread(count: int, most: int | None) -> NDArray[np.int64]:
    """At most `most` places, evenly spaced."""
    return np.arange(count) if most is None or most >= count else np.arange(most) * count // most


# ---- judging ---------------------------------------------------------------------------------------------------


def outputs(model: Path, name: str, images: Floats) -> Floats:
    """The first output for every image.

    Args:
        model: has one input, whose leading axis is free or 1.
        name: of the input.
        images: samples first.
    """
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    batch = 1 if session.get_inputs()[0].shape[0] == 1 else BATCH
    starts = range(0, len(images), batch)
    found: Floats = np.concatenate([session.run(None, {name: images[at : at + batch]})[0] for at in starts])
    return found


def score(task: Task, reference: Floats, found: Floats) -> float:
    """The task's metric; higher is better.

    Args:
        task: says which metric, and holds the labels.
        reference: outputs of the original for the judged images.
        found: outputs of the model to judge.
    """
    if task.metric == "edges":
        return float(np.mean((found > EDGE) == (reference > EDGE)))
    wanted = task.labels if task.metric == "accuracy" else reference.argmax(axis=1)
    return float(np.mean(found.argmax(axis=1) == wanted))


def error(reference: Floats, found: Floats) -> float:
    """Norm of the difference over the norm of what varies in the reference."""
    exact = reference.astype(np.float64)
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact - exact.mean()))


# ---- images ----------------------------------------------------------------------------------------------------


def _lenet(folder: Path, test: bool) -> tuple[Floats, Labels]:
    part = "t10k" if test else "train"
    images = read_idx(folder / f"{part}-images-idx3-ubyte.gz").reshape(-1, 28 * 28)
    labels = read_idx(folder / f"{part}-labels-idx1-ubyte.gz").astype(np.int64)
    most = len(images) if test else LENET_CALIBRATION
    return ((images[:most] / 255.0 - 0.5) / 0.5).astype(np.float32), labels[:most]


def _overwide(folder: Path, test: bool) -> tuple[Floats, Labels]:
    part = "t10k" if test else "train"
    images = read_idx(folder / f"{part}-images-idx3-ubyte.gz")
    labels = read_idx(folder / f"{part}-labels-idx1-ubyte.gz").astype(np.int64)
    most = len(images) if test else OVERWIDE_CALIBRATION
    return normalised(images[:most]), labels[:most]


def _resnet56(file: Path, test: bool) -> tuple[Floats, Labels]:
    part = "test" if test else "calib"
    with np.load(file) as data:
        return _standardised(data[f"{part}_x"]), data[f"{part}_y"].astype(np.int64)


def _efficientnet(folder: Path, test: bool) -> tuple[Floats, None]:
    return _channels_first((_photographs(folder, test) - 127.0) / 128.0), None


def _mobilenet(folder: Path, test: bool) -> tuple[Floats, None]:
    return _standardised(_photographs(folder, test)), None


def _hed(folder: Path, test: bool) -> tuple[Floats, None]:
    most = HED_TEST if test else HED_CALIBRATION
    return _channels_first(_photographs(folder, test, most=most, size=320)[..., ::-1] - np.array(HED_MEAN)), None


def _photographs(folder: Path, test: bool, *, most: int | None = None, size: int = 224) -> NDArray[np.uint8]:
    """[count, size, size, 3], red first; the files in a seeded order, the first `IMAGES` of them to calibrate with."""
    from PIL import Image  # only these tasks need it

    lines = (folder / "labels.csv").read_text(encoding="utf-8").splitlines()[1:]
    names = sorted(line.split(",")[0] for line in lines)
    order = np.random.default_rng(0).permutation(len(names))
    chosen = (order[IMAGES:] if test else order[:IMAGES])[:most]
    images: list[Any] = []
    for place in chosen:
        with Image.open(folder / names[place]) as image:
            images.append(np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)))
    return np.stack(images)


def _standardised(images: NDArray[np.uint8]) -> Floats:
    mean, deviation = np.array(IMAGENET_MEAN), np.array(IMAGENET_STD)
    return np.concatenate([_channels_first((part / 255.0 - mean) / deviation) for part in np.array_split(images, 8)])


def _channels_first(images: NDArray[Any]) -> Floats:
    return np.ascontiguousarray(np.moveaxis(images, -1, 1), dtype=np.float32)


TASKS = {
    "lenet": Recipe(_lenet, "accuracy", (0.5, 0.6, 0.7, 0.8), of_neurons=True),
    "overwide": Recipe(_overwide, "accuracy", (0.05, 0.02, 0.01)),
    "resnet56": Recipe(_resnet56, "accuracy", (0.8, 0.65, 0.5)),
    "efficientnet_lite0": Recipe(_efficientnet, "agreement", (0.97, 0.94, 0.88)),
    "mobilenetv2": Recipe(_mobilenet, "agreement", (0.97, 0.94, 0.88)),
    "hed_vgg16": Recipe(_hed, "edges", (0.9, 0.7, 0.5)),
}

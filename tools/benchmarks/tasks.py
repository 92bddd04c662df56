"""What is measured on: models, images for them, and how results are judged.

| subject | images | metric |
|---|---|---|
| demo | those of `models/`, which are always there | accuracy |
| lenet | Fashion-MNIST, 10,000 training images to calibrate with | accuracy |
| overwide | Fashion-MNIST, 4,000 of them, for the net of `tools/train.py vgg` | accuracy |
| resnet56, resnet20, cifar10_keras_cnn | cifar10_jpeg.npz: `calib_x`, `calib_y`, `test_x`, `test_y` | accuracy |
| efficientnet_lite0, mobilenetv2 | 600 photographs, 400 to calibrate with | agreement |
| hed_vgg16 | the same, resized to 320 x 320; 48 to calibrate with, 24 to judge by | edges |
| mtcnn_onet, open_nsfw | the same | agreement |
| crepe_tiny | tones that are made here | |
| realesr_animevideov3_x4 | the photographs, resized to 128 x 128 | likeness |
| ppocrv6_tiny_rec | lines of words that are drawn here, 48 x 320; needs Pillow | likeness |

`--models` is a folder of models, `--data` one with cifar10_jpeg.npz and `imagenet/*.jpg` (600 crops of 224 x 224
pixels; needs Pillow), `--fashion` the four idx `.gz` files of Fashion-MNIST.

Agreement is the share of images whose arg-max stays that of the original; edges is the share of pixels that stay on
their side of the threshold; likeness is 1 less the error of the output. The test images are for final figures only:
while methods are developed, `--held-out` keeps every fourth calibration image out of calibration to judge by.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]
Floats: TypeAlias = NDArray[np.float32]
Metric: TypeAlias = Literal["accuracy", "agreement", "edges", "likeness"]

ROOT = Path(__file__).parents[2]
#: Mean and standard deviation of the pixels that models were trained on, on the scale of the pixels that they divide.
FASHION, IMAGENET = (0.2860, 0.3530), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
PHOTOGRAPHS = 400
#: An edge map holds probabilities.
EDGE = 0.5
#: One image in so many is held out of calibration when the test images are not to be touched.
HELD_OUT = 4
BATCH = 32
RATE, FRAME, TONES = 16_000, 1024, 2000
LINES = 300


class Places(NamedTuple):
    """Folders that were given; see the module."""

    models: Path | None = None
    data: Path | None = None
    fashion: Path | None = None


class MissingError(LookupError):
    """A model or its images were not given."""


@dataclass(frozen=True)
class Subject:
    """A model and what is made of images for it.

    Attributes:
        file: of the model.
        images: called with the places and whether test images are wanted; pixels, and labels if there are any.
        prepared: inputs from pixels.
        metric: what is measured.
        points: what methods are compared at: shares of the parameters that are kept, or of the hidden neurons that go.
        of_neurons: whether it is the latter.
        calib: number of images that methods may look at; None for all.
        judged: number of those that the results are judged by.
    """

    file: str
    images: Callable[[Places, bool], tuple[Array, Array | None]]
    prepared: Callable[[Array], Floats]
    metric: Metric = "agreement"
    points: tuple[float, ...] = ()
    of_neurons: bool = False
    calib: int | None = None
    judged: int | None = None


@dataclass(frozen=True)
class Task:
    """A model and its images.

    Attributes:
        name: key of `SUBJECTS`.
        model: the original.
        input: name of its input.
        calib: images that methods may look at.
        judged: images that the results are judged by.
        labels: of the latter, for their accuracy.
        subject: says how.
    """

    name: str
    model: Path
    input: str
    calib: Floats
    judged: Floats
    labels: Array | None
    subject: Subject


def model_of(name: str, places: Places) -> Path:
    """The file of a subject's model.

    Raises:
        MissingError: it was not given.
    """
    folder = ROOT / "models" if name == "demo" else places.models
    if folder is None or not (folder / SUBJECTS[name].file).exists():
        raise MissingError(f"--models has no {SUBJECTS[name].file}")
    return folder / SUBJECTS[name].file


def open_task(
    name: str, places: Places, *, final: bool = True, samples: int | None = None, limit: int | None = None
) -> Task:
    """Load the images of a task.

    Args:
        name: key of `SUBJECTS`.
        places: where models and images are.
        final: whether to judge by the test images; else by held-out calibration images.
        samples: calibrate with at most so many images.
        limit: judge by at most so many images.

    Raises:
        MissingError: model or images were not given.
    """
    subject = SUBJECTS[name]
    model = model_of(name, places)
    pixels, labels = subject.images(places, False)
    calib = subject.prepared(pixels[: subject.calib])
    if final:
        pixels, labels = subject.images(places, True)
        judged = subject.prepared(pixels[: subject.judged])
    else:
        kept_out = np.arange(len(calib)) % HELD_OUT == HELD_OUT - 1
        calib, judged = calib[~kept_out], calib[kept_out]
        labels = None if labels is None else labels[: subject.calib][kept_out]
    chosen = _spread(len(judged), limit)
    graph = onnx.load(model, load_external_data=False).graph
    labels = None if labels is None else labels[: len(judged)][chosen].astype(np.int64)
    calib = calib[_spread(len(calib), samples)]
    return Task(name, model, graph.input[0].name, calib, judged[chosen], labels, subject)


def every(name: str, places: Places) -> Floats:
    """All calibration images of a subject, of photographs the test images too, in the order of the files."""
    subject = SUBJECTS[name]
    pixels = subject.images(places, False)[0]
    if subject.images is _photographs:
        pixels = np.concatenate([pixels, _photographs(places, True)[0]])
        pixels = pixels[np.argsort(_order(len(pixels)))]
    return subject.prepared(pixels)


def shuffled(name: str, places: Places) -> Floats:
    """The same in a random order, of photographs that of `open_task`."""
    samples = every(name, places)
    return samples[_order(len(samples))]


def _order(count: int) -> NDArray[np.int64]:
    return np.random.default_rng(0).permutation(count)


def _spread(count: int, most: int | None) -> NDArray[np.int64]:
    """At most `most` places, evenly spaced."""
    return np.arange(count) if most is None or most >= count else np.arange(most) * count // most


# ---- judging ---------------------------------------------------------------------------------------------------


def session(model: Path | onnx.ModelProto, threads: int = 0) -> onnxruntime.InferenceSession:
    """ONNX Runtime on the processor."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def outputs(model: Path | onnx.ModelProto, images: Floats) -> Floats:
    """The first output for every image.

    Args:
        model: has one input, whose leading axis is free or fixed.
        images: samples first.
    """
    running = session(model)
    (given,) = running.get_inputs()
    batch = given.shape[0] if isinstance(given.shape[0], int) else BATCH
    starts = range(0, len(images), batch)
    return np.concatenate([running.run(None, {given.name: images[at : at + batch]})[0] for at in starts])


def score(metric: Metric, reference: Floats, found: Floats, labels: Array | None = None) -> float:
    """A metric; higher is better.

    Args:
        metric: which one.
        reference: outputs of the original for the judged images.
        found: outputs of the model to judge.
        labels: for the accuracy.
    """
    if metric == "edges":
        return float(np.mean((found > EDGE) == (reference > EDGE)))
    if metric == "likeness":
        return 1.0 - error(reference, found)
    wanted = labels if metric == "accuracy" else reference.argmax(axis=1)
    return float(np.mean(found.argmax(axis=1) == wanted))


def error(reference: Floats, found: Floats) -> float:
    """Norm of the difference over the norm of what varies in the reference."""
    exact = reference.astype(np.float64)
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact - exact.mean()))


# ---- images ----------------------------------------------------------------------------------------------------


def read_idx(path: Path) -> NDArray[np.uint8]:
    """The array of a gzipped idx file of bytes: a 4-byte magic number whose last byte is the rank, sizes, data."""
    raw = gzip.decompress(path.read_bytes())
    sizes = np.frombuffer(raw, ">i4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(sizes)


def fashion(places: Places, test: bool) -> tuple[Array, Array]:
    """Images [count, 28, 28] and labels of Fashion-MNIST."""
    part = "t10k" if test else "train"
    if places.fashion is None:
        raise MissingError("--fashion was not given")
    images, labels = (places.fashion / f"{part}-{what}-ubyte.gz" for what in ("images-idx3", "labels-idx1"))
    return read_idx(images), read_idx(labels)


def _demo(_: Places, test: bool) -> tuple[Array, Array | None]:
    if not test:
        with np.load(ROOT / "models" / "calib.npz") as data:
            return data["image"], None
    with np.load(ROOT / "models" / "test_sample.npz") as data:
        return data["images"], data["labels"]


@cache
def _cifar(places: Places, test: bool) -> tuple[Array, Array]:
    part = "test" if test else "calib"
    if places.data is None:
        raise MissingError("--data was not given")
    with np.load(places.data / "cifar10_jpeg.npz") as data:
        return data[f"{part}_x"], data[f"{part}_y"]


def _photographs(places: Places, test: bool) -> tuple[Array, None]:
    """[count, 224, 224, 3], red first; the files in a seeded order, the first of them to calibrate with."""
    from PIL import Image  # only these subjects need it

    if places.data is None:
        raise MissingError("--data was not given")
    files = sorted((places.data / "imagenet").glob("*.jpg"))
    order = _order(len(files))
    images = []
    for place in order[PHOTOGRAPHS:] if test else order[:PHOTOGRAPHS]:
        with Image.open(files[place]) as image:
            images.append(np.asarray(image.convert("RGB")))
    return np.stack(images), None


def _tones(_: Places, test: bool) -> tuple[Array, None]:
    """(TONES, FRAME) harmonic tones of random pitch in noise of random size, standardised."""
    rng = np.random.default_rng(int(test))
    time = np.arange(FRAME) / RATE
    sounds = []
    for pitch in np.exp(rng.uniform(np.log(60), np.log(1500), TONES)):
        partials = np.arange(1, 6)[:, None]
        sizes, phases = rng.random((5, 1)), rng.uniform(0, 2 * np.pi, (5, 1))
        tone = (sizes * np.sin(2 * np.pi * pitch * partials * time + phases)).sum(axis=0)
        tone += 10 ** rng.uniform(-3, -0.5) * rng.normal(size=FRAME)
        sounds.append((tone - tone.mean()) / tone.std())
    return np.array(sounds, dtype=np.float32), None


def _lines(_: Places, test: bool) -> tuple[Array, None]:
    """(LINES, 48, 320, 3) lines of random letters, dark on bright."""
    from PIL import Image, ImageDraw, ImageFont

    rng = np.random.default_rng(int(test))
    letters = list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 ")
    images = []
    for _line in range(LINES):
        ink, paper = (tuple(rng.integers(low, low + 80, 3).tolist()) for low in (0, 170))
        image = Image.new("RGB", (320, 48), paper)
        text = "".join(rng.choice(letters, int(rng.integers(6, 18))))
        font = ImageFont.load_default(size=int(rng.integers(22, 34)))
        ImageDraw.Draw(image).text((int(rng.integers(2, 20)), int(rng.integers(2, 12))), text, fill=ink, font=font)
        images.append(np.asarray(image))
    return np.stack(images), None


def normalised(images: Array) -> Floats:
    """float32 [count, 1, height, width] of grey pixels, as the nets of `tools/train.py` want them."""
    if images.dtype != np.uint8:
        return images  # those of the repository are stored as inputs
    return ((images[:, None] / 255.0 - FASHION[0]) / FASHION[1]).astype(np.float32)


def _flat(images: Array) -> Floats:
    return ((images.reshape(len(images), -1) / 255.0 - 0.5) / 0.5).astype(np.float32)


def _colours(mean: Any, scale: Any, images: Array, *, size: int | None = None, bgr: bool = False) -> Floats:
    """(pixels - mean) / scale, channels first; the mean in the order of the channels of the result."""
    parts = []
    for image in images:
        pixels = image if size is None else _resized(image, size)
        pixels = pixels[..., ::-1] if bgr else pixels
        parts.append(np.moveaxis((pixels - np.array(mean)) / np.array(scale), -1, 0).astype(np.float32))
    return np.stack(parts)


def _resized(image: Array, size: int) -> Array:
    from PIL import Image

    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))


def _last(images: Array) -> Floats:
    """Blue first, channels last."""
    return (images[..., ::-1] - np.float32([104, 117, 123])).astype(np.float32)


_torchvision = partial(_colours, *(255 * np.array(part) for part in IMAGENET))
_hed = partial(_colours, (104.00699, 116.66877, 122.67892), 1.0, size=320, bgr=True)

SUBJECTS = {
    "demo": Subject("demo.onnx", _demo, normalised, "accuracy", (0.5,), calib=400),
    "lenet": Subject("lenet_300_100.onnx", fashion, _flat, "accuracy", (0.5, 0.6, 0.7, 0.8), True, calib=10_000),
    "overwide": Subject("overwide.onnx", fashion, normalised, "accuracy", (0.05, 0.02, 0.01), calib=4_000),
    "resnet56": Subject("resnet56.onnx", _cifar, _torchvision, "accuracy", (0.8, 0.65, 0.5)),
    "resnet20": Subject("resnet20.onnx", _cifar, _torchvision, "accuracy"),
    "cifar10_keras_cnn": Subject("cifar10_keras_cnn.onnx", _cifar, partial(_colours, 0.0, 1.0), "accuracy"),
    "efficientnet_lite0": Subject(
        "efficientnet_lite0.onnx", _photographs, partial(_colours, 127.0, 128.0), points=(0.97, 0.94, 0.88)
    ),
    "mobilenetv2": Subject("mobilenetv2.onnx", _photographs, _torchvision, points=(0.97, 0.94, 0.88)),
    "hed_vgg16": Subject("hed_vgg16.onnx", _photographs, _hed, "edges", (0.9, 0.7, 0.5), calib=48, judged=24),
    "mtcnn_onet": Subject("mtcnn_onet.onnx", _photographs, partial(_colours, 127.5, 128.0, size=48)),
    "open_nsfw": Subject("open_nsfw.onnx", _photographs, _last),
    "crepe_tiny": Subject("crepe_tiny.onnx", _tones, lambda tones: tones),
    "realesr_animevideov3_x4": Subject(
        "realesr_animevideov3_x4.onnx",
        _photographs,
        partial(_colours, 0.0, 255.0, size=128),
        "likeness",
        calib=48,
        judged=24,
    ),
    "ppocrv6_tiny_rec": Subject("ppocrv6_tiny_rec.onnx", _lines, partial(_colours, 127.5, 127.5), "likeness"),
}

"""A folder of images as calibration data, prepared the way image classifiers are usually fed.

Each image is turned upright (EXIF), converted to 8-bit RGB or grey, resized so that it just covers the size that the
model wants (or so that its shorter side is `resize`), and cropped in the centre: bilinear with antialiasing and rounded
as in torchvision's `Resize` and `CenterCrop`. Its pixels p, 0 to 255, become

    (p / scale - mean) / std.

Pillow decodes; it is imported only here, and only when there are images to read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lindep_onnx.data.inputs import Array, InputSpec, kind_of, listed
from lindep_onnx.errors import CalibrationError, UsageError, one_line
from lindep_onnx.files import in_order
from lindep_onnx.options import Color, DataOptions, ImageOptions, Layout, several

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
#: Larger images mean harm: a small file can hold them.
MAX_PIXELS = 1 << 27
#: Divides pixels unless told otherwise: they go from 0 to 1.
SCALE = 255.0


@dataclass(frozen=True)
class _Input:
    """One input of a model that takes images, and how they become what it wants."""

    spec: InputSpec
    height: int
    width: int
    layout: Layout
    color: Color
    resize: int | None
    scale: float
    mean: Array
    std: Array

    def described(self, count: int) -> str:
        """A sentence for the report."""
        sides = f"shorter side {self.resize}, " if self.resize else ""
        values = f"pixels / {self.scale:g}"
        if self.mean.any():
            values += f" - {_numbers(self.mean)}"
        if (self.std != 1).any():
            values += f", / {_numbers(self.std)}"
        if self.spec.dtype == np.uint8:
            values = "pixels from 0 to 255"
        return (
            f"{count:,} images became {sides}{self.height}x{self.width} from the centre, {self.color}, {self.layout}, "
            f"{values}: the way the model was trained?"
        )

    def array(self, path: Path) -> Array:
        """(1, ...) what one file becomes.

        Raises:
            CalibrationError: it cannot be read, naming it.
        """
        from PIL import Image, ImageOps

        try:
            with Image.open(path) as stored:
                if stored.width * stored.height > MAX_PIXELS:
                    raise ValueError(f"{stored.width}x{stored.height} pixels are too many")
                picture = ImageOps.exif_transpose(stored)
                if picture.mode.startswith(("I", "F")):
                    raise ValueError("more than 8 bits a channel; convert it to 8")
                picture = picture.convert("L" if self.color == "gray" else "RGB")
        except (OSError, ValueError, SyntaxError, EOFError, KeyError, IndexError, TypeError, AttributeError,
                Image.DecompressionBombError, MemoryError, OverflowError, ZeroDivisionError) as error:  # fmt: skip
            raise CalibrationError(
                f"{path}: is not a readable image ({one_line(error)}); repair or remove it."
            ) from error
        width, height = self._resized(*picture.size)
        if width * height > MAX_PIXELS:
            raise CalibrationError(f"{path}: {picture.width}x{picture.height} is too long to be resized; remove it.")
        picture = picture.resize((width, height), Image.Resampling.BILINEAR)
        left, top = round((width - self.width) / 2), round((height - self.height) / 2)
        pixels = np.asarray(picture.crop((left, top, left + self.width, top + self.height)))
        pixels = pixels[:, :, None] if self.color == "gray" else pixels[:, :, ::-1] if self.color == "bgr" else pixels
        if self.spec.dtype != np.uint8:
            pixels = ((pixels / self.scale - self.mean) / self.std).astype(self.spec.dtype)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1) if self.layout == "nchw" else pixels)[None]

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) before the crop; the longer side is rounded down, as torchvision does."""
        target = (self.resize, self.resize) if self.resize else (self.width, self.height)
        if target[0] * height >= target[1] * width:  # the width is what limits
            return target[0], max(self.height, target[0] * height // width)
        return max(self.width, target[1] * width // height), target[1]


def image_files(folder: Path) -> list[Path]:
    """The images in a folder and all folders below it, sorted by path."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    return sorted(found, key=in_order)


def images(
    folder: Path,
    files: Sequence[Path],
    specs: Sequence[InputSpec],
    wanted: DataOptions,
) -> tuple[int, Iterator[dict[str, Array]], str]:
    """How many images are used, their feeds in the order of the files, and a sentence on what was made of them.

    Args:
        folder: where they are, for messages.
        files: the images.
        specs: inputs of the model; there must be one.
        wanted: what to make of them. At most `max_samples` are used, chosen by a seeded hash: files sorted by class
            must not give the first class alone.

    Raises:
        UsageError: Pillow is missing, or an option does not fit the input.
        CalibrationError: the model takes no images, or leaves open what they should be.
    """
    found = _input(folder, specs, wanted)
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise UsageError('Images are read with Pillow, which is missing: pip install "lindep-onnx[images]".') from error
    if wanted.max_samples is not None:
        ranked = sorted(range(len(files)), key=lambda index: _rank(wanted.seed, index))
        files = [files[index] for index in sorted(ranked[: wanted.max_samples])]
    return len(files), ({found.spec.name: found.array(path)} for path in files), found.described(len(files))


def _rank(seed: int, index: int) -> bytes:
    return hashlib.blake2b(f"{seed}:{index}:image".encode(), digest_size=8).digest()


def _input(folder: Path, specs: Sequence[InputSpec], wanted: ImageOptions) -> _Input:
    if len(specs) != 1:
        names = listed([spec.name for spec in specs])
        raise CalibrationError(
            f"{folder}: images can feed one input, and the model has {len(specs)} ({names}); "
            "give .npz files or FILE.py:FUNC with an array for each."
        )
    spec = specs[0]
    shape = spec.shape
    where = f"{folder}: input {spec.name!r}"
    if shape is None or len(shape) != 4 or (kind_of(spec.dtype) != "float" and spec.dtype != np.uint8):
        raise CalibrationError(
            f"{where} is {spec.dtype} {_shown(shape)}, no batch of images; give .npz files or FILE.py:FUNC instead."
        )
    layout = wanted.layout or _layout(where, shape)
    axis = 1 if layout == "nchw" else 3
    count = shape[axis] if isinstance(shape[axis], int) else 1 if wanted.color == "gray" else 3
    color: Color = wanted.color or ("gray" if count == 1 else "rgb")
    if count != (1 if color == "gray" else 3):
        raise CalibrationError(
            f"{where} {_shown(shape)} has {count} channels in layout {layout}, and {color} images have not: see "
            "--layout and --color."
        )
    height, width = _size(where, shape, [place for place in (1, 2, 3) if place != axis], wanted)
    scale = SCALE if wanted.scale is None else wanted.scale
    if spec.dtype == np.uint8 and (wanted.scale, wanted.mean, wanted.std) != (None, None, None):
        raise UsageError(
            f"--scale, --mean and --std are for floats, and input {spec.name!r} takes uint8 pixels; drop them."
        )
    values = {}
    for flag, given, default in (("mean", wanted.mean, 0.0), ("std", wanted.std, 1.0)):
        numbers = (default,) if given is None else several(given)
        if len(numbers) not in (1, count):
            raise UsageError(f"--{flag} takes one number or {count} (the channels are {color}), not {len(numbers)}.")
        if max(numbers) > max(1.0, 255 / scale):
            raise UsageError(
                f"--{flag} {_numbers(numbers)} is beyond the pixels, which go from 0 to {255 / scale:g} after the "
                f"division by {scale:g}; give it in these units, or --scale 1 for pixels from 0 to 255."
            )
        values[flag] = np.array(numbers, dtype=np.float64)
    if wanted.resize is not None and wanted.resize**2 > MAX_PIXELS:
        raise UsageError(f"--resize {wanted.resize} makes images of too many pixels; the most is {MAX_PIXELS:,}.")
    if wanted.resize is not None and wanted.resize < max(height, width):
        raise UsageError(f"--resize {wanted.resize} is smaller than the {height}x{width} that are cropped from it.")
    return _Input(spec, height, width, layout, color, wanted.resize, scale, values["mean"], values["std"])


def _layout(where: str, shape: Sequence[int | str]) -> Layout:
    first, last = shape[1] in (1, 3), shape[3] in (1, 3)
    if first == last:
        raise CalibrationError(
            f"{where} {_shown(shape)} does not tell where its 1 or 3 channels are; add --layout nchw or --layout nhwc."
        )
    return "nchw" if first else "nhwc"


def _size(where: str, shape: Sequence[int | str], axes: Sequence[int], wanted: ImageOptions) -> tuple[int, int]:
    found = [size if isinstance(size, int) else None for size in (shape[axis] for axis in axes)]
    given = wanted.sides or (None, None)
    if any(size is None and other is None for size, other in zip(found, given, strict=True)):
        raise CalibrationError(f"{where} {_shown(shape)} takes any size; say which with --image-size H or HxW.")
    if any(size is not None and other is not None and size != other for size, other in zip(found, given, strict=True)):
        raise UsageError(
            f"--image-size {given[0]}x{given[1]} does not fit input {_shown(shape)}; drop the option, or use that size."
        )
    height, width = (size if size is not None else other for size, other in zip(found, given, strict=True))
    assert height is not None and width is not None
    if not 0 < height * width <= MAX_PIXELS:
        raise UsageError(f"--image-size: {height}x{width} pixels are none, or too many; the most is {MAX_PIXELS:,}.")
    return height, width


def _shown(shape: Sequence[int | str] | None) -> str:
    if shape is None:
        return "of unknown rank"
    return "[" + ", ".join("?" if str(size).startswith("?") else str(size) for size in shape) + "]"


def _numbers(values: Any) -> str:
    return ",".join(f"{value:g}" for value in values)

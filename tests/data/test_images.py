"""Folders of images become what the model wants, or are refused with what to do."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lindep_onnx.data.inputs import InputSpec
from lindep_onnx.data.samples import open_samples
from lindep_onnx.errors import CalibrationError, UsageError
from lindep_onnx.options import DataOptions

Image = pytest.importorskip("PIL.Image")


def spec(*shape: int | str, dtype: Any = np.float32) -> InputSpec:
    return InputSpec("x", np.dtype(dtype), shape)


NCHW = spec("N", 3, 8, 8)


def picture(seed: int = 0, width: int = 8, height: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def folder(path: Path, *pictures: np.ndarray) -> Path:
    path.mkdir(exist_ok=True)
    for number, pixels in enumerate(pictures):
        Image.fromarray(pixels).save(path / f"{number:03}.png")
    return path


def fed(source: Path, *inputs: InputSpec, most: int | None = None, **wanted: Any) -> np.ndarray:
    options = {"max_samples": most, "batch_size": 4}
    with open_samples(source, inputs or (NCHW,), DataOptions(**options, **wanted)) as samples:
        return np.concatenate([batch.feeds["x"][: len(batch.samples)] for batch in samples.batches()])


def test_pixels_go_from_0_to_1_and_are_standardised_like_torchvision_does(tmp_path: Path) -> None:
    pixels = picture()
    found = fed(folder(tmp_path, pixels), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    expected = (pixels.astype(np.float32) / 255 - np.float32([0.485, 0.456, 0.406])) / np.float32([0.229, 0.224, 0.225])
    np.testing.assert_allclose(found, expected.transpose(2, 0, 1)[None], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(fed(tmp_path), pixels.transpose(2, 0, 1)[None] / 255.0, rtol=1e-6)
    with pytest.raises(AssertionError):  # the negative control: channels the other way round
        np.testing.assert_allclose(found[:, ::-1], expected.transpose(2, 0, 1)[None], rtol=1e-5, atol=1e-6)


def test_other_conventions_are_a_matter_of_scale_layout_and_colour(tmp_path: Path) -> None:
    pixels = picture()
    folder(tmp_path, pixels)
    found = fed(tmp_path, spec("N", 8, 8, 3), scale=127.5, mean=(1.0,))
    np.testing.assert_allclose(found[0], pixels / 127.5 - 1, atol=1e-6)
    found = fed(tmp_path, scale=1, mean=(104.0, 117.0, 123.0), color="bgr")
    np.testing.assert_allclose(found[0], (pixels[:, :, ::-1] - [104.0, 117.0, 123.0]).transpose(2, 0, 1), atol=1e-4)
    found = fed(tmp_path, spec("N", 1, 8, 8))
    np.testing.assert_allclose(found[0, 0], pixels @ [0.299, 0.587, 0.114] / 255, atol=0.6 / 255)
    np.testing.assert_array_equal(fed(tmp_path, spec("N", 8, 8, 3, dtype=np.uint8))[0], pixels)


@pytest.mark.parametrize(("width", "height"), [(40, 20), (20, 40)])
def test_the_shorter_side_is_resized_and_the_centre_cropped(width: int, height: int, tmp_path: Path) -> None:
    columns, rows = np.meshgrid(np.arange(width) / width, np.arange(height) / height)
    pixels = np.stack([255 * columns, 255 * rows, 0 * rows], axis=2).astype(np.uint8)
    red, green, _ = fed(folder(tmp_path, pixels))[0]
    # What is left of the longer side is its middle half: from a quarter to three quarters.
    low, high = ((red[:, 0], red[:, -1]) if width > height else (green[0], green[-1]))  # fmt: skip
    assert abs(low.mean() - 0.28) < 0.02 and abs(high.mean() - 0.72) < 0.02
    wide = fed(tmp_path, resize=16)[0][0 if width > height else 1]  # a margin around: the middle quarter
    assert wide.min() > 0.36 and wide.max() < 0.64


def test_a_size_that_is_no_square_is_covered(tmp_path: Path) -> None:
    folder(tmp_path, picture(0, 30, 10))
    assert fed(tmp_path, spec("N", 3, "h", "w"), image_size=(4, 10)).shape == (1, 3, 4, 10)
    assert fed(tmp_path, spec("N", 3, 12, "w"), image_size=(12, 7)).shape == (1, 3, 12, 7)


def test_an_image_that_was_held_sideways_is_turned_upright(tmp_path: Path) -> None:
    pixels = picture()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_allclose(fed(tmp_path)[0], np.rot90(pixels, -1).transpose(2, 0, 1) / 255.0, rtol=1e-6)


def test_class_folders_are_read_and_max_samples_spreads_over_them(tmp_path: Path) -> None:
    for shade in range(10):
        folder(tmp_path / str(shade), *(np.full((8, 8, 3), 25 * shade + number, np.uint8) for number in range(6)))
    found = fed(tmp_path, most=20)
    assert len(found) == 20 and len(np.unique(found[:, 0, 0, 0] * 255 // 25)) > 5
    np.testing.assert_array_equal(found, fed(tmp_path, most=20))


def test_the_report_says_what_was_made_of_the_images(tmp_path: Path) -> None:
    wanted = DataOptions(mean=(0.5,), std=(0.25,), resize=9, batch_size=4)
    with open_samples(folder(tmp_path, *map(picture, range(3))), [NCHW], wanted) as samples:
        assert (
            "3 images became shorter side 9, 8x8 from the centre, rgb, nchw, pixels / 255 - 0.5, / 0.25"
            in samples.notes[0]
        )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "cannot identify"),
        (b"\x89PNG\r\n\x1a\nnothing", "cannot identify|broken|truncated"),
        ("cut", "truncated|Truncated"),
    ],
)
def test_a_file_that_is_no_image_is_named(content: bytes | str, reason: str, tmp_path: Path) -> None:
    folder(tmp_path, picture(0, 300, 300))
    whole = (tmp_path / "000.png").read_bytes()
    (tmp_path / "bad.png").write_bytes(whole[: len(whole) // 2] if content == "cut" else content)
    with pytest.raises(CalibrationError, match=rf"bad\.png: is not a readable image \(.*({reason})") as caught:
        fed(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.filterwarnings("ignore")  # of Pillow
def test_damaged_images_never_escape_as_another_error(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for suffix in ("png", "jpg", "bmp", "tiff", "webp"):
        path = tmp_path / f"a.{suffix}"
        Image.fromarray(picture()).save(path)
        whole = path.read_bytes()
        for _ in range(60):
            broken = bytearray(whole)
            for place in rng.integers(0, len(whole), 4):
                broken[place] = rng.integers(256)
            path.write_bytes(broken)
            try:
                assert fed(tmp_path).shape == (1, 3, 8, 8)
            except CalibrationError as error:
                assert "is not a readable image" in str(error)
        path.unlink()


def test_sixteen_bits_a_channel_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(CalibrationError, match=r"deep\.png.*more than 8 bits a channel"):
        fed(tmp_path)


REFUSED: dict[str, tuple[tuple[InputSpec, ...], dict[str, Any], type, str]] = {
    "no size": ((spec("N", 3, "h", "w"),), {}, CalibrationError, r"\[N, 3, h, w\] takes any size; .*--image-size"),
    "another size": (
        (NCHW,),
        {"image_size": (9, 8)},
        UsageError,
        r"--image-size 9x8 does not fit input \[N, 3, 8, 8\]",
    ),
    "no layout": (
        (spec("N", "a", "b", "c"),),
        {"image_size": (8, 8)},
        CalibrationError,
        "--layout nchw or --layout nhwc",
    ),
    "two inputs": ((NCHW, spec("N", 2)), {}, CalibrationError, "the model has 2"),
    "no image": ((spec("N", 64),), {}, CalibrationError, r"float32 \[N, 64\], no batch of images"),
    "no pixels": ((spec("N", 3, 8, 8, dtype=np.int64),), {}, CalibrationError, "int64"),
    "four channels": ((spec("N", 4, 8, 8),), {"layout": "nchw"}, CalibrationError, "has 4 channels"),
    "gray for three": ((NCHW,), {"color": "gray"}, CalibrationError, "3 channels in layout nchw, and gray"),
    "mean of pixels": ((NCHW,), {"mean": (123.7, 116.3, 103.5)}, UsageError, "go from 0 to 1 after.*--scale 1"),
    "std of pixels": ((NCHW,), {"std": (58.0,)}, UsageError, "--std 58 is beyond the pixels"),
    "two means": ((NCHW,), {"mean": (0.5, 0.5)}, UsageError, "one number or 3"),
    "small resize": ((NCHW,), {"resize": 7}, UsageError, "--resize 7 is smaller than the 8x8"),
    "mean of bytes": ((spec("N", 3, 8, 8, dtype=np.uint8),), {"mean": (0.5,)}, UsageError, "takes uint8 pixels"),
}


@pytest.mark.parametrize(("inputs", "wanted", "kind", "match"), REFUSED.values(), ids=REFUSED.keys())
def test_what_does_not_fit_is_refused_before_an_image_is_read(
    inputs: tuple[InputSpec, ...], wanted: dict[str, Any], kind: type, match: str, tmp_path: Path
) -> None:
    (tmp_path / "unreadable.png").write_bytes(b"")
    with pytest.raises(kind, match=match) as caught:
        fed(tmp_path, *inputs, **wanted)
    assert len(str(caught.value).splitlines()) == 1


def test_options_for_images_are_refused_where_there_are_none(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((9, 3, 8, 8), np.float32))
    for source in (tmp_path, tmp_path / "a.npy"):
        with pytest.raises(UsageError, match="are for folders of images"):
            fed(source, mean=(0.5,))
    assert len(fed(tmp_path)) == 9


def test_a_missing_pillow_is_an_extra_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path, picture())
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("PIL"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match=r'pip install "lindep-onnx\[images\]"'):
        fed(tmp_path)

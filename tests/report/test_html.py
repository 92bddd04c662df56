"""The HTML report: one file, for any eye and any name."""

from __future__ import annotations

import dataclasses
import math
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from reports import VERIFIED, a_hostile_report, a_report, group

from lindep_onnx.planning.values import FrontierPoint
from lindep_onnx.report.html import page
from lindep_onnx.report.values import Layer, Report, Size, Verification
from lindep_onnx.report.writing import write_report


class Page(HTMLParser):
    """Collects the tags and the visible text of a page, and checks that tags are nested as they should be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.text = " ".join(self.text.split())  # as a browser shows it
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data

    def of(self, tag: str, mark: str | None = None) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag and mark in (None, attributes.get("class"))]


def test_it_is_one_file_that_needs_no_script_and_no_network() -> None:
    text = page(a_report())
    parsed = Page(text)
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in parsed.tags}
    assert "http://" not in text and "https://" not in text and "url(" not in text
    assert "prefers-color-scheme: dark" in text and "@media print" in text and "width=device-width" in text
    for part in ("net.onnx", "3,000,000", "conv1", "Verification passed:", "unknown_operator", "What to do: ",
                 "calibrate", "2.25", "1.2.3", "Never active", "sample 3", "10 ms", "interval 0.78 to 0.83"):  # fmt: skip
        assert part in parsed.text, part


def test_every_picture_has_words_or_is_beside_its_number() -> None:
    parsed = Page(page(a_report()))
    pictures = parsed.of("svg")
    assert len(pictures) > 8
    assert all(svg.get("aria-label") or svg.get("aria-hidden") == "true" for svg in pictures)
    named = [svg for svg in pictures if svg.get("aria-label")]
    assert len(named) == len([svg for svg in pictures if svg.get("role") == "img"]) == 6
    targets = {attributes.get("id") for _, attributes in parsed.tags}
    assert {a["href"].removeprefix("#") for a in parsed.of("a") if a["href"]} <= targets
    assert {s["aria-labelledby"] for s in parsed.of("section")} <= targets


def test_the_strip_shows_the_width_of_every_layer_before_and_after() -> None:
    parsed = Page(page(a_report()))
    strip = [float(rect["height"] or 0) for rect in parsed.of("rect") if float(rect["width"] or 0) == 8.4]
    whole, kept = 70.0, 70 * math.sqrt(48 / 64)  # of 64; the second layer has 16, half as high
    assert strip == pytest.approx([whole, kept, 26 / 4, 35, 35], abs=0.01)
    assert "1 of 2 became narrower" in parsed.text


def test_many_layers_are_shown_in_rows() -> None:
    layers = tuple(Layer(f"l{k}", "Conv", 8, 8, 64, 64) for k in range(150))
    parsed = Page(page(a_report(layers=layers)))
    assert len(parsed.of("svg", "strip")) == 3
    assert "Layers 101 to 150" in parsed.text


def test_the_frontier_has_a_circle_a_plan_and_a_diamond_where_the_result_is() -> None:
    report = a_report()
    parsed = Page(page(report))
    circles = parsed.of("circle", "dot")
    assert len(circles) == 2 * len(report.frontier) + 2  # two charts, and the two groups of the evidence
    assert len(parsed.of("path", "chosen")) == 2
    worse = dataclasses.replace(VERIFIED, relative_error=1e-2)

    def height(found: Verification) -> float:
        drawn = Page(page(a_report(verification=found))).of("path", "chosen")[0]["d"]
        assert drawn is not None
        return float(drawn.split("l")[0].split()[1])

    assert height(worse) < height(VERIFIED)  # up is more


def test_over_fitting_is_counted_in_words() -> None:
    assert "No group errs more than twice" in page(a_report())
    assert "twice as much on held-out rows: 1." in page(a_report(groups=(group(held=0.1), group("b"))))
    assert "made up for exactly" in page(a_report(groups=(group(fit=0.0, held=0.0),)))


def test_hostile_names_are_text_wherever_they_are_shown() -> None:
    text = page(a_hostile_report())
    parsed = Page(text)
    assert not parsed.of("script") and text.count("</style>") == 1
    assert parsed.text.count("<script>alert(") == text.count("&lt;script&gt;alert(") > 20
    assert "\x1b" not in text and "\u202e" not in text


@pytest.mark.parametrize("size", [Size(0, 0, 0, 0), Size(0, 0, 0, 0, 0.0)])
def test_an_empty_report_is_still_a_page(size: Size) -> None:
    parsed = Page(page(Report(size, size, None, (), (), (), {}, {}, {})))
    assert "Nothing was removed" in parsed.text and "Not verified" in parsed.text


def test_numbers_that_are_none_do_not_stop_it() -> None:
    for error in (math.inf, math.nan, 0.0):
        odd = dataclasses.replace(
            VERIFIED, relative_error=error, agreement=None, passed=False, worst_errors=(error, 0.0)
        )
        points = (FrontierPoint(0.5, error, None), FrontierPoint(0.1, 0.5, None))
        groups = (group(fit=error, held=error),)
        parsed = Page(page(a_report(verification=odd, frontier=points, groups=groups, stress=odd)))
        assert (
            "VERIFICATION FAILED" in parsed.text and "nan" not in page(a_report(verification=odd)).split("</style>")[1]
        )


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
@pytest.mark.parametrize("width", [500, 1100])
def test_a_browser_shows_it_without_errors_and_without_sideways_scrolling(tmp_path: Path, width: int) -> None:
    path = tmp_path / "r.html"
    write_report(a_report(), path)
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--window-size={width},900",
    ]
    shot = tmp_path / "shot.png"
    subprocess.run([*command, f"--screenshot={shot}", path.as_uri()], check=True, capture_output=True, timeout=60)
    image = pytest.importorskip("PIL.Image").open(shot)
    pixels = np.asarray(image.convert("RGB")).astype(int)
    assert image.size == (width, 900)
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10
    margin = pixels[:, -12:]  # nothing reaches into the right margin
    assert (margin == margin[0, 0]).all()

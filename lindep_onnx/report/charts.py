"""Where the marks of a report's charts lie; `page.html.j2` draws them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from lindep_onnx.report.values import Layer

Point: TypeAlias = tuple[float, float]

#: Layers in one row of the strip.
ROW = 64
#: Smaller relative errors are drawn at the lower edge.
MIN_ERROR = 1e-7


@dataclass(frozen=True)
class Axis:
    """Values along one side of a plot.

    Attributes:
        title: what is measured.
        low, high: values at its ends.
        log: whether steps are decades.
        percent: whether values are shares.
    """

    title: str
    low: float
    high: float
    log: bool = False
    percent: bool = False

    def place(self, value: float) -> float:
        """From 0 at `low` to 1 at `high`, what lies outside at the end."""
        value = min(max(value, self.low), self.high)
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low or 1.0)

    def ticks(self, most: int) -> list[tuple[float, str]]:
        """At most so many values and what to write beside them."""
        if self.log:
            first, last = round(math.log10(self.low)), round(math.log10(self.high))
            every = -(-(last - first + 1) // most)
            return [(10.0**power, _power(power)) for power in range(last, first - 1, -every)]
        rough = (self.high - self.low) / max(1, most - 1)
        unit = 10.0 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
        step = next(unit * times for times in (1.0, 2.0, 5.0, 10.0) if unit * times >= rough * 0.999)
        if not self.percent:
            step = max(1.0, step)
        count = int((self.high - self.low) / step + 1e-9)
        values = [self.low + step * number for number in range(count + 1)]
        return [(value, f"{100 * value:.0f} %" if self.percent else f"{value:,.0f}") for value in values]


def _power(exponent: int) -> str:
    raised = str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return {0: "1", 1: "10"}.get(exponent, f"10{raised}")


def errors_axis(title: str, values: Iterable[float], least: float = MIN_ERROR) -> Axis:
    """Whole decades around these errors, at least two of them."""
    positive = [value for value in values if value > 0 and math.isfinite(value)]
    high = 10.0 ** math.ceil(math.log10(max([*positive, 10 * least])) - 1e-9)
    low = 10.0 ** math.floor(math.log10(max(least, min([*positive, high]))))
    return Axis(title, min(low, high / 100), high, log=True)


@dataclass(frozen=True)
class Plot:
    """A plot of so many units, with room for the numbers on its axes.

    Attributes:
        label: what it shows, for those who do not see it.
        x, y: its axes.
        curve: points of a line.
        guides: both ends of dashed lines.
        dots: circles, each with what is said when one points at it.
        chosen: where a diamond is.
        notes: words beside points: (point, text, whether above).
        width, height: in units.
        ticks: at most so many on each axis.
    """

    label: str
    x: Axis
    y: Axis
    curve: Sequence[Point] = ()
    guides: Sequence[tuple[Point, Point]] = ()
    dots: Sequence[tuple[Point, str]] = ()
    chosen: Point | None = None
    notes: Sequence[tuple[Point, str, bool]] = ()
    width: int = 360
    height: int = 230
    ticks: tuple[int, int] = (6, 6)

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right and bottom of where the values are."""
        return 40, 18, self.width - 16, self.height - 32

    def at(self, point: Point) -> Point:
        """Where a point lies."""
        left, top, right, bottom = self.box
        return left + (right - left) * self.x.place(point[0]), bottom - (bottom - top) * self.y.place(point[1])


class Bar(NamedTuple):
    """One layer of a strip: what is said of it, heights before and after, and the share of its channels that went."""

    title: str
    before: float
    after: float
    gone: float


class Strip(NamedTuple):
    """One row of layers, of so many units, from and to which layer."""

    first: int
    last: int
    width: int
    bars: list[Bar]


def strips(layers: Sequence[Layer], widest: int) -> Iterator[Strip]:
    """The widths of all layers in rows of about the same length; heights grow with the square root of a width."""
    size = -(-len(layers) // -(-len(layers) // ROW))
    for first in range(0, len(layers), size):
        bars = []
        for number, layer in enumerate(layers[first : first + size], first + 1):
            before, after = layer.channels_before, layer.channels_after
            title = f"{number}: {layer.name} ({layer.op}), {before:,} to {after:,} channels"
            gone = 1 - after / max(1, before)
            bars.append(Bar(title, 70 * math.sqrt(before / widest), 70 * math.sqrt(after / widest), gone))
        yield Strip(first + 1, first + len(bars), 10 * max(size, 8), bars)  # a lone layer is no wall

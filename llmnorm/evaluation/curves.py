"""Training curves as inline SVG: no plotting library, no script, colors from the page's CSS variables.

A chart stays readable for one point or a million (each pixel column keeps its extremes, so no spike is lost),
for values that are missing or not finite (a gap, and a tick on the axis), and for outliers (a logarithmic
axis).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 58, 16, 12, 30
COLUMNS = 500  # pixel columns a line is reduced to
LOG_RATIO = 5  # a maximum this many times the median asks for a logarithmic axis

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line of a chart: label, color (a CSS variable), points in order of x, and how it is drawn."""

    label: str
    color: str
    points: Sequence[Point]
    faint: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic map from [low, high] to pixels [start, stop]."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        position = ((math.log(value) if self.log else value) - low) / (high - low)
        return round(self.start + position * (self.stop - self.start), 1)


def chart(title: str, series: Sequence[Series], reference: tuple[str, float] | None = None) -> str:
    """An SVG line chart of `series` over steps; `reference` adds a dashed horizontal line (label, value)."""
    finite = [[point for point in line.points if math.isfinite(point[1])] for line in series]
    xs = [x for points in finite for x, _ in points]
    ys = [y for points in finite for _, y in points] + ([reference[1]] if reference else [])
    if not xs:
        return f'<p class="empty">No finite values of {escape(title.lower())} yet.</p>'
    x_axis = Axis(*_widened(min(xs), max(xs)), LEFT, WIDTH - RIGHT)
    y_axis = _y_axis(ys)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" xmlns="http://www.w3.org/2000/svg">',
        f"<title>{escape(title)}</title>",
        *_grid(x_axis, y_axis),
    ]
    if reference:
        label, value = reference
        y = y_axis(value)
        parts.append(f'<line class="reference" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick end" x="{WIDTH - RIGHT}" y="{y - 5}">{escape(label)}</text>')
    for line in series:
        parts += _line(line, x_axis, y_axis)
    parts.append("</svg>")
    return "".join(parts)


def smoothed(points: Sequence[Point]) -> list[Point]:
    """Centered moving median over a fiftieth of the run, its window shrinking toward both ends.

    Centered, because a trailing average lags behind a falling loss; a median, because one spike is not a
    trend.
    """
    finite = [point for point in points if math.isfinite(point[1])]
    last = len(finite) - 1
    half = len(finite) // 100
    result = []
    for i in sorted({round(last * column / COLUMNS) for column in range(COLUMNS + 1)}) if finite else []:
        reach = max(min(half, i, last - i), half // 5)
        window = [y for _, y in finite[max(0, i - reach) : i + reach + 1]]
        result.append((finite[i][0], statistics.median(window)))
    return result


def downsampled(points: Sequence[Point], columns: int = COLUMNS) -> list[Point]:
    """At most four points per column of x: the first, the smallest, the largest and the last."""
    if len(points) <= 4 * columns:
        return list(points)
    low, high = points[0][0], points[-1][0]
    kept: list[Point] = []
    column: list[Point] = []
    number = 0

    def close() -> None:
        extremes = {column[0], min(column, key=_y), max(column, key=_y), column[-1]}
        kept.extend(sorted(extremes))

    for point in points:
        here = int((point[0] - low) / (high - low) * (columns - 1)) if high > low else 0
        if column and here != number:
            close()
            column = []
        number = here
        column.append(point)
    close()
    return kept


def compact(value: float) -> str:
    """A number as a tick label: 1200000 -> 1.2M, 0.00035 -> 3.5e-4, 3.25 -> 3.25."""
    if value == 0:
        return "0"
    size = abs(value)
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1e3 if suffix == 'k' else limit):.4g}{suffix}"
    if size < 1e-2:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}"


def _y(point: Point) -> float:
    return point[1]


def _y_axis(values: Sequence[float]) -> Axis:
    low, high = min(values), max(values)
    log = low > 0 and high > LOG_RATIO * statistics.median(values)
    if log:
        low, high = low / 1.15, high * 1.15
    elif low >= 0 and low < 0.15 * high:
        low, high = 0.0, high * 1.06
    else:
        low, high = _widened(low, high)
        low, high = low - 0.06 * (high - low), high + 0.06 * (high - low)
    return Axis(low, high, HEIGHT - BOTTOM, TOP, log)


def _widened(low: float, high: float) -> tuple[float, float]:
    """The range, or one around it when it is a single value (or so narrow that ticks would coincide)."""
    room = max(abs(low), abs(high), 1e-12) * 1e-6
    return (
        (low, high)
        if high - low > room
        else (low - max(0.5 * abs(low), 1e-12), high + max(0.5 * abs(high), 1e-12))
    )


def ticks(axis: Axis, count: int) -> list[float]:
    """Round numbers inside the axis: 1, 2 or 5 times powers of ten; powers of ten when logarithmic."""
    if axis.log:
        exponents = range(math.floor(math.log10(axis.low)), math.ceil(math.log10(axis.high)) + 1)
        decades = math.log10(axis.high / axis.low)
        digits = (1, 2, 5) if decades < 2.5 else (1,)
        ticks = [digit * 10.0**exponent for exponent in exponents for digit in digits]
        ticks = [tick for tick in ticks if axis.low <= tick <= axis.high]
        return ticks[:: max(1, math.ceil(len(ticks) / (count + 2)))]
    raw = (axis.high - axis.low) / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * digit for digit in (1, 2, 5, 10) if unit * digit >= raw * 0.999)
    first = math.ceil(axis.low / step - 1e-9)
    last = math.floor(axis.high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _grid(x_axis: Axis, y_axis: Axis) -> list[str]:
    parts = []
    for tick in ticks(y_axis, 5):
        y = y_axis(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick end" x="{LEFT - 8}" y="{y + 4}">{compact(tick)}</text>')
    for tick in ticks(x_axis, 6):
        if tick == int(tick):
            x = x_axis(tick)
            parts.append(f'<text class="tick middle" x="{x}" y="{HEIGHT - 10}">{compact(tick)}</text>')
    baseline = HEIGHT - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{baseline}" y2="{baseline}"/>')
    return parts


def _line(line: Series, x_axis: Axis, y_axis: Axis) -> list[str]:
    style = f'style="stroke:var(--{line.color})"'
    runs: list[list[Point]] = [[]]
    lost = []
    for x, y in line.points:
        if math.isfinite(y):
            runs[-1].append((x, y))
        else:
            lost.append(x)
            runs.append([])
    parts = []
    for run in runs:
        points = [(x_axis(x), y_axis(y)) for x, y in downsampled(run)]
        if len(points) > 1:
            path = "M" + "L".join(f"{x:g} {y:g}" for x, y in points)
            parts.append(f'<path class="{"line faint" if line.faint else "line"}" {style} d="{path}"/>')
        if line.dots or len(points) == 1:
            radius = 3 if len(points) <= 60 else 1.5
            fill = f'style="fill:var(--{line.color})"'
            parts += [f'<circle class="dot" {fill} cx="{x:g}" cy="{y:g}" r="{radius}"/>' for x, y in points]
    baseline = HEIGHT - BOTTOM
    for x in (x_axis(step) for step in lost[:COLUMNS] if x_axis.low <= step <= x_axis.high):
        parts.append(f'<line class="lost" x1="{x}" x2="{x}" y1="{baseline}" y2="{baseline - 8}"/>')
    return parts

"""Line charts as inline SVG, coloured by the page's style sheet and readable without it by their titles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 14, 32
MOST_POINTS = 400  # of a line; more are thinned out evenly


@dataclass(frozen=True)
class Series:
    """One line. `place` chooses its colour and dashes in the style sheet, 0 to 3."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    place: int = 0


def line_chart(title: str, series: Sequence[Series], *, x_name: str, top: float | None = None) -> str:
    """A figure with lines over a common x axis and a y axis from 0 to `top`, by default a little over the data."""
    series = [line for line in map(thinned, series) if line.xs]
    xs = [x for line in series for x in line.xs]
    highest = max((y for line in series for y in line.ys), default=0.0)
    steps = ticks(0, top if top is not None else (highest or 1.0))
    high = max(steps[-1], top or 0.0)
    low_x, high_x = min(xs, default=0.0), max(xs, default=1.0)
    if low_x == high_x:
        low_x, high_x = low_x - 1, high_x + 1

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - low_x) / (high_x - low_x)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - y / high * (HEIGHT - TOP - BOTTOM)

    parts = []
    for y in steps:
        _, at = place(low_x, y)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{number(y)}</text>')
    for x in ticks(low_x, high_x, most=6, whole=True):
        if low_x <= x <= high_x:
            at, _ = place(x, 0)
            parts.append(
                f'<text class="tick" x="{at:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{x:g}</text>'
            )
    parts.append(f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 3}" text-anchor="end">{escape(x_name)}</text>')
    for line in series:
        points = [place(x, y) for x, y in zip(line.xs, line.ys, strict=True)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline class="line s{line.place}" points="{path}"/>')
        parts.append(f'<circle class="dot s{line.place}" cx="{points[-1][0]:.1f}" cy="{points[-1][1]:.1f}" r="3"/>')
    said = "; ".join(f"{line.name} from {line.ys[0]:.3g} to {line.ys[-1]:.3g}" for line in series)
    legend = "".join(
        f'<li><svg class="key" viewBox="0 0 26 8" aria-hidden="true"><line class="line s{line.place}" x1="1" x2="25" '
        f'y1="4" y2="4"/></svg>{escape(line.name)} <b>{number(line.ys[-1])}</b></li>'
        for line in series
    )
    drawing = svg(f"{title}: {said}", WIDTH, HEIGHT, "".join(parts))
    return f'<figure class="chart"><h3>{escape(title)}</h3>{drawing}<ul class="legend">{legend}</ul></figure>'


def precision_recall_chart(name: str, curve: Sequence[float], ap50: float, point: tuple[float, float] | None) -> str:
    """Precision [101] over recall 0, 0.01 .. 1, with the operating point (recall, precision) on it."""
    width, height, left, bottom, edge = 190, 160, 28, 24, 8

    def place(recall: float, precision: float) -> tuple[float, float]:
        return left + recall * (width - left - edge), height - bottom - precision * (height - bottom - edge)

    parts = []
    for value in (0.0, 0.5, 1.0):
        x, y = place(value, value)
        parts.append(f'<line class="grid" x1="{left}" x2="{width - edge}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{edge}" y2="{height - bottom}"/>')
        parts.append(f'<text class="tick" x="{left - 5}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
        anchor = "end" if value == 1 else "middle"
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{height - bottom + 14}" text-anchor="{anchor}">{value:g}</text>'
        )
    # A step of equal precision needs its two ends only.
    kept = [i for i in range(len(curve)) if i in (0, len(curve) - 1) or not curve[i - 1] == curve[i] == curve[i + 1]]
    ends = [place(i / (len(curve) - 1), curve[i]) for i in kept]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in ends)
    base = place(1, 0), place(0, 0)
    area = " ".join(f"{x:.1f},{y:.1f}" for x, y in base)
    parts += [f'<polygon class="area" points="{line} {area}"/>', f'<polyline class="line s0" points="{line}"/>']
    said = f"precision over recall of {name}, AP50 {ap50:.3f}"
    if point is not None:
        x, y = place(*point)
        parts.append(f'<circle class="operating" cx="{x:.1f}" cy="{y:.1f}" r="5"/>')
        said += f"; operating point at recall {point[0]:.2f}, precision {point[1]:.2f}"
    drawing = svg(said, width, height, "".join(parts))
    return f'<figure class="pr"><figcaption><bdi>{escape(name)}</bdi> <b>{ap50:.2f}</b></figcaption>{drawing}</figure>'


def svg(title: str, width: float, height: float, content: str, classes: str = "") -> str:
    """An SVG element with an accessible title; `content` is markup."""
    return (
        f'<svg class="{classes}" viewBox="0 0 {width:g} {height:g}" role="img">'
        f"<title>{escape(title)}</title>{content}</svg>"
    )


def thinned(line: Series) -> Series:
    """The line's finite points, at most MOST_POINTS of them, the first and last among them."""
    points = [(x, y) for x, y in zip(line.xs, line.ys, strict=True) if math.isfinite(y)]
    if len(points) > MOST_POINTS:
        step = (len(points) - 1) / (MOST_POINTS - 1)
        points = [points[round(k * step)] for k in range(MOST_POINTS)]
    return Series(line.name, [x for x, _ in points], [y for _, y in points], line.place)


def ticks(low: float, high: float, *, most: int = 5, whole: bool = False) -> list[float]:
    """Round numbers at equal distance, the last at or over `high`: at most `most` steps."""
    rough = max(high - low, 1e-12) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10, 20) if m * power >= rough * (1 - 1e-9))
    if whole:
        step = max(1.0, math.ceil(step))
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.ceil(high / step - 1e-9) + 1)]


def number(value: float) -> str:
    """Three digits, without needless zeros."""
    return f"{value:.3g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.1e}".replace("e-0", "e-")

"""What `yolonas benchmark` writes: a table in Markdown, and a picture of accuracy against latency as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import PurePath

from yolonas.benchmark import Left, Machine, Row
from yolonas.training.charts import number, ticks

# Okabe and Ito's colours, which colour-blind people tell apart; precisions differ in shape.
COLOURS = {"torch": "#d55e00", "onnxruntime": "#0072b2", "openvino": "#009e73"}
SHAPES = {"fp32": "circle", "bf16": "square", "fp16": "square", "int8": "diamond"}
WIDTH, HEIGHT = 720, 440
LEFT, RIGHT, TOP, BOTTOM = 60, 24, 40, 60

COLUMNS = (
    *("weights", "runtime", "precision", "batch", "canvas", "letterbox", "network", "post", "image to boxes"),
    *("images/s", "AP", "AP50", "MB", "threads", "date", "commit"),
)


def markdown(rows: Sequence[Row], left: Sequence[Left], notes: Sequence[str] = ()) -> str:
    """A table of all rows, what they hold for above it, and below it what could not be measured and why."""
    lines = [f"{machine_line(row.machine)}." for row in rows]
    lines = [*dict.fromkeys(lines), *notes]
    if rows:
        lines += [
            "Milliseconds an image, medians of contenders that took turns; image to boxes is timed by itself.",
            "",
            _line(COLUMNS),
            _line(["---"] * len(COLUMNS)),
            *(_line(_cells(row)) for row in rows),
        ]
    if left:
        lines += ["", "Not measured:", "", *(f"- {entry.contender}: {entry.reason}" for entry in left)]
    return "\n".join(lines) + "\n"


def machine_line(machine: Machine) -> str:
    """Processor, cores and versions as one line of text."""
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    return f"{machine.processor}, {machine.cores} cores; {versions}"


def _cells(row: Row) -> list[str]:
    height, width = row.image_size
    times = [number(value) for value in (row.letterbox, row.network, row.post, row.total)]
    accuracy = ["-" if value is None else f"{value:.4f}" for value in (row.ap, row.ap50)]
    runtime = f"{row.runtime} {row.machine.versions.get(row.runtime, '')}".strip()
    where = [str(row.threads)] if row.device == "cpu" else [row.device]
    return [
        *(row.weights, runtime, row.precision, str(row.batch), f"{height}x{width}", *times),
        *(f"{1e3 / row.total:.1f}", *accuracy, f"{row.megabytes:.1f}", *where),
        *(row.machine.date, row.machine.commit or "-"),
    ]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def picture(rows: Sequence[Row], title: str = "AP against latency") -> str:
    """Every row with an AP as a point over its milliseconds an image, and the front that no other beats, as SVG.

    A row is on the front where no row is both quicker and better. The axis of time is logarithmic. The file needs no
    style sheet. Raises ValueError where no row has an AP.
    """
    points = [(row.total, row.ap, row) for row in rows if row.ap is not None]
    if not points:
        raise ValueError("there is no AP to draw: measure on labelled images")
    times, aps = [p[0] for p in points], [p[1] for p in points]
    low_x, high_x = math.log10(min(times)) - 0.08, math.log10(max(times)) + 0.12
    margin = max(0.1 * (max(aps) - min(aps)), 0.01)
    steps = ticks(max(0.0, min(aps) - margin), max(aps) + margin)
    low_y, high_y = min(steps[0], min(aps)), steps[-1]

    def place(ms: float, ap: float) -> tuple[float, float]:
        across, up = (math.log10(ms) - low_x) / (high_x - low_x), (ap - low_y) / (high_y - low_y)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>', _text(LEFT, 22, title, size=15)]
    for ap in steps:
        y = place(min(times), ap)[1]
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(_text(LEFT - 8, y + 4, number(ap), anchor="end"))
    for ms in _decades(10**low_x, 10**high_x):
        x = place(ms, low_y)[0]
        parts.append(f'<path d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="#eee"/>')
        parts.append(_text(x, HEIGHT - BOTTOM + 16, number(ms), anchor="middle"))
    parts.append(_text(WIDTH - RIGHT, HEIGHT - BOTTOM + 32, "ms an image, image to boxes", anchor="end"))
    front = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(ms, ap) for ms, ap in _front(points)))
    parts.append(f'<polyline points="{front}" fill="none" stroke="#666" stroke-dasharray="5 4"/>')
    named: set[tuple[str, int]] = set()  # the quickest point of some weights at a batch size carries their name
    for ms, ap, row in sorted(points, key=lambda point: point[0]):
        x, y = place(ms, ap)
        told = f"{row.weights}, {row.runtime}, {row.precision}, batch {row.batch}: AP {ap:.4f}, {number(ms)} ms"
        parts.append(f"<g><title>{escape(told)}</title>{_mark(x, y, row.precision, COLOURS[row.runtime])}</g>")
        if (row.weights, row.batch) not in named:
            named.add((row.weights, row.batch))
            name = PurePath(row.weights).stem + (f", batch {row.batch}" if row.batch > 1 else "")
            parts.append(_text(x, y - 11, name, anchor="end" if x > WIDTH / 2 else "start", size=11))
    parts += _legend({row.runtime for _, _, row in points}, {row.precision for _, _, row in points})
    said = escape(f"{title}: {len(points)} points")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'font-family="sans-serif"><title>{said}</title>{"".join(parts)}</svg>\n'
    )


def _front(points: Sequence[tuple[float, float, Row]]) -> list[tuple[float, float]]:
    """The points that no other beats in both, quickest first."""
    best, front = -math.inf, []
    for ms, ap in sorted(((ms, ap) for ms, ap, _ in points), key=lambda p: (p[0], -p[1])):
        if ap > best:
            best = ap
            front.append((ms, ap))
    return front


def _decades(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten between two numbers."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [m * 10.0**power for power in powers for m in (1, 2, 5) if low <= m * 10.0**power <= high]


def _legend(runtimes: set[str], precisions: set[str]) -> list[str]:
    parts, x, y = [], float(LEFT), HEIGHT - 12.0
    entries = [(name, "fp32", COLOURS[name]) for name in COLOURS if name in runtimes]
    entries += [(name, name, "#666") for name in SHAPES if name in precisions]
    for name, precision, colour in entries:
        parts += [_mark(x, y - 4, precision, colour), _text(x + 10, y, name)]
        x += 28 + 7 * len(name)
    return parts


def _mark(x: float, y: float, precision: str, colour: str) -> str:
    shape = SHAPES.get(precision, "circle")
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5.5" fill="{colour}"/>'
    turn = f' transform="rotate(45 {x:.1f} {y:.1f})"' if shape == "diamond" else ""
    return f'<rect x="{x - 5:.1f}" y="{y - 5:.1f}" width="10" height="10" fill="{colour}"{turn}/>'


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="#222">{escape(text)}</text>'

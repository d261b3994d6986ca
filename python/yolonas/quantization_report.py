"""What INT8 costs and gains: a table for people and programs, and a drawing of each layer's sensitivity."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from yolonas.atomic import atomic_file
from yolonas.errors import MissingPackageError
from yolonas.exported import INPUT_NAME, RAW_OUTPUT_NAMES, file_size
from yolonas.extras import openvino_core, require
from yolonas.quantization_search import Measured

RUNTIMES = {"openvino": "OpenVINO", "onnxruntime": "ONNX Runtime"}
ROUNDS = 40

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem;
  --ink: #1d2330; --muted: #667085; --rule: #d9dde5; --int8: #3b6fd4; --float: #d9730d; color: var(--ink); }
table { border-collapse: collapse; } td, th { padding: .25rem .8rem; border-bottom: 1px solid var(--rule); }
th { text-align: left; } td + td { text-align: right; font-variant-numeric: tabular-nums; }
svg { width: 100%; } svg text { font-size: 10px; fill: var(--ink); } .value { fill: var(--muted); }
.int8 { fill: var(--int8); } .float { fill: var(--float); } p.key b.int8 { color: var(--int8); }
p.key b.float { color: var(--float); }
@media (prefers-color-scheme: dark) { body { background: #14171d; --ink: #e6e9ef; --muted: #98a2b3; --rule: #343a46;
  --int8: #7aa2f7; --float: #ff9e64; } }
"""


class Row(NamedTuple):
    """One form of the network; latency: median ms of each runtime that is installed, size in bytes."""

    measured: Measured
    latency: dict[str, float]
    size: int


def rows(measured: Sequence[Measured], canvas: npt.NDArray[np.uint8], *, rounds: int = ROUNDS) -> list[Row]:
    """The forms with their size, and their latency on one canvas, uint8 [1, 3, H, W]."""
    times = latencies({one.name: one.path for one in measured}, canvas, rounds=rounds)
    return [Row(one, times[one.name], file_size(one.path)) for one in measured]


def latencies(
    paths: Mapping[str, Path], canvas: npt.NDArray[np.uint8], *, rounds: int = ROUNDS
) -> dict[str, dict[str, float]]:
    """Median ms of the network alone, by name and runtime; the files take turns, so that other load meets all."""
    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    for name, path in paths.items():
        for runtime in RUNTIMES:
            if runtime == "onnxruntime" and path.suffix.lower() != ".onnx":
                continue
            try:
                calls[name, runtime] = network_call(path, runtime, canvas)
            except MissingPackageError:
                continue
    times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for _ in range(rounds):
        for key, call in calls.items():
            call()  # finds its code and data where the others left room for them
            begun = time.perf_counter()
            call()
            times[key].append(time.perf_counter() - begun)
    return {
        name: {
            runtime: 1e3 * statistics.median(times[name, runtime]) for runtime in RUNTIMES if (name, runtime) in times
        }
        for name in paths
    }


def network_call(
    path: Path, runtime: str, canvas: npt.NDArray[np.uint8], *, precision: str = "f32"
) -> Callable[[], Any]:
    """A call of the network of a file on one canvas, uint8 [B, 3, H, W], without decoding.

    precision: what OpenVINO computes in where the file is float: f32 or bf16.
    """
    if runtime == "onnxruntime":
        onnxruntime = require("onnxruntime", "onnx", "runtime 'onnxruntime'")
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return lambda: session.run(RAW_OUTPUT_NAMES, {INPUT_NAME: canvas})
    core = openvino_core()
    model = core.read_model(path)
    model.reshape(list(canvas.shape))
    config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
    request = core.compile_model(model, "CPU", config).create_infer_request()
    return lambda: request.infer({0: canvas}, share_inputs=True, share_outputs=True)


def markdown(found: Sequence[Row]) -> str:
    """The table; the first row is the float network."""
    head, *body = _cells(found)
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def to_dict(found: Sequence[Row], sensitivity: Mapping[str, float]) -> dict[str, Any]:
    """Everything as JSON-ready values; AP in COCO's 0..1, latency in ms, size in bytes."""
    forms = []
    for row in found:
        one, difference = row.measured, row.measured.difference
        forms.append(
            {
                "name": one.name,
                "ap": one.metrics.ap,
                "ap50": one.metrics.ap50,
                "ap_difference": None if difference is None else vars(difference),
                "float_layers": list(one.float_layers),
                "latency_ms": row.latency,
                "bytes": row.size,
            }
        )
    return {"forms": forms, "sensitivity": dict(sensitivity)}


def html(found: Sequence[Row], sensitivity: Mapping[str, float], *, title: str, notes: Sequence[str] = ()) -> str:
    """One page that needs nothing else: the table, the notes, and each layer's sensitivity."""
    head, *body = _cells(found)
    lines = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in body)
    heading = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    said = "".join(f"<p>{escape(note)}</p>" for note in notes)
    drawing = sensitivity_chart(sensitivity, found[-1].measured.float_layers) if sensitivity else ""
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style>"
        f"<h1>{escape(title)}</h1><table><tr>{heading}</tr>{lines}</table>{said}{drawing}</html>"
    )


def sensitivity_chart(sensitivity: Mapping[str, float], float_layers: Sequence[str]) -> str:
    """A bar for each layer in the network's order, those that stay in float in another colour; inline SVG."""
    from yolonas.training.charts import number, svg

    row, left, width = 13, 290, 900
    top = max(sensitivity.values(), default=0.0) or 1.0
    parts = []
    for k, (name, value) in enumerate(sensitivity.items()):
        y, length = k * row, max(value / top * (width - left - 60), 0.5)
        kind = "float" if name in float_layers else "int8"
        parts.append(
            f'<text x="{left - 6}" y="{y + 10}" text-anchor="end">{escape(name)}</text>'
            f'<rect class="{kind}" x="{left}" y="{y + 2}" width="{length:.1f}" height="{row - 4}"/>'
            f'<text class="value" x="{left + length + 5:.1f}" y="{y + 10}">{number(value)}</text>'
        )
    worst = max(sensitivity, key=sensitivity.__getitem__)
    drawing = svg(f"sensitivity by layer, highest: {worst}", width, row * len(sensitivity) + 4, "".join(parts))
    return (
        "<h2>What quantizing one layer alone changes</h2>"
        '<p class="key">Share of all that is detected that changes: class scores, and boxes weighted by their score. '
        f'<b class="int8">INT8</b>, <b class="float">left in float</b>.</p>{drawing}'
    )


def write(
    path: Path, found: Sequence[Row], sensitivity: Mapping[str, float], *, title: str, notes: Sequence[str]
) -> None:
    """Write the report as the suffix says: .html, .json or .md; ValueError for another, OSError as writing does."""
    kind = path.suffix.lower()
    if kind == ".html":
        text = html(found, sensitivity, title=title, notes=notes)
    elif kind == ".json":
        text = json.dumps({"title": title, "notes": list(notes), **to_dict(found, sensitivity)}, indent=1)
    elif kind == ".md":
        most = sorted(sensitivity.items(), key=lambda item: -item[1])
        listed = [f"| {name} | {value:.4f} |" for name, value in most]
        layers = ["", "| layer | sensitivity |", "| --- | --- |", *listed] if listed else []
        text = "\n".join([f"# {title}", "", markdown(found), "", *notes, *layers]) + "\n"
    else:
        raise ValueError(f"a report's name must end in .html, .json or .md, not {path.name}")
    with atomic_file(path) as stream:
        stream.write(text.encode())


def _cells(found: Sequence[Row]) -> list[list[str]]:
    first = found[0]
    used = [runtime for runtime in RUNTIMES if any(runtime in row.latency for row in found)]
    table = [
        ["", "AP", "AP50", "AP less float's (95 %)", *(f"{RUNTIMES[r]}, ms" for r in used), "MB", "layers in float"]
    ]
    for row in found:
        one, difference = row.measured, row.measured.difference
        times = []
        for runtime in used:
            here, base = row.latency.get(runtime), first.latency.get(runtime)
            gain = f" ({base / here:.2f}x)" if here and base and row is not first else ""
            times.append(f"{here:.2f}{gain}" if here else "-")
        share = f" ({row.size / first.size:.2f})" if row is not first else ""
        drop = (
            ""
            if difference is None
            else f"{_points(difference.value)} ({_points(difference.low)} to {_points(difference.high)})"
        )
        table.append(
            [
                one.name,
                f"{100 * one.metrics.ap:.2f}",
                f"{100 * one.metrics.ap50:.2f}",
                drop,
                *times,
                f"{row.size / 1e6:.2f}{share}",
                str(len(one.float_layers)) if difference is not None else "all",
            ]
        )
    return table


def _points(value: float) -> str:
    return f"{100 * value:+.2f}"

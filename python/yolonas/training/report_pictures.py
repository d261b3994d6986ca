"""The pictures of a report: downscaled JPEGs inside the page, with the boxes drawn over them as SVG."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from functools import lru_cache
from html import escape
from pathlib import Path

import numpy as np
import numpy.typing as npt

from yolonas.errors import DataError
from yolonas.inference._cv2 import cv2
from yolonas.inference.sources import read_image
from yolonas.training.charts import svg

QUALITY = 78
LONGEST_LABEL = 26  # letters


@dataclass(frozen=True, eq=False)
class Mark:
    """A box to draw, xyxy image px. `style` is right, missed, false, wrong, true or found; `text` stands at the box."""

    box: npt.NDArray[np.float32]
    style: str
    title: str
    text: str = ""


@dataclass(frozen=True)
class Picture:
    """Part of an image, ready to be shown: where it lies in the image, its scale, and its JPEG or why there is none."""

    left: float
    top: float
    width: int  # as shown
    height: int
    scale: float  # shown px of one image px
    jpeg: str | None
    reason: str = ""


def picture(
    path: Path, size: tuple[int, int], side: int, region: tuple[float, float, float, float] | None = None
) -> Picture:
    """An image, or the region xyxy of it, with its longest side scaled to `side` px (an image is never enlarged).

    `size` is the (height, width) that the labels are for. A file that is gone, unreadable or of another size gives a
    picture without pixels.
    """
    height, width = size
    x1, y1, x2, y2 = region or (0.0, 0.0, float(width), float(height))
    left, top = max(0, int(x1)), max(0, int(y1))
    right, bottom = min(width, int(np.ceil(x2))), min(height, int(np.ceil(y2)))
    right, bottom = max(right, left + 1), max(bottom, top + 1)
    scale = side / max(right - left, bottom - top)
    if region is None:
        scale = min(scale, 1.0)
    shown = max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale))
    jpeg, reason = None, ""
    try:
        pixels = _read(path)
        if pixels.shape[:2] != size:
            reason = f"the image is now {pixels.shape[1]}x{pixels.shape[0]}, not {width}x{height}"
        else:
            part = pixels[top:bottom, left:right]
            small = cv2.resize(part, shown, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
            encoded = cv2.imencode(".jpg", small[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1]
            jpeg = base64.b64encode(encoded.tobytes()).decode("ascii")
    except DataError:
        reason = "the image can no longer be read"
    return Picture(float(left), float(top), *shown, scale, jpeg, reason)


@lru_cache(maxsize=2)  # the truth and the prediction, or several crops of one image, follow each other
def _read(path: Path) -> npt.NDArray[np.uint8]:
    return read_image(path)


def forget() -> None:
    """Let go of the pixels that were read last."""
    _read.cache_clear()


def drawing(shown: Picture, marks: list[Mark], title: str, *, name: str = "", again: str = "") -> str:
    """The picture with its marks as SVG; `name` gives its pixels an id, under which `again` shows them once more."""
    if again and shown.jpeg is not None:
        pixels = f'<use href="#{again}"/>'
    elif shown.jpeg is not None:
        identity = f' id="{name}"' if name else ""
        pixels = (
            f'<image{identity} width="{shown.width}" height="{shown.height}" '
            f'href="data:image/jpeg;base64,{shown.jpeg}"/>'
        )
    else:
        pixels = (
            f'<rect class="gone" width="{shown.width}" height="{shown.height}"/><text class="reason" '
            f'x="{shown.width / 2:g}" y="{shown.height / 2:g}" text-anchor="middle">{escape(shown.reason)}</text>'
        )
    return svg(title, shown.width, shown.height, pixels + "".join(_mark(shown, mark) for mark in marks), "picture")


def _mark(shown: Picture, mark: Mark) -> str:
    corners = (mark.box.astype(np.float64) - np.array([shown.left, shown.top] * 2)) * shown.scale
    x1, y1, x2, y2 = np.clip(corners, 1, np.array([shown.width - 1, shown.height - 1] * 2)).tolist()
    place = f'x="{x1:.1f}" y="{y1:.1f}" width="{max(x2 - x1, 1):.1f}" height="{max(y2 - y1, 1):.1f}"'
    parts = [f'<rect class="halo" {place}/><rect class="edge" {place}><title>{escape(mark.title)}</title></rect>']
    if mark.text:
        text = mark.text if len(mark.text) <= LONGEST_LABEL else mark.text[: LONGEST_LABEL - 1] + "…"
        at = y1 - 4 if y1 > 15 else min(y2 + 12, shown.height - 3)
        end = x1 > 0.6 * shown.width
        anchor, x = ("end", x2) if end else ("start", x1)
        parts.append(f'<text x="{x:.1f}" y="{at:.1f}" text-anchor="{anchor}">{escape(text)}</text>')
    return f'<g class="mark {mark.style}">{"".join(parts)}</g>'

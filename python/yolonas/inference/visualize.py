"""Drawing boxes with class names and scores onto an image."""

from __future__ import annotations

import colorsys
import unicodedata
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from yolonas.inference._cv2 import cv2

if TYPE_CHECKING:
    from yolonas.inference.detections import Detections

_FONT = cv2.FONT_HERSHEY_SIMPLEX
_GOLDEN_RATIO = 0.618033988749895  # steps of the hue: neighbouring class numbers get colours far apart


def class_color(label: int) -> tuple[int, int, int]:
    """A colour for the number of a class or track: uint8 RGB, the same on every image."""
    hue = (0.03 + label * _GOLDEN_RATIO) % 1.0
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.85, (0.95, 0.75)[label // 8 % 2])
    return round(red * 255), round(green * 255), round(blue * 255)


def draw(image: npt.NDArray[np.uint8], detections: Detections) -> npt.NDArray[np.uint8]:
    """A copy of an image, uint8 [h, w, 3] RGB, with the detections drawn on it.

    Lines and letters grow with the image; the best-scored box is drawn last, on top. A colour is that of the class, or
    of the track where there is one.
    """
    canvas = np.ascontiguousarray(image).copy()
    height, width = canvas.shape[:2]
    line = max(1, round((height + width) / 2 * 0.003))
    font_scale = max(0.35, line / 4)
    for i in np.argsort(detections.scores, kind="stable"):
        label = int(detections.labels[i])
        track = None if detections.track_ids is None else int(detections.track_ids[i])
        color = class_color(label if track is None else track)
        left, top, right, bottom = (round(float(v)) for v in detections.boxes[i])
        cv2.rectangle(canvas, (left, top), (right, bottom), color, line)
        number = "" if track is None else f"#{track} "
        text = f"{number}{_drawable(detections.names[label], label)} {detections.scores[i]:.2f}"
        (text_width, text_height), below = cv2.getTextSize(text, _FONT, font_scale, max(1, line // 2))
        # Above the box; inside it where there is no room above; and never cut off by the image's right edge.
        x = max(0, min(left, width - text_width - 1))
        y = top - below if top >= text_height + 2 * below else top + text_height + below
        corners = (x, y - text_height - below // 2), (x + text_width, y + below)
        cv2.rectangle(canvas, *corners, color, cv2.FILLED)
        ink = (0, 0, 0) if np.dot(color, (0.299, 0.587, 0.114)) > 140 else (255, 255, 255)
        cv2.putText(canvas, text, (x, y), _FONT, font_scale, ink, max(1, line // 2), cv2.LINE_AA)
    return canvas


def _drawable(name: str, label: int) -> str:
    """What OpenCV's font can draw of a class name: all of it since 5.0, ASCII before."""
    if name.isascii() or hasattr(cv2, "FontFace"):
        return name
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().strip()
    return plain or f"class {label}"

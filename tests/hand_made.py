"""Labels and detections written out by hand, on images of 100 x 100."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from yolonas.data.labelled import LabelledImage
from yolonas.inference.detections import Detections

NAMES = ("cat", "dog")


def labelled(boxes: list, labels: list[int], crowd: list[bool] | None = None, image_id: int = 1) -> LabelledImage:
    return LabelledImage(
        Path(f"{image_id}.jpg"),
        np.array(boxes, dtype=np.float32).reshape(-1, 4),
        np.array(labels, dtype=np.int64),
        np.array(crowd or [False] * len(labels), dtype=bool),
        width=100,
        height=100,
        image_id=image_id,
    )


def found(boxes: list, scores: list[float], labels: list[int], names: tuple[str, ...] = NAMES) -> Detections:
    return Detections(boxes, scores, labels, names, (100, 100))

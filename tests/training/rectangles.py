"""Images of coloured rectangles, to train on in seconds."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from yolonas.data.labelled import LabelledImage, LabelledImages

COLOURS = {"red": (0, 0, 255), "green": (0, 255, 0), "blue": (255, 0, 0), "white": (255, 255, 255)}  # BGR
QUARTERS = np.array([[2, 2], [34, 2], [2, 34], [34, 34]])


def draw(
    folder: Path, count: int, names: tuple[str, ...] = ("red", "blue"), seed: int = 0, *, empty: bool = False
) -> LabelledImages:
    """Images 64 x 64, each with a rectangle of each name's colour, four at most; `empty`: without their labels."""
    rng, images = np.random.default_rng(seed), []
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        image = rng.integers(60, 120, (64, 64, 3), dtype=np.uint8)
        corners = QUARTERS[rng.permutation(4)[: len(names)]] + rng.integers(0, 12, (len(names), 2))
        boxes = np.concatenate([corners, corners + rng.integers(13, 17, corners.shape)], axis=1)
        for (x1, y1, x2, y2), name in zip(boxes.tolist(), names, strict=True):
            image[y1:y2, x1:x2] = COLOURS[name]
        path = folder / f"{'-'.join(names)}-{seed}-{k}.png"
        cv2.imwrite(str(path), image)
        kept = 0 if empty else len(names)
        boxes = boxes.astype(np.float32)[:kept]
        images.append(LabelledImage(path, boxes, np.arange(kept), np.zeros(kept, dtype=bool), 64, 64, k + 1))
    return LabelledImages(names, images)

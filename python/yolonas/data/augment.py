"""Random views of labelled images: flip, affine, mosaic and colour, drawn from one NumPy generator a sample.

Coordinates are edges of pixels: pixel (x, y) covers x..x+1, as in boxes. Every image reaches the canvas by one affine
matrix and one interpolation, in a mosaic too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from yolonas.inference._cv2 import cv2

Image = NDArray[np.uint8]
Boxes = NDArray[np.float32]
Labels = NDArray[np.int64]
Matrix = NDArray[np.float64]


class Labelled(NamedTuple):
    """An image uint8 [h, w, 3] with its boxes float32 [n, 4] xyxy px and labels int64 [n]."""

    image: Image
    boxes: Boxes
    labels: Labels


@dataclass(frozen=True)
class Augmentation:
    """How far views may differ from their image."""

    flip: float = 0.5  # probability of mirroring left and right
    hue: int = 5  # largest shift, of OpenCV's 180 hues
    saturation: float = 0.4  # largest change, as a share
    value: float = 0.3  # largest change, as a share
    translate: float = 0.1  # largest shift, as a share of the canvas
    scale: tuple[float, float] = (0.5, 1.5)  # of the letterboxed size
    degrees: float = 0.0  # largest rotation; boxes then enclose the rotated box, so they grow loose
    mosaic: float = 1.0  # probability of a view of four images
    min_visible: float = 0.2  # share of a box that must stay in view for it to be kept
    min_side: float = 2.0  # px that a box must keep


def single(rng: Generator, sample: Labelled, size: tuple[int, int], augmentation: Augmentation, pad: int) -> Labelled:
    """A random view of one image on a canvas of `size` (height, width), the rest filled with `pad`."""
    canvas = np.full((*size, 3), pad, dtype=np.uint8)
    height, width = size
    shift = rng.uniform(-augmentation.translate, augmentation.translate, 2) * (width, height)
    centre = np.array([width / 2, height / 2]) + shift
    matrix = _matrix(rng, sample.image, centre, rng.uniform(*augmentation.scale), augmentation)
    boxes, labels = _place(canvas, sample, matrix, (0, 0, width, height), augmentation)
    return Labelled(vary_colours(rng, canvas, augmentation), boxes, labels)


def mosaic(
    rng: Generator, samples: Sequence[Labelled], size: tuple[int, int], augmentation: Augmentation, pad: int
) -> Labelled:
    """A random view of four images that meet in one point of a canvas of `size` (height, width)."""
    if len(samples) != 4:
        raise ValueError(f"a mosaic takes 4 images, not {len(samples)}")
    canvas = np.full((*size, 3), pad, dtype=np.uint8)
    height, width = size
    x, y = (int(rng.uniform(0.25, 0.75) * extent) for extent in (width, height))
    regions = ((0, 0, x, y), (x, 0, width, y), (0, y, x, height), (x, y, width, height))
    boxes, labels = [], []
    for sample, region in zip(samples, regions, strict=True):
        scale = rng.uniform(*augmentation.scale)
        extent = np.array([region[2] - region[0], region[3] - region[1]], dtype=np.float64)
        # An image larger than its region shows a random part of it; a smaller one stands anywhere within.
        spare = np.array(sample.image.shape[1::-1]) * scale - extent
        centre = np.array(region[:2]) + extent / 2 + rng.uniform(-0.5, 0.5, 2) * spare
        matrix = _matrix(rng, sample.image, centre, scale, augmentation)
        placed = _place(canvas, sample, matrix, region, augmentation)
        boxes.append(placed[0])
        labels.append(placed[1])
    return Labelled(vary_colours(rng, canvas, augmentation), np.concatenate(boxes), np.concatenate(labels))


def transform_boxes(boxes: Boxes, matrix: Matrix) -> Boxes:
    """The axis-parallel boxes around boxes [n, 4] xyxy after an affine `matrix` [2, 3]."""
    corners = boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 4, 2).astype(np.float64)
    moved = corners @ matrix[:, :2].T + matrix[:, 2]
    return np.concatenate([moved.min(axis=1), moved.max(axis=1)], axis=1).astype(np.float32)


def vary_colours(rng: Generator, image: Image, augmentation: Augmentation) -> Image:
    """The RGB image with its hue shifted, its saturation and value scaled, each by a random amount."""
    limits = (augmentation.hue, augmentation.saturation, augmentation.value)
    hue, saturation, value = rng.uniform(-1, 1, 3) * limits
    if not any(limits):
        return image
    levels = np.arange(256)
    # Scaling leaves grey grey, where a shift of the saturation would show the noise of its hue.
    table = np.stack([(levels + round(hue)) % 180, levels * (1 + saturation), levels * (1 + value)], axis=-1)
    hsv = cv2.LUT(cv2.cvtColor(image, cv2.COLOR_RGB2HSV), np.clip(table, 0, 255).astype(np.uint8)[None])
    return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), dtype=np.uint8)


def _matrix(
    rng: Generator, image: Image, centre: NDArray[np.float64], scale: float, augmentation: Augmentation
) -> Matrix:
    """Affine [2, 3] that scales, turns and perhaps mirrors the image about its centre, which goes to `centre`."""
    angle = math.radians(rng.uniform(-augmentation.degrees, augmentation.degrees))
    mirror = -1.0 if rng.random() < augmentation.flip else 1.0
    cos, sin = scale * math.cos(angle), scale * math.sin(angle)
    linear = np.array([[mirror * cos, -sin], [mirror * sin, cos]])
    middle = np.array(image.shape[1::-1]) / 2
    return np.column_stack([linear, centre - linear @ middle])


def _place(
    canvas: Image, sample: Labelled, matrix: Matrix, region: tuple[int, int, int, int], augmentation: Augmentation
) -> tuple[Boxes, Labels]:
    """Draw the image into `region` (xyxy) of the canvas, in place; returns what boxes are still in view, and labels."""
    left, top, right, bottom = region
    pad = canvas[top, left].tolist()
    # OpenCV's coordinates are centres of pixels, half a pixel off from edges; the region starts at (left, top).
    to_pixels = matrix.copy()
    to_pixels[:, 2] += matrix[:, :2] @ (0.5, 0.5) - (0.5, 0.5) - (left, top)
    canvas[top:bottom, left:right] = cv2.warpAffine(
        sample.image,
        to_pixels,
        (right - left, bottom - top),
        flags=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=pad,
    )
    moved = transform_boxes(sample.boxes, matrix)
    seen = np.clip(moved, (left, top, left, top), (right, bottom, right, bottom)).astype(np.float32)
    sides, full = seen[:, 2:] - seen[:, :2], moved[:, 2:] - moved[:, :2]
    visible = sides.prod(axis=1) >= augmentation.min_visible * full.prod(axis=1)
    keep = visible & (sides >= augmentation.min_side).all(axis=1)
    return seen[keep], sample.labels[keep]

"""Random views of labelled images: mosaic, flip, affine, colour and mixup, drawn from one NumPy generator a sample.

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
    """How far views may differ from their image. Raises ValueError for numbers out of range."""

    flip: float = 0.5  # probability of mirroring left and right
    colours: float = 1.0  # probability of the next four
    hue: int = 5  # largest shift, of OpenCV's 180 hues
    saturation: float = 0.4  # largest change, as a share of what it was
    value: float = 0.3  # largest change, as a share of what it was
    added: bool = False  # saturation and value are levels of 255 to add; hue and both each change every other time
    swap: float = 0.0  # probability of exchanging red and blue
    translate: float = 0.1  # largest shift, as a share of the canvas
    scale: tuple[float, float] = (0.5, 1.5)  # of the letterboxed size
    degrees: float = 0.0  # largest rotation; boxes then enclose the rotated box, so they grow loose
    mosaic: float = 1.0  # probability of a view of four images
    mixup: float = 0.0  # probability of blending in another image, half and half
    mixup_scale: tuple[float, float] = (0.5, 1.5)  # of the letterboxed size of that image
    min_visible: float = 0.2  # share of a box that must stay in view for it to be kept
    min_side: float = 2.0  # px that a box must keep
    max_aspect: float | None = None  # of the long side of a box to the short one
    pad: int | None = None  # what surrounds the image; None: the pad value of the preprocessing

    def __post_init__(self) -> None:
        for name in ("flip", "colours", "swap", "mosaic", "mixup", "min_visible"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in 0..1, not {getattr(self, name)}")
        for name in ("scale", "mixup_scale"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} must be two positive numbers in order, not {low}, {high}")
        if self.pad is not None and not 0 <= self.pad <= 255:
            raise ValueError(f"pad must lie in 0..255, not {self.pad}")


def single(rng: Generator, sample: Labelled, size: tuple[int, int], augmentation: Augmentation, pad: int) -> Labelled:
    """A random view of one image on a canvas of `size` (height, width), the rest filled with `pad`.

    Boxes that the source image or the canvas cuts are cut with it, and dropped where too little is left of them.
    """
    height, width = size
    shift = rng.uniform(-augmentation.translate, augmentation.translate, 2) * (width, height)
    centre = np.array([width / 2, height / 2]) + shift
    scale = rng.uniform(*augmentation.scale)
    angle = math.radians(rng.uniform(-augmentation.degrees, augmentation.degrees))
    mirror = -1.0 if rng.random() < augmentation.flip else 1.0
    cos, sin = scale * math.cos(angle), scale * math.sin(angle)
    linear = np.array([[mirror * cos, -sin], [mirror * sin, cos]])
    middle = np.array(sample.image.shape[1::-1]) / 2
    matrix = np.column_stack([linear, centre - linear @ middle])
    canvas = _warp(sample.image, matrix, size, pad)
    boxes, labels = _in_view(sample, matrix, size, augmentation)
    return Labelled(vary_colours(rng, canvas, augmentation), boxes, labels)


def mosaic(rng: Generator, samples: Sequence[Labelled], size: tuple[int, int], pad: int) -> Labelled:
    """Four images around a random point of a canvas twice as high and wide as `size` (height, width).

    The point lies in the middle half of the canvas. What juts out of it is cut, but boxes keep their full size, so that
    `single`, which is to follow, knows how much of them is cut. Source: YOLOX, arXiv 2107.08430.
    """
    if len(samples) != 4:
        raise ValueError(f"a mosaic takes 4 images, not {len(samples)}")
    height, width = 2 * size[0], 2 * size[1]
    canvas = np.full((height, width, 3), pad, dtype=np.uint8)
    x, y = (int(rng.uniform(0.25, 0.75) * extent) for extent in (width, height))
    boxes = []
    for place, sample in enumerate(samples):
        h, w = sample.image.shape[:2]
        left, top = x - w if place % 2 == 0 else x, y - h if place < 2 else y
        x1, y1, x2, y2 = max(left, 0), max(top, 0), min(left + w, width), min(top + h, height)
        canvas[y1:y2, x1:x2] = sample.image[y1 - top : y2 - top, x1 - left : x2 - left]
        boxes.append(sample.boxes + np.array([left, top, left, top], dtype=np.float32))
    return Labelled(canvas, np.concatenate(boxes), np.concatenate([sample.labels for sample in samples]))


def mixup(rng: Generator, view: Labelled, other: Labelled, augmentation: Augmentation, pad: int) -> Labelled:
    """The view with another image blended in, half and half, and the boxes of both.

    The other image is placed in the upper left corner of a canvas filled with `pad`, mirrored with the probability
    `flip` and scaled with that canvas by a factor from `mixup_scale`: a larger canvas shows a random part, a smaller
    one leaves black beside it. Source: super-gradients' DetectionMixup, after YOLOX.
    """
    height, width = view.image.shape[:2]
    scale = rng.uniform(*augmentation.mixup_scale)
    mirror = rng.random() < augmentation.flip
    left, top = (rng.uniform(0, max(extent * (scale - 1), 0)) for extent in (width, height))
    across = [-scale, 0, scale * other.image.shape[1] - left] if mirror else [scale, 0, -left]
    matrix = np.array([across, [0, scale, -top]])
    canvas = _warp(other.image, matrix, (height, width), pad)
    canvas[:, round(width * scale) :] = 0
    canvas[round(height * scale) :] = 0
    boxes, labels = _in_view(other, matrix, (height, width), augmentation)
    return Labelled(
        np.asarray(cv2.addWeighted(view.image, 0.5, canvas, 0.5, 0), dtype=np.uint8),
        np.concatenate([view.boxes, boxes]),
        np.concatenate([view.labels, labels]),
    )


def transform_boxes(boxes: Boxes, matrix: Matrix) -> Boxes:
    """The axis-parallel boxes around boxes [n, 4] xyxy after an affine `matrix` [2, 3]."""
    corners = boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 4, 2).astype(np.float64)
    moved = corners @ matrix[:, :2].T + matrix[:, 2]
    return np.concatenate([moved.min(axis=1), moved.max(axis=1)], axis=1).astype(np.float32)


def vary_colours(rng: Generator, image: Image, augmentation: Augmentation) -> Image:
    """The RGB image with red and blue perhaps exchanged, and random changes of hue, saturation and value."""
    if rng.random() < augmentation.swap:
        image = np.ascontiguousarray(image[..., ::-1])
    limits = (augmentation.hue, augmentation.saturation, augmentation.value)
    change, changed = rng.random() < augmentation.colours, rng.integers(0, 2, 3)
    hue, saturation, value = rng.uniform(-1, 1, 3) * limits * (changed if augmentation.added else 1)
    if not (change and any(limits)):
        return image
    levels = np.arange(256)
    if augmentation.added:
        table = np.stack([(levels + int(hue)) % 180, levels + int(saturation), levels + int(value)], axis=-1)
    else:  # scaling leaves grey grey, where adding to the saturation shows the noise of its hue
        table = np.stack([(levels + round(hue)) % 180, levels * (1 + saturation), levels * (1 + value)], axis=-1)
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    cv2.LUT(hsv, np.clip(table, 0, 255).astype(np.uint8)[None], dst=hsv)
    return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), dtype=np.uint8)


def _warp(image: Image, matrix: Matrix, size: tuple[int, int], pad: int) -> Image:
    """The image after an affine `matrix` [2, 3], on a canvas of `size` (height, width)."""
    # OpenCV's coordinates are centres of pixels, half a pixel off from edges.
    to_pixels = matrix.copy()
    to_pixels[:, 2] += matrix[:, :2] @ (0.5, 0.5) - (0.5, 0.5)
    warped = cv2.warpAffine(
        image, to_pixels, size[::-1], flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=(pad,) * 3
    )
    return np.asarray(warped, dtype=np.uint8)


def _in_view(
    sample: Labelled, matrix: Matrix, size: tuple[int, int], augmentation: Augmentation
) -> tuple[Boxes, Labels]:
    """The boxes of an image that are in view after `matrix` on a canvas of `size`, cut to it, and their labels."""
    image_height, image_width = sample.image.shape[:2]
    inside = sample.boxes.clip(0, np.array([image_width, image_height] * 2, dtype=np.float32))
    full = transform_boxes(sample.boxes, matrix)
    seen = transform_boxes(inside, matrix).clip(0, np.array([size[1], size[0]] * 2, dtype=np.float32))
    sides, full_sides = seen[:, 2:] - seen[:, :2], full[:, 2:] - full[:, :2]
    area = sides.prod(axis=1)
    # A box of less than one px is dropped by the reference too, whatever its filter says.
    keep = (area >= 1) & (area >= augmentation.min_visible * full_sides.prod(axis=1))
    keep &= (sides >= augmentation.min_side).all(axis=1)
    if augmentation.max_aspect is not None:
        keep &= sides.max(axis=1) <= augmentation.max_aspect * sides.min(axis=1)
    return seen[keep], sample.labels[keep]

"""Fitting an image into the network's canvas, and boxes back into the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from yolonas.inference._cv2 import cv2

if TYPE_CHECKING:
    from yolonas.model.config import Preprocessing


@dataclass(frozen=True)
class Placement:
    """Where an image lies on its canvas: canvas px = image px * scale + (left, top).

    `scale` is the one before the resized size was rounded to whole pixels, as in the reference.
    """

    scale: float
    left: int
    top: int
    height: int  # of the image
    width: int

    def to_image(self, boxes: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Boxes [n, 4] xyxy canvas px -> float32 [n, 4] xyxy image px, clipped to the image."""
        canvas = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
        image = (canvas - [self.left, self.top, self.left, self.top]) / self.scale
        return np.clip(image, 0, [self.width, self.height, self.width, self.height]).astype(np.float32)

    def to_canvas(self, boxes: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Boxes [n, 4] xyxy image px -> float32 [n, 4] xyxy canvas px, not clipped."""
        image = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
        return (image * self.scale + [self.left, self.top, self.left, self.top]).astype(np.float32)


def letterbox(image: npt.NDArray[np.uint8], preprocessing: Preprocessing) -> tuple[npt.NDArray[np.uint8], Placement]:
    """Resize an image so that its longest side is `preprocessing.resize_to`, and pad it to the canvas.

    image: uint8 [h, w, 3] RGB. Returns the canvas, uint8 [H, W, 3] with channels in `preprocessing.channels` order, and
    the placement that takes boxes back. Equal to the last bit to the preprocessing of super-gradients' `predict()`.
    Raises ValueError for what is no such image.
    """
    resized, placement = _resized(image, preprocessing)
    if preprocessing.channels == "bgr":
        resized = resized[..., ::-1]
    canvas = np.full((*preprocessing.image_size, 3), preprocessing.pad_value, dtype=np.uint8)
    height, width = resized.shape[:2]
    canvas[placement.top : placement.top + height, placement.left : placement.left + width] = resized
    return canvas, placement


def letterbox_into(
    canvas: npt.NDArray[np.uint8], image: npt.NDArray[np.uint8], preprocessing: Preprocessing
) -> Placement:
    """`letterbox`, written into a canvas that the network takes as it is: uint8 [3, H, W], each plane contiguous.

    The resized pixels go straight to their places in the planes, and only the border is filled.
    """
    resized, placement = _resized(image, preprocessing)
    height, width = resized.shape[:2]
    top, left = placement.top, placement.left
    bottom, right = top + height, left + width
    canvas[:, :top] = canvas[:, bottom:] = preprocessing.pad_value
    canvas[:, top:bottom, :left] = canvas[:, top:bottom, right:] = preprocessing.pad_value
    for plane, channel in zip(canvas, (2, 1, 0) if preprocessing.channels == "bgr" else (0, 1, 2), strict=True):
        cv2.extractChannel(resized, channel, plane[top:bottom, left:right])
    return placement


def _resized(image: npt.NDArray[np.uint8], preprocessing: Preprocessing) -> tuple[npt.NDArray[np.uint8], Placement]:
    """The image in the size that it has on the canvas, and where it lies there."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
        raise ValueError(f"an image must be uint8 [h, w, 3] RGB, not {image.dtype} {list(image.shape)}")
    (height, width), (canvas_height, canvas_width) = image.shape[:2], preprocessing.image_size
    scale = preprocessing.scale(height, width)
    whole = round if preprocessing.rounding == "round" else int
    new_height, new_width = max(whole(height * scale), 1), max(whole(width * scale), 1)
    resized: Any = image
    if (new_height, new_width) != (height, width):
        resized = cv2.resize(image, (new_width, new_height), interpolation=cv2.INTER_LINEAR)
    center = preprocessing.pad == "center"
    top = (canvas_height - new_height) // 2 if center else 0
    left = (canvas_width - new_width) // 2 if center else 0
    return resized, Placement(scale, left, top, height, width)

"""Checks shared by the torch and the NumPy door: every message names the value and what is wanted."""

from __future__ import annotations

import operator
from collections.abc import Sequence


def threshold(value: float, name: str) -> float:
    """A number in 0..1, or ValueError."""
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number from 0 to 1, not {value!r}")
    number = float(value)
    if not 0.0 <= number <= 1.0:  # false for NaN too
        raise ValueError(f"{name} must be from 0 to 1, not {number}")
    return number


def positive(value: int, name: str, most: int = 2**63 - 1) -> int:
    """An integer from 1 to `most`, or ValueError."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be a positive integer, not {value!r}")
    number = operator.index(value)
    if number < 1:
        raise ValueError(f"{name} must be a positive integer, not {number}")
    if number > most:
        raise ValueError(f"{name} must be at most {most}, not {number}")
    return number


def numbers(strides: Sequence[float]) -> list[float]:
    """Strides as floats, or TypeError."""
    try:
        return [float(stride) for stride in strides]
    except (TypeError, ValueError):
        raise TypeError(f"strides must be a list with a number per level, not {strides!r}") from None


def level_strides(strides: Sequence[float], levels: int, most: int) -> list[float]:
    """One stride for each level, positive and finite in float32, or ValueError."""
    result = numbers(strides)
    if not 1 <= levels <= most:
        raise ValueError(f"expected 1 to {most} levels of logits, not {levels}")
    if len(result) != levels:
        raise ValueError(f"expected one stride for each of the {levels} levels, not {result}")
    for stride in result:
        if not 2.0**-126 <= stride <= 2.0**127:  # false for NaN too
            raise ValueError(f"strides must be positive and finite in float32, not {result}")
    return result


Shape = Sequence[int]


def box_shapes(shapes: Sequence[Shape]) -> tuple[int, int]:
    """Shapes [B, 4 * bins, h, w] of every level -> (B, bins), or ValueError."""
    first = shapes[0]
    for level, shape in enumerate(shapes):
        if len(shape) != 4:
            raise ValueError(f"box_logits[{level}] must be [B, 4 * bins, h, w], not of shape {list(shape)}")
        batch, channels, _, _ = shape
        if channels < 4 or channels % 4:
            raise ValueError(
                f"box_logits[{level}] must have 4 * bins channels, not {channels} (of shape {list(shape)})"
            )
        if batch != first[0] or channels != first[1]:
            raise ValueError(
                f"box_logits[{level}] has shape {list(shape)}, but box_logits[0] has {list(first)}: "
                "all levels must agree in batch and channels"
            )
    return first[0], first[1] // 4


def class_shapes(shapes: Sequence[Shape], box_logits: Sequence[Shape]) -> int:
    """Shapes [B, num_classes, h, w] of every level, matching the box logits' -> num_classes, or ValueError."""
    if len(shapes) != len(box_logits):
        raise ValueError(
            f"class_logits and box_logits must have the same levels, not {len(shapes)} and {len(box_logits)}"
        )
    classes, anchors = 0, 0
    for level, (shape, box) in enumerate(zip(shapes, box_logits, strict=True)):
        if len(shape) != 4:
            raise ValueError(f"class_logits[{level}] must be [B, num_classes, h, w], not of shape {list(shape)}")
        (batch, channels, height, width), (box_batch, _, box_height, box_width) = shape, box
        classes = classes if level else channels
        if channels < 1 or channels != classes:
            raise ValueError(
                f"class_logits[{level}] has shape {list(shape)}, but class_logits[0] has {list(shapes[0])}: "
                "all levels must have the same number of classes, at least 1"
            )
        if batch != box_batch or height != box_height or width != box_width:
            raise ValueError(
                f"class_logits[{level}] of shape {list(shape)} and box_logits[{level}] of shape {list(box)} "
                "must agree in batch, height and width"
            )
        anchors += height * width
    if anchors * classes >= 2**32:
        raise ValueError(f"{anchors} anchors of {classes} classes exceed the limit of 2**32 candidates an image")
    return classes


def nms_shapes(boxes: Shape, scores: Shape, labels: Shape | None = None) -> None:
    """Shapes boxes [N, 4], scores [N], labels [N], or ValueError."""
    if len(boxes) != 2 or boxes[1] != 4:
        raise ValueError(f"boxes must be [N, 4], not of shape {list(boxes)}")
    for name, shape in (("scores", scores), ("labels", labels)):
        if shape is not None and (len(shape) != 1 or shape[0] != boxes[0]):
            raise ValueError(f"{name} must be [N] with N = {boxes[0]} boxes, not of shape {list(shape)}")

"""The numbers of YOLO-NAS S, M, L (and our own N), and how an image becomes the network's input."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from yolonas.errors import OptionError

REG_MAX = 16
STRIDES = (8, 16, 32)
BIT_DEPTH = 255.0


@dataclass(frozen=True)
class Stage:
    """One backbone stage: a stride-2 QARepVGG to `channels`, then a CSP layer of `blocks` bottlenecks `hidden` wide."""

    channels: int
    blocks: int
    hidden: int
    concat: bool  # conv3 of the CSP layer sees the output of every bottleneck, not only of the last


@dataclass(frozen=True)
class NeckStage:
    """One neck stage: its output channels and the bottlenecks of its CSP layer."""

    channels: int
    blocks: int
    hidden: int


@dataclass(frozen=True)
class Variant:
    """The size of a YOLO-NAS; S, M and L are the published architectures (Deci, 2023), N is ours."""

    stem: int
    stages: tuple[Stage, Stage, Stage, Stage]  # strides 4, 8, 16, 32
    neck: tuple[NeckStage, NeckStage, NeckStage, NeckStage]  # up to 16, up to 8, down to 16, down to 32
    head: tuple[int, int, int]  # channels inside the head of strides 8, 16, 32


VARIANTS: dict[str, Variant] = {
    # Ours: for tests, demos and the edge; 1.1 M parameters and 1.3 GMACs at 640 px, so a CPU trains it in minutes.
    "n": Variant(
        stem=16,
        stages=(Stage(24, 1, 8, False), Stage(48, 2, 24, False), Stage(96, 2, 48, False), Stage(192, 1, 64, False)),
        neck=(NeckStage(48, 1, 32), NeckStage(24, 1, 16), NeckStage(48, 1, 32), NeckStage(96, 1, 48)),
        head=(24, 48, 64),
    ),
    "s": Variant(
        stem=48,
        stages=(Stage(96, 2, 32, False), Stage(192, 3, 64, False), Stage(384, 5, 96, False), Stage(768, 2, 192, False)),
        neck=(NeckStage(192, 2, 64), NeckStage(96, 2, 48), NeckStage(192, 2, 64), NeckStage(384, 2, 64)),
        head=(64, 128, 256),
    ),
    "m": Variant(
        stem=48,
        stages=(Stage(96, 2, 64, True), Stage(192, 3, 128, True), Stage(384, 5, 256, True), Stage(768, 2, 384, False)),
        neck=(NeckStage(192, 2, 192), NeckStage(96, 3, 64), NeckStage(192, 2, 192), NeckStage(384, 3, 256)),
        head=(96, 192, 384),
    ),
    "l": Variant(
        stem=48,
        stages=(Stage(96, 2, 96, True), Stage(192, 3, 128, True), Stage(384, 5, 256, True), Stage(768, 2, 512, True)),
        neck=(NeckStage(192, 4, 128), NeckStage(96, 4, 128), NeckStage(192, 4, 128), NeckStage(384, 4, 256)),
        head=(128, 256, 512),
    ),
}


@dataclass(frozen=True)
class Preprocessing:
    """How an RGB uint8 image becomes the network's input; the defaults are those of the published COCO weights.

    The image is resized by `scale(height, width)` (bilinear), padded with `pad_value` to the canvas `image_size`
    (height, width), reordered to `channels`, divided by 255 and, where `mean` and `std` are given, normalized with
    them (per channel, in the order of `channels`, in units of the 0..1 image).
    """

    image_size: tuple[int, int] = (640, 640)
    resize_to: int = 636
    rounding: Literal["round", "int"] = "round"
    pad: Literal["center", "bottom_right"] = "center"
    pad_value: int = 114
    channels: Literal["rgb", "bgr"] = "rgb"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        height, width = self.image_size
        if height < 32 or width < 32 or height % 32 or width % 32:
            raise ValueError(f"image_size {height}x{width} must be multiples of 32, at least 32")
        if not 1 <= self.resize_to <= max(height, width):
            raise ValueError(f"resize_to {self.resize_to} must lie in 1..{max(height, width)}, inside the canvas")
        if not 0 <= self.pad_value <= 255:
            raise ValueError(f"pad_value {self.pad_value} must lie in 0..255")
        choices = {"rounding": ("round", "int"), "pad": ("center", "bottom_right"), "channels": ("rgb", "bgr")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} {getattr(self, name)!r} must be one of {allowed}")
        for name in ("mean", "std"):
            value = getattr(self, name)
            if value is not None and (len(value) != 3 or not all(map(math.isfinite, value))):
                raise ValueError(f"{name} {value} must have three numbers, one for each channel")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"std {self.std} must be positive")

    @classmethod
    def square(cls, size: int) -> Preprocessing:
        """The preprocessing of models trained here: a centred letterbox that fills a `size` x `size` canvas."""
        return cls(image_size=(size, size), resize_to=size)

    def on_canvas(self, size: int | tuple[int, int]) -> Preprocessing:
        """The same on a canvas of another side, or (height, width): the margin around the image grows with it.

        Raises OptionError, a ValueError, where the size is no multiple of 32.
        """
        height, width = (size, size) if isinstance(size, int) else size
        if min(height, width) < 32 or height % 32 or width % 32:
            raise OptionError(f"imgsz {size} must be a multiple of 32, at least 32")
        resize_to = round(self.resize_to * max(height, width) / max(self.image_size))
        return replace(self, image_size=(height, width), resize_to=resize_to)

    def scale(self, height: int, width: int) -> float:
        """The factor that brings an image of `height` x `width` px to `resize_to` and inside the canvas."""
        return min(
            self.resize_to / height, self.resize_to / width, self.image_size[0] / height, self.image_size[1] / width
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """The inverse of `to_dict`; a missing field takes its default, an unknown one raises ValueError."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"preprocessing has unknown fields {unknown}; known are {sorted(known)}")
        arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**arguments)


# fmt: off
COCO_NAMES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
    "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee",
    "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple",
    "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch",
    "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard", "cell phone",
    "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear",
    "hair drier", "toothbrush",
)
# fmt: on


def default_names(num_classes: int) -> tuple[str, ...]:
    """COCO's names for 80 classes, otherwise class_0, class_1, ..."""
    return COCO_NAMES if num_classes == len(COCO_NAMES) else tuple(f"class_{i}" for i in range(num_classes))

"""Images with their true boxes, as every reader returns them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt


class Remark(str):
    """A line on one entry of a data set, and in `subject` what such lines have in common: "boxes without area"."""

    subject: str

    def __new__(cls, line: str, subject: str = "entries") -> Remark:
        remark = super().__new__(cls, line)
        remark.subject = subject
        return remark


@dataclass(frozen=True, eq=False)
class LabelledImage:
    """One image and its objects.

    boxes: float32 [n, 4] xyxy, pixels of the image after EXIF transposition, inside it, of positive size; labels: int64
    [n], indices into the data set's names; crowd: bool [n], regions in which detections count neither right nor wrong.
    No box at all is a statement too: there is nothing in the image.
    """

    path: Path
    boxes: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    crowd: npt.NDArray[np.bool_]
    width: int
    height: int
    image_id: int
    digest: bytes = b""  # of the file's content; empty before `yolonas.data.check.usable`


@dataclass(eq=False)
class LabelledImages:
    """A data set, or a part of one: class names, images, and a line on everything that was left out or changed.

    The lines are `Remark`s where they come from a reader.
    """

    names: tuple[str, ...]
    images: list[LabelledImage]
    dropped: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)  # kept, but not as it was written: a box cut to its image

    def __len__(self) -> int:
        return len(self.images)

    @property
    def objects(self) -> int:
        """How many boxes there are that must be found; crowd regions are not among them."""
        return sum(int((~image.crowd).sum()) for image in self.images)

    def to_coco(self) -> dict[str, Any]:
        """The data set as COCO json's dict; category ids are label + 1, `area` is the box's, as masks are not read."""
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for image in self.images:
            images.append(
                {"id": image.image_id, "file_name": str(image.path), "width": image.width, "height": image.height}
            )
            for box, label, crowd in zip(
                image.boxes.tolist(), image.labels.tolist(), image.crowd.tolist(), strict=True
            ):
                x, y, width, height = box[0], box[1], box[2] - box[0], box[3] - box[1]
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image.image_id,
                        "category_id": label + 1,
                        "bbox": [x, y, width, height],
                        "area": width * height,
                        "iscrowd": int(crowd),
                    }
                )
        categories = [{"id": label + 1, "name": name} for label, name in enumerate(self.names)]
        return {"images": images, "annotations": annotations, "categories": categories}


_SLACK = 1.0  # px; rounded numbers reach that far over an image's edge, and are not worth a line


@dataclass
class BoxList:
    """The boxes of one image as a reader meets them: checked and clipped when added, arrays at the end."""

    where: str  # the file or the image's name, for the remarks
    width: int
    height: int
    dropped: list[str]
    changed: list[str]
    rows: dict[tuple[float, float, float, float, int, bool], None] = field(default_factory=dict)  # an ordered set

    def add(self, box: Sequence[float], label: int, crowd: bool = False) -> None:
        """Add a box, xyxy image px; what is no box inside the image is listed in `dropped` instead."""
        x1, y1, x2, y2 = box
        shown = f"{self.where}: box [{', '.join(f'{v:g}' for v in box)}]"
        size = f"the image of {self.width}x{self.height}"
        if not np.isfinite(box).all():
            self.dropped.append(Remark(f"{shown} has no area", "boxes whose numbers are not finite"))
            return
        if x2 <= x1 or y2 <= y1:
            self.dropped.append(Remark(f"{shown} has no area", "boxes without area"))
            return
        over = max(-x1, -y1, x2 - self.width, y2 - self.height)
        x1, x2 = np.clip([x1, x2], 0, self.width).astype(np.float32).tolist()
        y1, y2 = np.clip([y1, y2], 0, self.height).astype(np.float32).tolist()
        if x2 <= x1 or y2 <= y1:
            self.dropped.append(Remark(f"{shown} lies outside {size}", "boxes outside their image"))
        elif (row := (x1, y1, x2, y2, label, crowd)) in self.rows:
            self.dropped.append(Remark(f"{shown} is there twice", "boxes that are there twice"))
        else:
            self.rows[row] = None
            if over > _SLACK:
                self.changed.append(Remark(f"{shown} is cut to {size}", "boxes that reach out of their image, now cut"))

    def labelled(self, path: Path, image_id: int) -> LabelledImage:
        """The image with the boxes added so far."""
        rows = list(self.rows)
        return LabelledImage(
            path=path,
            boxes=np.array([row[:4] for row in rows], dtype=np.float32).reshape(-1, 4),
            labels=np.array([row[4] for row in rows], dtype=np.int64),
            crowd=np.array([row[5] for row in rows], dtype=bool),
            width=self.width,
            height=self.height,
            image_id=image_id,
        )

"""A project to try the loop on: drawn images of metal parts, some of them labelled from their ground truth."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from xml.sax.saxutils import quoteattr

import numpy as np

from labelstudio_backend.client import LabelStudio
from yolonas.data.labelled import LabelledImage

TITLE = "Parts (sample of yolonas)"
COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#46f0f0", "#f032e6", "#bcf60c")
_UPLOADS = 20  # files in one request


def label_config(names: Sequence[str], **attributes: str) -> str:
    """A label config with one RectangleLabels tag `label` on one Image; `attributes` go on the tag."""
    extra = "".join(f' {name}="{value}"' for name, value in attributes.items())
    labels = "".join(
        f'    <Label value={quoteattr(name)} background="{COLOURS[n % len(COLOURS)]}"/>\n'
        for n, name in enumerate(names)
    )
    return (
        '<View>\n  <Image name="image" value="$image" zoom="true"/>\n'
        f'  <RectangleLabels name="label" toName="image"{extra}>\n{labels}  </RectangleLabels>\n</View>\n'
    )


def upload(
    client: LabelStudio, project: int, paths: Sequence[Path], on_images: Callable[[int], object] = lambda count: None
) -> list[int]:
    """Upload the images that are not there, one task each; returns the task of every image, in the images' order.

    `on_images` is told of each portion how many images it has.
    """
    there = _tasks_by_name(client, project)
    missing = [path for path in paths if _stored(path) not in there]
    on_images(len(paths) - len(missing))
    for start in range(0, len(missing), _UPLOADS):
        part = missing[start : start + _UPLOADS]
        client.upload_files(project, [(path.name, path.read_bytes()) for path in part])
        on_images(len(part))
    there = _tasks_by_name(client, project)
    return [there[_stored(path)] for path in paths]


def _tasks_by_name(client: LabelStudio, project: int) -> dict[str, int]:
    return {
        unquote(str(task["data"]["image"])).rpartition("/")[2].partition("-")[2]: int(task["id"])
        for task in client.iter_tasks(project, fields="task_only")
    }


def _stored(path: Path) -> str:
    """What Label Studio makes of a file's name behind "<8 hex digits>-": Django's valid name."""
    return re.sub(r"[^-\w.]", "", path.name.strip().replace(" ", "_"))


def annotate(client: LabelStudio, task: int, image: LabelledImage, names: Sequence[str], **values: Any) -> None:
    """Submit an image's true boxes as an annotation of the task; `values` go to the API with it."""
    client.create_annotation(task, regions(image, names), **values)


def regions(image: LabelledImage, names: Sequence[str]) -> list[dict[str, Any]]:
    """The boxes of an image as Label Studio's regions, percent of the image."""
    size = np.array([image.width, image.height, image.width, image.height], dtype=np.float64)
    found = []
    for box, label in zip(image.boxes.astype(np.float64) * 100 / size, image.labels.tolist(), strict=True):
        x, y, right, bottom = (float(v) for v in box)
        value = {"x": x, "y": y, "width": right - x, "height": bottom - y, "rotation": 0}
        found.append(
            {
                "id": uuid.uuid4().hex[:10],
                "type": "rectanglelabels",
                "from_name": "label",
                "to_name": "image",
                "original_width": image.width,
                "original_height": image.height,
                "image_rotation": 0,
                "value": {**value, "rectanglelabels": [names[label]]},
            }
        )
    return found

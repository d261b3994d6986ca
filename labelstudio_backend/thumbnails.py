"""Small pictures of the tasks to label next, for the dashboard."""

from __future__ import annotations

from collections import OrderedDict

from labelstudio_backend.asked import read_task_image
from labelstudio_backend.mapping import served_controls
from labelstudio_backend.media import MediaCache
from labelstudio_backend.overview import Overview
from labelstudio_backend.registry import Registry
from yolonas.errors import YolonasError
from yolonas.labelstudio import Control

THUMBNAIL_SIDE = 360  # px of the longer side
THUMBNAILS_KEPT = 200  # some 15 kB each


def shown_control(label_config: str | None) -> Control | None:
    """The control on whose image a task is shown: of several the first; None where no image is predicted."""
    try:
        controls = served_controls(label_config)
    except YolonasError:  # which the page says beside the labels
        return None
    return next((control for control in controls if control.media == "image"), None)


class Thumbnails:
    """JPEGs of the images of the tasks that `overview` saw to be next; the latest are kept."""

    def __init__(self, registry: Registry, media: MediaCache, overview: Overview) -> None:
        self._registry, self._media, self._overview = registry, media, overview
        self._kept: OrderedDict[tuple[str, int], bytes] = OrderedDict()

    def get(self, key: str, task_id: int) -> bytes | None:
        """The JPEG of a task's image; None where the task is not among the next, or has no image.

        Raises YolonasError where the image cannot be had or read, RegistryError where there is no such project.
        """
        content = self._kept.get((key, task_id)) or self._draw(key, task_id)
        if content is not None:
            self._kept[key, task_id] = content
        while len(self._kept) > THUMBNAILS_KEPT:
            self._kept.popitem(last=False)
        return content

    def _draw(self, key: str, task_id: int) -> bytes | None:
        from yolonas.inference._cv2 import cv2

        project = self._registry.project(key)
        task = next((task for task in self._overview.get(key).next_tasks or () if task.get("id") == task_id), None)
        control = shown_control(project.label_config)
        value = control.task_value(task.get("data") or {}) if task is not None and control is not None else None
        if value is None:
            return None
        image = read_task_image(self._media, value, task_id, *project.origin())
        scale = min(1.0, THUMBNAIL_SIDE / max(image.shape[:2]))
        size = [max(1, round(side * scale)) for side in image.shape[1::-1]]
        small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        ok, content = cv2.imencode(".jpg", small[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 82])
        if not ok:
            raise YolonasError(f"the image of task {task_id} could not be made smaller")
        return bytes(content)

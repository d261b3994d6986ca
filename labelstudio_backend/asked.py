"""One /predict request: what is asked, how urgently, and why tasks of it have no answer."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from labelstudio_backend.media import MediaCache, MediaError, brief
from labelstudio_backend.registry import ProjectRegistry
from labelstudio_backend.scheduler import Level, Picture
from yolonas.errors import DataError

logger = logging.getLogger(__name__)

REASONS = 10  # of failed tasks, logged for one request


@dataclass
class Asked:
    """A request. seconds: it may take; gone: done once nobody waits for the answer any more."""

    project: ProjectRegistry
    tasks: list[Mapping[str, Any]]
    level: Level
    seconds: float
    gone: Future[None]
    reasons: dict[int, str] = field(default_factory=dict)  # by index of the task
    late: set[int] = field(default_factory=set)  # tasks, by index, that were not reached in time
    passing: set[int] = field(default_factory=set)  # tasks, by index, whose image may be had a little later

    def __post_init__(self) -> None:
        self.deadline = time.monotonic() + self.seconds
        self.uid, self.hostname = self.project.origin()

    def numbers(self, indices: Iterable[int] | None = None) -> list[int]:
        """Label Studio's numbers of these tasks, or of all, where they have one."""
        found = (self.number(index) for index in (range(len(self.tasks)) if indices is None else indices))
        return [number for number in found if number is not None]

    def number(self, index: int) -> int | None:
        number = self.tasks[index].get("id")
        return number if isinstance(number, int) else None

    def picture(self, index: int, value: str, media: MediaCache) -> Picture:
        """The image `value` of a task, to be read when its turn has come: uint8 RGB [h, w, 3], EXIF-transposed."""

        number = self.number(index)
        return Picture(  # equal values of two projects may be two images
            (self.project.key, value), lambda: read_task_image(media, value, number, self.uid, self.hostname)
        )

    def not_reached(self, index: int) -> None:
        """Note that the deadline, or that nobody waits any more, came before the task's turn."""
        self.late.add(index)
        sentence = f"not reached in {self.seconds:g} s (YOLONAS_PREDICT_SECONDS); it will be asked again"
        self.reasons.setdefault(index, sentence)

    def failed(self, index: int, error: BaseException) -> None:
        """Note why a task has no answer."""
        self.reasons.setdefault(index, str(error))
        if isinstance(error, MediaError) and error.passing:
            self.passing.add(index)

    def report(self, version: str, results: list[Any]) -> None:
        """Log how many tasks were predicted, and why the others were not."""
        key = self.project.key
        if self.gone.done():
            logger.info("project %s: nobody waits for %d tasks any more", key, len(self.tasks))
            return
        done = sum(isinstance(result, dict) for result in results)
        logger.info("project %s: %d of %d tasks predicted by %s", key, done, len(self.tasks), version)
        grouped: dict[str, list[str]] = {}
        for index, reason in sorted(self.reasons.items()):
            grouped.setdefault(reason, []).append(str(self.tasks[index].get("id")))
        for reason, numbers in list(grouped.items())[:REASONS]:
            more = f" and {len(numbers) - 5} more" if len(numbers) > 5 else ""
            logger.warning("project %s: no prediction for task %s%s: %s", key, ", ".join(numbers[:5]), more, reason)
        if len(grouped) > REASONS:
            logger.warning("project %s: and %d more reasons like these", key, len(grouped) - REASONS)


def level_of(body: Mapping[str, Any]) -> Level:
    """Interactive requests carry a context; a task that is opened and one of the label stream look the same."""
    params = body.get("params")
    if isinstance(params, Mapping) and params.get("context"):
        return Level.DRAWING
    return Level.OPENED if len(body["tasks"]) == 1 else Level.MANY


def read_task_image(media: MediaCache, value: str, task: int | None, uid: str, hostname: str) -> np.ndarray:
    """The image `value` of a task, uint8 RGB [h, w, 3], EXIF-transposed. Raises MediaError."""
    from yolonas.inference.sources import read_image

    try:
        content = media.fetch(value, task_id=task, uid=uid, hostname=hostname).read_bytes()
    except FileNotFoundError:  # evicted between the two calls
        content = media.fetch(value, task_id=task, uid=uid, hostname=hostname).read_bytes()
    try:
        return read_image(content)
    except DataError as error:
        media.forget(value, uid)  # so that a mended file is seen
        raise MediaError(f"{brief(value)} {str(error).removeprefix('<bytes> ')}") from None

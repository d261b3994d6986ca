"""What people have labelled, as Label Studio tells it, and as a data set to learn from."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from labelstudio_backend.media import MediaError
from labelstudio_backend.video_frames import keyframe_images
from yolonas.data.label_studio_reader import labelled_image
from yolonas.data.labelled import LabelledImage, LabelledImages
from yolonas.errors import YolonasError
from yolonas.inference.sources import read_image
from yolonas.labelstudio import Control, choose_annotation, class_names, controls_by_image, controls_by_video

log = logging.getLogger(__name__)

FETCHES = 4  # at a time: Label Studio's own server handles few
AWAY = 0.05  # of the images: the others are learnt where no more are away; a host may never come back


@dataclass(frozen=True)
class Correction:
    """A task and the annotation of it that counts."""

    task: int
    data: Mapping[str, Any]
    annotation: Mapping[str, Any]

    @property
    def stamp(self) -> str:
        """Changes whenever the annotation does."""
        return f"{self.annotation.get('id')}@{self.annotation.get('updated_at')}"


def corrections(tasks: Iterable[Mapping[str, Any]]) -> list[Correction]:
    """The labelled tasks among `tasks` (with their `annotations`), by id."""
    found = {}
    for task in tasks:
        annotation = choose_annotation(task.get("annotations"))
        if annotation is not None:
            number = int(task["id"])
            found[number] = Correction(number, task.get("data") or {}, annotation)
    return [found[number] for number in sorted(found)]


def manifest(found: Iterable[Correction]) -> dict[str, str]:
    """Task id -> stamp of its annotation: what a training learns from, to tell later what is new."""
    return {str(correction.task): correction.stamp for correction in found}


def new_since(now: Mapping[str, str], then: Mapping[str, str] | None) -> int:
    """How many tasks were labelled, or labelled anew, since the manifest `then`."""
    return sum(then is None or then.get(task) != stamp for task, stamp in now.items())


def labelled_after(now: Mapping[str, str], when: float) -> int:
    """How many tasks of the manifest `now` were labelled, or labelled anew, after `when` (Unix seconds)."""
    text = datetime.fromtimestamp(when, UTC).isoformat()  # as Label Studio writes times, which therefore sort as texts
    return sum(stamp.partition("@")[2] > text for stamp in now.values())


def held_out(project_key: str, task: int, fraction: float) -> bool:
    """Whether a task belongs to the part that is never trained on: a stable hash, the same for every version."""
    digest = hashlib.sha256(f"{project_key}:{task}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64 < fraction


def class_sources(controls: Sequence[Control]) -> dict[str, tuple[str, ...]]:
    """Label -> the classes of a base model that it may start from, by `predicted_values`, the best one first."""
    sources: dict[str, tuple[str, ...]] = {}
    for control in controls:
        for label, names in control.predicted_values.items():
            sources[label] = tuple(dict.fromkeys((*sources.get(label, ()), *names)))
    return sources


def labelled_images(
    found: Sequence[Correction],
    controls: Sequence[Control],
    fetch: Callable[[str, int], Path],
    folder: Path,
    *,
    fetch_video: Callable[[str, int], Path] | None = None,
    on_image: Callable[[int, int], None] = lambda done, total: None,
) -> LabelledImages:
    """Fetch the images of the labelled tasks into `folder` and put their boxes with them.

    Tags that draw on the same image contribute to one item; a task with two images gives two, and a video one for each
    of its keyframes. Labels that the config no longer has are left out, an image without boxes is kept as a negative.
    What could not be used is listed in `.dropped`, a line each.

    Args:
        found: tasks and annotations.
        controls: RectangleLabels tags of the present label config.
        fetch: gives the local file of a task's URL; raises YolonasError.
        folder: the files are linked or copied here, so that a cache may evict them.
        fetch_video: as `fetch`, of a video; without it videos are left out.
        on_image: is told how many of how many images and videos are done.

    Raises:
        MediaError: more than `AWAY` of the images cannot be had now, but may be later: a part of the labels is not to
            pass for all of them.
    """
    names = class_names(controls)
    folder.mkdir(parents=True, exist_ok=True)
    wanted = []
    for correction in found:
        wanted += [
            (correction, value, used, folder / f"{correction.task}-{number}")
            for number, (value, used) in enumerate(controls_by_image(controls, correction.data).items())
        ]
        wanted += [
            (correction, value, used, folder / f"{correction.task}-v{number}")
            for number, (value, used) in enumerate(controls_by_video(controls, correction.data).items())
            if fetch_video is not None
        ]

    away: list[object] = []
    given_up = threading.Event()

    def one(item: tuple[Correction, str, list[Control], Path]) -> list[LabelledImage] | str:
        if given_up.is_set():
            return []
        correction, value, used, stem = item
        where, result = f"task {correction.task}", correction.annotation["result"]
        try:
            if fetch_video is not None and used[0].media == "video":
                file = fetch_video(value, correction.task)
                return keyframe_images(file, result, used, names, correction.data, stem, where)
            fetched = fetch(value, correction.task)
            path = keep(fetched, stem.with_suffix(fetched.suffix))
            height, width = read_image(path).shape[:2]
        except YolonasError as error:
            sentence = f"{where}: {str(error).removeprefix(f'{where}: ')}"
            if isinstance(error, MediaError) and error.passing:
                away.append(item)
                if len(away) <= AWAY * len(wanted):
                    return sentence
                given_up.set()
                advice = "nothing is learnt without it; delete the task if its image is gone for good"
                raise MediaError(f"{sentence}; {advice}", passing=True) from error
            return sentence
        # What is left out of a task was drawn by slips of the mouse, or of labels that the config no longer has.
        return [labelled_image(result, used, names, path, (height, width), 0, where)]

    images: list[LabelledImage] = []
    dropped: list[str] = []
    silent = dict.fromkeys(correction.task for correction in found)
    with ThreadPoolExecutor(FETCHES) as pool:
        for done, (item, outcome) in enumerate(zip(wanted, pool.map(one, wanted), strict=True), start=1):
            if isinstance(outcome, str):
                dropped.append(outcome)
            else:
                images += outcome
            if outcome:
                silent.pop(item[0].task, None)
            on_image(done, len(wanted))
    dropped += [f"task {task}: it has no image that the label config names, nor a labelled keyframe" for task in silent]
    for line in dropped:
        log.warning("%s", line)
    images = [replace(image, image_id=number) for number, image in enumerate(images, start=1)]
    return LabelledImages(names, images, dropped)


def tasks_of(images: Iterable[LabelledImage]) -> set[int]:
    """The tasks that these images are of, by the names that `labelled_images` gives their files."""
    return {int(image.path.name.partition("-")[0]) for image in images}


def keep(cached: Path, path: Path) -> Path:
    """Link or copy a cached file to `path`, where there is none yet, so that the cache may evict it."""
    if not path.exists():
        temporary = path.with_name(f"{path.name}.part")
        temporary.unlink(missing_ok=True)
        try:
            os.link(cached, temporary)
        except OSError:  # another file system, or one without links
            shutil.copyfile(cached, temporary)
        temporary.replace(path)
    return path

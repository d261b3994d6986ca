"""The checks of files: the tasks' images as they are fetched for a prediction, and the disk."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from labelstudio_backend.check import Case, Check, State, failed
from labelstudio_backend.client import project_uid
from labelstudio_backend.mapping import served_controls
from labelstudio_backend.media import MediaCache
from labelstudio_backend.registry import Registry
from yolonas.errors import YolonasError

TRIED_IMAGES = 3
FULL, SCARCE = 200 * 2**20, 2 * 2**30  # bytes free: one version takes 30 to 300 MB, a training some more


def images(case: Case, state: Mapping[str, Any]) -> Iterator[Check]:
    """Some of the images, fetched as for a prediction, into a cache of their own: so really fetched."""
    from labelstudio_backend.video import checked
    from yolonas.inference.sources import read_image

    try:
        controls = served_controls(state["label_config"])
        keys = list(dict.fromkeys((control.data_key, control.media) for control in controls))
        tasks = case.client.some_tasks(case.project, TRIED_IMAGES)
    except YolonasError as error:
        yield failed("Images", error)
        return
    if not tasks or not keys:
        yield Check("Images", "OK", "no task has one yet")
        return
    uid, hostname = project_uid(state), _hostname(case, state)
    fetched, sizes = 0, []
    with tempfile.TemporaryDirectory() as folder:
        media = MediaCache(
            case.settings.model_copy(update={"state_dir": Path(folder)}), case.client, transport=case.transport
        )
        for task in tasks:
            for key, kind in keys:
                value = task["data"].get(key)
                if not isinstance(value, str) or not value:
                    text = f'the data of task {task["id"]} has no text under "{key}", where the label config looks'
                    yield Check(
                        "Images", "FAIL", text, f"name the right key in the label config's <{kind.title()} value>"
                    )
                    continue
                video = kind == "video"
                try:
                    file = media.fetch(value, task_id=task["id"], uid=uid, hostname=hostname, video=video)
                    if video:
                        count = checked(file).frame_count() or "?"
                    else:
                        pixels = read_image(file)
                except YolonasError as error:
                    problem = failed("Images", error)
                    yield Check("Images", "FAIL", f"task {task['id']}: {problem.text}", problem.advice)
                    continue
                fetched += 1
                sizes.append(f"{count} frames" if video else f"{pixels.shape[1]} x {pixels.shape[0]}")
        media.close()
    if fetched:
        yield Check(
            "Images", "OK", f"{fetched} of {len(tasks) * len(keys)} tried are fetched and read ({', '.join(sizes)})"
        )


def _hostname(case: Case, state: Mapping[str, Any]) -> str:
    """The address under which Label Studio names itself, from what it told the backend."""
    project = Registry(case.settings.projects_dir).find(project_uid(state))
    return "" if project is None else str(project.metadata().get("hostname", ""))


def disk(case: Case) -> Iterator[Check]:
    """Whether there is room for versions, trainings and images."""
    folder = case.settings.state_dir
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    text = f"{free / 2**30:.1f} GB are free for {folder}"
    if not os.access(there, os.W_OK):
        advice = "mend its permissions, or set YOLONAS_STATE_DIR to another folder"
        yield Check("Disk", "FAIL", f"{there} cannot be written", advice)
    elif free < SCARCE:
        state: State = "FAIL" if free < FULL else "WARN"
        advice = "free some space: versions, trainings and fetched images (YOLONAS_MEDIA_CACHE_BYTES) are kept there"
        yield Check("Disk", state, text, advice)
    else:
        yield Check("Disk", "OK", text)

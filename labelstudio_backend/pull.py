"""`yolonas-labelstudio pull`: a project's labelled tasks and their images as a folder to train on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import click

from labelstudio_backend.cli import settings_from
from labelstudio_backend.client import LabelStudio, project_uid
from labelstudio_backend.corrections import FETCHES, keep
from labelstudio_backend.media import MediaCache
from labelstudio_backend.options import label_studio, project_options
from yolonas.atomic import atomic_file
from yolonas.data.label_studio_reader import CONFIG
from yolonas.errors import DataError, YolonasError
from yolonas.inference.sources import IMAGE_SUFFIXES
from yolonas.labelstudio import choose_annotation, class_names, controls_by_image, parse_label_config

SHOWN = 5  # images that could not be fetched


@dataclass
class Pulled:
    """What a folder now holds: labelled tasks, images, how many of them are new, and a line on each missing one."""

    tasks: int
    images: int
    new: int
    missing: list[str]


@click.command()
@project_options
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder to write into.")
def pull(project: int, out: Path, **options: Any) -> None:
    """Fetch the labelled tasks of a project, their images and its label config, for `yolonas train --data`.

    Repeat it to go on after an interruption, or to get newer labels: images that are there are not fetched again.
    """
    settings = settings_from(**options)
    with label_studio(settings) as client:
        media = MediaCache(settings, client)
        try:
            pulled = pull_project(client, media.fetch, project, out, progress=True)
        except OSError as error:
            raise DataError(f"{error.filename or out} cannot be written: {error.strerror or error}") from error
        finally:
            media.close()
    for line in pulled.missing[:SHOWN]:
        click.echo(line, err=True)
    if len(pulled.missing) > SHOWN:
        click.echo(f"and {len(pulled.missing) - SHOWN} more images that could not be fetched", err=True)
    missing = f", {len(pulled.missing)} could not be fetched" if pulled.missing else ""
    click.echo(
        f"{pulled.tasks} labelled tasks and {pulled.images} images ({pulled.new} new{missing}) are in {out}.\n"
        f"Train on them: yolonas train --data {out} --weights yolo_nas_s_coco"
    )


def pull_project(
    client: LabelStudio, fetch: Callable[..., Path], project: int, out: Path, *, progress: bool = False
) -> Pulled:
    """Write tasks.json (Label Studio's JSON), label_config.xml and images/ of a project into the folder `out`.

    The tasks' data name the files in images/, except where an image could not be fetched. `fetch(value, task_id=...,
    uid=...)` gives the local file of a task's image, or raises YolonasError. Raises YolonasError where there is nothing
    to pull.
    """
    from tqdm import tqdm

    state = client.get_project(project)
    uid, config = project_uid(state), state["label_config"]
    controls = [control for control in parse_label_config(config) if control.media == "image"]
    if not class_names(controls):
        raise DataError(f"the label config of project {project} has no RectangleLabels on an Image, nothing to learn")
    hidden = None if progress else True  # None: where there is no terminal
    found = tqdm(client.iter_tasks(project, only_annotated=True), "tasks", unit="task", disable=hidden, leave=False)
    tasks = [_plain(task) for task in found if choose_annotation(task.get("annotations")) is not None]
    if not tasks:
        raise DataError(f"no task of project {project} is labelled yet; submit some annotations first")
    (out / "images").mkdir(parents=True, exist_ok=True)
    wanted = [
        (task, value, [control.data_key for control in used])
        for task in tasks
        for value, used in controls_by_image(controls, task["data"]).items()
    ]

    def one(item: tuple[dict[str, Any], str, list[str]]) -> bool | str:
        """Whether an image is new, or why it is missing."""
        task, value, _ = item
        path = out / _image_name(task, value)
        if path.is_file():
            return False
        try:
            keep(fetch(value, task_id=task["id"], uid=uid), path)
        except YolonasError as error:
            return f"task {task['id']}: {error}"
        return True

    pulled = Pulled(len(tasks), 0, 0, [])
    with ThreadPoolExecutor(FETCHES) as pool:
        outcomes = tqdm(pool.map(one, wanted), "images", len(wanted), unit="image", disable=hidden, leave=False)
        for (task, value, keys), outcome in zip(wanted, outcomes, strict=True):
            if isinstance(outcome, str):
                pulled.missing.append(outcome)
                continue
            pulled.images += 1
            pulled.new += outcome
            task["data"].update(dict.fromkeys(keys, _image_name(task, value)))
    if not pulled.images:
        raise DataError(f"no image of the {len(tasks)} labelled tasks can be had: {pulled.missing[0]}")
    for name, text in ((CONFIG, config), ("tasks.json", json.dumps(tasks, ensure_ascii=False, indent=1))):
        with atomic_file(out / name) as stream:
            stream.write(text.encode())
    return pulled


def _plain(task: Mapping[str, Any]) -> dict[str, Any]:
    return {"id": task["id"], "data": dict(task.get("data") or {}), "annotations": task["annotations"]}


def _image_name(task: Mapping[str, Any], value: str) -> str:
    """A name of its own for each image of a task: should the task get another image, that one is fetched too."""
    return f"images/{task['id']}-{hashlib.sha256(value.encode()).hexdigest()[:8]}{_suffix(value)}"


def _suffix(value: str) -> str:
    if value.startswith("data:image/"):
        suffix = "." + value[len("data:image/") :].partition(";")[0].partition(",")[0]
    else:
        parts = urlsplit(value)
        suffix = Path(parse_qs(parts.query).get("d", [parts.path])[0]).suffix
    return suffix.lower() if suffix.lower() in IMAGE_SUFFIXES else ".jpg"  # decoders look at the content only

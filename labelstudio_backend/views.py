"""What the API and its page show of a version, a job, a task and the labels: plain values for JSON."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from labelstudio_backend.job import Job
from labelstudio_backend.job_queue import JobQueue
from labelstudio_backend.mapping import Mapped, mapped, served_controls
from labelstudio_backend.overview import Seen
from labelstudio_backend.redaction import redact
from labelstudio_backend.version import Version
from yolonas.errors import YolonasError
from yolonas.labelstudio import Control

LOG_BYTES = 16_384


def version_view(version: Version, current: Version | None, pinned: bool, jobs: JobQueue | None) -> dict[str, Any]:
    """A version with its figures, and what it is to the one that serves."""
    record = version.record
    before, after = version.base_figures, version.figures
    report = report_path(version, jobs)
    return {
        "number": version.number,
        "name": version.name,
        "trained": version.trained,
        "weights": None if version.trained else Path(version.weights).name,
        "published": record.get("published"),
        "current": current is not None and current.number == version.number,
        "pinned": pinned and current is not None and current.number == version.number,
        "candidate": current is not None and current.number < version.number and not version.removed,
        "removed": version.removed,
        "base": record.get("base"),
        "trigger": record.get("trigger"),
        "tasks": record.get("tasks"),
        "ap": after["ap"],
        "ap50": after["ap50"],
        "before": {"ap": before["ap"], "ap50": before["ap50"]} if record.get("before") else None,
        "per_class": [
            {"label": name, "before": before["per_class"].get(name), "after": value}
            for name, value in after["per_class"].items()
        ],
        "gate": record.get("gate"),
        "serving": record.get("serving"),
        "training": record.get("training"),
        "seconds": record.get("seconds"),
        "report": None if report is None else f"api/projects/{version.project_key}/versions/{version.number}/report",
    }


def report_path(version: Version, jobs: JobQueue | None) -> Path | None:
    """The HTML report that the training left in its job's folder, where it is still there."""
    number = version.record.get("job")
    if jobs is None or not isinstance(number, int):
        return None
    path = jobs.folder(number) / "training" / "report.html"
    return path if path.is_file() else None


def job_view(job: Job) -> dict[str, Any]:
    """A job, without its log."""
    return {
        "id": job.id,
        "project": job.project,
        "trigger": job.trigger,
        "state": job.state,
        "reason": job.reason,
        "progress": job.progress,
        "epoch": job.epoch,
        "seconds_left": job.seconds_left,
        "curve": job.curve,
        "cancelling": job.cancel and job.state == "running",
        "restarts": job.restarts,
        "version": job.version,
        "created": job.created,
        "started": job.started,
        "finished": job.finished,
    }


def log_tail(path: Path) -> list[str]:
    """The last whole lines of a log; what was written as JSON is shown as people read it."""
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - LOG_BYTES))
            text = redact(stream.read().decode(errors="replace"))  # what did not go through logging, too
    except FileNotFoundError:
        return []
    lines = text.splitlines()[1 if size > LOG_BYTES else 0 :]
    return [_readable(line) for line in lines]


def _readable(line: str) -> str:
    try:
        entry = json.loads(line)
        return "{} {} {}".format(str(entry["time"])[11:19], entry["level"], entry["message"])
    except (ValueError, KeyError, TypeError):
        return line


def task_view(task: Mapping[str, Any], version: str, key: str, seen: Seen, control: Control | None) -> dict[str, Any]:
    """A task with its newest prediction, of the version that serves where there is one.

    control: on whose image the task is shown (`shown_control`), with the boxes on that one. The counts are those of all
    its regions: boxes on the other images, tracks of a video.
    """
    predictions = [p for p in task.get("predictions") or () if isinstance(p, Mapping)]
    predictions.sort(key=lambda p: (p.get("model_version") == version, p.get("id") or 0))
    prediction = predictions[-1] if predictions else None
    regions = [r for r in (prediction or {}).get("result") or () if isinstance(r, Mapping)]
    shown = [r for r in regions if control is not None and r.get("to_name") == control.to_name]
    labels = [label for region in regions if (label := _label(region)) is not None]
    return {
        "id": task["id"],
        "url": f"{seen.url}?task={task['id']}" if seen.url else None,
        "thumbnail": f"api/projects/{key}/thumbnails/{task['id']}" if control is not None else None,
        "predicted": prediction is not None,
        "version": None if prediction is None else prediction.get("model_version"),
        "score": None if prediction is None else prediction.get("score"),
        "size": _size(shown[0]) if shown else None,
        "boxes": [box for region in shown if (box := _box(region)) is not None],
        "counts": dict(Counter(labels).most_common()),
        "tracks": sum(region.get("type") == "videorectangle" for region in regions),
    }


def first_to_label(task: Mapping[str, Any]) -> tuple[bool, float]:
    """The lowest score first; what has none cannot be ordered and comes last."""
    return task["score"] is None, task["score"] or 0.0


def _size(region: Mapping[str, Any]) -> tuple[float, float] | None:
    """Width and height of the image in px."""
    sides = region.get("original_width"), region.get("original_height")
    return sides if all(isinstance(side, int | float) and side > 0 for side in sides) else None  # type: ignore[return-value]


def _label(region: Mapping[str, Any]) -> str | None:
    """The label of a box, or of a track."""
    value = region.get("value") or {}
    labels = value.get("rectanglelabels") or value.get("labels")
    return str(labels[0]) if isinstance(labels, list) and labels else None


def _box(region: Mapping[str, Any]) -> dict[str, Any] | None:
    value, label = region.get("value") or {}, _label(region)
    sides = [value.get(name) for name in ("x", "y", "width", "height")]
    if label is None or not all(isinstance(side, int | float) for side in sides):
        return None
    x, y, width, height = sides
    rotation = value.get("rotation") or 0
    return {
        "x": x,
        "y": y,
        "width": width,
        "height": height,
        "rotation": rotation,
        "label": label,
        "score": region.get("score"),
    }


def labels_view(
    label_config: str | None, version: Version | None, names: Callable[[Version], Sequence[str] | None]
) -> dict[str, Any]:
    """Which classes become which label of each control, and what to do about the labels that none becomes."""
    try:
        controls = served_controls(label_config)
    except YolonasError as error:
        return {"controls": [], "problem": str(error)}
    if not controls:
        wanted = '<RectangleLabels> with labels on an <Image value="$...">'
        return {"controls": [], "problem": f"The label config has no {wanted}, so nothing is predicted."}
    found = [] if version is None else mapped(controls, version, names)
    if any(one.version is not None and one.names is None for one in found) or not found:
        shown = [(c.from_name, [{"label": label, "classes": None} for label in c.labels]) for c in controls]
        problem = "The model is not loaded yet, so its classes are not known."
        return {"controls": [{"name": name, "labels": labels} for name, labels in shown], "problem": problem}
    told = [
        {
            "name": one.control.from_name,
            "labels": [
                {"label": label, "classes": known, "advice": None if known else _advice(label, one)}
                for label, known in one.classes.items()
            ],
        }
        for one in found
    ]
    return {"controls": told, "problem": None}


def _advice(label: str, one: Mapped) -> str:
    if one.version is None:
        return str(one.remark)
    if one.own:
        return "Label some tasks with it: the next training learns it."
    tag = f'predicted_values="..." on <Label value="{label}">'
    return f"The model has no class of this name: name one by {tag}, or label some tasks for the first training."

"""The JSON that the dashboard and the commands read: GET /api/...; nothing here waits for a model or Label Studio.

    /api/projects                                   the server, all projects in brief, the jobs that run or wait
    /api/projects/KEY                               one project: what serves, labels, jobs, problems, people's work
    /api/projects/KEY/versions                      its versions with their figures, newest first
    /api/projects/KEY/versions/NUMBER/report        the training's own report, HTML
    /api/projects/KEY/next                          the tasks to label next, with predicted boxes (percent of the image)
    /api/projects/KEY/thumbnails/TASK               a small JPEG of one of these
    /api/jobs, /api/jobs?project=KEY                jobs, newest first
    /api/jobs/ID                                    one job with the end of its log

Times are Unix seconds.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Response
from fastapi import Path as Path_
from fastapi.responses import HTMLResponse

from labelstudio_backend.asked import read_task_image
from labelstudio_backend.job import Job
from labelstudio_backend.job_queue import JobQueue
from labelstudio_backend.mapping import Mapped, mapped, served_controls
from labelstudio_backend.metrics import figures
from labelstudio_backend.overview import Overview, Seen
from labelstudio_backend.redaction import redact
from labelstudio_backend.registry import ProjectRegistry, Registry
from labelstudio_backend.service import Service
from labelstudio_backend.settings import Settings
from labelstudio_backend.version import RECORD, RegistryError, Version
from yolonas.errors import YolonasError

log = logging.getLogger(__name__)

JOBS_SHOWN = 50
LOG_BYTES = 16_384
THUMBNAIL_SIDE = 360  # px of the longer side
THUMBNAILS_KEPT = 200  # some 15 kB each
THUMBNAIL_THREADS = 2  # decoding must not take the cores from predictions
REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; sandbox"


Number = Annotated[int, Path_(ge=0, lt=2**31)]


class _Jpeg(Response):
    media_type = "image/jpeg"


class _MissingError(YolonasError):
    """What was asked for is not there."""


class Api:
    """The routes over one backend's state; `quick` runs what reads files, `jobs` is None where nothing can train."""

    def __init__(
        self,
        settings: Settings,
        registry: Registry,
        service: Service,
        jobs: JobQueue | None,
        overview: Overview,
        quick: Executor,
    ) -> None:
        self._settings, self._registry, self._service = settings, registry, service
        self._jobs, self._overview, self._quick = jobs, overview, quick
        self._thumbnails: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._drawing = ThreadPoolExecutor(THUMBNAIL_THREADS, "thumbnail")
        self._queue_problem: str | None = None
        self._records: dict[Path, tuple[int, Version]] = {}
        self.router = APIRouter(prefix="/api")
        self._add_routes(self.router)

    def close(self) -> None:
        """Stop the threads."""
        self._drawing.shutdown(wait=False, cancel_futures=True)
        self._overview.close()

    def _add_routes(self, router: APIRouter) -> None:
        @router.get("/projects")
        async def projects() -> Response:
            return await self._run(self.projects)

        @router.get("/projects/{key}")
        async def project(key: str) -> Response:
            return await self._run(self.project, key)

        @router.get("/projects/{key}/versions")
        async def versions(key: str) -> Response:
            return await self._run(self.versions, key)

        @router.get("/projects/{key}/versions/{number}/report", response_class=HTMLResponse)
        async def report(key: str, number: Number) -> Response:
            return await self._run(self._report, key, number)

        @router.get("/projects/{key}/next")
        async def upcoming(key: str) -> Response:
            return await self._run(self.upcoming, key)

        @router.get("/projects/{key}/thumbnails/{task}", response_class=_Jpeg)
        async def thumbnail(key: str, task: Number) -> Response:
            return await self._run(self._thumbnail, key, task, pool=self._drawing)

        @router.get("/jobs")
        async def jobs(project: str | None = None) -> Response:
            return await self._run(self.jobs, project)

        @router.get("/jobs/{job}")
        async def one_job(job: Number) -> Response:
            return await self._run(self.job, job)

    async def _run(self, work: Callable[..., Any], *arguments: Any, pool: Executor | None = None) -> Response:
        loop, executor = asyncio.get_running_loop(), pool or self._quick
        return await loop.run_in_executor(executor, copy_context().run, _answer, work, *arguments)

    # -- projects ----------------------------------------------------------------------------------------------

    def projects(self) -> dict[str, Any]:
        """All projects in brief, and the jobs that run or wait."""
        active = self._look_up(states=("running", "queued"))
        return {
            "server": {
                "version": metadata.version("yolonas"),
                "can_train": self._jobs is not None,
                "label_studio": self._settings.label_studio_url or None,
                "train_every": self._settings.train_every,
            },
            "projects": [self._brief(project) for project in self._registry.projects()],
            "jobs": [_job(job) for job in active],
        }

    def project(self, key: str) -> dict[str, Any]:
        """One project."""
        project = self._find(key)
        seen = self._overview.get(key)
        version = self._current(project)
        return {
            **self._brief(project),
            "labels": self._labels(project, version),
            "problems": self._problems(project, seen),
            "rounds": None if seen.rounds is None else [work.to_dict() for work in seen.rounds],
            "jobs": self.jobs(key)["jobs"],
        }

    def _brief(self, project: ProjectRegistry) -> dict[str, Any]:
        seen, version, state = self._overview.get(project.key), self._current(project), project.metadata()
        return {
            "key": project.key,
            "id": project.project_id,
            "title": seen.title,
            "url": seen.url,
            "hostname": state.get("hostname"),
            "seen": {"when": seen.when, "error": seen.error},
            "tasks": seen.tasks,
            "labelled": seen.labelled,
            "sampling": seen.sampling,
            "serves": None if version is None else _version(version, version, project.pinned(), self._jobs),
            "problem_count": len(self._problems(project, seen)),
        }

    def _problems(self, project: ProjectRegistry, seen: Seen) -> list[dict[str, Any]]:
        problems = [{"text": text, "count": 1, "last": seen.when} for text in seen.problems]
        if seen.error is not None:
            problems.insert(0, {"text": seen.error, "count": 1, "last": None})
        if self._queue_problem is not None:
            problems.append({"text": f"Trainings cannot be seen: {self._queue_problem}", "count": 1, "last": None})
        if self._settings.label_studio_url == "":
            text = (
                "This backend does not know Label Studio's address, so it cannot train: set YOLONAS_LABEL_STUDIO_URL "
                "and YOLONAS_LABEL_STUDIO_TOKEN and start it again."
            )
            problems.append({"text": text, "count": 1, "last": None})
        notices = self._service.notices.recent(project.key)
        return problems + [{"text": n.text, "count": n.count, "last": n.last} for n in notices]

    def _labels(self, project: ProjectRegistry, version: Version | None) -> dict[str, Any]:
        """Which classes become which label of each control, and what to do about the labels that none becomes."""
        try:
            controls = served_controls(project.label_config)
        except YolonasError as error:
            return {"controls": [], "problem": str(error)}
        if not controls:
            wanted = '<RectangleLabels> with labels on an <Image value="$...">'
            return {"controls": [], "problem": f"The label config has no {wanted}, so nothing is predicted."}
        found = [] if version is None else mapped(controls, version, self._service.models.names)
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

    def versions(self, key: str) -> dict[str, Any]:
        """The versions of a project, newest first."""
        project = self._find(key)
        current = self._current(project)
        pinned = current is not None and project.pinned()
        found = [_version(version, current, pinned, self._jobs) for version in self._versions(project)]
        return {"versions": found[::-1]}

    def _versions(self, project: ProjectRegistry) -> list[Version]:
        """As `ProjectRegistry.versions`, each read once: with the list of its tasks a record may have megabytes."""
        paths = (project.path / "versions").glob(f"v*/{RECORD}")
        return [self._record(project, number) for number in sorted(int(path.parent.name[1:]) for path in paths)]

    def _current(self, project: ProjectRegistry) -> Version | None:
        """The version that serves; None before the first."""
        try:
            return self._record(project, project.current_number())
        except RegistryError:
            return None

    def _record(self, project: ProjectRegistry, number: int) -> Version:
        path = project.path / "versions" / f"v{number}" / RECORD
        stamp = path.stat().st_mtime_ns
        if self._records.get(path, (0, None))[0] != stamp:
            version = project.version(number)
            record = {name: value for name, value in version.record.items() if name != "manifest"}
            self._records[path] = stamp, replace(version, record=record)
        return self._records[path][1]

    # -- jobs --------------------------------------------------------------------------------------------------

    def jobs(self, project: str | None = None) -> dict[str, Any]:
        """The latest jobs, newest first."""
        latest = self._look_up(project, brief=True)[-JOBS_SHOWN:]
        running = any(job.state == "running" for job in latest)
        active = {job.id: job for job in self._look_up(project, states=("running",))} if running else {}
        return {"jobs": [_job(active.get(job.id, job)) for job in reversed(latest)]}

    def _look_up(self, *arguments: Any, **options: Any) -> list[Job]:
        """Jobs, or none where there is no queue, or it does not answer: versions and labels are shown all the same."""
        if self._jobs is None:
            return []
        try:
            found = self._jobs.find(*arguments, **options)
        except YolonasError as error:
            self._queue_problem = redact(str(error))
            return []
        self._queue_problem = None
        return found

    def job(self, number: int) -> dict[str, Any]:
        """One job with the end of its log."""
        job = self._jobs.get(number) if self._jobs is not None else None
        if job is None or self._jobs is None:
            raise _MissingError(f"there is no job {number} here")
        figures = {name: job.record.get(name) for name in ("before", "after", "gate", "tasks", "seconds", "base")}
        return {**_job(job), **figures, "log": _tail(self._jobs.folder(job.id) / "log.txt")}

    # -- what is labelled next ---------------------------------------------------------------------------------

    def upcoming(self, key: str) -> dict[str, Any]:
        """The tasks to label next, the first to label first."""
        project, seen = self._find(key), self._overview.get(key)
        version = self._current(project)
        name = "" if version is None else version.name
        return {
            "seen": {"when": seen.when, "error": seen.error},
            "sampling": seen.sampling,
            "tasks": sorted((_task(task, name, key, seen) for task in seen.next_tasks), key=_first_to_label),
        }

    def _thumbnail(self, key: str, task_id: int) -> Response:
        content = self._thumbnails.get((key, task_id)) or self._draw(key, task_id)
        self._thumbnails[key, task_id] = content
        while len(self._thumbnails) > THUMBNAILS_KEPT:
            self._thumbnails.popitem(last=False)
        return _Jpeg(content, headers={"Cache-Control": "private, max-age=3600"})

    def _draw(self, key: str, task_id: int) -> bytes:
        from yolonas.inference._cv2 import cv2

        project = self._find(key)
        task = next((task for task in self._overview.get(key).next_tasks if task.get("id") == task_id), None)
        controls = served_controls(project.label_config)
        control = next((control for control in controls if control.media == "image"), None)
        value = control.task_value(task.get("data") or {}) if task is not None and control is not None else None
        if value is None:
            raise _MissingError(f"task {task_id} is not among those to label next, or has no image")
        image = read_task_image(self._service.media, value, task_id, str(project.metadata().get("hostname", "")))
        scale = min(1.0, THUMBNAIL_SIDE / max(image.shape[:2]))
        size = [max(1, round(side * scale)) for side in image.shape[1::-1]]
        small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        ok, content = cv2.imencode(".jpg", small[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 82])
        if not ok:
            raise YolonasError(f"the image of task {task_id} could not be made smaller")
        return bytes(content)

    def _report(self, key: str, number: int) -> Response:
        path = _report_path(self._find(key).version(number), self._jobs)
        if path is None:
            raise _MissingError(f"the report of v{number} is not kept")
        headers = {"Content-Security-Policy": REPORT_POLICY}
        return HTMLResponse(path.read_bytes(), headers=headers)

    def _find(self, key: str) -> ProjectRegistry:
        return self._registry.project(key)


def _answer(work: Callable[..., Any], *arguments: Any) -> Response:
    try:
        content, status = work(*arguments), 200
        if isinstance(content, Response):
            return content
    except (_MissingError, RegistryError, FileNotFoundError) as error:
        content, status = {"error": redact(str(error))}, 404
    except YolonasError as error:
        content, status = {"error": redact(str(error))}, 503
    except Exception as error:
        log.exception("a look at the state failed")
        content, status = {"error": redact(f"{type(error).__name__}: {error}")}, 500
    text = json.dumps(content, allow_nan=False, ensure_ascii=False)
    return Response(text, status, media_type="application/json", headers={"Cache-Control": "no-store"})


def _version(version: Version, current: Version | None, pinned: bool, jobs: JobQueue | None) -> dict[str, Any]:
    record = version.record
    before, after = record.get("before") or {}, record.get("after") or {}
    classes_before, classes = before.get("per_class") or {}, after.get("per_class") or {}
    ap, ap50 = figures(version)
    report = _report_path(version, jobs)
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
        "ap": ap,
        "ap50": ap50,
        "before": {name: before.get(name) for name in ("ap", "ap50")} if before else None,
        "per_class": [
            {"label": name, "before": classes_before.get(name), "after": value} for name, value in classes.items()
        ],
        "gate": record.get("gate"),
        "serving": record.get("serving"),
        "training": record.get("training"),
        "seconds": record.get("seconds"),
        "report": None if report is None else f"api/projects/{version.project_key}/versions/{version.number}/report",
    }


def _report_path(version: Version, jobs: JobQueue | None) -> Path | None:
    """The HTML report that the training left in its job's folder, where it is still there."""
    number = version.record.get("job")
    if jobs is None or not isinstance(number, int):
        return None
    path = jobs.folder(number) / "training" / "report.html"
    return path if path.is_file() else None


def _job(job: Job) -> dict[str, Any]:
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


def _task(task: Mapping[str, Any], version: str, key: str, seen: Seen) -> dict[str, Any]:
    """A task with the boxes of its newest prediction, of the version that serves where there is one."""
    predictions = [p for p in task.get("predictions") or () if isinstance(p, Mapping)]
    predictions.sort(key=lambda p: (p.get("model_version") == version, p.get("id") or 0))
    prediction = predictions[-1] if predictions else None
    regions = [r for r in (prediction or {}).get("result") or () if isinstance(r, Mapping)]
    image = regions[0].get("to_name") if regions else None
    boxes = [box for region in regions if region.get("to_name") == image and (box := _box(region)) is not None]
    return {
        "id": task["id"],
        "url": f"{seen.url}?task={task['id']}" if seen.url else None,
        "thumbnail": f"api/projects/{key}/thumbnails/{task['id']}",
        "predicted": prediction is not None,
        "version": None if prediction is None else prediction.get("model_version"),
        "score": None if prediction is None else prediction.get("score"),
        "size": _size(regions[0]) if regions else None,
        "boxes": boxes,
        "counts": dict(Counter(box["label"] for box in boxes).most_common()),
    }


def _first_to_label(task: Mapping[str, Any]) -> tuple[bool, float]:
    """The lowest score first; what has none cannot be ordered and comes last."""
    return task["score"] is None, task["score"] or 0.0


def _size(region: Mapping[str, Any]) -> tuple[float, float] | None:
    """Width and height of the image in px."""
    sides = region.get("original_width"), region.get("original_height")
    return sides if all(isinstance(side, int | float) and side > 0 for side in sides) else None  # type: ignore[return-value]


def _box(region: Mapping[str, Any]) -> dict[str, Any] | None:
    value = region.get("value") or {}
    labels = value.get("rectanglelabels")
    sides = [value.get(name) for name in ("x", "y", "width", "height")]
    if not isinstance(labels, list) or not labels or not all(isinstance(side, int | float) for side in sides):
        return None
    x, y, width, height = sides
    rotation = value.get("rotation") or 0
    return {
        "x": x,
        "y": y,
        "width": width,
        "height": height,
        "rotation": rotation,
        "label": str(labels[0]),
        "score": region.get("score"),
    }


def _advice(label: str, one: Mapped) -> str:
    if one.version is None:
        return str(one.remark)
    if one.own:
        return "Label some tasks with it: the next training learns it."
    tag = f'predicted_values="..." on <Label value="{label}">'
    return f"The model has no class of this name: name one by {tag}, or label some tasks for the first training."


def _tail(path: Path) -> list[str]:
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

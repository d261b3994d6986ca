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
import contextlib
import json
import logging
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Response
from fastapi import Path as Path_
from fastapi.responses import HTMLResponse

from labelstudio_backend.job import Job
from labelstudio_backend.job_queue import JobQueue
from labelstudio_backend.overview import Overview, Seen
from labelstudio_backend.redaction import redact
from labelstudio_backend.registry import ProjectRegistry, Registry
from labelstudio_backend.service import Service
from labelstudio_backend.settings import Settings
from labelstudio_backend.thumbnails import Thumbnails, shown_control
from labelstudio_backend.version import RECORD, RegistryError, Version
from labelstudio_backend.views import (
    first_to_label,
    job_view,
    labels_view,
    log_tail,
    report_path,
    task_view,
    version_view,
)
from yolonas.errors import YolonasError

log = logging.getLogger(__name__)

JOBS_SHOWN = 50
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
        self._thumbnails = Thumbnails(registry, service.media, overview)
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
            "projects": [self._listed(project) for project in self._registry.projects()],
            "jobs": [job_view(job) for job in active],
        }

    def project(self, key: str) -> dict[str, Any]:
        """One project."""
        project = self._find(key)
        seen = self._overview.get(key)
        version, problems = self._current(project), self._problems(project, seen)
        return {
            **self._brief(project, seen, problems),
            "labels": labels_view(_metadata(project).get("label_config"), version, self._service.models.names),
            "problems": problems,
            "rounds": None if seen.rounds is None else [work.to_dict() for work in seen.rounds],
            "jobs": self.jobs(key)["jobs"],
        }

    def _listed(self, project: ProjectRegistry) -> dict[str, Any]:
        seen = self._overview.brief(project.key)
        return self._brief(project, seen, self._problems(project, seen))

    def _brief(self, project: ProjectRegistry, seen: Seen, problems: list[dict[str, Any]]) -> dict[str, Any]:
        version = self._current(project)
        return {
            "key": project.key,
            "id": project.project_id,
            "title": seen.title,
            "url": seen.url,
            "hostname": _metadata(project).get("hostname"),
            "seen": {"when": seen.when, "error": seen.error},
            "tasks": seen.tasks,
            "labelled": seen.labelled,
            "sampling": seen.sampling,
            "serves": None if version is None else version_view(version, version, project.pinned(), self._jobs),
            "problem_count": len(problems),
        }

    def _problems(self, project: ProjectRegistry, seen: Seen) -> list[dict[str, Any]]:
        unreadable = self._unreadable(project)
        problems = [{"text": text, "count": 1, "last": seen.when} for text in seen.problems]
        if seen.error is not None and seen.error not in unreadable:
            problems.insert(0, {"text": seen.error, "count": 1, "last": None})
        problems += [{"text": text, "count": 1, "last": None} for text in unreadable]
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

    def versions(self, key: str) -> dict[str, Any]:
        """The versions of a project, newest first."""
        project = self._find(key)
        current = self._current(project)
        pinned = current is not None and project.pinned()
        found = [version_view(version, current, pinned, self._jobs) for version in self._versions(project)]
        return {"versions": found[::-1]}

    def _versions(self, project: ProjectRegistry) -> list[Version]:
        """As `ProjectRegistry.versions`, each read once: with the list of its tasks a record may have megabytes.

        Those that cannot be read are left out; `_unreadable` tells.
        """
        found = []
        for number in _numbers(project):
            with contextlib.suppress(RegistryError):
                found.append(self._record(project, number))
        return found

    def _current(self, project: ProjectRegistry) -> Version | None:
        """The version that serves; None before the first, and where it cannot be read."""
        try:
            return self._record(project, project.current_number())
        except RegistryError:
            return None

    def _unreadable(self, project: ProjectRegistry) -> list[str]:
        """What cannot be read of a project's files, each with what to do: the rest is shown all the same."""
        looks: list[Callable[[], object]] = [project.metadata]
        if (project.path / "current").exists():
            looks.append(lambda: self._record(project, project.current_number()))
        looks += [partial(self._record, project, number) for number in _numbers(project)]
        found = []
        for look in looks:
            try:
                look()
            except RegistryError as error:
                found.append(redact(str(error)))
        return list(dict.fromkeys(found))

    def _record(self, project: ProjectRegistry, number: int) -> Version:
        path = project.path / "versions" / f"v{number}" / RECORD
        try:
            stamp = path.stat().st_mtime_ns
        except OSError:
            stamp = 0  # reading it says what is wrong
        if self._records.get(path, (-1, None))[0] != stamp:
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
        return {"jobs": [job_view(active.get(job.id, job)) for job in reversed(latest)]}

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
        return {**job_view(job), **figures, "log": log_tail(self._jobs.folder(job.id) / "log.txt")}

    # -- what is labelled next ---------------------------------------------------------------------------------

    def upcoming(self, key: str) -> dict[str, Any]:
        """The tasks to label next, the first to label first; None for them before Label Studio was asked."""
        project, seen = self._find(key), self._overview.get(key)
        version = self._current(project)
        name, control = "" if version is None else version.name, shown_control(project.label_config)
        tasks = [task_view(task, name, key, seen, control) for task in seen.next_tasks or ()]
        return {
            "seen": {"when": seen.when, "error": seen.error},
            "sampling": seen.sampling,
            "tasks": None if seen.next_tasks is None else sorted(tasks, key=first_to_label),
        }

    def _thumbnail(self, key: str, task: int) -> Response:
        content = self._thumbnails.get(key, task)
        if content is None:
            raise _MissingError(f"task {task} is not among those to label next, or has no image")
        return _Jpeg(content, headers={"Cache-Control": "private, max-age=3600"})

    def _report(self, key: str, number: int) -> Response:
        path = report_path(self._find(key).version(number), self._jobs)
        if path is None:
            raise _MissingError(f"the report of v{number} is not kept")
        headers = {"Content-Security-Policy": REPORT_POLICY}
        return HTMLResponse(path.read_bytes(), headers=headers)

    def _find(self, key: str) -> ProjectRegistry:
        return self._registry.project(key)


def _metadata(project: ProjectRegistry) -> dict[str, Any]:
    """The project's metadata; none where they cannot be read."""
    try:
        return project.metadata()
    except RegistryError:
        return {}


def _numbers(project: ProjectRegistry) -> list[int]:
    return sorted(int(path.parent.name[1:]) for path in (project.path / "versions").glob(f"v*/{RECORD}"))


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

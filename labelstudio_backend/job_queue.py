"""The rules of the queue of training jobs, whatever keeps it: `Jobs` (SQLite) or `RedisJobs`."""

from __future__ import annotations

import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from labelstudio_backend.job import FINAL, IN_VAIN, Job, State, last_ap50
from yolonas.errors import YolonasError

KEPT = 30  # ended jobs of a project

_LABEL_STUDIO_STATES: dict[State, str] = {
    "queued": "queued",
    "running": "started",
    "succeeded": "finished",
    "refused": "finished",
    "failed": "failed",
    "cancelled": "canceled",
}

T = TypeVar("T")


class QueueError(YolonasError):
    """A queue that does not answer, or cannot be read or written."""


class Rows(Protocol):
    """All jobs within one change: as they are, without their long fields, and what becomes of them."""

    @property
    def jobs(self) -> dict[int, Job]: ...
    def add(self, project: str, trigger: str) -> int: ...
    def set(self, job_id: int, **values: Any) -> None: ...
    def remove(self, job_id: int) -> None: ...


class JobQueue(ABC):
    """Training jobs and what may become of them: every method is one change, or one look.

    Safe to use from any thread and any process. `folder` of a job has its log, lock, images and checkpoints.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @abstractmethod
    def _change(self, work: Callable[[Rows], T]) -> T:
        """Do `work` and keep what it changes, all or nothing, with no other change in between; it may run again."""

    @abstractmethod
    def find(
        self, project: str | None = None, *, states: tuple[State, ...] | None = None, brief: bool = False
    ) -> list[Job]:
        """All jobs, oldest first, of one project and in the given states if asked for.

        `brief` leaves out curve, manifest and record, which grow with epochs and tasks: reading them takes 0.3 s for
        200 jobs of 2000 tasks.
        """

    @abstractmethod
    def get(self, job_id: int) -> Job | None:
        """The job, or `None` where there is no such job."""

    def folder(self, job_id: int) -> Path:
        """The job's own folder: log, lock, images, checkpoints."""
        return self._folder / str(job_id)

    def status(self, job_id: str | int) -> dict[str, Any] | None:
        """What Label Studio's /job_status wants to know, or `None` where there is no such job."""
        text = str(job_id)
        job = self.get(int(text)) if text.isdecimal() and len(text) < 16 else None  # a number that a database can hold
        if job is None:
            return None
        return {
            "job_status": _LABEL_STUDIO_STATES[job.state],
            "state": job.state,
            "reason": job.reason,
            "progress": job.progress,
            "epoch": job.epoch,
            "seconds_left": job.seconds_left,
            "ap50": last_ap50(job.curve),
            "model_version": job.version,
        }

    def enqueue(self, project: str, trigger: str) -> int:
        """Queue a training of `project` and return the job's id; one of the project that waits unbegun absorbs it.

        Not one that has begun and was put back, or is run again: it may go on with the data of before.
        """

        def work(rows: Rows) -> int:
            waits = _waiting(rows, project)
            return rows.add(project, trigger) if waits is None else waits.id

        return self._change(work)

    def claim(self, parallel: int | None = 1, *, job_id: int | None = None) -> Job | None:
        """Mark the oldest job that may run, or `job_id` if that may, as running, and return it.

        One job of a project runs at a time, and `parallel` in all.
        """

        def work(rows: Rows) -> int | None:
            running = [job for job in rows.jobs.values() if job.state == "running"]
            if parallel is not None and len(running) >= parallel:
                return None
            job = next((job for job in may_run(rows.jobs.values()) if job_id in (None, job.id)), None)
            if job is None:
                return None
            rows.set(job.id, state="running", reason="starting", started=time.time())
            return job.id

        claimed = self._change(work)
        return None if claimed is None else self.get(claimed)

    def report(
        self,
        job_id: int,
        *,
        progress: float | None = None,
        reason: str | None = None,
        epoch: int | None = None,
        seconds_left: float | None = None,
        curve: Sequence[Mapping[str, Any]] | None = None,
        manifest: Mapping[str, str] | None = None,
    ) -> None:
        """Write down how far a running job is; what is not given stays."""
        given = {
            "progress": progress,
            "reason": reason,
            "epoch": epoch,
            "seconds_left": seconds_left,
            "curve": None if curve is None else [dict(point) for point in curve],
            "manifest": None if manifest is None else dict(manifest),
        }
        values = {name: value for name, value in given.items() if value is not None}

        def work(rows: Rows) -> None:
            if (job := rows.jobs.get(job_id)) is not None and job.state == "running":
                rows.set(job_id, **values)

        self._change(work)

    def finish(
        self,
        job_id: int,
        state: State,
        reason: str,
        *,
        version: str | None = None,
        record: Mapping[str, Any] | None = None,
    ) -> bool:
        """End a job that has not ended yet; returns whether it was this call that ended it."""
        if state not in FINAL:
            raise ValueError(f"a job ends as one of {', '.join(FINAL)}, not {state!r}")
        values: dict[str, Any] = {"state": state, "reason": reason, "version": version, "seconds_left": None}
        if state not in IN_VAIN:
            values["progress"] = 1.0
        if record is not None:
            values["record"] = dict(record)

        def work(rows: Rows) -> bool:
            job = rows.jobs.get(job_id)
            if job is None or job.state in FINAL:
                return False
            rows.set(job_id, finished=time.time(), **values)
            return True

        return self._change(work)

    def requeue(self, job_id: int, reason: str, *, count: bool) -> None:
        """Put a running job back in the queue, where it goes on from its resume file; `count` it as a restart.

        A later job of the project that waits behind it goes on waiting: it learns what was labelled meanwhile.
        """

        def work(rows: Rows) -> None:
            job = rows.jobs.get(job_id)
            if job is None or job.state != "running":
                return
            rows.set(job_id, state="queued", reason=reason, restarts=job.restarts + int(count), seconds_left=None)

        self._change(work)

    def cancel(self, job_id: int) -> bool:
        """Cancel a queued job, or ask a running one to end; returns whether there was anything to cancel."""

        def work(rows: Rows) -> bool:
            job = rows.jobs.get(job_id)
            if job is None or job.state in FINAL:
                return False
            if job.state == "queued":
                reason = "cancelled before it started" if job.started is None else "cancelled"
                rows.set(job_id, cancel=True, state="cancelled", reason=reason, finished=time.time())
            else:
                rows.set(job_id, cancel=True, reason="being cancelled")
            return True

        return self._change(work)

    def retry(self, job_id: int) -> int | None:
        """Queue a failed or cancelled job again; returns the id of the job that waits, `None` for any other state.

        It goes on with its data where that is still there and nothing was published meanwhile. A job of the project
        that waits unbegun does in its place.
        """

        def work(rows: Rows) -> int | None:
            job = rows.jobs.get(job_id)
            if job is None or job.state not in IN_VAIN:
                return None
            if (waits := _waiting(rows, job.project)) is not None:
                return waits.id
            rows.set(job_id, state="queued", reason="to be run again", cancel=False, restarts=0, finished=None)
            return job_id

        return self._change(work)

    def prune(self, project: str, keep: Collection[int] = (), newest: int = KEPT) -> list[int]:
        """Forget a project's ended jobs but the `newest`, those of `keep` and the last that learnt; returns their ids.

        The last that learnt tells what is new since. Their folders go too.
        """

        def work(rows: Rows) -> list[int]:
            ended = [job for job in rows.jobs.values() if job.project == project and job.state in FINAL]
            ended.sort(key=ended_at)
            last = next((job.id for job in reversed(ended) if job.state not in IN_VAIN), None)
            gone = [job.id for job in ended[: max(0, len(ended) - newest)] if job.id != last and job.id not in keep]
            for old in gone:
                rows.remove(old)
            return gone

        gone = self._change(work)
        for old in gone:
            shutil.rmtree(self.folder(old), ignore_errors=True)
        return gone


def may_run(jobs: Collection[Job]) -> list[Job]:
    """The oldest queued job of each project of which none is running, oldest first."""
    running = {job.project for job in jobs if job.state == "running"}
    oldest: dict[str, Job] = {}
    for job in sorted(jobs, key=lambda job: job.id):
        if job.state == "queued" and job.project not in running:
            oldest.setdefault(job.project, job)
    return list(oldest.values())


def ended_at(job: Job) -> float:
    """For sorting ended jobs: a job that was run again ended later than its number says."""
    return job.finished or job.created


def _waiting(rows: Rows, project: str) -> Job | None:
    """The project's queued job that will learn whatever is labelled by then, as it has not begun."""
    waiting = (job for job in rows.jobs.values() if job.project == project and job.state == "queued")
    return next((job for job in waiting if job.started is None), None)

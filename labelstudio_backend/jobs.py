"""The durable queue of training jobs, in SQLite."""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

State = Literal["queued", "running", "succeeded", "refused", "failed", "cancelled"]
STOPPED = 75  # EX_TEMPFAIL: a job's process says that it was asked to end by SIGTERM
FINAL: tuple[State, ...] = ("succeeded", "refused", "failed", "cancelled")
_LABEL_STUDIO_STATES: dict[State, str] = {
    "queued": "queued",
    "running": "started",
    "succeeded": "finished",
    "refused": "finished",
    "failed": "failed",
    "cancelled": "canceled",
}

_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    project TEXT NOT NULL,
    trigger TEXT NOT NULL,
    state TEXT NOT NULL DEFAULT 'queued',
    reason TEXT NOT NULL DEFAULT '',
    progress REAL NOT NULL DEFAULT 0,
    restarts INTEGER NOT NULL DEFAULT 0,
    cancel INTEGER NOT NULL DEFAULT 0,
    version TEXT,
    created REAL NOT NULL,
    started REAL,
    finished REAL,
    manifest TEXT,
    record TEXT NOT NULL DEFAULT '{}'
);
CREATE INDEX IF NOT EXISTS jobs_by_project ON jobs (project, id);
"""


@dataclass(frozen=True)
class Job:
    """One training job as the queue knows it.

    `trigger` says why it was queued; `reason` where it stands, or why it ended as it did; `progress` runs from 0 to 1;
    `manifest` maps task ids to what was learnt from them (`None` before the annotations were pulled); times are Unix
    seconds.
    """

    id: int
    project: str
    trigger: str
    state: State
    reason: str
    progress: float
    restarts: int
    cancel: bool
    version: str | None
    created: float
    started: float | None
    finished: float | None
    manifest: dict[str, str] | None = field(repr=False)
    record: dict[str, Any] = field(repr=False)


class Jobs:
    """The queue, in one SQLite file; every method is one short transaction on a connection of its own.

    Safe to use from any thread and any process.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._connect() as db:
            db.execute("PRAGMA journal_mode=WAL")
            db.executescript(_SCHEMA)

    @contextlib.contextmanager
    def _connect(self) -> Iterator[sqlite3.Connection]:
        db = sqlite3.connect(self.path, timeout=10.0, isolation_level=None)
        db.row_factory = sqlite3.Row
        try:
            yield db
        finally:
            db.close()

    @contextlib.contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        with self._connect() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
            except BaseException:
                db.execute("ROLLBACK")
                raise
            db.execute("COMMIT")

    def folder(self, job_id: int) -> Path:
        """The job's own folder: log, lock, images, checkpoints."""
        return self.path.parent / "jobs" / str(job_id)

    def enqueue(self, project: str, trigger: str) -> int:
        """Queue a training of `project` and return the job's id; a job of the project that still waits absorbs it."""
        with self._write() as db:
            row = db.execute("SELECT id FROM jobs WHERE project = ? AND state = 'queued'", (project,)).fetchone()
            if row is not None:
                return int(row["id"])
            cursor = db.execute(
                "INSERT INTO jobs (project, trigger, created) VALUES (?, ?, ?)", (project, trigger, time.time())
            )
            assert cursor.lastrowid is not None
            return cursor.lastrowid

    def get(self, job_id: int) -> Job | None:
        """The job, or `None` where there is no such job."""
        jobs = self._select("WHERE id = ?", (job_id,))
        return jobs[0] if jobs else None

    def status(self, job_id: str | int) -> dict[str, Any] | None:
        """What Label Studio's /job_status wants to know, or `None` where there is no such job."""
        job = self.get(int(job_id)) if str(job_id).isdecimal() else None
        if job is None:
            return None
        return {
            "job_status": _LABEL_STUDIO_STATES[job.state],
            "state": job.state,
            "reason": job.reason,
            "progress": job.progress,
            "model_version": job.version,
        }

    def find(
        self, project: str | None = None, *, states: tuple[State, ...] | None = None, brief: bool = False
    ) -> list[Job]:
        """All jobs, oldest first, of one project and in the given states if asked for.

        `brief` leaves out manifest (`None`) and record (empty), which grow with the tasks: reading them takes 0.3 s for
        200 jobs of 2000 tasks.
        """
        clauses, values = [], []
        if project is not None:
            clauses.append("project = ?")
            values.append(project)
        if states is not None:
            clauses.append(f"state IN ({', '.join('?' * len(states))})")
            values += states
        return self._select(f"WHERE {' AND '.join(clauses)}" if clauses else "", tuple(values), brief=brief)

    def _select(self, where: str, values: tuple[Any, ...], *, brief: bool = False) -> list[Job]:
        names = [column.name for column in fields(Job)]
        left_out = {"manifest": "NULL", "record": "'{}'"} if brief else {}
        chosen = ", ".join(f"{left_out.get(name, name)} AS {name}" for name in names)
        with self._connect() as db:
            rows = db.execute(f"SELECT {chosen} FROM jobs {where} ORDER BY id", values).fetchall()
        return [_job(row) for row in rows]

    def claim(self, parallel: int = 1) -> Job | None:
        """Mark the oldest job that may run as running, and return it.

        One job of a project runs at a time, and `parallel` in all.
        """
        with self._write() as db:
            running = [row["project"] for row in db.execute("SELECT project FROM jobs WHERE state = 'running'")]
            if len(running) >= parallel:
                return None
            for row in db.execute("SELECT * FROM jobs WHERE state = 'queued' ORDER BY id").fetchall():
                if row["project"] not in running:
                    db.execute(
                        "UPDATE jobs SET state = 'running', reason = 'starting', started = ? WHERE id = ?",
                        (time.time(), row["id"]),
                    )
                    return _job(db.execute("SELECT * FROM jobs WHERE id = ?", (row["id"],)).fetchone())
        return None

    def report(
        self,
        job_id: int,
        *,
        progress: float | None = None,
        reason: str | None = None,
        manifest: Mapping[str, str] | None = None,
    ) -> None:
        """Write down how far a running job is."""
        values = {
            "progress": progress,
            "reason": reason,
            "manifest": None if manifest is None else json.dumps(dict(manifest)),
        }
        values = {name: value for name, value in values.items() if value is not None}
        columns = ", ".join(f"{name} = ?" for name in values)
        with self._write() as db:
            db.execute(f"UPDATE jobs SET {columns} WHERE id = ? AND state = 'running'", (*values.values(), job_id))

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
        with self._write() as db:
            cursor = db.execute(
                "UPDATE jobs SET state = ?, reason = ?, version = ?, record = COALESCE(?, record), finished = ?,"
                " progress = CASE WHEN ? THEN 1.0 ELSE progress END"
                " WHERE id = ? AND state IN ('queued', 'running')",
                (
                    state,
                    reason,
                    version,
                    None if record is None else json.dumps(dict(record)),
                    time.time(),
                    state in ("succeeded", "refused"),
                    job_id,
                ),
            )
            return cursor.rowcount == 1

    def requeue(self, job_id: int, reason: str, *, count: bool) -> None:
        """Put a running job back in the queue, where it goes on from its resume file; `count` it as a restart.

        A later job of the project that waits already is absorbed.
        """
        with self._write() as db:
            db.execute(
                "UPDATE jobs SET state = 'cancelled', finished = ?, reason = ? WHERE state = 'queued' AND project ="
                " (SELECT project FROM jobs WHERE id = ? AND state = 'running')",
                (time.time(), f"absorbed by job {job_id}, which goes on", job_id),
            )
            db.execute(
                "UPDATE jobs SET state = 'queued', reason = ?, restarts = restarts + ?"
                " WHERE id = ? AND state = 'running'",
                (reason, int(count), job_id),
            )

    def cancel(self, job_id: int) -> bool:
        """Cancel a queued job, or ask a running one to end; returns whether there was anything to cancel."""
        with self._write() as db:
            cursor = db.execute(
                "UPDATE jobs SET cancel = 1,"
                " reason = CASE state WHEN 'queued' THEN 'cancelled before it started' ELSE 'being cancelled' END,"
                " finished = CASE state WHEN 'queued' THEN ? ELSE finished END,"
                " state = CASE state WHEN 'queued' THEN 'cancelled' ELSE state END"
                " WHERE id = ? AND state IN ('queued', 'running')",
                (time.time(), job_id),
            )
            cancelled = cursor.rowcount == 1
        job = self.get(job_id)
        if cancelled and job is not None and job.state == "cancelled":
            tidy(self.folder(job_id))  # it may have run before
        return cancelled


def _job(row: sqlite3.Row) -> Job:
    values = dict(row)
    values["cancel"] = bool(values["cancel"])
    values["manifest"] = None if values["manifest"] is None else json.loads(values["manifest"])
    values["record"] = json.loads(values["record"])
    return Job(**values)


def tidy(folder: Path) -> None:
    """Remove from an ended job's folder what only a running one needs: images, checkpoints and exported files.

    Its log, its list of data and the curves stay.
    """
    for name in ("images", "serving"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for pattern in ("*.safetensors", "training/*.safetensors", "training/resume.pt"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)

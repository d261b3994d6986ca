"""The durable queue of training jobs, and the thread that runs them as processes of their own.

SQLite holds the queue; a file lock held by the job's process tells whether a running job is alive, which a PID cannot
(it is reused, and it says nothing after a restart of the machine).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

log = logging.getLogger(__name__)

State = Literal["queued", "running", "succeeded", "refused", "failed", "cancelled"]
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

    def find(self, project: str | None = None, *, states: tuple[State, ...] | None = None) -> list[Job]:
        """All jobs, oldest first, of one project and in the given states if asked for."""
        clauses, values = [], []
        if project is not None:
            clauses.append("project = ?")
            values.append(project)
        if states is not None:
            clauses.append(f"state IN ({', '.join('?' * len(states))})")
            values += states
        return self._select(f"WHERE {' AND '.join(clauses)}" if clauses else "", tuple(values))

    def _select(self, where: str, values: tuple[Any, ...]) -> list[Job]:
        with self._connect() as db:
            rows = db.execute(f"SELECT * FROM jobs {where} ORDER BY id", values).fetchall()
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
            return cursor.rowcount == 1


def _job(row: sqlite3.Row) -> Job:
    values = dict(row)
    values["cancel"] = bool(values["cancel"])
    values["manifest"] = None if values["manifest"] is None else json.loads(values["manifest"])
    values["record"] = json.loads(values["record"])
    return Job(**values)


def _try_lock(path: Path) -> int | None:
    """The descriptor of an exclusive lock on `path`, or `None` where another process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


class JobRunner:
    """A thread that starts queued jobs as processes and sees to it that each ends with a state and a reason.

    Args:
        jobs: the queue.
        command: gives the command line of a job's process.
        parallel: how many jobs run at once, over all projects.
        on_end: is called, in this thread, with each job that ended.
        stop_seconds: how long a process may take to end after SIGTERM before it is killed.
    """

    def __init__(
        self,
        jobs: Jobs,
        command: Callable[[Job], list[str]] | None = None,
        *,
        parallel: int = 1,
        on_end: Callable[[Job], None] = lambda job: None,
        stop_seconds: float = 20.0,
        poll_seconds: float = 0.5,
    ) -> None:
        self.jobs = jobs
        self._command = command or self._training_command
        self._parallel = parallel
        self._on_end = on_end
        self._stop_seconds = stop_seconds
        self._poll_seconds = poll_seconds
        self._children: dict[int, subprocess.Popen[bytes]] = {}
        self._terminated: dict[int, float] = {}
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="job-runner", daemon=True)

    def _training_command(self, job: Job) -> list[str]:
        # Its settings travel by the environment, which the command line of `serve` is written back into.
        return [sys.executable, "-m", "labelstudio_backend.training_job", str(job.id)]

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def wake(self) -> None:
        """Look at the queue now rather than at the next poll."""
        self._wake.set()

    def stop(self) -> None:
        """End the thread and, politely, the running jobs, which go back to the queue and go on after a restart."""
        self._stopping.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()
        running = self.jobs.find(states=("running",))
        for job in running:
            self._signal(job, signal.SIGTERM)
        deadline = time.monotonic() + self._stop_seconds
        for job in running:
            while self._alive(job) and time.monotonic() < deadline:
                time.sleep(0.02)
            self._signal(job, signal.SIGKILL)
            if (child := self._children.pop(job.id, None)) is not None:
                child.wait()
            ended = self.jobs.get(job.id)
            if ended is not None and ended.state == "running":
                if ended.cancel:
                    self.jobs.finish(job.id, "cancelled", "cancelled")
                else:
                    self.jobs.requeue(job.id, "the server was stopped; goes on when it starts again", count=False)

    def _loop(self) -> None:
        while not self._stopping.is_set():
            try:
                self._step()
            except (sqlite3.Error, OSError):
                # A full disk or a busy database: nothing is lost, the state of things is looked at again.
                log.exception("the job queue could not be worked on; trying again")
                self._stopping.wait(5.0)
            self._wake.wait(self._poll_seconds)
            self._wake.clear()

    def _step(self) -> None:
        for job in self.jobs.find(states=("running",)):
            child = self._children.get(job.id)
            if child is None:
                self._adopt(job)
            elif (code := child.poll()) is not None:
                self._settle(job, code)
                del self._children[job.id]
            elif job.cancel:
                self._end(job)
        # What is left has ended by its own hand: its process wrote the outcome itself.
        for job_id, child in list(self._children.items()):
            ended = self.jobs.get(job_id)
            if child.poll() is not None and ended is not None and ended.state != "running":
                del self._children[job_id]
                self._ended(ended)
        while not self._stopping.is_set() and (claimed := self.jobs.claim(self._parallel)) is not None:
            self._spawn(claimed)

    def _spawn(self, job: Job) -> None:
        folder = self.jobs.folder(job.id)
        lock = None
        try:
            lock = _try_lock(folder / "lock")
            if lock is None:
                raise OSError(f"the lock {folder / 'lock'} is held by another process")
            # The child inherits the locked descriptor, so the job is never running without its lock being held.
            with (folder / "log.txt").open("ab") as out:
                child = subprocess.Popen(
                    self._command(job),
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    pass_fds=(lock,),
                    start_new_session=True,
                )
            self._children[job.id] = child
            (folder / "pid").write_text(str(child.pid))
        except OSError as error:
            self.jobs.finish(job.id, "failed", f"the job's process could not be started: {error}")
            self._report_end(job.id)
            return
        finally:
            if lock is not None:
                os.close(lock)
        log.info("job %d of %s started: %s", job.id, job.project, job.trigger)

    def _adopt(self, job: Job) -> None:
        """See to a running job that a former server started: still alive, or to be started again, once."""
        lock = _try_lock(self.jobs.folder(job.id) / "lock")
        if lock is None:
            if job.cancel:
                self._end(job)
            return
        os.close(lock)
        fresh = self.jobs.get(job.id)
        if fresh is None or fresh.state != "running":
            if fresh is not None:
                self._ended(fresh)
        elif fresh.cancel:
            self.jobs.finish(job.id, "cancelled", "cancelled")
            self._report_end(job.id)
        elif fresh.restarts == 0:
            log.warning("job %d was interrupted; it goes on", job.id)
            self.jobs.requeue(job.id, "interrupted with the server; goes on", count=True)
        else:
            self.jobs.finish(job.id, "failed", "interrupted twice together with the server; train again to retry")
            self._report_end(job.id)

    def _alive(self, job: Job) -> bool:
        if (child := self._children.get(job.id)) is not None:
            return child.poll() is None
        lock = _try_lock(self.jobs.folder(job.id) / "lock")
        if lock is not None:
            os.close(lock)
        return lock is None

    def _signal(self, job: Job, number: signal.Signals) -> None:
        """Signal a job's process, if that is alive (so the PID is still its own); kill its helpers with it."""
        if self._alive(job):
            with contextlib.suppress(ProcessLookupError, FileNotFoundError, ValueError):
                pid = int((self.jobs.folder(job.id) / "pid").read_text())
                if number == signal.SIGKILL:
                    os.killpg(pid, number)
                else:
                    os.kill(pid, number)

    def _end(self, job: Job) -> None:
        """End the process of a cancelled job: politely at first."""
        began = self._terminated.setdefault(job.id, time.monotonic())
        late = time.monotonic() - began > self._stop_seconds
        self._signal(job, signal.SIGKILL if late else signal.SIGTERM)

    def _settle(self, job: Job, code: int) -> None:
        """Give an end to a job whose process is gone without having written one."""
        if job.cancel:
            self.jobs.finish(job.id, "cancelled", "cancelled")
        elif code < 0:
            name = signal.Signals(-code).name
            hint = " (out of memory, perhaps)" if -code == signal.SIGKILL else ""
            self.jobs.finish(job.id, "failed", f"the job's process was killed by {name}{hint}")
        else:
            where = self.jobs.folder(job.id) / "log.txt"
            self.jobs.finish(job.id, "failed", f"the job's process ended with exit code {code}; see {where}")
        self._report_end(job.id)

    def _report_end(self, job_id: int) -> None:
        job = self.jobs.get(job_id)
        if job is not None:
            self._ended(job)

    def _ended(self, job: Job) -> None:
        self._terminated.pop(job.id, None)
        log.info("job %d of %s %s: %s", job.id, job.project, job.state, job.reason)
        try:
            self._on_end(job)
        except Exception:
            log.exception("the end of job %d could not be passed on", job.id)

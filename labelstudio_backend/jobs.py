"""The queue of training jobs of one server, in SQLite."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from labelstudio_backend.job import LONG, Job, State
from labelstudio_backend.job_queue import JobQueue, QueueError, Rows
from labelstudio_backend.settings import Settings
from yolonas.errors import MissingPackageError

if TYPE_CHECKING:
    from labelstudio_backend.redis_jobs import RedisJobs

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
_LATER = {"epoch": "INTEGER", "seconds_left": "REAL", "curve": "TEXT NOT NULL DEFAULT '[]'"}  # columns added since
_COLUMNS = [column.name for column in dataclasses.fields(Job)]
_LEFT_OUT = {"curve": "'[]'", "manifest": "NULL", "record": "'{}'"}

T = TypeVar("T")


class Jobs(JobQueue):
    """The queue in one SQLite file on a local disk; every method is one short transaction on a connection of its own.

    Safe to use from any thread and any process of this machine. All raise QueueError, on a full disk for instance.
    """

    def __init__(self, path: Path, folder: Path | None = None) -> None:
        self.path = Path(path)
        super().__init__(folder or self.path.parent / "jobs")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._connect() as db:
            db.execute("PRAGMA journal_mode=WAL")
            db.executescript(_SCHEMA)
            if not _LATER.keys() <= _columns(db):
                self._add_columns()

    def _add_columns(self) -> None:
        with self._write() as db:
            for name in _LATER.keys() - _columns(db):
                db.execute(f"ALTER TABLE jobs ADD COLUMN {name} {_LATER[name]}")

    @contextlib.contextmanager
    def _connect(self) -> Iterator[sqlite3.Connection]:
        try:
            with contextlib.closing(sqlite3.connect(self.path, timeout=10.0, isolation_level=None)) as db:
                db.row_factory = sqlite3.Row
                yield db
        except sqlite3.Error as error:  # on a full disk it cannot even be read, as SQLite has to write for that
            raise QueueError(
                f"the queue of trainings, {self.path}, cannot be read or written ({error}); free some disk space or "
                "mend its permissions"
            ) from error

    @contextlib.contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        with self._connect() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
            except BaseException:
                if db.in_transaction:  # a full disk has ended it
                    db.execute("ROLLBACK")
                raise
            db.execute("COMMIT")

    def _change(self, work: Callable[[Rows], T]) -> T:
        with self._write() as db:
            return work(_SqliteRows(db))

    def get(self, job_id: int) -> Job | None:
        with self._connect() as db:
            jobs = _select(db, "WHERE id = ?", (job_id,))
        return jobs[0] if jobs else None

    def find(
        self, project: str | None = None, *, states: tuple[State, ...] | None = None, brief: bool = False
    ) -> list[Job]:
        clauses, values = [], []
        if project is not None:
            clauses.append("project = ?")
            values.append(project)
        if states is not None:
            clauses.append(f"state IN ({', '.join('?' * len(states))})")
            values += states
        with self._connect() as db:
            where = f"WHERE {' AND '.join(clauses)}" if clauses else ""
            return _select(db, where, tuple(values), brief=brief)


def open_jobs(settings: Settings) -> Jobs | RedisJobs:
    """The queue that the settings name: in Redis where `YOLONAS_QUEUE` is set, else in the state folder."""
    if settings.queue is None:
        return Jobs(settings.state_dir / "jobs.sqlite", settings.jobs_dir)
    try:
        from labelstudio_backend.redis_jobs import RedisJobs
    except ModuleNotFoundError as error:
        raise MissingPackageError("YOLONAS_QUEUE needs RQ: pip install 'yolonas[redis]'") from error
    return RedisJobs.open(settings.queue.get_secret_value(), settings.jobs_dir)


class _SqliteRows:
    """The jobs within one transaction."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self.jobs = {job.id: job for job in _select(db, brief=True)}

    def add(self, project: str, trigger: str) -> int:
        cursor = self._db.execute(
            "INSERT INTO jobs (project, trigger, created) VALUES (?, ?, ?)", (project, trigger, time.time())
        )
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def set(self, job_id: int, **values: Any) -> None:
        stored = [json.dumps(value) if name in LONG else value for name, value in values.items()]
        assignments = ", ".join(f"{name} = ?" for name in values)
        self._db.execute(f"UPDATE jobs SET {assignments} WHERE id = ?", (*stored, job_id))

    def remove(self, job_id: int) -> None:
        self._db.execute("DELETE FROM jobs WHERE id = ?", (job_id,))


def _columns(db: sqlite3.Connection) -> set[str]:
    return {row["name"] for row in db.execute("PRAGMA table_info(jobs)")}


def _select(db: sqlite3.Connection, where: str = "", values: tuple[Any, ...] = (), *, brief: bool = False) -> list[Job]:
    left_out = _LEFT_OUT if brief else {}
    chosen = ", ".join(f"{left_out.get(name, name)} AS {name}" for name in _COLUMNS)
    rows = db.execute(f"SELECT {chosen} FROM jobs {where} ORDER BY id", values).fetchall()
    return [_job(row) for row in rows]


def _job(row: sqlite3.Row) -> Job:
    values = dict(row)
    values["cancel"] = bool(values["cancel"])
    values |= {name: None if values[name] is None else json.loads(values[name]) for name in LONG}
    return Job(**values)

"""The queue of training jobs of several servers, in Redis; RQ's workers run what is handed to them.

Redis is the truth of what is queued, running and ended; RQ only carries "job 12 may run" to a worker, which claims the
job here first. So an entry of RQ that is lost is made again, and one that comes twice does nothing. Whether a running
job is alive tells the lock in its folder, which servers and workers share.

    yolonas:jobs        hash: id -> JSON of the job without its long fields
    yolonas:job:<id>    hash: its long fields, JSON each
    yolonas:last_job    the last id
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast
from uuid import uuid4

from redis import Redis
from redis.client import Pipeline
from redis.exceptions import RedisError
from rq import Queue

from labelstudio_backend.job import LONG, Job, State
from labelstudio_backend.job_queue import JobQueue, QueueError, Rows, may_run

JOBS, LONG_FIELDS, LAST = "yolonas:jobs", "yolonas:job:", "yolonas:last_job"
QUEUE = "yolonas"  # RQ's name of it: `rq worker yolonas`
WORK = "labelstudio_backend.worker.work"
_PREFIX = "yolonas-"

T = TypeVar("T")


class RedisJobs(JobQueue):
    """The queue in one Redis database; every change is one optimistic transaction (WATCH, MULTI).

    Safe to use from any thread, process and machine. Raises QueueError where Redis does not answer.
    """

    def __init__(self, redis: Redis, folder: Path) -> None:
        super().__init__(folder)
        self.redis = redis

    @classmethod
    def open(cls, url: str, folder: Path) -> RedisJobs:
        """The queue at this address; nothing is connected yet."""
        return cls(Redis.from_url(url, socket_connect_timeout=5.0, socket_timeout=5.0), folder)

    def _change(self, work: Callable[[Rows], T]) -> T:
        results: list[T] = []

        def attempt(pipe: Pipeline) -> None:
            rows = _RedisRows(self._brief(pipe), self._next_id)
            results[:] = [work(rows)]
            pipe.multi()
            rows.write(pipe)

        with _answering():
            self.redis.transaction(attempt, JOBS)
        return results[0]

    def get(self, job_id: int) -> Job | None:
        with _answering():
            text = self.redis.hget(JOBS, str(job_id))
            return None if text is None else self._whole(_job(cast(bytes, text)))

    def find(
        self, project: str | None = None, *, states: tuple[State, ...] | None = None, brief: bool = False
    ) -> list[Job]:
        with _answering():
            found = [
                job
                for job in self._brief(self.redis).values()
                if project in (None, job.project) and (states is None or job.state in states)
            ]
            return found if brief else [self._whole(job) for job in found]

    def dispatch(self) -> None:
        """See that each job that may run has an entry in RQ, for the next worker that has nothing to do."""
        ready = may_run(self.find(brief=True))
        if not ready:
            return
        with _answering():
            queue = Queue(QUEUE, connection=self.redis)
            there = {entry.removeprefix(_PREFIX).partition("-")[0] for entry in queue.get_job_ids()}
            for job in ready:
                if str(job.id) not in there:
                    # A training has a time budget of its own, and RQ's record of it is of no use afterwards.
                    queue.enqueue_call(
                        WORK,
                        (job.id,),
                        timeout=-1,
                        result_ttl=0,
                        failure_ttl=24 * 3600,
                        description=f"training {job.id} of project {job.project}",
                        job_id=f"{_PREFIX}{job.id}-{uuid4().hex[:8]}",
                    )

    def _brief(self, redis: Redis) -> dict[int, Job]:
        jobs = [_job(text) for text in cast("dict[bytes, bytes]", redis.hgetall(JOBS)).values()]
        return {job.id: job for job in sorted(jobs, key=lambda job: job.id)}

    def _whole(self, job: Job) -> Job:
        stored = cast("dict[bytes, bytes]", self.redis.hgetall(f"{LONG_FIELDS}{job.id}"))
        return dataclasses.replace(job, **{name.decode(): json.loads(text) for name, text in stored.items()})

    def _next_id(self) -> int:
        """A number that no job has had; one whose folder is there was given before this Redis forgot it."""
        while self.folder(number := int(self.redis.incr(LAST))).exists():
            pass
        return number


class _RedisRows:
    """The jobs within one transaction, and what it will write."""

    def __init__(self, jobs: dict[int, Job], next_id: Callable[[], int]) -> None:
        self.jobs = jobs
        self._next_id = next_id
        self._changed: dict[int, dict[Any, Any]] = {}  # their long fields
        self._removed: list[int] = []

    def add(self, project: str, trigger: str) -> int:
        job = Job(self._next_id(), project, trigger, created=time.time())
        self.jobs[job.id] = job
        self._changed[job.id] = {}
        return job.id

    def set(self, job_id: int, **values: Any) -> None:
        brief = {name: value for name, value in values.items() if name not in LONG}
        self.jobs[job_id] = dataclasses.replace(self.jobs[job_id], **brief)
        long = self._changed.setdefault(job_id, {})
        long.update({name: json.dumps(value) for name, value in values.items() if name in LONG})

    def remove(self, job_id: int) -> None:
        del self.jobs[job_id]
        self._removed.append(job_id)

    def write(self, pipe: Pipeline) -> None:
        for job_id, long in self._changed.items():
            brief = {field.name: getattr(self.jobs[job_id], field.name) for field in dataclasses.fields(Job)}
            pipe.hset(JOBS, str(job_id), json.dumps({name: brief[name] for name in brief if name not in LONG}))
            if long:
                pipe.hset(f"{LONG_FIELDS}{job_id}", mapping=long)
        for job_id in self._removed:
            pipe.hdel(JOBS, str(job_id))
            pipe.delete(f"{LONG_FIELDS}{job_id}")


def _job(text: bytes) -> Job:
    return Job(**json.loads(text))


@contextlib.contextmanager
def _answering() -> Iterator[None]:
    try:
        yield
    except RedisError as error:  # its text names host and port, never the password
        raise QueueError(f"the queue of trainings (YOLONAS_QUEUE) does not answer: {error}") from error

"""The thread by which a server hands queued jobs to workers on other machines, and hears how they end."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from labelstudio_backend.job import FINAL, Job
from labelstudio_backend.job_queue import QueueError
from labelstudio_backend.job_runner import go_on, tell_end
from labelstudio_backend.redis_jobs import RedisJobs
from labelstudio_backend.registry import Registry

log = logging.getLogger(__name__)


class RemoteRunner:
    """What `JobRunner` is to a server with a queue of its own; each server of a shared queue has one.

    All of them do the same, and none of it twice: a job whose worker died goes on once, as its lock is held meanwhile;
    an entry for RQ that two servers make is one too many, and finds nothing to do. Stopping a server stops no job.

    Args:
        jobs: the shared queue.
        registry: the shared versions.
        on_end: is called, in this thread, with each job that ended since this server started.
    """

    def __init__(
        self,
        jobs: RedisJobs,
        registry: Registry,
        *,
        on_end: Callable[[Job], None] = lambda job: None,
        poll_seconds: float = 1.0,
    ) -> None:
        self.jobs, self._registry = jobs, registry
        self._on_end = on_end
        self._poll_seconds = poll_seconds
        self._told: set[tuple[int, float | None]] | None = None  # ended jobs, each by its number and when it ended
        self._away = False
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="remote-runner", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout=8.0)

    def _loop(self) -> None:
        while not self._stopping.is_set():
            try:
                self.step()
                self._away = False
            except QueueError as error:
                if not self._away:
                    log.warning("%s; will look again", error)
                self._away = True
            except Exception:
                log.exception("the job queue could not be worked on; trying again")
            self._stopping.wait(self._poll_seconds * (5 if self._away else 1))

    def step(self) -> None:
        """Look once: jobs whose worker died, jobs that ended, jobs that may run."""
        for job in self.jobs.find(states=("running",), brief=True):
            go_on(self.jobs, self._registry, job)
        ended = self.jobs.find(states=FINAL, brief=True)
        marks = {(job.id, job.finished): job for job in ended}
        self._told = set(marks) if self._told is None else self._told & marks.keys()
        for mark, job in marks.items():
            if mark not in self._told:
                tell_end(self.jobs, job, self._on_end)
                self._told.add(mark)
        self.jobs.dispatch()

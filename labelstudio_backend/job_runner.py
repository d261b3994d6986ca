"""The thread that runs queued jobs as processes of their own, and sees to it that each ends with a reason.

A file lock held by a job's process tells whether a running job is alive, which a PID cannot: it is reused, and it says
nothing after a restart of the machine.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from labelstudio_backend.jobs import FINAL, STOPPED, Job, Jobs, tidy

log = logging.getLogger(__name__)


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
        running = self.jobs.find(states=("running",), brief=True)
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
                    tidy(self.jobs.folder(job.id))
                else:
                    self.jobs.requeue(job.id, "the server was stopped; goes on when it starts again", count=False)

    def _loop(self) -> None:
        swept = False
        while not self._stopping.is_set():
            try:
                if not swept:
                    for job in self.jobs.find(states=FINAL, brief=True):  # that ended while no server ran
                        tidy(self.jobs.folder(job.id))
                    swept = True
                self._step()
            except Exception:
                # A full disk or a busy database, mostly: nothing is lost, the state of things is looked at again.
                log.exception("the job queue could not be worked on; trying again")
                self._stopping.wait(5.0)
            self._wake.wait(self._poll_seconds)
            self._wake.clear()

    def _step(self) -> None:
        for job in self.jobs.find(states=("running",), brief=True):
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
        elif code in (STOPPED, -signal.SIGTERM):  # systemd tells every process of a service to end, not the server only
            log.info("job %d was told to end; it goes on", job.id)
            self.jobs.requeue(job.id, "told to end by SIGTERM; goes on", count=False)
            return
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
        tidy(self.jobs.folder(job.id))
        try:
            self._on_end(job)
        except Exception:
            log.exception("the end of job %d could not be passed on", job.id)


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

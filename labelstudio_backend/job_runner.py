"""The thread that runs queued jobs as processes of their own, and sees to it that each ends with a reason.

A file lock held by a job's process tells whether a running job is alive, which a PID cannot: it is reused, and it says
nothing after a restart of the machine.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

from labelstudio_backend.job import FINAL, IN_VAIN, STOPPED, Job, tidy
from labelstudio_backend.job_queue import JobQueue, QueueError, ended_at, may_run
from labelstudio_backend.locks import try_lock
from labelstudio_backend.registry import Registry
from labelstudio_backend.version import RegistryError

log = logging.getLogger(__name__)


class JobRunner:
    """A thread that starts queued jobs as processes and sees to it that each ends with a state and a reason.

    Args:
        jobs: the queue.
        registry: tells which version a job published that was killed before it could say so.
        command: gives the command line of a job's process.
        parallel: how many jobs run at once, over all projects.
        on_end: is called, in this thread, with each job that ended.
        stop_seconds: how long a process may take to end after SIGTERM before it is killed.
    """

    def __init__(
        self,
        jobs: JobQueue,
        registry: Registry,
        command: Callable[[Job], list[str]] | None = None,
        *,
        parallel: int = 1,
        on_end: Callable[[Job], None] = lambda job: None,
        stop_seconds: float = 20.0,
        poll_seconds: float = 0.5,
    ) -> None:
        self.jobs, self._registry = jobs, registry
        self._command = command or self._training_command
        self._parallel = parallel
        self._on_end = on_end
        self._stop_seconds = stop_seconds
        self._poll_seconds = poll_seconds
        self._children: dict[int, subprocess.Popen[bytes]] = {}
        self._untold: set[int] = set()  # others' that run, and what ended here: their end is still to be passed on
        self._terminated: dict[int, float] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="job-runner", daemon=True)

    def _training_command(self, job: Job) -> list[str]:
        # Its settings travel by the environment, which the command line of `serve` is written back into.
        return [sys.executable, "-m", "labelstudio_backend.training_job", str(job.id)]

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread and, politely, the running jobs, which go back to the queue and go on after a restart."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()
        self._interrupt(self.jobs.find(states=("running",), brief=True))

    def run_one(self, job_id: int) -> None:
        """Run this queued job here, if it may run, without the thread: to its end, or until `interrupt` is called.

        For a worker: other jobs of the queue run elsewhere.
        """
        lock = self._start(job_id, None)
        if lock is None:
            return
        try:
            while (child := self._children.get(job_id)) is not None and not self._stopping.is_set():
                with contextlib.suppress(QueueError):  # away for a while: the process goes on
                    if (job := self.jobs.get(job_id)) is not None:
                        self._watch(job, child)
                time.sleep(self._poll_seconds)
            if job_id in self._children and (job := self.jobs.get(job_id)) is not None:
                self._interrupt([job])
        finally:  # until the end is written down, too
            os.close(lock)

    def interrupt(self) -> None:
        """Have `run_one` end its job's process politely, from a signal handler."""
        self._stopping.set()

    def _lock(self, job_id: int) -> int | None:
        """The job's lock; others hold it for a moment when they look whether it is alive."""
        folder = self.jobs.folder(job_id)
        folder.mkdir(parents=True, exist_ok=True)
        for _ in range(20):
            if (lock := try_lock(folder / "lock")) is not None:
                return lock
            time.sleep(0.05)
        return None

    def _interrupt(self, running: list[Job]) -> None:
        """End these jobs' processes politely and put the jobs back into the queue."""
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
            if ended is None or ended.state != "running":
                continue
            if not (ended.cancel and end_as_known(self.jobs, self._registry, ended)):
                self.jobs.requeue(job.id, "stopped with the server or worker; goes on", count=False)

    def _loop(self) -> None:
        swept = False
        while not self._stopping.is_set():
            try:
                if not swept:
                    for project in {job.project for job in self.jobs.find(brief=True)}:  # while no server ran
                        tidy_ended(self.jobs, project)
                    swept = True
                self._step()
            except QueueError as error:  # nothing is lost, the state of things is looked at again
                log.warning("the job queue could not be worked on; trying again: %s", error)
                self._stopping.wait(5.0)
            except Exception:
                log.exception("the job queue could not be worked on; trying again")
                self._stopping.wait(5.0)
            self._stopping.wait(self._poll_seconds)

    def _step(self) -> None:
        running = self.jobs.find(states=("running",), brief=True)
        for job_id in self._untold - {job.id for job in running} - self._children.keys():
            self._report_end(job_id)
        for job in running:
            if job.id not in self._children:
                self._adopt(job)
        for job_id, child in list(self._children.items()):
            if (mine := self.jobs.get(job_id)) is not None:
                self._watch(mine, child)
        for ready in may_run(self.jobs.find(states=("queued", "running"), brief=True)):
            if not self._stopping.is_set() and (lock := self._start(ready.id, self._parallel)) is not None:
                os.close(lock)  # its process has it

    def _watch(self, job: Job, child: subprocess.Popen[bytes]) -> None:
        """See whether the job's process ended, or has to."""
        code = child.poll()
        if code is None:
            if job.cancel and job.state == "running":
                self._end(job)
        else:
            self._untold.add(job.id)
            del self._children[job.id]
            fresh = self.jobs.get(job.id) or job
            if fresh.state == "running":
                self._settle(fresh, code)
            else:  # by its own hand: its process wrote the outcome itself
                self._report_end(job.id)

    def _start(self, job_id: int, parallel: int | None) -> int | None:
        """Start a job that may run; returns its lock, which the caller has to close, None where it may not."""
        if (lock := self._lock(job_id)) is None:
            return None  # it runs already
        try:  # locked before it is marked as running, or another server would take it for dead
            if (job := self.jobs.claim(parallel, job_id=job_id)) is not None:
                self._spawn(job, lock)
                return lock
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)
        return None

    def _spawn(self, job: Job, lock: int) -> None:
        folder = self.jobs.folder(job.id)
        try:
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
            if (begun := self._children.pop(job.id, None)) is not None:  # nobody could end it without its PID
                begun.kill()
                begun.wait()
            self.jobs.finish(job.id, "failed", f"the job's process could not be started: {error}")
            self._report_end(job.id)
            return
        log.info("job %d of %s started: %s", job.id, job.project, job.trigger)

    def _adopt(self, job: Job) -> None:
        """See to a running job that a former server started: still alive, or to be started again, once."""
        self._untold.add(job.id)
        if not _held(self.jobs, job):
            if go_on(self.jobs, self._registry, job) is not None:
                self._report_end(job.id)
        elif job.cancel:
            self._end(job)

    def _alive(self, job: Job) -> bool:
        if (child := self._children.get(job.id)) is not None:
            return child.poll() is None
        return _held(self.jobs, job)

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
        if not end_as_known(self.jobs, self._registry, job):
            if code in (STOPPED, -signal.SIGTERM):  # systemd ends every process of a service, not the server only
                log.info("job %d was told to end; it goes on", job.id)
                self.jobs.requeue(job.id, "told to end by SIGTERM; goes on", count=False)
                return
            if code < 0:
                name = signal.Signals(-code).name
                hint = " (out of memory, perhaps)" if -code == signal.SIGKILL else ""
                if once_more(self.jobs, job, f"the job's process was killed by {name}{hint}"):
                    return
            else:
                where = self.jobs.folder(job.id) / "log.txt"
                self.jobs.finish(job.id, "failed", f"the job's process ended with exit code {code}; see {where}")
        self._report_end(job.id)

    def _report_end(self, job_id: int) -> None:
        """Pass on that a job ended, unless it was put back into the queue."""
        job = self.jobs.get(job_id)
        if job is not None and job.state in FINAL:
            self._terminated.pop(job_id, None)
            tell_end(self.jobs, job, self._on_end)
        self._untold.discard(job_id)


def tell_end(jobs: JobQueue, job: Job, on_end: Callable[[Job], None]) -> None:
    """Log that a job ended, tidy up after its project's jobs, and pass the end on; what fails there is logged.

    Raises QueueError where the queue does not answer; then nothing was passed on.
    """
    log.info("job %d of %s %s: %s", job.id, job.project, job.state, job.reason)
    tidy_ended(jobs, job.project)
    try:
        on_end(job)
    except Exception:
        log.exception("the end of job %d could not be passed on", job.id)


def finish_published(jobs: JobQueue, registry: Registry, job: Job) -> bool:
    """End a running job that was killed after it had published its version; returns whether it was.

    The version becomes current where the job was killed before it could make it so.
    """
    try:
        project = registry.project(job.project)
        if (version := project.made_by(job.id, job.created)) is None:
            return False
        project.take_over(version.number)
    except (RegistryError, ValueError, OSError) as error:  # a record that is no JSON, a folder that cannot be read
        log.warning("whether job %d has published a version cannot be told: %s", job.id, error)
        return False
    record = {name: value for name, value in version.record.items() if name != "manifest"}
    reason = f"published {version.name}; its process ended before it could say more"
    jobs.finish(job.id, "succeeded", reason, version=version.name, record=record)
    return True


def end_as_known(jobs: JobQueue, registry: Registry, job: Job) -> bool:
    """End a running job whose process is gone, if it had published a version or was cancelled; returns whether."""
    if finish_published(jobs, registry, job):
        return True
    if job.cancel:
        jobs.finish(job.id, "cancelled", "cancelled")
    return job.cancel


def once_more(jobs: JobQueue, job: Job, why: str) -> bool:
    """Have a running job whose process died go on, or fail if it has gone on before; returns whether it goes on."""
    if job.restarts == 0:
        log.warning("job %d goes on: %s", job.id, why)
        jobs.requeue(job.id, f"{why}; goes on", count=True)
        return True
    again = f"its labels are learnt by the next training, or run it again: yolonas-labelstudio jobs retry {job.id}"
    jobs.finish(job.id, "failed", f"{why} after it had gone on once; {again}")
    return False


def go_on(jobs: JobQueue, registry: Registry, job: Job) -> Job | None:
    """Have a running job whose process is gone go on, once; returns the job where it ended instead.

    Nothing where it is alive after all.
    """
    folder = jobs.folder(job.id)
    folder.mkdir(parents=True, exist_ok=True)
    lock = try_lock(folder / "lock")
    if lock is None:
        return None
    try:  # held, so that nobody starts it meanwhile
        fresh = jobs.get(job.id)
        if fresh is None or fresh.state != "running":
            return fresh if fresh is not None and fresh.state in FINAL else None
        if not end_as_known(jobs, registry, fresh) and once_more(jobs, fresh, "interrupted"):
            return None
        return jobs.get(job.id)
    finally:
        os.close(lock)


def tidy_ended(jobs: JobQueue, project: str) -> None:
    """Tidy the folders of a project's ended jobs, except that of the last one if it can be retried: its data stays."""
    ended = sorted(jobs.find(project, states=FINAL, brief=True), key=ended_at)
    last = len(ended) - bool(ended and ended[-1].state in IN_VAIN)
    for job in ended[:last]:
        tidy(jobs.folder(job.id))


def _held(jobs: JobQueue, job: Job) -> bool:
    """Whether a process holds the job's lock."""
    path = jobs.folder(job.id) / "lock"
    lock = try_lock(path) if path.exists() else None
    if lock is not None:
        os.close(lock)
    return lock is None and path.exists()

"""A worker of a shared queue: the command `yolonas-labelstudio worker`, and what RQ calls."""

from __future__ import annotations

import os
import signal
from typing import Any
from urllib.parse import urlsplit

import click

from labelstudio_backend import logs
from labelstudio_backend.cli import settings_from
from labelstudio_backend.job_runner import JobRunner
from labelstudio_backend.jobs import Jobs, open_jobs
from labelstudio_backend.registry import Registry
from labelstudio_backend.settings import Settings
from yolonas.errors import YolonasError


def work(job_id: int) -> None:
    """Run one job as a process of its own; RQ calls it in a fork, which therefore uses neither torch nor CUDA itself.

    Told to end (SIGTERM), it puts the job back into the queue, where it goes on from its resume file.
    """
    settings = Settings()
    runner = JobRunner(open_jobs(settings), Registry(settings.projects_dir))
    previous = signal.signal(signal.SIGTERM, lambda *_: runner.interrupt())
    try:
        runner.run_one(job_id)
    finally:
        signal.signal(signal.SIGTERM, previous)


@click.command()
@click.option("--state-dir", help="Folder of cached images, on this machine.")
@click.option("--shared-dir", help="Folder of versions and jobs' files that servers and workers share.")
@click.option("--label-studio-url", help="Where Label Studio is, for example http://localhost:8080.")
@click.option("--device", help="auto, cpu, cuda, cuda:1.  [default: auto]")
@click.option("--burst", is_flag=True, help="End when nothing is left to do.")
def worker(burst: bool, **options: Any) -> None:
    """Run trainings of a shared queue (YOLONAS_QUEUE) until Ctrl-C, one at a time.

    Ctrl-C and SIGTERM end a running training politely: it goes on at the next worker. `rq worker yolonas` does the
    same work, and finishes its training first.
    """
    settings = settings_from(**options)
    if settings.queue is None:
        raise YolonasError("a worker takes trainings from a shared queue: set YOLONAS_QUEUE=redis://HOST:6379/0")
    if not settings.can_train:
        raise YolonasError("a worker reads annotations: set YOLONAS_LABEL_STUDIO_URL and YOLONAS_LABEL_STUDIO_TOKEN")
    jobs = open_jobs(settings)
    assert not isinstance(jobs, Jobs)
    jobs.find(brief=True)  # one sentence, should Redis not answer

    from redis.exceptions import RedisError
    from rq import Worker

    from labelstudio_backend.redis_jobs import QUEUE

    class PoliteWorker(Worker):
        """Passes the wish to end on to the training, which would go on for minutes otherwise."""

        def request_stop(self, signum: Any, frame: Any) -> None:
            if self.horse_pid:
                os.kill(self.horse_pid, signal.SIGTERM)
            super().request_stop(signum, frame)  # type: ignore[no-untyped-call]

    logs.configure(settings.log_format)
    where = urlsplit(settings.queue.get_secret_value())
    shown = f"{where.hostname}:{where.port or 6379}" if where.hostname else where.path
    click.echo(f"Takes trainings from Redis at {shown}; versions are in {settings.projects_dir}. Ctrl-C ends it.")
    try:
        PoliteWorker([QUEUE], connection=jobs.redis).work(burst=burst, logging_level="WARNING")
    except RedisError as error:
        raise YolonasError(f"Redis at {shown} does not answer any more: {error}") from error

"""What a server does for a shared queue, on a real Redis."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from rq import Queue

from labelstudio_backend.job import Job
from labelstudio_backend.job_queue import QueueError
from labelstudio_backend.redis_jobs import QUEUE, RedisJobs
from labelstudio_backend.registry import Registry
from labelstudio_backend.remote_runner import RemoteRunner
from real_label_studio import wait


@pytest.fixture
def jobs(redis_url: str, tmp_path: Path) -> RedisJobs:
    return RedisJobs.open(redis_url, tmp_path / "jobs")


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "projects")


def waiting(jobs: RedisJobs) -> list[int]:
    return [entry.args[0] for entry in Queue(QUEUE, connection=jobs.redis).jobs]


def test_what_may_run_has_one_entry_and_a_lost_one_is_made_again(jobs: RedisJobs, registry: Registry) -> None:
    servers = [RemoteRunner(jobs, registry), RemoteRunner(jobs, registry)]
    first, other = jobs.enqueue("a", "x"), jobs.enqueue("b", "x")
    for server in servers:
        server.step()
    assert waiting(jobs) == [first, other]
    jobs.claim(None, job_id=first)
    Queue(QUEUE, connection=jobs.redis).empty()
    (jobs.folder(first)).mkdir(parents=True)
    later = jobs.enqueue("a", "x")
    jobs.dispatch()
    assert waiting(jobs) == [other], "one job of a project at a time"
    jobs.finish(first, "failed", "no")
    jobs.dispatch()
    assert waiting(jobs) == [other, later]


def test_each_server_hears_of_each_end_once(jobs: RedisJobs, registry: Registry) -> None:
    before = jobs.enqueue("a", "x")
    jobs.cancel(before)
    heard: list[tuple[int, int, str]] = []

    def server(number: int) -> RemoteRunner:
        def on_end(job: Job) -> None:
            heard.append((number, job.id, job.state))
            raise RuntimeError("no reason not to hear of the next")

        return RemoteRunner(jobs, registry, on_end=on_end)

    servers = [server(1), server(2)]
    first, other = jobs.enqueue("a", "x"), jobs.enqueue("b", "x")
    for step in range(4):
        for one in servers:
            one.step()
        if step == 0:
            jobs.cancel(first)
            jobs.finish(other, "refused", "worse")
        if step == 1:
            ends = [(first, "cancelled"), (other, "refused")]
            assert heard == [(number, *end) for number in (1, 2) for end in ends]
            heard.clear()
            jobs.retry(first)
        if step == 2:
            assert heard == []
            jobs.cancel(first)
    assert heard == [(1, first, "cancelled"), (2, first, "cancelled")], "it ended a second time"


def test_ends_that_come_while_redis_goes_away_are_heard_of_when_it_is_back(
    jobs: RedisJobs, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[int] = []
    server = RemoteRunner(jobs, registry, on_end=lambda job: heard.append(job.id))
    server.step()
    ended = [jobs.enqueue(project, "x") for project in ("a", "b")]
    for job_id in ended:
        jobs.finish(job_id, "refused", "worse")
    find = jobs.find

    def gone_after_the_first(project: str | None = None, **options: Any) -> list[Job]:
        if project is not None and heard:
            raise QueueError("Redis is away")
        return find(project, **options)

    with monkeypatch.context() as patch:
        patch.setattr(jobs, "find", gone_after_the_first)
        with pytest.raises(QueueError):
            server.step()
    for _ in range(2):
        server.step()
    assert heard == ended


def test_a_job_whose_worker_died_goes_on_once_and_then_has_failed(jobs: RedisJobs, registry: Registry) -> None:
    servers = [RemoteRunner(jobs, registry), RemoteRunner(jobs, registry)]
    job_id = jobs.enqueue("a", "x")
    for restarts, state in ((1, "queued"), (1, "failed")):
        assert jobs.claim(None, job_id=job_id) is not None  # and nobody holds its lock
        for server in servers:
            server.step()
        job = jobs.get(job_id)
        assert job is not None
        assert (job.restarts, job.state) == (restarts, state)


def test_a_job_whose_worker_died_after_publishing_has_succeeded(
    jobs: RedisJobs, registry: Registry, tmp_path: Path
) -> None:
    project = registry.register("http://ls", "5.1795289898")
    project.ensure_start("untrained-n", ["Car"])
    (weights := tmp_path / "model.safetensors").write_bytes(b"weights")
    job_id = jobs.enqueue(project.key, "x")
    assert jobs.claim(None, job_id=job_id) is not None  # and nobody holds its lock
    version = project.publish(weights, {"job": job_id})
    ended: list[Job] = []
    server = RemoteRunner(jobs, registry, on_end=ended.append)
    server._told = set()  # it has looked before
    server.step()
    assert [(job.state, job.version, job.restarts) for job in ended] == [("succeeded", version.name, 0)]


def test_a_number_is_not_given_again_after_redis_forgot_it(jobs: RedisJobs) -> None:
    first = jobs.enqueue("a", "x")
    jobs.folder(first).mkdir(parents=True)
    jobs.redis.flushall()
    assert jobs.enqueue("a", "x") == first + 1


def test_redis_away_is_one_sentence_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    away = RedisJobs.open(f"unix://{tmp_path}/nobody.sock", tmp_path)
    with pytest.raises(QueueError, match=r"YOLONAS_QUEUE.* does not answer"):
        away.enqueue("a", "x")
    runner = RemoteRunner(away, Registry(tmp_path), poll_seconds=0.001)
    with caplog.at_level(logging.WARNING):
        runner.start()
        wait(lambda: bool(caplog.records))
        runner._stopping.wait(0.2)
        runner.stop()
    assert len(caplog.records) == 1

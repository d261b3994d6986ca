"""Two servers and two workers on one real Redis, as processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from labelstudio_backend.job import Job
from labelstudio_backend.locks import try_lock
from labelstudio_backend.redis_jobs import RedisJobs
from labelstudio_backend.registry import Registry

REPLICA = Path(__file__).with_name("replica.py")
PROJECT = {"id": 5, "created_at": "2026-11-21T19:38:18.810449Z"}
UID = "5.1795289898"
CONFIG = (
    '<View><Image name="i" value="$image"/>'
    '<RectangleLabels name="l" toName="i"><Label value="Car"/></RectangleLabels></View>'
)
PIXEL = (
    "data:image/png;base64,"
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


class Cluster:
    def __init__(self, folder: Path, redis_url: str) -> None:
        self.folder, self.shared = folder, folder / "shared"
        self.jobs = RedisJobs.open(redis_url, self.shared / "jobs")
        self.registry = Registry(self.shared / "projects")
        self.processes: list[psutil.Popen] = []
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "YOLONAS_QUEUE": redis_url,
            "YOLONAS_SHARED_DIR": str(self.shared),
            "YOLONAS_WEIGHTS": "untrained-n",
            "YOLONAS_LABEL_STUDIO_URL": "http://127.0.0.1:9",  # nobody is there
            "YOLONAS_LABEL_STUDIO_TOKEN": "none",
        }

    def start(self, what: str, *options: str, **environment: str) -> psutil.Popen:
        name = f"{what}-{len(self.processes)}"
        environment = {**self.environment, "YOLONAS_STATE_DIR": str(self.folder / name), **environment}
        with (self.folder / f"{name}.log").open("wb") as log:
            process = psutil.Popen([sys.executable, REPLICA, what, *options], env=environment, stdout=log, stderr=log)
        self.processes.append(process)
        return process

    def server(self) -> httpx.Client:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.start("serve", YOLONAS_PORT=str(port))
        return httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30.0)

    def job(self, number: int) -> Job:
        job = self.jobs.get(number)
        assert job is not None
        return job

    def wait(self, condition: Callable[[], Any], what: str) -> Any:
        deadline = time.monotonic() + 90
        while not (found := condition()):
            if time.monotonic() > deadline:
                logs = "\n".join(f"{path}:\n{path.read_text()}" for path in self.folder.glob("*.log"))
                raise AssertionError(f"timed out: {what}; {self.jobs.find(brief=True)}\n{logs}")
            time.sleep(0.05)
        return found

    def lives(self, number: int) -> int:
        path = self.jobs.folder(number) / "lives"
        return len(path.read_text().splitlines()) if path.exists() else 0


def kill(process: psutil.Process) -> None:
    """As a machine that loses its power: the worker, RQ's fork of it, and the training."""
    tree = [process, *process.children(recursive=True)]
    for one in tree:
        one.kill()
    psutil.wait_procs(tree, 10)


@pytest.fixture
def cluster(tmp_path: Path, redis_url: str) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path, redis_url)
    yield cluster
    for process in cluster.processes:
        if process.is_running():
            kill(process)


def answering(server: httpx.Client) -> bool:
    try:
        return server.get("/health").status_code == 200
    except httpx.ConnectError:
        return False


def test_a_training_runs_once_on_a_worker_whatever_dies_and_every_server_serves_it(cluster: Cluster) -> None:
    a, b = cluster.server(), cluster.server()
    workers = [cluster.start("work"), cluster.start("work")]
    cluster.wait(lambda: answering(a) and answering(b), "servers")

    def setup(server: httpx.Client) -> str:
        body = {"project": UID, "hostname": "http://ls", "schema": CONFIG, "access_token": "", "extra_params": None}
        return str(server.post("/setup", json=body).json()["model_version"])

    def train(server: httpx.Client) -> int:
        return int(server.post("/webhook", json={"action": "START_TRAINING", "project": PROJECT}).json()["job"])

    def status(server: httpx.Client, job: int) -> dict[str, Any]:
        return dict(server.post("/job_status", json={"job": str(job)}).json())

    start = setup(a)
    assert setup(b) == start
    assert start.endswith("-v0")

    first = train(a)
    cluster.wait(lambda: cluster.job(first).curve, "the first life")
    assert status(b, first)["job_status"] == "started"
    busy = next(worker for worker in workers if len(worker.children(recursive=True)) > 1)
    kill(busy)
    cluster.wait(lambda: cluster.lives(first) == 2, "the second life")
    assert cluster.job(first).restarts == 1
    second = train(b)
    assert second != first
    assert train(a) == second, "absorbed by the one that waits"
    # nothing for it to do: one training of a project at a time
    cluster.start("work", "--burst").wait(60)
    assert (cluster.job(first).state, cluster.job(second).state) == ("running", "queued")

    (cluster.jobs.folder(first) / "go").touch()
    cluster.wait(lambda: cluster.job(first).state == "succeeded", "the end of the first job")
    version = start[:-1] + "1"
    cluster.wait(lambda: setup(a) == setup(b) == version, "both servers have loaded it")
    for server in (a, b):
        body = {"tasks": [{"id": 1, "data": {"image": PIXEL}}], "project": UID, "label_config": CONFIG}
        (prediction,) = server.post("/predict", json=body).json()["results"]
        assert prediction["model_version"] == version
        assert status(server, first)["job_status"] == "finished"
    assert cluster.lives(first) == 2

    cluster.wait(lambda: cluster.lives(second) == 1, "the second job")
    key = cluster.registry.projects()[0].key
    assert a.post(f"/api/jobs/{second}/cancel").json()["reason"] == "being cancelled"
    cluster.wait(lambda: status(b, second)["job_status"] == "canceled", "the cancellation")
    assert a.post(f"/api/projects/{key}/rollback", json={"version": 0}).json()["model_version"] == start
    cluster.wait(lambda: setup(b) == start, "the other server has loaded it")
    assert [version.number for version in cluster.registry.project(key).versions()] == [0, 1]


def test_a_worker_that_is_told_to_end_hands_its_training_on(cluster: Cluster) -> None:
    project = cluster.registry.register("http://ls", UID, CONFIG)
    project.ensure_start("untrained-n", ["Car"])
    job = cluster.jobs.enqueue(project.key, "x")
    cluster.jobs.dispatch()
    cluster.jobs.dispatch()
    worker = cluster.start("work")
    cluster.wait(lambda: cluster.lives(job) == 1, "the training")
    worker.terminate()
    assert worker.wait(30) == 0
    after = cluster.job(job)
    assert (after.state, after.restarts) == ("queued", 0)
    assert cluster.jobs.claim(None, job_id=job) is not None
    assert try_lock(cluster.jobs.folder(job) / "lock") is not None, "its process is gone"


def test_without_redis_or_a_queue_the_worker_says_one_sentence(tmp_path: Path) -> None:
    def output(**values: str) -> str:
        environment = {"PYTHONPATH": os.pathsep.join(sys.path), "YOLONAS_STATE_DIR": str(tmp_path), **values}
        done = subprocess.run([sys.executable, REPLICA, "work"], env=environment, capture_output=True, text=True)
        assert done.returncode == 1
        return done.stderr.strip()

    assert output().startswith("Error: a worker takes trainings from a shared queue: set YOLONAS_QUEUE=")
    queue = "redis://:secret@127.0.0.1:9/0"
    told = output(YOLONAS_QUEUE=queue, YOLONAS_LABEL_STUDIO_URL="http://ls", YOLONAS_LABEL_STUDIO_TOKEN="t")
    assert told.startswith("Error: the queue of trainings (YOLONAS_QUEUE) does not answer: ")
    assert len(told.splitlines()) == 1
    assert "secret" not in told

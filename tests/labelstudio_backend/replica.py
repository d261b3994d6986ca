"""A server and a worker of a shared queue for `test_several_servers`: real but for the model and the training.

`python replica.py serve` serves a model that sees one car; `python replica.py work` is `yolonas-labelstudio worker`
whose trainings wait for a file `go` in their folder; `python replica.py train JOB` is such a training.
"""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace
from typing import Any

import numpy as np

from labelstudio_backend import cli
from labelstudio_backend.job import Job
from labelstudio_backend.job_runner import JobRunner
from labelstudio_backend.jobs import open_jobs
from labelstudio_backend.registry import Registry
from labelstudio_backend.settings import Settings
from labelstudio_backend.version import Version


class Model:
    names = ("Car",)
    checkpoint = SimpleNamespace(conf=0.25, iou=0.7)

    def __init__(self, version: Version) -> None:
        pass

    def predict_batch(self, images: list[np.ndarray], **_: Any) -> list[Any]:
        from yolonas.inference.detections import Detections

        return [Detections(np.array([[0, 0, 9, 9]]), [0.9], [0], self.names, image.shape[:2]) for image in images]


def serve() -> None:
    import uvicorn

    from labelstudio_backend.app import create_app

    settings = Settings()
    uvicorn.run(create_app(settings, load=Model), host=settings.host, port=settings.port, log_level="warning")


def work() -> None:
    def command(self: JobRunner, job: Job) -> list[str]:
        return [sys.executable, __file__, "train", str(job.id)]

    JobRunner._training_command = command  # type: ignore[method-assign]
    cli.main(["worker", *sys.argv[2:]])


def train(job_id: int) -> None:
    settings = Settings()
    jobs = open_jobs(settings)
    job = jobs.get(job_id)
    assert job is not None
    with (jobs.folder(job_id) / "lives").open("a") as lives:
        lives.write(f"{time.time()}\n")
    jobs.report(job_id, progress=0.5, epoch=1, seconds_left=60.0, curve=[{"epoch": 1, "loss": 2.0}])
    while not (jobs.folder(job_id) / "go").exists():
        time.sleep(0.05)
    project = Registry(settings.projects_dir).project(job.project)
    weights = jobs.folder(job_id) / "model.safetensors"
    weights.write_bytes(b"weights")
    version = project.publish(weights, {"job": job_id, "labels": ["Car"]}, base=project.current().number)
    jobs.finish(job_id, "succeeded", "trained", version=version.name)


if __name__ == "__main__":
    train(int(sys.argv[2])) if sys.argv[1] == "train" else {"serve": serve, "work": work}[sys.argv[1]]()

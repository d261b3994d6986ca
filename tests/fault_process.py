"""The server, or one of its training processes, as `labelling_day.py` runs them: real, but for the network, which costs
nothing here; and able to kill themselves (SIGKILL) at a point with a name, once.

    python fault_process.py serve
    python fault_process.py job 7
    python fault_process.py work

FAULTS_FOLDER: while it holds a file `hold POINT`, every process that gets to POINT waits there, and says so by a file
`at POINT` with its PID; `killed` says that somebody died.
FAULTS_POINT: where to die. FAULTS_COUNT: the how-manieth time that the point is met.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import secrets
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from labelstudio_backend import cli, job_runner, reconcile, training_job
from labelstudio_backend.app import create_app
from labelstudio_backend.client import LabelStudio
from labelstudio_backend.gate import Verdict
from labelstudio_backend.job_queue import JobQueue
from labelstudio_backend.jobs import open_jobs
from labelstudio_backend.registry import ProjectRegistry
from labelstudio_backend.serving import Way
from labelstudio_backend.settings import Settings
from labelstudio_backend.training_data import TrainingData
from labelstudio_backend.version import CHECKPOINT, Version
from yolonas.inference.detections import Detections

FOLDER = Path(os.environ.get("FAULTS_FOLDER", "."))
POINT, COUNT = os.environ.get("FAULTS_POINT", ""), int(os.environ.get("FAULTS_COUNT", "1"))
EPOCHS, EPOCH_SECONDS = 5, 0.1
SERVER_POINTS = (
    "webhook",
    "queued",
    "claimed",
    "spawned",
    "title, before",
    "title, after",
    "re-prediction",
)
JOB_POINTS = (
    "pulled",
    "fetching",
    "data kept",
    "training",
    "gate",
    "publish, copied",
    "publish, renamed",
    "published",
    "finished",
)
_met = itertools.count(1)


def reach(point: str) -> None:
    """Wait here while the point is held; die here, the first time that any process gets here."""
    held = FOLDER / f"hold {point}"
    if held.exists():
        (FOLDER / f"at {point}").write_text(str(os.getpid()))
    while held.exists():
        time.sleep(0.02)
    if point == POINT and next(_met) >= COUNT:
        try:
            (FOLDER / "killed").touch(exist_ok=False)
        except FileExistsError:
            return
        os.kill(os.getpid(), signal.SIGKILL)


def on(owner: Any, name: str, point: str, *, before: bool = False) -> None:
    """Reach `point` whenever `owner.name` is called, or has returned."""
    work = getattr(owner, name)

    @functools.wraps(work)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if before:
            reach(point)
        result = work(*args, **kwargs)
        if not before:
            reach(point)
        return result

    setattr(owner, name, wrapped)


# -- the server ----------------------------------------------------------------------------------------------------


class Model:
    """Sees one box in the middle of every image."""

    def __init__(self, version: Version) -> None:
        if version.trained:
            whole(version.path / CHECKPOINT)
        self.names = version.labels or ("Cell",)
        self.checkpoint = SimpleNamespace(conf=0.25, iou=0.7)

    def predict_batch(self, images: list[np.ndarray], **_: Any) -> list[Detections]:
        box = np.array([[2, 2, 9, 9]], np.float32)
        return [Detections(box, [0.6], [0], self.names, image.shape[:2]) for image in images]


def whole(path: Path) -> None:
    """Raises where the file is not all that `train` wrote."""
    content = path.read_bytes()
    if hashlib.sha256(content[:-32]).digest() != content[-32:]:
        raise RuntimeError(f"{path} is not whole")


def serve() -> None:
    import logging

    import uvicorn

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    reconcile.RETRY_SECONDS = 0.5
    reconcile.Reconciler.__init__.__kwdefaults__["debounce"] = 0.1
    on(reconcile.Reconciler, "hint", "webhook", before=True)
    on(JobQueue, "enqueue", "queued")
    on(job_runner.JobRunner, "_spawn", "claimed", before=True)
    on(job_runner.JobRunner, "_spawn", "spawned")
    on(LabelStudio, "patch_ml_backend", "title, before", before=True)
    on(LabelStudio, "patch_ml_backend", "title, after")
    on(LabelStudio, "retrieve_predictions", "re-prediction")
    train_here()
    settings = Settings()
    app = create_app(settings, load=Model)
    uvicorn.run(app, host=settings.host, port=settings.port, log_level="warning", access_log=False)


def work() -> None:
    """A worker of a shared queue."""
    train_here()
    cli.main(["worker"])


def train_here() -> None:
    """Run trainings by this file."""
    job_runner.JobRunner._training_command = lambda self, job: [sys.executable, __file__, "job", str(job.id)]  # type: ignore[method-assign]


# -- a training ----------------------------------------------------------------------------------------------------


def train(self: Any, data: TrainingData, base: Version) -> tuple[Path, dict[str, Any]]:
    """Takes a moment, and writes a file that says whether it is whole."""
    for epoch in range(EPOCHS):
        self._report(0.1 + 0.8 * epoch / EPOCHS, f"training: epoch {epoch}")
        time.sleep(EPOCH_SECONDS)
        if epoch == 1:
            reach("training")
    content = secrets.token_bytes(200_000)
    artefact: Path = self.folder / CHECKPOINT
    artefact.write_bytes(content + hashlib.sha256(content).digest())
    return artefact, {"threshold": 0.25}


def gate(self: Any, data: TrainingData, ways: list[Way], remarks: list[str], base: Version) -> Any:
    reach("gate")
    return ways[0], Verdict(True, False, "as good as any", 0), None, None


def job(number: int) -> int:
    import logging

    logging.basicConfig(level=logging.INFO)
    training = training_job._Training
    training._train = train  # type: ignore[method-assign]
    training._ways = lambda self, data, artefact: ([Way(artefact, "torch", "fp32")], [])  # type: ignore[method-assign]
    training._gate = gate  # type: ignore[method-assign, assignment]
    on(training_job, "corrections", "pulled")
    on(training_job.MediaCache, "fetch", "fetching")
    on(TrainingData, "save", "data kept")
    on(ProjectRegistry, "_add", "publish, copied", before=True)
    on(ProjectRegistry, "_activate", "publish, renamed", before=True)
    on(ProjectRegistry, "publish", "published")
    on(JobQueue, "finish", "finished")
    stop: list[bool] = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    settings = Settings()
    return training_job.run(number, settings, open_jobs(settings), lambda: bool(stop))


if __name__ == "__main__":
    if sys.argv[1] == "job":
        sys.exit(job(int(sys.argv[2])))
    {"serve": serve, "work": work}[sys.argv[1]]()

"""The backend in this process, on a port, with a model that takes no time and trainings that nobody carries out."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI

from labelstudio_backend.app import Learning, create_app
from labelstudio_backend.jobs import Jobs
from labelstudio_backend.settings import Settings
from yolonas.inference.detections import Detections


class FakeModel:
    """One box of the only class on every image."""

    names = ("car",)
    checkpoint = SimpleNamespace(conf=0.25, iou=0.7)

    def predict_batch(self, images: list[np.ndarray], **_: Any) -> list[Detections]:
        return [Detections(np.array([[0, 0, 9, 9]]), [0.9], [0], self.names, image.shape[:2]) for image in images]


class FakeReconciler:
    """Has no Label Studio to keep in step with."""

    def hint(self, project_key: str, action: str, payload: Any) -> None:
        pass


@contextmanager
def served(app: FastAPI, port: int | None = None) -> Iterator[str]:
    """An application on a port of this machine, as `serve` has it; its address, until the block ends."""
    server = uvicorn.Server(uvicorn.Config(app, port=port or 0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


@contextmanager
def small_backend(settings: Settings) -> Iterator[str]:
    """Its address, until the block ends."""
    jobs = Jobs(settings.state_dir / "jobs.sqlite")
    learning = Learning(jobs, FakeReconciler(), lambda: None, lambda: None)  # a queue that nobody works on
    app = create_app(settings, load=lambda version: FakeModel(), learning=learning)
    with served(app) as url:
        yield url

"""A batch action that takes longer than a request may, on a real Label Studio: nothing lost, nothing doubled."""

from __future__ import annotations

import base64
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest

from labelstudio_backend import reconcile
from labelstudio_backend.app import create_app
from labelstudio_backend.local_label_studio import free_port
from labelstudio_backend.settings import Settings
from real_label_studio import Studio, wait
from small_backend import served
from yolonas.inference.detections import Detections

pytestmark = [pytest.mark.labelstudio, pytest.mark.timeout(300)]

TASKS = 60
SECONDS = 0.1  # of an image: all of them take twice as long as a request may
CONFIG = (
    '<View><Image name="image" value="$image"/><RectangleLabels name="label" toName="image"><Label value="car"/>'
    "</RectangleLabels></View>"
)


class SlowModel:
    """One box on every image."""

    names, checkpoint, device = ("car",), SimpleNamespace(conf=0.25, iou=0.7), "cpu"

    def predict_batch(self, images: list[np.ndarray], **_: Any) -> list[Detections]:
        time.sleep(SECONDS)
        return [Detections(np.array([[0, 0, 2, 2]]), [0.9], [0], self.names, image.shape[:2]) for image in images]


@pytest.fixture
def answered() -> list[int]:
    """How many tasks each request had answered."""
    return []


@pytest.fixture
def backend(
    label_studio: Studio, answered: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    monkeypatch.setattr(reconcile, "CHUNK_SECONDS", 1.0)
    port = free_port()
    settings = Settings(
        state_dir=tmp_path,
        weights="yolo_nas_s_coco",
        port=port,
        label_studio_url=label_studio.url,
        label_studio_token=label_studio.token,
        predict_seconds=TASKS * SECONDS / 2,
        reconcile_seconds=1.0,
        train_every=0,
    )
    app = create_app(settings, load=lambda _: SlowModel())
    predict = app.state.service.predict

    def counted(*arguments: Any) -> Any:
        answer = predict(*arguments)
        answered.append(sum(isinstance(result, dict) for result in answer["results"]))
        return answer

    monkeypatch.setattr(app.state.service, "predict", counted)
    with served(app, port) as url:
        yield url


def test_a_batch_action_that_takes_too_long_is_finished(
    label_studio: Studio, backend: str, answered: list[int]
) -> None:
    client = label_studio.client
    project = client.create_project("Too much for one request", CONFIG)["id"]
    pictures = [cv2.imencode(".png", np.full((8, 8 + n, 3), n, np.uint8))[1].tobytes() for n in range(TASKS)]
    addresses = ["data:image/png;base64," + base64.b64encode(picture).decode() for picture in pictures]
    tasks = client.import_tasks(project, [{"data": {"image": address}} for address in addresses])
    row = client.add_ml_backend(project, backend, "yolonas", is_interactive=True)
    version = str(row["model_version"]) or client.ml_backends(project)[0]["model_version"]

    client.retrieve_predictions(project)
    assert 0 < answered[0] < TASKS
    wait(lambda: client.count_predictions(project, version) == TASKS, 120, "the rest")
    given = Counter(prediction["task"] for prediction in client.predictions(project))
    assert given == dict.fromkeys(tasks, 1)

"""A backend with a history: a project of some versions and jobs, its Label Studio a fake one; for the dashboard."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np

from fake_label_studio import FakeLabelStudio
from labelstudio_backend.app import Learning, create_app
from labelstudio_backend.client import LabelStudio
from labelstudio_backend.jobs import Jobs
from labelstudio_backend.local_label_studio import free_port
from labelstudio_backend.registry import ProjectRegistry, Registry
from labelstudio_backend.settings import UNTRAINED, Settings
from small_backend import served
from yolonas.inference.detections import Detections

NASTY = '<img src=x onerror="window.hacked=1">'
TITLE = "Blood cells <script>window.hacked=1</script>"
LABELS = ("Platelets", "RBC", "WBC", NASTY)
HOUR, DAY = 3600.0, 86400.0
CONFIG = """<View><Image name="image" value="$image"/><RectangleLabels name="label" toName="image">
<Label value="Platelets"/><Label value="RBC"/><Label value="WBC"/><Label value="{}"/></RectangleLabels></View>"""


class NoModel:
    """Nothing is predicted here."""

    names = LABELS[:3]
    checkpoint = SimpleNamespace(conf=0.25, iou=0.7)

    def predict_batch(self, images: list[np.ndarray], **_: Any) -> list[Detections]:
        return [Detections(np.zeros((0, 4)), [], [], self.names, image.shape[:2]) for image in images]


class NoReconciler:
    last_success = 1_700_000_000.0

    def hint(self, project_key: str, action: str, payload: Any) -> None: ...


@dataclass
class Backend:
    """A server of this process, and what it serves."""

    url: str
    studio: FakeLabelStudio
    registry: ProjectRegistry
    jobs: Jobs
    app: Any
    project: int
    tasks: list[int]
    labels: tuple[str, ...]

    @property
    def key(self) -> str:
        return self.registry.key

    def forget_overview(self) -> None:
        """Have Label Studio asked anew at the next look."""
        self.app.state.overview.forget()

    def finish(self, job: int, state: Any, reason: str, **values: Any) -> None:
        self.jobs.finish(job, state, reason, **values)


@contextmanager
def backend(folder: Path, *, tasks: int = 14, title: str = TITLE, label: str = NASTY) -> Iterator[Backend]:
    """The backend with its history, until the block ends; its jobs stay as they are: nothing runs them.

    label: of the label config, which no version predicts.
    """
    with FakeLabelStudio() as studio, LabelStudio(studio.url, studio.token) as client:
        escaped = label.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
        state = client.create_project(title, CONFIG.format(escaped), sampling="Uncertainty sampling")
        port = free_port()
        settings = Settings(
            state_dir=folder, weights=UNTRAINED, label_studio_url=studio.url, label_studio_token=studio.token, port=port
        )
        jobs = Jobs(folder / "jobs.sqlite")
        learning = Learning(jobs, NoReconciler(), lambda: None, lambda: None)
        app = create_app(settings, load=lambda version: NoModel(), learning=learning)
        with served(app, port) as url:
            client.add_ml_backend(state["id"], url, "yolonas")
            (registry,) = Registry(folder / "projects").projects()
            found = Backend(url, studio, registry, jobs, app, state["id"], [], (*LABELS[:3], label))
            _history(found, folder)
            found.tasks = client.upload_files(state["id"], [(f"{n}.jpg", picture(n)) for n in range(tasks)])
            _work(found, client)
            for row in studio.backends.values():
                row["title"] = registry.current().name
            yield found


@contextmanager
def second_project(found: Backend, title: str) -> Iterator[ProjectRegistry]:
    """Another project that the server knows, until the block ends; it has start weights and no tasks."""
    with LabelStudio(found.studio.url, found.studio.token) as client:
        state = client.create_project(title, CONFIG.format("Other"))
        client.add_ml_backend(state["id"], found.url, "yolonas")
    (project,) = (p for p in Registry(found.registry.path.parent).projects() if p.key != found.key)
    try:
        yield project
    finally:
        shutil.rmtree(project.path)


def picture(seed: int) -> bytes:
    """Something like cells, JPEG."""
    random = np.random.default_rng(seed)
    image = np.full((480, 640, 3), (226, 214, 238), np.uint8)
    for x, y, radius in zip(
        random.integers(20, 620, 18), random.integers(20, 460, 18), random.integers(16, 46, 18), strict=True
    ):
        cv2.circle(image, (int(x), int(y)), int(radius), (168, 140, 214), -1, cv2.LINE_AA)
        cv2.circle(image, (int(x), int(y)), int(radius * 0.45), (196, 176, 226), -1, cv2.LINE_AA)
    ok, content = cv2.imencode(".jpg", image)
    assert ok
    return content.tobytes()


def _history(found: Backend, folder: Path) -> None:
    """Start weights, four trained versions, and jobs in every state."""
    _backdate(found.registry.current().path / "record.json", published=time.time() - 6 * DAY)
    weights = folder / "weights.safetensors"
    weights.write_bytes(b"w")
    now, labels = time.time(), found.labels
    figures = [(0.31, 0.55), (0.42, 0.71), (0.47, 0.78), (0.52, 0.836)]
    for step, (ap, ap50) in enumerate(figures, 1):
        job = found.jobs.enqueue(found.key, f"{20 * step} newly corrected tasks")
        found.jobs.claim()
        before = {"ap": ap - 0.05, "ap50": ap50 - 0.06, "per_class": {n: 0.3 + 0.1 * i for i, n in enumerate(labels)}}
        after = {"ap": ap, "ap50": ap50, "per_class": {n: 0.36 + 0.11 * i for i, n in enumerate(labels)}}
        base = found.registry.current().name
        record = {
            "job": job,
            "trigger": f"{20 * step} newly corrected tasks",
            "base": base,
            "labels": list(LABELS[:3]),
            "tasks": {"train": 16 * step, "held_out": 4 * step, "train_boxes": 190 * step, "held_out_boxes": 50 * step,
                      "unusable": int(step == 4), "unusable_because": [f"task 9: there is no label {labels[3]!r}"]},
            "training": {"variant": "s", "epochs": 9 * step, "seconds": 540.0, "threshold": 0.31},
            "gate": {"decision": "published", "measured": step > 2,
                     "reason": f"AP50 {ap50 - 0.06:.3f} -> {ap50:.3f} on {4 * step} held-out images",
                     "share_of_resamples_worse": 0.02 if step > 2 else None},
            "before": before,
            "after": after,
            "serving": {"runtime": "openvino", "precision": "int8" if step > 3 else "fp32", "remarks": []},
            "seconds": 612.0,
        }  # fmt: skip
        version = found.registry.publish(weights, record)
        _backdate(version.path / "record.json", published=now - (5 - step) * DAY)
        report = found.jobs.folder(job) / "training" / "report.html"
        report.parent.mkdir(parents=True)
        report.write_text("<!doctype html><title>Report</title><h1>The report</h1><script>window.hacked=1</script>")
        (found.jobs.folder(job) / "log.txt").write_text(f"12:00:0{step} INFO data: 20 tasks\n12:00:09 INFO {NASTY}\n")
        found.finish(job, "succeeded", record["gate"]["reason"], version=version.name, record=record)
    for ended, reason in (
        ("refused", "v4 goes on: AP50 is lower in 97 % of 2000 resamples, 0.836 -> 0.794"),
        ("failed", "no answer from Label Studio at http://localhost:8080 (connection refused); check that it runs"),
    ):
        job = found.jobs.enqueue(found.key, "START_TRAINING")
        found.jobs.claim()
        found.finish(job, ended, reason)


def _backdate(record: Path, **values: Any) -> None:
    record.write_text(json.dumps({**json.loads(record.read_text()), **values}))


def region(name: str, label: str, box: Sequence[float], score: float | None = None) -> dict[str, Any]:
    x, y, width, height = box
    value = {"x": x, "y": y, "width": width, "height": height, "rotation": 0, "rectanglelabels": [label]}
    return {
        "id": name, "from_name": "label", "to_name": "image", "type": "rectanglelabels", "original_width": 640,
        "original_height": 480, "image_rotation": 0, "score": score, "value": value,
    }  # fmt: skip


def _work(found: Backend, client: LabelStudio) -> None:
    """Predictions of the version that serves on all tasks but the last, and two rounds of labels on earlier ones."""
    versions = found.registry.versions()
    for index, task in enumerate(found.tasks[:-1]):
        labelled = index < 4
        version = versions[3] if index < 2 else versions[4]
        random = np.random.default_rng(index)
        boxes = [(*map(float, random.uniform(2, 70, 2)), *map(float, random.uniform(8, 24, 2))) for _ in range(6)]
        names = [found.labels[n] for n in random.integers(0, 3, 6)]
        names[0] = found.labels[3] if index == 5 else names[0]
        result = [region(f"r{n}", *one, 0.6) for n, one in enumerate(zip(names, boxes, strict=True))]
        score = None if labelled else 0.9 - 0.05 * index
        made = client.create_prediction(task, result, score or 0.5, version.name)
        if labelled:
            kept = result[: 3 + index]
            when = datetime.fromtimestamp(time.time() - (1.5 * DAY if index < 2 else HOUR), UTC).isoformat()
            client.create_annotation(
                task, kept, lead_time=30.0 - 4 * index, parent_prediction=made["id"], created_at=when
            )

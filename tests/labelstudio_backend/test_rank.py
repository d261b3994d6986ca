"""`yolonas-labelstudio rank`: the order against a small server, and Label Studio's own "next" against that order."""

from __future__ import annotations

import base64
import dataclasses
import functools
import json
import shutil
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import httpx
import numpy as np
import pytest
from click.testing import CliRunner, Result

from labelstudio_backend import options
from labelstudio_backend.app import create_app
from labelstudio_backend.cli import main
from labelstudio_backend.client import LabelStudio
from labelstudio_backend.connect import SAMPLING
from labelstudio_backend.rank import find_project, rank_project, write_order
from labelstudio_backend.registry import ProjectRegistry, Registry
from labelstudio_backend.settings import Settings
from labelstudio_backend.signal_store import SignalStore
from real_label_studio import Studio, wait
from small_backend import served
from yolonas.active_learning import STRATEGIES, ImageSignals, class_doubt
from yolonas.errors import DataError
from yolonas.inference.detections import Detections

URL = "http://studio.example.org:8080/ls"
TOKEN = "0123456789abcdef0123456789abcdef01234567"
CREATED = "2026-11-20T10:00:00Z"
UID = f"5.{int(datetime.fromisoformat(CREATED).timestamp())}"
LABELS = ("Car", "Van")
CONFIG = (
    '<View><Image name="image" value="$image"/><RectangleLabels name="label" toName="image">'
    '<Label value="Car"/><Label value="Van"/></RectangleLabels></View>'
)


def signals(scores: list[float], labels: list[int], feature: float) -> ImageSignals:
    logits = np.full((len(scores), 2), -12.0)
    logits[np.arange(len(scores)), labels] = [np.log(score / (1 - score)) for score in scores]
    margins, entropies, rivals = class_doubt(logits, labels)
    own = np.array(labels, np.int64)
    spreads = np.zeros(len(scores))
    return ImageSignals(np.array(scores, float), own, margins, entropies, rivals, spreads, np.array([feature, 1.0]))


def region(label: str = "Car", score: float = 0.9, x: float = 10) -> dict[str, Any]:
    value = {"x": x, "y": 10, "width": 20, "height": 20, "rotation": 0, "rectanglelabels": [label]}
    return {"from_name": "label", "to_name": "image", "type": "rectanglelabels", "score": score, "value": value}


def track(label: str = "Car", score: float = 0.9) -> dict[str, Any]:
    keyframe = {"frame": 1, "enabled": True, "rotation": 0, "x": 10, "y": 10, "width": 20, "height": 20, "time": 0.04}
    value = {"framesCount": 50, "duration": 2.0, "sequence": [keyframe], "labels": [label]}
    return {"from_name": "box", "to_name": "video", "type": "videorectangle", "score": score, "value": value}


class FakeStudio:
    """A Label Studio with one project; gives up after `patches` patched predictions."""

    def __init__(self, version: str) -> None:
        self.project = {
            "id": 5,
            "created_at": CREATED,
            "label_config": CONFIG,
            "sampling": SAMPLING,
            "model_version": version,
        }
        self.version = version
        self.tasks: list[dict[str, Any]] = []
        self.patched: list[int] = []
        self.patches = 1000

    def add(self, result: list[dict[str, Any]] | None, **more: Any) -> int:
        number = len(self.tasks) + 1
        task: dict[str, Any] = {"id": number, "data": {"image": "x.png"}, "annotations": [], "predictions": []}
        if result is not None:
            task["predictions"].append(self.prediction(number * 10, result, self.version))
        self.tasks.append({**task, **more})
        return number

    @staticmethod
    def prediction(number: int, result: list[dict[str, Any]], version: str) -> dict[str, Any]:
        return {"id": number, "result": result, "score": 0.5, "model_version": version}

    def __call__(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path.removeprefix("/ls")
        if request.headers.get("Authorization") != f"Token {TOKEN}":
            return httpx.Response(401)
        if path == "/api/projects/5/":
            return httpx.Response(200, json=self.project)
        if path == "/api/tasks":
            return httpx.Response(200, json={"tasks": self.tasks, "total": len(self.tasks)})
        if request.method == "PATCH" and path.startswith("/api/predictions/"):
            if len(self.patched) >= self.patches:
                return httpx.Response(400, text="away")
            number = int(path.split("/")[3])
            (found,) = (p for task in self.tasks for p in task["predictions"] if p["id"] == number)
            found |= json.loads(request.content)
            self.patched.append(number)
            return httpx.Response(200, json=found)
        return httpx.Response(404)


@pytest.fixture
def project(tmp_path: Path) -> ProjectRegistry:
    project = Registry(tmp_path / "projects").register(URL, UID, CONFIG)
    project.ensure_start("yolo_nas_s_coco", LABELS)
    return project


@pytest.fixture
def studio(project: ProjectRegistry, monkeypatch: pytest.MonkeyPatch) -> FakeStudio:
    """Tasks 1 sure, 2 doubtful, 3 empty, 4 doubtful and like nothing else, 5 labelled, 6 skipped, 7 not predicted."""
    studio = FakeStudio(project.current().name)
    known = {
        studio.add([region(score=0.97)]): signals([0.97], [0], 0.0),
        studio.add([region(score=0.55)]): signals([0.55], [0], 0.1),
        studio.add([]): signals([], [], 0.1),
        studio.add([region("Van", 0.6)]): signals([0.6], [1], 5.0),
    }
    annotation = {"id": 1, "result": [region()] * 3, "was_cancelled": False, "updated_at": CREATED}
    known[studio.add([region()], annotations=[annotation])] = signals([0.9], [0], 0.0)
    studio.add([region()], annotations=[annotation | {"was_cancelled": True}])
    studio.add(None)
    SignalStore(project.path, project.current().name, LABELS).add(known)
    transport = httpx.MockTransport(studio)
    monkeypatch.setattr(options, "LabelStudio", functools.partial(LabelStudio, transport=transport))
    monkeypatch.setenv("YOLONAS_LABEL_STUDIO_URL", URL)
    monkeypatch.setenv("YOLONAS_LABEL_STUDIO_TOKEN", TOKEN)
    monkeypatch.setenv("YOLONAS_STATE_DIR", str(project.path.parents[1]))
    monkeypatch.setenv("YOLONAS_ACQUISITION", "mix")
    return studio


def rank(*options: str) -> Result:
    return CliRunner().invoke(main, ["rank", "--project", "5", *options], catch_exceptions=False)


def order_of(studio: FakeStudio, project: ProjectRegistry, strategy: str) -> list[int]:
    with LabelStudio(URL, TOKEN, transport=httpx.MockTransport(studio)) as client:
        return [task.task for task in rank_project(client, project, studio.project, strategy).order]


def test_the_order_and_the_reasons_are_shown(studio: FakeStudio) -> None:
    result = rank()
    assert result.exit_code == 0
    header, first, *rest = result.output.splitlines()
    assert header.split() == ["task", "score", "why"]
    assert first.split()[0] == "4"
    assert "unlike what is labelled" in first
    assert "rare class: Van" in first
    assert [line.split()[0] for line in rest[:3]] == ["2", "3", "1"]
    assert "unsure of a Car" in rest[0]
    assert f"4 unlabelled tasks in order by {studio.version}; 1 are labelled." in result.output
    assert "1 unlabelled tasks have no prediction" in result.output
    assert studio.patched == []


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_orders_the_same_tasks(studio: FakeStudio, project: ProjectRegistry, strategy: str) -> None:
    order = order_of(studio, project, strategy)
    assert sorted(order) == [1, 2, 3, 4]
    assert order == order_of(studio, project, strategy)


def test_strategies_differ(studio: FakeStudio, project: ProjectRegistry) -> None:
    assert order_of(studio, project, "uncertainty") == [2, 3, 4, 1]  # 3, without a box, has the median: that of 4
    assert order_of(studio, project, "diversity")[0] == 4
    assert order_of(studio, project, "balance")[0] == 4
    studio.tasks[0]["predictions"].append(studio.prediction(3, [region(x=70)], "older"))
    studio.tasks[1]["predictions"].append(studio.prediction(4, [region(score=0.55)], "older"))
    assert order_of(studio, project, "disagreement")[0] == 1


def test_write_is_exact_goes_on_after_an_interruption_and_is_done_once(studio: FakeStudio) -> None:
    studio.patches = 2
    result = rank("--write")
    assert result.exit_code == 1
    assert "answered 400" in result.output
    assert studio.patched == [40, 20]  # the best first
    studio.patches = 1000
    result = rank("--write", "--top", "1")
    assert "and 3 more" in result.output
    assert "2 scores written, 2 were right." in result.output
    assert studio.patched == [40, 20, 30, 10]
    scores = {task["id"]: task["predictions"][0]["score"] for task in studio.tasks if task["predictions"]}
    assert [task for task, _ in sorted(scores.items(), key=lambda item: item[1]) if task <= 4] == [4, 2, 3, 1]
    assert scores[5] == scores[6] == 0.5
    assert [scores[task] for task in (4, 2, 3, 1)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert "0 scores written, 4 were right." in rank("--write").output


def test_what_stands_in_the_way_of_the_order_is_said(studio: FakeStudio) -> None:
    studio.project |= {"sampling": "Sequential sampling", "model_version": "My model"}
    output = rank("--write").output
    assert '{"sampling": "Uncertainty sampling"}' in output
    assert "shows predictions of 'My model'" in output


def test_tasks_that_were_predicted_elsewhere_are_ordered_by_their_scores(
    studio: FakeStudio, project: ProjectRegistry
) -> None:
    studio.add([region(score=0.5)])
    result = rank("--strategy", "uncertainty")
    assert result.output.splitlines()[1].split()[0] == "8"
    assert "Of 1 tasks only the scores" in result.output
    for path in (project.path / "signals").rglob("*.jsonl"):
        path.unlink()
    assert "Of 5 tasks only the scores" in rank().output


def test_videos_are_ordered_by_their_tracks(studio: FakeStudio, project: ProjectRegistry) -> None:
    shutil.rmtree(project.path / "signals")  # nothing is kept there of a video
    studio.project["label_config"] = (
        '<View><Labels name="labels" toName="video"><Label value="Car"/><Label value="Van"/></Labels>'
        '<Video name="video" value="$video"/><VideoRectangle name="box" toName="video"/></View>'
    )
    studio.tasks = []
    for tracks in ([track(score=0.97)], [track(score=0.55)], [], [track("Van")]):
        studio.add(tracks)
    for task in studio.tasks:
        task["predictions"].append(studio.prediction(1, [track(score=0.9)], "older"))
    annotation = {"id": 1, "result": [track()] * 3, "was_cancelled": False, "updated_at": CREATED}
    studio.add([track()], annotations=[annotation])
    for strategy in ("uncertainty", "disagreement"):  # tracks of two versions are not compared
        assert order_of(studio, project, strategy) == [2, 3, 4, 1]
    assert order_of(studio, project, "balance")[0] == 4
    output = rank("--strategy", "balance").output
    assert "rare class: Van" in output.splitlines()[1]
    assert "are known in this folder" not in output


def test_a_project_that_is_not_known_here(studio: FakeStudio, tmp_path: Path) -> None:
    result = rank("--state-dir", str(tmp_path / "elsewhere"))
    assert result.exit_code == 1
    assert "project 5 is not known in" in result.output
    with pytest.raises(DataError, match="not known"):  # the number of a project that was deleted
        find_project(Registry(tmp_path / "projects"), studio.project | {"created_at": "2025-01-01T00:00:00Z"})


def test_nothing_to_rank(studio: FakeStudio) -> None:
    studio.tasks = []
    result = rank("--write")
    assert result.exit_code == 0
    assert "0 unlabelled tasks in order" in result.output


# -- a real Label Studio


class ScriptedModel:
    """Knows an image by its grey value, 0 to 255: how many boxes, how sure, of which class."""

    names = ("car", "van")
    checkpoint = SimpleNamespace(conf=0.25, iou=0.7)

    def predict_batch(self, images: list[np.ndarray], **options: Any) -> list[Detections]:
        found = []
        for image in images:
            grey = round(float(image.mean()))
            scores = [] if grey % 4 == 0 else [0.3 + (grey * 37 % 65) / 100, 0.9][: 1 + grey % 2]
            labels = [int(grey % 5 == 0)] * len(scores)
            boxes = np.array([[5, 5, 40, 30], [50, 5, 60, 30]][: len(scores)], np.float32).reshape(-1, 4)
            one = Detections(boxes, scores, labels, self.names, image.shape[:2])
            found.append(dataclasses.replace(one, signals=signals(scores, labels, grey / 10)))
        return found


@pytest.fixture
def backend(tmp_path: Path, label_studio: Studio) -> Iterator[tuple[str, Settings]]:
    """A backend in this process, on a port of its own."""
    settings = Settings(
        state_dir=tmp_path,
        label_studio_url=label_studio.url,
        label_studio_token=label_studio.token,
        train_every=0,
        reconcile_seconds=1.0,
        weights="yolo_nas_n_bccd",
        acquisition="uncertainty",
    )
    app = create_app(settings, load=lambda version: ScriptedModel())
    with served(app) as url:
        yield url, settings


def grey_picture(grey: int) -> str:
    content = cv2.imencode(".png", np.full((40, 64, 3), grey, np.uint8))[1].tobytes()
    return "data:image/png;base64," + base64.b64encode(content).decode()


@pytest.mark.labelstudio
@pytest.mark.timeout(600)
def test_label_studio_serves_the_intended_order(label_studio: Studio, backend: tuple[str, Settings]) -> None:
    url, settings = backend
    client = label_studio.client
    number = client.create_project("What next", CONFIG, sampling=SAMPLING)["id"]
    tasks = client.import_tasks(number, [{"data": {"image": grey_picture(grey)}} for grey in range(90, 103)])
    client.add_ml_backend(number, url, title="My model")
    registry = Registry(settings.state_dir / "projects")
    version = find_project(registry, client.get_project(number)).current().name
    wait(lambda: client.get_project(number)["model_version"] == version, 60, "title and model_version")
    assert [row["title"] for row in client.ml_backends(number)] == [version]
    client.retrieve_predictions(number)
    wait(lambda: client.count_predictions(number, version) == len(tasks), 60, "predictions")

    def label_next() -> int:
        task = int(client._object("GET", f"api/projects/{number}/next")["id"])
        client.create_annotation(task, [])
        return task

    def stored() -> dict[int, float]:
        return {p["task"]: p["score"] for p in client.predictions(number) if p["model_version"] == version}

    # by the scores that came with the predictions
    scores, empty = stored(), {p["task"] for p in client.predictions(number) if not p["result"]}
    assert len(empty) == 3
    assert len(set(scores.values())) == len(tasks) - len(empty) + 1  # those without boxes share one
    order = [label_next() for _ in range(6)]
    assert [scores[task] for task in order] == sorted(scores.values())[:6]
    assert not empty & set(order[:3])  # none first by accident

    # by the order that rank has written, of another strategy
    left = [task for task in tasks if task not in order]
    project = find_project(registry, client.get_project(number))
    ranking = rank_project(client, project, client.get_project(number), "mix")
    intended = [task.task for task in ranking.order]
    assert sorted(intended) == left
    assert ranking.unseen == ranking.missing == 0
    assert intended != sorted(left, key=scores.__getitem__), "the test would show nothing"
    assert write_order(client, ranking.order) == len(left)
    assert write_order(client, rank_project(client, project, client.get_project(number), "mix").order) == 0
    assert stored() == pytest.approx(scores | {task.task: task.score for task in ranking.order})
    assert [label_next() for _ in left] == intended  # none lost
    with pytest.raises(Exception, match="404"):
        label_next()
    assert rank_project(client, project, client.get_project(number), "mix").order == []

"""The routes, with the requests that a real Label Studio 1.23.2 sent, and over a real server."""

from __future__ import annotations

import base64
import calendar
import json
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import cv2
import httpx
import numpy as np
import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal
from fastapi import FastAPI
from pydantic import SecretStr
from redis import Redis

from labelstudio_backend.app import Learning, create_app
from labelstudio_backend.owed import Owed
from labelstudio_backend.redis_jobs import RedisJobs
from labelstudio_backend.service import Service
from labelstudio_backend.settings import UNTRAINED, Settings
from real_label_studio import wait
from small_backend import served
from yolonas.inference.detections import Detections

RECORDED = [
    entry["request"] for entry in json.loads((Path(__file__).parent / "label_studio_requests.json").read_text())
]
CONFIG = next(request["body"]["schema"] for request in RECORDED if request["path"] == "/setup")


class FakeModel:
    """One box of the first class on every image."""

    names = ("car", "person")
    checkpoint = SimpleNamespace(conf=0.25, iou=0.7)

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds

    def predict_batch(self, images: list[np.ndarray], **_: Any) -> list[Detections]:
        if self.seconds < 0:  # no time to breathe: pure Python holds the interpreter
            until = time.monotonic() - self.seconds
            while time.monotonic() < until:
                sum(range(1000))
        time.sleep(max(self.seconds, 0))
        return [Detections(np.array([[0, 0, 9, 9]]), [0.9], [0], self.names, image.shape[:2]) for image in images]


class FakeLearning:
    def __init__(self) -> None:
        self.queued: list[tuple[str, str]] = []
        self.hints: list[tuple[str, str]] = []
        self.running: list[str] = []

    def enqueue(self, project_key: str, trigger: str) -> int:
        self.queued.append((project_key, trigger))
        return 7

    def status(self, job_id: int | str) -> dict[str, Any] | None:
        return {"job_status": "started"} if str(job_id) == "7" else None

    def hint(self, project_key: str, action: str, payload: Any) -> None:
        self.hints.append((project_key, action))

    def as_learning(self) -> Learning:
        return Learning(self, self, lambda: self.running.append("start"), lambda: self.running.append("stop"))


def settings(folder: Path, **values: Any) -> Settings:
    fixed = {"weights": "yolo_nas_s_coco", "label_studio_url": "", "label_studio_token": None}
    return Settings(state_dir=folder, **{**fixed, **values})


def picture(grey: int = 128) -> str:
    ok, content = cv2.imencode(".png", np.full((240, 320, 3), grey, np.uint8))
    assert ok
    return "data:image/png;base64," + base64.b64encode(content.tobytes()).decode()


def predict_body(count: int, uid: str = "5.1795289898", first: int = 0) -> dict[str, Any]:
    """Tasks whose images all differ, over all requests with another `first`."""
    tasks = [{"id": index, "data": {"image": picture(index)}} for index in range(first, first + count)]
    return {"tasks": tasks, "project": uid, "label_config": CONFIG, "params": {"context": None}}


def predict_request(first: int) -> bytes:
    """A request for one task as it goes over the wire."""
    body = json.dumps(predict_body(1, first=first)).encode()
    return f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


class Local:
    """The application called in this process, without a socket."""

    def __init__(self, portal: BlockingPortal, client: httpx.AsyncClient) -> None:
        self._portal = portal
        self._client = client

    def get(self, path: str) -> httpx.Response:
        return self._portal.call(lambda: self._client.get(path))

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self._portal.call(lambda: self._client.post(path, **body))


@contextmanager
def running(app: FastAPI) -> Iterator[Local]:
    """The application between its start and its stop."""
    client = httpx.AsyncClient(
        transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://backend"
    )
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(app.router.lifespan_context(app)):
        yield Local(portal, client)


@pytest.fixture
def learning() -> FakeLearning:
    return FakeLearning()


@pytest.fixture
def http(tmp_path: Path, learning: FakeLearning) -> Iterator[Local]:
    app = create_app(settings(tmp_path), load=lambda version: FakeModel(), learning=learning.as_learning())
    with running(app) as client:
        yield client
    assert learning.running == ["start", "stop"]


def send(http: Local, request: dict[str, Any]) -> httpx.Response:
    if request["method"] == "GET":
        return http.get(request["path"])
    return http.post(request["path"], json=request["body"])


@pytest.mark.parametrize("number", range(len(RECORDED)))
def test_every_recorded_request_is_answered(http: Local, number: int) -> None:
    assert len(RECORDED) == 17
    request = RECORDED[number]
    answer = send(http, request)
    if (request.get("body") or {}).get("action") == "START_TRAINING":
        assert answer.status_code == 409  # a project that no /setup introduced
        return
    assert answer.status_code == 200
    body = answer.json()
    if request["path"] == "/predict":  # the images are on a Label Studio that is not there
        assert body == {"results": [[] for _ in request["body"]["tasks"]]}
    elif request["path"] == "/setup":
        assert isinstance(body["model_version"], str)


def test_the_recorded_requests_in_their_order(http: Local, learning: FakeLearning) -> None:
    """A project is introduced by /setup; then its webhooks are hints, and its training call queues a job."""
    known: set[int] = set()
    for request in RECORDED:
        body = request["body"] or {}
        project = body.get("project")
        if isinstance(project, dict) and project["id"] not in known:
            known.add(project["id"])
            created = time.strptime(project["created_at"][:19], "%Y-%m-%dT%H:%M:%S")
            setup = {
                "project": f"{project['id']}.{calendar.timegm(created)}",
                "schema": CONFIG,
                "hostname": "http://ls",
            }
            assert http.post("/setup", json=setup).status_code == 200
        answer = send(http, request)
        assert answer.status_code == 200
        if body.get("action") == "START_TRAINING":
            assert answer.json() == {"job": "7"}
    assert [trigger for _, trigger in learning.queued] == ["START_TRAINING"]
    assert learning.queued[0][0].startswith("6-")
    assert {action for _, action in learning.hints} == {
        "ANNOTATION_CREATED",
        "ANNOTATION_UPDATED",
        "ANNOTATIONS_DELETED",
        "TASKS_CREATED",
        "PROJECT_UPDATED",
    }


def test_predictions(http: Local) -> None:
    setup = {"project": "5.1795289898", "schema": CONFIG, "hostname": "http://ls", "extra_params": None}
    version = http.post("/setup", json=setup).json()["model_version"]
    assert http.get("/versions").json() == {"versions": [version]}
    results = http.post("/predict", json=predict_body(20)).json()["results"]
    assert len(results) == 20
    assert {result["model_version"] for result in results} == {version}
    assert results[0]["result"][0]["value"]["rectanglelabels"] == ["Car"]


def test_jobs(http: Local) -> None:
    assert http.post("/job_status", json={"job": "7"}).json() == {"job_status": "started"}
    assert http.post("/job_status", json={"job": "8"}).status_code == 410
    assert http.post("/job_status", json={}).status_code == 400


def test_a_front_door(http: Local) -> None:
    assert http.get("/").json() == {"name": "yolonas", "status": "UP", "can_train": True}
    assert http.get("/health").json() == {"status": "UP"}
    assert http.get("/docs").status_code == 404


@pytest.mark.parametrize("path", ["/setup", "/predict", "/webhook", "/job_status"])
@pytest.mark.parametrize("raw", [b"{", b"[]", b"null", b'{"project": {}}', b"\xff", b"{}"])
def test_a_wrong_body_is_one_sentence_with_a_4xx(http: Local, path: str, raw: bytes) -> None:
    answer = http.post(path, content=raw)
    assert 400 <= answer.status_code < 500
    assert list(answer.json()) == ["error"]
    assert "\n" not in answer.json()["error"]
    assert http.get(path).status_code == 405


def test_without_a_token_it_says_that_it_cannot_train(tmp_path: Path) -> None:
    (training,) = [r for r in RECORDED if (r["body"] or {}).get("action") == "START_TRAINING"]
    (event, *_) = [r for r in RECORDED if (r["body"] or {}).get("action") == "ANNOTATION_CREATED"]
    with running(create_app(settings(tmp_path), load=lambda version: FakeModel())) as http:
        assert http.get("/").json()["can_train"] is False
        answer = send(http, training)
        assert answer.status_code == 409
        assert "YOLONAS_LABEL_STUDIO_TOKEN" in answer.json()["error"]
        assert send(http, event).status_code == 200
        assert http.post("/job_status", json={"job": "7"}).status_code == 410


def test_an_unwritable_state_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "projects").write_text("in the way")
    with running(create_app(settings(tmp_path), load=lambda version: FakeModel())) as http:
        setup = {"project": "5.1795289898", "schema": CONFIG, "hostname": "http://ls"}
        answer = http.post("/setup", json=setup)
        assert answer.status_code == 503
        assert http.post("/predict", json=predict_body(2)).json() == {"results": [[], []]}


@pytest.fixture
def server(tmp_path: Path, learning: FakeLearning) -> Iterator[Callable[[FakeModel], tuple[str, FastAPI]]]:
    """Starts the application on a free port, like `serve`; returns its address and the application."""

    def start(model: FakeModel) -> tuple[str, FastAPI]:
        app = create_app(settings(tmp_path), load=lambda version: model, learning=learning.as_learning())
        return stack.enter_context(served(app)), app

    with ExitStack() as stack:
        yield start


@pytest.mark.parametrize("seconds", [0.4, -0.4], ids=["model waits", "model holds the interpreter"])
def test_health_setup_and_webhook_answer_while_the_model_works(
    server: Callable[[FakeModel], tuple[str, FastAPI]], seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Label Studio gives /health and annotation webhooks 1 s and /setup 3 s."""
    monkeypatch.setattr("labelstudio_backend.app.PREDICT_THREADS", 4)  # all of them taken
    url, _ = server(FakeModel(seconds))
    setup = {"project": "5.1795289898", "schema": CONFIG, "hostname": "http://ls"}
    (event, *_) = [r["body"] for r in RECORDED if (r["body"] or {}).get("action") == "TASKS_CREATED"]
    with ThreadPoolExecutor(12) as pool, httpx.Client(base_url=url, timeout=60) as http:

        def ask() -> list[float]:
            """How long each call waits."""
            waits = []
            for _ in range(5):
                for call in (
                    lambda: http.get("/health"),
                    lambda: http.post("/setup", json=setup),
                    lambda: http.post("/webhook", json=event),
                    lambda: http.get("/versions"),
                ):
                    begin = time.monotonic()
                    assert call().status_code == 200
                    waits.append(time.monotonic() - begin)
            return waits

        http.post("/setup", json=setup)
        idle = ask()  # what the machine takes without the model's work
        bodies = [predict_body(12, first=12 * index) for index in range(4)]
        predictions = [pool.submit(http.post, "/predict", json=body) for body in bodies]
        time.sleep(0.3)
        waits = ask()
        assert http.post("/predict", json=predict_body(1)).status_code == 503
        assert not all(prediction.done() for prediction in predictions)
        assert statistics.median(waits) < 0.2 + statistics.median(idle)
        assert max(waits) < 0.9 + max(idle)
        for prediction in predictions:
            assert all(result["result"] for result in prediction.result().json()["results"])


class GatedModel(FakeModel):
    """Says when it has begun, and goes on when it may."""

    def __init__(self) -> None:
        super().__init__()
        self.began, self.may_go_on = threading.Event(), threading.Event()
        self.seen: list[int] = []

    def predict_batch(self, images: list[np.ndarray], **options: Any) -> list[Detections]:
        self.seen += [int(image[0, 0, 0]) for image in images]
        self.began.set()
        assert self.may_go_on.wait(60)
        return super().predict_batch(images, **options)


def test_what_the_client_has_given_up_on_is_not_computed(
    server: Callable[[FakeModel], tuple[str, FastAPI]],
) -> None:
    model = GatedModel()
    url, app = server(model)
    body = json.dumps(predict_body(50)).encode()
    head = f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with httpx.Client(base_url=url, timeout=60) as http:
        try:
            with socket.create_connection(("127.0.0.1", urlsplit(url).port)) as leaving:
                leaving.sendall(head + body)
                assert model.began.wait(60)
            wait(lambda: not app.state.service.scheduler.load()["requests"], what="the server's notice of it")
        finally:
            model.may_go_on.set()
        (result,) = http.post("/predict", json=predict_body(1, first=99)).json()["results"]
    assert result["result"]
    # which of the fifty was read first is chance
    assert len(model.seen) == 2
    assert model.seen[-1] == 99


def test_a_batch_action_on_top_of_too_many_requests_is_refused_at_once_and_owed(
    server: Callable[..., tuple[str, FastAPI]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("labelstudio_backend.app.PREDICT_THREADS", 1)
    model = GatedModel()
    url, app = server(model)
    service: Service = app.state.service
    service.settings = service.settings.model_copy(
        update={"label_studio_url": "http://ls", "label_studio_token": SecretStr("x")}
    )
    with ThreadPoolExecutor(1) as pool, httpx.Client(base_url=url, timeout=60) as http:
        try:
            first = pool.submit(http.post, "/predict", json=predict_body(1))
            assert model.began.wait(60)
            assert http.post("/predict", json=predict_body(3, first=50)).status_code == 503
        finally:
            model.may_go_on.set()
        assert first.result().json()["results"][0]["result"]
    (project,) = service.registry.projects()
    assert Owed(project).due() == {50, 51, 52}
    assert model.seen == [0]


def test_the_limit_holds_for_requests_that_come_at_the_same_time(
    server: Callable[..., tuple[str, FastAPI]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("labelstudio_backend.app.PREDICT_THREADS", 2)
    model = GatedModel()
    url, _ = server(model)
    sent = threading.Barrier(5)

    def ask(number: int) -> bytes:
        whole = predict_request(number)
        with socket.create_connection(("127.0.0.1", urlsplit(url).port), 60) as connection:
            connection.sendall(whole[:-10])
            sent.wait(60)
            time.sleep(0.5)  # for the server to have all heads
            connection.sendall(whole[-10:])
            return connection.recv(12)

    with ThreadPoolExecutor(5) as pool:
        try:
            asked = [pool.submit(ask, number) for number in range(5)]
            wait(lambda: sum(one.done() for one in asked) == 3, what="three refusals")
        finally:
            model.may_go_on.set()
    assert sorted(one.result() for one in asked) == [b"HTTP/1.1 200"] * 2 + [b"HTTP/1.1 503"] * 3


def test_a_request_that_was_given_up_counts_until_its_thread_is_free(
    server: Callable[..., tuple[str, FastAPI]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("labelstudio_backend.app.PREDICT_THREADS", 1)
    url, app = server(FakeModel())
    began, may_go_on, left = threading.Event(), threading.Event(), list[Any]()

    def busy(body: Any, gone: Any) -> dict[str, Any]:
        if not began.is_set():  # the first
            left.append(gone)
            began.set()
            assert may_go_on.wait(60)
        return {"results": []}

    monkeypatch.setattr(app.state.service, "predict", busy)
    with httpx.Client(base_url=url, timeout=60) as http:
        try:
            with socket.create_connection(("127.0.0.1", urlsplit(url).port), 60) as connection:
                connection.sendall(predict_request(1))
                assert began.wait(60)
            wait(left[0].done, what="the server to notice")
            assert http.post("/predict", json=predict_body(1)).status_code == 503
        finally:
            may_go_on.set()
        wait(lambda: http.post("/predict", json=predict_body(1)).status_code == 200, what="a free thread")


def test_a_queue_that_does_not_answer_holds_up_neither_setup_nor_events(tmp_path: Path, learning: FakeLearning) -> None:
    """Label Studio gives annotation webhooks 1 s and /setup 3 s."""
    setup = {"project": "5.1795289898", "schema": CONFIG, "hostname": "http://ls"}
    project = {"id": 5, "created_at": "2026-11-21T19:38:18.810449Z"}
    with socket.create_server(("127.0.0.1", 0)) as silent, ExitStack() as connections:
        redis = Redis.from_url(f"redis://127.0.0.1:{silent.getsockname()[1]}/0", socket_timeout=2.0)
        queue = RedisJobs(redis, tmp_path / "jobs")
        app = create_app(
            settings(tmp_path),
            load=lambda version: FakeModel(),
            learning=Learning(queue, learning, lambda: None, lambda: None),
        )
        with served(app) as url, ThreadPoolExecutor(6) as pool, httpx.Client(base_url=url, timeout=60) as http:
            assert http.post("/setup", json=setup).status_code == 200
            calls = [
                *(pool.submit(http.get, path) for path in ("/api/projects", "/metrics", "/api/jobs", "/api/jobs")),
                pool.submit(http.post, "/job_status", json={"job": "7"}),
                pool.submit(http.post, "/webhook", json={"action": "START_TRAINING", "project": project}),
            ]
            for _ in range(4):
                connections.enter_context(silent.accept()[0])  # all threads that may wait for it do
            for path, body in (("/setup", setup), ("/webhook", {"action": "TASKS_CREATED", "project": project})):
                assert http.post(path, json=body).status_code == 200
            assert not any(call.done() for call in calls), "answered only when the queue had been waited for"
            assert [call.result().status_code for call in calls] == [200, 200, 200, 200, 503, 503]
    assert [action for _, action in learning.hints] == ["TASKS_CREATED"]


def test_an_untrained_network_end_to_end(tmp_path: Path) -> None:
    app = create_app(settings(tmp_path, weights=UNTRAINED))
    config = CONFIG.replace("0.25", "0.001")
    setup = {"project": "5.1795289898", "schema": config, "hostname": "http://ls"}
    with running(app) as http:
        version = http.post("/setup", json=setup).json()["model_version"]
        body = predict_body(3) | {"label_config": config}
        body["tasks"][1]["data"]["image"] = "data:image/png;base64,AAAA"
        first, broken, last = http.post("/predict", json=body).json()["results"]
    assert first["model_version"] == last["model_version"] == version
    assert broken == []
    assert first["result"]
    for region in first["result"]:
        assert region["value"]["rectanglelabels"][0] in ("Car", "Person")
        assert 0 <= region["value"]["x"] <= region["value"]["x"] + region["value"]["width"] <= 100
        assert 0 < region["score"] < 1
    boxes = [[region["value"], region["score"]] for region in first["result"]]
    with running(create_app(settings(tmp_path, weights=UNTRAINED))) as http:  # a restart draws the same network
        again = http.post("/predict", json=body).json()["results"][0]
    assert [[region["value"], region["score"]] for region in again["result"]] == boxes

"""connect, doctor and push on a real Label Studio with a real backend: broken one by one, named, repaired."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import cv2
import numpy as np
import pytest

from labelstudio_backend import local_label_studio
from labelstudio_backend.backend import Backend, Credentials
from labelstudio_backend.check import Check
from labelstudio_backend.client import LabelStudio
from labelstudio_backend.connect import MARK, SAMPLING, connect_project
from labelstudio_backend.doctor import examine
from labelstudio_backend.push import push_project
from labelstudio_backend.registry import Registry
from labelstudio_backend.sample_project import label_config
from labelstudio_backend.settings import Settings
from real_label_studio import Studio, start_backend

pytestmark = [pytest.mark.labelstudio, pytest.mark.timeout(900)]

IMAGES = 12
SECRET = "correct-horse-battery"
CONFIG = label_config(["bolt", "nut"], model_score_threshold="0.01")
CANNOT_TRAIN = {"Training"}  # the fixture says why


@dataclass
class Bench:
    """A Label Studio with a project, and a backend that runs."""

    client: LabelStudio
    settings: Settings
    url: str
    project: int

    def connect(self, url: str = "") -> list[str]:
        return connect_project(self.client, self.project, url or self.url, Credentials.of(self.settings)).changes

    def problems(self) -> dict[str, Check]:
        return {c.name: c for c in examine(self.settings, self.project, self.url) if c.state != "OK"}

    @property
    def version(self) -> str:
        (project,) = (p for p in self.registry.projects() if p.project_id == self.project)
        return project.current().name

    @property
    def registry(self) -> Registry:
        return Registry(self.settings.state_dir / "projects")


@pytest.fixture(scope="module")
def bench(label_studio: Studio, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder, port = tmp_path_factory.mktemp("connection"), local_label_studio.free_port()
    settings = Settings(
        state_dir=folder / "state",
        label_studio_url=label_studio.url,
        label_studio_token=label_studio.token,
        secret=SECRET,
    )
    environment = {
        "YOLONAS_STATE_DIR": str(settings.state_dir),
        "YOLONAS_PORT": str(port),
        "YOLONAS_WEIGHTS": "untrained-n",
        "YOLONAS_RUNTIME": "torch",  # nothing is exported first
        "YOLONAS_SECRET": SECRET,
        # Without a token, as with one it sets title and model_version right within seconds by itself.
        "YOLONAS_LABEL_STUDIO_URL": "",
        "YOLONAS_LABEL_STUDIO_TOKEN": "",
    }
    with ExitStack() as stack:
        server = start_backend(environment, folder / "backend.log")
        stack.callback(server.stop, 30.0)
        url = f"http://127.0.0.1:{port}"
        server.wait_until(lambda: local_label_studio.answers(f"{url}/health"), 120)
        client = stack.enter_context(LabelStudio(label_studio.url, label_studio.token))
        project = client.create_project("Connection", CONFIG)["id"]
        client.import_tasks(project, [{"data": {"image": image(n)}} for n in range(IMAGES)])
        yield Bench(client, settings, url, project)


def image(number: int) -> str:
    """A small picture as a data: URL, which a backend reads without a token."""
    pixels = np.random.default_rng(number % 50).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    return "data:image/png;base64," + base64.b64encode(cv2.imencode(".png", pixels)[1].tobytes()).decode()


@contextmanager
def answering(version: str) -> Iterator[str]:
    """The address of something that answers as a backend does, until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            content = json.dumps({"status": "UP", "model_version": version}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            self.do_POST()

        def log_message(self, format: str, *args: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_connection_is_made_broken_named_and_repaired(bench: Bench) -> None:
    client, project = bench.client, bench.project
    assert bench.problems()["Backend"].text == f"the project has no backend at {bench.url}"
    lines = bench.connect()
    assert lines[0] == f"backend {bench.url} added to the project"
    assert bench.connect() == [], "a second run changes nothing"
    assert set(bench.problems()) == CANNOT_TRAIN
    (row,) = client.ml_backends(project)
    state = client.get_project(project)
    assert row["title"] == row["model_version"] == state["model_version"] == bench.version
    assert (state["sampling"], state["show_collab_predictions"]) == (SAMPLING, True)
    (webhook,) = client.webhooks(project)
    assert webhook["headers"]["Authorization"] == f"Bearer {SECRET}"

    def second() -> Any:
        local = bench.url.replace("127.0.0.1", "localhost")
        return client.add_ml_backend(project, local, title="twin", **Credentials.of(bench.settings).row)

    def moved() -> None:
        """As if the backend had been at another address, where nobody is now, and a webhook was left."""
        with answering(bench.version) as url:
            client.patch_ml_backend(client.ml_backends(project)[0], url=url)
        client.create_webhook(project, f"{url}/webhook", {MARK: "backend"})

    faults: list[tuple[Callable[[], Any], str, str]] = [
        (lambda: client.delete_webhook(client.webhooks(project)[0]["id"]), "Webhook", "no corrections are heard of"),
        (
            lambda: client.patch_webhook(client.webhooks(project)[0]["id"], headers={}),
            "Webhook",
            "lacks header Authorization",
        ),
        (
            lambda: client.create_webhook(project, "http://127.0.0.1:9/webhook", {MARK: "backend"}),
            "Webhook",
            "is left of a deleted backend",
        ),
        (lambda: client.patch_ml_backend(client.ml_backends(project)[0], title="My model"), "Version", "'My model'"),
        (lambda: client.patch_project(project, model_version=""), "Version", "the project shows ''"),
        (lambda: client.patch_project(project, show_collab_predictions=False), "Live prediction", "off"),
        (lambda: client.patch_project(project, sampling="Uniform sampling"), "Order", "Uniform sampling"),
        (second, "Backend", "it is connected 2 times"),
        (moved, "Backend", f"the project has no backend at {bench.url}"),
        (lambda: client.delete_ml_backend(client.ml_backends(project)[0]["id"]), "Backend", "the project has no"),
    ]
    for spoil, name, text in faults:
        spoil()
        found = bench.problems()
        assert name in found, (text, found)
        assert text in found[name].text
        assert "connect" in found[name].advice
        assert bench.connect(), text
        assert bench.connect() == [], text
        assert len(client.ml_backends(project)) == len(client.webhooks(project)) == 1
    assert set(bench.problems()) == CANNOT_TRAIN


def test_push_predicts_every_task_once(bench: Bench) -> None:
    bench.connect()
    with Backend(bench.url, Credentials.of(bench.settings)) as backend:
        pushed = push_project(bench.client, backend, bench.project, bench.version)
        assert (pushed.tasks, pushed.stored, pushed.left) == (IMAGES, IMAGES, [])
        stored = bench.client.predictions(bench.project)
        assert sorted(p["task"] for p in stored) == sorted(t["id"] for t in bench.client.iter_tasks(bench.project))
        assert {p["model_version"] for p in stored} == {bench.version}
        region = next(p for p in stored if p["result"])["result"][0]
        assert (region["from_name"], region["to_name"], region["type"]) == ("label", "image", "rectanglelabels")
        (task,) = bench.client.import_tasks(bench.project, [{"data": {"image": "/data/upload/nothing.jpg"}}])
        pushed = push_project(bench.client, backend, bench.project, bench.version)
        assert (pushed.stored, pushed.left) == (0, [task])
        assert bench.problems()["Images"].text.startswith(f"task {task}: ")


@pytest.mark.slow
def test_push_of_two_thousand_tasks(bench: Bench) -> None:
    # With the usual threshold: an untrained model would give each of them 300 boxes.
    project = bench.client.create_project("Two thousand", label_config(["bolt", "nut"]))["id"]
    bench.client.import_tasks(project, [{"data": {"image": image(n)}} for n in range(2000)])
    connect_project(bench.client, project, bench.url, Credentials.of(bench.settings))
    (row,) = bench.client.ml_backends(project)
    begun = time.monotonic()
    with Backend(bench.url, Credentials.of(bench.settings)) as backend:
        pushed = push_project(bench.client, backend, project, row["model_version"])
    print(f"2,000 tasks: {time.monotonic() - begun:.1f} s")
    assert (pushed.stored, pushed.left) == (2000, [])
    assert bench.client.model_versions(project) == {row["model_version"]: 2000}


@pytest.mark.slow
def test_a_batch_action_on_250_tasks(bench: Bench) -> None:
    project = bench.client.create_project("Batch action", label_config(["bolt", "nut"]))["id"]
    bench.client.import_tasks(project, [{"data": {"image": image(n)}} for n in range(250)])
    connect_project(bench.client, project, bench.url, Credentials.of(bench.settings))
    (row,) = bench.client.ml_backends(project)
    tasks = [task["id"] for task in bench.client.iter_tasks(project)]
    begun = time.monotonic()
    bench.client.retrieve_predictions(project, tasks)
    print(f"250 tasks: {time.monotonic() - begun:.1f} s")
    assert sorted(prediction["task"] for prediction in bench.client.predictions(project)) == sorted(tasks)
    assert bench.client.model_versions(project) == {row["model_version"]: 250}

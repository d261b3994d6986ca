"""The fake Label Studio behaves as the real one in what the backend relies on: the same script, against both."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from fake_label_studio import FakeLabelStudio
from labelstudio_backend.client import LabelStudio
from labelstudio_backend.label_studio_http import LabelStudioError

CONFIG = (
    '<View><Image name="image" value="$image"/>'
    '<RectangleLabels name="label" toName="image"><Label value="Car"/></RectangleLabels></View>'
)
BOX = {
    "id": "a",
    "from_name": "label",
    "to_name": "image",
    "type": "rectanglelabels",
    "original_width": 320,
    "original_height": 240,
    "value": {"x": 10, "y": 20, "width": 30, "height": 40, "rotation": 0, "rectanglelabels": ["Car"]},
}


class Backend:
    """Answers Label Studio's calls as version `version`, and notes them."""

    def __init__(self) -> None:
        import json

        self.version, self.calls, self.scores = "v1", [], {}
        backend = self

        class Handler(BaseHTTPRequestHandler):
            def _any(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
                answer = json.dumps(backend.answer(self.path, body)).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            do_GET = do_POST = _any  # noqa: N815

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        self.calls.append((path, body))
        if path == "/setup":
            return {"model_version": self.version}
        if path == "/predict":
            one = {"model_version": self.version, "result": [BOX]}
            return {"results": [{**one, "score": self.scores.get(task["id"], 0.9)} for task in body["tasks"]]}
        return {}

    def events(self) -> list[str]:
        return [body["action"] for path, body in self.calls if path == "/webhook"]


@pytest.fixture
def backend() -> Iterator[Backend]:
    backend = Backend()
    yield backend
    backend.server.shutdown()
    backend.server.server_close()


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.labelstudio)])
def client(request: pytest.FixtureRequest) -> Iterator[LabelStudio]:
    if request.param == "real":
        yield request.getfixturevalue("label_studio").client
    else:
        with FakeLabelStudio() as studio, LabelStudio(studio.url, studio.token) as client:
            yield client


def test_a_project_from_upload_to_training(client: LabelStudio, backend: Backend) -> None:
    project = client.create_project("Cars", CONFIG)["id"]
    tasks = client.upload_files(project, [(f"im{n}.jpg", b"not looked at %d" % n) for n in range(3)])
    state = client.get_project(project)
    assert (len(tasks), state["task_number"], state["label_config"]) == (3, 3, CONFIG)
    shown = list(client.iter_tasks(project, page_size=2))
    assert [task["id"] for task in shown] == sorted(tasks)
    image = shown[0]["data"]["image"]
    assert image.startswith(f"/data/upload/{project}/")
    assert image.endswith("-im0.jpg")
    assert client.download(image) == b"not looked at 0"

    client.add_ml_backend(project, backend.url, title="Mine")
    assert client.get_project(project)["model_version"] == "Mine"
    (row,) = client.ml_backends(project)
    assert (row["title"], row["model_version"], row["state"]) == ("Mine", "v1", "CO")
    row = client.patch_ml_backend(row, title="v1")
    assert client.get_project(project)["model_version"] == "v1"

    backend.scores = {tasks[0]: 0.9, tasks[1]: 0.1, tasks[2]: 0.5}
    client.retrieve_predictions(project, tasks[:2])
    client.retrieve_predictions(project)
    asked = [[task["id"] for task in body["tasks"]] for path, body in backend.calls if path == "/predict"]
    assert asked == [tasks[:2], tasks[2:]]  # those without a prediction of this version
    assert client.model_versions(project) == {"v1": 3}

    client.patch_project(project, sampling="Uncertainty sampling")
    assert next_task(client, project) == tasks[1]
    parent = client.get_task(tasks[1])["predictions"][0]["id"]
    box = {**BOX, "origin": "prediction"}
    annotation = client.create_annotation(tasks[1], [box], lead_time=4.5, parent_prediction=parent)
    assert next_task(client, project) == tasks[2]
    client.create_annotation(tasks[2], [], was_cancelled=True)
    labelled = list(client.iter_tasks(project, only_annotated=True))
    assert [task["id"] for task in labelled] == [tasks[1]]  # a skipped one is no label
    (found,) = labelled[0]["annotations"]
    assert (found["lead_time"], found["parent_prediction"], found["result"][0]["origin"]) == (4.5, parent, "prediction")

    since = labelled[0]["updated_at"]
    client.patch_annotation(annotation["id"], result=[])
    later = [{"filter": "filter:tasks:updated_at", "operator": "greater_or_equal", "type": "Datetime", "value": since}]
    assert tasks[1] in [task["id"] for task in client.iter_tasks(project, filters=later)]
    name = "filter:tasks:predictions_model_versions"
    without = [{"filter": name, "operator": "not_contains", "type": "List", "value": ["v1"]}]
    assert list(client.iter_tasks(project, filters=without)) == []
    client.create_prediction(tasks[0], [BOX], 0.3, "v2")
    without[0]["value"] = ["v2"]
    assert [task["id"] for task in client.iter_tasks(project, filters=without)] == tasks[1:]
    mine = [p for p in client.predictions(project) if p["model_version"] == "v2"]
    client.delete_prediction(mine[0]["id"])
    assert client.model_versions(project) == {"v1": 3}

    client.train(row["id"])
    client.delete_annotation(annotation["id"])
    assert list(client.iter_tasks(project, only_annotated=True)) == []
    events = ["ANNOTATION_CREATED", "ANNOTATION_CREATED", "ANNOTATION_UPDATED", "START_TRAINING", "ANNOTATIONS_DELETED"]
    assert [event for event in backend.events() if event != "PROJECT_UPDATED"] == events
    hook = next(hook for hook in client.webhooks(project) if hook["url"] == f"{backend.url}/webhook")
    client.patch_webhook(hook["id"], headers={"Authorization": "Bearer x"})
    with pytest.raises(LabelStudioError) as error:
        client.get_task(10**6)
    assert error.value.status == 404


def next_task(client: LabelStudio, project: int) -> int:
    answer = httpx.get(f"{client.url}/api/projects/{project}/next", headers=client.authorization(), trust_env=False)
    return int(answer.raise_for_status().json()["id"])


def test_what_a_test_may_do_to_the_fake(backend: Backend) -> None:
    with FakeLabelStudio() as studio, LabelStudio(studio.url, studio.token, retries=0) as client:
        project = client.create_project("Cars", CONFIG)["id"]
        task, _ = client.import_tasks(project, [{"data": {"image": "x"}}, {"data": {"image": "y"}}])
        client.add_ml_backend(project, backend.url, title="Mine")
        studio.webhook_copies = 2
        client.create_annotation(task, [])
        assert backend.events() == ["ANNOTATION_CREATED"] * 2
        studio.away = True
        with pytest.raises(LabelStudioError, match="503"):
            client.get_task(task)
        studio.away = False
        with LabelStudio(studio.url, "0" * 40) as stranger, pytest.raises(LabelStudioError, match="401"):
            stranger.projects()
        # A title that is changed while a training is asked for is saved over.
        row = client.ml_backends(project)[0]
        backend.answer = lambda path, body: client.patch_ml_backend(row, title="v1") if path == "/webhook" else {}  # type: ignore[method-assign]
        client.train(row["id"])
        assert studio.backends[row["id"]]["title"] == "Mine"
        backend.server.shutdown()
        backend.server.server_close()
        (row,) = client.ml_backends(project)
        assert row["state"] == "DI"

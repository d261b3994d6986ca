"""What `doctor` sees and advises, against a fake Label Studio and backend; test_connection.py has the real ones."""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import httpx
import numpy as np
import pytest
from click.testing import CliRunner

from labelstudio_backend import doctor as doctor_module
from labelstudio_backend import label_studio_http
from labelstudio_backend.backend import Credentials
from labelstudio_backend.check import Check
from labelstudio_backend.cli import main
from labelstudio_backend.client import LabelStudio
from labelstudio_backend.connect import MARK, connect_project
from labelstudio_backend.doctor import examine
from labelstudio_backend.registry import ProjectRegistry, Registry
from labelstudio_backend.settings import Settings
from moving_pictures import write_video
from studio_transport import BACKEND, CONFIG, TOKEN, UID, URL, FakeBackend, FakeStudio

SECRET = "correct-horse-battery"
ALL = [
    "Label Studio",
    "Token",
    "Project",
    "Backend",
    "Address",
    "Password",
    "Webhook",
    "Labels",
    "Version",
    "Predictions",
    "Live prediction",
    "Order",
    "Training",
    "Images",
    "Disk",
]
ADVICE = "yolonas-labelstudio connect --project 5 --url http://backend.example.org:9090"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_studio_http, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=50 * 2**30))


class Bench:
    """A whole connection, to be spoilt."""

    def __init__(self, folder: Path) -> None:
        self.studio, self.folder = FakeStudio(tasks=9), folder
        for task in self.studio.tasks.values():
            task["data"]["image"] = f"/data/upload/5/{task['id']}.png"
            content = cv2.imencode(".png", np.full((30, 40, 3), task["id"], np.uint8))[1].tobytes()
            self.studio.files[task["data"]["image"][1:]] = content
        self.settings = Settings(
            state_dir=folder, label_studio_url=URL, label_studio_token=TOKEN, secret=SECRET, train_every=7
        )
        self.project: ProjectRegistry = Registry(folder / "projects").register("http://ls", UID, CONFIG)
        names = ["person", "car", "bicycle", "truck"]
        self.version = self.project.ensure_start("untrained-n", names)
        self.write(kind="start", weights="yolo_nas_s_coco", stamp=None)
        backend = self.studio.backend()
        backend.version, backend.header = self.version.name, f"Bearer {SECRET}"
        self.connect()

    def write(self, **record: Any) -> None:
        """The record of the version that serves."""
        (self.version.path / "record.json").write_text(json.dumps({"number": 0, **record}))

    def connect(self) -> list[str]:
        backend = self.studio.backend()
        with LabelStudio(URL, TOKEN, transport=self.studio) as client:
            # the fake knows one header; a real backend takes the secret as password too
            bearer, backend.header = backend.header, ""
            changes = connect_project(client, 5, BACKEND, Credentials.of(self.settings), transport=self.studio).changes
            backend.header = bearer
        return changes

    def examine(self, url: str | None = None, **settings: Any) -> dict[str, Check]:
        """The checks by name, the worst of each."""
        changed = Settings(**{**self.settings.model_dump(), **settings})
        found: dict[str, Check] = {}
        self.order = []
        for check in examine(changed, 5, url, transport=self.studio):
            worse = ("OK", "WARN", "FAIL").index(check.state)
            if check.name not in found or worse > ("OK", "WARN", "FAIL").index(found[check.name].state):
                found[check.name] = check
            if check.name not in self.order:
                self.order.append(check.name)
        return found

    def problems(self, url: str | None = None, **settings: Any) -> dict[str, Check]:
        found = self.examine(url, **settings)
        return {name: check for name, check in found.items() if check.state != "OK"}


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    bench = Bench(tmp_path)
    # Label Studio sends the secret as a password, which the fake takes for the bearer that it is
    real = FakeBackend.__call__

    def either(self: FakeBackend, request: httpx.Request) -> httpx.Response:
        login = "Basic " + base64.b64encode(f"yolonas:{SECRET}".encode()).decode()
        if request.headers.get("authorization") == login and self.header == f"Bearer {SECRET}":
            request.headers["authorization"] = self.header
        return real(self, request)

    monkeypatch.setattr(FakeBackend, "__call__", either)
    return bench


def test_a_connection_that_is_whole(bench: Bench) -> None:
    bench.studio.project["label_config"] = CONFIG.replace('value="Lorry"', 'value="Lorry" predicted_values="truck"')
    found = bench.examine()
    assert {name: check for name, check in found.items() if check.state != "OK"} == {}
    assert bench.order == ALL
    assert all(check.advice == "" for check in found.values())
    assert found["Label Studio"].text == f"1.23.2 at {URL}"
    assert found["Token"].text == "legacy token of ann@example.org"
    assert found["Labels"].text == "3 of 3 labels of <label> are predicted"
    assert found["Images"].text == "3 of 3 tried are fetched and read (40 x 30, 40 x 30, 40 x 30)"
    assert found["Training"].text == "when asked for, and after every 7 corrected tasks; 0 tasks are labelled"
    assert bench.connect() == []


def test_it_changes_nothing(bench: Bench) -> None:
    before = json.dumps([bench.studio.rows, bench.studio.webhooks, bench.studio.project], default=str)
    bench.examine()
    assert json.dumps([bench.studio.rows, bench.studio.webhooks, bench.studio.project], default=str) == before
    assert not list((bench.folder).glob("media/*")), "images are tried in a cache of their own"


# -- Label Studio and its token -------------------------------------------------------------------------------------


def jwt(**payload: Any) -> str:
    return "head." + base64.urlsafe_b64encode(json.dumps(payload).encode()).decode().rstrip("=") + ".signature"


@pytest.mark.parametrize(
    ("settings", "name", "text", "advice"),
    [
        ({"label_studio_url": ""}, "Label Studio", "its address is not set", "set YOLONAS_LABEL_STUDIO_URL"),
        ({"label_studio_token": None}, "Token", "none is set", "make a personal access token under Account"),
        ({"label_studio_token": "abc"}, "Token", "neither a personal access token nor a legacy token", "make a"),
        ({"label_studio_token": jwt(token_type="access")}, "Token", "it is an access token, which lives", "make a"),
        ({"label_studio_token": jwt(exp=1)}, "Token", "the personal access token expired on 1970-01-01", "make a"),
        ({"label_studio_token": "f" * 40}, "Token", "refuses the legacy token (they are off unless", "make a"),
        ({"label_studio_token": jwt(exp=9e9)}, "Token", "Label Studio refuses the personal access token", "make a"),
    ],
)
def test_address_and_token(bench: Bench, settings: Mapping[str, Any], name: str, text: str, advice: str) -> None:
    found = bench.problems(**settings)
    assert list(found) == [name]
    assert found[name].state == "FAIL"
    assert text in found[name].text
    assert advice in found[name].advice
    assert "Disk" in bench.order, "what can be looked at is looked at"


def test_label_studio_that_is_away_old_or_has_no_such_project(bench: Bench) -> None:
    bench.studio.version = "1.20.0"
    assert "update if something does not work" in bench.problems()["Label Studio"].advice
    bench.studio.project["id"] = 6
    bench.studio.refused = "GET api/projects/5$"
    found = bench.problems()["Project"]
    assert found.state == "FAIL"
    assert "use a token of a member of the project" in found.advice
    bench.studio.away = 10**9
    found = bench.problems()["Label Studio"]
    assert "no answer from Label Studio" in found.text
    assert "check that it runs" in found.advice


@pytest.mark.parametrize("status", [403, 500])
@pytest.mark.parametrize(
    ("path", "name", "missing"),
    [
        ("api/ml", "Backend", ALL[4:13]),
        ("api/webhooks", "Webhook", []),
        ("api/projects/5/model-versions", "Predictions", []),
        ("api/tasks", "Images", []),
    ],
)
def test_a_check_that_label_studio_refuses_is_a_failed_one_and_the_others_go_on(
    bench: Bench, status: int, path: str, name: str, missing: list[str]
) -> None:
    bench.studio.refused, bench.studio.refusal = f"GET {path}$", status
    found = bench.problems()
    assert found[name].state == "FAIL"
    assert f"{path}" in found[name].text
    assert f"answered {status}" in found[name].text
    assert bench.order == [other for other in ALL if other not in missing]


# -- the connection: what is wrong is named, `connect` is the advice, and mends it ------------------------------------


@pytest.mark.parametrize(
    ("spoil", "name", "state", "text"),
    [
        (lambda s: s.webhooks.clear(), "Webhook", "FAIL", "no corrections are heard of"),
        (lambda s: s.webhooks[0].update(is_active=False), "Webhook", "FAIL", "lacks is_active"),
        (lambda s: s.webhooks[0].update(send_payload=False), "Webhook", "FAIL", "lacks send_payload"),
        (lambda s: s.webhooks[0].update(send_for_all_actions=False), "Webhook", "FAIL", "lacks send_for_all_actions"),
        (lambda s: s.webhooks[0].update(headers={}), "Webhook", "FAIL", "lacks header Authorization"),
        (lambda s: s.add_webhook(f"{BACKEND}/webhook"), "Webhook", "WARN", "is a second one"),
        (
            lambda s: s.add_webhook("http://dead/webhook", headers={MARK: "backend"}),
            "Webhook",
            "WARN",
            "is left of a deleted backend",
        ),
        (lambda s: s.rows[0].update(title="My model"), "Version", "FAIL", "its title is 'My model'"),
        (lambda s: s.rows[0].update(auto_update=False), "Version", "FAIL", "stay at one version"),
        (lambda s: s.project.update(model_version="theirs"), "Version", "FAIL", "the project shows 'theirs'"),
        (lambda s: s.project.update(show_collab_predictions=False), "Live prediction", "WARN", "off"),
        (lambda s: s.project.update(sampling="Uniform sampling"), "Order", "WARN", "has 'Uniform sampling'"),
        (lambda s: s.rows.append({**s.rows[0], "id": 99}), "Backend", "FAIL", "it is connected 2 times"),
        (lambda s: s.rows.clear(), "Backend", "FAIL", "the project has no backend"),
    ],
)
def test_each_fault_is_named_and_connect_mends_it(
    bench: Bench, spoil: Callable[[FakeStudio], None], name: str, state: str, text: str
) -> None:
    before = set(bench.problems())
    spoil(bench.studio)
    found = bench.problems(BACKEND)
    assert set(found) - before == {name}
    assert found[name].state == state
    assert text in found[name].text
    assert found[name].advice.startswith(ADVICE)
    bench.connect()
    assert set(bench.problems()) == before


def test_a_webhook_of_nobody_known_is_left_to_the_person(bench: Bench) -> None:
    theirs = [bench.studio.add_webhook(url) for url in ("http://dead/webhook", "http://dead/webhook/n8n")]
    found = bench.problems()["Webhook"]
    assert found.state == "WARN"
    assert found.text == f"webhook {theirs[0]['id']} (http://dead/webhook) is of no backend of the project"
    assert "remove it under Settings > Webhooks" in found.advice
    bench.connect()
    assert bench.studio.webhooks[1:] == theirs, "they may be somebody else's"


def test_a_token_that_may_only_read(bench: Bench) -> None:
    bench.studio.refused = "(PATCH|POST|DELETE) api"
    found = bench.problems()["Webhook"]
    assert found.state == "WARN"
    assert found.advice == "run doctor with a token whose user may save webhooks"


def test_other_backends_of_the_project(bench: Bench) -> None:
    bench.studio.backends["http://sam"] = FakeBackend("sam-1")
    theirs = bench.studio.add_row("http://sam", "sam-1")
    found = bench.problems()["Backend"]
    assert (found.state, "asks only this one" in found.text) == ("WARN", True)
    bench.studio.rows.reverse()
    found = bench.problems()["Backend"]
    assert found.state == "FAIL"
    assert found.text.startswith(f"backend {theirs['id']} (http://sam) comes before it")
    assert "remove backend" in found.advice


def test_no_backend_of_ours_and_one_of_somebody_else(bench: Bench) -> None:
    bench.studio.rows.clear()
    found = bench.problems()["Backend"]
    assert (found.text, found.advice.endswith("--url ADDRESS")) == ("the project has no backend of yolonas", True)
    bench.studio.backends["http://sam"] = FakeBackend("sam-1")
    bench.studio.add_row("http://sam", "sam-1")
    found = bench.problems("http://sam")["Address"]
    assert "names itself 'sam-1', which is not of yolonas" in found.text


def test_a_backend_that_is_down(bench: Bench) -> None:
    del bench.studio.backends[BACKEND]
    found = bench.problems()["Address"]
    assert found.state == "FAIL"
    assert "(Connection refused)" in found.text
    assert "from here it does not answer either" in found.text
    assert "the machine of Label Studio reaches it" in found.advice


def test_an_address_that_label_studio_refuses(bench: Bench) -> None:
    bench.studio.reserved = True
    found = bench.problems()
    assert found["Address"].state == found["Webhook"].state == "FAIL"
    assert "from here it answers" in found["Address"].text
    assert "USE_DEFAULT_BANNED_SUBNETS=false" in found["Address"].advice
    assert found["Webhook"].text == "Label Studio sends no events to this address"
    assert "USE_DEFAULT_BANNED_SUBNETS=false" in found["Webhook"].advice


def test_a_backend_that_only_label_studio_reaches(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    real = bench.studio.backends[BACKEND]

    class Inner(FakeBackend):
        def __call__(self, request: httpx.Request) -> httpx.Response:
            if request.headers["user-agent"].startswith("python-httpx") and "x-studio" not in request.headers:
                raise httpx.ConnectError("[Errno 113] No route to host")
            return real(request)

    asked = bench.studio._ask
    bench.studio.backends[BACKEND] = Inner()

    def from_studio(row: Mapping[str, Any], path: str) -> httpx.Response | None:
        bench.studio.backends[BACKEND] = real
        try:
            return asked(row, path)
        finally:
            bench.studio.backends[BACKEND] = Inner()

    monkeypatch.setattr(bench.studio, "_ask", from_studio)
    found = bench.problems()
    assert found["Address"].state == "WARN"
    assert found["Address"].advice == "run doctor where the backend runs"
    assert "Password" not in bench.order, "cannot be seen from here"
    assert "Webhook" not in found


# -- passwords ------------------------------------------------------------------------------------------------------


def test_passwords_that_do_not_fit(bench: Bench) -> None:
    found = bench.examine()["Password"]
    assert (found.state, found.text) == ("OK", "asked for, and sent by Label Studio")
    found = bench.problems(secret="another-secret")["Password"]
    assert (found.state, found.text) == ("FAIL", "the backend refuses what is set here")
    bench.studio.rows[0]["auth_method"] = "NONE"
    found = bench.problems()["Password"]
    assert found.text == "the backend asks for one, which Label Studio does not send"
    assert found.advice == ADVICE
    bench.studio.backend().header = ""
    found = bench.problems()["Password"]
    assert (found.state, found.text) == ("WARN", "one is set here, but the backend asks for none")
    found = bench.problems(secret=None)["Password"]
    assert found.state == "WARN"
    assert "whoever reaches the backend may have it predict and train" in found.text


def test_events_that_the_backend_refuses(bench: Bench) -> None:
    bench.studio.webhooks[0]["headers"]["Authorization"] = "Bearer of another time"
    found = bench.problems(secret=None)["Webhook"]
    assert "answers 401 to events with the headers of webhook" in found.text
    assert SECRET not in str(bench.examine())


# -- labels, versions, predictions ----------------------------------------------------------------------------------


def test_labels_that_no_class_becomes(bench: Bench) -> None:
    found = bench.problems()["Labels"]
    assert (found.state, found.text) == ("WARN", "2 of 3 labels of <label> are predicted, not Lorry")
    assert '<Label value="Lorry" predicted_values="..."/>; the model knows person, bicycle, car' in found.advice
    assert "and 70 more" in found.advice
    config = CONFIG.replace("car", "cars").replace("person", "Mensch")
    bench.studio.project["label_config"] = config
    found = bench.problems()["Labels"]
    assert (found.state, found.text) == ("FAIL", "0 of 3 labels of <label> are predicted, not cars, Mensch, Lorry")
    assert 'value="cars" predicted_values="car"' in found.advice


def test_labels_that_a_trained_version_has_not_learned(bench: Bench) -> None:
    bench.write(kind="trained", labels=["car", "person"])
    found = bench.problems()["Labels"]
    assert "not Lorry" in found.text
    assert found.advice == "the version has not learned them: label some, and train"


def test_label_configs_without_labels(bench: Bench) -> None:
    bench.studio.project["label_config"] = '<View><Image name="i" value="$image"/></View>'
    assert "has no <RectangleLabels>" in bench.problems()["Labels"].text
    bench.studio.project["label_config"] = "<View>"
    assert "not well-formed XML" in bench.problems()["Labels"].text


def test_a_version_of_another_machine(bench: Bench, tmp_path: Path) -> None:
    found = bench.problems(state_dir=tmp_path / "other")["Labels"]
    assert f"{bench.version.name} is not in {tmp_path / 'other'}" in found.text
    assert "with its YOLONAS_STATE_DIR" in found.advice
    labels: list[dict[str, Any]] = [
        {"label": "car", "classes": ["car"], "advice": None},
        {"label": "Lorry", "classes": [], "advice": "name a class"},
    ]
    backend = bench.studio.backend()
    backend.labels = {"controls": [{"name": "label", "labels": labels}], "problem": None}
    found = bench.problems(state_dir=tmp_path / "other")["Labels"]
    assert found == Check("Labels", "WARN", "1 of 2 labels of <label> are predicted, not Lorry", "name a class")
    backend.labels["controls"][0]["labels"] = labels[1:]
    assert bench.problems(state_dir=tmp_path / "other")["Labels"].state == "FAIL"
    backend.labels["controls"][0]["labels"] = labels[:1]
    assert bench.examine(state_dir=tmp_path / "other")["Labels"].state == "OK"
    backend.labels["problem"] = "The model is not loaded yet."
    assert bench.problems(state_dir=tmp_path / "other")["Labels"].text == "The model is not loaded yet."


def test_predictions_of_an_older_version(bench: Bench) -> None:
    found = bench.examine()["Predictions"]
    assert found.state == "OK", "start weights: the boxes come when a task is opened"
    assert "0 of 9 tasks have a prediction" in found.text
    bench.studio.predictions = [{"id": 1, "task": 1, "model_version": "older"}]
    found = bench.problems()["Predictions"]
    assert found.advice == "yolonas-labelstudio push --project 5 makes the rest"
    bench.studio.predictions = [{"id": n, "task": n, "model_version": bench.version.name} for n in range(1, 10)]
    assert "Predictions" not in bench.problems()


# -- images, training, disk -----------------------------------------------------------------------------------------


def test_images_that_cannot_be_had(bench: Bench) -> None:
    bench.studio.files["data/upload/5/1.png"] = b"no image"
    bench.studio.tasks[9]["data"] = {"picture": "x"}
    bench.studio.tasks[5]["data"]["image"] = "http://elsewhere.example.org/5.png"
    checks = [c for c in examine(bench.settings, 5, transport=bench.studio) if c.name == "Images"]
    assert [check.state for check in checks] == ["FAIL"] * 3
    assert checks[0].text.startswith("task 1: ")
    assert "add it to YOLONAS_MEDIA_HOSTS" in checks[1].advice
    assert checks[2].text == 'the data of task 9 has no text under "image", where the label config looks'
    bench.studio.tasks.clear()
    assert "Images" not in bench.problems()


def test_videos_are_tried_as_videos(bench: Bench, tmp_path: Path) -> None:
    bench.studio.project["label_config"] = (
        '<View><Labels name="l" toName="v"><Label value="Person"/></Labels><Video name="v" value="$film"/>'
        '<VideoRectangle name="box" toName="v"/></View>'
    )
    film = write_video(tmp_path / "film.mp4", 8)
    for task in bench.studio.tasks.values():
        task["data"] = {"film": "/data/upload/5/film.mp4"}
    bench.studio.files["data/upload/5/film.mp4"] = film.read_bytes()
    assert bench.examine()["Images"].text == "3 of 3 tried are fetched and read (8 frames, 8 frames, 8 frames)"
    bench.studio.files["data/upload/5/film.mp4"] = b"#EXTM3U"
    assert "no format that a browser plays" in bench.examine()["Images"].text


def test_training_that_is_not_possible(bench: Bench) -> None:
    bench.studio.backend().can_train = False
    found = bench.problems()["Training"]
    assert (found.state, "no access to the annotations" in found.text) == ("WARN", True)
    bench.studio.backend().can_train = True
    assert bench.examine(train_every=0)["Training"].text.startswith("only when asked for;")


@pytest.mark.parametrize(("free", "state"), [(2**30, "WARN"), (100 * 2**20, "FAIL")])
def test_a_disk_that_is_full(bench: Bench, monkeypatch: pytest.MonkeyPatch, free: int, state: str) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    found = bench.problems()["Disk"]
    assert (found.state, "free some space" in found.advice) == (state, True)


def test_a_folder_that_cannot_be_written(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "cannot be written" in bench.problems()["Disk"].text


# -- the command ----------------------------------------------------------------------------------------------------


def test_the_command(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_module, "examine", partial(examine, transport=bench.studio))
    monkeypatch.setenv("YOLONAS_STATE_DIR", str(bench.folder))
    monkeypatch.setenv("YOLONAS_SECRET", SECRET)
    arguments = ["doctor", "--project", "5", "--label-studio-url", URL, "--token", TOKEN]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0] == f"OK    Label Studio    1.23.2 at {URL}"
    assert any(line.startswith("WARN  Labels          2 of 3 labels") for line in lines)
    assert any(line.startswith(" " * 22 + "-> name the classes that mean it") for line in lines)
    assert lines[-1] == "0 failures, 1 warning."
    bench.studio.webhooks.clear()
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert result.output.splitlines()[-1] == "1 failure, 1 warning."
    result = CliRunner().invoke(main, [*arguments, "--json"])
    assert result.exit_code == 1
    found = json.loads(result.output)
    assert [check["name"] for check in found] == ALL
    assert [check["name"] for check in found if check["state"] == "FAIL"] == ["Webhook"]
    assert TOKEN not in result.output
    assert SECRET not in result.output

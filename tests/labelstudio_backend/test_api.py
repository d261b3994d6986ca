"""What the dashboard reads: routes, their JSON, and that looking costs predictions nothing."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Iterator
from typing import Any

import cv2
import httpx
import numpy as np
import pytest

from dashboard_state import LABELS, NASTY, TITLE, Backend, backend, region, second_project
from labelstudio_backend import overview as overview_module
from labelstudio_backend import page as page_module
from labelstudio_backend.client import LabelStudio
from labelstudio_backend.job_queue import QueueError
from labelstudio_backend.overview import Seen
from labelstudio_backend.registry import ProjectRegistry, Registry
from labelstudio_backend.thumbnails import THUMBNAIL_SIDE, shown_control
from labelstudio_backend.views import LOG_BYTES, task_view
from real_label_studio import wait


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    with backend(tmp_path_factory.mktemp("api")) as found:
        yield found


@pytest.fixture(scope="module")
def client(served: Backend) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url, trust_env=False) as client:
        yield client


def seen(client: httpx.Client, served: Backend) -> dict[str, Any]:
    """The project, once Label Studio was asked."""
    path = f"/api/projects/{served.key}"
    wait(lambda: client.get(path).json()["rounds"] is not None, 30, "what people did")
    return dict(client.get(path).json())


# -- the page --------------------------------------------------------------------------------------------------------


def test_browsers_get_the_page_and_programs_json(client: httpx.Client) -> None:
    page = client.get("/", headers={"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"})
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "<main" in page.text
    for accept in ("application/json", "*/*"):
        answer = client.get("/", headers={"Accept": accept})
        assert answer.json()["name"] == "yolonas"
        assert answer.headers["vary"] == page.headers["vary"] == "Accept"


@pytest.mark.parametrize("name", ["app.js", "views.js", "dom.js", "charts.js", "format.js", "style.css", "icon.svg"])
def test_files_are_revalidated_and_may_load_nothing_from_elsewhere(client: httpx.Client, name: str) -> None:
    first = client.get(f"/dashboard/{name}").raise_for_status()
    assert first.headers["cache-control"] == "no-cache"
    assert first.headers["x-content-type-options"].startswith("nosniff")
    assert first.headers["content-type"].startswith(page_module.TYPES[name.rpartition(".")[2]])
    again = client.get(f"/dashboard/{name}", headers={"If-None-Match": first.headers["etag"]})
    assert again.status_code == 304
    assert again.content == b""
    assert client.get(f"/dashboard/{name}", headers={"If-None-Match": '"other"'}).status_code == 200


def test_the_policy_allows_no_inline_script_and_no_other_host(client: httpx.Client) -> None:
    policy = client.get("/", headers={"Accept": "text/html"}).headers["content-security-policy"]
    rules = dict(part.strip().split(" ", 1) for part in policy.split(",")[0].split(";"))
    assert rules["default-src"] == "'none'"
    assert {rules[name] for name in ("script-src", "style-src", "img-src", "connect-src")} == {"'self'"}
    assert rules["require-trusted-types-for"] == "'script'"


@pytest.mark.parametrize(
    "path", ["/dashboard/..%2fapi.py", "/dashboard/nothing.js", "/dashboard/", "/dashboard/app.py"]
)
def test_nothing_else_is_served(client: httpx.Client, path: str) -> None:
    assert client.get(path).status_code == 404


# -- JSON ------------------------------------------------------------------------------------------------------------


def test_projects_are_listed_with_what_serves(client: httpx.Client, served: Backend) -> None:
    seen(client, served)
    body = client.get("/api/projects").json()
    (project,) = body["projects"]
    assert project["key"] == served.key
    assert project["title"] == TITLE
    assert (project["tasks"], project["labelled"]) == (14, 4)
    assert project["serves"]["name"].endswith("-v4")
    assert project["serves"]["ap50"] == 0.836
    assert body["server"]["can_train"] is True
    assert body["jobs"] == []


def test_a_project_tells_labels_problems_jobs_and_work(client: httpx.Client, served: Backend) -> None:
    project = seen(client, served)
    (control,) = project["labels"]["controls"]
    assert [entry["label"] for entry in control["labels"]] == list(LABELS)
    assert control["labels"][0]["classes"] == ["Platelets"]
    assert control["labels"][3] == {
        "label": NASTY, "classes": [], "advice": "Label some tasks with it: the next training learns it."
    }  # fmt: skip
    assert project["problems"] == []
    assert [job["state"] for job in project["jobs"]][:2] == ["failed", "refused"]
    first, second = project["rounds"]
    assert first["name"].endswith("-v3")
    assert second["name"].endswith("-v4")
    assert (first["tasks"], first["kept"], first["removed"], first["seconds"]) == (2, 7, 5, 28.0)
    assert second["acceptance"] == pytest.approx(11 / 12)


def test_versions_come_newest_first_with_the_gates_decision(client: httpx.Client, served: Backend) -> None:
    versions = client.get(f"/api/projects/{served.key}/versions").json()["versions"]
    assert [version["number"] for version in versions] == [4, 3, 2, 1, 0]
    assert [version["current"] for version in versions] == [True, False, False, False, False]
    assert versions[0]["gate"]["decision"] == "published"
    assert versions[0]["serving"]["precision"] == "int8"
    assert versions[0]["per_class"][0] == {"label": "Platelets", "before": 0.3, "after": 0.36}
    assert versions[4]["trained"] is False
    assert versions[4]["ap50"] is None
    assert "manifest" not in json.dumps(versions)


def test_a_report_is_served_where_it_is_kept_and_may_run_nothing(client: httpx.Client, served: Backend) -> None:
    path = client.get(f"/api/projects/{served.key}/versions").json()["versions"][1]["report"]
    answer = client.get(f"/{path}")
    assert "The report" in answer.text
    assert "sandbox" in answer.headers["content-security-policy"]
    assert "script-src" not in answer.headers["content-security-policy"]
    assert client.get(f"/api/projects/{served.key}/versions/0/report").status_code == 404


def test_a_job_tells_the_end_of_its_log(client: httpx.Client, served: Backend) -> None:
    log = served.jobs.folder(2) / "log.txt"
    lines = [f"12:00:00 INFO line {number} of a long training, with some more words" for number in range(1000)]
    about = {"time": "2026-01-02T03:04:05.678+00:00", "level": "INFO", "logger": "x", "message": "epoch 9", "job": 2}
    log.write_text("\n".join([*lines, json.dumps(about)]))
    job = client.get("/api/jobs/2").json()
    assert job["state"] == "succeeded"
    assert job["gate"]["decision"] == "published"
    assert job["log"][-2:] == [lines[-1], "03:04:05 INFO epoch 9"]
    assert lines[0] not in job["log"]
    assert sum(map(len, job["log"])) <= LOG_BYTES
    assert client.get("/api/jobs/5").json()["log"] == []


@pytest.mark.parametrize(
    "path",
    [
        *("jobs/999", "jobs/x", "projects/9-000000", "projects/.."),
        *("projects/KEY/versions/9/report", "projects/KEY/versions/x/report"),
        *("projects/KEY/thumbnails/9999", "projects/KEY/thumbnails/x"),
    ],
)
def test_what_is_not_there_is_said(client: httpx.Client, served: Backend, path: str) -> None:
    answer = client.get(f"/api/{path.replace('KEY', served.key)}")
    assert answer.status_code == (400 if path.endswith(("/x", "/x/report")) else 404)
    assert list(answer.json()) == ["error"]


def test_the_next_tasks_come_with_boxes_and_a_thumbnail(client: httpx.Client, served: Backend) -> None:
    seen(client, served)
    tasks = client.get(f"/api/projects/{served.key}/next").json()["tasks"]
    assert [task["id"] for task in tasks] == [*served.tasks[12:3:-1], served.tasks[13]]
    assert tasks[0]["size"] == [640, 480]
    assert len(tasks[0]["boxes"]) == 6
    assert sum(tasks[0]["counts"].values()) == 6
    assert tasks[-1]["predicted"] is False
    assert tasks[-1]["score"] is None
    answer = client.get(f"/{tasks[0]['thumbnail']}")
    assert answer.headers["cache-control"] == "private, max-age=3600"
    image = cv2.imdecode(np.frombuffer(answer.content, np.uint8), cv2.IMREAD_COLOR)
    assert image.shape == (THUMBNAIL_SIDE * 3 // 4, THUMBNAIL_SIDE, 3)
    labelled = client.get(f"/api/projects/{served.key}/thumbnails/{served.tasks[0]}")
    assert labelled.status_code == 404  # only of what is to be labelled next


CAR = """<Label value="car"/>"""
TWO_IMAGES = f"""<View><Image name="left" value="$left"/><RectangleLabels name="a" toName="left">{CAR}</RectangleLabels>
<Image name="right" value="$right"/><RectangleLabels name="b" toName="right">{CAR}</RectangleLabels></View>"""
A_VIDEO = f"""<View><Video name="video" value="$video"/><VideoRectangle name="box" toName="video"/>
<Labels name="label" toName="video">{CAR}</Labels></View>"""


def shown(config: str, result: list[dict[str, Any]]) -> dict[str, Any]:
    """A task of a project with this label config, as the page gets it."""
    task = {"id": 7, "predictions": [{"id": 1, "model_version": "v1", "score": 0.5, "result": result}]}
    return task_view(task, "v1", "KEY", Seen(), shown_control(config))


def test_of_several_images_the_first_is_shown_with_its_own_boxes() -> None:
    right = {**region("b", "car", (1, 2, 3, 4)), "to_name": "right", "original_width": 100}
    task = shown(TWO_IMAGES, [right])
    assert (task["boxes"], task["size"], task["counts"]) == ([], None, {"car": 1})
    left = {**region("a", "car", (5, 6, 7, 8)), "to_name": "left"}
    task = shown(TWO_IMAGES, [right, left])
    assert [box["x"] for box in task["boxes"]] == [5]
    assert (task["size"], task["counts"]) == ((640, 480), {"car": 2})


def test_of_a_video_the_tracks_are_counted() -> None:
    track = {"type": "videorectangle", "to_name": "video", "value": {"sequence": [], "labels": ["car"]}}
    task = shown(A_VIDEO, [track, track])
    assert (task["tracks"], task["counts"], task["boxes"]) == (2, {"car": 2}, [])
    assert task["thumbnail"] is None
    assert shown(A_VIDEO, [])["tracks"] == 0
    assert shown("<View", [track])["thumbnail"] is None, "the page tells what is wrong with the label config"


def test_skipped_tasks_are_not_to_be_labelled_next(client: httpx.Client, served: Backend) -> None:
    with LabelStudio(served.studio.url, served.studio.token) as studio:
        made = studio.create_annotation(served.tasks[7], [], was_cancelled=True)
        served.forget_overview()
        seen(client, served)
        tasks = client.get(f"/api/projects/{served.key}/next").json()["tasks"]
        studio.delete_annotation(made["id"])
    served.forget_overview()
    assert {task["id"] for task in tasks} == {*served.tasks[4:]} - {served.tasks[7]}


def test_boxes_of_the_version_that_serves_are_shown_rather_than_later_ones_of_another(
    client: httpx.Client, served: Backend
) -> None:
    seen(client, served)
    task = client.get(f"/api/projects/{served.key}/next").json()["tasks"][0]
    with LabelStudio(served.studio.url, served.studio.token) as studio:
        made = studio.create_prediction(task["id"], [], 0.01, served.registry.version(3).name)
        served.forget_overview()
        seen(client, served)
        again = client.get(f"/api/projects/{served.key}/next").json()["tasks"][0]
        studio.delete_prediction(made["id"])
    assert again == task


def test_a_queue_that_does_not_answer_hides_nothing_else(
    client: httpx.Client, served: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: Any, **__: Any) -> None:
        raise QueueError("no answer from Redis at localhost:6379")

    monkeypatch.setattr(served.jobs, "find", away)
    client.get("/api/projects").raise_for_status()
    project = client.get(f"/api/projects/{served.key}").raise_for_status().json()
    assert project["jobs"] == []
    assert project["serves"]["number"] == 4
    assert [problem["text"] for problem in project["problems"]] == [
        "Trainings cannot be seen: no answer from Redis at localhost:6379"
    ]
    assert "yolonas_version_info" in client.get("/metrics").raise_for_status().text
    monkeypatch.undo()
    assert client.get("/api/projects").json()["projects"][0]["problem_count"] == 0


def test_a_record_is_read_once_and_again_when_it_changes(
    client: httpx.Client, served: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = f"/api/projects/{served.key}/versions"
    before = client.get(path).json()
    read: list[int] = []
    version = ProjectRegistry.version
    monkeypatch.setattr(ProjectRegistry, "version", lambda self, number: read.append(number) or version(self, number))
    assert client.get(path).json() == before
    assert read == []
    record = served.registry.path / "versions" / "v1" / "record.json"
    kept = record.read_text()
    try:
        record.write_text(json.dumps({**json.loads(kept), "removed": 1.0}))
        assert [entry["removed"] for entry in client.get(path).json()["versions"]] == [False, False, False, True, False]
    finally:
        record.write_text(kept)


@pytest.mark.parametrize("name", ["current", "project.json", "versions/v0/record.json"])
@pytest.mark.parametrize("damage", ["", None])
def test_a_project_that_cannot_be_read_is_shown_with_that_problem_beside_the_others(
    client: httpx.Client, served: Backend, name: str, damage: str | None
) -> None:
    other = Registry(served.registry.path.parent).register("http://elsewhere", "7.1795289898", "<View/>")
    try:
        other.ensure_start("untrained-n", [])
        path = other.path / name
        path.unlink()
        if damage is not None:
            path.write_text(damage)
        found = client.get("/api/projects").raise_for_status().json()["projects"]
        projects = {project["key"]: project for project in found}
        assert projects[served.key]["serves"]["number"] == 4
        if damage is None and name != "versions/v0/record.json":
            return  # as before the first version, and as a project that is not known
        assert projects[other.key]["problem_count"] >= 1
        one = client.get(f"/api/projects/{other.key}").raise_for_status().json()
        wanted = "has no version v0 in" if damage is None else f"{path} cannot be read"
        assert any(wanted in problem["text"] for problem in one["problems"])
        assert (one["serves"] is None) == (name != "project.json")
        assert client.get(f"/api/projects/{other.key}/versions").status_code == 200
    finally:
        shutil.rmtree(other.path)


# -- what looking costs ----------------------------------------------------------------------------------------------


def test_nobody_waits_for_label_studio(client: httpx.Client, served: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    answer, go_on = served.studio.answer, threading.Event()

    def slowly(*request: Any) -> tuple[int, Any]:
        assert go_on.wait(60)
        return answer(*request)

    seen(client, served)
    monkeypatch.setattr(served.studio, "answer", slowly)
    served.forget_overview()
    try:
        for path in ("projects", f"projects/{served.key}", f"projects/{served.key}/next"):
            assert client.get(f"/api/{path}", timeout=10).status_code == 200
    finally:
        go_on.set()
    monkeypatch.undo()
    seen(client, served)


def test_label_studio_is_asked_seldom_and_not_while_nobody_looks(
    client: httpx.Client, served: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen(client, served)
    asked: list[str] = []
    answer = served.studio.answer
    monkeypatch.setattr(served.studio, "answer", lambda *request: asked.append(request[1]) or answer(*request))
    for _ in range(20):
        client.get(f"/api/projects/{served.key}")
    assert len(asked) <= 2  # at most one quick look: the project and its next tasks


def test_projects_that_are_only_listed_are_asked_about_seldom_and_in_brief(
    client: httpx.Client, served: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    with second_project(served, "Second") as project:
        about = re.compile(rf"projects/{project.project_id}\b|project={project.project_id}\b")
        asked: list[str] = []
        answer = served.studio.answer
        monkeypatch.setattr(served.studio, "answer", lambda *request: asked.append(request[1]) or answer(*request))
        monkeypatch.setattr(overview_module, "QUICK_SECONDS", 0.0)

        def listed() -> dict[str, Any]:
            return next(p for p in client.get("/api/projects").json()["projects"] if p["key"] == project.key)

        wait(lambda: listed()["seen"]["when"] is not None, 30, "Label Studio's answer")
        assert listed()["title"] == "Second"
        for _ in range(20):
            listed()
        kinds = [target.split("?")[0].strip("/").split("/")[1] for target in asked if about.search(target)]
        assert sorted(kinds) == ["ml", "projects", "webhooks"], "each once, and no tasks"
        path = f"/api/projects/{project.key}/next"
        assert client.get(path).json()["tasks"] is None
        wait(lambda: client.get(path).json()["tasks"] == [], 30, "the next tasks")

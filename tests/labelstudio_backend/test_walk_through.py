"""What a labelling person does, with a real Label Studio, backend and browser: connect, correct by mouse, get a new
version, take it back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from playwright.sync_api import Page

from labelstudio_backend import local_label_studio
from labelstudio_backend.cli import main
from labelstudio_backend.jobs import Jobs
from labelstudio_backend.registry import ProjectRegistry, Registry
from labelstudio_backend.sample_project import label_config, upload
from real_label_studio import Studio, browser, start_backend, wait
from yolonas.data.readers import read_dataset

pytestmark = [pytest.mark.labelstudio, pytest.mark.timeout(900)]

NAMES = ("RBC", "WBC", "Platelets")
TASKS, TRAIN_EVERY = 8, 5
REGIONS = "Htx.annotationStore.selected.regions.map(r => [r.x, r.y, r.width, r.height])"  # percent of the image
CANVASES = "[...document.querySelectorAll('canvas')].map(c => c.getBoundingClientRect())"
PLACES = f"{CANVASES}.map(r => [r.x, r.y, r.width, r.height])"


@dataclass
class Walk:
    """A project of blood cells whose backend knows them already."""

    studio: Studio
    project: int
    tasks: list[int]
    state_dir: Path
    backend: str

    @property
    def registry(self) -> ProjectRegistry:
        (project,) = Registry(self.state_dir / "projects").projects()
        return project

    def run(self, *arguments: str) -> str:
        """`yolonas-labelstudio ...`, as typed."""
        outcome = CliRunner().invoke(main, list(arguments))
        assert outcome.exit_code == 0, outcome.output
        return outcome.output

    def in_step(self, version: str) -> bool:
        (row,) = self.studio.client.ml_backends(self.project)
        shown = self.studio.client.get_project(self.project)["model_version"]
        return {row["title"], row["model_version"], shown} == {version}

    def boxes(self, task: int, version: str) -> list[list[float]]:
        (prediction,) = self.predictions(task, version)
        return [[region["value"][key] for key in ("x", "y", "width", "height")] for region in prediction["result"]]

    def predictions(self, task: int, version: str) -> list[dict[str, Any]]:
        found = self.studio.client.get_task(task)["predictions"]
        return [prediction for prediction in found if prediction["model_version"] == version]


@pytest.fixture
def walk(label_studio: Studio, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Walk]:
    data = read_dataset(shared / "data" / "bccd" / "val.json")
    project = label_studio.client.create_project("A walk", label_config(NAMES))["id"]
    tasks = upload(label_studio.client, project, [image.path for image in data.images[:TASKS]])
    port = local_label_studio.free_port()
    environment = {
        "YOLONAS_STATE_DIR": str(tmp_path / "state"),
        "YOLONAS_PORT": str(port),
        "YOLONAS_WEIGHTS": "yolo_nas_n_bccd",
        "YOLONAS_LABEL_STUDIO_URL": label_studio.url,
        "YOLONAS_LABEL_STUDIO_TOKEN": label_studio.token,
        "YOLONAS_SECRET": "walk the walk",
        "YOLONAS_BASIC_AUTH_USER": "yolonas",
        "YOLONAS_BASIC_AUTH_PASS": "talk-the-talk",
        "YOLONAS_TRAIN_EVERY": str(TRAIN_EVERY),
        "YOLONAS_TRAIN_MINUTES": "0.3",
        "YOLONAS_IMAGE_SIZE": "320",
        "YOLONAS_RECONCILE_SECONDS": "5",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    walk = Walk(label_studio, project, tasks, tmp_path / "state", f"http://127.0.0.1:{port}")
    server = start_backend({}, tmp_path / "backend.log")
    try:
        server.wait_until(lambda: local_label_studio.answers(f"{walk.backend}/health"), 120)
        yield walk
    finally:
        server.stop(30)
        print((tmp_path / "backend.log").read_text()[-6000:])


def test_connect_correct_train_predict_and_roll_back(walk: Walk, tmp_path: Path) -> None:
    client = walk.studio.client
    walk.run("connect", "--url", walk.backend, "--project", str(walk.project))
    first = walk.registry.current().name
    assert walk.in_step(first)

    client.retrieve_predictions(walk.project)
    wait(lambda: client.count_predictions(walk.project, first) == TASKS, 90, "first predictions")
    mine = next(task for task in walk.tasks if len(alone(walk.boxes(task, first))) >= 2)
    others = [task for task in walk.tasks if task != mine][: TRAIN_EVERY - 1]
    for task in others:  # a colleague accepts the boxes of four
        (prediction,) = walk.predictions(task, first)
        client.create_annotation(task, prediction["result"], parent_prediction=prediction["id"], lead_time=4.0)

    with browser(tmp_path / "chromium") as chromium:
        page = chromium.new_page()
        walk.studio.log_in(page)
        before, after = correct_two_boxes(walk, page, mine)
        (annotation,) = client.get_task(mine)["annotations"]
        assert [region["origin"] for region in annotation["result"]].count("prediction-changed") == 2
        assert annotation["parent_prediction"] == walk.predictions(mine, first)[0]["id"]
        assert len(before) == len(after) == len(annotation["result"])

        wait(lambda: walk.registry.current().name != first, 300, "the training that five labelled tasks start")
        second = walk.registry.current()
        manifest = Jobs(walk.state_dir / "jobs.sqlite").find()[-1].manifest
        assert manifest is not None
        assert sorted(manifest) == sorted(str(task) for task in (mine, *others))
        wait(lambda: walk.in_step(second.name), 60, "title and model_version follow")
        wait(lambda: client.count_predictions(walk.project, second.name) == TASKS, 90, "predicted again")
        assert shown_version(walk, page, walk.tasks[-1]) == second.name

        roll_back(walk, page, first)
        wait(lambda: walk.registry.current().name == first, 30, "rolled back")
        wait(lambda: walk.in_step(first), 60, "title and model_version follow back")
        assert shown_version(walk, page, walk.tasks[-1]) == first


def correct_two_boxes(walk: Walk, page: Page, task: int) -> tuple[list[list[float]], list[list[float]]]:
    """Open a task, drag one box, pull a corner of another, and submit; the regions before and after."""
    page.goto(f"{walk.studio.url}/projects/{walk.project}/data?task={task}")
    page.wait_for_selector("canvas")
    page.wait_for_function(f"{REGIONS}.length > 1")
    page.wait_for_timeout(3000)
    # the largest canvas has the place of the whole image
    left, top, width, height = max(page.evaluate(PLACES), key=lambda place: place[2] * place[3])
    before: list[list[float]] = page.evaluate(REGIONS)

    def pixel(x: float, y: float) -> tuple[float, float]:
        return left + width * x / 100, top + height * y / 100

    def drag(start: tuple[float, float], by: tuple[float, float]) -> None:
        page.mouse.move(*start)
        page.mouse.down()
        page.mouse.move(start[0] + by[0], start[1] + by[1], steps=6)
        page.mouse.up()
        page.wait_for_timeout(500)

    one, other = alone(before)[:2]
    x, y, w, h = before[one]
    page.mouse.click(*pixel(x + w / 2, y + h / 2))
    page.wait_for_timeout(700)
    drag(pixel(x + w / 2, y + h / 2), (14, 9))
    page.keyboard.press("Escape")
    x, y, w, h = before[other]
    page.mouse.click(*pixel(x + w / 2, y + h / 2))
    page.wait_for_timeout(700)
    drag(pixel(x + w, y + h), (-10, -10))
    after: list[list[float]] = page.evaluate(REGIONS)
    moved = [number for number, (old, new) in enumerate(zip(before, after, strict=True)) if max_change(old, new) > 0.3]
    assert sorted(moved) == sorted((one, other)), "two boxes were moved by mouse, and no other"
    page.get_by_test_id("bottombar-submit-button").click()
    wait(lambda: bool(walk.studio.client.get_task(task)["annotations"]), 30, "the submitted annotation")
    return before, after


def max_change(old: list[float], new: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(old, new, strict=True))


def alone(boxes: list[list[float]]) -> list[int]:
    """The boxes that a person can take hold of: inside the image, and no other one over their middle or corner."""

    def covers(box: list[float], x: float, y: float) -> bool:
        return box[0] - 2 < x < box[0] + box[2] + 2 and box[1] - 2 < y < box[1] + box[3] + 2

    found = []
    for number, (x, y, w, h) in enumerate(boxes):
        others = [box for place, box in enumerate(boxes) if place != number]
        points = ((x + w / 2, y + h / 2), (x + w, y + h))
        inside = x > 3 and y > 3 and x + w < 95 and y + h < 95 and min(w, h) > 5
        if inside and not any(covers(box, *point) for box in others for point in points):
            found.append(number)
    return found


def shown_version(walk: Walk, page: Page, task: int) -> str:
    """Whose boxes Label Studio shows to the person who opens a task."""
    page.goto(f"{walk.studio.url}/projects/{walk.project}/data?task={task}")
    page.wait_for_selector("canvas")
    page.wait_for_function(f"{REGIONS}.length > 0")
    shown = page.evaluate(REGIONS)
    versions = {
        prediction["model_version"]
        for prediction in walk.studio.client.get_task(task)["predictions"]
        if len(prediction["result"]) == len(shown)
        and max_change(sorted(region["value"]["x"] for region in prediction["result"]), sorted(box[0] for box in shown))
        < 0.01
    }
    assert len(versions) == 1, f"the boxes on the page are those of {versions or 'no prediction'}"
    return versions.pop()


def roll_back(walk: Walk, page: Page, version: str) -> None:
    """By mouse on the dashboard, which asks back."""
    serve = f"Serve {version.rpartition('-')[2]}"
    page.goto(walk.backend.replace("//", "//yolonas:talk-the-talk@"))  # typed once, the browser keeps them
    page.goto(walk.backend)
    page.get_by_role("button", name=serve).click()
    page.get_by_role("dialog").get_by_role("button", name=serve).click()

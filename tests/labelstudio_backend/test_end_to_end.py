"""The whole loop on a real Label Studio: predict, label, train, predict better; and a bad training refused.

It takes about six minutes, and four more where Label Studio has to be installed first.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from labelstudio_backend import local_label_studio
from labelstudio_backend.client import LabelStudio, project_uid
from labelstudio_backend.corrections import held_out
from labelstudio_backend.job import Job
from labelstudio_backend.jobs import Jobs
from labelstudio_backend.media import MediaCache
from labelstudio_backend.pull import pull_project
from labelstudio_backend.registry import ProjectRegistry, Registry, project_key
from labelstudio_backend.sample_project import COLOURS, annotate, label_config, regions, upload
from labelstudio_backend.settings import Settings
from real_label_studio import Studio, browser, start_backend, wait
from yolonas.data.labelled import LabelledImage, LabelledImages
from yolonas.data.readers import read_dataset
from yolonas.data.samples import generate
from yolonas.evaluation import coco_ap
from yolonas.inference.detections import Detections
from yolonas.inference.sources import read_image

pytestmark = [pytest.mark.labelstudio, pytest.mark.timeout(1800)]

SHARED = Path(__file__).resolve().parents[3] / "shared"
TRAIN, VAL = 40, 20
TRAIN_MINUTES = 0.8
HELD_OUT = 0.25
SCALE = 2  # pixels of the screenshot for one of the page


@dataclass
class Loop:
    """A Label Studio and a backend that run, and what was seen on the way round."""

    studio: Studio
    state_dir: Path
    backend: str
    data: LabelledImages  # TRAIN images, then VAL images
    extra: LabelledImage  # one more
    project: int = 0
    row: int = 0
    tasks: list[int] = field(default_factory=list)
    ap50: dict[str, float] = field(default_factory=dict)
    jobs: list[Job] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return self.studio.url

    @property
    def client(self) -> LabelStudio:
        return self.studio.client

    @property
    def registry(self) -> ProjectRegistry:
        (project,) = Registry(self.state_dir / "projects").projects()
        return project

    def phase(self, name: str, work: Callable[[], Any]) -> Any:
        begun = time.monotonic()
        result = work()
        self.seconds[name] = round(time.monotonic() - begun, 1)
        print(f"{name}: {self.seconds[name]} s", flush=True)
        return result


def bccd_or_drawn(folder: Path) -> LabelledImages:
    """TRAIN images to label, VAL images to measure on, and one more."""
    if (SHARED / "data" / "bccd" / "train.json").is_file():
        parts = [read_dataset(SHARED / "data" / "bccd" / f"{part}.json") for part in ("train", "val")]
        assert parts[0].names == parts[1].names
        return LabelledImages(parts[0].names, parts[0].images[:TRAIN] + parts[1].images[: VAL + 1])
    return generate(folder, TRAIN + VAL + 1)


@pytest.fixture(scope="module")
def loop(label_studio: Studio, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loop]:
    folder = tmp_path_factory.mktemp("loop")
    backend_port = local_label_studio.free_port()
    images = bccd_or_drawn(folder / "images")
    loop = Loop(
        studio=label_studio,
        state_dir=folder / "backend",
        backend=f"http://127.0.0.1:{backend_port}",
        data=LabelledImages(images.names, images.images[:-1]),
        extra=images.images[-1],
    )
    environment = {
        "YOLONAS_STATE_DIR": str(loop.state_dir),
        "YOLONAS_PORT": str(backend_port),
        "YOLONAS_WEIGHTS": "untrained-n",
        "YOLONAS_LABEL_STUDIO_URL": loop.url,
        "YOLONAS_LABEL_STUDIO_TOKEN": label_studio.token,
        "YOLONAS_TRAIN_MINUTES": str(TRAIN_MINUTES),
        "YOLONAS_TRAIN_EVERY": "0",
        "YOLONAS_HELD_OUT": str(HELD_OUT),
        "YOLONAS_IMAGE_SIZE": "320",
        "YOLONAS_RECONCILE_SECONDS": "5",
    }
    server = start_backend(environment, folder / "backend.log")
    try:
        up = f"{loop.backend}/health"
        loop.phase("start the backend", lambda: server.wait_until(lambda: local_label_studio.answers(up), 120))
        go_round(loop)
        yield loop
    finally:
        server.stop(30)
        print((folder / "backend.log").read_text()[-6000:])


# -- the way round -------------------------------------------------------------------------------------------------


def go_round(loop: Loop) -> None:
    loop.phase("make the project", lambda: make_project(loop))
    loop.phase("first predictions", lambda: first_predictions(loop))
    loop.ap50["before"] = stored_ap50(loop, loop.registry.current().name)
    loop.phase(f"annotate {TRAIN} tasks", lambda: annotate_all(loop))
    loop.phase("first training", lambda: train(loop))
    assert loop.jobs[0].state == "succeeded", loop.jobs[0].reason
    loop.phase("in step with v1", lambda: in_step(loop))
    loop.ap50["v1"] = stored_ap50(loop, loop.registry.current().name)
    loop.phase("second training", lambda: train(loop))
    loop.phase("in step again", lambda: in_step(loop))
    loop.ap50["after the second"] = stored_ap50(loop, loop.registry.current().name)
    loop.phase("spoil the training part", lambda: spoil(loop))
    loop.phase("third training", lambda: train(loop))
    print(f"AP50 on {VAL} unannotated tasks: {loop.ap50}")
    for job in loop.jobs:
        speed = job.record.get("training", {}).get("images_per_second")
        print(f"job {job.id}: {job.state}, {job.reason}, {speed} images/s")


def make_project(loop: Loop) -> None:
    """One whose held-out part can judge a version and leaves enough to learn from: by chance, it may be any part."""
    config = label_config(loop.data.names, model_score_threshold="0.05")
    held = 0
    while not TRAIN / 8 <= held <= 3 * TRAIN / 8:
        loop.project = loop.client.create_project("The loop", config)["id"]
        loop.tasks = upload(loop.client, loop.project, [image.path for image in loop.data.images])
        key = project_key(loop.url, project_uid(loop.client.get_project(loop.project)))
        held = sum(held_out(key, task, HELD_OUT) for task in loop.tasks[:TRAIN])
    loop.client.add_ml_backend(loop.project, loop.backend, title="My model")
    (row,) = loop.client.ml_backends(loop.project)
    loop.row = row["id"]


def first_predictions(loop: Loop) -> None:
    """As the person who presses Retrieve Predictions."""
    in_step(loop, predicted=False)
    loop.client.retrieve_predictions(loop.project)
    in_step(loop)


def annotate_all(loop: Loop) -> None:
    for task, image in zip(loop.tasks[:TRAIN], loop.data.images[:TRAIN], strict=True):
        annotate(loop.client, task, image, loop.data.names)


def train(loop: Loop) -> None:
    """As the person who presses Start Training; waits for the end of the job."""
    known = len(all_jobs(loop))
    loop.client.train(loop.row)
    assert len(all_jobs(loop)) == known + 1
    job_id = all_jobs(loop)[-1].id
    limit = TRAIN_MINUTES * 60 + 240
    status: dict[str, Any] = {}

    def ended() -> bool:
        nonlocal status
        status = httpx.post(f"{loop.backend}/job_status", json={"job": str(job_id)}).raise_for_status().json()
        return status["job_status"] in ("finished", "failed", "canceled")

    wait(ended, limit, f"job {job_id}")
    loop.jobs.append(all_jobs(loop)[-1])


def all_jobs(loop: Loop) -> list[Job]:
    return Jobs(loop.state_dir / "jobs.sqlite").find()


def in_step(loop: Loop, *, predicted: bool = True) -> None:
    """Wait until Label Studio shows the current version everywhere, and every task has its prediction."""
    version = loop.registry.current().name

    def title_and_project() -> bool:
        (row,) = loop.client.ml_backends(loop.project)  # it asks /setup, which names the version before while one loads
        shown = loop.client.get_project(loop.project)["model_version"]
        return {row["model_version"], row["title"], shown} == {version}

    wait(title_and_project, 60, f"title and model_version {version}")
    if predicted:
        count = lambda: loop.client.count_predictions(loop.project, version) == len(loop.tasks)  # noqa: E731
        wait(count, 120, f"predictions of {version}")


def stored_ap50(loop: Loop, version: str) -> float:
    """AP50 of the predictions that Label Studio holds for the unannotated tasks."""
    by_task: dict[int, list[dict[str, Any]]] = {}
    for prediction in loop.client.predictions(loop.project):
        if prediction["model_version"] == version:
            assert prediction["task"] not in by_task, "one prediction of a version for a task"
            by_task[prediction["task"]] = prediction["result"]
    images = loop.data.images[TRAIN:]
    found = [
        detections(by_task[task], image, loop.data.names)
        for task, image in zip(loop.tasks[TRAIN:], images, strict=True)
    ]
    return coco_ap(LabelledImages(loop.data.names, images), found).ap50


def detections(result: Sequence[dict[str, Any]], image: LabelledImage, names: Sequence[str]) -> Detections:
    boxes = []
    for region in result:
        assert (region["original_width"], region["original_height"]) == (image.width, image.height)
        x, y, width, height = (region["value"][key] for key in ("x", "y", "width", "height"))
        boxes.append([x, y, x + width, y + height])
    size = np.array([image.width, image.height, image.width, image.height])
    return Detections(
        np.array(boxes).reshape(-1, 4) * size / 100,
        np.array([region["score"] for region in result]),
        np.array([names.index(region["value"]["rectanglelabels"][0]) for region in result], dtype=np.int64),
        tuple(names),
        (image.height, image.width),
    )


def spoil(loop: Loop) -> None:
    """Give every task of the training part wrong boxes of wrong labels; the held-out part stays as it is."""
    key, count = loop.registry.key, len(loop.data.names)
    for task, image in zip(loop.tasks[:TRAIN], loop.data.images[:TRAIN], strict=True):
        if held_out(key, task, HELD_OUT):
            continue
        boxes = image.boxes.copy()
        boxes[:, [0, 2]] = image.width - boxes[:, [2, 0]]  # mirrored
        boxes[:, 2:] = (boxes[:, :2] + boxes[:, 2:]) / 2  # a quarter of the size
        wrong = LabelledImage(image.path, boxes, (image.labels + 1) % count, image.crowd, image.width, image.height, 1)
        (annotation,) = loop.client.get_task(task)["annotations"]
        loop.client.patch_annotation(annotation["id"], result=regions(wrong, loop.data.names))


# -- what must have come of it -------------------------------------------------------------------------------------


def test_one_training_makes_the_stored_predictions_better(loop: Loop) -> None:
    assert loop.ap50["v1"] >= loop.ap50["before"] + 0.2, loop.ap50
    record = loop.registry.version(1).record
    assert record["base"] == loop.registry.version(0).name
    assert record["tasks"]["labelled"] == TRAIN
    held = sum(held_out(loop.registry.key, task, HELD_OUT) for task in loop.tasks[:TRAIN])
    assert (record["tasks"]["train"], record["tasks"]["held_out"]) == (TRAIN - held, held)


def test_a_second_training_starts_from_the_version_of_the_first(loop: Loop) -> None:
    assert loop.jobs[1].state in ("succeeded", "refused"), loop.jobs[1].reason
    assert loop.jobs[1].record["base"] == loop.jobs[0].version


def test_a_training_on_wrong_boxes_is_refused_and_the_old_version_goes_on(loop: Loop) -> None:
    job = loop.jobs[2]
    assert job.state == "refused", job.reason
    assert job.record["gate"]["ap50_after"] < job.record["gate"]["ap50_before"]
    assert job.record["base"] == loop.registry.current().name
    in_step(loop)


def test_a_pulled_project_is_a_data_set(loop: Loop, tmp_path: Path) -> None:
    settings = Settings(state_dir=tmp_path, label_studio_url=loop.url, label_studio_token=loop.studio.account.token)
    pulled = pull_project(loop.client, MediaCache(settings, loop.client).fetch, loop.project, tmp_path / "project")
    assert (pulled.tasks, pulled.images, pulled.missing) == (TRAIN, TRAIN, [])
    data, given = read_dataset(tmp_path / "project"), loop.data.images[:TRAIN]
    assert (data.names, data.dropped, data.changed) == (loop.data.names, [], [])
    found = {image.path.read_bytes(): len(image.boxes) for image in data.images}
    assert found == {image.path.read_bytes(): len(image.boxes) for image in given}


def test_predicted_boxes_stand_on_the_image_in_a_browser(loop: Loop, tmp_path: Path) -> None:
    # With the version's own threshold, which a label config without `model_score_threshold` leaves to it; in a task
    # that nothing has looked at yet.
    loop.client.patch_project(loop.project, label_config=label_config(loop.data.names))
    image = loop.extra
    (task,) = loop.client.upload_files(loop.project, [(image.path.name, image.path.read_bytes())])

    def predicted() -> list[list[dict[str, Any]]]:
        version = loop.registry.current().name
        given = loop.client.get_task(task)["predictions"]
        return [prediction["result"] for prediction in given if prediction["model_version"] == version]

    wait(lambda: bool(predicted()), 60, "the new task's prediction")
    stored = predicted()[0]
    screenshot = Path(os.environ.get("YOLONAS_SCREENSHOTS", tmp_path)) / "label_studio_task.png"
    begun = time.monotonic()
    seen = open_task(loop, task, screenshot)
    print(f"browser: {time.monotonic() - begun:.1f} s, screenshot: {screenshot}")
    assert seen["regions"] == len(stored), "Label Studio shows every box of the prediction"
    assert image_difference(seen, image, stored) < 2, "the image is where the boxes are measured"
    drawn = [edge_share(seen, region, loop.data.names) for region in stored]
    assert len(drawn) >= 3
    # Not all of it: what another box lies over has that one's colour.
    assert np.mean(drawn) > 0.75, f"share of each box's outline that has its label's colour: {drawn}"
    elsewhere = [edge_share(seen, moved(region), loop.data.names) for region in stored]
    assert np.mean(elsewhere) < 0.7 * np.mean(drawn), "the colours are where the boxes are, not everywhere"


def open_task(loop: Loop, task: int, screenshot: Path) -> dict[str, Any]:
    """Log in and open a task as a person does; the number of regions, the image's place and the page's pixels."""
    # scaled, else the thin outlines are blended with what they stand on
    with browser(screenshot.parent / "chromium", scale=SCALE) as chromium:
        page = chromium.new_page()
        loop.studio.log_in(page)
        page.goto(f"{loop.url}/projects/{loop.project}/data?task={task}")
        page.wait_for_selector("canvas")
        page.wait_for_timeout(5000)
        page.screenshot(path=str(screenshot))
        regions = page.evaluate("window.Htx.annotationStore.selected.regions.length")
        # The largest canvas has the place of the whole image, which is zoomed a little and cut by the smallest.
        places = page.evaluate(
            "[...document.querySelectorAll('canvas')].map(c => c.getBoundingClientRect())"
            ".map(r => [r.x, r.y, r.width, r.height]).sort((a, b) => b[2] * b[3] - a[2] * a[3])"
        )
    return {"regions": regions, "place": places[0], "cut": places[-1], "pixels": read_image(screenshot).astype(int)}


def image_difference(seen: dict[str, Any], image: LabelledImage, result: Sequence[dict[str, Any]]) -> float:
    """Median difference, 0..255, of the page from the image, where nothing is drawn over it."""
    left, top, width, height = (SCALE * side for side in seen["place"])
    edges = [SCALE * side for side in seen["cut"]]
    pixels = read_image(image.path).astype(int)
    boxes = [region["value"] for region in result]
    differences = []
    for x, y in np.random.default_rng(0).uniform(0, 100, (4000, 2)):
        if any(-1 < x - b["x"] < b["width"] + 1 and -1 < y - b["y"] < b["height"] + 1 for b in boxes):
            continue
        px, py = left + width * x / 100, top + height * y / 100
        if 4 < px - edges[0] < edges[2] - 4 and 4 < py - edges[1] < edges[3] - 4:
            original = pixels[int(image.height * y / 100), int(image.width * x / 100)]
            differences.append(np.abs(seen["pixels"][int(py), int(px)] - original).mean())
    assert len(differences) > 100
    return float(np.median(differences))


def edge_share(seen: dict[str, Any], region: dict[str, Any], names: Sequence[str]) -> float:
    """Share of a box's outline along which the page has the colour of its label, within 3 px of where it belongs."""
    left, top, width, height = (SCALE * side for side in seen["place"])
    value = region["value"]
    x1, x2 = (left + width * x / 100 for x in (value["x"], value["x"] + value["width"]))
    y1, y2 = (top + height * y / 100 for y in (value["y"], value["y"] + value["height"]))
    code = COLOURS[names.index(value["rectanglelabels"][0])]
    colour = np.array([int(code[i : i + 2], 16) for i in (1, 3, 5)])
    along = np.linspace(0.1, 0.9, 15)
    points = [(x, y1 + t * (y2 - y1)) for x in (x1, x2) for t in along]
    points += [(x1 + t * (x2 - x1), y) for y in (y1, y2) for t in along]
    hits = 0
    for x, y in points:
        patch = seen["pixels"][max(0, round(y) - 3) : round(y) + 4, max(0, round(x) - 3) : round(x) + 4].reshape(-1, 3)
        hits += bool(len(patch)) and np.linalg.norm(patch - colour, axis=1).min() < 60
    return hits / len(points)


def moved(region: dict[str, Any]) -> dict[str, Any]:
    value = region["value"]
    return {**region, "value": {**value, "x": (value["x"] + 37) % 80, "y": (value["y"] + 41) % 80}}

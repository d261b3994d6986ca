"""Tasks in, predictions out, with a scripted model: order, isolation, deadlines, versions, mapping."""

from __future__ import annotations

import base64
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import httpx
import numpy as np
import pytest
from pydantic import SecretStr

from labelstudio_backend.client import LabelStudio
from labelstudio_backend.media import MediaCache
from labelstudio_backend.registry import Registry
from labelstudio_backend.service import BadRequestError, Service
from labelstudio_backend.settings import UNTRAINED, Settings
from labelstudio_backend.version import Version
from real_label_studio import wait
from yolonas.active_learning import SIGNALS_CONF
from yolonas.errors import YolonasError
from yolonas.inference.detections import Detections
from yolonas.labelstudio import task_score

HOST, UID = "http://localhost:8080", "5.1795289898"
CONFIG = (
    '<View><Image name="image" value="$image"/><RectangleLabels name="label" toName="image"{}>'
    '<Label value="Car" predicted_values="car,truck"/><Label value="Person"/></RectangleLabels></View>'
)


class FakeModel:
    """Finds one box, whose x is the image's mean grey value, of class 0; scores count up from `score`."""

    def __init__(self, names: tuple[str, ...] = ("car", "person"), score: float = 0.9, seconds: float = 0.0) -> None:
        self.names = names
        self.checkpoint = SimpleNamespace(conf=0.25, iou=0.7)
        self.score = score
        self.seconds = seconds
        self.batches: list[int] = []
        self.calls: list[dict[str, Any]] = []
        self.fail: Callable[[list[np.ndarray]], bool] = lambda images: False

    def predict_batch(self, images: list[np.ndarray], **options: Any) -> list[Detections]:
        time.sleep(self.seconds)
        self.batches.append(len(images))
        self.calls.append(options)
        if self.fail(images):
            raise RuntimeError("CUDA out of memory")
        found = []
        for image in images:
            kept = self.score > options["conf"]
            boxes = np.array([[image.mean(), 0, 300, 10]][:kept], np.float32).reshape(-1, 4)
            found.append(Detections(boxes, [self.score] * kept, [0] * kept, self.names, image.shape[:2]))
        return found


def picture(grey: int, size: tuple[int, int] = (240, 320)) -> str:
    ok, content = cv2.imencode(".png", np.full((*size, 3), grey, np.uint8))
    assert ok
    return "data:image/png;base64," + base64.b64encode(content.tobytes()).decode()


def tasks(*values: Any) -> list[dict[str, Any]]:
    return [{"id": 100 + index, "data": {"image": value}} for index, value in enumerate(values)]


def request(*values: Any, config: str = CONFIG.format(""), context: Any = None) -> dict[str, Any]:
    return {"tasks": tasks(*values), "project": UID, "label_config": config, "params": {"context": context}}


class Harness:
    def __init__(self, folder: Path, **values: Any) -> None:
        values = {"weights": "yolo_nas_s_coco", "predict_seconds": 10.0, **values}
        self.settings = Settings(state_dir=folder, label_studio_token=None, label_studio_url="", **values)
        self.registry = Registry(folder / "projects")
        self.model = FakeModel()
        self.loads: list[str] = []
        self.load: Callable[[Version], FakeModel] = lambda version: self.model
        self.service = Service(
            self.settings, self.registry, MediaCache(self.settings, None), load=lambda version: self._load(version)
        )

    def _load(self, version: Version) -> FakeModel:
        self.loads.append(version.name)
        return self.load(version)

    def setup(self, config: str = CONFIG.format(""), uid: str = UID, hostname: str = HOST) -> str:
        return self.service.setup({"project": uid, "schema": config, "hostname": hostname})["model_version"]

    def predict(self, *values: Any, **options: Any) -> list[Any]:
        return self.service.predict(request(*values, **options))["results"]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Harness]]:
    made: list[Harness] = []

    def build(**values: Any) -> Harness:
        made.append(Harness(tmp_path, **values))
        return made[-1]

    yield build
    for harness in made:
        harness.service.close()


@pytest.fixture
def harness(make: Callable[..., Harness]) -> Harness:
    return make()


# -- /setup


def test_setup_names_a_version_and_waits_for_no_model(harness: Harness) -> None:
    loaded = threading.Event()
    harness.load = lambda version: harness.model if loaded.wait(60) else FakeModel()
    begin = time.monotonic()
    version = harness.setup()
    assert version == harness.setup()
    assert version.startswith("yolonas-5-")
    assert harness.setup(hostname="http://other:8080") != version
    assert time.monotonic() - begin < 30  # so it has not waited for the model
    loaded.set()
    assert set(harness.service.versions()["versions"]) == {version, harness.setup(hostname="http://other:8080")}


@pytest.mark.parametrize("config", ["<View>", "<View/>", "<!DOCTYPE a><View/>"])
def test_setup_answers_whatever_the_label_config(harness: Harness, config: str) -> None:
    assert harness.setup(config).endswith("-v0")
    assert harness.predict(picture(1), picture(2), config=config) == [[], []]
    assert harness.loads == []


@pytest.mark.parametrize(
    "body",
    [{}, {"project": 5, "schema": "<View/>"}, {"project": "x", "schema": "<View/>"}, {"project": UID, "schema": []}],
)
def test_setup_refuses_what_label_studio_does_not_send(harness: Harness, body: dict[str, Any]) -> None:
    with pytest.raises(BadRequestError):
        harness.service.setup(body)


def test_setup_alone_tells_the_mapping_of_a_foreign_start(
    make: Callable[..., Harness], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    harness = make(loaded_models=1)
    harness.model.names = ("car", "truck", "dog")
    harness.setup()
    harness.setup()
    wait(lambda: "not predicted: Person" in caplog.text)
    assert "<label> Car <- car + truck" in caplog.text
    harness.setup(CONFIG.format("").replace("Person", "Dog"))
    assert "Car <- car + truck, Dog <- dog" in caplog.text  # the classes are known by now
    assert caplog.text.count(" serves ") == 2
    assert len(harness.loads) == 1


def test_setup_alone_tells_that_the_model_cannot_be_loaded(harness: Harness, caplog: pytest.LogCaptureFixture) -> None:
    def load(_: Version) -> FakeModel:
        raise FileNotFoundError("no such checkpoint")

    harness.load = load
    harness.setup()
    wait(lambda: "-v0 could not be loaded: no such checkpoint" in caplog.text)


def test_an_error_of_loading_does_not_gather_those_it_was_raised_to(harness: Harness) -> None:
    def load(_: Version) -> FakeModel:
        raise FileNotFoundError("no such checkpoint")

    harness.load = load
    harness.setup()
    version, frames = harness.registry.projects()[0].current(), []
    for _ in range(4):
        with pytest.raises(YolonasError, match="could not be loaded: no such checkpoint") as caught:
            harness.service.models.get(version, time.monotonic() + 5)
        frames.append(len(caught.traceback))
    assert len(harness.loads) == 1  # the others were told of the first one's failure
    assert len(set(frames[1:])) == 1


def test_the_classes_of_trained_versions_are_in_their_records_not_in_memory(harness: Harness) -> None:
    harness.setup()
    project = harness.registry.projects()[0]
    for number in range(3):
        weights = harness.settings.state_dir / f"{number}.safetensors"
        weights.write_bytes(b"weights")
        project.publish(weights, {"labels": list(harness.model.names)})
        harness.service.preload(project.key)
        assert harness.service.models.names(project.current()) == harness.model.names
    assert len(harness.loads) == 4  # the start version too
    assert len(harness.service.models._names) == 1


def test_a_model_that_has_left_memory_is_not_loaded_again_for_the_mapping(make: Callable[..., Harness]) -> None:
    harness = make(loaded_models=1)
    harness.setup()
    assert harness.predict(picture(1))[0]["result"]
    harness.service.settings = harness.settings.model_copy(update={"weights": "yolo_nas_m_coco"})
    other = {"project": "6.1795289898", "schema": CONFIG.format(""), "hostname": HOST}
    assert harness.service.setup(other)
    wait(lambda: len(harness.loads) == 2)
    harness.service.settings = harness.settings
    harness.setup()
    harness.service.preload(harness.registry.projects()[1].key)
    assert len(harness.loads) == 2


def test_unmatched_labels_are_logged_once(harness: Harness, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    harness.model.names = ("car", "truck", "dog")
    harness.setup()
    harness.predict(picture(1))
    harness.predict(picture(2))
    (line,) = [record.getMessage() for record in caplog.records if "serves" in record.getMessage()]
    assert "Car <- car + truck" in line
    assert "not predicted: Person" in line
    assert "predicted_values" in line


def test_a_full_disk_does_not_stop_what_is_known(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    version = harness.setup()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    assert harness.setup(CONFIG.format(' model_score_threshold="0.1"')) == version


# -- /predict


def test_a_prediction_as_label_studio_stores_it(harness: Harness) -> None:
    version = harness.setup()
    (prediction,) = harness.predict(picture(32))
    assert prediction["model_version"] == version
    assert 0 <= prediction["score"] <= 1
    (region,) = prediction["result"]
    assert region["value"]["rectanglelabels"] == ["Car"]
    assert (region["from_name"], region["to_name"], region["type"]) == ("label", "image", "rectanglelabels")
    assert (region["original_width"], region["original_height"]) == (320, 240)
    assert region["value"]["x"] == pytest.approx(10)


def test_order_and_length_over_batches_and_broken_tasks(make: Callable[..., Harness]) -> None:
    harness = make(batch=4)
    harness.setup()
    values: list[Any] = [picture(grey) for grey in range(0, 110, 10)]
    values[3] = "data:image/png;base64," + base64.b64encode(b"not a picture").decode()
    values[5] = None
    values[6] = "/data/upload/5/x.jpg"  # no address of Label Studio is set
    values[8] = {"url": "nested"}
    results = harness.predict(*values)
    assert len(results) == 11
    for index, result in enumerate(results):
        if index in (3, 5, 6, 8):
            assert result == []
        else:
            assert result["result"][0]["value"]["x"] == pytest.approx(index * 10 / 320 * 100)
    assert sum(harness.model.batches) == 7
    assert max(harness.model.batches) <= 4


def test_tasks_of_any_shape(harness: Harness) -> None:
    harness.setup()
    body = request() | {"tasks": [{}, {"id": "a", "data": []}, {"id": None, "data": {"image": picture(1)}}]}
    results = harness.service.predict(body)["results"]
    assert results[:2] == [[], []]
    assert results[2]["result"]


def test_failed_tasks_are_logged_with_their_reason(harness: Harness, caplog: pytest.LogCaptureFixture) -> None:
    harness.setup()
    harness.predict(picture(1), "/data/upload/5/x.jpg", "/data/upload/5/x.jpg", None)
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert any("task 101, 102: /data/upload/5/x.jpg" in line and "YOLONAS_LABEL_STUDIO_URL" in line for line in lines)
    assert any('task 103: its data has no text under "image"' in line for line in lines)


def test_a_model_that_fails_on_one_image_costs_only_that_one(harness: Harness) -> None:
    harness.setup()
    harness.model.fail = lambda images: any(image.mean() == 20 for image in images)
    results = harness.predict(picture(10), picture(20), picture(30))
    assert [bool(result) for result in results] == [True, False, True]


def test_by_disagreement_a_new_task_is_compared_with_its_mirror_image(make: Callable[..., Harness]) -> None:
    harness = make(acquisition="disagreement")
    harness.setup()
    # the model puts one box from the grey value to 300, of 320 pixels, on both
    even, near, apart = harness.predict(picture(20), picture(60), picture(200))
    assert even["score"] == pytest.approx(1, abs=1e-6)
    assert near["score"] == pytest.approx(200 / 280, abs=1e-6)  # 60 to 300, and 20 to 260
    assert apart["score"] == pytest.approx(0, abs=1e-6)
    assert sum(harness.model.batches) == 6
    older = {"id": 1, "model_version": "older", "result": even["result"]}
    body = request(picture(20))
    body["tasks"][0]["predictions"] = [older]
    (again,) = harness.service.predict(body)["results"]
    assert again["score"] == pytest.approx(1, abs=1e-6)
    assert sum(harness.model.batches) == 7  # what was drawn before is enough


def test_nothing_found_is_a_stored_empty_result_with_a_score_of_its_own(make: Callable[..., Harness]) -> None:
    harness = make(acquisition="uncertainty")
    version = harness.setup()
    harness.model.score = 0.05
    assert harness.predict(picture(1)) == [{"model_version": version, "score": 0.5, "result": []}]


def test_a_box_too_faint_to_be_shown_brings_its_task_forward_all_the_same(make: Callable[..., Harness]) -> None:
    harness, config = make(acquisition="uncertainty"), CONFIG.format(' model_score_threshold="0.6"')
    harness.setup(config)
    harness.model.score = 0.98
    (sure,) = harness.predict(picture(1), config=config)
    harness.model.score = 0.5
    (doubtful,) = harness.predict(picture(2), config=config)
    assert [len(result["result"]) for result in (sure, doubtful)] == [1, 0]
    assert doubtful["score"] < sure["score"]
    assert harness.model.batches == [1, 1], "one look at each"


def test_what_is_shown_is_what_a_model_without_faint_boxes_shows(harness: Harness) -> None:
    config = """<View><Image name="a" value="$image"/>
    <RectangleLabels name="x" toName="a"><Label value="car" model_score_threshold="0.6"/><Label value="person"/>
    </RectangleLabels><RectangleLabels name="y" toName="a" model_score_threshold="0.4"><Label value="car"/>
    <Label value="person" model_skip="true"/></RectangleLabels></View>"""
    scores, labels = np.linspace(0.95, 0.11, 29), np.arange(29) % 2
    asked: list[float] = []

    def many(images: list[np.ndarray], conf: float, max_det: int, **options: Any) -> list[Detections]:
        asked.append(conf)
        above = np.flatnonzero(scores > conf)[:max_det]
        boxes = np.array([[10 * k, 10, 10 * k + 9, 20] for k in range(29)])[above]
        return [Detections(boxes, scores[above], labels[above], harness.model.names, i.shape[:2]) for i in images]

    harness.model.predict_batch = many  # type: ignore[method-assign]
    harness.setup(config)
    (result,) = harness.predict(picture(1), config=config)
    shown = [(r["from_name"], r["value"]["rectanglelabels"][0], pytest.approx(r["score"])) for r in result["result"]]
    wanted = [("x", c, s) for c, s in zip(labels, scores, strict=True) if s > (0.25, 0.6)[1 - c]]
    wanted += [("y", c, s) for c, s in zip(labels, scores, strict=True) if s > 0.4 and c == 0]
    assert shown == [(control, ("car", "person")[label], score) for control, label, score in wanted]
    assert asked == [SIGNALS_CONF]


def test_who_draws_waits_for_no_score(make: Callable[..., Harness], monkeypatch: pytest.MonkeyPatch) -> None:
    harness = make(acquisition="disagreement")
    harness.setup()
    harness.predict(picture(1))
    before = [path.stat().st_size for path in harness.registry.root.rglob("*.jsonl")]
    monkeypatch.setattr(harness.service.acquisition, "_task_scores", lambda *_: pytest.fail("scored"))
    (drawn,) = harness.predict(picture(2), context={"result": []})
    assert drawn["score"] == pytest.approx(task_score([harness.model.score]))
    assert [path.stat().st_size for path in harness.registry.root.rglob("*.jsonl")] == before != []
    assert harness.model.batches == [1] * 3, "no mirror image of the second"


@pytest.mark.parametrize(
    ("attribute", "asked", "found"),
    [
        ("", 0.1, 0),
        (' model_score_threshold="0.05"', 0.05, 1),
        (' model_score_threshold="0.1"', 0.1, 1),
        (' score_threshold="0.3"', 0.1, 0),
    ],
)
def test_the_threshold_of_the_tag_beats_the_version_s(
    harness: Harness, attribute: str, asked: float, found: int
) -> None:
    config = CONFIG.format(attribute)
    harness.setup(config)
    harness.model.score = 0.2
    (prediction,) = harness.predict(picture(1), config=config)
    assert len(prediction["result"]) == found
    assert harness.model.calls[0] == {"conf": asked, "iou": None, "max_det": 300, "batch": 1, "signals": True}


def test_each_control_has_its_own_threshold_image_and_skip(harness: Harness) -> None:
    config = """<View><Image name="a" value="$left"/><Image name="b" value="$right"/>
    <RectangleLabels name="la" toName="a" model_score_threshold="0.1"><Label value="car"/></RectangleLabels>
    <RectangleLabels name="lb" toName="b" model_score_threshold="0.6"><Label value="Car"/></RectangleLabels>
    <RectangleLabels name="lc" toName="b" model_skip="true"><Label value="car"/></RectangleLabels></View>"""
    harness.setup(config)
    harness.model.score = 0.5
    task = {"id": 1, "data": {"left": picture(10), "right": picture(20)}}
    body = request(config=config) | {"tasks": [task, {"id": 2, "data": {"left": picture(10)}}]}
    first, second = harness.service.predict(body)["results"]
    assert [(region["from_name"], region["to_name"]) for region in first["result"]] == [("la", "a")]
    assert second == []
    assert harness.model.calls[0]["conf"] == 0.1
    harness.model.score = 0.7
    assert len(harness.service.predict(body)["results"][0]["result"]) == 2


def test_two_controls_on_one_image_look_once(harness: Harness) -> None:
    config = """<View><Image name="a" value="$image"/>
    <RectangleLabels name="x" toName="a"><Label value="car"/></RectangleLabels>
    <RectangleLabels name="y" toName="a"><Label value="Auto" predicted_values="car"/></RectangleLabels></View>"""
    harness.setup(config)
    (prediction,) = harness.predict(picture(10), config=config)
    labels = [(region["from_name"], *region["value"]["rectanglelabels"]) for region in prediction["result"]]
    assert labels == [("x", "car"), ("y", "Auto")]
    assert harness.model.batches == [1]


def test_no_label_mapped_answers_nothing_for_every_task(harness: Harness) -> None:
    harness.setup()
    harness.model.names = ("dog",)
    assert harness.predict(picture(1), picture(2)) == [[], []]
    assert harness.model.batches == []


def test_an_interactive_request_before_any_setup(harness: Harness) -> None:
    (prediction,) = harness.predict(picture(1), context={"result": []})
    assert prediction["result"]
    assert prediction["model_version"] in harness.service.versions()["versions"]


@pytest.mark.parametrize(
    "body",
    [{}, {"tasks": {}, "project": UID}, {"tasks": [1], "project": UID}, {"tasks": [], "project": 5}],
)
def test_predict_refuses_what_label_studio_does_not_send(harness: Harness, body: dict[str, Any]) -> None:
    with pytest.raises(BadRequestError):
        harness.service.predict(body)


def test_an_image_that_was_broken_is_fetched_again(harness: Harness) -> None:
    contents = [b"broken", base64.b64decode(picture(10).partition(",")[2])]
    transport = httpx.MockTransport(lambda request: httpx.Response(200, content=contents.pop(0)))
    settings = harness.settings.model_copy(update={"media_hosts": "cdn"})
    harness.service.media = MediaCache(settings, None, transport=transport)
    harness.setup()
    assert harness.predict("http://cdn/a.jpg") == [[]]
    assert harness.predict("http://cdn/a.jpg")[0]["result"]
    assert harness.predict("http://cdn/a.jpg")[0]["result"]


def test_equal_values_of_two_projects_are_two_images(make: Callable[..., Harness]) -> None:
    """With a bucket of the same name in the storage of each, or two Label Studios of the same address."""
    gate, asked, greys = threading.Event(), list[str](), {100: 10, 200: 90}

    def resolve(request: httpx.Request) -> httpx.Response:
        path = request.url.path
        if path.startswith("/api/projects/"):
            number = int(path.split("/")[3])
            return httpx.Response(200, json={"id": number, "created_at": "2026-11-21T19:38:18Z"})
        asked.append(path)
        gate.wait(60)  # until both are asked
        image = picture(greys[int(path.split("/")[2])]).partition(",")[2]
        return httpx.Response(200, content=base64.b64decode(image))

    harness, transport = make(), httpx.MockTransport(resolve)
    settings = harness.settings.model_copy(update={"label_studio_url": HOST, "label_studio_token": SecretStr("t" * 40)})
    client = LabelStudio(HOST, "t" * 40, transport=transport)
    harness.service.media = MediaCache(settings, client, transport=transport)
    uids = [UID, UID.replace("5.", "6.", 1)]
    bodies = [{**request("s3://bkt/a.png"), "project": uid} for uid in uids]
    bodies[1]["tasks"][0]["id"] = 200
    for uid in uids:
        harness.setup(uid=uid)
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(harness.service.predict, body) for body in bodies]
        wait(lambda: len(asked) == 2, what="both to be asked for")
        gate.set()
        found = [answer.result()["results"][0]["result"][0]["value"]["x"] for answer in answers]
    assert found == [pytest.approx(100 * grey / 320) for grey in greys.values()]


# -- time


def test_what_is_not_reached_in_time_answers_nothing(
    make: Callable[..., Harness], caplog: pytest.LogCaptureFixture
) -> None:
    harness = make(predict_seconds=1.0)
    harness.setup()
    harness.model.seconds = 0.3
    begin = time.monotonic()
    results = harness.predict(*[picture(grey) for grey in range(40)])
    assert time.monotonic() - begin < 8, "all forty take twelve"
    done = [bool(result) for result in results].index(False)
    assert done <= 3
    assert results[done:] == [[]] * (40 - done)
    assert "YOLONAS_PREDICT_SECONDS" in caplog.text


def test_a_slow_load_answers_nothing_in_time_and_goes_on(make: Callable[..., Harness]) -> None:
    harness = make(predict_seconds=0.3)
    loaded = threading.Event()

    def load(_: Version) -> FakeModel:
        loaded.wait(60)
        return harness.model

    harness.load = load
    harness.setup()
    assert harness.predict(picture(1)) == [[]]
    begin = time.monotonic()
    harness.setup()
    assert time.monotonic() - begin < 30  # so it has not waited for the model
    loaded.set()
    harness.service.preload(harness.registry.projects()[0].key)
    assert harness.predict(picture(1))[0]["result"]
    assert len(harness.loads) == 1


def test_requests_at_once_load_once_and_run_one_after_the_other(harness: Harness) -> None:
    harness.setup()
    running, most = 0, 0
    predict_batch = harness.model.predict_batch

    def counted(images: list[np.ndarray], **options: Any) -> list[Detections]:
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.02)
        running -= 1
        return predict_batch(images, **options)

    harness.model.predict_batch = counted  # type: ignore[method-assign]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda grey: harness.predict(picture(grey), picture(grey + 100)), range(16)))
    assert all(prediction["result"] for result in results for prediction in result)
    assert most == 1
    assert len(harness.loads) == 1


# -- versions


def test_a_published_version_serves_once_it_is_loaded_and_until_then_the_one_before(
    harness: Harness, tmp_path: Path
) -> None:
    first = harness.setup()
    assert harness.predict(picture(1))[0]["model_version"] == first
    checkpoint = tmp_path / "best.safetensors"
    checkpoint.write_bytes(b"weights")
    trained, may_load = FakeModel(names=("Person", "truck")), threading.Event()
    harness.load = lambda version: trained if may_load.wait(60) else FakeModel()
    harness.registry.projects()[0].publish(checkpoint, {})
    assert harness.setup() == first
    (prediction,) = harness.predict(picture(1))
    assert prediction["model_version"] == first, "nobody waits for the new one"
    assert prediction["result"][0]["value"]["rectanglelabels"] == ["Car"]
    may_load.set()
    harness.service.preload(harness.registry.projects()[0].key)
    assert harness.setup() == first[:-1] + "1"
    (prediction,) = harness.predict(picture(1))
    assert prediction["model_version"] == first[:-1] + "1"
    assert prediction["result"][0]["value"]["rectanglelabels"] == ["Person"]
    trained.names = ("truck", "Person")  # a label that the project had: predicted_values are for base models
    assert harness.predict(picture(1))[0]["result"] == []


def test_a_version_published_meanwhile_does_not_change_a_running_request(
    make: Callable[..., Harness], tmp_path: Path
) -> None:
    harness = make(batch=1)
    first = harness.setup()
    checkpoint = tmp_path / "best.safetensors"
    checkpoint.write_bytes(b"weights")
    harness.model.fail = lambda images: harness.registry.projects()[0].publish(checkpoint, {}) is None
    results = harness.predict(picture(1), picture(2))
    assert {result["model_version"] for result in results} == {first}


def test_a_switch_under_load_fails_no_request_and_mixes_no_versions(harness: Harness, tmp_path: Path) -> None:
    harness.setup()
    harness.predict(picture(0))
    (tmp_path / "best.safetensors").write_bytes(b"weights")
    project = harness.registry.projects()[0]
    first, may_load, done = project.current().name, threading.Event(), threading.Event()
    trained = FakeModel(names=("Person", "Car"))
    harness.load = lambda version: trained if may_load.wait(60) else FakeModel()

    def annotator(number: int) -> list[tuple[str, str]]:
        seen, answers = 0, []
        while not done.is_set() or seen < 3:
            grey = (number * 40 + seen) % 250
            for prediction in harness.predict(picture(grey), picture(grey + 1)):
                (region,) = prediction["result"]
                assert region["value"]["x"] == pytest.approx(grey / 320 * 100, abs=0.4)
                answers.append((prediction["model_version"], region["value"]["rectanglelabels"][0]))
            seen += 1
        return answers

    with ThreadPoolExecutor(6) as pool:
        futures = [pool.submit(annotator, number) for number in range(6)]
        second = project.publish(tmp_path / "best.safetensors", {}).name
        wait(lambda: len(harness.loads) == 2)
        looked = len(harness.model.batches)
        wait(lambda: len(harness.model.batches) > looked + 20, what="the version before goes on")
        assert trained.batches == []
        may_load.set()
        wait(lambda: len(trained.batches) > 20)
        done.set()
        answers = {answer for future in futures for answer in future.result()}
    assert answers == {(first, "Car"), (second, "Person")}
    assert len(harness.loads) == 2


def test_a_published_version_that_cannot_be_loaded_leaves_the_one_before(harness: Harness, tmp_path: Path) -> None:
    first = harness.setup()
    assert harness.predict(picture(1))[0]["result"]
    (tmp_path / "best.safetensors").write_bytes(b"weights")
    project = harness.registry.projects()[0]
    project.publish(tmp_path / "best.safetensors", {})

    def load(_: Version) -> FakeModel:
        raise FileNotFoundError("no such checkpoint")

    harness.load = load
    with pytest.raises(YolonasError, match="no such checkpoint"):
        harness.service.preload(project.key)
    assert harness.setup() == first
    assert harness.predict(picture(1))[0]["model_version"] == first


def test_a_version_that_cannot_be_loaded_answers_nothing_and_is_not_tried_at_once(
    harness: Harness, caplog: pytest.LogCaptureFixture
) -> None:
    def load(_: Version) -> FakeModel:
        raise FileNotFoundError("no such checkpoint")

    harness.load = load
    harness.setup()
    assert harness.predict(picture(1)) == [[]]
    assert harness.predict(picture(1)) == [[]]
    assert len(harness.loads) == 1
    assert "could not be loaded: no such checkpoint" in caplog.text


def test_projects_that_start_from_the_same_weights_share_the_model(harness: Harness) -> None:
    harness.setup()
    harness.setup(uid="6.1795289999")
    harness.predict(picture(1))
    body = request(picture(1)) | {"project": "6.1795289999"}
    (prediction,) = harness.service.predict(body)["results"]
    assert prediction["model_version"].startswith("yolonas-6-")
    assert len(harness.loads) == 1


def test_models_beyond_the_limit_leave_memory(make: Callable[..., Harness]) -> None:
    harness = make(loaded_models=2, weights=UNTRAINED)
    harness.load = lambda version: FakeModel(names=("Car", "Person"))
    uids = [f"{number}.1795289898" for number in (1, 2, 3, 1)]
    for uid in uids:
        harness.setup(uid=uid)
        harness.service.predict(request(picture(1)) | {"project": uid})
    assert [name.split("-")[1] for name in harness.loads] == ["1", "2", "3", "1"]


def test_warming_loads_in_the_background_and_logs_what_cannot_be(
    harness: Harness, caplog: pytest.LogCaptureFixture
) -> None:
    def load(_: Version) -> FakeModel:
        raise FileNotFoundError("no such checkpoint")

    harness.load = load
    harness.registry.register(HOST, UID).ensure_start("yolo_nas_s_coco", [])
    harness.service.warm()
    wait(lambda: "could not be loaded: no such checkpoint" in caplog.text)


# -- webhooks


def test_the_project_of_a_webhook(harness: Harness) -> None:
    harness.setup()
    about = {"id": 5, "created_at": "2026-11-21T19:38:18.810449Z", "label_config": "<View>new</View>"}
    project = harness.service.project_of({"project": about})
    assert project is not None
    assert project.label_config == CONFIG.format("")  # an event may be late: the reconciler asks for the label config
    assert harness.service.project_of({"project": about | {"id": 6}}) is None
    assert harness.service.project_of({"project": about | {"created_at": None}}) is None
    assert harness.service.project_of({"project": 5}) is None

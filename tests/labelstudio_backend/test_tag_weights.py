"""Weights of single tags: what `model_path` may name, and which version predicts for which tag."""

from __future__ import annotations

import base64
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest

from labelstudio_backend.mapping import describe, mapped, served_controls
from labelstudio_backend.media import MediaCache
from labelstudio_backend.registry import Registry
from labelstudio_backend.service import Service
from labelstudio_backend.settings import Settings
from labelstudio_backend.tag_weights import find
from labelstudio_backend.version import Version
from real_label_studio import wait
from yolonas.errors import WeightsError
from yolonas.inference.detections import Detections

HOST, UID = "http://localhost:8080", "5.1795289898"
CONFIG = (
    '<View><Image name="image" value="$image"/>'
    '<RectangleLabels name="first" toName="image"{}><Label value="Car"/></RectangleLabels>'
    '<RectangleLabels name="second" toName="image"{}><Label value="Washer"/></RectangleLabels></View>'
)


class FirstClass:
    """A model that finds one box of its first class."""

    checkpoint = SimpleNamespace(conf=0.25, iou=0.7)

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def predict_batch(self, images: list[np.ndarray], **_: Any) -> list[Detections]:
        return [Detections([[1, 1, 9, 9]], [0.9], [0], self.names, image.shape[:2]) for image in images]


def picture() -> str:
    content = cv2.imencode(".png", np.zeros((20, 20, 3), np.uint8))[1]
    return "data:image/png;base64," + base64.b64encode(content.tobytes()).decode()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """YOLONAS_WEIGHTS_DIR with two files, beside one that lies outside."""
    folder = tmp_path / "weights"
    (folder / "sub").mkdir(parents=True)
    for file in (folder / "parts.safetensors", folder / "sub" / "b.pth", tmp_path / "secret.pth"):
        file.write_bytes(b"weights")
    (folder / "link.pth").symlink_to(tmp_path / "secret.pth")
    monkeypatch.setenv("YOLONAS_WEIGHTS_DIR", str(folder))
    return folder


@pytest.mark.parametrize(
    ("model_path", "found"),
    [
        ("yolo_nas_s_coco", "yolo_nas_s_coco"),
        ("yolo_nas_m.pt", "yolo_nas_m_coco"),
        ("yolo_nas_n_bccd", "yolo_nas_n_bccd"),
    ],
)
def test_names_of_weights(model_path: str, found: str) -> None:
    assert find(model_path, "auto") == found


def test_files_of_the_folders_of_the_operator(folder: Path, tmp_path: Path) -> None:
    assert find("parts.safetensors", "x") == str(folder / "parts.safetensors")
    assert find("sub/../sub/b.pth", "x") == str(folder / "sub" / "b.pth")
    assert find(str(folder / "sub" / "b.pth"), "x") == str(folder / "sub" / "b.pth")
    assert find("secret.pth", str(tmp_path / "start.pth")) == str(tmp_path / "secret.pth")


@pytest.mark.parametrize(
    "model_path",
    [
        "../secret.pth",
        "sub/../../secret.pth",
        "link.pth",
        "{outside}/secret.pth",
        "/etc/passwd",
        "~/x.pth",
        "sub",
        ".",
        "gone.pth",
        "https://example.org/x.pth",
        "a" * 5000,
        "a\0b",
        "yolo_nas_xl_coco",
    ],
)
def test_nothing_else_is_opened(model_path: str, folder: Path, tmp_path: Path) -> None:
    path = model_path.format(outside=tmp_path)
    with pytest.raises(WeightsError, match="is no name of weights"):
        find(path, "yolo_nas_s_coco")


class Harness:
    """A service whose models know these classes, by the weights."""

    def __init__(self, folder: Path, classes: dict[str, tuple[str, ...]]) -> None:
        self.settings = Settings(
            state_dir=folder / "state", label_studio_token=None, label_studio_url="", weights="yolo_nas_s_coco"
        )
        self.registry = Registry(folder / "state" / "projects")
        self.classes, self.loads = classes, []  # type: ignore[var-annotated]
        self.service = Service(self.settings, self.registry, MediaCache(self.settings, None), load=self._load)

    def _load(self, version: Version) -> Any:
        self.loads.append(Path(version.weights).name)
        return FirstClass(self.classes[Path(version.weights).name])

    def predict(self, config: str, *, setup: bool = True) -> tuple[str, Any]:
        version = ""
        if setup:
            body = {"project": UID, "schema": config, "hostname": HOST}
            version = self.service.setup(body)["model_version"]
        tasks = [{"id": 1, "data": {"image": picture()}}]
        return version, self.service.predict({"tasks": tasks, "project": UID, "label_config": config})["results"][0]


@pytest.fixture
def harness(tmp_path: Path, folder: Path) -> Iterator[Harness]:
    classes = {
        "yolo_nas_s_coco": ("car", "dog"),
        "parts.safetensors": ("washer",),
        "b.pth": ("car",),
        "model.safetensors": ("Washer", "Car"),
    }
    harness = Harness(tmp_path, classes)
    yield harness
    harness.service.close()


def found(prediction: Any) -> list[tuple[str, str]]:
    return [(region["from_name"], region["value"]["rectanglelabels"][0]) for region in prediction["result"]]


def lines_of(config: str, names: tuple[str, ...], version: Version) -> list[str]:
    """What `serve` tells, where all weights know these classes."""
    return describe(mapped(served_controls(config), version, lambda _: names), version)


def test_each_tag_is_predicted_by_its_own_weights(harness: Harness, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    config = CONFIG.format("", ' model_path="parts.safetensors"')
    version, prediction = harness.predict(config)
    assert found(prediction) == [("first", "Car"), ("second", "Washer")]
    assert prediction["model_version"] == version
    assert sorted(harness.loads) == ["parts.safetensors", "yolo_nas_s_coco"]
    wait(lambda: "<second> Washer <- washer, by " in caplog.text)
    assert "<first> Car <- car;" in caplog.text


def test_weights_of_a_tag_that_cannot_be_loaded_cost_that_tag_its_boxes_alone(harness: Harness) -> None:
    del harness.classes["parts.safetensors"]
    _, prediction = harness.predict(CONFIG.format("", ' model_path="parts.safetensors"'))
    assert found(prediction) == [("first", "Car")]


def test_other_weights_of_a_tag_are_another_version(harness: Harness, folder: Path) -> None:
    config = CONFIG.format("", ' model_path="parts.safetensors"')
    first, _ = harness.predict(config)
    assert harness.predict(config)[0] == first
    (folder / "parts.safetensors").write_bytes(b"other weights")  # replaced in place
    second, _ = harness.predict(config)
    third, prediction = harness.predict(CONFIG.format("", ""))
    assert len({first, second, third}) == 3
    assert found(prediction) == [("first", "Car")]


def test_where_all_tags_name_the_same_the_project_starts_from_it(harness: Harness) -> None:
    attribute = ' model_path="sub/b.pth"'
    version, prediction = harness.predict(CONFIG.format(attribute, attribute))
    assert found(prediction) == [("first", "Car")]
    (project,) = harness.registry.projects()
    assert Path(project.current().weights).name == "b.pth"  # what the first training starts from
    assert project.current().name == version
    assert harness.loads == ["b.pth"]


def test_a_bad_path_costs_its_own_tag_only(harness: Harness, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    config = CONFIG.format("", ' model_path="../secret.pth"')
    _, prediction = harness.predict(config)
    assert found(prediction) == [("first", "Car")]
    wait(lambda: '<second> no boxes: model_path="../secret.pth" is no name of weights' in caplog.text)
    (project,) = harness.registry.projects()
    lines = lines_of(config, ("car", "dog"), project.current())
    assert lines[0] == "<first> Car <- car"
    assert lines[1].startswith('<second> no boxes: model_path="../secret.pth"')
    both = CONFIG.format(' model_path="gone"', ' model_path="../secret.pth"')
    assert harness.predict(both)[1] == []


def test_a_path_that_setup_has_not_seen_waits_for_it(harness: Harness) -> None:
    harness.predict(CONFIG.format("", ""))
    config = CONFIG.format("", ' model_path="parts.safetensors"')
    _, prediction = harness.predict(config, setup=False)
    assert found(prediction) == [("first", "Car")]
    (project,) = harness.registry.projects()
    line = lines_of(config, ("car",), project.current())[1]
    assert "is new; open the model page" in line


def test_what_is_told_of_a_tag_is_of_its_own_weights(harness: Harness) -> None:
    config = CONFIG.format("", ' model_path="parts.safetensors"')
    harness.predict(config)
    (project,) = harness.registry.projects()
    known = {"yolo_nas_s_coco": ("car",), "parts.safetensors": ("washer",)}
    found = mapped(served_controls(config), project.current(), lambda version: known[Path(version.weights).name])
    assert [one.classes for one in found] == [{"Car": ["car"]}, {"Washer": ["washer"]}]
    assert [one.own for one in found] == [False, False]


def test_a_trained_version_predicts_for_all_tags(harness: Harness, tmp_path: Path) -> None:
    config = CONFIG.format("", ' model_path="parts.safetensors"')
    harness.predict(config)
    (project,) = harness.registry.projects()
    artefact = tmp_path / "trained.safetensors"
    artefact.write_bytes(b"trained")
    trained = project.publish(artefact, {"labels": ["Washer", "Car"]})
    harness.service.preload(project.key)
    version, prediction = harness.predict(config)
    assert version == trained.name
    assert found(prediction) == [("second", "Washer")]  # the fake finds its first class only
    lines = lines_of(config, ("Washer", "Car"), trained)
    assert lines == [
        "<first> Car <- Car",
        '<second> Washer <- Washer; model_path="parts.safetensors" is not used any more: this version was trained in '
        "the project",
    ]

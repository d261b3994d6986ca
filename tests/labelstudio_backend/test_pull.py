"""`yolonas-labelstudio pull` against a small server of its own: what it writes, and what a second run does."""

from __future__ import annotations

import base64
import functools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np
import pytest
from click.testing import CliRunner, Result

from labelstudio_backend import label_studio_http, options
from labelstudio_backend import media as media_module
from labelstudio_backend import pull as pull_module
from labelstudio_backend.cli import main
from labelstudio_backend.client import LabelStudio
from yolonas.data.readers import read_dataset

URL = "http://studio.example.org:8080/ls"
TOKEN = "0123456789abcdef0123456789abcdef01234567"
CREATED = "2026-11-21T19:38:18.810449Z"
CONFIG = (
    '<View><Image name="image" value="$image"/><RectangleLabels name="label" toName="image">'
    '<Label value="Washer"/><Label value="Nut"/></RectangleLabels></View>'
)


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    return cv2.imencode(".png", pixels)[1].tobytes()


def task(number: int, image: str, *, skipped: bool = False) -> dict[str, Any]:
    value = {"x": 25, "y": 50, "width": 50, "height": 25, "rotation": 0, "rectanglelabels": ["Nut"]}
    region = {"type": "rectanglelabels", "from_name": "label", "to_name": "image", "value": value}
    annotation = {
        "id": number + 100,
        "result": [region],
        "was_cancelled": skipped,
        "updated_at": "2026-01-01T00:00:00Z",
    }
    return {"id": number, "data": {"image": image}, "annotations": [annotation], "predictions": [{"id": 1}]}


class Studio:
    """A Label Studio with one project; counts what was asked."""

    def __init__(self) -> None:
        self.config = CONFIG
        self.tasks = [
            task(1, "/data/upload/5/659649fc-a.png"),
            task(2, "/data/local-files/?d=photos/b c.png"),
            task(3, "data:image/png;base64," + base64.b64encode(png(3)).decode()),
            task(4, "/data/upload/5/gone.png"),
            task(5, "https://elsewhere.example.org/x.png"),
            task(6, "/data/upload/5/skipped.png", skipped=True),
        ]
        self.asked: Counter[str] = Counter()

    def __call__(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path.removeprefix("/ls")
        self.asked[path] += 1
        if request.headers.get("Authorization") != f"Token {TOKEN}":
            return httpx.Response(401)
        if path == "/api/projects/5/":
            return httpx.Response(200, json={"id": 5, "created_at": CREATED, "label_config": self.config})
        if path == "/api/tasks":
            return httpx.Response(200, json={"tasks": self.tasks, "total": len(self.tasks)})
        if path.endswith("a.png") or request.url.params.get("d") == "photos/b c.png":
            return httpx.Response(200, content=png(1 if path.endswith("a.png") else 2))
        return httpx.Response(404)


@pytest.fixture
def studio(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Studio:
    for name, value in (
        ("LABEL_STUDIO_URL", URL),
        ("LABEL_STUDIO_TOKEN", TOKEN),
        ("STATE_DIR", str(tmp_path / "state")),
    ):
        monkeypatch.setenv(f"YOLONAS_{name}", value)
    studio = Studio()
    transport = httpx.MockTransport(studio)
    monkeypatch.setattr(label_studio_http, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(options, "LabelStudio", functools.partial(LabelStudio, transport=transport))
    monkeypatch.setattr(pull_module, "MediaCache", functools.partial(media_module.MediaCache, transport=transport))
    return studio


def pull(out: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["pull", "--project", "5", "--out", str(out), *arguments])


def test_a_project_becomes_a_folder_to_train_on(studio: Studio, tmp_path: Path) -> None:
    out = tmp_path / "project"
    result = pull(out)
    assert result.exit_code == 0, result.output
    assert f"5 labelled tasks and 3 images (3 new, 2 could not be fetched) are in {out}." in result.output
    assert "task 4: /data/upload/5/gone.png could not be fetched" in result.output
    assert "task 5: https://elsewhere.example.org/x.png is on elsewhere.example.org" in result.output
    data = read_dataset(out)
    assert data.names == ("Washer", "Nut")  # the config's, in its order
    assert [image.path.read_bytes() for image in data.images] == [png(1), png(2), png(3)]
    assert [image.path.suffix for image in data.images] == [".png"] * 3
    for image in data.images:
        np.testing.assert_array_equal(image.boxes, [[16, 24, 48, 36]])
        assert image.labels.tolist() == [1]
    assert [line.partition(":")[0] for line in data.dropped] == ["task 4", "task 5"]
    assert "skipped.png" not in (out / "tasks.json").read_text()


def test_again_it_fetches_what_is_missing_and_the_labels_of_now(studio: Studio, tmp_path: Path) -> None:
    out = tmp_path / "project"
    assert pull(out).exit_code == 0
    asked = dict(studio.asked)
    (out / "tasks.json").unlink()  # as after an interruption
    studio.tasks[3] = task(4, "/data/upload/5/659649fc-a.png")
    studio.tasks[0]["annotations"][0]["result"] = []
    result = pull(out)
    assert "4 images (1 new, 1 could not be fetched)" in result.output
    local_files = "/data/local-files/"
    assert studio.asked[local_files] == asked[local_files]
    assert [len(image.boxes) for image in read_dataset(out).images] == [0, 1, 1, 1]
    pull(out)
    assert len(list((out / "images").iterdir())) == 4  # no leftovers


def test_many_missing_images_are_few_lines(studio: Studio, tmp_path: Path) -> None:
    studio.tasks += [task(number, f"/data/upload/5/gone{number}.png") for number in range(10, 30)]
    result = pull(tmp_path / "project")
    assert "and 17 more images that could not be fetched" in result.output
    assert len(result.output.splitlines()) <= 10


def test_what_cannot_be_pulled_is_one_sentence(studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sentence(*arguments: str, out: Path = tmp_path / "project") -> str:
        result = pull(out, *arguments)
        assert result.exit_code in (1, 2)
        assert isinstance(result.exception, SystemExit)
        return result.output.strip().splitlines()[-1]

    (tmp_path / "file").write_text("")
    assert "is a file" in sentence(out=tmp_path / "file")
    assert "cannot be written" in sentence(out=tmp_path / "file" / "below")
    assert "answered 404" in sentence("--project", "6")
    assert "the token was refused" in sentence("--label-studio-token", "wrong")
    monkeypatch.setenv("YOLONAS_LABEL_STUDIO_TOKEN", TOKEN)
    studio.config = "<View></View>"
    assert "has no RectangleLabels on an Image" in sentence()
    studio.config = CONFIG
    studio.tasks = studio.tasks[3:4]
    assert "no image of the 1 labelled tasks can be had: task 4: " in sentence()
    studio.tasks = [task(6, "/data/upload/5/skipped.png", skipped=True)]
    assert "no task of project 5 is labelled yet" in sentence()
    monkeypatch.delenv("YOLONAS_LABEL_STUDIO_TOKEN")
    assert "set YOLONAS_LABEL_STUDIO_URL and YOLONAS_LABEL_STUDIO_TOKEN" in sentence()
    assert not (tmp_path / "project" / "tasks.json").exists()


def test_the_folder_holds_plain_label_studio_json(studio: Studio, tmp_path: Path) -> None:
    assert pull(tmp_path).exit_code == 0
    tasks = json.loads((tmp_path / "tasks.json").read_text())
    assert [sorted(item) for item in tasks] == [["annotations", "data", "id"]] * 5
    assert tasks[0]["data"]["image"].startswith("images/1-")
    assert tasks[4]["data"]["image"] == "https://elsewhere.example.org/x.png"
    assert (tmp_path / "label_config.xml").read_text() == CONFIG

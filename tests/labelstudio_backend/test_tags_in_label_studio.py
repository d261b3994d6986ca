"""Two images with labels beyond ASCII, and a video with tracks, in a real Label Studio and a real browser."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from labelstudio_backend import local_label_studio
from labelstudio_backend.local_label_studio import free_port
from moving_pictures import write_video
from real_label_studio import Studio, browser, start_backend, wait

pytestmark = [pytest.mark.labelstudio, pytest.mark.timeout(600)]

CELLS, FPS, FRAMES = 6, 10, 20
ALIAS, HEBREW = "Erythrozyt ❤️ \"rot\" & 'rund'", "תא אדום"
IMAGES = """
<View><Image name="left" value="$left"/><Image name="right" value="$right"/>
<RectangleLabels name="one" toName="left" model_score_threshold="0.3">
  <Label value="Rotes Blutkörperchen" alias="Erythrozyt ❤️ &quot;rot&quot; &amp; 'rund'" predicted_values="RBC"/>
</RectangleLabels>
<RectangleLabels name="two" toName="right" model_path="yolo_nas_n_bccd" model_score_threshold="0.3">
  <Label value="תא אדום" predicted_values="rbc"/><Label value="WBC" model_skip="true"/>
</RectangleLabels></View>"""
VIDEO = """
<View><Labels name="labels" toName="film"><Label value="赤血球" predicted_values="RBC"/></Labels>
<Video name="film" value="$film" frameRate="10"/>
<VideoRectangle name="box" toName="film" model_score_threshold="0.3"/></View>"""


def cells(index: int) -> np.ndarray:
    """Six drawn blood cells, RGB, which go one pixel to the right with each frame."""
    image = np.full((240, 320, 3), (235, 225, 225), np.uint8)
    for number in range(CELLS):
        centre = (45 + number % 3 * 100 + index, 60 + number // 3 * 110)
        for radius, colour, width in ((30, (215, 150, 150), -1), (30, (190, 110, 120), 3), (10, (230, 185, 185), -1)):
            cv2.circle(image, centre, radius, colour, width, cv2.LINE_AA)
    return image


def data_url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


@pytest.fixture(scope="module")
def backend(label_studio: Studio, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder, port = tmp_path_factory.mktemp("tags"), free_port()
    environment = {
        "YOLONAS_STATE_DIR": str(folder / "state"),
        "YOLONAS_PORT": str(port),
        "YOLONAS_WEIGHTS": "yolo_nas_n_bccd",
        "YOLONAS_RUNTIME": "torch",
        "YOLONAS_LABEL_STUDIO_URL": label_studio.url,
        "YOLONAS_LABEL_STUDIO_TOKEN": label_studio.token,
        "YOLONAS_TRAIN_EVERY": "0",
    }
    server, url = start_backend(environment, folder / "log.txt"), f"http://127.0.0.1:{port}"
    try:
        server.wait_until(lambda: local_label_studio.answers(f"{url}/health"), 120)
        yield url
    finally:
        server.stop(30)
        print((folder / "log.txt").read_text()[-4000:])


def predicted(studio: Studio, backend: str, title: str, config: str, data: dict[str, str]) -> tuple[int, int, Any]:
    """A project with one task, predicted by a batch action: project, task, and the one stored prediction."""
    project = studio.client.create_project(title, config)["id"]
    (task,) = studio.client.import_tasks(project, [{"data": data}])
    studio.client.add_ml_backend(project, backend, title="Tags")
    wait(lambda: bool(studio.client.ml_backends(project)[0].get("model_version")), 60, "the backend's version")

    def stored() -> bool:
        studio.client.retrieve_predictions(project)
        return len(studio.client.predictions(project)) > 0

    wait(stored, 120, "a stored prediction")
    (prediction,) = studio.client.predictions(project)
    return int(project), int(task), prediction


def shown(studio: Studio, folder: Path, project: int, task: int) -> list[dict[str, Any]]:
    """The regions that Label Studio's editor has for an opened task, with their labels."""
    with browser(folder) as context:
        page = context.new_page()
        studio.log_in(page)
        page.goto(f"{studio.url}/projects/{project}/data?task={task}")
        regions = "window.Htx && window.Htx.annotationStore.selected && window.Htx.annotationStore.selected.regions"
        labelled = "r => r && r.length > 0 && r.every(x => x.labeling && x.labeling.mainValue.length > 0)"
        page.wait_for_function(f"({labelled})({regions})", timeout=60_000)  # they come before their labels
        page.wait_for_timeout(1000)  # for those that come one by one
        found = page.evaluate(f"{regions}.map(r => ({{labels: r.labeling && r.labeling.mainValue, type: r.type}}))")
        return list(found)


def test_two_images_with_aliases_beyond_ascii(label_studio: Studio, backend: str, tmp_path: Path) -> None:
    urls = [data_url("image/png", cv2.imencode(".png", cells(index)[..., ::-1])[1].tobytes()) for index in (0, 12)]
    data = {"left": urls[0], "right": urls[1]}
    project, task, prediction = predicted(label_studio, backend, "Two images", IMAGES, data)
    labels = Counter((r["from_name"], r["to_name"], *r["value"]["rectanglelabels"]) for r in prediction["result"])
    assert labels == {("one", "left", ALIAS): CELLS, ("two", "right", HEBREW): CELLS}
    assert 0 < prediction["score"] < 1
    drawn = shown(label_studio, tmp_path / "profile", project, task)
    assert Counter(label for region in drawn for label in region["labels"]) == {ALIAS: CELLS, HEBREW: CELLS}


def test_tracks_on_a_video(label_studio: Studio, backend: str, tmp_path: Path) -> None:
    film = write_video(tmp_path / "cells.webm", FRAMES, cells, FPS)
    data = {"film": data_url("video/webm", film.read_bytes())}
    project, task, prediction = predicted(label_studio, backend, "A video", VIDEO, data)
    tracks = prediction["result"]
    assert {(track["type"], *track["value"]["labels"]) for track in tracks} == {("videorectangle", "赤血球")}
    ends = [(track["value"]["sequence"][0], track["value"]["sequence"][-1]) for track in tracks]
    whole = [(first, last) for first, last in ends if first["frame"] <= 3 and last["frame"] >= FRAMES - 1]
    assert len(whole) == CELLS  # one track for each, however the model sees it in single frames
    for first, last in whole:
        assert last["x"] - first["x"] == pytest.approx((last["frame"] - first["frame"]) / 3.2, abs=1.5)
    drawn = shown(label_studio, tmp_path / "profile", project, task)
    assert Counter(label for region in drawn for label in region["labels"]) == {"赤血球": len(tracks)}

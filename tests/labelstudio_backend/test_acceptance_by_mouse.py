"""What people do with the mouse in a real Label Studio is counted as what they did."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from labelstudio_backend.acceptance import Edits, task_work
from labelstudio_backend.sample_project import label_config, regions
from real_label_studio import Studio, browser, wait
from yolonas.data.labelled import LabelledImage
from yolonas.inference.sources import write_image

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = [pytest.mark.labelstudio, pytest.mark.slow, pytest.mark.timeout(600)]  # its outcome is a fast test, too
WIDTH, HEIGHT = 640, 480


def test_keep_move_relabel_remove_and_add(label_studio: Studio, tmp_path: Path) -> None:
    client = label_studio.client
    project = client.create_project("By mouse", label_config(("Car", "Person")))["id"]
    picture = write_image(tmp_path / "grey.png", np.full((HEIGHT, WIDTH, 3), 128, np.uint8))
    (task,) = client.upload_files(project, [("grey.png", picture.read_bytes())])
    corners = np.array([[40, 40], [240, 40], [440, 40], [40, 300]], np.float32)
    boxes = np.concatenate([corners, corners + 100], axis=1)
    image = LabelledImage(picture, boxes, np.zeros(4, np.int64), np.zeros(4, bool), WIDTH, HEIGHT, 1)
    client.create_prediction(task, regions(image, ("Car", "Person")), 0.5, "v1")
    client.patch_project(project, model_version="v1", show_collab_predictions=True)

    with browser(tmp_path / "chromium") as chromium:
        page = chromium.new_page()
        label_studio.log_in(page)
        page.goto(f"{label_studio.url}/projects/{project}/data?task={task}")
        page.wait_for_selector("canvas")
        page.wait_for_function("window.Htx?.annotationStore?.selected?.regions?.length === 4", timeout=60_000)
        page.wait_for_timeout(3000)  # the picture is drawn
        left, top, width, height = image_place(page)

        def at(x: float, y: float) -> tuple[float, float]:
            return left + width * x / WIDTH, top + height * y / HEIGHT

        def drag(start: tuple[float, float], end: tuple[float, float]) -> None:
            page.mouse.move(*at(*start))
            page.mouse.down()
            page.mouse.move(*at(*end), steps=8)
            page.mouse.up()

        page.mouse.click(*at(290, 90))  # the second: moved
        drag((290, 90), (320, 130))
        page.keyboard.press("Escape")
        page.mouse.click(*at(490, 90))  # the third: relabelled
        page.keyboard.press("2")
        page.keyboard.press("Escape")
        page.mouse.click(*at(90, 350))  # the fourth: removed
        page.keyboard.press("Backspace")
        page.keyboard.press("1")  # a new one
        drag((400, 300), (500, 400))
        page.screenshot(path=str(tmp_path / "done.png"))
        page.get_by_test_id("bottombar-submit-button").click()
        wait(lambda: bool(client.get_task(task)["annotations"]), 30, "the annotation")

    work = task_work(client.get_task(task))
    assert work is not None
    assert work.edits == Edits(kept=1, moved=1, relabelled=1, removed=1, added=1)
    assert work.version == "v1"
    assert work.seconds is not None
    assert work.seconds > 0


def image_place(page: Page) -> tuple[float, float, float, float]:
    """Where the whole image is on the page: the largest canvas has its place."""
    places = page.evaluate(
        "[...document.querySelectorAll('canvas')].map(c => c.getBoundingClientRect())"
        ".map(r => [r.x, r.y, r.width, r.height]).sort((a, b) => b[2] * b[3] - a[2] * a[3])"
    )
    left, top, width, height = places[0]
    return left, top, width, height

"""The HTML report: what it says, that hostile names stay text, and that a browser shows it without asking anyone."""

from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from machine import CHROMIUM, missing
from yolonas.data.labelled import LabelledImage, LabelledImages
from yolonas.inference.detections import Detections
from yolonas.inference.sources import write_image
from yolonas.training.charts import Series, line_chart, thinned, ticks
from yolonas.training.html_report import write_html
from yolonas.training.report import EpochReport

SIDE = 160
HOSTILE = '<script>alert("x")</script>'
RECORD = {
    "recipe": {
        "batch": 8,
        "lr": 4e-3,
        "augmentation": {f"kind{k}": 0.5 for k in range(30)} | {"scale": [0.5, 1.5]},
        "seed": 0,
    },
    "reasons": {"batch": f"because {HOSTILE}", "lr": "from random weights", "augmentation": "few images"},
    "train_images": 30,
    "train_objects": 90,
    "device": "cpu",
    "start": "random weights of n",
}


def history(epochs: int) -> list[EpochReport]:
    first = EpochReport(1, epochs, 10, 1e-3, 3.0, 1.0, 1.5, 0.5, 0.1, 0.2, 6.0, 0.0, 12.0)
    return [
        dataclasses.replace(
            first,
            epoch=k,
            loss=3 / k,
            ap=0.5 - 0.4 / k if k % 2 else None,
            ap50=0.6 if k % 2 else None,
            seconds=6.0 * k,
        )
        for k in range(1, epochs + 1)
    ]


HOSTILE_FILE = "<script>alert(1)<b>äé&\"'" + "n" * 100  # '/' would part folders


def made(
    folder: Path,
    images: int,
    classes: int,
    *,
    names: tuple[str, ...] = (HOSTILE, "kočka & 猫", "ñ" * 120),
    file: str = HOSTILE_FILE,
    pixels: bool = True,
) -> tuple[LabelledImages, list[Detections]]:
    """Images with four objects, of which one is found as another class, one is missed, and one box is false."""
    rng = np.random.default_rng(1)
    names = (*names, *(f"class {k}" for k in range(len(names), classes)))[:classes]
    data, found = [], []
    for i in range(images):
        path = folder / f"{i} {file}.png"
        corners = np.array([[10, 10], [90, 10], [10, 90], [90, 90]], dtype=float)
        boxes = np.concatenate([corners, corners + rng.uniform(35, 50, (4, 2))], axis=1).astype(np.float32)
        labels = rng.integers(0, classes, 4)
        if pixels:
            folder.mkdir(parents=True, exist_ok=True)
            write_image(path, rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))
        data.append(LabelledImage(path, boxes, labels, np.zeros(4, dtype=bool), SIDE, SIDE, i + 1))
        seen = np.concatenate([boxes[:3] + rng.normal(0, 1, (3, 4)), [[60, 60, 85, 85]]])
        predicted = [*labels[:2], (labels[2] + 1) % classes, labels[0]]
        found.append(Detections(seen, [0.9, 0.8, 0.7, 0.6], predicted, names, (SIDE, SIDE)))
    return LabelledImages(names, data), found


class Page(HTMLParser):
    """The elements of a page and the text of its headings; fails on one that is closed in the wrong place."""

    VOID = ("meta", "link", "br")  # those of SVG end with />

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def count(self, tag: str, **attributes: str) -> int:
        return sum(t == tag and all(a.get(k) == v for k, v in attributes.items()) for t, a in self.tags)

    def says(self, text: str) -> bool:
        return text in re.sub(r"\s+", " ", "".join(self.text))


def report(folder: Path, data: LabelledImages, found: list[Detections], **more: Any) -> Page:
    path = folder / "report.html"
    write_html(path, **{"title": f"run {HOSTILE}", "data": data, "detections": found, **more})
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[LabelledImages, list[Detections]]:
    return made(tmp_path_factory.mktemp("small") / "images", 14, 3)


def test_says_what_was_measured(small: tuple[LabelledImages, list[Detections]], tmp_path: Path) -> None:
    page = report(tmp_path, *small, history=history(5), record=RECORD, dropped=["a.jpg: no box"], threshold=0.5)
    # Two of four objects are found, two of four boxes are right.
    assert page.says("Of 100 objects it finds 50, and of 100 boxes it draws 50 are right")
    assert page.says("measured on 14 images, 56 objects")
    assert page.says("trained on 30 images, 90 objects")
    assert page.says("epochs 5")
    assert page.says("minutes 0.5")
    assert page.says("Highest AP of a measured epoch: 0.420, in epoch 5")
    assert page.says("At the operating threshold 28 boxes are right")
    assert page.says("14 missed objects, 14 boxes where there is nothing")
    assert page.says("14 wrong classes")
    assert page.says("1 missed, 1 false, 1 wrong class, 2 right")
    assert page.says("1 entry of the data could not be used")
    assert page.says("from random weights")
    assert page.says("kind29 0.5, scale 0.5 to 1.5")
    assert page.count("figure", **{"class": "worst"}) == 12
    assert page.count("figure", **{"class": "pr"}) == 3
    assert page.count("polyline", **{"class": "line s0"}) == 3 + 3
    assert page.count("image") >= 12
    assert page.count("use") == 12


def test_hostile_names_stay_text(small: tuple[LabelledImages, list[Detections]], tmp_path: Path) -> None:
    page = report(tmp_path, *small, history=history(2), record=RECORD, dropped=[HOSTILE])
    assert page.count("script") == 0
    # The same elements with the same attributes as with harmless names.
    harmless = made(tmp_path / "images", 14, 3, names=("cat", "dog", "bird"), file="plain")
    plain = report(
        tmp_path,
        *harmless,
        history=history(2),
        record={**RECORD, "reasons": {"batch": "x", "lr": "y", "augmentation": "z"}},
        dropped=["x"],
    )
    assert [(tag, set(attributes)) for tag, attributes in page.tags] == [(tag, set(a)) for tag, a in plain.tags]
    assert page.says(HOSTILE)
    assert page.says("kočka & 猫")
    assert page.says(f"3 {HOSTILE_FILE}.png")


def test_nothing_to_measure_still_gives_a_report(tmp_path: Path) -> None:
    blind = [dataclasses.replace(epoch, ap=None, ap50=None) for epoch in history(3)]
    page = report(tmp_path, LabelledImages(("cat",), []), [], history=blind, record=RECORD)
    assert page.says("There were no validation images")
    page = report(tmp_path, LabelledImages(("cat",), []), [], history=history(3), record=RECORD)
    assert page.says("on images that were watched only")
    assert page.count("section", id="curves") == 1
    assert page.count("section", id="worst") == 0
    write_html(tmp_path / "report.html", title="run", data=None, history=history(3), record=RECORD)
    assert "The run is not over" in (tmp_path / "report.html").read_text()


def test_images_without_objects_and_a_model_without_detections(tmp_path: Path) -> None:
    data, found = made(tmp_path / "images", 2, 3)
    nothing = [d[:0] for d in found]
    assert report(tmp_path, data, nothing).says("On these images the model finds no object")
    bare = [dataclasses.replace(i, boxes=i.boxes[:0], labels=i.labels[:0], crowd=i.crowd[:0]) for i in data.images]
    page = report(tmp_path, LabelledImages(data.names, bare), found)
    assert page.says("The validation images have no objects")
    assert report(tmp_path, LabelledImages(data.names, bare), nothing).says("There is no image with an error")


def test_a_perfect_model(tmp_path: Path) -> None:
    data, _ = made(tmp_path / "images", 3, 2)
    perfect = [Detections(i.boxes, np.full(4, 0.9), i.labels, data.names, (SIDE, SIDE)) for i in data.images]
    page = report(tmp_path, data, perfect)
    assert page.says("it makes no error")
    assert page.says("No label looks wrong")


def test_images_that_are_gone_or_changed_leave_a_placeholder(tmp_path: Path) -> None:
    data, found = made(tmp_path / "images", 3, 3)
    data.images[0].path.unlink()
    data.images[1].path.write_bytes(b"no image")
    write_image(data.images[2].path, np.zeros((20, 30, 3), dtype=np.uint8))
    page = report(tmp_path, data, found)
    assert page.count("image") == 0
    assert page.says("the image can no longer be read")
    assert page.says("the image is now 30x20, not 160x160")


def test_a_file_name_that_is_no_text(tmp_path: Path) -> None:
    data, found = made(tmp_path / "images", 1, 3, pixels=False)
    data.images[0] = dataclasses.replace(data.images[0], path=tmp_path / "caf\udce9.jpg")
    assert report(tmp_path, data, found).says("caf\\udce9.jpg")


def test_eighty_classes_stay_readable_and_small(tmp_path: Path) -> None:
    data, found = made(tmp_path / "images", 100, 80, pixels=False)
    page = report(tmp_path, data, found, threshold=0.5)
    assert page.says("pairs of classes taken for each other")
    assert page.count("table", **{"class": "matrix"}) == 0
    assert page.count("svg", **{"class": "heat"}) == 1
    assert (tmp_path / "report.html").stat().st_size < 1_000_000


def test_the_threshold_can_be_given(small: tuple[LabelledImages, list[Detections]], tmp_path: Path) -> None:
    # Without the wrong and the false box, at 0.7 and 0.6, the F1 is best.
    page = report(tmp_path, *small)
    assert page.says("The operating threshold, 0.750, is the score with the best F1 on these very images")
    assert page.says("Of 100 objects it finds 50, and of 100 boxes it draws 100 are right")
    page = report(tmp_path, *small, threshold=0.5)
    assert page.says("The operating threshold, 0.500, is the checkpoint's; on these images the best F1 would be 0.667")
    assert page.says("Of 100 objects it finds 50, and of 100 boxes it draws 50 are right")


def test_charts_take_whatever_a_run_leaves() -> None:
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(1, 3, whole=True) == [1, 2, 3]
    assert ticks(0, 0.00037)[-1] >= 0.00037
    line = thinned(Series("a", list(range(10_000)), [float(k) for k in range(10_000)]))
    assert (len(line.xs), line.xs[0], line.xs[-1]) == (400, 0, 9999)
    assert "nan" not in line_chart("t", [Series("a", [1, 2], [float("nan"), 1.0])], x_name="epoch").lower()
    for points in ([], [0.0], [5.0], [float("inf")]):
        line_chart("t", [Series("a", list(range(len(points))), points)], x_name="epoch")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser(small: tuple[LabelledImages, list[Detections]], tmp_path: Path, scheme: str) -> None:
    if CHROMIUM is None:
        missing("needs Chromium (apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    report(tmp_path, *small, history=history(5), record=RECORD, dropped=["x" * 300], threshold=0.5)
    requests, complaints, dialogs = [], [], []
    with sync_playwright() as playwright:
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        page = browser.new_page(color_scheme=scheme)
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
        address = (tmp_path / "report.html").as_uri()
        page.goto(address)
        page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
        overflow = {}
        for width in (1280, 400):
            page.set_viewport_size({"width": width, "height": 900})
            overflow[width] = page.evaluate("document.documentElement.scrollWidth") - width
            if width == 1280:
                overflow["recipe"] = page.evaluate(
                    "(part => part.scrollWidth - part.clientWidth)(document.querySelector('#recipe .scroll'))"
                )
        sizes = page.evaluate(
            """Promise.all([...document.querySelectorAll('image')].map(async element => {
                const image = new Image();
                image.src = element.href.baseVal;
                await image.decode();
                return [image.naturalWidth, element.getBoundingClientRect().width];
            }))"""
        )
        copies = page.evaluate("[...document.querySelectorAll('use')].map(e => e.getBoundingClientRect().width)")
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        browser.close()
    assert [url for url in requests if not url.startswith("data:image/")] == [address]
    assert complaints == []
    assert dialogs == []
    assert overflow == {1280: 0, "recipe": 0, 400: 0}
    assert len(sizes) >= 12
    assert min(min(pair) for pair in sizes) > 0
    assert len(copies) == 12
    assert min(copies) > 50
    assert (sum(map(int, re.findall(r"\d+", paper)[:3])) < 200) == (scheme == "dark")

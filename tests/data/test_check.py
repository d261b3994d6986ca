"""What is found out about the images of a data set before training, and what is said about it."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from yolonas.data.check import usable
from yolonas.data.dataset import Draw, TrainingSet
from yolonas.data.labelled import BoxList, LabelledImages
from yolonas.data.report import data_report
from yolonas.errors import DataError
from yolonas.model.config import Preprocessing

PREPROCESSING = Preprocessing(image_size=(64, 64), resize_to=64)


def noise(path: Path, seed: int, width: int = 64, height: int = 48, orientation: int = 1) -> Path:
    exif = Image.Exif()
    if orientation != 1:
        exif[0x0112] = orientation
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, exif=exif)
    return path


class Album:
    """A data set under construction."""

    def __init__(self, *names: str) -> None:
        self.data = LabelledImages(names or ("cat", "dog"), [])

    def add(self, path: Path, *boxes: tuple[float, ...], label: int = 0, width: int = 64, height: int = 48) -> None:
        rows = BoxList(path.name, width, height, self.data.dropped, self.data.changed)
        for box in boxes:
            rows.add(box, label)
        self.data.images.append(rows.labelled(path, len(self.data) + 1))


BOX, OTHER = (10, 10, 40, 40), (20, 20, 60, 45)


def test_images_that_cannot_be_used_are_left_out_with_a_reason(tmp_path: Path) -> None:
    album = Album()
    album.add(noise(tmp_path / "good.jpg", 0), BOX)
    album.add(noise(tmp_path / "cut.jpg", 1), BOX)
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:-40])
    album.add(noise(tmp_path / "small.png", 2, 32, 24), BOX)
    album.add(noise(tmp_path / "turned.jpg", 3, orientation=6), BOX)
    album.add(noise(tmp_path / "upright.jpg", 4, 48, 64, orientation=8), BOX)
    for name, content in (("empty.jpg", b""), ("text.jpg", b"hello")):
        (tmp_path / name).write_bytes(content)
        album.add(tmp_path / name, BOX)
    album.add(tmp_path / "gone.jpg", BOX)
    (tmp_path / "folder.jpg").mkdir()
    album.add(tmp_path / "folder.jpg", BOX)
    found = usable(album.data)
    assert [image.path.name for image in found.images] == ["good.jpg", "upright.jpg"]
    assert len(found.dropped) == 7
    for name, reason in (
        ("cut.jpg", "is a truncated JPEG file"),
        ("small.png", "is 32x24 upright, but its labels are for 64x48"),
        ("turned.jpg", "is 48x64 upright, but its labels are for 64x48: they were made before the EXIF rotation"),
        ("empty.jpg", "is empty"),
        ("text.jpg", "is damaged, or not an image"),
        ("gone.jpg", "cannot be read: No such file"),
        ("folder.jpg", "cannot be read: Is a directory"),
    ):
        assert sum(f"{name} {reason}" in line for line in found.dropped) == 1, reason


def test_a_large_set_is_opened_and_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    album = Album()
    for name, seed in (("a.jpg", 0), ("b.png", 1)):
        album.add(noise(tmp_path / name, seed), BOX)
    monkeypatch.setattr(cv2, "imdecode", None)
    assert len(usable(album.data, most_pixels=100)) == 2
    with pytest.raises(TypeError):  # the decoder is gone
        usable(album.data, most_pixels=math.inf)
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:-40])
    noise(tmp_path / "b.png", 1, 32, 24)
    with pytest.raises(DataError, match=r"none of the 2 images can be used; the first: .*a\.jpg is a truncated JPEG"):
        usable(album.data, most_pixels=100)


def test_copies_are_left_out_where_their_boxes_agree(tmp_path: Path) -> None:
    album, content = Album(), noise(tmp_path / "a.jpg", 0).read_bytes()
    for name in ("b.jpg", "c.jpg", "d.jpg"):
        (tmp_path / name).write_bytes(content)
    album.add(tmp_path / "a.jpg", BOX, OTHER)
    album.add(tmp_path / "b.jpg", OTHER, (10.2, 10, 40, 40))
    album.add(tmp_path / "c.jpg", BOX)
    album.add(tmp_path / "d.jpg", BOX, OTHER, label=1)
    found = usable(album.data)
    assert [image.path.name for image in found.images] == ["a.jpg", "c.jpg", "d.jpg"]
    (line,) = found.dropped
    assert line.endswith("a.jpg, with the same boxes")
    report = "\n".join(data_report(found, LabelledImages(found.names, []), 64))
    assert "warning        1 pictures are there more than once with different labels" in report
    assert "c.jpg and" in report


def test_the_report_groups_and_counts(tmp_path: Path) -> None:
    train, val = Album("cat", "dog", "bird"), Album("cat", "fish")
    for number in range(12):
        boxes = [(number, 0, number + 20, 20), (0, 0, 3, 3)] if number else []
        train.add(noise(tmp_path / f"{number}.jpg", number), *boxes, (5, 5, 5, 9))
    train.add(noise(tmp_path / "d.jpg", 50), (-9, 0, 20, 20), (70, 0, 90, 9), label=1)
    val.add(tmp_path / "3.jpg", BOX)
    val.add(noise(tmp_path / "v.jpg", 60), BOX, label=1)
    parts = usable(train.data), usable(val.data)
    report = data_report(*parts, 64)
    assert report[0] == "left out       12 boxes without area, the first: 0.jpg: box [5, 5, 5, 9] has no area"
    assert report[1].startswith("               1 boxes outside their image: d.jpg: box [70, 0, 90, 9] lies outside")
    assert report[2].startswith("changed        1 boxes that reach out of their image, now cut: d.jpg: box [-9, 0, ")
    assert report[3] == "objects        cat 22, dog 1, bird 0"
    assert report[4:7] == [
        "               none to train on of: bird",
        "               fewer than 10 to train on of: dog",
        "               classes of the validation images that the training images lack, never found: fish 1",
    ]
    assert report[7].startswith("negatives      1 training and 0 validation images without objects are kept")
    assert report[8].startswith("small          11 of 23 boxes are smaller than 8 x 8 px on the canvas of 64 px")
    assert report[9].startswith("warning        1 of 2 validation images are among the training images")
    assert len(report) == 10
    long = "\n".join(data_report(*parts, 64, examples=5))
    assert long.count("has no area") == 5
    assert "and 7 more" in long
    assert not [line for line in data_report(*parts, 256) if line.startswith("small")]  # 3 px are 12 px there


def test_a_clean_set_has_a_short_report(tmp_path: Path) -> None:
    album = Album("cat")
    for number in range(10):
        album.add(noise(tmp_path / f"{number}.jpg", number), (0, 0, 64.9, 48))  # rounding is no news
    report = data_report(usable(album.data), LabelledImages(("cat",), []), 64)
    assert report == ["left out       nothing", "objects        cat 10"]


def test_boxes_that_mean_something_else(tmp_path: Path) -> None:
    album = Album()
    for number in range(6):
        album.add(noise(tmp_path / f"{number}.jpg", number), (30, 20, 30 + 60, 20 + 40))  # corners as width and height
    assert "COCO's are x, y, width" in "\n".join(data_report(album.data, LabelledImages(("cat", "dog"), []), 64))


def test_a_file_damaged_during_the_run_is_replaced_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    album = Album()
    for number in range(3):
        album.add(noise(tmp_path / f"{number}.jpg", number), BOX, label=number % 2)
    whole = TrainingSet(album.data, PREPROCESSING, augmentation=None)
    expected = whole[Draw(2, 0, 0, False)]
    (tmp_path / "1.jpg").write_bytes(b"")
    damaged = TrainingSet(album.data, PREPROCESSING, augmentation=None, cache_bytes=0)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            view = damaged[Draw(1, 0, 0, False)]
            np.testing.assert_array_equal(view.image, expected.image)
            np.testing.assert_array_equal(view.labels, expected.labels)
    (record,) = caplog.records
    assert "1.jpg is empty; another image takes its place" in record.getMessage()
    for number in (0, 2):
        (tmp_path / f"{number}.jpg").unlink()
    with pytest.raises(DataError, match="none of the 3 training images can be read any more"):
        damaged[Draw(0, 0, 0, False)]


def test_the_check_keeps_everything_else(tmp_path: Path) -> None:
    album = Album()
    album.add(noise(tmp_path / "a.jpg", 0), BOX)
    album.data.dropped.append("a line")
    found = usable(album.data)
    assert (found.names, found.dropped) == (("cat", "dog"), ["a line"])
    assert found.images[0].boxes is album.data.images[0].boxes
    assert len(found.images[0].digest) == 16
    assert usable(replace(album.data, images=[])).images == []

"""Pseudo-labels: what a trained detector finds, as images to train on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from yolonas.checkpoint import Checkpoint
from yolonas.data.labelled import LabelledImages
from yolonas.errors import DataError
from yolonas.inference.detector import Detector
from yolonas.training.pseudo_labels import mixed, pseudo_labels

NAMES = ("blue", "yellow", "RED")  # the teacher knows red, green, blue


@pytest.fixture(scope="module")
def teacher(trained: Checkpoint) -> Detector:
    return Detector(trained, "cpu")


def test_what_the_teacher_finds_is_what_there_is(teacher: Detector, rectangles: Callable[..., LabelledImages]) -> None:
    true = rectangles(5, ("red", "green", "blue"), 9)
    found = pseudo_labels(teacher, [image.path for image in true.images], NAMES)
    assert found.names == NAMES
    assert [image.path for image in found.images] == [image.path for image in true.images]
    assert found.objects >= 8  # of 10
    for image, truth in zip(found.images, true.images, strict=True):
        assert (image.width, image.height) == (64, 64)
        assert not image.crowd.any()
        for box, label in zip(image.boxes, image.labels.tolist(), strict=True):
            nearest = int(np.abs(truth.boxes - box).max(1).argmin())
            assert (
                np.abs(truth.boxes[nearest] - box).max() < 8
            )  # px; the rectangles are 15 wide, each in a quarter of 32
            assert NAMES[label].lower() == true.names[nearest]
    assert len({image.image_id for image in found.images}) == 5


def test_images_that_say_nothing_are_left_out(
    teacher: Detector, rectangles: Callable[..., LabelledImages], tmp_path: Path
) -> None:
    path = rectangles(1, ("red", "green", "blue"), 9).images[0].path
    grey, broken = tmp_path / "grey.png", tmp_path / "broken.png"
    cv2.imwrite(str(grey), np.full((64, 64, 3), 90, np.uint8))
    broken.write_bytes(b"no picture")
    found = pseudo_labels(teacher, [grey, broken, path], NAMES)
    assert [image.path for image in found.images] == [path]
    assert len(found.dropped) == 1
    assert "broken.png" in found.dropped[0]
    assert not pseudo_labels(teacher, [path], NAMES, conf=0.999).images
    assert not pseudo_labels(teacher, [], NAMES).images
    with pytest.raises(DataError, match="no class in common"):
        pseudo_labels(teacher, [path], ("cat",))


@pytest.mark.parametrize(("labelled", "unlabelled", "repeats"), [(2, 5, 3), (5, 2, 1), (3, 3, 1), (3, 0, 1)])
def test_labelled_images_are_at_least_half(
    rectangles: Callable[..., LabelledImages], labelled: int, unlabelled: int, repeats: int
) -> None:
    first = rectangles(labelled, NAMES[:1], 1)
    second = rectangles(unlabelled, NAMES[:1], 2)
    both = mixed(first, second)
    assert len(both) == repeats * labelled + unlabelled
    assert repeats * labelled >= unlabelled
    assert all(sum(one is image for one in both.images) == repeats for image in first.images)
    assert all(sum(one is image for one in both.images) == 1 for image in second.images)
    with pytest.raises(DataError, match="the labels are of blue, the pseudo-labels of red"):
        mixed(first, LabelledImages(("red",), []))

"""Detections: the interchange between all parts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from yolonas.inference.detections import Detection, Detections
from yolonas.inference.sources import read_image
from yolonas.inference.visualize import class_color

NAMES = ("cat", "Gerät", "猫")


def three(image: np.ndarray | None = None, size: tuple[int, int] = (100, 200)) -> Detections:
    boxes = np.array([[10, 20, 60, 90], [0, 0, 200, 100], [150, 5, 199, 30]], dtype=np.float32)
    return Detections(boxes, np.array([0.9, 0.5, 0.25]), np.array([0, 2, 1]), NAMES, size, "a.jpg", image)


def empty(image: np.ndarray | None = None) -> Detections:
    return Detections(np.empty((0, 4)), np.empty(0), np.empty(0), NAMES, (100, 200), None, image)


def test_rows_slices_and_masks() -> None:
    detections = three()
    assert len(detections) == 3
    assert [d.name for d in detections] == ["cat", "猫", "Gerät"]
    assert isinstance(detections[-1], Detection)
    assert detections[0].score == pytest.approx(0.9)
    part = detections[detections.scores > 0.4]
    assert len(part) == 2
    assert part.path == "a.jpg"
    assert detections[1:].labels.tolist() == [2, 1]
    assert detections[[2, 0]].labels.tolist() == [1, 0]
    with pytest.raises(IndexError):
        detections[3]


def test_dtypes_and_shapes_of_nothing() -> None:
    detections = empty()
    assert detections.boxes.shape == (0, 4)
    assert (detections.boxes.dtype, detections.labels.dtype) == (np.float32, np.int64)
    assert list(detections) == []
    assert len(detections.to_supervision()) == 0
    assert detections.to_dict()["detections"] == []


def test_arrays_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError, match="1 boxes, 2 scores, 1 labels"):
        Detections(np.ones((1, 4)), np.ones(2), np.ones(1), NAMES, (9, 9))
    for label in (-1, 3):
        with pytest.raises(ValueError, match=f"labels must be 0 to 2, not \\[{label}\\]"):
            Detections(np.ones((1, 4)), np.ones(1), np.array([label]), NAMES, (9, 9))


def test_to_dict_is_json() -> None:
    document = json.loads(json.dumps(three().to_dict()))
    assert (document["width"], document["height"], document["path"]) == (200, 100, "a.jpg")
    assert document["detections"][0] == {"box": [10.0, 20.0, 60.0, 90.0], "score": 0.9, "label": 0, "name": "cat"}


def test_to_supervision() -> None:
    found = three().to_supervision()
    np.testing.assert_array_equal(found.xyxy, three().boxes)
    assert found.data["class_name"].tolist() == ["cat", "猫", "Gerät"]
    assert found.class_id.tolist() == [0, 2, 1]


def tracked() -> Detections:
    detections = three(np.full((100, 200, 3), 128, np.uint8))
    detections.frame, detections.time = 12, 0.48
    return dataclasses.replace(detections, track_ids=[7, 3, 12])


def test_frames_and_tracks_go_along() -> None:
    detections = tracked()
    assert detections.track_ids is not None
    assert detections.track_ids.dtype == np.int64
    assert [d.track_id for d in detections] == [7, 3, 12]
    assert three()[0].track_id is None
    part = detections[detections.scores < 0.6]
    assert part.track_ids.tolist() == [3, 12]
    assert (part.frame, part.time, part.path) == (12, 0.48, "a.jpg")
    assert repr(part) == "Detections(2 boxes, 200x100, a.jpg, frame 12)"
    document = json.loads(json.dumps(part.to_dict()))
    assert (document["frame"], document["time"]) == (12, 0.48)
    assert [entry["track_id"] for entry in document["detections"]] == [3, 12]
    assert detections.to_supervision().tracker_id.tolist() == [7, 3, 12]
    assert three().to_supervision().tracker_id is None
    assert {"frame", "time"}.isdisjoint(three().to_dict())
    with pytest.raises(ValueError, match="track_ids must be as many as boxes, 3, not 2"):
        dataclasses.replace(detections, track_ids=[1, 2])


def test_a_track_keeps_its_colour_whatever_its_class() -> None:
    image = np.full((400, 400, 3), 128, dtype=np.uint8)
    box = np.array([[100, 200, 300, 350]])
    plain, *drawn = (
        Detections(box, [0.9], [label], NAMES, (400, 400), image=image, track_ids=track).plot()
        for label, track in ((1, None), (1, [5]), (0, [5]))
    )
    for picture in drawn:
        np.testing.assert_array_equal(picture[350, 200], class_color(5))
    label = np.s_[150:200, 95:301]
    assert (drawn[0][label] != 128).any(-1).sum() > (plain[label] != 128).any(-1).sum(), "its number stands before it"


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (20, 300), (100, 200), (1500, 2000)])
def test_plot_draws_on_a_copy_of_any_size(size: tuple[int, int]) -> None:
    image = np.full((*size, 3), 128, dtype=np.uint8)
    detections = three(image, size)
    detections.boxes *= np.array([size[1] / 200, size[0] / 100] * 2, dtype=np.float32)
    drawn = detections.plot()
    assert drawn.shape == image.shape
    assert (image == 128).all()
    assert (drawn != 128).any()


def test_plot_shows_boxes_in_their_colour_and_leaves_the_rest() -> None:
    image = np.full((400, 400, 3), 128, dtype=np.uint8)
    box = np.array([[100, 200, 300, 350]])
    drawn = Detections(box, [0.9], [1], NAMES, (400, 400), image=image).plot()
    np.testing.assert_array_equal(drawn[350, 200], class_color(1))
    assert (drawn[205:345, 105:295] == 128).all()  # inside
    assert (drawn[:150] == 128).all()  # far above the label
    label = drawn[170:199, 100:200]
    assert (label == class_color(1)).all(axis=-1).any()
    assert (np.abs(label.astype(int) - np.array(class_color(1))).max(axis=-1) > 60).any()  # the text's ink


def test_a_label_without_room_above_stands_inside_the_box() -> None:
    image = np.full((300, 300, 3), 128, dtype=np.uint8)
    drawn = Detections([[285, 0, 300, 200]], [0.5], [0], NAMES, (300, 300), image=image).plot()
    assert (drawn[2:14, 250:280] != 128).any()  # pushed left, so that it is not cut off at the right edge


def test_class_colors_differ() -> None:
    colors = np.array([class_color(label) for label in range(16)])
    distances = np.abs(colors[:, None] - colors[None]).sum(-1) + 1000 * np.eye(16, dtype=int)
    assert distances.min() > 25


def test_names_that_opencv_4_cannot_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    from yolonas.inference import visualize

    monkeypatch.delattr(visualize.cv2, "FontFace", raising=False)
    assert [visualize._drawable(name, label) for label, name in enumerate(NAMES)] == ["cat", "Gerat", "class 2"]
    three(np.zeros((100, 200, 3), np.uint8)).plot()


def test_plot_without_boxes_or_pixels(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (100, 200, 3), dtype=np.uint8)
    np.testing.assert_array_equal(empty(image).plot(), image)
    with pytest.raises(ValueError, match="neither the image nor its path"):
        empty().plot()
    saved = empty(image).save(tmp_path / "out.png")
    np.testing.assert_array_equal(read_image(saved), image)
    again = empty()
    again.path = str(saved)  # pixels are read from the file where they were not kept
    np.testing.assert_array_equal(again.plot(), image)

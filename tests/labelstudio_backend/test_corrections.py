from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from labelstudio_backend.corrections import (
    FETCHES,
    class_sources,
    corrections,
    held_out,
    labelled_images,
    manifest,
    new_since,
    tasks_of,
)
from labelstudio_backend.media import MediaError
from yolonas.errors import DataError
from yolonas.labelstudio import class_names, parse_label_config

CONFIG = """<View><Image name="image" value="$image"/>
<RectangleLabels name="label" toName="image">
<Label value="Car" predicted_values="car,truck"/><Label value="Dog"/></RectangleLabels>
<RectangleLabels name="more" toName="image"><Label value="Sign"/><Label value="Dog"/></RectangleLabels>
<RectangleLabels name="off" toName="image" model_skip="true"><Label value="Cloud"/></RectangleLabels></View>"""


def region(
    label: str, x: float, y: float, w: float, h: float, *, tag: str = "label", rotation: float = 0
) -> dict[str, Any]:
    value = {"x": x, "y": y, "width": w, "height": h, "rotation": rotation, "rectanglelabels": [label]}
    return {"type": "rectanglelabels", "from_name": tag, "to_name": "image", "value": value}


def task(number: int, *annotations: dict[str, Any], image: str = "pic") -> dict[str, Any]:
    return {"id": number, "data": {"image": f"/data/upload/{image}"}, "annotations": list(annotations)}


def annotation(number: int, *regions: dict[str, Any], at: int = 0, **values: Any) -> dict[str, Any]:
    return {"id": number, "result": list(regions), "updated_at": f"2026-01-01T00:00:{at:02d}Z", **values}


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "pic"
    path.write_bytes(cv2.imencode(".png", np.zeros((100, 200, 3), np.uint8))[1].tobytes())
    return path


def test_the_annotation_that_counts(picture: Path, tmp_path: Path) -> None:
    box, other = region("Car", 10, 10, 20, 20), region("Dog", 50, 50, 10, 10)
    tasks = [
        task(9, annotation(1, box, at=1), annotation(2, other, at=5)),
        task(2, annotation(3, box, at=1, ground_truth=True), annotation(4, other, at=5)),
        task(3, annotation(5, box, was_cancelled=True)),
        task(4),
        task(5, annotation(6)),
    ]
    found = corrections(tasks)
    assert [(c.task, c.annotation["id"]) for c in found] == [(2, 3), (5, 6), (9, 2)]
    assert corrections([*tasks, tasks[0]]) == found, "a task that comes twice counts once"
    data = labelled_images(found, parse_label_config(CONFIG), lambda url, number: picture, tmp_path / "images")
    assert data.names == ("Car", "Dog", "Sign")
    assert [image.labels.tolist() for image in data.images] == [[0], [], [1]]
    assert data.images[0].boxes.tolist() == [[20.0, 10.0, 60.0, 30.0]]
    assert (data.images[0].width, data.images[0].height) == (200, 100)


def test_two_tags_on_one_image_are_one_item_and_skipped_or_vanished_labels_are_left_out(
    picture: Path, tmp_path: Path
) -> None:
    regions = [
        region("Car", 0, 0, 10, 10),
        region("Sign", 20, 20, 10, 10, tag="more"),
        region("Dog", 40, 40, 10, 10, tag="more"),
        region("Cloud", 60, 60, 10, 10, tag="off"),
        region("Bicycle", 80, 80, 10, 10),
    ]
    found = corrections([task(1, annotation(1, *regions))])
    data = labelled_images(found, parse_label_config(CONFIG), lambda url, number: picture, tmp_path / "images")
    assert len(data) == 1
    assert [data.names[label] for label in data.images[0].labels] == ["Car", "Sign", "Dog"]


def test_images_that_cannot_be_had_are_listed_and_the_rest_is_kept(picture: Path, tmp_path: Path) -> None:
    def fetch(url: str, number: int) -> Path:
        if number == 2:
            raise DataError("no such image")
        return picture if number == 1 else tmp_path / "images.txt"

    (tmp_path / "images.txt").write_text("not an image")
    found = corrections([task(n, annotation(n, region("Car", 0, 0, 50, 50))) for n in (1, 2, 3)])
    seen: list[tuple[int, int]] = []
    data = labelled_images(
        found, parse_label_config(CONFIG), fetch, tmp_path / "images", on_image=lambda *count: seen.append(count)
    )
    assert len(data) == 1
    assert data.dropped[0] == "task 2: no such image"
    assert data.dropped[1].startswith("task 3:")
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_images_that_may_be_had_later_end_the_pull_at_once(picture: Path, tmp_path: Path) -> None:
    asked: list[int] = []

    def away(url: str, number: int) -> Path:
        asked.append(number)
        raise MediaError("studio answered 503", passing=True)

    found = corrections([task(n, annotation(n)) for n in range(1, 31)])
    with pytest.raises(MediaError, match=r"task \d: studio answered 503; nothing is learnt without it") as raised:
        labelled_images(found, parse_label_config(CONFIG), away, tmp_path / "images")
    assert raised.value.passing
    assert len(asked) <= FETCHES + 1


def test_one_image_in_twenty_may_be_away_for_good(picture: Path, tmp_path: Path) -> None:
    def fetch(url: str, number: int) -> Path:
        if number in lost:
            raise MediaError("example.org could not be asked", passing=True)
        return picture

    found = corrections([task(n, annotation(n)) for n in range(1, 21)])
    lost = {7}
    data = labelled_images(found, parse_label_config(CONFIG), fetch, tmp_path / "images")
    assert tasks_of(data.images) == {*range(1, 21)} - lost
    assert data.dropped == ["task 7: example.org could not be asked"]
    lost.add(9)
    with pytest.raises(MediaError, match="nothing is learnt"):
        labelled_images(found, parse_label_config(CONFIG), fetch, tmp_path / "images")


def test_a_task_without_anything_to_look_at_is_told(picture: Path, tmp_path: Path) -> None:
    other = {**task(2, annotation(2)), "data": {"picture": "/data/upload/pic"}}
    found = corrections([task(1, annotation(1)), other])
    data = labelled_images(found, parse_label_config(CONFIG), lambda url, number: picture, tmp_path / "images")
    assert tasks_of(data.images) == {1}
    assert data.dropped == ["task 2: it has no image that the label config names, nor a labelled keyframe"]


def test_a_kept_image_outlives_the_cache(picture: Path, tmp_path: Path) -> None:
    found = corrections([task(1, annotation(1))])
    data = labelled_images(found, parse_label_config(CONFIG), lambda url, number: picture, tmp_path / "images")
    picture.unlink()
    assert data.images[0].path.stat().st_size > 0


def test_what_is_new_since_a_manifest() -> None:
    then = manifest(corrections([task(1, annotation(1)), task(2, annotation(2))]))
    now = manifest(
        corrections(
            [task(1, annotation(1)), task(2, annotation(2, at=9)), task(3, annotation(3)), task(4, annotation(4))]
        )
    )
    assert new_since(now, then) == 3
    assert new_since(now, None) == 4
    assert new_since({}, then) == 0


def test_the_held_out_part_is_stable_and_has_the_fraction() -> None:
    part = [held_out("5-abcdef", number, 0.2) for number in range(5000)]
    assert sum(part) == pytest.approx(1000, abs=100)
    assert part[:50] == [held_out("5-abcdef", number, 0.2) for number in range(50)]
    assert all(held_out("5-abcdef", number, 0.3) for number in range(5000) if part[number]), "grows with the fraction"
    assert part != [held_out("6-abcdef", number, 0.2) for number in range(5000)]


def test_names_and_sources_of_the_classes() -> None:
    controls = parse_label_config(CONFIG)
    assert class_names(controls) == ("Car", "Dog", "Sign")
    assert class_sources(controls) == {"Car": ("car", "truck")}

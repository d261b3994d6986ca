"""Reading Label Studio's exports: which annotation counts, where images lie, what the classes are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from yolonas.data.readers import LabelledImages, read_dataset, splits
from yolonas.errors import DataError

CONFIG = (
    '<View><Image name="image" value="$image"/><RectangleLabels name="label" toName="image">'
    '<Label value="Washer"/><Label value="Bolt"/><Label value="Nut"/></RectangleLabels></View>'
)


def picture(path: Path, width: int = 64, height: int = 48, orientation: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (width, height), "white").save(path, "JPEG", exif=exif)
    return path


def region(label: str, x: float, y: float, width: float, height: float, **more: Any) -> dict[str, Any]:
    value = {"x": x, "y": y, "width": width, "height": height, "rotation": 0, "rectanglelabels": [label]}
    shape = {"original_width": 64, "original_height": 48, "image_rotation": 0}
    return {"type": "rectanglelabels", "from_name": "label", "to_name": "image", "value": value, **shape, **more}


def task(number: int, *results: list[dict[str, Any]], image: str = "a.jpg", **more: Any) -> dict[str, Any]:
    annotations = [
        {"id": 10 * number + k, "result": result, "updated_at": f"2026-01-01T00:00:{k:02d}Z", "was_cancelled": False}
        for k, result in enumerate(results)
    ]
    return {"id": number, "data": {"image": image}, "annotations": annotations, **more}


def read(folder: Path, document: Any, **options: Any) -> LabelledImages:
    (folder / "tasks.json").write_text(json.dumps(document))
    return read_dataset(folder / "tasks.json", **options)


def test_a_json_export(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    picture(tmp_path / "b.jpg")
    data = read(
        tmp_path,
        [
            task(2, [region("Nut", 25, 50, 50, 25)], [region("Bolt", 0, 0, 50, 50), region("Nut", 50, 0, 25, 25)]),
            task(3, [], image="b.jpg"),
            task(4, image="b.jpg"),
        ],
    )
    assert data.names == ("Bolt", "Nut")  # in the order of their first appearance among what counts
    np.testing.assert_array_equal(data.images[0].boxes, [[0, 0, 32, 24], [32, 0, 48, 12]])
    assert data.images[0].labels.tolist() == [0, 1]
    assert (len(data), len(data.images[1].boxes)) == (2, 0)  # annotated, and nothing is there
    assert data.dropped == ["task 4 has no submitted annotation"]
    assert data.changed == []


def test_a_skipped_annotation_does_not_count_and_a_ground_truth_comes_first(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    box, other = region("Nut", 0, 0, 50, 50), region("Bolt", 0, 0, 25, 25)
    first, second, third = task(1, [box], [other]), task(2, [box], [other]), task(3, [box])
    first["annotations"][1]["was_cancelled"] = True
    second["annotations"][0]["ground_truth"] = True
    third["annotations"][0]["was_cancelled"] = True
    data = read(tmp_path, [first, second, third])
    assert [image.boxes.tolist() for image in data.images] == [[[0, 0, 32, 24]]] * 2
    assert data.dropped == ["task 3 has no submitted annotation"]


def test_json_min_says_the_same(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "b.jpg")
    picture(tmp_path / "a.jpg")
    regions = [region("Bolt", 25, 50, 50, 25), region("Nut", 0, 0, 25, 25)]
    full = read(
        tmp_path,
        [
            task(1, [regions[0]], regions, image="/data/upload/1/a.jpg"),
            task(2, [], image="/data/upload/1/b.jpg"),
        ],
    )

    def item(number: int, key: int, shapes: list[dict[str, Any]], image: str) -> dict[str, Any]:
        shapes = [{**r["value"], "original_width": 64, "original_height": 48} for r in shapes]
        drawn = {"label": shapes} if shapes else {}
        stamp = f"2026-01-01T00:00:{key:02d}Z"
        image = f"/data/upload/1/{image}"
        return {"image": image, "id": number, **drawn, "annotator": 1, "annotation_id": key, "updated_at": stamp}

    unlabelled = {
        "image": "/data/upload/1/b.jpg",
        "id": 3,
        "annotator": None,
        "annotation_id": None,
        "updated_at": None,
    }
    items = [item(1, 10, regions[:1], "a.jpg"), item(1, 11, regions, "a.jpg"), item(2, 20, [], "b.jpg"), unlabelled]
    short = read(tmp_path, items)
    assert short.dropped == ["task 3 has no submitted annotation"]
    assert short.names == full.names == ("Bolt", "Nut")
    assert [image.path for image in short.images] == [image.path for image in full.images]
    for a, b in zip(short.images, full.images, strict=True):
        np.testing.assert_array_equal(a.boxes, b.boxes)
        np.testing.assert_array_equal(a.labels, b.labels)


def test_the_api_s_page_of_tasks(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    page = {"tasks": [task(1, [region("Nut", 0, 0, 50, 50)], predictions=[], drafts=[])], "total": 1}
    assert read(tmp_path, page).objects == 1


def test_the_label_config_beside_it_gives_the_order_and_refuses_other_labels(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    (tmp_path / "label_config.xml").write_text(CONFIG)
    data = read(tmp_path, [task(1, [region("Nut", 0, 0, 50, 50), region("Cog", 50, 50, 25, 25)])])
    assert data.names == ("Washer", "Bolt", "Nut")
    assert data.images[0].labels.tolist() == [2]
    assert data.dropped == ["task 1: there is no label 'Cog' in the label config"]
    for text, message in (("<View>", "not well-formed"), ("<View></View>", "has no RectangleLabels on an Image")):
        (tmp_path / "label_config.xml").write_text(text)
        with pytest.raises(DataError, match=rf"label_config\.xml.*{message}"):
            read_dataset(tmp_path / "tasks.json")


def test_pixels_are_those_of_the_upright_image(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg", 64, 48, orientation=6)
    upright = region("Nut", 25, 50, 50, 25, original_width=48, original_height=64)
    data = read(tmp_path, [task(1, [upright]), task(2, [region("Nut", 25, 50, 50, 25)])])
    for image in data.images:  # percent are of the image as the browser shows it, whatever else is written
        assert (image.width, image.height) == (48, 64)
        np.testing.assert_array_equal(image.boxes, [[12, 32, 36, 48]])
    (line,) = data.changed
    assert line.startswith("task 2: drawn on a picture of 64x48, but a.jpg is 48x64 upright")


def test_rotation_several_labels_and_what_is_left_out(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg", 200, 100)
    size = {"original_width": 200, "original_height": 100}
    turned = region("Nut", 50, 20, 20, 10, **size)
    turned["value"]["rotation"] = 90
    both = region("Nut", 0, 0, 10, 10, **size)
    both["value"]["rectanglelabels"] = ["Nut", "Bolt"]
    thin = region("Nut", 0, 0, 0.1, 10, **size)
    polygon = {"type": "polygonlabels", "from_name": "poly", "to_name": "image", "value": {"points": [[0, 0]]}}
    endless = region("Nut", float("inf"), 0, 10, 10, **size)
    data = read(tmp_path, [task(1, [turned, both, thin, polygon, endless, "no region", turned])])
    np.testing.assert_allclose(data.images[0].boxes, [[90, 20, 100, 60], [0, 0, 20, 10], [0, 0, 20, 10]], atol=1e-4)
    reasons = [getattr(line, "subject", "") for line in data.dropped]
    assert reasons == [
        "regions that are not RectangleLabels",
        "boxes without area",
        "boxes without area",
        "boxes that are there twice",
    ]


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ("a.jpg", "a.jpg"),
        ("images/sub/a.jpg", "images/sub/a.jpg"),
        ("/data/upload/5/659649fc-a.jpg", "659649fc-a.jpg"),
        ("/data/upload/5/659649fc-a.jpg", "images/659649fc-a.jpg"),
        ("/data/upload/5/659649fc-a.jpg", "images/a.jpg"),
        ("/data/upload/5/659649fc-a.jpg", "5/659649fc-a.jpg"),
        ("http://ls:8080/sub/data/upload/5/659649fc-a.jpg", "images/659649fc-a.jpg"),
        ("/data/local-files/?d=photos/a%20b.jpg", "photos/a b.jpg"),
        ("/data/local-files/?d=photos/a%20b.jpg", "images/a b.jpg"),
        ("https://ls/data/local-files/?d=a.jpg", "a.jpg"),
        ("s3://bucket/key/a.jpg", "images/a.jpg"),
        ("https://example.org/x/a.jpg?token=1", "a.jpg"),
        ("C:\\photos\\a.jpg", "images/a.jpg"),
        ("we[i]rd #1?.jpg", "we[i]rd #1?.jpg"),
    ],
)
def test_where_images_are_looked_for(tmp_path: Path, value: str, place: str) -> None:
    picture(tmp_path / place)
    data = read(tmp_path, [task(1, [region("Nut", 0, 0, 50, 50)], image=value)])
    assert [image.path for image in data.images] == [tmp_path / place]


def test_images_dir_and_folders_and_parts(tmp_path: Path) -> None:
    picture(tmp_path / "elsewhere" / "a.jpg")
    (tmp_path / "project").mkdir()
    document = [task(1, [region("Nut", 0, 0, 50, 50)])]
    assert read(tmp_path / "project", document, images_dir=tmp_path / "elsewhere").objects == 1
    picture(tmp_path / "project" / "images" / "a.jpg")
    assert splits(tmp_path / "project") == ()
    assert read_dataset(tmp_path / "project").objects == 1
    (tmp_path / "project" / "tasks.json").rename(tmp_path / "project" / "train.json")
    assert splits(tmp_path / "project") == ("train",)
    assert read_dataset(tmp_path / "project", "train").objects == 1


def test_images_that_are_not_here_are_dropped_with_the_way_to_get_them(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    away = task(2, [], image="https://example.org/b.jpg")
    data = read(tmp_path, [task(1, [region("Nut", 0, 0, 50, 50)]), away, task(3, [], image="data:image/png;base64,xx")])
    assert len(data) == 1
    assert data.dropped[0] == (
        "task 2: https://example.org/b.jpg is not here; yolonas-labelstudio pull fetches a project's images"
    )
    with pytest.raises(DataError, match=r"none of its 1 images is here; looked for 'https://example.org/b.jpg' in "):
        read(tmp_path, [task(1, [region("Nut", 0, 0, 50, 50)], image="https://example.org/b.jpg")])


def test_two_tags_and_two_images(tmp_path: Path) -> None:
    for name in "ab":
        picture(tmp_path / f"{name}.jpg")
    left, right = (region("Nut", 0, 0, 50, 50, from_name=tag, to_name=tag) for tag in ("left", "right"))
    double = {**task(1, [left, right]), "data": {"left": "a.jpg", "right": "b.jpg", "note": "text"}}
    data = read(tmp_path, [double])
    assert [(image.path.name, len(image.boxes), image.image_id) for image in data.images] == [
        ("a.jpg", 1, 1),
        ("b.jpg", 1, 2),
    ]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "holds an empty list"),
        ([1, 2], "item 0 is a int"),
        ([{"image_id": 1, "bbox": [1, 2, 3, 4]}], "but not of Label Studio's tasks"),
        ([task(1)], "has no rectangle with a label"),
        ([task(1, [{"type": "choices", "value": {"choices": ["x"]}}])], "has no rectangle with a label"),
        ([{"data": 5}, {"data": {}, "annotations": 7}], "has no rectangle with a label"),
        ([{"id": 1, "data": {}, "annotations": task(1, [region("Nut", 0, 0, 9, 9)])["annotations"]}], "names no image"),
    ],
)
def test_what_is_no_labelled_project_is_one_sentence(tmp_path: Path, document: Any, message: str) -> None:
    with pytest.raises(DataError, match=rf"tasks\.json.*{message}"):
        read(tmp_path, document)

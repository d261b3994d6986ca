"""Reading COCO json, YOLO folders and data.yaml, and what happens to entries that are wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from yolonas.data.readers import LabelledImages, read_dataset, splits
from yolonas.errors import DataError


def picture(path: Path, width: int = 64, height: int = 48, orientation: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (width, height), "white").save(path, exif=exif)
    return path


def coco(**changes: Any) -> dict[str, Any]:
    """Two images, 64 x 48; categories 7 "dog" and 3 "cat"; one box in the first image."""
    document = {
        "images": [
            {"id": 10, "file_name": "a.jpg", "width": 64, "height": 48},
            {"id": 20, "file_name": "b.jpg", "width": 64, "height": 48},
        ],
        "annotations": [box([10, 20, 30, 8])],
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
    }
    return {**document, **changes}


def box(bbox: Any, image_id: Any = 10, category_id: Any = 7, **more: Any) -> dict[str, Any]:
    return {"id": 1, "image_id": image_id, "category_id": category_id, "bbox": bbox, **more}


def written(folder: Path, document: Any, name: str = "labels.json", images: str = ".") -> Path:
    for stem in "ab":
        picture(folder / images / f"{stem}.jpg")
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


class TestCoco:
    def test_labels_follow_ascending_category_ids(self, tmp_path: Path) -> None:
        data = read_dataset(written(tmp_path, coco()))
        assert data.names == ("cat", "dog")
        first, second = data.images
        np.testing.assert_array_equal(first.boxes, [[10, 20, 40, 28]])
        assert (first.labels.tolist(), first.crowd.tolist()) == ([1], [False])
        assert (first.width, first.height, first.image_id, first.path) == (64, 48, 10, tmp_path / "a.jpg")
        assert second.boxes.shape == (0, 4)  # an image without objects is kept
        assert (data.objects, data.dropped) == (1, [])

    @pytest.mark.parametrize(
        ("json_name", "images"),
        [
            ("labels.json", "."),
            ("labels.json", "images"),
            ("val.json", "val"),
            ("val.json", "images/val"),
            ("annotations/instances_val2017.json", "val2017"),
            ("annotations/instances_val2017.json", "images/val2017"),
            ("annotations/labels.json", "images"),
            ("annotations/labels.json", "."),
        ],
    )
    def test_where_images_are_looked_for(self, tmp_path: Path, json_name: str, images: str) -> None:
        data = read_dataset(written(tmp_path, coco(), json_name, images))
        assert [image.path.resolve() for image in data.images] == [
            (tmp_path / images / f"{c}.jpg").resolve() for c in "ab"
        ]

    def test_explicit_images_dir_and_paths_of_other_machines(self, tmp_path: Path) -> None:
        document = coco()
        document["images"][0]["file_name"] = "C:\\exports\\images\\a.jpg"
        document["images"][1]["file_name"] = "../../label-studio/media/upload/1/b.jpg"
        path = written(tmp_path / "labels", document, images="../elsewhere")
        data = read_dataset(path, images_dir=tmp_path / "elsewhere")
        assert [image.path.name for image in data.images] == ["a.jpg", "b.jpg"]

    def test_what_cannot_be_used_is_dropped_with_a_reason(self, tmp_path: Path) -> None:
        annotations = [
            box([10, 20, 30, 8]),
            box([10, 20, 0, 8]),
            box([10, 20, 5, -1]),
            box([math.nan, 20, 5, 5]),
            box([70, 20, 5, 5]),
            box([10, 20, 30, 8]),
            box([1, 1, 5, 5], category_id=99),
            box([1, 1, 5, 5], image_id=99),
            box(None, segmentation=[[1, 1, 2, 2, 3, 3]]),
            box([-5, -5, 20, 100]),
        ]
        data = read_dataset(written(tmp_path, coco(annotations=annotations)))
        np.testing.assert_array_equal(data.images[0].boxes, [[10, 20, 40, 28], [0, 0, 15, 48]])
        assert len(data.dropped) == 8
        for line, reason in zip(
            sorted(data.dropped),
            [
                "[10, 20, 10, 28] has no area",
                "[10, 20, 15, 19] has no area",
                "[10, 20, 40, 28] is there twice",
                "[70, 20, 75, 25] lies outside the image of 64x48",
                "[nan, 20, nan, 25] has no area",
                "annotations[6]: there is no category with the id 99",
                "annotations[7]: there is no image with the id 99",
                "annotations[8]: it has no bbox",
            ],
            strict=True,
        ):
            assert line.endswith(reason)

    def test_a_missing_image_is_dropped_with_its_boxes(self, tmp_path: Path) -> None:
        path = written(tmp_path, coco())
        (tmp_path / "a.jpg").unlink()
        data = read_dataset(path)
        assert [image.image_id for image in data.images] == [20]
        assert data.dropped == ["a.jpg: the image is missing"]
        (tmp_path / "b.jpg").unlink()
        with pytest.raises(DataError, match=r"none of its 2 images is there; looked for 'a.jpg' in "):
            read_dataset(path)

    def test_crowd_regions_stay_crowd(self, tmp_path: Path) -> None:
        annotations = [
            box([0, 0, 9, 9], iscrowd=1, segmentation={"counts": "abc", "size": [48, 64]}),
            box([0, 0, 9, 9]),
        ]
        data = read_dataset(written(tmp_path, coco(annotations=annotations)))
        assert data.images[0].crowd.tolist() == [True, False]
        assert data.objects == 1
        assert [a["iscrowd"] for a in data.to_coco()["annotations"]] == [1, 0]

    def test_categories_of_one_name_are_one_class(self, tmp_path: Path) -> None:
        categories = [{"id": 0, "name": "cell"}, {"id": 1, "name": "cell"}, {"id": 2, "name": "dust"}]
        annotations = [box([0, 0, 9, 9], category_id=1), box([0, 0, 9, 9], category_id=2)]
        data = read_dataset(written(tmp_path, coco(categories=categories, annotations=annotations)))
        assert data.names == ("cell", "dust")
        assert data.images[0].labels.tolist() == [0, 1]

    def test_image_ids_that_are_names_are_numbered(self, tmp_path: Path) -> None:
        document = coco(annotations=[box([0, 0, 9, 9], image_id="second")])
        for entry, key in zip(document["images"], ("first", "second"), strict=True):
            entry["id"] = key
        data = read_dataset(written(tmp_path, document))
        assert [(image.image_id, len(image.boxes)) for image in data.images] == [(1, 0), (2, 1)]

    @pytest.mark.parametrize(
        ("document", "message"),
        [
            ("{", r"is not JSON: .* in line 1"),
            ("7", "holds int, not an object"),
            ("{}", "has no list 'images'"),
            (coco(annotations=None), "has no list 'annotations'"),
            (coco(categories=[]), "has no categories"),
            (coco(categories=[{"id": 7}]), r"categories\[0\] has no 'name'"),
            (coco(categories=[{"id": 7, "name": "a"}, {"id": 7, "name": "b"}]), "two categories have the id 7"),
            (coco(categories=[{"id": 7, "name": "a"}, {"id": "x", "name": "b"}]), "category ids must be all numbers"),
            (coco(images=[{"id": 1}]), r"images\[0\] has no 'file_name'"),
            (coco(images=[{"id": 1, "file_name": "a.jpg", "width": 0, "height": 9}]), r"images\[0\]\.width must be"),
            (coco(images=[{"id": 1, "file_name": "a.jpg", "width": "9", "height": 9}]), "number of pixels, not '9'"),
            (coco(images=[{"id": 1, "file_name": "a.jpg", "width": 9, "height": 9}] * 2), "two images have the id 1"),
            (coco(annotations=[{"category_id": 7}]), r"annotations\[0\] has no 'image_id'"),
            (coco(annotations=[box([1, 2, 3])]), r"annotations\[0\]\.bbox must be four numbers"),
            (coco(annotations=[box([1, 2, 3, "x"])]), r"annotations\[0\]\.bbox must be four numbers"),
            (coco(annotations=["x"]), r"annotations\[0\] has no 'image_id'"),
        ],
    )
    def test_errors_name_the_file_and_the_key(self, tmp_path: Path, document: Any, message: str) -> None:
        with pytest.raises(DataError, match=rf"labels\.json.*{message}"):
            read_dataset(written(tmp_path, document))

    def test_a_folder_with_one_file_for_each_part(self, tmp_path: Path) -> None:
        written(tmp_path, coco(), "test.json")
        written(tmp_path, coco(annotations=[]), "train.json")
        assert splits(tmp_path) == ("train", "test")
        assert read_dataset(tmp_path, "test").objects == 1
        assert read_dataset(tmp_path, "train").objects == 0
        with pytest.raises(DataError, match="has the parts train, test: name one"):
            read_dataset(tmp_path)
        with pytest.raises(DataError, match="has no part 'val', it has the parts train, test"):
            read_dataset(tmp_path, "val")

    def test_a_folder_with_a_single_file(self, tmp_path: Path) -> None:
        written(tmp_path, coco(), "instances.json")
        assert splits(tmp_path) == ()
        assert read_dataset(tmp_path).objects == 1

    def test_the_layouts_of_coco_and_roboflow(self, tmp_path: Path) -> None:
        written(tmp_path / "coco", coco(), "annotations/instances_val2017.json", "val2017")
        written(tmp_path / "coco", "{}", "annotations/captions_val2017.json", "val2017")
        assert read_dataset(tmp_path / "coco", "val").objects == 1
        written(tmp_path / "robo/valid", coco(), "_annotations.coco.json")
        written(tmp_path / "robo/train", coco(), "_annotations.coco.json")
        assert splits(tmp_path / "robo") == ("train", "val")
        assert read_dataset(tmp_path / "robo", "valid").objects == 1

    def test_to_coco_is_read_back_the_same(self, tmp_path: Path) -> None:
        data = read_dataset(written(tmp_path, coco(annotations=[box([1.5, 2, 3.25, 4], iscrowd=1), box([0, 0, 9, 9])])))
        (tmp_path / "again.json").write_text(json.dumps(data.to_coco()))
        assert_equal(read_dataset(tmp_path / "again.json"), data)


def assert_equal(a: LabelledImages, b: LabelledImages) -> None:
    assert (a.names, len(a)) == (b.names, len(b))
    for first, second in zip(a.images, b.images, strict=True):
        assert first.path == second.path
        assert (first.width, first.height) == (second.width, second.height)
        for name in ("boxes", "labels", "crowd"):
            np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


def yolo(folder: Path, lines: str = "1 0.5 0.5 0.5 0.25\n", images: str = "images", labels: str = "labels") -> Path:
    picture(folder / images / "a.jpg")
    picture(folder / images / "b.jpg")
    (folder / labels).mkdir(parents=True, exist_ok=True)
    (folder / labels / "a.txt").write_text(lines)
    (folder / "classes.txt").write_text("cat\ndog\n")
    return folder


class TestYolo:
    def test_boxes_become_pixels(self, tmp_path: Path) -> None:
        data = read_dataset(yolo(tmp_path))
        assert data.names == ("cat", "dog")
        np.testing.assert_array_equal(data.images[0].boxes, [[16, 18, 48, 30]])
        assert data.images[0].labels.tolist() == [1]
        assert len(data.images[1].boxes) == 0
        assert [image.image_id for image in data.images] == [1, 2]

    def test_pixels_are_those_of_the_upright_image(self, tmp_path: Path) -> None:
        picture(yolo(tmp_path) / "images" / "a.jpg", 64, 48, orientation=6)
        first = read_dataset(tmp_path).images[0]
        assert (first.width, first.height) == (48, 64)
        np.testing.assert_array_equal(first.boxes, [[12, 24, 36, 40]])

    def test_polygons_count_as_their_enclosing_box(self, tmp_path: Path) -> None:
        data = read_dataset(yolo(tmp_path, "0 0.25 0.5 0.5 0.25 0.75 0.5 0.5 1.5\n"))
        np.testing.assert_array_equal(data.images[0].boxes, [[16, 12, 48, 48]])

    def test_what_cannot_be_used_is_dropped_with_a_reason(self, tmp_path: Path) -> None:
        lines = (
            "0 0.5 0.5 0 0.1\n5 0.5 0.5 0.1 0.1\n-1 0.5 0.5 0.1 0.1\n0 nan 0.5 0.1 0.1\n0 120 90 30 30\n\n0 .5 .5 2 2\n"
        )
        yolo(tmp_path, lines)
        (tmp_path / "images" / "b.jpg").write_bytes(b"no image")
        data = read_dataset(tmp_path)
        np.testing.assert_array_equal(data.images[0].boxes, [[0, 0, 64, 48]])
        assert len(data.images) == 1
        reasons = "\n".join(data.dropped)
        assert len(data.dropped) == 6
        for reason in (
            "line 2: there is no class 5 among 2",
            "line 3: there is no class -1",
            "has no area",
            "b.jpg",
            "outside",
        ):
            assert reason in reasons

    @pytest.mark.parametrize(
        ("lines", "message"),
        [
            ("0 0.5 0.5 0.1 0.1\nx 1 1 1 1\n", r"a\.txt, line 2: 'x 1 1 1 1' are not numbers"),
            ("0.5 0.5 0.5 0.1 0.1\n", "line 1: the class must be a whole number, not 0.5"),
            ("nan 0.5 0.5 0.1 0.1\n", "line 1: the class must be a whole number, not nan"),
            ("0 0.5 0.5 0.1\n", "line 1: a class and 4 numbers are needed, not 4 columns"),
            ("0 0.5 0.5 0.1 0.1 0.9\n", "not 6 columns"),
            ("0\n", "not 1 columns"),
        ],
    )
    def test_errors_name_the_file_and_the_line(self, tmp_path: Path, lines: str, message: str) -> None:
        with pytest.raises(DataError, match=message):
            read_dataset(yolo(tmp_path, lines))

    def test_parts_in_either_order_of_folders(self, tmp_path: Path) -> None:
        yolo(tmp_path / "one", images="images/train", labels="labels/train")
        assert splits(tmp_path / "one") == ("train",)
        yolo(tmp_path / "two", images="valid/images", labels="valid/labels")
        assert splits(tmp_path / "two") == ("val",)
        assert read_dataset(tmp_path / "one", "train").objects == read_dataset(tmp_path / "two", "val").objects == 1

    def test_without_class_names(self, tmp_path: Path) -> None:
        (yolo(tmp_path) / "classes.txt").unlink()
        with pytest.raises(DataError, match=r"does not name its classes: put one name a line into .*classes\.txt"):
            read_dataset(tmp_path)

    def test_label_studios_export_with_its_notes(self, tmp_path: Path) -> None:
        (yolo(tmp_path) / "notes.json").write_text('{"categories": []}')
        assert read_dataset(tmp_path).objects == 1


class TestDataYaml:
    @pytest.mark.parametrize("names", ["[cat, dog]", "{0: cat, 1: dog}", "{1: dog, 0: cat}"])
    @pytest.mark.parametrize("root", ["", "path: .\n", "path: {root}\n", "path: ../elsewhere\n"])
    def test_folders(self, tmp_path: Path, names: str, root: str) -> None:
        yolo(tmp_path, images="images/val", labels="labels/val")
        text = f"{root.format(root=tmp_path)}train: images/val\nval: images/val\nnc: 2\nnames: {names}\n"
        (tmp_path / "data.yaml").write_text(text)
        for path in (tmp_path / "data.yaml", tmp_path):
            assert splits(path) == ("train", "val")
            data = read_dataset(path, "val")
            assert data.names == ("cat", "dog")
            np.testing.assert_array_equal(data.images[0].boxes, [[16, 18, 48, 30]])

    def test_lists_text_files_and_roboflows_dots(self, tmp_path: Path) -> None:
        yolo(tmp_path, images="val/images", labels="val/labels")
        (tmp_path / "lists").mkdir()
        (tmp_path / "lists" / "some.txt").write_text(
            f"val/images/a.jpg\n{tmp_path}/val/images/b.jpg\nval/images/none.jpg\n"
        )
        (tmp_path / "data.yaml").write_text(
            "train: [../val/images, lists/some.txt]\nvalid: ../val/images\ntest: lists/some.txt\nnames: [cat, dog]\n"
        )
        assert splits(tmp_path) == ("train", "val", "test")
        assert [image.path.name for image in read_dataset(tmp_path, "val").images] == ["a.jpg", "b.jpg"]
        listed = read_dataset(tmp_path, "test")
        assert [image.path.name for image in listed.images] == ["a.jpg", "b.jpg"]
        assert listed.dropped == [f"{tmp_path}/val/images/none.jpg: the image is missing"]
        assert len(read_dataset(tmp_path, "train")) == 2  # an image that is listed twice counts once

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("val: images\n", "names must list the class names"),
            ("val: images\nnames: []\n", "names must list the class names"),
            ("val: images\nnames: {0: a, 2: b}\n", r"names must be numbered 0 to 1, not \[0, 2\]"),
            ("val: images\nnames: [a]\nnc: 3\n", "nc is 3, but names lists 1 classes"),
            ("val: nowhere\nnames: [a, b]\n", r"val names 'nowhere', which is not there \(looked for .*nowhere\)"),
            ("names: [a, b]\n", "has no part 'val', it has no parts"),
            ("- a\n", "does not describe a data set"),
            ("val: [\n", "is not YAML: line 2"),
        ],
    )
    def test_errors_name_the_file_and_the_key(self, tmp_path: Path, text: str, message: str) -> None:
        yolo(tmp_path)
        (tmp_path / "data.yaml").write_text(text)
        with pytest.raises(DataError, match=rf"data\.yaml.*{message}"):
            read_dataset(tmp_path / "data.yaml", "val")


def test_paths_that_hold_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no data set at .*nowhere"):
        read_dataset(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no data set"):
        read_dataset(tmp_path)
    (tmp_path / "a.csv").write_text("")
    with pytest.raises(DataError, match=r"a\.csv is no data set"):
        read_dataset(tmp_path / "a.csv")
    (tmp_path / "images").mkdir()
    (tmp_path / "classes.txt").write_text("cat\n")
    with pytest.raises(DataError, match="holds no image"):
        read_dataset(tmp_path)


def test_bccd(shared: Path) -> None:
    counts = {part: read_dataset(shared / "data/bccd", part) for part in ("train", "val", "test")}
    assert [(len(data), data.objects, len(data.dropped)) for data in counts.values()] == [
        (205, 2804, 0),
        (87, 1137, 0),
        (72, 945, 0),
    ]
    assert counts["val"].names == ("RBC", "WBC", "Platelets")
    assert_equal(counts["val"], read_dataset(shared / "data/bccd/val.json"))


def test_coco_photographs(shared: Path) -> None:
    data = read_dataset(shared / "data/coco_permissive")
    crowd = sum(int(image.crowd.sum()) for image in data.images)
    assert (len(data), data.objects, crowd, len(data.names), data.dropped) == (137, 1271, 16, 80, [])
    assert (data.names[0], data.names[-1]) == ("person", "toothbrush")

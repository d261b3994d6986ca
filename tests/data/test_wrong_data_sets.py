"""Data sets that are wrong in many ways: `yolonas train` says in one sentence what is, or trains on the rest of it.

The sentence is what each case is about: that there is no traceback is not enough to know what to do.
"""

from __future__ import annotations

import json
import math
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from yolonas.cli import main
from yolonas.data.readers import read_dataset
from yolonas.errors import DataError

IMAGES = 5
Case = tuple[Callable[[Path], Any], int, str]


def picture(path: Path, seed: int, orientation: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.random.default_rng(seed).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, exif=exif)
    return path


def run(data: Path, out: Path, *more: object) -> Result:
    quick = ("--model", "n", "--imgsz", 64, "--batch", 2, "--minutes", 0.001, "--device", "cpu", "--workers", 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return CliRunner().invoke(main, ["train", *map(str, ("--data", data, *quick, "--out", out, *more))])
    finally:
        torch.set_num_threads(threads)


def check(result: Result, code: int, sentence: str) -> None:
    assert sentence in result.output
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    if code:
        assert len(result.output.strip().splitlines()) == 1
    else:
        assert "Wrote " in result.output


# -- COCO json ---------------------------------------------------------------------------------------------------------


def document() -> dict[str, Any]:
    """Five images of 64 x 48 with a cat each."""
    return {
        "images": [{"id": k, "file_name": f"{k}.jpg", "width": 64, "height": 48} for k in range(IMAGES)],
        "annotations": [
            {"id": k, "image_id": k, "category_id": 1, "bbox": [10 + k, 10, 20, 20], "iscrowd": 0}
            for k in range(IMAGES)
        ],
        "categories": [{"id": 1, "name": "cat"}],
    }


def coco(folder: Path, content: Any = None, name: str = "labels.json") -> Path:
    for k in range(IMAGES):
        picture(folder / f"{k}.jpg", k)
    content = document() if content is None else content
    path = folder / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def text(content: Any) -> Callable[[Path], Path]:
    """A json file with this content."""
    return lambda folder: coco(folder, content)


def every(kind: str, **values: Any) -> Callable[[Path], Path]:
    """These values in every entry of a kind."""
    return some(kind, IMAGES, **values)


def some(kind: str, count: int, **values: Any) -> Callable[[Path], Path]:
    """These values in the first entries of a kind."""

    def build(folder: Path) -> Path:
        content = document()
        for entry in content[kind][:count]:
            entry.update(values)
        return coco(folder, content)

    return build


def replaced(**keys: Any) -> Callable[[Path], Path]:
    return lambda folder: coco(folder, {**document(), **keys})


def files(change: Callable[[Path], Any], count: int = 1) -> Callable[[Path], Path]:
    """The first image files changed."""

    def build(folder: Path) -> Path:
        path = coco(folder)
        for k in range(count):
            change(folder / f"{k}.jpg")
        return path

    return build


def negative_ids(folder: Path) -> Path:
    content = document()
    content["categories"] = [{"id": -7, "name": "cat"}]
    for k in range(IMAGES):
        content["images"][k]["id"] = content["annotations"][k]["image_id"] = -k
        content["annotations"][k]["category_id"] = -7
    return coco(folder, content)


def corners_for_sizes(folder: Path) -> Path:
    content = document()
    for annotation in content["annotations"]:
        annotation["bbox"] = [30, 20, 60, 40]  # x1, y1, x2, y2
    return coco(folder, content)


def windows_paths(folder: Path) -> Path:
    content = document()
    for entry in content["images"]:
        entry["file_name"] = "C:\\Users\\me\\" + entry["file_name"]
    return coco(folder, content)


def directory_for_image(path: Path) -> None:
    path.unlink()
    path.mkdir()


def symlink_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def bomb(path: Path) -> None:
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\r" + header + struct.pack(">I", zlib.crc32(header)))


def copy_with_other_label(folder: Path) -> Path:
    path = coco(folder)
    (folder / "1.jpg").write_bytes((folder / "0.jpg").read_bytes())
    return path


def copy(folder: Path) -> Path:
    path = some("annotations", 2, bbox=[10, 10, 20, 20])(folder)
    (folder / "1.jpg").write_bytes((folder / "0.jpg").read_bytes())
    return path


def only_validation(folder: Path) -> Path:
    coco(folder, name="val.json")
    coco(folder, name="test.json")
    return folder


def parts(train: Any = None, val: Any = None) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        coco(folder, train, "train.json")
        coco(folder, val, "val.json")
        return folder

    return build


def foreign_class(document: dict[str, Any]) -> dict[str, Any]:
    document["categories"].append({"id": 2, "name": "dog"})
    document["annotations"][0]["category_id"] = 2
    return document


COCO: dict[str, Case] = {
    "syntax": (text('{"images": ['), 1, "labels.json is not JSON: Expecting value in line 1"),
    "empty file": (text(""), 1, "labels.json is not JSON"),
    "latin-1": (text(json.dumps({"name": "Gerät"}, ensure_ascii=False).encode("latin-1")), 1, "is not a UTF-8 text"),
    "utf-16": (text(json.dumps(document()).encode("utf-16")), 1, "is not a UTF-8 text file"),
    "byte order mark": (text(json.dumps(document()).encode("utf-8-sig")), 0, "objects        cat 4"),
    "deep nesting": (text("[" * 100_000), 1, "labels.json is nested too deeply to be a data set"),
    "endless number": (text('{"images": ' + "9" * 5000 + "}"), 1, "holds a number of thousands of digits"),
    "a number": (text("7"), 1, "is not a COCO json file: it holds int, not an object"),
    "images a dict": (
        replaced(images={"0": "0.jpg"}),
        1,
        "labels.json is not a COCO json file: it has no list 'images'",
    ),
    "no categories": (replaced(categories=[]), 1, "labels.json has no categories"),
    "categories of two types": (
        replaced(categories=[{"id": 1, "name": "cat"}, {"id": "2", "name": "dog"}]),
        1,
        "category ids must be all numbers or all texts",
    ),
    "doubled category": (replaced(categories=document()["categories"] * 2), 1, "two categories have the id 1"),
    "doubled image": (replaced(images=document()["images"] * 2), 1, "two images have the id 0 (images[5].id)"),
    "unknown category": (
        every("annotations", category_id=99),
        1,
        "has no object in its 5 training images, so there is nothing to learn; the first reason: annotations[0]: "
        "there is no category with the id 99",
    ),
    "unknown images": (some("annotations", 2, image_id=99), 0, "2 boxes of unknown images, the first: annotations[0]"),
    "negative ids": (negative_ids, 0, "objects        cat 4"),
    "nan and inf": (
        some("annotations", 3, bbox=[math.nan, 1, math.inf, 5]),
        0,
        "left out       3 boxes whose numbers are not finite, the first: 0.jpg: box [nan, 1, nan, 6] has no area",
    ),
    "number beyond floats": (some("annotations", 1, bbox=[10**400, 1, 2, 3]), 1, "bbox must be four numbers"),
    "nested bbox": (some("annotations", 1, bbox=[[1, 2], [3, 4]]), 1, "annotations[0].bbox must be four numbers"),
    "bbox as text": (some("annotations", 1, bbox="1 2 3 4"), 1, "annotations[0].bbox must be four numbers"),
    "bbox as words": (some("annotations", 1, bbox=["a", 2, 3, 4]), 1, "annotations[0].bbox must be four numbers"),
    "swapped corners": (some("annotations", 2, bbox=[30, 30, -20, -20]), 0, "2 boxes without area, the first: 0.jpg:"),
    "corners for sizes": (
        corners_for_sizes,
        0,
        "their numbers may mean something else: COCO's are x, y, width, height",
    ),
    "image without size": (some("images", 1, width=None), 1, "images[0] has no 'width'"),
    "image of no size": (some("images", 1, width=0), 1, "images[0].width must be a positive number of pixels, not 0"),
    "endless image": (some("images", 1, width=math.inf), 1, "width must be a positive number of pixels, not inf"),
    "size of other images": (
        every("images", width=640, height=480),
        1,
        "none of the 5 images can be used; the first:",
    ),
    "labels before exif rotation": (
        files(lambda path: picture(path, 9, orientation=6)),
        0,
        "0.jpg is 48x64 upright, but its labels are for 64x48: they were made before the EXIF rotation",
    ),
    "all images missing": (every("images", file_name="gone.jpg"), 1, "none of its 5 images is there; looked for"),
    "some images missing": (
        files(Path.unlink, 2),
        0,
        "2 images that are missing, the first: 0.jpg: the image is missing",
    ),
    "a name too long": (some("images", 1, file_name="x" * 5000), 0, "1 images that are missing: xxx"),
    "a name with a null byte": (some("images", 1, file_name="a\0.jpg"), 0, "1 images that are missing: a"),
    "windows paths": (windows_paths, 0, "objects        cat 4"),
    "directory for an image": (files(directory_for_image), 0, "1 images that are missing: 0.jpg"),
    "symlink loop": (files(symlink_loop), 0, "1 images that are missing: 0.jpg"),
    "truncated image": (files(cut), 0, "0.jpg is a truncated JPEG file: its end is missing"),
    "empty image": (files(lambda path: path.write_bytes(b"")), 0, "1 images that cannot be read: "),
    "text for an image": (files(lambda path: path.write_text("hello")), 0, "0.jpg is damaged, or not an image"),
    "no image is one": (files(lambda path: path.write_text("x"), 5), 1, "none of the 5 images can be used; the first:"),
    "pixel bomb": (files(bomb), 0, "0.jpg declares 3600000000 pixels, and more than 268435456 are not read"),
    "copy": (copy, 0, "1 copies of other images: "),
    "copy with another label": (copy_with_other_label, 0, "1 pictures are there more than once with different labels"),
    "no objects": (replaced(annotations=[]), 1, "has no object in its 5 training images, so there is nothing to learn"),
    "no images": (replaced(images=[]), 1, "has no image to train on"),
    "one image": (replaced(images=document()["images"][:1]), 0, "4 boxes of unknown images, the first: annotations[1]"),
    "no train part": (only_validation, 1, "has the parts val, test but no part train"),
    "the same images in both parts": (parts(), 0, "5 of 5 validation images are among the training images"),
    "other classes in val": (
        parts(val={**document(), "categories": [{"id": 1, "name": "dog"}]}),
        1,
        "no class in common: the model knows cat; the data has dog",
    ),
    "more classes in val": (
        parts(val=foreign_class(document())),
        0,
        "classes of the validation images that the training images lack, never found: dog 1",
    ),
    "val without images": (parts(val={**document(), "images": []}), 0, "0 images, 0 objects"),
}


# -- YOLO folders and data.yaml ----------------------------------------------------------------------------------------


def yolo(lines: str = "0 0.5 0.5 0.25 0.25\n", **contents: Any) -> Callable[[Path], Path]:
    """A YOLO folder; `contents` are files, "classes" for classes.txt, None for none."""

    def build(folder: Path) -> Path:
        for k in range(IMAGES):
            picture(folder / "images" / f"{k}.jpg", k)
            (folder / "labels").mkdir(exist_ok=True)
            (folder / "labels" / f"{k}.txt").write_text(lines if k else "0 0.5 0.5 0.5 0.5\n")
        for name, content in {"classes": "cat\n", **contents}.items():
            if content is not None:
                path = folder / name.replace("__", "/")
                path = path.with_suffix(path.suffix or ".txt")
                path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content)
        return folder

    return build


def without(name: str, builder: Callable[[Path], Path]) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        path = builder(folder)
        for file in sorted(folder.glob(name)):
            file.unlink()
        return path

    return build


def yaml(content: str) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        yolo()(folder)
        (folder / "data.yaml").write_text(content)
        return folder / "data.yaml"

    return build


YOLO: dict[str, Case] = {
    "words for numbers": (yolo("cat 0.5 0.5 0.1 0.1\n"), 1, "line 1: 'cat 0.5 0.5 0.1 0.1' are not numbers"),
    "too few columns": (yolo("0 0.5 0.5 0.1\n"), 1, "line 1: a class and 4 numbers are needed, not 4 columns"),
    "classes from one": (yolo("1 0.5 0.5 0.1 0.1\n"), 0, "4 boxes of unknown classes, the first:"),
    "negative class": (yolo("-1 0.5 0.5 0.1 0.1\n"), 0, "line 1: there is no class -1 among 1"),
    "nan": (yolo("0 nan 0.5 0.1 0.1\n"), 0, "4 boxes whose numbers are not finite"),
    "pixels for shares": (yolo("0 32 24 10 10\n"), 0, "YOLO's are the centre and the size as shares of the image"),
    "swapped corners": (yolo("0 0.5 0.5 -0.1 -0.1\n"), 0, "4 boxes without area, the first:"),
    "doubled boxes": (yolo("0 .5 .5 .2 .2\n0 .5 .5 .2 .2\n"), 0, "4 boxes that are there twice"),
    "no classes": (yolo(classes=None), 1, "does not name its classes: put one name a line into"),
    "empty classes": (yolo(classes="\n"), 1, "classes.txt must name each class once, one a line, not []"),
    "doubled classes": (yolo(classes="cat\ncat\n"), 1, "must name each class once"),
    "binary labels": (yolo(labels__1=b"\xff\xfe0\0"), 1, "1.txt is not a UTF-8 text file"),
    "no labels": (without("labels/*.txt", yolo()), 1, "no image has a label file; looked for"),
    "no images": (without("images/*.jpg", yolo()), 1, "images holds no image (looked for .jpg, "),
    "yaml syntax": (yaml("train: [images\nval: {"), 1, "data.yaml is not YAML: line"),
    "yaml objects": (yaml("!!python/object/apply:os.system ['true']"), 1, "data.yaml is not YAML: line 1"),
    "yaml list": (yaml("- train\n- val\n"), 1, "does not describe a data set: it needs the keys names, train and val"),
    "yaml without names": (yaml("train: images\n"), 1, "data.yaml: names must list the class names"),
    "yaml with a gap": (yaml("train: images\nnames: {0: cat, 2: dog}\n"), 1, "names must be numbered 0 to 1"),
    "yaml with doubled names": (yaml("train: images\nnames: [cat, cat]\n"), 1, "names must list each class once"),
    "yaml with another nc": (yaml("train: images\nnc: 3\nnames: [cat]\n"), 1, "nc is 3, but names lists 1 classes"),
    "yaml without the folder": (
        yaml("train: pictures\nnames: [cat]\n"),
        1,
        "train names 'pictures', which is not there",
    ),
    "yaml with a nested list": (yaml("train: [[images]]\nnames: [cat]\n"), 1, "which is not there (looked for"),
    "yaml without train": (yaml("val: images\nnames: [cat]\n"), 1, "has the parts val but no part train"),
    "list of missing images": (
        lambda folder: (yaml("train: a.txt\nnames: [cat]\n")(folder), (folder / "a.txt").write_text("D:\\x.jpg\n"))[0],
        1,
        "none of 1 images can be used; the first:",
    ),
}


# -- Label Studio ------------------------------------------------------------------------------------------------------


def tasks(image: str = "{k}.jpg", **changes: Any) -> list[dict[str, Any]]:
    region = {
        "type": "rectanglelabels",
        "from_name": "label",
        "to_name": "image",
        "value": {"x": 10, "y": 10, "width": 50, "height": 50, "rotation": 0, "rectanglelabels": ["cat"], **changes},
    }
    return [
        {"id": k, "data": {"image": image.format(k=k)}, "annotations": [{"id": k, "result": [region]}]}
        for k in range(IMAGES)
    ]


def with_config(xml: str) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        (folder / "label_config.xml").write_text(xml)
        return coco(folder, tasks())

    return build


OTHER_CONFIG = (
    '<View><Image name="image" value="$image"/><RectangleLabels name="label" toName="image"><Label value="dog"/>'
    "</RectangleLabels></View>"
)
LABEL_STUDIO: dict[str, Case] = {
    "empty list": (text([]), 1, "labels.json holds an empty list: export a project with labelled tasks"),
    "list of numbers": (text([1, 2]), 1, "is no list of Label Studio tasks: item 0 is a int"),
    "coco results": (text([{"image_id": 1, "bbox": [1, 2, 3, 4]}]), 1, "holds a list, but not of Label Studio's tasks"),
    "not labelled": (text([{"id": 1, "data": {"image": "0.jpg"}}]), 1, "has no rectangle with a label"),
    "images on a server": (
        text(tasks("https://example.org/photo{k}.jpg")),
        1,
        "yolonas-labelstudio pull fetches a project with its images",
    ),
    "numbers that are none": (
        text([*tasks(), *tasks(x="left"), *tasks(width=None)]),
        0,
        "10 boxes without area, the first: task 0: rectangle ['left', 10, 50, 50] is less than 1 px",
    ),
    "no labels of the config": (with_config(OTHER_CONFIG), 1, "there is no label 'cat' in the label config"),
    "broken config": (with_config("<View><Image"), 1, "label_config.xml: the label config is not well-formed XML"),
    "annotations of another type": (
        text([*tasks(), {"id": 9, "data": {"image": "1.jpg"}, "annotations": "none"}, {"id": 10, "data": None}]),
        0,
        "2 tasks that are not labelled, the first: task 9 has no submitted annotation",
    ),
}


# -- no data set at all ------------------------------------------------------------------------------------------------

NONE: dict[str, Case] = {
    "nothing there": (lambda folder: folder / "gone", 1, "no data set at"),
    "empty folder": (lambda folder: folder, 1, "holds no data set: no COCO json, no data.yaml, and no folder images/"),
    "an image": (
        lambda folder: picture(folder / "a.jpg", 0),
        1,
        "is no data set: give a COCO or Label Studio json file",
    ),
    "folder named as json": (
        lambda folder: ((folder / "a.json").mkdir(), folder / "a.json")[1],
        1,
        "a.json cannot be read: Is a directory",
    ),
}

CASES = {
    f"{kind}: {name}": case
    for kind, table in (("COCO", COCO), ("YOLO", YOLO), ("Label Studio", LABEL_STUDIO), ("none", NONE))
    for name, case in table.items()
}


@pytest.mark.parametrize(("build", "code", "sentence"), CASES.values(), ids=CASES.keys())
def test_a_wrong_data_set(tmp_path: Path, build: Callable[[Path], Path], code: int, sentence: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    result = run(build(folder), tmp_path / "run")
    check(result, code, sentence)
    kept = tmp_path / "run" / "data_report.txt"
    assert kept.is_file() == (code == 0)


def test_there_are_thirty_and_more() -> None:
    assert len(CASES) >= 30


JUNK = [
    *(None, True, 0, -1, 10**30, 10**400, 1e300, math.nan, -math.inf, "", "x", "1", "\0", "../" * 40, [], [[]], {}),
    *([1, 2, 3, 4], {"id": 1}, [None], ["x"], {"rectanglelabels": 5}, [{"rectanglelabels": [["x"]]}]),
]


def spoiled(rng: np.random.Generator, value: Any) -> Any:
    """A copy of a json value in which one thing, somewhere, is replaced, removed or doubled."""
    if not isinstance(value, list | dict) or not value or rng.random() < 0.1:
        return JUNK[rng.integers(len(JUNK))]
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = keys[rng.integers(len(keys))]
    changed = value.copy()
    if rng.random() < 0.1:
        del changed[key]
    elif isinstance(value, list) and rng.random() < 0.1:
        changed.append(value[key])
    else:
        changed[key] = spoiled(rng, value[key])
    return changed


def json_min() -> list[dict[str, Any]]:
    def item(task: dict[str, Any]) -> dict[str, Any]:
        (annotation,) = task["annotations"]
        return {**task["data"], "id": task["id"], "label": [r["value"] for r in annotation["result"]], "annotator": 1}

    return [item(task) for task in tasks()]


@pytest.mark.parametrize("content", [document(), tasks(), json_min()], ids=["COCO", "Label Studio", "JSON_MIN"])
def test_a_json_file_with_anything_wrong_is_read_or_gets_a_sentence(tmp_path: Path, content: Any) -> None:
    path = coco(tmp_path)
    rng = np.random.default_rng(0)
    read, refused, sentences = 0, 0, set[str]()
    for _ in range(300):
        wrong = spoiled(rng, content)
        path.write_text(json.dumps(wrong))
        try:
            data = read_dataset(path)
        except DataError as error:
            sentences.add(str(error))
            refused += 1
            continue
        read += 1
        for image in data.images:
            assert (image.boxes[:, 2:] > image.boxes[:, :2]).all(), wrong
            assert (image.boxes >= 0).all(), wrong
            assert (image.boxes <= (image.width, image.height) * 2).all(), wrong
            assert ((image.labels >= 0) & (image.labels < len(data.names))).all(), wrong
    assert read > 50
    assert refused > 50
    assert all(sentence.startswith(str(path)) and "\n" not in sentence for sentence in sentences), sentences


@contextmanager
def as_nobody() -> Iterator[None]:
    """Without root's right to read everything; pytest's folders are open to their owner only."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("name", [".", "labels.json"])
def test_a_data_set_that_may_not_be_read(tmp_path: Path, name: str) -> None:
    path = coco(tmp_path)
    tmp_path.chmod(0)
    try:
        with as_nobody():
            result = run(path.parent / name, tmp_path.parent / "run")
    finally:
        tmp_path.chmod(0o700)
    check(result, 1, "cannot be read: Permission denied")

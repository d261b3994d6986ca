"""COCO json files, and which json files of a folder hold which part."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from yolonas.data.image_files import image_folders, locate
from yolonas.data.labelled import BoxList, LabelledImages, Remark
from yolonas.errors import DataError

_PART = re.compile(r"(?:^|[_\-./])(train|valid|validation|val|test)(?:\d{4})?(?:$|[_\-./])")

_LONGEST_SIDE = 1 << 20  # px; more is a mistake


def find(folder: Path) -> dict[str, Path]:
    """The json files of a folder, by the part they hold: {"train": ..., "val": ...}, or {"": the only one}.

    Known layouts: `train.json`; `annotations/instances_train2017.json`; `train/_annotations.coco.json`.
    Of `annotations/` only the files named `instances_*` count: COCO keeps captions and key points there too.
    A folder with a classes.txt is a YOLO folder, whatever json lies in it.
    """
    if (folder / "classes.txt").is_file():
        return {}
    files = [*folder.glob("*.json"), *folder.glob("annotations/*.json"), *folder.glob("*/_annotations.coco.json")]
    instances = [file for file in files if file.stem.startswith("instances_")]
    if any(file.parent.name == "annotations" for file in instances):
        files = instances
    parts: dict[str, Path] = {}
    for file in sorted(files):
        match = _PART.search(str(file.relative_to(folder).with_suffix("")))
        if match is not None:
            parts.setdefault({"valid": "val", "validation": "val"}.get(match[1], match[1]), file)
    if parts:
        return {part: parts[part] for part in ("train", "val", "test") if part in parts}
    return {"": files[0]} if len(files) == 1 else {}


def read(path: Path, document: Any, images_dir: Path | None = None) -> LabelledImages:
    """The data set of a COCO json file with this content; labels number the categories by ascending id.

    Equal names are one class. Width and height are those that the file tells, not those of the images. See
    `yolonas.data.readers.read_dataset` for what is dropped and raised.
    """
    document = _checked(path, document)
    names, label_of = _categories(path, document["categories"])
    folders = [images_dir] if images_dir is not None else image_folders(path)
    dropped: list[str] = []
    changed: list[str] = []
    boxes: dict[Any, BoxList] = {}
    files: dict[Any, Path | None] = {}
    for i, entry in enumerate(document["images"]):
        where = f"images[{i}]"
        key, file_name = _get(path, entry, "id", where), str(_get(path, entry, "file_name", where))
        if key in files:
            raise DataError(f"{path}: two images have the id {key!r} ({where}.id)")
        files[key] = file = locate([file_name], folders)
        if file is None:
            dropped.append(Remark(f"{file_name}: the image is missing", "images that are missing"))
            continue
        width, height = (_positive(path, entry, side, where) for side in ("width", "height"))
        boxes[key] = BoxList(file_name, width, height, dropped, changed)
    if files and not boxes:
        raise DataError(
            f"{path}: none of its {len(files)} images is there; looked for {document['images'][0]['file_name']!r} in "
            f"{', '.join(map(str, folders))}"
        )
    for i, entry in enumerate(document["annotations"]):
        where = f"annotations[{i}]"
        key = _get(path, entry, "image_id", where)
        if files.get(key, path) is None:
            continue  # the image is missing, which has its line already
        if key not in boxes:
            dropped.append(Remark(f"{where}: there is no image with the id {key!r}", "boxes of unknown images"))
        elif (category := _get(path, entry, "category_id", where)) not in label_of:
            line = f"{where}: there is no category with the id {category!r}"
            dropped.append(Remark(line, "boxes of unknown categories"))
        elif not entry.get("bbox"):
            dropped.append(Remark(f"{where}: it has no bbox", "annotations without a bbox"))
        else:
            x, y, width_, height_ = _bbox(path, entry["bbox"], where)
            boxes[key].add((x, y, x + width_, y + height_), label_of[category], bool(entry.get("iscrowd", 0)))
    # Ids that are no integers (some tools write names) are numbered, since pycocotools sorts and compares them.
    whole = all(type(key) is int for key in boxes)
    images = [
        box_list.labelled(file, key if whole else i)
        for i, (key, box_list) in enumerate(boxes.items(), start=1)
        if (file := files[key]) is not None
    ]
    return LabelledImages(names, images, dropped, changed)


def _checked(path: Path, document: Any) -> dict[str, list[Any]]:
    if not isinstance(document, dict):
        raise DataError(f"{path} is not a COCO json file: it holds {type(document).__name__}, not an object")
    for key in ("images", "annotations", "categories"):
        if not isinstance(document.get(key), list):
            raise DataError(f"{path} is not a COCO json file: it has no list {key!r}")
    return document


def _categories(path: Path, entries: list[Any]) -> tuple[tuple[str, ...], dict[Any, int]]:
    """Class names by ascending category id, and the label of each id."""
    name_of: dict[Any, str] = {}
    for i, entry in enumerate(entries):
        key = _get(path, entry, "id", f"categories[{i}]")
        if key in name_of:
            raise DataError(f"{path}: two categories have the id {key!r} (categories[{i}].id)")
        name_of[key] = str(_get(path, entry, "name", f"categories[{i}]"))
    if not name_of:
        raise DataError(f"{path} has no categories")
    try:
        keys = sorted(name_of)
    except TypeError as error:
        raise DataError(f"{path}: category ids must be all numbers or all texts, not {list(name_of)}") from error
    names = tuple(dict.fromkeys(name_of[key] for key in keys))
    return names, {key: names.index(name_of[key]) for key in keys}


def _get(path: Path, entry: Any, key: str, where: str) -> Any:
    if not isinstance(entry, dict) or entry.get(key) is None or isinstance(entry[key], list | dict):
        raise DataError(f"{path}: {where} has no {key!r}")
    return entry[key]


def _positive(path: Path, entry: dict[str, Any], key: str, where: str) -> int:
    value = _get(path, entry, key, where)
    if not isinstance(value, int | float) or not 1 <= value <= _LONGEST_SIDE:
        raise DataError(f"{path}: {where}.{key} must be a positive number of pixels, not {value!r}")
    return int(value)


def _bbox(path: Path, value: Any, where: str) -> tuple[float, float, float, float]:
    try:
        x, y, width, height = (float(v) for v in value if isinstance(value, list))
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{path}: {where}.bbox must be four numbers [x, y, width, height], not {value!r}") from error
    return x, y, width, height

"""Label Studio's exports: JSON, JSON_MIN, and tasks as its API lists them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from yolonas.data.image_files import image_folders, locate
from yolonas.data.labelled import BoxList, LabelledImage, LabelledImages, Remark
from yolonas.errors import DataError
from yolonas.inference.sources import IMAGE_SUFFIXES, image_size
from yolonas.labelstudio import (
    Control,
    LabelConfigError,
    boxes_from_annotation,
    choose_annotation,
    class_names,
    controls_by_image,
    parse_label_config,
)

CONFIG = "label_config.xml"  # beside the json; without it the labels come in the order of their first appearance
_SAME_SHAPE = 0.02  # two aspect ratios that differ by less are one picture at two sizes


def fits(document: Any) -> bool:
    """Whether this content of a json file is a list of tasks, and not COCO's object."""
    return isinstance(document, list) or (isinstance(document, dict) and isinstance(document.get("tasks"), list))


def read(path: Path, document: Any, images_dir: Path | None = None) -> LabelledImages:
    """The data set of a Label Studio json file with this content.

    Of several annotations of a task one counts, as `yolonas.labelstudio.choose_annotation` says; tasks without any are
    left out, one without regions is an image without objects. Images are looked for by path and by name, as those of a
    COCO json file. See `yolonas.data.readers.read_dataset` for what is dropped and raised.
    """
    tasks = _tasks(path, document if isinstance(document, list) else document["tasks"])
    labelled = [(task, choose_annotation(task["annotations"])) for task in tasks]
    controls = _controls(path, tasks, [annotation["result"] for _, annotation in labelled if annotation is not None])
    names = class_names(controls)
    folders = [images_dir] if images_dir is not None else image_folders(path)
    data = LabelledImages(names, [])
    looked_for: list[str] = []
    for task, annotation in labelled:
        where = f"task {task.get('id', '?')}"
        if annotation is None:
            data.dropped.append(Remark(f"{where} has no submitted annotation", "tasks that are not labelled"))
            continue
        _remark_other_regions(annotation["result"], where, data.dropped)
        by_image = controls_by_image(controls, task["data"])
        if not by_image:
            data.dropped.append(Remark(f"{where} names no image", "tasks without an image"))
        for value, used in by_image.items():
            file = locate(_file_names(value, task), folders)
            if file is None:
                looked_for.append(_brief(value))
                line = f"{where}: {_brief(value)} is not here; yolonas-labelstudio pull fetches a project's images"
                data.dropped.append(Remark(line, "images that are missing"))
                continue
            try:
                size = image_size(file)
            except DataError as error:
                data.dropped.append(Remark(str(error), "images that cannot be read"))
                continue
            image = labelled_image(
                annotation["result"], used, names, file, size, len(data) + 1, where, data.dropped, data.changed
            )
            data.images.append(image)
    if looked_for and not data.images:
        raise DataError(
            f"{path}: none of its {len(looked_for)} images is here; looked for {looked_for[0]!r} in "
            f"{', '.join(map(str, folders))}; yolonas-labelstudio pull fetches a project with its images"
        )
    if not data.images:
        why = f"; the first: {data.dropped[0]}" if data.dropped else ""
        raise DataError(f"{path}: none of its {len(tasks)} tasks can be used{why}")
    return data


def labelled_image(
    result: Sequence[Mapping[str, Any]],
    controls: Iterable[Control],
    names: Sequence[str],
    path: Path,
    size: tuple[int, int],
    image_id: int,
    where: str,
    dropped: list[str] | None = None,
    changed: list[str] | None = None,
) -> LabelledImage:
    """One image of `size` (height, width) with the boxes that the controls drew on it in an annotation's `result`.

    Lines on what is left out, and what is not as it was drawn, go to `dropped` and `changed`, beginning with `where`.
    """
    height, width = size
    dropped = [] if dropped is None else dropped
    changed = [] if changed is None else changed
    boxes = BoxList(where, width, height, dropped, changed)
    for control in controls:
        left_out: list[Remark] = []
        rows, labels = boxes_from_annotation(result, control, width, height, dropped=left_out)
        dropped += [Remark(f"{where}: {line}", line.subject) for line in left_out]
        for row, label in zip(rows.tolist(), labels, strict=True):
            boxes.add(row, names.index(label))
    drawn = next((r for r in result if isinstance(r, Mapping) and _other_shape(r, width, height)), None)
    if drawn is not None:
        line = (
            f"{where}: drawn on a picture of {drawn['original_width']}x{drawn['original_height']}, but {path.name} is "
            f"{width}x{height} upright; percent are taken of the latter"
        )
        changed.append(Remark(line, "images of another shape than what was labelled"))
    return boxes.labelled(path, image_id)


def _other_shape(region: Mapping[str, Any], width: int, height: int) -> bool:
    w, h = region.get("original_width"), region.get("original_height")
    if not (isinstance(w, int | float) and isinstance(h, int | float) and w > 1 and h > 1):
        return False  # scripts that import predictions often leave it out, or write 1
    return bool(abs(w * height / (h * width) - 1) > _SAME_SHAPE)


def _tasks(path: Path, items: list[Any]) -> list[dict[str, Any]]:
    """The tasks with `data` and `annotations`, whatever the format."""
    if not items:
        raise DataError(f"{path} holds an empty list: export a project with labelled tasks")
    for number, item in enumerate(items):
        if not isinstance(item, dict):
            raise DataError(f"{path} is no list of Label Studio tasks: item {number} is a {type(item).__name__}")
    if any(isinstance(item.get("data"), dict) for item in items):
        return [
            {
                **item,
                "data": item["data"] if isinstance(item.get("data"), dict) else {},
                "annotations": [a for a in item.get("annotations") or () if isinstance(a, dict)]
                if isinstance(item.get("annotations"), list | None)
                else [],
            }
            for item in items
        ]
    if any("annotation_id" in item or "annotator" in item or any(map(_drawn, item.values())) for item in items):
        return _tasks_of_json_min(items)
    raise DataError(
        f"{path} holds a list, but not of Label Studio's tasks, which have data and annotations; COCO json is an object"
    )


def _tasks_of_json_min(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """JSON_MIN has an item for each annotation; the task's values and the regions of each tag are its keys."""
    tasks: dict[Any, dict[str, Any]] = {}
    for number, item in enumerate(items):
        key = item.get("id") if isinstance(item.get("id"), int | str) else f"item {number}"
        regions = {name: value for name, value in item.items() if _drawn(value)}
        result = [
            {
                **{side: shape[side] for side in ("original_width", "original_height") if side in shape},
                "type": "rectanglelabels",
                "from_name": name,
                "value": shape,
            }
            for name, shapes in regions.items()
            for shape in shapes
            if isinstance(shape, dict) and "rectanglelabels" in shape
        ]
        data = {name: value for name, value in item.items() if name not in regions}
        task = tasks.setdefault(key, {"id": key, "data": data, "annotations": []})
        if item.get("annotation_id", number) is not None:  # None: of an export of all tasks, one without annotation
            stamps = {name: item.get(name) for name in ("created_at", "updated_at")}
            task["annotations"].append({"id": item.get("annotation_id"), "result": result, **stamps})
    return list(tasks.values())


def _drawn(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(shape, dict) and "rectanglelabels" in shape for shape in value)


def _controls(path: Path, tasks: Sequence[Mapping[str, Any]], results: Iterable[Sequence[Any]]) -> list[Control]:
    """The tags that drew the boxes: of the label config beside the json, or as far as the boxes tell."""
    config = path.parent / CONFIG
    if config.is_file():
        try:
            tags = parse_label_config(config.read_text(encoding="utf-8-sig"))
            controls = [c for c in tags if c.media == "image" and not c.skip]
        except (OSError, ValueError) as error:  # LabelConfigError and UnicodeDecodeError are ValueErrors
            reason = error if isinstance(error, LabelConfigError) else "it is not a readable UTF-8 text file"
            raise DataError(f"{config}: {reason}") from error
        if not class_names(controls):
            raise DataError(f"{config} has no RectangleLabels on an Image, so there is nothing to learn")
        return controls
    labels: dict[tuple[str, str], dict[str, None]] = {}
    for result in results:
        for region in result:
            value = region.get("value") if isinstance(region, Mapping) else None
            if isinstance(value, Mapping) and isinstance(value.get("rectanglelabels"), list):
                tag = (str(region.get("from_name")), str(region.get("to_name", "image")))
                labels.setdefault(tag, {}).update((str(label), None) for label in value["rectanglelabels"])
    if not labels:
        raise DataError(f"{path} has no rectangle with a label (RectangleLabels), so there is nothing to learn")
    keys = Counter(key for task in tasks for key, value in task["data"].items() if _is_image(value))
    usual = keys.most_common(1)[0][0] if keys else "image"
    return [
        Control(from_name, to_name, to_name if to_name in keys else usual, tuple(found))
        for (from_name, to_name), found in labels.items()
    ]


def _is_image(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    path = value.partition("?")[0].lower()
    return path.endswith(IMAGE_SUFFIXES) or value.startswith(("/data/", "data:image/")) or "://" in value


def _file_names(value: str, task: Mapping[str, Any]) -> list[str]:
    """What the file of a task's image may be called: a path relative to some folder, or its last part."""
    if value.startswith("data:"):
        return []
    names = [value]
    try:
        parts = urlsplit(value)
        path = unquote(parts.path).lstrip("/")
        if path.endswith("data/local-files/"):
            path = parse_qs(parts.query).get("d", [""])[0]
        names += [path, path.removeprefix("data/upload/")]
    except ValueError:  # no URL: a name with brackets
        path = value
    # An upload is kept under its own name behind eight hexadecimal digits.
    names.append(re.sub(r"^[0-9a-f]{8}-", "", Path(path).name))
    if isinstance(task.get("file_upload"), str):
        names.append(task["file_upload"])
    return [name for name in names if name.strip("./")]


def _remark_other_regions(result: Sequence[Any], where: str, dropped: list[str]) -> None:
    for region in result:
        kind = region.get("type") if isinstance(region, Mapping) else type(region).__name__
        if kind in ("polygonlabels", "brushlabels", "ellipselabels", "keypointlabels", "rectangle", "polygon", "brush"):
            dropped.append(Remark(f"{where}: a region of type {kind}", "regions that are not RectangleLabels"))


def _brief(value: str) -> str:
    return value if len(value) <= 100 else value[:97] + "..."

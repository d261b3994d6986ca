"""YOLO folders (`images/`, `labels/`, `classes.txt`) and Ultralytics' `data.yaml`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from yolonas.data.labelled import BoxList, LabelledImage, LabelledImages, Remark
from yolonas.errors import DataError
from yolonas.inference.sources import IMAGE_SUFFIXES, image_size

_FOLDERS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}


def yaml_splits(path: Path) -> tuple[str, ...]:
    """The parts that a data.yaml names."""
    document = _load_yaml(path)
    return tuple(split for split, keys in _FOLDERS.items() if any(document.get(key) for key in keys))


def read_yaml(path: Path, split: str) -> LabelledImages:
    """Read one part of a data set that a data.yaml describes: a folder, a text file of paths, or a list of these."""
    document = _load_yaml(path)
    names = _names(path, document)
    entries = next(document[key] for key in _FOLDERS[split] if document.get(key))
    here = path.parent
    root = document.get("path")
    roots = [here / str(root), here] if root else [here]
    files: list[Path] = []
    for entry in entries if isinstance(entries, list) else [entries]:
        place = _place(path, split, str(entry), roots)
        files += _listed_images(place, roots) if place.is_file() else _images_below(place)
    return _read(names, files)


def folder_splits(folder: Path) -> tuple[str, ...]:
    """The parts of a YOLO folder: those with `images/<part>/` or `<part>/images/`."""
    return tuple(split for split in _FOLDERS if _images_folder(folder, split) is not None)


def read_folder(folder: Path, split: str | None) -> LabelledImages:
    """Read a YOLO folder, or the part of it that `split` names; class names come from its classes.txt."""
    images = _images_folder(folder, split) if split else folder / "images"
    if images is None or not images.is_dir():
        raise DataError(f"{folder} holds no data set: no COCO json, no data.yaml, and no folder images/")
    lists = [folder / "classes.txt", folder / "labels" / "classes.txt", images.parent / "classes.txt"]
    listed = next((file for file in lists if file.is_file()), None)
    if listed is None:
        raise DataError(f"{folder} does not name its classes: put one name a line into {lists[0]}")
    names = tuple(line.strip() for line in _read_text(listed).splitlines() if line.strip())
    if not names or len(set(names)) != len(names):
        raise DataError(f"{listed} must name each class once, one a line, not {list(names)}")
    return _read(names, _images_below(images))


def label_path(image: Path) -> Path:
    """Where an image's boxes are: its path with the last folder `images` called `labels`, and the suffix .txt."""
    parts = list(image.parts)
    for i in range(len(parts) - 2, -1, -1):
        if parts[i] == "images":
            parts[i] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def _read(names: tuple[str, ...], files: list[Path]) -> LabelledImages:
    dropped: list[str] = []
    changed: list[str] = []
    images: list[LabelledImage] = []
    for path in dict.fromkeys(files):
        if not path.is_file():
            dropped.append(Remark(f"{path}: the image is missing", "images that are missing"))
            continue
        try:
            height, width = image_size(path)
        except DataError as error:
            dropped.append(Remark(str(error), "images that cannot be read"))
            continue
        boxes = BoxList(str(path), width, height, dropped, changed)
        labels = label_path(path)
        if labels.is_file():  # none: nothing is in the image
            _add_lines(labels, names, boxes)
        images.append(boxes.labelled(path, len(images) + 1))
    if images and not any(label_path(image.path).is_file() for image in images):
        line = f"no image has a label file; looked for {label_path(images[0].path)}"
        changed.append(Remark(line, "parts without any label file, taken as images without objects"))
    if not images:
        raise DataError(f"none of {len(files)} images can be used; the first: {dropped[0]}")
    return LabelledImages(names, images, dropped, changed)


def _add_lines(path: Path, names: tuple[str, ...], boxes: BoxList) -> None:
    """Add the boxes of a label file: lines of `class cx cy w h`, or `class x1 y1 x2 y2 x3 y3 ...` (a polygon)."""
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            label, *values = (float(word) for word in line.split())
        except ValueError as error:
            raise DataError(f"{path}, line {number}: {line.strip()!r} are not numbers") from error
        if not label.is_integer():
            raise DataError(f"{path}, line {number}: the class must be a whole number, not {label:g}")
        if len(values) == 4:
            cx, cy, w, h = values
            corners = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
        elif len(values) >= 6 and len(values) % 2 == 0:
            corners = (min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2]))
        else:
            raise DataError(f"{path}, line {number}: a class and 4 numbers are needed, not {len(values) + 1} columns")
        if not 0 <= label < len(names):
            line = f"{path}, line {number}: there is no class {label:g} among {len(names)}"
            boxes.dropped.append(Remark(line, "boxes of unknown classes"))
            continue
        boxes.add([v * side for v, side in zip(corners, (boxes.width, boxes.height) * 2, strict=True)], int(label))


def _load_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        document = yaml.safe_load(_read_text(path))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise DataError(f"{path} is not YAML{f': line {mark.line + 1}' if mark else ''}") from error
    if not isinstance(document, dict):
        raise DataError(f"{path} does not describe a data set: it needs the keys names, train and val")
    return document


def _names(path: Path, document: dict[str, Any]) -> tuple[str, ...]:
    names = document.get("names")
    if isinstance(names, dict):
        if sorted(names, key=str) != sorted(range(len(names)), key=str):
            raise DataError(f"{path}: names must be numbered 0 to {len(names) - 1}, not {list(names)}")
        names = [names[i] for i in range(len(names))]
    if not isinstance(names, list) or not names:
        raise DataError(f"{path}: names must list the class names")
    count = document.get("nc", len(names))
    if count != len(names):
        raise DataError(f"{path}: nc is {count}, but names lists {len(names)} classes")
    if len({str(name) for name in names}) != len(names):
        raise DataError(f"{path}: names must list each class once, not {names}")
    return tuple(str(name) for name in names)


def _place(path: Path, split: str, entry: str, roots: list[Path]) -> Path:
    # Roboflow writes ../train/images for a folder beside the data.yaml.
    candidates = [root / name for name in (entry, entry.removeprefix("../")) for root in roots]
    for candidate in candidates:
        if candidate.exists():
            return candidate
    raise DataError(f"{path}: {split} names {entry!r}, which is not there (looked for {candidates[0]})")


def _listed_images(listing: Path, roots: list[Path]) -> list[Path]:
    """The images that a text file lists, one a line: absolute, relative to the data set, or `./` to the text file."""
    files = []
    for line in filter(None, map(str.strip, _read_text(listing).splitlines())):
        places = (
            [listing.parent / line] if line.startswith("./") else [root / line for root in [*roots, listing.parent]]
        )
        files.append(next((place for place in places if place.is_file()), places[0]))
    return files


def _images_below(folder: Path) -> list[Path]:
    files: Iterable[Path] = (Path(root, name) for root, _, names in os.walk(folder) for name in names)
    found = sorted(file for file in files if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith("."))
    if not found:
        raise DataError(f"the folder {folder} holds no image (looked for {', '.join(IMAGE_SUFFIXES)})")
    return found


def _images_folder(folder: Path, split: str) -> Path | None:
    names = _FOLDERS.get(split, (split,))
    candidates = [place for name in names for place in (folder / "images" / name, folder / name / "images")]
    return next((place for place in candidates if place.is_dir()), None)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not a UTF-8 text file") from error

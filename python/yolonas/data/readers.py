"""Data sets on disk: which format a path holds, and which parts (train, val, test) it has."""

from __future__ import annotations

from pathlib import Path

from yolonas.data import coco_reader, label_studio_reader, yolo_reader
from yolonas.data.image_files import read_json
from yolonas.data.labelled import LabelledImage, LabelledImages
from yolonas.errors import DataError

__all__ = ["LabelledImage", "LabelledImages", "read_dataset", "splits"]

_YAML = (".yaml", ".yml")


def read_dataset(path: Path | str, split: str | None = None, *, images_dir: Path | str | None = None) -> LabelledImages:
    """Read a data set, or the part of it that `split` names.

    path is one of: a COCO json file, or a Label Studio export (JSON or JSON_MIN, its `label_config.xml` beside it), its
    images beside it, in `images/`, in a folder named as the file, or in `images_dir` (one file is one part, so `split`
    is not looked at); an Ultralytics `data.yaml`; a YOLO folder with `images/`, `labels/` and `classes.txt`; or a
    folder that holds one of these, or one json file for each part. Without a split a data set must be one whole; see
    `splits`.

    Images without objects are kept. Boxes are clipped to their image, which is noted in `.changed` where it is more
    than rounding; boxes without area or outside their image, exact duplicates, unknown categories and missing images
    are left out, each with a line in `.dropped`.
    Raises DataError in one sentence for everything else, naming the file and what is wrong in it.
    """
    try:
        return _read(Path(path), split, Path(images_dir) if images_dir is not None else None)
    except OSError as error:  # a folder that may not be looked into
        raise DataError(f"{error.filename or path} cannot be read: {error.strerror or error}") from error


def _read(path: Path, split: str | None, images_dir: Path | None) -> LabelledImages:
    if not path.exists():
        raise DataError(f"no data set at {path}: give a COCO or Label Studio json file, a data.yaml or a folder")
    if path.suffix.lower() == ".json":
        return _read_json(path, images_dir)
    parts = splits(path)
    split = {"valid": "val", "validation": "val"}.get(split, split) if split else None
    if split is None and parts:
        raise DataError(f"{path} has the parts {', '.join(parts)}: name one of them as the split")
    if split is not None and split not in parts:
        has = f"the parts {', '.join(parts)}" if parts else "no parts"
        raise DataError(f"{path} has no part {split!r}, it has {has}")
    if path.is_file():
        return yolo_reader.read_yaml(path, str(split))
    if yaml := _yaml_in(path):
        return yolo_reader.read_yaml(yaml, str(split))
    if files := coco_reader.find(path):
        return _read_json(files[split or ""], images_dir)
    return yolo_reader.read_folder(path, split)


def _read_json(path: Path, images_dir: Path | None) -> LabelledImages:
    document = read_json(path)
    if label_studio_reader.fits(document):
        return label_studio_reader.read(path, document, images_dir)
    return coco_reader.read(path, document, images_dir)


def splits(path: Path | str) -> tuple[str, ...]:
    """The names of the parts of a data set, such as ("train", "val"); () where it is one whole.

    "valid" and "validation" are read as "val". Raises DataError where the path holds no data set.
    """
    try:
        return _splits(Path(path))
    except OSError as error:
        raise DataError(f"{error.filename or path} cannot be read: {error.strerror or error}") from error


def _splits(path: Path) -> tuple[str, ...]:
    if path.suffix.lower() == ".json":
        return ()
    if path.is_file():
        if path.suffix.lower() not in _YAML:
            raise DataError(f"{path} is no data set: give a COCO or Label Studio json file, a data.yaml or a folder")
        return yolo_reader.yaml_splits(path)
    if not path.is_dir():
        raise DataError(f"no data set at {path}: give a COCO or Label Studio json file, a data.yaml or a folder")
    if yaml := _yaml_in(path):
        return yolo_reader.yaml_splits(yaml)
    if files := coco_reader.find(path):
        return tuple(part for part in files if part)
    return yolo_reader.folder_splits(path)


def _yaml_in(folder: Path) -> Path | None:
    """The folder's data.yaml, or its only YAML file."""
    found = sorted(file for file in folder.iterdir() if file.suffix.lower() in _YAML)
    named = [file for file in found if file.stem in ("data", "dataset")]
    if named:
        return named[0]
    return found[0] if len(found) == 1 else None

"""Data sets on disk: which format a path holds, and which parts (train, val, test) it has."""

from __future__ import annotations

from pathlib import Path

from yolonas.data import coco_reader, yolo_reader
from yolonas.data.labelled import LabelledImage, LabelledImages
from yolonas.errors import DataError

__all__ = ["LabelledImage", "LabelledImages", "read_dataset", "splits"]

_YAML = (".yaml", ".yml")


def read_dataset(path: Path | str, split: str | None = None, *, images_dir: Path | str | None = None) -> LabelledImages:
    """Read a data set, or the part of it that `split` names.

    path is one of: a COCO json file (its images beside it, in `images/`, in a folder named as the file, or in
    `images_dir`; one file is one part, so `split` is not looked at); an Ultralytics `data.yaml`; a YOLO folder with
    `images/`, `labels/` and `classes.txt`; or a folder that holds one of these, or one COCO json file for each part.
    Without a split a data set must be one whole; see `splits`.

    Images without objects are kept. Boxes are clipped to their image; boxes without area or outside their image, exact
    duplicates, unknown categories and missing images are left out, each with a line in `.dropped`.
    Raises DataError in one sentence for everything else, naming the file and what is wrong in it.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"no data set at {path}: give a COCO json file, a data.yaml or a folder")
    if path.suffix.lower() == ".json":
        return coco_reader.read(path, Path(images_dir) if images_dir is not None else None)
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
        return coco_reader.read(files[split or ""], Path(images_dir) if images_dir is not None else None)
    return yolo_reader.read_folder(path, split)


def splits(path: Path | str) -> tuple[str, ...]:
    """The names of the parts of a data set, such as ("train", "val"); () where it is one whole.

    "valid" and "validation" are read as "val". Raises DataError where the path holds no data set.
    """
    path = Path(path)
    if path.suffix.lower() == ".json":
        return ()
    if path.is_file():
        if path.suffix.lower() not in _YAML:
            raise DataError(f"{path} is no data set: give a COCO json file, a data.yaml or a folder")
        return yolo_reader.yaml_splits(path)
    if not path.is_dir():
        raise DataError(f"no data set at {path}: give a COCO json file, a data.yaml or a folder")
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

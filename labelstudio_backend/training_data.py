"""What one training learns from: the labelled tasks, in a part to train on and a part to judge by."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from labelstudio_backend.corrections import Correction, class_sources, held_out, labelled_images, tasks_of
from yolonas.atomic import atomic_file
from yolonas.data.labelled import LabelledImage, LabelledImages
from yolonas.errors import DataError
from yolonas.labelstudio import Control, class_names


@dataclass
class TrainingData:
    """A training part and a held-out part.

    sources: label -> classes of a base model it may start from; tasks: counts, and manifest: task -> annotation and
    part ("train", "held_out", or "unusable": it has no image that can be learnt from), both for the version's record;
    base: name of the version that the training starts from.
    """

    names: tuple[str, ...]
    sources: dict[str, tuple[str, ...]]
    train: LabelledImages
    held_out: LabelledImages
    tasks: dict[str, Any]
    manifest: dict[str, dict[str, Any]]
    base: str

    def save(self, path: Path) -> None:
        """Write it down, so that a restart goes on with the same; the images stay where they are."""
        document = {
            "names": self.names,
            "sources": self.sources,
            "train": [_to_json(image) for image in self.train.images],
            "held_out": [_to_json(image) for image in self.held_out.images],
            "tasks": self.tasks,
            "manifest": self.manifest,
            "base": self.base,
        }
        with atomic_file(path) as stream:
            stream.write(json.dumps(document).encode())

    @classmethod
    def load(cls, path: Path) -> TrainingData | None:
        """What `save` wrote, or `None` where that is not whole, or images are gone."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            document = json.loads(path.read_text())
            names = tuple(document["names"])
            train, test = (LabelledImages(names, [_from_json(i) for i in document[p]]) for p in ("train", "held_out"))
            if all(image.path.exists() for image in train.images + test.images):
                sources = {label: tuple(classes) for label, classes in document["sources"].items()}
                return cls(names, sources, train, test, document["tasks"], document["manifest"], document["base"])
        return None


def build(
    found: Sequence[Correction],
    controls: Sequence[Control],
    project_key: str,
    base: str,
    fraction: float,
    fetch: Callable[[str, int], Path],
    folder: Path,
    on_image: Callable[[int], None],
    fetch_video: Callable[[str, int], Path] | None = None,
) -> TrainingData:
    """Fetch the images of the labelled tasks into `folder` and split them.

    Args:
        found: the labelled tasks.
        controls: RectangleLabels and VideoRectangle tags to learn.
        project_key: with the task's id it decides the part, see `held_out`.
        base: name of the version that the training starts from.
        fraction: of the tasks is held out.
        fetch: gives the local file of a task's URL; raises YolonasError.
        folder: keeps the images.
        on_image: is told how many were fetched.
        fetch_video: as `fetch`, of a task's video; without it videos are left out.

    Raises:
        DataError: there is nothing to learn from; the sentence says why.
        MediaError: see `labelled_images`.
    """
    if not class_names(controls):
        raise DataError(
            "the label config has no RectangleLabels on an Image and no VideoRectangle, so there is nothing to learn"
        )
    if not found:
        raise DataError("no task is labelled yet; submit some annotations and train again")
    parts = {
        "train": [c for c in found if not held_out(project_key, c.task, fraction)],
        "held_out": [c for c in found if held_out(project_key, c.task, fraction)],
    }
    done = len(parts["train"])
    common = (controls, fetch, folder)
    train = labelled_images(parts["train"], *common, fetch_video=fetch_video, on_image=lambda n, _: on_image(n))
    test = labelled_images(
        parts["held_out"], *common, fetch_video=fetch_video, on_image=lambda n, _: on_image(done + n)
    )
    dropped = train.dropped + test.dropped
    used = tasks_of(train.images + test.images)
    if train.objects == 0:
        raise DataError(_nothing_to_learn(train, test, len(found), dropped))
    return TrainingData(
        names=train.names,
        sources=class_sources(controls),
        train=train,
        held_out=test,
        tasks={
            "labelled": len(found),
            "train": len(train),
            "held_out": len(test),
            "negatives": sum(len(image.boxes) == 0 for image in train.images + test.images),
            "train_boxes": train.objects,
            "held_out_boxes": test.objects,
            "boxes_per_class": _boxes_per_class(train.names, train.images + test.images),
            "unusable": len(dropped),
            "unusable_because": dropped[:20],
        },
        manifest={
            str(c.task): {
                "annotation": c.annotation.get("id"),
                "updated_at": c.annotation.get("updated_at"),
                "part": part if c.task in used else "unusable",
            }
            for part, tasks in parts.items()
            for c in tasks
        },
        base=base,
    )


def _boxes_per_class(names: Sequence[str], images: Sequence[LabelledImage]) -> dict[str, int]:
    labels = np.concatenate([np.zeros(0, np.int64), *(image.labels for image in images)])
    return dict(zip(names, np.bincount(labels, minlength=len(names)).tolist(), strict=True))


def _nothing_to_learn(train: LabelledImages, test: LabelledImages, tasks: int, dropped: list[str]) -> str:
    if not train.images and not test.images and dropped:
        return f"no image of the {tasks} labelled tasks can be had: {dropped[0]}"
    if test.objects:
        return (
            f"the boxes of all {tasks} labelled tasks fall into the held-out part, by which new versions are judged; "
            "label a few more tasks"
        )
    return f"there is no box of the label config's labels in the {tasks} labelled tasks; draw some and train again"


def _to_json(image: LabelledImage) -> dict[str, Any]:
    return {
        "path": str(image.path),
        "boxes": image.boxes.tolist(),
        "labels": image.labels.tolist(),
        "size": [image.width, image.height],
        "id": image.image_id,
    }


def _from_json(value: dict[str, Any]) -> LabelledImage:
    boxes = np.array(value["boxes"], np.float32).reshape(-1, 4)
    labels = np.array(value["labels"], np.int64)
    width, height = value["size"]
    return LabelledImage(Path(value["path"]), boxes, labels, np.zeros(len(boxes), bool), width, height, value["id"])

"""What a version has learned from, as far as the scores of tasks go by it: the boxes drawn, and how the images look.

The boxes of each class are in the version's record, the features in a file beside its weights. So every server has both
before the first task is scored, whatever it was asked before, and whatever became of its notes on the tasks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from labelstudio_backend.version import Version
from yolonas.active_learning import BACKGROUND, ImageSignals
from yolonas.inference.sources import read_image

if TYPE_CHECKING:
    from labelstudio_backend.models import Model

FEATURES = "learnt.npy"
IMAGES = 200  # that are looked at: half a minute at a publication, at seven images a second
COMPARING = ("diversity", "mix")  # strategies that need them


def write_features(
    model: Model,
    images: Sequence[Path],
    file: Path,
    *,
    conf: float,
    iou: float | None,
    max_det: int,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Have the model look at these images, of many at `IMAGES` from first to last, and write their features to `file`.

    conf, iou, max_det: as tasks are looked at, so that their features compare. check: called before each image, and may
    raise to stop. Raises YolonasError for an image that cannot be read, and OSError.
    """
    features = []
    for index in np.linspace(0, len(images) - 1, min(len(images), IMAGES)).astype(int):
        check()
        (found,) = model.predict_batch([read_image(images[index])], conf, iou, max_det, 1, signals=True)
        features.append(ImageSignals.of(found).feature)
    np.save(file, np.array([feature for feature in features if np.isfinite(feature).all()], np.float32))


def learnt_images(version: Version) -> Sequence[ImageSignals]:
    """The images that the version has learned from, known by their features alone; none where it has no such file."""
    return _read(version.path / FEATURES)


@lru_cache(16)  # each /predict asks, and a version never changes
def _read(file: Path) -> Sequence[ImageSignals]:
    try:
        features = np.load(file)
    except FileNotFoundError:
        return ()
    none, no_class = np.zeros(0), np.zeros(0, np.int64)
    blank = ImageSignals(none, no_class, none, none, np.full(0, BACKGROUND), none, none)
    return tuple(dataclasses.replace(blank, feature=feature) for feature in features.astype(np.float64))


def learnt_boxes(version: Version, labels: Sequence[str]) -> npt.NDArray[np.int64] | None:
    """How many boxes of each label were drawn in the tasks that the version has learned from, [C]; None: not known."""
    drawn = version.record.get("tasks", {}).get("boxes_per_class")
    return None if drawn is None else np.array([drawn.get(label, 0) for label in labels], np.int64)

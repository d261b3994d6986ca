"""Pseudo-labels: what a teacher finds in unlabelled images, as images to learn from beside the labelled ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from yolonas.data.labelled import BoxList, LabelledImages
from yolonas.errors import DataError
from yolonas.evaluation import label_map
from yolonas.inference.detector import Detector


def pseudo_labels(
    teacher: Detector, paths: Sequence[Path], names: tuple[str, ...], *, conf: float | None = None
) -> LabelledImages:
    """The images with the teacher's boxes above `conf` as their labels, classes by name, whatever the case.

    `conf` None is the teacher's operating threshold, where wrong and missed boxes are in balance: both would be
    learned. An image without a box above it is left out, as a teacher that finds nothing says little; so is one that
    cannot be read, with a line in `dropped`. Raises DataError where the teacher knows none of the classes.
    """
    labels = label_map(teacher.names, names)
    found = LabelledImages(names, [])
    for detections in teacher.stream(paths, conf, on_error=lambda error: found.dropped.append(str(error))):
        path = Path(str(detections.path))
        height, width = detections.image_size
        boxes = BoxList(path.name, width, height, found.dropped, found.changed)
        for detection in detections:
            if labels[detection.label] >= 0:
                boxes.add(detection.box.tolist(), int(labels[detection.label]))
        if boxes.rows:
            found.images.append(boxes.labelled(path, len(found.images) + 1))
    return found


def mixed(labelled: LabelledImages, pseudo: LabelledImages) -> LabelledImages:
    """Both sets as one, in which the labelled images are at least as many: they are repeated where needed.

    Each entry is drawn equally often, so half of the training or more has true labels. Raises DataError where the
    class names differ.
    """
    if labelled.names != pseudo.names:
        raise DataError(
            f"the labels are of {', '.join(labelled.names)}, the pseudo-labels of {', '.join(pseudo.names)}"
        )
    repeats = max(1, math.ceil(len(pseudo) / max(len(labelled), 1)))
    return LabelledImages(
        labelled.names, labelled.images * repeats + pseudo.images, [*labelled.dropped, *pseudo.dropped]
    )

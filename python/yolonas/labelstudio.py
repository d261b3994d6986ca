"""Pure conversion between Label Studio's JSON and detections or training boxes: no I/O, no torch.

Label Studio's rectangles are in percent of the image as the browser shows it, that is after EXIF transposition; ours
are xyxy pixels of the same image. Turning the whole image in the editor (`image_rotation`) turns the view only.
Sources: https://labelstud.io/tags/rectanglelabels, https://labelstud.io/guide/export.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from yolonas.data.labelled import Remark
from yolonas.labelstudio_config import (
    Control,
    LabelConfigError,
    LabelMap,
    by_spelling,
    class_names,
    controls_by_image,
    controls_by_video,
    map_labels,
    parse_label_config,
    spelling,
)

if TYPE_CHECKING:
    from yolonas.inference.detections import Detections

__all__ = [
    "Control",
    "LabelConfigError",
    "LabelMap",
    "boxes_from_annotation",
    "choose_annotation",
    "class_names",
    "controls_by_image",
    "controls_by_video",
    "map_labels",
    "parse_label_config",
    "task_score",
    "to_regions",
]

EMPTY_SCORE = 0.5
MIN_SIDE = 1.0  # image px; a thinner rectangle is a slip of the mouse, and no box to learn from


def to_regions(
    detections: Detections, control: Control, label_map: LabelMap, *, score_threshold: float = 0.0
) -> list[dict[str, Any]]:
    """Label Studio regions of the detections above the threshold whose class has a label, best score first.

    score_threshold: for labels to which neither the tag nor the label gives one. Values are percent of the image and
    never outside 0..100; boxes that are not finite or have no area are left out.
    """
    height, width = detections.image_size
    boxes = np.asarray(detections.boxes, np.float64).reshape(-1, 4)
    scores = np.asarray(detections.scores, np.float32)
    limits = {label: np.float32(control.threshold(label, score_threshold)) for label in label_map.to_label.values()}
    regions = []
    for index in np.argsort(-scores, kind="stable"):
        label, score = label_map.to_label.get(int(detections.labels[index])), float(scores[index])
        if label is None or not scores[index] > limits[label]:  # as the detector compares
            continue
        if not np.isfinite(boxes[index]).all() or score == math.inf:
            continue
        percent = np.clip(boxes[index] * (100.0 / np.array([width, height, width, height])), 0.0, 100.0)
        x, y, right, bottom = (float(value) for value in percent)
        if right <= x or bottom <= y:
            continue
        regions.append(
            {
                "id": uuid.uuid4().hex[:10],
                "from_name": control.from_name,
                "to_name": control.to_name,
                "type": "rectanglelabels",
                "original_width": int(width),
                "original_height": int(height),
                "image_rotation": 0,
                "score": score,
                "value": {
                    "x": x,
                    "y": y,
                    "width": _span(x, right),
                    "height": _span(y, bottom),
                    "rotation": 0,
                    "rectanglelabels": [label],
                },
            }
        )
    return regions


def _span(start: float, stop: float) -> float:
    span = stop - start
    return math.nextafter(span, 0.0) if start + span > 100.0 else span  # the sum may round up by one bit


def task_score(scores: Iterable[float]) -> float:
    """How sure the model is of an image, 0..1; the lowest is worth labelling first.

    It is the mean margin |2 s - 1| of the boxes, weighted by their scores s, so that the many faint boxes which a low
    threshold lets in do not drown a doubtful one: 0 where every box is a coin toss, near 1 where all are clear. Label
    Studio's uncertainty sampling shows the task with the lowest score first. An image without any box gets
    EMPTY_SCORE = 0.5: after those with doubtful boxes (every s in 0.25..0.75 makes at most 0.5), before those whose
    boxes are all clear. A mean over no boxes would be 0 and put every empty image first.
    """
    weights = list(scores)
    total = sum(weights)
    return float(sum(s * abs(2.0 * s - 1.0) for s in weights) / total) if total > 0 else EMPTY_SCORE


def choose_annotation(annotations: Iterable[Mapping[str, Any]] | None) -> Mapping[str, Any] | None:
    """The annotation of a task that counts: a ground truth before others, then the newest; None where there is none.

    Skipped ones (`was_cancelled`) and drafts never count; one submitted without regions does, and says that the image
    shows nothing.
    """
    usable = [a for a in annotations or () if not a.get("was_cancelled") and isinstance(a.get("result"), list)]
    return max(usable, key=lambda a: (bool(a.get("ground_truth")), _time(a), _number(a.get("id"))), default=None)


def _time(annotation: Mapping[str, Any]) -> float:
    text = annotation.get("updated_at") or annotation.get("created_at")
    try:
        moment = datetime.fromisoformat(str(text))
    except ValueError:
        return 0.0
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _number(value: Any) -> int:
    return value if isinstance(value, int) else 0


def boxes_from_annotation(
    result: Sequence[Mapping[str, Any]],
    control: Control,
    width: int,
    height: int,
    *,
    dropped: list[Remark] | None = None,
) -> tuple[np.ndarray, list[str]]:
    """Boxes and labels of one annotation's `result` that were drawn with this control.

    `width` and `height` are those of the EXIF-transposed image. Returns boxes float32 [n, 4], xyxy image px, clipped to
    the image, and their n labels. A rotated rectangle (degrees clockwise about its top-left corner) becomes the box
    that encloses it. Regions of other controls, labels that are not the control's, and what is thinner than MIN_SIDE
    within the image are left out; a region with several labels gives a box for each. `dropped` gets a line on each
    region of this control that is left out.
    """
    boxes: list[tuple[float, float, float, float]] = []
    labels: list[str] = []
    left_out = [] if dropped is None else dropped
    shown = {spelling(value): label for label, value in control.values.items()}
    written = shown | by_spelling(control.labels)
    skipped = by_spelling(control.skipped_labels)
    for region in result:
        if not isinstance(region, Mapping):
            continue
        value = region.get("value")
        if region.get("from_name") != control.from_name or region.get("to_name", control.to_name) != control.to_name:
            continue
        if region.get("type") != "rectanglelabels" or not isinstance(value, Mapping):
            continue
        box = _enclosing_box(value, width, height)
        if box is None:
            sides = [value.get(key) for key in ("x", "y", "width", "height")]
            line = f"rectangle {sides} is less than {MIN_SIDE:g} px wide or high within the image"
            left_out.append(Remark(line, "boxes without area"))
            continue
        names = value.get("rectanglelabels")
        for name in names if isinstance(names, list) else ():
            label = written.get(name) or written.get(spelling(name)) if isinstance(name, str) else None
            if label is not None:
                boxes.append(box)
                labels.append(label)
            elif not isinstance(name, str) or spelling(name) not in skipped:
                left_out.append(Remark(f"there is no label {name!r} in the label config", "boxes of unknown labels"))
    return np.array(boxes, np.float32).reshape(-1, 4), labels


def _enclosing_box(value: Mapping[str, Any], width: int, height: int) -> tuple[float, float, float, float] | None:
    try:
        # into pixels first: percent of width and of height are different units, and a rotation mixes them
        x, w = (float(value[key]) * width / 100.0 for key in ("x", "width"))
        y, h = (float(value[key]) * height / 100.0 for key in ("y", "height"))
        angle = math.radians(float(value.get("rotation") or 0.0))
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    if not all(math.isfinite(number) for number in (x, y, w, h, angle)):
        return None
    cos, sin = math.cos(angle), math.sin(angle)
    xs = [x, x + w * cos, x - h * sin, x + w * cos - h * sin]
    ys = [y, y + w * sin, y + h * cos, y + w * sin + h * cos]
    left, right = (min(max(edge, 0.0), float(width)) for edge in (min(xs), max(xs)))
    top, bottom = (min(max(edge, 0.0), float(height)) for edge in (min(ys), max(ys)))
    if right - left < MIN_SIDE or bottom - top < MIN_SIDE:
        return None
    return left, top, right, bottom

"""Pure conversion between Label Studio's JSON and detections or training boxes: no I/O, no torch.

Label Studio's rectangles are in percent of the image as the browser shows it, that is after EXIF transposition; ours
are xyxy pixels of the same image. Turning the whole image in the editor (`image_rotation`) turns the view only.
Sources: https://labelstud.io/tags/rectanglelabels, https://labelstud.io/guide/export.
"""

from __future__ import annotations

import math
import re
import uuid
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from yolonas.data.labelled import Remark
from yolonas.errors import YolonasError

if TYPE_CHECKING:
    from yolonas.inference.detections import Detections

EMPTY_SCORE = 0.5
MIN_SIDE = 1.0  # image px; a thinner rectangle is a slip of the mouse, and no box to learn from


class LabelConfigError(YolonasError, ValueError):
    """A label config that cannot be understood."""


@dataclass(frozen=True)
class Control:
    """One RectangleLabels tag on one Image tag of a label config."""

    from_name: str
    to_name: str
    data_key: str  # of the task's data: `image` for `$image`
    labels: tuple[str, ...]  # as Label Studio writes them into results: the alias where there is one, else the value
    predicted_values: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # label -> names of model classes
    values: Mapping[str, str] = field(default_factory=dict)  # label -> what the annotator sees, where an alias differs
    score_threshold: float | None = None
    skip: bool = False

    def task_value(self, data: Mapping[str, Any]) -> str | None:
        """What a task's `data` holds for this control: a URL or path; None where there is no text."""
        value: Any = data.get(self.data_key)
        if value is None:
            value = data
            for part in self.data_key.split("."):
                value = value.get(part) if isinstance(value, Mapping) else None
        return value if isinstance(value, str) and value else None


@dataclass(frozen=True)
class LabelMap:
    """How model classes become labels of a control."""

    to_label: dict[int, str]  # class index of the model -> label
    unmatched: tuple[str, ...]  # labels that no class becomes


def parse_label_config(xml: str) -> list[Control]:
    """The RectangleLabels tags of a label config that draw on an Image; other tags are ignored.

    Reads `model_score_threshold` (or `score_threshold`) and `model_skip` of the tag, `predicted_values` and `alias` of
    its labels. A tag whose Image takes a list of pictures (`valueList`) is left out. Raises LabelConfigError.
    """
    if re.search(r"<!\s*(DOCTYPE|ENTITY)", xml, re.IGNORECASE):
        raise LabelConfigError(
            "the label config declares a DOCTYPE or ENTITY, which is refused; remove the declaration"
        )
    try:
        root = ET.fromstring(xml)
    except (ET.ParseError, ValueError) as error:
        raise LabelConfigError(
            f"the label config is not well-formed XML ({error}); correct it in the project's settings"
        ) from None
    tags = [(str(element.tag).lower(), element) for element in root.iter()]
    keys = {}
    for tag, element in tags:
        name, value = element.get("name", ""), element.get("value", "").strip()
        if tag == "image" and name and value.startswith("$") and len(value) > 1:
            keys[name] = value[1:]
    controls = []
    for tag, element in tags:
        if tag != "rectanglelabels" or not element.get("name"):
            continue
        for to_name in (part.strip() for part in element.get("toName", "").split(",")):
            if to_name in keys:
                controls.append(_control(element, to_name, keys[to_name]))
    return controls


def _control(element: ET.Element, to_name: str, data_key: str) -> Control:
    labels: list[str] = []
    predicted: dict[str, tuple[str, ...]] = {}
    values: dict[str, str] = {}
    for label in element.iter():
        value = label.get("value", "")
        written = label.get("alias") or value
        if str(label.tag).lower() != "label" or not written or written in labels:
            continue
        labels.append(written)
        if value and value != written:
            values[written] = value
        names = tuple(name.strip() for name in label.get("predicted_values", "").split(",") if name.strip())
        if names:
            predicted[written] = names
    return Control(
        from_name=element.get("name", ""),
        to_name=to_name,
        data_key=data_key,
        labels=tuple(labels),
        predicted_values=predicted,
        values=values,
        score_threshold=_threshold(element),
        skip=element.get("model_skip", "").strip().lower() in ("1", "true", "yes"),
    )


def _threshold(element: ET.Element) -> float | None:
    for attribute in ("model_score_threshold", "score_threshold"):
        text = element.get(attribute, "").strip()
        if not text:
            continue
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 <= value <= 1:
            raise LabelConfigError(
                f'{attribute}="{text}" of <RectangleLabels name="{element.get("name")}"> is not a number from 0 to 1'
            )
        return value
    return None


def map_labels(control: Control, model_names: Sequence[str], *, own: bool = False) -> LabelMap:
    """Which label each class of the model becomes.

    First by `predicted_values`, then by the label's name (or its shown value, under an alias); case, spaces, hyphens
    and underscores make no difference. `own=True` is for a version trained in the project, whose classes are its
    labels: they map to themselves and to nothing else. A class becomes the first label that claims it.
    """
    if own:
        to_label = {index: name for index, name in enumerate(model_names) if name in control.labels}
    else:
        classes: dict[str, list[int]] = {}
        for index, name in enumerate(model_names):
            classes.setdefault(_plain(name), []).append(index)
        claims = [(label, name) for label in control.labels for name in control.predicted_values.get(label, ())]
        claims += [(label, name) for label in control.labels for name in (label, control.values.get(label, label))]
        to_label = {}
        for label, name in claims:
            for index in classes.get(_plain(name), ()):
                to_label.setdefault(index, label)
    matched = set(to_label.values())
    return LabelMap(to_label, tuple(label for label in control.labels if label not in matched))


def class_names(controls: Iterable[Control]) -> tuple[str, ...]:
    """The labels to learn: those of all RectangleLabels tags that the model serves, in the config's order."""
    return tuple(dict.fromkeys(label for control in controls if not control.skip for label in control.labels))


def controls_by_image(controls: Iterable[Control], data: Mapping[str, Any]) -> dict[str, list[Control]]:
    """What a task's `data` holds for each of its images, with the controls that draw on it; skipped ones left out."""
    by_image: dict[str, list[Control]] = {}
    for control in controls:
        value = control.task_value(data)
        if value is not None and not control.skip:
            by_image.setdefault(value, []).append(control)
    return by_image


def _plain(name: str) -> str:
    return re.sub(r"[\s_\-]+", "", name).casefold()


def to_regions(
    detections: Detections, control: Control, label_map: LabelMap, *, score_threshold: float = 0.0
) -> list[dict[str, Any]]:
    """Label Studio regions of the detections above the threshold whose class has a label, best score first.

    Values are percent of the image and never outside 0..100; boxes that are not finite or have no area are left out.
    """
    height, width = detections.image_size
    boxes = np.asarray(detections.boxes, np.float64).reshape(-1, 4)
    scores = np.asarray(detections.scores, np.float32)
    above = scores > np.float32(score_threshold)  # as the detector compares
    regions = []
    for index in np.argsort(-scores, kind="stable"):
        label, score = label_map.to_label.get(int(detections.labels[index])), float(scores[index])
        if label is None or not above[index] or not np.isfinite(boxes[index]).all() or score == math.inf:
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
    written = {shown: label for label, shown in control.values.items()} | {label: label for label in control.labels}
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
            if isinstance(name, str) and name in written:
                boxes.append(box)
                labels.append(written[name])
            else:
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

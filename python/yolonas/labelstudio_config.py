"""What a label config asks of a model: its control tags, and which label each class of the model becomes.

Sources: https://labelstud.io/tags/rectanglelabels, https://labelstud.io/tags/videorectangle,
https://labelstud.io/tags/video.
"""

from __future__ import annotations

import math
import re
import unicodedata
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from yolonas.errors import YolonasError

FRAME_RATE = 24.0
"""Frames per second by which Label Studio counts those of a Video tag without `frameRate`, whatever the file's own."""


class LabelConfigError(YolonasError, ValueError):
    """A label config that cannot be understood."""


@dataclass(frozen=True)
class Control:
    """One RectangleLabels tag on one Image tag, or one VideoRectangle tag with the Labels of its Video tag."""

    from_name: str
    to_name: str
    data_key: str  # of the task's data: `image` for `$image`
    labels: tuple[str, ...]  # as Label Studio writes them into results: the alias where there is one, else the value
    predicted_values: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # label -> names of model classes
    values: Mapping[str, str] = field(default_factory=dict)  # label -> what the annotator sees, where an alias differs
    score_threshold: float | None = None
    skip: bool = False
    label_thresholds: Mapping[str, float] = field(default_factory=dict)  # label -> its own, where it has one
    skipped_labels: tuple[str, ...] = ()  # neither predicted nor learned, and not among `labels`
    model_path: str = ""  # weights that the tag asks for, as written
    media: Literal["image", "video"] = "image"
    frame_rate: str = ""  # of the Video tag, as written: a number, or `$key` of the task's data

    def task_value(self, data: Mapping[str, Any]) -> str | None:
        """What a task's `data` holds for this control: a URL or path; None where there is no text."""
        value = _look_up(data, self.data_key)
        return value if isinstance(value, str) and value else None

    def threshold(self, label: str, default: float) -> float:
        """The score that a box of this label must exceed: the label's own, else the tag's, else `default`."""
        own = default if self.score_threshold is None else self.score_threshold
        return self.label_thresholds.get(label, own)

    def lowest_threshold(self, default: float) -> float:
        """The least of its labels' thresholds."""
        return min((self.threshold(label, default) for label in self.labels), default=default)

    def frames_per_second(self, data: Mapping[str, Any]) -> float:
        """The rate by which Label Studio counts a task's frames; below 1 it is read as seconds per frame."""
        written: Any = self.frame_rate
        if self.frame_rate.startswith("$"):
            written = _look_up(data, self.frame_rate[1:])
        try:
            rate = float(written)
        except (TypeError, ValueError):
            return FRAME_RATE
        if not math.isfinite(rate) or rate <= 0:
            return FRAME_RATE
        return 1 / rate if rate < 1 else rate


@dataclass(frozen=True)
class LabelMap:
    """How model classes become labels of a control."""

    to_label: dict[int, str]  # class index of the model -> label
    unmatched: tuple[str, ...]  # labels that no class becomes


def parse_label_config(xml: str) -> list[Control]:
    """The RectangleLabels on an Image of a label config, and its VideoRectangles; other tags are ignored.

    Reads `model_score_threshold` (or `score_threshold`), `model_skip` and `model_path` of the tag, the first two of its
    labels too, and their `predicted_values` and `alias`. Of a VideoRectangle the labels are those of the Labels tags
    on its Video, which may carry these attributes as well. A tag whose Image takes a list of pictures (`valueList`) is
    left out. Raises LabelConfigError.
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
    media: dict[str, dict[str, ET.Element]] = {"image": {}, "video": {}}
    for tag, element in tags:
        name, value = element.get("name", ""), element.get("value", "").strip()
        if tag in media and name and value.startswith("$") and len(value) > 1:
            media[tag][name] = element
    holding: dict[str, list[ET.Element]] = {}  # the Labels tags of each object
    for element in (element for tag, element in tags if tag == "labels"):
        for to_name in dict.fromkeys(_to_names(element)):
            holding.setdefault(to_name, []).append(element)
    controls = []
    for tag, element in tags:
        if tag not in ("rectanglelabels", "videorectangle") or not element.get("name"):
            continue
        shown = media["image" if tag == "rectanglelabels" else "video"]
        for to_name in _to_names(element):
            if to_name not in shown:
                continue
            holders = [element]
            if tag == "videorectangle":
                holders += holding.get(to_name, [])
            controls.append(_control(holders, to_name, shown[to_name]))
    return controls


def _control(holders: Sequence[ET.Element], to_name: str, shown: ET.Element) -> Control:
    """holders: the control tag, and others that hold its labels; the first that has an attribute counts."""
    labels: dict[str, None] = {}  # as a set that keeps its order: there are configs of 20,000
    skipped: dict[str, None] = {}
    predicted: dict[str, tuple[str, ...]] = {}
    values: dict[str, str] = {}
    thresholds: dict[str, float] = {}
    for label in (element for holder in holders for element in holder.iter()):
        value = label.get("value", "")
        written = label.get("alias") or value
        if str(label.tag).lower() != "label" or not written or written in labels or written in skipped:
            continue
        if _is_true(label.get("model_skip")):
            skipped[written] = None
            continue
        labels[written] = None
        if value and value != written:
            values[written] = value
        names = tuple(name.strip() for name in label.get("predicted_values", "").split(",") if name.strip())
        if names:
            predicted[written] = names
        if (threshold := _threshold([label])) is not None:
            thresholds[written] = threshold
    rate = next((text for key, text in shown.attrib.items() if key.lower() == "framerate"), "")
    return Control(
        from_name=holders[0].get("name", ""),
        to_name=to_name,
        data_key=shown.get("value", "").strip()[1:],
        labels=tuple(labels),
        predicted_values=predicted,
        values=values,
        score_threshold=_threshold(holders),
        skip=any(_is_true(holder.get("model_skip")) for holder in holders),
        label_thresholds=thresholds,
        skipped_labels=tuple(skipped),
        model_path=next((path for holder in holders if (path := holder.get("model_path", "").strip())), ""),
        media="video" if str(shown.tag).lower() == "video" else "image",
        frame_rate=rate.strip(),
    )


def _to_names(element: ET.Element) -> list[str]:
    return [part.strip() for part in element.get("toName", "").split(",")]


def _is_true(text: str | None) -> bool:
    return (text or "").strip().lower() in ("1", "true", "yes")


def _threshold(holders: Sequence[ET.Element]) -> float | None:
    for holder in holders:
        for attribute in ("model_score_threshold", "score_threshold"):
            text = holder.get(attribute, "").strip()
            if not text:
                continue
            try:
                value = float(text)
            except ValueError:
                value = math.nan
            if not 0 <= value <= 1:
                key = "name" if holder.get("name") else "value"
                raise LabelConfigError(
                    f'{attribute}="{text}" of <{holder.tag} {key}="{holder.get(key)}"> is not a number from 0 to 1'
                )
            return value
    return None


def map_labels(control: Control, model_names: Sequence[str], *, own: bool = False) -> LabelMap:
    """Which label each class of the model becomes.

    First by `predicted_values`, then by the label's name (or its shown value, under an alias); case, spaces, hyphens,
    underscores and what Unicode holds for the same (NFKC) make no difference. `own=True` is for a version trained in
    the project, whose classes are its labels: they map to themselves and to nothing else, composed or not (NFC). A
    class becomes the first label that claims it.
    """
    if own:
        written = by_spelling(control.labels)
        known = ((index, written.get(name) or written.get(spelling(name))) for index, name in enumerate(model_names))
        to_label = {index: label for index, label in known if label is not None}
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
    """The labels to learn: those of all tags that the model serves, in the config's order."""
    return tuple(dict.fromkeys(label for control in controls if not control.skip for label in control.labels))


def controls_by_image(controls: Iterable[Control], data: Mapping[str, Any]) -> dict[str, list[Control]]:
    """What a task's `data` holds for each of its images, with the controls that draw on it; skipped ones left out."""
    return _by_value((control for control in controls if control.media == "image"), data)


def controls_by_video(controls: Iterable[Control], data: Mapping[str, Any]) -> dict[str, list[Control]]:
    """What a task's `data` holds for each of its videos, with the controls that draw on it; skipped ones left out."""
    return _by_value((control for control in controls if control.media == "video"), data)


def _by_value(controls: Iterable[Control], data: Mapping[str, Any]) -> dict[str, list[Control]]:
    found: dict[str, list[Control]] = {}
    for control in controls:
        value = control.task_value(data)
        if value is not None and not control.skip:
            found.setdefault(value, []).append(control)
    return found


def spelling(name: str) -> str:
    """One spelling of a name that may be written composed or decomposed: e with an accent, or e and an accent."""
    return unicodedata.normalize("NFC", name)


def by_spelling(names: Iterable[str]) -> dict[str, str]:
    """Each name under its `spelling` and as it is written; names as they are written come first."""
    written = {name: name for name in names}
    return {spelling(name): name for name in reversed(written)} | written


def _plain(name: str) -> str:
    """What names are compared by: NFKC case-folded, without spaces, hyphens, underscores and invisible characters."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
    kept = "".join(letter for letter in folded if not _is_filler(letter))
    return kept or folded


def _is_filler(letter: str) -> bool:
    """Also the marks of writing direction and the selector that makes a sign an emoji, which keyboards add unseen."""
    return letter.isspace() or letter in "_\ufe0e\ufe0f" or unicodedata.category(letter) in ("Pd", "Cf")


def _look_up(data: Mapping[str, Any], key: str) -> Any:
    """`data[key]`, or for a key with dots what lies below its parts."""
    value: Any = data.get(key)
    if value is None:
        value = data
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
    return value

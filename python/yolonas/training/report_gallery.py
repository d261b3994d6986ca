"""The sections of a report that show images: those with the most errors, and labels that look wrong."""

from __future__ import annotations

import os
from collections.abc import Sequence
from html import escape

import numpy as np

from yolonas.analysis import Analysis, ImageResult, Verdict
from yolonas.data.labelled import LabelledImage, LabelledImages
from yolonas.inference.detections import Detections
from yolonas.label_errors import KINDS, Kind, Suspect, suspects
from yolonas.training.report_pictures import Mark, drawing, forget, picture

WORST_IMAGES = 12
SUSPECTS = 12  # of each kind
IMAGE_SIDE, CROP_SIDE = 520, 230  # px
MOST_MARKS = 150  # in one picture; more hide it and swell the file

METHODS: dict[Kind, str] = {
    "missing label": "A confident prediction that overlaps no label: an object may have been forgotten.",
    "wrong label": "A confident prediction of another class lies on the label, and none of the label's own class does.",
    "spurious label": "Nothing is predicted here, although most labels of this class, size and place in the image are "
    "found: there may be no such object.",
    "loose box": "The confident prediction of this class overlaps the label much less than is usual for the class.",
}


def worst_section(data: LabelledImages, analysis: Analysis) -> str:
    """The images with the most errors, truth and prediction side by side."""
    worst = analysis.worst(WORST_IMAGES)
    if not worst:
        return "<p>There is no image with an error.</p>"
    wrong = sum(image.errors > 0 for image in analysis.images)
    intro = (
        f"<p>{wrong} of {len(data)} images have errors. These {len(worst)} have the most (missed objects, false boxes "
        "and wrong classes at the operating threshold).</p>"
        + _legend({"right": "right", "missed": "missed", "false": "false", "wrong": "wrong class"})
    )
    names = _file_names(data)
    cards = []
    for rank, index in enumerate(worst):
        image, result = data.images[index], analysis.images[index]
        cards.append(_worst_card(f"w{rank}", names[index], image, result, data.names))
    forget()
    return intro + "".join(cards)


def _worst_card(identity: str, name: str, image: LabelledImage, result: ImageResult, classes: Sequence[str]) -> str:
    shown = picture(image.path, (image.height, image.width), IMAGE_SIDE)
    found = result.detections
    truth, predicted = [], []
    for label in np.flatnonzero(~image.crowd).tolist():
        text = classes[image.labels[label]]
        if label in result.missed:
            truth.append(Mark(image.boxes[label], "missed", f"missed: {text}", text))
        else:
            met = int(np.flatnonzero(result.partners == label)[0])
            style = "right" if result.verdicts[met] == Verdict.RIGHT else "wrong"
            truth.append(Mark(image.boxes[label], style, text, text if style == "wrong" else ""))
    for d, verdict, partner in zip(found, result.verdicts.tolist(), result.partners.tolist(), strict=True):
        text = f"{d.name} {d.score:.2f}"
        if verdict == Verdict.RIGHT:
            predicted.append(Mark(d.box, "right", text))
        elif verdict == Verdict.WRONG_CLASS:
            predicted.append(Mark(d.box, "wrong", f"{text}, but it is {classes[image.labels[partner]]}", text))
        elif verdict != Verdict.UNCOUNTED:
            reason = {Verdict.DUPLICATE: "a second box", Verdict.POOR_BOX: "lies badly"}.get(
                Verdict(verdict), "nothing there"
            )
            predicted.append(Mark(d.box, "false", f"false: {text}, {reason}", text))
    order = ("right", "false", "missed", "wrong")
    panes = []
    for k, (caption, marks) in enumerate((("truth", truth), ("prediction", predicted))):
        left_out = max(0, len(marks) - MOST_MARKS)
        marks = sorted(marks, key=lambda mark: order.index(mark.style))[left_out:]  # errors on top
        pane = drawing(shown, marks, f"{caption} of {name}", name="" if k else identity, again=identity if k else "")
        more = f", {left_out} right boxes not drawn" if left_out else ""
        panes.append(f"<div><span>{caption}{more}</span>{pane}</div>")
    wrong, right = result.count(Verdict.WRONG_CLASS), result.count(Verdict.RIGHT)
    false = result.errors - wrong - len(result.missed)
    return (
        f'<figure class="worst"><figcaption><b><bdi>{escape(name)}</bdi></b> &nbsp;{len(result.missed)} missed, '
        f"{false} false, {wrong} wrong class, {right} right</figcaption>"
        f'<div class="pair">{"".join(panes)}</div></figure>'
    )


def suspects_section(data: LabelledImages, detections: Sequence[Detections], analysis: Analysis) -> str:
    """Crops of the labels that look wrong, by kind."""
    everything = suspects(data, detections, analysis.threshold)
    intro = (
        "<p>Where a label contradicts the model, and predictions like this one are mostly right elsewhere, the label "
        "deserves a look. These are suspicions, not findings: the model's own mistakes are among them"
        + (", and this model still makes many" if analysis.f1 < 0.6 else "")
        + ".</p>"
        '<p class="note">After confident learning (Northcutt et al. 2021) and the kinds of error of ObjectLab '
        "(Tkachenko et al. 2023), with scores of our own: how often predictions like this one (same class, nearest "
        "scores) are right, times the score, times how far they contradict the label; only where two thirds of such "
        "predictions are right. A model repeats the errors of labels that it learned: trust this for images that had "
        "no part in the training.</p>"
    )
    if not everything:
        return intro + "<p>No label looks wrong.</p>"
    names = _file_names(data)
    parts = [intro, _legend({"true": "label", "found": "prediction", "right": "other labels"})]
    for kind in KINDS:
        of_kind = [suspect for suspect in everything if suspect.kind == kind]
        if not of_kind:
            continue
        shown = of_kind[:SUSPECTS]
        number = f"{len(shown)} of {len(of_kind)}" if len(shown) < len(of_kind) else f"{len(of_kind)}"
        cards = "".join(_suspect_card(data, suspect, names[suspect.image]) for suspect in shown)
        parts.append(
            f'<h3>{kind.capitalize()} <span class="note">{number}</span></h3><p class="note">{METHODS[kind]}</p>'
            f'<div class="crops">{cards}</div>'
        )
    forget()
    return "".join(parts)


def _suspect_card(data: LabelledImages, suspect: Suspect, name: str) -> str:
    image = data.images[suspect.image]
    marks = [
        Mark(box, "right", data.names[label])
        for k, (box, label) in enumerate(zip(image.boxes, image.labels.tolist(), strict=True))
        if k != suspect.label
    ]
    label = "" if suspect.label is None else data.names[image.labels[suspect.label]]
    if suspect.box is not None:
        marks.append(Mark(suspect.box, "true", f"label: {label}", label if suspect.found is None else ""))
    if suspect.found is not None:
        text = f"{suspect.name} {suspect.score:.2f}"
        marks.append(Mark(suspect.found, "found", f"prediction: {text}", text))
    boxes = np.stack([box for box in (suspect.box, suspect.found) if box is not None]).astype(np.float64)
    low, high = boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)
    # A square with surroundings, moved into the image where it runs over the edge.
    side = max(float((high - low).max()) * 1.9, 48.0)
    size = np.array([image.width, image.height], dtype=np.float64)
    start = np.clip((low + high - side) / 2, 0, np.maximum(size - side, 0))
    region = (*start.tolist(), *(start + side).tolist())
    crop = picture(image.path, (image.height, image.width), CROP_SIDE, (region[0], region[1], region[2], region[3]))
    marks = [mark for mark in marks if _touches(mark, region)]
    trust = f"{suspect.trust * 100:.0f} %"
    predicted = f"<b><bdi>{escape(suspect.name)}</bdi></b>"
    labelled = f"<b><bdi>{escape(label)}</bdi></b>"
    sentence = {
        "missing label": f"no label, predicted {predicted} {_score(suspect)}; {trust} of such are right",
        "wrong label": f"labelled {labelled}, predicted {predicted} {_score(suspect)}; {trust} of such are right",
        "spurious label": f"labelled {labelled}; {trust} of similar labels are found",
        "loose box": f"{labelled} predicted {_score(suspect)}, IoU with the label {suspect.iou:.2f}",
    }[suspect.kind]
    title = f"{suspect.kind} in {name}"
    return (
        f'<figure class="suspect">{drawing(crop, marks, title)}<figcaption>{sentence}<br><bdi>{escape(name)}</bdi>, '
        f"suspicion {suspect.suspicion:.2f}</figcaption></figure>"
    )


def _score(suspect: Suspect) -> str:
    return f"with {suspect.score:.2f}" if suspect.score is not None else ""


def _touches(mark: Mark, region: Sequence[float]) -> bool:
    x1, y1, x2, y2 = mark.box.tolist()
    return bool(x1 < region[2] and x2 > region[0] and y1 < region[3] and y2 > region[1])


def _legend(styles: dict[str, str]) -> str:
    keys = "".join(
        f'<li><svg class="key box" viewBox="0 0 26 18" aria-hidden="true"><g class="mark {style}">'
        '<rect class="halo" x="4" y="4" width="18" height="10"/><rect class="edge" x="4" y="4" width="18" height="10"/>'
        f"</g></svg>{text}</li>"
        for style, text in styles.items()
    )
    return f'<ul class="legend">{keys}</ul>'


def _file_names(data: LabelledImages) -> list[str]:
    """Paths below the folder that all images share: enough to find them, and nothing about the machine."""
    folders = [os.path.abspath(image.path.parent) for image in data.images]
    try:
        base = os.path.commonpath(folders)
    except ValueError:  # on several drives
        return [str(image.path) for image in data.images]
    return [
        os.path.join(os.path.relpath(folder, base), image.path.name).removeprefix(f".{os.sep}")
        for folder, image in zip(folders, data.images, strict=True)
    ]

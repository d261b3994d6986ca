"""Which labels of a data set look wrong to a detector that was not trained on them.

The idea of confident learning (Northcutt, Jiang, Chuang: "Confident Learning", JAIR 2021) - believe the model against
the label where, on the labels it agrees with, it is right as often as it claims - and the kinds of error of ObjectLab
(Tkachenko, Thyagarajan, Mueller: "ObjectLab", 2023). Scores and code are our own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from yolonas.data.labelled import LabelledImage, LabelledImages
from yolonas.evaluation import MATCH_IOU, in_labels_of, match, overlaps
from yolonas.inference.detections import Detections

Kind = Literal["missing label", "wrong label", "spurious label", "loose box"]
KINDS: tuple[Kind, ...] = ("missing label", "wrong label", "spurious label", "loose box")

APART_IOU = 0.3  # a detection that overlaps no true box by more stands for an object of its own
APART_SHARE = 0.6  # unless so much of it or of the box lies inside the other: a part of an object, or a group
POOR_IOU = 0.2  # with less a detection and a box are not about the same object
SIMILAR = 20  # true boxes that a box is compared with
SIMILAR_SIZE = 2.0  # their sides differ by this factor at most
FEWEST_SIMILAR = 5
LEAST_DOUBT = 0.5  # suspicion of a spurious label; below it are the objects that the model merely misses
LEAST_TRUST = 2 / 3  # a detection is evidence against a label where so many of those like it are right


@dataclass(frozen=True, eq=False)
class Suspect:
    """A label that looks wrong.

    suspicion: 0..1, comparable within its kind. image: its index in the data set. label: index of the true box and box:
    float32 [4] xyxy image px, None where a label is missing. found, name and score: the detection that speaks against
    it, None for a spurious label. trust: 0..1, how often what speaks against it is right.
    """

    kind: Kind
    suspicion: float
    image: int
    label: int | None
    box: npt.NDArray[np.float32] | None
    found: npt.NDArray[np.float32] | None
    name: str
    score: float | None
    trust: float
    iou: float = 0.0  # of the two boxes


def suspects(data: LabelledImages, detections: Sequence[Detections], threshold: float) -> list[Suspect]:
    """Suspected label errors of all kinds, most suspicious first; classes meet by name, as in `coco_ap`.

    `trust` of a detection is the share that is right (IoU 0.5) among the detections of its class with the nearest
    scores; it must be above 2/3. A label is suspected to be

    - missing, where a detection overlaps no true box: trust * score;
    - wrong, where a detection of another class lies on a box: trust * score * (1 - score of the labelled class there);
    - spurious, where nothing above the threshold lies on a box although similar ones are found: the share found of the
      20 true boxes of its class most like it in size and in touching the image's edge, which must be above 2/3,
      * (1 - best score there / threshold), which must be above 0.5;
    - a loose box, where the detection of its class overlaps it far less than is usual for the class:
      trust * score * (1 - IoU / median IoU).

    Detections must not come from a model that learned these labels, which would repeat their errors. Raises what
    `coco_ap` raises.
    """
    found = in_labels_of(data, detections)
    matches = [match(image, d) for image, d in zip(data.images, found, strict=True)]
    trust = _trust(found, matches, len(data.names))
    usual = _usual_iou(data, found, matches, threshold)
    suspected: list[Suspect] = []
    unfound: list[tuple[int, int, float]] = []  # image, box, best score there
    covered: list[npt.NDArray[np.bool_]] = []
    for i, (image, d) in enumerate(zip(data.images, found, strict=True)):
        here = _Image(i, image, d, matches[i][1], trust[i], threshold)
        suspected += here.missing()
        suspected += here.wrong()
        suspected += here.loose(usual)
        best = np.where(here.overlap >= APART_IOU, d.scores[:, None], 0.0).max(axis=0, initial=0.0)
        covered.append(best > threshold)
        unfound += [(i, j, float(best[j])) for j in np.flatnonzero((best <= threshold) & ~image.crowd).tolist()]
    suspected += _spurious(data, covered, unfound, threshold)
    return sorted(suspected, key=lambda suspect: -suspect.suspicion)


class _Image:
    """One image's evidence."""

    def __init__(
        self,
        index: int,
        image: LabelledImage,
        found: Detections,
        partners: npt.NDArray[np.int64],
        trust: npt.NDArray[np.float64],
        threshold: float,
    ) -> None:
        self.index, self.image, self.found, self.partners, self.trust = index, image, found, partners, trust
        self.overlap = overlaps(found.boxes, image.boxes, image.crowd)  # [detections, boxes]
        self.same = found.labels[:, None] == image.labels[None, :]
        self.believed = (found.scores > threshold) & (trust > LEAST_TRUST)
        self.taken = np.zeros(len(image.boxes), dtype=bool)
        self.taken[partners[(partners >= 0) & (found.scores > threshold)]] = True

    def suspect(self, kind: Kind, factor: float, i: int, label: int | None) -> Suspect:
        """Of detection i against a box."""
        score, trust = float(self.found.scores[i]), float(self.trust[i])
        box = None if label is None else self.image.boxes[label]
        iou = 0.0 if label is None else float(self.overlap[i, label])
        name = self.found.names[self.found.labels[i]]
        suspicion = trust * score * factor
        return Suspect(kind, suspicion, self.index, label, box, self.found.boxes[i], name, score, trust, iou)

    def missing(self) -> list[Suspect]:
        inside = _inside(self.found.boxes, self.image.boxes)
        apart = (self.overlap < APART_IOU).all(axis=1) & (inside < APART_SHARE).all(axis=1)
        # A box of its class that nothing else takes is what the detection means, however badly it lies.
        apart &= ~(self.same & (self.overlap >= POOR_IOU) & ~self.taken).any(axis=1)
        return [
            self.suspect("missing label", 1.0, i, None)
            for i in self._best_of_each_place(np.flatnonzero(apart & self.believed))
        ]

    def _best_of_each_place(self, candidates: npt.NDArray[np.int64]) -> list[int]:
        kept: list[int] = []
        for i in candidates[np.argsort(-self.found.scores[candidates], kind="stable")].tolist():
            boxes = self.found.boxes[[i, *kept]]
            if overlaps(boxes[:1], boxes[1:], np.zeros(len(kept), dtype=bool)).max(initial=0.0) < APART_IOU:
                kept.append(i)
        return kept

    def wrong(self) -> list[Suspect]:
        on = np.where(self.image.crowd[None], 0.0, self.overlap)
        suspected: dict[int, Suspect] = {}  # by box: its most confident detection
        for i in np.flatnonzero(self.believed & (self.partners < 0) & (on.max(axis=1, initial=0.0) >= MATCH_IOU)):
            label = int(on[i].argmax())
            if self.same[i, label] or (self.same[i] & (on[i] >= MATCH_IOU)).any():
                continue  # a second detection of a box that has this class
            own = self.found.scores[self.same[:, label] & (on[:, label] >= MATCH_IOU)].max(initial=0.0)
            known = suspected.get(label)
            if own < self.found.scores[i] and (known is None or (known.score or 0.0) < self.found.scores[i]):
                suspected[label] = self.suspect("wrong label", 1.0 - float(own), int(i), label)
        return list(suspected.values())

    def loose(self, usual: npt.NDArray[np.float64]) -> list[Suspect]:
        on = np.where(self.same & ~self.image.crowd[None], self.overlap, 0.0)
        suspected = []
        for label in np.flatnonzero(~self.image.crowd).tolist():
            speaking = self.believed & (on.argmax(axis=1) == label) & (on[:, label] >= POOR_IOU)
            typical = usual[self.image.labels[label]]
            best = on[speaking, label].max(initial=0.0)
            # Halfway from useless to usual; and no believed detection confirms the box.
            if speaking.any() and best < (typical + POOR_IOU) / 2:
                i = int(np.flatnonzero(speaking)[self.found.scores[speaking].argmax()])
                suspected.append(self.suspect("loose box", 1.0 - float(on[i, label] / typical), i, label))
        return suspected


def _trust(
    found: Sequence[Detections],
    matches: Sequence[tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]],
    classes: int,
) -> list[npt.NDArray[np.float64]]:
    """For each detection the share of right ones among those of its class with the nearest scores, itself left out."""
    labels = np.concatenate([d.labels for d in found] or [np.empty(0, dtype=np.int64)])
    scores = np.concatenate([d.scores for d in found] or [np.empty(0, dtype=np.float32)])
    right = np.concatenate([m[1] >= 0 for m in matches] or [np.empty(0, dtype=bool)])
    trust = np.zeros(len(labels))
    for label in range(classes):
        members = np.flatnonzero(labels == label)
        members = members[np.argsort(-scores[members], kind="stable")]
        hits = right[members].astype(np.int64)
        # A rare class has few detections like one: 5 objects, 3 to each side; 400 and more, 20.
        reach = int(np.clip(round(float(np.sqrt(hits.sum()))), 3, 20))
        before = np.concatenate([[0], np.cumsum(hits)])
        ranks = np.arange(len(members))
        low, high = np.maximum(ranks - reach, 0), np.minimum(ranks + reach + 1, len(members))
        near = before[high] - before[low] - hits
        trust[members] = (near + 1) / (high - low - 1 + 2)  # Laplace: one of two where there is no other
    return np.split(trust, np.cumsum([len(d) for d in found])[:-1])


def _usual_iou(
    data: LabelledImages,
    found: Sequence[Detections],
    matches: Sequence[tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]],
    threshold: float,
) -> npt.NDArray[np.float64]:
    """Median IoU [classes] of the right detections above the threshold; MATCH_IOU where there is none."""
    values: list[list[float]] = [[] for _ in data.names]
    for image, d, (_, partners) in zip(data.images, found, matches, strict=True):
        sure = np.flatnonzero((partners >= 0) & (d.scores > threshold))
        overlap = overlaps(d.boxes[sure], image.boxes, image.crowd)
        for row, i in enumerate(sure.tolist()):
            values[d.labels[i]].append(float(overlap[row, partners[i]]))
    return np.array([np.median(v) if v else MATCH_IOU for v in values])


def _spurious(
    data: LabelledImages,
    covered: Sequence[npt.NDArray[np.bool_]],
    unfound: Sequence[tuple[int, int, float]],
    threshold: float,
) -> list[Suspect]:
    features, labels, was_found, place = [], [], [], []
    for i, (image, hit) in enumerate(zip(data.images, covered, strict=True)):
        sides = np.log(np.maximum(image.boxes[:, 2:] - image.boxes[:, :2], 1.0))
        edge = (image.boxes[:, :2] <= 1).any(axis=1) | (
            image.boxes[:, 2:] >= np.array([image.width - 1, image.height - 1])
        ).any(axis=1)
        real = np.flatnonzero(~image.crowd)
        # A box cut by the image's edge is compared with such boxes.
        features.append(np.column_stack([sides, 10.0 * edge])[real])
        labels.append(image.labels[real])
        was_found.append(hit[real])
        place += [(i, int(j)) for j in real]
    if not place:
        return []
    points, classes, hits = np.concatenate(features), np.concatenate(labels), np.concatenate(was_found)
    row_of = {key: row for row, key in enumerate(place)}
    suspected = []
    for i, j, score in unfound:
        row = row_of[i, j]
        others = np.flatnonzero(classes == classes[row])
        others = others[others != row]
        distance = np.abs(points[others] - points[row]).max(axis=1)
        near = np.argsort(distance, kind="stable")[:SIMILAR]
        near = near[distance[near] <= np.log(SIMILAR_SIZE)]
        if len(near) < FEWEST_SIMILAR:
            continue
        share = float(hits[others[near]].mean())
        doubt = share * (1 - score / max(threshold, 1e-9))
        if share > LEAST_TRUST and doubt > LEAST_DOUBT:
            box, name = data.images[i].boxes[j], data.names[classes[row]]
            suspected.append(Suspect("spurious label", doubt, i, j, box, None, name, None, share))
    return suspected


def _inside(found: npt.NDArray[np.float32], true: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Share [n, m] of the smaller of two boxes that lies in the other."""
    a, b = found.astype(np.float64)[:, None], true.astype(np.float64)[None]
    sides = np.clip(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0, None)
    smaller = np.minimum((a[..., 2:] - a[..., :2]).prod(-1), (b[..., 2:] - b[..., :2]).prod(-1))
    return np.asarray(sides.prod(-1) / np.maximum(smaller, 1e-9))

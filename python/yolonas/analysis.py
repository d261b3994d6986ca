"""What a detector does right and wrong at its operating threshold: by class, by pair of classes, by image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from yolonas.data.labelled import LabelledImage, LabelledImages
from yolonas.evaluation import MATCH_IOU, Metrics, coco_curves, in_labels_of, match, metrics_of, overlaps
from yolonas.inference.detections import Detections

POOR_IOU = 0.1  # a detection of the right class that overlaps a box by this much meant it, and lies badly


class Verdict(IntEnum):
    """What a detection is, seen from the truth."""

    RIGHT = 0
    WRONG_CLASS = 1  # on a box of another class that no detection of the right class takes
    DUPLICATE = 2  # on a box that another detection has taken
    POOR_BOX = 3  # overlaps a box of its class by an IoU of 0.1 to 0.5
    BACKGROUND = 4  # where there is nothing
    UNCOUNTED = 5  # in a crowd region of its class


FALSE = (Verdict.DUPLICATE, Verdict.POOR_BOX, Verdict.BACKGROUND)


@dataclass(frozen=True, eq=False)
class ImageResult:
    """One image at the operating threshold.

    detections: those above it, under the data's labels; verdicts: int64 [n], a `Verdict` of each; partners: int64 [n],
    the true box of each right or wrong class, else -1; missed: int64 [k], the true boxes that have no detection.
    """

    detections: Detections
    verdicts: npt.NDArray[np.int64]
    partners: npt.NDArray[np.int64]
    missed: npt.NDArray[np.int64]

    def count(self, *verdicts: Verdict) -> int:
        """How many detections have one of these verdicts."""
        return int(np.isin(self.verdicts, verdicts).sum())

    @property
    def errors(self) -> int:
        """Missed boxes, false boxes and wrong classes."""
        return len(self.missed) + self.count(Verdict.WRONG_CLASS, *FALSE)


@dataclass(frozen=True, eq=False)
class ClassResult:
    """One class. ap and ap50 are None where the data has no object of it, precision where nothing was detected as it.

    curve: precision [101] at recall 0, 0.01 .. 1 and IoU 0.5, as COCO's AP50 averages it (each value is the best
    precision at that recall or a higher one). precision and recall hold at the operating threshold.
    """

    name: str
    objects: int
    ap: float | None
    ap50: float | None
    curve: npt.NDArray[np.float64]
    precision: float | None
    recall: float | None


@dataclass(frozen=True, eq=False)
class Analysis:
    """A detector's result on a data set at one score threshold.

    confusion: int64 [classes + 1, classes + 1], rows the truth, columns the detections; the last row and column stand
    for nothing being there: false and missed boxes. precision and recall are over all classes; 0 where undefined.
    """

    metrics: Metrics
    threshold: float
    classes: tuple[ClassResult, ...]
    confusion: npt.NDArray[np.int64]
    images: tuple[ImageResult, ...]

    @property
    def right(self) -> int:
        """Detections of the right class in the right place."""
        return int(self.confusion[:-1, :-1].trace())

    @property
    def precision(self) -> float:
        """Share of the detections that are right."""
        return self.right / max(int(self.confusion[:, :-1].sum()), 1)

    @property
    def recall(self) -> float:
        """Share of the true boxes that are found."""
        return self.right / max(int(self.confusion[:-1].sum()), 1)

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall."""
        return 2 * self.right / max(int(self.confusion[:, :-1].sum() + self.confusion[:-1].sum()), 1)

    def worst(self, most: int) -> list[int]:
        """Indices of the images with errors, those with most first; among equals the smaller share of right boxes."""
        wrong = [i for i, image in enumerate(self.images) if image.errors]
        wrong.sort(key=lambda i: (-self.images[i].errors, self.images[i].count(Verdict.RIGHT)))
        return wrong[:most]

    def confusions(self) -> list[tuple[int, int, int]]:
        """(true label, detected label, count) of classes taken for each other, most frequent first."""
        between = self.confusion[:-1, :-1].copy()
        np.fill_diagonal(between, 0)
        truth, found = np.nonzero(between)
        pairs = zip(truth.tolist(), found.tolist(), between[truth, found].tolist(), strict=True)
        return sorted(pairs, key=lambda pair: -pair[2])


def analyse(data: LabelledImages, detections: Sequence[Detections], threshold: float | None = None) -> Analysis:
    """Analyse detections, one `Detections` for each image of the data and in its order, as `coco_ap` takes them.

    `threshold` is the operating threshold, by default the one with the best F1 on this data. Boxes and detections of
    the same class meet first, as in the F1; what is left on both sides then meets whatever its class, at an IoU of at
    least 0.5, the largest overlap first. Raises what `coco_ap` raises.
    """
    found = in_labels_of(data, detections)
    precision, recall = coco_curves(data, found)
    metrics = metrics_of(data, found, precision, recall)
    threshold = metrics.threshold if threshold is None else threshold
    images = tuple(_judge(image, d[d.scores > threshold]) for image, d in zip(data.images, found, strict=True))
    confusion = _confusion(data, images)
    return Analysis(metrics, threshold, _classes(data, metrics, precision[0], confusion), confusion, images)


def _judge(image: LabelledImage, found: Detections) -> ImageResult:
    counted, partners = match(image, found)
    real = np.where(image.crowd[None], 0.0, overlaps(found.boxes, image.boxes, image.crowd))
    verdicts = np.full(len(found), Verdict.BACKGROUND, dtype=np.int64)
    same = found.labels[:, None] == image.labels[None, :]
    verdicts[(real * same).max(axis=1, initial=0.0) >= POOR_IOU] = Verdict.POOR_BOX
    verdicts[real.max(axis=1, initial=0.0) >= MATCH_IOU] = Verdict.DUPLICATE
    verdicts[~counted] = Verdict.UNCOUNTED
    verdicts[partners >= 0] = Verdict.RIGHT

    free = ~image.crowd
    free[partners[partners >= 0]] = False
    left = np.where(free[None] & (counted & (partners < 0))[:, None], real, 0.0)
    while left.max(initial=0.0) >= MATCH_IOU:
        i, truth = np.unravel_index(left.argmax(), left.shape)
        partners[i], verdicts[i], free[truth] = truth, Verdict.WRONG_CLASS, False
        left[i], left[:, truth] = 0.0, 0.0
    return ImageResult(found, verdicts, partners, np.flatnonzero(free))


def _confusion(data: LabelledImages, images: Sequence[ImageResult]) -> npt.NDArray[np.int64]:
    nothing = len(data.names)
    confusion = np.zeros((nothing + 1, nothing + 1), dtype=np.int64)
    for image, result in zip(data.images, images, strict=True):
        met, false = result.partners >= 0, np.isin(result.verdicts, FALSE)
        labels = result.detections.labels
        truth = [image.labels[result.partners[met]], np.full(false.sum(), nothing), image.labels[result.missed]]
        found = [labels[met], labels[false], np.full(len(result.missed), nothing)]
        np.add.at(confusion, (np.concatenate(truth), np.concatenate(found)), 1)
    return confusion


def _classes(
    data: LabelledImages, metrics: Metrics, curves: npt.NDArray[np.float64], confusion: npt.NDArray[np.int64]
) -> tuple[ClassResult, ...]:
    results = []
    for label, name in enumerate(data.names):
        objects, detected = int(confusion[label].sum()), int(confusion[:, label].sum())
        right, curve = int(confusion[label, label]), np.maximum(curves[:, label], 0.0)
        results.append(
            ClassResult(
                name,
                objects,
                metrics.per_class.get(name),
                float(curve.mean()) if objects else None,
                curve,
                right / detected if detected else None,
                right / objects if objects else None,
            )
        )
    return tuple(results)

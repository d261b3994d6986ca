"""How sure a difference in AP is: the paired bootstrap over images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from yolonas.data.labelled import LabelledImages
from yolonas.evaluation import coco_matches, in_labels_of
from yolonas.inference.detections import Detections

RESAMPLES = 1000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """AP of one set of detections less that of another, in COCO's 0..1, and its bootstrap interval."""

    value: float
    low: float
    high: float
    resamples: int
    confidence: float = CONFIDENCE


def ap_difference(
    data: LabelledImages,
    detections: Sequence[Detections],
    baseline: Sequence[Detections],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference:
    """AP of `detections` less AP of `baseline`, with the percentile interval of a paired bootstrap over images.

    Each resample draws as many images as there are, with replacement, the same ones for both, and takes COCO's AP of
    them. Detections meet the true boxes once only: a resample weighs each image's matches by how often it was drawn,
    which gives the AP of the repeated images to the last bit but for detections of equal score in one image. The same
    seed gives the same interval. Method: Efron and Tibshirani, An Introduction to the Bootstrap, chapters 8 and 13.
    """
    ours, theirs = (WeighedAP(data, found) for found in (detections, baseline))
    rng = np.random.default_rng(seed)
    count = len(data.images)
    drawn = []
    for _ in range(resamples if count else 0):
        weights = np.bincount(rng.integers(count, size=count), minlength=count)
        drawn.append(ours(weights) - theirs(weights))
    drawn = [difference for difference in drawn if not math.isnan(difference)]  # of those that drew an object
    once = np.ones(count, dtype=np.int64)
    value = ours(once) - theirs(once)
    value = 0.0 if math.isnan(value) else value
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail]).tolist() if drawn else (value, value)
    return Difference(value, low, high, len(drawn))


class _Class(NamedTuple):
    """The detections of one class in all images, best first."""

    image: npt.NDArray[np.int64]  # [n] position of its image
    hit: npt.NDArray[np.bool_]  # [IoU, n] takes a true box
    miss: npt.NDArray[np.bool_]  # [IoU, n] takes none; neither: only a crowd region
    objects: npt.NDArray[np.int64]  # [images] boxes to find


class WeighedAP:
    """AP of detections on a data set in which image i is there `weights[i]` times."""

    def __init__(self, data: LabelledImages, detections: Sequence[Detections]) -> None:
        run = coco_matches(data, in_labels_of(data, detections))
        position = {image.image_id: i for i, image in enumerate(data.images)}
        self._recalls = run.params.recThrs
        by_class: dict[int, list[dict[str, npt.NDArray[np.float64]]]] = {}
        for entry in run.evalImgs:
            if entry is not None:
                by_class.setdefault(entry["category_id"], []).append(entry)
        self._classes = [self._collect(entries, position, len(data.images)) for entries in by_class.values()]

    @staticmethod
    def _collect(entries: list[dict[str, npt.NDArray[np.float64]]], position: dict[int, int], images: int) -> _Class:
        scores = np.concatenate([entry["dtScores"] for entry in entries])
        order = np.argsort(-scores, kind="mergesort")  # pycocotools' own, which settles equal scores
        places = np.concatenate([np.full(len(e["dtScores"]), position[int(e["image_id"])]) for e in entries])
        taken = np.concatenate([entry["dtMatches"] for entry in entries], axis=1)[:, order] > 0
        aside = np.concatenate([entry["dtIgnore"] for entry in entries], axis=1)[:, order].astype(bool)
        objects = np.zeros(images, dtype=np.int64)
        for entry in entries:
            objects[position[int(entry["image_id"])]] = int((np.asarray(entry["gtIgnore"]) == 0).sum())
        return _Class(places[order].astype(np.int64), taken & ~aside, ~taken & ~aside, objects)

    def __call__(self, weights: npt.NDArray[np.int64]) -> float:
        """COCO's AP; weights: whole numbers [images]. NaN where no object is left."""
        found = [self._class_ap(one, weights) for one in self._classes if one.objects @ weights]
        return float(np.mean(found)) if found else math.nan

    def _class_ap(self, one: _Class, weights: npt.NDArray[np.int64]) -> float:
        weight = weights[one.image]
        kept = weight > 0
        weight = weight[kept]
        total = int(one.objects @ weights)
        precisions = np.zeros((len(one.hit), len(self._recalls)))
        if weight.size:
            hits = np.cumsum(one.hit[:, kept] * weight, axis=1)
            misses = np.cumsum(one.miss[:, kept] * weight, axis=1)
            precision = hits / (hits + misses + np.spacing(1))
            precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
            for row, (recall, envelope) in enumerate(zip(hits / total, precision, strict=True)):
                places = np.searchsorted(recall, self._recalls, side="left")
                reached = places < len(envelope)
                precisions[row, reached] = envelope[places[reached]]
        return float(precisions.mean())

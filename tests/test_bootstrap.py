"""The paired bootstrap of AP against drawing the images again for real."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hand_made import NAMES, found, labelled
from yolonas.bootstrap import WeighedAP, ap_difference
from yolonas.data.labelled import LabelledImages
from yolonas.evaluation import coco_ap
from yolonas.inference.detections import Detections


def scene(rng: np.random.Generator, images: int) -> tuple[LabelledImages, list[Detections], list[Detections]]:
    """Images with objects, crowd regions and none at all, and two sets of detections, the second worse."""
    data, good, bad = [], [], []
    for k in range(images):
        count = int(rng.integers(0, 5))
        corners = rng.uniform(0, 60, (count, 2))
        boxes = np.concatenate([corners, corners + rng.uniform(15, 40, (count, 2))], axis=1)
        labels = rng.integers(0, 2, count).tolist()
        crowd = (rng.random(count) < 0.2).tolist()
        data.append(labelled(boxes.tolist(), labels, crowd, image_id=k + 1))
        for found_in, shift in ((good, 3.0), (bad, 8.0)):
            kept = rng.random(count) < 0.9
            moved = np.concatenate([boxes[kept] + rng.normal(0, shift, (int(kept.sum()), 4)), [[1, 1, 20, 20]]])
            moved[:, 2:] = np.maximum(moved[:, 2:], moved[:, :2] + 1)
            scores = rng.uniform(0.1, 1, len(moved)).tolist()
            found_in.append(found(moved.tolist(), scores, [*np.array(labels, dtype=int)[kept].tolist(), 0]))
    return LabelledImages(NAMES, data), good, bad


def repeated(
    data: LabelledImages, detections: list[Detections], weights: np.ndarray
) -> tuple[LabelledImages, list[Detections]]:
    """The data set in which each image is there as often as its weight says."""
    order = np.repeat(np.arange(len(data.images)), weights).tolist()
    images = [replace(data.images[i], image_id=k + 1) for k, i in enumerate(order)]
    return LabelledImages(data.names, images), [detections[i] for i in order]


@pytest.mark.parametrize("seed", range(6))
def test_weighing_images_gives_the_ap_of_repeating_them(seed: int) -> None:
    rng = np.random.default_rng(seed)
    data, detections, _ = scene(rng, 12)
    weighed = WeighedAP(data, detections)
    for _ in range(5):
        weights = np.bincount(rng.integers(12, size=12), minlength=12)
        assert weighed(weights) == pytest.approx(coco_ap(*repeated(data, detections, weights)).ap, abs=1e-12)
    assert weighed(np.ones(12, dtype=np.int64)) == pytest.approx(coco_ap(data, detections).ap, abs=1e-12)


def test_an_image_without_weight_does_not_count() -> None:
    data = LabelledImages(NAMES, [labelled([[10, 10, 40, 40]], [0]), labelled([[10, 10, 40, 40]], [1], image_id=2)])
    weighed = WeighedAP(data, [found([[10, 10, 40, 40]], [0.9], [0]), found([], [], [])])
    assert weighed(np.array([1, 0])) == pytest.approx(1.0)
    assert weighed(np.array([0, 1])) == 0
    assert np.isnan(weighed(np.array([0, 0])))


def test_the_interval_is_that_of_the_slow_and_obvious_bootstrap() -> None:
    rng = np.random.default_rng(7)
    data, good, bad = scene(rng, 10)
    difference = ap_difference(data, bad, good, resamples=60, seed=3)
    assert difference.value == pytest.approx(coco_ap(data, bad).ap - coco_ap(data, good).ap)
    draws, slow = np.random.default_rng(3), []
    for _ in range(60):
        weights = np.bincount(draws.integers(10, size=10), minlength=10)
        slow.append(coco_ap(*repeated(data, bad, weights)).ap - coco_ap(*repeated(data, good, weights)).ap)
    assert (difference.low, difference.high) == pytest.approx(tuple(np.quantile(slow, [0.025, 0.975])))
    assert difference.low < difference.value < difference.high


def test_detections_do_not_differ_from_themselves() -> None:
    data, good, _ = scene(np.random.default_rng(1), 8)
    difference = ap_difference(data, good, good, resamples=20)
    assert (difference.value, difference.low, difference.high) == (0, 0, 0)

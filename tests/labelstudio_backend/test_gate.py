from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from labelstudio_backend.gate import _Curves, judge, rename
from yolonas.data.labelled import LabelledImage, LabelledImages
from yolonas.evaluation import coco_ap
from yolonas.inference.detections import Detections

NAMES = ("bolt", "nut", "washer")
Generator = np.random.Generator


def data_set(rng: Generator, count: int) -> LabelledImages:
    images = []
    for number in range(count):
        n = int(rng.integers(0, 7))
        corner = rng.uniform(0, 500, (n, 2))
        boxes = np.concatenate([corner, corner + rng.uniform(20, 120, (n, 2))], axis=1).astype(np.float32)
        labels = rng.integers(0, len(NAMES), n)
        images.append(LabelledImage(Path(f"{number}.jpg"), boxes, labels, np.zeros(n, bool), 640, 640, number + 1))
    return LabelledImages(NAMES, images)


def found(data: LabelledImages, rng: Generator, *, recall: float, noise: int, jitter: float = 6.0) -> list[Detections]:
    """A detector that finds `recall` of the boxes, `jitter` px off, and `noise` boxes an image that are not there."""
    results = []
    for image in data.images:
        hit = rng.random(len(image.boxes)) < recall
        corner = rng.uniform(0, 500, (noise, 2))
        wrong = np.concatenate([corner, corner + 80], axis=1)
        moved = image.boxes[hit] + np.tile(rng.normal(0, jitter, (int(hit.sum()), 2)), 2)
        boxes = np.clip(np.concatenate([moved, wrong]), 0, 640)
        labels = np.concatenate([image.labels[hit], rng.integers(0, len(NAMES), noise)])
        scores = np.concatenate([rng.uniform(0.4, 1.0, int(hit.sum())), rng.uniform(0.05, 0.6, noise)])
        results.append(Detections(boxes, scores, labels, NAMES, (640, 640)))
    return results


@pytest.mark.parametrize("seed", range(6))
def test_ap50_is_that_of_pycocotools(seed: int) -> None:
    rng = np.random.default_rng(seed)
    data = data_set(rng, 12)
    detections = found(data, rng, recall=rng.uniform(0, 1), noise=int(rng.integers(0, 130)), jitter=12.0)
    ours = _Curves(data, detections).ap50(np.ones(len(data)))
    assert ours == pytest.approx(coco_ap(data, detections).ap50, abs=1e-9)


def test_ap50_of_a_resample_is_that_of_the_images_repeated() -> None:
    rng = np.random.default_rng(1)
    data = data_set(rng, 8)
    detections = found(data, rng, recall=0.7, noise=3)
    weights = np.array([0, 2, 1, 0, 3, 1, 1, 0])
    rows = np.repeat(np.arange(8), weights)
    repeated = LabelledImages(NAMES, [data.images[row] for row in rows])
    expected = _Curves(repeated, [detections[row] for row in rows]).ap50(np.ones(len(rows)))
    assert _Curves(data, detections).ap50(weights) == pytest.approx(expected, abs=1e-9)


def test_a_worse_version_is_refused_and_a_better_one_published() -> None:
    rng = np.random.default_rng(2)
    data = data_set(rng, 40)
    good, bad = found(data, rng, recall=0.9, noise=1), found(data, rng, recall=0.5, noise=3)
    refused, published = judge(data, good, bad), judge(data, bad, good)
    assert refused.measured
    assert not refused.publish
    assert refused.worse is not None
    assert refused.worse > 0.95
    assert refused.interval is not None
    assert refused.interval[1] < 0
    assert published.measured
    assert published.publish
    assert "held-out images" in published.reason


def test_noise_alone_seldom_refuses() -> None:
    refusals = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        data = data_set(rng, 30)
        verdict = judge(data, *(found(data, rng, recall=0.8, noise=1) for _ in range(2)), resamples=300)
        refusals += not verdict.publish
    assert refusals <= 6, "5 % are expected where both versions are equally good"


def test_equal_detections_are_published() -> None:
    rng = np.random.default_rng(3)
    data = data_set(rng, 30)
    detections = found(data, rng, recall=0.8, noise=1)
    verdict = judge(data, detections, detections)
    assert verdict.publish
    assert verdict.worse == 0.0


@pytest.mark.parametrize(("after", "publish"), [(0.75, True), (0.1, False)])
def test_few_images_refuse_only_a_clear_loss_and_say_not_measured(after: float, publish: bool) -> None:
    rng = np.random.default_rng(4)
    data = data_set(rng, 10)
    verdict = judge(data, found(data, rng, recall=0.85, noise=0), found(data, rng, recall=after, noise=0))
    assert verdict.publish is publish
    assert not verdict.measured
    assert ("not measured" in verdict.reason) is publish
    assert verdict.to_dict()["measured"] is False


def test_a_first_version_is_published_whatever_the_figures() -> None:
    rng = np.random.default_rng(5)
    data = data_set(rng, 30)
    good, bad = found(data, rng, recall=0.9, noise=0), found(data, rng, recall=0.1, noise=5)
    assert judge(data, good, bad, first=True).publish
    assert not judge(data, good, bad).publish


def test_nothing_held_out_is_not_measured() -> None:
    verdict = judge(LabelledImages(NAMES, []), [], [])
    assert (verdict.publish, verdict.measured, verdict.images) == (True, False, 0)
    empty = LabelledImage(Path("a"), np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, bool), 9, 9, 1)
    nothing = Detections(np.zeros((0, 4)), np.zeros(0), np.zeros(0), NAMES, (9, 9))
    verdict = judge(LabelledImages(NAMES, [empty]), [nothing], [nothing])
    assert (verdict.publish, verdict.measured) == (True, False)


def test_detections_are_renamed_to_the_labels_and_others_dropped() -> None:
    boxes = np.arange(12, dtype=np.float32).reshape(3, 4)
    before = Detections(boxes, np.array([0.9, 0.8, 0.7]), np.array([2, 0, 1]), ("car", "dog", "truck"), (9, 9), "a.jpg")
    after = rename(before, ("Vehicle", "Person"), {0: "Vehicle", 2: "Vehicle"})
    assert after.labels.tolist() == [0, 0]
    assert after.boxes.tolist() == boxes[:2].tolist()
    assert after.names == ("Vehicle", "Person")
    nothing = before[np.zeros(0, dtype=np.int64)]
    assert len(rename(nothing, ("Vehicle",), {0: "Vehicle"})) == 0

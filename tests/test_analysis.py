"""The analysis at one threshold, against hand-made cases."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hand_made import NAMES, found, labelled
from yolonas.analysis import FALSE, Verdict, analyse
from yolonas.data.labelled import LabelledImages
from yolonas.evaluation import coco_ap
from yolonas.inference.detections import Detections


def test_each_verdict() -> None:
    truth = labelled(
        [[0, 0, 20, 20], [30, 0, 50, 20], [60, 0, 80, 20], [0, 60, 20, 80], [60, 60, 100, 100]],
        [0, 0, 1, 1, 0],
        [False, False, False, False, True],
    )
    cases = [
        ([0, 0, 20, 20], 0.9, 0, Verdict.RIGHT),
        ([0, 0, 20, 18], 0.8, 0, Verdict.DUPLICATE),
        ([30, 0, 50, 20], 0.7, 1, Verdict.WRONG_CLASS),
        ([60, 0, 72, 12], 0.6, 1, Verdict.POOR_BOX),  # IoU 0.36
        ([30, 30, 50, 50], 0.5, 0, Verdict.BACKGROUND),
        ([62, 62, 70, 70], 0.45, 0, Verdict.UNCOUNTED),
        ([82, 82, 90, 90], 0.44, 1, Verdict.BACKGROUND),  # in a crowd of another class, as pycocotools has it
        ([0, 60, 20, 80], 0.3, 1, None),  # right, but below the threshold
    ]
    boxes, scores, labels, verdicts = (list(column) for column in zip(*cases, strict=True))
    analysis = analyse(LabelledImages(NAMES, [truth]), [found(boxes, scores, labels)], 0.4)
    (image,) = analysis.images
    assert image.verdicts.tolist() == verdicts[:-1]
    assert image.partners.tolist() == [0, -1, 1, -1, -1, -1, -1]
    assert image.missed.tolist() == [2, 3]
    # rows cat, dog, nothing; columns the same
    assert analysis.confusion.tolist() == [[1, 1, 0], [0, 0, 2], [2, 2, 0]]
    assert (analysis.right, analysis.recall, analysis.precision) == (1, 1 / 4, 1 / 6)
    assert analysis.f1 == pytest.approx(2 * 1 / (6 + 4))
    assert image.errors == 2 + 1 + 4
    assert analysis.confusions() == [(0, 1, 1)]
    cat, dog = analysis.classes
    assert (cat.objects, cat.precision, cat.recall) == (2, 1 / 3, 1 / 2)
    assert (dog.objects, dog.precision, dog.recall) == (2, 0.0, 0.0)


def test_the_right_class_takes_a_box_before_a_more_confident_wrong_one() -> None:
    data = LabelledImages(NAMES, [labelled([[0, 0, 20, 20]], [0])])
    analysis = analyse(data, [found([[0, 0, 20, 20], [0, 0, 20, 19]], [0.9, 0.5], [1, 0])], 0.1)
    assert analysis.images[0].verdicts.tolist() == [Verdict.DUPLICATE, Verdict.RIGHT]


def test_the_worst_image_comes_first_and_one_without_errors_never() -> None:
    good = labelled([[0, 0, 20, 20]], [0], image_id=1)
    one_missed = labelled([[0, 0, 20, 20], [50, 50, 90, 90]], [0, 1], image_id=2)
    one_false = labelled([], [], image_id=3)
    two = labelled([[0, 0, 20, 20], [50, 50, 90, 90]], [1, 1], image_id=4)
    one = found([[0, 0, 20, 20]], [0.9], [0])
    analysis = analyse(LabelledImages(NAMES, [good, one_missed, one_false, two]), [one] * 4, 0.5)
    assert analysis.worst(10) == [3, 2, 1]
    assert analysis.worst(1) == [3]


def test_classes_meet_by_name_and_what_the_data_lacks_is_left_out() -> None:
    data = LabelledImages(NAMES, [labelled([[0, 0, 20, 20]], [1])])
    d = found([[0, 0, 20, 20], [50, 50, 70, 70]], [0.9, 0.8], [0, 1], ("DOG", "bird"))
    analysis = analyse(data, [d])
    assert analysis.confusion.tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 0]]
    cat = analysis.classes[0]
    assert (cat.objects, cat.ap, cat.ap50, cat.precision, cat.recall) == (0, None, None, None, None)


def test_nothing() -> None:
    nothing = Detections(np.empty((0, 4)), [], [], NAMES, (100, 100))
    for images in ([], [labelled([], [])]):
        analysis = analyse(LabelledImages(NAMES, images), [nothing] * len(images))
        assert (analysis.precision, analysis.recall, analysis.f1, analysis.worst(3)) == (0, 0, 0, [])


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6))
def test_agrees_with_the_metrics(seed: int) -> None:
    rng = np.random.default_rng(seed)
    images, detections = [], []
    for image_id in range(1, 4):
        n, m = int(rng.integers(1, 6)), int(rng.integers(0, 9))
        corners = rng.integers(0, 60, (n, 2))
        boxes = np.concatenate([corners, corners + rng.integers(10, 40, (n, 2))], axis=1)
        crowd = (rng.random(n) < 0.1).tolist()
        images.append(labelled(boxes.tolist(), rng.integers(0, 2, n).tolist(), crowd, image_id=image_id))
        guess = boxes[rng.integers(0, n, m)] + rng.integers(-3, 4, (m, 4))
        detections.append(found(guess.tolist(), rng.uniform(0.01, 1, m).tolist(), rng.integers(0, 2, m).tolist()))
    data = LabelledImages(NAMES, images)
    metrics, analysis = coco_ap(data, detections), analyse(data, detections)
    assert analysis.metrics == metrics
    if metrics.f1:
        assert (analysis.precision, analysis.recall, analysis.f1) == pytest.approx(
            (metrics.precision, metrics.recall, metrics.f1)
        )
    assert analysis.confusion[:-1].sum() == data.objects
    assert analysis.confusion[-1, -1] == 0
    counted = sum(image.count(Verdict.RIGHT, Verdict.WRONG_CLASS, *FALSE) for image in analysis.images)
    assert analysis.confusion[:, :-1].sum() == counted

"""Suspected label errors: each kind planted in a clean data set, and found first."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from yolonas.data.labelled import LabelledImage, LabelledImages
from yolonas.inference.detections import Detections
from yolonas.label_errors import KINDS, Suspect, suspects

NAMES = ("cat", "dog", "rare")
SIDE = 400
THRESHOLD = 0.4


def clean(images: int = 40, seed: int = 0) -> tuple[LabelledImages, list[Detections]]:
    """Nine objects an image on a grid, found well: 1 of 12 missed, IoU of 0.8 and more, a few unsure false boxes."""
    rng = np.random.default_rng(seed)
    data, found = [], []
    for i in range(images):
        corners = np.array([(20 + 125 * x, 20 + 125 * y) for x in range(3) for y in range(3)], dtype=float)
        boxes = np.concatenate([corners, corners + rng.uniform(55, 85, (9, 2))], axis=1)
        labels = rng.choice(3, 9, p=[0.5, 0.45, 0.05])
        hit = rng.random(9) > 1 / 12
        shaken = boxes[hit] + rng.normal(0, 1.5, (hit.sum(), 4))
        doubt = np.concatenate([corners[:2] + 40, corners[:2] + 110], axis=1)
        data.append(
            LabelledImage(
                Path(f"{i}.jpg"), boxes.astype(np.float32), labels, np.zeros(9, dtype=bool), SIDE, SIDE, i + 1
            )
        )
        scores = np.concatenate([rng.uniform(0.5, 0.9, hit.sum()), rng.uniform(0.05, 0.3, 2)])
        found.append(
            Detections(
                np.concatenate([shaken, doubt]),
                scores,
                np.append(labels[hit], rng.integers(0, 2, 2)),
                NAMES,
                (SIDE, SIDE),
            )
        )
    return LabelledImages(NAMES, data), found


def without(image: LabelledImage, label: int) -> LabelledImage:
    kept = np.arange(len(image.boxes)) != label
    return replace(image, boxes=image.boxes[kept], labels=image.labels[kept], crowd=image.crowd[kept])


def sure(data: LabelledImages, found: list[Detections], image: int, label: int) -> tuple[int, int]:
    """A found object like the one asked for: the first with a score of 0.7 and more that is no `rare`."""
    for k in range(image, len(data)):
        d = found[k]
        for j in range(label, 9):
            on = np.abs(d.boxes - data.images[k].boxes[j]).max(axis=1) < 10
            if data.images[k].labels[j] < 2 and d.scores[on].max(initial=0) > 0.7:
                return k, j
    raise AssertionError("nothing like that")


def of_kind(kind: str, all_suspects: list[Suspect]) -> list[Suspect]:
    return [suspect for suspect in all_suspects if suspect.kind == kind]


def test_clean_labels_raise_little_suspicion() -> None:
    data, found = clean()
    left = suspects(data, found, THRESHOLD)
    # The model misses 1 of 12 objects by chance, which looks like labels of nothing; no other kind can appear.
    assert {suspect.kind for suspect in left} == {"spurious label"}
    assert all(0 <= suspect.suspicion <= 1 for suspect in left)


def test_a_missing_label_is_found_first() -> None:
    data, found = clean()
    i, j = sure(data, found, 7, 2)
    removed = data.images[i].boxes[j]
    data.images[i] = without(data.images[i], j)
    (first,) = of_kind("missing label", suspects(data, found, THRESHOLD))
    assert (first.image, first.label, first.box) == (i, None, None)
    assert first.found is not None
    np.testing.assert_allclose(first.found, removed, atol=8)
    assert first.score is not None
    assert first.score > 0.7
    assert first.trust > 0.9


def test_a_wrong_label_is_found_first() -> None:
    data, found = clean()
    i, j = sure(data, found, 11, 0)
    labels = data.images[i].labels.copy()
    truth = NAMES[labels[j]]
    labels[j] = 1 - labels[j]
    data.images[i] = replace(data.images[i], labels=labels)
    (first,) = of_kind("wrong label", suspects(data, found, THRESHOLD))
    assert (first.image, first.label, first.name) == (i, j, truth)
    assert first.iou > 0.8


def test_a_spurious_label_is_found_first() -> None:
    # A perfect model but for the one box that stands on nothing.
    data, found = clean()
    found = [Detections(image.boxes, np.full(9, 0.8), image.labels, NAMES, (SIDE, SIDE)) for image in data.images]
    image = data.images[5]
    nothing = np.array([[150, 100, 210, 138]], dtype=np.float32)
    data.images[5] = replace(
        image,
        boxes=np.concatenate([image.boxes, nothing]),
        labels=np.append(image.labels, 0),
        crowd=np.append(image.crowd, False),
    )
    (first,) = suspects(data, found, THRESHOLD)
    assert (first.kind, first.image, first.label) == ("spurious label", 5, 9)
    assert first.found is None
    assert first.score is None
    assert first.suspicion == pytest.approx(1.0)


def test_a_label_with_a_detection_just_below_the_threshold_is_only_missed() -> None:
    data, _ = clean()
    found = [Detections(image.boxes, np.full(9, 0.8), image.labels, NAMES, (SIDE, SIDE)) for image in data.images]
    found[5].scores[3] = 0.9 * THRESHOLD
    assert suspects(data, found, THRESHOLD) == []
    found[5].scores[3] = 0.1 * THRESHOLD
    (first,) = suspects(data, found, THRESHOLD)
    assert (first.kind, first.image, first.label) == ("spurious label", 5, 3)


def test_labels_of_a_kind_that_is_rarely_found_are_not_spurious() -> None:
    data, found = clean()
    found = [d[d.labels != 1] for d in found]  # no dog is ever found
    assert not [s for s in suspects(data, found, THRESHOLD) if s.name == "dog"]


def test_a_loose_box_is_found_first() -> None:
    data, found = clean()
    i, j = sure(data, found, 20, 3)
    boxes = data.images[i].boxes.copy()
    boxes[j] += np.array([-14, -14, 22, 22], dtype=np.float32)  # IoU with the object about 0.45
    data.images[i] = replace(data.images[i], boxes=boxes)
    left = suspects(data, found, THRESHOLD)
    (first,) = of_kind("loose box", left)
    assert (first.image, first.label) == (i, j)
    assert 0.3 < first.iou < 0.55
    assert not of_kind("missing label", left), "the detection means this box"


def test_all_kinds_at_once_are_each_first() -> None:
    data, found = clean(seed=4)
    missing, wrong, loose = (sure(data, found, k, 0) for k in (3, 10, 17))
    data.images[missing[0]] = without(data.images[missing[0]], missing[1])
    labels = data.images[wrong[0]].labels.copy()
    labels[wrong[1]] = 1 - labels[wrong[1]]
    data.images[wrong[0]] = replace(data.images[wrong[0]], labels=labels)
    boxes = data.images[loose[0]].boxes.copy()
    boxes[loose[1]] += np.array([-14, -14, 22, 22], dtype=np.float32)
    data.images[loose[0]] = replace(data.images[loose[0]], boxes=boxes)
    first = {kind: of_kind(kind, suspects(data, found, THRESHOLD))[0] for kind in KINDS}
    assert first["missing label"].image == missing[0]
    assert (first["wrong label"].image, first["wrong label"].label) == wrong
    assert (first["loose box"].image, first["loose box"].label) == loose


def test_a_model_that_is_often_wrong_is_no_witness() -> None:
    data, found = clean()
    rng = np.random.default_rng(1)
    for k, d in enumerate(found):  # for each right box two as confident ones on nothing
        corners = rng.uniform(0, 330, (18, 2))
        boxes = np.concatenate([d.boxes, np.concatenate([corners, corners + 30], axis=1)])
        scores = np.concatenate([d.scores, rng.uniform(0.5, 0.9, 18)])
        found[k] = Detections(boxes, scores, np.append(d.labels, rng.integers(0, 2, 18)), NAMES, (SIDE, SIDE))
    assert not of_kind("missing label", suspects(data, found, THRESHOLD))


def test_nothing_is_suspected_of_nothing() -> None:
    empty = Detections(np.empty((0, 4)), [], [], NAMES, (SIDE, SIDE))
    no_box = LabelledImage(
        Path("a.jpg"), np.empty((0, 4), np.float32), np.empty(0, np.int64), np.empty(0, bool), SIDE, SIDE, 1
    )
    assert suspects(LabelledImages(NAMES, []), [], THRESHOLD) == []
    assert suspects(LabelledImages(NAMES, [no_box]), [empty], THRESHOLD) == []
    data, _ = clean(2)
    assert suspects(data, [empty, empty], THRESHOLD) == []
    assert suspects(data, [empty, empty], 0.0) == []


def test_detections_in_a_crowd_miss_no_label() -> None:
    data, found = clean()
    i, j = sure(data, found, 7, 2)
    crowd = data.images[i].crowd.copy()
    crowd[j] = True
    data.images[i] = replace(data.images[i], crowd=crowd)
    assert not [suspect for suspect in suspects(data, found, THRESHOLD) if suspect.image == i and suspect.label == j]
    assert not of_kind("missing label", suspects(data, found, THRESHOLD))

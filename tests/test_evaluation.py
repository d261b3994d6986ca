"""COCO AP and the best-F1 threshold, against hand-computed cases and a brute force."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hand_made import NAMES, found, labelled
from quantized_network import trainable
from yolonas.data.readers import LabelledImage, LabelledImages, read_dataset
from yolonas.errors import DataError
from yolonas.evaluation import Metrics, best_f1_threshold, coco_ap, evaluate, label_map, predict_dataset
from yolonas.inference.detections import Detections
from yolonas.inference.detector import Detector
from yolonas.inference.sources import write_image


def perfect(data: LabelledImages, names: tuple[str, ...] | None = None) -> list[Detections]:
    names = names or data.names
    renumber = np.array([names.index(name) for name in data.names])
    return [
        Detections(i.boxes[~i.crowd], np.full(len(i.boxes), 0.9)[~i.crowd], renumber[i.labels[~i.crowd]], names, (9, 9))
        for i in data.images
    ]


def test_the_truth_has_ap_1(shared: Path) -> None:
    data = read_dataset(shared / "data/bccd/val.json")
    metrics = coco_ap(data, perfect(data))
    assert (metrics.ap, metrics.ap50, metrics.ap75) == pytest.approx((1, 1, 1))
    assert metrics.per_class == pytest.approx({"RBC": 1, "WBC": 1, "Platelets": 1})
    assert (metrics.images, metrics.objects, metrics.precision, metrics.recall) == (87, 1137, 1, 1)


def test_the_order_and_number_of_the_models_classes_do_not_matter(shared: Path, capsys: pytest.CaptureFixture) -> None:
    data = read_dataset(shared / "data/bccd/val.json")
    other = ("nothing", "Platelets", "RBC", "more", "WBC")
    assert coco_ap(data, perfect(data, other)).ap == pytest.approx(1)
    upper = [Detections(d.boxes, d.scores, d.labels, ("rbc ", "wbc", "PLATELETS"), (9, 9)) for d in perfect(data)]
    assert coco_ap(data, upper).ap == pytest.approx(1)
    assert capsys.readouterr().out == ""


def test_crowd_and_80_classes(shared: Path) -> None:
    data = read_dataset(shared / "data/coco_permissive")
    metrics = coco_ap(data, perfect(data))
    assert metrics.ap == pytest.approx(1)
    assert set(metrics.per_class) == {data.names[label] for i in data.images for label in i.labels[~i.crowd]}


def test_equals_pycocotools_own_way(shared: Path, tmp_path: Path) -> None:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    data = read_dataset(shared / "data/bccd/val.json")
    rng = np.random.default_rng(3)
    detections, results = [], []
    categories = {0: 1, 1: 2, 2: 3}  # the file's ids
    for image in data.images:
        boxes = np.clip(image.boxes + rng.normal(0, 6, image.boxes.shape), 0, [640, 480, 640, 480]).astype(np.float32)
        boxes = boxes[(boxes[:, 2:] > boxes[:, :2]).all(1)]
        labels = rng.choice(3, len(boxes), p=[0.8, 0.1, 0.1])
        scores = rng.random(len(boxes)).astype(np.float32)
        detections.append(Detections(boxes, scores, labels, data.names, (480, 640)))
        for (x1, y1, x2, y2), score, label in zip(boxes.tolist(), scores.tolist(), labels.tolist(), strict=True):
            bbox = [x1, y1, x2 - x1, y2 - y1]
            results.append({"image_id": image.image_id, "category_id": categories[label], "bbox": bbox, "score": score})
    (tmp_path / "results.json").write_text(json.dumps(results))
    truth = COCO(str(shared / "data/bccd/val.json"))
    run = COCOeval(truth, truth.loadRes(str(tmp_path / "results.json")), "bbox")
    run.evaluate()
    run.accumulate()
    run.summarize()
    metrics = coco_ap(data, detections)
    assert (metrics.ap, metrics.ap50, metrics.ap75, metrics.ar) == pytest.approx(run.stats[[0, 1, 2, 8]], abs=1e-9)
    assert 0.05 < metrics.ap < 0.9
    assert np.mean(list(metrics.per_class.values())) == pytest.approx(metrics.ap)


def test_a_case_computed_by_hand() -> None:
    # Two cats. The best detection is wrong, the second meets the first cat with IoU 0.8, the third misses.
    data = LabelledImages(("cat",), [labelled([[0, 0, 50, 50], [60, 60, 90, 90]], [0, 0])])
    d = found([[0, 60, 30, 90], [0, 0, 50, 40], [60, 0, 90, 30]], [0.9, 0.8, 0.7], [0, 0, 0], ("cat",))
    metrics = coco_ap(data, [d])
    # Recall reaches 0.5 with precision 1/2: 51 of the 101 recall points hold 0.5. That is so at IoU 0.50 to 0.80,
    # 7 of 10 thresholds.
    ap50 = 51 * 0.5 / 101
    assert metrics.ap50 == metrics.ap75 == pytest.approx(ap50)
    assert metrics.ap == pytest.approx(0.7 * ap50)
    assert metrics.ar == pytest.approx(0.7 * 0.5)
    assert (metrics.f1, metrics.precision, metrics.recall) == pytest.approx((0.5, 0.5, 0.5))
    assert metrics.threshold == pytest.approx(0.75)


def test_boxes_that_run_over_the_edge_are_clipped() -> None:
    data = LabelledImages(("cat",), [labelled([[50, 50, 100, 100]], [0])])
    assert coco_ap(data, [found([[50, 50, 180, 180]], [0.9], [0], ("cat",))]).ap == pytest.approx(1)


def test_an_image_without_objects_makes_its_detections_wrong() -> None:
    images = [labelled([[0, 0, 50, 50]], [0]), labelled([], [], image_id=2)]
    right = found([[0, 0, 50, 50]], [0.5], [0])
    wrong = found([[0, 0, 50, 50]], [0.9], [0])
    metrics = coco_ap(LabelledImages(NAMES, images), [right, wrong])
    assert metrics.ap == pytest.approx(0.5)
    assert metrics.per_class == pytest.approx({"cat": 0.5})  # dog has no object


def test_a_class_that_the_model_lacks_counts_as_missed() -> None:
    data = LabelledImages(NAMES, [labelled([[0, 0, 50, 50], [50, 50, 90, 90]], [0, 1])])
    metrics = coco_ap(data, [found([[0, 0, 50, 50]], [0.9], [0], ("Cat", "bird"))])
    assert metrics.per_class == pytest.approx({"cat": 1, "dog": 0})
    assert metrics.ap == pytest.approx(0.5)
    assert metrics.recall == 0.5


def test_no_class_in_common() -> None:
    with pytest.raises(DataError, match="the model knows bird, fish; the data has cat, dog"):
        label_map(("bird", "fish"), NAMES)
    assert label_map(("DOG", "x", "cat"), NAMES).tolist() == [1, -1, 0]
    assert label_map(("a", "A"), ("A", "a")).tolist() == [1, 0]  # the exact name first


def test_nothing_to_find_and_nothing_found() -> None:
    nothing = Detections(np.empty((0, 4)), [], [], NAMES, (100, 100))
    for image in (labelled([[0, 0, 9, 9]], [0]), labelled([], [])):
        metrics = coco_ap(LabelledImages(NAMES, [image]), [nothing])
        assert (metrics.ap, metrics.ap50, metrics.f1, metrics.threshold) == (0, 0, 0, 0.25)
    assert coco_ap(LabelledImages(NAMES, []), []).ap == 0
    assert best_f1_threshold(LabelledImages(NAMES, []), []) == 0.25
    only_wrong = coco_ap(LabelledImages(NAMES, [labelled([], [])]), [found([[0, 0, 9, 9]], [0.9], [0])])
    assert (only_wrong.ap, only_wrong.objects) == (0, 0)
    with pytest.raises(ValueError, match="0 detections for 1 images"):
        coco_ap(LabelledImages(NAMES, [labelled([], [])]), [])


def test_metrics_are_json() -> None:
    data = LabelledImages(NAMES, [labelled([[0, 0, 9, 9]], [0])])
    metrics = coco_ap(data, [found([[0, 0, 9, 9]], [0.9], [0])])
    assert Metrics(**json.loads(json.dumps(metrics.to_dict()))) == metrics


def test_threshold_lies_midway_or_just_below_the_last() -> None:
    data = LabelledImages(NAMES, [labelled([[0, 0, 40, 40], [50, 50, 90, 90]], [0, 1])])
    boxes = [[0, 0, 40, 40], [50, 50, 90, 90], [0, 50, 40, 90]]
    assert best_f1_threshold(data, [found(boxes, [0.9, 0.6, 0.2], [0, 1, 0])]) == pytest.approx(0.4)
    assert best_f1_threshold(data, [found(boxes[:2], [0.9, 0.6], [0, 1])]) == pytest.approx(0.6 * 0.99)
    # Equal scores cannot be parted: right and wrong at 0.6 are kept or dropped together.
    assert best_f1_threshold(data, [found(boxes, [0.9, 0.6, 0.6], [0, 1, 0])]) == pytest.approx(0.6 * 0.99)
    # The right place under the wrong class is wrong.
    assert best_f1_threshold(data, [found(boxes[:2], [0.9, 0.6], [1, 0])]) == 0.25


def test_crowd_counts_neither_right_nor_wrong() -> None:
    data = LabelledImages(NAMES, [labelled([[0, 0, 40, 40], [50, 50, 100, 100]], [0, 0], [False, True])])
    d = found([[60, 60, 70, 70], [80, 80, 90, 90], [0, 0, 40, 40]], [0.9, 0.8, 0.7], [0, 0, 0])
    metrics = coco_ap(data, [d])
    assert metrics.ap == pytest.approx(1)
    assert (metrics.f1, metrics.precision, metrics.objects) == (1, 1, 1)


def brute_force_f1(data: LabelledImages, detections: list[Detections], threshold: float) -> float:
    right = kept = 0
    for image, d in zip(data.images, detections, strict=True):
        free = list(range(len(image.boxes)))
        for i in sorted(range(len(d)), key=lambda i: (-d.scores[i], i)):
            if d.scores[i] <= threshold:
                continue
            kept += 1
            best, best_iou = None, 0.5
            for j in free:
                a, b = d.boxes[i].astype(float), image.boxes[j].astype(float)
                w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
                shared = max(w, 0) * max(h, 0)
                iou = shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)
                if d.labels[i] == image.labels[j] and iou >= best_iou and (best is None or iou > best_iou):
                    best, best_iou = j, iou
            if best is not None:
                right += 1
                free.remove(best)
    return 2 * right / (kept + data.objects) if kept + data.objects else 0.0


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), levels=st.sampled_from([3, 1000]))
def test_best_f1_equals_a_brute_force(seed: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    images, detections = [], []
    for image_id in range(1, 4):
        n, m = rng.integers(0, 4), rng.integers(0, 7)
        corners = rng.integers(0, 60, (n, 2))
        boxes = np.concatenate([corners, corners + rng.integers(10, 40, (n, 2))], axis=1).reshape(-1, 4)
        images.append(labelled(boxes.tolist(), rng.integers(0, 2, n).tolist(), image_id=image_id))
        if n:
            guess = boxes[rng.integers(0, n, m)] + rng.integers(-3, 4, (m, 4))
            scores = rng.integers(1, levels + 1, m) / (levels + 1)
            detections.append(found(guess.tolist(), scores.tolist(), rng.integers(0, 2, m).tolist()))
        else:
            detections.append(Detections(np.empty((0, 4)), [], [], NAMES, (100, 100)))
    data = LabelledImages(NAMES, images)
    threshold = best_f1_threshold(data, detections)
    assert 0 < threshold < 1
    scores = np.concatenate([d.scores for d in detections])
    candidates = [brute_force_f1(data, detections, t) for t in [0.0, *scores.tolist()]]
    assert brute_force_f1(data, detections, threshold) == pytest.approx(max(candidates))
    assert coco_ap(data, detections).f1 == pytest.approx(max(candidates))


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for seed, path in enumerate(paths):
        write_image(path, np.random.default_rng(seed).integers(0, 256, (40 + seed, 60, 3), dtype=np.uint8))
    return paths


@pytest.fixture(scope="module")
def detector() -> Detector:
    return Detector(trainable(), "cpu")


OPTIONS = {"conf": 0.5, "iou": 0.3, "max_det": 20}


def labelled_by(detector: Detector, paths: list[Path], names: tuple[str, ...]) -> LabelledImages:
    """A data set that the detector knows by heart."""
    images = []
    for i, d in enumerate(detector(paths, **OPTIONS), start=1):
        assert len(d) > 0
        labels = np.array([names.index(detector.names[label]) for label in d.labels])
        height, width = d.image_size
        images.append(LabelledImage(Path(str(d.path)), d.boxes, labels, np.zeros(len(d), bool), width, height, i))
    return LabelledImages(names, images)


@pytest.mark.parametrize("batch", [1, 2])
def test_evaluate_end_to_end(detector: Detector, pictures: list[Path], batch: int) -> None:
    data = labelled_by(detector, pictures, ("dog", "fish", "bird", "cat"))
    metrics = evaluate(detector, data, batch=batch, **OPTIONS)
    assert metrics.ap == pytest.approx(1, abs=1e-3)
    assert metrics.images == 3
    assert metrics.seconds > 0
    assert all(d.image is None for d in predict_dataset(detector, data, **OPTIONS))


def test_evaluate_refuses_what_it_cannot_measure(detector: Detector, pictures: list[Path]) -> None:
    data = labelled_by(detector, pictures, detector.names)
    first = data.images[0]
    turned = dataclasses.replace(first, width=first.height, height=first.width)
    with pytest.raises(DataError, match=r"0\.png is 60x40 upright, but its labels are for 40x60"):
        evaluate(detector, dataclasses.replace(data, images=[turned]))
    with pytest.raises(DataError, match="no class in common"):
        evaluate(detector, dataclasses.replace(data, names=("a", "b", "c")))
    pictures[1].write_bytes(b"")
    with pytest.raises(DataError, match=r"1\.png is empty"):
        evaluate(detector, data)

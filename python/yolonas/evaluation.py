"""How good detections are: COCO average precision, by pycocotools, and the score threshold with the best F1."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from yolonas.data.labelled import LabelledImage, LabelledImages
from yolonas.errors import DataError
from yolonas.inference.detections import Detections

if TYPE_CHECKING:
    from yolonas.inference.detector import Detector

MATCH_IOU = 0.5  # of a detection that is right, where one number is asked for
_NO_THRESHOLD = 0.25  # super-gradients' default, where no detection is right and so no threshold is better than another


@dataclass
class Metrics:
    """Accuracy on a data set.

    ap, ap50, ap75 and ar are COCO's (IoU 0.50:0.95, 0.50, 0.75; at most 100 detections an image and class), 0 where the
    data has no object at all. per_class: AP of each class that has objects. precision, recall and f1 hold at
    `threshold`, the score threshold with the best F1 at IoU 0.5. seconds: reading the images and predicting, 0 where
    the detections were given.
    """

    ap: float
    ap50: float
    ap75: float
    ar: float
    per_class: dict[str, float]
    threshold: float
    precision: float
    recall: float
    f1: float
    images: int
    objects: int
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, ready for JSON."""
        return asdict(self)


def evaluate(
    detector: Detector,
    data: LabelledImages,
    *,
    conf: float = 0.01,
    iou: float = 0.7,
    max_det: int = 300,
    batch: int = 8,
    imgsz: int | tuple[int, int] | None = None,
    progress: bool = False,
) -> Metrics:
    """Predict on every image of the data set and measure; see `predict_dataset` for what is raised."""
    start = time.perf_counter()
    detections = predict_dataset(
        detector, data, conf=conf, iou=iou, max_det=max_det, batch=batch, imgsz=imgsz, progress=progress
    )
    seconds = time.perf_counter() - start
    metrics = coco_ap(data, detections)
    metrics.seconds = seconds
    return metrics


def predict_dataset(
    detector: Detector,
    data: LabelledImages,
    *,
    conf: float = 0.01,
    iou: float = 0.7,
    max_det: int = 300,
    batch: int = 8,
    imgsz: int | tuple[int, int] | None = None,
    progress: bool = False,
) -> list[Detections]:
    """Detections of each image of the data set, in its order, without pixels.

    Raises DataError where no class of the data is one of the detector's, where an image cannot be read, or where it
    does not have the size that its labels were made for.
    """
    from tqdm import tqdm

    label_map(detector.names, data.names)  # before any work

    def stop(error: DataError) -> None:
        raise error

    stream = detector.stream([image.path for image in data.images], conf, iou, max_det, batch, imgsz, on_error=stop)
    found = []
    for image, detections in zip(
        tqdm(data.images, unit="image", disable=None if progress else True), stream, strict=True
    ):
        if detections.image_size != (image.height, image.width):
            height, width = detections.image_size
            raise DataError(
                f"{image.path} is {width}x{height} upright, but its labels are for {image.width}x{image.height}: "
                "labels must be in pixels of the image as it is shown, EXIF orientation applied"
            )
        detections.image = None
        found.append(detections)
    return found


def coco_ap(data: LabelledImages, detections: Sequence[Detections]) -> Metrics:
    """Measure detections, one `Detections` for each image of the data and in its order, against its boxes.

    Classes meet by name, whatever their order, number and case; a class of the data that the model lacks counts as
    missed. Raises ValueError where the counts differ, DataError where no class is in common.
    """
    found = in_labels_of(data, detections)
    return metrics_of(data, found, *coco_curves(data, found))


def metrics_of(
    data: LabelledImages,
    detections: Sequence[Detections],
    precision: npt.NDArray[np.float64],  # [IoU, recall, class]
    recall: npt.NDArray[np.float64],  # [IoU, class]
) -> Metrics:
    """The figures, from detections under the data's labels and their curves (see `coco_curves`)."""
    per_class = {
        name: _mean(precision[:, :, label])
        for label, name in enumerate(data.names)
        if precision[:, :, label].max(initial=-1) > -1
    }
    threshold, precise, recalled, f1 = _best_f1(data, detections)
    return Metrics(
        _mean(precision),
        _mean(precision[0]),
        _mean(precision[5]),
        _mean(recall),
        per_class,
        threshold,
        precise,
        recalled,
        f1,
        images=len(data),
        objects=data.objects,
    )


def _mean(values: npt.NDArray[np.float64]) -> float:
    """Over the classes that have objects, as pycocotools has it; 0 where none has."""
    known = values[values > -1]
    return float(known.mean()) if known.size else 0.0


def best_f1_threshold(data: LabelledImages, detections: Sequence[Detections]) -> float:
    """The score threshold, inside (0, 1), that gives the best F1 over all classes; classes meet as in `coco_ap`.

    In each image and class the detections take, best first, the free box that they overlap most, if by an IoU of at
    least 0.5; those that only meet a crowd region count neither right nor wrong. The threshold lies midway between the
    last score to keep and the next. 0.25 where no detection is right.
    """
    return _best_f1(data, in_labels_of(data, detections))[0]


def label_map(names: Sequence[str], data_names: Sequence[str]) -> npt.NDArray[np.int64]:
    """For each class of a model its label in the data, by name, whatever the case; -1 for one that the data lacks.

    Raises DataError, listing both, where no name is in common.
    """
    exact = {name: label for label, name in enumerate(data_names)}
    folded = {_folded(name): label for label, name in reversed(list(enumerate(data_names)))}
    labels = [exact.get(name, folded.get(_folded(name), -1)) for name in names]
    if max(labels, default=-1) < 0:
        raise DataError(f"no class in common: the model knows {_listed(names)}; the data has {_listed(data_names)}")
    return np.array(labels, dtype=np.int64)


def _folded(name: str) -> str:
    return name.strip().casefold()


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def in_labels_of(data: LabelledImages, detections: Sequence[Detections]) -> list[Detections]:
    """The detections under the data's labels, without those of classes that the data lacks."""
    if len(detections) != len(data.images):
        raise ValueError(f"there are {len(detections)} detections for {len(data.images)} images")
    maps = {names: label_map(names, data.names) for names in {d.names for d in detections}}
    mapped = []
    for d in detections:
        labels = maps[d.names][d.labels]
        known = labels >= 0
        mapped.append(Detections(d.boxes[known], d.scores[known], labels[known], data.names, d.image_size))
    return mapped


def coco_curves(
    data: LabelledImages, detections: Sequence[Detections]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Precision [IoU, recall, class] and largest recall [IoU, class] of detections under the data's labels.

    By pycocotools, at IoU 0.50, 0.55 .. 0.95 and recall 0, 0.01 .. 1; -1 for a class without objects.
    """
    run = coco_matches(data, detections)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints each step
        run.accumulate()
    # [IoU, recall, class, area, detections] and [IoU, class, area, detections]
    return run.eval["precision"][..., 0, 0], run.eval["recall"][..., 0, 0]


def coco_matches(data: LabelledImages, detections: Sequence[Detections]) -> Any:
    """pycocotools' COCOeval of detections under the data's labels after `evaluate()`, for all areas, 100 a class."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    document = data.to_coco()
    results: list[dict[str, Any]] = []
    for image, d in zip(data.images, detections, strict=True):
        # Detections run over the edge in no image; others' may, and pycocotools would count the part outside.
        boxes = np.clip(d.boxes.astype(np.float64), 0, [image.width, image.height, image.width, image.height])
        sizes = boxes[:, 2:] - boxes[:, :2]
        for (x, y), (width, height), score, label in zip(
            boxes[:, :2].tolist(), sizes.tolist(), d.scores.tolist(), d.labels.tolist(), strict=True
        ):
            results.append(
                {
                    "id": len(results) + 1,
                    "image_id": image.image_id,
                    "category_id": label + 1,
                    "bbox": [x, y, width, height],
                    "area": width * height,
                    "iscrowd": 0,
                    "score": score,
                }
            )
    with contextlib.redirect_stdout(io.StringIO()):
        truth, found = COCO(), COCO()
        truth.dataset = document
        found.dataset = {**document, "annotations": results}  # not loadRes, which fails on no detection at all
        truth.createIndex()
        found.createIndex()
        run = COCOeval(truth, found, "bbox")
        # Only what is read here: the areas small, medium and large and the limits of 1 and 10 detections take
        # three quarters of the time.
        run.params.areaRng, run.params.areaRngLbl, run.params.maxDets = run.params.areaRng[:1], ["all"], [100]
        run.evaluate()
    return run


def _best_f1(data: LabelledImages, detections: Sequence[Detections]) -> tuple[float, float, float, float]:
    """Threshold, and precision, recall and F1 at it."""
    matches = [match(image, d) for image, d in zip(data.images, detections, strict=True)]
    counted = np.concatenate([m[0] for m in matches] or [np.empty(0, dtype=bool)])
    right = np.concatenate([m[1] >= 0 for m in matches] or [np.empty(0, dtype=bool)])[counted]
    scores = np.concatenate([d.scores for d in detections] or [np.empty(0, dtype=np.float32)])
    scores = scores[counted].astype(np.float64)
    if not right.any():
        return _NO_THRESHOLD, 0.0, 0.0, 0.0
    order = np.argsort(-scores, kind="stable")
    scores, hits = scores[order], np.cumsum(right[order])
    kept = np.arange(1, len(scores) + 1)
    f1 = 2 * hits / (kept + data.objects)
    f1[:-1][scores[:-1] == scores[1:]] = -1.0  # no threshold parts equal scores
    best = int(np.argmax(f1))
    # Below the last score of all nothing is known, so the threshold stays close to it.
    threshold = (scores[best] + scores[best + 1]) / 2 if best + 1 < len(scores) else 0.99 * scores[best]
    return float(threshold), float(hits[best] / kept[best]), float(hits[best] / data.objects), float(f1[best])


def match(image: LabelledImage, found: Detections) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
    """For each detection: whether it counts at all, and the true box of its class that it takes, -1 for none.

    Best first, a detection takes the free box that it overlaps most, if by an IoU of at least 0.5. One that meets only
    a crowd region does not count.
    """
    counted, partner = np.ones(len(found), dtype=bool), np.full(len(found), -1, dtype=np.int64)
    free = ~image.crowd
    overlap = overlaps(found.boxes, image.boxes, image.crowd)
    overlap[found.labels[:, None] != image.labels[None, :]] = 0.0
    order = np.argsort(-found.scores, kind="stable")
    for i in order[overlap.max(axis=1, initial=0.0)[order] >= MATCH_IOU]:
        candidates = np.where(free, overlap[i], 0.0)
        if candidates.max(initial=0.0) >= MATCH_IOU:
            partner[i] = candidates.argmax()
            free[partner[i]] = False
        elif np.where(image.crowd, overlap[i], 0.0).max(initial=0.0) >= MATCH_IOU:
            counted[i] = False
    return counted, partner


def overlaps(
    found: npt.NDArray[np.float32], true: npt.NDArray[np.float32], crowd: npt.NDArray[np.bool_]
) -> npt.NDArray[np.float64]:
    """IoU [n, m] of boxes xyxy; with a crowd region the share of the detection inside it, as pycocotools has it."""
    a, b = found.astype(np.float64)[:, None], true.astype(np.float64)[None]
    sides = np.clip(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0, None)
    shared = sides.prod(-1)
    area_a, area_b = (a[..., 2:] - a[..., :2]).prod(-1), (b[..., 2:] - b[..., :2]).prod(-1)
    union = np.where(crowd[None], area_a, area_a + area_b - shared)
    overlaps: npt.NDArray[np.float64] = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
    return overlaps

"""Whether a newly trained version may serve: it is compared with the current one on images neither may learn from.

The measure is AP50, COCO's average precision at IoU 0.5, mean over the classes that occur: annotators agree on what is
there rather than on the last pixels of a box.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from yolonas.data.labelled import LabelledImages
from yolonas.inference.detections import Detections

MEASURABLE_IMAGES = 20
CONFIDENCE = 0.95
RESAMPLES = 2000
# With fewer images only a loss of AP50 beyond this over sqrt(images) is clear: two standard errors of a mean over
# images that spread by 0.22. It is 0.45 with one image, 0.14 with ten, 0.10 with twenty.
CLEAR_LOSS = 0.45

_RECALLS = np.linspace(0.0, 1.0, 101)
_IOU = 0.5
_MAX_DETECTIONS = 100  # of an image and class, as COCO counts


@dataclass(frozen=True)
class Verdict:
    """The gate's decision, and what it rests on; `worse` is the share of the resamples in which the new one lost."""

    publish: bool
    measured: bool
    reason: str
    images: int
    ap50_before: float | None = None
    ap50_after: float | None = None
    worse: float | None = None
    interval: tuple[float, float] | None = None  # 90 % of the resampled differences after - before

    def to_dict(self) -> dict[str, Any]:
        """JSON for the version's record."""
        return {
            "decision": "published" if self.publish else "refused",
            "measured": self.measured,
            "reason": self.reason,
            "held_out_images": self.images,
            "ap50_before": self.ap50_before,
            "ap50_after": self.ap50_after,
            "share_of_resamples_worse": self.worse,
            "difference_90_percent": self.interval,
        }


def judge(
    data: LabelledImages,
    before: Sequence[Detections],
    after: Sequence[Detections],
    *,
    first: bool = False,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Verdict:
    """Compare the detections of the current version and of the new one on the held-out images.

    - `first`: the current version was never trained in the project; the new one is published, whatever the figures.
    - Fewer than `MEASURABLE_IMAGES` images: not measured; refused only where AP50 fell by more than
      `CLEAR_LOSS / sqrt(images)`.
    - Otherwise a paired bootstrap over the images: refused where AP50 is lower in at least 95 % of the resamples.

    Args:
        data: held-out images with their true boxes.
        before: detections of the current version, one per image, in `data.names`.
        after: detections of the new version, likewise.
        first: see above.
        resamples: draws of the bootstrap.
        seed: of the draws.
    """
    count = len(data)
    if count == 0 or data.objects == 0:
        what = "no labelled task" if count == 0 else f"{count} images, none with a box,"
        return Verdict(True, False, f"not measured: {what} fell into the held-out part", count)
    old, new = _Curves(data, before), _Curves(data, after)
    ones = np.ones(count)
    ap_before, ap_after = old.ap50(ones), new.ap50(ones)
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1.0 / count), size=resamples)
    # A resample in which no class occurs says nothing.
    differences = np.array([new.ap50(weights) - old.ap50(weights) for weights in draws])
    differences = differences[np.isfinite(differences)]
    worse = float((differences < 0).mean())
    interval = tuple(round(float(q), 4) for q in np.quantile(differences, [0.05, 0.95]))
    change = f"AP50 {ap_before:.3f} -> {ap_after:.3f} on {count} held-out images"
    if first:
        publish, measured, reason = True, count >= MEASURABLE_IMAGES, f"first version of the project: {change}"
    elif count < MEASURABLE_IMAGES:
        limit = CLEAR_LOSS / math.sqrt(count)
        publish, measured = ap_before - ap_after <= limit, False
        rule = f"below {MEASURABLE_IMAGES} images only a loss over {limit:.2f} is clear"
        reason = f"{change}: a clear loss ({rule})" if not publish else f"not measured ({rule}): {change}"
    else:
        publish, measured = worse < CONFIDENCE, True
        reason = f"{change}, lower in {worse:.0%} of {len(differences)} resamples (refused from {CONFIDENCE:.0%})"
    return Verdict(
        publish,
        measured,
        reason,
        count,
        round(ap_before, 4),
        round(ap_after, 4),
        round(worse, 4),
        (interval[0], interval[1]),
    )


def rename(detections: Detections, names: Sequence[str], to_name: Mapping[int, str]) -> Detections:
    """The detections whose class becomes one of `names`, in those names; the others are dropped."""
    index = {name: number for number, name in enumerate(names)}
    new = np.array([index.get(to_name.get(label, ""), -1) for label in range(len(detections.names))], dtype=np.int64)
    labels = new[detections.labels] if len(detections) else np.zeros(0, np.int64)
    keep = labels >= 0
    return Detections(
        detections.boxes[keep],
        detections.scores[keep],
        labels[keep],
        tuple(names),
        detections.image_size,
        detections.path,
    )


class _Curves:
    """Every class's detections in order of score, matched once: what a precision-recall curve of any resample needs."""

    def __init__(self, data: LabelledImages, found: Sequence[Detections]) -> None:
        if len(found) != len(data):
            raise ValueError(f"{len(found)} results for {len(data)} images")
        self.classes = []
        for label in range(len(data.names)):
            scores, hits, owners = [], [], []
            truths = np.zeros(len(data))
            for number, (image, detections) in enumerate(zip(data.images, found, strict=True)):
                true = image.boxes[(image.labels == label) & ~image.crowd]
                truths[number] = len(true)
                rows = np.flatnonzero(detections.labels == label)
                rows = rows[np.argsort(-detections.scores[rows], kind="stable")][:_MAX_DETECTIONS]
                scores.append(detections.scores[rows])
                hits.append(_match(detections.boxes[rows], true))
                owners.append(np.full(len(rows), number))
            order = np.argsort(-np.concatenate(scores), kind="stable")
            self.classes.append((truths, np.concatenate(hits)[order], np.concatenate(owners)[order]))

    def ap50(self, weights: npt.NDArray[Any]) -> float:
        """Mean AP over the classes that occur, each image counted `weights` times; NaN where none occurs."""
        precisions = []
        for truths, hits, owners in self.classes:
            positives = float(truths @ weights)
            if positives == 0:
                continue
            counts = weights[owners]
            right = np.cumsum(counts * hits)
            total = np.cumsum(counts)
            precision = np.maximum.accumulate((right / np.maximum(total, 1e-9))[::-1])[::-1]
            at = np.searchsorted(right / positives, _RECALLS, side="left")
            reached = at < len(precision)
            precisions.append(float(precision[at[reached]].sum()) / len(_RECALLS))
        return float(np.mean(precisions)) if precisions else math.nan


def _match(boxes: npt.NDArray[np.float32], true: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """Which boxes [n, 4], best first, take a true box [m, 4] that no better one took: COCO's greedy matching."""
    hits = np.zeros(len(boxes), dtype=bool)
    if len(boxes) == 0 or len(true) == 0:
        return hits
    a, b = boxes[:, None].astype(np.float64), true[None].astype(np.float64)
    sides = np.clip(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0, None)
    shared = sides[..., 0] * sides[..., 1]
    areas = [(x[..., 2] - x[..., 0]) * (x[..., 3] - x[..., 1]) for x in (a, b)]
    iou = shared / np.maximum(areas[0] + areas[1] - shared, 1e-12)
    for row in range(len(boxes)):
        # the last of equals, as pycocotools takes it
        best = len(true) - 1 - int(np.argmax(iou[row, ::-1]))
        if iou[row, best] >= _IOU - 1e-10:
            hits[row] = True
            iou[:, best] = -1.0
    return hits

"""What the raw maps say about the boxes that came of them, and about the image as a whole: see `active_learning`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from yolonas.model.config import STRIDES

if TYPE_CHECKING:
    from yolonas.inference.detections import Detections
    from yolonas.inference.runtimes import Canvases, Found

Floats = npt.NDArray[Any]  # float64

BACKGROUND = -1  # the rival of a box that may be no object at all
FINITE = 50.0  # the logit of a class that is not looked for is minus infinity
STEP = 16  # px of the canvas between the pixels that stand for its looks


@dataclass(frozen=True, eq=False)
class ImageSignals:
    """What the network said about one image, as far as it tells whether to label it.

    scores: [n] 0..1, labels: int [n] of the boxes. margins: [n] 0..1, how far the box's class is ahead of its rival,
    and entropies: [n] 0..1, see `class_doubt`; rivals: int [n], the second in line, BACKGROUND for "no object".
    spreads: [n] 0..1, see `box_spread`. feature: [d], images that look alike to the network have similar ones.
    disagreement: 0..1, see `active_learning.disagreement`; None where there is nothing to compare with. Raises
    ValueError where the arrays do not belong together.
    """

    scores: npt.NDArray[Any]
    labels: npt.NDArray[Any]
    margins: npt.NDArray[Any]
    entropies: npt.NDArray[Any]
    rivals: npt.NDArray[Any]
    spreads: npt.NDArray[Any]
    feature: npt.NDArray[Any]
    disagreement: float | None = None

    def __post_init__(self) -> None:
        sizes = {name: np.shape(getattr(self, name)) for name in _OF_BOXES}
        if len(set(sizes.values())) != 1 or np.ndim(self.scores) != 1 or np.ndim(self.feature) != 1:
            raise ValueError(f"the signals of boxes must be equally many, and the feature one row, not {sizes}")

    @classmethod
    def of(cls, detections: Detections, disagreement: float | None = None) -> ImageSignals:
        """The signals of detections; where they carry none, as those of a file with its NMS inside, by scores alone.

        A score s stands for a margin of |2 s - 1|, its place for certain, and the classes for the feature.
        """
        if detections.signals is not None:
            return dataclasses.replace(detections.signals, disagreement=disagreement)
        scores = np.asarray(detections.scores, np.float64)
        logits = _logit(scores)[:, None]
        margins, entropies, _ = class_doubt(logits)
        feature = np.log1p(np.bincount(detections.labels, scores, len(detections.names)))
        rivals = np.full(len(scores), BACKGROUND)
        return cls(scores, detections.labels, margins, entropies, rivals, np.zeros(len(scores)), feature, disagreement)

    def labelled_as(self, labels: npt.ArrayLike) -> ImageSignals:
        """The same image once a person has labelled it: certain boxes of these classes [m], the feature unchanged."""
        truth = np.asarray(labels, np.int64).reshape(-1)
        one, zero = np.ones(len(truth)), np.zeros(len(truth))
        return ImageSignals(one, truth, one, zero, np.full(len(truth), BACKGROUND), zero, self.feature, None)

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, index: Any) -> ImageSignals:
        """The image with a part of its boxes: those of a slice, an index array or a boolean mask."""
        return dataclasses.replace(self, **{name: np.asarray(getattr(self, name))[index] for name in _OF_BOXES})


_OF_BOXES = ("scores", "labels", "margins", "entropies", "rivals", "spreads")


def with_signals(
    found: Sequence[Found],  # of each image
    anchors: npt.NDArray[np.int64],  # [B, K], padding -1
    maps: Sequence[Any],  # the six raw maps, NumPy's arrays or torch's tensors, class maps first
) -> list[Found]:
    """The same detections with their signals; what is gathered from the maps is little, also where they lie on a GPU.

    The feature is, for each class, log(1 + the sum of the boxes' scores), and the highest and the mean logit in the
    image: [3 C]. Measured on BCCD, nearest neighbours by it are nearest by what was labelled in them too
    (tests/inference/test_signals.py), and the neck's own features are not in an exported file.
    """
    xp = np if isinstance(maps[0], np.ndarray) else _torch()
    image, slot = np.nonzero(anchors >= 0)
    anchor = anchors[image, slot]
    classes, sides = maps[0].shape[1], maps[3].shape[1]
    class_logits = np.empty((len(anchor), classes), np.float32)
    box_logits = np.empty((len(anchor), sides), np.float32)
    strides = np.empty(len(anchor), np.float32)
    highest = np.full((len(anchors), classes), -FINITE)
    total, cells = np.zeros((len(anchors), classes)), 0
    for class_map, box_map, stride in zip(maps[:3], maps[3:], STRIDES, strict=True):
        height, width = class_map.shape[2:]
        (here,) = np.nonzero((anchor >= cells) & (anchor < cells + height * width))
        i, y, x = (xp.asarray(index) for index in (image[here], *np.divmod(anchor[here] - cells, width)))
        class_logits[here] = _host(class_map[i, :, y, x])
        box_logits[here] = _host(box_map[i, :, y, x])
        strides[here] = stride
        np.maximum(highest, _host(xp.amax(class_map, (2, 3))), out=highest)
        total += _host(xp.mean(class_map, (2, 3))) * (height * width)
        cells += height * width
    labels = np.concatenate([f.labels for f in found])
    boxes = np.concatenate([f.boxes for f in found])
    margins, entropies, rivals = class_doubt(class_logits, labels)
    spreads = box_spread(box_logits.reshape(len(anchor), 4, sides // 4), strides, boxes)
    pooled = np.clip(np.concatenate([highest, total / cells], axis=1), -FINITE, FINITE)
    ends = np.cumsum([len(f.labels) for f in found])
    results = []
    for index, (one, end) in enumerate(zip(found, ends.tolist(), strict=True)):
        rows = slice(end - len(one.labels), end)
        counts = np.log1p(np.bincount(one.labels, one.scores, classes))
        of_boxes = (margins[rows], entropies[rows], rivals[rows], spreads[rows])
        results.append(
            one._replace(signals=ImageSignals(one.scores, one.labels, *of_boxes, np.append(counts, pooled[index])))
        )
    return results


def class_doubt(
    logits: npt.NDArray[Any], labels: npt.ArrayLike | None = None
) -> tuple[Floats, Floats, npt.NDArray[np.int64]]:
    """How sure the classes of boxes are: class logits [n, C] -> margins [n], entropies [n], 0..1, rivals int [n].

    The detector's independent sigmoids, given that a box shows one object at most, are a softmax over the logits and 0
    for "no object". The margin is the lead of the first over the second of these C + 1, which with one class of score
    s is |2 s - 1| (margin sampling: Scheffer et al., 2001); the entropy is divided by log(C + 1) (Settles, 2009). The
    rival is the best of the others than the box's own label [n] (None: the best class), BACKGROUND for "no object".
    """
    logits = np.asarray(logits, np.float64)
    n, classes = logits.shape
    if classes == 0:
        raise ValueError("logits must be of one class at least")
    full = np.concatenate([np.zeros((n, 1)), logits], axis=1)
    full -= full.max(axis=1, keepdims=True)
    probabilities = np.exp(full)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    rows = np.arange(n)
    ordered = np.sort(probabilities, axis=1)
    terms = probabilities * np.log(np.where(probabilities > 0, probabilities, 1.0))
    entropies = -terms.sum(axis=1) / np.log(classes + 1.0)
    without = probabilities.copy()
    without[rows, 1 + (logits.argmax(axis=1) if labels is None else np.asarray(labels, np.int64))] = -1.0
    rivals = without.argmax(axis=1) - 1
    return ordered[:, -1] - ordered[:, -2], np.clip(entropies, 0.0, 1.0), rivals


def box_spread(box_logits: npt.NDArray[Any], strides: npt.ArrayLike, boxes: npt.NDArray[Any]) -> Floats:
    """How unsure the places of boxes are: their DFL logits [n, 4, bins] (left, top, right, bottom) -> [n] 0..1.

    It is the standard deviation of each side's distribution (in bins of `strides` [n] px) over the width or height of
    `boxes` [n, 4], xyxy px of the same canvas, on average over the four sides, at most 1. A flat distribution is a
    side that the network does not know (Li et al., Generalized Focal Loss V2, 2021).
    """
    logits = np.asarray(box_logits, np.float64)
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    probabilities = np.exp(logits - logits.max(axis=2, keepdims=True, initial=-np.inf))
    probabilities /= probabilities.sum(axis=2, keepdims=True)
    bins = np.arange(logits.shape[2], dtype=np.float64)
    mean = probabilities @ bins
    variance = np.maximum(probabilities @ bins**2 - mean**2, 0.0)
    deviations = np.sqrt(variance) * np.asarray(strides, np.float64).reshape(-1, 1)
    sides = np.maximum(boxes[:, 2:] - boxes[:, :2], 1.0)
    spreads: Floats = np.minimum((deviations / np.concatenate([sides, sides], axis=1)).mean(axis=1), 1.0)
    return spreads


def looks(canvas: Canvases) -> npt.NDArray[np.float64]:
    """A canvas, uint8 [3, H, W], in eight numbers: mean and deviation of each channel, contrast in y and in x.

    They tell images apart to a network that has learned nothing yet.
    """
    pixels = canvas[:, ::STEP, ::STEP].astype(np.float32) / 255.0
    contrasts = [float(np.abs(np.diff(pixels, axis=axis)).mean()) for axis in (1, 2)]
    return np.concatenate([pixels.mean(axis=(1, 2)), pixels.std(axis=(1, 2)), contrasts]).astype(np.float64)


def _logit(scores: Floats) -> Floats:
    inside = np.clip(scores, 1e-6, 1.0 - 1e-6)
    logits: Floats = np.log(inside / (1.0 - inside))
    return logits


def _host(array: Any) -> npt.NDArray[np.float32]:
    return array if isinstance(array, np.ndarray) else array.float().cpu().numpy()


def _torch() -> Any:
    import torch

    return torch

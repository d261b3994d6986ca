"""What the raw maps say about the boxes that came of them, and about the image as a whole: see `active_learning`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from yolonas.active_learning import ImageSignals, box_spread, class_doubt
from yolonas.inference.runtimes import Canvases, Found
from yolonas.model.config import STRIDES

FINITE = 50.0  # the logit of a class that is not looked for is minus infinity
STEP = 16  # px of the canvas between the pixels that stand for its looks


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


def looks(canvas: Canvases) -> npt.NDArray[np.float64]:
    """A canvas, uint8 [3, H, W], in eight numbers: mean and deviation of each channel, contrast in y and in x.

    They tell images apart to a network that has learned nothing yet.
    """
    pixels = canvas[:, ::STEP, ::STEP].astype(np.float32) / 255.0
    contrasts = [float(np.abs(np.diff(pixels, axis=axis)).mean()) for axis in (1, 2)]
    return np.concatenate([pixels.mean(axis=(1, 2)), pixels.std(axis=(1, 2)), contrasts]).astype(np.float64)


def _host(array: Any) -> npt.NDArray[np.float32]:
    return array if isinstance(array, np.ndarray) else array.float().cpu().numpy()


def _torch() -> Any:
    import torch

    return torch

"""The ops on NumPy arrays: needs NumPy alone, torch is not imported.

from yolonas.ops import numpy as npops
boxes, scores, labels, anchors, counts = npops.decode_nms(class_logits, box_logits, (8, 16, 32),
                                                          score_threshold=0.25, iou_threshold=0.7)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from yolonas import _core
from yolonas.ops import arguments

Array = NDArray[Any]

_TYPES = {np.dtype(np.float32): 0, np.dtype(np.float16): 1}


class Decoded(NamedTuple):
    """Detections of a batch, of fixed size K = max_detections; rows past an image's count are padding."""

    boxes: NDArray[np.float32]  # [B, K, 4] xyxy canvas px, not clipped; padding 0
    scores: NDArray[np.float32]  # [B, K]; padding 0
    labels: NDArray[np.int64]  # [B, K]; padding -1
    anchors: NDArray[np.int64]  # [B, K] index over all levels, row-major within a level; padding -1
    counts: NDArray[np.int64]  # [B] detections of each image


def decode_nms(
    class_logits: Sequence[Array],
    box_logits: Sequence[Array],
    strides: Sequence[float],
    *,
    score_threshold: float,
    iou_threshold: float,
    pre_nms_top_k: int = 1000,
    max_detections: int = 300,
    multi_label: bool = True,
    class_agnostic: bool = False,
    threads: int = 1,
) -> Decoded:
    """Raw head maps -> detections: threshold, top-k, DFL decoding of survivors, NMS, as `yolonas.ops.decode_nms`.

    Args:
        class_logits: a map [B, num_classes, h, w] per level, float32 or float16, any strides.
        box_logits: a map [B, 4 * bins, h, w] per level, of the same type.
        strides: canvas pixels per grid cell of each level.
        score_threshold: from 0 to 1; a candidate's score is above it.
        iou_threshold: from 0 to 1; a suppressed box's IoU with a better one is above it.
        pre_nms_top_k: candidates of an image that enter the NMS.
        max_detections: K, detections of an image.
        multi_label: every (anchor, class) is a candidate; otherwise only each anchor's best class.
        class_agnostic: boxes suppress boxes of every class.
        threads: images of the batch decoded at the same time.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.
    """
    class_logits, box_logits = _arrays(class_logits, "class_logits"), _arrays(box_logits, "box_logits")
    steps = arguments.level_strides(strides, len(box_logits), _core.MAX_LEVELS)
    batch, bins = arguments.box_shapes([m.shape for m in box_logits])
    classes = arguments.class_shapes([m.shape for m in class_logits], [m.shape for m in box_logits])
    dtype = _dtype([*class_logits, *box_logits])
    k = arguments.positive(max_detections, "max_detections")
    options = _core.DecodeNmsOptions(
        batch,
        classes,
        bins,
        arguments.threshold(score_threshold, "score_threshold"),
        arguments.threshold(iou_threshold, "iou_threshold"),
        arguments.positive(pre_nms_top_k, "pre_nms_top_k"),
        k,
        bool(multi_label),
        bool(class_agnostic),
    )
    out = Decoded(
        np.empty((batch, k, 4), np.float32),
        np.empty((batch, k), np.float32),
        np.empty((batch, k), np.int64),
        np.empty((batch, k), np.int64),
        np.empty(batch, np.int64),
    )
    _core.decode_nms_cpu(
        [_map(m) for m in class_logits],
        [_map(m) for m in box_logits],
        steps,
        _TYPES[dtype],
        options,
        [_address(array) for array in out],
        arguments.positive(threads, "threads", 2**31 - 1),
    )
    return out


def dfl_decode(box_logits: Sequence[Array], strides: Sequence[float], *, threads: int = 1) -> NDArray[np.float32]:
    """Box logits [B, 4 * bins, h, w] per level -> boxes [B, A, 4] float32 xyxy canvas px; A sums h * w over levels.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.
    """
    box_logits = _arrays(box_logits, "box_logits")
    steps = arguments.level_strides(strides, len(box_logits), _core.MAX_LEVELS)
    batch, bins = arguments.box_shapes([m.shape for m in box_logits])
    dtype = _dtype(box_logits)
    boxes = np.empty((batch, sum(m.shape[2] * m.shape[3] for m in box_logits), 4), np.float32)
    threads = arguments.positive(threads, "threads", 2**31 - 1)
    _core.dfl_decode_cpu([_map(m) for m in box_logits], steps, _TYPES[dtype], batch, bins, _address(boxes), threads)
    return boxes


def nms(boxes: Array, scores: Array, iou_threshold: float) -> NDArray[np.int64]:
    """Greedy NMS: boxes [N, 4] xyxy, scores [N] -> kept indices, descending by score, ties by index.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.
    """
    return _nms(boxes, scores, None, iou_threshold)


def batched_nms(boxes: Array, scores: Array, labels: Array, iou_threshold: float) -> NDArray[np.int64]:
    """`nms` within each label [N], integers or floats: boxes of different labels never suppress each other.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.
    """
    labels = np.asarray(labels)
    if labels.dtype.kind == "f" and labels.dtype.itemsize <= 8:
        # Bits that are equal where the floats are, once -0 is 0.
        labels = (labels.astype(np.float64) + 0.0).view(np.int64)
    elif labels.dtype.kind not in "biu":
        raise TypeError(f"labels must be integers or floats, not {labels.dtype}")
    return _nms(boxes, scores, labels.astype(np.int64, copy=False), iou_threshold)


def _nms(boxes: Array, scores: Array, labels: Array | None, iou_threshold: float) -> NDArray[np.int64]:
    boxes, scores = _aligned(boxes), _aligned(scores)
    arguments.nms_shapes(boxes.shape, scores.shape, None if labels is None else labels.shape)
    for name, array in (("boxes", boxes), ("scores", scores)):
        if array.dtype not in (np.float16, np.float32, np.float64):
            raise TypeError(f"{name} must be float16, float32 or float64, not {array.dtype}")
    iou_threshold = arguments.threshold(iou_threshold, "iou_threshold")
    double = np.float64 in (boxes.dtype, scores.dtype)
    function = _core.batched_nms_cpu_float64 if double else _core.batched_nms_cpu_float32
    compute = np.float64 if double else np.float32
    boxes, scores = np.ascontiguousarray(boxes, compute), np.ascontiguousarray(scores, compute)
    keep = np.empty(len(boxes), np.int64)
    labels = None if labels is None else np.ascontiguousarray(labels)
    label_address = 0 if labels is None else _address(labels)
    kept = function(_address(boxes), _address(scores), label_address, len(boxes), iou_threshold, _address(keep))
    return keep[:kept].copy()


def _arrays(arrays: Sequence[Array], name: str) -> list[Array]:
    if isinstance(arrays, np.ndarray):
        raise TypeError(f"{name} must be a sequence with an array per level, not one array")
    return [_aligned(array) for array in arrays]


def _aligned(array: Array) -> Array:
    """The array itself, or a copy where elements start between two addresses of their type: a field of a record."""
    array = np.asarray(array)
    return array if array.flags.aligned else array.copy()


def _dtype(arrays: Sequence[Array]) -> np.dtype[Any]:
    dtypes = {array.dtype for array in arrays}
    if len(dtypes) != 1 or next(iter(dtypes)) not in _TYPES:
        raise TypeError(f"logits must all be float32 or all float16, not {', '.join(sorted(map(str, dtypes)))}")
    return dtypes.pop()


def _address(array: Array) -> int:
    return int(array.__array_interface__["data"][0])


def _map(array: Array) -> list[int]:
    return [_address(array), *array.shape[2:], *(stride // array.itemsize for stride in array.strides)]

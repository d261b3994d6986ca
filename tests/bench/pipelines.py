"""What people use in place of `yolonas.ops.decode_nms`: the same work, from raw head maps to detections, in other ways.

Also reductions that read every class map once, and how far two results agree.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

try:
    from torchvision.extension import _assert_has_ops
    from torchvision.ops import boxes as torchvision_boxes

    _assert_has_ops()
    NO_TORCHVISION = ""
except (ImportError, RuntimeError) as error:
    NO_TORCHVISION = f"torchvision's operators cannot be loaded ({str(error).split('.')[0]})"

STRIDES = (8, 16, 32)
IOU, TOP_K, MAX_DETECTIONS = 0.7, 1000, 300

Run = Callable[[], Any]
Detected = list[tuple[Any, Any, Any]]  # an image's boxes [n, 4], scores [n], labels [n]


class Maps(NamedTuple):
    class_logits: list[Tensor]  # a map [B, C, h, w] of each level
    box_logits: list[Tensor]  # [B, 4 * bins, h, w]


def each_map(maps: Maps, function: Callable[[Tensor], Tensor]) -> Maps:
    return Maps(*([function(m) for m in side] for side in maps))


def anchor_grid(maps: Maps) -> tuple[Tensor, Tensor]:
    """Centres of the anchors in grid cells [A, 2] and their strides [A, 1]: made once, as every pipeline does."""
    points, strides = [], []
    for m, stride in zip(maps.class_logits, STRIDES, strict=True):
        y, x = torch.meshgrid(torch.arange(m.shape[2]) + 0.5, torch.arange(m.shape[3]) + 0.5, indexing="ij")
        points.append(torch.stack([x, y], -1).reshape(-1, 2))
        strides.append(torch.full((x.numel(), 1), float(stride)))
    return torch.cat(points), torch.cat(strides)


def reference_pipeline(maps: Maps, conf: float) -> Callable[[], Detected]:
    """What super-gradients 3.7.1 does after its last convolution, in eager torch, with torchvision's batched NMS."""
    bins = maps.box_logits[0].shape[1] // 4
    like = maps.box_logits[0]
    projection = torch.arange(bins, dtype=like.dtype, device=like.device).view(1, bins, 1, 1)
    points, strides = (t.to(like) for t in anchor_grid(maps))

    @torch.no_grad()
    def run() -> Detected:
        distances = []
        for m in maps.box_logits:
            sides = m.reshape(len(m), 4, bins, -1).permute(0, 2, 3, 1)  # [B, bins, h * w, 4]
            distances.append(torch.nn.functional.conv2d(sides.softmax(1), projection).squeeze(1))
        left_top, right_bottom = torch.cat(distances, 1).chunk(2, -1)
        all_boxes = torch.cat([points - left_top, points + right_bottom], -1) * strides
        all_scores = torch.cat([m.flatten(2) for m in maps.class_logits], -1).permute(0, 2, 1).sigmoid()
        out: Detected = []
        for boxes, scores in zip(all_boxes, all_scores, strict=True):
            anchors, labels = (scores > conf).nonzero().unbind(1)
            boxes, scores = boxes[anchors], scores[anchors, labels]
            if len(scores) > TOP_K:
                scores, best = scores.topk(TOP_K)
                boxes, labels = boxes[best], labels[best]
            keep = torchvision_boxes.batched_nms(boxes, scores, labels, IOU)[:MAX_DETECTIONS]
            out.append((boxes[keep], scores[keep], labels[keep]))
        return out

    return run


def numpy_cv2(
    maps: Maps, conf: float, pool: ThreadPoolExecutor | None, threshold_first: bool = False
) -> Callable[[], Detected]:
    """NumPy up to cv2.dnn.NMSBoxesBatched, the images over `pool`; `threshold_first` decodes the candidates alone."""
    all_points, all_strides = (t.numpy() for t in anchor_grid(maps))
    class_maps = [m.flatten(2).numpy() for m in maps.class_logits]  # [B, C, h * w]
    box_maps = [m.unflatten(1, (4, -1)).flatten(3).numpy() for m in maps.box_logits]  # [B, 4, bins, h * w]
    bins = np.arange(box_maps[0].shape[2], dtype=np.float32)[:, None]
    first = np.cumsum([0, *(m.shape[3] for m in box_maps)])  # first anchor of each level
    cutoff = np.float32(np.log(conf / (1 - conf)))

    def sigmoid(x: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-x))

    def decode(logits: np.ndarray, points: np.ndarray, strides: np.ndarray) -> np.ndarray:  # logits [4, bins, n]
        weights = np.exp(logits - logits.max(1, keepdims=True))
        left, top, right, bottom = (weights * bins).sum(1) / weights.sum(1)
        x, y = points.T
        return np.stack([x - left, y - top, x + right, y + bottom], 1) * strides

    def finish(boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> tuple[Any, Any, Any]:
        xywh = boxes.copy()
        xywh[:, 2:] -= xywh[:, :2]
        keep = np.asarray(cv2.dnn.NMSBoxesBatched(xywh, scores, labels, 0.0, IOU), np.int64)[:MAX_DETECTIONS]
        return boxes[keep], scores[keep], labels[keep]

    def best(values: np.ndarray) -> np.ndarray | slice:
        return np.argpartition(-values, TOP_K)[:TOP_K] if len(values) > TOP_K else slice(None)

    def whole(image: int) -> tuple[Any, Any, Any]:
        scores = np.concatenate([sigmoid(m[image]) for m in class_maps], 1)  # [C, A]
        boxes = decode(np.concatenate([m[image] for m in box_maps], 2), all_points, all_strides)
        labels, anchors = np.nonzero(scores > conf)
        chosen = best(scores[labels, anchors])
        labels, anchors = labels[chosen], anchors[chosen]
        return finish(boxes[anchors], scores[labels, anchors], labels)

    def candidates(image: int) -> tuple[Any, Any, Any]:
        logits = np.concatenate([m[image] for m in class_maps], 1)
        labels, anchors = np.nonzero(logits > cutoff)
        chosen = best(logits[labels, anchors])
        labels, anchors = labels[chosen], anchors[chosen]
        levels = np.searchsorted(first, anchors, "right") - 1
        sides = np.empty((4, len(bins), len(anchors)), np.float32)
        for level, m in enumerate(box_maps):
            here = levels == level
            sides[:, :, here] = m[image][:, :, anchors[here] - first[level]]
        boxes = decode(sides, all_points[anchors], all_strides[anchors])
        return finish(boxes, sigmoid(logits[labels, anchors]), labels)

    images, one = range(len(class_maps[0])), candidates if threshold_first else whole
    return lambda: list((pool.map if pool else map)(one, images))


def reads(maps: Maps) -> dict[str, Run]:
    """Plain reductions, the fastest found from Python: the best takes the time of one read of the class maps."""
    arrays = [m.numpy().reshape(1, -1) for m in maps.class_logits]
    return {
        "np.max": lambda: [a.max() for a in arrays],
        "torch.sum": lambda: [m.sum() for m in maps.class_logits],
        "cv2.norm": lambda: [cv2.norm(a, cv2.NORM_INF) for a in arrays],
    }


def detected(result: Any) -> Detected:
    if isinstance(result, list):
        return [tuple(np.asarray(part) for part in image) for image in result]
    boxes, scores, labels, _, counts = (np.asarray(part) for part in result)
    return [(boxes[i, :n], scores[i, :n], labels[i, :n]) for i, n in enumerate(counts)]


def agreement(a: Detected, b: Detected) -> float:
    """Share of both sides' detections that the other has: same label, boxes within 0.05 px, scores within 1e-5."""
    found = total = 0
    for (boxes, scores, labels), (others, other_scores, other_labels) in zip(a, b, strict=True):
        near = np.abs(boxes[:, None] - others[None]).max(2, initial=0) < 0.05
        near &= (np.abs(scores[:, None] - other_scores) < 1e-5) & (labels[:, None] == other_labels)
        found += near.any(0).sum() + near.any(1).sum()
        total += sum(near.shape)
    return found / total if total else 1.0

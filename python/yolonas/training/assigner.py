"""Which anchor point learns which ground-truth box: task-aligned assignment, and ATSS.

Everything is [B, G, A] (images, padded ground truth, anchor points) and free of host synchronisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from yolonas.data.targets import Targets

EPS = 1e-9


class Assignment(NamedTuple):
    """What each anchor point should predict.

    labels [B, A] int64, the number of classes for background; boxes [B, A, 4] float32, xyxy canvas px (any box where
    the label is background); scores [B, A, C] float32, the soft target of the assigned class, 0 elsewhere.
    """

    labels: Tensor
    boxes: Tensor
    scores: Tensor


@torch.no_grad()
def task_aligned(
    predicted_scores: Tensor,
    predicted_boxes: Tensor,
    points: Tensor,
    targets: Targets,
    *,
    top_k: int = 13,
    alpha: float = 1.0,
    beta: float = 6.0,
    sequential: bool = False,
) -> Assignment:
    """Give each box the `top_k` points inside it with the highest score^alpha * IoU^beta (TOOD, arXiv 2108.07755).

    predicted_scores [B, A, C] in 0..1; predicted_boxes [B, A, 4] and points [A, 2] in canvas px. A point wanted by
    several boxes goes to the box it overlaps most. The soft target is the metric, scaled so that the best point of a
    box gets that box's best IoU. `sequential` drops boxes whose best metric is not above 1e-9, as the reference does
    when it assigns image by image; its batched form, the default, keeps them.
    """
    batch, _, num_classes = predicted_scores.shape
    ious = pairwise_iou(targets.boxes, predicted_boxes)  # [B, G, A]
    images = torch.arange(batch, device=ious.device).unsqueeze(-1)
    metric = predicted_scores.transpose(1, 2)[images, targets.labels].pow(alpha) * ious.pow(beta)

    inside = _points_inside(points, targets.boxes)
    wanted = metric * inside
    values, indices = wanted.topk(min(top_k, points.shape[0]), dim=-1)
    keep = targets.mask.unsqueeze(-1)
    if sequential:
        keep = keep & (values[..., :1] > EPS)
    positive = torch.zeros_like(inside).scatter_(-1, indices, True) & inside & keep
    positive = _resolve(positive, ious)

    metric = metric * positive
    best_metric = metric.amax(-1, keepdim=True)
    best_iou = (ious * positive).amax(-1, keepdim=True)
    return _gather(positive, targets, (metric / (best_metric + EPS) * best_iou).amax(1), num_classes)


@torch.no_grad()
def atss(
    predicted_boxes: Tensor,
    anchors: Tensor,
    level_sizes: Sequence[int],
    targets: Targets,
    num_classes: int,
    *,
    top_k: int = 9,
) -> Assignment:
    """Give each box the points near its centre whose anchor overlaps it well (ATSS, arXiv 1912.02424).

    predicted_boxes [B, A, 4] and anchors [A, 4] (one square per point), xyxy canvas px, level after level with
    `level_sizes` points each. Candidates are the `top_k` nearest points of each level; those above mean + standard
    deviation of the candidates' IoU, with their centre in the box, are positive. The soft target is the IoU of the
    predicted box.
    """
    batch, most, _ = targets.boxes.shape
    ious = pairwise_iou(targets.boxes, anchors.expand(batch, -1, -1))
    points = (anchors[:, :2] + anchors[:, 2:]) / 2
    centres = (targets.boxes[..., :2] + targets.boxes[..., 2:]) / 2
    distances = (centres.reshape(-1, 1, 2) - points).norm(dim=-1).reshape(batch, most, -1)

    nearest, start = [], 0
    for level in distances.split(list(level_sizes), dim=-1):
        nearest.append(level.topk(min(top_k, level.shape[-1]), dim=-1, largest=False).indices + start)
        start += level.shape[-1]
    candidates = torch.cat(nearest, dim=-1)
    overlap = ious.gather(-1, candidates)
    threshold = overlap.mean(-1, keepdim=True) + overlap.std(-1, keepdim=True)

    inside = _points_inside(points, targets.boxes)
    near = torch.zeros_like(inside).scatter_(-1, candidates, True)
    positive = _resolve(near & (ious > threshold) & inside & targets.mask.unsqueeze(-1), ious)
    predicted = pairwise_iou(targets.boxes, predicted_boxes) * positive
    return _gather(positive, targets, predicted.amax(1), num_classes)


def pairwise_iou(first: Tensor, second: Tensor) -> Tensor:
    """IoU of boxes [B, G, 4] and [B, A, 4] -> [B, G, A]."""
    x1, y1, x2, y2 = first.unsqueeze(2).unbind(-1)
    left, top, right, bottom = second.unsqueeze(1).unbind(-1)
    width = (torch.minimum(x2, right) - torch.maximum(x1, left)).clamp_(min=0)
    shared = width.mul_((torch.minimum(y2, bottom) - torch.maximum(y1, top)).clamp_(min=0))
    areas = [(boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1) for boxes in (first, second)]
    return shared / (areas[0].unsqueeze(2) + areas[1].unsqueeze(1) - shared + EPS)


def _points_inside(points: Tensor, boxes: Tensor) -> Tensor:
    """Whether points [A, 2] lie strictly inside boxes [B, G, 4] -> [B, G, A] bool."""
    x, y = points.unbind(-1)
    x1, y1, x2, y2 = boxes.unsqueeze(2).unbind(-1)
    return (x - x1 > EPS) & (y - y1 > EPS) & (x2 - x > EPS) & (y2 - y > EPS)


def _resolve(positive: Tensor, ious: Tensor) -> Tensor:
    """Leave each point one box: where several claim it, the box (of all, claimant or not) with the highest IoU."""
    owner = _first(ious == ious.amax(1, keepdim=True))
    best = torch.arange(ious.shape[1], device=ious.device).view(1, -1, 1) == owner.unsqueeze(1)
    return torch.where(positive.sum(1, keepdim=True) > 1, best, positive)


def _first(chosen: Tensor) -> Tensor:
    """The lowest box chosen for each point, bool [B, G, A] -> int64 [B, A]; 0 where none is.

    The same as argmax over the boxes, which takes ten times as long on a CPU.
    """
    count = chosen.shape[1]
    numbers = torch.arange(count, device=chosen.device, dtype=torch.int32).view(1, -1, 1)
    return torch.where(chosen, numbers, count).amin(1).remainder(count).long()


def _gather(positive: Tensor, targets: Targets, point_scores: Tensor, num_classes: int) -> Assignment:
    """The assignment of `positive` [B, G, A], at most one box a point, with soft targets [B, A]."""
    owner, foreground = _first(positive), positive.any(1)
    labels = targets.labels.gather(1, owner)
    boxes = targets.boxes.gather(1, owner.unsqueeze(-1).expand(-1, -1, 4))
    scores = torch.zeros(*owner.shape, num_classes, dtype=point_scores.dtype, device=point_scores.device)
    scores.scatter_(2, labels.unsqueeze(-1), (point_scores * foreground).unsqueeze(-1))
    return Assignment(torch.where(foreground, labels, num_classes), boxes, scores)

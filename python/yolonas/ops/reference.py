"""The ops in plain torch, slow and obvious: the oracle of the tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from yolonas.ops.functional import Decoded


def dfl_decode(box_logits: Sequence[Tensor], strides: Sequence[float]) -> Tensor:
    """As `yolonas.ops.dfl_decode`: boxes [B, A, 4] xyxy canvas px."""
    boxes = []
    for logits, stride in zip(box_logits, strides, strict=True):
        batch, channels, height, width = logits.shape
        bins = channels // 4
        distribution = _computed(logits).reshape(batch, 4, bins, height * width).softmax(2)
        projection = torch.arange(bins, dtype=distribution.dtype, device=logits.device)
        left, top, right, bottom = torch.einsum("bsnp,n->bsp", distribution, projection).unbind(1)
        y, x = torch.meshgrid(
            torch.arange(height, device=logits.device) + 0.5,
            torch.arange(width, device=logits.device) + 0.5,
            indexing="ij",
        )
        x, y = x.reshape(-1), y.reshape(-1)
        boxes.append(torch.stack([x - left, y - top, x + right, y + bottom], 2) * stride)
    return torch.cat(boxes, 1)


def dfl_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """As `yolonas.ops.dfl_loss` without weights and reduction."""
    log_probabilities = _computed(logits).log_softmax(-1)
    last = logits.shape[-1] - 1
    targets = targets.to(log_probabilities.dtype).clamp(0, last)
    loss = torch.zeros_like(targets)
    for b in range(last + 1):
        share = (1 - (targets - b).abs()).clamp(min=0)  # of the target's probability, NaN for a target of NaN
        loss = loss - torch.where(share == 0, 0, share * log_probabilities[..., b])
    return loss


def _computed(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """As `yolonas.ops.nms`: kept indices, descending by score."""
    return batched_nms(boxes, scores, torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device), iou_threshold)


def batched_nms(boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float) -> Tensor:
    """As `yolonas.ops.batched_nms`: kept indices, descending by score."""
    boxes = boxes.float() if boxes.dtype in (torch.float16, torch.bfloat16) else boxes
    order = scores.argsort(descending=True, stable=True)
    kept: list[int] = []
    for i in order.tolist():
        if not any(labels[i] == labels[j] and _iou(boxes[j], boxes[i]) > iou_threshold for j in kept):
            kept.append(i)
    return torch.tensor(kept, dtype=torch.int64, device=boxes.device)


def _iou(a: Tensor, b: Tensor) -> Tensor:
    intersection = (torch.minimum(a[2:], b[2:]) - torch.maximum(a[:2], b[:2])).clamp(min=0).prod()
    return intersection / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - intersection)


def decode_nms(
    class_logits: Sequence[Tensor],
    box_logits: Sequence[Tensor],
    strides: Sequence[float],
    *,
    score_threshold: float,
    iou_threshold: float,
    pre_nms_top_k: int = 1000,
    max_detections: int = 300,
    multi_label: bool = True,
    class_agnostic: bool = False,
) -> Decoded:
    """As `yolonas.ops.decode_nms`."""
    logits = torch.cat([m.float().flatten(2).transpose(1, 2) for m in class_logits], 1)  # [B, A, C]
    all_boxes = dfl_decode(box_logits, strides)
    batch, _, classes = logits.shape
    out = Decoded(
        torch.zeros(batch, max_detections, 4),
        torch.zeros(batch, max_detections),
        torch.full((batch, max_detections), -1),
        torch.full((batch, max_detections), -1),
        torch.zeros(batch, dtype=torch.int64),
    )
    for image in range(batch):
        # In double, so that rounding to float32 is right and a tie in float32 scores is decided by the logits below.
        scores = logits[image].double().sigmoid().float()
        candidate = scores > torch.tensor(score_threshold, dtype=torch.float32)
        if not multi_label:
            best = logits[image].nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).argmax(1, keepdim=True)
            candidate &= torch.zeros_like(candidate).scatter_(1, best, True)
        index = candidate.flatten().nonzero()[:, 0]  # ascending: anchor, then class
        order = logits[image].flatten()[index].argsort(descending=True, stable=True)
        index = index[order][:pre_nms_top_k]
        anchors, labels = index // classes, index % classes
        boxes = all_boxes[image, anchors]
        finite = boxes.isfinite().all(1)
        anchors, labels, boxes = anchors[finite], labels[finite], boxes[finite]
        groups = torch.zeros_like(labels) if class_agnostic else labels
        descending = -torch.arange(len(labels), dtype=torch.float64)
        keep = batched_nms(boxes, descending, groups, iou_threshold)[:max_detections]
        n = len(keep)
        out.boxes[image, :n] = boxes[keep]
        out.scores[image, :n] = scores[anchors[keep], labels[keep]]
        out.labels[image, :n] = labels[keep]
        out.anchors[image, :n] = anchors[keep]
        out.counts[image] = n
    return out

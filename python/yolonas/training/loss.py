"""The YOLO-NAS detection loss: classification against soft targets, GIoU, and distribution focal loss.

Formulae of super-gradients' PPYoloELoss (VarifocalNet, arXiv 2008.13367; GIoU, 1902.09630; DFL, 2006.04388).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from yolonas import ops
from yolonas.data.targets import Targets
from yolonas.model import RawOutput
from yolonas.training import distributed
from yolonas.training.assigner import Assignment, atss, task_aligned

MAX_PAIRS = 1 << 25  # of box and point that are compared at once; each takes some 40 bytes
TASK_ALIGNED_TOP_K = 13  # points for a box, at most
ATSS_TOP_K = 9  # points for a box on each level, at most
ANCHOR_CELLS = 5  # side of ATSS' anchor squares, in cells of the level


class Losses(NamedTuple):
    """Scalars of a batch: `total` is what is minimised, the others are its weighted parts."""

    total: Tensor
    classification: Tensor
    iou: Tensor
    dfl: Tensor


class DetectionLoss(nn.Module):
    """Loss of a batch of raw head maps against padded ground truth.

    `assigner` decides which points learn which boxes, `classification` how the scores learn. Computes in float32
    whatever autocast says, and never synchronises with the device.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        reg_max: int = 16,
        strides: Sequence[int] = (8, 16, 32),
        assigner: Literal["task_aligned", "task_aligned_sequential", "atss"] = "task_aligned",
        classification: Literal["varifocal", "focal"] = "varifocal",
        classification_weight: float = 1.0,
        iou_weight: float = 2.5,
        dfl_weight: float = 0.5,
    ) -> None:
        super().__init__()
        if assigner not in ("task_aligned", "task_aligned_sequential", "atss"):
            raise ValueError(f"assigner must be task_aligned, task_aligned_sequential or atss, not {assigner!r}")
        if classification not in ("varifocal", "focal"):
            raise ValueError(f"classification must be varifocal or focal, not {classification!r}")
        self.num_classes = num_classes
        self.reg_max = reg_max
        self.strides = tuple(strides)
        self.assigner = assigner
        self.classification = classification
        self.weights = (classification_weight, iou_weight, dfl_weight)

    def forward(self, output: RawOutput, targets: Targets) -> Losses:
        """Losses of maps [B, C, h, w] and [B, 4 * (reg_max + 1), h, w] per level, of any float dtype."""
        with torch.autocast(output.class_logits[0].device.type, enabled=False):
            grid = Grid.of(output.class_logits, self.strides)
            class_logits = flatten_maps(output.class_logits)  # [B, A, C]
            boxes = ops.dfl_decode([level.detach() for level in output.box_logits], self.strides)  # [B, A, 4] canvas px
            assignment = self.assign(class_logits.detach().sigmoid(), boxes, grid, targets)
            scores = assignment.scores.sum(-1)  # [B, A], 0 for background
            # over all ranks, whose gradients are averaged: together they give the loss of the whole batch
            normaliser = distributed.total(scores.sum()).clamp(min=1.0) / distributed.size()

            parts = (
                self._classification_loss(class_logits, assignment),
                *self.box_losses(output.box_logits, scores, assignment.boxes, grid, targets.boxes.shape[1]),
            )
            cls, iou, dfl = (w * part / normaliser for w, part in zip(self.weights, parts, strict=True))
        return Losses(cls + iou + dfl, cls.detach(), iou.detach(), dfl.detach())

    def assign(self, scores: Tensor, boxes: Tensor, grid: Grid, targets: Targets) -> Assignment:
        """The assignment of predicted scores [B, A, C] and boxes [B, A, 4] in canvas px."""
        images, pairs = len(scores), targets.boxes.shape[1] * scores.shape[1]
        if images > 1 and images * pairs > MAX_PAIRS:
            rows = max(1, MAX_PAIRS // pairs)
            parts = [
                self.assign(
                    scores[k : k + rows], boxes[k : k + rows], grid, Targets(*(t[k : k + rows] for t in targets))
                )
                for k in range(0, images, rows)
            ]
            return Assignment(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
        if self.assigner == "atss":
            half = ANCHOR_CELLS * grid.strides / 2
            anchors = torch.cat([grid.points - half, grid.points + half], dim=-1)
            return atss(boxes, anchors, grid.level_sizes, targets, self.num_classes, top_k=ATSS_TOP_K)
        sequential = self.assigner == "task_aligned_sequential"
        return task_aligned(scores, boxes, grid.points, targets, top_k=TASK_ALIGNED_TOP_K, sequential=sequential)

    def _classification_loss(self, logits: Tensor, assignment: Assignment) -> Tensor:
        probabilities, target = logits.sigmoid(), assignment.scores
        if self.classification == "focal":
            weight = (probabilities - target).abs().square()
            if self.assigner == "atss":  # the reference balances the classes only with hard assignments
                weight = weight * (0.25 * target + 0.75 * (1 - target))
        else:
            one_hot = assignment.labels.unsqueeze(-1) == torch.arange(self.num_classes, device=logits.device)
            # The gradient goes through the probabilities of the weight too, as in the reference.
            weight = torch.where(one_hot, target, 0.75 * probabilities.square())
        return (weight * F.binary_cross_entropy_with_logits(logits, target, reduction="none")).sum()

    def box_losses(
        self, maps: Sequence[Tensor], scores: Tensor, target_boxes: Tensor, grid: Grid, targets: int
    ) -> tuple[Tensor, Tensor]:
        """Sums of (1 - GIoU) and of DFL, weighted by scores [B, A], against target boxes [B, A, 4] canvas px.

        Few points have a score, and at most a known number for each of `targets` boxes of an image. So the P best hold
        them all, and nobody asks the device how many there are.
        """
        most = ATSS_TOP_K * len(self.strides) if self.assigner == "atss" else TASK_ALIGNED_TOP_K
        weight, points = scores.topk(min(most * targets, scores.shape[1]))  # [B, P]
        box_logits = point_rows(maps, points).unflatten(-1, (4, self.reg_max + 1))  # [B, P, 4, bins]
        stride = grid.strides[points]
        cells = grid.points[points] / stride
        target_boxes = target_boxes.take_along_dim(points.unsqueeze(-1), 1) / stride

        bins = torch.arange(self.reg_max + 1, dtype=torch.float32, device=box_logits.device)
        distances = box_logits.softmax(-1) @ bins  # [B, P, 4], in cells
        boxes = torch.cat([cells - distances[..., :2], cells + distances[..., 2:]], dim=-1)
        target_sides = torch.cat([cells - target_boxes[..., :2], target_boxes[..., 2:] - cells], dim=-1)
        target_sides = target_sides.clamp(0, self.reg_max - 0.01)
        return (
            ((1 - _giou(boxes, target_boxes)) * weight).sum(),
            ops.dfl_loss(box_logits, target_sides, weight.unsqueeze(-1), reduction="sum") / 4,  # the mean of the sides
        )


class Grid(NamedTuple):
    """Anchor points of the levels: points [A, 2] canvas px, strides [A, 1], and how many points each level has."""

    points: Tensor
    strides: Tensor
    level_sizes: tuple[int, ...]

    @classmethod
    def of(cls, maps: Sequence[Tensor], strides: Sequence[int]) -> Grid:
        """The grid of maps [B, C, h, w]: row-major, points at the cells' centres."""
        points, columns = [], []
        for level, stride in zip(maps, strides, strict=True):
            height, width = level.shape[-2:]
            y = (torch.arange(height, dtype=torch.float32, device=level.device) + 0.5) * stride
            x = (torch.arange(width, dtype=torch.float32, device=level.device) + 0.5) * stride
            grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
            points.append(torch.stack([grid_x, grid_y], dim=-1).reshape(-1, 2))
            columns.append(torch.full((height * width, 1), float(stride), device=level.device))
        return cls(torch.cat(points), torch.cat(columns), tuple(len(level) for level in points))


def flatten_maps(maps: Sequence[Tensor]) -> Tensor:
    """Maps [B, C, h, w] of all levels -> [B, A, C] float32."""
    return torch.cat([level.permute(0, 2, 3, 1).flatten(1, 2).float() for level in maps], dim=1)


def point_rows(maps: Sequence[Tensor], points: Tensor) -> Tensor:
    """The logits of points [B, P] from maps [B, C, h, w] of all levels -> [B, P, C] float32."""
    rows, first = torch.zeros((), device=points.device), 0
    for level in maps:
        cells = level.flatten(2).transpose(1, 2)  # [B, h * w, C]
        index = (points - first).unsqueeze(-1)
        last = cells.shape[1] - 1
        inside = (index >= 0) & (index <= last)
        rows = torch.where(inside, cells.take_along_dim(index.clamp(0, last), 1).float(), rows)
        first += cells.shape[1]
    return rows


def _giou(first: Tensor, second: Tensor, eps: float = 1e-10) -> Tensor:
    """GIoU of boxes [..., 4] with boxes [..., 4], pair by pair."""
    shared = _area(torch.maximum(first[..., :2], second[..., :2]), torch.minimum(first[..., 2:], second[..., 2:]))
    hull = _area(torch.minimum(first[..., :2], second[..., :2]), torch.maximum(first[..., 2:], second[..., 2:])) + eps
    union = _area(first[..., :2], first[..., 2:]) + _area(second[..., :2], second[..., 2:]) - shared + eps
    return shared / union - (hull - union) / hull


def _area(top_left: Tensor, bottom_right: Tensor) -> Tensor:
    width, height = (bottom_right - top_left).clamp(min=0).unbind(-1)
    return width * height

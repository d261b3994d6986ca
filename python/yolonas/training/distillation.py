"""Distillation: a student learns the class scores and the box distributions of a teacher, where the labels agree."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from yolonas import ops
from yolonas.data.targets import Targets
from yolonas.errors import DataError
from yolonas.evaluation import label_map
from yolonas.model import Preprocessing, RawOutput, YoloNAS
from yolonas.training import distributed
from yolonas.training.assigner import pairwise_iou
from yolonas.training.loss import flatten_maps, point_rows

POINTS = 1024  # anchor points of an image that are compared: the teacher's best
AGREEMENT_IOU = 0.5  # between the teacher's box and a label of the same class
TEMPERATURE = 2.0  # of the box distributions
BOX_WEIGHT = 0.5  # as that of the loss' own distribution part


class Distiller:
    """The loss of a student against a teacher YOLO-NAS, of any variant, on the same canvases.

    Classes meet by name, whatever their case. The teacher's word on a class at an anchor point counts as much as its
    score there, and only where its box overlaps a label of that class: where labels and teacher differ, the labels win,
    so classes that the teacher does not know, objects that it missed, and boxes that were deleted or renamed are
    learned from the labels alone. Class part: Kullback-Leibler divergence of each class' probability. Box part: that of
    the distributions of the four sides (Localization Distillation, arXiv 2102.12252).

    The teacher is copied to `device` and runs there in mixed precision where `amp` gives a type. Its batch norms take
    their statistics from the batch, as the student's do: a fused teacher differs from an equal student in training, and
    would pull it away from good weights.
    Raises ValueError where the two models' boxes have other bins or strides, DataError where they share no class.
    """

    def __init__(
        self, teacher: YoloNAS, student: YoloNAS, device: torch.device, amp: torch.dtype | None = None
    ) -> None:
        for what in ("reg_max", "strides"):
            if (theirs := getattr(teacher, what)) != (ours := getattr(student, what)):
                raise ValueError(f"a teacher with {what} {theirs} cannot teach a student with {what} {ours}")
        try:
            rows = torch.from_numpy(label_map(student.class_names, teacher.class_names)).to(device)
        except DataError as error:
            known = ", ".join(teacher.class_names[:20])
            raise DataError(f"the teacher knows none of the classes to learn: it knows {known}") from error
        self.strides, self.reg_max, self.amp = teacher.strides, teacher.reg_max, amp
        self.rows, self.known = rows.clamp(min=0), rows >= 0  # [C] of the student's classes
        self.input = _InputChange.between(student.preprocessing, teacher.preprocessing, device)
        network: nn.Module = copy.deepcopy(teacher).train().requires_grad_(False)
        self.teacher = network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if distributed.size() > 1:
            distributed.synchronise_batch_norms(self.teacher, device)

    def __call__(self, output: RawOutput, images: Tensor, targets: Targets) -> Tensor:
        """The loss, a float32 scalar, of the student's `output` on `images` [B, 3, H, W] made as for the student.

        Never synchronises with the device.
        """
        kind = images.device.type
        with torch.no_grad(), torch.autocast(kind, dtype=self.amp, enabled=self.amp is not None):
            taught: RawOutput = self.teacher(self.input(images))
        with torch.autocast(kind, enabled=False):
            lesson = self.lesson(taught, targets)
            normaliser = distributed.total(lesson.weights.sum()).clamp(min=1.0) / distributed.size()
            logits = flatten_maps(output.class_logits).take_along_dim(lesson.points.unsqueeze(-1), 1)
            sides = point_rows(output.box_logits, lesson.points).unflatten(-1, (4, self.reg_max + 1))
            classes = (lesson.weights * _binary_divergence(lesson.logits, logits)).sum()
            boxes = (lesson.weights.amax(-1) * _divergence(lesson.sides, sides, TEMPERATURE).mean(-1)).sum()
            return (classes + BOX_WEIGHT * boxes) / normaliser

    @torch.no_grad()
    def lesson(self, taught: RawOutput, targets: Targets) -> Lesson:
        """What of the teacher's maps the labels agree with, at its best points."""
        logits = flatten_maps(taught.class_logits)[..., self.rows]  # [B, A, C]
        scores = logits.sigmoid() * self.known
        points = scores.amax(-1).topk(min(POINTS, scores.shape[1])).indices  # [B, P]
        at = points.unsqueeze(-1)
        boxes = ops.dfl_decode(list(taught.box_logits), self.strides).take_along_dim(at, 1)
        near = (pairwise_iou(targets.boxes, boxes) >= AGREEMENT_IOU) & targets.mask.unsqueeze(-1)  # [B, G, P]
        labels = (targets.labels.unsqueeze(-1) == torch.arange(len(self.rows), device=at.device)).float()
        agreed = near.float().transpose(1, 2) @ labels > 0  # [B, P, C]
        return Lesson(
            points,
            logits.take_along_dim(at, 1),
            point_rows(taught.box_logits, points).unflatten(-1, (4, self.reg_max + 1)),
            scores.take_along_dim(at, 1) * agreed,
        )


class Lesson(NamedTuple):
    """What the teacher says at P anchor points of each image.

    points [B, P]; logits [B, P, C] under the student's classes; sides [B, P, 4, bins], logits; weights [B, P, C], 0
    where it is not to be heard.
    """

    points: Tensor
    logits: Tensor
    sides: Tensor
    weights: Tensor


class _InputChange(NamedTuple):
    """From one model's input to another's: channels `flipped` or not, then times `scale` plus `shift` [3, 1, 1]."""

    flipped: bool
    scale: Tensor
    shift: Tensor

    @classmethod
    def between(cls, source: Preprocessing, target: Preprocessing, device: torch.device) -> _InputChange:
        flipped = source.channels != target.channels
        mean, std, new_mean, new_std = (
            torch.tensor(values or (default,) * 3, dtype=torch.float64).view(3, 1, 1)
            for values, default in ((source.mean, 0.0), (source.std, 1.0), (target.mean, 0.0), (target.std, 1.0))
        )
        if flipped:
            mean, std = mean.flip(0), std.flip(0)
        scale, shift = std / new_std, (mean - new_mean) / new_std
        return cls(flipped, scale.float().to(device), shift.float().to(device))

    def __call__(self, images: Tensor) -> Tensor:
        return (images.flip(1) if self.flipped else images) * self.scale + self.shift


def _binary_divergence(taught: Tensor, logits: Tensor) -> Tensor:
    """KL divergence between the two-valued distributions of logits, element by element."""
    yes, no = F.logsigmoid(taught), F.logsigmoid(-taught)
    return taught.sigmoid() * (yes - F.logsigmoid(logits)) + (-taught).sigmoid() * (no - F.logsigmoid(-logits))


def _divergence(taught: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """KL divergence between the distributions of logits [..., bins], softened; its gradient keeps its size."""
    wanted, found = (F.log_softmax(x / temperature, -1) for x in (taught, logits))
    return temperature**2 * F.kl_div(found, wanted, reduction="none", log_target=True).sum(-1)

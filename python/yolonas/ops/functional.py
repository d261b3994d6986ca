"""The ops as functions of torch tensors, on CPU and CUDA. Under torch.compile they stay whole (`fullgraph=True`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from yolonas.ops import arguments
from yolonas.ops import registration as registration


class Decoded(NamedTuple):
    """Detections of a batch, of fixed size K = max_detections; rows past an image's count are padding."""

    boxes: Tensor  # [B, K, 4] float32 xyxy canvas px, not clipped; padding 0
    scores: Tensor  # [B, K] float32; padding 0
    labels: Tensor  # [B, K] int64; padding -1
    anchors: Tensor  # [B, K] int64, index over all levels, row-major within a level; padding -1
    counts: Tensor  # [B] int64, detections of each image


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
    """Raw head maps -> detections: threshold, top-k, DFL decoding of the survivors and NMS in one op.

    A candidate has score > score_threshold; the best pre_nms_top_k of an image enter a greedy NMS, which suppresses
    a box of the same class with IoU > iou_threshold. Order is by float32 logit, then anchor, then class, so results
    depend on neither device, batch nor thread count. NaN logits never become boxes. Outputs have fixed sizes and, on
    CUDA, the host is never waited for. No gradient flows.

    Args:
        class_logits: a map [B, num_classes, h, w] per level; float32, float16 or bfloat16, any strides.
        box_logits: a map [B, 4 * bins, h, w] per level of the same dtype and device: left, top, right, bottom.
        strides: canvas pixels per grid cell of each level.
        score_threshold: from 0 to 1.
        iou_threshold: from 0 to 1.
        pre_nms_top_k: candidates of an image that enter the NMS.
        max_detections: K, detections of an image.
        multi_label: every (anchor, class) is a candidate; otherwise only each anchor's best class.
        class_agnostic: boxes suppress boxes of every class.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.
    """
    return Decoded(
        *torch.ops.yolonas.decode_nms(
            _maps(class_logits, "class_logits"),
            _maps(box_logits, "box_logits"),
            arguments.numbers(strides),
            arguments.threshold(score_threshold, "score_threshold"),
            arguments.threshold(iou_threshold, "iou_threshold"),
            arguments.positive(pre_nms_top_k, "pre_nms_top_k"),
            arguments.positive(max_detections, "max_detections"),
            bool(multi_label),
            bool(class_agnostic),
        )
    )


def dfl_decode(box_logits: Sequence[Tensor], strides: Sequence[float]) -> Tensor:
    """Expectation of each side's distribution (DFL) -> boxes of all anchors; differentiable.

    Args:
        box_logits: a map [B, 4 * bins, h, w] per level: left, top, right, bottom; float32, float16, bfloat16 or
            float64, any strides.
        strides: canvas pixels per grid cell of each level.

    Returns:
        Boxes [B, A, 4] float32 (float64 of float64 logits), xyxy canvas px, not clipped; A sums h * w over the levels.
        NaN where a logit is NaN or +inf, or all of a side are -inf. Gradients have the logits' type and memory format;
        where a side's gradient is exactly 0, so is that of its logits.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.
    """
    boxes: Tensor = torch.ops.yolonas.dfl_decode(_maps(box_logits, "box_logits"), arguments.numbers(strides))
    return boxes


def dfl_loss(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    *,
    reduction: Literal["none", "mean", "sum"] = "mean",
) -> Tensor:
    """Distribution focal loss: cross entropy with the two bins around each target (arXiv 2006.04388, equation 6).

    A target t = l + f between bins l and l + 1 costs lse(x) - (1 - f) * x[l] - f * x[l + 1]. Neither the softmax nor
    its logarithm is written to memory, forward or backward.

    Args:
        logits: [..., bins], at least 2 bins; float32, float16, bfloat16 (computed in float32) or float64, any strides.
        targets: [...] distances in bins, clamped to [0, bins - 1]; no gradient flows to them.
        weights: factors of the losses, broadcast against targets.
        reduction: "none" keeps a loss for each target, "sum" adds them up, "mean" divides that by their number.

    Returns:
        The loss, float32 (float64 of float64 logits): [...], or a scalar. NaN where the target or a logit is NaN, a
        logit is +inf, or all of a row are -inf.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.
    """
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f'reduction must be "none", "mean" or "sum", not {reduction!r}')
    if _tensor(targets, "targets").requires_grad and torch.is_grad_enabled():
        raise ValueError("no gradient flows to targets: pass targets.detach()")
    loss: Tensor = torch.ops.yolonas.dfl_loss(_tensor(logits, "logits"), targets)
    if weights is not None:
        missing = targets.dim() - _tensor(weights, "weights").dim()
        if missing < 0 or any(w not in (1, n) for w, n in zip(weights.shape, targets.shape[missing:], strict=True)):
            raise ValueError(
                f"weights of shape {list(weights.shape)} do not broadcast to targets of shape {list(targets.shape)}"
            )
        loss = loss * weights.to(loss.dtype)
    return loss if reduction == "none" else loss.sum() if reduction == "sum" else loss.mean()


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Greedy NMS with torchvision's contract.

    Args:
        boxes: [N, 4] xyxy; float16, bfloat16 (both computed in float32), float32 or float64.
        scores: [N].
        iou_threshold: from 0 to 1; a box is suppressed by a better one with IoU > iou_threshold.

    Returns:
        int64 indices of the kept boxes, descending by score, ties in ascending index.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.
    """
    keep: Tensor = torch.ops.yolonas.batched_nms(
        _tensor(boxes, "boxes"), _tensor(scores, "scores"), None, arguments.threshold(iou_threshold, "iou_threshold")
    )
    return keep


def batched_nms(boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float) -> Tensor:
    """`nms` within each label: boxes of different labels never suppress each other. Exact at any coordinate scale.

    Args:
        boxes: [N, 4] xyxy.
        scores: [N].
        labels: [N] integers, or floats, which are not rounded; torchvision calls it `idxs`.
        iou_threshold: from 0 to 1.

    Returns:
        int64 indices of the kept boxes, descending by score, ties in ascending index.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.
    """
    keep: Tensor = torch.ops.yolonas.batched_nms(
        _tensor(boxes, "boxes"),
        _tensor(scores, "scores"),
        _tensor(labels, "labels"),
        arguments.threshold(iou_threshold, "iou_threshold"),
    )
    return keep


def _tensor(value: Tensor, name: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(value).__name__}")
    if value.layout is not torch.strided or value.is_nested:
        kind = "nested tensor" if value.is_nested else f"tensor of layout {value.layout}"
        raise TypeError(f"{name} must be a dense tensor, not a {kind}")
    return value


def _maps(maps: Sequence[Tensor], name: str) -> list[Tensor]:
    if not isinstance(maps, list | tuple):
        raise TypeError(f"{name} must be a list with a tensor per level, not {type(maps).__name__}")
    for level, m in enumerate(maps):
        if not isinstance(m, Tensor) or m.layout is not torch.strided or m.is_nested:
            _tensor(m, f"{name}[{level}]")  # raises: the name is put together for nothing else
    return list(maps)

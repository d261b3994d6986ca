"""The compiled ops on plain addresses; see csrc/bindings/core.cpp. A map is [address, h, w, strides of B, C, h, w],
rows are [address, rows, bins, strides of row, bin]."""

from collections.abc import Sequence

MAX_LEVELS: int
WITH_CUDA: bool

_Maps = Sequence[Sequence[int]]

class DecodeNmsOptions:
    def __init__(
        self,
        batch: int,
        num_classes: int,
        bins: int,
        score_threshold: float,
        iou_threshold: float,
        pre_nms_top_k: int,
        max_detections: int,
        multi_label: bool,
        class_agnostic: bool,
    ) -> None: ...

def decode_nms_cpu(
    class_logits: _Maps,
    box_logits: _Maps,
    strides: Sequence[float],
    dtype: int,
    options: DecodeNmsOptions,
    out: Sequence[int],
    threads: int,
) -> None: ...
def decode_nms_cpu_stages(
    class_logits: _Maps,
    box_logits: _Maps,
    strides: Sequence[float],
    dtype: int,
    options: DecodeNmsOptions,
    out: Sequence[int],
) -> tuple[float, float, float, float]: ...
def dfl_decode_cpu(
    box_logits: _Maps, strides: Sequence[float], dtype: int, batch: int, bins: int, boxes: int, threads: int
) -> None: ...
def dfl_decode_backward_cpu(
    gradient: int,
    box_logits: _Maps,
    strides: Sequence[float],
    dtype: int,
    batch: int,
    bins: int,
    logit_gradients: _Maps,
    threads: int,
) -> None: ...
def dfl_loss_cpu(logits: Sequence[int], dtype: int, targets: int, loss: int, threads: int) -> None: ...
def dfl_loss_backward_cpu(
    gradient: int, logits: Sequence[int], dtype: int, targets: int, logit_gradients: Sequence[int], threads: int
) -> None: ...
def batched_nms_cpu_float32(boxes: int, scores: int, labels: int, n: int, iou_threshold: float, keep: int) -> int: ...
def batched_nms_cpu_float64(boxes: int, scores: int, labels: int, n: int, iou_threshold: float, keep: int) -> int: ...

# Only in builds with CUDA (WITH_CUDA).
def decode_nms_workspace(
    class_logits: _Maps, box_logits: _Maps, strides: Sequence[float], options: DecodeNmsOptions
) -> int: ...
def decode_nms_cuda(
    class_logits: _Maps,
    box_logits: _Maps,
    strides: Sequence[float],
    dtype: int,
    options: DecodeNmsOptions,
    out: Sequence[int],
    workspace: int,
    device: int,
    stream: int,
) -> None: ...
def dfl_decode_cuda(
    box_logits: _Maps,
    strides: Sequence[float],
    dtype: int,
    batch: int,
    bins: int,
    boxes: int,
    device: int,
    stream: int,
) -> None: ...
def dfl_decode_backward_cuda(
    gradient: int,
    box_logits: _Maps,
    strides: Sequence[float],
    dtype: int,
    batch: int,
    bins: int,
    logit_gradients: _Maps,
    device: int,
    stream: int,
) -> None: ...
def dfl_loss_cuda(logits: Sequence[int], dtype: int, targets: int, loss: int, device: int, stream: int) -> None: ...
def dfl_loss_backward_cuda(
    gradient: int,
    logits: Sequence[int],
    dtype: int,
    targets: int,
    logit_gradients: Sequence[int],
    device: int,
    stream: int,
) -> None: ...
def batched_nms_workspace_float32(n: int) -> int: ...
def batched_nms_workspace_float64(n: int) -> int: ...
def batched_nms_cuda_float32(
    boxes: int,
    scores: int,
    labels: int,
    n: int,
    iou_threshold: float,
    keep: int,
    kept: int,
    workspace: int,
    device: int,
    stream: int,
) -> None: ...
def batched_nms_cuda_float64(
    boxes: int,
    scores: int,
    labels: int,
    n: int,
    iou_threshold: float,
    keep: int,
    kept: int,
    workspace: int,
    device: int,
    stream: int,
) -> None: ...

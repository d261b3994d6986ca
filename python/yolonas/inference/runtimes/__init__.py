"""What runs the network: PyTorch, ONNX Runtime or OpenVINO behind one interface."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

STRIDES = (8, 16, 32)


class Found(NamedTuple):
    """Detections of one canvas, best first."""

    boxes: npt.NDArray[np.float32]  # [n, 4] xyxy canvas px, not clipped
    scores: npt.NDArray[np.float32]  # [n]
    labels: npt.NDArray[np.int64]  # [n]


@dataclass(frozen=True)
class Decoding:
    """How raw maps become detections; see `yolonas.ops.decode_nms`."""

    conf: float
    iou: float
    max_det: int = 300
    pre_nms_top_k: int = 1000


class Runtime(Protocol):
    """A network that is loaded and ready; safe to call from several threads."""

    name: str  # "torch", "onnxruntime" or "openvino"
    device: str
    precision: str  # "fp32", "fp16", "bf16" or "int8"

    def detect(self, canvases: npt.NDArray[np.uint8], decoding: Decoding) -> list[Found]:
        """Detections of canvases, uint8 [B, 3, H, W], C-contiguous, channels as the preprocessing says."""


def decode(maps: list[npt.NDArray[np.float32]], decoding: Decoding, threads: int = 1) -> list[Found]:
    """Detections of each image from the six raw maps, class maps first."""
    from yolonas.ops import numpy as npops

    decoded = npops.decode_nms(
        maps[:3],
        maps[3:],
        STRIDES,
        score_threshold=decoding.conf,
        iou_threshold=decoding.iou,
        pre_nms_top_k=max(decoding.pre_nms_top_k, decoding.max_det),
        max_detections=decoding.max_det,
        threads=threads,
    )
    return [
        Found(decoded.boxes[i, :n], decoded.scores[i, :n], decoded.labels[i, :n]) for i, n in enumerate(decoded.counts)
    ]

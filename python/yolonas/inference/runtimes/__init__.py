"""What runs the network: PyTorch, ONNX Runtime or OpenVINO behind one interface."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from yolonas.model.config import STRIDES

if TYPE_CHECKING:
    from yolonas.inference.signals import ImageSignals

Canvases = npt.NDArray[np.uint8]  # [B, 3, H, W], C-contiguous, channels as the preprocessing says


def in_parts(canvases: Canvases, size: int | None) -> Iterator[tuple[Canvases, int]]:
    """Batches of `size` canvases, None: one of all, the last one filled up; with each, how many of it count."""
    size = size or len(canvases)
    for start in range(0, len(canvases), size):
        part = canvases[start : start + size]
        missing = np.zeros((size - len(part), *part.shape[1:]), dtype=np.uint8)
        yield (np.concatenate([part, missing]) if len(missing) else part), len(part)


class Found(NamedTuple):
    """Detections of one canvas, best first."""

    boxes: npt.NDArray[np.float32]  # [n, 4] xyxy canvas px, not clipped
    scores: npt.NDArray[np.float32]  # [n]
    labels: npt.NDArray[np.int64]  # [n]
    signals: ImageSignals | None = None  # where they were asked for and the file gives its raw maps


@dataclass(frozen=True)
class Decoding:
    """How raw maps become detections; see `yolonas.ops.decode_nms`."""

    conf: float
    iou: float
    max_det: int = 300
    pre_nms_top_k: int = 1000
    hidden: tuple[int, ...] = ()  # classes that are not looked for: they take no place and suppress no box
    agnostic: bool = False
    signals: bool = False  # also say how sure the network is of each box

    @property
    def candidates(self) -> int:
        """How many enter the NMS: never fewer than may leave it."""
        return max(self.pre_nms_top_k, self.max_det)


class Runtime(Protocol):
    """A network that is loaded and ready; safe to call from several threads."""

    name: str  # "torch", "onnxruntime" or "openvino"
    device: str
    precision: str  # "fp32", "fp16", "bf16" or "int8"

    def allocate(self, count: int, height: int, width: int) -> Canvases:
        """Memory for `count` canvases, not filled, in which `detect` takes them quickest."""

    def detect(self, canvases: Canvases, decoding: Decoding) -> list[Found]:
        """Detections of each canvas."""

    def maps(self, canvases: Canvases) -> Any:
        """The network alone, to its end, of a batch that it takes: the first half of `detect`, to be timed apart."""

    def found(self, maps: Any, count: int, decoding: Decoding) -> list[Found]:
        """The other half: detections of `count` canvases from what `maps` gave."""


def decode(maps: list[npt.NDArray[np.float32]], decoding: Decoding, threads: int = 1) -> list[Found]:
    """Detections of each image from the six raw maps, class maps first; they are not kept as they were."""
    from yolonas.ops import numpy as npops

    for class_map in maps[:3] if decoding.hidden else ():
        class_map[:, list(decoding.hidden)] = -np.inf
    decoded = npops.decode_nms(
        maps[:3],
        maps[3:],
        STRIDES,
        score_threshold=decoding.conf,
        iou_threshold=decoding.iou,
        pre_nms_top_k=decoding.candidates,
        max_detections=decoding.max_det,
        class_agnostic=decoding.agnostic,
        threads=threads,
    )
    found = split(decoded.boxes, decoded.scores, decoded.labels, decoded.counts)
    if decoding.signals:
        from yolonas.inference.signals import with_signals

        found = with_signals(found, decoded.anchors, maps)
    return found


def split(
    boxes: npt.NDArray[np.float32],  # [B, K, 4]
    scores: npt.NDArray[np.float32],  # [B, K]
    labels: npt.NDArray[np.int64],  # [B, K]
    counts: npt.NDArray[np.int64],  # [B]
) -> list[Found]:
    """The detections of each image, without the places that are empty."""
    return [Found(boxes[i, :n], scores[i, :n], labels[i, :n]) for i, n in enumerate(counts.tolist())]

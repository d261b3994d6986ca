"""The detector: images of any kind in, detections in image pixels out."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from yolonas import checkpoint, ops
from yolonas.errors import DataError
from yolonas.inference.detections import Detections
from yolonas.inference.device import resolve_device
from yolonas.inference.letterbox import letterbox
from yolonas.inference.sources import Image, is_single, iter_sources, read_image
from yolonas.model import Preprocessing, YoloNAS

_PRE_NMS_TOP_K = 1000


class Detector:
    """A YOLO-NAS ready to predict: fused, in eval mode, on its device. Safe to call from several threads.

    weights: a checkpoint file, the name of published weights, a loaded `Checkpoint`, or a `YoloNAS`.
    device: "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1", "1". runtime: "torch", which "auto" means too.
    `names` are the classes, `checkpoint` is what was loaded. Raises CheckpointError or WeightsError where the weights
    cannot be had, ValueError for another device or runtime.
    """

    def __init__(
        self,
        weights: str | Path | checkpoint.Checkpoint | YoloNAS,
        device: str | int | torch.device = "auto",
        runtime: str = "auto",
    ) -> None:
        if runtime not in ("auto", "torch"):
            raise ValueError(f"runtime {runtime!r} is not known: use auto or torch")
        self.device = resolve_device(device)
        self.checkpoint = _loaded(weights)
        self.names: tuple[str, ...] = self.checkpoint.model.class_names
        fused = self.checkpoint.model.fused().requires_grad_(False)
        self._network = fused.to(device=self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._lock = threading.Lock()

    def __call__(
        self,
        source: Any,
        conf: float | None = None,
        iou: float | None = None,
        max_det: int = 300,
        batch: int = 8,
        imgsz: int | tuple[int, int] | None = None,
    ) -> Detections | list[Detections]:
        """Detections of one image, or the list of them for a folder, a pattern, a list or an array of images.

        source: see `yolonas.inference.sources.iter_sources`. conf: scores must be higher; None is the checkpoint's
        operating threshold. iou: boxes of one class that overlap a better one by more are suppressed; None is the
        checkpoint's. batch: images in one pass through the network; it does not change the result. imgsz: the side of
        the canvas, or (height, width), multiples of 32; None is the checkpoint's.
        Raises DataError at the first image that cannot be read (`stream` goes on), ValueError for an option out of
        range. In a list the detections of files do not keep the pixels.
        """
        stream = self.stream(source, conf, iou, max_det, batch, imgsz, on_error=_raise)
        if is_single(source):
            return next(stream)
        return [d if d.path is None else dataclasses.replace(d, image=None) for d in stream]

    def stream(
        self,
        source: Any,
        conf: float | None = None,
        iou: float | None = None,
        max_det: int = 300,
        batch: int = 8,
        imgsz: int | tuple[int, int] | None = None,
        *,
        on_error: Callable[[DataError], None] | None = None,
    ) -> Iterator[Detections]:
        """Detections one image after the other, in order, holding no more than `batch` images; options as in a call.

        An image that cannot be read is left out. `on_error` is called for it, with a DataError that names it, and may
        raise to stop; without `on_error` a DataError that lists such images is raised after the last detections.
        """
        preprocessing = self._preprocessing(imgsz)
        thresholds = self._thresholds(conf, iou)
        _check_counts(max_det=max_det, batch=batch)

        def run() -> Iterator[Detections]:
            failed: list[DataError] = []
            report = on_error or failed.append
            images: list[Image] = []
            paths: list[str | None] = []

            def flush() -> Iterator[Detections]:
                results = self._predict(images, thresholds, max_det, preprocessing)
                for image, path, detections in zip(images, paths, results, strict=True):
                    yield dataclasses.replace(detections, path=path, image=image)
                images.clear()
                paths.clear()

            for item in iter_sources(source):
                try:
                    images.append(read_image(item))
                except DataError as error:
                    report(error)
                    continue
                paths.append(str(item) if isinstance(item, Path) else None)
                if len(images) == batch:
                    yield from flush()
            if images:
                yield from flush()
            if failed:
                raise DataError(f"{len(failed)} images could not be read: {'; '.join(map(str, failed))}")

        return run()

    def predict_batch(
        self,
        images: Sequence[Image],
        conf: float | None = None,
        iou: float | None = None,
        max_det: int = 300,
        batch: int = 8,
        imgsz: int | tuple[int, int] | None = None,
    ) -> list[Detections]:
        """Detections of decoded images, uint8 [h, w, 3] RGB of any sizes, in order, without pixels; see `__call__`."""
        preprocessing = self._preprocessing(imgsz)
        thresholds = self._thresholds(conf, iou)
        _check_counts(max_det=max_det, batch=batch)
        found: list[Detections] = []
        for start in range(0, len(images), batch):
            found += self._predict(images[start : start + batch], thresholds, max_det, preprocessing)
        return found

    def _predict(
        self, images: Sequence[Image], thresholds: tuple[float, float], max_det: int, preprocessing: Preprocessing
    ) -> list[Detections]:
        canvases, placements = zip(*(letterbox(image, preprocessing) for image in images), strict=True)
        with self._lock, torch.inference_mode():
            raw = self._network(_network_input(np.stack(canvases), preprocessing, self.device))
            decoded = ops.decode_nms(
                raw.class_logits,
                raw.box_logits,
                self._network.strides,
                score_threshold=thresholds[0],
                iou_threshold=thresholds[1],
                pre_nms_top_k=max(_PRE_NMS_TOP_K, max_det),
                max_detections=max_det,
            )
            boxes, scores, labels = (t.cpu().numpy() for t in (decoded.boxes, decoded.scores, decoded.labels))
            counts = decoded.counts.tolist()
        results = []
        for i, (count, placement) in enumerate(zip(counts, placements, strict=True)):
            clipped = placement.to_image(boxes[i, :count])
            # A box that lies in the padding altogether has no area left.
            inside = (clipped[:, 2] > clipped[:, 0]) & (clipped[:, 3] > clipped[:, 1])
            size = (placement.height, placement.width)
            found = clipped[inside], scores[i, :count][inside], labels[i, :count][inside]
            results.append(Detections(*found, self.names, size))
        return results

    def _thresholds(self, conf: float | None, iou: float | None) -> tuple[float, float]:
        conf = self.checkpoint.conf if conf is None else conf
        iou = self.checkpoint.iou if iou is None else iou
        for name, value in (("conf", conf), ("iou", iou)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must lie in 0..1, not {value}")
        return conf, iou

    def _preprocessing(self, imgsz: int | tuple[int, int] | None) -> Preprocessing:
        """The checkpoint's preprocessing, on a canvas of another size if asked: the margin around the image scales."""
        own = self.checkpoint.model.preprocessing
        if imgsz is None:
            return own
        height, width = (imgsz, imgsz) if isinstance(imgsz, int) else imgsz
        resize_to = round(own.resize_to * max(height, width) / max(own.image_size))
        try:
            return dataclasses.replace(own, image_size=(height, width), resize_to=resize_to)
        except ValueError as error:
            raise ValueError(f"imgsz {imgsz} must be a multiple of 32, at least 32") from error


def _network_input(canvases: npt.NDArray[np.uint8], preprocessing: Preprocessing, device: torch.device) -> torch.Tensor:
    """Canvases uint8 [B, H, W, 3] -> float32 [B, 3, H, W], 0..1 or normalized, channels last in memory."""
    images = torch.from_numpy(canvases).to(device).permute(0, 3, 1, 2).float().div_(255.0)
    for numbers, apply in ((preprocessing.mean, images.sub_), (preprocessing.std, images.div_)):
        if numbers is not None:
            apply(torch.tensor(numbers, device=device).view(3, 1, 1))
    return images


def _loaded(source: str | Path | checkpoint.Checkpoint | YoloNAS) -> checkpoint.Checkpoint:
    if isinstance(source, YoloNAS):
        return checkpoint.Checkpoint(source)
    if isinstance(source, checkpoint.Checkpoint):
        return source
    from yolonas.weights import resolve

    return checkpoint.load(resolve(source))


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, not {value}")


def _raise(error: DataError) -> None:
    raise error

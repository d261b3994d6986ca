"""The detector: images of any kind in, detections in image pixels out."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from yolonas.errors import DataError, OptionError
from yolonas.exported import SUFFIXES, Manifest, find_manifest, read_manifest
from yolonas.inference.detections import Detections
from yolonas.inference.letterbox import Placement, letterbox_into
from yolonas.inference.pipeline import in_batches
from yolonas.inference.runtimes import Canvases, Decoding, Runtime
from yolonas.inference.runtimes.choice import PRECISIONS, RUNTIMES, Choice
from yolonas.inference.signals import looks
from yolonas.inference.sources import Image, Origin, is_live, is_single, iter_sources, origin, read_image
from yolonas.model.config import Preprocessing

if TYPE_CHECKING:
    import torch

    from yolonas.checkpoint import Checkpoint
    from yolonas.model import YoloNAS

# Threads that read images and fill canvases: 1 to 10 ms each, as much as a small network takes, or 32 on a GPU.
WORKERS = min(8, os.cpu_count() or 1)


class Detector:
    """A YOLO-NAS ready to predict. Safe to call from several threads; needs no torch for an exported file.

    weights: a checkpoint file, the name of published weights, a loaded `Checkpoint`, a `YoloNAS`, or a file of `yolonas
    export` or `yolonas quantize` (.onnx, .xml, raw .pt2).
    device: "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1", "1"; a GPU is for runtime "torch".
    runtime: "torch"; "onnxruntime" or "openvino", for which a checkpoint is exported once (see
    `runtimes.cache.exported`); or "auto": torch for a checkpoint, OpenVINO or else ONNX Runtime for an .onnx file, and
    in `stream`, where the rest of the job would take 20 s on the network, the quickest of those installed on the first
    image of the rest; in float32 all find the same.
    precision: "fp32"; "bf16" with torch and OpenVINO, "fp16" with torch on a GPU; "auto" is the exported file's own,
    for a checkpoint "fp32".
    threads: of the network on a CPU, None is the runtime's choice; with torch they are those of the whole process.
    compile: run the network through torch.compile, which takes a minute at first and less time at each call.

    `names` are the classes, `manifest` says what was loaded, as does `checkpoint`: the Checkpoint, or the manifest of
    an exported file. `runtime` is what runs now, `choice` what "auto" measured. Raises CheckpointError or WeightsError
    where the weights cannot be had, MissingPackageError where the runtime is not installed, ExportError where the
    export fails, OptionError for options that are not known or do not go together.
    """

    def __init__(
        self,
        weights: str | Path | Checkpoint | YoloNAS,
        device: str | int | torch.device = "auto",
        runtime: str = "auto",
        precision: str = "auto",
        threads: int | None = None,
        *,
        compile: bool = False,
    ) -> None:
        for name, value, known in (("runtime", runtime, RUNTIMES), ("precision", precision, PRECISIONS)):
            if value not in known:
                raise OptionError(f"{name} {value!r} is not known: use {', '.join(known)}")
        if threads is not None:
            _check_counts(threads=threads)
        source = _source(weights)
        self.manifest: Manifest
        self.checkpoint: Checkpoint | Manifest
        if isinstance(source, Path):
            self.manifest = self.checkpoint = read_manifest(source)
        else:
            from yolonas.export import manifest_of

            self.manifest, self.checkpoint = manifest_of(source), source
        self.names = self.manifest.class_names
        self.choice = Choice(source, self.manifest, device, runtime, precision, threads, compile)

    @property
    def runtime(self) -> Runtime:
        """What runs the network now: its `name`, `device` and `precision`."""
        return self.choice.current

    @property
    def device(self) -> str:
        """Where the network runs: "cpu", "cuda" or "cuda:1"."""
        return self.runtime.device

    @property
    def lowest_conf(self) -> float:
        """The least `conf` that may be asked for: above 0 where the file has its NMS inside."""
        return self.manifest.nms["score_threshold"] if self.manifest.nms else 0.0

    def __call__(
        self,
        source: Any,
        conf: float | None = None,
        iou: float | None = None,
        max_det: int = 300,
        batch: int = 8,
        imgsz: int | tuple[int, int] | None = None,
        *,
        stride: int = 1,
        classes: Sequence[int] | None = None,
        agnostic_nms: bool = False,
    ) -> Detections | list[Detections]:
        """Detections of one image, or the list of them for a folder, a pattern, a video, a list or an array of images.

        source: see `yolonas.inference.sources.list_sources`; a live one gives its next frame. conf: scores must be
        higher; None is the checkpoint's operating threshold. iou: boxes of one class that overlap a better one by more
        are suppressed; None is the checkpoint's. batch: images in one pass through the network; it does not change the
        result. imgsz: the side of the canvas, or (height, width), multiples of 32; None is the checkpoint's. stride: of
        a video every `stride`-th frame is looked at. classes: only these, by number; the others suppress no box.
        agnostic_nms: a better box suppresses those of other classes too.
        Raises DataError at the first image that cannot be read (`stream` goes on), OptionError for an option out of
        range. In a list the detections of files and videos do not keep the pixels.
        """
        if is_single(source):
            preprocessing = self._preprocessing(imgsz)
            decoding = self._decoding(conf, iou, max_det, classes, agnostic_nms)
            _check_counts(batch=batch, stride=stride)
            item = next(iter_sources(source, stride))
            image = read_image(item)
            (detections,) = self._one(image, preprocessing, decoding)
            return dataclasses.replace(detections, image=image, **origin(item)._asdict())
        more: dict[str, Any] = {"stride": stride, "classes": classes, "agnostic_nms": agnostic_nms}
        stream = self.stream(source, conf, iou, max_det, batch, imgsz, **more, on_error=_raise)
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
        stride: int = 1,
        classes: Sequence[int] | None = None,
        agnostic_nms: bool = False,
        on_error: Callable[[DataError], None] | None = None,
    ) -> Generator[Detections, None, None]:
        """Detections one image after the other, in order; options as in a call.

        The next images are read while the network runs, and it runs while the caller works on the results: up to three
        batches are held. Of an iterator one batch is, and nothing is taken before its detections are asked for; the
        frames of a live source go one by one. Closing the generator ends its threads.

        The frames of a video carry their index and time. An image that cannot be read is left out, and so is the rest
        of a video that breaks off. `on_error` is called for it, with a DataError that names it, and may raise to stop;
        without `on_error` a DataError that lists such images is raised after the last detections.
        """
        preprocessing = self._preprocessing(imgsz)
        decoding = self._decoding(conf, iou, max_det, classes, agnostic_nms)
        _check_counts(batch=batch, stride=stride)
        total, done = _count(source), 0

        def prepare(item: Any, canvas: Canvases) -> _Prepared | DataError:
            try:
                image = read_image(item)
            except DataError as error:
                return error
            return _Prepared(image, origin(item), letterbox_into(canvas, image, preprocessing))

        def run(canvases: Canvases, prepared: list[_Prepared | DataError]) -> list[Detections | DataError]:
            nonlocal done
            readable = [i for i, item in enumerate(prepared) if isinstance(item, _Prepared)]
            if len(readable) < len(prepared):
                canvases = canvases[readable]
            images = [item for item in prepared if isinstance(item, _Prepared)]
            start = time.perf_counter()
            found = iter(self._detect(canvases, [image.placement for image in images], decoding))
            if images:
                done += len(images)
                left = total - done if total > done else done  # of a job of unknown length, as much again
                self.choice.consider(canvases, decoding, left, (time.perf_counter() - start) / len(images))
            return [
                item
                if isinstance(item, DataError)
                else dataclasses.replace(next(found), image=item.image, **item.origin._asdict())
                for item in prepared
            ]

        def results() -> Generator[Detections, None, None]:
            failed: list[DataError] = []
            report = on_error or failed.append
            size = preprocessing.image_size
            live = is_live(source)
            for batch_of_results in in_batches(
                iter_sources(source, stride),
                lambda count: self.runtime.allocate(count, *size),
                prepare,
                run,
                batch=1 if live else batch,
                workers=WORKERS,
                ahead=0 if live or isinstance(source, Iterator) else 2,
            ):
                for result in batch_of_results:
                    if isinstance(result, DataError):
                        report(result)
                    else:
                        yield result
            if failed:
                raise DataError(f"{len(failed)} images could not be read: {'; '.join(map(str, failed))}")

        return results()

    def predict_batch(
        self,
        images: Sequence[Image],
        conf: float | None = None,
        iou: float | None = None,
        max_det: int = 300,
        batch: int = 8,
        imgsz: int | tuple[int, int] | None = None,
        *,
        signals: bool = False,
    ) -> list[Detections]:
        """Detections of decoded images, uint8 [h, w, 3] RGB of any sizes, in order, without pixels; see `__call__`.

        signals: also say how sure the network is of each box and what the image is like, as `Detections.signals`, for
        `yolonas.active_learning`; a file that has its NMS inside cannot, and leaves None.
        """
        preprocessing = self._preprocessing(imgsz)
        decoding = dataclasses.replace(self._decoding(conf, iou, max_det), signals=signals)
        _check_counts(batch=batch)
        if len(images) == 1:
            return self._one(images[0], preprocessing, decoding)
        batches = in_batches(
            images,
            lambda count: self.runtime.allocate(count, *preprocessing.image_size),
            lambda image, canvas: letterbox_into(canvas, image, preprocessing),
            lambda canvases, placements: self._detect(canvases, placements, decoding),
            batch=batch,
            workers=WORKERS,
            ahead=1,
        )
        return list(chain.from_iterable(batches))

    def _one(self, image: Image, preprocessing: Preprocessing, decoding: Decoding) -> list[Detections]:
        """Detections of one image, by the shortest way: no thread is started."""
        canvases = self.runtime.allocate(1, *preprocessing.image_size)
        return self._detect(canvases, [letterbox_into(canvases[0], image, preprocessing)], decoding)

    def _detect(self, canvases: Canvases, placements: Sequence[Placement], decoding: Decoding) -> list[Detections]:
        if not placements:
            return []
        results = []
        every = self.runtime.detect(canvases, decoding)
        for found, canvas, placement in zip(every, canvases, placements, strict=True):
            clipped = placement.to_image(found.boxes)
            # A box that lies in the padding altogether has no area left.
            inside = (clipped[:, 2] > clipped[:, 0]) & (clipped[:, 3] > clipped[:, 1])
            size = (placement.height, placement.width)
            result = Detections(clipped[inside], found.scores[inside], found.labels[inside], self.names, size)
            if found.signals is not None:
                feature = np.append(found.signals.feature, looks(canvas))
                result.signals = dataclasses.replace(found.signals[inside], feature=feature)
            results.append(result)
        return results

    def _decoding(
        self,
        conf: float | None,
        iou: float | None,
        max_det: int,
        classes: Sequence[int] | None = None,
        agnostic: bool = False,
    ) -> Decoding:
        baked = self.manifest.nms  # the file decodes, and keeps nothing below its own threshold
        if baked is not None:
            conf = max(self.manifest.conf, self.lowest_conf) if conf is None else conf
            iou = baked["iou_threshold"] if iou is None else iou
        conf = self.manifest.conf if conf is None else conf
        iou = self.manifest.iou if iou is None else iou
        for name, value in (("conf", conf), ("iou", iou)):
            if not 0 <= value <= 1:
                raise OptionError(f"{name} must lie in 0..1, not {value}")
        _check_counts(max_det=max_det)
        if conf < self.lowest_conf:
            raise OptionError(
                f"conf {conf:g} is below {self.lowest_conf:g}, which this file was exported at: export it without NMS"
            )
        if baked is not None and abs(iou - baked["iou_threshold"]) > 1e-6:
            fixed = baked["iou_threshold"]
            raise OptionError(f"iou {iou:g} is not {fixed:g}, at which this file was exported: export it without NMS")
        if baked is not None and agnostic:
            raise OptionError("agnostic_nms is not what this file does, which has its NMS inside: export it without")
        asked = range(len(self.names)) if classes is None else classes
        for label in asked:
            if not 0 <= label < len(self.names):
                raise OptionError(f"classes must be numbers from 0 to {len(self.names) - 1}, not {label}")
        hidden = tuple(sorted(set(range(len(self.names))) - set(asked)))
        return Decoding(conf, iou, max_det, hidden=hidden, agnostic=agnostic)

    def _preprocessing(self, imgsz: int | tuple[int, int] | None) -> Preprocessing:
        """The manifest's preprocessing, on a canvas of another size if asked: the margin around the image scales."""
        own, fixed = self.manifest.preprocessing, self.manifest.image_size
        size = (imgsz, imgsz) if isinstance(imgsz, int) else imgsz or fixed or own.image_size
        if size == own.image_size and fixed in (None, size):
            return own
        if fixed is not None and size != tuple(fixed):
            raise OptionError(f"imgsz {imgsz} is not {fixed}, to which this file is bound: export it with --dynamic")
        return own.on_canvas(size if imgsz is None else imgsz)


class _Prepared(NamedTuple):
    """An image whose canvas is filled."""

    image: Image
    origin: Origin
    placement: Placement


def _count(source: Any) -> int:
    """About how many images a source has; 0 where that is not known without going through it."""
    if hasattr(source, "__array__"):
        return len(source) if getattr(source, "ndim", 3) == 4 else 1
    if isinstance(source, (list, tuple)):
        return len(source)
    if isinstance(source, (str, Path)) and os.path.isdir(source):
        return len(os.listdir(source))
    return 0


def _source(weights: str | Path | Checkpoint | YoloNAS) -> Checkpoint | Path:
    """What was loaded from a checkpoint, or the path of an exported file."""
    if isinstance(weights, (str, Path)):
        from yolonas.weights import resolve

        path = resolve(weights)
        suffix = path.suffix.lower()
        if suffix in SUFFIXES and (suffix != ".onnx" or find_manifest(path)):  # others' ONNX files are weights
            return path
        from yolonas import checkpoint

        return checkpoint.load(path)
    from yolonas.checkpoint import Checkpoint

    return weights if isinstance(weights, Checkpoint) else Checkpoint(weights)


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise OptionError(f"{name} must be a whole number of at least 1, not {value}")


def _raise(error: DataError) -> None:
    raise error

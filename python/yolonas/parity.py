"""Does an exported file find what its model finds? Both see the same images, each in its own runtime."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from yolonas.data import samples
from yolonas.errors import DataError
from yolonas.exported import INPUT_NAME, OUTPUT_NAMES, Manifest, read_manifest
from yolonas.extras import openvino_core, require
from yolonas.inference.letterbox import letterbox
from yolonas.inference.runtimes import Decoding, Found, decode
from yolonas.model import Preprocessing, YoloNAS
from yolonas.model.config import STRIDES

Array = npt.NDArray[np.float32]

MOST_IMAGES = 8
SAMPLES = 3  # sample images, where none are given
ANCHORS = 300  # of an image whose boxes are compared where the file gives raw maps: those with the best scores
SHOWN = 20  # detections in an image that a comparison wants to see


@dataclass(frozen=True)
class Tolerance:
    """How far a file may be from its model: px of a box side, score, and the least share of boxes found by both."""

    box: float
    score: float
    share: float


# fp32 is another order of the same sums: of S 0.0007 px and 2e-6 were seen. fp16 has 11 bits: 0.45 px and 0.0015. int8:
# boxes that overlap by IoU_MATCHED are the same object; what quantization costs is measured in AP, by `yolonas
# quantize`, so this only finds files that are broken.
TOLERANCES = {
    "fp32": Tolerance(0.1, 1e-3, 0.98),
    "fp16": Tolerance(2.0, 0.02, 0.9),
    "int8": Tolerance(np.inf, np.inf, 0.6),
}
IOU_MATCHED = 0.5


@dataclass(frozen=True)
class Parity:
    """The largest differences between a file and its model, and the share of boxes found by both.

    compared: boxes of either, on `images` images. box: px of a side; score: of any class. Differences of detections
    are those of the boxes found by both.
    """

    precision: str
    images: int
    compared: int
    box: float
    score: float
    share: float

    @property
    def passed(self) -> bool:
        """Whether the differences are within the precision's tolerance; a difference that is not a number is not."""
        limit = TOLERANCES[self.precision]
        return bool(self.box <= limit.box and self.score <= limit.score and self.share >= limit.share)

    def __str__(self) -> str:
        limit = TOLERANCES[self.precision]
        shared = f"{100 * self.share:.1f} % (at least {100 * limit.share:.0f} %) of {self.compared} boxes agree"
        if self.precision == "int8":
            return f"{shared} in {self.images} images (same class, IoU over {IOU_MATCHED})"
        return (
            f"{shared} in {self.images} images; largest differences {self.box:.2g} px (allowed {limit.box:g}) and "
            f"{self.score:.2g} of a score (allowed {limit.score:g})"
        )


def canvases(preprocessing: Preprocessing, source: Any = None) -> npt.NDArray[np.uint8]:
    """The first images of a source (as of a Detector; None: sample images), letterboxed: uint8 [N, 3, H, W]."""
    from yolonas.inference.sources import iter_sources, read_image

    if source is None:
        pictures = [samples.draw(np.random.default_rng([0, i]), 480, 640)[0] for i in range(SAMPLES)]
    else:
        pictures = [read_image(item) for item in itertools.islice(iter_sources(source), MOST_IMAGES)]
    if not pictures:
        raise DataError("there is no image to compare the file and the model on")
    boards = [letterbox(picture, preprocessing)[0].transpose(2, 0, 1) for picture in pictures]
    return np.ascontiguousarray(np.stack(boards))


class Reference:
    """What the model itself gives on canvases, in float32 by PyTorch."""

    def __init__(self, model: YoloNAS, canvases: npt.NDArray[np.uint8]) -> None:
        from yolonas.tracing import RawNetwork

        network = RawNetwork(model).eval()
        with torch.inference_mode():
            each = [network(torch.from_numpy(canvas[None])) for canvas in canvases]
        self.canvases = canvases
        self.maps: list[Array] = [torch.cat(maps).numpy() for maps in zip(*each, strict=True)]

    def shown(self, manifest: Manifest) -> Manifest:
        """The manifest, or one whose NMS has a threshold low enough that there is something to compare."""
        best = -np.sort(-_scores(self.maps).reshape(len(self.canvases), -1), axis=1)[:, SHOWN].mean()
        conf = float(min(manifest.conf, best))
        if manifest.output == "raw":
            return manifest if manifest.precision != "int8" else dataclasses.replace(manifest, conf=conf)
        assert manifest.nms is not None
        if any(len(found.scores) for found in decode(self.maps, _decoding(manifest.nms))):
            return manifest
        return dataclasses.replace(manifest, nms=manifest.nms | {"score_threshold": conf})

    def compare(self, file: Path, manifest: Manifest) -> Parity:
        """Run the file on the canvases and compare; `manifest` is what it was written with."""
        outputs = run(file, manifest, self.canvases)
        if manifest.output == "raw" and manifest.precision != "int8":
            return self._compare_maps(outputs, manifest)
        decoding = Decoding(manifest.conf, manifest.iou) if manifest.nms is None else _decoding(manifest.nms)
        expected = decode(self.maps, decoding)
        found = decode(outputs, decoding) if manifest.output == "raw" else detections(outputs, manifest.output)
        return _compare_detections(expected, found, decoding, manifest.precision)

    def _compare_maps(self, maps: list[Array], manifest: Manifest) -> Parity:
        """Anchor by anchor, so that neither a threshold nor the order of near ties blurs the comparison."""
        expected, scores = _scores(self.maps), _scores(maps)
        expected_boxes, boxes = _boxes(self.maps), _boxes(maps)
        differences = [np.abs(scores - expected).max()]
        count = 0
        distance = np.zeros(0, dtype=np.float32)
        for image in range(len(self.canvases)):
            ranked = (np.argsort(-s[image].max(axis=1), kind="stable")[:ANCHORS] for s in (expected, scores))
            anchors = np.union1d(*ranked)
            count += len(anchors)
            distance = np.append(distance, np.abs(boxes[image, anchors] - expected_boxes[image, anchors]).max(axis=1))
        limit = TOLERANCES[manifest.precision]
        share = float((distance <= limit.box).mean())
        return Parity(
            manifest.precision, len(self.canvases), count, float(distance.max()), float(max(differences)), share
        )


def run(file: Path, manifest: Manifest, canvases: npt.NDArray[np.uint8]) -> list[Any]:
    """The outputs of an exported file for canvases uint8 [N, 3, H, W], in the manifest's order, whatever its batch."""
    batch = manifest.batch or len(canvases)
    call = _session(file)
    parts: list[list[Any]] = []
    for start in range(0, len(canvases), batch):
        part = canvases[start : start + batch]
        filled = np.concatenate([part, np.repeat(part[-1:], batch - len(part), axis=0)])
        images = filled if manifest.input == "uint8" else filled.astype(np.float32) / 255
        outputs = call(images)
        if manifest.output == "flat":
            rows = outputs[0][outputs[0][:, 0] < len(part)]
            parts.append([rows + np.array([start, 0, 0, 0, 0, 0, 0], dtype=np.float32)])
        else:
            parts.append([output[: len(part)] for output in outputs])
    return [np.concatenate(outputs) for outputs in zip(*parts, strict=True)]


def detections(outputs: list[Any], output: str) -> list[Found]:
    """The detections of each image in an output of the format "batch"; of "flat", of each image that has some."""
    if output == "flat":
        flat = outputs[0]
        each = [flat[flat[:, 0] == image] for image in range(int(flat[:, 0].max(initial=-1)) + 1)]
        return [Found(rows[:, 1:5], rows[:, 5], rows[:, 6].astype(np.int64)) for rows in each]
    counts, boxes, scores, labels = outputs
    return [Found(boxes[i, :n], scores[i, :n], labels[i, :n]) for i, n in enumerate(counts[:, 0].tolist())]


def _session(file: Path) -> Any:
    """A function images -> outputs, as the file names them in our order."""
    names = OUTPUT_NAMES[read_manifest(file).output]
    suffix = file.suffix.lower()
    if suffix == ".onnx":
        runtime = require("onnxruntime", "onnx", "the check of an exported ONNX file")
        session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        return lambda images: session.run(list(names), {INPUT_NAME: images})
    if suffix == ".xml":
        core = openvino_core()
        compiled = core.compile_model(core.read_model(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

        def infer(images: Any) -> list[Any]:
            results = compiled(images)
            return [results[name].copy() for name in names]

        return infer
    program = torch.export.load(str(file)).module()

    def call(images: Any) -> list[Any]:
        with torch.inference_mode():
            return [output.numpy() for output in program(torch.from_numpy(images))]

    return call


def _decoding(nms: dict[str, Any]) -> Decoding:
    return Decoding(nms["score_threshold"], nms["iou_threshold"], nms["max_detections"], nms["pre_nms_top_k"])


def _scores(maps: list[Array]) -> Array:
    """[N, A, C] of the class maps."""
    logits = np.concatenate([m.reshape(*m.shape[:2], -1) for m in maps[:3]], axis=2).transpose(0, 2, 1)
    return np.asarray(1 / (1 + np.exp(-logits.astype(np.float64))), dtype=np.float32)


def _boxes(maps: list[Array]) -> Array:
    """[N, A, 4] xyxy canvas px of the box maps."""
    from yolonas import ops

    return ops.dfl_decode([torch.from_numpy(np.ascontiguousarray(m)) for m in maps[3:]], STRIDES).numpy()


def _compare_detections(expected: list[Found], found: list[Found], decoding: Decoding, precision: str) -> Parity:
    """Pair detections of the same class, nearest first come; what lies at a threshold may be on either side of it."""
    limit = TOLERANCES[precision]
    nothing = Found(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))
    compared = agreed = 0
    box = score = 0.0
    for ours, theirs in itertools.zip_longest(expected, found, fillvalue=nothing):
        free = np.ones(len(theirs.scores), dtype=bool)
        matched = np.zeros(len(ours.scores), dtype=bool)
        for i in range(len(ours.scores)):
            candidates = np.flatnonzero(free & (theirs.labels == ours.labels[i]))
            if not len(candidates):
                continue
            overlap = _iou(ours.boxes[i], theirs.boxes[candidates])
            j = candidates[overlap.argmax()]
            if precision == "int8" and not overlap.max() > IOU_MATCHED:
                continue
            apart, off = np.abs(theirs.boxes[j] - ours.boxes[i]).max(), abs(theirs.scores[j] - ours.scores[i])
            if not (apart <= limit.box and off <= limit.score):
                continue
            free[j], matched[i] = False, True
            box, score = max(box, float(apart)), max(score, float(off))
        slack = limit.score if np.isfinite(limit.score) else 0.0
        ours_left = ours.scores[~matched] > _least(theirs, decoding) + slack
        theirs_left = theirs.scores[free] > _least(ours, decoding) + slack
        agreed += int(matched.sum())
        compared += int(matched.sum()) + int(ours_left.sum()) + int(theirs_left.sum())
    return Parity(precision, len(expected), compared, box, score, agreed / compared if compared else 1.0)


def _least(found: Found, decoding: Decoding) -> float:
    """The score that a detection must beat to be in the list."""
    full = len(found.scores) == decoding.max_det
    return float(found.scores.min()) if full else decoding.conf


def _iou(box: Array, boxes: Array) -> Array:
    sides = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
    overlap = sides.clip(0).prod(axis=1)
    union = (box[2:] - box[:2]).prod() + (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) - overlap
    return np.asarray(overlap / np.maximum(union, 1e-12), dtype=np.float32)

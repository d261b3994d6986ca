"""What the runtimes of exported files have in common: their inputs, their batches, their outputs."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from yolonas.exported import Manifest
from yolonas.inference.runtimes import Canvases, Decoding, Found, decode, in_parts, split

Array = npt.NDArray[np.generic]


class ExportedRuntime:
    """A `Runtime` of a file with a manifest; a subclass says how `infer` runs it, and takes `threads` to decode."""

    device = "cpu"

    def __init__(self, manifest: Manifest, threads: int | None) -> None:
        self.manifest = manifest
        self.threads = threads or 1

    def infer(self, images: Array) -> list[Array]:
        """Outputs of the file, in its order, of a batch that it takes."""
        raise NotImplementedError

    def allocate(self, count: int, height: int, width: int) -> Canvases:
        return np.empty((count, 3, height, width), dtype=np.uint8)

    def detect(self, canvases: Canvases, decoding: Decoding) -> list[Found]:
        found: list[Found] = []
        for part, count in in_parts(canvases, self.manifest.batch):
            found += self.found(self.infer(self._input(part)), len(part), decoding)[:count]
        return found

    def maps(self, canvases: Canvases) -> list[Array]:
        return self.infer(self._input(canvases))

    def _input(self, canvases: Canvases) -> Array:
        if self.manifest.input == "uint8":
            return canvases
        return (canvases / np.float32(255)).astype(self.manifest.input)

    def found(self, maps: list[Array], count: int, decoding: Decoding) -> list[Found]:
        if self.manifest.output == "raw":
            return decode([np.asarray(o, dtype=np.float32) for o in maps], decoding, self.threads)
        if self.manifest.output == "batch":
            counts, boxes, scores, labels = maps
            rows = split(_float(boxes), _float(scores), labels.astype(np.int64), counts.reshape(-1).astype(np.int64))
        else:
            (flat,) = maps
            of_image = flat[:, 0].astype(np.int64)  # image, x1, y1, x2, y2, score, class
            parts = [_float(flat[of_image == image]) for image in range(count)]
            rows = [Found(p[:, 1:5], p[:, 5], p[:, 6].astype(np.int64)) for p in parts]
        return [_best(found, decoding) for found in rows]


def _float(array: Array) -> npt.NDArray[np.float32]:
    return array.astype(np.float32)


def _best(found: Found, decoding: Decoding) -> Found:
    """What is left of a file's own detections, which met its thresholds, above a higher one."""
    order = np.argsort(-found.scores, kind="stable")  # a file of super-gradients has them class by class
    wanted = (found.scores[order] > decoding.conf) & ~np.isin(found.labels[order], decoding.hidden)
    keep = order[wanted][: decoding.max_det]
    return Found(found.boxes[keep], found.scores[keep], found.labels[keep])

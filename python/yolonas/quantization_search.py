"""Which layers to leave in floating point so that INT8 keeps the accuracy that was asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from yolonas.bootstrap import Difference, ap_difference
from yolonas.data.labelled import LabelledImages
from yolonas.errors import DataError
from yolonas.evaluation import Metrics, coco_ap, predict_dataset
from yolonas.exported import read_manifest
from yolonas.inference.detections import Detections
from yolonas.inference.detector import Detector
from yolonas.quantization import PRESETS, Quantizer


@dataclass(frozen=True)
class Measured:
    """An exported file on the validation images: `difference` is its AP less the float network's."""

    name: str
    path: Path
    metrics: Metrics
    detections: list[Detections]
    difference: Difference | None = None  # None for the float network itself
    float_layers: tuple[str, ...] = ()

    def holds(self, max_drop: float) -> bool:
        """Whether the drop is at most `max_drop` points of AP (0..100), by the lower end of the interval."""
        return self.difference is not None and 100 * self.difference.low >= -max_drop


class Judge:
    """Measures exported files on the validation images against the float network, in one runtime."""

    def __init__(self, data: LabelledImages, runtime: str = "openvino", *, progress: bool = False) -> None:
        self.data, self.runtime, self.progress = data, runtime, progress
        self._float: list[Detections] | None = None

    def measure(self, name: str, path: Path) -> Measured:
        """Measure a file; the first one is the float network, which the others are compared with."""
        detector = Detector(path, device="cpu", runtime=self.runtime)
        detections = predict_dataset(detector, self.data, progress=self.progress)
        metrics = coco_ap(self.data, detections)
        if self._float is None:
            self._float = detections
            return Measured(name, path, metrics, detections)
        kept = read_manifest(path).record["quantization"]["float_layers"]
        difference = ap_difference(self.data, detections, self._float)
        return Measured(name, path, metrics, detections, difference, tuple(kept))


def select(
    quantizer: Quantizer,
    judge: Judge,
    path: Path,
    sensitivity: Mapping[str, float],
    *,
    max_drop: float,
    preset: str = "full",
    tensorrt: bool = False,
    first: Measured | None = None,
    on_try: Callable[[Measured], None] | None = None,
) -> Measured:
    """Quantize to `path` with the fewest layers in float, or nearly, for which AP drops by at most `max_drop` points.

    Layers leave INT8 by their sensitivity, the most sensitive first; how many must is found by doubling and then
    halving, each time quantizing anew and measuring. The drop counts at the lower end of its bootstrap interval: a
    drop that might be larger than asked is not accepted. `first` is the file with no layer in float, where it has been
    measured. Raises DataError where even all layers in float do not help: what remains are sums, products and
    concatenations, and the chance in the images.
    """
    already = quantizer.matching(PRESETS[preset])
    order = [layer for layer, _ in sorted(sensitivity.items(), key=lambda item: -item[1]) if layer not in already]
    tried: dict[int, Measured] = {} if first is None else {0: first}

    def holds(count: int) -> bool:
        if count not in tried:
            quantizer.write(path, preset=preset, float_layers=order[:count], tensorrt=tensorrt)
            tried[count] = judge.measure(f"{count} layers in float", path)
            if on_try is not None:
                on_try(tried[count])
        return tried[count].holds(max_drop)

    count = fewest(len(order), holds)
    if not tried[count].holds(max_drop):
        raise DataError(
            f"AP may drop by more than {max_drop:g} points even with all {count} layers in float: allow a larger drop, "
            f"or judge on more than {len(judge.data)} validation images"
        )
    if list(tried)[-1] != count:  # the file is that of the last try
        quantizer.write(path, preset=preset, float_layers=order[:count], tensorrt=tensorrt)
    return tried[count]


def fewest(most: int, holds: Callable[[int], bool]) -> int:
    """The least count in 0..most that `holds`, or up to an eighth more, with few tries.

    Takes it that with one count all higher ones hold, and that `most` does.
    """
    failed, count = -1, 0
    while not holds(count):
        if count == most:
            return most
        failed, count = count, min(max(2 * count, 1), most)
    while count - failed > max(1, count // 8):
        middle = (failed + count) // 2
        if holds(middle):
            count = middle
        else:
            failed = middle
    return count

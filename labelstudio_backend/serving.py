"""What a version is served with: the runtime of this machine, and the file made for it after a training.

A trained version always has its float weights, from which the next training starts. Where another runtime than PyTorch
serves, or INT8 is asked for, the version also has an exported file, and its record says under "serving" which file the
gate has judged and which runtime and precision that was.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from labelstudio_backend.gate import judge
from labelstudio_backend.settings import Settings
from labelstudio_backend.version import CHECKPOINT, Version, load_checkpoint

if TYPE_CHECKING:
    from yolonas.checkpoint import Checkpoint
    from yolonas.data.labelled import LabelledImages
    from yolonas.inference.detections import Detections
    from yolonas.inference.detector import Detector

log = logging.getLogger(__name__)

CALIBRATION_IMAGES = 128
PARITY_IMAGES = 4
SHOWN = {"torch": "PyTorch", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
EXPORTER = ("onnx", "onnxscript")


@dataclass(frozen=True)
class Way:
    """One way to serve a new version: the file, and the runtime and precision that it runs in."""

    file: Path
    runtime: str
    precision: str

    def __str__(self) -> str:
        return f"{'INT8' if self.precision == 'int8' else 'float'} in {SHOWN[self.runtime]}"

    def detector(self, device: str) -> Detector:
        """The detector that serves, as the gate must judge it."""
        from yolonas.inference.detector import Detector

        return Detector(self.file, device=device, runtime=self.runtime)


def runtime_of(settings: Settings) -> str:
    """The runtime that serves: "auto" is PyTorch on a GPU, and on a CPU OpenVINO or ONNX Runtime where installed."""
    if settings.runtime != "auto":
        return settings.runtime
    from yolonas.inference.device import resolve_device

    if resolve_device(settings.device).type == "cuda":
        return "torch"
    usable = (name for name in ("openvino", "onnxruntime") if all(map(importlib.util.find_spec, (name, *EXPORTER))))
    return next(usable, "torch")


def ways(
    weights: Path,
    folder: Path,
    calibration: Sequence[Path],
    settings: Settings,
    check: Callable[[], None] = lambda: None,
) -> tuple[list[Way], list[str]]:
    """How trained weights can be served: what was asked for first, the float weights in PyTorch last.

    Also a sentence for each way that was asked for and cannot be had; nothing is raised for it. Files are written into
    `folder`. calibration: images of the training part, on which INT8 is calibrated and the export checked. check:
    called before each file, and may raise to stop.
    """
    from yolonas import checkpoint

    runtime = runtime_of(settings)
    found, remarks = [Way(weights, "torch", "fp32")], []
    if runtime == "torch":
        if settings.precision == "int8":
            remarks.append("INT8 needs OpenVINO or ONNX Runtime: pip install 'yolonas[quantize]', or YOLONAS_RUNTIME")
        return found, remarks
    loaded = checkpoint.load(weights)
    for precision in ("fp32", "int8") if settings.precision == "int8" else ("fp32",):
        check()
        file = folder / ("model.onnx" if precision == "fp32" else "model.int8.onnx")
        try:
            _write(loaded, file, precision, calibration)
            found.insert(0, Way(file, runtime, precision))
        except Exception as error:  # whatever an exporter raises: the weights are there, and serve
            log.warning("the %s file could not be made", precision, exc_info=error)
            remarks.append(f"no {precision} file for {SHOWN[runtime]} could be made: {error}")
    return found, remarks


def _write(loaded: Checkpoint, file: Path, precision: str, images: Sequence[Path]) -> None:
    if precision == "int8":
        from yolonas.quantization import quantize

        quantize(loaded, file, images, count=CALIBRATION_IMAGES)
    else:
        from yolonas.export import export

        export(loaded, file, dynamic=True, images=list(images[:PARITY_IMAGES]))


def choose(
    ways: Sequence[Way],
    remarks: list[str],
    held_out: LabelledImages,
    detect: Callable[[Way], list[Detections]],
) -> tuple[Way, list[Detections]]:
    """The way that serves and its detections: the first of `ways` that works, if INT8 costs no clear loss.

    INT8 is judged against the next way as a new version is against the old one (`gate.judge`). A line on each way that
    is passed over goes into `remarks`. Raises what the last way raises where none works.
    """
    way, found = ways[0], None
    for candidate in ways:
        try:
            detections = detect(candidate)
        except Exception as error:
            if candidate is ways[-1] and found is None:
                raise
            log.warning("%s does not work", candidate, exc_info=error)
            remarks.append(f"{candidate} does not work: {error}")
            continue
        if found is not None:
            verdict = judge(held_out, detections, found)
            if verdict.publish:
                break
            remarks.append(f"{way} is worse than {candidate}, which serves: {verdict.reason}")
            log.warning("%s", remarks[-1])
        way, found = candidate, detections
        if way.precision != "int8":
            break
    assert found is not None  # the last way works, or has raised
    return way, found


def load(version: Version, settings: Settings) -> Detector:
    """The detector that serves a version: its exported file where it has one, else its weights, in the runtime that
    the settings name, or for `auto` in the one that the gate has judged; its weights in PyTorch where that fails.

    YOLONAS_RUNTIME=torch serves the float weights of every version.
    """
    with version.in_use():
        return _load(version, settings)


def _load(version: Version, settings: Settings) -> Detector:
    from yolonas.inference.detector import Detector

    own = version.record.get("serving", {})
    exported = own.get("file", CHECKPOINT) != CHECKPOINT
    runtime = runtime_of(settings)
    judged = exported and (settings.runtime == "auto" or own["precision"] == "int8")  # INT8 differs between runtimes
    if judged and runtime != "torch":
        runtime = own["runtime"]
    # At its training it could not be exported for this runtime: at each start it would fail again, after a while.
    failed = not exported and bool(own.get("remarks")) and own.get("asked") == runtime
    if runtime != "torch" and not failed:
        try:
            source = version.path / own["file"] if exported else load_checkpoint(version)
            detector = Detector(source, device=settings.device, runtime=runtime)
            detector.predict_batch([np.zeros((64, 64, 3), np.uint8)])
            return detector
        except Exception as error:  # whatever an exporter or a runtime raises: the weights are there, and serve
            log.warning("%s is served from its float weights by PyTorch: %s", version.name, error)
    return Detector(load_checkpoint(version), device=settings.device, runtime="torch")

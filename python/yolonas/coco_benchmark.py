"""The published table of YOLO-NAS, measured again: AP on COCO val2017 and latency, S, M and L, float and INT8.

As the reference measures: val preprocessing (the resized size cut to whole pixels, not rounded), scores above 0.01, IoU
0.7, the best 1000 of an image into the NMS and at most 300 out of it. AP is pycocotools', which counts the best 100.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yolonas.benchmark import CALIBRATION_IMAGES, Contender, Machine, measure, opened, this_machine
from yolonas.errors import DataError, WeightsError, YolonasError
from yolonas.inference.detections import Detections
from yolonas.training.charts import number
from yolonas.weights import PUBLISHED

if TYPE_CHECKING:
    from yolonas.data.labelled import LabelledImage, LabelledImages
    from yolonas.inference.detector import Detector

CONF, IOU, MAX_DET = 0.01, 0.7, 300
VARIANTS = ("s", "m", "l")
# YOLONAS.md of super-gradients: AP, and ms on an NVIDIA T4 (TensorRT, FP16 and INT8, batch 1).
PUBLISHED_AP = {("s", "fp32"): 47.5, ("m", "fp32"): 51.55, ("l", "fp32"): 52.22} | {
    ("s", "int8"): 47.03,
    ("m", "int8"): 51.0,
    ("l", "int8"): 52.1,
}
PUBLISHED_MS = {("s", "fp32"): 3.21, ("m", "fp32"): 5.85, ("l", "fp32"): 7.87} | {
    ("s", "int8"): 2.36,
    ("m", "int8"): 3.78,
    ("l", "int8"): 4.78,
}
COLUMNS = (
    *("model", "precision", "runtime", "AP", "published", "AP50", "network ms", "image to boxes ms"),
    *("published ms, T4", "weights"),
)


@dataclass(frozen=True)
class CocoRow:
    """A line of the table: what was measured, with what, and what was published.

    AP in percent, milliseconds an image at batch 1: `total` from image in memory to boxes. `error` says why there is
    none. sha256: of the weights' file; `pinned` whether it is that of the published one.
    """

    variant: str
    precision: str
    weights: str
    sha256: str
    pinned: bool
    runtime: str
    images: int
    calibration: str | None
    machine: Machine
    ap: float | None = None
    ap50: float | None = None
    network: float | None = None
    total: float | None = None
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, ready for JSON, the published figures among them."""
        key = (self.variant, self.precision)
        return asdict(self) | {"published_ap": PUBLISHED_AP[key], "published_ms_t4": PUBLISHED_MS[key]}


def quickest_runtime(device: str) -> str:
    """On a CPU OpenVINO, or ONNX Runtime, where they are installed; else PyTorch."""
    if device != "cpu":
        return "torch"
    return next((name for name in ("openvino", "onnxruntime") if importlib.util.find_spec(name)), "torch")


def find_weights(folder: Path) -> dict[str, Path]:
    """The weights of S, M and L in a folder, under any name that is known for them.

    Raises WeightsError where there is none, with the names looked for.
    """
    found = {}
    for variant in VARIANTS:
        known = PUBLISHED[f"yolo_nas_{variant}_coco"]
        paths = (folder / name for name in (known.file, *known.other_files))
        if path := next((path for path in paths if path.is_file()), None):
            found[variant] = path
    if not found:
        names = ", ".join(f"yolo_nas_{variant}_coco.pth" for variant in VARIANTS)
        raise WeightsError(f"{folder} holds no published weights: put {names} (or .safetensors) into it")
    return found


def find_images(folder: Path) -> tuple[LabelledImages, list[Path], str]:
    """val2017 with its labels; images to calibrate INT8 on; and which those are.

    The folder is laid out as COCO's downloads: annotations/instances_val2017.json, val2017/, and train2017/ if it is
    there. Raises DataError, naming all that is missing.
    """
    from yolonas.data.readers import read_dataset

    json_file, images = folder / "annotations" / "instances_val2017.json", folder / "val2017"
    missing = [str(path.relative_to(folder)) for path in (json_file, images) if not path.exists()]
    if missing:
        raise DataError(f"{folder} lacks {' and '.join(missing)}: unpack COCO's val2017 and annotations into it")
    data = read_dataset(json_file, images_dir=images)
    if not data.objects:
        raise DataError(f"{json_file} has no object in its {len(data)} images, so there is nothing to measure")
    train = sorted((folder / "train2017").glob("*.jpg"))
    chosen = train or [image.path for image in data.images]
    step = max(1, len(chosen) // CALIBRATION_IMAGES)  # evenly over all, so the same each time
    calibration = chosen[::step][:CALIBRATION_IMAGES]
    return data, calibration, f"{len(calibration)} images of {'train2017' if train else 'val2017, which AP is of'}"


def measure_coco(
    coco: Path,
    weights: Path,
    out: Path,
    *,
    runtime: str,
    precisions: Sequence[str] = ("fp32", "int8"),
    device: str = "cpu",
    imgsz: tuple[int, int] | None = None,
    threads: int | None = None,
    repeats: int = 20,
    say: Callable[[str], None] = lambda line: None,
) -> list[CocoRow]:
    """Measure what weights there are of S, M and L; see the module for how.

    Detections are kept in `out` as they are made, so a run that was cut goes on where it was. What fails of one model
    and precision is in its row. Raises DataError and WeightsError as `find_images` and `find_weights` do.
    """
    from yolonas import checkpoint
    from yolonas.evaluation import coco_ap
    from yolonas.inference.sources import read_image

    found = find_weights(weights)
    for variant in VARIANTS:
        if variant not in found:
            say(f"{weights} has no yolo_nas_{variant}_coco.pth, so {variant.upper()} is left out")
    data, calibration, told = find_images(coco)
    for line in data.dropped[:5]:
        say(f"left out of the data: {line}")
    machine = this_machine(device)
    sample = [read_image(image.path) for image in data.images[:16]]
    rows: list[CocoRow] = []
    for variant, path in found.items():
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        loaded = checkpoint.load(path, variant=variant)
        own = loaded.model.preprocessing
        loaded.model.preprocessing = replace(own if imgsz is None else own.on_canvas(imgsz), rounding="int")
        detectors: dict[Contender, Detector] = {}
        measured: dict[Contender, CocoRow] = {}
        for precision in precisions:
            name = f"{variant.upper()} {precision} in {runtime}"
            contender = Contender(path, runtime, precision)
            row = CocoRow(
                variant=variant,
                precision=precision,
                weights=path.name,
                sha256=digest,
                pinned=digest == PUBLISHED[f"yolo_nas_{variant}_coco"].sha256,
                runtime=runtime,
                images=len(data),
                calibration=told if precision == "int8" else None,
                machine=machine,
            )
            try:
                say(f"{name}: loading")
                detector, _ = opened(contender, loaded, device, threads, calibration, out)
                run = {
                    "weights": digest,
                    "version": machine.versions.get(runtime),
                    "canvas": imgsz,
                    "int8": row.calibration,
                }
                log = out / "detections" / f"{variant}-{runtime}-{precision}.jsonl"
                metrics = coco_ap(data, _detections(detector, data, log, run))
            except (YolonasError, ValueError) as error:
                say(f"{name}: {error}")
                measured[contender] = replace(row, error=str(error))
                continue
            say(f"{name}: AP {100 * metrics.ap:.2f}")
            detectors[contender] = detector
            measured[contender] = replace(row, ap=100 * metrics.ap, ap50=100 * metrics.ap50)
        for contender, times in measure(detectors, sample, 1, repeats=repeats).items():
            measured[contender] = replace(measured[contender], network=times.network, total=times.total)
        rows += measured.values()
    return rows


def _detections(detector: Detector, data: LabelledImages, log: Path, run: dict[str, Any]) -> list[Detections]:
    """Detections of every image, in order; those that `log` holds of the same `run` are not made again."""
    from tqdm import tqdm

    head = json.dumps(run, sort_keys=True)
    found = _read_log(log, head, data, detector.names)
    rest = [image for image in data.images if image.image_id not in found]
    if not rest:
        return [found[image.image_id] for image in data.images]
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        if not found:
            log.write_text(f"{head}\n", encoding="utf-8")
        with log.open("a", encoding="utf-8") as stream:
            stream.write("\n")  # ends a line that was cut
            results = detector.stream([image.path for image in rest], CONF, IOU, MAX_DET, on_error=_stop)
            with tqdm(total=len(data), initial=len(found), unit="image", disable=None) as bar:
                for image, detections in zip(rest, results, strict=True):
                    # Rounded as the log has it, so that a run that was cut ends with the same figures.
                    kept = replace(detections, image=None, boxes=detections.boxes.round(3))
                    found[image.image_id] = kept
                    stream.write(f"{_line(image, kept)}\n")
                    bar.update()
    except OSError as error:
        raise DataError(f"{log} cannot be written: {error.strerror or error}") from error
    return [found[image.image_id] for image in data.images]


def _line(image: LabelledImage, found: Detections) -> str:
    values = [image.image_id, found.boxes.tolist(), found.scores.tolist(), found.labels.tolist()]
    return json.dumps(values, separators=(",", ":"))


def _read_log(log: Path, head: str, data: LabelledImages, names: tuple[str, ...]) -> dict[int, Detections]:
    try:
        lines = log.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return {}
    if not lines or lines[0] != head:
        return {}
    images = {image.image_id: image for image in data.images}
    found = {}
    for line in lines[1:]:
        try:
            image_id, boxes, scores, labels = json.loads(line)
            image = images[image_id]
            found[image_id] = Detections(boxes, scores, labels, names, (image.height, image.width), str(image.path))
        except (ValueError, KeyError, TypeError):  # cut while it was written: it is made again
            continue
    return found


def _stop(error: DataError) -> None:
    raise error


def coco_markdown(rows: Sequence[CocoRow], command: str) -> str:
    """The table, the published figures beside the measured ones."""
    from yolonas.benchmark_report import machine_line

    lines = [f"{machine_line(row.machine)}; {row.machine.date}, commit {row.machine.commit or '-'}." for row in rows]
    lines = [
        *dict.fromkeys(lines),
        f"`{command}` made this: {rows[0].images if rows else 0} images, scores above {CONF}, IoU {IOU}, 1000 "
        f"candidates, {MAX_DET} detections, val preprocessing; milliseconds an image at batch 1, medians.",
        "Published: YOLONAS.md of super-gradients, milliseconds of TensorRT on an NVIDIA T4, FP16 in place of fp32.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{'---|' * len(COLUMNS)}",
    ]
    for row in rows:
        key = (row.variant, row.precision)
        figures = ["-" if v is None else f"{v:.2f}" for v in (row.ap, row.ap50)]
        times = ["-" if v is None else number(v) for v in (row.network, row.total)]
        file = f"{row.weights} {row.sha256[:12]}{' (as published)' if row.pinned else ''}"
        cells = [f"YOLO-NAS {row.variant.upper()}", row.precision, row.runtime, figures[0], f"{PUBLISHED_AP[key]:g}"]
        lines.append(f"| {' | '.join([*cells, figures[1], *times, f'{PUBLISHED_MS[key]:g}', file])} |")
    notes = [f"INT8 calibrated on {row.calibration}." for row in rows if row.calibration and not row.error]
    notes += [f"{row.variant.upper()} {row.precision} is not there: {row.error}" for row in rows if row.error]
    return "\n".join([*lines, "", *dict.fromkeys(notes)]) + "\n"

"""How fast and how good checkpoints are on this machine, in every runtime and precision that it has."""

from __future__ import annotations

import hashlib
import itertools
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from yolonas.errors import YolonasError

if TYPE_CHECKING:
    from yolonas.checkpoint import Checkpoint
    from yolonas.data.labelled import LabelledImages
    from yolonas.evaluation import Metrics
    from yolonas.inference.detector import Detector
    from yolonas.inference.sources import Image

RUNTIMES = ("torch", "onnxruntime", "openvino")
PRECISIONS = ("fp32", "bf16", "fp16", "int8")
MOST_SECONDS = 60.0  # of rounds over one checkpoint and batch; then LEAST_ROUNDS are enough
LEAST_ROUNDS = 5
CALIBRATION_IMAGES = 128
SETTLE = 0.004  # s of rest before a turn: OpenMP's idle threads spin that long and would share the cores with it

Say = Callable[[str], None]


@dataclass(frozen=True)
class Machine:
    """What figures hold for."""

    date: str
    processor: str
    cores: int
    versions: dict[str, str]  # of Python, yolonas and the runtimes
    commit: str | None  # of yolonas, where it runs from a clone


@dataclass(frozen=True)
class Contender:
    """One way to run one checkpoint or exported file."""

    weights: Path
    runtime: str
    precision: str

    def __str__(self) -> str:
        return f"{self.weights.name} {self.runtime} {self.precision}"


@dataclass(frozen=True)
class Row:
    """What was measured of one contender at one batch size.

    Times are medians over `rounds` turns in milliseconds an image: letterbox (image in memory -> canvas), network,
    post (decoding, NMS, boxes into the image), and total, image in memory -> detections, which is timed by itself; on a
    GPU that is one graph, and network runs without it. ap and ap50 are COCO's, None without labelled data. megabytes:
    the file that runs.
    """

    weights: str
    variant: str
    runtime: str
    precision: str
    device: str
    threads: int
    image_size: tuple[int, int]
    batch: int
    rounds: int
    letterbox: float
    network: float
    post: float
    total: float
    megabytes: float
    ap: float | None
    ap50: float | None
    machine: Machine

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, ready for JSON."""
        return asdict(self)


class Left(NamedTuple):
    """A contender that could not be measured, and why, in one sentence."""

    contender: str
    reason: str


def this_machine(device: str = "cpu") -> Machine:
    """Today, the processor or GPU, the versions of what may run, and the commit of a clone."""
    versions = {"python": platform.python_version()}
    for package in ("yolonas", *RUNTIMES, "nncf"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return Machine(str(date.today()), _processor(device), os.cpu_count() or 1, versions, _commit())


def _processor(device: str) -> str:
    if device.startswith("cuda"):
        import torch

        return str(torch.cuda.get_device_name(torch.device(device)))
    try:
        model = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        model = None
    return model[1] if model else platform.processor() or platform.machine()


def _commit() -> str | None:
    """Of the clone that this file belongs to; a version control that merely surrounds an installation says nothing."""
    package = Path(__file__).resolve().parent
    describe = ["git", "-C", str(package), "describe", "--always", "--dirty", "--exclude=*"]
    if not (package.parents[1] / ".git").exists():
        return None
    try:
        done = subprocess.run(describe, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def contenders(path: Path, runtimes: Sequence[str], precisions: Sequence[str]) -> list[Contender]:
    """Every way to run a file: an exported one has its own precision, and takes part whatever `precisions` are."""
    from yolonas.exported import SUFFIXES, read_manifest

    if path.suffix.lower() in SUFFIXES:
        precisions = [read_manifest(path).precision]
    return [Contender(path, runtime, precision) for runtime in runtimes for precision in precisions]


def opened(
    contender: Contender,
    loaded: Checkpoint | None,
    device: str,
    threads: int | None,
    calibration: Sequence[Path],
    folder: Path,
) -> tuple[Detector, Path]:
    """A contender ready to run, and the file that runs. Raises YolonasError or ValueError, saying why it cannot be.

    loaded: the checkpoint, None for an exported file. INT8 is made of it in `folder`, calibrated on `calibration`.
    """
    from yolonas.inference.detector import Detector
    from yolonas.inference.runtimes.cache import exported

    path, runtime, precision = contender.weights, contender.runtime, contender.precision
    if loaded is None:
        return Detector(path, device, runtime, threads=threads), path
    if runtime == "torch":
        if precision == "int8":
            raise ValueError("INT8 is of the runtimes onnxruntime and openvino")
        return Detector(loaded, device, runtime, precision, threads), path
    if precision == "int8":
        file = quantized(loaded, path.stem, calibration, folder)
        return Detector(file, device, runtime, threads=threads), file
    detector = Detector(loaded, device, runtime, precision, threads)
    return detector, exported(loaded)


def quantized(loaded: Checkpoint, name: str, calibration: Sequence[Path], folder: Path) -> Path:
    """The INT8 file of a checkpoint, in `folder`, made where it is not there yet; for every runtime that has INT8."""
    if not calibration:
        raise ValueError("INT8 needs images to calibrate on: give --data or --source")
    from yolonas.inference.runtimes.cache import key
    from yolonas.quantization import quantize

    named = hashlib.sha256("\n".join([key(loaded), *map(str, calibration)]).encode()).hexdigest()[:12]
    path = folder / f"{name}-{named}.int8.onnx"
    if not path.is_file():  # of another runtime, or of a run that was cut
        quantize(loaded, path, calibration, count=CALIBRATION_IMAGES, progress=True)
    return path


def benchmark(
    weights: Sequence[Path],
    *,
    images: Sequence[Image],
    folder: Path,
    runtimes: Sequence[str] = RUNTIMES,
    precisions: Sequence[str] = ("fp32", "bf16", "int8"),
    batches: Sequence[int] = (1, 8),
    data: LabelledImages | None = None,
    calibration: Sequence[Path] = (),
    device: str = "cpu",
    imgsz: tuple[int, int] | None = None,
    threads: int | None = None,
    repeats: int = 20,
    say: Say = lambda line: None,
) -> tuple[list[Row], list[Left]]:
    """Measure every checkpoint in every runtime, precision and batch that this machine has.

    weights: checkpoints, and exported files, which have a precision and canvas of their own. images: uint8 [h, w, 3]
    RGB, those that are timed. data: labelled images, for AP (scores above 0.01, the checkpoint's IoU, 300 detections).
    calibration: images for INT8; quantized files go into `folder`. Returns the rows, and what was left out and why.
    Raises CheckpointError for weights that cannot be read, ValueError for a canvas that is no multiple of 32.
    """
    from yolonas import checkpoint
    from yolonas.evaluation import evaluate
    from yolonas.exported import SUFFIXES, file_size

    machine = this_machine(device)
    rows: list[Row] = []
    left: list[Left] = []
    for path in weights:
        loaded = None if path.suffix.lower() in SUFFIXES else checkpoint.load(path)
        if loaded is not None and imgsz is not None:
            loaded.model.preprocessing = loaded.model.preprocessing.on_canvas(imgsz)
        detectors: dict[Contender, Detector] = {}
        files: dict[Contender, Path] = {}
        for contender in contenders(path, runtimes, precisions):
            try:
                say(f"{contender}: loading")
                detectors[contender], files[contender] = opened(contender, loaded, device, threads, calibration, folder)
            except (YolonasError, ValueError) as error:
                left.append(Left(str(contender), str(error)))
        times: dict[tuple[Contender, int], Times] = {}
        for batch in batches:
            able = {c: d for c, d in detectors.items() if d.manifest.batch in (None, batch)}
            for contender in set(detectors) - set(able):
                bound = detectors[contender].manifest.batch
                left.append(Left(f"{contender} batch {batch}", f"the file is bound to batches of {bound}"))
            say(f"{path.name}: timing {len(able)} ways at batch {batch}")
            times |= {(c, batch): t for c, t in measure(able, images, batch, repeats=repeats).items()}
        accuracy: dict[Contender, Metrics] = {}
        for contender, detector in detectors.items():
            if data is not None:
                say(f"{contender}: AP on {len(data)} images")
                accuracy[contender] = evaluate(detector, data, iou=detector.manifest.iou, progress=True)
        for (contender, batch), found in times.items():
            manifest, metrics = detectors[contender].manifest, accuracy.get(contender)
            rows.append(
                Row(
                    weights=path.name,
                    variant=manifest.variant,
                    runtime=contender.runtime,
                    precision=detectors[contender].runtime.precision,
                    device=detectors[contender].device,
                    threads=threads or machine.cores,
                    image_size=manifest.image_size or manifest.preprocessing.image_size,
                    batch=batch,
                    megabytes=file_size(files[contender]) / 1e6,
                    ap=None if metrics is None else metrics.ap,
                    ap50=None if metrics is None else metrics.ap50,
                    machine=machine,
                    **found._asdict(),
                )
            )
    return rows, left


class Times(NamedTuple):
    """Medians in milliseconds an image, see `Row`."""

    letterbox: float
    network: float
    post: float
    total: float
    rounds: int


def measure(
    detectors: Mapping[Contender, Detector], images: Sequence[Image], batch: int, *, repeats: int = 20
) -> dict[Contender, Times]:
    """Time every stage of each contender.

    Contenders take turns, so that other load on the machine meets all of them, each round on the next `batch` of
    `images`. After `MOST_SECONDS`, `LEAST_ROUNDS` rounds are enough.
    """
    times: dict[Contender, list[tuple[float, ...]]] = {contender: [] for contender in detectors}
    end = time.perf_counter() + MOST_SECONDS
    for turn in range(repeats + 1):  # the first is not counted: it allocates, compiles and fills caches
        chosen = [images[(turn * batch + i) % len(images)] for i in range(batch)]
        for contender, detector in detectors.items():
            time.sleep(SETTLE)
            detector.predict_batch(chosen, batch=batch)  # not counted: it finds its data where the others left room
            stages = _turn(detector, chosen)
            if turn:
                times[contender].append(tuple(1e3 * seconds / batch for seconds in stages))
        if turn >= LEAST_ROUNDS and time.perf_counter() > end:
            break
    medians: dict[Contender, Times] = {}
    for contender, turns in times.items():
        letterbox, network, post, total = (statistics.median(stage) for stage in zip(*turns, strict=True))
        medians[contender] = Times(letterbox, network, post, total, len(turns))
    return medians


def _turn(detector: Detector, images: Sequence[Image]) -> tuple[float, ...]:
    """Seconds of letterbox, network and post-processing of a batch, one after the other, and of all of it at once."""
    from yolonas.inference.letterbox import letterbox_into
    from yolonas.inference.runtimes import Decoding

    runtime, manifest = detector.runtime, detector.manifest
    size, decoding = manifest.image_size or manifest.preprocessing.image_size, Decoding(manifest.conf, manifest.iou)
    clock = [time.perf_counter()]
    canvases = runtime.allocate(len(images), *size)
    placements = [
        letterbox_into(canvas, image, manifest.preprocessing) for canvas, image in zip(canvases, images, strict=True)
    ]
    clock.append(time.perf_counter())
    maps = runtime.maps(canvases)
    clock.append(time.perf_counter())
    for found, placement in zip(runtime.found(maps, len(images), decoding), placements, strict=True):
        placement.to_image(found.boxes)
    clock.append(time.perf_counter())
    detector.predict_batch(images, batch=len(images))
    clock.append(time.perf_counter())
    return tuple(later - earlier for earlier, later in itertools.pairwise(clock))

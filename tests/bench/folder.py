"""A folder of JPEG files to JSON with S: our runtimes beside modern-yolonas 0.5's detector in its default form.

python tests/bench/folder.py [--write] [--images 100] [--rounds 5] [--shared ../shared]

Each contender goes from files to a JSON file of boxes, scores and names: the peer by a call for each path, as its
documentation shows, ours by `Detector.stream`. All have the same weights, a rule of random ones whose scores spread
over 0..1, and the same thresholds. They take turns, a share of the folder each, so that other load on the machine
meets all of them; figures are for an image, of a turn. The time to open a detector, to export and to quantize is not
in them. Networks of torch, peer and ours, take all cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import peer
from golden import golden
from measuring import REPOSITORY, Report, Times, ms
from yolonas import Detector, YoloNAS
from yolonas.checkpoint import Checkpoint
from yolonas.quantization import quantize

PEER = "modern-yolonas"
GOALS = {"openvino INT8": 8.0, "openvino": 2.5, "openvino bf16": 2.5}
CONF, IOU = 0.95, 0.7  # 20 to 30 boxes an image with these weights

Contender = Callable[[Sequence[Path], Path], int]  # files -> JSON in a file; how many boxes


def theirs(model: YoloNAS) -> Contender:
    detector = peer.load("inference.detect").YoloNASDetector(
        "yolo_nas_s", device="cpu", pretrained=False, conf_threshold=CONF, iou_threshold=IOU
    )
    detector.model.load_state_dict(model.state_dict())

    def run(files: Sequence[Path], out: Path) -> int:
        rows: list[dict[str, Any]] = []
        for file in files:
            found = detector(file)
            names = found.data.get("class_name", [])
            boxes, scores = (x.tolist() for x in (found.xyxy, found.confidence)) if len(found) else ([], [])
            detections = [
                {"box": box, "score": score, "name": str(name)}
                for box, score, name in zip(boxes, scores, names, strict=True)
            ]
            rows.append({"path": str(file), "detections": detections})
        out.write_text(json.dumps(rows))
        return sum(len(row["detections"]) for row in rows)

    return run


def ours(detector: Detector) -> Contender:
    def run(files: Sequence[Path], out: Path) -> int:
        rows = [detections.to_dict() for detections in detector.stream(files, CONF, IOU)]
        out.write_text(json.dumps(rows))
        return sum(len(row["detections"]) for row in rows)

    return run


def contenders(model: YoloNAS, files: Sequence[Path], folder: Path, calibration: int) -> dict[str, Contender]:
    quantize(Checkpoint(model), folder / "int8.onnx", files, count=calibration)
    forms = {
        "torch": Detector(model, "cpu", "torch", "fp32"),
        "torch bf16": Detector(model, "cpu", "torch", "bf16"),
        "onnxruntime": Detector(model, "cpu", "onnxruntime"),
        "openvino": Detector(model, "cpu", "openvino", "fp32"),
        "openvino bf16": Detector(model, "cpu", "openvino", "bf16"),
        "onnxruntime INT8": Detector(folder / "int8.onnx", "cpu", "onnxruntime"),
        "openvino INT8": Detector(folder / "int8.onnx", "cpu", "openvino"),
    }
    return {PEER: theirs(model)} | {name: ours(detector) for name, detector in forms.items()}


def measure(report: Report, runs: dict[str, Contender], files: Sequence[Path], rounds: int, folder: Path) -> None:
    share = [files[k::rounds] for k in range(rounds)]
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    boxes = dict.fromkeys(runs, 0)
    for run in runs.values():
        run(files[:2], folder / "warm.json")
    for part in share:
        for name, run in runs.items():
            start = time.perf_counter()
            boxes[name] += run(part, folder / "out.json")
            seconds[name].append((time.perf_counter() - start) / len(part))
    times = {name: Times(statistics.median(s), min(s)) for name, s in seconds.items()}
    above = f"{len(files)} files in {rounds} turns; milliseconds for an image, median [least]"
    report.table(above, "", "ms", "images/s", f"of {PEER}'s time", "boxes an image")
    for name, taken in times.items():
        ratio = times[PEER].median / taken.median
        report.row(name, ms(taken), f"{1 / taken.median:.1f}", f"{ratio:.2f}x", f"{boxes[name] / len(files):.1f}")
    for name, least in GOALS.items():
        report.goal(f"{PEER} / ours, {name}", times[PEER], times[name], least)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=REPOSITORY.parent / "shared", help="holds data/coco_permissive")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calibration", type=int, default=32, help="images to quantize with; they decide no time")
    parser.add_argument("--write", action="store_true", help="write tests/bench/results/folder_<processor>.md")
    arguments = parser.parse_args()
    images = arguments.shared / "data" / "coco_permissive" / "images"
    files = sorted(images.glob("*.jpg"))[: arguments.images]
    if len(files) < max(arguments.images, arguments.rounds):
        sys.exit(f"{images} holds {len(files)} JPEG files, and {arguments.images} are asked for")
    import nncf
    import onnxruntime
    import openvino

    versions = f"OpenVINO {openvino.__version__.split('-')[0]}, ONNX Runtime {onnxruntime.__version__}, "
    versions += f"NNCF {nncf.__version__}, modern-yolonas {peer.VERSION}, {torch.get_num_threads()} threads of torch"
    command = " ".join(["python tests/bench/folder.py", *sys.argv[1:]])
    report = Report("A folder of JPEG files to JSON with S at 640 px", versions, command)
    with tempfile.TemporaryDirectory() as folder:
        runs = contenders(golden(YoloNAS("s")), files, Path(folder), arguments.calibration)
        measure(report, runs, files, arguments.rounds, Path(folder))
    report.finish()
    if arguments.write:
        report.write("folder")


if __name__ == "__main__":
    main()

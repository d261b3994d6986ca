"""What INT8 costs and gains: AP, latency and size of every form of the shipped model, and the times of S, M and L.

    python tests/bench/int8.py [--sizes n,s,m,l] [--calibration 300] [--epochs N] [--rounds 60]

n: yolo_nas_n_bccd, calibrated on BCCD's training images, chosen on its validation images, judged on its test images.
s, m, l: random weights at 640 px, as their times do not depend on the weights. Writes results/int8_<processor>.md.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from measuring import REPOSITORY, Report
from yolonas import YoloNAS, checkpoint
from yolonas.bootstrap import ap_difference
from yolonas.checkpoint import Checkpoint
from yolonas.data.readers import read_dataset
from yolonas.exported import file_size
from yolonas.fake_quantization import SENSITIVITY_IMAGES, sensitivity
from yolonas.quantization import Quantizer
from yolonas.quantization_report import RUNTIMES, network_call
from yolonas.quantization_search import Judge, Measured, select
from yolonas.training.qat import fine_tune
from yolonas.weights import resolve

DATA = REPOSITORY.parent / "shared" / "data" / "bccd"
MAX_DROP = 0.5  # points of AP
FASTER, SMALLER = 3.0, 0.3  # goals against float: OpenVINO's time, the file's size

Times = dict[str, dict[str, float]]  # ms by form and by runtime and precision


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", default="n,s,m,l")
    parser.add_argument("--calibration", type=int, default=300)
    parser.add_argument("--epochs", type=int, help="of quantization-aware training; its recipe's own without")
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    sizes = options.sizes.split(",")
    versions = ", ".join(f"{name} {version(name)}" for name in ("openvino", "onnxruntime", "nncf"))
    report = Report("INT8", versions, "python tests/bench/int8.py")
    report.text(
        "\nLatency: the network alone, one image, medians of turns. OpenVINO f32 computes what is not quantized in "
        "float32, bf16 in bfloat16. AP in OpenVINO f32; intervals: 95 %, 1000 paired bootstrap resamples of images."
    )
    with tempfile.TemporaryDirectory() as folder:
        if "n" in sizes:
            shipped(report, Path(folder), options)
        for size in [size for size in sizes if size != "n"]:
            torch.manual_seed(0)
            untrained(report, Path(folder), size, options.rounds)
        report.finish()
    report.write("int8")


def shipped(report: Report, folder: Path, options: argparse.Namespace) -> None:
    start = checkpoint.load(resolve("yolo_nas_n_bccd"))
    train, val, test = (read_dataset(DATA, part) for part in ("train", "val", "test"))
    paths = [image.path for image in train.images]
    quantizer = Quantizer(start, paths, count=options.calibration)
    chooser = Judge(val)
    files = {name: folder / f"{name}.onnx" for name in ("float", "full", "heads-float", "selective", "QAT")}
    quantizer.write_float(files["float"])
    base = chooser.measure("float", files["float"])
    on_val = {"float": base}
    for preset in ("full", "heads-float"):
        quantizer.write(files[preset], preset=preset)
        on_val[preset] = chooser.measure(preset, files[preset])
    begun = time.perf_counter()
    found = sensitivity(start.model.fused(), quantizer.canvases[:SENSITIVITY_IMAGES])
    seconds = {"sensitivity": time.perf_counter() - begun}
    begun = time.perf_counter()
    tries: list[Measured] = []
    on_val["selective"] = select(quantizer, chooser, files["selective"], found, max_drop=MAX_DROP, on_try=tries.append)
    seconds["selection"] = time.perf_counter() - begun
    begun = time.perf_counter()
    tuned = fine_tune(start, train, val, canvases=quantizer.canvases, epochs=options.epochs, progress=True)
    seconds["QAT"] = time.perf_counter() - begun
    Quantizer(tuned, paths, count=options.calibration).write(files["QAT"])
    on_val["QAT"] = chooser.measure("QAT", files["QAT"])

    judge = Judge(test)
    on_test = {name: judge.measure(name, path) for name, path in files.items()}
    times = timed(files, quantizer.canvases[0], options.rounds)
    size = start.model.preprocessing.image_size[0]
    report.table(
        f"## yolo_nas_n_bccd, {size} px: calibrated on {len(quantizer.canvases)}, {len(val)} val, {len(test)} test",
        *("form", "in float", "AP val", "difference on val", "AP test", "AP50 test", "difference on test"),
        *("OpenVINO f32, ms", "bf16, ms", "ONNX Runtime, ms", "MB"),
    )
    for name, path in files.items():
        one, other = on_val[name], on_test[name]
        report.row(
            name,
            "all" if name == "float" else len(other.float_layers),
            f"{100 * one.metrics.ap:.2f}",
            shown(one),
            f"{100 * other.metrics.ap:.2f}",
            f"{100 * other.metrics.ap50:.2f}",
            shown(other),
            *(against(times, name, kind) for kind in ("openvino f32", "openvino bf16", "onnxruntime")),
            f"{file_size(path) / 1e6:.2f} ({file_size(path) / file_size(files['float']):.2f})",
        )
    history = ", ".join(f"{entry['ap']:.4f}" for entry in tuned.record["qat"]["history"])
    report.text(
        f"\nQAT: AP on val under imitated INT8 after each epoch, the start first: {history}. "
        + "; ".join(f"{what}: {value:.0f} s" for what, value in seconds.items())
        + f". The selection tried {', '.join(str(len(one.float_layers)) for one in tries)} layers in float."
    )
    worst = sorted(found.items(), key=lambda item: -item[1])[:8]
    report.text("Most sensitive: " + ", ".join(f"{name} {value:.3f}" for name, value in worst) + ".")

    quicker = times["float"]["openvino f32"] / times["full"]["openvino f32"]
    goal(report, "full INT8 against OpenVINO float, n", f"{quicker:.2f}x", f"at least {FASTER:g}x", quicker >= FASTER)
    share = file_size(files["full"]) / file_size(files["float"])
    goal(report, "file of full INT8, of the fp32 .onnx", f"{share:.3f}", f"at most {SMALLER:g}", share <= SMALLER)
    for part, measured in (("val", on_val), ("test", on_test)):
        low = 100 * (measured["selective"].difference.low if measured["selective"].difference else 0.0)
        goal(report, f"selective on {part}, lower end", f"{low:+.2f}", f"at least {-MAX_DROP:g}", low >= -MAX_DROP)
    gain = ap_difference(test, on_test["QAT"].detections, on_test["full"].detections)
    text = f"{100 * gain.value:+.2f} ({100 * gain.low:+.2f} to {100 * gain.high:+.2f})"
    goal(report, "QAT less PTQ (full), AP on test", text, "no worse: not below 0 for sure", gain.high >= 0)


def untrained(report: Report, folder: Path, size: str, rounds: int) -> None:
    """Times of a size in all forms at 640 px, from random weights and images of noise."""
    import cv2

    rng = np.random.default_rng(0)
    paths = []
    for k in range(4):
        paths.append(folder / f"{size}{k}.png")
        cv2.imwrite(str(paths[-1]), rng.integers(0, 256, (640, 640, 3), dtype=np.uint8))
    quantizer = Quantizer(Checkpoint(YoloNAS(size, 80).eval()), paths)
    files = {name: folder / f"{size}-{name}.onnx" for name in ("float", "full", "heads-float")}
    files["full .xml"] = folder / f"{size}-full.xml"
    quantizer.write_float(files["float"])
    quantizer.write(files["full"])
    quantizer.write(files["full .xml"])
    quantizer.write(files["heads-float"], preset="heads-float")
    times = timed(files, quantizer.canvases[0], max(rounds // 6, 5))
    columns = ("form", "OpenVINO f32, ms", "bf16, ms", "ONNX Runtime, ms", "MB")
    report.table(f"## {size}, 640 px, random weights", *columns)
    for name, path in files.items():
        share = file_size(path) / file_size(files["float"])
        kinds = ("openvino f32", "openvino bf16", "onnxruntime")
        report.row(name, *(against(times, name, kind) for kind in kinds), f"{file_size(path) / 1e6:.2f} ({share:.2f})")
    quicker = times["float"]["openvino f32"] / times["full"]["openvino f32"]
    goal(
        report,
        f"full INT8 against OpenVINO float, {size}",
        f"{quicker:.2f}x",
        f"at least {FASTER:g}x",
        quicker >= FASTER,
    )
    for path in files.values():
        path.unlink()


def timed(files: dict[str, Path], canvas: np.ndarray, rounds: int) -> Times:
    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    for name, path in files.items():
        for precision in ("f32", "bf16"):
            calls[name, f"openvino {precision}"] = network_call(path, "openvino", canvas, precision=precision)
        if path.suffix == ".onnx":
            calls[name, "onnxruntime"] = network_call(path, "onnxruntime", canvas)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for _ in range(rounds):
        for key, call in calls.items():
            call()
            begun = time.perf_counter()
            call()
            times[key].append(time.perf_counter() - begun)
    return {
        name: {kind: 1e3 * statistics.median(times[name, kind]) for of, kind in calls if of == name} for name in files
    }


def against(times: Times, name: str, kind: str) -> str:
    """Milliseconds, and how many times faster than float in the same runtime in float32."""
    if kind not in times[name]:
        return "-"
    base = times["float"]["onnxruntime" if kind == "onnxruntime" else next(iter(RUNTIMES)) + " f32"]
    gain = (
        ""
        if (name, kind) in (("float", "openvino f32"), ("float", "onnxruntime"))
        else f" ({base / times[name][kind]:.2f}x)"
    )
    return f"{times[name][kind]:.2f}{gain}"


def shown(one: Measured) -> str:
    difference = one.difference
    if difference is None:
        return ""
    return f"{100 * difference.value:+.2f} ({100 * difference.low:+.2f} to {100 * difference.high:+.2f})"


def goal(report: Report, figure: str, measured: str, wanted: str, holds: bool) -> None:
    report.goals.append((figure, measured, "", wanted, "yes" if holds else "**no**"))


if __name__ == "__main__":
    main()

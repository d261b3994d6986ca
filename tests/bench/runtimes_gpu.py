"""Images in memory to boxes with S on a GPU: the Detector beside modern-yolonas 0.5's in float16.

python tests/bench/runtimes_gpu.py [--write] [--compile] [--size 640] [--batches 1 32] [--shared ../shared]

Images are decoded before; letterbox, copies, network, NMS and boxes back in image pixels are timed. The peer's
detector runs a batch of 1 as it is. Its `detect_batch` does not convert the batch to the model's float16 and fails,
so larger batches are its own functions in the order of that method, with the conversion. Contenders have the same
weights and thresholds and take turns. `--device cpu` tries the script without a GPU; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

import peer
from golden import golden
from measuring import REPOSITORY, Report, Times, interleave, ms
from yolonas import Detector, YoloNAS
from yolonas.inference.sources import read_image

PEER = "modern-yolonas fp16"
GOALS = {1: 5.0, 32: 2.0}
CONF, IOU = 0.95, 0.7

Images = list[tuple[np.ndarray, np.ndarray]]  # uint8 [h, w, 3], in RGB, which ours takes, and BGR, which theirs does


def theirs(model: YoloNAS, device: str, size: int) -> Callable[[Images], int]:
    detector = peer.load("inference.detect").YoloNASDetector(
        "yolo_nas_s",
        device=device,
        pretrained=False,
        conf_threshold=CONF,
        iou_threshold=IOU,
        input_size=size,
        precision="fp32" if device == "cpu" else "fp16",
    )
    detector.model.load_state_dict(model.state_dict())
    preprocess, post = peer.load("inference.preprocess").preprocess, peer.load("inference.postprocess")
    dtype = next(detector.model.parameters()).dtype

    @torch.no_grad()
    def run(images: Images) -> int:
        bgr = [image for _, image in images]
        if len(bgr) == 1:
            return len(detector(bgr[0]))
        tensors, scales, pads = zip(*(preprocess(image, size) for image in bgr), strict=True)
        batch = torch.cat(tensors).to(device).to(dtype)
        with torch.amp.autocast("cuda", enabled=device == "cuda"):
            boxes, scores = detector.model(batch)
        results = post.postprocess(boxes, scores, CONF, IOU)
        found = 0
        for (corners, values, labels), scale, pad, image in zip(results, scales, pads, bgr, strict=True):
            rescaled = post.rescale_boxes(corners, scale, pad, image.shape[:2])
            found += len(detector._to_detections(rescaled, values, labels))
        return found

    return run


def ours(detector: Detector, size: int) -> Callable[[Images], int]:
    def run(images: Images) -> int:
        rgb = [image for image, _ in images]
        return sum(map(len, detector.predict_batch(rgb, CONF, IOU, batch=len(rgb), imgsz=size)))

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=REPOSITORY.parent / "shared", help="holds data/coco_permissive")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--size", type=int, default=640)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--compile", action="store_true", help="also through torch.compile, which takes minutes")
    parser.add_argument("--commit", help="to name in the report where the checkout has no .git")
    parser.add_argument("--write", action="store_true", help="write tests/bench/results/runtimes_gpu_<device>.md")
    arguments = parser.parse_args()
    device = arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device; --device cpu tries the script without one")
    name = torch.cuda.get_device_name() if device == "cuda" else "a CPU, not a GPU"
    files = sorted((arguments.shared / "data/coco_permissive/images").glob("*.jpg"))[: max(arguments.batches)]
    if len(files) < max(arguments.batches):
        sys.exit(f"{arguments.shared}/data/coco_permissive/images holds {len(files)} JPEG files, too few for a batch")
    images = [(image, np.ascontiguousarray(image[..., ::-1])) for image in map(read_image, files)]

    model = golden(YoloNAS("s"))
    precisions = ["fp16", "bf16", "fp32"] if device == "cuda" else ["fp32", "bf16"]
    runs = {PEER: theirs(model, device, arguments.size)}
    for precision in precisions:
        runs[precision] = ours(Detector(model, device, "torch", precision), arguments.size)
    if arguments.compile:
        compiled = Detector(model, device, "torch", precisions[0], compile=True)
        runs[f"{precisions[0]} compiled"] = ours(compiled, arguments.size)

    versions = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, modern-yolonas {peer.VERSION}"
    command = " ".join(["python tests/bench/runtimes_gpu.py", *sys.argv[1:]])
    title = f"Images in memory to boxes with S at {arguments.size} px on {name}"
    report = Report(title, versions, command, arguments.commit)
    for count in arguments.batches:
        calls = {name: partial(run, images[:count]) for name, run in runs.items()}
        times: dict[str, Times] = interleave(calls, arguments.rounds)
        report.table(f"Batch {count}, milliseconds for an image, median [least]", "", "ms", f"of {PEER}", "boxes")
        for contender, taken in times.items():
            each = Times(taken.median / count, taken.least / count)
            ratio = times[PEER].median / taken.median
            report.row(contender, ms(each), f"{ratio:.2f}x", calls[contender]())
        if count in GOALS:
            figure = f"{PEER} / ours {precisions[0]}, batch {count}"
            report.goal(figure, times[PEER], times[precisions[0]], GOALS[count])
    report.finish()
    if arguments.write:
        report.write("runtimes_gpu", name)


if __name__ == "__main__":
    main()

"""What the signals of active learning add to a detection, and whether neighbours by their feature are alike.

python tests/bench/signals.py [--shared ../shared] [--rounds 50]

Times are of one image of BCCD, `predict_batch` with and without signals in turns, medians. Neighbours: the label
histogram (log counts) of each validation image's nearest neighbour by feature, how far it is against that of any other.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np

from measuring import REPOSITORY
from yolonas import YoloNAS
from yolonas.active_learning import ImageSignals
from yolonas.data.readers import read_dataset
from yolonas.inference.detector import Detector
from yolonas.inference.sources import read_image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=REPOSITORY.parent / "shared")
    parser.add_argument("--rounds", type=int, default=50)
    options = parser.parse_args()
    images = read_dataset(options.shared / "data" / "bccd" / "val.json").images
    print("| weights | runtime | boxes | ms without | ms added | share |\n|---|---|---|---|---|---|")
    pixels = read_image(images[0].path)
    for name, weights in (("n, 320 px, 3 classes", "yolo_nas_n_bccd"), ("s, 640 px, 80 classes", YoloNAS("s").eval())):
        for runtime in ("openvino", "torch"):
            print(f"| {name} | {runtime} | {added(Detector(weights, 'cpu', runtime), pixels, options.rounds)} |")
    found = Detector("yolo_nas_n_bccd", "cpu").predict_batch(
        [read_image(image.path) for image in images], conf=0.05, signals=True
    )
    features = np.array([ImageSignals.of(detections).feature for detections in found])
    features = (features - features.mean(axis=0)) / np.maximum(features.std(axis=0), 1e-9)
    histograms = np.log1p([np.bincount(image.labels, minlength=3) for image in images])
    apart = np.abs(histograms[:, None] - histograms[None]).sum(axis=2)
    others = ~np.eye(len(images), dtype=bool)
    nearest = np.where(others, np.linalg.norm(features[:, None] - features[None], axis=2), np.inf).argmin(axis=1)
    ratio = apart[np.arange(len(images)), nearest].mean() / apart[others].mean()
    print(f"\nneighbours' label histograms are {ratio:.2f} times as far apart as any two ({len(images)} images)")


def added(detector: Detector, pixels: np.ndarray, rounds: int) -> str:
    """A row of the table: boxes, time without signals, what they add, and its share."""
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(rounds + 3):
        for signals in (False, True):
            begin = time.perf_counter()
            (found,) = detector.predict_batch([pixels], signals=signals)
            if turn >= 3:  # the first ones make plans and take memory
                seconds[signals].append(1e3 * (time.perf_counter() - begin))
    without, more = (statistics.median(seconds[signals]) for signals in (False, True))
    return f"{len(found)} | {without:.1f} | {more - without:.2f} | {(more - without) / without:.1%}"


if __name__ == "__main__":
    main()

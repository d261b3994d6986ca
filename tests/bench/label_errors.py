"""How many planted label errors are suspected: python tests/bench/label_errors.py CHECKPOINT DATA [SPLIT]

One label is falsified in each image, the four kinds in turn, with three seeds; the checkpoint must not have been
trained on these images. Printed for each kind: how many were planted, how many labels are suspected, and how many of
the suspects are planted, among the first as many as were planted and in all. The data's own errors are suspects too, so
the shares are lower bounds.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.random import Generator

from yolonas.data.labelled import LabelledImage, LabelledImages
from yolonas.data.readers import read_dataset
from yolonas.evaluation import best_f1_threshold, overlaps, predict_dataset
from yolonas.inference.detector import Detector
from yolonas.label_errors import KINDS, Kind, Suspect, suspects

SEEDS = 3
Planted = tuple[Kind, int | None, np.ndarray]  # kind, the label's index, and where: [1, 4] xyxy image px


def main(weights: str, data_path: str, split: str | None = None) -> None:
    data = read_dataset(Path(data_path), split)
    found = predict_dataset(Detector(weights), data, progress=True)
    print(f"{'seed':>4}  {'kind':14}  planted  suspected  planted among first  planted in all")
    for seed in range(SEEDS):
        wrong, planted = plant(data, np.random.default_rng(seed))
        suspected = suspects(wrong, found, best_f1_threshold(wrong, found))
        for kind in KINDS:
            count = sum(one is not None and one[0] == kind for one in planted)
            hits = [is_planted(suspect, planted) for suspect in suspected if suspect.kind == kind]
            print(f"{seed:4}  {kind:14}  {count:7}  {len(hits):9}  {sum(hits[:count]):19}  {sum(hits):14}")


def plant(data: LabelledImages, rng: Generator) -> tuple[LabelledImages, list[Planted | None]]:
    """The data with at most one wrong label in each image, and what was done to each."""
    sizes = np.concatenate([image.boxes[:, 2:] - image.boxes[:, :2] for image in data.images])
    images, planted = [], []
    for turn, index in enumerate(rng.permutation(len(data)).tolist()):
        image, done = falsified(data.images[index], KINDS[turn % len(KINDS)], len(data.names), sizes, rng)
        images.append((index, image))
        planted.append((index, done))
    return (
        LabelledImages(data.names, [image for _, image in sorted(images, key=lambda pair: pair[0])]),
        [done for _, done in sorted(planted, key=lambda pair: pair[0])],
    )


def falsified(
    image: LabelledImage, kind: Kind, classes: int, sizes: np.ndarray, rng: Generator
) -> tuple[LabelledImage, Planted | None]:
    if kind == "spurious label":
        for _ in range(200):
            size = sizes[rng.integers(len(sizes))]
            corner = rng.uniform(0, 1, 2) * np.maximum(np.array([image.width, image.height]) - size, 0)
            box = np.concatenate([corner, corner + size]).astype(np.float32)[None]
            if overlaps(box, image.boxes, image.crowd).max(initial=0.0) < 0.05:
                boxes, crowd = np.concatenate([image.boxes, box]), np.append(image.crowd, False)
                labels = np.append(image.labels, rng.integers(classes) if not len(image.labels) else image.labels[0])
                return replace(image, boxes=boxes, labels=labels, crowd=crowd), (kind, len(image.boxes), box)
        return image, None
    if not len(image.boxes) or (kind == "wrong label" and classes < 2):
        return image, None
    label = int(rng.integers(len(image.boxes)))
    box = image.boxes[label : label + 1].copy()
    if kind == "missing label":
        kept = np.arange(len(image.boxes)) != label
        fewer = replace(image, boxes=image.boxes[kept], labels=image.labels[kept], crowd=image.crowd[kept])
        return fewer, (kind, None, box)
    if kind == "wrong label":
        labels = image.labels.copy()
        labels[label] = (labels[label] + rng.integers(1, classes)) % classes
        return replace(image, labels=labels), (kind, label, box)
    boxes = image.boxes.copy()  # moved by 0.3 of its sides, so that the IoU is 0.32
    shift = (box[0, 2:] - box[0, :2]) * rng.choice([-0.3, 0.3], 2)
    boxes[label] = np.clip(boxes[label] + np.tile(shift, 2), 0, [image.width, image.height] * 2)
    return replace(image, boxes=boxes), (kind, label, box)


def is_planted(suspect: Suspect, planted: Sequence[Planted | None]) -> bool:
    done = planted[suspect.image]
    if done is None or done[0] != suspect.kind:
        return False
    if suspect.found is None or suspect.kind != "missing label":
        return done[1] == suspect.label
    return bool(overlaps(suspect.found[None], done[2], np.zeros(1, dtype=bool))[0, 0] > 0.5)


if __name__ == "__main__":
    main(*sys.argv[1:])

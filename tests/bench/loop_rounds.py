"""A simulated annotator labels a pool of images in rounds, with a model that learns from the labels between them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from labelstudio_backend.acceptance import Boxes, Edits, compare, pair
from yolonas.data.labelled import LabelledImage, LabelledImages


@dataclass(frozen=True)
class Corrected:
    """What an annotator submits for an image.

    sources: int [n], the predicted box that each one was, -1 where it was drawn; kept: bool [n], left as predicted.
    """

    boxes: Boxes
    sources: npt.NDArray[np.int64]
    kept: npt.NDArray[np.bool_]
    edits: Edits


def correct(predicted: Boxes, truth: Boxes) -> Corrected:
    """The work of somebody who knows the truth and does no more than needed.

    A box of the right class with an IoU of 0.7 or more is left as it is, inexact as it may be, and learnt from so;
    every other one becomes the true box.
    """
    boxes = np.array(truth.boxes, np.float32).reshape(-1, 4)
    sources, kept = np.full(len(boxes), -1), np.zeros(len(boxes), bool)
    for row, column in zip(*pair(predicted, truth), strict=True):
        sources[column] = row
        one = Boxes(predicted.boxes[row : row + 1], predicted.labels[row : row + 1])
        if compare(one, Boxes(truth.boxes[column : column + 1], truth.labels[column : column + 1])).kept:
            boxes[column], kept[column] = predicted.boxes[row], True
    return Corrected(Boxes(boxes, list(truth.labels)), sources, kept, compare(predicted, truth))


def truth_of(image: LabelledImage, names: Sequence[str]) -> Boxes:
    """The true boxes of an image, in px, with the names of their classes."""
    return Boxes(image.boxes[~image.crowd], [names[label] for label in image.labels[~image.crowd]])


UNTRAINED = {"ap": math.nan, "ap50": math.nan, "published": 1, "training_s": 0.0}
NOTHING = Boxes(np.zeros((0, 4), np.float32), [])


class Team(Protocol):
    """What an annotator works with: Label Studio and the backend, or their parts in one process."""

    def next(self) -> int:
        """The image to be labelled next, an index into the pool."""

    def predicted(self, image: int) -> Boxes | None:
        """What is drawn on the image already; None where no model serves yet."""

    def submit(self, image: int, work: Corrected) -> None:
        """Hand in the labels of an image."""

    def train(self) -> dict[str, Any]:
        """Learn from all that was submitted; returns `ap` and `ap50` on the test images, and whether `published`."""


def label(
    team: Team, pool: LabelledImages, counts: Sequence[int], *, train_last: bool = True
) -> Iterator[dict[str, Any]]:
    """Label the pool in rounds that end at `counts` images, the first by hand; a row for each round.

    `train_last`: also learn from the labels of the last round, which saves nobody work any more.
    """
    labelled: set[int] = set()
    for number, count in enumerate(counts):
        edits, by_hand = Edits(), 0
        while len(labelled) < count:
            image = team.next()
            assert image not in labelled, f"image {image} was to be labelled twice"
            labelled.add(image)
            truth = truth_of(pool.images[image], pool.names)
            predicted = team.predicted(image)
            work = correct(NOTHING if predicted is None else predicted, truth)
            edits += work.edits
            by_hand += len(truth.labels)
            team.submit(image, work)
        counted = {name: getattr(edits, name) for name in ("kept", "moved", "relabelled", "removed", "added")}
        learnt = team.train() if train_last or number < len(counts) - 1 else UNTRAINED
        yield {"round": number, "labelled": len(labelled), "boxes": by_hand, **counted, **learnt}

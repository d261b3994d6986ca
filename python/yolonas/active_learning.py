"""What to label next: how much each image that nobody has labelled would teach the network. NumPy alone.

An image is known by its `ImageSignals`, which `Detector.predict_batch(..., signals=True)` gives with its detections.
`values` says from 0 to 1 what an image is worth now, `select` which images to label next, best first, each chosen in
the knowledge of those before it. Both order the same signals the same way on every machine.

    strategy      prefers images
    uncertainty   whose boxes are doubtful, in class or in place
    disagreement  on which two versions of the network, or an image and its mirror image, differ
    diversity     unlike all that is labelled or was chosen before
    balance       that show classes of which few boxes are labelled
    mix           for all of these reasons together
    random        at random, the baseline
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from yolonas.errors import OptionError
from yolonas.inference.signals import BACKGROUND, Floats, ImageSignals, box_spread, class_doubt

if TYPE_CHECKING:
    from yolonas.inference.detections import Detections

__all__ = [
    "BACKGROUND",
    "EMPTY",
    "MIX",
    "SAME_BOX",
    "SIGNALS_CONF",
    "STRATEGIES",
    "ImageSignals",
    "box_spread",
    "box_uncertainty",
    "class_doubt",
    "disagreement",
    "mirrored",
    "parts",
    "presence",
    "rarity",
    "select",
    "uncertainty",
    "values",
]

STRATEGIES: dict[str, str] = {
    "mix": "doubtful, disputed, new and rare together",
    "uncertainty": "doubtful boxes first",
    "disagreement": "first what two versions see differently",
    "diversity": "first what is unlike all that is labelled",
    "balance": "rare classes first",
    "random": "any order",
}
MIX = {"uncertainty": 0.4, "disagreement": 0.2, "diversity": 0.25, "balance": 0.15}  # what is not known is left out
EMPTY = 0.5  # an image without boxes, where there is no other image to compare it with
# What people are shown does not tell how doubtful an image is. With versions trained on 25 and 50 images, the rank
# correlation of uncertainty with the edits that an image needs was -0.1 by the boxes shown, 0.5 and 0.6 by those above
# 0.1.
SIGNALS_CONF = 0.1
SAME_BOX = 0.5  # IoU from which on boxes of two predictions are about the same object


# -- one box ------------------------------------------------------------------------------------------------------


def box_uncertainty(signals: ImageSignals) -> Floats:
    """How doubtful each box is, [n] 0..1: in its class (margin and entropy, half and half) or in its place."""
    return _doubt(*(np.asarray(part, np.float64) for part in (signals.margins, signals.entropies, signals.spreads)))


def _doubt(margins: Floats, entropies: Floats, spreads: Floats) -> Floats:
    return 1.0 - (1.0 - (1.0 - margins + entropies) / 2.0) * (1.0 - spreads)


# -- one image ----------------------------------------------------------------------------------------------------


def uncertainty(signals: ImageSignals) -> float | None:
    """How doubtful an image is, 0..1; None for one without boxes, which says nothing about itself.

    It is S / (1 + S), where S sums over the boxes their score times the square of `box_uncertainty`: about how many
    boxes are a toss-up. The square keeps many fairly sure boxes, the score many faint ones, from outweighing a doubtful
    one.
    """
    return _uncertainties([signals])[0]


def disagreement(a: Detections, b: Detections) -> float:
    """How far two predictions of one image differ, 0..1; symmetric, 0 where they are equal or both are empty.

    Boxes of one class with an IoU of SAME_BOX or more are matched, best first, and agree by IoU x the lower score; the
    disagreement is 1 - 2 x the sum of that over the sum of all scores. A committee of two, whose vote is the boxes
    (query by committee: Seung et al., 1992; for detectors: Roy et al., 2018). Classes are compared by name.
    """
    total = float(a.scores.sum(dtype=np.float64) + b.scores.sum(dtype=np.float64))
    if total <= 0:
        return 0.0
    same = np.array(a.names, object)[a.labels][:, None] == np.array(b.names, object)[b.labels][None]
    overlaps = np.where(same, _iou(a.boxes, b.boxes), 0.0)
    agreed = 0.0
    free_a, free_b = np.ones(len(a), bool), np.ones(len(b), bool)
    rows, columns = np.nonzero(overlaps >= SAME_BOX)
    for index in np.argsort(-overlaps[rows, columns], kind="stable"):
        i, j = rows[index], columns[index]
        if free_a[i] and free_b[j]:
            free_a[i] = free_b[j] = False
            agreed += float(overlaps[i, j]) * float(min(a.scores[i], b.scores[j]))
    return min(max(1.0 - 2.0 * agreed / total, 0.0), 1.0)


def mirrored(detections: Detections) -> Detections:
    """The detections of the mirror image (left and right exchanged) as those of the image itself."""
    boxes = detections.boxes.copy()
    boxes[:, [0, 2]] = detections.image_size[1] - boxes[:, [2, 0]]
    return dataclasses.replace(detections, boxes=boxes)


def presence(signals: ImageSignals, classes: int) -> Floats:
    """How surely an image shows each class: its best score, [C] 0..1."""
    found = np.zeros(classes)
    np.maximum.at(found, np.asarray(signals.labels, np.int64), np.asarray(signals.scores, np.float64))
    return found


# -- many images --------------------------------------------------------------------------------------------------


def rarity(counts: ArrayLike) -> Floats:
    """How rare each class is among labelled boxes: counts [C] -> [C] 0..1, 0 for the most frequent one."""
    counts = np.asarray(counts, np.float64)
    rare: Floats = 1.0 - (counts + 1.0) / (counts.max(initial=0.0) + 1.0)
    return rare


def values(
    signals: Sequence[ImageSignals],
    labelled: Sequence[ImageSignals],
    strategy: str = "mix",
    *,
    others: Sequence[ImageSignals] = (),
    counts: ArrayLike | None = None,
    seed: int = 0,
) -> Floats:
    """What each image is worth labelling, [n] 0..1, by itself and by what is labelled, regardless of the others' turn.

    labelled: the images that are, best `labelled_as` what they show. others: more images that are not, by which these
    are judged too: `values([*signals, *others], labelled)[:n]` in a fraction of the time. counts: [C] labelled boxes of
    each class, where that is known better than by `labelled`. An image without boxes gets the median uncertainty of the
    images with boxes, so that it comes neither first nor last. Raises OptionError for a strategy that is not known.
    """
    return _Pool(signals, labelled, seed, others, counts).values(strategy)


def parts(signals: Sequence[ImageSignals], labelled: Sequence[ImageSignals]) -> dict[str, Floats]:
    """`values` by each strategy of the mix, where it knows anything: why an image is worth labelling."""
    pool = _Pool(signals, labelled, 0)
    return {name: pool.values(name) for name in pool.mix}


def select(
    signals: Sequence[ImageSignals],
    labelled: Sequence[ImageSignals],
    strategy: str = "mix",
    count: int | None = None,
    seed: int = 0,
) -> list[int]:
    """Indices of the `count` (None: of all) images to label next, best first; ties go to the lower index.

    One by one the image of the highest value is taken, and counts as labelled for the rest: the next one is unlike it
    too, and a class that it shows is less rare. `seed` is of the strategy "random" alone. Time and memory grow with
    count x n. Raises OptionError for a strategy that is not known.

    With "diversity" it is the greedy cover of Sener and Savarese (Core-Set, 2018): each image is the farthest from all
    that are labelled or chosen, and where none is labelled the first is the one nearest to the mean.
    """
    pool = _Pool(signals, labelled, seed)
    count = len(signals) if count is None else max(0, min(count, len(signals)))
    if strategy in ("uncertainty", "disagreement", "random"):
        return [int(index) for index in np.argsort(-pool.values(strategy), kind="stable")[:count]]
    chosen: list[int] = []
    taken = np.zeros(len(signals), bool)
    for _ in range(count):
        worth = np.where(taken, -1.0, pool.values(strategy))
        index = int(worth.argmax())
        chosen.append(index)
        taken[index] = True
        pool.take(index)
    return chosen


class _Pool:
    """Images to choose from, and what is labelled: arrays that are brought up to date when one is taken."""

    def __init__(
        self,
        signals: Sequence[ImageSignals],
        labelled: Sequence[ImageSignals],
        seed: int,
        others: Sequence[ImageSignals] = (),
        counts: ArrayLike | None = None,
    ) -> None:
        count, everything = len(signals), [*signals, *others, *labelled]
        doubt = _filled(_uncertainties(signals), lambda: _uncertainties(others))
        disputes, more = [s.disagreement for s in signals], [s.disagreement for s in others]
        disputed = any(dispute is not None for dispute in [*disputes, *more])
        self.mix = {name: weight for name, weight in MIX.items() if name != "disagreement" or disputed}
        self._fixed = {
            "uncertainty": doubt,
            "disagreement": _filled(disputes, lambda: more) if disputed else doubt,
            "random": np.random.default_rng(seed).random(count),
        }
        drawn = _joined("labels", labelled).astype(np.int64)
        told = np.bincount(drawn, _joined("scores", labelled)) if counts is None else np.asarray(counts, np.float64)
        classes = max(len(told), 1 + int(_joined("labels", signals).max(initial=0)))
        self._presence = np.array([presence(s, classes) for s in signals]).reshape(-1, classes)
        self._expected = np.array([np.bincount(s.labels, s.scores, classes) for s in signals]).reshape(-1, classes)
        self._counts: Floats = np.pad(told, (0, classes - len(told)))
        features = _standardized([s.feature for s in everything])
        self._features, self._unlabelled = features[:count], features[: count + len(others)]
        self._nearest = _nearest(self._features, features[count + len(others) :])
        self._scale = _typical_distance(features)

    def values(self, strategy: str) -> Floats:
        if strategy not in STRATEGIES:
            raise OptionError(f"strategy {strategy!r} is not known: use {', '.join(STRATEGIES)}")
        if strategy == "mix":
            return self._mix()
        if strategy == "diversity":
            return self._diversity()
        if strategy == "balance":
            rare: Floats = (self._presence * rarity(self._counts)).max(axis=1, initial=0.0)
            return rare
        return self._fixed[strategy]

    def take(self, index: int) -> None:
        """This image will be labelled."""
        self._counts = self._counts + self._expected[index]
        self._nearest = np.minimum(self._nearest, _distances(self._features, self._features[index]))

    def _mix(self) -> Floats:
        mixed = np.zeros(len(self._features))
        for name, weight in self.mix.items():
            mixed += weight / sum(self.mix.values()) * self.values(name)
        return mixed

    def _diversity(self) -> Floats:
        if len(self._features) and np.isinf(self._nearest).all():  # nothing is labelled: begin with what is typical
            return self._scale / (self._scale + _distances(self._features, self._unlabelled.mean(axis=0)))
        return self._nearest / (self._nearest + self._scale)


def _filled(known: Sequence[float | None], more: Callable[[], Sequence[float | None]]) -> Floats:
    """Numbers, with the median of those that are known for the others; `more` of these are asked for if need be."""
    numbers = [number for number in known if number is not None]
    if len(numbers) < len(known):
        numbers += [number for number in more() if number is not None]
    middle = float(np.median(numbers)) if numbers else EMPTY
    return np.array([middle if number is None else number for number in known], np.float64)


def _uncertainties(signals: Sequence[ImageSignals]) -> list[float | None]:
    """`uncertainty` of each image."""
    joined = {name: _joined(name, signals) for name in ("scores", "margins", "entropies", "spreads")}
    counts = [len(s) for s in signals]
    image = np.repeat(np.arange(len(signals)), counts)
    doubt = _doubt(joined["margins"], joined["entropies"], joined["spreads"])
    totals = np.bincount(image, joined["scores"] * doubt**2, len(signals)).tolist()
    return [total / (1.0 + total) if boxes else None for total, boxes in zip(totals, counts, strict=True)]


def _joined(name: str, signals: Sequence[ImageSignals]) -> Floats:
    """What all images say of their boxes, in one array; numbers of classes stay exact."""
    return np.concatenate([np.zeros(0), *(getattr(s, name) for s in signals)])


def _standardized(features: Sequence[NDArray[Any]]) -> Floats:
    """Features as rows, each column of mean 0 and deviation 1, or all 0 where it does not vary; over sqrt(d)."""
    if not features:
        return np.zeros((0, 1))
    try:
        rows = np.array(features, np.float64)
    except ValueError:
        raise ValueError("the features must be equally long: those of one network") from None
    rows -= rows.mean(axis=0)
    deviation = np.sqrt(np.einsum("nd,nd->d", rows, rows) / len(rows))
    rows /= np.where(deviation > 1e-6, deviation, np.inf) * np.sqrt(max(rows.shape[1], 1))
    return rows


def _typical_distance(rows: Floats) -> float:
    """The mean distance of standardized rows from the origin: what far means; 1 where all are the same."""
    distance = float(np.sqrt(np.einsum("nd,nd->n", rows, rows)).mean()) if len(rows) else 0.0
    return distance or 1.0


def _distances(rows: Floats, row: Floats) -> Floats:
    difference = rows - row
    distances: Floats = np.sqrt(np.einsum("nd,nd->n", difference, difference))
    return distances


def _nearest(rows: Floats, others: Floats) -> Floats:
    """The distance of each row to the nearest of the others, infinite without any."""
    if len(rows) < len(others):
        return np.array([_distances(others, row).min() for row in rows])
    nearest = np.full(len(rows), np.inf)
    for other in others:
        np.minimum(nearest, _distances(rows, other), out=nearest)
    return nearest


def _iou(a: NDArray[Any], b: NDArray[Any]) -> Floats:
    """IoU of boxes [n, 4] and [m, 4], xyxy -> [n, m]."""
    a, b = np.asarray(a, np.float64)[:, None], np.asarray(b, np.float64)[None]
    sides = np.maximum(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0.0)
    shared = sides.prod(axis=2)
    areas = (a[..., 2:] - a[..., :2]).prod(axis=2) + (b[..., 2:] - b[..., :2]).prod(axis=2) - shared
    overlaps: Floats = np.divide(shared, areas, out=np.zeros_like(shared), where=areas > 0)
    return overlaps

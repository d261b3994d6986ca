"""The task's score, low = label me first: an acquisition function over what the version said about the project.

At prediction time a task is scored by what is known by then: its own boxes, what an older version drew on it, what the
version has learned from, and the tasks of the project that it has seen. `yolonas-labelstudio rank` makes the exact
order of the whole project.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from labelstudio_backend.learnt import learnt_boxes, learnt_images
from labelstudio_backend.registry import ProjectRegistry
from labelstudio_backend.signal_store import SignalStore
from labelstudio_backend.version import Version
from yolonas.active_learning import (
    BACKGROUND,
    MIX,
    ImageSignals,
    box_uncertainty,
    disagreement,
    parts,
    presence,
    rarity,
    values,
)
from yolonas.labelstudio import LabelMap, task_score

if TYPE_CHECKING:
    from yolonas.inference.detections import Detections

logger = logging.getLogger(__name__)

REFERENCE = 500  # labelled tasks, and others, that a task is compared with at prediction time: some milliseconds
PROJECTS = 16  # whose tasks are in memory, those that were asked last
REASONS = 2  # that are told of one task


class Acquisition:
    """Scores the tasks of a request and remembers what the version said about them. Thread-safe."""

    def __init__(self, strategy: str) -> None:
        self.strategy = strategy
        self._stores: OrderedDict[str, SignalStore] = OrderedDict()  # by project: of the version that was asked last
        self._lock = threading.Lock()  # of the stores; nothing is read with it

    def task_scores(
        self,
        project: ProjectRegistry,
        version: Version,
        labels: Sequence[str],
        tasks: Mapping[int, Mapping[str, Any]],
        regions: Mapping[int, Sequence[Mapping[str, Any]]],
        signals: Mapping[int, Sequence[ImageSignals]],
    ) -> dict[int, float]:
        """Scores 0..1 of predicted tasks by their key, an index in the request; the lowest is to be labelled first.

        labels: the project's. regions: what is answered for each task. signals: of each of its images, `of_control`.
        Whatever fails here costs a task its place, never its boxes: then `yolonas.labelstudio.task_score` is given.
        """
        if not tasks:
            return {}
        try:
            return self._task_scores(project, version, labels, tasks, regions, signals)
        except Exception:
            logger.exception("project %s: the tasks are scored by their boxes' scores alone", project.key)
            return {key: task_score(region["score"] for region in regions[key]) for key in tasks}

    def plain_score(
        self, version: Version, key: int, task: Mapping[str, Any], regions: Sequence[Mapping[str, Any]]
    ) -> float:
        """The score of a task without signals, a video for example, by its regions alone; arguments as above."""
        if self.strategy == "random":
            return by_chance(version.name, task["id"] if isinstance(task.get("id"), int) else key)
        return task_score(region["score"] for region in regions)

    def _task_scores(
        self,
        project: ProjectRegistry,
        version: Version,
        labels: Sequence[str],
        tasks: Mapping[int, Mapping[str, Any]],
        regions: Mapping[int, Sequence[Mapping[str, Any]]],
        signals: Mapping[int, Sequence[ImageSignals]],
    ) -> dict[int, float]:
        found: dict[int, ImageSignals] = {}
        for key, task in tasks.items():
            older = older_regions(task.get("predictions"), version.name)
            differs = None if older is None else regions_disagreement(regions[key], older)
            found[key] = of_task(signals[key])
            if differs is not None:
                found[key] = dataclasses.replace(found[key], disagreement=differs)
        store = self._store(project, version, labels)
        ids = {key: task["id"] for key, task in tasks.items() if isinstance(task.get("id"), int)}
        store.add({task: found[key] for key, task in ids.items() if np.isfinite(found[key].feature).all()})
        if self.strategy == "random":
            return {key: by_chance(version.name, ids.get(key, key)) for key in tasks}
        labelled, others = store.latest(REFERENCE, set(ids.values()))
        # Tasks without labels are predicted first: by the time that they are scored, no labelled one is in the store.
        labelled = _alike(learnt_images(version), found) or _alike(labelled, found)
        worth = values(
            list(found.values()),
            labelled,
            self.strategy,
            others=_alike(others, found),
            counts=learnt_boxes(version, labels),
        )
        if not np.isfinite(worth).all():  # an overflow in a map of half precision: JSON has no such number
            raise ValueError("the strategy gave scores that are no numbers")
        return {key: 1.0 - float(value) for key, value in zip(found, worth.tolist(), strict=True)}

    def _store(self, project: ProjectRegistry, version: Version, labels: Sequence[str]) -> SignalStore:
        with self._lock:
            store = self._stores.get(project.key)
            if store is None or store.version != version.name or store.labels != tuple(labels):
                learnt = version.record.get("manifest", {})
                store = self._stores[project.key] = SignalStore(project.path, version.name, labels, learnt)
            self._stores.move_to_end(project.key)
            while len(self._stores) > PROJECTS:
                self._stores.popitem(last=False)
            return store


def of_control(
    detections: Detections, label_map: LabelMap, labels: Sequence[str], *, score_threshold: float
) -> ImageSignals:
    """The signals of an image for one control: of the boxes above the threshold whose class has a label.

    Labels and rivals become indices into `labels`, the project's; a rival without a label is none of its business.
    """
    place = {index: labels.index(label) for index, label in label_map.to_label.items()}
    signals = ImageSignals.of(detections)
    above = np.asarray(signals.scores, np.float32) > np.float32(score_threshold)
    signals = signals[above & np.isin(signals.labels, list(place))]
    own = [place[int(label)] for label in signals.labels]
    rivals = [place.get(int(rival), BACKGROUND) for rival in signals.rivals]
    return dataclasses.replace(signals, labels=np.array(own, np.int64), rivals=np.array(rivals, np.int64))


def of_task(images: Sequence[ImageSignals]) -> ImageSignals:
    """The signals of a task with several images or controls: all its boxes, the mean feature, the worst disagreement.

    Of controls with models of their own the mean features stand one after the other.
    """
    if len(images) == 1:
        return images[0]

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(image, name) for image in images])

    lengths = dict.fromkeys(len(image.feature) for image in images)
    means = [np.mean([image.feature for image in images if len(image.feature) == n], axis=0) for n in lengths]
    return ImageSignals(
        scores=joined("scores"),
        labels=joined("labels"),
        margins=joined("margins"),
        entropies=joined("entropies"),
        rivals=joined("rivals"),
        spreads=joined("spreads"),
        feature=np.concatenate(means),
        disagreement=max((i.disagreement for i in images if i.disagreement is not None), default=None),
    )


def older_regions(predictions: Any, version: str) -> list[Mapping[str, Any]] | None:
    """The regions of the latest prediction of another version, None where there is none."""
    others = [
        prediction
        for prediction in (predictions if isinstance(predictions, list) else ())
        if isinstance(prediction, Mapping)
        and prediction.get("model_version") != version
        and isinstance(prediction.get("result"), list)
    ]
    latest = max(others, key=lambda prediction: _number(prediction.get("id")), default=None)
    return None if latest is None else latest["result"]


def regions_disagreement(a: Iterable[Mapping[str, Any]], b: Iterable[Mapping[str, Any]]) -> float:
    """`active_learning.disagreement` of two results of Label Studio's, in percent of the image, which is all the same.

    A region without a score, drawn by a person or by another tool, counts as certain.
    """
    return disagreement(*_detections(list(a), list(b)))


def _detections(*results: list[Mapping[str, Any]]) -> list[Detections]:
    from yolonas.inference.detections import Detections

    rows: list[list[tuple[list[float], float, str]]] = []
    for result in results:
        rows.append([])
        for region in result:
            value = region.get("value") if isinstance(region, Mapping) else None
            if not isinstance(value, Mapping) or not isinstance(value.get("rectanglelabels"), list):
                continue
            x, y, width, height = (_number(value.get(key)) for key in ("x", "y", "width", "height"))
            score = region.get("score")
            sure = float(score) if isinstance(score, int | float) and 0 < score <= 1 else 1.0
            where = f"{region.get('from_name')} {region.get('to_name')}"  # several controls, several images
            for label in value["rectanglelabels"]:
                rows[-1].append(([x, y, x + width, y + height], sure, f"{where} {label}"))
    names = tuple(dict.fromkeys(name for result in rows for _, _, name in result))
    return [
        Detections(
            np.array([box for box, _, _ in result], np.float32).reshape(-1, 4),
            np.array([score for _, score, _ in result], np.float32),
            np.array([names.index(name) for _, _, name in result], np.int64),
            names,
            (100, 100),
        )
        for result in rows
    ]


def by_chance(version: str, task: int) -> float:
    """A number from 0 to 1 that is always the same for a task and a version."""
    digest = hashlib.sha256(f"{version} {task}".encode()).digest()
    return int.from_bytes(digest[:6]) / 2**48


def reasons(
    signals: Sequence[ImageSignals],
    labelled: Sequence[ImageSignals],
    strategy: str,
    labels: Sequence[str],
) -> list[str]:
    """Why each image should be labelled, in words: what lifts it most above the middle of the others."""
    if strategy == "random":
        return ["by chance"] * len(signals)
    worth = parts(signals, labelled)
    names = list(worth) if strategy == "mix" else [strategy if strategy in worth else "uncertainty"]
    lifted = {name: MIX[name] * (worth[name] - (np.median(worth[name]) if signals else 0.0)) for name in names}
    counts = np.zeros(len(labels))
    for image in labelled:
        counts += np.bincount(image.labels, image.scores, len(labels))
    told = []
    for index, image in enumerate(signals):
        order = sorted(names, key=lambda name: (-lifted[name][index], name))
        best = [name for name in order if lifted[name][index] > 0][:REASONS] or order[:1]
        lines = (_reason(name, image, labels, counts, bool(labelled)) for name in best)
        told.append("; ".join(dict.fromkeys(line for line in lines if line)) or "nothing stands out")
    return told


def _reason(name: str, image: ImageSignals, labels: Sequence[str], counts: np.ndarray, any_labelled: bool) -> str:
    if name == "disagreement":
        return "versions disagree" if image.disagreement else ""
    if name == "diversity":
        return "unlike what is labelled" if any_labelled else "typical of the project"
    if not len(image):
        return "no box found" if name == "uncertainty" else ""
    if name == "balance":
        rare = presence(image, len(labels)) * rarity(counts)
        return f"rare class: {labels[int(rare.argmax())]}" if rare.max() > 0 else ""
    worst = int((image.scores * box_uncertainty(image) ** 2).argmax())
    label, rival = labels[int(image.labels[worst])], int(image.rivals[worst])
    in_class = (1.0 - image.margins[worst] + image.entropies[worst]) / 2.0
    if image.spreads[worst] > in_class:
        return f"unsure where a {label} ends"
    return f"unsure between {label} and {labels[rival]}" if rival != BACKGROUND else f"unsure of a {label}"


def _alike(known: Sequence[ImageSignals], found: Mapping[int, ImageSignals]) -> list[ImageSignals]:
    """Those whose feature is as long: a version may be served from another kind of file after a restart."""
    length = len(next(iter(found.values())).feature) if found else 0
    return [signals for signals in known if len(signals.feature) == length]


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else 0.0

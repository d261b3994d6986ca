"""The loop without servers: the backend's split and gate, and the order of its `rank`, around the trainer itself."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from labelstudio_backend.acceptance import Boxes, fewest_edits_threshold
from labelstudio_backend.corrections import held_out
from labelstudio_backend.gate import judge
from labelstudio_backend.settings import Settings
from labelstudio_backend.training_job import THRESHOLD_IMAGES
from loop_rounds import Corrected
from yolonas import checkpoint
from yolonas.active_learning import SIGNALS_CONF, ImageSignals, disagreement, select
from yolonas.data.labelled import LabelledImage, LabelledImages
from yolonas.evaluation import coco_ap, predict_dataset
from yolonas.inference.detections import Detections
from yolonas.inference.detector import Detector
from yolonas.inference.sources import read_image
from yolonas.training.recipe import Recipe
from yolonas.training.trainer import train

BATCH = 8


class DirectTeam:
    """See `loop_rounds.Team`. `seconds` of each training are of processor time: other load takes nothing from it."""

    def __init__(
        self,
        pool: LabelledImages,
        test: LabelledImages,
        strategy: str,
        seed: int,
        *,
        first: int,
        seconds: float,
        variant: str,
        size: int,
        folder: Path,
    ) -> None:
        self.pool, self.test, self.strategy, self.seed = pool, test, strategy, seed
        self.seconds, self.variant, self.size, self.folder = seconds, variant, size, folder
        self.fraction = float(Settings.model_fields["held_out"].default)
        order = np.random.default_rng(seed).permutation(len(pool))
        self.queue = [int(image) for image in order[:first]]  # the same for all strategies
        self.labelled: dict[int, LabelledImage] = {}
        self.version: Path | None = None  # that serves
        self.detector: Detector | None = None
        self.found: dict[int, Detections] = {}  # by the present version
        self.before: dict[int, Detections] = {}  # by the one before it
        self.round = 0

    def next(self) -> int:
        if not self.queue:
            self.queue = self._order()
        return self.queue.pop(0)

    def predicted(self, image: int) -> Boxes | None:
        if self.detector is None:
            return None
        found = self._detect([image])[0]
        found = found[found.scores > self.detector.checkpoint.conf]
        return Boxes(found.boxes, [found.names[label] for label in found.labels])

    def submit(self, image: int, work: Corrected) -> None:
        labels = np.array([self.pool.names.index(str(name)) for name in work.boxes.labels], np.int64)
        crowd = np.zeros(len(labels), bool)
        self.labelled[image] = replace(
            self.pool.images[image], boxes=np.asarray(work.boxes.boxes), labels=labels, crowd=crowd
        )

    def train(self) -> dict[str, Any]:
        self.round += 1
        parts: dict[bool, list[LabelledImage]] = {True: [], False: []}
        for image in sorted(self.labelled):
            parts[held_out(f"seed {self.seed}", image, self.fraction)].append(self.labelled[image])
        learn, judged = (LabelledImages(self.pool.names, parts[out]) for out in (False, True))
        start = None if self.version is None else checkpoint.load(self.version)
        begun = time.process_time()
        recipe = Recipe.auto(
            learn,
            self.variant,
            "cpu",
            self.seconds,
            start_size=None if start is None else self.size,
            image_size=self.size,
            seed=self.seed,
            workers=0,
        )
        out = self.folder / f"training-{self.round}"
        nothing = LabelledImages(self.pool.names, [])
        result = train(learn, nothing, recipe=recipe, out_dir=out, start=start, variant=self.variant, device="cpu")
        trained = time.process_time() - begun
        detector = Detector(result.best, "cpu", runtime="torch")
        more = learn.images[: max(0, THRESHOLD_IMAGES - len(judged))]
        sample = LabelledImages(learn.names, [*judged.images, *more])
        saved = checkpoint.load(result.best)
        saved.conf = fewest_edits_threshold(sample, predict_dataset(detector, sample))
        file = self.folder / f"version-{self.round}.safetensors"
        checkpoint.save(saved, file)
        new = Detector(file, "cpu", runtime="torch")
        published = self._gate(judged, new)
        if published:
            self.version, self.detector, self.before, self.found = file, new, self.found, {}
        self.queue = []
        assert self.detector is not None
        metrics = coco_ap(self.test, predict_dataset(self.detector, self.test))
        return {
            "ap": round(metrics.ap, 4),
            "ap50": round(metrics.ap50, 4),
            "published": int(published),
            "training_s": round(trained, 1),
        }

    def _gate(self, judged: LabelledImages, new: Detector) -> bool:
        if self.detector is None or not judged.objects:
            return True
        before, after = (predict_dataset(detector, judged) for detector in (self.detector, new))
        return judge(judged, before, after).publish

    def _order(self) -> list[int]:
        """All that is not labelled, in the order of the strategy."""
        rest = [image for image in range(len(self.pool)) if image not in self.labelled]
        if self.strategy == "random":
            return [rest[k] for k in np.random.default_rng([self.seed, self.round]).permutation(len(rest))]
        found = self._detect(rest)
        differences: list[float | None] = [None] * len(rest)
        if self.strategy in ("disagreement", "mix"):
            others = [self.before.get(image) for image in rest]
            differences = [None if b is None else disagreement(a, b) for a, b in zip(found, others, strict=True)]
        signals = [ImageSignals.of(one, differs) for one, differs in zip(found, differences, strict=True)]
        done = sorted(self.labelled)
        known = [
            ImageSignals.of(one).labelled_as(self.labelled[image].labels)
            for image, one in zip(done, self._detect(done), strict=True)
        ]
        return [rest[k] for k in select(signals, known, self.strategy, seed=self.seed)]

    def _detect(self, images: Sequence[int]) -> list[Detections]:
        """Detections of the present version, with signals and down to SIGNALS_CONF where the strategy wants them."""
        assert self.detector is not None
        missing = [image for image in images if image not in self.found]
        conf = self.detector.checkpoint.conf
        more = {} if self.strategy == "random" else {"signals": True, "conf": min(conf, SIGNALS_CONF)}
        for start in range(0, len(missing), BATCH):
            part = missing[start : start + BATCH]
            pixels = [read_image(self.pool.images[image].path) for image in part]
            self.found |= zip(part, self.detector.predict_batch(pixels, **more), strict=True)
        return [self.found[image] for image in images]


def process_clock() -> None:
    """Have the trainer's time budget count this process's own time."""
    time.monotonic = time.process_time

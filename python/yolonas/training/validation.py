"""Measuring the weights of a run on its validation images, as a Detector will serve them."""

from __future__ import annotations

import copy
from collections.abc import Collection
from functools import cached_property

from torch import Tensor

from yolonas.data.dataset import Draw, TrainingSet, collate
from yolonas.data.labelled import LabelledImages
from yolonas.evaluation import Metrics, coco_ap, label_map, predict_dataset
from yolonas.inference.detections import Detections
from yolonas.inference.detector import Detector
from yolonas.model import YoloNAS
from yolonas.training import distributed
from yolonas.training.ema import calibrate
from yolonas.training.network import Network

CALIBRATION_IMAGES = 64


class Validation:
    """Measures models on the images of `val` or, to be shown only, of `watch`, shared by the processes.

    `detections` are those of the last measuring. Raises DataError where either has images but no class of `train`.
    """

    def __init__(
        self,
        train: LabelledImages,
        val: LabelledImages,
        network: Network,
        batch: int,
        frozen: Collection[str],
        watch: LabelledImages | None = None,
    ) -> None:
        self.train, self.val, self.network, self.batch, self.frozen = train, val, network, batch, frozen
        self.watch = watch or LabelledImages(val.names, [])
        for data in (self.val, self.watch):
            if data.images:
                label_map(train.names, data.names)
        self.detections: list[Detections] = []

    def measure(self, model: YoloNAS) -> Metrics | None:
        """Give the model its batch norm statistics and measure its fused form; None without validation images."""
        return self._measure(model, self.val)

    def look(self, model: YoloNAS) -> Metrics | None:
        """Measure a copy of the model on the watched images; None without such."""
        return self._measure(copy.deepcopy(model), self.watch) if self.watch.images else None

    def _measure(self, model: YoloNAS, data: LabelledImages) -> Metrics | None:
        calibrate(model, (self.network.prepare(canvases) for canvases in self.canvases), frozen=self.frozen)
        self.detections = []
        if not data.images:
            return None
        own = LabelledImages(data.names, distributed.share(data.images))
        detector = Detector(model, self.network.device, runtime="torch")  # no export of each epoch's weights
        self.detections = distributed.gather(predict_dataset(detector, own) if own.images else [])
        return coco_ap(data, self.detections)

    @cached_property
    def canvases(self) -> list[Tensor]:
        """Plain canvases uint8 of some training images, spread over the set, in batches."""
        plain = TrainingSet(self.train, self.network.preprocessing, augmentation=None)
        count = min(len(self.train), CALIBRATION_IMAGES)
        views = [plain[Draw(k * len(self.train) // count, 0, 0, False)] for k in range(count)]
        return [collate(views[k : k + self.batch]).images for k in range(0, count, self.batch)]

"""Labelled images as batches for training: uint8 canvases and padded targets, the same for any number of workers."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from yolonas.data import augment
from yolonas.data.augment import Augmentation, Image, Labelled
from yolonas.data.labelled import LabelledImage, LabelledImages
from yolonas.data.targets import Targets
from yolonas.errors import DataError
from yolonas.inference._cv2 import cv2
from yolonas.inference.letterbox import letterbox
from yolonas.inference.sources import read_image

if TYPE_CHECKING:
    from yolonas.model.config import Preprocessing


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Draw:
    """One sample to make: of which image, from which stream of random numbers, and whether images may be combined."""

    index: int
    epoch: int
    position: int
    mosaic: bool  # or mixup


class Batch(NamedTuple):
    """images [B, 3, H, W] uint8, channels_last in memory; targets in canvas px."""

    images: Tensor
    targets: Targets


class TrainingSet(Dataset[Labelled]):
    """Views of labelled images on the canvas of `preprocessing`; crowd boxes are left out.

    A view depends on `seed` and its Draw only. Without `augmentation` it is the plain letterbox. Images scaled to the
    canvas are kept in memory up to `cache_bytes`: decoding a JPEG takes longer than the rest. For an image that cannot
    be read the next one stands in, with a warning.
    """

    def __init__(
        self,
        data: LabelledImages,
        preprocessing: Preprocessing,
        *,
        augmentation: Augmentation | None,
        seed: int = 0,
        cache_bytes: int = 0,
    ) -> None:
        self.data = data
        self.preprocessing = preprocessing
        self.augmentation = augmentation
        self.seed = seed
        self._cache: dict[int, Labelled] = {}
        self._cache_left = cache_bytes
        self._unreadable: set[Path] = set()

    def __len__(self) -> int:
        return len(self.data.images)

    def __getitem__(self, draw: Draw) -> Labelled:
        sample = self._load(draw.index)
        if self.augmentation is None:
            return self._letterboxed(sample)
        rng = np.random.default_rng([self.seed, draw.epoch, draw.position + 1])  # 0: the sampler
        augmentation, size, pad = self.augmentation, self.preprocessing.image_size, self.preprocessing.pad_value
        if draw.mosaic and rng.random() < augmentation.mosaic:
            others = [self._load(int(index)) for index in rng.integers(len(self), size=3)]
            sample = augment.mosaic(rng, [sample, *others], size, pad)
        around = pad if augmentation.pad is None else augmentation.pad
        view = augment.single(rng, sample, size, augmentation, around)
        if draw.mosaic and rng.random() < augmentation.mixup:
            view = augment.mixup(rng, view, self._load(int(rng.integers(len(self)))), augmentation, pad)
        return view._replace(image=view.image[..., ::-1]) if self.preprocessing.channels == "bgr" else view

    def _letterboxed(self, sample: Labelled) -> Labelled:
        canvas, placement = letterbox(sample.image, self.preprocessing)
        return Labelled(canvas, placement.to_canvas(sample.boxes), sample.labels)

    def _load(self, index: int) -> Labelled:
        """The image, scaled as letterbox would, and its boxes."""
        if index in self._cache:
            return self._cache[index]
        labelled, image = self._read(index)
        height, width = image.shape[:2]
        scale = self.preprocessing.scale(height, width)
        size = (max(round(width * scale), 1), max(round(height * scale), 1))
        resized = np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_LINEAR), dtype=np.uint8)
        real = ~labelled.crowd
        sample = Labelled(resized, (labelled.boxes[real] * scale).astype(np.float32), labelled.labels[real])
        if resized.nbytes <= self._cache_left:
            self._cache_left -= resized.nbytes
            self._cache[index] = sample
        return sample

    def _read(self, index: int) -> tuple[LabelledImage, Image]:
        """The image, or the next one that can be read: a run of hours must not end because of one damaged file."""
        for step in range(len(self)):
            labelled = self.data.images[(index + step) % len(self)]
            try:
                image = read_image(labelled.path)
            except DataError as error:
                if labelled.path not in self._unreadable:
                    log.warning("%s; another image takes its place in training", error)
                self._unreadable.add(labelled.path)
            else:
                return labelled, image
        raise DataError(f"none of the {len(self)} training images can be read any more")


class DrawSampler(Sampler[list[Draw]]):
    """Batches of draws of one epoch: every image as often as every other, in random order, in full batches.

    Small sets repeat within an epoch until it has `min_samples`. Of `ranks` processes each gets its share of every
    batch. Set `epoch` and `mosaic` before iterating.
    """

    def __init__(
        self, images: int, batch: int, *, seed: int = 0, min_samples: int = 0, rank: int = 0, ranks: int = 1
    ) -> None:
        if images < 1 or batch < 1:
            raise ValueError(f"need at least one image and a batch of at least one, not {images} and {batch}")
        if batch % ranks:
            raise ValueError(f"a batch of {batch} cannot be shared evenly by {ranks} processes: choose a multiple")
        self.rank, self.ranks = rank, ranks
        self.images = images
        self.batch = batch
        self.seed = seed
        self.epoch = 0
        self.mosaic = True
        self._batches = -(-max(images, min_samples) // batch)

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[list[Draw]]:
        rng = np.random.default_rng([self.seed, self.epoch])
        total = self._batches * self.batch
        rounds = [rng.permutation(self.images) for _ in range(-(-total // self.images))]
        order = np.concatenate(rounds)[:total].tolist()
        for start in range(0, total, self.batch):
            positions = range(start + self.rank, start + self.batch, self.ranks)
            yield [Draw(order[position], self.epoch, position, self.mosaic) for position in positions]


def start_worker(worker: int) -> None:
    """To be called in each worker process: the thread pool of OpenCV does not survive a fork."""
    cv2.setNumThreads(0)


def collate(views: Sequence[Labelled]) -> Batch:
    """A batch of views that share one canvas size."""
    pixels = torch.from_numpy(np.stack([view.image for view in views]))
    targets = Targets.pad([view.boxes for view in views], [view.labels for view in views])
    return Batch(pixels.permute(0, 3, 1, 2), targets)

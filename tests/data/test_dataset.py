"""Batches for training: what is in them, and that they do not depend on the number of workers."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from yolonas.data.augment import Augmentation
from yolonas.data.dataset import Batch, Draw, DrawSampler, TrainingSet, collate, start_worker
from yolonas.data.labelled import LabelledImage, LabelledImages
from yolonas.inference.letterbox import letterbox
from yolonas.model import Preprocessing

VIEWS = Augmentation(mosaic=0.5, mixup=0.5, swap=0.5, degrees=10)  # every source of chance


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> LabelledImages:
    folder, rng, images = tmp_path_factory.mktemp("images"), np.random.default_rng(0), []
    for k, (height, width) in enumerate([(60, 90), (120, 50), (64, 64), (33, 100), (80, 80)]):
        path = folder / f"{k}.png"
        cv2.imwrite(str(path), rng.integers(0, 255, (height, width, 3), dtype=np.uint8))
        boxes = np.array([[2, 3, 20, 30], [10, 10, 45, 33]], dtype=np.float32)[: k % 3]
        crowd = np.array([False, True])[: len(boxes)]
        images.append(LabelledImage(path, boxes, np.arange(len(boxes)), crowd, width, height, k + 1))
    return LabelledImages(("a", "b"), images, [])


def batches(data: LabelledImages, workers: int, cache: int = 0) -> list[Batch]:
    dataset = TrainingSet(data, Preprocessing.square(64), augmentation=VIEWS, seed=3, cache_bytes=cache)
    sampler = DrawSampler(len(dataset), 4, seed=3, min_samples=10)
    result = []
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=start_worker,
        persistent_workers=workers > 0,
    )
    for epoch in range(2):
        sampler.epoch = epoch
        result += list(loader)
    return result


def test_batches_do_not_depend_on_workers_or_cache(data: LabelledImages) -> None:
    one, two, cached = batches(data, 0), batches(data, 2), batches(data, 0, cache=1 << 20)
    assert len(one) == len(two) == 6
    for a, b, c in zip(one, two, cached, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.images, c.images)
        assert all(torch.equal(x, y) for x, y in zip(a.targets, b.targets, strict=True))
    assert not torch.equal(one[0].images, one[3].images)


def test_batch_layout(data: LabelledImages) -> None:
    batch = batches(data, 0)[0]
    assert batch.images.dtype == torch.uint8
    assert batch.images.shape == (4, 3, 64, 64)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    most = batch.targets.mask.sum(1).max()
    assert batch.targets.boxes.shape == (4, max(int(most), 1), 4)
    assert not batch.targets.boxes[~batch.targets.mask].any()


def test_plain_view_is_the_letterbox_without_crowd(data: LabelledImages) -> None:
    preprocessing = Preprocessing.square(64)
    dataset = TrainingSet(data, preprocessing, augmentation=None)
    view = dataset[Draw(2, 0, 0, False)]
    canvas, _ = letterbox(cv2.imread(str(data.images[2].path))[..., ::-1].copy(), preprocessing)
    assert np.array_equal(view.image, canvas)
    assert view.labels.tolist() == [0]
    turned = dataset[Draw(1, 0, 0, False)]  # 120 x 50 -> 64 x 27, padded by 18 on the left
    np.testing.assert_allclose(turned.boxes[0], np.array([2, 3, 20, 30]) * 64 / 120 + [18, 0, 18, 0], atol=1e-4)


@pytest.mark.parametrize("pad", ["center", "bottom_right"])
def test_plain_boxes_lie_on_their_objects_on_either_canvas(
    pad: Literal["center", "bottom_right"], tmp_path: Path
) -> None:
    image = np.zeros((50, 80, 3), np.uint8)
    image[10:30, 20:60] = 255
    cv2.imwrite(str(tmp_path / "a.png"), image)
    labelled = LabelledImage(
        tmp_path / "a.png",
        *(np.array([[20, 10, 60, 30]], np.float32), np.zeros(1, np.int64), np.zeros(1, bool)),
        *(80, 50, 1),
    )
    preprocessing = Preprocessing(image_size=(160, 160), resize_to=156, pad=pad)
    view = TrainingSet(LabelledImages(("a",), [labelled]), preprocessing, augmentation=None)[Draw(0, 0, 0, False)]
    inside = view.image[..., 0] > 180
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    np.testing.assert_allclose(view.boxes[0], [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], atol=1.0)
    assert (view.boxes[0, 0] > 40) == (pad == "center")


def test_mixup_and_mosaic_take_other_images_and_end_together(data: LabelledImages) -> None:
    for changes in ({"mosaic": 1.0, "mixup": 0.0}, {"mosaic": 0.0, "mixup": 1.0}):
        augmentation = Augmentation(flip=0, colours=0, translate=0, scale=(1, 1), min_visible=0, min_side=0, **changes)
        views = TrainingSet(data, Preprocessing.square(64), augmentation=augmentation, seed=5)
        several = {len(views[Draw(0, 0, position, True)].boxes) for position in range(30)}
        alone = {len(views[Draw(0, 0, position, False)].boxes) for position in range(30)}
        assert len(several) > 1
        assert alone == {0}, "image 0 has no box"


def test_channels_of_the_start_are_kept(data: LabelledImages) -> None:
    rgb, bgr = (
        TrainingSet(data, Preprocessing(image_size=(64, 64), resize_to=64, channels=c), augmentation=Augmentation())
        for c in ("rgb", "bgr")
    )
    draw = Draw(2, 0, 0, True)
    assert np.array_equal(rgb[draw].image, bgr[draw].image[..., ::-1])


def test_cache_is_bounded(data: LabelledImages) -> None:
    dataset = TrainingSet(data, Preprocessing.square(64), augmentation=None, cache_bytes=64 * 64 * 3)
    for index in range(len(dataset)):
        dataset[Draw(index, 0, 0, False)]
    assert sum(sample.image.nbytes for sample in dataset._cache.values()) <= 64 * 64 * 3
    assert dataset._cache


@pytest.mark.parametrize(
    ("images", "batch", "minimum", "draws"), [(5, 4, 0, 8), (1, 8, 0, 8), (3, 2, 9, 10), (8, 4, 0, 8)]
)
def test_every_image_is_drawn_as_often(images: int, batch: int, minimum: int, draws: int) -> None:
    sampler = DrawSampler(images, batch, min_samples=minimum)
    epoch = list(sampler)
    assert len(epoch) == len(sampler) == draws // batch
    assert {len(one) for one in epoch} == {batch}
    counts = np.bincount([draw.index for one in epoch for draw in one], minlength=images)
    assert counts.max() - counts.min() <= 1
    assert [draw.position for one in epoch for draw in one] == list(range(draws))


def test_epochs_differ_and_repeat() -> None:
    sampler = DrawSampler(20, 4, seed=1)
    first = list(sampler)
    assert list(sampler) == first
    sampler.epoch = 1
    assert [d.index for b in sampler for d in b] != [d.index for b in first for d in b]


def test_no_image_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one image"):
        DrawSampler(0, 4)

"""Images of coloured rectangles, and a tiny detector that has learned them."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import pytest
import torch

from yolonas import checkpoint
from yolonas.checkpoint import Checkpoint
from yolonas.data.augment import Augmentation
from yolonas.data.labelled import LabelledImage, LabelledImages
from yolonas.training.recipe import Recipe
from yolonas.training.trainer import train

COLOURS = {"red": (0, 0, 255), "green": (0, 255, 0), "blue": (255, 0, 0), "white": (255, 255, 255)}  # BGR
QUARTERS = np.array([[2, 2], [34, 2], [2, 34], [34, 34]])

Rectangles = Callable[..., LabelledImages]


@pytest.fixture(scope="session")
def rectangles(tmp_path_factory: pytest.TempPathFactory) -> Rectangles:
    """rectangles(count, names, seed): images 64 x 64, each with a rectangle of each name's colour, four at most."""
    folder = tmp_path_factory.mktemp("rectangles")

    def make(count: int, names: tuple[str, ...], seed: int = 0) -> LabelledImages:
        rng, images = np.random.default_rng(seed), []
        for k in range(count):
            image = rng.integers(60, 120, (64, 64, 3), dtype=np.uint8)
            corners = QUARTERS[rng.permutation(4)[: len(names)]] + rng.integers(0, 12, (len(names), 2))
            boxes = np.concatenate([corners, corners + rng.integers(13, 17, corners.shape)], axis=1)
            for (x1, y1, x2, y2), name in zip(boxes.tolist(), names, strict=True):
                image[y1:y2, x1:x2] = COLOURS[name]
            path = folder / f"{'-'.join(names)}-{seed}-{k}.png"
            cv2.imwrite(str(path), image)
            crowd = np.zeros(len(names), dtype=bool)
            images.append(LabelledImage(path, boxes.astype(np.float32), np.arange(len(names)), crowd, 64, 64, k + 1))
        return LabelledImages(names, images)

    return make


@pytest.fixture(scope="session")
def rectangle_recipe() -> Recipe:
    return Recipe(
        image_size=64,
        batch=8,
        epochs=4,
        lr=8e-3,
        warmup_steps=4,
        min_samples=80,
        evaluate_every=4,
        augmentation=Augmentation(mosaic=0.0, hue=0, scale=(0.8, 1.2)),
    )


@pytest.fixture(scope="session")
def trained(rectangles: Rectangles, rectangle_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A detector of red, green and blue rectangles, on one thread."""
    names = ("red", "green", "blue")
    folder = tmp_path_factory.mktemp("trained")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        data = rectangles(16, names), rectangles(6, names, 9)
        result = train(*data, recipe=rectangle_recipe, out_dir=folder, variant="n", device="cpu")
    finally:
        torch.set_num_threads(threads)
    return checkpoint.load(result.best)

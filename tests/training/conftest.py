"""Images of coloured rectangles, and a tiny detector that has learned them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import pytest
import torch

from rectangles import draw
from yolonas import checkpoint
from yolonas.checkpoint import Checkpoint
from yolonas.data.augment import Augmentation
from yolonas.data.labelled import LabelledImages
from yolonas.training.recipe import Recipe
from yolonas.training.trainer import train

Rectangles = Callable[..., LabelledImages]


@pytest.fixture(autouse=True, scope="module")  # of the module, as what modules train once must run under it too
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def rectangles(tmp_path_factory: pytest.TempPathFactory) -> Rectangles:
    """rectangles(count, names, seed): see `draw`."""
    return functools.partial(draw, tmp_path_factory.mktemp("rectangles"))


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

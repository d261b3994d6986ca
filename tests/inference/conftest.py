"""Models whose outputs are worth comparing."""

from __future__ import annotations

import pytest

from golden import golden
from yolonas.checkpoint import Checkpoint
from yolonas.model import Preprocessing, YoloNAS


@pytest.fixture(scope="session")
def golden_s() -> YoloNAS:
    return golden(YoloNAS("s"))


@pytest.fixture(scope="session")
def lively() -> Checkpoint:
    """A small model of three classes that finds some dozens of boxes in any picture."""
    preprocessing = Preprocessing(image_size=(192, 192), resize_to=190)
    model = golden(YoloNAS("n", 3, class_names=("cat", "dog", "bird"), preprocessing=preprocessing))
    return Checkpoint(model, conf=0.6, iou=0.5)

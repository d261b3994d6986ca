"""A small model for the commands."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantized_network import trainable
from yolonas.checkpoint import Checkpoint, save


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "n.safetensors"
    save(Checkpoint(trainable(), conf=0.5, iou=0.3), path)
    return path

"""A small model for the commands."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from yolonas.checkpoint import Checkpoint, save
from yolonas.model import Preprocessing, YoloNAS


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = YoloNAS("n", 3, class_names=("cat", "dog", "bird"), preprocessing=Preprocessing.square(64))
    for parameter in model.parameters():  # untrained scores all lie at 0.01; these spread over 0..1
        if parameter.ndim == 4:
            torch.nn.init.kaiming_normal_(parameter, a=0.75)
    for level in model.heads.levels:
        torch.nn.init.zeros_(level.cls_pred.bias)
        level.reg_pred.bias.data = -torch.arange(17.0).repeat(4)  # small boxes, which the image does not clip
    path = tmp_path_factory.mktemp("weights") / "n.safetensors"
    save(Checkpoint(model.eval(), conf=0.5, iou=0.3), path)
    return path

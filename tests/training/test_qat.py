"""Quantization-aware training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from yolonas.checkpoint import Checkpoint
from yolonas.data.labelled import LabelledImages
from yolonas.errors import DataError
from yolonas.quantization import calibration_canvases
from yolonas.training.qat import fine_tune, qat_recipe

Rectangles = Callable[..., LabelledImages]


def test_the_recipe_is_the_references_change_of_the_trainings_own(trained: Checkpoint, rectangles: Rectangles) -> None:
    names = ("red", "green", "blue")
    data = rectangles(4, names), rectangles(2, names, 9)
    own, recipe = trained.record["recipe"], qat_recipe(trained, *data)
    assert recipe.lr == pytest.approx(own["lr"] / 100)
    assert recipe.weight_decay == pytest.approx(own["weight_decay"] / 100)
    assert (recipe.epochs, recipe.batch) == (max(own["epochs"] // 10, 1), own["batch"] // 2)
    unknown = qat_recipe(replace(trained, record={}), *data)
    assert unknown.image_size == 64
    assert unknown.lr < 1e-3


def test_training_under_int8_learns_and_keeps_the_best(trained: Checkpoint, rectangles: Rectangles) -> None:
    names = ("red", "green", "blue")
    train, val = rectangles(16, names), rectangles(6, names, 9)
    canvases = calibration_canvases(trained, [image.path for image in train.images], 4)
    told: list[tuple[int, float, float]] = []

    def run(lr: float) -> Checkpoint:
        told.clear()
        recipe = replace(qat_recipe(trained, train, val), lr=lr, min_samples=32)
        return fine_tune(
            trained, train, val, canvases=canvases, recipe=recipe, epochs=2, on_epoch=lambda *line: told.append(line)
        )

    tuned = run(lr=2e-4)
    assert [epoch for epoch, _, _ in told] == [0, 1, 2]
    assert told[2][1] < told[1][1]  # the loss falls
    assert tuned.model.form == "fused"
    assert tuned.record["qat"]["history"][0]["epoch"] == 0
    before, after = trained.model.fused().state_dict(), tuned.model.state_dict()
    assert list(after) == list(before)
    kept = max(range(3), key=lambda epoch: told[epoch][2])
    changed = any(not torch.equal(after[key], before[key]) for key in before)
    assert changed == (kept > 0)
    again = run(lr=2e-4)
    assert all(torch.equal(value, after[key]) for key, value in again.model.state_dict().items())
    ruined = run(lr=3.0)  # worse after every epoch: the start is kept
    assert max(ap for _, _, ap in told[1:]) < told[0][2]
    assert all(torch.equal(value, before[key]) for key, value in ruined.model.state_dict().items())


def test_data_that_does_not_do(trained: Checkpoint, rectangles: Rectangles) -> None:
    known, val = rectangles(2, ("red", "green", "blue")), rectangles(2, ("red", "green", "blue"), 9)
    canvases = [np.zeros((1, 3, 64, 64), dtype=np.uint8)]
    with pytest.raises(DataError, match="does not know the class white"):
        fine_tune(trained, rectangles(2, ("red", "white")), val, canvases=canvases)
    empty = replace(known, images=rectangles(2, ("red", "green", "blue"), 3, empty=True).images)
    with pytest.raises(DataError, match="no object"):
        fine_tune(trained, empty, val, canvases=canvases)

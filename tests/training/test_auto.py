"""The default recipe: what it makes of data, device, start and time, and that it says why."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from yolonas.data.labelled import LabelledImage, LabelledImages
from yolonas.data.summary import DataSummary
from yolonas.training import auto
from yolonas.training.auto import CANVASES
from yolonas.training.recipe import Recipe

MANY = DataSummary(
    images=2000,
    objects=9000,
    names=("a", "b"),
    sides=(0.1, 0.15, 0.2, 0.25, 0.3),
    smallest=0.1,
    image_side=1280,
)
FEW = replace(MANY, images=10, objects=30)


def labelled(boxes: list[list[float]], labels: list[int], size: tuple[int, int] = (640, 480)) -> LabelledImage:
    crowd = np.array([label < 0 for label in labels], dtype=bool)
    array = np.array(boxes, np.float32).reshape(-1, 4)
    return LabelledImage(Path("x.jpg"), array, np.abs(np.array(labels, np.int64)), crowd, *size, 1)


def images(count: int) -> LabelledImages:
    return LabelledImages(("a",), [labelled([], [])] * count)


def test_summary_of_a_data_set() -> None:
    first = labelled([[0, 0, 64, 64], [0, 0, 32, 32], [0, 0, 640, 480]], [0, 1, -1])
    second = labelled([[0, 0, 128, 32], [10, 10, 138, 42]], [0, 0], (320, 640))
    found = DataSummary.of(LabelledImages(("a", "b", "c"), [first, second, labelled([], [], (100, 100))]))
    assert (found.images, found.objects, found.names) == (3, 4, ("a", "b", "c"))
    assert found.image_side == 640
    assert found.sides == pytest.approx(np.quantile([0.1, 0.05, 0.1, 0.1], (0.1, 0.25, 0.5, 0.75, 0.9)))
    assert found.smallest == pytest.approx(0.05)
    assert found.side(0.5, 320) == pytest.approx(32)
    nothing = DataSummary.of(images(2))
    assert (nothing.objects, nothing.sides, nothing.smallest) == (0, (), 0.0)
    assert DataSummary.of(images(0)).images == 0


def test_start_and_variant_set_rates_and_length() -> None:
    scratch, tuned = Recipe.auto(MANY, "n"), Recipe.auto(MANY, "n", start_size=640)
    assert scratch.lr > tuned.lr
    assert Recipe.auto(FEW, "n").epochs > Recipe.auto(FEW, "n", start_size=640).epochs
    assert [Recipe.auto(MANY, variant, start_size=640).lr for variant in "sml"] == [5e-4, 4e-4, 4e-4]
    assert Recipe.auto(replace(MANY, images=1), "n").min_samples > 1
    with pytest.raises(ValueError, match="no image"):
        Recipe.auto(replace(MANY, images=0), "n")


def test_small_objects_get_a_larger_canvas() -> None:
    sides = [Recipe.auto(replace(MANY, smallest=smallest), "n").image_size for smallest in (0.1, 0.045, 0.03, 0.001)]
    assert sides == [320, 416, 640, 640]
    assert Recipe.auto(replace(MANY, sides=(0.02, *MANY.sides[1:])), "n").image_size == 640
    sides = [Recipe.auto(replace(MANY, smallest=side), "s", "cuda").image_size for side in (0.1, 0.021, 0.001)]
    assert sides == [640, 800, 1280]
    recipe = Recipe.auto(replace(MANY, smallest=0.001, image_side=400), "n")
    assert recipe.image_size == 416, "enlarged images show nothing new"
    assert "the images cannot use" in recipe.reasons["image_size"]
    assert Recipe.auto(MANY, "s", "cuda", start_size=512).image_size == 512
    assert Recipe.auto(MANY, "s", "cpu", start_size=640).image_size == 320
    assert Recipe.auto(replace(MANY, sides=(), smallest=0.0), "s").image_size == 320
    assert all(size % 32 == 0 for size in CANVASES)
    if not torch.cuda.is_available():
        assert Recipe.auto(MANY, "s", "auto") == Recipe.auto(MANY, "s", "cpu")


def test_the_batch_fits_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Recipe.auto(MANY, "s", "cpu").batch == 8
    assert Recipe.auto(FEW, "s", "cpu").batch == 4
    assert [Recipe.auto(MANY, "s", "cpu", seconds).batch for seconds in (60.0, 600.0)] == [4, 8]
    assert "short run" in Recipe.auto(MANY, "s", "cpu", 60.0).reasons["batch"]
    memory = {"gb": 80.0}
    monkeypatch.setattr(auto, "_gpu_memory_gb", lambda device: memory["gb"])
    assert Recipe.auto(MANY, "l", "cuda:0").batch == 16
    memory["gb"] = 8.0
    assert [Recipe.auto(MANY, variant, "cuda:0").batch for variant in "nsml"] == [16, 8, 4, 4]
    memory["gb"] = 7.0
    assert Recipe.auto(MANY, "s", "cuda:0").batch == 4, "1.5 GB are not for images"
    memory["gb"] = 1.0
    assert Recipe.auto(MANY, "l", "cuda:0").batch == 1
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert Recipe.auto(MANY, "l", "cuda:0").batch == 3, "the same in each of three processes"
    memory["gb"] = 80.0
    assert Recipe.auto(MANY, "l", "cuda:0").batch == 12
    assert Recipe.auto(MANY, "l", "cpu").batch == 9
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert Recipe.auto(MANY, "l", "cuda:0").batch == 32
    assert "GB" in Recipe.auto(MANY, "l", "cuda:0").reasons["batch"]


def test_views_keep_what_a_class_name_says_and_do_not_halve_small_objects() -> None:
    assert Recipe.auto(MANY, "n").augmentation.flip == 0.5
    sided = Recipe.auto(replace(MANY, names=("left_hand", "right_hand")), "n")
    assert sided.augmentation.flip == 0
    assert "left_hand" in sided.reasons["augmentation"]
    assert Recipe.auto(replace(MANY, names=("bright", "cleft")), "n").augmentation.flip == 0.5
    small = replace(MANY, sides=(0.02, 0.025, 0.03, 0.04, 0.05), smallest=0.02)
    assert Recipe.auto(small, "n").augmentation.scale[0] == 0.75
    assert Recipe.auto(MANY, "n").augmentation.scale[0] == 0.5


def test_evaluations_and_patience_follow_the_validation_images() -> None:
    assert Recipe.auto(FEW, "n", val=images(20)).evaluate_every == 1
    assert Recipe.auto(replace(MANY, images=200), "s", val=images(1000)).evaluate_every > 3
    assert Recipe.auto(FEW, "n").evaluate_every == 10
    assert Recipe.auto(FEW, "n").patience == 0
    assert Recipe.auto(FEW, "n", val=images(9)).patience == 0
    assert Recipe.auto(FEW, "n", val=images(50)).patience == 38, "0.3 of 125 evaluations"
    assert Recipe.auto(FEW, "n", val=images(50), time_budget_s=60).patience == 0


def test_a_time_budget_replaces_the_epochs() -> None:
    recipe = Recipe.auto(MANY, "n", time_budget_s=60.0)
    assert (recipe.time_budget_s, recipe.epochs) == (60.0, 100_000)
    assert Recipe.auto(MANY, "n", time_budget_s=60.0, epochs=5).epochs == 5


def test_every_choice_has_a_reason_and_what_is_asked_for_wins() -> None:
    recipe = Recipe.auto(MANY, "n", image_size=96, lr=0.1, seed=3, batch=2)
    assert (recipe.image_size, recipe.lr, recipe.seed, recipe.batch) == (96, 0.1, 3, 2)
    asked = {name for name, reason in recipe.reasons.items() if reason == "as asked"}
    assert asked == {"image_size", "lr", "seed", "batch"}
    chosen = {"epochs", "freeze", "ema_decay", "augmentation", "plain_share", "evaluate_every", "patience", "workers"}
    assert chosen <= set(recipe.reasons)
    assert all(recipe.reasons.values())
    assert recipe.warmup_steps == 1000, "3 epochs of 1000 steps, but not so many"
    with pytest.raises(TypeError, match="momentum"):
        Recipe.auto(MANY, "n", momentum=0.9)

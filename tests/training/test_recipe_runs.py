"""Recipes as they are, on sets of every size: nothing fails, whatever there is to learn from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rectangles import draw
from yolonas import checkpoint
from yolonas.checkpoint import Checkpoint
from yolonas.data.labelled import LabelledImages
from yolonas.errors import DataError
from yolonas.model import YoloNAS
from yolonas.training.recipe import Recipe
from yolonas.training.trainer import TrainResult, train


def make(folder: Path, count: int, empty: int = 0) -> LabelledImages:
    """`count` images with a red rectangle each; the first `empty` have no label."""
    bare, labelled = (draw(folder, count, ("red",), empty=without) for without in (True, False))
    return LabelledImages(labelled.names, bare.images[:empty] + labelled.images[empty:])


def split(data: LabelledImages) -> tuple[LabelledImages, LabelledImages]:
    """Every fifth image for validation, as `yolonas train` has it."""
    train = [image for k, image in enumerate(data.images) if k % 5 != 4]
    return LabelledImages(data.names, train), LabelledImages(data.names, data.images[4::5])


def run(train_data: LabelledImages, val: LabelledImages, recipe: Recipe, out: Path, trained: bool) -> TrainResult:
    torch.manual_seed(0)
    start = Checkpoint(YoloNAS("n", 1, class_names=("red",))) if trained else None
    result = train(train_data, val, recipe=recipe, out_dir=out, start=start, variant="n", device="cpu")
    saved = checkpoint.load(result.best).model.state_dict()
    assert all(torch.isfinite(value).all() for value in saved.values())
    return result


@pytest.mark.parametrize(("count", "trained"), [(1, False), (1, True), (5, False), (20, True), (100, False)])
def test_auto_trains_on_any_number_of_images(count: int, trained: bool, tmp_path: Path) -> None:
    training, validation = split(make(tmp_path, count))
    assert len(validation) == count // 5
    changes = {"image_size": 64, "epochs": 1, "min_samples": 8}
    recipe = Recipe.auto(training, "n", val=validation, start_size=64 if trained else None, **changes)
    result = run(training, validation, recipe, tmp_path / "out", trained)
    assert (result.epochs, result.metrics is None) == (1, count == 1)


@pytest.mark.parametrize("name", ["coco", "roboflow"])
def test_the_references_recipes_train_on_one_image(name: str, tmp_path: Path) -> None:
    data = make(tmp_path, 1)
    recipe = getattr(Recipe, name)("n", image_size=64, epochs=1, batch=2, min_samples=4)
    result = run(data, LabelledImages(data.names, []), recipe, tmp_path / "out", trained=True)
    preprocessing = checkpoint.load(result.last).model.preprocessing
    assert preprocessing == recipe.preprocessing(None)
    assert preprocessing.channels == ("bgr" if name == "roboflow" else "rgb")


def test_images_without_objects_are_left_out_where_the_recipe_says_so(tmp_path: Path) -> None:
    data, none = make(tmp_path, 3, empty=2), LabelledImages(("red",), [])
    recipe = Recipe(image_size=64, epochs=1, batch=1)
    kept = run(data, none, recipe, tmp_path / "kept", trained=False)
    left_out = run(data, none, replace(recipe, drop_empty=True), tmp_path / "left", trained=False)
    assert [checkpoint.load(result.last).record["train_images"] for result in (kept, left_out)] == [3, 1]
    with pytest.raises(DataError, match="no image to train on that has an object"):
        run(make(tmp_path, 2, empty=2), none, replace(recipe, drop_empty=True), tmp_path / "no", trained=False)

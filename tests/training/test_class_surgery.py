"""Other class lists: what a detector has learned about the classes it keeps stays, measured by AP."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from yolonas import checkpoint
from yolonas.checkpoint import Checkpoint
from yolonas.data.labelled import LabelledImages
from yolonas.evaluation import evaluate
from yolonas.inference.detector import Detector
from yolonas.model import YoloNAS
from yolonas.training.recipe import Recipe
from yolonas.training.start import first_model
from yolonas.training.trainer import train

OLD = ("red", "green", "blue")


def under(data: LabelledImages, names: dict[str, str]) -> LabelledImages:
    """The data with the classes `names` (new name -> old name) only."""
    images = []
    for image in data.images:
        rows = [
            (box, new)
            for new, old in enumerate(names.values())
            for box in image.boxes[image.labels == data.names.index(old)]
        ]
        boxes, labels = [row[0] for row in rows], [row[1] for row in rows]
        crowd = np.zeros(len(rows), dtype=bool)
        images.append(replace(image, boxes=np.stack(boxes), labels=np.array(labels), crowd=crowd))
    return LabelledImages(tuple(names), images)


def ap_of(model: YoloNAS, data: LabelledImages) -> dict[str, float]:
    return evaluate(Detector(model, "cpu"), data).per_class


@pytest.fixture(scope="module")
def validation(rectangles: Callable[..., LabelledImages]) -> LabelledImages:
    return rectangles(12, OLD, 9)


@pytest.fixture(scope="module")
def before(trained: Checkpoint, validation: LabelledImages) -> dict[str, float]:
    found = ap_of(trained.model, validation)
    assert min(found.values()) > 0.5  # there is something to lose
    assert len(set(found.values())) == 3  # and a mix-up of classes would show
    return found


@pytest.mark.parametrize(
    ("names", "sources"),
    [
        (("blue", "red", "green"), {}),
        (("green", "blue"), {}),
        (("white", "red", "green", "grey", "blue"), {}),
        (("BLUE", "white", "Red"), {}),
        (("scarlet", "sky", "green"), {"scarlet": "red", "sky": "blue"}),
    ],
    ids=["reordered", "removed", "added", "all at once", "renamed"],
)
def test_nothing_is_lost_before_training(
    names: tuple[str, ...],
    sources: dict[str, str],
    trained: Checkpoint,
    validation: LabelledImages,
    before: dict[str, float],
) -> None:
    model = first_model(trained, "n", names, Recipe(image_size=64), sources)
    kept = {name: old for name in names if (old := sources.get(name, name).lower()) in OLD}
    assert ap_of(model, under(validation, kept)) == pytest.approx({name: before[old] for name, old in kept.items()})


def test_old_classes_stay_while_a_new_one_is_learned(
    trained: Checkpoint,
    rectangle_recipe: Recipe,
    rectangles: Callable[..., LabelledImages],
    before: dict[str, float],
    tmp_path: Path,
) -> None:
    names = ("blue", "white", "red")  # reordered, one removed, one added
    recipe = replace(rectangle_recipe, epochs=3, evaluate_every=3, lr=2e-3)
    data, unseen = rectangles(16, names, 3), rectangles(12, names, 8)
    result = train(data, LabelledImages(names, []), recipe=recipe, start=trained, out_dir=tmp_path, device="cpu")
    after = ap_of(checkpoint.load(result.best).model, unseen)
    first = ap_of(trained.model.with_classes(names), unseen)
    assert first["white"] < 0.2
    assert after["white"] > 0.5
    for name in ("red", "blue"):
        assert after[name] > first[name] - 0.05

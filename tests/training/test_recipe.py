"""Recipes by name, and the schedule that follows steps or the clock."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from yolonas.data.augment import Augmentation
from yolonas.model import Preprocessing
from yolonas.training import schedule
from yolonas.training.recipe import Recipe
from yolonas.training.schedule import Schedule


def test_goes_through_json() -> None:
    recipe = Recipe(augmentation=Augmentation(scale=(0.7, 1.2)), time_budget_s=90.0)
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    with pytest.raises(ValueError, match="no fields"):
        Recipe.from_dict({**recipe.to_dict(), "momentum": 0.9})


def test_named_recipes_have_the_numbers_of_the_reference() -> None:
    coco, small, medium = Recipe.coco("s"), Recipe.roboflow("s"), Recipe.roboflow("m")
    assert (coco.epochs, coco.batch, coco.lr, coco.weight_decay) == (300, 32, 2e-4, 1e-5)
    assert (small.epochs, small.batch, small.lr, small.weight_decay) == (100, 16, 5e-4, 1e-4)
    assert (medium.batch, medium.lr) == (12, 4e-4)
    assert (coco.ema_decay, small.ema_decay) == (0.9997, 0.9)
    assert (coco.select_by, small.select_by) == ("ap", "ap50")
    assert (coco.drop_empty, small.drop_empty) == (True, False)
    assert (coco.min_samples, small.min_samples) == (0, 512)
    for recipe in (coco, small):
        assert (recipe.image_size, recipe.clip_norm, recipe.final_lr_ratio) == (640, None, 0.1)
        assert (recipe.average_best, recipe.plain_share, recipe.freeze) == (10, 0.0, "none")
        assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    views = coco.augmentation
    assert (views.mosaic, views.mixup, views.mixup_scale, views.flip, views.swap) == (0, 0.5, (0.5, 1.5), 0.5, 0.5)
    assert (views.translate, views.scale, views.degrees, views.pad) == (0.25, (0.5, 1.5), 0, 114)
    assert (views.colours, views.added, views.hue, views.saturation, views.value) == (0.5, True, 18, 30, 30)
    assert (views.min_side, views.min_visible, views.max_aspect) == (2, 0.1, 20)
    views = small.augmentation
    assert (views.mosaic, views.mixup, views.flip, views.swap) == (1, 0, 0.5, 0)
    assert (views.translate, views.scale, views.degrees, views.pad) == (0.1, (0.5, 1.5), 0, 128)
    assert (views.colours, views.added, views.hue, views.saturation, views.value) == (1, True, 5, 30, 30)
    assert (views.min_side, views.min_visible, views.max_aspect) == (0, 0, None)


def test_what_is_asked_for_changes_a_named_recipe_and_says_so() -> None:
    recipe = Recipe.roboflow("l", epochs=7)
    assert (recipe.epochs, recipe.batch) == (7, 12)
    assert recipe.reasons["epochs"] == "as asked"
    assert recipe.reasons["lr"] == "as the reference's Roboflow recipe (it has none for l)"
    assert Recipe.coco("s").reasons["lr"] == "as the reference's COCO recipe"
    assert "reasons" not in recipe.to_dict()
    assert replace(recipe, epochs=8).reasons == recipe.reasons


def test_the_canvas_of_each_recipe() -> None:
    start = Preprocessing(image_size=(320, 320), resize_to=310, mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 1.0))
    assert Recipe(image_size=96).preprocessing(None) == Preprocessing.square(96)
    assert Recipe.coco("s").preprocessing(None) == Preprocessing(), "636 px centred on 640, of the published weights"
    assert Recipe.coco("s", image_size=320).preprocessing(None).resize_to == 316
    kept = Recipe(image_size=96).preprocessing(replace(start, channels="bgr", pad="bottom_right", pad_value=7))
    assert (kept.image_size, kept.resize_to) == ((96, 96), 96)
    assert (kept.channels, kept.pad, kept.pad_value, kept.mean) == ("bgr", "bottom_right", 7, start.mean)
    theirs = Recipe.roboflow("s").preprocessing(start)
    assert (theirs.image_size, theirs.resize_to, theirs.pad, theirs.channels) == (
        (640, 640),
        640,
        "bottom_right",
        "bgr",
    )
    assert theirs.mean == start.mean


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("batch", 0),
        ("epochs", 0),
        ("image_size", 100),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("ema_decay", 1.5),
        ("workers", -1),
        ("time_budget_s", 0.0),
        ("freeze", "everything"),
        ("warmup", "soon"),
        ("canvas", "round"),
        ("precision", "int8"),
        ("select_by", "luck"),
        ("average_best", 0),
        ("patience", -1),
        ("clip_norm", 0.0),
    ],
)
def test_numbers_out_of_range_are_named(field: str, value: float | str) -> None:
    with pytest.raises(ValueError, match=f"{field} .*{value}"):
        replace(Recipe(), **{field: value})


def test_rate_warms_up_and_follows_the_cosine() -> None:
    recipe = Recipe(epochs=10, lr=1.0, warmup_steps=5, final_lr_ratio=0.1)
    plan = Schedule(recipe, steps_per_epoch=20)
    rates = []
    for plan.step in range(200):
        rates.append(plan.learning_rate(plan.progress()))
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0], rel=1e-2)
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[100] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)


def rates(recipe: Recipe, steps_per_epoch: int, steps: int) -> list[float]:
    plan, found = Schedule(recipe, steps_per_epoch), []
    for plan.step in range(steps):
        found.append(plan.learning_rate(plan.progress()))
    return found


def test_roboflow_warms_up_by_epochs_and_falls_late() -> None:
    """The rates that super-gradients gives at 512 samples of 16 an epoch: facts measured by running it."""
    found = rates(Recipe.roboflow("s"), 32, 3200)
    firsts = found[::32]
    assert firsts[:4] == pytest.approx([1e-6, 1.67e-4, 3.34e-4, 5e-4], rel=3e-3)
    assert set(found[:32]) == {1e-6}
    assert set(firsts[3:32]) == {5e-4}
    assert found[1097] == 5e-4, "1000 steps and 3 epochs, set after the step"
    assert found[1098] < 5e-4
    assert found[1096:] == sorted(found[1096:], reverse=True)
    assert firsts[99] == pytest.approx(5.03e-5, rel=1e-3)
    assert rates(Recipe.roboflow("s", epochs=20), 10, 200)[-1] == 5e-4, "a shorter run never falls"


def test_coco_warms_up_by_steps_within_an_epoch() -> None:
    found = rates(Recipe.coco("s"), 1200, 3000)
    assert found[0] == pytest.approx(1e-6)
    assert found[500] == pytest.approx(1e-6 + (2e-4 - 1e-6) * 500 / 999)
    assert found[999] == found[1000] == pytest.approx(2e-4)
    assert found[998] < found[999]
    assert found[2999] < found[1002] <= 2e-4
    short = rates(Recipe.coco("s"), 100, 30_000)
    assert short[99] == pytest.approx(2e-4)
    assert short[98] < 1.99e-4
    assert set(short[99:1001]) == {short[99]}
    assert short[15_500] == pytest.approx(0.55 * 2e-4, rel=1e-3), "half way from step 1000 to 30,000"
    assert short[-1] == pytest.approx(2e-5, rel=1e-3)


def test_a_time_budget_ends_the_cosine_of_the_reference_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Schedule, "seconds", lambda self: 0.1 * self.step)
    found = rates(Recipe.coco("s", time_budget_s=300.0), 10_000, 3000)
    assert found[-1] == pytest.approx(2e-5, rel=1e-2)
    assert found[2000] == pytest.approx(0.55 * 2e-4, rel=1e-2)


def test_warm_up_takes_a_tenth_of_a_short_run_at_most() -> None:
    plan = Schedule(Recipe(epochs=1, lr=1.0, warmup_steps=1000), steps_per_epoch=20)
    plan.step = 2
    assert plan.learning_rate(plan.progress()) > 0.95


def test_time_budget_drives_the_rate_and_keeps_room_for_the_last_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(schedule.time, "monotonic", lambda: now)
    plan = Schedule(Recipe(epochs=1000, lr=1.0, warmup_steps=1, time_budget_s=100.0), steps_per_epoch=10)
    now += 50
    assert plan.progress() == pytest.approx(0.5)
    assert plan.seconds_left() == pytest.approx(50)
    plan.closing_seconds = 10.0
    now += 40
    assert plan.progress() == pytest.approx(1.0)
    plan.seconds_before = 5.0  # of a process before this one
    assert plan.seconds() == pytest.approx(95)
    plan.step = 9000  # epochs are an upper bound too
    now -= 85
    assert plan.progress() == pytest.approx(0.9)


def test_a_batch_without_variance_is_refused() -> None:
    with pytest.raises(ValueError, match="one image at 32 px has no variance"):
        Recipe(image_size=32, batch=1)
    assert Recipe(image_size=32, batch=2).batch == 2

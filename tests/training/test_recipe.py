"""Recipes sized by the data, and the schedule that follows steps or the clock."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from yolonas.data.augment import Augmentation
from yolonas.training import schedule
from yolonas.training.recipe import Recipe
from yolonas.training.schedule import Schedule


def test_goes_through_json() -> None:
    recipe = Recipe(augmentation=Augmentation(scale=(0.7, 1.2)), time_budget_s=90.0)
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    with pytest.raises(ValueError, match="no fields"):
        Recipe.from_dict({**recipe.to_dict(), "momentum": 0.9})


def test_auto_sizes_by_data_and_start() -> None:
    scratch = Recipe.auto(200, "n", "cpu", from_scratch=True)
    tuned = Recipe.auto(200, "n", "cpu")
    assert scratch.lr > tuned.lr
    assert scratch.epochs > tuned.epochs
    assert Recipe.auto(1, "n").min_samples > 1
    assert Recipe.auto(30, "n", n_val=20).evaluate_every == 1
    assert Recipe.auto(200, "s", n_val=5000).evaluate_every > 5
    assert Recipe.auto(200, "s", "cuda").batch > Recipe.auto(200, "s", "cpu").batch
    assert Recipe.auto(200, "s", image_size=320, lr=0.1).image_size == 320
    with pytest.raises(ValueError, match="no image"):
        Recipe.auto(0, "n")


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

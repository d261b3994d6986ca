"""How far a run is, by steps and by the clock, and the learning rate that follows from it."""

from __future__ import annotations

import math
import time

from yolonas.training.recipe import Recipe

WARMUP_SHARE = 0.1  # of the run that a smooth warm-up may take
FIRST_RATE, WARMUP_EPOCHS = 1e-6, 3  # of the reference's warm-ups


class Schedule:
    """The clock of a run. With a time budget a run has as many steps as fit, and the cosine follows the clock."""

    def __init__(self, recipe: Recipe, steps_per_epoch: int) -> None:
        self.recipe = recipe
        self.steps_per_epoch = steps_per_epoch
        self.total_steps = recipe.epochs * steps_per_epoch
        self.step = 0
        self.seconds_before = 0.0  # in earlier processes
        self.closing_seconds = 0.0  # what comes after the last step: an evaluation and the files
        self._begun = time.monotonic()

    def seconds(self) -> float:
        """Seconds of this run, over resumes."""
        return self.seconds_before + time.monotonic() - self._begun

    def progress(self) -> float:
        """Share of the run that is done, 0 to 1 and slightly over: by steps or, where that is more, by the clock."""
        done = self.step / self.total_steps
        budget = self.recipe.time_budget_s
        if budget is None:
            return done
        return max(done, self.seconds() / (budget - min(self.closing_seconds, 0.5 * budget)))

    def seconds_left(self) -> float:
        """Until the end, at the pace so far."""
        progress = max(self.progress(), 1e-6)
        return max(0.0, self.seconds() * (1 - progress) / progress)

    def learning_rate(self, progress: float) -> float:
        """The rate of the coming step at `progress` (0 to 1), by the recipe's `warmup`, ending in a cosine.

        "smooth": from 0 over `warmup_steps`, at most a tenth of the run; the cosine begins with the run. "steps": from
        1e-6 over `warmup_steps`, at most an epoch; "epochs": from 1e-6 in equal stairs over 3 epochs. In both the
        cosine begins when `warmup_steps` and those epochs are over, so a run that is shorter has none. Source of the
        latter: super-gradients 3.7.1's LinearBatchLRWarmup, LinearEpochLRWarmup and CosineLRScheduler.
        """
        recipe, progress = self.recipe, min(progress, 1.0)
        if recipe.warmup == "smooth":
            warm = max((self.step + 1) / max(recipe.warmup_steps, 1), progress / WARMUP_SHARE)
            return recipe.lr * min(warm, 1.0) * self._cosine(progress)
        if self.step > recipe.warmup_steps:
            stairs = WARMUP_EPOCHS * self.steps_per_epoch if recipe.warmup == "epochs" else 0
            total = self.total_steps if recipe.time_budget_s is None else self.step / max(progress, 1e-6)
            done = max(self.step - 1 - stairs - recipe.warmup_steps, 0)
            return recipe.lr * self._cosine(done / (max(total - stairs - recipe.warmup_steps, done) + 1))
        if recipe.warmup == "epochs":
            share = self.step // self.steps_per_epoch / WARMUP_EPOCHS
        else:
            share = self.step / max(min(recipe.warmup_steps, self.steps_per_epoch) - 1, 1)
        return FIRST_RATE + min(share, 1.0) * (recipe.lr - FIRST_RATE)

    def _cosine(self, progress: float) -> float:
        ratio = self.recipe.final_lr_ratio
        return ratio + (1 - ratio) * 0.5 * (1 + math.cos(math.pi * progress))

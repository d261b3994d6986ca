"""How far a run is, by steps and by the clock, and the learning rate that follows from it."""

from __future__ import annotations

import math
import time

from yolonas.training.recipe import Recipe

WARMUP_SHARE = 0.1  # of the run that the warm-up may take


class Schedule:
    """The clock of a run. With a time budget a run has as many steps as fit, and the cosine follows the clock."""

    def __init__(self, recipe: Recipe, steps_per_epoch: int) -> None:
        self.recipe = recipe
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
        """Linear warm-up of `warmup_steps`, at most a tenth of the run, then a cosine to `final_lr_ratio`."""
        recipe, progress = self.recipe, min(progress, 1.0)
        warm = max((self.step + 1) / max(recipe.warmup_steps, 1), progress / WARMUP_SHARE)
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return recipe.lr * min(warm, 1.0) * (recipe.final_lr_ratio + (1 - recipe.final_lr_ratio) * cosine)

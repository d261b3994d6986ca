"""How to train: every number of a run in one frozen object, and sensible ones for a data set and a machine."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from yolonas.data.augment import Augmentation

Freeze = Literal["none", "backbone", "backbone+neck"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Recipe:
    """The numbers of a training run; `Recipe.auto` sizes them, `dataclasses.replace` changes one.

    The same recipe on the same data, kind of CPU and number of threads gives the same weights, whatever `workers` and
    `cache_bytes` are, unless `time_budget_s` cuts the run by the clock. Raises ValueError for numbers out of range.
    """

    image_size: int = 640  # side of the square canvas
    batch: int = 16
    epochs: int = 100
    lr: float = 5e-4  # AdamW, after the warm-up
    weight_decay: float = 1e-4  # not on biases and batch norm
    warmup_steps: int = 100  # linear, from 0
    final_lr_ratio: float = 0.05  # of the cosine
    clip_norm: float = 30.0  # largest norm of the gradient
    ema_decay: float = 0.9997  # reached slowly: step t uses min(ema_decay, (1 + t) / (10 + t))
    augmentation: Augmentation = field(default_factory=Augmentation)
    plain_share: float = 0.15  # last share of the run, without mosaic
    min_samples: int = 0  # an epoch draws at least so many, repeating images
    evaluate_every: int = 1  # epochs
    freeze: Freeze = "none"
    seed: int = 0
    workers: int = 0  # processes that make samples; 0: in the training process
    cache_bytes: int = 1 << 30  # for images scaled to the canvas; each worker has its own share
    time_budget_s: float | None = None  # evaluation included; `epochs` stays an upper bound
    precision: Precision = "auto"  # of the network's forward and backward pass; auto: 16 bit where the device is fast
    compile: bool = False  # the network through torch.compile
    patience: int = 0  # the run ends after so many evaluations without a better one; 0: never
    average_best: int = 1  # `best` is the mean of so many best evaluated weights, where that is better still
    select_by: Literal["ap", "ap50"] = "ap"  # what "best" means
    distillation: float = 0.0  # weight of the loss against a teacher's output, where there is a teacher

    def __post_init__(self) -> None:
        for name in ("batch", "epochs", "evaluate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.image_size < 32 or self.image_size % 32:
            raise ValueError(f"image_size must be a multiple of 32, at least 32, not {self.image_size}")
        for name in ("lr", "clip_norm"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} must be a positive number, not {getattr(self, name)}")
        for name in ("ema_decay", "final_lr_ratio", "plain_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in 0..1, not {getattr(self, name)}")
        for name in ("weight_decay", "warmup_steps", "min_samples", "workers", "cache_bytes", "seed"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")
        if self.time_budget_s is not None and not self.time_budget_s > 0:
            raise ValueError(f"time_budget_s must be positive, not {self.time_budget_s}")
        if self.freeze not in ("none", "backbone", "backbone+neck"):
            raise ValueError(f"freeze must be none, backbone or backbone+neck, not {self.freeze!r}")

    @classmethod
    def auto(
        cls,
        n_images: int,
        variant: str,
        device: str = "cpu",
        time_budget_s: float | None = None,
        *,
        from_scratch: bool = False,
        n_val: int = 0,
        **changes: Any,
    ) -> Recipe:
        """A recipe for `n_images` training and `n_val` validation images; `changes` replace fields of it.

        From random weights a run needs a high learning rate and many epochs; from trained ones few, and a low rate.
        With a time budget the epochs are as many as fit.
        """
        if n_images < 1:
            raise ValueError("there is no image to train on")
        on_gpu = device.startswith("cuda")
        # A CPU trains as many images a second in small batches, which take more steps: from 1500 views of 30 images of
        # BCCD (n, 320 px, random weights) batches of 4 reached AP50 0.75, batches of 8 0.68.
        batch = 16 if on_gpu else 4 if n_images <= 64 else 8
        # A small set is drawn several times in one epoch, so that evaluation and the curves come at a sane pace.
        min_samples = 128
        draws = max(n_images, min_samples)
        epochs = 100_000 if time_budget_s is not None else _epochs(draws, batch, from_scratch)
        recipe = cls(
            batch=batch,
            epochs=epochs,
            lr=_learning_rate(variant, from_scratch),
            warmup_steps=min(1000, 3 * math.ceil(draws / batch)),
            min_samples=min_samples,
            # An evaluated image costs about a fifth of a trained one; a quarter of the time may go there. Without
            # validation images there is only the checkpoint to write.
            evaluate_every=max(1, round(0.8 * n_val / draws)) if n_val else 10,
            workers=min(4, max(1, (os.cpu_count() or 2) // 2)) if on_gpu else 0,
            time_budget_s=time_budget_s,
        )
        return replace(recipe, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        values = asdict(self)
        values["augmentation"] = {k: list(v) if isinstance(v, tuple) else v for k, v in values["augmentation"].items()}
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """The inverse of `to_dict`; raises ValueError for an unknown field."""
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"a recipe has no fields {unknown}")
        augmentation: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values["augmentation"].items()
        }
        return cls(**{**values, "augmentation": Augmentation(**augmentation)})


def _learning_rate(variant: str, from_scratch: bool) -> float:
    if from_scratch:
        return {"n": 4e-3, "s": 2e-3, "m": 1e-3, "l": 1e-3}.get(variant, 1e-3)
    return {"n": 1e-3, "s": 5e-4, "m": 4e-4, "l": 4e-4}.get(variant, 4e-4)


def _epochs(draws: int, batch: int, from_scratch: bool) -> int:
    """Enough epochs for some 8000 steps from random weights, 2000 from trained ones, between 10 and 300."""
    steps = 8000 if from_scratch else 2000
    return min(300, max(10, round(steps / math.ceil(draws / batch))))

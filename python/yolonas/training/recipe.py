"""How to train: every number of a run in one frozen object, by name or sized for a data set and a machine."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from yolonas.data.augment import Augmentation
from yolonas.model import Preprocessing

if TYPE_CHECKING:
    from yolonas.data.labelled import LabelledImages
    from yolonas.data.summary import DataSummary

Freeze = Literal["none", "backbone", "backbone+neck"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]
Warmup = Literal["smooth", "steps", "epochs"]
Canvas = Literal["start", "coco", "roboflow"]
CHOICES = {
    "freeze": ("none", "backbone", "backbone+neck"),
    "precision": ("auto", "float32", "bfloat16", "float16"),
    "warmup": ("smooth", "steps", "epochs"),
    "canvas": ("start", "coco", "roboflow"),
    "select_by": ("ap", "ap50"),
}


@dataclass(frozen=True)
class Recipe:
    """The numbers of a training run; `Recipe.auto` sizes them, `dataclasses.replace` changes one.

    The same recipe on the same data, kind of CPU and number of threads gives the same weights, whatever `workers` and
    `cache_bytes` are, unless `time_budget_s` cuts the run by the clock. Raises ValueError for numbers out of range.
    """

    image_size: int = 640  # side of the square canvas
    canvas: Canvas = "start"  # how an image lies on it: `preprocessing` says
    batch: int = 16
    epochs: int = 100
    lr: float = 5e-4  # AdamW, after the warm-up
    weight_decay: float = 1e-4  # not on biases and batch norm
    warmup: Warmup = "smooth"  # how the learning rate begins: training/schedule.py says
    warmup_steps: int = 100
    final_lr_ratio: float = 0.05  # of the cosine
    clip_norm: float | None = 30.0  # largest norm of the gradient; None: any
    ema_decay: float = 0.9997  # reached slowly: step t uses min(ema_decay, (1 + t) / (10 + t))
    augmentation: Augmentation = field(default_factory=Augmentation)
    plain_share: float = 0.15  # last share of the run, without mosaic and mixup
    min_samples: int = 0  # an epoch draws at least so many, repeating images
    drop_empty: bool = False  # leave out training images without objects
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
    reasons: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)  # of `auto`'s choices, by field

    def __post_init__(self) -> None:
        for name in ("batch", "epochs", "evaluate_every", "average_best"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.image_size < 32 or self.image_size % 32:
            raise ValueError(f"image_size must be a multiple of 32, at least 32, not {self.image_size}")
        if self.batch * (self.image_size // 32) ** 2 == 1:
            raise ValueError("a batch of one image at 32 px has no variance for the batch norms: raise either")
        for name in ("lr", "clip_norm"):
            value = getattr(self, name)
            if not (name == "clip_norm" and value is None) and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a positive number, not {value}")
        for name in ("ema_decay", "final_lr_ratio", "plain_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in 0..1, not {getattr(self, name)}")
        for name in (
            *("weight_decay", "warmup_steps", "min_samples", "workers", "cache_bytes", "seed"),
            *("patience", "distillation"),
        ):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")
        if self.time_budget_s is not None and not self.time_budget_s > 0:
            raise ValueError(f"time_budget_s must be positive, not {self.time_budget_s}")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")

    @classmethod
    def auto(
        cls,
        data: LabelledImages | DataSummary,
        variant: str,
        device: str = "cpu",
        time_budget_s: float | None = None,
        *,
        val: LabelledImages | None = None,
        start_size: int | None = None,
        **changes: Any,
    ) -> Recipe:
        """A recipe sized by the training and validation images, the start, the device and the time; with its reasons.

        `start_size` is the canvas side of the trained weights that the run begins with, None for random weights.
        `changes` replace fields. The rules and their numbers are in training/auto.py.
        """
        from yolonas.training.auto import size_recipe

        return size_recipe(data, variant, device, time_budget_s, val=val, start_size=start_size, **changes)

    @classmethod
    def coco(cls, variant: str, **changes: Any) -> Recipe:
        """The reference's recipe for COCO, of 300 epochs from random weights: super-gradients' coco2017_yolo_nas_s.

        Its batch of 32 is that of each of eight GPUs, ours that of all processes together: with eight ask for 256.
        There is a recipe for S only, with a note that the published weights were trained by another; the others take
        its numbers. Views differ in three points: the affine fills the whole canvas where the reference cuts it to the
        image's shape, its exchange of height and width in the shift is left out, and the share of a box in view is of
        the scaled box, not of the first one.
        """
        augmentation = Augmentation(
            colours=0.5,
            hue=18,
            saturation=30,
            value=30,
            added=True,
            swap=0.5,
            translate=0.25,
            mosaic=0.0,
            mixup=0.5,
            min_visible=0.1,
            min_side=2,
            max_aspect=20,
            pad=114,
        )
        recipe = cls(
            canvas="coco",
            batch=32,
            epochs=300,
            lr=2e-4,
            weight_decay=1e-5,
            warmup="steps",
            warmup_steps=1000,
            final_lr_ratio=0.1,
            clip_norm=None,
            ema_decay=0.9997,
            augmentation=augmentation,
            plain_share=0.0,
            drop_empty=True,
            average_best=10,
            select_by="ap",
        )
        return recipe.changed(f"as the reference's COCO recipe{_unpublished(variant, 's')}", changes)

    @classmethod
    def roboflow(cls, variant: str, **changes: Any) -> Recipe:
        """The reference's recipe for fine-tuning weights of COCO: super-gradients' roboflow_yolo_nas_s and _m.

        There is none for L, nor of course for our N: L takes the numbers of M, N those of S. The network sees BGR, as
        there, though weights of COCO know RGB. Small sets are drawn as often as there, but every image as often as
        every other, where the reference draws with replacement.
        """
        large = variant in ("m", "l")
        augmentation = Augmentation(
            hue=5,
            saturation=30,
            value=30,
            added=True,
            translate=0.1,
            mosaic=1.0,
            min_visible=0.0,
            min_side=0.0,
            pad=128,
        )
        recipe = cls(
            canvas="roboflow",
            batch=12 if large else 16,
            epochs=100,
            lr=4e-4 if large else 5e-4,
            weight_decay=1e-4,
            warmup="epochs",
            warmup_steps=1000,
            final_lr_ratio=0.1,
            clip_norm=None,
            ema_decay=0.9,
            augmentation=augmentation,
            plain_share=0.0,
            min_samples=512,
            average_best=10,
            select_by="ap50",
        )
        return recipe.changed(f"as the reference's Roboflow recipe{_unpublished(variant, 'sm')}", changes)

    def changed(self, reason: str, changes: Mapping[str, Any]) -> Recipe:
        """With the fields `changes`, whose reason is "as asked"; `reason` is that of every field without one."""
        reasons = {f.name: self.reasons.get(f.name, reason) for f in fields(self) if f.name != "reasons"}
        return replace(self, **changes, reasons={**reasons, **dict.fromkeys(changes, "as asked")})

    def preprocessing(self, start: Preprocessing | None) -> Preprocessing:
        """How images become the network's input, given how they did for the weights that the run begins with.

        `canvas` "start" keeps that, filling the canvas of `image_size`; random weights (None) get a centred letterbox.
        "coco" and "roboflow" place images as the reference's recipes do, whatever the start did, but keep its
        normalisation: 636 px centred on 640 (other sizes keep the 4 px), and BGR 640 px on the upper left.
        """
        size = self.image_size
        fitted = replace(start or Preprocessing(), image_size=(size, size), resize_to=size)
        if self.canvas == "coco":
            return replace(fitted, resize_to=size - 4, pad="center", pad_value=114, channels="rgb", rounding="round")
        if self.canvas == "roboflow":
            return replace(fitted, pad="bottom_right", pad_value=114, channels="bgr", rounding="round")
        return fitted

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values, without the reasons."""
        values = asdict(self)
        del values["reasons"]
        values["augmentation"] = {k: list(v) if isinstance(v, tuple) else v for k, v in values["augmentation"].items()}
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """The inverse of `to_dict`; raises ValueError for an unknown field."""
        for kind, given in ((cls, values), (Augmentation, values["augmentation"])):
            unknown = sorted(set(given) - {f.name for f in fields(kind)})
            if unknown:
                raise ValueError(f"a recipe has no fields {unknown}")
        augmentation: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values["augmentation"].items()
        }
        return cls(**{**values, "augmentation": Augmentation(**augmentation)})


def _unpublished(variant: str, published: str) -> str:
    return "" if variant in published else f" (it has none for {variant})"

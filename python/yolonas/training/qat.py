"""Quantization-aware training: a trained network learns to be right under INT8's rounding."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.utils.data import DataLoader

from yolonas.checkpoint import Checkpoint
from yolonas.data.dataset import DrawSampler, TrainingSet, collate
from yolonas.data.labelled import LabelledImages
from yolonas.errors import DataError, YolonasError
from yolonas.evaluation import coco_ap, predict_dataset
from yolonas.fake_quantization import fake_quantized, input_ranges, network_input, without_fake_quantization
from yolonas.inference.detector import Detector
from yolonas.model import YoloNAS
from yolonas.training.loss import DetectionLoss
from yolonas.training.recipe import Recipe
from yolonas.training.schedule import Schedule
from yolonas.training.start import parameter_groups


def qat_recipe(checkpoint: Checkpoint, train: LabelledImages, val: LabelledImages, device: str = "cpu") -> Recipe:
    """The training's own recipe, or one sized for the data, as super-gradients changes it for QAT.

    A tenth of the epochs and of the warm-up, half the batch, a hundredth of the learning rate and of the weight decay,
    the cosine down to a hundredth, and no average of weights. Mosaic and mixup, which a training closes with leaving
    out, stay out. Source: QATRecipeModificationCallback of super-gradients 3.7.1.
    """
    written = checkpoint.record.get("recipe")
    size = max(checkpoint.model.preprocessing.image_size)
    if isinstance(written, dict):
        base = Recipe.from_dict(written)
    else:
        base = Recipe.auto(train, checkpoint.model.variant, device, None, val=val, start_size=size)
    return replace(
        base,
        image_size=size,
        epochs=max(base.epochs // 10, 1),
        batch=max(base.batch // 2, 1),
        lr=base.lr * 0.01,
        weight_decay=base.weight_decay * 0.01,
        warmup="smooth",
        warmup_steps=base.warmup_steps // 10,
        final_lr_ratio=0.01,
        time_budget_s=None,
    )


def fine_tune(
    checkpoint: Checkpoint,
    train: LabelledImages,
    val: LabelledImages,
    *,
    canvases: Sequence[npt.NDArray[np.uint8]],
    float_layers: Sequence[str] = (),
    recipe: Recipe | None = None,
    epochs: int | None = None,
    minutes: float | None = None,
    batch: int | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = False,
    on_epoch: Callable[[int, float, float], None] | None = None,
) -> Checkpoint:
    """Train the fused network of a checkpoint under imitated INT8; returns it in fused form, to be quantized.

    canvases: calibration images, uint8 [1, 3, H, W] each, which fix the scales of the activations; those of the
    weights follow the weights. Layers in `float_layers` are not quantized. The best epoch by AP on `val` under
    imitated INT8 is kept, the start among them, so that without gain the weights stay as they are. `on_epoch` is told
    the epoch, its mean loss and that AP; 0 is the start. Raises DataError where there is nothing to learn from or the
    data has a class that the model lacks, YolonasError when the loss is not finite.
    """
    device = torch.device(device)
    recipe = recipe or qat_recipe(checkpoint, train, val, str(device))
    changes: dict[str, Any] = {"epochs": epochs, "batch": batch, "seed": seed}
    if minutes is not None:
        changes["time_budget_s"] = 60 * minutes
    recipe = replace(recipe, **{name: value for name, value in changes.items() if value is not None})
    train = _in_classes_of(checkpoint.model, train)
    if not train.objects:
        raise DataError("there is no object in the training images, so quantization-aware training learns nothing")

    start = checkpoint.model.fused().to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    model = fake_quantized(start, input_ranges(start, canvases), float_layers).requires_grad_(True)
    views = TrainingSet(
        train,
        model.preprocessing,
        augmentation=recipe.augmentation,
        seed=recipe.seed,
        cache_bytes=recipe.cache_bytes // max(recipe.workers, 1),
    )
    sampler = DrawSampler(len(train), recipe.batch, seed=recipe.seed, min_samples=recipe.min_samples)
    sampler.mosaic = False
    loader: DataLoader[Any] = DataLoader(views, batch_sampler=sampler, collate_fn=collate, num_workers=recipe.workers)
    optimizer = torch.optim.AdamW(parameter_groups(model, recipe.weight_decay), lr=recipe.lr)
    loss = DetectionLoss(model.num_classes, reg_max=model.reg_max, strides=model.strides)
    schedule = Schedule(recipe, len(sampler))

    def evaluate(epoch: int, mean_loss: float) -> float:
        begun = time.monotonic()
        ap = coco_ap(val, predict_dataset(Detector(model, device, runtime="torch"), val)).ap
        schedule.closing_seconds = time.monotonic() - begun
        if on_epoch is not None:
            on_epoch(epoch, mean_loss, ap)
        return ap

    best = without_fake_quantization(model)
    history = [{"epoch": 0, "loss": None, "ap": evaluate(0, float("nan"))}]
    for epoch in range(recipe.epochs):
        if schedule.progress() >= 1:
            break
        sampler.epoch = epoch
        mean_loss = _epoch(model, loader, loss, optimizer, schedule, recipe, progress=progress)
        history.append({"epoch": epoch + 1, "loss": mean_loss, "ap": evaluate(epoch + 1, mean_loss)})
        if history[-1]["ap"] == max(entry["ap"] or 0.0 for entry in history) and history[-1]["ap"] != history[0]["ap"]:
            best = without_fake_quantization(model)
    record = {**checkpoint.record, "qat": {"recipe": recipe.to_dict(), "history": history}}
    best = best.to("cpu").eval().requires_grad_(False)
    return replace(checkpoint, model=best, record=record)


def _epoch(
    model: YoloNAS,
    loader: DataLoader[Any],
    loss: DetectionLoss,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    recipe: Recipe,
    *,
    progress: bool,
) -> float:
    """One pass over the draws, cut when the time is over; its mean loss."""
    from tqdm import tqdm

    model.train()
    device = next(model.parameters()).device
    total, steps = 0.0, 0
    for batch in tqdm(loader, "training", unit="step", leave=False, disable=None if progress else True):
        if steps and schedule.progress() >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate(schedule.progress())
        losses = loss(model(network_input(model, batch.images)), batch.targets.to(device))
        if not bool(losses.total.isfinite()):
            raise YolonasError(
                f"the loss is no longer a finite number: lower the learning rate, which is {recipe.lr:g}"
            )
        losses.total.backward()
        if recipe.clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step += 1
        total, steps = total + float(losses.total.detach()), steps + 1
    return total / max(steps, 1)


def _in_classes_of(model: YoloNAS, data: LabelledImages) -> LabelledImages:
    """The data under the model's labels; names meet whatever their case."""
    known = {name.strip().casefold(): label for label, name in enumerate(model.class_names)}
    missing = [name for name in data.names if name.strip().casefold() not in known]
    if missing:
        raise DataError(
            f"the model does not know the class {missing[0]}: quantization-aware training adds none, train it first"
        )
    labels = np.array([known[name.strip().casefold()] for name in data.names], dtype=np.int64)
    images = [replace(image, labels=labels[image.labels]) for image in data.images]
    return replace(data, names=model.class_names, images=images)

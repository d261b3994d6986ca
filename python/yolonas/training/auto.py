"""The default recipe, sized by what it finds: data, start, device and time. Every number of its rules is here.

What was measured says so with its figure; the rest are rules of thumb, and say what they rest on.
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch

from yolonas.data.augment import Augmentation
from yolonas.data.labelled import LabelledImages
from yolonas.data.summary import DataSummary
from yolonas.inference.device import resolve_device
from yolonas.training.recipe import Recipe

CANVASES = (320, 416, 512, 640, 800, 960, 1280)
LARGEST_CANVAS = {"cpu": 640, "cuda": 1280}  # a step takes time and memory in proportion to its square
# Sides in px that objects should have on the canvas: the finest cells of the network are 8 px wide, and an object of
# less than two is one cell's guess. Not measured.
TENTH_SIDE, SMALLEST_CLASS_SIDE = 12, 16

# A CPU trains as many images a second in small batches, which take more steps. Of BCCD (n, 320 px, random weights) a
# minute on 100 images reached AP 0.37 in batches of 4 and 0.29 in batches of 8 (tests/bench/results/experiments_*.md);
# 1500 views of 30 images AP50 0.75 and 0.68. Longer runs have steps enough; where they begin was not measured.
FEW_IMAGES_ON_CPU, SHORT_RUN_S, SMALL_BATCH, CPU_BATCH, GPU_BATCH = 64, 300.0, 4, 8, 16
LEAST_SHARE = 4  # images that each of several GPUs has in a batch, where its memory allows
# GB of GPU memory for an image of 640 px in a training step in 16 bit, and for everything else. Not measured: after the
# batches with which people train S, M and L on GPUs of 16 GB.
IMAGE_GB, FIXED_GB = {"n": 0.25, "s": 0.7, "m": 1.1, "l": 1.5}, 1.5

STEPS_FROM_RANDOM, STEPS_FROM_TRAINED, EPOCHS = 8000, 2000, (10, 300)
MIN_SAMPLES = 128  # of an epoch, so that evaluations and the curves of a small set come at a sane pace
# Of AdamW. From trained weights S and M have the rates of the reference's Roboflow recipe; none is published for L,
# which takes M's. N's, and all from random weights, are ours.
RATES_FROM_TRAINED = {"n": 1e-3, "s": 5e-4, "m": 4e-4, "l": 4e-4}
RATES_FROM_RANDOM = {"n": 4e-3, "s": 2e-3, "m": 1e-3, "l": 1e-3}
WARMUP_EPOCHS, MOST_WARMUP_STEPS = 3, 1000

SMALL_SIDE = 24  # px: where a quarter of the objects is smaller, views do not halve them
# Of the time; and the cost of an evaluated image to a trained one's: for n at 320 px 0.057 s to 0.053 s, on one thread
# of a CPU that trains in bfloat16 (calibration included; in float32 training costs twice as much).
EVALUATION_SHARE, EVALUATED_TO_TRAINED = 0.25, 1.0
UNEVALUATED_EPOCHS = 10  # between checkpoints without validation images
PATIENCE_SHARE, LEAST_PATIENCE, PATIENCE_IMAGES = 0.3, 10, 10  # of the planned evaluations; AP of fewer images jumps
# A CPU has none: a view of BCCD at 320 px takes 2.5 ms of one core from the cache and 7 ms without, its training (n)
# about 100 ms. With a GPU each process leaves one core to the training.
GPU_WORKERS = 8
UNLIMITED = 100_000  # epochs, where the clock ends the run


def size_recipe(
    data: LabelledImages | DataSummary,
    variant: str,
    device: str = "cpu",
    time_budget_s: float | None = None,
    *,
    val: LabelledImages | None = None,
    start_size: int | None = None,
    **changes: Any,
) -> Recipe:
    """The recipe of `Recipe.auto`. Raises ValueError without images."""
    found = data if isinstance(data, DataSummary) else DataSummary.of(data)
    if found.images < 1:
        raise ValueError("there is no image to train on")
    device = str(resolve_device(device)) if device == "auto" else device
    kind, trained, n_val = device.partition(":")[0], start_size is not None, len(val) if val is not None else 0
    origin = "from trained weights" if trained else "from random weights"
    chosen: dict[str, tuple[Any, str]] = {}

    def choose(name: str, value: Any, reason: str) -> Any:
        chosen[name] = (changes[name], "as asked") if name in changes else (value, reason)
        return chosen[name][0]

    size = choose("image_size", *_canvas(found, kind, start_size))
    short = time_budget_s is not None and time_budget_s <= SHORT_RUN_S
    batch = choose("batch", *_batch(found, variant, device, kind, size, short))
    draws = max(found.images, choose("min_samples", MIN_SAMPLES, "an epoch of a small set repeats its images"))
    steps = math.ceil(draws / batch)
    if time_budget_s is None:
        planned = STEPS_FROM_TRAINED if trained else STEPS_FROM_RANDOM
        epochs = min(EPOCHS[1], max(EPOCHS[0], round(planned / steps)))
        reason = f"about {planned} steps {origin}, of {steps} an epoch, but {EPOCHS[0]} to {EPOCHS[1]} epochs"
        epochs = choose("epochs", epochs, reason)
    else:
        epochs = choose("epochs", UNLIMITED, "as many as fit into the time")
        choose("time_budget_s", time_budget_s, "as asked")
    # From 20 images of BCCD to 25 and 40 a frozen backbone was no better: tests/bench/results/experiments_amd_epyc.md.
    everything = "fine-tuning all of it was no worse, with few images too" if trained else "all of it has to learn"
    choose("freeze", "none", everything)
    rates = RATES_FROM_TRAINED if trained else RATES_FROM_RANDOM
    choose("lr", rates.get(variant, rates["l"]), f"{origin} of {variant}, AdamW")
    choose("warmup_steps", min(MOST_WARMUP_STEPS, WARMUP_EPOCHS * steps), f"{WARMUP_EPOCHS} epochs")
    choose("ema_decay", 0.9997, "up to step 30,000 the average is over the last ninth of the run so far")
    choose("augmentation", *_augmentation(found, size))
    # On BCCD, 20 and 100 images, a minute each, an end without mosaic made no difference; in long runs it may.
    choose("plain_share", 0.0, "mosaic to the end: an end without it was no better")
    if n_val:
        every = max(1, round(EVALUATED_TO_TRAINED * n_val / draws / EVALUATION_SHARE))
        every = choose("evaluate_every", every, f"{n_val} validation images, at most a quarter of the time for them")
    else:
        every = choose("evaluate_every", UNEVALUATED_EPOCHS, "no validation images: only a checkpoint")
    choose("patience", *_patience(n_val, math.ceil(epochs / every), time_budget_s))
    choose("workers", *_workers(kind))
    values = {**changes, **{name: value for name, (value, _) in chosen.items()}}
    reasons = {**dict.fromkeys(changes, "as asked"), **{name: reason for name, (_, reason) in chosen.items()}}
    return Recipe(**values, reasons=reasons)


def _canvas(data: DataSummary, kind: str, start_size: int | None) -> tuple[int, str]:
    """The smallest canvas on which the objects are large enough, but not above what the images and the device give."""
    if kind == "cpu":
        least, why = min(CANVASES[0], start_size or CANVASES[0]), "a CPU trains four times as fast at half the size"
    else:
        least, why = start_size or 640, "the start's" if start_size else "a GPU has the time"
    if not data.sides:
        return least, f"{why}, and there are no objects to judge by"
    useful = max(least, math.ceil(data.image_side / 32) * 32)  # enlarging an image shows nothing new
    most = min(max(least, LARGEST_CANVAS.get(kind, 640)), useful)
    needed = max(TENTH_SIDE / max(data.side(0.1, 1), 1e-6), SMALLEST_CLASS_SIDE / max(data.smallest, 1e-6))
    size = next((size for size in (least, *CANVASES) if least <= size <= most and size >= needed), most)
    shown = f"a tenth of the objects is below {data.side(0.1, size):.0f} px then, the smallest class about "
    shown += f"{data.smallest * size:.0f} px"
    if size == least:
        return size, f"{why}; {shown}"
    if size < needed:
        return (
            size,
            f"for small objects, more than which the {'images' if size == useful else 'device'} cannot use; {shown}",
        )
    return size, f"for small objects; {shown}"


def _batch(data: DataSummary, variant: str, device: str, kind: str, size: int, short: bool) -> tuple[int, str]:
    """The batch of all processes together, the same number in each."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))  # torchrun's
    if kind == "cpu":
        batch, reason = CPU_BATCH, "a CPU is no faster with more"
        if short or data.images <= FEW_IMAGES_ON_CPU:
            which = "a short run learns" if short else f"{data.images} images learn"
            batch, reason = SMALL_BATCH, f"on a CPU {which} more from many small steps"
        return math.ceil(batch / ranks) * ranks, reason
    share, reason, memory = (
        max(GPU_BATCH / ranks, LEAST_SHARE),
        "the device's memory is not known",
        _gpu_memory_gb(device),
    )
    if memory is not None:
        one = IMAGE_GB.get(variant, max(IMAGE_GB.values())) * (size / 640) ** 2
        share = min(share, max(1.0, (memory - FIXED_GB) / one))
        reason = f"{memory:.0f} GB of memory, about {one:.1f} GB an image of {variant} at {size} px"
    return ranks * 2 ** int(math.log2(share)), reason


def _gpu_memory_gb(device: str) -> float | None:
    if not torch.cuda.is_available():
        return None
    return float(torch.cuda.get_device_properties(torch.device(device)).total_memory) / 1e9


def _augmentation(data: DataSummary, size: int) -> tuple[Augmentation, str]:
    """Mosaic always; mirroring only where no class is a left or a right one; small objects are not halved."""
    sided = [name for name in data.names if {"left", "right"} & set(_words(name))]
    small = bool(data.sides) and data.side(0.25, size) < SMALL_SIDE
    reasons = ["mosaics show more objects of other sizes in other places"]
    reasons += [f"no mirroring, because of the class {sided[0]}"] if sided else []
    reasons += [f"scaled down little, as a quarter of the objects is below {SMALL_SIDE} px"] if small else []
    flip, scale = 0.0 if sided else 0.5, (0.75, 1.5) if small else (0.5, 1.5)
    return Augmentation(flip=flip, scale=scale), "; ".join(reasons)


def _words(name: str) -> list[str]:
    return "".join(c if c.isalpha() else " " for c in name.casefold()).split()


def _patience(n_val: int, evaluations: int, time_budget_s: float | None) -> tuple[int, str]:
    if time_budget_s is not None:
        return 0, "the clock ends the run"
    if n_val < PATIENCE_IMAGES:
        return 0, f"{n_val} validation images are too few to end a run early"
    patience = max(LEAST_PATIENCE, round(PATIENCE_SHARE * evaluations))
    return patience, f"evaluations without a better one end the run; {evaluations} are planned"


def _workers(kind: str) -> tuple[int, str]:
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun's
    if kind == "cpu":
        return 0, "the CPU is busy training, which takes far longer than making samples"
    return min(GPU_WORKERS, max(1, cores - 1)), f"{cores} cores feed the GPU"

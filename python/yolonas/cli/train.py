"""`yolonas train`."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from yolonas.cli import options
from yolonas.errors import DataError

if TYPE_CHECKING:
    from tqdm import tqdm

    from yolonas.checkpoint import Checkpoint
    from yolonas.data.labelled import LabelledImages
    from yolonas.training.recipe import Recipe
    from yolonas.training.report import EpochReport

VARIANTS = ("n", "s", "m", "l")
# The fields of a recipe that are shown, in this order; results.csv and the checkpoints' record tell the rest.
CHOICES = (
    *("image_size", "batch", "epochs", "time_budget_s", "freeze", "lr", "ema_decay", "augmentation", "plain_share"),
    *("evaluate_every", "patience", "workers"),
)
HELD_OUT = 5  # without validation images one in so many is taken for it


@click.command(short_help="Train or fine-tune on labelled images.")
@click.option(
    "--weights",
    "--model",
    required=True,
    help="What to start from: a checkpoint file, the name of published weights, or n, s, m, l for random weights.",
)
@click.option(
    "--data",
    required=True,
    type=click.Path(path_type=Path),
    help="COCO or Label Studio json, data.yaml, or a folder.",
)
@click.option("--val", type=click.Path(path_type=Path), help="Validation images.  [default: the part val of --data]")
@click.option(
    "--recipe",
    "recipe_name",
    type=click.Choice(["auto", "coco", "roboflow"]),
    default="auto",
    show_default=True,
    help="auto: sized by data, start, device and time; coco, roboflow: the reference's. The options below change it.",
)
@click.option("--imgsz", metavar="SIDE", callback=options.canvas, help="Side of the square canvas, a multiple of 32.")
@click.option("--batch", type=click.IntRange(min=1), help="Images in a step.")
@click.option("--epochs", type=click.IntRange(min=1), help="Passes over the images.")
@click.option(
    "--minutes", type=click.FloatRange(min=0, min_open=True), help="Time for everything, evaluation included."
)
@click.option("--lr", type=click.FloatRange(min=0, min_open=True), help="Learning rate after the warm-up.")
@click.option(
    "--patience", type=click.IntRange(min=0), help="End after so many evaluations without a better one; 0: never."
)
@click.option(
    "--freeze",
    type=click.Choice(["none", "backbone", "backbone+neck"]),
    help="What stays as the start has it.",
)
@click.option(
    "--precision",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    help="Of the forward and backward pass.  [default: 16 bit where the device is fast]",
)
@click.option("--teacher", help="A checkpoint, or the name of published weights, that the training learns from too.")
@click.option(
    "--distillation", type=click.FloatRange(min=0), help="Weight of the teacher's scores and boxes.  [default: 1]"
)
@click.option(
    "--unlabelled", type=click.Path(path_type=Path), help="Folder of images that the teacher labels, to learn from too."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="The same seed, the same run.")
@click.option("--workers", type=click.IntRange(min=0), help="Processes that make samples; 0: none beside the training.")
@options.device
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the run.  [default: runs/train, train2, ...]")
@click.option("--resume", is_flag=True, help="Go on with the run in --out: repeat its command and add this.")
def train(
    weights: str,
    data: Path,
    val: Path | None,
    recipe_name: str,
    imgsz: tuple[int, int] | None,
    device: Any,
    out: Path | None,
    resume: bool,
    minutes: float | None,
    teacher: str | None,
    unlabelled: Path | None,
    **numbers: Any,
) -> None:
    """Train on labelled images, from a checkpoint or from random weights.

    Prints what it chooses and why, and writes best.safetensors, last.safetensors, results.csv, report.html, and
    data_report.txt, which lists what of the data was left out and what looks wrong in it. Classes that the start knows
    by name keep what it learned about them.
    """
    from yolonas.data.report import data_report
    from yolonas.training import trainer
    from yolonas.training.recipe import Recipe
    from yolonas.training.resume import RESUME_FILE, read_resume

    if resume and out is None:
        raise click.UsageError("--resume needs --out, the folder of the run to go on with")
    if imgsz is not None and imgsz[0] != imgsz[1]:
        raise click.UsageError(f"training uses a square canvas: give --imgsz one number, not {imgsz[0]},{imgsz[1]}")
    for name, value in (("--distillation", numbers["distillation"]), ("--unlabelled", unlabelled)):
        if value is not None and teacher is None:
            raise click.UsageError(f"{name} needs --teacher, the checkpoint to learn from")
    folder = out if out is not None else _free_folder(Path("runs/train"))
    start = _start(weights)
    taught = None if teacher is None else _load(teacher)
    training, validation = _read(data, val, numbers["seed"])
    if unlabelled is not None and taught is not None:
        training = _with_pseudo_labels(training, validation, unlabelled, taught, device)
    changes: dict[str, Any] = {name: value for name, value in numbers.items() if value is not None}
    if imgsz is not None:
        changes["image_size"] = imgsz[0]
    if minutes is not None:
        changes["time_budget_s"] = minutes * 60
    if taught is not None:
        changes.setdefault("distillation", 1.0)
    if resume and recipe_name == "auto":  # an auto recipe of this day might be another
        recipe = replace(Recipe.from_dict(read_resume(folder / RESUME_FILE)["recipe"]), **changes)
    else:
        recipe = _recipe(recipe_name, weights, start, training, validation, str(device), changes)

    first = os.environ.get("RANK", "0") == "0"  # of torchrun's processes
    if first:
        click.echo(_choices(recipe, weights, start, training, validation, device, folder))
        click.echo("\n".join(data_report(training, validation, recipe.image_size)))
    bars = _Bars()
    try:
        if first:
            folder.mkdir(parents=True, exist_ok=True)
            report = data_report(training, validation, recipe.image_size, examples=1000)
            (folder / "data_report.txt").write_text("\n".join(report) + "\n", encoding="utf-8")
        result = trainer.train(
            training,
            validation,
            start=start,
            teacher=taught,
            variant=weights,
            recipe=recipe,
            out_dir=folder,
            resume=resume,
            device=device,
            on_epoch=bars.finish_epoch if first else None,
            on_step=bars.step if first else None,
        )
    except KeyboardInterrupt:
        bars.close()
        raise click.ClickException(f"stopped; repeat the command with --out {folder} --resume to go on") from None
    except OSError as error:
        raise DataError(f"{error.filename or folder} cannot be written: {error.strerror or error}") from error
    finally:
        bars.close()
    if not first:
        return
    hurried = recipe.time_budget_s is not None and result.seconds > 0.9 * recipe.time_budget_s  # the clock ended it
    if recipe.patience and result.epochs < recipe.epochs and not hurried:
        click.echo(f"Ended early: the last {recipe.patience} evaluations brought nothing better.")
    click.echo(
        f"{result.epochs} epochs in {result.seconds / 60:.1f} minutes, {result.images_per_second:.1f} images/s.\n"
        + (
            f"Best on validation: AP {result.metrics.ap:.4f}, AP50 {result.metrics.ap50:.4f}, "
            f"best F1 {result.metrics.f1:.3f} at score {result.metrics.threshold:.3f}.\n"
            if result.metrics
            else ""
        )
        + f"Wrote {result.best} and {result.last}"
    )


class _Bars:
    """One progress bar an epoch; its line stays, with the loss and the accuracy."""

    def __init__(self) -> None:
        self.bar: tqdm[Any] | None = None

    def step(self, epoch: int, done: int, total: int) -> None:
        from tqdm import tqdm

        bar = self.bar or tqdm(total=total, desc=f"epoch {epoch}", unit="step", dynamic_ncols=True)
        bar.update(done - bar.n)
        self.bar = bar

    def finish_epoch(self, report: EpochReport) -> None:
        if self.bar is None:
            return
        accuracy = f", AP {report.ap:.3f}, AP50 {report.ap50:.3f}" if report.ap is not None else ""
        self.bar.set_description_str(f"epoch {report.epoch}/{report.epochs}")
        self.bar.set_postfix_str(f"loss {report.loss:.3f}{accuracy}, {report.seconds_left / 60:.1f} min left")
        self.close()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        self.bar = None


def _start(weights: str) -> Checkpoint | None:
    return None if weights in VARIANTS else _load(weights)


def _load(weights: str) -> Checkpoint:
    from yolonas import checkpoint
    from yolonas.weights import resolve

    return checkpoint.load(resolve(weights))


def _read(data: Path, val: Path | None, seed: int) -> tuple[LabelledImages, LabelledImages]:
    """Training and validation images; the latter from `val`, the part val, or every fifth image."""
    from yolonas.data.check import usable
    from yolonas.data.readers import read_dataset, splits
    from yolonas.evaluation import label_map

    parts = splits(data)
    if parts and "train" not in parts:
        raise DataError(f"{data} has the parts {', '.join(parts)} but no part train")
    training = read_dataset(data, "train" if parts else None)
    if not training.images:
        raise DataError(f"{data} has no image to train on")
    training = usable(training, progress=True)
    if not training.objects:
        why = next((f"; the first reason: {line}" for line in (*training.dropped, *training.changed)), "")
        raise DataError(
            f"{data} has no object in its {len(training)} training images, so there is nothing to learn{why}"
        )
    held_out: LabelledImages | None = None
    if val is not None:
        held_out = read_dataset(val, "val" if "val" in splits(val) else None)
    elif "val" in parts:
        held_out = read_dataset(data, "val")
    if held_out is None:
        training, held_out = _split(training, seed)
    label_map(training.names, held_out.names)  # raises where they have no class in common
    # All of them are decoded, however many: each evaluation reads them, and cannot do without one.
    return training, usable(held_out, most_pixels=math.inf, progress=True)


def _split(data: LabelledImages, seed: int) -> tuple[LabelledImages, LabelledImages]:
    """A random fifth of the images apart from the rest."""
    import numpy as np

    from yolonas.data.labelled import LabelledImages

    order = np.random.default_rng(seed).permutation(len(data.images)).tolist()
    held = set(order[: len(order) // HELD_OUT])
    images = [[image for k, image in enumerate(data.images) if (k in held) == wanted] for wanted in (False, True)]
    return replace(data, images=images[0]), LabelledImages(data.names, images[1])


def _with_pseudo_labels(
    training: LabelledImages, validation: LabelledImages, folder: Path, teacher: Checkpoint, device: Any
) -> LabelledImages:
    """The training images and those of the folder that are neither among them nor for validation, mixed."""
    from yolonas.inference.detector import Detector
    from yolonas.inference.sources import list_sources
    from yolonas.training.pseudo_labels import mixed, pseudo_labels

    labelled = {image.path.resolve() for image in training.images + validation.images}
    paths = [path for path in list_sources(folder) if isinstance(path, Path) and path.resolve() not in labelled]
    found = pseudo_labels(Detector(teacher, device), paths, training.names)
    click.echo(f"The teacher found {found.objects} objects in {len(found)} of {len(paths)} images of {folder}")
    return mixed(training, found)


def _recipe(
    name: str,
    weights: str,
    start: Checkpoint | None,
    training: LabelledImages,
    validation: LabelledImages,
    device: str,
    changes: dict[str, Any],
) -> Recipe:
    from yolonas.training.recipe import Recipe

    variant = weights if start is None else start.model.variant
    if name != "auto":
        return Recipe.coco(variant, **changes) if name == "coco" else Recipe.roboflow(variant, **changes)
    size = None if start is None else max(start.model.preprocessing.image_size)
    budget = changes.pop("time_budget_s", None)
    return Recipe.auto(training, variant, device, budget, val=validation, start_size=size, **changes)


def _choices(
    recipe: Recipe,
    weights: str,
    start: Checkpoint | None,
    training: LabelledImages,
    validation: LabelledImages,
    device: Any,
    folder: Path,
) -> str:
    """What will be done, a line for each choice, with its reason."""
    from yolonas.training.auto import UNLIMITED

    if start is None:
        origin = f"YOLO-NAS {weights} with random weights"
    else:
        known = {name.casefold() for name in start.model.class_names}
        kept = [name for name in training.names if name.casefold() in known]
        origin = f"{weights} (YOLO-NAS {start.model.variant}); it knows {', '.join(kept) or 'none of the classes'}"
    views = recipe.augmentation
    shown = {
        "image_size": f"{recipe.image_size} px",
        "epochs": "any number" if recipe.epochs == UNLIMITED else str(recipe.epochs),
        "lr": f"{recipe.lr:g}",
        "augmentation": f"mosaic {views.mosaic:g}, mixup {views.mixup:g}, flip {views.flip:g}, "
        f"scale {views.scale[0]:g} to {views.scale[1]:g}",
        "time_budget_s": f"{recipe.time_budget_s or 0:g} s",
        "patience": str(recipe.patience or "none"),
    }
    lines = [
        ("start", origin),
        ("classes", ", ".join(training.names)),
        ("training", f"{len(training)} images, {training.objects} objects"),
        ("validation", f"{len(validation)} images, {validation.objects} objects"),
        ("device", str(device)),
    ]
    for name in CHOICES:
        value = shown.get(name, str(getattr(recipe, name)))
        if name != "time_budget_s" or recipe.time_budget_s is not None:
            lines.append((name, f"{value} ({recipe.reasons.get(name, 'as in the run that goes on')})"))
    lines.append(("folder", str(folder)))
    if start is not None and start.license:
        lines.append(("licence", f"of the start, and so of the result: {start.license}"))
    return "\n".join(f"{name:<15}{text}" for name, text in lines)


def _free_folder(folder: Path) -> Path:
    number = 1
    while (found := folder if number == 1 else folder.with_name(f"{folder.name}{number}")).exists():
        number += 1
    return found

"""`yolonas train`."""

from __future__ import annotations

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
HELD_OUT = 5  # without validation images one in so many is taken for it


@click.command(short_help="Train or fine-tune on labelled images.")
@click.option(
    "--weights",
    "--model",
    required=True,
    help="What to start from: a checkpoint file, the name of published weights, or n, s, m, l for random weights.",
)
@click.option("--data", required=True, type=click.Path(path_type=Path), help="COCO json, data.yaml, or a folder.")
@click.option("--val", type=click.Path(path_type=Path), help="Validation images.  [default: the part val of --data]")
@options.imgsz
@click.option("--batch", type=click.IntRange(min=1), help="Images in a step.  [default: by the data and the device]")
@click.option("--epochs", type=click.IntRange(min=1), help="[default: by the data and the start]")
@click.option(
    "--minutes", type=click.FloatRange(min=0, min_open=True), help="Time for everything, evaluation included."
)
@click.option("--lr", type=click.FloatRange(min=0, min_open=True), help="Learning rate.  [default: by the start]")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="The same seed, the same run.")
@click.option("--workers", type=click.IntRange(min=0), help="Processes that make samples.  [default: by the device]")
@options.device
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the run.  [default: runs/train, train2, ...]")
@click.option("--resume", is_flag=True, help="Go on with the run in --out: repeat its command and add this.")
def train(
    weights: str,
    data: Path,
    val: Path | None,
    imgsz: tuple[int, int] | None,
    device: Any,
    out: Path | None,
    resume: bool,
    minutes: float | None,
    **numbers: Any,
) -> None:
    """Train on labelled images, from a checkpoint or from random weights.

    Writes best.safetensors, last.safetensors, results.csv and results.png. Classes that the start knows by name keep
    what it learned about them.
    """
    from yolonas.training import trainer
    from yolonas.training.recipe import Recipe

    if resume and out is None:
        raise click.UsageError("--resume needs --out, the folder of the run to go on with")
    if imgsz is not None and imgsz[0] != imgsz[1]:
        raise click.UsageError(f"training uses a square canvas: give --imgsz one number, not {imgsz[0]},{imgsz[1]}")
    folder = out if out is not None else _free_folder(Path("runs/train"))
    start = _start(weights)
    training, validation = _read(data, val, numbers["seed"])
    changes: dict[str, Any] = {name: value for name, value in numbers.items() if value is not None}
    if imgsz is not None:
        changes["image_size"] = imgsz[0]
    if minutes is not None:
        changes["time_budget_s"] = minutes * 60
    if resume:
        recipe = replace(Recipe.from_dict(trainer.read_resume(folder / trainer.RESUME_FILE)["recipe"]), **changes)
    else:
        recipe = _recipe(weights, start, training, validation, str(device), changes)

    click.echo(_choices(recipe, weights, start, training, validation, device, folder))
    bars = _Bars()
    try:
        result = trainer.train(
            training,
            validation,
            start=start,
            variant=weights,
            recipe=recipe,
            out_dir=folder,
            resume=resume,
            device=device,
            on_epoch=bars.finish_epoch,
            on_step=bars.step,
        )
    except KeyboardInterrupt:
        bars.close()
        raise click.ClickException(f"stopped; repeat the command with --out {folder} --resume to go on") from None
    except OSError as error:
        raise DataError(f"{error.filename or folder} cannot be written: {error.strerror or error}") from error
    finally:
        bars.close()
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
    if weights in VARIANTS:
        return None
    from yolonas import checkpoint
    from yolonas.weights import resolve

    return checkpoint.load(resolve(weights))


def _read(data: Path, val: Path | None, seed: int) -> tuple[LabelledImages, LabelledImages]:
    """Training and validation images; the latter from `val`, the part val, or every fifth image."""
    import numpy as np

    from yolonas.data.labelled import LabelledImages
    from yolonas.data.readers import read_dataset, splits

    parts = splits(data)
    if parts and "train" not in parts:
        raise DataError(f"{data} has the parts {', '.join(parts)} but no part train")
    training = read_dataset(data, "train" if parts else None)
    if not training.images:
        raise DataError(f"{data} has no image to train on")
    if val is not None:
        parts = splits(val)
        return training, read_dataset(val, "val" if "val" in parts else None)
    if "val" in parts:
        return training, read_dataset(data, "val")
    order = np.random.default_rng(seed).permutation(len(training.images)).tolist()
    held = set(order[: len(order) // HELD_OUT])
    images = [[image for k, image in enumerate(training.images) if (k in held) == wanted] for wanted in (False, True)]
    return LabelledImages(training.names, images[0], training.dropped), LabelledImages(training.names, images[1])


def _recipe(
    weights: str,
    start: Checkpoint | None,
    training: LabelledImages,
    validation: LabelledImages,
    device: str,
    changes: dict[str, Any],
) -> Recipe:
    from yolonas.training.recipe import Recipe

    return Recipe.auto(
        len(training),
        weights if start is None else start.model.variant,
        device,
        changes.pop("time_budget_s", None),
        from_scratch=start is None,
        n_val=len(validation),
        **{"image_size": 640 if start is None else max(start.model.preprocessing.image_size), **changes},
    )


def _choices(
    recipe: Recipe,
    weights: str,
    start: Checkpoint | None,
    training: LabelledImages,
    validation: LabelledImages,
    device: Any,
    folder: Path,
) -> str:
    """What will be done, a line for each choice."""
    if start is None:
        origin = f"YOLO-NAS {weights} with random weights"
    else:
        known = {name.casefold() for name in start.model.class_names}
        kept = [name for name in training.names if name.casefold() in known]
        origin = f"{weights} (YOLO-NAS {start.model.variant}); it knows {', '.join(kept) or 'none of the classes'}"
    length = f"at most {recipe.epochs} epochs" if recipe.time_budget_s is not None else f"{recipe.epochs} epochs"
    if recipe.time_budget_s is not None:
        length = f"{recipe.time_budget_s / 60:g} minutes" + (f", {length}" if recipe.epochs < 100_000 else "")
    lines = [
        f"start       {origin}",
        f"classes     {', '.join(training.names)}",
        f"training    {len(training)} images, {training.objects} objects",
        f"validation  {len(validation)} images, {validation.objects} objects",
        f"canvas      {recipe.image_size} px, batch {recipe.batch}, device {device}",
        f"length      {length}, evaluated every {recipe.evaluate_every}",
        f"optimizer   AdamW, learning rate {recipe.lr:g}, weight decay {recipe.weight_decay:g}, seed {recipe.seed}",
        f"folder      {folder}",
    ]
    dropped = [*training.dropped, *validation.dropped]
    if dropped:
        lines.append(f"left out    {len(dropped)} entries of the data, the first: {dropped[0]}")
    if start is not None and start.license:
        lines.append(f"licence     of the start, and so of the result: {start.license}")
    return "\n".join(lines)


def _free_folder(folder: Path) -> Path:
    number = 1
    while (found := folder if number == 1 else folder.with_name(f"{folder.name}{number}")).exists():
        number += 1
    return found

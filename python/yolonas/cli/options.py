"""Options that several commands share, under Ultralytics' names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from yolonas.inference.runtimes.choice import PRECISIONS, RUNTIMES

F = TypeVar("F", bound=Callable[..., Any])


def canvas(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """(height, width) of `640`, or of `384,640`."""
    if value is None:
        return None
    sides = value.split(",")
    if len(sides) > 2 or not all(side.strip().isdecimal() for side in sides):
        raise click.BadParameter(f"{value!r} is not a size: write 640, or 384,640 for height and width")
    height, width = int(sides[0]), int(sides[-1])
    if min(height, width) < 32 or height % 32 or width % 32:
        nearest = ",".join(str(_nearest(int(side))) for side in sides)
        raise click.BadParameter(f"{value} is not a multiple of 32; the nearest is {nearest}")
    return height, width


def _nearest(side: int) -> int:
    return max(32, round(side / 32) * 32)


def _existing_device(ctx: click.Context, param: click.Parameter, value: str) -> Any:
    if value in ("auto", "cpu"):  # these are always there, and exported files run without torch
        return value
    from yolonas.inference.device import resolve_device

    try:
        return resolve_device(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


weights = click.option(
    "--weights",
    "--model",
    required=True,
    help="Checkpoint, exported file, or name of weights: yolo_nas_n_bccd comes along, yolo_nas_s_coco is downloaded.",
)
device = click.option(
    "--device",
    default="auto",
    show_default=True,
    callback=_existing_device,
    help="auto, cpu, cuda, or the number of a CUDA device.",
)
runtime = click.option(
    "--runtime",
    type=click.Choice(RUNTIMES),
    default="auto",
    show_default=True,
    help="What runs the network; auto changes to the quickest installed one in a long job.",
)
precision = click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    default="auto",
    show_default=True,
    help="Of its arithmetic; auto is an exported file's own, else fp32.",
)
imgsz = click.option(
    "--imgsz",
    metavar="SIDE|HEIGHT,WIDTH",
    callback=canvas,
    help="Size of the network's canvas, in multiples of 32.  [default: the checkpoint's]",
)
batch = click.option(
    "--batch", type=click.IntRange(min=1), default=8, show_default=True, help="Images in one pass through the network."
)
max_det = click.option(
    "--max-det",
    "--max_det",
    type=click.IntRange(min=1),
    default=300,
    show_default=True,
    help="Most detections in an image.",
)


def conf(default: float | None) -> Callable[[F], F]:
    """The option --conf; without a default it is the checkpoint's operating threshold."""
    return _share("--conf", default, "Scores must be higher than this.")


def iou(default: float | None) -> Callable[[F], F]:
    """The option --iou; without a default it is the checkpoint's."""
    return _share("--iou", default, "Boxes of one class that overlap a better one by more are dropped.")


def _share(name: str, default: float | None, text: str) -> Callable[[F], F]:
    return click.option(
        name,
        type=click.FloatRange(0, 1),
        default=default,
        show_default=default is not None,
        help=text if default is not None else f"{text}  [default: the checkpoint's]",
    )

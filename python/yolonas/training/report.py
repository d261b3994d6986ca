"""What a training run tells while it goes: one report an epoch, a CSV file and a picture of the curves."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from yolonas.atomic import atomic_file


@dataclass(frozen=True)
class EpochReport:
    """One finished epoch; ap and ap50 are None where it was not evaluated."""

    epoch: int  # from 1
    epochs: int  # planned; with a time budget the estimate so far
    step: int
    lr: float
    loss: float  # mean over the epoch; the next three are its weighted parts
    classification: float
    iou: float
    dfl: float
    ap: float | None
    ap50: float | None
    seconds: float  # since the start of the run, over resumes
    seconds_left: float
    images_per_second: float  # training only


def write_csv(path: Path, history: Sequence[EpochReport]) -> None:
    """The reports, one a line."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [f.name for f in fields(EpochReport)], lineterminator="\n")
    writer.writeheader()
    for report in history:
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in asdict(report).items()})
    with atomic_file(path) as file:
        file.write(text.getvalue().encode())


def write_png(path: Path, history: Sequence[EpochReport]) -> None:
    """Curves of losses, accuracy and learning rate over the epochs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # not pyplot, which keeps global state and may want a display

    figure = Figure(figsize=(12, 3.6))
    figure.subplots_adjust(left=0.04, right=0.99, top=0.9, bottom=0.14, wspace=0.2)
    losses, accuracy, rate = figure.subplots(1, 3)
    epochs = [report.epoch for report in history]
    for name in ("loss", "classification", "iou", "dfl"):
        losses.plot(epochs, [getattr(report, name) for report in history], label=name)
    losses.set(title="training loss", xlabel="epoch", ylim=(0, None))
    losses.legend()
    evaluated = [report for report in history if report.ap is not None]
    for name, label in (("ap50", "AP50"), ("ap", "AP50:95")):
        values = [getattr(report, name) for report in evaluated]
        accuracy.plot([report.epoch for report in evaluated], values, marker=".", label=label)
    accuracy.set(title="validation", xlabel="epoch", ylim=(0, 1))
    accuracy.legend()
    rate.plot(epochs, [report.lr for report in history])
    rate.set(title="learning rate", xlabel="epoch", ylim=(0, None))
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for axes in (losses, accuracy, rate):
        axes.xaxis.get_major_locator().set_params(integer=True)
    with atomic_file(path) as file:
        FigureCanvasAgg(figure).print_png(file)  # type: ignore[no-untyped-call]

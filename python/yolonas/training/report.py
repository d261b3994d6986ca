"""What a training run tells while it goes: one report an epoch, and a CSV file."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from yolonas.atomic import atomic_file


@dataclass(frozen=True)
class EpochReport:
    """One finished epoch; ap and ap50, of the validation or else the watched images, are None where not measured."""

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

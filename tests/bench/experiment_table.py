"""The rows of the experiments and what they say: means over seeds, and differences to a baseline, seed by seed."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

SPLIT = "test"  # of verdicts: the validation images chose the weights
UNDECIDED = "no difference above two standard errors"


class Key(NamedTuple):
    """What a row measures."""

    experiment: str
    option: str
    images: int
    seed: int


@dataclass(frozen=True)
class Row:
    """A row of the file: its key, its numbers, and where it was made."""

    key: Key
    numbers: Mapping[str, float]
    date: str
    commit: str
    device: str


@dataclass(frozen=True)
class Experiment:
    """Options to try at each number of images. They are compared with `baseline` (experiment, option), if there is one,
    on the same images and seeds; `verdicts` are the words for above it and below it."""

    name: str
    about: str
    options: Mapping[int, Sequence[str]]
    baseline: tuple[str, str] | None = None
    verdicts: tuple[str, str] = ("helps", "hurts")


class Spread(NamedTuple):
    """Mean, standard deviation (nan for one value) and count of some values."""

    mean: float
    deviation: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        known = len(values) > 1 and not any(map(math.isnan, values))  # nothing is trained after a last round
        deviation = statistics.stdev(values) if known else math.nan
        return cls(statistics.fmean(values), deviation, len(values))

    @property
    def error(self) -> float:
        """The standard error of the mean."""
        return self.deviation / math.sqrt(self.count)


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, the last of each key; none where there is no file."""
    if not path.exists():
        return []
    rows = {}
    with path.open(newline="") as file:
        for fields in csv.DictReader(file):
            key = Key(
                fields.pop("experiment"), fields.pop("option"), int(fields.pop("images")), int(fields.pop("seed"))
            )
            made = {name: fields.pop(name) for name in ("date", "commit", "device")}
            rows[key] = Row(key, {name: float(value) for name, value in fields.items()}, **made)
    return list(rows.values())


def paired(rows: Iterable[Row], option: tuple[str, str], baseline: tuple[str, str], images: int, metric: str) -> Spread:
    """The spread of option - baseline over the seeds that both have; a seed draws the same images for both.

    The subsets of two seeds differ far more than two options on one subset, so this is much narrower than the
    difference of two means. Raises ValueError where they share no seed.
    """
    values: dict[tuple[str, str], dict[int, float]] = {option: {}, baseline: {}}
    for row in rows:
        name = (row.key.experiment, row.key.option)
        if row.key.images == images and name in values:
            values[name][row.key.seed] = row.numbers[metric]
    shared = sorted(values[option].keys() & values[baseline].keys())
    if not shared:
        raise ValueError(f"{option} and {baseline} have no seed in common at {images} images")
    return Spread.of([values[option][seed] - values[baseline][seed] for seed in shared])


def verdict(difference: Spread, words: tuple[str, str]) -> str:
    """What may be said of a difference: something only above two standard errors."""
    if difference.count < 2:
        return "one seed says nothing"
    if abs(difference.mean) <= 2 * difference.error:
        return UNDECIDED
    return words[0] if difference.mean > 0 else words[1]


def markdown(experiments: Sequence[Experiment], rows: Sequence[Row]) -> str:
    """A table for each experiment that has rows."""
    if not rows:
        return "No rows yet.\n"

    def listed(values: Iterable[object]) -> str:
        return ", ".join(sorted({str(value) for value in values}))

    lines = [
        "# Experiments",
        "",
        f"BCCD, `n` at 320 px, one thread; {listed(row.date for row in rows)}; "
        f"commit {listed(row.commit for row in rows)}; {listed(row.device for row in rows)}; "
        f"seeds {listed(row.key.seed for row in rows)}. `python tests/bench/experiments.py` measured this.",
        "",
        "AP on the test images in percent: mean ± standard deviation over the seeds. The difference is the mean ± "
        "standard error of the differences seed by seed, on the same images.",
    ]
    for experiment in experiments:
        cells = [row for row in rows if row.key.experiment == experiment.name]
        if not cells:
            continue
        against = f", against {experiment.baseline[1]}" if experiment.baseline else ""
        lines += ["", f"## {experiment.name}", "", experiment.about, ""]
        head = ["images", "option", "seeds", "AP", "AP50", "AP on validation", "images seen", "CPU s", "peak MB"]
        head += [f"difference{against}", "verdict"] if experiment.baseline else []
        lines += [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
        for images, options in experiment.options.items():
            for option in options:
                these = [row for row in cells if (row.key.images, row.key.option) == (images, option)]
                if these:
                    lines.append(f"| {' | '.join(_line(experiment, images, option, these, rows))} |")
    return "\n".join(lines) + "\n"


def _line(experiment: Experiment, images: int, option: str, these: Sequence[Row], rows: Sequence[Row]) -> list[str]:
    def mean(name: str) -> str:
        return f"{statistics.fmean(row.numbers[name] for row in these):.0f}"

    def percent(name: str) -> str:
        spread = Spread.of([100 * row.numbers[name] for row in these])
        return f"{spread.mean:.1f}" + (f" ± {spread.deviation:.1f}" if spread.count > 1 else "")

    accuracy = [percent(name) for name in (f"{SPLIT}_ap", f"{SPLIT}_ap50", "val_ap")]
    cells = [str(images), option, str(len(these)), *accuracy, mean("images_seen"), mean("cpu_s"), mean("peak_rss_mb")]
    if experiment.baseline is None:
        return cells
    name = (experiment.name, option)
    there = {row.key.seed for row in rows if row.key[:3] == (*experiment.baseline, images)}
    if name == experiment.baseline or not there & {row.key.seed for row in these}:
        return [*cells, "", "the baseline" if name == experiment.baseline else ""]
    difference = paired(rows, name, experiment.baseline, images, f"{SPLIT}_ap")
    shown = f"{100 * difference.mean:+.1f}" + (f" ± {100 * difference.error:.1f}" if difference.count > 1 else "")
    return [*cells, shown, verdict(difference, experiment.verdicts)]

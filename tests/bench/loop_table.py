"""The rows of the loop and what they say: work saved, and accuracy against labels, each with its spread over seeds."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from experiment_table import Spread, verdict

COUNTED = ("kept", "moved", "relabelled", "removed", "added")
COLUMNS = (
    *("data", "mode", "strategy", "seed", "round", "labelled", "boxes", *COUNTED),
    *("ap", "ap50", "published", "training_s", "wall_s", "budget_s", "date", "commit", "device"),
)
GOAL, FLOOR = 0.6, 0.4  # of the edits of labelling by hand, saved
LABELS = 0.6  # with this share of the labels a strategy should have random's final AP
WORDS = ("beats random by two standard errors", "is worse than random by two standard errors")
DATA = {"bccd": "BCCD: photographs of blood, as people labelled them", "parts": "Drawn metal parts, labelled exactly"}
MODES = {
    "direct": "in one process",
    "backend": "through the backend and the tests' own Label Studio",
    "real": "through the backend and a real Label Studio",
}


class Run(NamedTuple):
    """One way through all images."""

    data: str
    mode: str
    strategy: str
    seed: int


@dataclass(frozen=True)
class Row:
    """A round: what was done to the boxes of its images, and how good the version is that learnt from all so far."""

    run: Run
    labelled: int
    boxes: int  # true ones: the edits of labelling by hand
    counts: dict[str, int]
    ap: float
    ap50: float
    published: bool
    budget_s: float
    wall_s: float
    date: str
    commit: str
    device: str

    @property
    def edits(self) -> int:
        return sum(self.counts[name] for name in COUNTED if name != "kept")


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, in order; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [
            Row(
                Run(fields["data"], fields["mode"], fields["strategy"], int(fields["seed"])),
                int(fields["labelled"]),
                int(fields["boxes"]),
                {name: int(fields[name]) for name in COUNTED},
                float(fields["ap"]),
                float(fields["ap50"]),
                fields["published"] == "1",
                float(fields["budget_s"]),
                float(fields["wall_s"]),
                *(fields[name] for name in ("date", "commit", "device")),
            )
            for fields in csv.DictReader(file)
        ]


def markdown(rows: Sequence[Row]) -> str:
    """Work for the whole set, work round by round, and AP of the strategies; of the runs that are whole."""
    last = max((row.labelled for row in rows), default=0)
    whole = {row.run for row in rows if row.labelled == last}
    rows = [row for row in rows if row.run in whole]
    if not rows:
        return "No runs yet.\n"
    lines = [
        "# The loop",
        "",
        f"A simulated annotator labels {last} images in rounds, the first by hand, with a training after each. n at "
        "320 px, from random weights. Means ± standard deviation over the seeds. "
        f"{_listed(row.date for row in rows)}; commit {_listed(row.commit for row in rows)}; "
        f"{_listed(row.device for row in rows)}. `python tests/bench/loop.py` measured this.",
    ]
    for data in dict.fromkeys(row.run.data for row in rows):
        these = [row for row in rows if row.run.data == data]
        direct = [row for row in these if row.run.mode == "direct"]
        lines += ["", f"## {DATA[data]}", *_work(these), *_work_by_round(these)]
        lines += [*_accuracy(direct, last), *_fewer_labels(direct, last)]
    return "\n".join(lines) + "\n"


def _work(rows: Sequence[Row]) -> list[str]:
    lines = [
        "",
        "### Work for the whole set",
        "",
        "Box edits: moved (same class, IoU under 0.7), relabelled, removed, added. By hand every box is added. "
        f"Goal: {GOAL:.0%} fewer edits, {FLOOR:.0%} at least.",
        "",
        "| how | training, s | next images by | seeds | images | boxes by hand | edits | moved | relabelled | "
        "removed | added | fewer edits | goal |",
        "|" + " --- |" * 13,
    ]
    for mode, strategy in _groups(rows):
        these = _of(rows, mode, strategy)
        runs = sorted({row.run for row in these})

        def total(value: Callable[[Row], float], these: Sequence[Row] = these, runs: Sequence[Run] = runs) -> Spread:
            return Spread.of([sum(value(row) for row in these if row.run == run) for run in runs])

        counts = [total(lambda row, name=name: row.counts[name]) for name in COUNTED[1:]]  # type: ignore[misc]
        boxes, edits = total(lambda row: row.boxes), total(lambda row: row.edits)
        saved = Spread.of([1 - _sum(these, run, "edits") / _sum(these, run, "boxes") for run in runs])
        goal = "reached" if saved.mean >= GOAL else "floor reached" if saved.mean >= FLOOR else "**missed**"
        images = max(row.labelled for row in these)
        budget = _listed(row.budget_s for row in these)
        cells = [MODES[mode], budget, strategy, len(runs), images, _whole(boxes), _whole(edits), *map(_whole, counts)]
        lines.append(_line(*cells, _percent(saved), goal))
    return lines


def _work_by_round(rows: Sequence[Row]) -> list[str]:
    lines = [
        "",
        "### Work round by round",
        "",
        "Share of the edits by hand that was saved on the images of the round, and share of the predicted boxes that "
        "were left as they were.",
        "",
        "| how | next images by | images labelled then | fewer edits | accepted | AP50 of the next version | refused |",
        "|" + " --- |" * 7,
    ]
    for mode, strategy in _groups(rows):
        these = _of(rows, mode, strategy)
        for labelled in sorted({row.labelled for row in these}):
            here = [row for row in these if row.labelled == labelled]
            predicted = [sum(row.counts[name] for name in COUNTED if name != "added") for row in here]
            shares = [row.counts["kept"] / p for row, p in zip(here, predicted, strict=True) if p]
            saved = Spread.of([1 - row.edits / row.boxes for row in here])
            accepted = _percent(Spread.of(shares)) if shares else "by hand"
            refused = sum(not row.published for row in here)
            ap50 = _percent(Spread.of([row.ap50 for row in here]))
            lines.append(_line(MODES[mode], strategy, labelled, _percent(saved), accepted, ap50, refused or ""))
    return lines


def _accuracy(rows: Sequence[Row], last: int) -> list[str]:
    """AP after each round, and the mean over the rounds in which the strategies have different images."""
    if not rows:
        return []
    counts = sorted({row.labelled for row in rows})
    between = counts[1:-1]
    lines = [
        "",
        "### Accuracy against labels",
        "",
        "AP on the test images in percent after the training on so many labelled images, in one process; all "
        "strategies begin with the same images. The mean is over the rounds in which they differ; the difference is "
        "the mean ± standard error of the differences seed by seed.",
        "",
        f"| next images by | seeds | {' | '.join(map(str, counts))} | mean | against random | verdict |",
        "|" + " --- |" * (5 + len(counts)),
    ]
    for _, strategy in _groups(rows):
        these = _of(rows, "direct", strategy)
        cells = [_percent(Spread.of([row.ap for row in these if row.labelled == count])) for count in counts]
        means = _means(these, between)
        shown, said = _against(means, _means(_of(rows, "direct", "random"), between), strategy)
        lines.append(
            _line(strategy, len(means), *cells, _percent(Spread.of(list(means.values()))) if means else "", shown, said)
        )
    return lines


def _fewer_labels(rows: Sequence[Row], last: int) -> list[str]:
    """AP with 60 % of the labels against random's with all."""
    final = {row.run.seed: row.ap for row in rows if row.run.strategy == "random" and row.labelled == last}
    counts = [row.labelled for row in rows if row.labelled >= LABELS * last - 1e-9]
    if not final or not counts:
        return []
    count = min(counts)
    lines = [
        "",
        f"### With {count} of {last} labels",
        "",
        f"AP in percent against that of random with all {last}; goal: the same.",
        "",
        f"| next images by | AP with {count} | random's AP with {last} | difference | goal |",
        "|" + " --- |" * 5,
    ]
    for _, strategy in _groups(rows):
        here = {r.run.seed: r.ap for r in _of(rows, "direct", strategy) if r.labelled == count and r.run.seed in final}
        if not here:
            continue
        difference = Spread.of([here[seed] - final[seed] for seed in here])
        reached = difference.mean >= 0
        said = "reached" if reached else "within two standard errors" if _within(difference) else "missed"
        ours, theirs = Spread.of(list(here.values())), Spread.of([final[seed] for seed in here])
        lines.append(_line(strategy, _percent(ours), _percent(theirs), _difference(difference), said))
    return lines


def _means(rows: Iterable[Row], counts: Sequence[int]) -> dict[int, float]:
    """Seed -> mean AP over the rounds that end at `counts`."""
    found: dict[int, list[float]] = {}
    for row in rows:
        if row.labelled in counts:
            found.setdefault(row.run.seed, []).append(row.ap)
    return {seed: sum(values) / len(values) for seed, values in found.items()}


def _against(means: dict[int, float], random: dict[int, float], strategy: str) -> tuple[str, str]:
    shared = sorted(means.keys() & random.keys())
    if strategy == "random" or not shared:
        return "", "the baseline" if strategy == "random" else ""
    difference = Spread.of([means[seed] - random[seed] for seed in shared])
    return _difference(difference), verdict(difference, WORDS)


def _within(difference: Spread) -> bool:
    return difference.count > 1 and abs(difference.mean) <= 2 * difference.error


def _groups(rows: Iterable[Row]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((row.run.mode, row.run.strategy) for row in rows))


def _of(rows: Iterable[Row], mode: str, strategy: str) -> list[Row]:
    return [row for row in rows if (row.run.mode, row.run.strategy) == (mode, strategy)]


def _sum(rows: Iterable[Row], run: Run, name: str) -> int:
    return sum(getattr(row, name) for row in rows if row.run == run)


def _line(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _listed(values: Iterable[object]) -> str:
    return ", ".join(sorted({f"{value:g}" if isinstance(value, float) else str(value) for value in values}))


def _whole(spread: Spread) -> str:
    return f"{spread.mean:.0f}" + (f" ± {spread.deviation:.0f}" if spread.count > 1 and spread.deviation else "")


def _percent(spread: Spread) -> str:
    if math.isnan(spread.mean):
        return "-"
    return f"{100 * spread.mean:.1f}" + (f" ± {100 * spread.deviation:.1f}" if spread.count > 1 else "")


def _difference(spread: Spread) -> str:
    return f"{100 * spread.mean:+.1f}" + (f" ± {100 * spread.error:.1f}" if spread.count > 1 else "")

"""The experiments' statistics on made-up rows, and that rows which are there are not made again."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest

import experiments
from experiment_table import UNDECIDED, Experiment, Key, Row, Spread, markdown, paired, read_rows, verdict

BASE, OPTION = ("learning-curve", "auto"), ("from-scratch", "no mosaic")


def made_up(name: tuple[str, str], aps: list[float], images: int = 20) -> list[Row]:
    numbers = dict.fromkeys((c for c in experiments.COLUMNS[4:-3]), 1.0)
    return [
        Row(Key(*name, images, seed), {**numbers, "test_ap": ap}, "2026-11-22", "abc", "cpu")
        for seed, ap in enumerate(aps)
    ]


def row_of(key: Key) -> dict[str, Any]:
    return {**dict.fromkeys(experiments.COLUMNS, 0.5), **key._asdict(), "date": "d", "commit": "c", "device": "x"}


def test_differences_are_taken_seed_by_seed() -> None:
    # Seeds differ by 0.2, the option adds 0.02, 0.03 and 0.04: unpaired, nobody would see it.
    rows = made_up(BASE, [0.20, 0.40, 0.60]) + made_up(OPTION, [0.22, 0.43, 0.64])
    difference = paired(rows, OPTION, BASE, 20, "test_ap")
    assert difference.mean == pytest.approx(0.03)
    assert difference.deviation == pytest.approx(0.01)
    assert difference.error == pytest.approx(0.01 / math.sqrt(3))
    assert verdict(difference, ("helps", "hurts")) == "helps"


def test_only_shared_seeds_and_sizes_are_compared() -> None:
    rows = made_up(BASE, [0.2, 0.4]) + made_up(OPTION, [0.1, 0.4, 0.9]) + made_up(BASE, [0.7, 0.7, 0.7], images=100)
    assert paired(rows, OPTION, BASE, 20, "test_ap").count == 2
    with pytest.raises(ValueError, match="no seed in common at 100 images"):
        paired(rows, OPTION, BASE, 100, "test_ap")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([0.01, 0.02, 0.03], "helps"),  # 0.02 +- 0.0058
        ([-0.01, -0.02, -0.03], "hurts"),
        ([0.0, 0.01, 0.03], UNDECIDED),  # 0.0133 +- 0.0088
        ([0.0, 0.0, 0.0], UNDECIDED),
        ([0.5], "one seed says nothing"),
    ],
)
def test_verdicts(values: list[float], said: str) -> None:
    assert verdict(Spread.of(values), ("helps", "hurts")) == said


def test_table() -> None:
    experiment = Experiment("from-scratch", "Options.", {20: ("no mosaic", "absent")}, baseline=BASE)
    rows = made_up(BASE, [0.20, 0.40, 0.60]) + made_up(OPTION, [0.22, 0.43, 0.64])
    table = markdown([experiment], rows)
    assert "| 20 | no mosaic | 3 | 43.0 ± 21.0 |" in table
    assert "| +3.0 ± 0.6 | helps |" in table
    assert "absent" not in table
    assert "against" not in markdown([Experiment("learning-curve", "", {20: ("auto",)})], rows)


def test_rows_that_are_there_are_not_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, made = tmp_path / "rows.csv", []
    keys = [Key("learning-curve", "auto", 5, seed) for seed in range(3)]

    def make(key: Key) -> dict[str, Any] | str:
        made.append(key)
        return "no memory" if key.seed == 1 else row_of(key)

    assert experiments.run(keys, path, 1, make) == 1
    assert [row.key for row in read_rows(path)] == [keys[0], keys[2]]
    assert "FAILED: no memory" in capsys.readouterr().out
    made.clear()
    assert experiments.run(keys, path, 1, lambda key: (made.append(key), row_of(key))[1]) == 0
    assert made == [keys[1]]  # the failed one
    assert experiments.run(keys, path, 2, make) == 0
    with path.open() as file:
        assert len(list(csv.reader(file))) == 4


def test_a_base_is_made_again_where_its_weights_are_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiments, "CACHE", tmp_path)
    key = Key("next-version", "base", experiments.BASE_IMAGES, 0)
    rows = [Row(key, {}, "", "", "")]
    assert experiments.missing([key], rows) == [key]
    experiments.base_file(0).touch()
    assert experiments.missing([key], rows) == []


def test_every_baseline_is_among_the_rows() -> None:
    keys = set(experiments.wanted(experiments.EXPERIMENTS, 1))
    for experiment in experiments.EXPERIMENTS:
        for images, options in experiment.options.items():
            if experiment.baseline and options != ("base",):
                assert Key(*experiment.baseline, images, 0) in keys


@pytest.mark.slow
def test_a_row_of_ours(shared: Path) -> None:
    row = experiments.in_a_process(Key("learning-curve", "auto", 5, 0), shared, 5.0)
    assert isinstance(row, dict), row
    assert set(row) == set(experiments.COLUMNS)
    assert row["images_seen"] > 0
    assert row["cpu_s"] < 15

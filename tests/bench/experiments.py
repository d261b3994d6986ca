"""Which training options help on few labels: experiments on BCCD, a row for each option, number of images and seed.

python tests/bench/experiments.py [--only EXPERIMENT] [--seeds 3] [--jobs 1] [--shared ../shared]
python tests/bench/experiments.py --table

Rows are added to results/experiments_<processor>.csv as they are finished, and never made twice, so it may be stopped
at any time; delete a row to have it made again. `--table` prints what they say, and writes it beside the rows.

Every row is a process of its own with one thread. It trains n at 320 px for at most 60 s *of processor time*, so that
other load on the machine takes nothing from it. Ours has to make its evaluations and files within that time. The best
evaluation on the validation images chooses the weights; the test images choose nothing.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from experiment_table import Experiment, Key, Row, markdown, read_rows
from measuring import REPOSITORY, append, processor_slug

VARIANT, SIZE = "n", 320
CACHE = Path.home() / ".cache" / "yolonas" / "experiments"
METRICS = ("ap", "ap50", "RBC", "WBC", "Platelets")  # the last three are AP of the classes
COLUMNS = (
    *("experiment", "option", "images", "seed", "budget_s"),
    *(f"{split}_{metric}" for split in ("val", "test") for metric in METRICS),
    *("images_seen", "cpu_s", "wall_s", "peak_rss_mb", "date", "commit", "device"),
)

# Option -> fields of the recipe, on top of Recipe.auto's choice.
CHANGES: dict[str, dict[str, Any]] = {
    "auto": {},
    "mosaic to the end": {"plain_share": 0.0},
    "no mosaic": {"augmentation": {"mosaic": 0.0}},
    "float32": {"precision": "float32"},  # auto is bfloat16 on a CPU that multiplies it faster
    "mean of the 3 best": {"average_best": 3},
    "batch 4": {"batch": 4},  # auto's on a CPU for up to 64 images
    "batch 8": {"batch": 8},
}
NEXT: dict[str, dict[str, Any]] = {
    "plain": {},
    "distillation": {"distillation": 1.0},
    "frozen backbone": {"freeze": "backbone"},
    "frozen backbone and neck": {"freeze": "backbone+neck"},
    "pseudo-labels": {},
    "pseudo-labels and distillation": {"distillation": 1.0},
}
PEER = "modern-yolonas, our batch and rate"
BASE_IMAGES = 20

EXPERIMENTS = (
    Experiment(
        "learning-curve",
        "Recipe.auto from random weights, 60 s.",
        dict.fromkeys((5, 20, 50, 100, 205), ("auto",)),
    ),
    Experiment(
        "peer",
        "modern-yolonas 0.5's training from random weights, 60 s, against ours.",
        dict.fromkeys((20, 205), (PEER,)),
        baseline=("learning-curve", "auto"),
        verdicts=("better than ours", "worse than ours"),
    ),
    Experiment(
        "next-version",
        f"From a base trained on {BASE_IMAGES} images in 60 s to a version with more labels in 30 s.",
        {
            BASE_IMAGES: ("base",),
            40: tuple(NEXT),
            25: ("plain", "distillation", "frozen backbone", "frozen backbone and neck"),
        },
        baseline=("next-version", "plain"),
    ),
    Experiment(
        "from-scratch",
        "Options of a training from random weights, 60 s.",
        {
            20: ("mosaic to the end", "no mosaic", "float32", "mean of the 3 best", "batch 8"),
            100: ("batch 4", "mosaic to the end"),
            205: ("batch 4",),
        },
        baseline=("learning-curve", "auto"),
    ),
)


def wanted(experiments: Iterable[Experiment], seeds: int) -> list[Key]:
    """Every row, the first seed of all options first, so that a table begun says something about each."""
    return [
        Key(experiment.name, option, images, seed)
        for experiment in experiments
        for images, options in experiment.options.items()
        for seed in range(seeds)
        for option in options
    ]


def missing(keys: Sequence[Key], rows: Iterable[Row]) -> list[Key]:
    """The keys without a row; a base counts only while its weights are in the cache."""
    there = {row.key for row in rows}
    return [key for key in keys if key not in there or (key.option == "base" and not base_file(key.seed).exists())]


def base_file(seed: int) -> Path:
    return CACHE / f"{processor_slug()}_{VARIANT}_{SIZE}_base_{BASE_IMAGES}_seed{seed}.safetensors"


# One row: everything below runs in a process of its own.


@dataclass(frozen=True)
class Data:
    """BCCD, its training images in the order of a seed: a subset is a beginning of it, so subsets are nested."""

    names: tuple[str, ...]
    images: list[Any]
    val: Any
    test: Any

    @classmethod
    def read(cls, shared: Path, seed: int) -> Data:
        from yolonas.data.readers import read_dataset

        train, val, test = (read_dataset(shared / "data" / "bccd", split) for split in ("train", "val", "test"))
        order = np.random.default_rng(seed).permutation(len(train.images))
        return cls(train.names, [train.images[k] for k in order], val, test)

    def first(self, count: int) -> Any:
        from yolonas.data.labelled import LabelledImages

        return LabelledImages(self.names, self.images[:count])


def make(key: Key, shared: Path, budget_s: float | None = None) -> dict[str, Any]:
    """The row of `key`: trains, measures."""
    import cv2

    cv2.setNumThreads(1)
    data = Data.read(shared, key.seed)
    seconds = budget_s or (30.0 if key.experiment == "next-version" and key.option != "base" else 60.0)
    with tempfile.TemporaryDirectory() as folder:
        wall, cpu = time.perf_counter(), time.process_time()
        if key.experiment == "peer":
            detect, images_seen = train_peer(key, data, seconds, Path(folder))
        else:
            detect, images_seen = train_ours(key, data, seconds, Path(folder))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        row = {**key._asdict(), "budget_s": seconds, "images_seen": images_seen}
        for split in ("val", "test"):
            row |= {f"{split}_{name}": value for name, value in measure(getattr(data, split), detect).items()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    describe = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    row |= {"cpu_s": round(cpu, 1), "wall_s": round(wall, 1), "peak_rss_mb": round(peak)}
    return row | {"date": str(date.today()), "commit": commit, "device": processor_slug()}


def measure(data: Any, detect: Callable[[Any], Any]) -> dict[str, float]:
    """METRICS of detections on `data`."""
    from yolonas.evaluation import coco_ap

    metrics = coco_ap(data, detect(data))
    values = {"ap": metrics.ap, "ap50": metrics.ap50, **metrics.per_class}
    return {name: round(values[name], 4) for name in METRICS}


def automatic(data: Any, val: Any, seconds: float, seed: int, start: Any = None, **changes: Any) -> Any:
    """What Recipe.auto chooses for these images and this time, with changes; those of the augmentation are a dict."""
    from yolonas.training.recipe import Recipe

    views = changes.pop("augmentation", {})
    # What auto chose until this table changed it, so that new rows compare with those that are there.
    earlier = {"batch": 4 if len(data) <= 64 else 8, "plain_share": 0.15}
    changes = {**earlier, **changes, "image_size": SIZE, "seed": seed}
    size = None if start is None else SIZE
    recipe = Recipe.auto(data, VARIANT, "cpu", seconds, val=val, start_size=size, **changes)
    return replace(recipe, augmentation=replace(recipe.augmentation, **views), workers=0)


def train_ours(key: Key, data: Data, seconds: float, folder: Path) -> tuple[Callable[[Any], Any], int]:
    """Train as `key` says; returns what detects in a data set, and how many images the training saw."""
    from yolonas import checkpoint
    from yolonas.evaluation import predict_dataset
    from yolonas.inference.detector import Detector
    from yolonas.training import trainer

    time.monotonic = time.process_time  # the clock of the trainer's time budget: other processes do not take from it
    train, start, more = data.first(key.images), None, {}
    if key.experiment == "next-version" and key.option != "base":
        if not base_file(key.seed).exists():
            raise SystemExit(f"{base_file(key.seed)} is not there: the row `base` of this seed has to be made first")
        start = checkpoint.load(base_file(key.seed))
        changes = {"freeze": "none", **NEXT[key.option]}
        if key.option.startswith("pseudo-labels"):
            from yolonas.training.pseudo_labels import mixed, pseudo_labels

            rest = [image.path for image in data.images[key.images :]]
            train = mixed(train, pseudo_labels(Detector(start, "cpu"), rest, data.names))
        if "distillation" in changes:
            more["teacher"] = start
    else:
        changes = CHANGES["auto" if key.option == "base" else key.option]
    recipe = automatic(train, data.val, seconds, key.seed, start, **changes)
    steps = 0

    def count(*_: int) -> None:
        nonlocal steps
        steps += 1

    result = trainer.train(
        train,
        data.val,
        recipe=recipe,
        out_dir=folder,
        start=start,
        variant=VARIANT,
        device="cpu",
        on_step=count,
        **more,
    )
    if key.option == "base":
        CACHE.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(result.best, base_file(key.seed))
    return functools.partial(predict_dataset, Detector(result.best, "cpu")), steps * recipe.batch


def train_peer(key: Key, data: Data, seconds: float, folder: Path) -> tuple[Callable[[Any], Any], int]:
    """The same for modern-yolonas."""
    import peer

    train = data.first(key.images)
    recipe = automatic(train, data.val, seconds, key.seed)
    numbers = {"batch": recipe.batch, "lr": recipe.lr}
    trained = peer.train(
        train, data.val, variant=VARIANT, size=SIZE, amp=True, seed=key.seed, budget_s=seconds, folder=folder, **numbers
    )
    return functools.partial(peer.predict, trained, size=SIZE), trained.images_seen


# All rows.


def in_a_process(key: Key, shared: Path, budget_s: float | None) -> dict[str, Any] | str:
    """The row of `key`, or why there is none."""
    command = [sys.executable, __file__, "--row", json.dumps(key), "--shared", str(shared)]
    command += ["--seconds", str(budget_s)] if budget_s else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if result.returncode:
        return (result.stderr.strip().splitlines() or ["it died"])[-1]
    row: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return row


def run(keys: Sequence[Key], path: Path, jobs: int, make_row: Callable[[Key], dict[str, Any] | str]) -> int:
    """Make the rows that `path` lacks, `jobs` at a time, and add them to it; returns how many failed."""
    todo = missing(keys, read_rows(path))
    print(f"{len(keys) - len(todo)} of {len(keys)} rows are there", flush=True)
    failed, begun = 0, time.perf_counter()
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(make_row, key): key for key in todo}
        for done, future in enumerate(as_completed(futures), 1):
            key, row = futures[future], future.result()
            if isinstance(row, str):
                failed += 1
                said = f"FAILED: {row}"
            else:
                append(path, COLUMNS, row)
                said = f"AP val {row['val_ap']:.3f}, test {row['test_ap']:.3f}; {row['wall_s']:.0f} s"
            left = (time.perf_counter() - begun) / done * (len(todo) - done) / 60
            name = f"{key.experiment}, {key.option}, {key.images} images, seed {key.seed}"
            print(f"[{done}/{len(todo)}] {name}: {said}; {left:.0f} minutes left", flush=True)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [experiment.name for experiment in EXPERIMENTS]
    parser.add_argument("--only", action="append", choices=names, help="this experiment; may be repeated")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="rows at a time, a core each")
    parser.add_argument("--shared", type=Path, default=REPOSITORY.parent / "shared", help="the folder with data/bccd")
    parser.add_argument("--table", action="store_true", help="make the table of the rows that there are")
    parser.add_argument("--out", type=Path, help="the file of rows  [results/experiments_<processor>.csv]")
    parser.add_argument("--seconds", type=float, help="of each training, to try something out (give --out too)")
    parser.add_argument("--row", help=argparse.SUPPRESS)  # make one row, print it as json
    options = parser.parse_args()
    if not (options.shared / "data" / "bccd").exists() and not options.table:
        raise SystemExit(f"{options.shared}/data/bccd is not there: give the folder that holds data/bccd with --shared")
    if options.seconds and not (options.out or options.row):
        raise SystemExit("rows of another length belong into a file of their own: give --out")
    if options.row:
        print("\n" + json.dumps(make(Key(*json.loads(options.row)), options.shared, options.seconds)))
        return
    path = options.out or REPOSITORY / "tests" / "bench" / "results" / f"experiments_{processor_slug()}.csv"
    chosen = [experiment for experiment in EXPERIMENTS if not options.only or experiment.name in options.only]
    failed = 0
    if not options.table:
        if any(experiment.name == "peer" for experiment in chosen):
            import peer

            peer.install()  # once, before several processes want to
        make_row = functools.partial(in_a_process, shared=options.shared, budget_s=options.seconds)
        failed = run(wanted(chosen, options.seeds), path, options.jobs, make_row)
    text = markdown(EXPERIMENTS, read_rows(path))
    print(text)
    path.with_suffix(".md").write_text(text)
    if failed:
        raise SystemExit(f"{failed} rows could not be made; run it again once what they lack is there")


if __name__ == "__main__":
    main()

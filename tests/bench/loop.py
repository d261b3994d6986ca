"""What the loop saves: a simulated annotator labels a data set in rounds, and its work is counted.

python tests/bench/loop.py [--data bccd|parts] [--mode direct|backend|real] [--only STRATEGY SEED] [--seeds 3]
python tests/bench/loop.py --table

The data are BCCD's training images, with all that people missed in them, or as many drawn ones of metal parts, whose
labels are exact; the test images are others of the same kind.

`backend` goes through `yolonas-labelstudio serve` and the small Label Studio of the tests, `real` through a real one:
predictions, annotations and trainings travel as they do for people. `direct` has the same split, gate and counting
around the trainer in one process, and compares the strategies. It chooses images as `yolonas-labelstudio rank` orders
them, each in the knowledge of those before it; a server scores each task by itself. A run labels all images with one
strategy and one seed, n at 320 px from random weights, a fixed time of training after each round: of the clock with
servers, of the processor in `direct`, so that other load takes little from it.

A row for each round is added to results/loop_<processor>.csv as it is finished. Runs that are whole are never made
again, so it may be stopped at any time; delete a run's rows to have it made again. `--table` prints what the rows say,
and writes it beside them.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

from loop_table import COLUMNS, Row, Run, markdown, read_rows
from measuring import REPOSITORY, append, processor_slug

VARIANT, SIZE, SECONDS = "n", 320, 40.0
COUNTS = (10, 25, 50, 85, 123, 164, 205)  # images labelled at the end of each round; 123 is 60 %
DATA = ("bccd", "parts")
PARTS_TEST = 72  # images, as BCCD has
CACHE = Path.home() / ".cache" / "yolonas" / "loop-parts"
STRATEGIES = {
    "direct": ("random", "mix", "uncertainty", "disagreement", "diversity", "balance"),
    "backend": ("mix", "random"),
    "real": ("mix",),
}


def wanted(data: str, modes: Sequence[str], seeds: int) -> list[Run]:
    """Every run, the first seed of all strategies first, so that a table begun says something about each."""
    return [Run(data, mode, strategy, seed) for mode in modes for seed in range(seeds) for strategy in STRATEGIES[mode]]


def missing(runs: Sequence[Run], rows: Sequence[Row], last: int) -> list[Run]:
    """The runs without a row for `last` images."""
    whole = {row.run for row in rows if row.labelled == last}
    return [run for run in runs if run not in whole]


def make(run: Run, shared: Path, counts: Sequence[int], seconds: float) -> Iterator[dict[str, Any]]:
    """The rows of a run, in this process."""
    import cv2

    from loop_rounds import label
    from yolonas.data.labelled import LabelledImages

    cv2.setNumThreads(1)
    pool, test = read(run.data, shared)
    pool = LabelledImages(pool.names, pool.images[: max(counts)])
    with tempfile.TemporaryDirectory() as folder:
        if run.mode == "direct":
            from loop_direct import DirectTeam, process_clock

            process_clock()
            team = DirectTeam(
                *(pool, test, run.strategy, run.seed),
                first=counts[0],
                seconds=seconds,
                variant=VARIANT,
                size=SIZE,
                folder=Path(folder),
            )
            yield from label(team, pool, counts)
            return
        sys.path.append(str(REPOSITORY / "tests"))  # the Label Studios of the tests
        from loop_backend import backend_team

        with backend_team(
            *(pool, test, run.strategy, run.seed),
            first=counts[0],
            seconds=seconds,
            size=SIZE,
            folder=Path(folder),
            real=run.mode == "real",
        ) as through:
            try:
                rows = []
                for row in label(through, pool, counts, train_last=False):
                    rows.append(row)
                    through.check(rows)
                    yield row
            except Exception:
                print((Path(folder) / "backend.log").read_text()[-4000:], file=sys.stderr)
                raise


def read(data: str, shared: Path) -> tuple[Any, Any]:
    """The images to label, and those to measure on."""
    from yolonas.data.labelled import LabelledImages
    from yolonas.data.readers import read_dataset
    from yolonas.data.samples import generate

    if data == "bccd":
        return read_dataset(shared / "data" / "bccd", "train"), read_dataset(shared / "data" / "bccd", "test")
    file = CACHE / "instances.json"
    if not file.exists():
        generate(CACHE, max(COUNTS) + PARTS_TEST)
    drawn = read_dataset(file)
    return LabelledImages(drawn.names, drawn.images[:-PARTS_TEST]), LabelledImages(
        drawn.names, drawn.images[-PARTS_TEST:]
    )


def in_a_process(run: Run, shared: Path, counts: Sequence[int], seconds: float, path: Path) -> str | None:
    """Make a run, adding its rows to `path` as they come; why it failed, or None."""
    command = [sys.executable, __file__, "--run", json.dumps(run), "--shared", str(shared), "--seconds", str(seconds)]
    command += ["--counts", ",".join(map(str, counts))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                row = json.loads(line)
                append(path, COLUMNS, row)
                name = ", ".join(map(str, run))
                edits = row["moved"] + row["relabelled"] + row["removed"] + row["added"]
                work = f"{edits} edits for {row['boxes']} boxes"
                print(
                    f"{name}: {row['labelled']} images, {work}; AP {row['ap']:.3f}; {row['wall_s']:.0f} s", flush=True
                )
        if process.wait():
            errors.seek(0)
            return "".join(errors.readlines()[-30:])
    return None


def forget(path: Path, runs: Sequence[Run]) -> None:
    """Drop the rows of runs that were cut short: they are made anew."""
    if not path.exists():
        return
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    kept = [row for row in rows if Run(row["data"], row["mode"], row["strategy"], int(row["seed"])) not in runs]
    if len(kept) < len(rows):
        path.unlink()
        for row in kept:
            append(path, COLUMNS, row)


def commit() -> str:
    describe = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def main() -> None:
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=DATA, default="bccd")
    parser.add_argument("--mode", action="append", choices=STRATEGIES, help="may be repeated  [direct and backend]")
    parser.add_argument("--only", nargs=2, metavar=("STRATEGY", "SEED"), help="this run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; one with servers takes two cores")
    parser.add_argument("--shared", type=Path, default=REPOSITORY.parent / "shared", help="the folder with data/bccd")
    parser.add_argument("--table", action="store_true", help="make the table of the rows that there are")
    parser.add_argument("--out", type=Path, help="the file of rows  [results/loop_<processor>.csv]")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each training; another needs --out")
    parser.add_argument("--counts", help="images after each round, to try something out; needs --out")
    parser.add_argument("--run", help=argparse.SUPPRESS)  # make one run, print its rows as json
    options = parser.parse_args()
    counts = tuple(map(int, options.counts.split(","))) if options.counts else COUNTS
    if options.run:
        run, begun = Run(*json.loads(options.run)), time.perf_counter()
        same = {**run._asdict(), "budget_s": options.seconds, "commit": commit(), "device": processor_slug()}
        for row in make(run, options.shared, counts, options.seconds):
            took = {"wall_s": round(time.perf_counter() - begun, 1), "date": str(date.today())}
            print("\n" + json.dumps({**same, **row, **took}))
        return
    if (options.seconds != SECONDS or counts != COUNTS) and not options.out:
        raise SystemExit("rows of other rounds or another time belong into a file of their own: give --out")
    if options.data == "bccd" and not (options.shared / "data" / "bccd").exists() and not options.table:
        raise SystemExit(f"{options.shared}/data/bccd is not there: give the folder that holds data/bccd with --shared")
    path = options.out or REPOSITORY / "tests" / "bench" / "results" / f"loop_{processor_slug()}.csv"
    failed = 0
    if not options.table:
        modes = options.mode or ["direct", "backend"]
        runs = wanted(options.data, modes, options.seeds)
        if options.only:
            runs = [Run(options.data, mode, options.only[0], int(options.only[1])) for mode in modes]
        todo = missing(runs, read_rows(path), max(counts))
        print(f"{len(runs) - len(todo)} of {len(runs)} runs are there")
        forget(path, todo)
        with ThreadPoolExecutor(options.jobs) as pool:
            outcomes = pool.map(lambda run: in_a_process(run, options.shared, counts, options.seconds, path), todo)
            for run, reason in zip(todo, outcomes, strict=True):
                if reason is not None:
                    failed += 1
                    print(f"{', '.join(map(str, run))} FAILED: {reason}")
    text = markdown(read_rows(path))
    print(text)
    path.with_suffix(".md").write_text(text)
    if failed:
        raise SystemExit(f"{failed} runs could not be made")


if __name__ == "__main__":
    main()

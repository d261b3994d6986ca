"""Faults, the long form: whether a label is lost, or half a version serves, over hours of a labelling team.

PYTHONPATH=tests unshare -rm python tests/bench/faults.py [--write] [--random 100] [--only "Label Studio"]

Each line is a day of `tests/labelling_day.py`: a fake Label Studio, the real server and its training processes, of
which only the network and its training are replaced (`tests/fault_process.py`). In the end every labelled task must
stand in the last job's manifest with its newest annotation, and once in the version's, as training or held out; each
task that a version's manifest has as one of these must have had its image in the data of that training; title, /setup's
model_version and project.model_version must be one; every task must have one prediction of it. A watcher reads the
version that serves 20 times a second, and it must be whole. A quarter of an hour; it stops with the first thing lost.
`unshare -rm` lets it mount the small file system that the day with a full disk fills.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import labelling_day
from fault_process import JOB_POINTS, SERVER_POINTS
from labelling_day import AWAY_POINTS, FULL_POINTS
from measuring import Report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write tests/bench/results/faults_<processor>.md")
    parser.add_argument("--random", type=int, default=100, help="kills at random moments")
    parser.add_argument("--only", default="", metavar="NAME", help="run the days whose name begins so")
    arguments = parser.parse_args()
    if arguments.write and arguments.only:
        parser.error("--write writes the table of all days, so it goes without --only")
    days: dict[str, Callable[[labelling_day.Day], object]] = {
        f"kill -9 at {len(SERVER_POINTS)} points of the server: {'; '.join(SERVER_POINTS)}": (
            lambda day: labelling_day.killed_at(day, SERVER_POINTS)
        ),
        f"kill -9 at {len(JOB_POINTS)} points of a training: {'; '.join(JOB_POINTS)}": (
            lambda day: labelling_day.killed_at(day, JOB_POINTS)
        ),
        "1,000 webhooks in 10 s, the server killed at the 500th": lambda day: labelling_day.killed_in_a_burst(
            day, 1000, 10.0
        ),
        f"kill -9 of server or training at {arguments.random} random moments": (
            lambda day: labelling_day.killed_at_random(day, arguments.random)
        ),
        f"the disk is full for 10 s each, from: nothing trained; {'; '.join(FULL_POINTS)}": (
            lambda day: labelling_day.full_disk(day, 10.0)
        ),
        f"Label Studio is away for 60 s each, from: {'; '.join(AWAY_POINTS)}": (
            lambda day: labelling_day.away(day, 60.0)
        ),
        "every webhook twice, 0.5 s late, before and during a training": labelling_day.doubled_and_delayed,
        "a new label in the config when a training has its data": labelling_day.config_changed,
        "two servers on one state folder, one killed with the second training claimed": labelling_day.two_servers,
        "two servers and a worker over Redis, one server and the worker killed": labelling_day.two_servers_over_redis,
    }
    days = {name: run for name, run in days.items() if name.startswith(arguments.only)}
    if not days:
        parser.error(f"no day's name begins with {arguments.only!r}")
    report = Report(
        "Faults", "a fake Label Studio", "PYTHONPATH=tests unshare -rm python tests/bench/faults.py --write"
    )
    report.table(
        "No label may be lost, and no half version serve.", "what happened", "kills", "jobs", "versions", "s", "lost"
    )
    for name, run in days.items():
        shared = run is labelling_day.two_servers_over_redis
        with tempfile.TemporaryDirectory() as folder, labelling_day.Day(Path(folder) / "day", shared=shared) as day:
            begun = time.monotonic()
            run(day)  # raises where anything was lost
            assert day.registry is not None
            jobs = len(day.jobs.find(day.registry.key, brief=True))
            versions = len(day.registry.versions()) - 1
            report.row(name, day.kills, jobs, versions, round(time.monotonic() - begun), "nothing")
    if arguments.write:
        report.write("faults")


if __name__ == "__main__":
    main()

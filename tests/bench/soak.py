"""Half an hour of two projects on one backend: whether its memory stays flat, and whether all is answered.

PYTHONPATH=tests python tests/bench/soak.py [--write] [--minutes 30] [--shared ../shared]

The real server with yolo_nas_n_bccd and a small Label Studio of the tests. In each project an annotator opens a task,
waits for its boxes and submits them, without a pause; now and then everything is predicted by a batch action, and the
labels start trainings of six seconds. Memory is the server's resident set (its trainings are other processes), read
every five seconds; the first five minutes, in which models are loaded, are told but not compared. What may grow is told
as it is after these five minutes and at the end. A task does: it is sent with its predictions by every version, so that
requests, and the memory that they pass through, grow with the trainings.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

from fake_label_studio import FakeLabelStudio
from labelstudio_backend import local_label_studio
from labelstudio_backend.client import LabelStudio
from labelstudio_backend.jobs import Jobs
from labelstudio_backend.local_label_studio import Process
from labelstudio_backend.registry import Registry
from labelstudio_backend.sample_project import label_config, upload
from measuring import REPOSITORY, Report
from yolonas.data.readers import read_dataset

IMAGES, NAMES = 30, ("RBC", "WBC", "Platelets")
SECONDS = 5.0  # between two readings
WARM = 300.0  # s


class Annotator(threading.Thread):
    """Works through the tasks of a project, again and again."""

    def __init__(self, studio: FakeLabelStudio, project: int, tasks: list[int], over: threading.Event) -> None:
        super().__init__(daemon=True)
        self.studio, self.project, self.tasks, self.over = studio, project, tasks, over
        self.submitted = self.empty = self.failed = 0

    def run(self) -> None:
        with LabelStudio(self.studio.url, self.studio.token, retries=0) as client:
            for number, task in enumerate(itertools.cycle(self.tasks)):
                if self.over.is_set():
                    return
                try:
                    if number % 100 == 99:
                        client.retrieve_predictions(self.project)
                    else:
                        self.correct(client, task)
                except Exception as error:
                    self.failed += 1
                    print(f"project {self.project}: {error}", file=sys.stderr)

    def correct(self, client: LabelStudio, task: int) -> None:
        version = client.get_project(self.project)["model_version"]
        given = [p for p in client.get_task(task)["predictions"] if p["model_version"] == version]
        if not given:
            client.retrieve_predictions(self.project, [task])
            given = [p for p in client.get_task(task)["predictions"] if p["model_version"] == version]
        self.empty += not given
        result = given[0]["result"] if given else []
        annotations = client.get_task(task)["annotations"]
        if annotations:
            client.patch_annotation(annotations[0]["id"], result=result)
        else:
            client.create_annotation(task, result)
        self.submitted += 1


def resident(pid: int) -> float:
    """Megabytes of a process, Linux."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def held(pid: int, folder: Path, studio: FakeLabelStudio) -> tuple[int, int, float, float]:
    """Threads and open files of a process (Linux), megabytes of a folder's files, kilobytes of a task, the mean."""
    sizes = []
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            sizes.append(path.stat().st_blocks * 512)
    with studio.lock:
        tasks = [len(json.dumps(task)) for task in studio.tasks.values()]
    threads, files = (len(list(Path(f"/proc/{pid}/{kind}").iterdir())) for kind in ("task", "fd"))
    return threads, files, sum(sizes) / 1e6, statistics.mean(tasks) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write tests/bench/results/soak_<processor>.md")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--shared", type=Path, default=REPOSITORY.parent / "shared")
    arguments = parser.parse_args()
    paths = [
        image.path for image in read_dataset(arguments.shared / "data" / "bccd" / "train.json").images[: 2 * IMAGES]
    ]
    report = Report(
        "Soak",
        "a fake Label Studio",
        f"PYTHONPATH=tests python tests/bench/soak.py --minutes {arguments.minutes:g} --write",
    )
    with tempfile.TemporaryDirectory() as name, FakeLabelStudio() as studio:
        folder, over, port = Path(name), threading.Event(), local_label_studio.free_port()
        environment = {
            "YOLONAS_STATE_DIR": str(folder / "state"),
            "YOLONAS_PORT": str(port),
            "YOLONAS_WEIGHTS": "yolo_nas_n_bccd",
            "YOLONAS_LABEL_STUDIO_URL": studio.url,
            "YOLONAS_LABEL_STUDIO_TOKEN": studio.token,
            "YOLONAS_TRAIN_EVERY": "20",
            "YOLONAS_TRAIN_MINUTES": "0.1",
            "YOLONAS_IMAGE_SIZE": "320",
            "YOLONAS_RECONCILE_SECONDS": "5",
        }
        serve = [sys.executable, "-m", "labelstudio_backend.cli", "serve"]
        server = Process("The backend", serve, os.environ | environment, folder / "backend.log")
        readings: list[tuple[float, float]] = []
        try:
            url = f"http://127.0.0.1:{port}"
            server.wait_until(lambda: local_label_studio.answers(f"{url}/health"), 120)
            annotators = []
            with LabelStudio(studio.url, studio.token) as client:
                for number in range(2):
                    project = client.create_project(f"Soak {number}", label_config(NAMES))["id"]
                    tasks = upload(client, project, paths[number * IMAGES : (number + 1) * IMAGES])
                    client.add_ml_backend(project, url, title="My model")
                    annotators.append(Annotator(studio, project, tasks, over))
            for annotator in annotators:
                annotator.start()
            begun, warm_at = time.monotonic(), min(WARM, 15 * arguments.minutes)
            holds: list[tuple[int, int, float, float]] = []
            while (now := time.monotonic() - begun) < 60 * arguments.minutes:
                readings.append((now, resident(server.pid)))
                if now >= warm_at and not holds:
                    holds.append(held(server.pid, folder / "state", studio))
                over.wait(SECONDS)
            holds.append(held(server.pid, folder / "state", studio))
            over.set()
            for annotator in annotators:
                annotator.join(120)
            jobs = Jobs(folder / "state" / "jobs.sqlite").find(brief=True)
            versions = [len(registry.versions()) for registry in Registry(folder / "state" / "projects").projects()]
        finally:
            over.set()
            server.stop(60)
        warm = [reading for reading in readings if reading[0] >= warm_at]
        third = len(warm) // 3
        first, last = (statistics.median(mb for _, mb in part) for part in (warm[:third], warm[-third:]))
        late = warm[third:]
        slope = statistics.linear_regression([t / 60 for t, _ in late], [mb for _, mb in late]).slope
        report.table(
            "Resident memory of the server, MB.",
            "first minute",
            "first third",
            "last third",
            "highest",
            "slope over the last two thirds, MB a minute",
        )
        report.row(
            f"{readings[min(11, len(readings) - 1)][1]:.0f}",
            f"{first:.0f}",
            f"{last:.0f}",
            f"{max(mb for _, mb in readings):.0f}",
            f"{slope:.2f}",
        )
        report.table("What may grow.", "", "threads", "open files", "state folder, MB", "a task as it is sent, kB")
        for when, (threads, files, megabytes, kilobytes) in zip(("warm", "end"), holds, strict=True):
            report.row(when, threads, files, f"{megabytes:.0f}", f"{kilobytes:.0f}")
        report.table(
            "What was done meanwhile.", "project", "submitted", "without a prediction", "failed calls", "versions"
        )
        for annotator, count in zip(annotators, versions, strict=True):
            report.row(annotator.project, annotator.submitted, annotator.empty, annotator.failed, count)
        states = {state: sum(job.state == state for job in jobs) for state in sorted({job.state for job in jobs})}
        report.text(f"\nTrainings: {', '.join(f'{count} {state}' for state, count in states.items())}.")
    if arguments.write:
        report.write("soak")


if __name__ == "__main__":
    main()

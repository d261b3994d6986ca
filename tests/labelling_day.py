"""A labelling day with faults: people submit labels while the backend is killed, the disk fills, Label Studio is away.

`Day` runs a fake Label Studio and the real server (`fault_process.py`) and says at the end whether anything was lost.

    unshare --map-root-user --mount python tests/labelling_day.py FOLDER SECONDS

is a day with a full disk, with the right to mount one, which is gone with the command.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil

import fault_process
import real_redis
from fake_label_studio import FakeLabelStudio
from labelstudio_backend import local_label_studio
from labelstudio_backend.client import LabelStudio, project_uid
from labelstudio_backend.corrections import corrections, held_out, manifest
from labelstudio_backend.job import Job
from labelstudio_backend.job_queue import JobQueue
from labelstudio_backend.jobs import Jobs
from labelstudio_backend.local_label_studio import Process
from labelstudio_backend.redis_jobs import RedisJobs
from labelstudio_backend.registry import ProjectRegistry, Registry, project_key
from labelstudio_backend.settings import Settings
from labelstudio_backend.version import CHECKPOINT

HERE = Path(__file__).resolve().parent
PARTS = ("train", "held_out")
TITLE = "My model"  # as a person connects it
DISK = 32 * 1024 * 1024  # bytes, of which a day needs some 10 MB
CONFIG = (
    '<View><Image name="image" value="$image"/>'
    '<RectangleLabels name="label" toName="image"><Label value="Cell"/>{}</RectangleLabels></View>'
)


class Day:
    """A project of `tasks` images, a server that trains after every corrected task, and the people.

    A context manager. `lost` names what went wrong while it ran: a version that was not whole. shared: the jobs are in
    a real Redis and run by workers, and the versions in a folder beside the servers' own.
    """

    def __init__(self, folder: Path, tasks: int = 12, *, shared: bool = False) -> None:
        self.folder = folder
        self.state_dir = folder / "state"
        self.shared_dir = folder / "shared" if shared else self.state_dir
        self.queue = ""
        self.marks = folder / "marks"
        self.marks.mkdir(parents=True)
        self.studio = FakeLabelStudio()
        self.client = LabelStudio(self.studio.url, self.studio.token)
        self.port = local_label_studio.free_port()
        self.backend = f"http://127.0.0.1:{self.port}"
        self.server: Process | None = None
        self.count = tasks
        self.tasks: list[int] = []
        self.lost: list[str] = []
        self.kills = 0
        self._over = threading.Event()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Day:
        self._stack.enter_context(self.studio)
        if self.shared_dir != self.state_dir:
            self.queue = self._stack.enter_context(real_redis.running(self.folder))
        self.project = self.client.create_project("A day", CONFIG.format(""))["id"]
        picture = np.random.default_rng(0).integers(0, 255, (16, 16, 3)).astype(np.uint8)
        content = cv2.imencode(".png", picture)[1].tobytes()
        self.tasks = self.client.upload_files(self.project, [(f"{n}.png", content) for n in range(self.count)])
        self._date_project()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._watcher.join()
        self.kill()
        for process in self.trainings():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self.client.close()
        self._stack.close()

    def _date_project(self) -> None:
        """Give the project a date with which its first three tasks are learnt from, and another one is held out.

        The part of a task is a hash of its project's date and address: by chance all that is labelled is held out, and
        nothing can be learnt.
        """
        row = self.studio.projects[self.project]
        fraction = float(Settings.model_fields["held_out"].default)
        for second in itertools.count(1):
            row["created_at"] = datetime.fromtimestamp(second, UTC).isoformat()
            key = project_key(self.studio.url, project_uid(row))
            parts = [held_out(key, task, fraction) for task in self.tasks]
            if not any(parts[:3]) and any(parts):
                return

    # -- the machine -----------------------------------------------------------------------------------------------

    @property
    def registry(self) -> ProjectRegistry | None:
        return next(iter(Registry(self.shared_dir / "projects").projects()), None)

    @property
    def jobs(self) -> JobQueue:
        if self.queue:
            return RedisJobs.open(self.queue, self.shared_dir / "jobs")
        return Jobs(self.state_dir / "jobs.sqlite")

    def trainings(self) -> list[int]:
        """The PIDs of the trainings that live."""
        found = []
        for path in (self.shared_dir / "jobs").glob("*/pid"):
            with contextlib.suppress(OSError, ValueError):
                pid = int(path.read_text())
                if b"fault_process.py" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(pid)
        return found

    def start(self, point: str = "", count: int = 1) -> None:
        """Start the server, which dies (or one of its trainings) at `point`; connect it where it is not."""
        command, environment = self.command(self.port, FAULTS_POINT=point, FAULTS_COUNT=str(count))
        self.server = Process("The backend", command, environment, self.folder / "backend.log")
        up = f"{self.backend}/health"
        with contextlib.suppress(Exception):  # it may die at once
            self.server.wait_until(lambda: local_label_studio.answers(up), 60)
            if not self.client.ml_backends(self.project):
                self.client.add_ml_backend(self.project, self.backend, title=TITLE)

    def command(self, port: int, what: str = "serve", **own: str) -> tuple[list[str], dict[str, str]]:
        """The command line and the environment of a server, or of a worker."""
        shared = {"YOLONAS_QUEUE": self.queue, "YOLONAS_SHARED_DIR": str(self.shared_dir)} if self.queue else {}
        environment = {
            "FAULTS_FOLDER": str(self.marks),
            "YOLONAS_STATE_DIR": str(self.state_dir),
            "YOLONAS_PORT": str(port),
            "YOLONAS_WEIGHTS": "untrained-n",
            "YOLONAS_LABEL_STUDIO_URL": self.studio.url,
            "YOLONAS_LABEL_STUDIO_TOKEN": self.studio.token,
            "YOLONAS_TRAIN_EVERY": "1",
            "YOLONAS_RECONCILE_SECONDS": "1",
        }
        return [sys.executable, str(HERE / "fault_process.py"), what], os.environ | environment | shared | own

    def kill(self) -> None:
        """kill -9 of the server; a training goes on by itself."""
        if self.server is not None and self.server.running:
            os.kill(self.server.pid, signal.SIGKILL)
            self.server._popen.wait()
            self.kills += 1

    def keep_running(self) -> None:
        """Start the server again where it has died, as systemd does."""
        if self.server is None or not self.server.running:
            self.start()

    def mount_disk(self) -> None:
        """Before the server starts: have the state folder on a small file system of its own, which `full_disk` fills.

        That needs root, or `unshare --map-root-user --mount` before the command.
        """
        self.state_dir.mkdir()
        size = f"size={DISK}"
        subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(self.state_dir)], check=True)
        self._stack.callback(subprocess.run, ["umount", "--lazy", str(self.state_dir)], check=True)

    @contextlib.contextmanager
    def full_disk(self) -> Iterator[None]:
        """Not a byte is free in the state folder, and what becomes free is taken again: SQLite fails as all else."""
        filler, over = self.state_dir / "filler", threading.Event()

        def fill() -> None:
            with filler.open("ab", buffering=0) as stream:
                while not over.wait(0.005):
                    with contextlib.suppress(OSError):
                        while stream.write(bytes(4096)):
                            pass

        thread = threading.Thread(target=fill, daemon=True)
        thread.start()
        try:
            until(lambda: os.statvfs(self.state_dir).f_bavail == 0, "a full disk")
            yield
        finally:
            over.set()
            thread.join()
            filler.unlink()

    def hold(self, *points: str) -> None:
        """From now on who gets to one of these points of `fault_process.py` waits there until `release`."""
        for point in points:
            (self.marks / f"at {point}").unlink(missing_ok=True)
            (self.marks / f"hold {point}").touch()

    def wait_at(self, point: str) -> int:
        """Wait until somebody is held at the point; returns the PID."""
        mark = self.marks / f"at {point}"
        until(lambda: mark.exists() and mark.read_text() != "", f"a process at {point!r}")
        return int(mark.read_text())

    def release(self, point: str) -> None:
        (self.marks / f"hold {point}").unlink()

    # -- the people ------------------------------------------------------------------------------------------------

    def label(self, task: int) -> None:
        """A person submits a task, or corrects what was submitted."""
        value = {"x": 10, "y": 10, "width": random.uniform(20, 60), "height": 40, "rectanglelabels": ["Cell"]}
        result = [{"from_name": "label", "to_name": "image", "type": "rectanglelabels", "value": value}]
        existing = self.client.get_task(task)["annotations"]
        if existing:
            self.client.patch_annotation(existing[0]["id"], result=result)
        else:
            self.client.create_annotation(task, result)

    # -- what must be true -----------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """The version that serves is whole, whenever somebody looks."""
        while not self._over.wait(0.05):
            registry = self.registry
            if registry is None or not (registry.path / "current").exists():
                continue
            try:
                version = registry.current()
                if version.trained:
                    fault_process.whole(version.path / CHECKPOINT)
                    json.loads((version.path / "record.json").read_text())
            except Exception as error:
                self.lost.append(f"the version that serves is not whole: {error}")

    def problems(self) -> list[str]:
        """What is not (yet) as it must be in the end."""
        registry = self.registry
        if registry is None:
            return ["the project is not known"]
        jobs = self.jobs.find(registry.key)
        ended = [job for job in jobs if job.state in ("succeeded", "refused")]
        if any(job.state in ("queued", "running") for job in jobs):
            return ["a job is under way"]
        found = corrections(self.client.iter_tasks(self.project))
        if not found:
            return []
        if not ended:
            return [f"no job has succeeded: {[(job.state, job.reason) for job in jobs]}"]
        return [
            *self._unlearnt(ended[-1], manifest(found), registry),
            *self._imageless(registry),
            *_untold(jobs, registry),
            *self._out_of_step(registry),
        ]

    def _unlearnt(self, job: Job, labelled: dict[str, str], registry: ProjectRegistry) -> list[str]:
        if job.manifest != labelled:
            return [f"job {job.id} learnt {job.manifest}, and {labelled} is labelled"]
        made = [version for version in registry.versions() if version.record.get("job") == job.id]
        if len(made) != 1:
            return [f"job {job.id} {job.state} and made the versions {[version.name for version in made]}"]
        parts = made[0].record["manifest"]
        if sorted(parts) != sorted(labelled) or not all(p["part"] in PARTS for p in parts.values()):
            return [f"{made[0].name} has the tasks {parts}, and {labelled} is labelled"]
        return []

    def _imageless(self, registry: ProjectRegistry) -> list[str]:
        """Versions whose manifest has tasks as learnt whose images were not in the data of their training."""
        found = []
        for version in registry.versions():
            if "manifest" not in version.record:  # a start version, or a removed one
                continue
            said = {
                (task, value["part"]) for task, value in version.record["manifest"].items() if value["part"] in PARTS
            }
            data = json.loads((self.jobs.folder(version.record["job"]) / "data.json").read_text())
            learnt = {(_task(image), part) for part in PARTS for image in data[part]}
            if said != learnt:
                found.append(f"{version.name} learnt {sorted(learnt)} and says {sorted(said)}")
        return found

    def _out_of_step(self, registry: ProjectRegistry) -> list[str]:
        name = registry.current().name
        rows = self.client.ml_backends(self.project)
        shown = self.client.get_project(self.project)["model_version"]
        seen = {rows[0]["title"], rows[0]["model_version"], shown} if rows else set()
        if seen != {name}:
            return [f"{name} serves, but Label Studio has {seen}"]
        given = [p["task"] for p in self.client.predictions(self.project) if p["model_version"] == name]
        if sorted(given) != sorted(self.tasks):
            return [f"{name} has predictions for the tasks {sorted(given)} of {sorted(self.tasks)}"]
        return []

    def settle(self, seconds: float = 120.0) -> None:
        """Let everything come to rest, starting the server again where it died; AssertionError where it does not."""
        deadline = time.monotonic() + seconds
        problems = ["nothing was looked at"]
        while problems and time.monotonic() < deadline:
            self.keep_running()
            with contextlib.suppress(Exception):
                problems = self.problems()
            time.sleep(0.2)
        assert not problems, f"{problems}; {log_tail(self.folder / 'backend.log')}"
        assert not self.lost, self.lost


def _task(image: Mapping[str, Any]) -> str:
    """The task of an image in a job's data.json: its file is named after it."""
    return Path(image["path"]).name.partition("-")[0]


def _untold(jobs: Sequence[Job], registry: ProjectRegistry) -> list[str]:
    """Jobs that published a version and are told to have done otherwise: what they learnt would be learnt again."""
    made = {version.record.get("job"): version.name for version in registry.versions()}
    return [
        f"job {job.id} published {made[job.id]} and {job.state}: {job.reason}"
        for job in jobs
        if job.id in made and job.state != "succeeded"
    ]


def log_tail(path: Path) -> str:
    return path.read_text(errors="replace")[-3000:] if path.exists() else ""


# -- what happens on such days -------------------------------------------------------------------------------------


def killed_at(day: Day, points: Sequence[str]) -> None:
    """At each of these points of `fault_process.py`, while two tasks are corrected; and the server after each."""
    for place, point in enumerate(points):
        day.kill()
        (day.marks / "killed").unlink(missing_ok=True)
        day.start(point)
        for task in (day.tasks[place % day.count], day.tasks[(place + 1) % day.count]):
            day.label(task)
        day.settle()
        assert (day.marks / "killed").exists(), f"{point!r} was never reached"
        day.kills += 1


def killed_in_a_burst(day: Day, events: int, seconds: float) -> float:
    """After half of a burst of webhooks; returns how long the burst took."""
    day.start("webhook", count=events // 2)
    begun = time.monotonic()
    for number in range(events):
        day.label(day.tasks[number % day.count])
        time.sleep(max(0.0, begun + seconds * number / events - time.monotonic()))
        day.keep_running()
    took = time.monotonic() - begun
    day.settle()
    assert (day.marks / "killed").exists()
    day.kills += 1
    return took


def killed_at_random(day: Day, times: int, seed: int = 0) -> None:
    """The server or the training, at a random moment after a correction, again and again."""
    draw = random.Random(seed)
    for number in range(times):
        day.keep_running()
        day.label(draw.choice(day.tasks) if number else day.tasks[0])
        time.sleep(draw.uniform(0.0, 2.5))
        trainings = day.trainings()
        if trainings and draw.random() < 0.5:
            with contextlib.suppress(ProcessLookupError):
                os.kill(trainings[-1], signal.SIGKILL)
                day.kills += 1
        else:
            day.kill()
    day.settle()


FULL_POINTS = ("claimed", "pulled", "training", "publish, copied", "title, before")


def full_disk(day: Day, seconds: float, points: Sequence[str] = FULL_POINTS) -> None:
    """Nothing can be written for a while: at first while people label and nothing is trained, so that a training cannot
    even be queued; then from each of these points on."""
    day.mount_disk()
    day.start()
    day.label(day.tasks[0])
    day.settle()
    log = day.folder / "backend.log"
    with day.full_disk():
        read = log.stat().st_size
        day.label(day.tasks[1])
        until(lambda: b"the queue of trainings" in log.read_bytes()[read:], "a queue that cannot be written")
        time.sleep(seconds)
    day.settle()
    for place, point in enumerate(points):
        day.hold(point)
        day.label(day.tasks[place % day.count])
        day.wait_at(point)
        with day.full_disk():
            day.release(point)
            day.label(day.tasks[(place + 1) % day.count])
            time.sleep(seconds)
        day.settle()


AWAY_POINTS = {  # what is asked for there of Label Studio
    "fetching": "GET data/upload/",
    "title, before": "PATCH api/ml/",
    "re-prediction": "POST api/dm/actions",
}


def away(day: Day, seconds: float) -> None:
    """Label Studio is away for a while when the first images are fetched and others are not, again before it is told
    of the new version, and again when it has asked for some predictions of it and not for all."""
    day.start()
    until(lambda: day.client.ml_backends(day.project)[0]["title"] != TITLE, "the title of the start version")
    day.hold("claimed", *AWAY_POINTS)
    for task in day.tasks:
        day.label(task)
    day.wait_at("claimed")  # the first training has more images than are fetched at once
    day.release("claimed")
    for point, call in AWAY_POINTS.items():
        day.wait_at(point)
        day.label(day.tasks[0])
        day.studio.away = True
        day.release(point)
        time.sleep(seconds)
        until(lambda call=call: any(line.startswith(call) for line in day.studio.turned_away), f"{call} in vain")
        day.studio.away = False
    day.settle(120 + 2 * seconds)


def doubled_and_delayed(day: Day) -> None:
    """Every webhook comes twice, half a second late, of a first task and, during its training, of all others: all that
    is new is learnt by one more training."""
    day.studio.webhook_copies, day.studio.webhook_delay = 2, 0.5
    day.hold("training")
    day.start()
    day.label(day.tasks[0])
    day.wait_at("training")
    for task in day.tasks[1:]:
        day.label(task)
    day.release("training")
    day.settle()
    assert day.studio.calls["/webhook"] >= 2 * day.count
    jobs = day.jobs.find()
    assert len(jobs) == 2, [(job.trigger, job.state, job.reason) for job in jobs]


def config_changed(day: Day) -> None:
    """The label config gets another label when a training has its data, and nobody labels on: the training that follows
    has it."""
    day.hold("data kept")
    day.start()
    day.label(day.tasks[0])
    day.wait_at("data kept")
    day.client.patch_project(day.project, label_config=CONFIG.format('<Label value="Σκύλος"/>'))
    day.release("data kept")
    until(lambda: any("Σκύλος" in job.trigger for job in day.jobs.find()), "a training for the new label")
    day.label(day.tasks[1])
    day.settle()
    jobs = day.jobs.find()
    assert jobs[1].trigger.startswith("new labels in the label config"), jobs
    assert day.registry is not None
    assert day.registry.current().labels == ("Cell", "Σκύλος")


def two_servers(day: Day) -> None:
    """Two servers look after one state folder and a second training is due: one takes it, the other leaves it alone
    until the first is killed before it could start it."""
    day.hold("training")
    day.start()
    port = local_label_studio.free_port()
    second = Process("A second backend", *day.command(port), day.folder / "second.log")
    try:
        second.wait_until(lambda: local_label_studio.answers(f"http://127.0.0.1:{port}/health"), 60)
        day.label(day.tasks[0])
        day.wait_at("training")
        for task in day.tasks[1:]:
            day.label(task)
        day.hold("claimed")
        day.release("training")
        claimer = day.wait_at("claimed")
        time.sleep(2.0)  # the other looks at the queue every half second
        assert not day.trainings(), "both servers took the training"
        os.kill(claimer, signal.SIGKILL)
        day.kills += 1
        day.release("claimed")
        until(lambda: day.jobs.find()[-1].state == "succeeded", "the second training, by the other server")
        day.settle()
        first, *others = day.jobs.find()
        assert (first.restarts, [job.restarts for job in others]) == (0, [1]), [first, *others]
        assert second.running == (claimer != second.pid), log_tail(day.folder / "second.log")
    finally:
        second.stop()


def two_servers_over_redis(day: Day) -> None:
    """Two servers with state folders of their own share a queue in Redis, whose worker is killed with its training, as
    by a loss of power, and started again; then the first server is killed. Afterwards all goes on."""
    second = Process(
        "A second backend",
        *day.command(local_label_studio.free_port(), YOLONAS_STATE_DIR=str(day.folder / "second")),
        day.folder / "second.log",
    )
    workers: list[Process] = []

    def work() -> None:
        name = f"worker {len(workers)}"
        environment = day.command(0, "work", YOLONAS_STATE_DIR=str(day.folder / name))
        workers.append(Process("A worker", *environment, day.folder / f"{name}.log"))

    try:
        work()
        day.start()
        for place, task in enumerate(day.tasks):
            day.label(task)
            if place == day.count // 3:
                until(lambda: bool(day.trainings()), "a training")
                machine = psutil.Process(workers[0].pid)
                for process in [machine, *machine.children(recursive=True)]:
                    process.kill()
                day.kills += 1
                work()
            if place == 2 * day.count // 3:
                day.kill()
        day.settle()
        day.label(day.tasks[0])
        day.settle()
        assert second.running, log_tail(day.folder / "second.log")
        assert workers[1].running, log_tail(workers[1].log)
        assert any(job.restarts for job in day.jobs.find(brief=True)), "the killed training did not go on"
    finally:
        for process in (second, *workers):
            process.stop()


def until(condition: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.02)


if __name__ == "__main__":
    with Day(Path(sys.argv[1]), tasks=6) as _day:
        full_disk(_day, float(sys.argv[2]), ("training",))

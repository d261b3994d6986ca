"""What the backend answers how quickly: a server as a process, and clients that ask it as Label Studio does.

python tests/bench/serving.py [--write] [--seconds 20] [--training] [--weights NAME ...] [--shared ../shared]

Each client sends its next request when it has its answer; latencies are of whole requests, over loopback. The pictures
are BCCD's, 640x480 JPEG; all have been asked for once, so they come from the backend's cache and are decoded anew. No
two requests that are under way ask for the same picture. `--weights` is yolo_nas_n_bccd, whose canvas is 320 px, and a
variant's letter for random weights at 640 px. With `--training` all of it is measured again while a training runs as
the backend starts it: niced, on one thread less than there are cores.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np

from labelstudio_backend.serving import SHOWN, runtime_of
from labelstudio_backend.settings import Settings
from measuring import REPOSITORY, Report
from yolonas import YoloNAS, checkpoint
from yolonas.data.readers import read_dataset

UID = "1.1795289898"
LABELS = ("RBC", "WBC", "Platelets")
CONFIG = (
    '<View><Image name="image" value="$image"/><RectangleLabels name="label" toName="image">'
    + "".join(f'<Label value="{label}"/>' for label in LABELS)
    + "</RectangleLabels></View>"
)
CLIENTS = (1, 8, 32)
PAUSE = 0.3  # s between the requests of somebody who draws
MANY = 250  # tasks of a batch action
LONGEST = 120.0  # s; more than a batch action may take


@dataclass
class Backend:
    """A running server and the pictures that can be asked for."""

    url: str
    pictures: int
    pid: int
    number: Iterator[int] = field(default_factory=itertools.count)

    def ask(
        self, http: httpx.Client, tasks: int, drawing: bool = False, names: Sequence[str] = ()
    ) -> tuple[float, int]:
        """Seconds of a request for the next pictures, or for these, and how many tasks it answered."""
        numbers = [next(self.number) for _ in range(tasks)]
        names = names or [f"{number % self.pictures}.jpg" for number in numbers]
        data = [{"id": n, "data": {"image": f"/data/upload/1/{name}"}} for n, name in zip(numbers, names, strict=True)]
        context = {"result": [{"type": "rectanglelabels"}]} if drawing else None
        body = {"tasks": data, "project": UID, "label_config": CONFIG, "params": {"context": context}}
        begin = time.perf_counter()
        answer = http.post("/predict", json=body).raise_for_status()
        return time.perf_counter() - begin, sum(isinstance(result, dict) for result in answer.json()["results"])

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=LONGEST, trust_env=False)


@dataclass
class Load:
    """What clients saw in some seconds."""

    seconds: float
    latencies: list[float]
    images: int

    def percentile(self, share: float) -> float:
        """Milliseconds, by nearest rank."""
        ordered = sorted(self.latencies)
        return ordered[max(0, math.ceil(share * len(ordered)) - 1)] * 1e3


def load(backend: Backend, clients: int, tasks: int, seconds: float, pause: float = 0.0) -> Load:
    """So many clients, each with requests one after the other, of which those count that begin in time."""
    latencies: list[float] = []
    images = 0
    lock, ready = threading.Lock(), threading.Barrier(clients + 1)
    begin = math.inf

    def run() -> None:
        nonlocal images
        with backend.client() as http:
            ready.wait()
            while time.perf_counter() - begin < seconds:
                took, answered = backend.ask(http, tasks, drawing=pause > 0)
                with lock:
                    latencies.append(took)
                    images += answered
                time.sleep(pause)

    threads = [threading.Thread(target=run) for _ in range(clients)]
    for thread in threads:
        thread.start()
    ready.wait()
    begin = time.perf_counter()
    for thread in threads:
        thread.join()
    return Load(time.perf_counter() - begin, latencies, images)


def beside_a_batch_action(backend: Backend, seconds: float) -> tuple[Load, Load]:
    """What somebody who draws sees, and what one batch action after the other does meanwhile."""
    enough = threading.Event()
    latencies: list[float] = []
    images = 0

    def actions() -> None:
        nonlocal images
        with backend.client() as http:
            while not enough.is_set():
                took, answered = backend.ask(http, MANY)
                latencies.append(took)
                images += answered

    thread = threading.Thread(target=actions)
    begin = time.perf_counter()
    thread.start()
    drawing = load(backend, 1, 1, seconds, PAUSE)
    enough.set()
    thread.join()
    return drawing, Load(time.perf_counter() - begin, latencies, images)


def memory(backend: Backend) -> tuple[float, float]:
    """Megabytes that the server holds, and holds most while it is asked for MANY large photographs four times over."""

    def resident(field: str) -> float:
        status = Path(f"/proc/{backend.pid}/status").read_text()
        return int(status.partition(f"{field}:")[2].split()[0]) / 1e3

    def action(number: int) -> None:
        with backend.client() as http:
            backend.ask(http, MANY, names=[f"large.jpg?{number}-{index}" for index in range(MANY)])

    Path(f"/proc/{backend.pid}/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    threads = [threading.Thread(target=action, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return before, resident("VmHWM")


@contextmanager
def files(folder: Path) -> Iterator[str]:
    """Label Studio, as far as pictures go."""

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, directory=str(folder), **options)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


@contextmanager
def process(*command: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(command, env={**os.environ, **environment}, stdout=log, stderr=log)
        try:
            yield child
        finally:
            ended = child.poll()
            child.terminate()
            child.wait(60)
            if ended is not None:
                log.seek(0)
                sys.exit(f"{' '.join(command)} ended:\n{log.read().decode()[-3000:]}")


@contextmanager
def backend(weights: str, pictures: Sequence[Path], folder: Path) -> Iterator[Backend]:
    """A server of these weights that has looked at each picture once."""
    upload = folder / "data" / "upload" / "1"
    upload.mkdir(parents=True)
    for number, picture in enumerate(pictures):
        (upload / f"{number}.jpg").symlink_to(picture.resolve())
    cv2.imwrite(
        str(upload / "large.jpg"), np.add.outer(np.arange(3000).astype(np.uint8), np.zeros((4000, 3), np.uint8))
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with files(folder) as label_studio:
        environment = {
            "YOLONAS_WEIGHTS": weights,
            "YOLONAS_PORT": str(port),
            "YOLONAS_STATE_DIR": str(folder / "state"),
            "YOLONAS_LABEL_STUDIO_URL": label_studio,
            "YOLONAS_LABEL_STUDIO_TOKEN": "",
        }
        with process(sys.executable, "-m", "labelstudio_backend.cli", "serve", **environment) as server:
            found = Backend(f"http://127.0.0.1:{port}", len(pictures), server.pid)
            with found.client() as http:
                while server.poll() is None:
                    try:
                        http.post("/setup", json={"project": UID, "schema": CONFIG, "hostname": label_studio})
                        break
                    except httpx.TransportError:
                        time.sleep(0.5)
                answered = [found.ask(http, 1)[1] for _ in range(len(pictures))]
            if not all(answered):
                sys.exit(f"the backend answered {sum(answered)} of {len(pictures)} pictures")
            yield found


@contextmanager
def training(shared: Path) -> Iterator[None]:
    """A training as the backend runs it, which goes on for as long as it is measured."""
    with tempfile.TemporaryDirectory() as folder:
        begun = Path(folder) / "begun"
        with process(sys.executable, __file__, "--shared", str(shared), "--train-in", folder) as child:
            while not begun.exists() and child.poll() is None:
                time.sleep(0.5)
            yield


def train_in(folder: Path, shared: Path) -> None:
    """What the process of `training` does."""
    from labelstudio_backend.training_job import NICENESS

    os.nice(NICENESS)
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    import torch

    torch.set_num_threads(max(1, torch.get_num_threads() - 1))
    from yolonas.training.recipe import Recipe
    from yolonas.training.trainer import train

    images, val = (read_dataset(shared / "data" / "bccd", part) for part in ("train", "val"))
    recipe = Recipe.auto(images, "n", val=val, epochs=10_000)
    began = (folder / "begun").touch
    train(images, val, recipe=recipe, out_dir=folder / "run", variant="n", on_epoch=lambda _: began())


def named(weights: str, folder: Path) -> str:
    """A file of random weights for a variant's letter, whose scores are all low: the time is that of the network."""
    if len(weights) > 1:
        return weights
    file = folder / f"random_{weights}.safetensors"
    if not file.exists():
        checkpoint.save(checkpoint.Checkpoint(YoloNAS(weights, num_classes=len(LABELS), class_names=LABELS)), file)
    return str(file)


def measure(report: Report, weights: str, backend: Backend, seconds: float, beside: str) -> None:
    report.table(f"## {weights}{beside}", "images in a request", "clients", "requests", "images/s", "p50 ms", "p99 ms")
    for tasks in (1, 8):
        for clients in CLIENTS:
            seen = load(backend, clients, tasks, seconds)
            rate, p50, p99 = seen.images / seen.seconds, seen.percentile(0.5), seen.percentile(0.99)
            report.row(tasks, clients, len(seen.latencies), f"{rate:.1f}", f"{p50:.0f}", f"{p99:.0f}")
    report.table(
        f"One who draws, with {PAUSE:g} s between requests, {weights}{beside}", "beside", "requests", "p50 ms", "p99 ms"
    )
    alone = load(backend, 1, 1, seconds, PAUSE)
    report.row("nothing", len(alone.latencies), f"{alone.percentile(0.5):.0f}", f"{alone.percentile(0.99):.0f}")
    drawing, many = beside_a_batch_action(backend, seconds)
    report.row(
        f"batch actions on {MANY} tasks",
        len(drawing.latencies),
        f"{drawing.percentile(0.5):.0f}",
        f"{drawing.percentile(0.99):.0f}",
    )
    answered, took = many.images / len(many.latencies), statistics.mean(many.latencies)
    report.text(f"\nEach of those batch actions had {answered:.0f} of {MANY} tasks answered, in {took:.0f} s.")
    if not beside:
        before, most = memory(backend)
        report.text(
            f"\nFour batch actions at once, each on {MANY} photographs of 12 megapixels (36 MB decoded), took the "
            f"server from {before:.0f} to {most:.0f} MB at most."
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into results/serving_<processor>.md")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each figure")
    parser.add_argument("--training", action="store_true", help="measure again while a training runs")
    parser.add_argument("--weights", nargs="+", default=["yolo_nas_n_bccd", "s"])
    parser.add_argument("--shared", type=Path, default=REPOSITORY.parent / "shared")
    parser.add_argument("--train-in", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train_in:
        train_in(options.train_in, options.shared)
        return
    runtime = runtime_of(Settings())
    command = " ".join(["python", "tests/bench/serving.py", *sys.argv[1:]])
    report = Report("The backend under load", f"{SHOWN[runtime]} {version(runtime)}", command)
    parts = [read_dataset(options.shared / "data" / "bccd", part) for part in ("train", "val")]
    pictures = [image.path for part in parts for image in part.images]
    for weights in options.weights:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            with backend(named(weights, folder), pictures, folder) as running:
                measure(report, weights, running, options.seconds, "")
                if options.training:
                    with training(options.shared):
                        measure(report, weights, running, options.seconds, ", while a training runs")
    report.finish()
    if options.write:
        report.write("serving")


if __name__ == "__main__":
    main()

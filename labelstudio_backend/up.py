"""`yolonas-labelstudio up`: Label Studio, the backend and a sample project on this machine, with one command."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
import threading
import webbrowser
from collections.abc import Iterator, Sequence, Set
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import IO, Any

import click

from labelstudio_backend import local_label_studio, sample_project
from labelstudio_backend.backend import Credentials
from labelstudio_backend.cli import read_settings
from labelstudio_backend.client import LabelStudio
from labelstudio_backend.connect import connect_project
from labelstudio_backend.job import Job
from labelstudio_backend.job_runner import JobRunner
from labelstudio_backend.jobs import Jobs
from labelstudio_backend.local_label_studio import Account, Process
from labelstudio_backend.registry import Registry
from labelstudio_backend.settings import UNTRAINED, default_state_dir
from yolonas.atomic import atomic_file
from yolonas.errors import YolonasError

PORT, BACKEND_PORT = 8080, 9090
SAMPLE_IMAGES = 36
LABELLED_IMAGES = 20
TRAIN_EVERY = 8
TRAIN_MINUTES = 3.0
SERVE_SECONDS = 180.0  # importing torch on a slow disk takes a while


@click.command()
@click.option(
    "--dir",
    "folder",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where everything is kept, for the next time too.  [default: ~/.local/share/yolonas/up]",
)
@click.option("--port", type=int, help=f"Port of Label Studio.  [default: {PORT}, or a free one]")
@click.option("--backend-port", type=int, help=f"Port of the backend.  [default: {BACKEND_PORT}, or a free one]")
@click.option("--weights", default="auto", show_default=True, help="What to start from, as for `serve`.")
@click.option(
    "--images",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="A folder of your own images, which become the project.  [default: drawn samples, some of them labelled]",
)
@click.option("--labels", help="Names of what to label in --images: a,b,c.  [default: the classes of --weights]")
@click.option("--no-browser", is_flag=True, help="Do not open a browser window.")
def up(
    folder: Path | None,
    port: int | None,
    backend_port: int | None,
    weights: str,
    images: Path | None,
    labels: str | None,
    no_browser: bool,
) -> None:
    """Run Label Studio, the backend and a project on this machine, until Ctrl-C.

    The first start installs Label Studio in an environment of its own (1 GB, a few minutes). The next one finds its
    projects, labels and versions again.
    """
    read_settings()  # what is wrong with them is told before anything is installed
    with _until_told(), ExitStack() as stack:
        try:
            up = _Up(folder or default_state_dir() / ("up-images" if images else "up"), stack)
            up.choose(images, weights, [name.strip() for name in (labels or "").split(",") if name.strip()])
            up.run(port, backend_port, not no_browser)
        except KeyboardInterrupt:
            click.echo("\nStopping Label Studio and the backend ...")
    click.echo("All stopped.")


@contextmanager
def _until_told() -> Iterator[None]:
    """SIGTERM and a closed terminal end the command as Ctrl-C does, once; while stopping they are not heard."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        for name in signals:
            signal.signal(name, signal.SIG_IGN)
        raise KeyboardInterrupt

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {name: signal.signal(name, interrupt) for name in signals}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


class _Up:
    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder, self.stack = folder.absolute(), stack
        self.folder.mkdir(parents=True, exist_ok=True)
        self.account = Account.of(self.folder)
        self.state_path = self.folder / "up.json"
        stack.enter_context(self._alone())
        self.state: dict[str, Any] = json.loads(self.state_path.read_text()) if self.state_path.exists() else {}

    @contextmanager
    def _alone(self) -> Iterator[IO[str]]:
        with (self.folder / "up.lock").open("a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise YolonasError(
                    f"{self.folder} is in use by another `up`; stop that one or give another --dir."
                ) from None
            yield lock

    def _remember(self, **values: Any) -> None:
        self.state |= values
        with atomic_file(self.state_path) as stream:
            stream.write(json.dumps(self.state).encode())

    def choose(self, images: Path | None, weights: str, labels: Sequence[str]) -> None:
        """What the project is of: `images` to be labelled with `labels`, or the samples; it stays what it was.

        So do the weights that projects start from, unless others are asked for.
        """
        if weights != "auto" or "weights" not in self.state:
            self._remember(weights=weights)
        if "project" in self.state:
            if images and str(images.absolute()) != self.state.get("images"):
                kept = self.state.get("images", "the sample images")
                raise YolonasError(f"{self.folder} has a project of {kept}: give another --dir for {images}")
            return
        if images is None:
            if labels:
                raise YolonasError("--labels are for your own images: give --images too")
            return
        if not image_files(images):
            raise YolonasError(f"the folder {images} holds no image: give --images another")
        self._remember(images=str(images.absolute()), labels=list(labels) or class_names_of(weights))

    def run(self, port: int | None, backend_port: int | None, browser: bool) -> None:
        """Start everything and wait for Ctrl-C."""
        from labelstudio_backend.version import choose_weights

        # The port belongs to the address under which the backend knows the projects: it stays.
        kept = self.state.get("port")
        if kept and port and port != kept:
            raise YolonasError(
                f"the versions trained in {self.folder} belong to Label Studio on port {kept} and would not be found "
                f"from port {port}; use --port {kept} or another --dir."
            )
        other = "give another --dir, as this one's versions belong to that port" if kept else "give another --port"
        self._remember(port=_port(port or kept, PORT, "Label Studio", other))
        usual = self.state.get("backend_port", BACKEND_PORT)
        backend = _port(backend_port, usual, "the backend", "give another --backend-port")
        self._remember(backend_port=backend)
        local_label_studio.install(click.echo)
        chosen, sentence = choose_weights(self.state["weights"])
        click.echo(f"New projects start from {sentence}.")
        url = f"http://127.0.0.1:{self.state['port']}"
        click.echo(f"Starting Label Studio at {url}" + (" (the first start takes a minute)" if self._is_new() else ""))
        studio = local_label_studio.start(self.folder / "label-studio", self.state["port"], self.account)
        self.stack.callback(studio.stop)
        click.echo("Starting the backend")
        server = self._serve(url, chosen)
        with LabelStudio(url, self.account.token) as client:
            row = self._project(client)
        self._say_what_next(url, row)
        # Without a screen Python may pick a browser for the terminal, which would take it over.
        if browser and (sys.platform == "darwin" or {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ)):
            webbrowser.open(self._project_url(url))
        self._watch([studio, server])

    def _is_new(self) -> bool:
        return not (self.folder / "label-studio").exists()

    def _serve(self, url: str, weights: str) -> Process:
        """The backend as a process."""
        state_dir = self.folder / "backend"
        environment = {
            "YOLONAS_TRAIN_MINUTES": str(TRAIN_MINUTES),
            "YOLONAS_TRAIN_EVERY": str(TRAIN_EVERY),  # the labelled samples are more: a first training begins by itself
            "YOLONAS_RECONCILE_SECONDS": "10",
            **({"YOLONAS_IMAGE_SIZE": "320"} if weights == UNTRAINED else {}),
            **local_label_studio.past_proxies(os.environ),
            "YOLONAS_STATE_DIR": str(state_dir),
            "YOLONAS_HOST": "127.0.0.1",
            "YOLONAS_PORT": str(self.state["backend_port"]),
            "YOLONAS_WEIGHTS": weights,
            "YOLONAS_LABEL_STUDIO_URL": url,
            "YOLONAS_LABEL_STUDIO_TOKEN": self.account.token,
        }
        command = [sys.executable, "-m", "labelstudio_backend.cli", "serve"]
        # Should the backend not end in time, its trainings, which have sessions of their own, are ended here.
        self.stack.callback(JobRunner(Jobs(state_dir / "jobs.sqlite"), Registry(state_dir / "projects")).stop)
        server = Process("The backend", command, environment, self.folder / "backend.log")
        self.stack.callback(server.stop, 45.0)
        server.wait_until(lambda: local_label_studio.answers(f"{self._backend_url()}/health"), SERVE_SECONDS)
        return server

    def _backend_url(self) -> str:
        return f"http://127.0.0.1:{self.state['backend_port']}"

    def _project_url(self, url: str) -> str:
        return f"{url}/projects/{self.state['project']}/data"

    # -- the sample project ----------------------------------------------------------------------------------------

    def _project(self, client: LabelStudio) -> dict[str, Any]:
        """The sample project and Label Studio's row of the backend in it, made where they are not there yet."""
        known = {project["id"] for project in client.projects()}
        if self.state.get("project") not in known or not self.state.get("filled", True):
            self._make_project(client, known)
        project, url, earlier = int(self.state["project"]), self._backend_url(), self.state.get("connected", "")
        row = next((row for row in client.ml_backends(project) if row["url"].rstrip("/") in (url, earlier)), None)
        if row is None or row["url"].rstrip("/") != url:  # another port than the last time
            # the order of the label stream is the person's choice once it is connected
            credentials = Credentials.of(read_settings())
            row = connect_project(client, project, url, credentials, earlier=earlier, sampling=row is None).row
            assert row is not None  # this is no dry run
        self._remember(connected=url)
        return row

    def _make_project(self, client: LabelStudio, known: Set[int]) -> None:
        """Make the sample project, or what is missing of one that an earlier start was stopped in."""
        from yolonas.data.samples import generate

        if "images" in self.state:
            self._fill_with_images(client, known)
            return
        click.echo(f"Drawing {SAMPLE_IMAGES} sample images and making a project of them")
        data = generate(self.folder / "images", SAMPLE_IMAGES)
        if self.state.get("project") not in known:
            made = client.create_project(sample_project.TITLE, sample_project.label_config(data.names))
            self._remember(project=int(made["id"]), filled=False)
        project = int(self.state["project"])
        tasks = sample_project.upload(client, project, [image.path for image in data.images])
        labelled = {int(task["id"]) for task in client.iter_tasks(project, only_annotated=True, fields="task_only")}
        # The last ones are labelled, so that the person begins with what is left at the top of the list.
        for task, image in list(zip(tasks, data.images, strict=True))[-LABELLED_IMAGES:]:
            if task not in labelled:
                sample_project.annotate(client, task, image, data.names)
        self._remember(filled=True)

    def _fill_with_images(self, client: LabelStudio, known: Set[int]) -> None:
        folder, labels = Path(self.state["images"]), self.state["labels"]
        if self.state.get("project") not in known:
            made = client.create_project(folder.name, sample_project.label_config(labels))
            self._remember(project=int(made["id"]), filled=False)
        paths = image_files(folder)
        with click.progressbar(length=len(paths), label=f"Uploading {len(paths)} images") as bar:
            sample_project.upload(client, int(self.state["project"]), paths, bar.update)
        self._remember(filled=True)

    # -- what the person sees --------------------------------------------------------------------------------------

    def _say_what_next(self, url: str, row: dict[str, Any]) -> None:
        if "images" in self.state:
            now = f"{row['model_version']} draws the boxes that it knows when you open an image."
        elif str(row["model_version"]).endswith("-v0"):
            now = f"{LABELLED_IMAGES} of {SAMPLE_IMAGES} images are labelled, and a first training learns from them:"
            now += "\n     its progress is shown here. Then every image gets boxes from it."
        else:
            now = f"Every image has boxes from {row['model_version']}."
        click.echo(
            f"\n  Label Studio   {self._project_url(url)}\n"
            f"  Login          {self.account.email}\n"
            f"  Password       {self.account.password}\n\n"
            f"  1. Log in. {now}\n"
            "  2. Open images without labels, correct the boxes, submit.\n"
            f"  3. Correct {TRAIN_EVERY} of them, or start a training under Settings > Model: the next version learns\n"
            "     from them, and serves if it is no worse.\n\n"
            f"  Everything is kept in {self.folder}. Ctrl-C stops all of it.\n"
        )

    def _watch(self, processes: Sequence[Process]) -> None:
        """Show what the trainings do until one of the processes ends, or Ctrl-C."""
        jobs = Jobs(self.folder / "backend" / "jobs.sqlite")
        told: dict[int, str] = {job.id: _line(job) for job in jobs.find(brief=True) if job.finished is not None}
        pause = threading.Event()
        while all(process.running for process in processes):
            for job in jobs.find(brief=True):
                line = _line(job)
                if told.get(job.id) != line:
                    told[job.id] = line
                    click.echo(line)
            pause.wait(1.0)
        dead = next(process for process in processes if not process.running)
        raise YolonasError(f"{dead.name} has ended; its log is {dead.log}.")


def image_files(folder: Path) -> list[Path]:
    """The images directly in a folder, by name."""
    from yolonas.inference.sources import IMAGE_SUFFIXES

    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())


def class_names_of(weights: str) -> list[str]:
    """The classes of the weights a project starts from, as its labels."""
    from labelstudio_backend.version import choose_weights
    from yolonas import checkpoint
    from yolonas.weights import resolve

    chosen, _ = choose_weights(weights)
    if chosen == UNTRAINED:
        raise YolonasError("nothing says what to label: give --labels a,b,c, or --weights that know some classes")
    return list(checkpoint.load(resolve(chosen)).model.class_names)


def _port(wanted: int | None, usual: int, what: str, other: str) -> int:
    """`wanted` if it is free, else an error; without a wish the usual one, or any that is free."""
    port = local_label_studio.free_port(wanted or usual)
    if wanted and port != wanted:
        raise YolonasError(f"port {wanted} of {what} is taken by another program; stop that, or {other}.")
    return port


def _line(job: Job) -> str:
    if job.state == "running":
        tenths = int(job.progress * 10) * 10  # a line now and then, not one for every epoch
        return f"Training {job.id}: {tenths:2d} % {job.reason.partition(',')[0].partition(':')[0]}"
    end = {"queued": "waits", "succeeded": f"{job.version} serves"}.get(job.state, job.state)
    return f"Training {job.id}: {end}{': ' + job.reason if job.finished else ''}"

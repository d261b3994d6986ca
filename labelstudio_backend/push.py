"""`yolonas-labelstudio push`: predicts all tasks of a project, in chunks, for what one request cannot hold.

The running backend is asked, as Label Studio asks it: it has the version that serves in memory, the images and the
label mapping, so nothing is loaded twice and `push` runs on any machine. The answers go into Label Studio's bulk
import, which stores a prediction in about a millisecond, where its own batch action takes a hundred. Which tasks are
done is asked of Label Studio each time, so there is nothing to remember between two runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import click

from labelstudio_backend.backend import UNREACHABLE, Backend, BackendError, Credentials, find_row
from labelstudio_backend.cli import settings_from
from labelstudio_backend.client import LabelStudio, project_uid
from labelstudio_backend.label_studio_http import LabelStudioError
from labelstudio_backend.options import backend_url, label_studio, project_options
from yolonas.errors import YolonasError

T = TypeVar("T")

FIRST_CHUNK, LARGEST_CHUNK = 8, 100  # tasks in one /predict
PREDICT_SECONDS = 120.0  # the backend stops after YOLONAS_PREDICT_SECONDS, 80 s
CHUNK_SECONDS = 15.0  # of one /predict: far below the 80 s after which the backend stops, and short for Ctrl-C
STORED_AT_ONCE = 200  # each import has Label Studio count the predictions of the whole project
HELD_SECONDS = 20.0
AWAY_SECONDS = 300.0  # how long Label Studio or the backend may be away
LONGEST_PAUSE = 15.0
EMPTY_CHUNKS = 3  # in a row without one prediction: something else than an image is wrong
PASSES = 2  # a task that got nothing is asked for once more
SHOWN = 5


class PushError(YolonasError):
    """Predictions that cannot be made or stored; the message says what to do."""


@dataclass
class Pushed:
    """What came of it: the version, the tasks that have its prediction, those stored now, and those without."""

    version: str
    tasks: int
    stored: int
    left: list[int]
    interrupted: bool = False


@click.command()
@project_options
@click.option("--url", callback=backend_url, help="The backend's address from here.  [default: as Label Studio has it]")
def push(project: int, url: str | None, **options: Any) -> None:
    """Predict all tasks of a project that have no prediction of the version that serves.

    For projects that are too large for Label Studio's own batch action, which sends all tasks in one request. It asks
    the running backend, in chunks, and may be stopped by Ctrl-C and started again: what is there is not made twice.
    """
    settings = settings_from(**options)
    with label_studio(settings) as client:
        rows = client.ml_backends(project)
        row = find_row(rows, project, url) or find_row(rows, project, None)
        if row is None:
            raise PushError(f"project {project} has no backend of ours: run `yolonas-labelstudio connect` first")
        if row.get("state") in UNREACHABLE:
            raise PushError(f"Label Studio does not reach the backend at {row['url']}: `yolonas-labelstudio doctor`")
        with Backend(url or row["url"], Credentials.of(settings)) as backend, _Bar() as bar:
            pushed = push_project(client, backend, project, str(row["model_version"]), bar.show)
    if pushed.interrupted:
        click.echo(f"Stopped; {pushed.stored} predictions were stored. The same command goes on with the rest.")
        raise click.exceptions.Exit(130)
    click.echo(
        f"{pushed.tasks - len(pushed.left)} of {pushed.tasks} tasks have a prediction of {pushed.version}, "
        f"{pushed.stored} of them made now."
    )
    if pushed.left:
        some = ", ".join(map(str, pushed.left[:SHOWN])) + (", ..." if len(pushed.left) > SHOWN else "")
        click.echo(f"Without: {some}. The log of the backend says why; `doctor` tries some images.", err=True)
        raise click.exceptions.Exit(1)


def push_project(
    client: LabelStudio,
    backend: Backend,
    project: int,
    version: str,
    show: Callable[[int, int, str], object] = lambda done, total, note: None,
    pause: Callable[[float], object] = time.sleep,
) -> Pushed:
    """Predict the tasks of a project that have no prediction of its version, and store the predictions.

    Ctrl-C ends it after what was predicted is stored.

    Args:
        client: of the Label Studio.
        backend: the backend that serves the project.
        project: the project's ID.
        version: what the backend serves; where it serves another one meanwhile, that one counts.
        show: is told how many tasks are done, of how many, and what it is waiting for, if for anything.
        pause: waits some seconds.

    Raises:
        LabelStudioError: Label Studio refused, or stayed away.
        PushError: the backend refused, stayed away, or predicts nothing.
    """
    pusher = _Pusher(client, backend, project, version, show, pause)
    try:
        interrupted = pusher.run()
        return Pushed(pusher.version, pusher.total, pusher.stored, pusher.left, interrupted)
    except BackendError as error:
        raise PushError(str(error)) from error


class _Bar:
    """The line of progress, where there is a terminal."""

    def __enter__(self) -> _Bar:
        from tqdm import tqdm

        self._bar = tqdm(unit="task", leave=False, disable=None)
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def show(self, done: int, total: int, note: str) -> None:
        if self._bar.total is None:
            self._bar.initial = self._bar.n = done  # so that the speed is of this run
        self._bar.total = total
        self._bar.set_description_str(note, refresh=False)
        self._bar.update(done - self._bar.n)
        self._bar.refresh()


class _Pusher:
    def __init__(
        self,
        client: LabelStudio,
        backend: Backend,
        project: int,
        version: str,
        show: Callable[[int, int, str], object],
        pause: Callable[[float], object],
    ) -> None:
        self.client, self.backend, self.project, self.version = client, backend, project, version
        self._show, self._pause = show, pause
        self.held: dict[int, dict[str, Any]] = {}  # predictions that are not stored yet
        self.held_since = time.monotonic()
        self.total = self.stored = self.done = self.empty = 0
        self.left: list[int] = []
        self.chunk = FIRST_CHUNK

    def run(self) -> bool:
        """Predict and store everything; whether it was interrupted."""
        passes = 0
        try:
            while passes < PASSES:
                version, again = self.version, self._pass()
                passes = passes + 1 if self.version == version else 0
                if not again:
                    break
        except KeyboardInterrupt:
            self._tell("storing what was predicted")
            self._store()
            return True
        missing = self._patiently(self._missing)
        self.left = [int(task["id"]) for task in missing]
        # A task that somebody opened while it was predicted, or an import that ended after we had given it up.
        if self._patiently(lambda: self.client.model_versions(self.project)).get(self.version, 0) > (
            self.total - len(missing)
        ):
            self.client.delete_second_predictions(self.project, self.version)
        return False

    def _pass(self) -> bool:
        """Ask for every task that has no prediction of the version; whether there is reason for another pass."""
        state = self._patiently(lambda: self.client.get_project(self.project))
        missing = self._patiently(self._missing)
        self.total = int(state["task_number"])
        self.done, silent = self.total - len(missing), 0
        self._tell()
        while missing:
            chunk = missing[: self.chunk]
            answers = self._ask(chunk, project_uid(state), state["label_config"])
            if answers is None:
                continue  # with a smaller one
            missing = missing[len(chunk) :]
            predictions = _predictions(chunk, answers)
            version = next((p["model_version"] for p in predictions), self.version)
            if version != self.version:  # a training has ended: everything is to be predicted with the new version
                self._store()
                self.version = version
                self._hold(predictions)
                self._store()
                return True
            self._hold(predictions)
            silent += len(chunk) - len(predictions)
            self.empty = 0 if predictions else self.empty + 1
            if self.empty == EMPTY_CHUNKS:
                self._store()
                raise PushError(
                    f"the backend at {self.backend.url} answers without any prediction; its log says why, and "
                    "`yolonas-labelstudio doctor` checks images and labels"
                )
            if len(self.held) >= STORED_AT_ONCE or time.monotonic() - self.held_since > HELD_SECONDS:
                self._store()
        self._store()
        return silent > 0

    def _missing(self, tasks: Iterable[int] | None = None) -> list[dict[str, Any]]:
        """The tasks (of these) that have no prediction of the version."""
        versions = self.client.model_versions(self.project)
        return list(self.client.unpredicted_tasks(self.project, self.version, versions, tasks))

    # -- the backend -----------------------------------------------------------------------------------------------

    def _ask(self, chunk: Sequence[Mapping[str, Any]], uid: str, label_config: str) -> list[Any] | None:
        """The backend's answers for the tasks, in order; None where it could not answer so many."""
        body = {
            "tasks": [{"id": task["id"], "data": task["data"], "project": self.project} for task in chunk],
            "project": uid,
            "label_config": label_config,
            "params": {"context": None},
        }

        def ask() -> list[Any] | None:
            try:
                answers = self.backend.call("predict", body, seconds=PREDICT_SECONDS).get("results")
            except BackendError as error:
                if error.status == 413 and len(chunk) > 1:
                    return None
                raise
            if not isinstance(answers, list) or len(answers) != len(chunk):
                raise PushError(f"{self.backend.url}/predict did not answer one result for each task")
            return answers

        begun = time.monotonic()
        answers = self._patiently(ask)
        seconds = max(time.monotonic() - begun, 0.01)
        fitting = int(len(chunk) * CHUNK_SECONDS / seconds)
        self.chunk = len(chunk) // 2 if answers is None else max(1, min(LARGEST_CHUNK, len(chunk) * 2, fitting))
        return answers

    # -- Label Studio ----------------------------------------------------------------------------------------------

    def _hold(self, predictions: Sequence[dict[str, Any]]) -> None:
        if not self.held:
            self.held_since = time.monotonic()
        self.held |= {p["task"]: p for p in predictions if p["model_version"] == self.version}
        self._tell()

    def _store(self) -> None:
        """Store what is held, except for tasks that somebody has had predicted since, or that are gone."""
        try:
            self._patiently(self._import)
        except LabelStudioError as error:
            if error.status != 400:
                raise
            self._patiently(self._import)  # one of the tasks was deleted just now, perhaps

    def _import(self) -> None:
        """One try; an import whose answer was lost may have been carried out, so it first looks at what is missing."""
        if not self.held:
            return
        missing = {int(task["id"]) for task in self._missing(self.held)}
        self.done += len(self.held) - len(missing)
        self.held = {task: prediction for task, prediction in self.held.items() if task in missing}
        if self.held:
            self.stored += self.client.import_predictions(self.project, list(self.held.values()))
            self.done += len(self.held)
            self.held = {}

    def _patiently(self, work: Callable[[], T]) -> T:
        """Do it, and again while Label Studio or the backend is away."""
        deadline, wait = time.monotonic() + AWAY_SECONDS, 1.0
        while True:
            try:
                return work()
            except (LabelStudioError, BackendError) as error:
                if not _passing(error) or time.monotonic() > deadline:
                    raise
                who = "Label Studio" if isinstance(error, LabelStudioError) else "the backend"
                self._tell(f"waiting for {who}")
            self._pause(wait)
            wait = min(2 * wait, LONGEST_PAUSE)

    def _tell(self, note: str = "") -> None:
        self._show(self.done + len(self.held), self.total, note or self.version)


def _passing(error: LabelStudioError | BackendError) -> bool:
    return error.status in (None, 429, 502, 503, 504)


def _predictions(tasks: Sequence[Mapping[str, Any]], answers: Sequence[Any]) -> list[dict[str, Any]]:
    """What the backend answered as Label Studio's import takes it; a task that failed or was not reached has none."""
    found = []
    for task, answer in zip(tasks, answers, strict=True):
        prediction = answer[0] if isinstance(answer, list) and answer else answer
        if isinstance(prediction, Mapping):
            values = {key: prediction.get(key) for key in ("result", "score", "model_version")}
            found.append({"task": int(task["id"]), **values})
    return found

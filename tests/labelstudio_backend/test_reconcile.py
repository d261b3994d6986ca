from __future__ import annotations

import base64
import errno
import logging
import os
import shutil
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import httpx
import numpy as np
import pytest

from labelstudio_backend import reconcile
from labelstudio_backend.client import LabelStudio
from labelstudio_backend.corrections import Correction
from labelstudio_backend.jobs import Jobs
from labelstudio_backend.label_studio_http import LabelStudioError
from labelstudio_backend.learnt import FEATURES, write_features
from labelstudio_backend.locks import try_lock
from labelstudio_backend.media import MediaCache
from labelstudio_backend.owed import Owed
from labelstudio_backend.reconcile import Reconciler
from labelstudio_backend.registry import ProjectRegistry, Registry
from labelstudio_backend.service import Service
from labelstudio_backend.settings import Settings
from labelstudio_backend.training_data import build
from real_label_studio import wait
from yolonas.active_learning import BACKGROUND, ImageSignals
from yolonas.inference.detections import Detections
from yolonas.labelstudio import parse_label_config

CREATED = "2026-11-21T19:38:18.810449Z"
UID = "5.1795289898"
CONFIG = (
    '<View><Image name="i" value="$image"/>'
    '<RectangleLabels name="l" toName="i"><Label value="Car"/></RectangleLabels></View>'
)


class FakeLabelStudio:
    """One project of Label Studio as its API shows it, with the habits that facts were gathered about."""

    def __init__(self, tasks: int = 6) -> None:
        self.project = {
            "id": 5,
            "created_at": CREATED,
            "label_config": CONFIG,
            "model_version": "my model",
            "task_number": tasks,
        }
        self.rows = [
            {"id": 1, "project": 5, "url": "http://b", "title": "my model", "state": "CO", "model_version": ""}
        ]
        self.tasks = {
            n: {"id": n, "updated_at": f"2026-01-01T00:00:{n:02d}Z", "annotations": [], "is_labeled": False}
            for n in range(1, tasks + 1)
        }
        self.given: dict[int, list[str]] = {n: [] for n in self.tasks}
        self.asked: list[list[int]] = []
        self.calls = 0
        self.deleted: list[int] = []
        self.away = False
        self.serving = ""
        self.titles_lost = 0  # Label Studio saves the old row over this many PATCHes
        self.silent: set[int] = set()  # tasks for which the backend gives no prediction

    def _call(self) -> None:
        self.calls += 1
        if self.away:
            raise LabelStudioError("no answer from Label Studio")

    def get_project(self, project: int) -> dict[str, Any]:
        self._call()
        return dict(self.project)

    def ml_backends(self, project: int) -> list[dict[str, Any]]:
        self._call()
        self.rows[0]["model_version"] = self.serving  # it calls /setup of each
        return [dict(row) for row in self.rows]

    def patch_ml_backend(self, row: Mapping[str, Any], *, title: str) -> None:
        self._call()
        if self.titles_lost:
            self.titles_lost -= 1
            return
        stored = next(r for r in self.rows if r["id"] == row["id"])
        if self.project["model_version"] == stored["title"]:
            self.project["model_version"] = title
        stored["title"] = title

    def patch_project(self, project: int, *, model_version: str) -> None:
        self._call()
        self.project["model_version"] = model_version

    def iter_tasks(
        self,
        project: int,
        *,
        only_annotated: bool = False,
        filters: Sequence[Mapping[str, Any]] = (),
        fields: str = "all",
        page_size: int = 100,
    ) -> Iterator[dict[str, Any]]:
        self._call()
        for number, task in self.tasks.items():
            given = self.given[number]
            kept = not only_annotated or task["annotations"]
            for item in filters:
                if item["filter"].endswith("updated_at"):
                    kept = kept and task["updated_at"] >= item["value"]
                else:
                    kept = kept and not any(item["value"][0] in version for version in given)
            if kept:
                extra = {"predictions": [{"model_version": v} for v in given]} if fields == "all" else {}
                yield {**task, **extra}

    unpredicted_tasks = LabelStudio.unpredicted_tasks  # as it is, over these tasks

    def retrieve_predictions(self, project: int, tasks: Sequence[int]) -> None:
        self._call()
        self.asked.append(list(tasks))
        for number in tasks:
            if number not in self.silent and self.serving not in self.given[number]:
                self.given[number].append(self.serving)

    delete_second_predictions = LabelStudio.delete_second_predictions
    retitle_ml_backend = LabelStudio.retitle_ml_backend

    def model_versions(self, project: int) -> dict[str, int]:
        self._call()
        given = [version for versions in self.given.values() for version in versions]
        return {version: given.count(version) for version in given}

    def predictions(self, project: int) -> list[dict[str, Any]]:
        pairs = [(task, version) for task, versions in self.given.items() for version in versions]
        return [{"id": n, "task": task, "model_version": version} for n, (task, version) in enumerate(pairs)]

    def delete_prediction(self, prediction: int) -> None:
        self.deleted.append(prediction)

    def annotate(self, *numbers: int, at: int = 30) -> None:
        for number in numbers:
            stamp = f"2026-01-01T00:00:{at:02d}Z"
            annotation = {"id": number * 100 + at, "result": [], "updated_at": stamp}
            self.tasks[number] |= {"updated_at": stamp, "annotations": [annotation], "is_labeled": True}


class Bench:
    """A reconciler on a fake Label Studio, with one project that has a start version."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.settings = Settings(state_dir=folder, **{"train_every": 0, **settings})
        self.registry = Registry(folder / "projects")
        self.project: ProjectRegistry = self.registry.register("http://ls", UID, CONFIG)
        self.project.ensure_start("untrained-n", ["Car"])
        self.jobs = Jobs(folder / "jobs.sqlite")
        self.studio = FakeLabelStudio()
        self.studio.serving = self.project.current().name
        self.reconciler = Reconciler(self.settings, self.registry, self.studio, self.jobs, debounce=0.05)  # type: ignore[arg-type]
        self.checkpoint = folder / "model.safetensors"
        self.checkpoint.write_bytes(b"weights")

    def publish(self) -> str:
        version = self.project.publish(self.checkpoint, {})
        self.studio.serving = version.name
        return version.name

    def reconcile(self) -> None:
        self.reconciler.reconcile(self.project.key)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_the_title_becomes_the_version_and_the_project_follows(bench: Bench) -> None:
    bench.reconcile()
    v0 = bench.project.current().name
    assert (bench.studio.rows[0]["title"], bench.studio.project["model_version"]) == (v0, v0)
    assert bench.studio.asked == [], "the start weights predict when somebody asks"
    v1 = bench.publish()
    bench.reconcile()
    assert (bench.studio.rows[0]["title"], bench.studio.project["model_version"]) == (v1, v1)


def test_a_title_that_is_saved_over_is_set_again(bench: Bench) -> None:
    bench.studio.titles_lost = 2
    bench.reconcile()
    assert bench.studio.rows[0]["title"] == bench.project.current().name
    bench.studio.titles_lost = 99
    bench.publish()
    with pytest.raises(LabelStudioError, match="stays"):
        bench.reconcile()
    bench.studio.titles_lost = 0
    bench.reconcile()
    assert bench.studio.project["model_version"] == bench.project.current().name


def test_predictions_that_somebody_chose_by_hand_stay_chosen(bench: Bench) -> None:
    bench.reconcile()
    bench.studio.project["model_version"] = "imported by hand"
    bench.publish()
    bench.reconcile()
    assert bench.studio.project["model_version"] == "imported by hand"
    bench.studio.project["model_version"] = ""
    bench.reconcile()
    assert bench.studio.project["model_version"] == bench.project.current().name


def test_after_publishing_every_task_is_predicted_again_unlabelled_ones_first(bench: Bench) -> None:
    bench.studio.annotate(1, 2)
    v1 = bench.publish()
    bench.reconcile()
    assert all(v1 in given for given in bench.studio.given.values())
    assert [task for chunk in bench.studio.asked for task in chunk] == [3, 4, 5, 6, 1, 2]
    assert all(len(chunk) <= 4 for chunk in bench.studio.asked)
    asked = len(bench.studio.asked)
    bench.reconcile()
    assert len(bench.studio.asked) == asked, "done is done"
    bench.studio.tasks[7] = {"id": 7, "updated_at": "2026-01-01T00:01:00Z", "annotations": [], "is_labeled": False}
    bench.studio.given[7] = []
    bench.studio.project["task_number"] = 7
    bench.reconcile()
    assert bench.studio.asked[-1] == [7], "a task that came later"


def test_a_full_disk_keeps_label_studio_in_step(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    version = bench.publish()
    monkeypatch.setattr(ProjectRegistry, "tell", full)
    bench.reconcile()
    assert bench.studio.project["model_version"] == version
    assert all(version in given for given in bench.studio.given.values())
    assert "No space left on device" in caplog.text


def test_tasks_that_gave_no_prediction_are_asked_again_later_not_at_once(bench: Bench) -> None:
    bench.studio.silent = {3}
    bench.publish()
    bench.reconcile()
    asked = len(bench.studio.asked)
    bench.reconcile()
    assert len(bench.studio.asked) == asked
    known = bench.reconciler._known[bench.project.key]
    assert 50 < known.retry - time.monotonic() <= 60
    bench.studio.silent = set()
    known.retry = 0.0
    bench.reconcile()
    assert bench.studio.asked[-1] == [3]


@pytest.mark.parametrize(("predict_seconds", "waits"), [(80.0, [60, 120, 240, 3600]), (0.1, [60, 120, 240, 240])])
def test_what_fails_is_asked_again_ever_later_and_what_only_took_its_time_in_a_few_minutes(
    tmp_path: Path, predict_seconds: float, waits: list[int]
) -> None:
    bench = Bench(tmp_path, predict_seconds=predict_seconds)  # a request counts as 0.1 s at least
    bench.studio.silent = {3}
    bench.publish()
    for number, pause in enumerate(waits):
        bench.reconcile()
        known = bench.reconciler._known[bench.project.key]
        assert pause - 10 < known.retry - time.monotonic() <= pause
        known.retry = 0.0
        if number == 2:
            known.failures += 20
    bench.publish()
    bench.reconcile()
    assert 50 < known.retry - time.monotonic() <= 60, "another version may manage"


def test_a_long_prediction_gives_other_projects_their_turn(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconcile, "TURN_SECONDS", -1.0)
    bench.studio.silent = {1}
    bench.publish()
    bench.reconcile()
    assert bench.studio.asked == [[1, 2, 3, 4]]
    assert bench.project.key in bench.reconciler._hinted, "it goes on after the others"
    bench.reconcile()
    assert bench.studio.asked == [[1, 2, 3, 4], [5, 6]], "a task that gives nothing is not asked in every turn"
    bench.reconcile()
    assert len(bench.studio.asked) == 2


def test_a_second_prediction_of_a_task_is_deleted(bench: Bench) -> None:
    v0, v1 = bench.project.current().name, bench.publish()
    bench.studio.given[1] = [v0, v0]
    bench.studio.given[5] = [v1, v1]  # somebody opened it while the batch was under way
    bench.reconcile()
    given = bench.studio.predictions(5)
    assert [(given[n]["task"], given[n]["model_version"], given[n - 1]["task"]) for n in bench.studio.deleted] == [
        (5, v1, 5)
    ]


def test_version_names_that_contain_each_other_are_told_apart(bench: Bench) -> None:
    for _ in range(10):
        v10 = bench.publish()
    assert v10.endswith("-v10")
    bench.reconcile()
    v1 = bench.project.rollback(1).name
    bench.studio.serving = v1
    bench.reconcile()
    assert all(v1 in given for given in bench.studio.given.values())


def test_every_n_corrected_tasks_queue_a_training(tmp_path: Path) -> None:
    bench = Bench(tmp_path, train_every=3)
    bench.studio.annotate(1, 2)
    bench.reconcile()
    assert bench.jobs.find() == []
    bench.studio.annotate(3)
    bench.reconcile()
    bench.reconcile()
    (job,) = bench.jobs.find()
    assert (job.state, job.trigger) == ("queued", "3 newly corrected tasks")
    # the job learns from what it finds, one more by now
    bench.studio.annotate(4)
    bench.jobs.claim()
    bench.jobs.report(job.id, manifest={str(n): f"{n * 100 + 30}@2026-01-01T00:00:30Z" for n in (1, 2, 3, 4)})
    bench.jobs.finish(job.id, "refused", "worse")
    bench.reconcile()
    assert len(bench.jobs.find()) == 1
    bench.studio.annotate(1, 2, at=40)  # corrected once more
    bench.studio.annotate(5, at=41)
    bench.reconcile()
    assert bench.jobs.find()[-1].trigger == "3 newly corrected tasks"


def test_labelled_tasks_are_counted_one_by_one_not_all_held_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Task(dict[str, Any]):
        """One that can be counted; it brings the predictions of every version."""

        def __hash__(self) -> int:  # type: ignore[override]
            return id(self)

    alive: weakref.WeakSet[Task] = weakref.WeakSet()
    most = 0
    bench = Bench(tmp_path, train_every=6)
    bench.studio.annotate(*bench.studio.tasks)
    read = bench.studio.iter_tasks

    def iter_tasks(project: int, **options: Any) -> Iterator[Task]:
        nonlocal most
        for values in read(project, **options):
            task = Task(values)
            alive.add(task)
            most = max(most, len(alive))
            yield task
            del task

    monkeypatch.setattr(bench.studio, "iter_tasks", iter_tasks)
    bench.reconcile()
    assert bench.jobs.find()[0].trigger == "6 newly corrected tasks"
    assert most <= 2  # the one before is let go when the next has come


def test_a_training_that_could_not_pull_is_not_queued_again_at_once(tmp_path: Path) -> None:
    bench = Bench(tmp_path, train_every=1)
    bench.studio.annotate(1)
    bench.reconcile()
    bench.jobs.finish(bench.jobs.find()[0].id, "failed", "Label Studio was away")
    bench.reconcile()
    assert len(bench.jobs.find()) == 1


def test_what_a_failed_training_pulled_is_not_learnt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path, train_every=1)
    bench.studio.annotate(1)
    bench.reconcile()
    job = bench.jobs.claim()
    assert job is not None
    bench.jobs.report(job.id, manifest={"1": "130@2026-01-01T00:00:30Z"})
    bench.jobs.finish(job.id, "failed", "killed by SIGKILL (out of memory, perhaps)")
    bench.reconcile()
    assert len(bench.jobs.find()) == 1, "not at once"
    monkeypatch.setattr(reconcile, "RETRY_SECONDS", 0.0)
    bench.reconcile()
    assert len(bench.jobs.find()) == 2
    again = bench.jobs.claim()
    assert again is not None
    bench.jobs.report(again.id, manifest={"1": "130@2026-01-01T00:00:30Z"})
    bench.jobs.finish(again.id, "succeeded", "better")
    bench.reconcile()
    assert len(bench.jobs.find()) == 2


@pytest.mark.parametrize("pulled", [True, False])
def test_a_cancelled_training_comes_again_only_after_as_many_new_corrections(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pulled: bool
) -> None:
    monkeypatch.setattr(reconcile, "RETRY_SECONDS", 0.0)
    bench = Bench(tmp_path, train_every=2)
    bench.studio.annotate(1, 2)
    bench.reconcile()
    job = bench.jobs.claim()
    assert job is not None
    if pulled:
        bench.jobs.report(job.id, manifest={str(n): f"{n * 100 + 30}@2026-01-01T00:00:30Z" for n in (1, 2)})
    bench.jobs.finish(job.id, "cancelled", "cancelled")
    monkeypatch.setattr(reconcile, "ended_at", lambda job: 1767225635.0)  # 2026-01-01T00:00:35Z
    bench.reconcile()
    bench.studio.annotate(3, at=40)
    bench.reconcile()
    assert len(bench.jobs.find()) == 1
    bench.studio.annotate(1, at=41)
    bench.reconcile()
    assert [job.trigger for job in bench.jobs.find()] == ["2 newly corrected tasks"] * 2


def test_errors_that_differ_each_time_are_remembered_within_a_bound(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.publish()
    bench.studio.rows[0]["state"] = "DI"
    for number in range(reconcile.SAID + 20):
        bench.studio.rows[0]["error_message"] = f"<HTTPConnection object at {number:#x}>"
        bench.reconcile()
        bench.reconcile()
    assert caplog.text.count("HTTPConnection") == reconcile.SAID + 20  # each once
    assert len(bench.reconciler._known[bench.project.key].said) <= reconcile.SAID


def test_another_project_under_the_same_number_is_left_alone(bench: Bench) -> None:
    bench.studio.project["created_at"] = "2026-11-22T19:38:18Z"
    bench.publish()
    bench.reconcile()
    assert bench.studio.rows[0]["title"] == "my model"


def test_a_backend_that_is_not_ours_is_left_alone(bench: Bench) -> None:
    bench.studio.serving = "somebody else"
    bench.reconcile()
    assert bench.studio.rows[0]["title"] == "my model"


def test_a_changed_label_config_is_noted(bench: Bench) -> None:
    bench.studio.project["label_config"] = CONFIG.replace("Car", "Bus")
    bench.reconcile()
    assert bench.project.label_config == CONFIG.replace("Car", "Bus")


def test_the_thread_looks_at_the_start_after_a_hint_and_after_a_job(bench: Bench) -> None:
    bench.reconciler.start()
    try:
        wait(lambda: bench.studio.rows[0]["title"] == bench.project.current().name)
        v1 = bench.publish()
        for _ in range(50):
            bench.reconciler.hint(bench.project.key, "ANNOTATION_CREATED", {})
        wait(lambda: bench.studio.rows[0]["title"] == v1)
        wait(lambda: all(v1 in given for given in bench.studio.given.values()))
        v2 = bench.publish()
        job = bench.jobs.get(bench.jobs.enqueue(bench.project.key, "x"))
        assert job is not None
        bench.reconciler.job_ended(job)
        wait(lambda: bench.studio.rows[0]["title"] == v2)
    finally:
        bench.reconciler.stop()
    assert not bench.reconciler._thread.is_alive()


def test_without_projects_the_thread_sleeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path)
    looks: list[object] = []
    monkeypatch.setattr(bench.registry, "projects", lambda: looks.append(None) or [])
    bench.reconciler.start()
    wait(lambda: bool(looks))
    time.sleep(0.5)
    bench.reconciler.stop()
    assert len(looks) == 1


def test_the_thread_outlives_a_state_folder_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path, reconcile_seconds=0.05)
    looks: list[object] = []

    def unreadable() -> list[ProjectRegistry]:
        looks.append(None)
        raise OSError("Stale file handle")

    with monkeypatch.context() as broken:
        broken.setattr(bench.registry, "projects", unreadable)
        bench.reconciler.start()
        wait(lambda: len(looks) > 1)
    wait(lambda: bench.studio.rows[0]["title"] == bench.project.current().name)
    bench.reconciler.stop()


def test_label_studio_away_is_waited_for_and_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(tmp_path, reconcile_seconds=0.05)
    bench.studio.away = True
    with caplog.at_level(logging.INFO):
        bench.reconciler.start()
        try:
            wait(lambda: bench.studio.calls >= 3)
            assert bench.reconciler._away >= 2
            bench.studio.away = False
            wait(lambda: bench.studio.rows[0]["title"] == bench.project.current().name)
        finally:
            bench.reconciler.stop()
    assert sum("will look again" in record.message for record in caplog.records) == 1
    assert any("answers again" in record.message for record in caplog.records)


# -- what somebody asked of the start weights, and did not get in time


class Asking:
    """The backend as Label Studio asks it: predictions it gives are stored, `[]` is not."""

    config = CONFIG

    def __init__(self, bench: Bench, monkeypatch: pytest.MonkeyPatch, acquisition: Any = "random") -> None:
        self.bench, self.studio, self.acquisition = bench, bench.studio, acquisition
        self.scores: dict[int, float] = {}
        self.enough_for = 10**9  # images, then the time for the request is over
        self.looked = 0
        self.broken = ""
        self.service = self.start()
        monkeypatch.setattr(bench.studio, "retrieve_predictions", self.retrieve)

    def start(self) -> Service:
        fixed: dict[str, Any] = {"label_studio_url": "http://ls", "label_studio_token": "x" * 40}
        changed = Settings(state_dir=self.bench.settings.state_dir, acquisition=self.acquisition, **fixed)
        return Service(changed, self.bench.registry, MediaCache(changed, None), load=lambda version: self)

    names: tuple[str, ...] = ("Car",)
    checkpoint, device = SimpleNamespace(conf=0.25, iou=0.7), "cpu"

    def predict_batch(self, images: list[np.ndarray], **_: Any) -> list[Detections]:
        self.looked += 1
        if self.looked > self.enough_for:
            for ticket in list(self.service.scheduler._tickets):
                self.service.scheduler.give_up(ticket)
        return [Detections(np.zeros((0, 4)), [], [], self.names, image.shape[:2]) for image in images]

    def ask(self, tasks: Sequence[int], gone: Future[None] | None = None) -> list[Any]:
        picture = [{"id": n, "data": {"image": self.broken if n == 3 and self.broken else grey(n)}} for n in tasks]
        body = {"tasks": picture, "project": UID, "label_config": self.config}
        return self.service.predict(body, gone)["results"]

    def retrieve(self, project: int, tasks: Sequence[int]) -> None:
        self.studio.asked.append(list(tasks))
        for number, result in zip(tasks, self.ask(tasks), strict=True):
            if result:
                self.studio.given[number].append(result["model_version"])
                self.scores[number] = result["score"]


def grey(number: int) -> str:
    ok, content = cv2.imencode(".png", np.full((2, 2 + number, 3), number % 256, np.uint8))
    assert ok
    return "data:image/png;base64," + base64.b64encode(content.tobytes()).decode()


@pytest.fixture
def asking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Asking]:
    bench = Bench(tmp_path)
    bench.studio = FakeLabelStudio(300)
    bench.studio.serving = bench.project.current().name
    bench.reconciler._client = bench.studio  # type: ignore[assignment]
    asking = Asking(bench, monkeypatch)
    yield asking
    asking.service.close()


def test_a_batch_action_that_was_answered_in_part_is_finished_with_nothing_doubled(asking: Asking) -> None:
    asking.enough_for = 40
    asking.retrieve(5, range(1, 301))
    v0, given = asking.studio.serving, asking.studio.given
    first = {number for number in given if given[number]}
    assert len(first) == 40
    asking.enough_for = 10**9
    while len(asking.studio.asked) < 2 or asking.bench.project.key in asking.bench.reconciler._hinted:
        asking.bench.reconcile()
    assert all(versions == [v0] for versions in given.values())
    assert not first.intersection(*asking.studio.asked[1:]), "what has its prediction is not asked again"
    asked = len(asking.studio.asked)
    asking.bench.reconcile()
    assert len(asking.studio.asked) == asked


def test_only_what_was_asked_for_is_predicted_by_the_start_weights(asking: Asking) -> None:
    asking.enough_for = 2
    asking.retrieve(5, range(1, 11))
    asking.enough_for = 10**9
    asking.bench.reconcile()
    assert {number for number, versions in asking.studio.given.items() if versions} == set(range(1, 11))


def test_a_task_that_cannot_be_predicted_is_not_owed(asking: Asking) -> None:
    asking.broken, asking.enough_for = "data:image/png;base64,AAAA", 4
    asking.retrieve(5, range(1, 11))
    asking.enough_for = 10**9
    for _ in range(3):
        asking.bench.reconcile()
    assert [number for number in range(1, 11) if not asking.studio.given[number]] == [3]
    assert Owed(asking.bench.project).due() == set()


def test_an_image_that_could_not_be_had_for_a_moment_is_asked_for_again_but_not_all_the_time(asking: Asking) -> None:
    content = base64.b64decode(grey(3).partition(",")[2])
    answers = {"now": httpx.Response(500)}
    asking.service.media._http = httpx.Client(transport=httpx.MockTransport(lambda _: answers["now"]))
    asking.broken = "/data/upload/5/3.png"
    asking.retrieve(5, range(1, 5))
    assert Owed(asking.bench.project).due() == {3}
    for _ in range(3):
        asking.bench.reconcile()
    assert asking.studio.asked == [[1, 2, 3, 4], [3]]
    assert Owed(asking.bench.project).due() == {3}
    answers["now"] = httpx.Response(200, content=content)
    asking.bench.reconciler._known[asking.bench.project.key].retry = 0.0
    asking.bench.reconcile()
    assert [number for number, versions in asking.studio.given.items() if versions] == [1, 2, 3, 4]
    assert Owed(asking.bench.project).due() == set()


def test_what_the_client_gave_up_on_is_owed_and_what_one_task_asked_for_is_not(asking: Asking) -> None:
    gone: Future[None] = Future()
    gone.set_result(None)
    assert asking.ask([1, 2, 3], gone) == [[], [], []]
    assert Owed(asking.bench.project).due() == {1, 2, 3}
    asking.ask([4], gone)
    assert Owed(asking.bench.project).due() == {1, 2, 3}
    asking.ask([2])
    assert Owed(asking.bench.project).due() == {1, 3}


def test_a_killed_server_owes_what_it_was_working_on(asking: Asking, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("labelstudio_backend.owed.GIVEN_UP_SECONDS", 0.0)

    def killed(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(asking.service.models, "start_loading", killed)
    with pytest.raises(KeyboardInterrupt):
        asking.ask([1, 2, 3])
    assert Owed(asking.bench.project).due() == {1, 2, 3}
    monkeypatch.undo()
    asking.service.close()
    asking.service = asking.start()
    monkeypatch.setattr(asking.studio, "retrieve_predictions", asking.retrieve)
    asking.bench.reconcile()
    assert [number for number, versions in asking.studio.given.items() if versions] == [1, 2, 3]
    assert Owed(asking.bench.project).due() == set()


def test_a_request_that_is_being_answered_is_not_asked_for_twice(asking: Asking) -> None:
    during: list[int] = []

    def reconcile_meanwhile(images: list[np.ndarray], **options: Any) -> list[Detections]:
        asking.bench.reconcile()
        during.append(len(asking.studio.asked))
        return Asking.predict_batch(asking, images, **options)

    asking.predict_batch = reconcile_meanwhile  # type: ignore[method-assign]
    asking.retrieve(5, [1, 2])
    assert during == [1, 1]


def test_what_start_weights_owe_is_no_matter_once_a_trained_version_has_predicted_all(asking: Asking) -> None:
    asking.enough_for = 2
    asking.retrieve(5, range(1, 11))
    asking.enough_for = 10**9
    v1 = asking.bench.publish()
    asking.service.preload(asking.bench.project.key)
    while not all(v1 in versions for versions in asking.studio.given.values()):
        asking.bench.reconcile()
    assert Owed(asking.bench.project).due() == set()


def test_a_batch_action_cut_short_under_a_trained_version_is_finished_too(asking: Asking) -> None:
    v1 = asking.bench.publish()
    asking.service.preload(asking.bench.project.key)
    while not all(v1 in versions for versions in asking.studio.given.values()):
        asking.bench.reconcile()
    for versions in asking.studio.given.values():  # somebody deletes the predictions and asks for ten again
        versions.clear()
    asking.looked, asking.enough_for = 0, 3
    asking.retrieve(5, range(1, 11))
    assert sum(bool(asking.studio.given[number]) for number in range(1, 11)) == 3
    asking.enough_for = 10**9
    asking.bench.reconcile()
    assert all(asking.studio.given[number] == [v1] for number in range(1, 11))
    assert Owed(asking.bench.project).due() == set()


def test_a_task_that_is_late_each_time_does_not_hold_up_what_is_promised_since(asking: Asking) -> None:
    asking.enough_for = 0
    for _ in range(3):
        asking.retrieve(5, [1, 2])
        asking.bench.reconcile()
    asking.retrieve(5, [4, 5])
    asking.enough_for = 10**9
    asking.bench.reconcile()
    assert all(asking.studio.given[number] for number in (1, 2, 4, 5))


def test_drawing_on_a_task_does_not_take_its_promise(asking: Asking) -> None:
    asking.enough_for = 0
    asking.retrieve(5, [1, 2])
    asking.enough_for = 10**9
    drawing = {"tasks": [{"id": 1, "data": {"image": grey(1)}}], "project": UID, "label_config": CONFIG}
    asking.service.predict(drawing | {"params": {"context": {"result": []}}})
    assert Owed(asking.bench.project).due() == {1, 2}


def test_a_project_that_another_server_is_about_is_left_to_it_and_looked_at_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconcile, "ELSEWHERE_SECONDS", 0.01)
    lock = try_lock(bench.project.path / ".reconciling")
    assert lock is not None
    calls = bench.studio.calls
    bench.reconciler._reconcile_all([bench.project.key])
    assert bench.studio.calls == calls
    assert bench.reconciler.last_success is None, "it was another server's"
    bench.reconciler.start()
    bench.reconciler.hint(bench.project.key, "ANNOTATION_CREATED", {})
    os.close(lock)
    wait(lambda: bench.studio.rows[0]["title"] == bench.project.current().name)  # the hint is not lost
    wait(lambda: bench.reconciler.last_success is not None)
    bench.reconciler.stop()


def test_a_rollback_queues_no_training_without_a_new_correction(tmp_path: Path) -> None:
    bench = Bench(tmp_path, train_every=1)
    bench.studio.annotate(1, 2)
    bench.reconcile()
    job = bench.jobs.claim()
    assert job is not None
    bench.jobs.report(job.id, manifest={str(n): f"{n * 100 + 30}@2026-01-01T00:00:30Z" for n in (1, 2)})
    bench.jobs.finish(job.id, "succeeded", "published", version=bench.publish())
    bench.studio.serving = bench.project.rollback(0).name
    bench.reconcile()
    assert bench.jobs.find(states=("queued",)) == []
    assert bench.studio.rows[0]["title"] == bench.project.version(0).name
    assert bench.studio.project["model_version"] == bench.project.version(0).name
    bench.studio.annotate(3, at=31)
    bench.reconcile()
    assert [job.state for job in bench.jobs.find()] == ["succeeded", "queued"]


def test_after_a_rollback_no_other_server_goes_on_under_the_name_of_before(asking: Asking) -> None:
    bench, studio, other = asking.bench, asking.studio, asking.service
    bench.reconciler._service = asking.start()  # the server that looks after the project; Label Studio asks the other
    older, newer = bench.publish(), bench.publish()
    other.preload(bench.project.key)
    asking.retrieve(5, range(1, 301))
    for task in range(1, 200):
        studio.given[task].insert(0, older)
    assert studio.given[1] == [older, newer]
    studio.serving = bench.project.rollback(1).name
    try:
        bench.reconcile()
        assert all(given == [older, newer] for task, given in studio.given.items() if task < 200)
        assert all(given == [newer, older] for task, given in studio.given.items() if task >= 200)
        assert other.setup({"project": UID, "hostname": "http://ls", "schema": CONFIG})["model_version"] == older
    finally:
        bench.reconciler._service.close()


class Seeing(Asking):
    """A model that finds one box on each image; by the task's number its class, and how the image looks to it."""

    names = ("Car", "Van", "Bus")
    config = CONFIG.replace('<Label value="Car"/>', "".join(f'<Label value="{name}"/>' for name in names))
    sees = ("", "Van", "Van", "Van", "Van", "Car", "Bus", "Van")
    looks = (0.0, 0.0, 0.5, 1.0, 1.5, 2.0, 9.0, 4.0)

    def predict_batch(self, images: list[np.ndarray], *_: Any, **__: Any) -> list[Detections]:
        return [self.find(round(float(image.mean())), image.shape[:2]) for image in images]

    def find(self, number: int, size: Any) -> Detections:
        label, zero = np.array([self.names.index(self.sees[number])]), np.zeros(1)
        of_boxes = (np.array([0.9]), label, np.array([0.8]), zero, np.array([BACKGROUND]), zero)
        signals = ImageSignals(*of_boxes, np.array([self.looks[number], 1.0]))
        return Detections(np.array([[0, 0, 2, 2]]), [0.9], label, self.names, size, signals=signals)

    def publish(self, drawn: Mapping[int, list[str]], folder: Path) -> None:
        """A version that has learned from these labels by task, as a training publishes it."""

        def fetch(value: str, task: int) -> Path:
            file = folder / f"{task}.png"
            file.write_bytes(base64.b64decode(value.partition(",")[2]))
            return file

        shape = {"x": 0, "y": 0, "width": 100, "height": 100, "rotation": 0}
        region = {"type": "rectanglelabels", "from_name": "l", "to_name": "i"}
        found = []
        for task, labels in drawn.items():
            result = [{**region, "value": {**shape, "rectanglelabels": [label]}} for label in labels]
            found.append(Correction(task, {"image": grey(task)}, {"id": task, "result": result}))
        project, controls = self.bench.project, parse_label_config(self.config)
        data = build(found, controls, project.key, project.current().name, 0.25, fetch, folder / "kept", lambda _: None)
        paths = [image.path for image in data.train.images + data.held_out.images]
        write_features(self, paths, folder / FEATURES, conf=0.1, iou=None, max_det=300)
        record = {"labels": list(data.names), "tasks": data.tasks, "manifest": data.manifest}
        self.studio.serving = project.publish(self.bench.checkpoint, record, [folder / FEATURES]).name


@pytest.mark.parametrize("acquisition", ["balance", "diversity", "mix"])
def test_the_order_goes_by_what_the_new_version_has_learned_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, acquisition: str
) -> None:
    bench = Bench(tmp_path)
    bench.studio = FakeLabelStudio(7)
    bench.studio.project["label_config"] = Seeing.config
    bench.reconciler._client = bench.studio  # type: ignore[assignment]
    asking = Seeing(bench, monkeypatch, acquisition)
    bench.studio.annotate(1, 2, 3, 4)  # the model sees a Van on each of them, people saw Cars
    asking.publish({1: ["Car"] * 3, 2: ["Car"] * 3, 3: ["Car"] * 3, 4: ["Van"]}, tmp_path)
    bench.reconcile()
    assert [task for chunk in bench.studio.asked for task in chunk] == [5, 6, 7, 1, 2, 3, 4]
    unlabelled = [5, 6, 7]
    # no Bus is drawn, one Van is; 6 looks least like what is labelled, 5 most
    assert sorted(unlabelled, key=asking.scores.__getitem__) == [6, 7, 5]
    asking.service.close()
    shutil.rmtree(bench.project.path / "signals")
    asking.service = asking.start()  # knows nothing of what was predicted, as another server would
    found = {task: asking.ask([task])[0]["score"] for task in unlabelled}
    asking.service.close()
    assert sorted(unlabelled, key=found.__getitem__) == [6, 7, 5]

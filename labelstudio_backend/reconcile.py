"""Makes Label Studio's state and ours agree, in a thread of its own, outside any request.

Nothing here believes an event: webhooks only say when to look. What is true is asked for by GET at the start, every
minute, and after every job.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from labelstudio_backend import logs
from labelstudio_backend.client import LabelStudio, same_project
from labelstudio_backend.corrections import corrections, labelled_after, new_since
from labelstudio_backend.job import Job
from labelstudio_backend.job_queue import JobQueue, ended_at
from labelstudio_backend.label_studio_http import LabelStudioError
from labelstudio_backend.locks import try_lock
from labelstudio_backend.owed import Owed
from labelstudio_backend.registry import ProjectRegistry, Registry
from labelstudio_backend.settings import Settings
from labelstudio_backend.version import Version
from yolonas.errors import YolonasError

if TYPE_CHECKING:
    from labelstudio_backend.service import Service

log = logging.getLogger(__name__)

DEBOUNCE_SECONDS = 2.0  # a burst of webhooks is looked into once
RECOUNT_SECONDS = 600.0  # deleted annotations leave no trace in `updated_at`
RETRY_SECONDS = 600.0  # between trainings queued by ourselves after one that failed, doubled with each further one
# Label Studio waits 100 s for a /predict and the backend stops at 80 s; one chunk should stay far below both.
CHUNK_SECONDS = 20.0
TURN_SECONDS = 60.0  # then other projects have their turn
LARGEST_CHUNK = 50
LONGEST_WAIT = 3600.0
SAID = 100  # lines that are not logged again; an error may name another address each time
ELSEWHERE_SECONDS = 2.0  # until we look again at a project that another server is about


@dataclass
class _Known:
    """What the last look at a project found; lost with the process, and found again."""

    manifest: dict[str, str] = field(default_factory=dict)
    seen: str = ""  # `updated_at` of the latest annotated task
    counted: float = -1e9  # when the annotations were last counted from scratch
    goal: tuple[str, int] | None = None  # version and number of tasks: what is being predicted again
    tried: set[int] = field(default_factory=set)  # tasks asked for it so far
    asked: tuple[str, int] | None = None  # the goal for which every task was asked
    predicted: tuple[str, int] | None = None  # the goal for which every task has its prediction
    left: set[int] = field(default_factory=set)  # tasks that it did not get
    failures: int = 0
    retry: float = 0.0
    chunk: int = 4
    said: set[str] = field(default_factory=set)


class Reconciler:
    """Keeps every project in step: title := version, predictions of the version, a training every N corrections.

    Args:
        settings: train_every, reconcile_seconds.
        registry: the projects and their versions.
        client: of the Label Studio that the settings name; without one there is nothing to reconcile with.
        jobs: the queue of trainings.
        service: loads a new version before Label Studio asks for it.
        debounce: how long a hint waits for further ones.
    """

    def __init__(
        self,
        settings: Settings,
        registry: Registry,
        client: LabelStudio,
        jobs: JobQueue,
        service: Service | None = None,
        *,
        debounce: float = DEBOUNCE_SECONDS,
    ) -> None:
        self._settings, self._registry, self._client = settings, registry, client
        self._jobs, self._service, self._debounce = jobs, service, debounce
        self._known: dict[str, _Known] = {}
        self._hinted: dict[str, float] = {}
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._away = 0
        self.last_success: float | None = None  # Unix seconds
        self._thread = threading.Thread(target=self._loop, name="reconciler", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread; a call to Label Studio that is under way is left behind."""
        self._stopping.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout=8.0)

    def hint(self, project_key: str, action: str, payload: Mapping[str, Any]) -> None:
        """A webhook came: look at the project soon. Takes no time and believes nothing of the payload."""
        self._look(project_key, time.monotonic() + self._debounce)

    def job_ended(self, job: Job) -> None:
        """A training ended: look at its project now, and have its version at hand here, whichever server looks."""
        if self._service is not None and job.version is not None:
            self._service.start_loading(job.project)
        self._look(job.project, time.monotonic())

    def _look(self, project_key: str, when: float) -> None:
        with self._lock:
            self._hinted[project_key] = min(when, self._hinted.get(project_key, when))
        self._wake.set()

    def _loop(self) -> None:
        regular = time.monotonic()
        while not self._stopping.is_set():
            try:
                regular = self._look_around(regular)
            except Exception:  # the state folder cannot be read, for instance
                log.exception("the projects could not be looked at; will look again")
                regular = time.monotonic() + self._settings.reconcile_seconds
            with self._lock:
                soonest = min([regular, *self._hinted.values()])
            self._wake.wait(max(0.05, soonest - time.monotonic()))
            self._wake.clear()

    def _look_around(self, regular: float) -> float:
        """Reconcile the projects that were hinted at and, from `regular` on, all; returns when that is next."""
        now = time.monotonic()
        with self._lock:
            due = [key for key, when in self._hinted.items() if when <= now]
            for key in due:
                del self._hinted[key]
        everything = now >= regular
        if everything:
            due = list(dict.fromkeys([*due, *(project.key for project in self._registry.projects())]))
        reached = self._reconcile_all(due)
        if not reached:
            # Label Studio is away: 1, 2, 4, ... times the interval, ten minutes at most
            self._away += 1
            wait: float = self._settings.reconcile_seconds * 2 ** min(self._away - 1, 8)
            return time.monotonic() + min(wait, 600.0) if everything else regular
        soon = time.monotonic() + self._settings.reconcile_seconds
        return soon if everything else min(regular, soon)

    def _reconcile_all(self, keys: list[str]) -> bool:
        """Reconcile these projects; returns whether Label Studio is there, as far as that was seen."""
        answered, away = False, False
        for key in keys:
            if self._stopping.is_set():
                return True
            try:
                with logs.about(project=key):
                    if self.reconcile(key):
                        answered, self.last_success = True, time.time()
            except LabelStudioError as error:
                answered, away = answered or error.status is not None, away or error.status is None
                self._say(key, f"not in step with Label Studio, will look again: {error}")
            except YolonasError as error:
                self._say(key, f"not in step with Label Studio, will look again: {error}")
            except Exception:
                log.exception("project %s could not be reconciled; will look again", key)
        if answered and self._away:
            self._away = 0
            log.info("Label Studio answers again")
        return answered or not away

    def reconcile(self, key: str) -> bool:
        """Look at one project and do what there is to do, unless another server is about it: then again soon.

        Returns whether this server has done it.

        Raises:
            LabelStudioError: Label Studio did not answer, or refused.
        """
        project = self._registry.project(key)
        lock = try_lock(project.path / ".reconciling")
        if lock is None:
            self._look(key, time.monotonic() + ELSEWHERE_SECONDS)
            return False
        try:
            self._reconcile(key, project)
            return True
        finally:
            os.close(lock)

    def _reconcile(self, key: str, project: ProjectRegistry) -> None:
        known = self._known.setdefault(key, _Known())
        state = self._client.get_project(project.project_id)
        if not same_project(state, str(project.metadata().get("uid", ""))):
            self._say(key, "Label Studio has another project under this number now; left alone")
            return
        if state["label_config"] != project.label_config:
            project.update(label_config=state["label_config"])
        self._count(project, known)
        self._step_forward(project, known, state)
        known.said = {line for line in known.said if not line.startswith("not in step")}

    def _say(self, key: str, line: str) -> None:
        """Log a line once, until things change."""
        if self._service is not None:
            self._service.notices.note(key, line[0].upper() + line[1:])
        said = self._known.setdefault(key, _Known()).said
        if line not in said:
            if len(said) >= SAID:
                said.clear()
            said.add(line)
            log.warning("project %s: %s", key, line)

    # -- a training every N corrections --------------------------------------------------------------------------

    def _count(self, project: ProjectRegistry, known: _Known) -> None:
        every = self._settings.train_every
        if every == 0 or self._jobs.find(project.key, states=("queued", "running"), brief=True):
            return
        fresh = time.monotonic() - known.counted > RECOUNT_SECONDS
        filters = []
        if not fresh and known.seen:
            item = "filter:tasks:updated_at"
            filters.append({"filter": item, "operator": "greater_or_equal", "type": "Datetime", "value": known.seen})
        manifest, seen = {} if fresh else dict(known.manifest), known.seen
        for task in self._client.iter_tasks(project.project_id, only_annotated=True, filters=filters):
            manifest |= {str(c.task): c.stamp for c in corrections([task])}
            seen = max(seen, task["updated_at"])
        known.manifest, known.seen = manifest, seen  # once all are read
        if fresh:
            known.counted = time.monotonic()
        earlier = sorted(self._jobs.find(project.key, brief=True), key=ended_at)
        failed = list(itertools.takewhile(lambda job: job.state == "failed", reversed(earlier)))
        # What a person cancelled is not begun anew by itself: as after one that learnt, only what is newer counts.
        last = self._jobs.get(earlier[-1 - len(failed)].id) if len(failed) < len(earlier) else None
        if last is not None and last.state == "cancelled":
            count = labelled_after(known.manifest, ended_at(last))
        else:
            count = new_since(known.manifest, None if last is None else last.manifest)
        if count < every:
            return
        if failed:
            wait = min(RETRY_SECONDS * 2 ** min(len(failed) - 1, 10), LONGEST_WAIT)
            if time.time() - ended_at(failed[0]) < wait:
                return
        job = self._jobs.enqueue(project.key, f"{count} newly corrected tasks")
        log.info("project %s: %d newly corrected tasks, training queued as job %d", project.key, count, job)

    # -- the title, then the predictions ---------------------------------------------------------------------------

    def _step_forward(self, project: ProjectRegistry, known: _Known, state: Mapping[str, Any]) -> None:
        version = project.current()
        rows = self._client.ml_backends(project.project_id)
        names = set(project.names())
        row = next((row for row in rows if row.get("model_version") in names or row.get("title") in names), None)
        if row is None:
            self._say(project.key, "no backend of this project in Label Studio answers with one of our versions")
            return
        if row["title"] != version.name and self._service is not None:
            self._service.preload(project.key)
        try:
            project.tell(version)  # from now on every server answers with it
        except OSError as error:  # a full disk: with one server nothing is missing
            self._say(project.key, f"other servers cannot be told that {version.name} serves: {error}")
        if row["title"] != version.name:
            row = self._client.retitle_ml_backend(row, version.name, self._stopping.wait)
            if row["title"] == version.name:
                log.info("project %s: the title of backend %s is now %s", project.key, row["id"], version.name)
        if row["title"] != version.name:
            raise LabelStudioError(f"the title of backend {row['id']} stays {row['title']!r}, not {version.name!r}")
        self._follow(project, names, version)
        if not version.trained and not Owed(project).due():
            return  # boxes of the start weights come when somebody asks for them
        if rows[0]["id"] != row["id"]:
            self._say(project.key, "another backend comes first, and Label Studio predicts in batches with the first")
        elif row.get("state") in ("DI", "ER"):
            self._say(
                project.key, f"Label Studio cannot reach this backend at {row['url']}: {row.get('error_message')}"
            )
        else:
            self._predict_again(project, known, version, int(state["task_number"]))

    def _follow(self, project: ProjectRegistry, names: set[str], version: Version) -> None:
        """See that project.model_version is the version, unless somebody chose other predictions by hand."""
        shown = self._client.get_project(project.project_id).get("model_version")
        if shown == version.name:
            return
        if shown and shown not in names:
            self._say(project.key, f"shows the predictions {shown!r} by choice, not this backend's")
            return
        self._client.patch_project(project.project_id, model_version=version.name)
        shown = self._client.get_project(project.project_id).get("model_version")
        if shown != version.name:
            raise LabelStudioError(f"project.model_version stays {shown!r}, not {version.name!r}")

    def _predict_again(self, project: ProjectRegistry, known: _Known, version: Version, task_number: int) -> None:
        """Have Label Studio ask for the predictions that this version has not given yet, in chunks, for one turn.

        Of the start weights only for those that somebody asked for and that could not be given in time.
        """
        owed = Owed(project)
        promised = owed.due()
        due = None if version.trained else promised
        goal = (version.name, task_number)
        if promised - known.left:  # a batch action was cut short since
            known.asked = known.predicted = None
        if known.predicted == goal or (known.asked == goal and time.monotonic() < known.retry):
            return
        if known.goal != goal:
            known.goal, known.failures, known.tried = goal, 0, set()
        missing = [task for task in self._missing(project, version) if task not in known.tried]
        if due is not None:
            missing = [task for task in missing if task in due]
        began, in_time = time.monotonic(), True
        while missing:
            if self._stopping.is_set() or project.current().name != version.name:
                return
            chunk, missing = missing[: known.chunk], missing[known.chunk :]
            started = time.monotonic()
            try:
                self._client.retrieve_predictions(project.project_id, chunk)
            except LabelStudioError:
                known.chunk = max(1, known.chunk // 2)
                raise
            known.tried.update(chunk)
            seconds = max(time.monotonic() - started, 0.1)
            in_time = in_time and seconds < 0.5 * self._settings.predict_seconds
            known.chunk = max(1, min(LARGEST_CHUNK, known.chunk * 2, int(len(chunk) * CHUNK_SECONDS / seconds)))
            if missing and time.monotonic() - began > TURN_SECONDS:
                self._look(project.key, time.monotonic())  # other projects have their turn first
                return
        # "Retrieved N predictions" is also said when the backend failed.
        left = self._missing(project, version) if known.tried else []
        predicted = task_number - len(left)
        if self._client.model_versions(project.project_id).get(version.name, 0) > predicted:
            self._client.delete_second_predictions(project.project_id, version.name)
        owed.settle(promised, left)  # some were predicted meanwhile, or are no tasks any more
        if due is not None:
            left = sorted(owed.due().intersection(left))
        if known.tried:
            done, asked = len(known.tried) - len(left), len(known.tried)
            log.info("project %s: %d of %d tasks predicted with %s", project.key, done, asked, version.name)
        known.asked, known.predicted, known.tried = goal, None if left or due is not None else goal, set()
        known.left = set(left)
        known.failures, known.retry = known.failures + 1 if left else 0, 0.0
        if left:
            if not in_time:  # a long video, mostly: each request goes on where the last one stopped
                known.failures = min(known.failures, 3)
            known.retry = time.monotonic() + min(60.0 * 2 ** min(known.failures - 1, 10), LONGEST_WAIT)

    def _missing(self, project: ProjectRegistry, version: Version) -> list[int]:
        """Tasks without a prediction of this version, those without labels first."""
        found = self._client.unpredicted_tasks(project.project_id, version.name, project.names())
        return [task for _, task in sorted((bool(task.get("is_labeled")), int(task["id"])) for task in found)]

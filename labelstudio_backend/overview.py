"""What Label Studio says about the projects, for the dashboard: asked in the background, and only while somebody looks.

A page gets what is known at once, and what is older than a few seconds is asked for again in a thread: neither a slow
Label Studio nor an open dashboard holds up a prediction. Projects that are only listed are asked about seldom, in a
thread of their own, so that many of them do not hold up the one that is shown.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from labelstudio_backend.acceptance import TaskWork, Work, task_work, works_by_round
from labelstudio_backend.client import LabelStudio, same_project
from labelstudio_backend.label_studio_http import LabelStudioError
from labelstudio_backend.redaction import redact
from labelstudio_backend.registry import ProjectRegistry, Registry
from yolonas.errors import YolonasError

log = logging.getLogger(__name__)

QUICK_SECONDS = 10.0  # title, counts, the next tasks: two small requests
SLOW_SECONDS = 60.0  # backends (Label Studio calls each of them for it), webhooks, what people have labelled since
NEXT_TASKS = 12
FORGET_SECONDS = 3600.0  # annotations are read from scratch so often: deleted ones leave no trace in `updated_at`


@dataclass(frozen=True)
class Seen:
    """What was last seen of a project; `when` in Unix seconds, None before the first answer.

    error: why the last look failed; problems: what keeps the project from working as it should; next_tasks: those
    neither labelled nor skipped, the first to label first, each as Label Studio lists it; rounds: what people did, see
    `acceptance`. The last two are None until the project was shown and not only listed.
    """

    when: float | None = None
    error: str | None = None
    title: str | None = None
    url: str | None = None
    tasks: int | None = None
    labelled: int | None = None
    sampling: str | None = None
    problems: tuple[str, ...] = ()
    next_tasks: tuple[dict[str, Any], ...] | None = None
    rounds: tuple[Work, ...] | None = None


@dataclass
class _Look:
    asked: float = -1e9
    pending: bool = False


@dataclass
class _Project:
    seen: Seen = field(default_factory=Seen)
    shown: _Look = field(default_factory=_Look)
    listed: _Look = field(default_factory=_Look)
    checked: float = -1e9
    counted: float = -1e9
    read_all: float = -1e9
    updated_at: str = ""
    works: dict[int, TaskWork] = field(default_factory=dict)


class Overview:
    """Answers at once with what is known of a project, and sees to it that it is soon known better.

    `client` is of the Label Studio that the settings name, and is closed with this; None where there is none.
    """

    def __init__(self, registry: Registry, client: LabelStudio | None) -> None:
        self._registry, self._client = registry, client
        self._projects: dict[str, _Project] = {}
        self._guard = threading.Lock()
        self._shown = ThreadPoolExecutor(1, "overview")
        self._listed = ThreadPoolExecutor(1, "overview-list")

    def close(self) -> None:
        """Ask no more."""
        for thread in (self._shown, self._listed):
            thread.shutdown(wait=False, cancel_futures=True)
        if self._client is not None:
            self._client.close()

    def forget(self) -> None:
        """Know nothing, so that everything is asked for at the next look."""
        with self._guard:
            self._projects = {}

    def get(self, key: str) -> Seen:
        """What is known of a project; asks for all of it again, in the background, where that is old."""
        with self._guard:
            project = self._projects.setdefault(key, _Project())
            self._ask(key, project, project.shown, QUICK_SECONDS, self._shown)
            return project.seen

    def brief(self, key: str) -> Seen:
        """The same, but asks only for the title, the counts and the problems, and seldom: for a list of projects."""
        with self._guard:
            project = self._projects.setdefault(key, _Project())
            if time.monotonic() - project.shown.asked > SLOW_SECONDS and not project.shown.pending:
                self._ask(key, project, project.listed, SLOW_SECONDS, self._listed)
            return project.seen

    def _ask(self, key: str, project: _Project, look: _Look, seconds: float, thread: Executor) -> None:
        if self._client is not None and time.monotonic() - look.asked > seconds and not look.pending:
            look.pending = True
            thread.submit(self._refresh, self._client, key, project, look)

    def _refresh(self, client: LabelStudio, key: str, project: _Project, look: _Look) -> None:
        try:
            self._look(client, self._registry.project(key), project, whole=look is project.shown)
        except YolonasError as error:
            self._learn(project, error=redact(str(error)))
        except Exception as error:  # Label Studio of another version, perhaps
            log.exception("project %s could not be looked at for the dashboard", key)
            self._learn(project, error=redact(f"{type(error).__name__}: {error}"))
        finally:
            look.asked, look.pending = time.monotonic(), False

    def _learn(self, project: _Project, **values: Any) -> None:
        with self._guard:
            project.seen = replace(project.seen, **values)

    def _look(self, client: LabelStudio, registry: ProjectRegistry, project: _Project, *, whole: bool) -> None:
        number = registry.project_id
        state = client.get_project(number)
        if not same_project(state, str(registry.metadata().get("uid", ""))):
            raise LabelStudioError(f"{client.url} has another project under the number {number} now")
        self._learn(
            project,
            title=str(state.get("title") or ""),
            url=f"{client.url}/projects/{number}/data",
            tasks=_count(state, "task_number"),
            labelled=_count(state, "num_tasks_with_annotations"),
            sampling=state.get("sampling"),
        )
        if whole:
            self._learn(project, next_tasks=_next_tasks(client, number))
        if time.monotonic() - project.checked > SLOW_SECONDS:
            self._learn(project, problems=tuple(_problems(client, registry, state)))
            project.checked = time.monotonic()
        if whole and time.monotonic() - project.counted > SLOW_SECONDS:
            self._learn(project, rounds=tuple(self._rounds(client, registry, project)))
            project.counted = time.monotonic()
        self._learn(project, when=time.time(), error=None)

    def _rounds(self, client: LabelStudio, registry: ProjectRegistry, project: _Project) -> list[Work]:
        """What people did from version to version; reads what changed since the last time."""
        fresh = time.monotonic() - project.read_all > FORGET_SECONDS
        changed = {
            "filter": "filter:tasks:updated_at",
            "operator": "greater_or_equal",
            "type": "Datetime",
            "value": project.updated_at,
        }
        filters = [] if fresh or not project.updated_at else [changed]
        tasks = list(client.iter_tasks(registry.project_id, only_annotated=True, filters=filters))  # all, or it raises
        if fresh:
            project.works, project.updated_at, project.read_all = {}, "", time.monotonic()
        for task in tasks:
            project.works.pop(int(task["id"]), None)
            if (work := task_work(task)) is not None:
                project.works[int(task["id"])] = work
            project.updated_at = max(project.updated_at, str(task.get("updated_at") or ""))
        published = [(float(v.record.get("published") or 0.0), v.name) for v in registry.versions()]
        return works_by_round(project.works.values(), published)


def _next_tasks(client: LabelStudio, number: int) -> tuple[dict[str, Any], ...]:
    filters = [
        {"filter": f"filter:tasks:{count}", "operator": "equal", "type": "Number", "value": 0}
        for count in ("total_annotations", "cancelled_annotations")  # the latter are skips
    ]
    return tuple(client.first_tasks(number, NEXT_TASKS, "tasks:predictions_score", filters))


def _count(state: Mapping[str, Any], name: str) -> int | None:
    value = state.get(name)
    return value if isinstance(value, int) else None


def _problems(client: LabelStudio, project: ProjectRegistry, state: Mapping[str, Any]) -> list[str]:
    """What keeps predictions or trainings from working, each with what to do."""
    names = set(project.names())
    rows = client.ml_backends(project.project_id)
    own = [row for row in rows if row.get("title") in names or row.get("model_version") in names]
    connect = f"run `yolonas-labelstudio connect --project {project.project_id}`"
    if not own:
        return [f"No backend of this project in Label Studio is this one: {connect}."]
    problems = []
    if own[0].get("state") in ("DI", "ER"):
        why = " ".join(str(own[0].get("error_message") or "it gives no reason").split())[:300]
        problems.append(f"Label Studio cannot reach this backend at {own[0].get('url')}: {why}")
    if rows[0].get("id") != own[0].get("id"):
        problems.append("Another backend comes first in this project, and Label Studio predicts with the first only.")
    if len(own) > 1:
        problems.append(
            "This backend is connected to the project more than once; remove the others in Settings > Model."
        )
    address = str(own[0].get("url") or "").rstrip("/")
    hooks = [hook for hook in client.webhooks(project.project_id) if str(hook.get("url") or "").startswith(address)]
    if not any(hook.get("is_active", True) for hook in hooks):
        problems.append(f"Label Studio sends no events here, so labels are noticed with a delay: {connect}.")
    if not state.get("show_collab_predictions", True):
        problems.append("The project does not show predictions to annotators: switch that on in Settings > Annotation.")
    return problems

"""The calls to Label Studio that the backend needs, by what they are about."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, BinaryIO

import httpx

from labelstudio_backend.label_studio_http import CONNECT_SECONDS, LabelStudioError, LabelStudioHttp

IMPORT_SECONDS = 300.0  # it counts the predictions of every task of the project after each import
TITLE_TRIES = 4
PAGE = 100  # tasks of one answer
BARE_PAGE = 1000  # where they come without annotations and predictions


class LabelStudio(LabelStudioHttp):
    """The calls to a Label Studio, as `LabelStudioHttp` makes each."""

    # -- Label Studio itself -----------------------------------------------------------------------------------

    def version(self) -> str:
        """Its version, like 1.23.2; "" where it does not say. A client without a token may ask."""
        return str(self._object("GET", "api/version/").get("release", ""))

    def user(self) -> str:
        """The e-mail address of the token's user."""
        return str(self._object("GET", "api/current-user/whoami").get("email", ""))

    # -- projects and tasks ------------------------------------------------------------------------------------

    def get_project(self, project: int, *, read_seconds: float | None = None) -> dict[str, Any]:
        """The project: `id`, `title`, `label_config`, `model_version`, `created_at`, counters."""
        less = {} if read_seconds is None else {"timeout": httpx.Timeout(read_seconds, connect=CONNECT_SECONDS)}
        return self._object("GET", f"api/projects/{project}/", **less)

    def projects(self) -> list[dict[str, Any]]:
        """All projects this token sees."""
        answer = self._json("GET", "api/projects/", params={"page_size": 1000})
        return list(answer["results"] if isinstance(answer, dict) else answer)

    def create_project(self, title: str, label_config: str, **values: Any) -> dict[str, Any]:
        """A new project; the title has three characters at least."""
        return self._object("POST", "api/projects/", json={"title": title, "label_config": label_config, **values})

    def patch_project(self, project: int, **values: Any) -> dict[str, Any]:
        return self._object("PATCH", f"api/projects/{project}/", json=values)

    def iter_tasks(
        self,
        project: int,
        *,
        only_annotated: bool = False,
        filters: Sequence[Mapping[str, Any]] = (),
        page_size: int = PAGE,
        **params: Any,
    ) -> Iterator[dict[str, Any]]:
        """All tasks with `data` (URIs unresolved), `annotations` (skipped ones too), `predictions` and `drafts`, by ID.

        `only_annotated` leaves out tasks whose every annotation is skipped or that have none. `filters` are the Data
        Manager's, all of which must hold. `fields="task_only"` leaves out the last three. A task that meets them all
        the while comes exactly once, whatever becomes of the others meanwhile.
        """
        items = list(filters)
        if only_annotated:
            items.append(
                {"filter": "filter:tasks:total_annotations", "operator": "greater", "type": "Number", "value": 0}
            )
        beyond: list[Mapping[str, Any]] = []
        while True:
            answer = self._task_page(project, [*items, *beyond], "tasks:id", page_size, **params)
            tasks = answer["tasks"]
            yield from tasks
            if not tasks or len(tasks) >= answer["total"]:
                return
            # The pages of a set that changes shift: from one to the next a task would come twice, or not at all.
            last = tasks[-1]["id"]
            beyond = [{"filter": "filter:tasks:id", "operator": "greater", "type": "Number", "value": last}]

    def first_tasks(
        self, project: int, count: int, ordering: str, filters: Sequence[Mapping[str, Any]] = ()
    ) -> list[dict[str, Any]]:
        """The first `count` tasks, as `iter_tasks` gives them, in an order of the Data Manager's."""
        return list(self._task_page(project, filters, ordering, count)["tasks"])

    def _task_page(
        self, project: int, filters: Sequence[Mapping[str, Any]], ordering: str, page_size: int, **params: Any
    ) -> dict[str, Any]:
        """The first `page_size` of the tasks that meet the filters, and the `total` of these."""
        query: dict[str, Any] = {"ordering": [ordering]}
        if filters:
            query["filters"] = {"conjunction": "and", "items": [dict(item) for item in filters]}
        common = {"project": project, "fields": "all", "resolve_uri": "false", "query": json.dumps(query)}
        return self._object("GET", "api/tasks", params={**common, "page_size": page_size, **params})

    def unpredicted_tasks(
        self, project: int, model_version: str, versions: Iterable[str], tasks: Iterable[int] | None = None
    ) -> Iterator[dict[str, Any]]:
        """The tasks (of these) that have no prediction of this version, with `id`, `data` and `is_labeled`, by ID.

        versions: the names of those that predictions of the project may be of.
        """
        filters: list[dict[str, Any]] = []
        wanted = None if tasks is None else set(tasks)
        if wanted:
            bounds = {"min": min(wanted), "max": max(wanted)}
            filters.append({"filter": "filter:tasks:id", "operator": "in", "type": "Number", "value": bounds})
        # The filter looks for a part of the name: v1 would find v10 too. So then the tasks are read with predictions.
        longer = any(name != model_version and name.startswith(model_version) for name in versions)
        if not longer:
            item = "filter:tasks:predictions_model_versions"
            filters.append({"filter": item, "operator": "not_contains", "type": "List", "value": [model_version]})
        found = self.iter_tasks(
            project,
            filters=filters,
            page_size=PAGE if longer else BARE_PAGE,
            fields="all" if longer else "task_only",
        )
        for task in found:
            given = {prediction.get("model_version") for prediction in task.get("predictions") or ()}
            if model_version not in given and (wanted is None or task["id"] in wanted):
                yield task

    def some_tasks(self, project: int, count: int) -> list[dict[str, Any]]:
        """Up to `count` tasks spread over the project, the first and the last among them, with `id` and `data`."""
        params: dict[str, Any] = {"project": project, "fields": "task_only", "resolve_uri": "false", "page_size": 1}
        first = self._json("GET", "api/tasks", params={**params, "page": 1})
        found, total = list(first["tasks"]), int(first["total"])
        pages = {1 + round(step * (total - 1) / (count - 1)) for step in range(1, count)} if count > 1 else set()
        for page in sorted(pages - {0, 1}):
            found += self._json("GET", "api/tasks", params={**params, "page": page})["tasks"]
        return found

    def get_task(self, task: int) -> dict[str, Any]:
        """One task with annotations and predictions."""
        return self._object("GET", f"api/tasks/{task}/")

    def import_tasks(self, project: int, tasks: Sequence[Mapping[str, Any]]) -> list[int]:
        """Import `{"data": {...}}` tasks; returns their IDs."""
        path = f"api/projects/{project}/import"
        answer = self._json("POST", path, params={"return_task_ids": "true"}, json=list(tasks))
        return list(answer.get("task_ids", []))

    def upload_files(self, project: int, files: Iterable[tuple[str, bytes | BinaryIO]]) -> list[int]:
        """Upload images as (file name, content), one task each; returns the tasks' IDs."""
        path = f"api/projects/{project}/import"
        parts = [(f"file{number}", named) for number, named in enumerate(files)]
        answer = self._json("POST", path, params={"return_task_ids": "true"}, files=parts)
        return list(answer.get("task_ids", []))

    def create_annotation(self, task: int, result: Sequence[Mapping[str, Any]], **values: Any) -> dict[str, Any]:
        """Submit an annotation; `values`: lead_time, parent_prediction, was_cancelled, ground_truth."""
        return self._object("POST", f"api/tasks/{task}/annotations/", json={"result": list(result), **values})

    def patch_annotation(self, annotation: int, **values: Any) -> dict[str, Any]:
        return self._object("PATCH", f"api/annotations/{annotation}/", json=values)

    def delete_annotation(self, annotation: int) -> None:
        self._request("DELETE", f"api/annotations/{annotation}/")

    def export(self, project: int) -> list[dict[str, Any]]:
        """The annotated tasks in Label Studio's JSON."""
        return list(self._json("GET", f"api/projects/{project}/export", params={"exportType": "JSON"}))

    # -- predictions -------------------------------------------------------------------------------------------

    def predictions(self, project: int) -> list[dict[str, Any]]:
        """All predictions of a project: `task`, `result`, `score`, `model_version`."""
        answer = self._json("GET", "api/predictions/", params={"project": project})
        return list(answer["results"] if isinstance(answer, dict) else answer)

    def model_versions(self, project: int) -> dict[str, int]:
        """How many predictions there are of each version."""
        return dict(self._json("GET", f"api/projects/{project}/model-versions/"))

    def delete_prediction(self, prediction: int) -> None:
        self._request("DELETE", f"api/predictions/{prediction}/")

    def delete_second_predictions(self, project: int, model_version: str) -> int:
        """Delete all but the first prediction of this version of each task; how many were deleted.

        They come where a person opens a task while the batch that holds it is under way: Label Studio asks twice.
        """
        seen: set[int] = set()
        deleted = 0
        for prediction in sorted(self.predictions(project), key=lambda found: int(found["id"])):
            if prediction["model_version"] == model_version:
                if prediction["task"] in seen:
                    self.delete_prediction(int(prediction["id"]))
                    deleted += 1
                seen.add(prediction["task"])
        return deleted

    def patch_prediction(self, prediction: int, **values: Any) -> dict[str, Any]:
        return self._object("PATCH", f"api/predictions/{prediction}/", json=values)

    def count_predictions(self, project: int, model_version: str) -> int:
        """How many tasks have a prediction of this version."""
        return len({p["task"] for p in self.predictions(project) if p["model_version"] == model_version})

    def create_prediction(
        self, task: int, result: Sequence[Mapping[str, Any]], score: float, model_version: str
    ) -> dict[str, Any]:
        body = {"task": task, "result": list(result), "score": score, "model_version": model_version}
        return self._object("POST", "api/predictions/", json=body)

    def import_predictions(self, project: int, predictions: Sequence[Mapping[str, Any]]) -> int:
        """Store many predictions (`task`, `result`, `score`, `model_version`) at once; returns how many were created.

        Of one with a label that the label config has not, Label Studio says nothing and creates none; a task that is
        gone has it refuse them all, with 400.
        """
        answer = self._object(
            "POST",
            f"api/projects/{project}/import/predictions",
            json=list(predictions),
            timeout=httpx.Timeout(IMPORT_SECONDS, connect=CONNECT_SECONDS),
        )
        return int(answer.get("created", 0))

    def retrieve_predictions(
        self, project: int, tasks: Sequence[int] | None = None, *, read_seconds: float = 600.0
    ) -> None:
        """Have Label Studio ask its backend to predict these tasks (None: all), those without a current prediction.

        Its answer says "Retrieved N predictions" even when the backend failed: count_predictions() tells.
        """
        selected: dict[str, Any]
        selected = {"all": True, "excluded": []} if tasks is None else {"all": False, "included": list(tasks)}
        self._request(
            "POST",
            "api/dm/actions",
            params={"id": "retrieve_tasks_predictions", "project": project},
            json={"selectedItems": selected},
            timeout=httpx.Timeout(read_seconds, connect=CONNECT_SECONDS),
        )

    # -- ml backends and webhooks ------------------------------------------------------------------------------

    def ml_backends(self, project: int) -> list[dict[str, Any]]:
        """The project's backends: `id`, `url`, `title`, `state` (CO, DI, ER, TR, PR), `model_version`.

        Label Studio calls /health and /setup of each while it answers.
        """
        return list(self._json("GET", "api/ml", params={"project": project}))

    def add_ml_backend(self, project: int, url: str, title: str, **values: Any) -> dict[str, Any]:
        """Connect a backend; `values`: is_interactive, basic_auth_user, basic_auth_pass."""
        body = {"project": project, "url": url, "title": title, "auth_method": "NONE", **values}
        return self._object("POST", "api/ml", json=body)

    def patch_ml_backend(self, backend: Mapping[str, Any], **values: Any) -> dict[str, Any]:
        """Change a backend that ml_backends() listed; url, project and auth_method go along, else it answers 500."""
        body = {key: backend[key] for key in ("url", "project", "auth_method") if key in backend}
        if backend.get("auth_method") == "BASIC_AUTH":  # an empty password keeps the old one
            body |= {"basic_auth_user": backend.get("basic_auth_user"), "basic_auth_pass": ""}
        return self._object("PATCH", f"api/ml/{backend['id']}", json={**body, **values})

    def retitle_ml_backend(
        self, backend: dict[str, Any], title: str, pause: Callable[[float], bool | None] = time.sleep
    ) -> dict[str, Any]:
        """Set the title of a backend, read it back, and again where something else was saved over it; the row then.

        While `POST /api/ml/ID/train` or a batch prediction runs, Label Studio holds the whole row and saves it at the
        end, old title included. `pause` waits some seconds, and ends this where it answers True.
        """
        for attempt in range(TITLE_TRIES):
            self.patch_ml_backend(backend, title=title)
            if pause(0.5 * attempt):
                break
            rows = self.ml_backends(backend["project"])
            backend = next((row for row in rows if row["id"] == backend["id"]), backend)
            if backend["title"] == title:
                break
        return backend

    def delete_ml_backend(self, backend: int) -> None:
        """Remove a backend; its webhook stays, and project.model_version becomes "" where it was its title."""
        self._request("DELETE", f"api/ml/{backend}")

    def train(self, backend: int) -> None:
        """Press the train button of a backend."""
        self._request("POST", f"api/ml/{backend}/train", json={})

    def webhooks(self, project: int) -> list[dict[str, Any]]:
        return list(self._json("GET", "api/webhooks/", params={"project": project}))

    def delete_webhook(self, webhook: int) -> None:
        self._request("DELETE", f"api/webhooks/{webhook}/")

    def patch_webhook(self, webhook: int, **values: Any) -> dict[str, Any]:
        return dict(self._json("PATCH", f"api/webhooks/{webhook}/", json=values))

    def create_webhook(self, project: int, url: str, headers: Mapping[str, str] | None = None) -> dict[str, Any]:
        """A webhook for all events of a project, with payload."""
        body = {
            "project": project,
            "url": url,
            "send_payload": True,
            "send_for_all_actions": True,
            "headers": dict(headers or {}),
        }
        return self._object("POST", "api/webhooks/", json=body)

    # -- files -------------------------------------------------------------------------------------------------

    def download(self, path: str, *, max_bytes: int = 2**30) -> bytes:
        """A file of Label Studio's, like `/data/upload/5/659649fc-im0.jpg`, relative to its base URL."""
        answer = self._request("GET", path.lstrip("/"))
        if len(answer.content) > max_bytes:
            raise LabelStudioError(f"{self.url}/{path.lstrip('/')} is larger than {max_bytes} bytes")
        return answer.content


def project_uid(project: Mapping[str, Any]) -> str:
    """ "ID.timestamp", by which Label Studio names a project to its backends; raises ValueError, KeyError."""
    return f"{project['id']}.{int(datetime.fromisoformat(str(project['created_at'])).timestamp())}"


def same_project(state: Mapping[str, Any], uid: str) -> bool:
    """Whether what Label Studio answers for a project is the project "ID.timestamp": ids repeat after a reinstall."""
    try:
        return uid == project_uid(state)
    except (KeyError, ValueError):
        return False

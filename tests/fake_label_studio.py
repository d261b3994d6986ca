"""A small Label Studio for tests and benches: its API as far as `client.py` calls it, over HTTP, with state in memory.

It answers at once where the real one takes a while, and has its habits as far as they were measured: which calls it
makes to a backend, and when; webhooks without patience; predictions of another version than /setup's that pile up; a
batch action that says "Retrieved" whatever happened; saved-over titles; filters that look for a part of a name.

    with FakeLabelStudio() as studio, LabelStudio(studio.url, studio.token) as client:
        project = client.create_project("Cells", label_config)["id"]

The server is a thread of this process, so what people labelled outlives a backend that is killed. `away = True` turns
everybody away, of which `turned_away` keeps a list; `webhook_copies` and `webhook_delay` double and delay the events.
"""

from __future__ import annotations

import json
import random
import re
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx

Json = dict[str, Any]
PATIENCE = {"/health": 1.0, "/setup": 3.0, "/predict": 100.0, "/webhook": 1.0, "/job_status": 1.0}  # s


class _RefusedError(Exception):
    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status


class FakeLabelStudio:
    """The server, a context manager.

    `projects`, `tasks` (with their `annotations` and `predictions`), `backends` and `webhooks` hold everything by ID;
    look at them under `lock`. `calls` counts what backends were asked, by path. `token` is a legacy token.
    """

    def __init__(self) -> None:
        self.token = secrets.token_hex(20)
        self.away = False
        self.turned_away: list[str] = []  # "GET api/tasks"
        self.webhook_copies = 1
        self.webhook_delay = 0.0  # s
        self.lock = threading.RLock()  # never held while a backend is asked
        self.projects: dict[int, Json] = {}
        self.tasks: dict[int, Json] = {}
        self.backends: dict[int, Json] = {}
        self.webhooks: dict[int, Json] = {}
        self.files: dict[str, bytes] = {}
        self.calls: Counter[str] = Counter()
        self._ids: Counter[str] = Counter()
        self._random = random.Random(0)
        self._http = httpx.Client(trust_env=False)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FakeLabelStudio:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._http.close()

    # -- requests --------------------------------------------------------------------------------------------------

    def answer(self, method: str, target: str, headers: Mapping[str, str], body: bytes) -> tuple[int, Any]:
        """Status and JSON value, or bytes of a file, of one request."""
        parts = urlsplit(target)
        path, query = parts.path.strip("/"), {key: values[0] for key, values in parse_qs(parts.query).items()}
        if self.away:
            self.turned_away.append(f"{method} {path}")
            return 503, {"detail": "away"}
        if path == "health":
            return 200, {"status": "UP"}
        if headers.get("Authorization") != f"Token {self.token}":
            return 401, {"detail": "Authentication credentials were not provided."}
        if path.startswith("data/upload/"):
            return (200, self.files[path]) if path in self.files else (404, {"detail": "Not found."})
        multipart = headers.get("Content-Type", "").startswith("multipart/")
        given = _parts(headers["Content-Type"], body) if multipart else json.loads(body or b"null")
        for wanted, pattern, work in _ROUTES:
            if wanted == method and (match := re.fullmatch(pattern, path)):
                try:
                    return work(self, *map(int, match.groups()), query, given)
                except _RefusedError as error:
                    return error.status, {"detail": str(error)}
                except KeyError as error:
                    return 404, {"detail": f"Not found: {error}"}
        return 404, {"detail": f"{method} {path} is not known here"}

    def _row(self, kind: str, values: Mapping[str, Any]) -> Json:
        self._ids[kind] += 1
        now = _now()
        return {"id": self._ids[kind], "created_at": now, "updated_at": now, **values}

    # -- projects and tasks ----------------------------------------------------------------------------------------

    def project(self, number: int) -> Json:
        """A project as the API shows it."""
        with self.lock:
            tasks = [task for task in self.tasks.values() if task["project"] == number]
            return {
                **self.projects[number],
                "task_number": len(tasks),
                "num_tasks_with_annotations": sum(map(_labelled, tasks)),
                "total_predictions_number": sum(len(task["predictions"]) for task in tasks),
            }

    def task(self, number: int) -> Json:
        """A task as the API shows it."""
        with self.lock:
            return _shown(self.tasks[number])

    def _list_projects(self, query: Json, body: Any) -> tuple[int, Any]:
        found = [self.project(number) for number in list(self.projects)]
        return 200, {"count": len(found), "results": found}

    def _create_project(self, query: Json, body: Json) -> tuple[int, Any]:
        if len(body["title"]) < 3:
            raise _RefusedError(400, "title: Ensure this field has at least 3 characters.")
        habits = {"sampling": "Sequential sampling", "model_version": "", "show_collab_predictions": True}
        with self.lock:
            row = self._row("project", {**habits, **body})
            self.projects[row["id"]] = row
        return 201, self.project(row["id"])

    def _patch_project(self, number: int, query: Json, body: Json) -> tuple[int, Any]:
        with self.lock:
            self.projects[number] |= body | {"updated_at": _now()}
        self._event(number, "PROJECT_UPDATED", {})
        return 200, self.project(number)

    def _list_tasks(self, query: Json, body: Any) -> tuple[int, Any]:
        wanted = json.loads(query.get("query", "{}"))
        items = wanted.get("filters", {}).get("items", [])
        page, size = int(query.get("page", 1)), int(query.get("page_size", 30))
        with self.lock:
            ordered = sorted(self.tasks.values(), key=lambda task: task["id"])
            found = [t for t in ordered if t["project"] == int(query["project"]) and all(_passes(t, i) for i in items)]
            if page > 1 and not found[(page - 1) * size :]:
                raise _RefusedError(404, "Invalid page.")
            shown = [_shown(task) for task in found[(page - 1) * size : page * size]]
        if query.get("fields") == "task_only":
            shown = [{**task, "annotations": [], "predictions": [], "drafts": []} for task in shown]
        return 200, {"tasks": shown, "total": len(found)}

    def _get_task(self, number: int, query: Json, body: Any) -> tuple[int, Any]:
        return 200, self.task(number)

    def _import(self, number: int, query: Json, body: Sequence[Any]) -> tuple[int, Any]:
        """A list of tasks, or files as (name, content)."""
        with self.lock:
            made = []
            for item in body:
                if isinstance(item, tuple):
                    name = f"data/upload/{number}/{secrets.token_hex(4)}-{item[0]}"
                    self.files[name] = item[1]
                    item = {"data": {"image": f"/{name}"}}
                values = {"data": item["data"], "meta": {}, "project": self.projects[number]["id"]}
                task = self._row("task", {**values, "annotations": [], "predictions": []})
                self.tasks[task["id"]] = task
                for kind in ("annotations", "predictions"):
                    task[kind] = [self._result(kind, task, one) for one in item.get(kind, ())]
                made.append(task["id"])
        self._event(number, "TASKS_CREATED", {"tasks": [{"id": task} for task in made]})
        return 201, {"task_count": len(made), "task_ids": made}

    def _next(self, number: int, query: Json, body: Any) -> tuple[int, Any]:
        """The label stream's next task: the lowest score of the project's version, or the lowest ID."""
        with self.lock:
            project = self.projects[number]
            open_tasks = [t for t in self.tasks.values() if t["project"] == number and not t["annotations"]]
            if not open_tasks:
                raise _RefusedError(404, "There are no tasks remaining to be annotated")
            if project["sampling"] != "Uncertainty sampling":
                return 200, _shown(min(open_tasks, key=lambda task: task["id"]))
            scored = [
                (prediction["score"], task["id"])
                for task in open_tasks
                for prediction in task["predictions"]
                if prediction["model_version"] == project["model_version"] and prediction["score"] is not None
            ]
            chosen = min(scored)[1] if scored else self._random.choice(sorted(task["id"] for task in open_tasks))
            return 200, _shown(self.tasks[chosen])

    def _export(self, number: int, query: Json, body: Any) -> tuple[int, Any]:
        with self.lock:
            mine = [task for task in self.tasks.values() if task["project"] == number]
            return 200, [_shown(task) for task in mine if task["annotations"]]

    # -- annotations and predictions -------------------------------------------------------------------------------

    def _result(self, kind: str, task: Json, values: Mapping[str, Any]) -> Json:
        if kind == "predictions":
            return self._row(kind, {"score": None, "model_version": "", **values, "task": task["id"]})
        usual = {"was_cancelled": False, "ground_truth": False, "lead_time": None, "parent_prediction": None}
        return self._row(kind, {**usual, "prediction": {}, **values, "task": task["id"], "project": task["project"]})

    def _find(self, kind: str, number: int) -> tuple[Json, int]:
        """The task that holds an annotation or a prediction, and where."""
        for task in self.tasks.values():
            for place, row in enumerate(task[kind]):
                if row["id"] == number:
                    return task, place
        raise KeyError(number)

    def _annotate(self, number: int, query: Json, body: Json) -> tuple[int, Any]:
        with self.lock:
            task = self.tasks[number]
            row = self._result("annotations", task, body)
            task["annotations"].append(row)
            task["updated_at"] = row["updated_at"]
            about = {"annotation": dict(row), "task": _shown(task)}
        self._event(task["project"], "ANNOTATION_CREATED", about)
        return 201, row

    def _patch_annotation(self, number: int, query: Json, body: Json) -> tuple[int, Any]:
        with self.lock:
            task, place = self._find("annotations", number)
            row = task["annotations"][place]
            row |= {**body, "updated_at": _now()}
            task["updated_at"] = row["updated_at"]
            about = {"annotation": dict(row), "task": _shown(task)}
        self._event(task["project"], "ANNOTATION_UPDATED", about)
        return 200, row

    def _delete_annotation(self, number: int, query: Json, body: Any) -> tuple[int, Any]:
        with self.lock:
            task, place = self._find("annotations", number)
            del task["annotations"][place]  # and `updated_at` stays
        self._event(task["project"], "ANNOTATIONS_DELETED", {"annotations": [{"id": number}]})
        return 204, None

    def _list_predictions(self, query: Json, body: Any) -> tuple[int, Any]:
        with self.lock:
            mine = [task for task in self.tasks.values() if task["project"] == int(query["project"])]
            return 200, [dict(prediction) for task in mine for prediction in task["predictions"]]

    def _create_prediction(self, query: Json, body: Json) -> tuple[int, Any]:
        with self.lock:
            task = self.tasks[body["task"]]
            row = self._result("predictions", task, body)
            task["predictions"].append(row)
        return 201, row

    def _delete_prediction(self, number: int, query: Json, body: Any) -> tuple[int, Any]:
        with self.lock:
            task, place = self._find("predictions", number)
            del task["predictions"][place]
        return 204, None

    def _model_versions(self, number: int, query: Json, body: Any) -> tuple[int, Any]:
        _, predictions = self._list_predictions({"project": number}, None)
        return 200, Counter(prediction["model_version"] for prediction in predictions)

    def _action(self, query: Json, body: Json) -> tuple[int, Any]:
        """Ask the first backend for predictions of the chosen tasks that have none of its version."""
        if query["id"] != "retrieve_tasks_predictions":
            raise _RefusedError(400, f"action {query['id']} is not known here")
        number, chosen = int(query["project"]), body["selectedItems"]
        with self.lock:
            mine = [task["id"] for task in self.tasks.values() if task["project"] == number]
            backend = next((row for row in self.backends.values() if row["project"] == number), None)
        wanted = set(chosen["included"]) if not chosen["all"] else set(mine) - set(chosen.get("excluded", ()))
        tasks = [task for task in mine if task in wanted]
        if backend is not None and (version := self._set_up(backend)) is not None:
            self._predict(backend, tasks, version)
        return 200, {"processed_items": len(tasks), "detail": f"Retrieved {len(tasks)} predictions"}

    def _predict(self, backend: Json, tasks: Sequence[int], version: str) -> None:
        project = self.projects[backend["project"]]
        with self.lock:
            shown = [_shown(self.tasks[task]) for task in tasks]
        missing = [t for t in shown if all(p["model_version"] != version for p in t["predictions"])]
        if not missing:
            return
        request = {"tasks": missing, "project": _uid(project), "label_config": project["label_config"]}
        params = {"login": None, "password": None, "context": None}
        answer = self._ask(backend, "/predict", {**request, "params": params})
        results = answer.get("results") if isinstance(answer, dict) else None
        if not isinstance(results, list) or len(results) != len(missing):
            if isinstance(results, list) and len(results) == 1:
                for task in missing:
                    self._predict(backend, [task["id"]], version)
            return
        found = [r for given in results for r in (given if isinstance(given, list) else [given])]
        if not all(isinstance(r.get("score", 0.0), int | float) for r in found):
            return
        with self.lock:
            for task, given in zip(missing, results, strict=True):
                for one in given if isinstance(given, list) else [given]:
                    values = {"model_version": version, **one}
                    self.tasks[task["id"]]["predictions"].append(self._result("predictions", task, values))

    # -- backends and webhooks -------------------------------------------------------------------------------------

    def _list_backends(self, query: Json, body: Any) -> tuple[int, Any]:
        with self.lock:
            rows = [row for row in self.backends.values() if row["project"] == int(query["project"])]
        for row in rows:
            self._set_up(row)
        return 200, rows

    def _add_backend(self, query: Json, body: Json) -> tuple[int, Any]:
        with self.lock:
            project = self.projects[body["project"]]
            row = self._row("backend", {"model_version": "", "state": "DI", "error_message": None, **body})
            self.backends[row["id"]] = row
            project["model_version"] = row["title"]
        for _ in range(2):
            self._set_up(row)
        self._create_webhook({"project": row["project"]}, {"url": f"{row['url'].rstrip('/')}/webhook"})
        return 201, row

    def _patch_backend(self, number: int, query: Json, body: Json) -> tuple[int, Any]:
        if not {"url", "project", "auth_method"} <= body.keys():
            raise _RefusedError(500, "KeyError")
        with self.lock:
            row = self.backends[number]
            project = self.projects[row["project"]]
            if project["model_version"] == row["title"]:
                project["model_version"] = body.get("title", row["title"])
            row |= {key: value for key, value in body.items() if key != "basic_auth_pass" or value}
        for _ in range(3):
            self._set_up(row)
        return 200, row

    def _train(self, number: int, query: Json, body: Any) -> tuple[int, Any]:
        """The train button, which holds the whole row meanwhile and saves it at the end, old title included."""
        with self.lock:
            row = self.backends[number]
            before = dict(row)
        event = {"action": "START_TRAINING", "project": self.project(row["project"])}
        answer = self._ask(row, "/webhook", event, seconds=PATIENCE["/predict"])
        with self.lock:
            row |= before
        return (200, {}) if answer is not None else (500, {"detail": "the backend did not answer"})

    def _list_webhooks(self, query: Json, body: Any) -> tuple[int, Any]:
        with self.lock:
            return 200, [row for row in self.webhooks.values() if row["project"] == int(query["project"])]

    def _create_webhook(self, query: Json, body: Json) -> tuple[int, Any]:
        with self.lock:
            project = body.get("project", query.get("project"))
            row = self._row("webhook", {"headers": {}, "is_active": True, **body, "project": project})
            self.webhooks[row["id"]] = row
        return 201, row

    def _patch_webhook(self, number: int, query: Json, body: Json) -> tuple[int, Any]:
        with self.lock:
            self.webhooks[number] |= body
            return 200, self.webhooks[number]

    def _delete_webhook(self, number: int, query: Json, body: Any) -> tuple[int, Any]:
        with self.lock:
            del self.webhooks[number]
        return 204, None

    def _event(self, project: int, action: str, about: Json) -> None:
        with self.lock:
            hooks = [row for row in self.webhooks.values() if row["project"] == project and row["is_active"]]
        body = {"action": action, **about, "project": self.project(project)} if hooks else {}
        for row in hooks * self.webhook_copies:
            if self.webhook_delay:
                timer = threading.Timer(self.webhook_delay, self._post, (row["url"], body, row["headers"]))
                timer.daemon = True
                timer.start()
            else:
                self._post(row["url"], body, row["headers"])

    def _set_up(self, backend: Json) -> str | None:
        """GET /health and POST /setup; the version, or None, with the backend's new state."""
        project = self.projects[backend["project"]]
        alive = self._ask(backend, "/health", None) is not None
        body = {
            "project": _uid(project),
            "schema": project["label_config"],
            "hostname": self.url,
            "access_token": "",
            "extra_params": None,
        }
        answer = self._ask(backend, "/setup", body) if alive else None
        version = answer.get("model_version") if isinstance(answer, dict) else None
        backend["state"] = "CO" if version is not None else "ER" if alive else "DI"
        backend["error_message"] = None if version is not None else "no answer"
        if version is not None:
            backend["model_version"] = str(version)
        return version

    def _ask(self, backend: Json, path: str, body: Json | None, seconds: float | None = None) -> Any:
        url, auth = backend["url"].rstrip("/") + path, None
        if backend.get("auth_method") == "BASIC_AUTH":
            auth = (backend["basic_auth_user"], backend["basic_auth_pass"])
        return self._post(url, body, {}, auth, seconds)

    def _post(
        self,
        url: str,
        body: Json | None,
        headers: Mapping[str, str],
        auth: tuple[str, str] | None = None,
        seconds: float | None = None,
    ) -> Any:
        """What was answered, None where there was no 2xx in time: then nobody tries again."""
        path = "/" + url.rpartition("/")[2]
        self.calls[path] += 1
        timeout = httpx.Timeout(seconds or PATIENCE[path], connect=1.0)
        method = "GET" if body is None else "POST"
        try:
            answer = self._http.request(method, url, json=body, headers=dict(headers), auth=auth, timeout=timeout)
            return answer.raise_for_status().json()
        except (httpx.HTTPError, ValueError):
            return None


_Work = Callable[..., tuple[int, Any]]
_F = FakeLabelStudio
_ROUTES: tuple[tuple[str, str, _Work], ...] = (
    ("GET", r"api/projects", _F._list_projects),
    ("POST", r"api/projects", _F._create_project),
    ("GET", r"api/projects/(\d+)", lambda self, number, query, body: (200, self.project(number))),
    ("PATCH", r"api/projects/(\d+)", _F._patch_project),
    ("POST", r"api/projects/(\d+)/import", _F._import),
    ("GET", r"api/projects/(\d+)/next", _F._next),
    ("GET", r"api/projects/(\d+)/export", _F._export),
    ("GET", r"api/projects/(\d+)/model-versions", _F._model_versions),
    ("GET", r"api/tasks", _F._list_tasks),
    ("GET", r"api/tasks/(\d+)", _F._get_task),
    ("POST", r"api/tasks/(\d+)/annotations", _F._annotate),
    ("PATCH", r"api/annotations/(\d+)", _F._patch_annotation),
    ("DELETE", r"api/annotations/(\d+)", _F._delete_annotation),
    ("GET", r"api/predictions", _F._list_predictions),
    ("POST", r"api/predictions", _F._create_prediction),
    ("DELETE", r"api/predictions/(\d+)", _F._delete_prediction),
    ("POST", r"api/dm/actions", _F._action),
    ("GET", r"api/ml", _F._list_backends),
    ("POST", r"api/ml", _F._add_backend),
    ("PATCH", r"api/ml/(\d+)", _F._patch_backend),
    ("POST", r"api/ml/(\d+)/train", _F._train),
    ("GET", r"api/webhooks", _F._list_webhooks),
    ("POST", r"api/webhooks", _F._create_webhook),
    ("PATCH", r"api/webhooks/(\d+)", _F._patch_webhook),
    ("DELETE", r"api/webhooks/(\d+)", _F._delete_webhook),
)


def _shown(task: Json) -> Json:
    annotations, predictions = list(task["annotations"]), list(task["predictions"])
    done = sum(not annotation["was_cancelled"] for annotation in annotations)
    return {
        **task,
        "annotations": annotations,
        "predictions": predictions,
        "drafts": [],
        "is_labeled": done > 0,
        "total_annotations": done,
        "cancelled_annotations": len(annotations) - done,
        "total_predictions": len(predictions),
    }


def _labelled(task: Json) -> bool:
    return any(not annotation["was_cancelled"] for annotation in task["annotations"])


def _passes(task: Json, item: Json) -> bool:
    """A filter of the Data Manager, those that the backend uses."""
    name, operator, value = item["filter"].removeprefix("filter:tasks:"), item["operator"], item["value"]
    if name in ("total_annotations", "cancelled_annotations") and operator in ("greater", "equal"):
        count = _shown(task)[name]
        return count > value if operator == "greater" else count == value
    if (name, operator) == ("id", "greater"):
        return bool(task["id"] > value)
    if (name, operator) == ("updated_at", "greater_or_equal"):
        return datetime.fromisoformat(task["updated_at"]) >= datetime.fromisoformat(value)
    if (name, operator) == ("predictions_model_versions", "not_contains"):
        versions = [str(prediction["model_version"]) for prediction in task["predictions"]]
        return not any(part in version for part in value for version in versions)
    raise _RefusedError(400, f"filter {name} {operator} is not known here")


def _uid(project: Json) -> str:
    return f"{project['id']}.{int(datetime.fromisoformat(project['created_at']).timestamp())}"


def _now() -> str:
    return datetime.fromtimestamp(time.time(), UTC).isoformat().replace("+00:00", "Z")


def _parts(content_type: str, body: bytes) -> list[tuple[str, bytes]]:
    """Names and contents of the files of a multipart body."""
    message = BytesParser().parsebytes(b"Content-Type: " + content_type.encode() + b"\r\n\r\n" + body)
    parts = message.get_payload()
    assert isinstance(parts, list)
    return [(part.get_filename() or "file", part.get_payload(decode=True)) for part in parts]


def _handler(studio: FakeLabelStudio) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # head and body in one packet: two would wait for each other, 40 ms
        disable_nagle_algorithm = True

        def _any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, value = studio.answer(self.command, self.path, self.headers, body)
            content = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "image/jpeg" if isinstance(value, bytes) else "application/json")
            self.send_header("Content-Length", str(0 if status == 204 else len(content)))
            self.end_headers()
            self.wfile.write(b"" if status == 204 else content)

        do_GET = do_POST = do_PATCH = do_DELETE = _any  # noqa: N815

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler

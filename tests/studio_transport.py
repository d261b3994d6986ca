"""A Label Studio of one project, and the backends that it calls, behind one httpx transport.

It has the habits that were seen at 1.23.2, and answers in its words where these are read.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

import httpx

URL = "http://studio.example.org:8080/ls"
TOKEN = "0123456789abcdef0123456789abcdef01234567"
BACKEND = "http://backend.example.org:9090"
CREATED = "2026-11-21T19:38:18.810449Z"
UID = "5.1795289898"
VERSION = "yolonas-5-abc123-v0"
CONFIG = (
    '<View><Image name="image" value="$image"/><RectangleLabels name="label" toName="image">'
    '<Label value="car"/><Label value="person"/><Label value="Lorry"/></RectangleLabels></View>'
)
RESERVED = "URL resolves to a reserved network address (block: 127.0.0.0/8)"


class Answer(Exception):  # noqa: N818
    """What is answered instead."""

    def __init__(self, status: int, **body: Any) -> None:
        super().__init__(status, body)
        self.response = httpx.Response(status, json={"status_code": status, **body})


class FakeBackend:
    """A backend; `header` is what it asks for, `name` what it says that it is."""

    def __init__(self, version: str = VERSION, header: str = "", name: str = "yolonas") -> None:
        self.version, self.header, self.name = version, header, name
        self.works = True  # what /setup answers
        self.can_train = True
        self.labels: dict[str, Any] = {}  # what /api/projects/KEY says of them
        self.predicted: list[int] = []
        self.silent: set[int] = set()  # tasks that get no prediction
        self.most = 10**9  # tasks in one request
        self.away = 0  # calls that are not answered
        self.before: Callable[[list[int]], None] = lambda tasks: None

    def __call__(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path.rpartition("/")[2]
        if self.away > 0:
            self.away -= 1
            raise httpx.ConnectError("[Errno 111] Connection refused")
        if path == "health":
            return httpx.Response(200, json={"status": "UP"})
        if self.header and request.headers.get("authorization") != self.header:
            return httpx.Response(401, json={"error": "who are you?"})
        if path == "setup" and not self.works:
            return httpx.Response(503, json={"error": "the disk is full"})
        body = json.loads(request.content) if request.content else {}
        if path == "predict":
            return self._predict(body)
        if self.labels and request.url.path == f"/api/projects/{self.version.removeprefix('yolonas-')[:-3]}":
            return httpx.Response(200, json={"labels": self.labels})
        answers: dict[str, Any] = {
            "": {"name": self.name, "status": "UP", "can_train": self.can_train},
            "setup": {"model_version": self.version},
            "versions": {"versions": [self.version]},
            "webhook": {},
        }
        return httpx.Response(200 if path in answers else 404, json=answers.get(path, {}))

    def _predict(self, body: dict[str, Any]) -> httpx.Response:
        assert body["project"] == UID
        assert body["label_config"] == CONFIG
        tasks = [task["id"] for task in body["tasks"]]
        assert all(task["data"]["image"] for task in body["tasks"])
        if len(tasks) > self.most:
            return httpx.Response(413, json={"error": "too large"})
        self.before(tasks)
        results = [
            [] if task in self.silent else {"result": [{"id": "r"}], "score": 0.5, "model_version": self.version}
            for task in tasks
        ]
        self.predicted += tasks
        return httpx.Response(200, json={"results": results})


class FakeStudio(httpx.MockTransport):
    """Label Studio at URL with project 5; `backends` are those that answer, by address."""

    def __init__(self, tasks: int = 0) -> None:
        super().__init__(self._route)
        self.project: dict[str, Any] = {
            "id": 5,
            "title": "Traffic",
            "created_at": CREATED,
            "label_config": CONFIG,
            "model_version": "",
            "show_collab_predictions": True,
            "sampling": "Sequential sampling",
            "num_tasks_with_annotations": 0,
        }
        self.backends: dict[str, FakeBackend] = {BACKEND: FakeBackend()}
        self.rows: list[dict[str, Any]] = []
        self.webhooks: list[dict[str, Any]] = []
        self.tasks = {n: {"id": n, "data": {"image": f"/data/upload/5/{n}.jpg"}} for n in range(1, tasks + 1)}
        self.predictions: list[dict[str, Any]] = []
        self.version = "1.23.2"
        self.reserved = False  # refuses private addresses
        self.refused = ""  # a pattern of "METHOD path" that the token may not do ...
        self.refusal = 403  # ... and what is answered to it
        self.status = 0  # answered to everything, where it is set
        self.away = 0  # calls that are not answered
        self.lose = 0  # imports that are carried out, but whose answer is lost
        self.overloaded = 0  # imports that are answered 504, and not carried out
        self.files: dict[str, bytes] = {}
        self.calls: Counter[str] = Counter()
        self.ids = 0

    def backend(self, url: str = BACKEND) -> FakeBackend:
        return self.backends[url]

    def _route(self, request: httpx.Request) -> httpx.Response:
        url = str(request.url)
        if not url.startswith(URL):
            parts = urlsplit(url)
            backend = self.backends.get(f"{parts.scheme}://{parts.netloc}")
            if backend is None:
                raise httpx.ConnectError("[Errno 111] Connection refused")
            return backend(request)
        if self.away > 0:
            self.away -= 1
            raise httpx.ConnectError("[Errno 111] Connection refused")
        if self.status:
            return httpx.Response(self.status, json={"detail": "no"})
        path = urlsplit(url).path.removeprefix(urlsplit(URL).path + "/").rstrip("/")
        body = json.loads(request.content) if request.content else {}
        name = f"{request.method} {re.sub('[0-9]+', 'ID', path)}"
        self.calls[name] += 1
        try:
            if path == "api/version":
                return httpx.Response(200, json={"release": self.version})
            if path == "api/token/refresh":
                raise Answer(401, detail="Token is invalid")
            if request.headers.get("authorization") != f"Token {TOKEN}":
                raise Answer(401, detail="Invalid token.")
            if self.refused and re.search(self.refused, f"{request.method} {path}"):
                raise Answer(self.refusal, detail="You do not have permission to perform this action.")
            if path in self.files:
                return httpx.Response(200, content=self.files[path])
            return self._answer(name, path, dict(request.url.params), body)
        except Answer as answer:
            return answer.response

    def _answer(self, name: str, path: str, params: dict[str, str], body: Any) -> httpx.Response:
        number = int(([0] + [int(part) for part in path.split("/") if part.isdecimal()])[-1])
        if name.endswith(("projects/ID", "projects/ID/model-versions", "import/predictions")) and number != 5:
            raise Answer(404, detail="Not found.")
        made: Any
        match name:
            case "GET api/current-user/whoami":
                made = {"email": "ann@example.org"}
            case "GET api/projects/ID":
                made = {**self.project, "task_number": len(self.tasks)}
            case "PATCH api/projects/ID":
                self.project |= body
                made = self.project
            case "GET api/projects/ID/model-versions":
                made = dict(Counter(p["model_version"] for p in self.predictions))
            case "GET api/ml":
                for row in self.rows:
                    self._update(row)
                made = self.rows
            case "POST api/ml":
                made = self._save({"id": self._id(), "auto_update": True, "error_message": None}, body)
                self.rows.append(made)
                if not self.project["model_version"]:
                    self.project["model_version"] = made["title"]
                url = made["url"].rstrip("/") + "/webhook"
                if not any(webhook["url"] == url for webhook in self.webhooks):
                    self.add_webhook(url)
            case "PATCH api/ml/ID":
                row = self._one(self.rows, number)
                title = row["title"]
                made = self._save(row, body)
                if self.project["model_version"] == title:
                    self.project["model_version"] = row["title"]
            case "DELETE api/ml/ID":
                row = self._one(self.rows, number)
                self.rows.remove(row)
                if self.project["model_version"] == row["title"]:
                    self.project["model_version"] = ""
                made = {}
            case "GET api/webhooks":
                made = self.webhooks
            case "POST api/webhooks":
                self._allowed()
                made = self.add_webhook(**{key: value for key, value in body.items() if key != "project"})
            case "PATCH api/webhooks/ID":
                if "url" in body:
                    self._allowed()
                made = self._one(self.webhooks, number)
                made |= body
            case "DELETE api/webhooks/ID":
                self.webhooks.remove(self._one(self.webhooks, number))
                made = {}
            case "GET api/tasks":
                made = self._tasks(params)
            case "GET api/predictions":
                made = self.predictions
            case "DELETE api/predictions/ID":
                self.predictions.remove(self._one(self.predictions, number))
                made = {}
            case "POST api/projects/ID/import/predictions":
                made = self._import(body)
            case _:
                raise Answer(404, detail=f"the fake knows no {name}")
        return httpx.Response(200, json=made)

    # -- backends and webhooks -------------------------------------------------------------------------------------

    def add_webhook(self, url: str, **values: Any) -> dict[str, Any]:
        whole = {"send_payload": True, "send_for_all_actions": True, "is_active": True, "headers": {}}
        self.webhooks.append({"id": self._id(), "url": url, **whole, **values})
        return self.webhooks[-1]

    def add_row(self, url: str, title: str = "My model", **values: Any) -> dict[str, Any]:
        row = {"id": self._id(), "project": 5, "url": url, "title": title, "auth_method": "NONE", "state": "CO"}
        self.rows.append({**row, "model_version": "", "error_message": None, "auto_update": True, **values})
        self._update(self.rows[-1])
        return self.rows[-1]

    def _id(self) -> int:
        self.ids += 1
        return self.ids

    def _one(self, stored: list[dict[str, Any]], number: int) -> dict[str, Any]:
        found = [one for one in stored if one["id"] == number]
        if not found:
            raise Answer(404, detail="Not found.")
        return found[0]

    def _allowed(self) -> None:
        if self.reserved:
            raise Answer(403, detail=RESERVED)

    def _ask(self, row: Mapping[str, Any], path: str) -> httpx.Response | None:
        backend = self.backends.get(str(row["url"]).rstrip("/"))
        if backend is None or self.reserved:
            return None
        login = httpx.BasicAuth(row["basic_auth_user"], row["_pass"]) if row.get("_pass") else None
        method = "GET" if path == "health" else "POST"
        with httpx.Client(transport=httpx.MockTransport(backend)) as http:
            try:
                return http.request(method, f"{str(row['url']).rstrip('/')}/{path}", auth=login)
            except httpx.TransportError:
                return None

    def _update(self, row: dict[str, Any]) -> None:
        health, setup = self._ask(row, "health"), self._ask(row, "setup")
        if health is None or setup is None:
            row["state"] = "DI"
        elif not setup.is_success:
            row |= {"state": "ER", "error_message": f"{setup.status_code} Client Error: for url: {row['url']}/setup"}
        else:
            row |= {"state": "CO", "error_message": None}
            if row["auto_update"]:
                row["model_version"] = setup.json()["model_version"]

    def _save(self, row: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
        self._allowed()
        if "url" not in body or "auth_method" not in body:
            raise Answer(500, detail="KeyError")
        new = {**row, **body}
        if body.get("basic_auth_pass"):
            new["_pass"] = body["basic_auth_pass"]
        new.pop("basic_auth_pass", None)
        health, setup = self._ask(new, "health"), self._ask(new, "setup")
        error = ""
        if health is None or setup is None:
            error = (
                f"Can't connect to ML backend {new['url']}, health check failed. Make sure it is up and your "
                'firewall is properly configured. <a href="https://labelstud.io/guide/ml.html">Learn more</a> about '
                "how to set up an ML backend. Additional info: HTTPConnectionPool(host='b', port=1): Max retries "
                "exceeded with url: "
                '/health (Caused by NewConnectionError("failed: [Errno 111] Connection refused"))'
            )
        elif not setup.is_success:
            error = (
                f"Successfully connected to {new['url']} but it doesn't look like a valid ML backend. Reason: "
                f"{setup.status_code} Client Error: Unauthorized for url: {new['url']}/setup.\nCheck the ML backend "
                "server console logs to check the status."
            )
        if error:
            raise Answer(400, detail="Validation error", validation_errors={"non_field_errors": [error]})
        row |= new
        self._update(row)
        return row

    # -- tasks and predictions -------------------------------------------------------------------------------------

    def _tasks(self, params: dict[str, str]) -> dict[str, Any]:
        assert params["resolve_uri"] == "false"
        found = list(self.tasks.values())
        for item in json.loads(params.get("query", "{}")).get("filters", {}).get("items", []):
            if (item["filter"], item["operator"]) == ("filter:tasks:id", "greater"):
                found = [task for task in found if task["id"] > item["value"]]
            elif item["filter"] == "filter:tasks:id":
                low, high = item["value"]["min"], item["value"]["max"]
                found = [task for task in found if low <= task["id"] <= high]
            else:
                assert (item["filter"], item["operator"]) == ("filter:tasks:predictions_model_versions", "not_contains")
                have = {p["task"] for p in self.predictions if item["value"][0] in p["model_version"]}
                found = [task for task in found if task["id"] not in have]
        size, page = int(params["page_size"]), int(params.get("page", 1))
        shown: list[dict[str, Any]] = [dict(task) for task in found[(page - 1) * size : page * size]]
        if params["fields"] == "all":
            for task in shown:
                task["predictions"] = [p for p in self.predictions if p["task"] == task["id"]]
        return {"tasks": shown, "total": len(found)}

    def _import(self, body: list[dict[str, Any]]) -> dict[str, Any]:
        if any(item["task"] not in self.tasks for item in body):
            raise Answer(400, detail="Validation error", validation_errors={"non_field_errors": ["invalid task"]})
        if self.overloaded > 0:
            self.overloaded -= 1
            raise Answer(504, detail="Gateway Time-out")
        self.predictions += [{"id": self._id(), **item} for item in body]
        if self.lose > 0:
            self.lose -= 1
            raise httpx.ReadTimeout("timed out")
        return {"created": len(body)}

    def of_version(self, version: str = VERSION) -> list[int]:
        """The tasks of the predictions of a version, each as often as it has one."""
        return sorted(p["task"] for p in self.predictions if p["model_version"] == version)

"""The calls to Label Studio: both kinds of tokens, sub-paths, time-outs, retries, and errors that say what to do."""

from __future__ import annotations

import base64
import binascii
import json
import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, BinaryIO

import httpx

from labelstudio_backend.redaction import hide, redact
from yolonas.errors import YolonasError

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 3.0
READ_SECONDS = 60.0
IMPORT_SECONDS = 300.0  # it counts the predictions of every task of the project after each import
RETRIES = 3
RETRY_SECONDS = 0.5  # doubled each time
REFRESH_MARGIN = 30.0  # access tokens live 300 s
TITLE_TRIES = 4
PAGE = 100
DETAIL = 800  # characters of what Label Studio says of an error
_RESERVED = "reserved network address"
RESERVED_ADVICE = (
    "it refuses addresses of its own machine and private network (since 1.23.1); start Label Studio with "
    "USE_DEFAULT_BANNED_SUBNETS=false"
)
DIRECT = {f"all://{host}": None for host in ("localhost", "127.0.0.1", "[::1]")}  # a proxy knows another loopback


class LabelStudioError(YolonasError):
    """A call to Label Studio that failed; `status` is its HTTP status, None when there was no answer."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(redact(message))
        self.status = status


class LabelStudio:
    """A Label Studio at `url` (sub-paths allowed), called with a legacy token or a personal access token.

    Safe for several threads. Calls are tried again on connection errors, 429, 502, 503 and 504; a POST, which may have
    been carried out, only where nobody listened, or on 429. (PATCH is called with whole values, and may be repeated.)
    """

    def __init__(
        self,
        url: str,
        token: str | None,
        *,
        read_seconds: float = READ_SECONDS,
        retries: int = RETRIES,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self._token = token or ""
        hide(token)
        self._personal = self._token.count(".") == 2
        self._access = ""
        self._access_until = 0.0
        self._refreshing = threading.Lock()
        self._retries = retries
        self._http = httpx.Client(
            base_url=self.url + "/",
            timeout=httpx.Timeout(read_seconds, connect=CONNECT_SECONDS),
            follow_redirects=False,
            transport=transport,
            mounts=DIRECT,
            headers={"User-Agent": "yolonas"},
        )

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> LabelStudio:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # -- Label Studio itself -----------------------------------------------------------------------------------

    def version(self) -> str:
        """Its version, like 1.23.2; "" where it does not say. A client without a token may ask."""
        return str(self._object("GET", "api/version/").get("release", ""))

    def user(self) -> str:
        """The e-mail address of the token's user."""
        return str(self._object("GET", "api/current-user/whoami").get("email", ""))

    # -- projects and tasks ------------------------------------------------------------------------------------

    def get_project(self, project: int) -> dict[str, Any]:
        """The project: `id`, `title`, `label_config`, `model_version`, `created_at`, counters."""
        return self._object("GET", f"api/projects/{project}/")

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
        ordering: Sequence[str] = ("tasks:id",),
        **params: Any,
    ) -> Iterator[dict[str, Any]]:
        """All tasks with `data` (URIs unresolved), `annotations` (skipped ones too), `predictions` and `drafts`, by ID.

        `only_annotated` leaves out tasks whose every annotation is skipped or that have none. `filters` are the Data
        Manager's, all of which must hold. `fields="task_only"` leaves out the last three.
        """
        items = [dict(item) for item in filters]
        if only_annotated:
            items.append(
                {"filter": "filter:tasks:total_annotations", "operator": "greater", "type": "Number", "value": 0}
            )
        query: dict[str, Any] = {"ordering": list(ordering)}
        if items:
            query["filters"] = {"conjunction": "and", "items": items}
        common = {"project": project, "fields": "all", "resolve_uri": "false", "query": json.dumps(query), **params}
        page, seen = 1, 0
        while True:
            answer = self._json("GET", "api/tasks", params={**common, "page": page, "page_size": page_size})
            yield from answer["tasks"]
            seen += len(answer["tasks"])
            if not answer["tasks"] or seen >= answer["total"]:
                return
            page += 1

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

    def authorization(self) -> dict[str, str]:
        """The header that authorizes a call, after refreshing the access token where it is about to expire."""
        if not self._token:
            return {}
        if not self._personal:
            return {"Authorization": f"Token {self._token}"}
        with self._refreshing:
            if time.time() > self._access_until - REFRESH_MARGIN:
                self._refresh()
            return {"Authorization": f"Bearer {self._access}"}

    def forget_access(self) -> None:
        """Have the next call refresh the access token; for who saw a 401."""
        self._access_until = 0.0

    @property
    def refreshable(self) -> bool:
        """Whether a 401 may be mended by refreshing: the token is a personal access token."""
        return self._personal

    def download(self, path: str, *, max_bytes: int = 2**30) -> bytes:
        """A file of Label Studio's, like `/data/upload/5/659649fc-im0.jpg`, relative to its base URL."""
        answer = self._request("GET", path.lstrip("/"))
        if len(answer.content) > max_bytes:
            raise LabelStudioError(f"{self.url}/{path.lstrip('/')} is larger than {max_bytes} bytes")
        return answer.content

    # -- the one door ------------------------------------------------------------------------------------------

    def _object(self, method: str, path: str, **kwargs: Any) -> dict[str, Any]:
        answer = self._json(method, path, **kwargs)
        if not isinstance(answer, dict):
            raise LabelStudioError(f"{self.url}/{path} answered {type(answer).__name__}, not an object")
        return answer

    def _json(self, method: str, path: str, **kwargs: Any) -> Any:
        answer = self._request(method, path, **kwargs)
        try:
            return answer.json()
        except ValueError:
            raise LabelStudioError(
                f"{answer.request.url.copy_with(query=None)} answered something that is not JSON; check that "
                f"{self.url} is Label Studio's address, with its sub-path",
                answer.status_code,
            ) from None

    def _request(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        attempts = self._retries + 1
        refreshed = False
        for attempt in range(attempts):
            last = attempt == attempts - 1
            try:
                answer = self._http.request(method, path, headers=self.authorization(), **kwargs)
            except httpx.TransportError as error:
                # a POST may have been carried out although its answer was lost; nobody listening is safe to repeat
                if last or not (method != "POST" or isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)):
                    raise LabelStudioError(
                        f"no answer from Label Studio at {self.url} ({_reason(error)}); check that it runs and that "
                        "YOLONAS_LABEL_STUDIO_URL is its address"
                    ) from error
            else:
                if answer.status_code == 401 and self._personal and not refreshed:
                    refreshed = True
                    self.forget_access()
                    if not last:
                        continue
                retry = answer.status_code == 429 or (method != "POST" and answer.status_code in (502, 503, 504))
                if last or not retry:
                    if answer.is_success:
                        return answer
                    raise self._error(answer)
            time.sleep(RETRY_SECONDS * 2**attempt)
        raise AssertionError("unreachable")

    def _refresh(self) -> None:
        url = f"{self.url}/api/token/refresh/"
        try:
            answer = self._http.post("api/token/refresh/", json={"refresh": self._token})
        except httpx.TransportError as error:
            raise LabelStudioError(
                f"no answer from Label Studio at {self.url} ({_reason(error)}); check that it runs and that "
                "YOLONAS_LABEL_STUDIO_URL is its address"
            ) from error
        if answer.status_code in (502, 503, 504):
            raise LabelStudioError(
                f"{url} answered {answer.status_code}; is Label Studio still starting?", answer.status_code
            )
        access = answer.json().get("access") if answer.is_success and _is_json(answer) else None
        if not isinstance(access, str):
            raise LabelStudioError(
                f"{url} refused the personal access token ({answer.status_code}); make a new one in Label Studio under "
                "Account & Settings, and set YOLONAS_LABEL_STUDIO_TOKEN",
                answer.status_code,
            )
        self._access, self._access_until = access, _expiry(access)

    def _error(self, answer: httpx.Response) -> LabelStudioError:
        status, url = answer.status_code, answer.request.url.copy_with(query=None)
        if status == 401:
            advice = (
                "set YOLONAS_LABEL_STUDIO_TOKEN to a personal access token"
                if not self._token
                else "the token was refused: a legacy token works only where legacy tokens are switched on in the "
                "organization's settings; set YOLONAS_LABEL_STUDIO_TOKEN to a personal access token"
            )
        elif status == 403 and _RESERVED in answer.text:
            advice = RESERVED_ADVICE
        elif status == 403:
            advice = "the token's user may not do this; use a token of a member of the project"
        elif status == 404:
            advice = "it is not there; check YOLONAS_LABEL_STUDIO_URL and that the project still exists"
        elif answer.is_redirect:
            location = answer.headers.get("location", "?")
            advice = f"it redirects to {location}; set YOLONAS_LABEL_STUDIO_URL to the final address"
        else:
            advice = f"it says: {_detail(answer)}"
        return LabelStudioError(f"{answer.request.method} {url} answered {status}; {advice}", status)


def project_uid(project: Mapping[str, Any]) -> str:
    """ "ID.timestamp", by which Label Studio names a project to its backends; raises ValueError, KeyError."""
    return f"{project['id']}.{int(datetime.fromisoformat(str(project['created_at'])).timestamp())}"


def _is_json(answer: httpx.Response) -> bool:
    return str(answer.headers.get("content-type", "")).startswith("application/json")


def _detail(answer: httpx.Response) -> str:
    """What Label Studio says of an error, without its JSON and HTML."""
    text = answer.text
    try:
        body = answer.json() if _is_json(answer) else None
    except ValueError:
        body = None
    if isinstance(body, dict):
        errors = body.get("validation_errors")
        if isinstance(errors, dict) and errors:
            lines = [line for found in errors.values() for line in (found if isinstance(found, list) else [found])]
            text = "; ".join(map(str, lines))
        else:
            text = str(body.get("detail") or text)
    text = " ".join(re.sub(r"</?\w[^<>]*>", "", text).split())
    return text[:DETAIL] or "nothing"


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def _expiry(jwt: str) -> float:
    """When the access token expires by our clock; 300 s from now where it does not say."""
    payload = jwt_payload(jwt)
    try:
        # exp - iat, not exp: the two machines' clocks need not agree
        return time.time() + float(payload["exp"]) - float(payload["iat"])
    except (ValueError, KeyError, TypeError):
        return time.time() + 300.0


def jwt_payload(token: str) -> dict[str, Any]:
    """What a JSON web token says of itself, unverified; empty for any other token."""
    with_padding = token.split(".")[1] + "==" if token.count(".") == 2 else ""
    try:
        payload = json.loads(base64.urlsafe_b64decode(with_padding))
    except (binascii.Error, ValueError):
        return {}
    return payload if isinstance(payload, dict) else {}

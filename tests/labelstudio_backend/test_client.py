"""Tokens, sub-paths, retries and messages of the Label Studio client, against a scripted server."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import httpx
import pytest

from labelstudio_backend import label_studio_http
from labelstudio_backend.client import LabelStudio
from labelstudio_backend.label_studio_http import LabelStudioError

LEGACY = "0123456789abcdef0123456789abcdef01234567"
URL = "http://studio.example.org:8080/ls"


def jwt(lifetime: float, mark: str = "") -> str:
    issued = 1_000_000.0  # the server's clock is not ours
    payload = base64.urlsafe_b64encode(json.dumps({"iat": issued, "exp": issued + lifetime}).encode()).decode()
    return f"head{mark}.{payload.rstrip('=')}.signature"


PERSONAL = jwt(1e9, "personal")


class Server:
    """Answers from a list, keeping what was asked."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self.answers.pop(0) if self.answers else httpx.Response(200, json={})
        if isinstance(answer, Exception):
            raise answer
        return answer(request) if callable(answer) else answer


@pytest.fixture(autouse=True)
def _no_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_studio_http, "RETRY_SECONDS", 0.0)


@pytest.fixture
def connect() -> Iterator[Callable[..., LabelStudio]]:
    made = []

    def make(server: Server, token: str | None = LEGACY, url: str = URL) -> LabelStudio:
        made.append(LabelStudio(url, token, transport=httpx.MockTransport(server)))
        return made[-1]

    yield make
    for client in made:
        client.close()


def test_a_legacy_token_and_a_sub_path(connect: Callable[..., LabelStudio]) -> None:
    server = Server(httpx.Response(200, json={"id": 5}))
    assert connect(server, url=URL + "/").get_project(5) == {"id": 5}
    (request,) = server.requests
    assert str(request.url) == URL + "/api/projects/5/"
    assert request.headers["Authorization"] == f"Token {LEGACY}"


def test_no_token_no_header(connect: Callable[..., LabelStudio]) -> None:
    server = Server()
    connect(server, token=None).get_project(5)
    assert "Authorization" not in server.requests[0].headers


def test_a_personal_token_is_exchanged_once_and_again_before_it_expires(
    connect: Callable[..., LabelStudio], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = jwt(300, "1"), jwt(300, "2")
    server = Server(httpx.Response(200, json={"access": first}), *[httpx.Response(200, json={})] * 2)
    client = connect(server, token=PERSONAL)
    client.get_project(5)
    client.get_project(5)
    assert [request.url.path for request in server.requests] == ["/ls/api/token/refresh/"] + ["/ls/api/projects/5/"] * 2
    assert json.loads(server.requests[0].content) == {"refresh": PERSONAL}
    assert server.requests[2].headers["Authorization"] == f"Bearer {first}"
    later = time.time() + 280
    monkeypatch.setattr(time, "time", lambda: later)
    server.answers = [httpx.Response(200, json={"access": second}), httpx.Response(200, json={})]
    client.get_project(5)
    assert server.requests[-1].headers["Authorization"] == f"Bearer {second}"


def test_a_personal_token_is_refreshed_on_401_once(connect: Callable[..., LabelStudio]) -> None:
    refreshed = httpx.Response(200, json={"access": jwt(300)})
    server = Server(refreshed, httpx.Response(401), refreshed, httpx.Response(200, json={"id": 1}))
    assert connect(server, token=PERSONAL).get_project(1) == {"id": 1}
    server = Server(refreshed, httpx.Response(401), refreshed, httpx.Response(401))
    with pytest.raises(LabelStudioError, match="personal access token") as raised:
        connect(server, token=PERSONAL).get_project(1)
    assert raised.value.status == 401
    assert len(server.requests) == 4


def test_a_refused_personal_token(connect: Callable[..., LabelStudio]) -> None:
    server = Server(httpx.Response(401, json={"detail": "Token is blacklisted"}))
    with pytest.raises(LabelStudioError, match=r"refused the personal access token \(401\); make a new one"):
        connect(server, token=PERSONAL).get_project(1)
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_read_is_tried_again(connect: Callable[..., LabelStudio], status: int) -> None:
    server = Server(httpx.Response(status), httpx.ReadTimeout("slow"), httpx.Response(200, json={"id": 1}))
    assert connect(server).get_project(1) == {"id": 1}
    server = Server(*[httpx.Response(status, text="busy")] * 4, httpx.Response(200, json={}))
    with pytest.raises(LabelStudioError, match=f"answered {status}; it says: busy"):
        connect(server).get_project(1)


def test_a_write_is_not_repeated_when_it_may_have_happened(connect: Callable[..., LabelStudio]) -> None:
    server = Server(httpx.ReadTimeout("slow"))
    with pytest.raises(LabelStudioError, match="no answer from Label Studio"):
        connect(server).create_annotation(3, [])
    assert len(server.requests) == 1
    server = Server(httpx.ConnectError("refused"), httpx.Response(429), httpx.Response(201, json={"id": 4}))
    assert connect(server).create_annotation(3, [], was_cancelled=True) == {"id": 4}
    assert json.loads(server.requests[2].content) == {"result": [], "was_cancelled": True}


@pytest.mark.parametrize("status", [502, 503, 504])
def test_a_write_that_a_gateway_gave_up_on_is_not_repeated(connect: Callable[..., LabelStudio], status: int) -> None:
    server = Server(httpx.Response(status, text="busy"))
    with pytest.raises(LabelStudioError, match=f"answered {status}; it says: busy"):
        connect(server).create_annotation(3, [])
    assert len(server.requests) == 1
    server = Server(httpx.Response(status), httpx.Response(204))
    connect(server).delete_annotation(3)
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("answer", "token", "message"),
    [
        (httpx.Response(401), None, "set YOLONAS_LABEL_STUDIO_TOKEN to a personal access token"),
        (httpx.Response(401), LEGACY, "a legacy token works only where"),
        (httpx.Response(403), LEGACY, "a member of the project"),
        (httpx.Response(404), LEGACY, "check YOLONAS_LABEL_STUDIO_URL"),
        (httpx.Response(302, headers={"location": "https://s/"}), LEGACY, "redirects to https://s/; set"),
        (httpx.Response(500, text="KeyError\n  at line 3"), LEGACY, "it says: KeyError at line 3"),
        (httpx.Response(200, text="<html>", headers={"content-type": "text/html"}), LEGACY, "is not JSON"),
        (httpx.ConnectError("[Errno 111] Connection refused"), LEGACY, "Connection refused.*check that it runs"),
    ],
)
def test_errors_are_one_sentence_that_names_the_address(
    connect: Callable[..., LabelStudio], answer: Any, token: str | None, message: str
) -> None:
    server = Server(*[answer] * 4)
    with pytest.raises(LabelStudioError, match=message) as raised:
        connect(server, token=token).get_project(7)
    text = str(raised.value)
    assert URL in text
    assert "\n" not in text
    assert LEGACY not in text


@pytest.mark.parametrize("token", [LEGACY, PERSONAL])
def test_tokens_are_never_in_messages(connect: Callable[..., LabelStudio], token: str) -> None:
    server = Server(*[httpx.ConnectError("refused")] * 9)
    client = connect(server, token=token)
    with pytest.raises(LabelStudioError) as raised:
        client.get_project(7)
    assert token not in str(raised.value)
    assert token not in repr(client)


def page(tasks: Mapping[int, int]) -> Callable[[httpx.Request], httpx.Response]:
    """Answers GET /api/tasks of these tasks: ID -> number of annotations."""

    def answer(request: httpx.Request) -> httpx.Response:
        bounds = {"total_annotations": -1, "id": 0}
        for item in json.loads(request.url.params["query"])["filters"]["items"]:
            assert item["operator"] == "greater"
            bounds[item["filter"].removeprefix("filter:tasks:")] = item["value"]
        found = [n for n, count in sorted(tasks.items()) if count > bounds["total_annotations"] and n > bounds["id"]]
        shown = found[: int(request.url.params["page_size"])]
        return httpx.Response(200, json={"tasks": [{"id": number} for number in shown], "total": len(found)})

    return answer


def test_tasks_are_paged(connect: Callable[..., LabelStudio]) -> None:
    server = Server(*[page(dict.fromkeys(range(1, 6), 1))] * 9)
    found = list(connect(server).iter_tasks(7, page_size=2, only_annotated=True))
    assert [task["id"] for task in found] == [1, 2, 3, 4, 5]
    assert len(server.requests) == 3
    params = server.requests[0].url.params
    assert (params["project"], params["fields"]) == ("7", "all")
    assert json.loads(params["query"])["filters"]["items"][0]["filter"] == "filter:tasks:total_annotations"


@pytest.mark.parametrize(("task", "annotations"), [(1, 1), (2, 0), (6, 0)])
def test_a_task_that_is_labelled_or_not_any_more_meanwhile_moves_no_other(
    connect: Callable[..., LabelStudio], task: int, annotations: int
) -> None:
    tasks = {1: 0, 2: 1, 3: 1, 4: 1, 5: 1, 6: 1}
    server = Server(*[page(tasks)] * 9)
    found = connect(server).iter_tasks(7, page_size=2, only_annotated=True)
    seen = [next(found)["id"], next(found)["id"]]
    tasks[task] = annotations
    seen += [one["id"] for one in found]
    assert seen == [n for n in (2, 3, 4, 5, 6) if n != 6 or task != 6]


def test_no_tasks(connect: Callable[..., LabelStudio]) -> None:
    server = Server(httpx.Response(200, json={"tasks": [], "total": 0}))
    assert list(connect(server).iter_tasks(7)) == []


def test_a_patched_backend_keeps_its_address_and_login(connect: Callable[..., LabelStudio]) -> None:
    server = Server()
    backend = {"id": 4, "url": "http://b:9090", "project": 7, "title": "old", "auth_method": "NONE", "state": "CO"}
    connect(server).patch_ml_backend(backend, title="yolonas-7-abc123-v1")
    assert server.requests[0].method == "PATCH"
    assert json.loads(server.requests[0].content) == {
        "url": "http://b:9090",
        "project": 7,
        "auth_method": "NONE",
        "title": "yolonas-7-abc123-v1",
    }
    connect(server).patch_ml_backend({**backend, "auth_method": "BASIC_AUTH", "basic_auth_user": "u"}, title="t")
    assert json.loads(server.requests[1].content)["basic_auth_user"] == "u"


def test_predictions_are_counted_by_version(connect: Callable[..., LabelStudio]) -> None:
    stored = [{"task": task, "model_version": version} for task, version in [(1, "a"), (1, "b"), (2, "b"), (2, "b")]]
    server = Server(httpx.Response(200, json=stored))
    assert connect(server).count_predictions(7, "b") == 2


def test_asking_for_predictions_of_some_tasks(connect: Callable[..., LabelStudio]) -> None:
    server = Server()
    client = connect(server)
    client.retrieve_predictions(7)
    client.retrieve_predictions(7, [3, 4])
    bodies = [json.loads(request.content) for request in server.requests]
    assert bodies[0] == {"selectedItems": {"all": True, "excluded": []}}
    assert bodies[1] == {"selectedItems": {"all": False, "included": [3, 4]}}
    assert server.requests[0].url.params["id"] == "retrieve_tasks_predictions"


def test_uploading_and_downloading(connect: Callable[..., LabelStudio]) -> None:
    server = Server(httpx.Response(201, json={"task_ids": [1, 2]}), httpx.Response(200, content=b"jpeg"))
    client = connect(server)
    assert client.upload_files(7, [("a.jpg", b"A"), ("b.jpg", b"B")]) == [1, 2]
    assert b'filename="b.jpg"' in server.requests[0].content
    assert client.download("/data/upload/7/a.jpg") == b"jpeg"
    assert str(server.requests[1].url) == URL + "/data/upload/7/a.jpg"

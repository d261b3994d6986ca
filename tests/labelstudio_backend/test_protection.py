"""Who may call the backend, from where, and with how much."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from labelstudio_backend import protection
from labelstudio_backend.cli import describe
from labelstudio_backend.protection import Protection, RefusedError, read_json
from labelstudio_backend.settings import Settings

SECRET, USER, PASSWORD = "0f1e2d3c4b5a69788796", "labeller", "päss:wörd 12"
PAGE = "https://evil.example.org"


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """An application that answers how many bytes it was sent."""
    if scope["type"] == "http":
        size, more = 0, True
        while more:
            message = await receive()
            size, more = size + len(message.get("body", b"")), message.get("more_body", False)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": str(size).encode()})


def settings(**values: Any) -> Settings:
    return Settings(**{"label_studio_url": "", "label_studio_token": None, **values})


def call(
    method: str = "GET",
    path: str = "/",
    *,
    content: bytes | Iterable[bytes] | None = None,
    host: str = "127.0.0.1:9090",
    headers: dict[str, str] | None = None,
    **values: Any,
) -> httpx.Response:
    """One request to `echo` behind the middleware with these settings."""

    async def stream(chunks: Iterable[bytes]) -> AsyncIterator[bytes]:
        for chunk in chunks:
            yield chunk

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(Protection(echo, settings(**values)), raise_app_exceptions=True)
        async with httpx.AsyncClient(transport=transport, base_url=f"http://{host}") as client:
            body = content if isinstance(content, bytes | None) else stream(content)
            return await client.request(method, path, content=body, headers=headers)

    return asyncio.run(ask())


def basic(user: str, password: str, encoding: str = "utf-8") -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode(encoding)).decode()}


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("YOLONAS_STATE_DIR", str(tmp_path))


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        (basic(USER, PASSWORD), 200),
        (basic(USER, PASSWORD, "latin-1"), 200),  # Label Studio's way
        (basic(USER, "wrong"), 401),
        (basic("wrong", PASSWORD), 401),
        (basic(USER, ""), 401),
        (basic("", ""), 401),
        (basic("anybody", SECRET), 200),  # a browser has no other way to give it
        ({"Authorization": f"Bearer {SECRET}"}, 200),
        ({"authorization": f"bearer  {SECRET} "}, 200),
        ({"Authorization": f"Bearer {PASSWORD[2:]}".encode("ascii", "ignore").decode()}, 401),
        ({"Authorization": "Bearer "}, 401),
        ({"Authorization": "Bearer"}, 401),
        ({"Authorization": SECRET}, 401),
        ({"Authorization": f"Token {SECRET}"}, 401),
        ({"Authorization": "Basic %%%"}, 401),
        ({"Authorization": "Basic " + base64.b64encode(b"\xff\xfe").decode()}, 401),
    ],
)
def test_who_may_call(headers: dict[str, str], status: int) -> None:
    protected = {"basic_auth_user": USER, "basic_auth_pass": PASSWORD, "secret": SECRET}
    answer = call("POST", "/predict", content=b"{}", headers=headers, **protected)
    assert answer.status_code == status
    if status == 401:
        assert answer.headers["WWW-Authenticate"].startswith("Basic ")  # a browser asks its user
        assert list(answer.json()) == ["error"]
        assert SECRET not in answer.text
    assert call("GET", "/health", headers=headers, **protected).status_code == 200


def test_either_way_alone_is_enough() -> None:
    assert call(headers={"Authorization": f"Bearer {SECRET}"}, secret=SECRET).status_code == 200
    assert call(headers=basic("", ""), secret=SECRET).status_code == 401
    assert call(headers={"Authorization": "Bearer "}, basic_auth_user=USER, basic_auth_pass=PASSWORD).status_code == 401
    assert call().status_code == 200


@pytest.mark.parametrize("name", ["/health/", "/health/../predict", "//health", "/HEALTH", "/healthy"])
def test_only_health_is_open(name: str) -> None:
    assert call("GET", name, secret=SECRET).status_code == 401


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),  # Label Studio, curl
        ({"Sec-Fetch-Site": "same-origin", "Origin": "http://behind.a.proxy"}, 200),
        ({"Sec-Fetch-Site": "none"}, 200),
        ({"Sec-Fetch-Site": "cross-site", "Origin": PAGE}, 403),
        ({"Sec-Fetch-Site": "same-site", "Origin": "http://127.0.0.1:8080"}, 403),
        ({"Origin": PAGE}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://[half"}, 403),
        ({"Origin": "http://127.0.0.1:8080"}, 403),  # another server of this machine
        ({"Origin": "http://127.0.0.1:9090"}, 200),
    ],
)
@pytest.mark.parametrize("method", ["POST", "DELETE"])
def test_a_page_of_another_site_changes_nothing(method: str, headers: dict[str, str], status: int) -> None:
    assert call(method, "/webhook", headers=headers).status_code == status
    login = {"Authorization": f"Bearer {SECRET}"}  # the password that a browser keeps does not help the page
    assert call(method, "/webhook", headers={**headers, **login}, secret=SECRET).status_code == status
    assert call("GET", "/", headers=headers).status_code == 200  # which the page may not read: there is no CORS header


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:9090", 200),
        ("127.0.0.1", 200),
        ("[::1]:9090", 200),
        ("192.168.1.7:9090", 200),
        ("yolonas:9090", 200),  # a container's name
        ("host.docker.internal:9090", 200),
        ("evil.example.org:9090", 403),
        ("127.0.0.1.nip.io", 403),
        ("localhost.example.org", 403),
        ("127.0.0.1:port", 200),
    ],
)
def test_a_name_of_a_stranger_is_not_answered_on_loopback(host: str, status: int) -> None:
    assert call(headers={"Host": host}).status_code == status
    login = {"Host": host, "Authorization": f"Bearer {SECRET}"}
    assert call(headers=login, secret=SECRET).status_code == 200  # a stranger's page has no password
    assert call(headers={"Host": host}, host="0.0.0.0").status_code == status


def test_open_to_the_network_it_has_any_name_and_says_that_anyone_may_call(tmp_path: Path) -> None:
    async def ask() -> int:
        transport = httpx.ASGITransport(Protection(echo, settings(host="0.0.0.0")))
        async with httpx.AsyncClient(transport=transport, base_url="http://gpu.example.org") as client:
            return (await client.get("/")).status_code

    assert asyncio.run(ask()) == 200

    def said(**values: Any) -> str:
        return next(line for line in describe(settings(state_dir=tmp_path, **values), "x") if line.startswith("Access"))

    assert "WARNING: whoever reaches port 9090" in said(host="0.0.0.0")
    assert "WARNING: whoever" in said(host="192.168.1.7")
    for loopback in ("127.0.0.1", "::1", "localhost", "127.8.8.8"):
        assert "on this machine only" in said(host=loopback)
    assert said(host="0.0.0.0", secret=SECRET).endswith("Every call but /health needs the secret.")


def test_a_body_too_large_is_refused_with_and_without_its_length() -> None:
    assert call("POST", content=b"x" * 2000, max_body_bytes=2000).text == "2000"
    for content in (b"x" * 2001, [b"x" * 1000] * 3):
        answer = call("POST", content=content, max_body_bytes=2000)
        assert answer.status_code == 413
        assert "larger than 2000 bytes" in answer.json()["error"]
        assert "YOLONAS_MAX_BODY_BYTES" in answer.json()["error"]
        assert answer.headers["connection"] == "close"


def test_250_photographs_or_5000_tasks_pass_by_default() -> None:
    assert settings().max_body_bytes >= max(250 * 1.5e6 * 4 / 3, 5000 * 50_000)


def slow(chunks: Iterable[bytes], seconds: float) -> tuple[int, float]:
    """Send a body chunk by chunk; the status of the answer, and when it came."""
    waiting = iter(chunks)

    async def ask() -> tuple[int, float]:
        async def receive() -> dict[str, Any]:
            await asyncio.sleep(seconds)
            chunk = next(waiting, None)
            return {"type": "http.request", "body": chunk or b"", "more_body": chunk is not None}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        statuses: list[int] = []
        scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"host", b"localhost")]}
        begin = time.monotonic()
        await Protection(echo, settings())(scope, receive, send)
        return statuses[0], time.monotonic() - begin

    return asyncio.run(ask())


def test_a_body_that_trickles_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protection, "BODY_SECONDS", 0.2)
    monkeypatch.setattr(protection, "DRAIN_SECONDS", 0.1)
    endless: Iterator[bytes] = iter(lambda: b"x", b"")
    assert slow(endless, 0.02)[0] == 408
    assert slow([b"x"], 30)[0] == 408  # nothing at all
    large = [b"x" * 100_000] * 15  # 1 s for each of them
    assert slow(large, 0.02)[0] == 200, "slower than 0.2 s, but not slow for its size"


def test_after_the_body_it_waits_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who computes for a minute asks `receive` meanwhile whether the client is still there."""
    monkeypatch.setattr(protection, "BODY_SECONDS", 0.05)

    async def patient(scope: Any, receive: Any, send: Any) -> None:
        seen.append((await receive())["type"])
        seen.append((await receive())["type"])

    async def ask() -> None:
        async def receive() -> dict[str, Any]:
            if not seen:
                return {"type": "http.request", "body": b"{}", "more_body": False}
            await asyncio.sleep(0.2)
            return {"type": "http.disconnect"}

        scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"host", b"localhost")]}
        await Protection(patient, settings())(scope, receive, lambda message: asyncio.sleep(0))

    seen: list[str] = []
    asyncio.run(ask())
    assert seen == ["http.request", "http.disconnect"]


def test_there_are_no_web_sockets() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message["type"])

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    asyncio.run(Protection(echo, settings(secret=SECRET))({"type": "websocket", "headers": []}, receive, send))
    assert sent == ["websocket.close"]


def test_answers_tell_browsers_what_not_to_do() -> None:
    for answer in (call(), call("POST", headers={"Origin": PAGE})):
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["X-Frame-Options"] == "DENY"
        assert "frame-ancestors 'none'" in answer.headers["Content-Security-Policy"]
        assert "Access-Control-Allow-Origin" not in answer.headers


def test_refusals_are_logged_once_in_a_while(caplog: pytest.LogCaptureFixture) -> None:
    async def ask() -> None:
        transport = httpx.ASGITransport(Protection(echo, settings(secret=SECRET)))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            for _ in range(5):
                await client.post("/predict%0AINFO all is well")

    with caplog.at_level(logging.WARNING):
        asyncio.run(ask())
    (record,) = caplog.records
    assert "/predict" in record.getMessage()
    assert "was refused with 401" in record.getMessage()
    assert "\n" not in record.getMessage()


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe{}", "not JSON"),
        (b'{"a": "\xff"}', "no UTF-8 text"),
        (b'{"a": NaN}', "NaN is no JSON number"),
        (b'{"a": [-Infinity]}', "-Infinity is no JSON number"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"a": ' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
        (rb'{"a": "\ud800"}', "half a character"),
        (b"[]", "a JSON list"),
        (b"null", "a JSON NoneType"),
        (b"1", "a JSON int"),
    ],
)
def test_what_is_no_json_object(raw: bytes, reason: str) -> None:
    with pytest.raises(RefusedError) as raised:
        read_json(raw)
    assert raised.value.status_code == 400
    assert reason in raised.value.detail
    assert len(raised.value.detail) < 300


def test_what_is_a_json_object() -> None:
    assert read_json(b"") == {}
    assert read_json(rb'{"a": "\ud83d\ude00", "b": 1e400}') == {"a": "\U0001f600", "b": float("inf")}
    body = {"tasks": [{"id": number, "data": {"image": "x" * 100}} for number in range(5000)]}
    assert read_json(json.dumps(body).encode()) == body


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"secret": "short"}, "it has 5 characters, and needs 8 at least"),
        ({"basic_auth_user": "me", "basic_auth_pass": "1234567"}, "it has 7 characters"),
        ({"basic_auth_user": "me"}, "set together or not at all"),
        ({"basic_auth_pass": PASSWORD}, "set together or not at all"),
        ({"secret": "Schlüsselwort"}, "other characters than ASCII's letters"),
        ({"secret": "two lines\nof it"}, "other characters than ASCII's letters"),
        ({"label_studio_token": "Schlüsselwort"}, "other characters than ASCII's letters"),
        ({"basic_auth_user": "me", "basic_auth_pass": "Schlüsselwort €"}, "beyond Latin-1, which Label Studio cannot"),
        ({"basic_auth_user": "я", "basic_auth_pass": PASSWORD}, "beyond Latin-1, which Label Studio cannot send"),
        ({"basic_auth_user": "me:you", "basic_auth_pass": PASSWORD}, "it has a colon, which ends a user name"),
        ({"media_hosts": "http://cdn/"}, "'http://cdn/' is no host"),
        ({"media_folders": "pictures"}, "'pictures' is no absolute path"),
        ({"media_folders": "/"}, "name the folders of the images"),
    ],
)
def test_settings_that_protect_nothing_are_refused(values: dict[str, str], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence) as raised:
        settings(**values)
    for secret in ("short", "1234567", "Schlüsselwort", PASSWORD):
        assert secret not in str(raised.value), "a traceback would show it"

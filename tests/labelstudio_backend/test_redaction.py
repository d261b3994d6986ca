"""Tokens, passwords and signatures are in no log line and in no answer, whatever happens."""

from __future__ import annotations

import base64
import io
import json
import logging
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

import cv2
import httpx
import numpy as np
import pytest

from labelstudio_backend import redaction
from labelstudio_backend.cli import main
from labelstudio_backend.client import LabelStudio
from labelstudio_backend.label_studio_http import LabelStudioError
from labelstudio_backend.media import MediaCache, MediaError
from labelstudio_backend.redaction import hide, redact
from labelstudio_backend.settings import Settings
from small_backend import FakeModel, small_backend

PERSONAL = "eyJhbGciOiJIUzI1NiJ9.eyJ0b2tlbl90eXBlIjoicmVmcmVzaCJ9.c2lnbmF0dXJlLW9mLXJlZnJlc2g"
ACCESS = "eyJhbGciOiJIUzI1NiJ9.eyJ0b2tlbl90eXBlIjoiYWNjZXNzIn0.c2lnbmF0dXJlLW9mLWFjY2Vzcw"
SIGNATURE, CREDENTIAL, SAS = "5f1b0c4e5d6a7988", "AKIAEXAMPLEKEY", "q1w2e3r4%2Ft5y6%3D"
COOKIE, USER, PASSWORD, SECRET = "sessionid=k3v9x7z1q5", "labeller", "pass&word/äöü 1", "0f1e2d3c4b5a69788796"
BASIC = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
SECRETS = (PERSONAL, ACCESS, SIGNATURE, CREDENTIAL, SAS, COOKIE[10:], PASSWORD, quote(PASSWORD, safe=""), SECRET, BASIC)
CONFIG = """<View><Image name="image" value="$image"/>
<RectangleLabels name="label" toName="image"><Label value="car"/></RectangleLabels></View>"""


class Chatty(BaseHTTPRequestHandler):
    """A Label Studio that tells everything that it was told, in each way of failing."""

    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Set-Cookie", COOKIE)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(200, json.dumps({"access": ACCESS}).encode(), Content_Type="application/json")

    def do_GET(self) -> None:
        here = f"http://127.0.0.1:{self.server.server_address[1]}"
        signed = f"?X-Amz-Credential={CREDENTIAL}%2F2026&X-Amz-Signature={SIGNATURE}"
        what = self.path.partition("?")[0].rsplit("/", 1)[-1]
        told = f"{self.headers['Authorization']} {self.path} {here}/x{signed} {COOKIE}".encode()
        if self.path == "/api/projects/5/":
            project = {"id": 5, "created_at": "2026-11-21T19:38:18.810449Z"}
            self.answer(200, json.dumps(project).encode(), Content_Type="application/json")
        elif what == "png":
            self.answer(200, cv2.imencode(".png", np.zeros((48, 64, 3), np.uint8))[1].tobytes())
        elif what == "page":
            self.answer(200, told, Content_Type="text/html")
        elif what == "away":
            self.answer(302, b"", Location=f"http://elsewhere.example.org/x{signed}")
        elif "resolve" in self.path:
            self.answer(303, b"", Location=f"http://bucket.example.org/x{signed}")
        elif what == "azure":
            self.answer(
                303, b"", Location=f"http://user:{quote(PASSWORD, safe='')}@elsewhere.example.org/x?sv=1&sig={SAS}"
            )
        elif what == "broken":
            self.answer(303, b"", Location=f"http://user:{PASSWORD[:4]}/{PASSWORD[5:8]}@elsewhere.example.org/x")
        else:
            self.answer(int(what), told)


@pytest.fixture
def chatty() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Chatty) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.fixture
def logged() -> Iterator[io.StringIO]:
    """What the process logs at its loudest, tracebacks included."""
    stream = io.StringIO()
    handler, root = logging.StreamHandler(stream), logging.getLogger()
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(message)s"))
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield stream
    root.removeHandler(handler)
    root.setLevel(level)


def test_a_run_that_fails_in_every_way_tells_no_secret(
    chatty: str, logged: io.StringIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = socket.getaddrinfo

    def resolve(host: Any, *args: Any, **kwargs: Any) -> Any:
        return real("127.0.0.9" if str(host).endswith(".example.org") else host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)  # whatever the machine's name server says, and how fast
    settings = Settings(
        state_dir=tmp_path,
        weights="yolo_nas_s_coco",
        label_studio_url=chatty,
        label_studio_token=PERSONAL,
        basic_auth_user=USER,
        basic_auth_pass=PASSWORD,
        secret=SECRET,
        media_seconds=5,
        media_hosts="bucket.example.org",
    )
    images = [
        *(f"/data/upload/1/{what}" for what in ("png", "page", "away", "azure", "broken")),
        *(f"/data/upload/1/{status}" for status in (400, 401, 403, 404, 500, 503)),
        f"/tasks/1/resolve/?fileuri=x&token={PERSONAL}",
        f"s3://bucket/key?X-Amz-Signature={SIGNATURE}",
        f"https://elsewhere.example.org/a.jpg?sig={SAS}&X-Amz-Signature={SIGNATURE}",
        f"https://{USER}:{quote(PASSWORD, safe='')}@elsewhere.example.org/a.jpg",
        f"http://127.0.0.1:9/{PERSONAL}",
        f"data:image/png;base64,{BASIC}",
    ]
    answers = []
    with (
        small_backend(settings) as url,
        httpx.Client(base_url=url, timeout=60) as http,
        pytest.MonkeyPatch.context() as patch,
    ):
        login = {"Authorization": f"Bearer {SECRET}"}

        def ask(path: str, content: Any, **headers: str) -> httpx.Response:
            raw = content if isinstance(content, bytes) else json.dumps(content).encode()
            answer = http.post(path, content=raw, headers={**login, **headers})
            answers.append(f"{answer.headers} {answer.text}")
            return answer

        setup = {"project": "5.1795289898", "schema": CONFIG, "hostname": chatty, "access_token": PERSONAL}
        assert ask("/setup", setup).status_code == 200
        predict = {
            "tasks": [{"id": number, "data": {"image": image}} for number, image in enumerate(images, 1)],
            "project": "5.1795289898",
            "label_config": CONFIG,
            "params": {"login": USER, "password": PASSWORD},
        }
        results = ask("/predict", predict).json()["results"]
        assert [bool(result) for result in results] == [True] + [False] * (len(images) - 1)
        for wrong in (f"Basic {BASIC}x", f"Token {PERSONAL}", f"Bearer {SECRET}x"):
            assert ask("/predict", predict, Authorization=wrong).status_code == 401
        for broken in (f'{{"project": {SECRET}}}', f'["{PERSONAL}"]', f"http://{USER}:{PASSWORD}@x/"):
            assert ask("/setup", broken.encode()).status_code == 400
        ask("/setup", {**setup, "project": f"{PERSONAL}.1"})
        ask("/job_status", {"job": f"{SECRET} {ACCESS}"})

        def fail(*_: Any, **__: Any) -> Any:
            raise RuntimeError(f"Authorization: Bearer {ACCESS} at https://b/x?X-Amz-Signature={SIGNATURE} {PASSWORD}")

        patch.setattr(FakeModel, "predict_batch", fail)
        ask("/predict", predict)
        patch.setattr("labelstudio_backend.service.Service.versions", fail)
        answer = http.get("/versions", headers=login)
        assert answer.status_code == 500
        answers.append(answer.text)
    with LabelStudio(chatty, PERSONAL, retries=0) as client:
        for path in ("400", "401", "403", "404", "500", "away"):
            with pytest.raises(LabelStudioError) as raised:
                client._json("GET", path)
            answers.append(str(raised.value))
    told = logged.getvalue()
    for expected in ("httpcore", "Traceback", "RuntimeError", "X-Amz-Signature=***", "no prediction for task"):
        assert expected in told, "the log is whole"
    assert f"{PASSWORD[:4]}'" not in told, "a part of it, in an address that is none"
    for secret in SECRETS:
        assert secret not in told, [line for line in told.splitlines() if secret in line][:3]
        assert secret not in "\n".join(answers), [answer for answer in answers if secret in answer][:3]
    assert not any(secret in repr(settings) + str(settings) for secret in SECRETS)


def test_errors_of_images_tell_no_secret(chatty: str, tmp_path: Path) -> None:
    settings = Settings(state_dir=tmp_path, label_studio_url=chatty, label_studio_token=PERSONAL)
    with LabelStudio(chatty, PERSONAL) as client:
        media = MediaCache(settings, client)
        for value in (
            "/data/upload/1/away",
            "/data/upload/1/azure",
            "/data/upload/1/403",
            f"http://x/{PERSONAL}?sig={SAS}",
        ):
            with pytest.raises(MediaError) as raised:
                media.fetch(value)
            assert not any(secret in str(raised.value) for secret in SECRETS)
        media.close()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:pw@host/a", "https://***@host/a"),
        ("GET /a?x=1&X-Amz-Signature=ab%2F&y=2 HTTP/1.1", "GET /a?x=1&X-Amz-Signature=***&y=2 HTTP/1.1"),
        ("'https://b/x?sv=1&sig=a%2Fb%3D'", "'https://b/x?sv=1&sig=***'"),
        ("https://b/x?GoogleAccessId=me&Signature=ab", "https://b/x?GoogleAccessId=***&Signature=***"),
        ("fileuri%3Fx%26sig%3Dabc", "fileuri%3Fx%26sig%3D***"),
        ("(b'Authorization', b'Token abcdef')", "(b'Authorization', b'Token ***')"),
        ("authorization: Basic YWJj", "authorization: Basic ***"),
        ("(b'Set-Cookie', b'sessionid=abc; Path=/')", "(b'Set-Cookie', b'***')"),
        (f"Bearer {ACCESS}", "Bearer ***"),
        ("/data/local-files/?d=signature/a.jpg", "/data/local-files/?d=signature/a.jpg"),
        ("the token was refused: a legacy token works", "the token was refused: a legacy token works"),
        ("Basic authentication is asked for", "Basic authentication is asked for"),
        ("a@b and user@host:/path", "a@b and user@host:/path"),
    ],
)
def test_forms(text: str, shown: str) -> None:
    assert redact(text) == shown


def test_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redaction, "_secrets", frozenset())
    hide("correct horse/1", None, "", "short")
    for form in ("correct horse/1", "correct%20horse%2F1", "correct+horse%2F1", redaction.encoded("correct horse/1")):
        assert redact(f"<{form}>") == "<***>"
    assert redact("a short text") == "a short text"


def test_a_value_cannot_forge_a_log_line(logged: io.StringIO) -> None:
    redaction.install()
    logging.getLogger("labelstudio_backend").warning("task %s: gone", "7\n2026 INFO all is well\x1b[2J\u2028")
    (line,) = logged.getvalue().splitlines()
    assert r"7\n2026 INFO all is well\x1b[2J\u2028: gone" in line


def test_settings_that_do_not_fit_are_told_without_their_values(monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner

    monkeypatch.setenv("YOLONAS_LABEL_STUDIO_TOKEN", PERSONAL)
    monkeypatch.setenv("YOLONAS_LABEL_STUDIO_URL", f"http://{USER}:{quote(PASSWORD, safe='')}@studio")
    monkeypatch.setenv("YOLONAS_SECRET", "hunter2")
    result = CliRunner().invoke(main, ["serve"])
    assert result.exit_code == 1
    assert "YOLONAS_SECRET: it has 7 characters" in result.output
    assert "YOLONAS_LABEL_STUDIO_URL: it has a user name or password in it" in result.output
    for secret in (PERSONAL, quote(PASSWORD, safe=""), "hunter2"):
        assert secret not in result.output

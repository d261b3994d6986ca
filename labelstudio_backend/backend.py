"""The backend as others see it: its address, the names of its versions, its password, and calls to it."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx

from labelstudio_backend.label_studio_http import CONNECT_SECONDS, DIRECT
from labelstudio_backend.settings import Settings
from yolonas.errors import YolonasError

VERSION_NAME = re.compile(r"yolonas-\d+-[0-9a-f]{6}-v\d+")
UNREACHABLE = ("DI", "ER")  # states of a backend's row: disconnected, error
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class BackendError(YolonasError):
    """A call to the backend that failed; `status` is its HTTP status, None when there was no answer."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Credentials:
    """What a protected backend asks for: a user name and password, or a secret, which is also any user's password.

    All are empty for one that is open.
    """

    user: str = ""
    password: str = field(default="", repr=False)
    secret: str = field(default="", repr=False)

    @classmethod
    def of(cls, settings: Settings) -> Credentials:
        password, secret = settings.basic_auth_pass, settings.secret
        return cls(
            settings.basic_auth_user,
            password.get_secret_value() if password else "",
            secret.get_secret_value() if secret else "",
        )

    @property
    def header(self) -> dict[str, str]:
        """The Authorization header of webhooks and other calls; none for an open backend."""
        if self.secret:
            return {"Authorization": f"Bearer {self.secret}"}
        if self.user and self.password:
            pair = base64.b64encode(f"{self.user}:{self.password}".encode()).decode()
            return {"Authorization": f"Basic {pair}"}
        return {}

    @property
    def row(self) -> dict[str, str]:
        """What Label Studio must know to call the backend, as fields of its row: it sends user and password only."""
        user, password = (self.user, self.password) if self.user and self.password else ("yolonas", self.secret)
        if not password:
            return {}
        return {"auth_method": "BASIC_AUTH", "basic_auth_user": user, "basic_auth_pass": password}


class Backend:
    """A backend at `url`, called as Label Studio calls it."""

    def __init__(
        self, url: str, credentials: Credentials | None = None, *, transport: httpx.BaseTransport | None = None
    ) -> None:
        self.url = url.rstrip("/")
        self._header = (credentials or Credentials()).header
        self._http = httpx.Client(
            timeout=httpx.Timeout(10.0, connect=CONNECT_SECONDS), transport=transport, mounts=DIRECT
        )

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Backend:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def status(self, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> int:
        """The HTTP status that it answers with, a POST where there is a body; `headers` in place of its own."""
        return self._send(path, body, self._header if headers is None else headers).status_code

    def call(self, path: str, body: Any = None, *, seconds: float = 10.0) -> dict[str, Any]:
        """What it answers, an object; a POST where there is a body.

        Raises:
            BackendError: it did not answer, or refused.
        """
        answer = self._send(path, body, self._header, seconds)
        if answer.status_code == 401:
            raise BackendError(
                f"{self.url} asks for a password: set YOLONAS_BASIC_AUTH_USER and YOLONAS_BASIC_AUTH_PASS, or "
                "YOLONAS_SECRET, to what it was started with",
                401,
            )
        try:
            content = answer.json()
        except ValueError:
            content = None
        if not answer.is_success or not isinstance(content, dict):
            said = content.get("error") if isinstance(content, dict) else None
            raise BackendError(
                f"{self.url}/{path} answered {answer.status_code}: {said or 'nothing that is understood'}; check that "
                "it is the address of yolonas-labelstudio",
                answer.status_code,
            )
        return content

    def _send(self, path: str, body: Any, headers: Mapping[str, str], seconds: float = 10.0) -> httpx.Response:
        method, timeout = "GET" if body is None else "POST", httpx.Timeout(seconds, connect=CONNECT_SECONDS)
        try:
            return self._http.request(method, f"{self.url}/{path}", json=body, headers=dict(headers), timeout=timeout)
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise BackendError(
                f"no answer from the backend at {self.url} ({str(error) or type(error).__name__}); check that it runs"
            ) from error

    def is_yolonas(self) -> bool:
        """Whether a backend of ours answers there and says so, which a protected one does to those it knows only."""
        try:
            return self.call("").get("name") == "yolonas"
        except BackendError:
            return False


def same_address(one: str, other: str) -> bool:
    """Whether two URLs name the same server and path, however the loopback address, port and end are written."""
    return _plain(one) == _plain(other)


def _plain(url: str) -> tuple[str, str, int | None, str]:
    parts = urlsplit(url.strip())
    host = (parts.hostname or "").lower()
    try:
        port = parts.port
    except ValueError:
        port = -1
    return (
        parts.scheme,
        "localhost" if host in _LOOPBACK else host,
        port or {"http": 80, "https": 443}.get(parts.scheme),
        parts.path.rstrip("/"),
    )


def is_ours(row: Mapping[str, Any], project: int) -> bool:
    """Whether a row of Label Studio's is of a yolonas backend: named after one of the project's versions."""
    names = (str(row.get("model_version") or ""), str(row.get("title") or ""))
    return any(VERSION_NAME.fullmatch(name) and name.startswith(f"yolonas-{project}-") for name in names)


def find_row(rows: Iterable[Mapping[str, Any]], project: int, url: str | None) -> dict[str, Any] | None:
    """The row of the backend at `url`; without one, of the project's yolonas backend, one that answers first."""
    if url:
        found = [row for row in rows if same_address(str(row["url"]), url)]
    else:
        found = sorted((row for row in rows if is_ours(row, project)), key=lambda row: row.get("state") in UNREACHABLE)
    return dict(found[0]) if found else None

"""What stands between the network and the routes: who may call, from where, and how large a request may be.

ASGI middleware, so that it holds for every route, also for those added later. Label Studio sends Basic authentication
with its calls, webhooks and other tools a bearer token. A browser is a case of its own: it calls whatever a web page
asks for, also on loopback, and adds the password that it has kept.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hmac
import ipaddress
import json
import logging
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias
from urllib.parse import urlsplit

from pydantic import SecretStr
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException

from labelstudio_backend.redaction import redact
from labelstudio_backend.settings import Settings

logger = logging.getLogger(__name__)

Message: TypeAlias = MutableMapping[str, Any]
Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = ("/health",)  # a load balancer asks it too, and it says nothing
BODY_SECONDS = 20.0  # a body may take this long ...
BODY_RATE = 100_000.0  # ... and a second more for so many bytes
DRAIN_SECONDS = 2.0
TELL_SECONDS = 60.0  # refusals are logged once in this time
_CHALLENGE = {"WWW-Authenticate": 'Basic realm="yolonas", charset="UTF-8"'}
_CLOSE = {"Connection": "close"}  # what is left of the body is not read: the connection cannot be used again
_SAFE = ("GET", "HEAD", "OPTIONS")
_PRIVATE_NAMES = (".localhost", ".local", ".internal", ".home.arpa")  # nobody can register them on the internet
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",  # a page that shows ours under its own could have its buttons clicked
    "Content-Security-Policy": "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",
}


class RefusedError(HTTPException):
    """A request that is not carried out: its status, and a sentence."""

    def __init__(self, status: int, sentence: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(status, sentence, headers)


class Protection:
    """ASGI middleware in front of all routes; the settings decide what it asks for."""

    def __init__(self, app: App, settings: Settings) -> None:
        self.app = app
        self._settings = settings
        self._told = -TELL_SECONDS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # there are none
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        started = False

        async def answer(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                with_ours = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    with_ours.append(name, value)
            await send(message)

        body = _Body(receive, self._settings.max_body_bytes)
        try:
            self._check(scope, headers)
            await self.app(scope, body.receive, answer)
        except RefusedError as refusal:
            if started:
                raise
            self._tell(scope, refusal)
            await body.drain()
            await _send(answer, refusal)

    def _check(self, scope: Scope, headers: Headers) -> None:
        """Raise RefusedError for whom the request is not answered."""
        if not self._settings.protected and is_loopback(self._settings.host):
            check_host(headers.get("host", ""))
        if scope["method"] not in _SAFE:
            check_origin(headers)
        if self._settings.protected and scope["path"] not in OPEN:
            self._authenticate(headers.get("authorization", ""))
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > self._settings.max_body_bytes:
            raise _too_large(self._settings.max_body_bytes)

    def _authenticate(self, authorization: str) -> None:
        """All comparisons are made, each in constant time."""
        scheme, _, rest = authorization.strip().partition(" ")
        user, password = _basic(rest) if scheme.lower() == "basic" else ("", "")
        secret = rest.strip() if scheme.lower() == "bearer" else password
        basic_user, basic_pass = self._settings.basic_auth_user, _clear(self._settings.basic_auth_pass)
        known = _same(user, basic_user) & _same(password, basic_pass) | _same(secret, _clear(self._settings.secret))
        if not known:
            said = "the user name, password or secret is wrong" if authorization else "a password is asked for"
            raise RefusedError(
                401,
                f"{said}: give what YOLONAS_BASIC_AUTH_USER and YOLONAS_BASIC_AUTH_PASS, or YOLONAS_SECRET, are here",
                {**_CHALLENGE, **_CLOSE},
            )

    def _tell(self, scope: Scope, refusal: RefusedError) -> None:
        """Log it, not more than once a minute: Label Studio shows nothing of what it was answered."""
        if time.monotonic() - self._told >= TELL_SECONDS:
            self._told = time.monotonic()
            where = (scope.get("client") or ("?",))[0]
            line = "%s %s from %s was refused with %d: %s"
            logger.warning(line, scope["method"], scope["path"][:100], where, refusal.status_code, refusal.detail)


class _Body:
    """The body of a request, which may not be too large, nor too slow."""

    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive = receive
        self._limit = limit
        self._begin = time.monotonic()
        self._size = 0
        self._complete = False

    async def receive(self) -> Message:
        """ASGI's `receive`; raises RefusedError."""
        if self._complete:  # whoever asks now wants to know whether the client is still there
            return await self._receive()
        seconds = time.monotonic() - self._begin
        try:
            left = max(BODY_SECONDS + self._size / BODY_RATE - seconds, 0.0)
            message = await asyncio.wait_for(self._receive(), left)
        except TimeoutError:
            sentence = f"the body came too slowly: {self._size} bytes in {time.monotonic() - self._begin:.0f} s"
            raise RefusedError(408, sentence, _CLOSE) from None
        self._size += len(message.get("body", b""))
        self._complete = not message.get("more_body", False)
        if self._size > self._limit:
            await self.drain()
            raise _too_large(self._limit)
        return message

    async def drain(self) -> None:
        """Read on for a moment and forget it: many clients read no answer before they have sent all."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                while not self._complete:
                    self._complete = not (await self._receive()).get("more_body", False)
        self._complete = True


def access(settings: Settings) -> str:
    """Who may call this backend, in a sentence."""
    if settings.protected:
        ways = ["the user name and password"] * bool(settings.basic_auth_pass) + ["the secret"] * bool(settings.secret)
        return f"Every call but /health needs {' or '.join(ways)}."
    if is_loopback(settings.host):
        return "Programs on this machine only; no password is asked for."
    return (
        f"WARNING: whoever reaches port {settings.port} of this machine may have it predict, train and roll back. Set "
        "YOLONAS_SECRET, or YOLONAS_BASIC_AUTH_USER and YOLONAS_BASIC_AUTH_PASS."
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens on this address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _too_large(limit: int) -> RefusedError:
    advice = "send fewer tasks at a time, or raise YOLONAS_MAX_BODY_BYTES"
    return RefusedError(413, f"the body is larger than {limit} bytes; {advice}", _CLOSE)


def check_host(host: str) -> None:
    """Raise RefusedError for a name that a stranger may have pointed to this machine (DNS rebinding).

    A page of such a name is of the same origin as the backend under that name, and a browser lets it do everything.
    Addresses, names without a dot and names of private zones are nobody's on the internet.
    """
    try:
        name = urlsplit(f"//{host}").hostname or ""
        private = "." not in name or name.endswith(_PRIVATE_NAMES)
        if not private:
            ipaddress.ip_address(name)
    except ValueError:
        raise RefusedError(
            403,
            f"{host[:100]!r} is no name of this machine: without a password it answers to addresses, localhost and "
            "names without a dot; set YOLONAS_SECRET to use another name",
        ) from None


def check_origin(headers: Headers) -> None:
    """Raise RefusedError for what a page of another site has a browser send (cross-site request forgery).

    Browsers say where a request is from, by Sec-Fetch-Site or, older ones and plain http, Origin; Label Studio, curl
    and other programs say neither. Method: Go's net/http.CrossOriginProtection.
    """
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site is not None:
        own = site in ("same-origin", "none")
    elif origin is not None:
        try:
            own = urlsplit(origin).netloc.lower() == headers.get("host", "").lower() != ""
        except ValueError:
            own = False
    else:
        own = True
    if not own:
        raise RefusedError(403, "a page of another site may not ask for this; use the dashboard of this backend itself")


def read_json(raw: bytes) -> dict[str, Any]:
    """The JSON object that a body holds, `{}` for an empty one. Raises RefusedError (400) with a sentence.

    Unlike Python's own reader it takes no NaN and no Infinity, and nothing that could not be written down again.
    """
    try:
        body = json.loads(raw, parse_constant=_no_constant) if raw else {}
        if _SURROGATE.search(raw):  # half a character, as "\ud800" without its second half
            json.dumps(body, ensure_ascii=False).encode()
    except UnicodeDecodeError:
        raise RefusedError(400, "the body is not JSON: it is no UTF-8 text") from None
    except UnicodeEncodeError:
        raise RefusedError(400, "the body is not JSON that can be stored: a text in it has half a character") from None
    except RecursionError:
        raise RefusedError(400, "the body is nested too deeply") from None
    except ValueError as error:  # also a number of more than 4300 digits
        raise RefusedError(400, f"the body is not JSON: {redact(str(error))[:200]}") from None
    if not isinstance(body, dict):
        raise RefusedError(400, f"the body is a JSON {type(body).__name__}, not an object")
    return body


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _basic(credentials: str) -> tuple[str, str]:
    """User and password; nothing where that is not what they are."""
    try:
        raw = base64.b64decode(credentials.strip(), validate=True)
    except (binascii.Error, ValueError):
        return "", ""
    try:
        user, _, password = raw.decode().partition(":")
    except UnicodeDecodeError:  # Label Studio sends Latin-1, by way of requests
        user, _, password = raw.decode("latin-1").partition(":")
    return user, password


def _clear(secret: SecretStr | None) -> str:
    return secret.get_secret_value() if secret is not None else ""


def _same(given: str, wanted: str) -> bool:
    """Compared in constant time; an empty one is never right."""
    return hmac.compare_digest(given.encode(), wanted.encode()) & (wanted != "")


async def _send(send: Send, refusal: RefusedError) -> None:
    content = json.dumps({"error": redact(str(refusal.detail))}).encode()
    fields = {"Content-Type": "application/json", "Content-Length": str(len(content)), **(refusal.headers or {})}
    raw = [(name.lower().encode(), value.encode()) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": refusal.status_code, "headers": raw})
    await send({"type": "http.response.body", "body": content})

"""One call to Label Studio: both kinds of tokens, sub-paths, time-outs, retries, and errors that say what to do."""

from __future__ import annotations

import base64
import binascii
import json
import re
import threading
import time
from typing import Any, Self

import httpx

from labelstudio_backend.redaction import hide, redact
from yolonas.errors import YolonasError

CONNECT_SECONDS = 3.0
READ_SECONDS = 60.0
RETRIES = 3
RETRY_SECONDS = 0.5  # doubled each time
REFRESH_MARGIN = 30.0  # access tokens live 300 s
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

    @property
    def passing(self) -> bool:
        """Whether the same call may succeed a little later."""
        return self.status is None or self.status == 429 or self.status >= 500


class LabelStudioHttp:
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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # -- the token ---------------------------------------------------------------------------------------------

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

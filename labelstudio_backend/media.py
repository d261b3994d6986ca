"""What a task holds for an image -> a local file, through a cache of bounded size.

Only two kinds of hosts are ever asked: Label Studio at the configured address, with the token, and the hosts of
`YOLONAS_MEDIA_HOSTS`, without it. Label Studio may name itself differently in its tasks (LABEL_STUDIO_HOST): such a URL
is rewritten to the configured address, so that no request goes where a task points.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import logging
import os
import re
import secrets
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote_to_bytes, urljoin, urlsplit

import httpx

from labelstudio_backend.client import CONNECT_SECONDS, DIRECT, LabelStudio, LabelStudioError
from labelstudio_backend.settings import Settings
from yolonas.errors import YolonasError

logger = logging.getLogger(__name__)

_FILES = ("data/", "storage-data/", "tasks/", "projects/", "static/")  # where Label Studio serves files
_TEMPORARY = ".tmp-"
_PROTECT_SECONDS = 60.0  # a file just fetched is about to be read: the bound may be exceeded that long
_REDIRECTS = 3


class MediaError(YolonasError):
    """An image that cannot be had."""


@dataclass(frozen=True)
class _Limits:
    """Of one download, and how the settings that hold them begin."""

    bytes: int
    seconds: float
    name: str

    @classmethod
    def of(cls, settings: Settings, video: bool) -> _Limits:
        if video:
            return cls(settings.video_max_bytes, settings.video_seconds, "VIDEO")
        return cls(settings.media_max_bytes, settings.media_seconds, "MEDIA")

    def too_large(self, value: str) -> MediaError:
        setting = f"YOLONAS_{self.name}_MAX_BYTES"
        return MediaError(f"{brief(value)} is larger than {self.bytes} bytes; raise {setting} to allow it")


class MediaCache:
    """Fetches images and keeps them in `<state_dir>/media`, the least recently used going first.

    Safe for several threads and processes. A cached file is not asked for again: an image replaced under the same URL
    is seen after `forget`, or once the folder is deleted.
    """

    def __init__(
        self, settings: Settings, client: LabelStudio | None, *, transport: httpx.BaseTransport | None = None
    ) -> None:
        self.folder = settings.state_dir / "media"
        self._settings = settings
        self._client = client
        self._http = httpx.Client(
            timeout=httpx.Timeout(settings.media_seconds, connect=CONNECT_SECONDS),
            follow_redirects=False,
            transport=transport,
            mounts=DIRECT,
            headers={"User-Agent": "yolonas"},
        )
        self._bytes: int | None = None  # what the folder holds, as far as this process knows
        self._writes = 0
        self._guard = threading.Lock()

    def close(self) -> None:
        self._http.close()

    def fetch(self, value: str, *, task_id: int | None = None, hostname: str = "", video: bool = False) -> Path:
        """A local file with the content of a task's image, or of its video, for which other limits hold.

        `value`: `/data/upload/...`, `/data/local-files/?d=...`, a URL of Label Studio's or of an allowed host, a
        `data:` URL, or a cloud URI such as `s3://...`, which Label Studio resolves for the task `task_id`.
        `hostname`: the address under which Label Studio named itself at /setup. Raises MediaError: one sentence that
        says what to do.
        """
        limits = _Limits.of(self._settings, video)
        path = self._path(value)
        try:
            os.utime(path)  # last used now
            return path
        except FileNotFoundError:
            pass
        if value.startswith("data:"):
            content = self._decode(value, limits)
        else:
            url, own = self._locate(value, task_id, hostname)
            content = self._download(url, own=own, shown=brief(value), limits=limits)
        try:
            self._store(path, content)
        except OSError as error:
            raise MediaError(
                f"{brief(value)} could not be kept in {self.folder} ({error.strerror or error}); free some disk space "
                "or set YOLONAS_STATE_DIR to a folder that can be written"
            ) from error
        return path

    def forget(self, value: str) -> None:
        """Drop the cached file, so that the next fetch asks again; for who found it unreadable."""
        self._path(value).unlink(missing_ok=True)

    # -- where -------------------------------------------------------------------------------------------------

    def _path(self, value: str) -> Path:
        digest = hashlib.sha256(f"{self._settings.label_studio_url}\n{value}".encode()).hexdigest()
        return self.folder / digest[:2] / digest

    def _locate(self, value: str, task_id: int | None, hostname: str) -> tuple[str, bool]:
        """URL to ask, and whether it is Label Studio's."""
        base = self._settings.label_studio_url
        try:
            parts = urlsplit(value)
        except ValueError as error:
            raise MediaError(f"{brief(value)!r} is no image address ({error})") from None
        if parts.scheme in ("http", "https"):
            for own in (base, hostname):
                if own and _below(value, own):
                    return self._label_studio(_relative(parts.path, own), parts.query, value), True
            if (
                _host(value) in self._settings.extra_media_hosts
                or (parts.hostname or "") in self._settings.extra_media_hosts
            ):
                return value, False
            raise MediaError(
                f"{brief(value)} is on {_host(value)}, from which images are not fetched; if you trust that host, "
                "add it to YOLONAS_MEDIA_HOSTS"
            )
        if value.startswith("/") and not value.startswith("//"):
            return self._label_studio(_relative(parts.path, base), parts.query, value), True
        if parts.scheme and parts.netloc:
            if task_id is None:
                raise MediaError(f"{brief(value)} can only be had through Label Studio, for a task with an ID")
            uri = base64.urlsafe_b64encode(value.encode()).decode()
            return self._label_studio(f"tasks/{task_id}/resolve/", f"fileuri={uri}", value), True
        raise MediaError(
            f"{brief(value)!r} is no image address; a task needs a URL, /data/upload/..., /data/local-files/?d=... or "
            "a cloud URI"
        )

    def _label_studio(self, path: str, query: str, value: str) -> str:
        base = self._settings.label_studio_url
        if not base:
            raise MediaError(
                f"{brief(value)} is a file of Label Studio's, whose address is not known here; set "
                "YOLONAS_LABEL_STUDIO_URL and YOLONAS_LABEL_STUDIO_TOKEN"
            )
        segments = unquote_to_bytes(path).split(b"/")
        if b".." in segments or b"." in segments or not path.startswith(_FILES):
            raise MediaError(f"{brief(value)} is not an address under which Label Studio serves files")
        return f"{base}/{path}" + (f"?{query}" if query else "")

    # -- how ---------------------------------------------------------------------------------------------------

    def _decode(self, value: str, limits: _Limits) -> bytes:
        header, comma, body = value.partition(",")
        try:
            raw = unquote_to_bytes(body)
            content = base64.b64decode(raw, validate=False) if header.endswith(";base64") else raw
        except binascii.Error as error:
            raise MediaError(f"the data: URL {brief(value)} is not valid base64 ({error})") from None
        if not comma or not content:
            raise MediaError(f"the data: URL {brief(value)} holds nothing")
        if len(content) > limits.bytes:
            raise limits.too_large(value)
        return content

    def _download(self, url: str, *, own: bool, shown: str, limits: _Limits) -> bytes:
        deadline = time.monotonic() + limits.seconds
        redirects, tries = 0, 2
        while True:
            tries -= 1
            authorized = own and _below(url, self._settings.label_studio_url)
            try:
                headers = self._client.authorization() if authorized and self._client is not None else {}
                with self._http.stream("GET", url, headers=headers) as answer:
                    if answer.is_success:
                        return self._body(answer, deadline, shown, limits)
                    status, location = answer.status_code, answer.headers.get("location", "")
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                passing = isinstance(error, httpx.TransportError) and not isinstance(error, httpx.ReadTimeout)
                if passing and tries > 0 and time.monotonic() < deadline:
                    continue
                reason = str(error) or type(error).__name__
                advice = "check that it runs" + (" and that YOLONAS_LABEL_STUDIO_URL is its address" if own else "")
                raise MediaError(f"{shown} could not be fetched from {_host(url)} ({reason}); {advice}") from error
            except LabelStudioError as error:
                raise MediaError(f"{shown} could not be fetched: {error}") from error
            if 300 <= status < 400 and location:
                redirects += 1
                url = self._redirected(url, location, own=own, shown=shown, redirects=redirects)
                tries = 2
                continue
            if status == 401 and authorized and self._client is not None and self._client.refreshable and tries > 0:
                self._client.forget_access()
                continue
            if status in (429, 502, 503, 504) and tries > 0:
                time.sleep(0.3)
                continue
            raise MediaError(
                f"{shown} could not be fetched: {_host(url)} answered {status}; {_advice(status, authorized)}"
            )

    def _body(self, answer: httpx.Response, deadline: float, shown: str, limits: _Limits) -> bytes:
        if answer.headers.get("content-type", "").startswith("text/html"):
            raise MediaError(f"{shown} is a web page, not an image; check its address, and the token")
        length = answer.headers.get("content-length", "")
        if length.isdecimal() and int(length) > limits.bytes:
            raise limits.too_large(shown)
        content = bytearray()
        for chunk in answer.iter_bytes():
            content += chunk
            if len(content) > limits.bytes:
                raise limits.too_large(shown)
            if time.monotonic() > deadline:
                raise MediaError(
                    f"{shown} took longer than {limits.seconds:g} s; raise YOLONAS_{limits.name}_SECONDS if the "
                    "connection is that slow"
                )
        if not content:
            raise MediaError(f"{shown} is an empty file; upload it again")
        return bytes(content)

    def _redirected(self, url: str, location: str, *, own: bool, shown: str, redirects: int) -> str:
        target = urljoin(url, location)
        base = self._settings.label_studio_url
        # the answer of resolve/ is a presigned URL of the project's own cloud storage; it gets no token
        presigned = own and re.search(r"/(tasks|projects)/\d+/(resolve|presign)/$", urlsplit(url).path) is not None
        within = _below(target, base) if own else _host(target) in {_host(url), *self._settings.extra_media_hosts}
        safe = urlsplit(target).scheme in ("http", "https") and (presigned or within)
        if redirects > _REDIRECTS or not safe:
            advice = (
                "set YOLONAS_LABEL_STUDIO_URL to the final address" if own else "add that host to YOLONAS_MEDIA_HOSTS"
            )
            raise MediaError(f"{shown} redirects to {_host(target)}, which is not followed; {advice}")
        return target

    # -- the folder --------------------------------------------------------------------------------------------

    def _store(self, path: Path, content: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.parent / f"{_TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}"
        try:
            temporary.write_bytes(content)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        with self._guard:
            self._writes += 1
            if self._bytes is not None:
                self._bytes += len(content)
            # other processes write too: look at the folder itself now and then
            if self._bytes is None or self._bytes > self._settings.media_cache_bytes or self._writes % 256 == 0:
                self._bytes = self._evict()

    def _evict(self) -> int:
        """Delete the least recently used files down to 90 % of the bound where it is exceeded; returns what is left."""
        now, files = time.time(), []
        for path in self.folder.glob("*/*"):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue  # another process evicted it
            if path.name.startswith(_TEMPORARY) and now - status.st_mtime > 3600:
                path.unlink(missing_ok=True)  # of a killed process
            else:
                files.append((status.st_mtime, status.st_size, path))
        total = sum(size for _, size, _ in files)
        if total <= self._settings.media_cache_bytes:
            return total
        for used, size, path in sorted(files):
            if total <= 0.9 * self._settings.media_cache_bytes or now - used < _PROTECT_SECONDS:
                break
            path.unlink(missing_ok=True)
            total -= size
        return total


def _host(url: str) -> str:
    return urlsplit(url).netloc.rpartition("@")[2].lower()


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = -1
    return parts.scheme, parts.hostname, port or {"http": 80, "https": 443}.get(parts.scheme)


def _below(url: str, base: str) -> bool:
    """Whether the URL is under the base: same origin, and the base's sub-path."""
    if not base or _origin(url) != _origin(base) or "@" in urlsplit(url).netloc:
        return False
    prefix = urlsplit(base).path.rstrip("/")
    path = urlsplit(url).path
    return path == prefix or path.startswith(prefix + "/")


def _relative(path: str, base: str) -> str:
    """A path of Label Studio's without its sub-path and leading slash."""
    prefix = urlsplit(base).path.rstrip("/")
    if prefix and path.startswith(prefix + "/"):
        path = path[len(prefix) :]
    return path.lstrip("/")


def brief(value: str) -> str:
    """A value for messages: short, and without a query, which may hold a signature (but `?d=` names a local file)."""
    if value.startswith("data:"):
        return value[:30] + "..."
    path, mark, query = value.partition("?")
    return (path + mark + query if query.startswith("d=") else path)[:200]


def _advice(status: int, authorized: bool) -> str:
    if status == 401 and authorized:
        return (
            "set YOLONAS_LABEL_STUDIO_TOKEN to a valid personal access token of Label Studio (or a legacy token, if on)"
        )
    if status in (401, 403):
        return "the token's user may not see this file" if authorized else "only images without a login can be fetched"
    if status == 404:
        local = "for local files a storage must cover the path" if authorized else "check its address"
        return f"the file is not there; {local}"
    return "try again later, or look into that server's log"

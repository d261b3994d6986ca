"""What a task holds for an image -> a local file, through a cache of bounded size.

Only two kinds of hosts are ever asked: Label Studio at the configured address, with the token, and the hosts of
`YOLONAS_MEDIA_HOSTS`, without it; besides, the links that Label Studio signs for the storages of a project. Label
Studio may name itself differently in its tasks (LABEL_STUDIO_HOST): such a URL is rewritten to the configured address,
so that no request goes where a task points. That holds for the projects that the configured Label Studio has: the names
of files repeat, so those of a project of another one are not asked of it.
"""

from __future__ import annotations

import base64
import binascii
import logging
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, unquote, unquote_to_bytes, urljoin, urlsplit

import httpx

from labelstudio_backend import metrics
from labelstudio_backend.addresses import PORTS, AddressError, address, below, host, origin, relative
from labelstudio_backend.client import LabelStudio, same_project
from labelstudio_backend.egress import Egress, ForbiddenError, Trust
from labelstudio_backend.file_cache import FileCache
from labelstudio_backend.label_studio_http import CONNECT_SECONDS, LabelStudioError
from labelstudio_backend.redaction import redact
from labelstudio_backend.settings import Settings
from yolonas.errors import YolonasError
from yolonas.inference import image_header

logger = logging.getLogger(__name__)

_RESOLVED = r"(tasks|projects)/\d+/(resolve|presign)/$"  # the answer is a signed link, or the file itself
_SERVED = re.compile(rf"(data|storage-data|static)/.|{_RESOLVED}")  # where Label Studio serves files
_LOCAL_FILES = "data/local-files/"
_REDIRECTS = 3
_ASK_SECONDS = 5.0  # for Label Studio to say whether it has a project, and until it is asked again where it did not
_ASK_AGAIN_SECONDS = 60.0  # whether Label Studio has a project that it had not


class MediaError(YolonasError):
    """An image that cannot be had; `passing` where it may be had a little later, as it is not the image's own fault."""

    def __init__(self, sentence: str, *, passing: bool = False) -> None:
        super().__init__(redact(sentence))
        self.passing = passing


@dataclass(frozen=True)
class _Limits:
    """Of one download, and how the settings that hold them begin."""

    most: int
    pixels: int | None
    seconds: float
    name: str

    @classmethod
    def of(cls, settings: Settings, video: bool) -> _Limits:
        if video:
            return cls(settings.video_max_bytes, None, settings.video_seconds, "VIDEO")
        return cls(settings.media_max_bytes, settings.media_max_pixels, settings.media_seconds, "MEDIA")

    def too_large(self, value: str) -> MediaError:
        setting = f"YOLONAS_{self.name}_MAX_BYTES"
        return MediaError(f"{brief(value)} is larger than {self.most} bytes; raise {setting} to allow it")

    def check_pixels(self, content: bytes | bytearray, value: str) -> None:
        if self.pixels is not None and (pixels := image_header.pixels(bytes(content))) > self.pixels:
            advice = "raise YOLONAS_MEDIA_MAX_PIXELS to allow it"
            raise MediaError(f"{brief(value)} declares {pixels} pixels, more than {self.pixels}; {advice}")


class MediaCache:
    """Fetches images and keeps them in `<state_dir>/media`, the least recently used going first.

    Safe for several threads and processes. A cached file is not asked for again: an image replaced under the same URL
    is seen after `forget`, or once the folder is deleted.
    """

    def __init__(
        self, settings: Settings, client: LabelStudio | None, *, transport: httpx.BaseTransport | None = None
    ) -> None:
        self.folder = settings.state_dir / "media"
        self._files = FileCache(self.folder, settings.media_cache_bytes)
        self._settings = settings
        self._client = client
        self._asking = threading.Lock()
        # By "ID.timestamp": whether it is there, or why that is not known, and until when that holds.
        self._projects: dict[str, tuple[bool | str, float]] = {}
        self._http = httpx.Client(
            timeout=httpx.Timeout(settings.media_seconds, connect=CONNECT_SECONDS),
            follow_redirects=False,
            transport=transport or Egress(self._trust),
            headers={"User-Agent": "yolonas"},
        )

    def close(self) -> None:
        self._http.close()

    def fetch(
        self,
        value: str,
        *,
        task_id: int | None = None,
        uid: str = "",
        hostname: str = "",
        video: bool = False,
    ) -> Path:
        """A local file with the content of a task's image or video: one of the cache, or of `YOLONAS_MEDIA_FOLDERS`.

        `value`: `/data/upload/...`, `/data/local-files/?d=...`, a URL of Label Studio's or of an allowed host, a path
        in an allowed folder, a `data:` URL, or a cloud URI such as `s3://...`, which Label Studio resolves for the task
        `task_id`. `uid`: "ID.timestamp" of the task's project; `hostname`: the address under which its Label Studio
        named itself at /setup. Raises MediaError: one sentence that says what to do.
        """
        limits = _Limits.of(self._settings, video)
        hostname = self._known_name(value, uid, hostname)
        if (own := self._local_file(value, hostname, limits)) is not None:
            return own
        key = self._key(value, uid)
        if (cached := self._files.get(key)) is not None:
            metrics.media.labels("cached").inc()
            return cached
        with metrics.fetching():
            if value.startswith("data:"):
                content: bytes | bytearray = self._decode(value, limits)
            else:
                url, of_label_studio = self._locate(value, task_id, hostname)
                content = self._download(url, own=of_label_studio, shown=brief(value), limits=limits)
            limits.check_pixels(content, value)
        try:
            return self._files.put(key, content)
        except OSError as error:
            raise MediaError(
                f"{brief(value)} could not be kept in {self.folder} ({error.strerror or error}); free some disk space "
                "or set YOLONAS_STATE_DIR to a folder that can be written",
                passing=True,
            ) from error

    def size(self) -> int:
        """Bytes in the cache."""
        return self._files.size()

    def forget(self, value: str, uid: str = "") -> None:
        """Drop the cached file, so that the next fetch asks again; for who found it unreadable."""
        self._files.drop(self._key(value, uid))

    def _key(self, value: str, uid: str) -> str:
        """What a cloud URI stands for, the storages of its project decide."""
        base = self._settings.label_studio_url
        return f"{base}\n{uid}\n{value}" if _is_cloud_uri(value) else f"{base}\n{value}"

    # -- whose -------------------------------------------------------------------------------------------------

    def _known_name(self, value: str, uid: str, hostname: str) -> str:
        """`hostname` where it is another name of the configured Label Studio, "" where that has not the project.

        Raises MediaError for what only the project's own Label Studio can give then.
        """
        base = self._settings.label_studio_url
        if not uid or not self._of_label_studio(value, hostname) or self._has_project(uid, value):
            return hostname
        if below(value, hostname) and not below(value, base):
            return ""  # an address like any other
        raise MediaError(
            f"{brief(value)} can only be had through the task's own Label Studio, and the one at {base} has not its "
            "project, or hides it from the token's user; run a backend of its own for that Label Studio, or set a "
            "token that sees the project"
        )

    def _of_label_studio(self, value: str, hostname: str) -> bool:
        """Whether the value names something of Label Studio's own, or of the storages that it knows."""
        base = self._settings.label_studio_url
        if value.startswith("/") and not value.startswith("//"):
            return _SERVED.match(relative(value.partition("?")[0], base, hostname)) is not None
        return below(value, base) or below(value, hostname) or _is_cloud_uri(value)

    def _has_project(self, uid: str, value: str) -> bool:
        """Whether the configured Label Studio has the project "ID.timestamp"; without a token to ask by, it has."""
        number, _, created = uid.partition(".")
        if self._client is None or self._settings.token is None or created == "0":  # ml_base knows no time of creation
            return True
        with self._asking:  # once for all who wait
            known, until = self._projects.get(uid, (False, 0.0))
            if time.monotonic() >= until:
                try:
                    known = same_project(self._client.get_project(int(number), read_seconds=_ASK_SECONDS), uid)
                except LabelStudioError as error:
                    known = False if error.status in (403, 404) else str(error)
                again = float("inf") if known is True else _ASK_SECONDS if known else _ASK_AGAIN_SECONDS
                self._projects[uid] = known, time.monotonic() + again
        if isinstance(known, str):
            raise MediaError(f"{brief(value)} could not be fetched: {known}", passing=True)
        return known

    # -- where -------------------------------------------------------------------------------------------------

    def _local_file(self, value: str, hostname: str, limits: _Limits) -> Path | None:
        """The file that a task names, where it lies in one of the allowed folders."""
        folders = self._settings.local_media_folders
        if not folders or value.startswith("data:") or (name := self._local_name(value, hostname)) is None:
            return None
        path = find_file(name, folders)
        if path is not None:
            try:
                if path.stat().st_size > limits.most:
                    raise limits.too_large(value)
                if limits.pixels is not None:
                    limits.check_pixels(path.read_bytes(), value)
            except OSError as error:
                raise MediaError(
                    f"{path} cannot be read ({error.strerror}); let the user of this backend read it"
                ) from None
        return path

    def _local_name(self, value: str, hostname: str) -> str | None:
        """What `?d=` says, or a path."""
        try:
            parts = urlsplit(value)
        except ValueError:
            return None
        if parts.scheme == "file":
            return unquote(parts.path)
        bases = (self._settings.label_studio_url, hostname)
        known = not parts.scheme or any(below(value, base) for base in bases)
        if known and relative(parts.path, *bases) == _LOCAL_FILES:
            return _named_file(parts.query)
        return value if value.startswith("/") and not value.startswith("//") else None

    def _locate(self, value: str, task_id: int | None, hostname: str) -> tuple[str, bool]:
        """URL to ask, and whether it is Label Studio's."""
        base = self._settings.label_studio_url
        try:
            parts = urlsplit(value)
        except ValueError as error:
            raise MediaError(f"{brief(value)!r} is no image address ({error})") from None
        if parts.scheme in ("http", "https"):
            try:
                url = address(value)
            except AddressError as error:
                raise MediaError(f"{brief(value)!r} {error}") from None
            for own in (base, hostname):
                if below(value, own):
                    return self._label_studio(relative(parts.path, own), parts.query, value), True
            if not self._named(url):
                raise MediaError(
                    f"{brief(value)} is on {host(value)}, from which images are not fetched; if you trust that host, "
                    "add it to YOLONAS_MEDIA_HOSTS"
                )
            return value, False
        if parts.scheme == "file":
            raise MediaError(f"{brief(value)} is not in one of the folders of YOLONAS_MEDIA_FOLDERS")
        if value.startswith("/") and not value.startswith("//"):
            return self._label_studio(relative(parts.path, base, hostname), parts.query, value), True
        if _is_cloud_uri(value):
            if task_id is None:
                raise MediaError(f"{brief(value)} can only be had through Label Studio, for a task with an ID")
            uri = base64.urlsafe_b64encode(value.encode(errors="replace")).decode()
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
        segments = re.split(r"[/\\]", unquote(path))
        segments += re.split(r"[/\\]", _named_file(query) or "") if path == _LOCAL_FILES else []
        if ".." in segments or "." in segments or _SERVED.match(path) is None:
            raise MediaError(f"{brief(value)} is not an address under which Label Studio serves files")
        return f"{base}/{path}" + (f"?{query}" if query else "")

    def _trust(self, url: httpx.URL) -> Trust:
        if origin(str(url)) == origin(self._settings.label_studio_url):
            return Trust.OWN
        return Trust.NAMED if self._named(url) else Trust.STRANGER

    def _named(self, url: httpx.URL) -> bool:
        """Whether YOLONAS_MEDIA_HOSTS has the host; there a name without a port stands for ports 80 and 443."""
        named, port = self._settings.extra_media_hosts, url.port or PORTS.get(url.scheme)
        for name in {url.host, url.raw_host.decode("ascii")}:
            plain = f"[{name}]" if ":" in name else name
            if f"{plain}:{port}" in named or (plain in named and port in PORTS.values()):
                return True
        return False

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
        if len(content) > limits.most:
            raise limits.too_large(value)
        return content

    def _download(self, url: str, *, own: bool, shown: str, limits: _Limits) -> bytes | bytearray:
        deadline = time.monotonic() + limits.seconds
        redirects, tries = 0, 2
        while True:
            tries -= 1
            authorized = own and below(url, self._settings.label_studio_url)
            try:
                headers = self._client.authorization() if authorized and self._client is not None else {}
                with self._http.stream("GET", url, headers=headers) as answer:
                    if answer.is_success:
                        return self._body(answer, deadline, shown, limits)
                    status, location = answer.status_code, answer.headers.get("location", "")
            except ForbiddenError as error:
                raise MediaError(f"{shown} is not fetched: {error}") from None
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                reason = str(error) or type(error).__name__
                passing = isinstance(error, httpx.TransportError)
                if "location header" in reason:  # whose address, with all that is in it, goes on there
                    reason, passing = "it redirects to what is no address", False
                if passing and not isinstance(error, httpx.ReadTimeout) and tries > 0 and time.monotonic() < deadline:
                    continue
                advice = "check that it runs"
                advice += " and that YOLONAS_LABEL_STUDIO_URL is its address" if authorized else ""
                sentence = f"{shown} could not be fetched from {host(url)} ({reason}); {advice}"
                raise MediaError(sentence, passing=passing) from error
            except LabelStudioError as error:
                raise MediaError(f"{shown} could not be fetched: {error}", passing=True) from error
            if 300 <= status < 400 and location:
                redirects += 1
                url = self._redirected(url, location, own=own, shown=shown, redirects=redirects)
                tries = 2
                continue
            if status == 401 and authorized and self._client is not None and self._client.refreshable and tries > 0:
                self._client.forget_access()
                continue
            passing = status == 429 or status >= 500
            if passing and tries > 0:
                time.sleep(0.3)
                continue
            raise MediaError(
                f"{shown} could not be fetched: {host(url)} answered {status}; {_advice(status, authorized)}",
                passing=passing or (status == 401 and authorized),  # the token's fault
            )

    def _body(self, answer: httpx.Response, deadline: float, shown: str, limits: _Limits) -> bytes | bytearray:
        if answer.headers.get("content-type", "").startswith("text/html"):
            raise MediaError(f"{shown} is a web page, not an image; check its address, and the token")
        length = answer.headers.get("content-length", "")
        if length.isdecimal() and int(length) > limits.most:
            raise limits.too_large(shown)
        content = bytearray()
        for chunk in answer.iter_bytes():
            content += chunk
            if len(content) > limits.most:
                raise limits.too_large(shown)
            if time.monotonic() > deadline:
                raise MediaError(
                    f"{shown} took longer than {limits.seconds:g} s; raise YOLONAS_{limits.name}_SECONDS if the "
                    "connection is that slow",
                    passing=True,
                )
        if not content:
            raise MediaError(f"{shown} is an empty file; upload it again")
        return content  # no copy: a video is large

    def _redirected(self, url: str, location: str, *, own: bool, shown: str, redirects: int) -> str:
        """Where a redirect leads, if it may be followed.

        Label Studio redirects to its own files, and from resolve/ and presign/ to the signed link of a storage, which
        gets no token and may lead to any public address. All others lead to the same host, or to one that is named.
        """
        base = self._settings.label_studio_url
        target = urljoin(url, location)
        try:
            parsed = address(target)
        except AddressError:
            raise MediaError(f"{shown} redirects to an address that is none, which is not followed") from None
        own = own and below(url, base)  # no more where a signed link led elsewhere
        if own:
            signed = re.search(f"/{_RESOLVED}", urlsplit(url).path) is not None
            safe = below(target, base) or (signed and origin(target) != origin(base))
        else:
            safe = origin(target) == origin(url) or self._named(parsed)
        if redirects > _REDIRECTS or not safe:
            advice = (
                "set YOLONAS_LABEL_STUDIO_URL to the final address" if own else "add that host to YOLONAS_MEDIA_HOSTS"
            )
            raise MediaError(f"{shown} redirects to {host(target)}, which is not followed; {advice}")
        return target


def _is_cloud_uri(value: str) -> bool:
    """Whether it is of a storage, like s3://bucket/1.jpg, which Label Studio resolves."""
    try:
        parts = urlsplit(value[:1000])  # of a data: URL no more
    except ValueError:
        return False
    return parts.scheme not in ("", "http", "https", "file", "data") and parts.netloc != ""


def _named_file(query: str) -> str | None:
    return parse_qs(query).get("d", [None])[0]


def find_file(name: str, folders: Sequence[Path]) -> Path | None:
    """The regular file of this absolute path, or path relative to a folder, if it is in one of the folders.

    It is the file that counts, with its symbolic links and `..` followed, not its name.
    """
    for candidate in [Path(name)] if name.startswith("/") else [folder / name for folder in folders]:
        try:
            real = candidate.resolve(strict=True)
            if real.is_file() and any(real.is_relative_to(folder.resolve()) for folder in folders):
                return real
        except (OSError, RuntimeError, ValueError):  # not there, a circle of links, a name that is none
            continue
    return None


def brief(value: str) -> str:
    """A value for messages: short, and without a query, which may hold a signature (but `?d=` names a local file)."""
    if value.startswith("data:"):
        return value[:30] + "..."
    path, mark, query = value.partition("?")
    return redact((path + mark + query.partition("&")[0] if query.startswith("d=") else path)[:200])


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

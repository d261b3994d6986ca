"""Images by their web address: what an address is, and its content within limits of size and time."""

from __future__ import annotations

import base64
import http.client
import time
import urllib.error
import urllib.request
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from yolonas.errors import DataError

MOST_BYTES = 1 << 27
"""Larger content is refused."""
SECONDS = 30.0
"""A download that takes longer is given up; so is a server that says nothing for a third of it."""
_CHUNK = 1 << 16


def is_web_address(source: str) -> bool:
    return source.lower().startswith(("http://", "https://"))


def suffix(url: str) -> str:
    """The suffix of an address's path, in lower case, such as `.jpg`; what follows a `?` does not count."""
    return PurePosixPath(unquote(urlsplit(url).path)).suffix.lower()


def file_name(url: str) -> str:
    """The last part of an address's path, or its host where it has none."""
    parts = urlsplit(url)
    return unquote(PurePosixPath(parts.path).name) or parts.hostname or ""


def without_password(url: str) -> str:
    """An address as it may be shown: a password in it becomes `***`."""
    try:
        parts = urlsplit(url)
        if parts.password is None:
            return url
    except ValueError:
        return url
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{parts.username}:***@{host}"))


def content_type(url: str) -> tuple[str, bool]:
    """What the server calls the content, such as `image/jpeg`, and whether it names a length; raises DataError."""
    with _open(url, time.monotonic() + SECONDS) as response:
        return response.headers.get_content_type(), response.headers.get("Content-Length") is not None


def download(url: str) -> bytes:
    """The content of a web address; raises DataError, one sentence that names the address, where it cannot be had."""
    name, deadline = without_password(url), time.monotonic() + SECONDS
    with _open(url, deadline) as response:
        if response.headers.get_content_type() == "text/html":
            raise DataError(f"{name} is an HTML page, not an image: give the address of the image itself")
        length = response.headers.get("Content-Length", "")
        if length.isdecimal() and int(length) > MOST_BYTES:
            raise DataError(f"{name} has {int(length) >> 20} MiB, and more than {MOST_BYTES >> 20} are not downloaded")
        content = bytearray()
        try:
            while chunk := response.read1(_CHUNK):
                content += chunk
                if len(content) > MOST_BYTES:
                    raise DataError(f"{name} has more than {MOST_BYTES >> 20} MiB, which are not downloaded")
                if time.monotonic() > deadline:
                    raise DataError(f"{name} took more than {SECONDS:g} s to download")
        except (OSError, http.client.HTTPException) as error:
            raise DataError(f"{name} broke off while it was downloaded: {error or type(error).__name__}") from error
        if length.isdecimal() and len(content) < int(length):
            raise DataError(f"{name} broke off while it was downloaded: {len(content)} of {length} bytes came")
    return bytes(content)


def _open(url: str, deadline: float) -> Any:
    name = without_password(url)
    try:
        parts = urlsplit(url)
        plain = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
        headers = {"User-Agent": "yolonas", "Accept": "*/*"}  # some servers refuse Python's own name
        request = urllib.request.Request(plain, headers=headers)
        if parts.username is not None:
            login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            encoded = base64.b64encode(login.encode()).decode()
            request.add_unredirected_header("Authorization", f"Basic {encoded}")  # not for whom it redirects to
        timeout = max(0.1, min(SECONDS / 3, deadline - time.monotonic()))
        return urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        raise DataError(f"{name} cannot be downloaded: the server answers {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        said = getattr(reason, "strerror", None) or reason
        raise DataError(f"{name} cannot be downloaded: {said}") from error

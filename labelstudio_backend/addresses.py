"""Addresses as tasks hold them, understood in the one way in which they will be asked."""

from __future__ import annotations

from urllib.parse import urlsplit

import httpx

from yolonas.errors import YolonasError


class AddressError(YolonasError):
    """An address that is not asked; the sentence goes on after its name."""


PORTS = {"http": 80, "https": 443}


def address(url: str) -> httpx.URL:
    """The address as it will be asked; raises AddressError for one that could be understood in two ways."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise AddressError(f"is no address ({error})") from None
    if "\\" in url or parsed.userinfo or parsed.scheme not in PORTS or not parsed.host:
        raise AddressError("is no address of an image: it has a user name, a backslash or no host")
    return parsed


def host(url: str) -> str:
    """Host and port, for messages."""
    return urlsplit(url).netloc.rpartition("@")[2].lower()


def origin(url: str) -> tuple[str, str, int | None] | None:
    """Scheme, host and port, None for what has none: such are never the same."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        return None
    return (parsed.scheme, parsed.host, parsed.port or PORTS.get(parsed.scheme)) if parsed.host else None


def below(url: str, base: str) -> bool:
    """Whether the URL is under the base: same origin, and the base's sub-path."""
    if not base or origin(url) != origin(base) or origin(base) is None or "\\" in url:
        return False
    if "@" in urlsplit(url).netloc:
        return False
    prefix = urlsplit(base).path.rstrip("/")
    path = urlsplit(url).path
    return path == prefix or path.startswith(prefix + "/")


def relative(path: str, *bases: str) -> str:
    """A path of Label Studio's without the sub-path of its address, under one name or another, and leading slash."""
    for base in bases:
        prefix = urlsplit(base).path.rstrip("/")
        if prefix and path.startswith(prefix + "/"):
            return path[len(prefix) :].lstrip("/")
    return path.lstrip("/")

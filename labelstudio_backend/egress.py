"""Which addresses of the network are connected to, decided when the name is resolved, and not before.

A task names an address and a signed link leads to another; a name may stand for any machine, and for another one the
moment after. So the address that a name resolves to is looked at, and that very address is connected to.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import threading
import urllib.request
from collections.abc import Callable
from enum import Enum, auto
from typing import TypeAlias

import httpx

from yolonas.errors import YolonasError

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve: TypeAlias = Callable[[str, int], list[str]]

# Where clouds hand out credentials to who runs inside; 169.254.0.0/16 is refused as a whole.
_METADATA = {
    ipaddress.ip_address(address)
    for address in ("100.100.100.200", "168.63.129.16", "192.0.0.192", "fd00:ec2::254", "fd20:ce::254")
}
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class Trust(Enum):
    """What is known of a host."""

    OWN = auto()  # Label Studio's configured address: any address will do
    NAMED = auto()  # named by the administrator, who may mean a private address
    STRANGER = auto()  # named by a link only


class ForbiddenError(YolonasError):
    """A host that is not connected to."""


def resolve(host: str, port: int) -> list[str]:
    """The addresses of a name."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class Egress(httpx.BaseTransport):
    """A transport that connects only to permitted addresses; raises ForbiddenError for the others.

    trust: says what is known of the host of an address. A proxy (HTTPS_PROXY ...) resolves names itself: what it lets
    through is its affair, but addresses in the place of names are looked at here too.
    """

    def __init__(self, trust: Callable[[httpx.URL], Trust], resolve: Resolve = resolve) -> None:
        self._trust = trust
        self._resolve = resolve
        self._context = httpx.create_ssl_context()
        # One for each host: a connection that was opened for a name, and verified by it, serves no other.
        self._transports: dict[str, httpx.HTTPTransport] = {}
        self._guard = threading.Lock()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        url, trust = request.url, self._trust(request.url)
        proxy = _proxy(url)
        if trust is Trust.OWN or (proxy and _literal(url.host) is None):
            return self._transport(url.host, proxy).handle_request(request)
        port = url.port or (443 if url.scheme == "https" else 80)
        try:
            addresses = self._resolve(url.host, port)
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise httpx.ConnectError(f"{url.host} cannot be resolved: {reason}", request=request) from error
        permitted = [address for address in addresses if _permitted(address, url.host, trust)]
        if not permitted:
            raise ForbiddenError(_sentence(url, addresses, trust))
        if proxy:
            return self._transport(url.host, proxy).handle_request(request)
        for number, address in enumerate(permitted):
            pinned = httpx.Request(
                request.method,
                url.copy_with(host=address),
                headers=request.headers,  # Host among them
                stream=request.stream,
                extensions={**request.extensions, "sni_hostname": url.raw_host.decode("ascii")},
            )
            try:
                return self._transport(url.host, None).handle_request(pinned)
            except (httpx.ConnectError, httpx.ConnectTimeout):
                if number == len(permitted) - 1:
                    raise
        raise AssertionError("unreachable")

    def close(self) -> None:
        with self._guard:
            for transport in self._transports.values():
                transport.close()
            self._transports.clear()

    def _transport(self, host: str, proxy: str | None) -> httpx.HTTPTransport:
        key = f"{host} {proxy}"
        with self._guard:
            if key not in self._transports:
                self._transports[key] = httpx.HTTPTransport(verify=self._context, proxy=proxy)
            return self._transports[key]


def _permitted(text: str, host: str, trust: Trust) -> bool:
    address = _embedded(ipaddress.ip_address(text.partition("%")[0]))
    if trust is Trust.NAMED:
        reserved = address.is_link_local or address.is_multicast or address.is_unspecified or address in _METADATA
        return not reserved or _literal(host) is not None  # who writes the very address out, means it
    return address.is_global and not address.is_multicast and address not in _METADATA


def _embedded(address: Address) -> Address:
    """The IPv4 address that an IPv6 address stands for, where it does."""
    if isinstance(address, ipaddress.IPv6Address):
        if address in _NAT64:
            return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        return address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else address)
    return address


def _sentence(url: httpx.URL, addresses: list[str], trust: Trust) -> str:
    host = f"[{url.host}]" if ":" in url.host else url.host
    where = host if url.port is None else f"{host}:{url.port}"
    if trust is Trust.NAMED:
        return f"{where} resolves to {', '.join(addresses)}, where clouds keep credentials and no images are"
    return (
        f"{where} resolves to {', '.join(addresses)}, which is not on the internet; if you trust that host, add "
        f"{where} to YOLONAS_MEDIA_HOSTS"
    )


def _literal(host: str) -> Address | None:
    """The address that is written in the place of a name, also as 2130706433, 0x7f.1 or 127.1."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        if not re.fullmatch(r"(?i)(0x[0-9a-f]+|[0-9]+)(\.(0x[0-9a-f]+|[0-9]+))*", host):
            return None
    try:
        return ipaddress.IPv4Address(socket.inet_aton(host))
    except OSError:
        return None


def _proxy(url: httpx.URL) -> str | None:
    """The proxy that the environment names for this address."""
    literal = _literal(url.host)
    if url.host == "localhost" or (literal is not None and literal.is_loopback):
        return None  # a proxy knows another loopback
    if urllib.request.proxy_bypass(url.host):
        return None
    proxies = urllib.request.getproxies()
    found = proxies.get(url.scheme) or proxies.get("all")
    return found if found is None or "://" in found else f"http://{found}"

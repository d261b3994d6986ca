"""Which addresses are connected to, whatever name stands for them."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from labelstudio_backend import egress
from labelstudio_backend.egress import Egress, ForbiddenError, Trust

PUBLIC, PRIVATE, LINK_LOCAL = "93.184.215.14", "10.1.2.3", "169.254.169.254"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.hosts.append(self.headers["Host"])  # type: ignore[attr-defined]
        self.send_response(200)
        self.send_header("Content-Length", "6")
        self.end_headers()
        self.wfile.write(b"pixels")

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.hosts = []  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def get(url: str, trust: Trust, *addresses: str) -> httpx.Response:
    with httpx.Client(transport=Egress(lambda _: trust, lambda host, port: list(addresses))) as client:
        return client.get(url)


@pytest.mark.parametrize(
    ("address", "stranger", "named"),
    [
        (PUBLIC, True, True),
        ("2606:2800:21f:cb07:6820:80da:af6b:8b2c", True, True),
        (PRIVATE, False, True),
        ("192.168.1.1", False, True),
        ("127.0.0.1", False, True),
        ("::1", False, True),
        ("fd12::1", False, True),
        ("100.64.0.1", False, True),
        (LINK_LOCAL, False, False),
        ("169.254.1.1", False, False),
        ("fe80::1", False, False),
        ("fe80::1%eth0", False, False),
        ("::ffff:169.254.169.254", False, False),
        ("::ffff:10.0.0.1", False, True),
        ("64:ff9b::a9fe:a9fe", False, False),
        ("64:ff9b::7f00:1", False, True),
        ("2002:a9fe:a9fe::1", False, False),
        ("fd00:ec2::254", False, False),
        ("100.100.100.200", False, False),
        ("168.63.129.16", False, False),
        ("0.0.0.0", False, False),
        ("::", False, False),
        ("224.0.0.1", False, False),
        ("ff02::1", False, False),
        ("240.0.0.1", False, True),
        ("192.0.2.1", False, True),
    ],
)
def test_which_addresses_a_name_may_stand_for(address: str, stranger: bool, named: bool) -> None:
    assert egress._permitted(address, "images.example.org", Trust.STRANGER) is stranger
    assert egress._permitted(address, "images.example.org", Trust.NAMED) is named
    assert egress._permitted(address, LINK_LOCAL, Trust.NAMED), "written out in YOLONAS_MEDIA_HOSTS"


def test_a_forbidden_address_gets_no_request(server: ThreadingHTTPServer) -> None:
    port = server.server_address[1]
    for url in (f"http://bucket.example.org:{port}/a?X-Amz-Signature=0f", f"http://127.0.0.1:{port}/a"):
        with pytest.raises(ForbiddenError, match=r"resolves to 127\.0\.0\.1, which is not on the internet") as raised:
            get(url, Trust.STRANGER, "127.0.0.1")
        assert f"add {httpx.URL(url).host}:{port} to YOLONAS_MEDIA_HOSTS" in str(raised.value)
        assert "Signature" not in str(raised.value)
    with pytest.raises(ForbiddenError, match="where clouds keep credentials"):
        get("http://images.example.org/a", Trust.NAMED, LINK_LOCAL)
    assert server.hosts == []  # type: ignore[attr-defined]


def test_the_address_that_was_looked_at_is_the_one_connected_to(server: ThreadingHTTPServer) -> None:
    """The name resolves to another one the moment after, and nobody asks again."""
    answers = [["127.0.0.1"], ["169.254.169.254"]]
    url = f"http://minio.example.org:{server.server_address[1]}/a"
    with httpx.Client(transport=Egress(lambda _: Trust.NAMED, lambda host, port: answers.pop(0))) as client:
        assert client.get(url).content == b"pixels"
        with pytest.raises(ForbiddenError):
            client.get(url)
    assert server.hosts == [httpx.URL(url).netloc.decode()]  # type: ignore[attr-defined]


def test_forbidden_ones_among_several_addresses_are_passed_over(server: ThreadingHTTPServer) -> None:
    url = f"http://minio.example.org:{server.server_address[1]}/a"
    assert get(url, Trust.NAMED, LINK_LOCAL, "127.0.0.1").content == b"pixels"


def test_the_next_address_is_tried_where_nobody_listens(server: ThreadingHTTPServer) -> None:
    url = f"http://minio.example.org:{server.server_address[1]}/a"
    assert get(url, Trust.NAMED, "127.0.0.2", "127.0.0.1").content == b"pixels"
    with pytest.raises(httpx.ConnectError):
        get(url, Trust.NAMED, "127.0.0.2", "127.0.0.3")


def test_a_name_that_is_none_is_an_error_of_the_connection() -> None:
    def unknown(host: str, port: int) -> list[str]:
        raise OSError(-2, "Name or service not known")

    with (
        httpx.Client(transport=Egress(lambda _: Trust.NAMED, unknown)) as client,
        pytest.raises(httpx.ConnectError, match=r"nowhere\.example cannot be resolved: Name or service not known"),
    ):
        client.get("http://nowhere.example/a")


@pytest.mark.parametrize("host", ["127.0.0.1", "2130706433", "0x7f000001", "127.1", "[::1]", "localhost"])
def test_an_address_in_the_place_of_a_name_is_looked_at_behind_a_proxy_too(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with httpx.Client(transport=Egress(lambda _: Trust.STRANGER)) as client, pytest.raises(ForbiddenError):
        client.get(f"http://{host}/a")


def test_a_proxy_resolves_names(server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.server_address[1]}")
    assert get("http://bucket.example.org/a", Trust.STRANGER).content == b"pixels"
    assert server.hosts == ["bucket.example.org"]  # type: ignore[attr-defined]
    monkeypatch.setenv("no_proxy", "example.org")
    with pytest.raises(ForbiddenError):
        get("http://bucket.example.org/a", Trust.STRANGER, PRIVATE)


def test_the_certificate_must_be_the_name_s(server: ThreadingHTTPServer, tmp_path: Path) -> None:
    """Although the connection is made to an address."""
    certificate = self_signed("images.example.org", tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    port = server.server_address[1]
    transport = Egress(lambda _: Trust.NAMED, lambda host, port: ["127.0.0.1"])
    transport._context.load_verify_locations(certificate)
    with httpx.Client(transport=transport) as client:
        assert client.get(f"https://images.example.org:{port}/a").content == b"pixels"
        for other in (f"https://other.example.org:{port}/a", f"https://127.0.0.1:{port}/a"):
            with pytest.raises(httpx.ConnectError, match="certificate"):
                client.get(other)


def self_signed(name: str, folder: Path) -> Path:
    """A certificate and its key, in one file."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = folder / "certificate.pem"
    path.write_bytes(
        certificate.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return path

"""Images by their web address, and one sentence for each way in which that fails."""

from __future__ import annotations

import base64
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import numpy as np
import pytest

from moving_pictures import grey, send, web_server
from yolonas.errors import DataError
from yolonas.inference import download
from yolonas.inference.sources import is_single, iter_sources, list_sources, origin, read_image, write_image


@pytest.fixture
def png(tmp_path: Path) -> bytes:
    return write_image(tmp_path / "a.png", grey(7)).read_bytes()


@pytest.mark.parametrize("path", ["/a.png", "/a.PNG?token=x.mp4", "/photo/12", "/"])
def test_an_image_comes_from_its_address(png: bytes, path: str) -> None:
    with web_server(lambda request: send(request, png, "image/png")) as address:
        url = address + path
        assert is_single(url)
        assert list(list_sources(url)) == [url]
        assert origin(url) == (url, None, None)
        (item,) = iter_sources([url])
        np.testing.assert_array_equal(read_image(item), grey(7))


def test_an_address_is_asked_once_what_it_is(png: bytes) -> None:
    asked: list[str] = []

    def answer(request: BaseHTTPRequestHandler) -> None:
        asked.append(request.path)
        send(request, png, "image/png")

    with web_server(answer) as address:
        listed = list(list_sources([f"{address}/photo", f"{address}/a.png"]))
        assert asked == ["/photo"]
        for item in iter_sources(listed):
            read_image(item)
    assert asked == ["/photo", "/photo", "/a.png"]


def test_redirects_and_logins(png: bytes) -> None:
    def answer(request: BaseHTTPRequestHandler) -> None:
        if request.path == "/old.png":
            send(request, b"", "text/html", 302, Location="/new.png")
        elif request.headers.get("Authorization") == "Basic " + base64.b64encode(b"me:p@ss").decode():
            send(request, png, "image/png")
        else:
            send(request, b"", "text/plain", 401)

    with web_server(answer) as address:
        url = address.replace("://", "://me:p%40ss@") + "/new.png"
        np.testing.assert_array_equal(read_image(url), grey(7))
        assert origin(url).path == address.replace("://", "://me:***@") + "/new.png"
        with pytest.raises(DataError, match=r"old\.png cannot be downloaded: the server answers 401 Unauthorized"):
            read_image(f"{address}/old.png")


def failing(request: BaseHTTPRequestHandler) -> None:
    kind, length = "image/jpeg", None
    if request.path == "/gone.jpg":
        return send(request, b"", "text/plain", 404)
    if request.path == "/page.jpg":
        return send(request, b"<p>no image", "text/html; charset=utf-8")
    if request.path == "/lying.jpg":
        return send(request, b"\n<!DOCTYPE html><p>no image", kind)
    if request.path == "/empty.jpg":
        return send(request, b"", kind)
    if request.path == "/text.jpg":
        return send(request, b"hello", kind)
    request.send_response(200)
    length = {"/declared.jpg": 1 << 40, "/short.jpg": 1000}.get(request.path)
    if length:
        request.send_header("Content-Length", str(length))
    request.end_headers()
    request.wfile.write(b"\xff\xd8\xff")
    if request.path == "/silent.jpg":
        time.sleep(1.5)
    for _ in range(200 if request.path in ("/endless.jpg", "/slow.jpg") else 0):
        request.wfile.write(b"x" * 1000)
        time.sleep(0.02 if request.path == "/slow.jpg" else 0)
    return None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone", "cannot be downloaded: the server answers 404 Not Found"),
        ("page", "is an HTML page, not an image: give the address of the image itself"),
        ("lying", "is an HTML page, not an image"),
        ("empty", "is empty"),
        ("text", "is damaged, or not an image that OpenCV can read"),
        ("declared", "has 1048576 MiB, and more than 128 are not downloaded"),
        ("endless", "has more than 0 MiB, which are not downloaded"),
        ("short", "broke off while it was downloaded: 3 of 1000 bytes came"),
        ("slow", "took more than 0.6 s to download"),
        ("silent", "broke off while it was downloaded: timed out"),
    ],
)
def test_failures_get_a_sentence_that_names_the_address(
    name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "endless":
        monkeypatch.setattr(download, "MOST_BYTES", 100_000)
    monkeypatch.setattr(download, "SECONDS", 0.6)
    with web_server(failing) as address, pytest.raises(DataError) as caught:
        read_image(f"{address}/{name}.jpg")
    assert str(caught.value).startswith(f"{address}/{name}.jpg {message}")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1:9/a.jpg", "cannot be downloaded: Connection refused"),
        ("http://127.0.0.1:9/a", "cannot be downloaded: Connection refused"),
        ("http://127.0.0.1:port/a.jpg", "cannot be downloaded: "),
        ("http:///a.jpg", "cannot be downloaded: "),
        ("s3://bucket/a.jpg", "is an address of a kind that is not read, s3: use a file, or one of http, https, rtsp"),
    ],
)
def test_addresses_that_lead_nowhere(url: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        [read_image(item) for item in iter_sources(url)]
    assert str(caught.value).startswith(f"{url} {message}")


def test_a_host_without_a_name_server_is_named() -> None:
    with pytest.raises(DataError, match=r"^http://no-such-host\.invalid/a\.jpg cannot be downloaded: "):
        read_image("http://no-such-host.invalid/a.jpg")

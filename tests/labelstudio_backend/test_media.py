"""From what a task holds to a file: addresses, tokens, limits and the cache, against a scripted Label Studio."""

from __future__ import annotations

import base64
import os
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from labelstudio_backend import label_studio_http
from labelstudio_backend import media as media_module
from labelstudio_backend.client import LabelStudio
from labelstudio_backend.media import MediaCache, MediaError
from labelstudio_backend.settings import Settings

BASE = "http://studio:8080/ls"
TOKEN = "0123456789abcdef0123456789abcdef01234567"
Answer = Callable[[httpx.Request], httpx.Response]


class Web:
    """Hosts that answer by URL; what they were asked is kept."""

    def __init__(self, pages: dict[str, Any] | None = None) -> None:
        self.pages = pages or {}
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self.pages.get(str(request.url), httpx.Response(404))
        if isinstance(answer, list):
            answer = answer.pop(0)
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, bytes):
            return httpx.Response(200, content=answer)
        return answer(request) if callable(answer) else answer


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., MediaCache]:
    monkeypatch.setattr(label_studio_http, "RETRY_SECONDS", 0.0)

    def make(web: Web, token: str | None = TOKEN, url: str = BASE, **values: Any) -> MediaCache:
        settings = Settings(
            state_dir=tmp_path, label_studio_url=url, label_studio_token=token, weights="untrained-n", **values
        )
        transport = httpx.MockTransport(web)
        client = LabelStudio(url, token, transport=transport) if url else None
        return MediaCache(settings, client, transport=transport)

    return make


@pytest.mark.parametrize(
    ("value", "asked"),
    [
        ("/data/upload/5/659649fc-im0.jpg", BASE + "/data/upload/5/659649fc-im0.jpg"),
        ("/ls/data/upload/5/a b.jpg", BASE + "/data/upload/5/a%20b.jpg"),
        ("/data/local-files/?d=imgs/im0.jpg", BASE + "/data/local-files/?d=imgs/im0.jpg"),
        (BASE + "/data/local-files/?d=imgs/im0.jpg", BASE + "/data/local-files/?d=imgs/im0.jpg"),
        ("https://label.example.org/data/upload/5/x.jpg", BASE + "/data/upload/5/x.jpg"),
        ("HTTPS://LABEL.example.org:443/tasks/3/resolve/?fileuri=abc", BASE + "/tasks/3/resolve/?fileuri=abc"),
    ],
)
def test_files_of_label_studio_are_asked_at_its_configured_address(
    cache: Callable[..., MediaCache], value: str, asked: str
) -> None:
    web = Web({asked: b"pixels"})
    path = cache(web).fetch(value, task_id=3, hostname="https://label.example.org")
    assert path.read_bytes() == b"pixels"
    assert web.requests[0].headers["Authorization"] == f"Token {TOKEN}"


def test_a_file_is_fetched_once(cache: Callable[..., MediaCache]) -> None:
    web = Web({BASE + "/data/upload/1/a.jpg": b"pixels"})
    media = cache(web)
    assert media.fetch("/data/upload/1/a.jpg") == media.fetch("/data/upload/1/a.jpg")
    assert len(web.requests) == 1
    media.forget("/data/upload/1/a.jpg")
    media.fetch("/data/upload/1/a.jpg")
    assert len(web.requests) == 2


def test_a_personal_token_is_refreshed_on_401(cache: Callable[..., MediaCache]) -> None:
    access = httpx.Response(200, json={"access": "a.b.c"})
    web = Web(
        {
            BASE + "/api/token/refresh/": [access, access],
            BASE + "/data/upload/1/a.jpg": [httpx.Response(401), b"pixels"],
        }
    )
    assert cache(web, token="x.y.z").fetch("/data/upload/1/a.jpg").read_bytes() == b"pixels"
    assert [request.url.path.split("/")[-2] for request in web.requests] == ["refresh", "1", "refresh", "1"]


def test_cloud_uris_are_resolved_by_label_studio_without_giving_its_token_away(
    cache: Callable[..., MediaCache],
) -> None:
    uri = base64.urlsafe_b64encode(b"s3://bkt/pics/im0.jpg").decode()
    signed = "https://bkt.s3.example.org/pics/im0.jpg?X-Amz-Signature=1"
    web = Web(
        {
            f"{BASE}/tasks/323/resolve/?fileuri={uri}": httpx.Response(303, headers={"location": signed}),
            signed: b"pixels",
        }
    )
    media = cache(web)
    assert media.fetch("s3://bkt/pics/im0.jpg", task_id=323).read_bytes() == b"pixels"
    assert "Authorization" in web.requests[0].headers
    assert "Authorization" not in web.requests[1].headers
    with pytest.raises(MediaError, match="only be had through Label Studio"):
        media.fetch("gs://bkt/pics/im1.jpg")


def test_data_urls(cache: Callable[..., MediaCache]) -> None:
    media = cache(Web())
    value = "data:image/png;base64," + base64.b64encode(b"pixels").decode()
    assert media.fetch(value).read_bytes() == b"pixels"
    for broken in ("data:image/png;base64,", "data:image/png;base64,a"):
        with pytest.raises(MediaError, match="data: URL"):
            media.fetch(broken)


def test_other_hosts_only_where_allowed_and_without_the_token(cache: Callable[..., MediaCache]) -> None:
    web = Web({"https://images.example.org/a.jpg": b"pixels", "http://cdn:8443/a.jpg": b"more"})
    with pytest.raises(MediaError, match=r"is on images\.example\.org.*YOLONAS_MEDIA_HOSTS"):
        cache(web).fetch("https://images.example.org/a.jpg")
    assert web.requests == []
    media = cache(web, media_hosts="images.example.org, CDN:8443")
    assert media.fetch("https://images.example.org/a.jpg").read_bytes() == b"pixels"
    assert media.fetch("http://cdn:8443/a.jpg").read_bytes() == b"more"
    with pytest.raises(MediaError, match=r"is on images\.example\.org:8443"):  # a name alone stands for 80 and 443
        media.fetch("http://images.example.org:8443/a.jpg")
    assert all("Authorization" not in request.headers for request in web.requests)
    with pytest.raises(MediaError, match="YOLONAS_MEDIA_HOSTS"):
        media.fetch("http://cdn/a.jpg")


@pytest.mark.parametrize(
    "value",
    [
        "http://169.254.169.254/latest/meta-data",
        "http://studio:8080@evil.example.org/data/a.jpg",
        "http://user@studio:8080/ls/data/a.jpg",
        "http://studio:8081/ls/data/upload/1/a.jpg",
        "http://studio:8080/lsx/data/upload/1/a.jpg",
        "https://studio:8080/ls/data/upload/1/a.jpg",
        "//evil.example.org/data/a.jpg",
        "/data/../api/users",
        "/data/%2e%2e/api/users",
        "/data/upload/./../../api/users",
        "/api/projects/",
        BASE + "/logout",
        "file:///etc/passwd",
        "/etc/passwd",
        "etc/passwd",
        "/data/local-files/?d=../../etc/passwd",
        "/data/local-files/?d=..%2f..%2fetc%2fpasswd",
        BASE + "/data/local-files/?x=1&d=a/../../b",
        "/data/..%5c..%5capi",
        "/data\\..\\api",
        "/tasks/5/",
        "/projects/5/settings",
        "/tasks/5/resolve/../../../api/users?fileuri=x",
        "http://studio:8080\\@evil.example.org/ls/data/a.jpg",
        "http://evil.example.org\\@studio:8080/ls/data/a.jpg",
        "http://evil.example.org#@studio:8080/ls/data/a.jpg",
        "http://studio:8080.evil.example.org/ls/data/a.jpg",
        "http://studio.:8080/ls/data/a.jpg",
        "http://user:pass@cdn/a.jpg",
        "http://cdn@evil.example.org/a.jpg",
        "http://cdn:22/a.jpg",
        "http://cdn.evil.example.org/a.jpg",
        "http://evilcdn/a.jpg",
        "http://[::ffff:169.254.169.254]/latest/meta-data",
        "http://[fe80::1%25eth0]/a.jpg",
        "http://2852039166/latest/meta-data",
        "http://0xa9fea9fe/",
        "http://127.1/",
        "http://localhost/a.jpg",
        "http:///a.jpg",
        "http:studio:8080/ls/data/a.jpg",
        "javascript:alert(1)",
        "file://localhost/etc/passwd",
        "\x00",
        "http://cdn/\r\nHost: evil",
        "",
        "ftp://studio/a.jpg",
        "http://[studio/a.jpg",
        "http://studio:port/a.jpg",
    ],
)
def test_where_a_task_may_not_point(cache: Callable[..., MediaCache], value: str) -> None:
    web = Web()
    with pytest.raises(MediaError) as raised:
        cache(web, media_hosts="cdn").fetch(value)
    assert web.requests == []
    assert "\n" not in str(raised.value)
    assert "pass@" not in str(raised.value)


def test_redirects_stay_where_they_are(cache: Callable[..., MediaCache]) -> None:
    def to(url: str) -> httpx.Response:
        return httpx.Response(302, headers={"location": url})

    web = Web(
        {
            BASE + "/data/upload/1/slash": to("/ls/data/upload/1/slash/"),
            BASE + "/data/upload/1/slash/": b"pixels",
            BASE + "/data/upload/1/out": to("http://169.254.169.254/"),
            BASE + "/data/upload/1/other": to("http://studio:8080/elsewhere"),
            BASE + "/data/upload/1/loop": to("loop"),
            BASE + "/tasks/1/resolve/?fileuri=x": to("file:///etc/passwd"),
            "http://cdn/a": to("http://169.254.169.254/"),
            "http://cdn/b": to("/c"),
            "http://cdn/c": b"more",
        }
    )
    media = cache(web, media_hosts="cdn")
    assert media.fetch("/data/upload/1/slash").read_bytes() == b"pixels"
    assert media.fetch("http://cdn/b").read_bytes() == b"more"
    for value in (
        "/data/upload/1/out",
        "/data/upload/1/other",
        "/data/upload/1/loop",
        "/tasks/1/resolve/?fileuri=x",
        "http://cdn/a",
    ):
        with pytest.raises(MediaError, match="not followed"):
            media.fetch(value)
    assert not any(request.url.host == "169.254.169.254" for request in web.requests)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (httpx.Response(401), "answered 401; set YOLONAS_LABEL_STUDIO_TOKEN"),
        (httpx.Response(403), "may not see this file"),
        (httpx.Response(404), "a storage must cover the path"),
        (httpx.Response(500), "look into that server's log"),
        ([httpx.Response(503), httpx.Response(503)], "answered 503"),
        ([httpx.ConnectError("refused")] * 2, "refused.*YOLONAS_LABEL_STUDIO_URL"),
        (httpx.Response(200, text="<html>", headers={"content-type": "text/html; charset=utf-8"}), "a web page"),
        (b"", "an empty file"),
        (b"x" * 101, "larger than 100 bytes; raise YOLONAS_MEDIA_MAX_BYTES"),
        (lambda _: httpx.Response(200, content=iter([b"x" * 60, b"x" * 60])), "larger than 100 bytes"),
    ],
)
def test_failures_say_what_to_do(cache: Callable[..., MediaCache], answer: Any, message: str, tmp_path: Path) -> None:
    web = Web({BASE + "/data/upload/1/a.jpg": answer})
    with pytest.raises(MediaError, match=message) as raised:
        cache(web, media_max_bytes=100).fetch("/data/upload/1/a.jpg")
    assert "/data/upload/1/a.jpg" in str(raised.value)
    assert TOKEN not in str(raised.value)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("failure", [httpx.ConnectError("refused"), httpx.Response(429), httpx.Response(500)])
def test_a_passing_failure_is_tried_again(cache: Callable[..., MediaCache], failure: Any) -> None:
    web = Web({BASE + "/data/upload/1/a.jpg": [failure, b"pixels"]})
    assert cache(web).fetch("/data/upload/1/a.jpg").read_bytes() == b"pixels"


@pytest.mark.parametrize(
    ("answer", "passing"),
    [
        (httpx.ConnectError("refused"), True),
        (httpx.ReadTimeout("timed out"), True),
        (httpx.Response(429), True),
        (httpx.Response(500), True),
        (httpx.Response(503), True),
        (httpx.Response(401), True),  # the token's fault
        (httpx.Response(403), False),
        (httpx.Response(404), False),
        (httpx.Response(302, headers={"location": "http://elsewhere/"}), False),
        (httpx.Response(200, text="<html>", headers={"content-type": "text/html"}), False),
        (b"", False),
        (b"x" * 101, False),
    ],
)
def test_what_may_be_had_later_is_told_from_what_cannot(
    cache: Callable[..., MediaCache], answer: Any, passing: bool
) -> None:
    web = Web({BASE + "/data/upload/1/a.jpg": [answer] * 2})
    with pytest.raises(MediaError) as raised:
        cache(web, media_max_bytes=100).fetch("/data/upload/1/a.jpg")
    assert raised.value.passing is passing


def test_a_token_that_cannot_be_refreshed_is_no_fault_of_the_image(cache: Callable[..., MediaCache]) -> None:
    web = Web({BASE + "/api/token/refresh/": httpx.Response(503)})
    with pytest.raises(MediaError, match="is Label Studio still starting") as raised:
        cache(web, token="x.y.z").fetch("/data/upload/1/a.jpg")
    assert raised.value.passing


def test_a_trickle_is_cut_off(cache: Callable[..., MediaCache]) -> None:
    def trickle(_: httpx.Request) -> httpx.Response:
        def chunks() -> Any:
            while True:
                time.sleep(0.05)
                yield b"x"

        return httpx.Response(200, content=chunks())

    web = Web({BASE + "/data/upload/1/a.jpg": trickle})
    begin = time.monotonic()
    with pytest.raises(MediaError, match="YOLONAS_MEDIA_SECONDS") as raised:
        cache(web, media_seconds=0.3).fetch("/data/upload/1/a.jpg")
    assert raised.value.passing
    assert time.monotonic() - begin < 30  # and not for ever


def test_without_an_address_the_message_names_both_settings(cache: Callable[..., MediaCache]) -> None:
    media = cache(Web(), token=None, url="")
    for value in ("/data/upload/1/a.jpg", "http://localhost:8080/data/upload/1/a.jpg"):
        with pytest.raises(MediaError, match="YOLONAS_LABEL_STUDIO_URL and YOLONAS_LABEL_STUDIO_TOKEN"):
            media.fetch(value, hostname="http://localhost:8080")


def test_the_cache_forgets_the_least_recently_used(cache: Callable[..., MediaCache]) -> None:
    web = Web({f"{BASE}/data/upload/1/{number}": b"x" * 100 for number in range(12)})
    media = cache(web, media_cache_bytes=1000)
    paths = [media.fetch(f"/data/upload/1/{number}") for number in range(10)]
    for age, path in enumerate(paths):
        os.utime(path, (1000 + age, 1000 + age))
    media.fetch("/data/upload/1/0")  # used again
    media.fetch("/data/upload/1/10")
    assert [path.exists() for path in paths] == [True, False, False] + [True] * 7
    media.fetch("/data/upload/1/1")
    assert len(web.requests) == 12
    assert sum(path.stat().st_size for path in media.folder.glob("*/*")) <= 1000


def test_a_new_process_knows_the_old_files(cache: Callable[..., MediaCache]) -> None:
    web = Web({f"{BASE}/data/upload/1/{number}": b"x" * 100 for number in range(12)})
    first = cache(web, media_cache_bytes=1000)
    for number in range(10):
        os.utime(first.fetch(f"/data/upload/1/{number}"), (1000 + number, 1000 + number))
    second = cache(web, media_cache_bytes=1000)
    second.fetch("/data/upload/1/9")
    assert len(web.requests) == 10
    second.fetch("/data/upload/1/10")
    assert sum(path.stat().st_size for path in first.folder.glob("*/*")) <= 1000


def test_files_about_to_be_read_are_not_evicted(cache: Callable[..., MediaCache]) -> None:
    web = Web({f"{BASE}/data/upload/1/{number}": b"x" * 100 for number in range(5)})
    media = cache(web, media_cache_bytes=0)
    paths = [media.fetch(f"/data/upload/1/{number}") for number in range(5)]
    assert all(path.exists() for path in paths)


def test_threads_see_whole_files_only(cache: Callable[..., MediaCache]) -> None:
    content = os.urandom(300_000)
    web = Web({f"{BASE}/data/upload/1/{number}": content for number in range(4)})
    media = cache(web)
    start = threading.Barrier(8)

    def fetch(number: int) -> bytes:
        start.wait()
        return media.fetch(f"/data/upload/1/{number % 4}").read_bytes()

    with ThreadPoolExecutor(8) as pool:
        assert all(read == content for read in pool.map(fetch, range(8)))
    assert not list(media.folder.rglob(".tmp-*"))


def test_a_full_disk_is_a_sentence(cache: Callable[..., MediaCache], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(MediaError, match=r"No space left on device.*YOLONAS_STATE_DIR") as raised:
        cache(Web({BASE + "/data/upload/1/a.jpg": b"pixels"})).fetch("/data/upload/1/a.jpg")
    assert raised.value.passing


def test_a_path_of_a_signed_link_cannot_pass_for_label_studio_s(cache: Callable[..., MediaCache]) -> None:
    """Only Label Studio's own resolve/ may lead elsewhere, not one in a bucket of the same name."""
    signed = "https://bucket.example.org/tasks/1/resolve/"
    web = Web(
        {
            f"{BASE}/tasks/1/resolve/?fileuri=x": httpx.Response(303, headers={"location": signed}),
            signed: httpx.Response(302, headers={"location": "https://evil.example.org/"}),
        }
    )
    with pytest.raises(MediaError, match=r"redirects to evil\.example\.org, which is not followed"):
        cache(web).fetch("/tasks/1/resolve/?fileuri=x")


def test_where_a_signed_link_leads_on_has_to_be_named(cache: Callable[..., MediaCache]) -> None:
    """S3 answers 307 with the address of the bucket's region for some hours after a bucket was made."""
    signed, region = (f"https://bkt.{host}.amazonaws.com/a.jpg?X-Amz-Signature=0f" for host in ("s3", "s3.eu-west-1"))
    pages = {
        f"{BASE}/tasks/1/resolve/?fileuri=x": httpx.Response(303, headers={"location": signed}),
        signed: httpx.Response(307, headers={"location": region}),
        region: b"pixels",
    }
    with pytest.raises(MediaError, match=r"bkt\.s3\.eu-west-1\.amazonaws\.com, .*add that host to YOLONAS_MEDIA_HOSTS"):
        cache(Web(pages)).fetch("/tasks/1/resolve/?fileuri=x")
    with pytest.raises(MediaError, match=r"from bkt\.s3\.amazonaws\.com \(refused\); check that it runs$"):
        cache(Web({**pages, signed: httpx.ConnectError("refused")})).fetch("/tasks/1/resolve/?fileuri=x")
    web = Web(pages)
    media = cache(web, media_hosts="bkt.s3.eu-west-1.amazonaws.com")
    assert media.fetch("/tasks/1/resolve/?fileuri=x").read_bytes() == b"pixels"
    assert ["Authorization" in request.headers for request in web.requests] == [True, False, False]


@pytest.mark.parametrize(
    "target", ["//evil.example.org/x", "http://u:p@cdn/x", "http://cdn:22/x", "gopher://cdn/", "/\\evil"]
)
def test_redirects_of_a_named_host_stay_there(cache: Callable[..., MediaCache], target: str) -> None:
    web = Web({"http://cdn/a": httpx.Response(302, headers={"location": target})})
    with pytest.raises(MediaError, match="not followed"):
        cache(web, media_hosts="cdn").fetch("http://cdn/a")
    assert len(web.requests) == 1


def png(width: int, height: int) -> bytes:
    """The begin of a PNG file that declares this size."""
    return b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">II", width, height) + b"\x08\x02\0\0\0"


def test_an_image_of_too_many_pixels_is_not_even_kept(cache: Callable[..., MediaCache], tmp_path: Path) -> None:
    (tmp_path / "shelf").mkdir()
    (tmp_path / "shelf" / "bomb.png").write_bytes(png(10_000, 10_001))
    web = Web({BASE + "/data/upload/1/a.png": png(10_000, 10_001), BASE + "/data/upload/1/b.png": png(10_000, 10_000)})
    media = cache(web, media_folders=str(tmp_path / "shelf"))
    inline = "data:image/png;base64," + base64.b64encode(png(10_000, 10_001)).decode()
    for value in ("/data/upload/1/a.png", inline, "/data/local-files/?d=bomb.png"):
        with pytest.raises(MediaError, match=r"declares 100010000 pixels.*YOLONAS_MEDIA_MAX_PIXELS"):
            media.fetch(value)
    assert media.fetch("/data/upload/1/b.png").is_file()
    assert len(list((tmp_path / "media").glob("*/*"))) == 1


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    """A folder of images beside one of secrets, with links within and across."""
    shelf, secret = tmp_path / "shelf", tmp_path / "secret"
    for folder in (shelf / "imgs", secret, tmp_path / "shelf2"):
        folder.mkdir(parents=True)
    (shelf / "imgs" / "a b.jpg").write_bytes(b"pixels")
    (secret / "key.jpg").write_bytes(b"secret")
    (tmp_path / "shelf2" / "key.jpg").write_bytes(b"secret")
    (shelf / "in.jpg").symlink_to(shelf / "imgs" / "a b.jpg")
    (shelf / "out.jpg").symlink_to(secret / "key.jpg")
    (shelf / "door").symlink_to(secret)
    (shelf / "round").symlink_to(shelf / "round")
    os.mkfifo(shelf / "pipe.jpg")
    return shelf


@pytest.mark.parametrize(
    "value",
    [
        "/data/local-files/?d=imgs/a%20b.jpg",
        "/data/local-files/?d=imgs/a b.jpg",
        "/ls/data/local-files/?d=imgs/a%20b.jpg",
        BASE + "/data/local-files/?d=imgs/a%20b.jpg",
        "https://label.example.org/data/local-files/?d=imgs/a%20b.jpg",
        "/data/local-files/?d=imgs/../imgs/a%20b.jpg",
        "/data/local-files/?d={shelf}/imgs/a%20b.jpg",
        "/data/local-files/?d=in.jpg",
        "{shelf}/imgs/a b.jpg",
        "file://{shelf}/imgs/a%20b.jpg",
    ],
)
def test_files_of_allowed_folders_are_read_from_the_disk(
    cache: Callable[..., MediaCache], shelf: Path, tmp_path: Path, value: str
) -> None:
    web = Web()
    media = cache(web, media_folders=f"{tmp_path / 'none'}:{shelf}")
    found = media.fetch(value.format(shelf=shelf), hostname="https://label.example.org")
    assert found == shelf / "imgs" / "a b.jpg"
    assert web.requests == []
    media.forget(value.format(shelf=shelf))
    assert found.exists(), "what is not in the cache is not ours to delete"
    (tmp_path / "link").symlink_to(shelf)  # the allowed folder may itself be a link
    media = cache(web, media_folders=str(tmp_path / "link"))
    assert media.fetch("/data/local-files/?d=in.jpg").read_bytes() == b"pixels"


@pytest.mark.parametrize(
    "value",
    [
        "/data/local-files/?d=../secret/key.jpg",
        "/data/local-files/?d=..%2Fsecret%2Fkey.jpg",
        "/data/local-files/?d=imgs/../../secret/key.jpg",
        "/data/local-files/?d={secret}/key.jpg",
        "/data/local-files/?d=out.jpg",
        "/data/local-files/?d=door/key.jpg",
        "/data/local-files/?d=door/../../secret/key.jpg",
        "/data/local-files/?d=../shelf2/key.jpg",
        "/data/local-files/?d=round",
        "/data/local-files/?d=pipe.jpg",
        "/data/local-files/?d=imgs",
        "/data/local-files/?d=",
        "/data/local-files/?d=%00",
        "/data/local-files/?d=" + "x" * 5000,
        "http://evil.example.org/data/local-files/?d=imgs/a%20b.jpg",
        "{secret}/key.jpg",
        "file://{secret}/key.jpg",
        "file://{shelf}/../secret/key.jpg",
        "file://{shelf}/door/key.jpg",
        "{shelf}/out.jpg",
        "{shelf}2/key.jpg",
    ],
)
def test_nothing_else_is_read_from_the_disk(
    cache: Callable[..., MediaCache], shelf: Path, tmp_path: Path, value: str
) -> None:
    media = cache(Web(), media_folders=str(shelf))
    with pytest.raises(MediaError):  # Label Studio is asked for some, and has none
        media.fetch(value.format(shelf=shelf, secret=tmp_path / "secret"))


def test_a_local_file_that_is_not_here_is_asked_of_label_studio(cache: Callable[..., MediaCache], shelf: Path) -> None:
    web = Web({BASE + "/data/local-files/?d=elsewhere.jpg": b"pixels"})
    assert cache(web, media_folders=str(shelf)).fetch("/data/local-files/?d=elsewhere.jpg").read_bytes() == b"pixels"


def test_a_sub_path_that_only_label_studio_itself_knows(cache: Callable[..., MediaCache]) -> None:
    """LABEL_STUDIO_HOST=https://example.org/label, asked without its proxy at http://studio:8080."""
    web = Web(
        {"http://studio:8080/data/upload/5/x.jpg": b"pixels", "http://studio:8080/tasks/3/resolve/?fileuri=abc": b"x"}
    )
    media = cache(web, url="http://studio:8080")
    for value in (
        "/label/data/upload/5/x.jpg",
        "https://example.org/label/data/upload/5/x.jpg",
        "/data/upload/5/x.jpg",
        "/label/tasks/3/resolve/?fileuri=abc",
    ):
        media.fetch(value, hostname="https://example.org/label")
    with pytest.raises(MediaError, match=r"is on example\.org"):
        media.fetch("https://example.org/data/upload/5/x.jpg", hostname="https://example.org/label")


# -- a backend that two Label Studios connect to: the names of their files are the same

UID, CREATED = "5.1795289898", "2026-11-21T19:38:18.810449Z"
PROJECT = BASE + "/api/projects/5/"
OTHER = "http://other.example.org"


def studios(created: str) -> Web:
    """The configured one, whose project 5 was created then, another one, and a host of images."""
    uri = base64.urlsafe_b64encode(b"s3://bkt/a.jpg").decode()
    files = ("data/upload/5/a.jpg", "data/local-files/?d=a.jpg", f"tasks/3/resolve/?fileuri={uri}")
    pages: dict[str, Any] = {f"{BASE}/{path}": b"ours" for path in files}
    pages |= {f"{OTHER}/{path}": b"theirs" for path in files}
    pages |= {"http://cdn/a.jpg": b"everyone's", PROJECT: httpx.Response(200, json={"id": 5, "created_at": created})}
    return Web(pages)


@pytest.mark.parametrize("hostname", [OTHER, BASE, "http://localhost:8080", ""])
@pytest.mark.parametrize(
    "value",
    [
        "/data/upload/5/a.jpg",
        "/ls/data/upload/5/a.jpg",
        "/data/local-files/?d=a.jpg",
        "s3://bkt/a.jpg",
        "/tasks/3/resolve/?fileuri=czM6Ly9ia3QvYS5qcGc=",
        BASE + "/data/upload/5/a.jpg",
    ],
)
def test_files_of_another_label_studio_are_not_asked_of_ours(
    cache: Callable[..., MediaCache], tmp_path: Path, value: str, hostname: str
) -> None:
    web = studios("2025-01-01T00:00:00Z")
    (tmp_path / "shelf").mkdir()
    (tmp_path / "shelf" / "a.jpg").write_bytes(b"ours")
    media = cache(web, media_hosts="cdn", media_folders=str(tmp_path / "shelf"))
    media.fetch(value, task_id=3)  # now it is cached
    asked = len(web.requests)
    for _ in range(2):
        with pytest.raises(MediaError, match=r"the one at http://studio:8080/ls has not its project.*run a backend"):
            media.fetch(value, task_id=3, uid=UID, hostname=hostname)
    assert [str(request.url) for request in web.requests[asked:]] == [PROJECT], "and it is asked once a minute"
    assert media.fetch("http://cdn/a.jpg", uid=UID, hostname=hostname).read_bytes() == b"everyone's"
    assert media.fetch("data:image/png;base64,aWNo", uid=UID, hostname=hostname).read_bytes() == b"ich"
    assert media.fetch(str(tmp_path / "shelf" / "a.jpg"), uid=UID, hostname=hostname).read_bytes() == b"ours"


def test_addresses_of_another_label_studio_are_those_of_any_host(cache: Callable[..., MediaCache]) -> None:
    web = studios("2025-01-01T00:00:00Z")
    with pytest.raises(MediaError, match=r"is on other\.example\.org, from which images are not fetched"):
        cache(web).fetch(f"{OTHER}/data/upload/5/a.jpg", task_id=3, uid=UID, hostname=OTHER)
    media = cache(web, media_hosts="other.example.org")
    assert media.fetch(f"{OTHER}/data/upload/5/a.jpg", task_id=3, uid=UID, hostname=OTHER).read_bytes() == b"theirs"
    assert "Authorization" not in web.requests[-1].headers


def test_our_label_studio_under_another_name(cache: Callable[..., MediaCache]) -> None:
    web = studios(CREATED)
    media = cache(web)
    for value in (
        "/data/upload/5/a.jpg",
        f"{OTHER}/data/upload/5/a.jpg",
        "/data/local-files/?d=a.jpg",
        "s3://bkt/a.jpg",
    ):
        assert media.fetch(value, task_id=3, uid=UID, hostname=OTHER).read_bytes() == b"ours"
    assert [str(request.url) for request in web.requests].count(PROJECT) == 1
    without = cache(web, token=None)  # nothing to ask by, and nothing that the other one could be told
    assert without.fetch("/data/upload/5/a.jpg", uid=UID, hostname=OTHER).read_bytes() == b"ours"


def test_a_project_that_cannot_be_asked_for(cache: Callable[..., MediaCache], monkeypatch: pytest.MonkeyPatch) -> None:
    web = studios(CREATED)
    there = web.pages[PROJECT]
    media = cache(web)
    web.pages[PROJECT] = httpx.Response(500)
    with pytest.raises(MediaError, match=r"a\.jpg could not be fetched: GET .*api/projects/5/ answered 500"):
        media.fetch("/data/upload/5/a.jpg", uid=UID)
    web.pages[PROJECT] = httpx.Response(404)
    with pytest.raises(MediaError, match="answered 500") as raised:  # asked once for all who wait
        media.fetch("/data/upload/5/b.jpg", uid=UID)
    assert raised.value.passing
    media._projects.clear()
    with pytest.raises(MediaError, match="hides it from the token's user"):
        media.fetch("/data/upload/5/a.jpg", uid=UID)
    web.pages[PROJECT] = there
    monkeypatch.setattr(media_module, "_ASK_AGAIN_SECONDS", 0.0)
    media._projects.clear()
    assert media.fetch("/data/upload/5/a.jpg", uid=UID).read_bytes() == b"ours"


def test_a_cloud_uri_is_another_file_in_another_project(cache: Callable[..., MediaCache]) -> None:
    """Each has a storage of its own, with buckets of the same name at two endpoints, for instance."""
    uri = base64.urlsafe_b64encode(b"s3://bkt/a.jpg").decode()
    web = Web({f"{BASE}/tasks/{task}/resolve/?fileuri={uri}": f"of {task}".encode() for task in (3, 4)})
    created = {"created_at": CREATED}
    web.pages |= {f"{BASE}/api/projects/{n}/": httpx.Response(200, json={"id": n, **created}) for n in (5, 6)}
    media = cache(web)
    six = UID.replace("5.", "6.", 1)
    for _ in range(2):
        assert media.fetch("s3://bkt/a.jpg", task_id=3, uid=UID).read_bytes() == b"of 3"
        assert media.fetch("s3://bkt/a.jpg", task_id=4, uid=six).read_bytes() == b"of 4"
    media.forget("s3://bkt/a.jpg", six)
    asked = len(web.requests)
    media.fetch("s3://bkt/a.jpg", task_id=3, uid=UID)
    assert len(web.requests) == asked
    media.fetch("s3://bkt/a.jpg", task_id=4, uid=six)
    assert len(web.requests) == asked + 1


@pytest.mark.parametrize(
    ("uri", "signed"),
    [
        (
            "s3://bkt/pics/im 0.jpg",
            "https://bkt.s3.eu-west-1.amazonaws.com/pics/im%200.jpg?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Signature=0f",
        ),
        (
            "gs://bkt/pics/im0.jpg",
            "https://storage.googleapis.com/bkt/pics/im0.jpg?X-Goog-Signature=0f&X-Goog-Expires=60",
        ),
        ("azure-blob://bkt/pics/im0.jpg", "https://account.blob.core.windows.net/bkt/pics/im0.jpg?sv=2025&sig=0f%3D"),
    ],
)
@pytest.mark.parametrize("through", ["uri", "resolve", "presign", "project"])
def test_links_that_label_studio_signs(cache: Callable[..., MediaCache], uri: str, signed: str, through: str) -> None:
    """For each cloud, as a raw URI or as the API gives it; Label Studio's answer is faked for all three here."""
    encoded = base64.urlsafe_b64encode(uri.encode()).decode()
    value, asked = {
        "uri": (uri, f"/tasks/3/resolve/?fileuri={encoded}"),
        "resolve": (f"/tasks/3/resolve/?fileuri={encoded}",) * 2,
        "presign": (f"/ls/tasks/3/presign/?fileuri={encoded}", f"/tasks/3/presign/?fileuri={encoded}"),
        "project": (f"{BASE}/projects/7/resolve/?fileuri={encoded}", f"/projects/7/resolve/?fileuri={encoded}"),
    }[through]
    web = Web({BASE + asked: httpx.Response(303, headers={"location": signed}), signed: b"pixels"})
    assert cache(web).fetch(value, task_id=3).read_bytes() == b"pixels"
    assert ["Authorization" in request.headers for request in web.requests] == [True, False]

"""Published weights by name, against a web server on this machine."""

from __future__ import annotations

import hashlib
import http.server
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from yolonas import weights
from yolonas.errors import WeightsError
from yolonas.weights import PUBLISHED, Published, resolve

CONTENT = bytes(range(256)) * 5000
DIGEST = hashlib.sha256(CONTENT).hexdigest()
NAME = "yolo_nas_x_coco"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        requests: list[str] = self.server.requests  # type: ignore[attr-defined]
        requests.append(self.path)
        if self.path == "/missing":
            self.send_error(404)
            return
        body = {"/corrupt": b"<html>gone</html>", "/short": CONTENT[:1000]}.get(self.path, CONTENT)
        self.send_response(200)
        if self.path != "/endless":
            self.send_header("Content-Length", str(len(CONTENT) if self.path == "/short" else len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[http.server.ThreadingHTTPServer]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def url(server: http.server.ThreadingHTTPServer) -> str:
    server.requests = []  # type: ignore[attr-defined]
    return f"http://127.0.0.1:{server.server_port}"


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home: cache, current folder, no folder of the user's own."""
    for name in ("cache", "here", "mine"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("YOLONAS_WEIGHTS_DIR", raising=False)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def published(*urls: str, sha256: str = DIGEST) -> dict[str, Published]:
    return {NAME: Published(f"{NAME}.pth", urls, sha256, (f"{NAME}.safetensors", "yolo_nas_x.pt"))}


def requests(server: http.server.ThreadingHTTPServer) -> list[str]:
    found: list[str] = server.requests  # type: ignore[attr-defined]
    return found


def test_an_existing_path_wins(places: Path) -> None:
    file = places / "here" / NAME
    file.write_bytes(b"mine")
    assert resolve(file) == file
    assert resolve(NAME, published=published()) == Path(NAME)
    assert resolve(str(file)) == file


def test_places_are_searched_in_order(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YOLONAS_WEIGHTS_DIR", str(places / "mine"))
    cached = places / "cache" / "yolonas" / "weights" / f"{NAME}.pth"
    cached.parent.mkdir(parents=True)
    for file in (cached, places / "mine" / "yolo_nas_x.pt", places / "here" / f"{NAME}.safetensors"):
        file.write_bytes(b"x")
        assert resolve(NAME, published=published()).resolve() == file


@pytest.mark.parametrize("name", [NAME, f"{NAME}.pth", "yolo_nas_x", "yolo_nas_x.pt"])
def test_a_download_is_kept_in_the_cache(
    server: http.server.ThreadingHTTPServer, url: str, places: Path, name: str
) -> None:
    file = resolve(name, published=published(f"{url}/good"))
    assert file == places / "cache" / "yolonas" / "weights" / f"{NAME}.pth"
    assert file.read_bytes() == CONTENT
    assert resolve(name, published=published(f"{url}/good")) == file
    assert requests(server) == ["/good"]
    assert sorted(os.listdir(file.parent)) == ["deci-license-shown", f"{NAME}.pth"]


def test_a_download_without_a_length(url: str) -> None:
    assert resolve(NAME, published=published(f"{url}/endless")).read_bytes() == CONTENT


def test_the_next_mirror_is_tried(server: http.server.ThreadingHTTPServer, url: str) -> None:
    mirrors = [f"{url}/{name}" for name in ("missing", "corrupt", "short", "good", "never")]
    mirrors.insert(0, "http://127.0.0.1:1/refused")
    assert resolve(NAME, published=published(*mirrors)).read_bytes() == CONTENT
    assert requests(server) == ["/missing", "/corrupt", "/short", "/good"]


def test_without_any_mirror_the_error_says_what_to_do(url: str, places: Path) -> None:
    mirrors = [f"{url}/missing", f"{url}/corrupt", f"{url}/short", "http://127.0.0.1:1/x"]
    with pytest.raises(WeightsError) as caught:
        resolve(NAME, published=published(*mirrors))
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        "404",
        f"SHA-256 {hashlib.sha256(b'<html>gone</html>').hexdigest()} where {DIGEST} is pinned",
        f"1000 of {len(CONTENT)} bytes",
        "refused",
        f"get {NAME}.pth from {mirrors[0]}",
        f"put it into {places / 'cache' / 'yolonas' / 'weights'} or the current folder",
    ):
        assert part in message
    assert os.listdir(places / "cache" / "yolonas" / "weights") == ["deci-license-shown"]


def test_a_wrong_file_is_not_kept_and_an_old_one_is_not_lost(url: str, places: Path) -> None:
    with pytest.raises(WeightsError, match="is pinned"):
        resolve(NAME, published=published(f"{url}/good", sha256="0" * 64))
    assert not (places / "cache" / "yolonas" / "weights" / f"{NAME}.pth").exists()


def test_a_mirror_that_sends_too_much_is_cut_off(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "MAX_BYTES", 1000)
    with pytest.raises(WeightsError, match="larger than 1000 bytes"):
        resolve(NAME, published=published(f"{url}/endless"))


@pytest.mark.parametrize("name", ["yolo_nas_q", "nothing.pth", "folder/yolo_nas_x_coco", "../yolo_nas_x_coco.pth", "/"])
def test_unknown_names_list_the_known_ones(name: str) -> None:
    with pytest.raises(WeightsError, match=rf"^{re.escape(str(Path(name)))} is .*{NAME}"):
        resolve(name, published=published())


def test_the_licence_is_shown_once(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    for expected in (1, 0):
        resolve(NAME, published=published(f"{url}/good"))
        captured = capsys.readouterr()
        assert captured.err.count("LICENSE.YOLONAS.md") == expected
        assert captured.out == ""


def test_the_licence_is_shown_where_no_cache_can_be_written(
    places: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    blocker = places / "file"
    blocker.write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocker))
    (places / "here" / f"{NAME}.pth").write_bytes(b"x")
    resolve(NAME, published=published())
    assert "LICENSE.YOLONAS.md" in capsys.readouterr().err


def test_processes_that_download_at_once(url: str, places: Path) -> None:
    program = (
        "import sys; from yolonas.weights import Published, resolve\n"
        f"p = Published({NAME + '.pth'!r}, ({url + '/good'!r},), {DIGEST!r})\n"
        f"assert len(resolve({NAME!r}, published={{{NAME!r}: p}}).read_bytes()) == {len(CONTENT)}"
    )
    processes = [subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE) for _ in range(4)]
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, errors
    assert sum(error.count(b"LICENSE.YOLONAS.md") for error in errors) == 1
    folder = places / "cache" / "yolonas" / "weights"
    assert sorted(os.listdir(folder)) == ["deci-license-shown", f"{NAME}.pth"]
    assert (folder / f"{NAME}.pth").read_bytes() == CONTENT


def test_the_published_ones_are_pinned_and_encrypted() -> None:
    assert list(PUBLISHED) == ["yolo_nas_s_coco", "yolo_nas_m_coco", "yolo_nas_l_coco"]
    for name, entry in PUBLISHED.items():
        assert entry.file == f"{name}.pth"
        assert all(url.startswith("https://") and url.endswith(f"/{name}.pth") for url in entry.urls)
        assert re.fullmatch("[0-9a-f]{64}", entry.sha256)

"""Each kind of image that a real Label Studio has, predicted on through the backend.

S3 is moto's server. There is no emulator of Google's and Azure's storages here: their links are in test_media.py, with
a Label Studio that is faked.
"""

from __future__ import annotations

import base64
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import cv2
import httpx
import numpy as np
import pytest

from labelstudio_backend.client import LabelStudio
from labelstudio_backend.media import MediaCache, MediaError
from labelstudio_backend.settings import Settings
from real_label_studio import Studio
from small_backend import small_backend

pytestmark = [pytest.mark.labelstudio, pytest.mark.timeout(600)]

USER, PASSWORD = "label-studio", "its: own pässword"
KEY, KEY_SECRET = "AKIAYOLONASTESTS", "a-secret-key-of-the-storage"
CONFIG = """<View><Image name="image" value="$image"/>
<RectangleLabels name="label" toName="image"><Label value="Car"/></RectangleLabels></View>"""


def png(width: int) -> bytes:
    """Each picture has a width of its own, by which a prediction tells what it was made of."""
    ok, content = cv2.imencode(".png", np.full((48, width, 3), 128, np.uint8))
    assert ok
    return content.tobytes()


@contextmanager
def http_server(handler: Any) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


class SubPath(BaseHTTPRequestHandler):
    """A reverse proxy that has Label Studio under /label, as nginx would."""

    studio: str

    def forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {name: self.headers[name] for name in ("Authorization", "Content-Type") if name in self.headers}
        if not self.path.startswith("/label/"):
            self.send_error(404)
            return
        url = self.studio + self.path.removeprefix("/label")
        answer = httpx.request(self.command, url, content=body, headers=headers)
        self.send_response(answer.status_code)
        for name in ("Content-Type", "Location"):
            if name in answer.headers:
                self.send_header(name, answer.headers[name])
        self.send_header("Content-Length", str(len(answer.content)))
        self.end_headers()
        self.wfile.write(answer.content)

    def do_GET(self) -> None:
        self.forward()

    def do_POST(self) -> None:
        self.forward()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The address of an S3 with one bucket, `shelf`, of one picture."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    client = boto3.client(
        "s3", endpoint_url=url, region_name="us-east-1", aws_access_key_id=KEY, aws_secret_access_key=KEY_SECRET
    )
    client.create_bucket(Bucket="shelf")
    client.put_object(Bucket="shelf", Key="pictures/at work.png", Body=png(84))
    yield url
    server.stop()


def test_every_kind_of_image_is_predicted_on(
    label_studio: Studio, s3: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    studio = label_studio.client
    project = studio.create_project("Each kind of image", CONFIG)["id"]
    (label_studio.files / "synced").mkdir()
    (label_studio.files / "synced" / "by name.png").write_bytes(png(82))
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "a.png").write_bytes(png(85))

    def storage(kind: str, **values: Any) -> None:
        common = {"project": project, "title": kind, "use_blob_urls": True, "regex_filter": ".*"}
        made = studio._object("POST", f"api/storages/{kind}", json=common | values)
        synced = studio._object("POST", f"api/storages/{kind}/{made['id']}/sync", json={})
        assert synced["last_sync_count"] == 1, synced

    storage("localfiles", path=str(label_studio.files / "synced"))
    storage(
        "s3",
        bucket="shelf",
        prefix="pictures",
        s3_endpoint=s3,
        region_name="us-east-1",
        aws_access_key_id=KEY,
        aws_secret_access_key=KEY_SECRET,
        presign=True,
    )
    studio.upload_files(project, [("an upload.png", png(81))])
    with (
        http_server(partial(Quiet, directory=str(tmp_path / "web"))) as web,
        http_server(partial(Quiet, directory=str(tmp_path / "web"))) as stranger,
        http_server(type("Proxy", (SubPath,), {"studio": label_studio.url})) as proxy,
    ):
        values = {
            "local file, relative": ("/data/local-files/?d=synced/by%20name.png", 82),
            "http": (f"{web}/a.png", 85),
            "data": ("data:image/png;base64," + base64.b64encode(png(86)).decode(), 86),
            "http, not named": (f"{stranger}/a.png", None),
        }
        studio.import_tasks(project, [{"data": {"image": value}} for value, _ in values.values()])
        settings = Settings(
            state_dir=tmp_path / "state",
            weights="yolo_nas_s_coco",
            label_studio_url=label_studio.url,
            label_studio_token=label_studio.token,
            basic_auth_user=USER,
            basic_auth_pass=PASSWORD,
            media_hosts=f"{host_of(web)},{host_of(s3)}",
        )
        login = {"auth_method": "BASIC_AUTH", "basic_auth_user": USER, "basic_auth_pass": PASSWORD}
        with small_backend(settings) as backend:
            assert httpx.post(f"{backend}/setup", json={}).status_code == 401
            studio.add_ml_backend(project, backend, "yolonas", **login)
            studio.retrieve_predictions(project)
        tasks = {task["id"]: task["data"]["image"] for task in studio.iter_tasks(project)}
        widths = {p["task"]: p["result"][0]["original_width"] for p in studio.predictions(project)}
        seen = {tasks[task].partition("?")[0].partition(";")[0]: width for task, width in widths.items()}
        for value, width in values.values():
            assert seen.get(value.partition("?")[0].partition(";")[0]) == width
        assert seen["s3://shelf/pictures/at work.png"] == 84
        assert sorted(widths.values()) == [81, 82, 82, 84, 85, 86]
        (absolute,) = [v for v in tasks.values() if v.startswith(f"{label_studio.url}/data/local-files/")]
        (upload,) = [v for v in tasks.values() if v.startswith("/data/upload/")]
        assert f"is on {host_of(stranger)}, from which images are not fetched" in caplog.text

        # -- what the API, not /predict, says of the same; behind a sub-path; from the disk; without the storage's name
        (in_s3,) = [task for task, value in tasks.items() if value.startswith("s3://")]
        resolved = studio.get_task(in_s3)["data"]["image"]
        assert "/resolve/" in resolved or "/presign/" in resolved
        below = settings.model_copy(
            update={"label_studio_url": f"{proxy}/label", "state_dir": tmp_path / "below", "media_hosts": host_of(s3)}
        )
        for some, of_what in (
            (settings.model_copy(update={"state_dir": tmp_path / "again"}), (resolved,)),
            (below, (resolved, "s3://shelf/pictures/at work.png", upload, absolute, f"/label{upload}")),
        ):
            with (
                LabelStudio(some.label_studio_url, some.token) as client,
                media_cache(some, client) as media,
            ):
                for value in of_what:
                    content = media.fetch(value, task_id=in_s3, hostname=label_studio.url).read_bytes()
                    expected = {upload: 81, f"/label{upload}": 81, absolute: 82}.get(value, 84)
                    assert content == png(expected)
        shared = settings.model_copy(update={"label_studio_token": None, "media_folders": str(label_studio.files)})
        with media_cache(shared, None) as media:
            assert media.fetch(absolute, hostname=label_studio.url) == label_studio.files / "synced" / "by name.png"
        unnamed = settings.model_copy(update={"media_hosts": "", "state_dir": tmp_path / "unnamed"})
        with (
            LabelStudio(unnamed.label_studio_url, unnamed.token) as client,
            media_cache(unnamed, client) as media,
            pytest.raises(MediaError, match=f"add {host_of(s3)} to YOLONAS_MEDIA_HOSTS"),
        ):
            media.fetch("s3://shelf/pictures/at work.png", task_id=in_s3)
    everything = "\n".join(map(logging.Formatter().format, caplog.records))
    assert "X-Amz-Signature=***" in everything, "the debug log of httpx is there"
    for secret in (label_studio.token, label_studio.account.token, PASSWORD, KEY):
        assert secret not in everything
    assert "Signature=" in everything
    assert not [part for part in everything.split("X-Amz-Signature=")[1:] if not part.startswith("***")]


@contextmanager
def media_cache(settings: Settings, client: LabelStudio | None) -> Iterator[MediaCache]:
    media = MediaCache(settings, client)
    try:
        yield media
    finally:
        media.close()


def host_of(url: str) -> str:
    return urlsplit(url).netloc

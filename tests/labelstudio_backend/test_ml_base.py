"""The service hosted by label-studio-ml: PyPI's 1.0.9 with its own server, and a double of 2.x, which is not on PyPI.

The tests of 2.x run on the real one where YOLONAS_LABEL_STUDIO_ML_2 names the folder that holds it and, after a colon,
others with what it imports (label-studio-sdk and its dependencies, semver).
"""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np
import pytest

from labelstudio_backend import local_label_studio
from labelstudio_backend.local_label_studio import Process, free_port
from labelstudio_backend.registry import Registry
from real_label_studio import wait
from yolonas.data.samples import draw

pytestmark = pytest.mark.timeout(300)

VERSION = "1.0.9"
NEEDS = (
    "appdirs==1.4.4",
    "attrs==26.1.0",
    "blinker==1.9.0",
    "certifi==2026.10.18",
    "charset_normalizer==3.5.2",
    "click==8.5.1",
    "colorama==0.4.6",
    "croniter==7.0.0",
    "Flask==3.1.3",
    "idna==3.20",
    "itsdangerous==2.2.0",
    "Jinja2==3.1.6",
    "label_studio_tools==0.0.4",
    "lxml==6.1.3",
    "MarkupSafe==3.0.4",
    "python_dateutil==4.0.0",
    "redis==8.1.0",
    "requests==2.34.2",
    "rq==3.0.0",
    "tzdata==2026.6",
    "urllib3==2.8.0",
    "Werkzeug==3.1.9",
)
UID, HOST = "5.1795289898", "http://localhost:8080"
CONFIG = (
    '<View><Image name="image" value="$image"/>'
    '<RectangleLabels name="label" toName="image" model_score_threshold="0.001"><Label value="RBC"/></RectangleLabels>'
    "</View>"
)
DOUBLE = Path(__file__).resolve().parents[1] / "label_studio_ml_double"
SERVER = """
import sys
sys.path += sys.argv[2:]
from label_studio_ml.api import init_app
from labelstudio_backend.ml_base import YolonasBackend
app = init_app(model_class=YolonasBackend, **{options})
if __name__ == "__main__":
    app.run(port=int(sys.argv[1]), threaded=True)
"""


def environment_of_its_own() -> Path:
    """A folder with label-studio-ml 1.0.9 and what it imports, made once; torch comes from the tests' environment.

    Its requirements pin Flask of 2020 and leave out rq and redis, so it is installed without them, and with these.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "yolonas"
    folder = cache / f"label-studio-ml-{VERSION}-{hashlib.sha256(repr(NEEDS).encode()).hexdigest()[:8]}"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            target = Path(temporary, "packages")
            pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--target", str(target)]
            subprocess.run([*pip, "--no-deps", f"label-studio-ml=={VERSION}", *NEEDS], check=True)
            target.replace(folder)
    return folder


@dataclass
class Hosted:
    """A label-studio-ml server that runs."""

    url: str
    folder: Path
    log: Path

    def post(self, path: str, **body: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, timeout=120)

    def setup(self) -> str:
        answer = self.post("/setup", project=UID, schema=CONFIG, hostname=HOST, access_token="", extra_params="")
        return str(answer.raise_for_status().json()["model_version"])

    def predict(self, *urls: str) -> list[Any]:
        tasks = [{"id": 100 + index, "data": {"image": url}} for index, url in enumerate(urls)]
        params = {"login": None, "password": None, "context": None}
        answer = self.post("/predict", tasks=tasks, project=UID, label_config=CONFIG, params=params)
        return list(answer.raise_for_status().json()["results"])

    def webhook(self, action: str, **more: Any) -> httpx.Response:
        project = {"id": 5, "created_at": "2026-11-22T00:00:00Z", "label_config": CONFIG, "model_version": ""}
        return self.post("/webhook", action=action, project=project, **more)


@contextmanager
def hosted(folder: Path, path: Path, options: str = "", more: str = "") -> Iterator[Hosted]:
    """label-studio-ml of `path` as a process, with a model that comes with yolonas."""
    script, log, port = folder / "_wsgi.py", folder / "log.txt", free_port()
    script.write_text(SERVER.format(options=options or "{}"))
    environment = os.environ | {
        "YOLONAS_STATE_DIR": str(folder / "state"),
        "YOLONAS_WEIGHTS": "yolo_nas_n_bccd",
        "YOLONAS_RUNTIME": "torch",
        "PYTHONPATH": f"{path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "MODEL_DIR": str(folder),
    }
    server = Process("label-studio-ml", [sys.executable, str(script), str(port), *more.split()], environment, log)
    url = f"http://127.0.0.1:{port}"
    try:
        server.wait_until(lambda: local_label_studio.answers(f"{url}/health"), 120)
        yield Hosted(url, folder, log)
    finally:
        server.stop(10)


@pytest.fixture(scope="module")
def picture() -> str:
    image, *_ = draw(np.random.default_rng(0), 240, 320)
    content = cv2.imencode(".jpg", image[..., ::-1])[1]
    return "data:image/jpeg;base64," + base64.b64encode(content.tobytes()).decode()


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosted]:
    folder = tmp_path_factory.mktemp("one")
    with hosted(folder, environment_of_its_own(), f"dict(model_dir={str(folder / 'jobs')!r})") as server:
        yield server


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosted]:
    first, *others = os.environ.get("YOLONAS_LABEL_STUDIO_ML_2", str(DOUBLE)).split(os.pathsep)
    flask = environment_of_its_own()
    with hosted(tmp_path_factory.mktemp("two"), Path(first), more=" ".join([*others, str(flask)])) as server:
        yield server


def a_prediction(results: list[Any]) -> dict[str, Any]:
    """Of three tasks, the middle one without a picture that can be had."""
    first, broken, last = results
    assert broken == []
    assert first["result"]
    assert first["result"][0]["type"] == "rectanglelabels"
    assert first["result"][0]["value"]["rectanglelabels"] == ["RBC"]
    assert 0 <= first["score"] <= 1
    assert [region["value"] for region in last["result"]] == [region["value"] for region in first["result"]]
    return dict(first)


def version_of(server: Hosted) -> str:
    (project,) = Registry(server.folder / "state" / "projects").projects()
    assert project.metadata()["uid"] == UID
    return project.current().name


def test_one_predicts_under_its_own_version(one: Hosted, picture: str) -> None:
    assert one.setup() == "INITIAL"
    assert one.setup() == "INITIAL"
    assert version_of(one)
    prediction = a_prediction(one.predict(picture, "/data/upload/5/gone.jpg", picture))
    assert "model_version" not in prediction  # Label Studio puts the one of /setup there


def test_one_takes_events_in_a_process_of_their_own(one: Hosted) -> None:
    job = one.webhook("ANNOTATION_CREATED", annotation={"id": 1, "result": []}).json()["job_id"]
    wait((one.folder / "jobs" / job / "event.json").exists, 60, "label-studio-ml's process for the event")
    assert one.webhook("START_TRAINING").status_code == 201
    assert httpx.get(f"{one.url}/health").json()["status"] == "UP"
    assert one.setup() == "INITIAL"  # the event has made no version of its own
    assert "labelstudio_backend/" not in one.log.read_text()  # 1.0.9 prints a traceback about its own files here


def test_two_predicts_under_our_version(two: Hosted, picture: str) -> None:
    version = two.setup()
    assert version == version_of(two)
    prediction = a_prediction(two.predict(picture, "/data/upload/5/gone.jpg", picture))
    assert prediction["model_version"] == version
    assert prediction["result"][0]["original_width"] > 0


def test_two_takes_events_and_answers_at_once(two: Hosted) -> None:
    two.setup()
    assert two.webhook("ANNOTATION_CREATED", annotation={}).json() == {"result": {}, "status": "ok"}
    assert two.webhook("PROJECT_UPDATED").json() == {"status": "Unknown event"}
    answer = two.webhook("START_TRAINING")
    assert answer.status_code == 201
    assert "cannot train" in answer.json()["result"]["error"]  # no Label Studio is set
    assert "Traceback" not in two.log.read_text()

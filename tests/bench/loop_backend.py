"""The loop through `yolonas-labelstudio serve` and a Label Studio: the fake one of the tests, or a real one."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from fake_label_studio import FakeLabelStudio
from labelstudio_backend import serving
from labelstudio_backend.acceptance import Boxes, summarise
from labelstudio_backend.client import LabelStudio
from labelstudio_backend.job import FINAL
from labelstudio_backend.jobs import Jobs
from labelstudio_backend.local_label_studio import Process, answers, free_port
from labelstudio_backend.registry import ProjectRegistry, Registry
from labelstudio_backend.sample_project import label_config, upload
from labelstudio_backend.settings import Settings
from loop_rounds import Corrected
from real_label_studio import running, start_backend
from yolonas.data.labelled import LabelledImages
from yolonas.evaluation import coco_ap, predict_dataset

POLL = 0.5  # s


class BackendTeam:
    """See `loop_rounds.Team`. Label Studio's uncertainty sampling says what is next, by the task scores of the backend;
    with the strategy "random" the seed does."""

    def __init__(
        self,
        client: LabelStudio,
        backend: str,
        server: Process,
        state_dir: Path,
        pool: LabelledImages,
        test: LabelledImages,
        strategy: str,
        seed: int,
        *,
        first: int,
        seconds: float,
    ) -> None:
        self.client, self.backend, self.server, self.state_dir = client, backend, server, state_dir
        self.pool, self.test, self.strategy, self.seconds = pool, test, strategy, seconds
        self.order = [int(image) for image in np.random.default_rng(seed).permutation(len(pool))]
        self.first = first
        self.project = client.create_project(f"Loop, {strategy}, seed {seed}", label_config(pool.names))["id"]
        self.tasks = upload(client, self.project, [image.path for image in pool.images])
        self.image_of = {task: image for image, task in enumerate(self.tasks)}
        client.add_ml_backend(self.project, backend, title="Loop")
        (self.row,) = client.ml_backends(self.project)
        client.patch_project(self.project, sampling="Uncertainty sampling")
        self.labelled: set[int] = set()
        self.version = ""
        self.parent: dict[str, Any] | None = None

    def next(self) -> int:
        if self.strategy == "random" or len(self.labelled) < self.first:
            return next(image for image in self.order if image not in self.labelled)
        url, headers = f"{self.client.url}/api/projects/{self.project}/next", self.client.authorization()
        return self.image_of[int(httpx.get(url, headers=headers, trust_env=False).raise_for_status().json()["id"])]

    def predicted(self, image: int) -> Boxes | None:
        if not self.version:
            return None
        task = self.client.get_task(self.tasks[image])
        self.parent = next(p for p in task["predictions"] if p["model_version"] == self.version)
        found = [region["value"] for region in self.parent["result"]]
        percent = np.array([[v["x"], v["y"], v["x"] + v["width"], v["y"] + v["height"]] for v in found])
        return Boxes(percent.reshape(-1, 4) * self._scale(image), [v["rectanglelabels"][0] for v in found])

    def submit(self, image: int, work: Corrected) -> None:
        """As the editor does: a predicted region keeps its ID, and `origin` says what was done to it."""
        true, parent = self.pool.images[image], self.parent
        result = []
        percent = np.asarray(work.boxes.boxes, np.float64) / self._scale(image)
        for (x, y, right, bottom), name, source, kept in zip(
            percent.tolist(), work.boxes.labels, work.sources.tolist(), work.kept.tolist(), strict=True
        ):
            region = {} if parent is None or source < 0 else parent["result"][source]
            origin = "manual" if source < 0 else "prediction" if kept else "prediction-changed"
            value = {"x": x, "y": y, "width": right - x, "height": bottom - y, "rotation": 0, "rectanglelabels": [name]}
            result.append(
                {
                    "id": region.get("id", uuid.uuid4().hex[:10]),
                    "from_name": "label",
                    "to_name": "image",
                    "type": "rectanglelabels",
                    "original_width": true.width,
                    "original_height": true.height,
                    "image_rotation": 0,
                    "value": value,
                    "origin": origin,
                }
            )
        more = {} if parent is None else {"parent_prediction": parent["id"]}
        self.client.create_annotation(self.tasks[image], result, **more)
        self.labelled.add(image)
        self.parent = None

    def train(self) -> dict[str, Any]:
        begun = time.monotonic()
        self.client.train(self.row["id"])
        jobs = Jobs(self.state_dir / "jobs.sqlite")
        job = jobs.find()[-1].id
        self._wait(lambda: jobs.get(job).state in FINAL, 3 * self.seconds + 240, f"job {job}")  # type: ignore[union-attr]
        ended = jobs.get(job)
        assert ended is not None
        if ended.state not in ("succeeded", "refused"):
            raise RuntimeError(f"job {job} {ended.state}: {ended.reason}")
        current = self._registry().current()
        trained = time.monotonic() - begun
        if current.trained:
            self._wait(lambda: self._in_step(current.name), 180, f"predictions of {current.name}")
            self.version = current.name
        metrics = coco_ap(self.test, predict_dataset(serving.load(current, self._settings()), self.test))
        return {
            "ap": round(metrics.ap, 4),
            "ap50": round(metrics.ap50, 4),
            "published": int(ended.state == "succeeded"),
            "training_s": round(trained, 1),
        }

    def check(self, rows: list[dict[str, Any]]) -> None:
        """That what the annotations in Label Studio say is what was counted."""
        works = summarise(self.client.iter_tasks(self.project))
        for name in ("kept", "moved", "relabelled", "removed", "added"):
            said, counted = sum(getattr(work.edits, name) for work in works), sum(row[name] for row in rows)
            assert said == counted, f"{name}: {counted} counted, {said} by the annotations"

    def _in_step(self, version: str) -> bool:
        (row,) = self.client.ml_backends(self.project)
        if not row["title"] == version == self.client.get_project(self.project)["model_version"]:
            return False
        return self.client.count_predictions(self.project, version) == len(self.tasks)

    def _wait(self, condition: Any, seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline or not self.server.running:
                raise RuntimeError(f"{what}: not within {seconds:.0f} s; see {self.server.log}")
            time.sleep(POLL)

    def _registry(self) -> ProjectRegistry:
        projects = Registry(self.state_dir / "projects").projects()
        return next(project for project in projects if project.project_id == self.project)

    def _settings(self) -> Settings:
        return Settings(state_dir=self.state_dir)

    def _scale(self, image: int) -> Any:
        true = self.pool.images[image]
        return np.array([true.width, true.height] * 2) / 100.0


@contextmanager
def backend_team(
    pool: LabelledImages,
    test: LabelledImages,
    strategy: str,
    seed: int,
    *,
    first: int,
    seconds: float,
    size: int,
    folder: Path,
    real: bool,
) -> Iterator[BackendTeam]:
    """A new Label Studio and a new backend with their data in `folder`, until the block ends."""
    with contextlib.ExitStack() as stack:
        if real:
            studio = stack.enter_context(running(folder))
            url, token = studio.url, studio.token
        else:
            fake = stack.enter_context(FakeLabelStudio())
            url, token = fake.url, fake.token
        port = free_port()
        environment = {
            "YOLONAS_STATE_DIR": str(folder / "state"),
            "YOLONAS_PORT": str(port),
            "YOLONAS_WEIGHTS": "untrained-n",
            "YOLONAS_LABEL_STUDIO_URL": url,
            "YOLONAS_LABEL_STUDIO_TOKEN": token,
            "YOLONAS_TRAIN_MINUTES": str(seconds / 60),
            "YOLONAS_TRAIN_EVERY": "0",
            "YOLONAS_IMAGE_SIZE": str(size),
            "YOLONAS_ACQUISITION": strategy,
            "YOLONAS_RECONCILE_SECONDS": "5",
        }
        client = stack.enter_context(LabelStudio(url, token))
        backend = f"http://127.0.0.1:{port}"
        server = start_backend(environment, folder / "backend.log")
        stack.callback(server.stop, 30)
        server.wait_until(lambda: answers(f"{backend}/health"), 120)
        yield BackendTeam(
            client, backend, server, folder / "state", pool, test, strategy, seed, first=first, seconds=seconds
        )

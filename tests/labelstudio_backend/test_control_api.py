"""Steering by HTTP: jobs and versions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from fastapi import FastAPI

from labelstudio_backend.control_api import control_router
from labelstudio_backend.jobs import Jobs
from labelstudio_backend.registry import ProjectRegistry, Registry


@pytest.fixture
def jobs(tmp_path: Path) -> Jobs:
    return Jobs(tmp_path / "jobs.sqlite")


@pytest.fixture
def project(tmp_path: Path) -> ProjectRegistry:
    project = Registry(tmp_path / "projects").register("http://ls", "5.1795289898")
    project.ensure_start("w.pth", [])
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"weights")
    for _ in range(2):
        project.publish(weights, {})
    return project


class Client:
    def __init__(self, project: ProjectRegistry, jobs: Jobs | None, changed: list[str]) -> None:
        self.app = FastAPI()
        self.app.include_router(control_router(Registry(project.path.parent), jobs, changed.append))

    def post(self, path: str, json: Any = None) -> httpx.Response:
        async def send() -> httpx.Response:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://backend") as client:
                return await client.post(path, json=json)

        return anyio.run(send)


def test_jobs_are_asked_for_cancelled_and_retried(project: ProjectRegistry, jobs: Jobs) -> None:
    http = Client(project, jobs, [])
    asked = http.post(f"/api/projects/{project.key}/train").json()
    assert (asked["job"], asked["state"]) == (1, "queued")
    assert http.post("/api/jobs/1/retry").status_code == 409
    assert http.post("/api/jobs/1/cancel").json()["state"] == "cancelled"
    again = http.post("/api/jobs/1/cancel")
    assert (again.status_code, again.json()["detail"]) == (409, "job 1 has ended: cancelled")
    assert http.post("/api/jobs/1/retry").json()["state"] == "queued"
    assert http.post("/api/jobs/9/cancel").status_code == 404
    assert http.post("/api/projects/5-000000/train").status_code == 404
    for odd in ("/api/projects/..%2Fx/train", f"/api/jobs/{10**30}/cancel", "/api/jobs/x/retry"):
        assert http.post(odd).status_code in (404, 422)


def test_versions_are_rolled_back_and_pinned(project: ProjectRegistry, jobs: Jobs) -> None:
    changed: list[str] = []
    http = Client(project, jobs, changed)
    path = f"/api/projects/{project.key}"
    assert http.post(f"{path}/rollback", json={"version": 1}).json() == {
        "model_version": project.version(1).name,
        "pinned": False,
    }
    assert project.current().number == 1
    assert http.post(f"{path}/pin", json={"version": 2}).json()["pinned"]
    assert http.post(f"{path}/pin", json={"version": None}).json() == {
        "model_version": project.version(2).name,
        "pinned": False,
    }
    assert changed == [project.key] * 3
    missing = http.post(f"{path}/rollback", json={"version": 9})
    assert (missing.status_code, "no version v9" in missing.json()["detail"]) == (409, True)
    assert http.post(f"{path}/rollback", json={"version": "x"}).status_code == 422
    assert http.post(f"{path}/pin", json={"version": 10**300}).status_code == 422
    assert changed == [project.key] * 3


def test_a_backend_that_cannot_train_says_what_it_needs(project: ProjectRegistry) -> None:
    answer = Client(project, None, []).post(f"/api/projects/{project.key}/train")
    assert answer.status_code == 409
    assert "YOLONAS_LABEL_STUDIO_TOKEN" in answer.json()["detail"]
